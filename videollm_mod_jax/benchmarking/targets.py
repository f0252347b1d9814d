"""What is to be reached, and where in a result it is found.

A target is looked for on the devices and in the setting that it is about; what a result of another
kind says is no figure of it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from videollm_mod_jax.benchmarking import device

Result = Mapping[str, Any]
"""What `report.write` wrote."""

ACCELERATORS = ("gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
      value: to compare with the bound.
      text: how it is printed.
      share: of the floor reached, printed; empty where that has no meaning.
      where: device, batch and context.
    """

    value: float
    text: str
    share: str
    where: str


@dataclasses.dataclass(frozen=True)
class Target:
    """One line of the page.

    Attributes:
      what: is measured.
      sense: `<=` or `>=`; empty for what is only reported.
      limit: of the value.
      find: the figures in a result, none where it is about something else.
    """

    what: str
    sense: str
    limit: float | None
    find: Callable[[Result], Iterator[Figure]]

    @property
    def bound(self) -> str:
        """Of the value, printed."""
        return "" if self.limit is None else f"{self.sense} {self.limit:g}"

    def verdict(self, value: float) -> bool | None:
        """Whether a value, as it is printed, reaches the target."""
        if self.limit is None:
            return None
        rounded = round(value, 3)
        return rounded <= self.limit if self.sense == "<=" else rounded >= self.limit


def _setting(result: Result, row: Mapping[str, Any]) -> str:
    """Device, batch and context of a row.

    ```
    NVIDIA H200, batch 8, 600 frames x 10, 601 text tokens
    ```
    """
    parts = (
        [result["target"]["topology"]] if "target" in result else [device.name(result["device"])]
    )
    if batch := row.get("batch_size") or result.get("batch_size"):
        parts.append(f"batch {batch}")
    tokens = row.get("tokens_per_frame") or result.get("tokens_per_frame")
    frames = f"{row['frames']} frames" + (f" x {tokens}" if tokens else "")
    return ", ".join([*parts, frames, f"{row['text_tokens']} text tokens"])


def _shares(row: Mapping[str, Any]) -> str:
    return f"full {row['full']['share_of_floor']:.0%}, MoD {row['mod']['share_of_floor']:.0%}"


