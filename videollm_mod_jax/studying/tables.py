"""The report of a study as Markdown, made from nothing but its result files."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from videollm_mod_jax.studying import orderings
from videollm_mod_jax.studying.variants import FULL, MOD, TABLES, Table, Variant

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""By variant and seed, what `running.run_variant` gave; {"failed": message} of one that failed."""

NOT_RUN, ABSENT = "not run", "-"
METRICS = ("lm_ppl", "time_diff", "fluency", "lm_correctness")
_TITLES = {
    "lm_ppl": "LM-PPL ↓",
    "time_diff": "TimeDiff ↓",
    "fluency": "Fluency ↑",
    "lm_correctness": "LM-Corr ↑",
}
_HIGHER = ("fluency", "lm_correctness")
# Digits behind the point, and what a number is multiplied by.
_SHOWN = {"lm_ppl": (2, 1), "time_diff": (2, 1), "fluency": (1, 100), "lm_correctness": (1, 100)}


def values(results: Results, read: Callable[[Mapping[str, Any]], float | None]) -> Any:
    """A number by variant and seed, of the runs that have it."""
    out: dict[str, dict[int, float]] = {}
    for name, runs in results.items():
        for seed, run in runs.items():
            value = None if "failed" in run else read(run)
            if value is not None:
                out.setdefault(name, {})[seed] = value
    return out


