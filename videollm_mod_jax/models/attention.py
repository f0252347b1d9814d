"""Causal grouped-query attention of a sequence with itself, by the kernels of the platform.

Letters: B batch, T tokens, H query heads, G key/value heads, E head width.
"""

import jax
import jax.numpy as jnp

from videollm_mod_jax.models.attention_per_device import attend_per_device
from videollm_mod_jax.models.attention_splash import splash_attention
from videollm_mod_jax.models.attention_xla import blockwise_attention


def causal_attention(
    q_BTHE: jax.Array, k_BTGE: jax.Array, v_BTGE: jax.Array, kernels: str
) -> jax.Array:
    """Attention of every token to itself and those before it.

    ```
    query 0   x . .
    query 1   x x .
    query 2   x x x
    ```

    Order decides, not position: the rows of a routed layer stand in the order of the stream, and
    padding stands behind everything that could see it.

    No kernel holds all scores at once, forward or backward, computes the blocks above the diagonal,
    or repeats keys for the query heads that share them.

    Args:
      q_BTHE: rotated queries.
      k_BTGE: rotated keys; G divides H.
      v_BTGE: values.
      kernels: `xla`: blocks in plain XLA; `tpu`: Splash; `gpu`: cuDNN's flash attention. What each
        can serve is said by `execution.choose_kernels`.

    Returns:
      [B, T, H, E] in q's dtype; scores and softmax are float32.
    """
    if kernels == "xla":
        return blockwise_attention(q_BTHE, k_BTGE, v_BTGE)
    attend = {"tpu": splash_attention, "gpu": _cudnn_attention}[kernels]
    return attend_per_device(attend, q_BTHE, k_BTGE, v_BTGE)


def _cudnn_attention(q_BTHE: jax.Array, k_BTGE: jax.Array, v_BTGE: jax.Array) -> jax.Array:
    T = q_BTHE.shape[1]
    # JAX refuses gradients of odd lengths; no token sees one that is appended.
    q_BTHE, k_BTGE, v_BTGE = (
        jnp.pad(x, [(0, 0), (0, T % 2), (0, 0), (0, 0)]) for x in (q_BTHE, k_BTGE, v_BTGE)
    )
    return jax.nn.dot_product_attention(
        q_BTHE, k_BTGE, v_BTGE, is_causal=True, implementation="cudnn"
    )[:, :T]
