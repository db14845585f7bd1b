"""The command line: duet run | ask | tell | info | report | select | curate | prefer | compile | serve |
ratings.

Only the command that computes imports what computes, so that help, `tell` and `info` answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duet_jax import __version__
from duet_jax import config as configs
from duet_jax._checks import nearest
from duet_jax.errors import ConfigError, DuetError, FeedbackError, StudyError
from duet_jax.storage import is_address
from duet_jax.study import Study
from duet_jax.trial import Trial, words

BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    That is 0, 2 for a mistake of input, 130 when interrupted, and 143 when ended by SIGTERM; see also
    `distributed.processes`.
    """
    parser = _parser()
    words = sys.argv[1:] if arguments is None else arguments
    # argparse takes a score such as -1e-3 for an option, unless a space comes first.
    options, rest = parser.parse_known_args([f" {word}" if _is_negative(word) else word for word in words])
    # argparse takes positional arguments in one piece only; overrides and scores may also stand after options.
    if options.command is _tell and options.score is None and len(rest) == 1:
        options.score = _as_score(parser, rest.pop())
    resumable = options.command in (_run, _select, _curate, _prefer)
    takes_overrides = resumable or options.command is _compile
    strays = [word for word in rest if not takes_overrides or word.startswith("-") or "=" not in word]
    if strays:
        parser.error(f"unrecognized arguments: {' '.join(strays)}")
    if rest:
        options.overrides += rest
    try:
        for argument, name in (("folder", "The study"), ("output", "--output"), ("profile", "--profile")):
            _require_folder(name, getattr(options, argument, None))
        options.command(options)
    except DuetError as error:
        print(f"duet: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        # `processes.Stopped`, which is not imported here, is one of another type.
        told = type(stop) is not KeyboardInterrupt
        hint = "; the same command goes on from here" if resumable else ""
        print(f"duet: stopped{' by SIGTERM' if told else ''}{hint}.", file=sys.stderr)
        return TERMINATED if told else INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="duet",
        description="Finds the mixture of data domains that serves an unseen task best, from scores alone.",
        epilog="A study is a directory, or in an object store. It can be stopped at any moment and continued.",
    )
    parser.add_argument("--version", action="version", version=f"duet {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a study to its last round, or continue it")
    run.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; configs/ holds some to start from")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value, as training.epochs=2")
    run.add_argument(
        "--study", type=_place, metavar="DIR", help="study directory, or s3://, gs:// or az:// (default: studies/NAME)"
    )
    run.add_argument(
        "--feedback", choices=["people"], help="instead of its task, people rate the models: duet serve shows them"
    )
    run.add_argument("--worker", metavar="NAME", help="share the study with other processes, each under its own name")
    _cluster_arguments(run)
    run.add_argument("--profile", type=Path, metavar="FOLDER", help="trace a few training steps by JAX's profiler")
    run.add_argument("--quiet", action="store_true", help="print nothing")
    run.set_defaults(command=_run)

    ask = commands.add_parser("ask", help="open a trial and print its mixture, to train it yourself")
    ask.add_argument("folder", type=_place, metavar="DIR", help="study directory or address")
    ask.add_argument("overrides", nargs="*", metavar="key=value", help="of --config, replaces a value; before it")
    ask.add_argument("--config", type=Path, metavar="FILE", help="YAML of a study, begun here if there is none")
    ask.set_defaults(command=_ask)

    tell = commands.add_parser("tell", help="record the feedback of a trial")
    tell.add_argument("folder", type=_place, metavar="DIR", help="study directory or address")
    tell.add_argument("trial", type=int, metavar="TRIAL", help="number of the trial, from 0")
    tell.add_argument("score", type=float, nargs="?", metavar="SCORE", help="its feedback, higher is better")
    tell.add_argument("--stderr", type=float, metavar="S", help="standard error of the score, if known")
    tell.add_argument("--ratings", action="store_true", help="instead of a score: what its ratings by people say")
    tell.add_argument(
        "--failed", metavar="REASON", help="instead of a score: something outside went wrong, it may be proposed again"
    )
    tell.add_argument("--abandoned", metavar="REASON", help="instead of a score: it must not be proposed again")
    tell.set_defaults(command=_tell)

    info = commands.add_parser("info", help="show a study")
    info.add_argument("folder", type=_place, metavar="DIR", help="study directory or address")
    info.add_argument("--json", action="store_true", help="print everything, for programs")
    info.set_defaults(command=_info)

    report = commands.add_parser("report", help="write a study or a selection as one HTML page")
    report.add_argument(
        "folder", type=_place, metavar="DIR", help="study directory or address, or a selection's folder"
    )
    report.add_argument("--output", type=Path, metavar="FILE", help="(default: DIR/report.html)")
    report.set_defaults(command=_report)

    jobs = (
        ("select", "score and choose training examples, without a study", "count=500", "selections", _select),
        ("curate", "make data or weights of a model's mistakes, samples or doubts", "seed=1", "curated", _curate),
        (
            "prefer",
            "train on pairs of responses, or on a model's own replies",
            "loss.beta=0.05",
            "preferences",
            _prefer,
        ),
    )
    for name, does, example, place, command in jobs:
        job = commands.add_parser(name, help=does)
        job.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; configs/ holds some to start from")
        job.add_argument("overrides", nargs="*", metavar="key=value", help=f"replaces a value, as {example}")
        job.add_argument("--output", type=Path, metavar="DIR", help=f"where to (default: {place}/NAME)")
        job.add_argument("--quiet", action="store_true", help="print nothing")
        if command is _select:
            _cluster_arguments(job)
        job.set_defaults(command=command)
    _compile_arguments(commands)

    from duet_jax.serve.commands import add

    add(commands)
    return parser


