"""Causal grouped-query attention of a sequence with itself.

Letters: B batch, T tokens, U key tokens, H query heads, G key/value heads, Q = H / G query heads
per key/value head, E head width.
"""

import jax
import jax.numpy as jnp

QUERY_CHUNK = 512
"""Longest run of queries whose scores against all keys are in memory at once."""


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

    Args:
      q_BTHE: rotated queries.
      k_BTGE: rotated keys; G divides H.
      v_BTGE: values.
      kernels: of `execution.KERNELS`, not `auto`.

    Returns:
      [B, T, H, E] in q's dtype; scores and softmax are float32.
    """
    del kernels
    B, T, H, E = q_BTHE.shape
    chunks = -(-T // QUERY_CHUNK)
    if chunks == 1:
        return dense_attention(q_BTHE, k_BTGE, v_BTGE, jnp.tri(T, dtype=bool)[None])
    size = -(-T // chunks)
    pad = chunks * size - T
    q_NBTHE = jnp.pad(q_BTHE, [(0, 0), (0, pad), (0, 0), (0, 0)]).reshape(B, chunks, size, H, E)

    @jax.checkpoint
    def one(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BTHE, first = chunk
        visible_TU = jnp.arange(T) <= first + jnp.arange(size)[:, None]
        return dense_attention(q_BTHE, k_BTGE, v_BTGE, visible_TU[None])

    out = jax.lax.map(one, (jnp.moveaxis(q_NBTHE, 1, 0), size * jnp.arange(chunks)))
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, H, E)[:, :T]


def dense_attention(
    q_BTHE: jax.Array, k_BUGE: jax.Array, v_BUGE: jax.Array, visible_BTU: jax.Array
) -> jax.Array:
    """Attention under a mask, all scores in memory at once.

    Args:
      q_BTHE: rotated queries.
      k_BUGE: rotated keys; G divides H.
      v_BUGE: values.
      visible_BTU: bool, B may be 1; every query sees some key.

    Returns:
      [B, T, H, E] in q's dtype; scores and softmax are float32.
    """
    B, T, H, E = q_BTHE.shape
    G = k_BUGE.shape[2]
    q_BTGQE = (q_BTHE * E**-0.5).reshape(B, T, G, H // G, E)
    scores_BGQTU = jnp.einsum(
        "BTGQE,BUGE->BGQTU", q_BTGQE, k_BUGE, preferred_element_type=jnp.float32
    )
    scores_BGQTU = jnp.where(visible_BTU[:, None, None], scores_BGQTU, -jnp.inf)
    weights_BGQTU = jax.nn.softmax(scores_BGQTU, axis=-1).astype(v_BUGE.dtype)
    return jnp.einsum("BGQTU,BUGE->BTGQE", weights_BGQTU, v_BUGE).reshape(B, T, H, E)
