"""What of each benchmark's JSON the page of results shows as tables, by the result's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from page_cells import Column, Row, Table, all_mappings, cell, named, records, table
from page_studies import curation, replay, selector_study

GB, GIB = 1e9, 2**30


def _of_seeds(data: Row) -> list[Table]:
    """Arms by measure: mean and standard deviation over the seeds."""
    found, tables = data["mean_and_deviation"], []
    # Of some benchmarks there are several parts, each of arms or of measures alone.
    deep = any(all_mappings(arm) for arm in found.values())
    for caption, part in (found if deep else {"": found}).items():
        arms = named(part) if all_mappings(part) else [{"name": "", **part}]
        columns: dict[str, Column] = {"": ("name", "")} | {name: (name, "short") for row in arms for name in row}
        del columns["name"]
        tables.append(table(caption.capitalize(), arms, columns))
    return [*tables, Table("", ["seeds", "peak GiB"], [[str(len(data["runs"])), cell(data["peak_gib"], ".1f")]])]


def _aot(data: Row) -> list[Table]:
    mesh = ", ".join(f"{name} {size}" for name, size in data["mesh"].items())
    model = {**data, "shape": mesh, "limit": data["chip"]["memory"] / GIB, "of": data["round"]}
    return [
        table(
            "",
            [model],
            {
                **{name: (name, "") for name in ("model", "method", "rank", "topology", "chips")},
                "mesh": ("shape", ""),
                "GiB a chip": ("limit", ".2f"),
                "steps a round": ("of.steps", ""),
                "least seconds a round": ("of.seconds", ".0f"),
            },
        ),
        table(
            "Of one chip, as the compiler counts it:",
            data["programs"],
            {
                **{name: (name, "") for name in ("program", "rows", "length")},
                "GiB": (lambda row: row["memory"] / GIB, ".1f"),
                "fits": ("fits", ""),
                "largest rows": ("largest_rows", ""),
                "TFLOP": (lambda row: row["flops"] / 1e12, ".3g"),
                "GB moved": (lambda row: row["traffic"] / GB, ".3g"),
                "least seconds": ("estimate.seconds", ".2g"),
                "bound by": ("estimate.bound", ""),
            },
        ),
    ]


def _domains(data: Row) -> list[Table]:
    def shares(row: Row) -> str:
        return ", ".join(f"{name} {share:.0%}" for name, share in row.get("shares", {}).items() if share > 0)

    columns: dict[str, Column] = {
        "trained on": ("mixture", ""),
        "value": ("value", ".3f"),
        "of each seed": (lambda row: ", ".join(f"{value:.3f}" for value in row["values"]), ""),
        "error of the task": ("stderr", ".3f"),
        "mixture": (shares, ""),
    }
    about = {
        "rounds": ("rounds", ""),
        "examples a round": ("budget", ""),
        "seconds of the study": ("study_seconds", ".0f"),
    }
    return [table("", data["rows"], columns), table("", [data], about)]


def _regret(data: Row) -> list[Table]:
    columns: dict[str, Column] = {"beside": ("name", "")} | {name: (name, "") for name in ("cells", "studies")}
    columns |= {"less regret": ("won", ""), "no different": ("tied", ""), "more": ("lost", "")}
    columns["ratio of regrets, geometric mean"] = (lambda row: 10 ** row["difference"], ".2f")
    columns["95%"] = (lambda row: " to ".join(f"{10**end:.2f}" for end in row["interval"]), "")
    methods = list(data["rivals"])
    cells: dict[str, Column] = {name: (name, "") for name in ("objective", "domains", "feedback")}
    cells |= {name: (f"{name}.log10_regret", ".2f") for name in ("search", *methods)}
    return [
        table("", named(data["rivals"]), columns),
        table("Mean of the logarithm (10) of the regret in every cell:", data["cells"], cells),
    ]


def _speed(data: Row) -> list[Table]:
    sizes: dict[str, Column] = {"domains": ("domains", ""), "scores": ("observations", "")}
    steps = {
        "ours, ms": ("ours.wall_ms", ".1f"),
        "DUET's settings, times that": ("ratio_duet.wall_ms", ".0f"),
        "tuned": ("ratio_tuned.wall_ms", ".0f"),
        "DUET's settings, CPU": ("ratio_duet.cpu_ms", ".0f"),
        "tuned, CPU": ("ratio_tuned.cpu_ms", ".0f"),
    }
    first = {"empty cache, s": ("empty_cache.step_s", ".1f"), "programs on disk, s": ("warm_cache.step_s", ".1f")}
    studies = {"domains": ("domains", ""), "rounds": ("rounds", ""), "studies": ("seeds", "")}
    studies |= {"with compilation, s": ("first_s", ".1f"), "again, s": ("again_s", ".1f")}
    return [
        table("A warm step beside BoTorch:", data["steps"], sizes | steps),
        table("The first step of a process:", data["first_calls"], sizes | first),
        table("Whole studies in one program:", [data["studies"]] if data["studies"] else [], studies),
    ]


def _search_table(data: Row) -> list[Table]:
    tried = {name: (name, "") for name in ("target", "method")} | {"rows tried, median": ("median", "")}
    tried |= {"95%": (lambda row: " to ".join(cell(end) for end in row["interval"]), ""), "never": ("never", "")}
    fits = {name: (name, "") for name in ("target", "method", "observations")}
    fits |= {f"within {share}%": (f"cover{share}", ".0%") for share in (50, 80, 95)}
    fits |= {name: (name, ".2f") for name in ("nrmse", "spearman", "nlpd")}
    return [
        table("Until one of the best 1% is found:", data["searches"], tried),
        table("Held-out rows as expected:", data["calibrations"], fits),
    ]


def _quality(data: Row) -> list[Table]:
    columns = {"": ("name", ""), "linear datamodeling score": (lambda row: _pair(row, "lds", "lds_error"), ".2f")}
    columns |= {"area under the curve": ("auroc", ".2f")}
    return [table(f"{name.capitalize()}:", named(rows), columns) for name, rows in data["results"].items()]


def _pair(row: Row, value: str, error: str) -> list[Any] | None:
    return None if row.get(value) is None else [row[value], row.get(error)]


def _sketching_peers(data: Row) -> list[Table]:
    speed = {name: (name, "") for name in ("tool", "feature", "dtype")}
    speed |= {"examples/s": ("examples_per_s", ".2f"), "CPU s an example": ("cpu_s_per_example", ".2f")}
    speed |= {"of limit": ("of_limit", ".0%"), "peak GB": ("process_gb", ".1f"), "bytes a row": ("bytes", "")}
    errors = {name: (name, "") for name in ("tool", "feature", "rows")} | {"bytes a row": ("bytes", "")}
    errors |= {"error of a cosine": ("rmse", ".4f"), "rank correlation": ("spearman", ".3f")}
    goals = {"goal": ("what", ""), "reached": ("value", ".2f"), "wanted": ("target", ""), "met": ("reached", "")}
    return [
        table("Speed:", data["rows"], speed),
        table("What stored rows are worth:", data["errors"], errors),
        table("Goals that were set before:", data["targets"], goals),
    ]


def _generation(data: Row) -> list[Table]:
    columns = {
        "case": ("case", ""),
        "dtype": ("dtype", ""),
        "tokens/s": ("tokens_per_s", ".0f"),
        "transformers": ("transformers_tokens_per_s", ".0f"),
        "ratio": ("ratio", ".1f"),
        "of what memory allows": ("share_of_memory", ".0%"),
        "of what large products allow": ("share_of_products", ".0%"),
        "our products alone": ("products_alone_tokens_per_s", ".0f"),
        "torch's": ("torch_products_alone_tokens_per_s", ".0f"),
    }
    return [table("", data["cases"], columns)]


def _scoring(data: Row) -> list[Table]:
    columns = {
        "dtype": ("dtype", ""),
        "examples/s": ("examples_per_s", ".2f"),
        "transformers": ("transformers_examples_per_s", ".2f"),
        "ratio": ("transformers_ratio", ".2f"),
        "transformers, sorted by length": ("transformers_sorted_examples_per_s", ".2f"),
        "ratio to that": ("transformers_sorted_ratio", ".2f"),
        "of large products": ("share_of_products", ".0%"),
        "padding": ("padding", ".0%"),
        "largest difference a token, nats": ("largest_difference_a_token", ".1g"),
    }
    return [table("", data["cases"], columns), *records({"data": data["data"]}, ())]


def _confidence(data: Row) -> list[Table]:
    signals = {"signal": ("name", ""), "area under the curve": ("auroc", ".2f"), "kept": ("kept", ".0%")}
    signals |= {"wrong among the kept": ("noise_of_kept", ".0%")}
    speed = {"wrong of all": ("noise", ".0%"), "examples/s": ("examples_per_s", ".2f")}
    speed |= {"transformers": ("transformers_examples_per_s", ".3f"), "ratio": ("ratio", ".1f")}
    speed |= {"largest difference of a probability": ("largest_difference", ".1g")}
    return [table("", named(data["signals"]), signals), table("", [data], speed)]


def _diversity(data: Row) -> list[Table]:
    columns = {
        "search": ("name", ""),
        "ours, s": ("ours_s", ".3f"),
        "plain, s": ("plain_s", ".3g"),
        "ratio": ("ratio", ".0f"),
        "compilation, s": ("compile_s", ".2f"),
        "same order": ("same_order", ""),
    }
    return [table("", named(data["searches"]), columns)]


def _quickstart(data: Row) -> list[Table]:
    rows = [*data["rows"], {"seed": "median", **data["median"]}]
    columns = {
        "seed": ("seed", ""),
        "distance from the best": ("distance", ".2f"),
        "uniform mixture": ("uniform", ".3f"),
    }
    return [table("", rows, columns | {"best found": ("best", ".3f"), "seconds": ("seconds", ".0f")})]


def _training(data: Row) -> list[Table]:
    columns = {"": ("who", ""), "trained": ("method", ""), "tokens/s": ("tokens_per_s", ".0f")}
    return [
        table("", data["rows"], columns | {"peak GB": ("peak_gb", ".1f"), "first step, s": ("first_step_s", ".1f")})
    ]


def _sketching(data: Row) -> list[Table]:
    bare = next((row["seconds"] for row in data["rows"] if row["kind"] == "bare"), None)
    batch = data["settings"]["batch"]
    columns: dict[str, Column] = {
        "": ("kind", ""),
        "examples/s": (lambda row: batch / row["seconds"], ".2f"),
        "of the bare pass's rate": (lambda row: bare and bare / row["seconds"], ".0%"),
        "CPU seconds": ("cpu_seconds", ".1f"),
        "peak GB": ("peak_gb", ".1f"),
    }
    return [table("", data["rows"], columns)]


def _panel_study(data: Row) -> list[Table]:
    rows = [*data["rows"], {"seed": "median", **data["median"]}]
    columns: dict[str, Column] = {"seed": ("seed", "")}
    for name, words in (("exact", "its own feedback"), ("people", "people's stars")):
        columns[f"{words}: distance"] = (f"{name}.distance", ".2f")
        columns[f"{words}: regret, nats"] = (f"{name}.regret", ".3f")
        columns[f"{words}: share lost"] = (f"{name}.share", ".1%")
    return [table("", rows, columns)]


def _weak_scaling(data: Row) -> list[Table]:
    rows = []
    for job in data["jobs"]:
        grown = {f"{at['chips'] // job['slice'][0]['chips']} times the chips": at["exposed"] for at in job["slice"]}
        rows.append({**job, **grown} | {f"{at['slices']} slices": at["overlapped"] for at in job["slices"]})
    columns: dict[str, Column] = {"job": ("job", ""), "program": ("program", "")}
    columns |= {name: (name, ".0%") for row in rows for name in row if name.endswith((" chips", " slices"))}
    said = "Efficiency, as a share: of one slice where nothing that is sent is hidden, of several where all of it is."
    return [table(said, rows, columns)]


def _attention(data: Row) -> list[Table]:
    columns = {
        "length": ("length", ""),
        "batch": ("batch", ""),
        "ours, CPU ms": (lambda row: 1e3 * row["ours_s"], ".0f"),
    }
    columns |= {"jax.nn, CPU ms": (lambda row: 1e3 * row["library_s"], ".0f")}
    columns |= {
        "ratio": (lambda row: row["library_s"] / row["ours_s"], ".1f"),
        "largest difference": ("difference", ".1g"),
    }
    return [table("", data["rows"], columns)]


def _store(data: Row) -> list[Table]:
    columns = {
        "k": ("k", ""),
        "rows": ("format", ""),
        "queries": ("query_format", ""),
        "bytes a row": ("bytes_per_row", ".0f"),
        "written rows/s": ("write_rows_per_s", ".0f"),
        "scored rows/s": ("score_rows_per_s", ".0f"),
        "rank correlation with exact cosines": ("spearman_exact", ".4f"),
        "the same of the best 5%, overlap": ("overlap_exact", ".3f"),
    }
    return [table("", data["rows"], columns)]


def _acquisition(data: Row) -> list[Table]:
    columns = {"domains": ("domains", ""), "posteriors": ("posteriors", ""), "within": ("within", ".1%")}
    return [
        table("", data["rows"], columns | {"worst gap": ("worst_gap", ".1g"), "gap of draws": ("draws_gap", ".1g")})
    ]


TABLES: dict[str, Callable[[Row], list[Table]]] = {
    "aot": _aot,
    "domains": _domains,
    "search_regret": _regret,
    "search_speed": _speed,
    "search_table": _search_table,
    "search_acquisition": _acquisition,
    "attribution_quality": _quality,
    "attention": _attention,
    "panel_study": _panel_study,
    "weak_scaling": _weak_scaling,
    "store": _store,
    "sketching": _sketching,
    "sketching_peers": _sketching_peers,
    "generation": _generation,
    "scoring": _scoring,
    "curation": curation,
    "confidence": _confidence,
    "diversity": _diversity,
    "quickstart": _quickstart,
    "replay": replay,
    "selector_study": selector_study,
    "training": _training,
    **{name: _of_seeds for name in ("nice", "davir", "preference", "clear")},
}
