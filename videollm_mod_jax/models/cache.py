"""The KV cache: one array pair per layer, entries in order of their stream position.

Routed layers store only text and kept tokens, so their caches are shorter; mask, trim and append
all go by the stored positions, never by a shared index.
"""

import flax.struct
import jax
import jax.numpy as jnp

from videollm_mod_jax.models.config import VideoLLMConfig
from videollm_mod_jax.models.plan import config_plan

EMPTY = 2**30
"""Position of a free slot or a padding token: later than any real token, hence never attended."""


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one decoder layer, entries contiguous per head, as attention reads them.

    ```
    position  0 1 2 7 9 EMPTY EMPTY EMPTY      length 5, capacity 8
    ```

    Attributes:
      k_BGCE: rotated keys.
      v_BGCE: values.
      position_BC: int32 stream position of every entry, increasing; EMPTY in free slots, which all
        lie behind the filled ones.
      length_B: int32 number of filled entries, which is also where the next one goes.
    """

    k_BGCE: jax.Array
    v_BGCE: jax.Array
    position_BC: jax.Array
    length_B: jax.Array

    def append(self, k_BTGE: jax.Array, v_BTGE: jax.Array, position_BT: jax.Array) -> "LayerCache":
        """Writes T entries behind the filled ones.

        Padding tokens (position EMPTY) may stand at the tail of the T; their slots stay free. The
        caller sees to it that all T fit: an overlong write would move back over older entries.
        """
        k_BGTE, v_BGTE = (
            jnp.swapaxes(rows_BTGE, 1, 2).astype(self.k_BGCE.dtype)
            for rows_BTGE in (k_BTGE, v_BTGE)
        )

        # One contiguous update per stream, which compilers do in place. All streams at once would
        # be a scatter, for which XLA on CPU makes float32 copies of whole bfloat16 caches.
        def write(b: jax.Array, buffers: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            k_BGCE, v_BGCE, position_BC = buffers
            k_1GTE, v_1GTE, position_1T = (
                jax.lax.dynamic_slice_in_dim(rows, b, 1) for rows in (k_BGTE, v_BGTE, position_BT)
            )
            start = self.length_B[b]
            update = jax.lax.dynamic_update_slice
            return (
                update(k_BGCE, k_1GTE, (b, 0, start, 0)),
                update(v_BGCE, v_1GTE, (b, 0, start, 0)),
                update(position_BC, position_1T, (b, start)),
            )

        buffers = (self.k_BGCE, self.v_BGCE, self.position_BC)
        k_BGCE, v_BGCE, position_BC = jax.lax.fori_loop(0, self.length_B.shape[0], write, buffers)
        new_B = jnp.sum(position_BT != EMPTY, axis=-1, dtype=jnp.int32)
        return LayerCache(k_BGCE, v_BGCE, position_BC, self.length_B + new_B)


Caches = tuple[LayerCache, ...]


def layer_capacities(config: VideoLLMConfig, max_text: int, max_frames: int) -> tuple[int, ...]:
    """Entries that each layer stores for a stream: text + N * frames, or text + K * frames."""
    return tuple(
        max_text + max_frames * (config.tokens_per_frame if spec.keep is None else spec.keep)
        for spec in config_plan(config)
    )


def init_caches(
    config: VideoLLMConfig, batch_size: int, max_text: int, max_frames: int, dtype: jnp.dtype
) -> Caches:
    """Empty caches that hold `max_text` text tokens and `max_frames` frames per stream.

    Count the padding of text chunks in `max_text`.
    """
    decoder = config.decoder

    def one(capacity: int) -> LayerCache:
        shape = (batch_size, decoder.num_kv_heads, capacity, decoder.head_dim)
        return LayerCache(
            k_BGCE=jnp.zeros(shape, dtype),
            v_BGCE=jnp.zeros(shape, dtype),
            position_BC=jnp.full((batch_size, capacity), EMPTY, jnp.int32),
            length_B=jnp.zeros((batch_size,), jnp.int32),
        )

    return tuple(one(capacity) for capacity in layer_capacities(config, max_text, max_frames))


def trim_caches(caches: Caches, limit_B: jax.Array) -> Caches:
    """Forgets every entry at position >= limit, in every layer, by position.

    ```
    limit 5     dense layer   0 1 2 3 4 5 6  ->  0 1 2 3 4 EMPTY EMPTY
                routed layer  0 1 4 6        ->  0 1 4 EMPTY
    ```
    """

    def trim(cache: LayerCache) -> LayerCache:
        stays_BC = cache.position_BC < limit_B[:, None]
        return cache.replace(
            position_BC=jnp.where(stays_BC, cache.position_BC, EMPTY),
            length_B=jnp.sum(stays_BC, axis=-1, dtype=jnp.int32),
        )

    return tuple(trim(cache) for cache in caches)
