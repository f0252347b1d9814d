"""What a block does to every row by itself, over all rows of a sequence or some at a time.

Attention is the only part of a block in which rows meet. What stands before and behind it are the
functions of this module.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import PartitionSpec

from videollm_mod_jax.models.layers import LinearWeights, rms_norm
from videollm_mod_jax.models.rope import apply_rope
from videollm_mod_jax.models.row_loop import Keys, RowFunction, row_loop

Linears = Mapping[str, LinearWeights]
"""Weights by name: `q`, `k`, `v`, `o` of attention; `gate`, `up`, `down` of the MLP. The keys of
their dropout have the same names."""


def project(
    rows: tuple[jax.Array, jax.Array],
    weights: tuple[jax.Array, Linears],
    keys: Keys,
    *,
    eps: float,
    frequencies: np.ndarray,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, the first two rotated.

    Args:
      rows: x_BTD of the residual stream, and their int32 positions_BT in the stream.
      weights: scale_D of attention's RMSNorm, and the linears, of which `q`, `k` and `v` count.
      keys: of the linears.
      eps: of the RMSNorm.
      frequencies: [E / 2], from `rope_frequencies`.

    Returns:
      q_BTHE, k_BTGE, v_BTGE.
    """
    (x_BTD, position_BT), (scale_D, linears) = rows, weights
    normed_BTD = rms_norm(x_BTD, scale_D, eps)
    B, T, _ = x_BTD.shape
    q_BTHE, k_BTGE, v_BTGE = (
        linears[name].apply(normed_BTD, keys[name]).reshape(B, T, -1, 2 * len(frequencies))
        for name in ("q", "k", "v")
    )
    q_BTHE = apply_rope(q_BTHE, position_BT, frequencies)
    return q_BTHE, apply_rope(k_BTGE, position_BT, frequencies), v_BTGE


def swiglu(
    x_BTD: jax.Array, weight_BT: jax.Array | None, linears: Linears, keys: Keys
) -> jax.Array:
    """down(silu(gate(x)) * up(x)) * w of normed rows: [B, T, D] -> [B, T, D].

    Args:
      x_BTD: normed rows.
      weight_BT: w; None where every weight is 1.
      linears, keys: of `gate`, `up` and `down`.
    """
    gate, up, down = linears["gate"], linears["up"], linears["down"]
    hidden_BTI = jax.nn.silu(gate.apply(x_BTD, keys["gate"])) * up.apply(x_BTD, keys["up"])
    if weight_BT is not None:
        # `down` is linear, so rows may be weighted before it. Behind it, the weight's gradient
        # would need down's output: a matmul more in the backward pass, which otherwise drops it,
        # and under tensor parallelism an all-reduce more.
        hidden_BTI = hidden_BTI * weight_BT.astype(hidden_BTI.dtype)[..., None]
    return down.apply(hidden_BTI, keys["down"])


def finish(
    rows: tuple[jax.Array, jax.Array, jax.Array | None],
    weights: tuple[jax.Array, Linears],
    keys: Keys,
    *,
    eps: float,
    residual: bool,
) -> jax.Array:
    """What attention and MLP make of every row, given what its heads attended to.

    With a = o(heads): x + w * a + w * mlp(norm(x + a)).

    Args:
      rows: x_BTD of the residual stream; heads_BTO, the heads' outputs side by side, O = H * E;
        and w_BT, None where every weight is 1.
      weights: scale_D of the MLP's RMSNorm, and the linears, of which `o`, `gate`, `up` and `down`
        count.
      keys: of the linears.
      eps: of the RMSNorm.
      residual: False leaves out the first x.

    Returns:
      [B, T, D].
    """
    (x_BTD, heads_BTO, w_BT), (scale_D, linears) = rows, weights
    a_BTD = linears["o"].apply(heads_BTO, keys["o"])
    mlp_BTD = swiglu(rms_norm(x_BTD + a_BTD, scale_D, eps), w_BT, linears, keys)
    if w_BT is not None:
        a_BTD = w_BT[..., None].astype(a_BTD.dtype) * a_BTD
    update_BTD = a_BTD + mlp_BTD
    return x_BTD + update_BTD if residual else update_BTD


def in_row_chunks(
    function: RowFunction, rows: Any, weights: Any, keys: Keys, rows_at_once: int
) -> Any:
    """`function` of a few rows at a time, so that what it has in between is never there for all.

    Every chunk is recomputed in the backward pass, whatever else is: what its gradients need, which
    is what rematerialising the block around it would recompute, and does not recompute again. Every
    chunk of every device draws its dropout by itself, so the draw is another than without chunks.

    Args:
      function: see `RowFunction`.
      rows, weights, keys: its arguments.
      rows_at_once: of a chunk, at most; 0, or T and more, is all of them.

    Returns:
      A tree of arrays [B, T, ...].
    """
    B, T = jax.tree.leaves(rows)[0].shape[:2]
    if rows_at_once == 0:
        return function(rows, weights, keys)

    def chunked(rows, weights, keys):
        if rows_at_once >= T:
            return function(rows, weights, keys)
        return row_loop(function, rows, weights, keys, rows_at_once)

    (batch,) = nn.logical_to_mesh_axes(("batch",)) or (None,)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or batch is None or B % math.prod(mesh.shape[axis] for axis in batch):
        return chunked(rows, weights, keys)

    # Each device loops over its own sequences with weights gathered before the loop, and sums its
    # gradients with those of the others behind it. The partitioner would sum them in every chunk,
    # and would have every device draw the dropout of all.
    def local(rows, shared):
        weights, keys = jax.lax.pcast(shared, batch, to="varying")
        index = jax.lax.axis_index(batch)
        keys = jax.tree.map(lambda key: jax.random.fold_in(key, index), keys)
        return chunked(rows, weights, keys)

    split, whole = PartitionSpec(batch), PartitionSpec()
    return jax.shard_map(local, in_specs=(split, whole), out_specs=split, axis_names=set(batch))(
        rows, (weights, keys)
    )
