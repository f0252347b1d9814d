"""Attention of new tokens to a KV cache that ends with them.

Letters: B streams, T new tokens, H query heads, G key/value heads, E head width, C cache capacity.
"""

import jax
import jax.numpy as jnp

from videollm_mod_jax.models.attention import dense_attention
from videollm_mod_jax.models.cache import LayerCache


def cached_attention(
    q_BTHE: jax.Array, cache: LayerCache, start_B: jax.Array, kernels: str
) -> jax.Array:
    """Attention of T tokens to all entries up to their own.

    ```
    entries 0 1 2 | 3 4 | free       start 3, T = 2
    query 0 x x x   x .   . .
    query 1 x x x   x x   . .
    ```

    Args:
      q_BTHE: rotated queries of the T tokens.
      cache: to which their keys and values have been appended.
      start_B: int32 entry of the first of them.
      kernels: of `execution.KERNELS`, not `auto`.

    Returns:
      [B, T, H, E] in q's dtype; scores and softmax are float32. What padding tokens get is
      meaningless.
    """
    del kernels
    T, C = q_BTHE.shape[1], cache.k_BGCE.shape[2]
    last_BT = start_B[:, None] + jnp.arange(T)
    visible_BTC = jnp.arange(C) <= last_BT[:, :, None]
    k_BCGE, v_BCGE = (
        jnp.swapaxes(x, 1, 2).astype(q_BTHE.dtype) for x in (cache.k_BGCE, cache.v_BGCE)
    )
    return dense_attention(q_BTHE, k_BCGE, v_BCGE, visible_BTC)