def _trained(result: Result, platforms: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """Rows of `benchmark train` on these platforms at 600 frames in which both variants ran."""
    if result["benchmark"] == "train" and result["device"]["platform"] in platforms:
        for row in result["rows"]:
            if row["frames"] == 600 and "seconds" in row["ratio"]:
                yield row


def _flops(result: Result) -> Iterator[Figure]:
    if result["benchmark"] not in ("train", "memory"):
        return
    for row in result["rows"]:
        sides = [row["full"], row["mod"]]
        if all(side["compiled_flops"] for side in sides):
            full, mod = (side["compiled_flops"] / side["floor_flops"] for side in sides)
            yield Figure(max(full, mod), f"{full:.3f}, {mod:.3f}", "", _setting(result, row))


def _step_ratio(tokens_per_frame: int) -> Callable[[Result], Iterator[Figure]]:
    def find(result: Result) -> Iterator[Figure]:
        for row in _trained(result, ACCELERATORS):
            if row["tokens_per_frame"] == tokens_per_frame:
                ratio, floor = row["ratio"]["seconds"], row["ratio"]["floor_flops"]
                text = f"{ratio:.3f} (floor {floor:.3f})"
                yield Figure(ratio, text, _shares(row), _setting(result, row))

    return find


def _utilisation(result: Result) -> Iterator[Figure]:
    for row in _trained(result, ACCELERATORS):
        value = row["full"]["model_flops_utilisation"]
        yield Figure(value, f"{value:.1%}", _shares(row), _setting(result, row))


def _tiny_step(result: Result) -> Iterator[Figure]:
    for row in _trained(result, ("cpu",)):
        ratio, floor = row["ratio"]["seconds"], row["ratio"]["floor_flops"]
        text = f"{ratio:.3f} (floor {floor:.3f})"
        yield Figure(ratio, text, _shares(row), _setting(result, row))


def _peer_step(ratio: str) -> Callable[[Result], Iterator[Figure]]:
    def find(result: Result) -> Iterator[Figure]:
        on_accelerator = result["device"]["platform"] in ACCELERATORS
        if result["benchmark"] == "peer_train" and on_accelerator:
            value, where = result["ratios"][ratio], _setting(result, result["shapes"])
            yield Figure(value, f"{value:.3f}", "", where)

    return find


def _peer_on_cpu(result: Result) -> Iterator[Figure]:
    if result["benchmark"] == "peer_train" and result["device"]["platform"] == "cpu":
        full, mod = (result["ratios"][f"{name}_to_peer"] for name in ("full", "mod"))
        where = _setting(result, result["shapes"])
        yield Figure(max(full, mod), f"{full:.3f}, {mod:.3f}", "", where)


def _memory(result: Result) -> Iterator[Figure]:
    key = {"train": "device_peak_bytes", "memory": "peak_bytes"}.get(result["benchmark"])
    for row in result["rows"] if key else ():
        if row["frames"] == 4800 and key in row["ratio"]:
            value = row["ratio"][key]
            yield Figure(value, f"{value:.3f}", "", _setting(result, row))


def _longest(result: Result) -> Iterator[Figure]:
    if result["benchmark"] == "memory" and "frames" in result.get("longest", {}).get("ratio", {}):
        frames = {name: result["longest"][name]["frames"] for name in ("full", "mod")}
        value = result["longest"]["ratio"]["frames"]
        text = f"{value:.3f} ({frames['mod']} / {frames['full']} frames)"
        yield Figure(value, text, "", _setting(result, result["rows"][-1]))


def _cache(result: Result) -> Iterator[Figure]:
    if result["benchmark"] == "memory":
        value = 1 / result["stream"]["ratio"]["cache_bytes_per_frame_without_text"]
        yield Figure(value, f"{value:.3f}", "", _setting(result, result["stream"]))


def _routing(result: Result) -> Iterator[Figure]:
    if result["benchmark"] == "kernels" and result["device"]["platform"] in ACCELERATORS:
        where = _setting(result, result["shapes"])
        for direction, value in result["routing_overhead"].items():
            yield Figure(value, f"{value:.1%} {direction}", "", where)


def _frames(
    result: Result, minutes: float, platforms: tuple[str, ...] = ACCELERATORS
) -> Iterator[Mapping[str, Any]]:
    """The frame step of one stream behind so many minutes, of `benchmark stream`.

    With weights as they are: those of 8 bits have a floor of their own.
    """
    if result["benchmark"] != "stream" or result["shapes"].get("int8"):
        return
    if result["device"]["platform"] in platforms:
        for row in result["steps"]:
            if row["minutes"] == minutes and row["streams"] == 1:
                yield row


def _frame_floor(result: Result) -> Iterator[Figure]:
    for row in _frames(result, 10):
        shares = [row["frame"][name]["share_of_floor"] for name in ("full", "mod")]
        text = ", ".join(f"{share:.0%}" for share in shares)
        yield Figure(min(shares), text, _shares(row["frame"]), _stream_setting(result, row))


def _frame_rate(result: Result) -> Iterator[Figure]:
    for row in _frames(result, 10):
        full, mod = (1 / row["frame"][name]["median"] for name in ("full", "mod"))
        where = _stream_setting(result, row)
        yield Figure(min(full, mod), f"{full:.0f}, {mod:.0f}", _shares(row["frame"]), where)


def _peer_frame(result: Result) -> Iterator[Figure]:
    if result["benchmark"] == "peer_stream" and result["device"]["platform"] in ACCELERATORS:
        for row in result["contexts"]:
            if row["minutes"] == 10:
                value = 1 / row["ratios"]["mod_to_peer"]
                where = f"{device.name(result['device'])}, {row['frames']} frames"
                yield Figure(value, f"{value:.2f}", "", where)


def _growth(result: Result) -> Iterator[Figure]:
    """Time added between 1 and 60 minutes, over that of reading the added bytes of cache."""
    for first in _frames(result, 1, (*ACCELERATORS, "cpu")):
        for last in _frames(result, 60, (*ACCELERATORS, "cpu")):
            over = []
            for name in ("full", "mod"):
                short, long = first["frame"][name], last["frame"][name]
                size = long["cache_bytes"] - short["cache_bytes"]
                seconds = size / result["peaks"]["bandwidth"]
                over.append((long["median"] - short["median"]) / seconds)
            text = ", ".join(f"{value:.2f}" for value in over)
            yield Figure(max(over), text, "", _stream_setting(result, last))


def _predicted(result: Result) -> Iterator[Figure]:
    """Bytes that the caches have, over those that were counted before."""
    for row in result["memory"] if result["benchmark"] == "stream" else ():
        value = max(
            row[name]["cache_bytes"] / row[name]["counted_cache_bytes"] for name in ("full", "mod")
        )
        where = f"{device.name(result['device'])}, {row['streams']} x {row['frames']} frames"
        yield Figure(value, f"{value:.3f}", "", where)


def _tiny_frame(result: Result) -> Iterator[Figure]:
    for row in _frames(result, 10, ("cpu",)):
        ratio = row["frame"]["ratio"]
        yield Figure(ratio, f"{ratio:.3f}", _shares(row["frame"]), _stream_setting(result, row))


def _stream_setting(result: Result, row: Mapping[str, Any]) -> str:
    shapes = {"tokens_per_frame": result["shapes"]["tokens_per_frame"], "batch_size": 1}
    return _setting(result, row | shapes)


TARGETS = (
    Target("FLOPs of the compiled step / the floor (full, MoD)", "<=", 1.05, _flops),
    Target("step time, MoD / full, 10 tokens per frame", "<=", 0.65, _step_ratio(10)),
    Target("step time, MoD / full, 50 tokens per frame", "<=", 0.60, _step_ratio(50)),
    Target("step time, full / PyTorch peer's full", "<=", 0.85, _peer_step("full_to_peer")),
    Target("step time, MoD / PyTorch peer's full", "<=", 0.55, _peer_step("mod_to_peer")),
    Target("model FLOPs utilisation of the full step", ">=", 0.55, _utilisation),
    Target("peak memory, MoD / full, at 4800 frames", "<=", 0.74, _memory),
    Target("frames that fit in training, MoD / full", ">=", 1.45, _longest),
    # Five thirds, rounded down: 10 tokens per frame over the mean of 10 and 2.
    Target("frames that a text-free cache holds, MoD / full", ">=", 1.666, _cache),
    Target("routing of a layer, on top of its block", "<=", 0.05, _routing),
    Target("frame step at 10 minutes, share of its floor (full, MoD)", ">=", 0.6, _frame_floor),
    Target("frames per second at 10 minutes (full, MoD)", ">=", 100, _frame_rate),
    Target("frame step at 10 minutes, PyTorch peer / MoD", ">=", 3, _peer_frame),
    Target("time added from 1 to 60 minutes / that of the added bytes", "", None, _growth),
    Target("bytes of a stream's caches / those counted before", "<=", 1, _predicted),
    Target("step time on a CPU, MoD / full", "<=", 0.8, _tiny_step),
    Target("step time on a CPU / PyTorch peer's full (full, MoD)", "", None, _peer_on_cpu),
    Target("frame step on a CPU at 10 minutes, MoD / full", "<=", 0.8, _tiny_frame),
)
"""In the order of the page."""
