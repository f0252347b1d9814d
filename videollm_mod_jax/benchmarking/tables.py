"""What `benchmark train` and `benchmark memory` found, for the terminal."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from videollm_mod_jax.benchmarking import report

COLUMNS = ("full", "mod", "mod / full")
_GIB = 2**30

Rows = dict[str, tuple[str, str, str]]


def training_tables(result: Mapping[str, Any]) -> list[Table]:
    """One table for every length of `benchmark_training`'s result."""
    lines: dict[str, tuple[str, Callable[[Any], float]]] = {
        "step [s]": ("median", float),
        "  quartiles apart [s]": ("spread", float),
        "  floor at the measured peak [s]": ("floor_seconds", float),
        "  share of the floor reached [%]": ("share_of_floor", lambda share: 100 * share),
        "model FLOPs utilisation [%]": ("model_flops_utilisation", lambda share: 100 * share),
        "tokens/s": ("tokens_per_second", float),
        "sequences/s": ("sequences_per_second", float),
        "TFLOPs per device, compiled": ("compiled_flops", lambda flops: flops / 1e12),
        "  analytic floor": ("floor_flops", lambda flops: flops / 1e12),
        "peak memory by the compiler [GiB]": ("compiler_peak_bytes", lambda size: size / _GIB),
        "peak memory by the device [GiB]": ("device_peak_bytes", lambda size: size / _GIB),
    }
    out = []
    for row in result["rows"]:
        # The figures of the timing, beside those that follow from it.
        sides = {name: {**row[name], **row[name].get("seconds", {})} for name in ("full", "mod")}
        sides["ratio"] = row["ratio"] | {"median": row["ratio"].get("seconds")}
        title = (
            f"training step: {row['frames']} frames x {row['tokens_per_frame']} tokens, "
            f"{row['text_tokens']} text tokens, batch {row['batch_size']}"
        )
        rows = {label: _cells(sides, *line) for label, line in lines.items()}
        out.append(report.table(title, COLUMNS, _known(rows)))
    return out


def memory_tables(result: Mapping[str, Any]) -> list[Table]:
    """Of `benchmark_memory`'s result: training by frames, a stream, and the longest that fits."""
    training: Rows = {}
    for row in result["rows"]:
        label = f"{row['frames']} frames: "
        training[label + "peak [GiB]"] = _cells(row, "peak_bytes", lambda size: size / _GIB)
        training[label + "step, estimated [s]"] = _cells(row, "step_seconds", float)
        training[label + "TFLOPs"] = _cells(row, "compiled_flops", lambda flops: flops / 1e12)
    if "longest" in result:
        training["longest stream that fits [frames]"] = _cells(result["longest"], "frames", int)
    stream = result["stream"]
    streaming: Rows = {
        "peak [GiB]": _cells(stream, "peak_bytes", lambda size: size / _GIB),
        "caches [GiB]": _cells(stream, "cache_bytes", lambda size: size / _GIB),
        "cache per frame [KiB]": _cells(stream, "cache_bytes_per_frame", lambda size: size / 1024),
        "frames until full": _cells(stream, "frames_until_full", int),
    }
    where = f"{result['target']['topology']}, batch {result['batch_size']}, by the compiler"
    return [
        report.table(f"training step on {where}", COLUMNS, _known(training)),
        report.table(
            f"stream of {stream['frames']} frames, one device", COLUMNS, _known(streaming)
        ),
    ]


def _cells(
    row: Mapping[str, Any], key: str, convert: Callable[[Any], float]
) -> tuple[str, str, str]:
    """A value of both variants, and their ratio; empty where it is unknown."""
    values = [row[name].get(key) for name in ("full", "mod")]
    texts = ["" if value is None else f"{convert(value):.4g}" for value in values]
    ratio = row["ratio"].get(key)
    return texts[0], texts[1], "" if ratio is None else f"{ratio:.3f}"


def _known(rows: Rows) -> Rows:
    """The rows in which anything is known."""
    return {label: cells for label, cells in rows.items() if any(cells)}
