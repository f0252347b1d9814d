"""Models without a checkpoint, and streams that have run for an hour, made without running them.

What a frame costs depends on what the caches hold, not on how it came there, so that the caches are
filled with random keys and values at the positions that a stream would have given them.

Letters: T tokens that a layer stores, C cache capacity.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from videollm_mod_jax.models import (
    Execution,
    LayerCache,
    VideoLLM,
    VideoLLMConfig,
    config_plan,
    init_variables,
    unstack_layers,
)
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.streaming.engine import StreamState


def random_variables(config: VideoLLMConfig) -> dict[str, Any]:
    """Random weights of a per-layer model, drawn stacked and taken apart.

    What draws 32 unrolled layers takes minutes to compile for a GPU: every kernel of a layer with a
    key of its own is a program of its own.
    """
    scanned = VideoLLM(config, Execution(scan=True))
    return unstack_layers(init_variables(scanned, jax.random.key(0)), config_plan(config))


@dataclasses.dataclass(frozen=True)
class Context:
    """What a stream has seen: frames, with the text spread evenly before them.

    ```
    frames 2, text 3, N = 3       a v v v b c w w w
    ```

    Attributes:
      frames: F, at least 1 where there is text.
      text: tokens before the frames, the interval tokens among them.
    """

    frames: int
    text: int

    def frame_starts(self, tokens_per_frame: int) -> np.ndarray:
        """Position of the first token of every frame, int32.

        ```
        a v v v b c w w w       1 6
        ```
        """
        frame_F = np.arange(self.frames)
        text_F = (frame_F + 1) * self.text // self.frames
        return (text_F + frame_F * tokens_per_frame).astype(np.int32)

    def positions(self, tokens_per_frame: int, keep: int | None) -> np.ndarray:
        """Stream positions that a layer stores, int32, increasing.

        ```
        a v v v b c w w w       dense    0 1 2 3 4 5 6 7 8
        0 1 2 3 4 5 6 7 8       keep 2   0 1 2   4 5 6 7
        ```

        A routed layer keeps evenly spaced tokens, as the selection `uniform` does: which ones
        makes no difference to time.

        Args:
          tokens_per_frame: N.
          keep: K of a routed layer; None for a dense one.
        """
        N = tokens_per_frame
        kept = range(N) if keep is None else {j * N // keep for j in range(keep)}
        dropped = np.array([n for n in range(N) if n not in kept], int)
        is_stored_S = np.ones(self.text + self.frames * N, bool)
        is_stored_S[self.frame_starts(N)[:, None] + dropped] = False
        return np.flatnonzero(is_stored_S).astype(np.int32)


def fill(
    model: VideoLLM,
    context: Context,
    room: Context,
    *,
    batch_size: int,
    seed: int,
) -> StreamState:
    """The state of `batch_size` streams behind a context, with random contents.

    Args:
      model: per-layer model (`scan=False`).
      context: what each stream has seen.
      room: what the caches hold, at least the context.
      batch_size: B.
      seed: of the contents.
    """
    config = model.config
    state = engine.start(model, batch_size, room.text, room.frames, seed)
    logits_key, *keys = jax.random.split(jax.random.key(seed), 1 + len(state.caches))
    caches = tuple(
        append_random(cache, context.positions(config.tokens_per_frame, spec.keep), key)
        for cache, spec, key in zip(state.caches, config_plan(config), keys, strict=True)
    )
    length = context.text + context.frames * config.tokens_per_frame
    return state.replace(
        caches=caches,
        position_B=jnp.full_like(state.position_B, length),
        logits_BV=jax.random.normal(logits_key, state.logits_BV.shape),
    )


@functools.partial(jax.jit, donate_argnums=0)
def append_random(cache: LayerCache, position_T: jax.Array, key: jax.Array) -> LayerCache:
    """Appends entries at these stream positions, the same for every stream of the cache.

    Args:
      cache: donated; it has room for them.
      position_T: int32, increasing.
      key: of their keys and values.
    """
    B, G, _, E = cache.k_BGCE.shape
    k_BTGE, v_BTGE = jax.random.normal(key, (2, B, len(position_T), G, E), cache.k_BGCE.dtype)
    return cache.append(k_BTGE, v_BTGE, jnp.broadcast_to(position_T, (B, len(position_T))))