def _cluster_arguments(job: argparse.ArgumentParser) -> None:
    where = "one run of several processes, each started so: auto on a TPU pod, under SLURM, Open MPI and Kubernetes, "
    job.add_argument("--cluster", metavar="auto|HOST:PORT", help=f"{where}elsewhere where the first one listens")
    job.add_argument("--processes", type=int, metavar="N", help="with HOST:PORT: how many there are")
    job.add_argument("--process", type=int, metavar="I", help="with HOST:PORT: which one this is, from 0")


def _compile_arguments(commands: Any) -> None:
    job = commands.add_parser("compile", help="compile a study's programs for a TPU slice, without having one")
    job.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; configs/pod_*.yaml are for slices")
    job.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value, as training.batch_size=64")
    job.add_argument("--topology", required=True, metavar="KIND:SHAPE", help="the slice, as v5e:4x4 or v5p:2x4x4")
    job.add_argument("--mfu", type=float, default=0.5, metavar="SHARE", help="of the peak, in products (default: 0.5)")
    job.add_argument("--no-largest", action="store_true", help="do not look for the largest batch that fits")
    job.add_argument("--json", type=Path, metavar="FILE", help="also writes all numbers there")
    job.set_defaults(command=_compile)


def _run(options: argparse.Namespace) -> None:
    asked = ["task={kind: people}"] if options.feedback == "people" else []
    config = configs.load(_found(options.config), [*asked, *options.overrides])
    folder = options.study or Path("studies") / config.name

    from duet_jax.distributed import processes

    with processes.joined(options.cluster, options.processes, options.process):
        from duet_jax import duet

        duet.run(config, folder, options.quiet, options.worker, options.profile)


def _select(options: argparse.Namespace) -> None:
    config = configs.load_selection(_found(options.config), options.overrides)

    from duet_jax.distributed import processes

    with processes.joined(options.cluster, options.processes, options.process):
        from duet_jax.select import select

        select(config, options.output or Path("selections") / config.name, options.quiet)


def _curate(options: argparse.Namespace) -> None:
    config = configs.load_curation(_found(options.config), options.overrides)

    from duet_jax.distributed import processes

    with processes.joined():
        from duet_jax.curate import curate

        curate(config, options.output or Path("curated") / config.name, options.quiet)


def _prefer(options: argparse.Namespace) -> None:
    config = configs.load_preference(_found(options.config), options.overrides)

    from duet_jax.distributed import processes

    with processes.joined():
        from duet_jax.prefer import prefer

        prefer(config, options.output or Path("preferences") / config.name, options.quiet)


def _compile(options: argparse.Namespace) -> None:
    config = configs.load(_found(options.config), options.overrides)
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu is {options.mfu:g}; it must be greater than 0, and at most 1.")
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"--json is {options.json}, but there is no folder {options.json.parent}; make it first.")

    from duet_jax.distributed import topology

    slice_ = topology.parse(options.topology)
    # Before anything asks JAX for its devices.
    topology.prepare()

    from duet_jax.compile import compile_study

    compile_study(config, slice_, mfu=options.mfu, find_largest=not options.no_largest, output=options.json)


def _ask(options: argparse.Namespace) -> None:
    if options.config is not None:
        Study.begin(options.folder, configs.load(_found(options.config), options.overrides))
    elif options.overrides:
        raise ConfigError(f"{options.overrides[0]} goes with --config FILE; give that, or leave it out.")
    Study.open(options.folder)

    from duet_jax import duet

    trial = duet.ask(options.folder)
    answer = {"trial": trial.trial, "mixture": dict(trial.mixture), "counts": dict(trial.counts)}
    print(json.dumps(answer | ({"settings": dict(trial.settings)} if trial.settings else {})))


