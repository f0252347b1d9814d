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
    """

    k_BGCE: jax.Array
    v_BGCE: jax.Array
    position_BC: jax.Array

    @property
    def length_B(self) -> jax.Array:
        """int32 number of filled entries, which is also where the next one goes."""
        return jnp.sum(self.position_BC != EMPTY, axis=-1, dtype=jnp.int32)

    def append(self, k_BTGE: jax.Array, v_BTGE: jax.Array, position_BT: jax.Array) -> "LayerCache":
        """Writes T entries behind the filled ones.

        Padding tokens (position EMPTY) may stand at the tail of the T; their slots stay free. The
        caller sees to it that all T fit: an overlong write would move back over older entries.
        """

        start_B = self.length_B

        def write(buffer: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
            update = jax.lax.dynamic_update_slice_in_dim
            each = jax.vmap(lambda buffer, rows, start: update(buffer, rows, start, axis))
            return each(buffer, rows.astype(buffer.dtype), start_B)

        return LayerCache(
            k_BGCE=write(self.k_BGCE, jnp.swapaxes(k_BTGE, 1, 2), 1),
            v_BGCE=write(self.v_BGCE, jnp.swapaxes(v_BTGE, 1, 2), 1),
            position_BC=write(self.position_BC, position_BT, 0),
        )


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
        return cache.replace(position_BC=jnp.where(stays_BC, cache.position_BC, EMPTY))

    return tuple(trim(cache) for cache in caches)
