"""What `benchmark stream` found, for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from videollm_mod_jax.benchmarking import report

COLUMNS = ("full", "mod", "mod / full")
MS, MIB, PERCENT = 1e3, 2**-20, 100


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Tables of what `benchmark_stream` returned."""
    growth, memory = {}, {}
    for row in result["growth"]:
        label = f"{row['minutes'][0]:g} to {row['minutes'][1]:g} min: "
        growth[label + "added to a frame [ms]"] = cells(row, "seconds", MS)
        growth[label + "added to the caches [MiB]"] = cells(row, "cache_bytes", MIB)
    for row in result["memory"]:
        label = f"{row['streams']} x {row['frames']} frames, {row['text']} text: "
        memory[label + "caches, counted [MiB]"] = cells(row, "counted_cache_bytes", MIB)
        memory[label + "caches, allocated [MiB]"] = cells(row, "cache_bytes", MIB)
        memory[label + "arguments, compiled [MiB]"] = cells(row, "argument_bytes", MIB)
        memory[label + "temporaries, compiled [MiB]"] = cells(row, "temporary_bytes", MIB)
    tower = {
        f"{row['images']} at once": (
            f"{MS * row['median']:.4g}",
            f"{PERCENT * row['share_of_floor']:.3g}",
            f"{row['images'] / row['median']:.4g}",
        )
        for row in result["tower"]
    }
    return [
        *(_step_table(row, result["shapes"]["int8"]) for row in result["steps"]),
        report.table("growth with the stream", COLUMNS, growth),
        report.table("memory of the frame step", COLUMNS, memory),
        report.table("vision tower", ("ms", "share of the floor, %", "frames/s"), tower),
    ]


def cells(row: Mapping[str, Any], key: str, scale: float) -> tuple[str, str, str]:
    """A value of both variants, and their ratio."""
    full, mod = row["full"][key], row["mod"][key]
    ratio = f"{mod / full:.3f}" if full else ""
    return f"{scale * full:.4g}", f"{scale * mod:.4g}", ratio


def _step_table(row: Mapping[str, Any], int8: bool) -> Table:
    rows = {}
    for name in ("frame", "token"):
        step = row[name]
        rows[f"{name} [ms]"] = cells(step, "median", MS)
        rows[f"{name}: quartiles apart [ms]"] = cells(step, "spread", MS)
        rows[f"{name}: floor by bytes [ms]"] = cells(step, "bytes_floor", MS)
        rows[f"{name}: floor by operations [ms]"] = cells(step, "flops_floor", MS)
        rows[f"{name}: share of the higher floor [%]"] = cells(step, "share_of_floor", PERCENT)
        rate = {side: {"rate": row["streams"] / step[side]["median"]} for side in ("full", "mod")}
        rows[f"{name}s/s, all streams"] = cells(rate, "rate", 1)
    title = f"{_length(row)}: {row['frames']} frames, {row['text_tokens']} text tokens"
    if int8:
        title += ", weights of 8 bits"
    return report.table(title, COLUMNS, rows)


def _length(row: Mapping[str, Any]) -> str:
    return f"{row['streams']} x {row['minutes']:g} min"
