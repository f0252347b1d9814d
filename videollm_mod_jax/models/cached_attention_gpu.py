"""Attention to a KV cache on NVIDIA GPUs: split-K flash attention, a Pallas kernel for Triton.

`jax.experimental.pallas.ops.gpu.decode_attention` splits the capacity: where little of a cache is
filled, most of its programs have nothing to do. Here the programs of a stream share the blocks that
are filled, in turn, and new tokens, which must not see each other's successors, need no second
kernel.

Letters as in `cached_attention`; M = T * Q query rows of a key/value head, P rows with padding,
J programs that share its cache.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh, Sharding

BLOCK = 64
"""Cache entries that a program reads at a time; a power of two."""

MIN_ROWS, MAX_ROWS = 16, 64
"""Query rows of a program, powers of two: what tensor cores take, and what registers hold."""

PROGRAMS = 132
"""At most so many share the work of one call where it is small: multiprocessors of an H100."""

_LOWEST = float(jnp.finfo(jnp.float32).min)


def split_attention(
    q_BTHE: jax.Array, k_BGCE: jax.Array, v_BGCE: jax.Array, start_B: jax.Array, interpret: bool
) -> jax.Array:
    """Attention of T tokens to the entries up to their own; see `cached_attention`.

    ```
    BLOCK = 2, three programs, stream ends with entry 8
    entries   0 1 | 2 3 | 4 5 | 6 7 | 8 . | free
    program     0     1     2     0     1            each an online softmax, then merged
    ```

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1; Flash-Decoding (Dao et al. 2023) for
    the split and its merging by log-sum-exp.

    Args:
      q_BTHE: rotated queries, bfloat16 or float16; E is a power of two.
      k_BGCE: rotated keys.
      v_BGCE: values.
      start_B: int32 entry of the first query.
      interpret: run the kernel's Python on any device, for tests.

    Returns:
      [B, T, H, E] in q's dtype; scores, softmax and partial results are float32.
    """
    B, T, H, E = q_BTHE.shape
    G = k_BGCE.shape[1]
    # Rows of a key/value head in the order of time, so that early rows read less.
    q_BGTQE = jnp.moveaxis(q_BTHE.reshape(B, T, G, H // G, E), 1, 2)
    # All four alike, so that one sharding says how devices share them.
    start_BG11 = jnp.broadcast_to(start_B[:, None, None, None], (B, G, 1, 1))
    q_BGME = q_BGTQE.reshape(B, G, -1, E)
    out_BGME = _split_attention(q_BGME, k_BGCE, v_BGCE, start_BG11, T, interpret)
    return jnp.moveaxis(out_BGME.reshape(q_BGTQE.shape), 2, 1).reshape(B, T, H, E)


@functools.partial(custom_partitioning, static_argnums=(4, 5))
def _split_attention(
    q_BGME: jax.Array,
    k_BGCE: jax.Array,
    v_BGCE: jax.Array,
    start_BG11: jax.Array,
    tokens: int,
    interpret: bool,
) -> jax.Array:
    B, G, M, E = q_BGME.shape
    C = k_BGCE.shape[2]
    rows = min(MAX_ROWS, max(MIN_ROWS, pl.next_power_of_2(M)))
    row_blocks = -(-M // rows)
    P = row_blocks * rows
    q_BGPE = jnp.pad(q_BGME, [(0, 0), (0, 0), (0, P - M), (0, 0)])
    J = max(1, min(PROGRAMS // (B * G * row_blocks), -(-C // BLOCK)))

    row_spec = pl.BlockSpec((None, None, None, rows), lambda i, r, j: (j, i // G, i % G, r))
    cache_spec = pl.BlockSpec((None, None, C, E), lambda i, r, j: (i // G, i % G, 0, 0))
    out_JBGPE, sum_JBGP, top_JBGP = pl.pallas_call(
        functools.partial(_kernel, rows=rows, tokens=tokens, queries_per_key=M // tokens),
        grid=(B * G, row_blocks, J),
        in_specs=[
            pl.BlockSpec((None, None, None, None), lambda i, r, j: (i // G, i % G, 0, 0)),
            pl.BlockSpec((None, None, rows, E), lambda i, r, j: (i // G, i % G, r, 0)),
            cache_spec,
            cache_spec,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, rows, E), lambda i, r, j: (j, i // G, i % G, r, 0)),
            row_spec,
            row_spec,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((J, B, G, P, E), jnp.float32),
            jax.ShapeDtypeStruct((J, B, G, P), jnp.float32),
            jax.ShapeDtypeStruct((J, B, G, P), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="split_attention",
    )(start_BG11, q_BGPE, k_BGCE, v_BGCE)

    share_JBGP = jnp.exp(top_JBGP - jnp.max(top_JBGP, axis=0))
    sum_BGP = jnp.sum(share_JBGP * sum_JBGP, axis=0)
    out_BGPE = jnp.sum(share_JBGP[..., None] * out_JBGPE, axis=0) / sum_BGP[..., None]
    return out_BGPE[:, :, :M].astype(q_BGME.dtype)


def _partition(
    tokens: int, interpret: bool, mesh: Mesh, arguments: tuple[Any, ...], result: Any
) -> tuple[Mesh, Callable, Sharding, tuple[Sharding, ...]]:
    """Every device attends with the streams and key/value heads of its part of the cache."""
    del result
    local = functools.partial(_split_attention.fun, tokens=tokens, interpret=interpret)
    cache = arguments[1].sharding
    return mesh, local, cache, (cache, cache, cache, cache)


_split_attention.def_partition(
    _partition,
    decode_shardings=False,
    sharding_rule="b g m e, b g c e, b g c e, b g i j -> b g m e",
    need_replication_factors=("m", "e", "c", "i", "j"),
)


def _kernel(
    start_ref, q_ref, k_ref, v_ref, out_ref, sum_ref, top_ref, *, rows, tokens, queries_per_key
):
    """One program: the rows of a block against every J-th block of one head's cache."""
    J, program = pl.num_programs(2), pl.program_id(2)
    E = q_ref.shape[1]
    start, first_row = start_ref[()], pl.program_id(1) * rows
    last_M = start + (first_row + jnp.arange(rows)) // queries_per_key
    written = start + tokens
    seen = jnp.minimum(start + (first_row + rows - 1) // queries_per_key + 1, written)
    q_ME = q_ref[...]

    def step(i, carry):
        top_M, sum_M, out_ME = carry
        first = (program + i * J) * BLOCK
        entry_U = first + jnp.arange(BLOCK)
        is_written_U1 = (entry_U < written)[:, None]
        at = pl.ds(first, BLOCK)
        k_UE = plgpu.load(k_ref.at[at, :], mask=is_written_U1, other=0.0)
        v_UE = plgpu.load(v_ref.at[at, :], mask=is_written_U1, other=0.0)
        scores_MU = E**-0.5 * plgpu.dot(q_ME, k_UE, trans_b=True)
        visible_MU = entry_U[None, :] <= last_M[:, None]
        scores_MU = jnp.where(visible_MU, scores_MU, _LOWEST)
        new_top_M = jnp.maximum(top_M, jnp.max(scores_MU, axis=1))
        # Where a row sees none of a block, its lowest score would weigh 1.
        weights_MU = jnp.where(visible_MU, jnp.exp(scores_MU - new_top_M[:, None]), 0.0)
        shrink_M = jnp.exp(top_M - new_top_M)
        out_ME = shrink_M[:, None] * out_ME + plgpu.dot(weights_MU.astype(v_UE.dtype), v_UE)
        return new_top_M, shrink_M * sum_M + jnp.sum(weights_MU, axis=1), out_ME

    blocks = pl.cdiv(seen, BLOCK)
    top_M, sum_M, out_ME = jax.lax.fori_loop(
        0,
        pl.cdiv(jnp.maximum(blocks - program, 0), J),
        step,
        (
            jnp.full((rows,), _LOWEST, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            jnp.zeros((rows, E), jnp.float32),
        ),
    )
    out_ref[...] = out_ME
    sum_ref[...] = sum_M
    top_ref[...] = top_M