def metric(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Reads a teacher-forced metric of a run."""
    return lambda run: run["teacher_forced"].get(name)


def spread(numbers: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """Mean and sample standard deviation over seeds: "71.2 ± 0.8"; "not run" of none."""
    if not numbers:
        return NOT_RUN
    text = f"{scale * statistics.fmean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {scale * statistics.stdev(numbers):.{digits}f}"
    return text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def report(
    variants: Mapping[str, Variant],
    results: Results,
    measured: Mapping[str, Any] | None,
    baselines: Mapping[str, Mapping[str, float]] | None,
    setting: Mapping[str, Any],
) -> str:
    """The whole report.

    Args:
      variants: by name.
      results: of the runs that there are.
      measured: what `measuring.measure_all` gave; None if it was not run.
      baselines: what `baselines.baselines` gave; None if it was not run.
      setting: of the study: `command`, `seeds`, `steps`, `seconds`, and what else is to be stated,
        in the order in which it is listed.
    """
    costs = measured["variants"] if measured else {}
    parts = [
        "# The paper's study in miniature",
        "VideoLLM-MoD (arXiv 2408.16730) asks which vision tokens a layer should compute, in which "
        "layers, and how many. Here the same questions are put to small models on "
        "`digits_scenes`: small digits that no patch shows whole, among turned scans and clutter. "
        "Everything below was written by the command; ± is the standard deviation over seeds.",
        _setting(setting, measured),
        "## Orderings",
        _orderings(results),
        *(_table(table, variants, results, costs) for table in TABLES),
        "## Without looking",
        _baselines(baselines),
        "## With its own words as history",
        _self_conditioned(variants, results),
        "## What is kept",
        _kept(variants, results),
        "## What it costs",
        _costs(variants, costs),
    ]
    failed = _failed(results)
    if failed:
        parts += ["## Runs that failed", failed]
    return "\n\n".join(parts) + "\n"


def _setting(setting: Mapping[str, Any], measured: Mapping[str, Any] | None) -> str:
    lines = [f"- {name}: {value}" for name, value in setting.items()]
    if measured:
        device = measured["device"]
        versions = device["versions"]
        lines.append(
            f"- measured on: {device['kind']}, {device['host_cores']} cores, "
            f"jax {versions.get('jax')}"
        )
    return "\n".join(lines)


def _table(
    table: Table,
    variants: Mapping[str, Variant],
    results: Results,
    costs: Mapping[str, Any],
) -> str:
    header = ["", "MACs", *(f"{_TITLES[m]}" for m in METRICS), "paper: TFLOPs"]
    header += [f"paper: {_TITLES[m]}" for m in METRICS]
    rows = []
    for name in table.rows:
        variant = variants[name]
        cells = [variant.title, _ratio(costs, name, lambda cost: cost["count"]["macs"])]
        for m in METRICS:
            numbers = list(values(results, metric(m)).get(name, {}).values())
            cells.append(spread(numbers, *_SHOWN[m]))
        cells.append(_published(variant.published.tflops, 2))
        cells += [_published(getattr(variant.published, m), _SHOWN[m][0]) for m in METRICS]
        rows.append(cells)
    note = "MACs: multiply-adds of the decoder's linears, relative to full computation."
    return f"## {table.name}\n\n{table.text} {note}\n\n{markdown(header, rows)}"


def _published(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def _ratio(costs: Mapping[str, Any], name: str, read: Callable[[Mapping[str, Any]], float]) -> str:
    if name not in costs or FULL not in costs:
        return NOT_RUN
    return f"{read(costs[name]) / read(costs[FULL]):.2f}"


def _orderings(results: Results) -> str:
    header = ["claim", "by", "difference", "95% interval", "seeds", "verdict"]
    rows = []
    for ordering in orderings.ORDERINGS:
        for name in ("lm_correctness", "fluency", "lm_ppl"):
            judged = orderings.judge(
                ordering, values(results, metric(name)), higher_is_better=name in _HIGHER
            )
            scale, digits = (100, 1) if name in _HIGHER else (1, 3)
            numbers = (judged.difference, judged.interval)
            shown = [ABSENT if x is None else f"{scale * x:.{digits}f}" for x in numbers]
            shown[1] = shown[1] if shown[1] == ABSENT else f"± {shown[1]}"
            rows.append(
                [ordering.text, _TITLES[name][:-2], *shown, str(judged.seeds), judged.verdict]
            )
    text = (
        "Differences are taken seed by seed, positive where the claim points; intervals are "
        "Student's t over the seeds. A claim holds where its whole interval is on the right side."
    )
    return f"{text}\n\n{markdown(header, rows)}"


def _baselines(baselines: Mapping[str, Mapping[str, float]] | None) -> str:
    if baselines is None:
        return NOT_RUN
    rows = []
    for name, scores in baselines.items():
        rows.append([name, *(spread([scores[m]], *_SHOWN[m]) for m in METRICS)])
    text = (
        "All three say, after every true beginning of an answer, the token that most often came "
        "next in the training streams, given the question."
    )
    return f"{text}\n\n{markdown(['', *(_TITLES[m] for m in METRICS)], rows)}"


def _self_conditioned(variants: Mapping[str, Variant], results: Results) -> str:
    columns = {
        "F1": lambda run: run["self_conditioned"].get("f1"),
        "F1 within a frame": lambda run: run["self_conditioned"].get("f1_in_window"),
        "CIDEr": lambda run: run["self_conditioned"].get("cider"),
        "questions answered": lambda run: run.get("answers"),
    }
    rows = []
    for name, variant in variants.items():
        cells = [variant.title]
        for column, read in columns.items():
            numbers = list(values(results, read).get(name, {}).values())
            scale, digits = (1, 2) if column == "CIDEr" else (100, 1)
            cells.append(spread(numbers, digits, scale))
        rows.append(cells)
    return markdown(["", *columns], rows)


def _kept(variants: Mapping[str, Variant], results: Results) -> str:
    rows = []
    for name, variant in variants.items():
        runs = [run for run in results.get(name, {}).values() if run.get("kept")]
        rows += [
            [variant.title, layer, *_kept_cells([run["kept"][layer] for run in runs])]
            for layer in sorted({layer for run in runs for layer in run["kept"]}, key=int)
        ]
    if not rows:
        return NOT_RUN
    text = (
        "Per cent of the spatial tokens kept by a learned router that show a digit, beside what "
        "chance would give; how much more often than by chance they are the last patch of a digit "
        "in reading order, the only one that can have seen all of it, attention being causal; and "
        "per cent of the frames whose CLS token is kept."
    )
    header = ["", "layer", "on digits", "chance", "ratio", "last patch: ratio", "CLS kept"]
    return f"{text}\n\n{markdown(header, rows)}"


def _kept_cells(kept: Sequence[Mapping[str, float]]) -> list[str]:
    """Share, chance, both ratios and summary of a layer over seeds."""
    share, chance, ratio, last_ratio, summary = (
        [one[key] for one in kept] for key in ("share", "chance", "ratio", "last_ratio", "summary")
    )
    return [
        spread(share, 1, 100),
        spread(chance[:1], 1, 100),
        spread(ratio, 2),
        spread(last_ratio, 2),
        spread(summary, 1, 100),
    ]


def _costs(variants: Mapping[str, Variant], costs: Mapping[str, Any]) -> str:
    if not costs:
        return NOT_RUN
    header = ["", "kept by layer", "MACs", "FLOPs counted", "FLOPs compiled", "step time"]
    header += ["step memory", "cache", "frame time", "frame memory", "step, ms", "frame, ms"]
    reads = (
        lambda cost: cost["count"]["macs"],
        lambda cost: cost["count"]["flops"],
        lambda cost: cost["compiled_flops"],
        lambda cost: cost["step"]["median"],
        lambda cost: cost["peak_bytes"],
        lambda cost: cost["count"]["cache_bytes"],
        lambda cost: cost["frame"]["median"],
        lambda cost: cost["frame_bytes"],
    )
    rows = []
    for name, variant in variants.items():
        if name not in costs:
            continue
        cost = costs[name]
        kept = " ".join("·" if keep is None else str(keep) for keep in cost["count"]["kept"])
        row = [variant.title, kept, *(_ratio(costs, name, read) for read in reads)]
        rows.append([*row, *(_milliseconds(cost[key]) for key in ("step", "frame"))])
    text = (
        "Ratios to full computation; times are medians of calls in turn (± interquartile range); "
        "memory is the compiler's: of the training step, and what a frame's step of a stream "
        "holds. · is a layer that computes everything."
    )
    return f"{text}\n\n{markdown(header, rows)}\n\n{_explained(costs)}"


def _milliseconds(timing: Mapping[str, float]) -> str:
    return f"{1e3 * timing['median']:.1f} ± {1e3 * timing['spread']:.1f}"


def _explained(costs: Mapping[str, Any]) -> str:
    """What of the difference between the ratios of arithmetic and of time can be read off."""
    if MOD not in costs or FULL not in costs:
        return NOT_RUN
    mod, full = costs[MOD], costs[FULL]
    lines = []
    for text, read in (
        ("multiply-adds of the linears", lambda cost: cost["count"]["macs"]),
        ("operations of the compiled step", lambda cost: cost["compiled_flops"]),
        ("time of the step", lambda cost: cost["step"]["median"]),
    ):
        lines.append(f"{text} {read(mod) / read(full):.2f}")
    rates = [1e-9 * cost["compiled_flops"] / cost["step"]["median"] for cost in (full, mod)]
    return (
        f"VideoLLM-MoD to full computation: {', '.join(lines)}. Between the first two lie what "
        "routing does not touch (output head, connector, optimizer) and attention, which falls "
        "with the square of the rows; between the last two, how fast the operations run: "
        f"{rates[0]:.1f} GFLOP/s in full computation and {rates[1]:.1f} in VideoLLM-MoD."
    )


def _failed(results: Results) -> str:
    return "\n".join(
        f"- {name}, seed {seed}: {run['failed']}"
        for name, runs in results.items()
        for seed, run in runs.items()
        if "failed" in run
    )
