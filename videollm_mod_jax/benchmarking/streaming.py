"""`benchmark stream`: what a frame and a generated token cost, by the length of the stream.

The model of a config and the same model without routing take turns in one process, with the same
weights. Their caches are filled to each length directly (`filled.py`), and every step that is timed
is the one that a session runs, what it decides read on the host included.

Letters: B streams that advance together, T text tokens, N vision tokens per frame, W vision width.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import numpy as np

from videollm_mod_jax.benchmarking import device, floors
from videollm_mod_jax.benchmarking.device import Peaks
from videollm_mod_jax.benchmarking.filled import Context, fill, random_variables
from videollm_mod_jax.benchmarking.floors import measured
from videollm_mod_jax.benchmarking.timing import Timing, measure
from videollm_mod_jax.benchmarking.training import variants
from videollm_mod_jax.config_dict import COUNT, Checked, Interval
from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import (
    Execution,
    VideoLLM,
    VideoLLMConfig,
    config_plan,
)
from videollm_mod_jax.models.flops import kv_cache_bytes
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.int8 import quantize_variables
from videollm_mod_jax.streaming.triggers import breaks_silence

IMAGES = (1, 8)
"""Frames that the vision tower encodes at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSettings(Checked):
    """What is measured.

    Attributes:
      minutes: of video that the streams have seen.
      fps: frames per second of the video.
      streams: how many advance together; more than one at the middle one of `minutes` only.
      new_tokens: of an answer, generated in one call.
      rounds: timed calls of every step; their medians are reported.
      warmup: calls before them.
      int8: round the decoder's weights of both variants to 8 bits, adapters merged.
    """

    minutes: tuple[Annotated[float, Interval("(0, 1e6]")], ...]
    fps: Annotated[float, Interval("[1e-3, 1000]")]
    streams: tuple[COUNT, ...]
    new_tokens: COUNT
    rounds: COUNT
    warmup: COUNT
    int8: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("minutes", "streams"):
            values = getattr(self, name)
            if not values or sorted(set(values)) != list(values):
                raise UserError(f"{name} are {values}; expected rising numbers, at least one")

    def context(self, minutes: float, data: DataConfig) -> Context:
        """What a stream of that length has seen, with as much text per frame as the data allow."""
        frames = max(1, round(60 * minutes * self.fps))
        return Context(frames, -(-data.text_tokens * frames // data.frames))

    def room(self, context: Context) -> Context:
        """What a stream has seen at the most, behind all calls from a context on."""
        calls = self.rounds + self.warmup
        return Context(context.frames + calls, context.text + calls * (1 + self.new_tokens))


class Streams:
    """Streams of one model that go on by a frame, or by an answer, at every call."""

    def __init__(
        self, model: VideoLLM, variables: dict, context: Context, room: Context, batch_size: int
    ):
        """Fills the caches.

        Args:
          model: per-layer model (`scan=False`).
          variables: its variables.
          context: what the streams have seen.
          room: what their caches hold.
          batch_size: B.
        """
        config = model.config
        self._model, self._variables, self._room = model, variables, room
        self._state = fill(model, context, room, batch_size=batch_size, seed=0)
        self._prefix_BT = np.zeros((batch_size, 1), np.int32)
        shape = (batch_size, config.vision.features_per_frame, config.vision.width)
        self._features_BNW = jax.random.normal(jax.random.key(0), shape, config.dtype)

    def see(self) -> np.ndarray:
        """Appends an interval token and a frame; whether each stream speaks, on the host."""
        self._state = engine.append_frame(*self._frame_arguments())
        return np.asarray(breaks_silence(self._state.logits_BV, 0, None))

    def answer(self, new_tokens: int) -> np.ndarray:
        """Generates an answer of that many tokens, on the host."""
        self._state, tokens_BT, _ = engine.generate(
            self._model,
            self._variables,
            self._state,
            # No token that can be drawn, so that no answer is shorter.
            eos_id=self._model.config.decoder.vocab_size,
            max_new_tokens=new_tokens,
            temperature=0.0,
        )
        return np.asarray(tokens_BT)

    def memory(self, int8: bool) -> dict[str, int]:
        """Bytes that the frame step needs: as counted, as allocated, as the compiler says."""
        config, caches = self._model.config, self._state.caches
        program = engine.append_frame.lower(*self._frame_arguments()).compile().memory_analysis()
        per_stream = kv_cache_bytes(config, self._room.frames, self._room.text, config.dtype)
        return {
            "counted_cache_bytes": len(self._prefix_BT) * per_stream,
            "cache_bytes": sum(cache.k_BGCE.nbytes + cache.v_BGCE.nbytes for cache in caches),
            "weight_bytes": floors.stored_bytes(config, tower=False, int8=int8),
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self._state)),
            "input_bytes": self._prefix_BT.nbytes + self._features_BNW.nbytes,
            "argument_bytes": program.argument_size_in_bytes,
            "aliased_bytes": program.alias_size_in_bytes,
            "temporary_bytes": program.temp_size_in_bytes,
        }

    def _frame_arguments(self) -> tuple:
        return self._model, self._variables, self._state, self._prefix_BT, self._features_BNW


def benchmark_stream(
    config: VideoLLMConfig,
    data: DataConfig,
    kernels: str,
    settings: StreamSettings,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Measures everything that this file is about.

    Args:
      config: of the model with routing.
      data: of the config; its budget says how much text goes with how many frames.
      kernels: of `execution.KERNELS`.
      settings: what to measure.
      announce: called with what comes next.

    Returns:
      What `report.write` writes, times in seconds: `settings`, `shapes`, `peaks`; `steps`, by
      context and number of streams, each with the times of a `frame` and of a generated `token`
      of both variants; `growth` between contexts; `memory` by number of streams; and `tower`.

    Raises:
      UserError: the model routes nowhere, or the device cannot hold the weights and the caches of
        both variants.
    """
    config.require("decoder", "vision")
    configs = variants(config)
    middle = settings.minutes[len(settings.minutes) // 2]
    runs = {1: settings.minutes} | {count: (middle,) for count in settings.streams if count > 1}
    # A stream has the room of the longest at every length: a cost that followed the capacity would
    # show.
    rooms = {
        count: settings.room(settings.context(lengths[-1], data)) for count, lengths in runs.items()
    }
    for streams, room in rooms.items():
        _check_memory(configs, room, streams, settings.int8)
    announce("measuring the device and drawing weights")
    peaks = device.measured_peaks(config.dtype)
    variables = random_variables(config)
    if settings.int8:
        config, variables = quantize_variables(config, variables)
        configs = variants(config)
    models = {name: VideoLLM(each, Execution(kernels=kernels)) for name, each in configs.items()}
    steps, memory = [], []
    for streams, lengths in runs.items():
        for minutes in lengths:
            context = settings.context(minutes, data)
            announce(f"{streams} x {minutes:g} min: {context.frames} frames, {context.text} text")
            sides = {
                name: Streams(model, variables, context, rooms[streams], streams)
                for name, model in models.items()
            }
            row = {"minutes": minutes, "streams": streams}
            row |= {"frames": context.frames, "text_tokens": context.text}
            steps.append(row | measure_steps(configs, sides, context, streams, settings, peaks))
            if minutes == lengths[-1]:
                room = {"streams": streams} | dataclasses.asdict(rooms[streams])
                memory.append(
                    room | {name: side.memory(settings.int8) for name, side in sides.items()}
                )
            # Before the next are filled: the caches of two lengths need not fit at once.
            del sides
    announce("the vision tower")
    return {
        "settings": dataclasses.asdict(settings),
        "shapes": shapes(config, data, kernels) | {"int8": settings.int8},
        "peaks": dataclasses.asdict(peaks),
        "steps": steps,
        "growth": growth([row for row in steps if row["streams"] == 1]),
        "memory": memory,
        "peak_memory_bytes": device.peak_memory_bytes(),
        "tower": _tower(models["mod"], variables, settings, peaks),
    }


def shapes(config: VideoLLMConfig, data: DataConfig, kernels: str) -> dict[str, Any]:
    """What a figure depends on, beside the device."""
    return {
        "decoder": dataclasses.asdict(config.decoder),
        "tokens_per_frame": config.tokens_per_frame,
        "kept_by_layer": [spec.keep for spec in config_plan(config)],
        "text_tokens_per_frame": data.text_tokens / data.frames,
        "lora_rank": config.lora.rank,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "kernels": kernels,
    }


def growth(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What longer streams add to a frame, beside what they add to the caches.

    ```
    1 min: 10 ms, 100 MB   10 min: 14 ms, 900 MB      4 ms more for 800 MB more: 200 GB/s
    ```

    Args:
      steps: of one stream each, by rising length, as in `benchmark_stream`.
    """
    out = []
    for short, long in itertools.pairwise(steps):
        row: dict[str, Any] = {"minutes": [short["minutes"], long["minutes"]]}
        for name in ("full", "mod"):
            more = {
                key: long["frame"][name][key] - short["frame"][name][key]
                for key in ("median", "cache_bytes")
            }
            row[name] = {"seconds": more["median"], "cache_bytes": more["cache_bytes"]}
        out.append(row)
    return out


def measure_steps(
    configs: Mapping[str, VideoLLMConfig],
    sides: Mapping[str, Streams],
    context: Context,
    streams: int,
    settings: StreamSettings,
    peaks: Peaks,
) -> dict[str, Any]:
    """Times and floors of a frame and of a token, a share of an answer.

    Streams go on from call to call, so that a floor is that of the middle call: behind 5 frames,
    with one call to warm up and 4 timed ones, that of a stream that has seen 8.
    """
    calls, middle = settings.warmup + settings.rounds, settings.warmup + settings.rounds // 2
    frames = measure(
        {name: side.see for name, side in sides.items()}, settings.rounds, settings.warmup
    )
    answers = measure(
        {name: lambda s=side: s.answer(settings.new_tokens) for name, side in sides.items()},
        settings.rounds,
        settings.warmup,
    )
    at_frame = Context(context.frames + middle, context.text + middle)
    half = settings.new_tokens // 2
    at_token = Context(
        context.frames + calls, context.text + calls + middle * settings.new_tokens + half
    )
    out: dict[str, Any] = {"frame": {}, "token": {}}
    for name, config in configs.items():
        work = floors.append_work(
            config, at_frame, streams=streams, frames=1, text=1, int8=settings.int8
        )
        out["frame"][name] = measured(frames[name], work, peaks)
        each = Timing(tuple(s / settings.new_tokens for s in answers[name].seconds))
        work = floors.append_work(
            config, at_token, streams=streams, frames=0, text=1, int8=settings.int8
        )
        out["token"][name] = measured(each, work, peaks)
    for step in out.values():
        step["ratio"] = step["mod"]["median"] / step["full"]["median"]
    return out


def _tower(
    model: VideoLLM, variables: dict, settings: StreamSettings, peaks: Peaks
) -> list[dict[str, Any]]:
    """The vision tower apart, on frames that come from the host."""
    size, rng, out = model.config.vision.image_size, np.random.default_rng(0), []
    for count in IMAGES:
        images_BHWC = rng.integers(0, 256, (count, size, size, 3), np.uint8)
        step = {"encode": lambda x=images_BHWC: engine.encode(model, variables, x)}
        timing = measure(step, settings.rounds, settings.warmup)["encode"]
        work = floors.tower_work(model.config, count)
        out.append({"images": count} | measured(timing, work, peaks))
    return out


def _check_memory(
    configs: Mapping[str, VideoLLMConfig], room: Context, streams: int, int8: bool
) -> None:
    limit = device.describe()["memory_bytes"]
    needed = floors.stored_bytes(configs["mod"], tower=True, int8=int8) + streams * sum(
        kv_cache_bytes(config, room.frames, room.text, config.dtype) for config in configs.values()
    )
    if limit is not None and needed > limit:
        raise UserError(
            f"{streams} streams of {room.frames} frames need {needed / 2**30:.1f} GiB for weights "
            f"and the caches of both variants; the device has {limit / 2**30:.1f}: give fewer "
            "--streams or shorter --minutes"
        )
