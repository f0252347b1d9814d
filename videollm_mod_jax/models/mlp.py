"""The MLP of a block as a function, over all rows of a sequence or some at a time."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from videollm_mod_jax.models.layers import LinearWeights

Weights = tuple[LinearWeights, LinearWeights, LinearWeights]
Keys = tuple[jax.Array | None, jax.Array | None, jax.Array | None]


def swiglu(
    x_BTD: jax.Array, weight_BT: jax.Array | None, weights: Weights, dropout_keys: Keys
) -> jax.Array:
    """down(silu(gate(x)) * up(x)) * w, all rows at once.

    Args:
      x_BTD: normed rows.
      weight_BT: w; None where every weight is 1.
      weights: of gate, up and down.
      dropout_keys: of their adapters' dropout, each a key or None.

    Returns:
      [B, T, D].
    """
    gate, up, down = weights
    gate_key, up_key, down_key = dropout_keys
    hidden_BTI = jax.nn.silu(gate.apply(x_BTD, gate_key)) * up.apply(x_BTD, up_key)
    if weight_BT is not None:
        # `down` is linear, so rows may be weighted before it. Behind it, the weight's gradient
        # would need down's output: a matmul more in the backward pass, which otherwise drops it,
        # and under tensor parallelism an all-reduce more.
        hidden_BTI = hidden_BTI * weight_BT.astype(hidden_BTI.dtype)[..., None]
    return down.apply(hidden_BTI, down_key)


def in_row_chunks(
    x_BTD: jax.Array,
    weight_BT: jax.Array | None,
    weights: Weights,
    dropout_keys: Keys,
    rows: int,
) -> jax.Array:
    """`swiglu` of a few rows at a time, so that [T, I] is never in memory.

    ```
    T = 7, rows = 5        0 1 2 3 | 4 5 6 .        . is padding, dropped behind
    ```

    Every chunk is recomputed in the backward pass, whatever else is: gate and up once more, and
    down's adapter up to its rank, which is what rematerialising the block around it would do, and
    does not do again. Every chunk of every device draws its dropout by itself, so the draw is
    another than without chunks.

    Args:
      x_BTD, weight_BT, weights, dropout_keys: as for `swiglu`.
      rows: of a chunk, at most: chunks are as equal as they can be, to pad little. 0, or T and
        more, is all of them.

    Returns:
      [B, T, D].
    """
    if rows == 0 or rows >= x_BTD.shape[1]:
        return swiglu(x_BTD, weight_BT, weights, dropout_keys)
    (batch,) = nn.logical_to_mesh_axes(("batch",)) or (None,)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or batch is None or x_BTD.shape[0] % math.prod(mesh.shape[a] for a in batch):
        return _in_row_chunks(x_BTD, weight_BT, weights, dropout_keys, rows)

    # Each device loops over its own sequences with weights gathered before the loop, and sums its
    # gradients with those of the others behind it. The partitioner would sum them in every chunk.
    def local(x_BTD, weight_BT, shared):
        shared = jax.lax.pcast(shared, batch, to="varying")
        weights, dropout_keys = shared
        index = jax.lax.axis_index(batch)
        dropout_keys = jax.tree.map(lambda key: jax.random.fold_in(key, index), dropout_keys)
        return _in_row_chunks(x_BTD, weight_BT, weights, dropout_keys, rows)

    split, whole = PartitionSpec(batch), PartitionSpec()
    return jax.shard_map(
        local, in_specs=(split, split, whole), out_specs=split, axis_names=set(batch)
    )(x_BTD, weight_BT, (weights, dropout_keys))


def _in_row_chunks(
    x_BTD: jax.Array,
    weight_BT: jax.Array | None,
    weights: Weights,
    dropout_keys: Keys,
    rows: int,
) -> jax.Array:
    B, T, D = x_BTD.shape
    chunks = -(-T // rows)
    rows = -(-T // chunks)

    def split(x_BT: jax.Array) -> jax.Array:
        tail = [(0, 0)] * (x_BT.ndim - 2)
        x_BT = jnp.pad(x_BT, [(0, 0), (0, chunks * rows - T), *tail])
        return jnp.moveaxis(x_BT.reshape(B, chunks, rows, *x_BT.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(part: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        index, x_BTD, weight_BT = part
        keys = jax.tree.map(lambda key: jax.random.fold_in(key, index), dropout_keys)
        return swiglu(x_BTD, weight_BT, weights, keys)

    parts = (jnp.arange(chunks), split(x_BTD), None if weight_BT is None else split(weight_BT))
    out_CBTD = jax.lax.map(chunk, parts)
    return jnp.moveaxis(out_CBTD, 0, 1).reshape(B, chunks * rows, D)[:, :T]
