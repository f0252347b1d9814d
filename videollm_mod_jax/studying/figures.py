"""The figures of a study: quality against cost, which layers, which tokens, how many."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from videollm_mod_jax.data.files import written_aside
from videollm_mod_jax.studying.tables import Results, metric, values
from videollm_mod_jax.studying.variants import FULL, MOD, TABLES, Variant

_METRIC, _LABEL = "lm_correctness", "LM-Correctness, %"


def draw(
    variants: Mapping[str, Variant], results: Results, measured: Mapping[str, Any] | None, out: Path
) -> list[Path]:
    """Draws what the results allow; returns the files."""
    paths = []
    for index, table in enumerate(TABLES, 1):
        rows = [name for name in table.rows if name in results]
        if rows:
            title = table.name
            paths.append(_bars(variants, results, rows, title, out / f"table-{index}.png"))
    if measured:
        paths.append(_trade(variants, results, measured["variants"], out / "trade-off.png"))
        paths.append(_ratios(variants, measured["variants"], out / "cost-ratios.png"))
    kept = [name for name, runs in results.items() if any(run.get("kept") for run in runs.values())]
    if kept:
        paths.append(_kept(variants, results, kept, out / "kept.png"))
    return paths


def _numbers(results: Results, name: str) -> list[float]:
    return [100 * value for value in values(results, metric(_METRIC)).get(name, {}).values()]


def _bars(
    variants: Mapping[str, Variant],
    results: Results,
    names: Sequence[str],
    title: str,
    path: Path,
) -> Path:
    """A dot per seed and a bar for the mean, with full computation as a line."""
    figure, axes = _figure(7, 0.5 * len(names) + 1.6)
    for row, name in enumerate(names):
        numbers = _numbers(results, name)
        if numbers:
            axes.barh(row, statistics.fmean(numbers), color="tab:blue", alpha=0.35)
            axes.plot(numbers, [row] * len(numbers), "o", color="tab:blue", markersize=4)
    full = _numbers(results, FULL)
    if full:
        axes.axvline(statistics.fmean(full), color="tab:gray", linestyle="--", label="full")
        axes.legend(loc="lower right")
    axes.set_yticks(range(len(names)), [variants[name].title for name in names])
    axes.invert_yaxis()
    shown = [number for name in (*names, FULL) for number in _numbers(results, name)]
    if shown:
        # Bars from zero would hide what lies between them.
        margin = 0.15 * (max(shown) - min(shown)) + 0.5
        axes.set_xlim(min(shown) - margin, max(shown) + margin)
    axes.set_xlabel(_LABEL)
    axes.set_title(title)
    return _save(figure, path)


def _trade(
    variants: Mapping[str, Variant], results: Results, costs: Mapping[str, Any], path: Path
) -> Path:
    figure, axes = _figure(8, 6)
    full = costs[FULL]["count"]["macs"] if FULL in costs else 1
    points: dict[str, tuple[float, float]] = {}
    for name, variant in variants.items():
        numbers = _numbers(results, name)
        if not numbers or name not in costs:
            continue
        x, y = costs[name]["count"]["macs"] / full, statistics.fmean(numbers)
        error = statistics.stdev(numbers) if len(numbers) > 1 else 0
        colour = "tab:red" if name == MOD else "tab:gray" if name == FULL else "tab:blue"
        axes.errorbar(x, y, yerr=error, fmt="o", color=colour, capsize=3)
        points[variant.name] = x, y
    axes.margins(0.1)
    _label(axes, points)
    axes.set_xlabel("multiply-adds of the decoder's linears, relative to full computation")
    axes.set_ylabel(_LABEL)
    axes.set_title("Quality against arithmetic (mean and standard deviation over seeds)")
    return _save(figure, path)


def _label(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names points to their right, one above the other where they stand close together."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    near, line = 0.06 * (right - left), 0.03 * (top - bottom)
    placed: list[tuple[float, float]] = []
    for name, (x, y) in sorted(points.items(), key=lambda point: point[1][1]):
        height = max([y, *(other + line for at, other in placed if abs(at - x) < near)])
        placed.append((x, height))
        axes.annotate(
            name,
            (x, y),
            xytext=(x + 0.015 * (right - left), height),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "tab:gray", "linewidth": 0.5},
        )


def _ratios(variants: Mapping[str, Variant], costs: Mapping[str, Any], path: Path) -> Path:
    names = [name for name in variants if name in costs]
    reads = {
        "multiply-adds": lambda cost: cost["count"]["macs"],
        "step time": lambda cost: cost["step"]["median"],
        "step memory": lambda cost: cost["peak_bytes"],
        "cache": lambda cost: cost["count"]["cache_bytes"],
        "frame time": lambda cost: cost["frame"]["median"],
    }
    figure, axes = _figure(9, 4.5)
    width = 0.8 / len(reads)
    for i, (label, read) in enumerate(reads.items()):
        heights = [read(costs[n]) / read(costs[FULL]) if FULL in costs else 0 for n in names]
        axes.bar([x + i * width for x in range(len(names))], heights, width, label=label)
    axes.axhline(1, color="tab:gray", linestyle="--")
    axes.set_xticks([x + 0.4 for x in range(len(names))], names, rotation=45, ha="right")
    axes.set_ylabel("relative to full computation")
    axes.legend(fontsize=8)
    return _save(figure, path)


def _kept(
    variants: Mapping[str, Variant], results: Results, names: Sequence[str], path: Path
) -> Path:
    figure, axes = _figure(8, 4.5)
    labels, position = [], 0
    for name in names:
        runs = [run for run in results[name].values() if run.get("kept")]
        for layer in sorted({layer for run in runs for layer in run["kept"]}, key=int):
            ratios = [run["kept"][layer]["ratio"] for run in runs if layer in run["kept"]]
            axes.bar(position, statistics.fmean(ratios), color="tab:blue", alpha=0.35)
            axes.plot([position] * len(ratios), ratios, "o", color="tab:blue", markersize=3)
            labels.append(f"{name}, layer {layer}")
            position += 1
    axes.axhline(1, color="tab:gray", linestyle="--", label="chance")
    axes.axhline(2, color="tab:red", linestyle=":", label="twice chance")
    axes.set_xticks(range(position), labels, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("kept tokens on digits, relative to chance")
    axes.legend(fontsize=8)
    return _save(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # A Figure without pyplot keeps no global state and needs no display.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> Path:
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
    return path
