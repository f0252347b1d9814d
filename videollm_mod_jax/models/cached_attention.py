"""Attention of new tokens to a KV cache that ends with them, at the cost of what is filled.

Letters: B streams, T new tokens, H query heads, G key/value heads, Q = H / G query heads per
key/value head, E head width, C cache capacity, U entries of a block.
"""

import jax
import jax.numpy as jnp

from videollm_mod_jax.models.cache import LayerCache
from videollm_mod_jax.models.cached_attention_gpu import split_attention

BLOCK = 512
"""Cache entries that are read at a time."""

QUERY_CHUNK = 512
"""Longest run of queries whose scores against a block are in memory at once."""


def cached_attention(
    q_BTHE: jax.Array, cache: LayerCache, start_B: jax.Array, kernels: str
) -> jax.Array:
    """Attention of T tokens to all entries up to their own. Without a gradient.

    ```
    entries 0 1 2 | 3 4 | free       start 3, T = 2
    query 0 x x x   x .   . .
    query 1 x x x   x x   . .
    ```

    What lies behind the entries of a stream is never read, or has no influence whatever it is.

    Args:
      q_BTHE: rotated queries of the T tokens.
      cache: to which their keys and values have been appended.
      start_B: int32 entry of the first of them.
      kernels: of `execution.KERNELS`, not `auto`.

    Returns:
      [B, T, H, E] in q's dtype; scores and softmax are float32. What padding tokens get is
      meaningless.
    """
    B, T, H, E = q_BTHE.shape
    # Triton's arrays are powers of two wide.
    if kernels == "gpu" and E & (E - 1) == 0:
        return split_attention(q_BTHE, cache.k_BGCE, cache.v_BGCE, start_B, interpret=False)
    G = cache.k_BGCE.shape[1]
    q_BGQTE = jnp.moveaxis(q_BTHE.reshape(B, T, G, H // G, E), 1, 3)
    end_B = start_B + T
    chunks = -(-T // QUERY_CHUNK)
    if chunks == 1:
        out_BGQTE = _block_attention(q_BGQTE, cache, start_B, end_B)
    else:
        size = -(-T // chunks)
        pad = chunks * size - T
        q_BGQTE = jnp.pad(q_BGQTE, [(0, 0)] * 3 + [(0, pad), (0, 0)])
        q_NBGQTE = jnp.moveaxis(q_BGQTE.reshape(*q_BGQTE.shape[:3], chunks, size, E), 3, 0)
        first_N = size * jnp.arange(chunks, dtype=jnp.int32)
        out_NBGQTE = jax.lax.map(
            lambda chunk: _block_attention(chunk[0], cache, start_B + chunk[1], end_B),
            (q_NBGQTE, first_N),
        )
        out_BGQTE = jnp.moveaxis(out_NBGQTE, 0, 3).reshape(q_BGQTE.shape)[:, :, :, :T]
    return jnp.moveaxis(out_BGQTE, 3, 1).reshape(B, T, H, E)


def _block_attention(
    q_BGQTE: jax.Array, cache: LayerCache, start_B: jax.Array, end_B: jax.Array
) -> jax.Array:
    """Goes over the blocks up to the longest stream's last entry, with an online softmax.

    ```
    C = 10, blocks of 4, longest stream ends with entry 8
    entries   0 1 2 3 | 4 5 6 7 | 8 9
    step 0    x x x x
    step 1              x x x x
    step 2                . .     x x        moved back into the cache; 6 and 7 were seen
    ```

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.

    Args:
      q_BGQTE: rotated queries.
      cache: as in `cached_attention`.
      start_B: int32 entry of the first query.
      end_B: int32 entries written; queries at or behind them are padding.

    Returns:
      [B, G, Q, T, E] in q's dtype.
    """
    T, E, C = *q_BGQTE.shape[3:], cache.k_BGCE.shape[2]
    U = min(BLOCK, C)
    last_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)

    def step(block: jax.Array | int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top_BGQT, sum_BGQT, out_BGQTE = carry
        first = jnp.minimum(block * U, C - U)
        entry_U = first + jnp.arange(U, dtype=jnp.int32)
        k_BGUE, v_BGUE = (
            jax.lax.dynamic_slice_in_dim(x_BGCE, first, U, 2).astype(q_BGQTE.dtype)
            for x_BGCE in (cache.k_BGCE, cache.v_BGCE)
        )
        # A weight of zero does not remove what is not finite.
        is_written_BU = entry_U < end_B[:, None]
        v_BGUE = jnp.where(is_written_BU[:, None, :, None], v_BGUE, 0)
        scores_BGQTU = jnp.einsum(
            "BGQTE,BGUE->BGQTU", q_BGQTE, k_BGUE, preferred_element_type=jnp.float32
        )
        visible_BTU = (entry_U >= block * U) & (entry_U <= last_BT[:, :, None])
        scores_BGQTU = jnp.where(visible_BTU[:, None, None], E**-0.5 * scores_BGQTU, -jnp.inf)
        # Finite from the first block on: every query sees entry 0.
        new_top_BGQT = jnp.maximum(top_BGQT, jnp.max(scores_BGQTU, axis=-1))
        weights_BGQTU = jnp.exp(scores_BGQTU - new_top_BGQT[..., None])
        shrink_BGQT = jnp.exp(top_BGQT - new_top_BGQT)
        block_BGQTE = jnp.einsum(
            "BGQTU,BGUE->BGQTE",
            weights_BGQTU.astype(v_BGUE.dtype),
            v_BGUE,
            preferred_element_type=jnp.float32,
        )
        return (
            new_top_BGQT,
            shrink_BGQT * sum_BGQT + jnp.sum(weights_BGQTU, axis=-1),
            shrink_BGQT[..., None] * out_BGQTE + block_BGQTE,
        )

    carry = (
        jnp.full(q_BGQTE.shape[:-1], -jnp.inf, jnp.float32),
        jnp.zeros(q_BGQTE.shape[:-1], jnp.float32),
        jnp.zeros(q_BGQTE.shape, jnp.float32),
    )
    if C == U:
        _, sum_BGQT, out_BGQTE = step(0, carry)
    else:
        seen = jnp.max(jnp.minimum(last_BT[:, -1] + 1, end_B))
        _, sum_BGQT, out_BGQTE = jax.lax.fori_loop(0, -(-seen // U), step, carry)
    return (out_BGQTE / sum_BGQT[..., None]).astype(q_BGQTE.dtype)
