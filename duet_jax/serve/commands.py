"""`duet serve` and `duet ratings import` on the command line; what computes is imported when they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from duet_jax.errors import ConfigError


def add(commands: Any) -> None:
    """Adds both commands to the command line's."""
    served = commands.add_parser("serve", help="a page where testers chat with a study's models and rate them")
    served.add_argument("folder", type=Path, metavar="STUDY", help="study directory, of a task of kind people")
    served.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    served.add_argument("--port", type=int, default=8000, help="(default: 8000; 0: any that is free)")
    served.add_argument("--rule", metavar="RULE", help="when a trial is told by itself: count=30 or stderr=0.2")
    served.add_argument("--rows", type=int, default=16, help="answers of one model written at once (default: 16)")
    served.add_argument(
        "--keep-conversations", action="store_true", help="write conversations to the study; the page says so"
    )
    served.set_defaults(command=_serve)

    ratings = commands.add_parser("ratings", help="ratings that come from elsewhere").add_subparsers(required=True)
    imported = ratings.add_parser("import", help="add ratings from a file to a study")
    imported.add_argument("file", type=Path, metavar="FILE", help="JSON lines, each with key, trial and stars")
    imported.add_argument("folder", type=Path, metavar="STUDY", help="study directory, of a task of kind people")
    imported.set_defaults(command=_import)


def _serve(options: argparse.Namespace) -> None:
    for name, least, most in (("port", 0, 65535), ("rows", 1, 1024)):
        value = getattr(options, name)
        if not least <= value <= most:
            raise ConfigError(f"--{name} is {value}; it must be from {least} to {most}.")

    from duet_jax.serve.server import serve
    from duet_jax.serve.telling import Rule

    serve(
        options.folder,
        host=options.host,
        port=options.port,
        rows=options.rows,
        rule=None if options.rule is None else Rule.parse(options.rule),
        keep_conversations=options.keep_conversations,
        say=lambda line: print(line, flush=True),
    )


def _import(options: argparse.Namespace) -> None:
    from functools import cache, partial

    from duet_jax.serve.ratings import Ratings, read_votes
    from duet_jax.serve.telling import people_of, rated
    from duet_jax.study import Study

    study = Study.open(options.folder)
    votes = read_votes(options.file, people_of(study.config).stars)
    fresh = Ratings(study.folder).add(votes, cache(partial(rated, study)))
    known = len(fresh) - sum(fresh)
    print(f"{sum(fresh)} ratings added" + (f", {known} were there already" if known else ""))
