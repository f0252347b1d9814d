"""Pictures of what the benchmarks found, drawn from their JSON."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from videollm_mod_jax.benchmarking import device
from videollm_mod_jax.data.files import written_aside

NAMES = {"full": "full computation", "mod": "Mixture-of-Depths"}
_COLOURS = {"full": "tab:gray", "mod": "tab:blue"}
GIB = 2**30

Result = Mapping[str, Any]
"""What `report.write` wrote."""

Points = Sequence[tuple[float, float | None]]
"""(x, y), y None where it is unknown."""


def draw_training(result: Result, out: Path) -> list[Path]:
    """Step time over frames, with its floor, and the peak of memory: `train-time.png` and more."""
    rows, title = result["rows"], _title(result, result["rows"][-1])
    seconds = {
        name: [(row["frames"], row[name].get("seconds", {}).get("median")) for row in rows]
        for name in NAMES
    }
    floors = {name: [(r["frames"], r[name]["floor_seconds"]) for r in rows] for name in NAMES}
    peaks = {
        name: [
            (r["frames"], _gib(r[name]["device_peak_bytes"] or r[name]["compiler_peak_bytes"]))
            for r in rows
        ]
        for name in NAMES
    }
    source = "device" if rows[0]["mod"]["device_peak_bytes"] else "compiler"
    return [
        _draw(
            out / "train-time.png",
            ("frames", "seconds per step", f"Training step: {title}"),
            seconds,
            floors,
        ),
        _draw(
            out / "train-memory.png",
            ("frames", f"GiB at the peak, by the {source}", f"Training step: {title}"),
            peaks,
            {},
        ),
    ]


def draw_memory(result: Result, out: Path) -> list[Path]:
    """Peak of memory over frames, and the estimate of step time: `memory.png` and more."""
    rows, title = result["rows"], _title(result, result)
    peaks = {name: [(r["frames"], _gib(r[name]["peak_bytes"])) for r in rows] for name in NAMES}
    files = [
        _draw(
            out / "memory.png",
            ("frames", "GiB per device at the peak, by the compiler", f"Training step: {title}"),
            peaks,
            {},
        )
    ]
    if rows[0]["mod"]["step_seconds"] is not None:
        seconds = {name: [(r["frames"], r[name]["step_seconds"]) for r in rows] for name in NAMES}
        labels = ("frames", "seconds per step, estimated", f"Training step: {title}")
        files.append(_draw(out / "memory-time.png", labels, seconds, {}))
    return files


def draw_streaming(result: Result, out: Path) -> list[Path]:
    """Time of a frame over the length of the stream, with its floor: `stream.png`."""
    rows = [row for row in result["steps"] if row["streams"] == 1]
    shapes = result["shapes"]
    model = {"decoder": shapes["decoder"], "dtype": shapes["dtype"]}
    title = _title(
        {"device": result["device"], "model": model},
        {"tokens_per_frame": shapes["tokens_per_frame"]},
    )
    times = {
        name: [(r["minutes"], 1e3 * r["frame"][name]["median"]) for r in rows] for name in NAMES
    }
    floors = {
        name: [
            (
                r["minutes"],
                1e3 * max(r["frame"][name]["bytes_floor"], r["frame"][name]["flops_floor"]),
            )
            for r in rows
        ]
        for name in NAMES
    }
    labels = ("minutes of video before the frame", "ms per frame", f"A frame of a stream: {title}")
    return [_draw(out / "stream.png", labels, times, floors)]


def _title(result: Result, shapes: Mapping[str, Any]) -> str:
    """The device, the model, and the shapes that a figure belongs to, in two lines."""
    decoder = result["model"]["decoder"]
    where = result.get("target", {}).get("topology") or device.name(result["device"])
    texts = (
        f"{decoder['num_layers']} layers of width {decoder['hidden_size']}",
        result["model"]["dtype"],
        f"{shapes['tokens_per_frame']} tokens per frame",
        f"batch {shapes['batch_size']}" if "batch_size" in shapes else "",
    )
    return f"{where}\n" + ", ".join(text for text in texts if text)


def _draw(
    path: Path,
    labels: tuple[str, str, str],
    measured: Mapping[str, Points],
    floors: Mapping[str, Points],
) -> Path:
    """Draws lines of both variants: solid what was measured, dashed its floor.

    Args:
      path: of the picture, replaced if there is one.
      labels: of the axes, and the title.
      measured, floors: points by variant.
    """
    # Imported here: matplotlib takes a second, and most verbs draw nothing.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for lines, style, ending in ((measured, "o-", ""), (floors, "--", ", floor")):
        for name, points in lines.items():
            # None is where a line ends.
            x, y = zip(*points, strict=True)
            axes.plot(
                x,
                [math.nan if value is None else value for value in y],
                style,
                color=_COLOURS[name],
                label=NAMES[name] + ending,
            )
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_title(labels[2], fontsize="medium")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=100)
    return path


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB
