"""Times the frame step of a stream of ours, Full and MoD, beside the peer's, in one process."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from tests.peers import running
from tests.peers.decoding import CACHES, Decoding
from tests.peers.model import Peer
from videollm_mod_jax.benchmarking.filled import Context, random_variables
from videollm_mod_jax.benchmarking.streaming import Streams
from videollm_mod_jax.benchmarking.timing import measure
from videollm_mod_jax.models import (
    NO_LORA,
    Execution,
    VideoLLM,
    VideoLLMConfig,
    full_computation,
)

SILENCE = 0
"""Stands for the interval token, which a frame is preceded by and may be answered with."""


def benchmark_streaming(
    config: VideoLLMConfig,
    kernels: str,
    *,
    minutes: tuple[float, ...],
    fps: float,
    rounds: int,
    warmup: int,
    compiled: bool,
    announce: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Times one frame behind one interval token, by the length of the stream before it.

    Variants: `ours_full`, `ours_mod`, `peer_dynamic`, `peer_static` and, if asked for,
    `peer_static_compiled`. All have the same weights, without adapters, and read on the host
    whether the frame is answered. The stream is silent: every frame has one token of text.

    Args:
      config: with Mixture-of-Depths; Full is the same without.
      kernels: of `execution.KERNELS`.
      minutes: of the streams.
      fps: frames per second.
      rounds: timed calls of each.
      warmup: calls before them. Every call makes the stream longer, by one frame.
      compiled: time the static cache with a compiled model, too.
      announce: called with what comes next.

    Returns:
      by length: seconds by variant, and the ratios of their medians.
    """
    device = running.torch_device()
    config = dataclasses.replace(config, lora=NO_LORA)
    full = dataclasses.replace(config, routing=full_computation())
    variables = random_variables(config)
    peer = Peer(full, device).eval()
    peer.load(variables)
    ours = {
        name: VideoLLM(each, Execution(kernels=kernels))
        for name, each in (("ours_full", full), ("ours_mod", config))
    }
    per_frame = 1 + full.tokens_per_frame
    peers = [(cache, False) for cache in CACHES] + [("static", True)] * compiled
    rows = []
    for length in minutes:
        frames = max(1, round(60 * length * fps))
        most = frames + warmup + rounds
        context, room = Context(frames, frames), Context(most, most)
        announce(f"{length:g} minutes: {frames} frames, {frames} text tokens")
        steps = {
            name: Streams(model, variables, context, room, batch_size=1).see
            for name, model in ours.items()
        }
        for cache, is_compiled in peers:
            stream = Decoding(peer, cache, most * per_frame, is_compiled)
            stream.fill(frames * per_frame, seed=0)
            steps[f"peer_{cache}" + "_compiled" * is_compiled] = _see(stream, full, device)
        timings = measure(steps, rounds, warmup)
        medians = {name: timing.median for name, timing in timings.items()}
        rows.append(
            {
                "minutes": length,
                "frames": frames,
                "text_tokens": frames,
                "seconds": {name: timing.to_dict() for name, timing in timings.items()},
                "ratios": running.ratios(medians, [n for n in steps if n.startswith("peer")]),
            }
        )
    return rows


def _see(stream: Decoding, config: VideoLLMConfig, device: torch.device) -> Callable[[], bool]:
    tokens_BT = torch.full((1, 1), SILENCE, device=device)
    shape = (1, config.vision.features_per_frame, config.vision.width)
    features_BNW = torch.randn(shape, device=device)
    return lambda: stream.speaks(tokens_BT, features_BNW, SILENCE)