def _tell(options: argparse.Namespace) -> None:
    if [options.score, options.failed, options.abandoned, options.ratings or None].count(None) != 3:
        raise FeedbackError("A trial is told one thing: a score, --failed REASON, --abandoned REASON or --ratings.")
    if options.score is None and options.stderr is not None:
        raise FeedbackError("--stderr is of a score; leave it out.")
    study = Study.open(options.folder)
    if options.ratings:
        from duet_jax.serve.ratings import Ratings
        from duet_jax.serve.telling import tell

        _print_told(study, tell(study, Ratings(study.folder), options.trial))
        return
    if options.score is None:
        close, reason = (
            (study.fail, options.failed) if options.abandoned is None else (study.abandon, options.abandoned)
        )
        trial = close(options.trial, reason.strip())
        print(f"trial {trial.trial}: {trial.status}, {_progress(study)}")
        return
    _print_told(study, study.tell(options.trial, options.score, options.stderr))


def _print_told(study: Study, trial: Trial) -> None:
    assert trial.feedback is not None
    print(f"trial {trial.trial}: feedback {trial.feedback['value']:g} recorded, {_progress(study)}")


def _info(options: argparse.Namespace) -> None:
    study = Study.open(options.folder)
    if options.json:
        print(json.dumps(_strict(_whole(study)), indent=1, ensure_ascii=False))
    else:
        _print_table(study)


def _report(options: argparse.Namespace) -> None:
    picked = isinstance(options.folder, Path) and (options.folder / "selection.json").is_file()
    if not picked:
        Study.open(options.folder)

    from duet_jax.report import write_report, write_selection

    print(write_selection(options.folder, options.output) if picked else write_report(options.folder, options.output))


def _found(path: Path) -> Path:
    """The path of a file that is there; else says which configurations the package brings, the likeliest first."""
    if path.is_file():
        return path
    folder = importlib.resources.files("duet_jax.configs")
    found = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    meant = nearest(path.name, found)
    advice = f"did you mean {folder / meant}?" if meant else f"{folder} holds {', '.join(found)}."
    raise ConfigError(f"There is no file {path}; {advice if found else 'give a YAML file.'}")


def _place(word: str) -> str | Path:
    """A study's place: an address stays as it is, since a path would lose one slash of it."""
    if re.match(r"(s3|gs|az|file):/[^/]", word):
        raise argparse.ArgumentTypeError(f"{word} has one slash; an address is {word.replace(':/', '://', 1)}")
    return word if is_address(word) else Path(word)


def _require_folder(name: str, folder: str | Path | None) -> None:
    """Refuses the address of a bucket where a path was read, which has lost one slash of it."""
    if isinstance(folder, Path) and re.match(r"[A-Za-z][\w+.-]+:/", str(folder)):
        address = str(folder).replace(":/", "://", 1)
        raise StudyError(f"{name} is {address}; this needs a file system, so give a path.")


def _is_negative(word: str) -> bool:
    try:
        return word.startswith("-") and float(word) <= 0
    except ValueError:
        return False


def _as_score(parser: argparse.ArgumentParser, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        parser.error(f"the score is {word!r}; it must be a number")


def _best(trials: Sequence[Trial]) -> Trial | None:
    told = [trial for trial in trials if trial.feedback is not None]
    return max(told, key=lambda trial: trial.feedback["value"], default=None)  # type: ignore[index]


def _progress(study: Study) -> str:
    return f"{len(study.completed())} of {study.config.rounds} rounds have feedback"


def _whole(study: Study) -> dict[str, Any]:
    trials = study.trials()
    best = _best(trials)
    return {
        "study": study.address,
        "config": dataclasses.asdict(study.config),
        "domains": list(study.domain_names),
        "trials": [dataclasses.asdict(trial) for trial in trials],
        "highest": None if best is None else best.trial,
    }


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(study: Study) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    trials = study.trials()
    best = _best(trials)
    table = Table(box=box.SIMPLE_HEAD)
    columns = list(dict.fromkeys(name for trial in trials for name in words(trial.settings)))
    for title in ("trial", *study.domain_names, *columns, "loss", "feedback", ""):
        table.add_column(Text(title), justify="left" if title == "" else "right")
    for trial in trials:
        shares = [f"{trial.mixture[name]:.0%}" if trial.mixture[name] else "·" for name in study.domain_names]
        loss = "" if trial.training is None else f"{trial.training['loss']:.3f}"
        stage = trial.stage if trial.worker is None else f"{trial.stage} by {trial.worker}"
        state = stage if trial.status == "pending" else f"{trial.status}: {trial.error}" if trial.error else ""
        state = "highest so far" if trial is best else state
        chosen = [words(trial.settings).get(name, "") for name in columns]
        cells = [str(trial.trial), *shares, *chosen, loss, _score(trial), state]
        table.add_row(*map(Text, cells), style="bold" if trial is best else None)
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{study.config.name}: {_progress(study)}"))
    if trials:
        # A table that is wider than the terminal is better than one with numbers cut off.
        console.width = max(
            console.width, console.measure(table, options=console.options.update(max_width=9999)).maximum
        )
        console.print(table)


def _score(trial: Trial) -> str:
    if trial.feedback is None:
        return ""
    stderr = trial.feedback["stderr"]
    return f"{trial.feedback['value']:.4g}" + ("" if stderr is None else f" ± {stderr:.2g}")


if __name__ == "__main__":
    sys.exit(main())
