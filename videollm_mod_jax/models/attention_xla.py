"""Causal flash attention in plain XLA: portable, blocks above the diagonal skipped.

Source of the algorithm: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2. Neither pass ever
holds more scores than one block of queries has to one block of keys.
"""

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256
"""Most rows of a block; shorter sequences are one block."""


def block_length(T: int) -> int:
    """Rows of a block of a sequence: the fewest blocks of at most `BLOCK`, as even as can be.

    ```
    tokens     7   256   257   368   600    6601   7680
    rows      16   256   144   192   208     256    256
    blocks     1     1     2     2     3      26     30
    ```
    """
    blocks = -(-T // BLOCK)
    # Vector registers hold 8 rows of float32, 16 of bfloat16.
    return -(-T // (16 * blocks)) * 16


def block_pairs(blocks: int) -> np.ndarray:
    """The (query block, key block) pairs that attention computes, in order.

    ```
    keys     0 1 2
    query 0  1 . .
    query 1  2 3 .        ->  (0, 0) (1, 0) (1, 1) (2, 0) (2, 1) (2, 2)
    query 2  4 5 6
    ```

    Returns:
      int32 [blocks * (blocks + 1) / 2, 2].
    """
    return np.stack(np.tril_indices(blocks), axis=1).astype(np.int32)


def blockwise_attention(q_BTHE: jax.Array, k_BTGE: jax.Array, v_BTGE: jax.Array) -> jax.Array:
    """As `attention.causal_attention`, in blocks.

    The program's size does not depend on T, its memory grows with T, and its operations come to
    1 + 1 / blocks of the causal half.
    """
    B, T, H, E = q_BTHE.shape
    G = k_BTGE.shape[2]
    size = block_length(T)

    def blocks(x: jax.Array, heads: tuple[int, ...]) -> jax.Array:
        """[B, T, heads, E] -> [blocks, B, heads, size, E]."""
        x = jnp.pad(x, [(0, 0), (0, -T % size), (0, 0), (0, 0)])
        x = x.reshape(B, -1, size, *heads, E)
        return jnp.moveaxis(jnp.moveaxis(x, 2, -2), 1, 0)

    # Query heads that share keys are rows of one matmul: keys are never repeated.
    out = _attend(blocks(q_BTHE, (G, H // G)), blocks(k_BTGE, (G,)), blocks(v_BTGE, (G,)))
    out = jnp.moveaxis(jnp.moveaxis(out, 0, 1), -2, 2)
    return out.reshape(B, -1, H, E)[:, :T]


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [blocks, B, G, Q, T, E], k and v [blocks, B, G, U, E]; returns q's shape and dtype."""
    return _forward(q, k, v)[0]


def _seen(T: int, i: jax.Array, j: jax.Array) -> jax.Array:
    """Which keys of block j the queries of block i see, bool [T queries, T keys]."""
    query_TU = jax.lax.broadcasted_iota(jnp.int32, (T, T), 0)
    key_TU = jax.lax.broadcasted_iota(jnp.int32, (T, T), 1)
    return key_TU <= query_TU + (i - j) * T


def _forward(q: jax.Array, k: jax.Array, v: jax.Array):
    T, E = q.shape[-2:]

    def step(carry, pair):
        out, logsumexp, total_BGQTE, maximum_BGQT, weight_BGQT = carry
        i, j = pair
        scores_BGQTU = E**-0.5 * _product("BGQTE,BGUE->BGQTU", q[i], k[j])
        scores_BGQTU = jnp.where(_seen(T, i, j), scores_BGQTU, -jnp.inf)
        # The first block of a row takes nothing over from the row before: its factor is 0.
        before_BGQT = jnp.where(j == 0, -jnp.inf, maximum_BGQT)
        maximum_BGQT = jnp.maximum(before_BGQT, jnp.max(scores_BGQTU, axis=-1))
        weights_BGQTU = jnp.exp(scores_BGQTU - maximum_BGQT[..., None])
        factor_BGQT = jnp.exp(before_BGQT - maximum_BGQT)
        weight_BGQT = factor_BGQT * weight_BGQT + jnp.sum(weights_BGQTU, axis=-1)
        update_BGQTE = _product("BGQTU,BGUE->BGQTE", weights_BGQTU.astype(v.dtype), v[j])
        total_BGQTE = factor_BGQT[..., None] * total_BGQTE + update_BGQTE
        # The last block of a row writes last.
        out = out.at[i].set((total_BGQTE / weight_BGQT[..., None]).astype(out.dtype))
        logsumexp = logsumexp.at[i].set(maximum_BGQT + jnp.log(weight_BGQT))
        return (out, logsumexp, total_BGQTE, maximum_BGQT, weight_BGQT), None

    zeros = jnp.zeros(q.shape[:-1], jnp.float32)
    start = (
        jnp.zeros_like(q),
        zeros,
        jnp.zeros(q.shape[1:], jnp.float32),
        zeros[0],
        zeros[0],
    )
    (out, logsumexp, *_), _ = jax.lax.scan(step, start, _pairs(q))
    return out, (q, k, v, out, logsumexp)


def _backward(saved, d_out: jax.Array):
    q, k, v, out, logsumexp = saved
    T, E = q.shape[-2:]
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    # Scores have their queries last here, so that the five products find what they sum over in
    # place: no block of scores is transposed.
    q_last, d_out_last = (jnp.moveaxis(x, -1, 3) for x in (q, d_out))
    k_last = jnp.swapaxes(k, -1, -2)

    def step(carry, pair):
        d_q_last, d_k, d_v, row_BGEQT = carry
        i, j = pair
        scores_BGUQT = E**-0.5 * _product("BGUE,BGEQT->BGUQT", k[j], q_last[i])
        seen_UQT = _seen(T, i, j).T[:, None]
        scores_BGUQT = jnp.where(seen_UQT, scores_BGUQT, -jnp.inf)
        weights_BGUQT = jnp.exp(scores_BGUQT - logsumexp[i][:, :, None])
        d_v = d_v.at[j].add(
            _product("BGUQT,BGQTE->BGUE", weights_BGUQT.astype(d_out.dtype), d_out[i])
        )
        d_weights_BGUQT = _product("BGUE,BGEQT->BGUQT", v[j], d_out_last[i])
        d_scores_BGUQT = weights_BGUQT * (d_weights_BGUQT - delta[i][:, :, None])
        d_scores_BGUQT = (E**-0.5 * d_scores_BGUQT).astype(q.dtype)
        d_k = d_k.at[j].add(_product("BGUQT,BGQTE->BGUE", d_scores_BGUQT, q[i]))
        row_BGEQT = jnp.where(j == 0, 0.0, row_BGEQT)
        row_BGEQT += _product("BGEU,BGUQT->BGEQT", k_last[j], d_scores_BGUQT)
        d_q_last = d_q_last.at[i].set(row_BGEQT.astype(q.dtype))
        return (d_q_last, d_k, d_v, row_BGEQT), None

    # Rows of queries are finished one by one; keys, of which there are fewer, stay in float32.
    start = (
        jnp.zeros_like(q_last),
        jnp.zeros(k.shape, jnp.float32),
        jnp.zeros(v.shape, jnp.float32),
        jnp.zeros(q_last.shape[1:], jnp.float32),
    )
    (d_q_last, d_k, d_v, _), _ = jax.lax.scan(step, start, _pairs(q))
    return jnp.moveaxis(d_q_last, 3, -1), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _pairs(q: jax.Array) -> jax.Array:
    """`block_pairs` of the blocks of q, as a value that depends on q.

    What depends on nothing, JAX would compute ahead of a rematerialised loop over layers, and keep:
    the masks of all pairs, which are as large as all scores.
    """
    pairs, _ = jax.lax.optimization_barrier((jnp.asarray(block_pairs(q.shape[0])), q))
    return pairs


_attend.defvjp(_forward, _backward)
