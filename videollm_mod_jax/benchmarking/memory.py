"""`benchmark memory`: what a config needs of a device by the number of frames, by the compiler."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from videollm_mod_jax.benchmarking.training import ratios, variants
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLMConfig
from videollm_mod_jax.models.flops import kv_cache_bytes

Plan = Mapping[str, Any]
"""A `planning.Plan` as a dict."""

PlanFrames = Callable[[VideoLLMConfig, int], Plan]
"""Compiles a step of a variant for a number of frames."""


def benchmark_memory(
    model: VideoLLMConfig,
    frames: Sequence[int],
    *,
    plan_training: PlanFrames,
    plan_streaming: PlanFrames,
    longest: Callable[[VideoLLMConfig], Plan | None] | None,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Compiles both variants for every number of frames; nothing runs.

    Args:
      model: with routing.
      frames: rising.
      plan_training, plan_streaming: see `PlanFrames`.
      longest: the plan of the longest training stream of a variant that fits, or None if none does;
        None to leave that out.
      announce: called with what comes next.

    Returns:
      What `report.write` writes: `model`, `tokens_per_frame`; `rows`, by frames, each with `full`,
      `mod` and `ratio` (mod / full); `stream`, the same of a stream as long as the last row; and
      `longest`, frames by variant and their ratio, if asked for. Bytes are per device.
      `step_seconds` is an estimate from the chip's peaks, None for a device without.

    Raises:
      UserError: frames do not rise, or the model routes nowhere.
    """
    check_rising("--frames", frames)
    configs = variants(model)
    rows = []
    for count in frames:
        row: dict[str, Any] = {"frames": count}
        for name, config in configs.items():
            announce(f"{count} frames, {name}: compiling")
            plan = plan_training(config, count)
            row |= {"text_tokens": plan["text_tokens"], name: _figures(plan)}
        rows.append(row | {"ratio": ratios(row)})
    stream: dict[str, Any] = {"frames": frames[-1]}
    for name, config in configs.items():
        announce(f"stream of {frames[-1]} frames, {name}: compiling")
        plan = plan_streaming(config, frames[-1])
        stream |= {"text_tokens": plan["text_tokens"]}
        stream[name] = _figures(plan) | {
            "cache_bytes": plan["parts"]["caches"],
            "cache_bytes_per_frame": plan["cache_bytes_per_frame"],
            "cache_bytes_per_frame_without_text": kv_cache_bytes(config, 1, 0, config.dtype),
            "frames_until_full": plan["frames_until_full"],
        }
    out = {
        "model": model.to_dict(),
        "tokens_per_frame": model.tokens_per_frame,
        "rows": rows,
        "stream": stream | {"ratio": ratios(stream)},
    }
    if longest is None:
        return out
    found = {}
    for name, config in configs.items():
        announce(f"longest stream, {name}")
        plan = longest(config)
        found[name] = {"frames": plan["frames"] if plan else 0}
    return out | {"longest": found | {"ratio": ratios(found)}}


def check_rising(name: str, numbers: Sequence[int]) -> None:
    """Refuses what is not a rising row of positive numbers.

    Args:
      name: of the flag.
      numbers: its values.

    Raises:
      UserError: they do not rise from 1 or more.
    """
    if numbers[0] < 1 or sorted(set(numbers)) != list(numbers):
        said = " ".join(map(str, numbers))
        raise UserError(f"{name} {said}: expected rising numbers, such as {name} 600 1200 2400")


def _figures(plan: Plan) -> dict[str, Any]:
    program = plan["program"]
    return {
        "fits": plan["fits"],
        "peak_bytes": program["peak_bytes"] or program["needed_bytes"],
        "tower_bytes": plan["tower_bytes"],
        "compiled_flops": program["cost"] and program["cost"]["flops"],
        "floor_flops": plan["floor_flops"],
        "step_seconds": plan["seconds"] and max(plan["seconds"].values()),
    }
