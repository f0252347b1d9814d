"""Attention kernels under a mesh: each device attends with its own sequences and heads."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q_BTHE, k_BTGE, v_BTGE) -> out_BTHE."""

_Axes = str | tuple[str, ...] | None


def attend_per_device(
    attend: Attend, q_BTHE: jax.Array, k_BTGE: jax.Array, v_BTGE: jax.Array
) -> jax.Array:
    """Runs a kernel that the partitioner cannot split on the part of every device.

    The logical axis rules in force say how `batch` and `heads` lie on the mesh that is set; an axis
    that the mesh does not divide stays whole. Without a mesh the kernel runs as it is.

    Keys go with the query heads that read them. Where there are too few for that, they are whole
    on every device:

    ```
    tensor 4, H = 8, G = 2     device    0     1     2     3
                               queries  0 1   2 3   4 5   6 7
                               keys     0 0   0 0   1 1   1 1     of 0 1
    ```
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q_BTHE, k_BTGE, v_BTGE)
    B, _, H, _ = q_BTHE.shape
    G = k_BTGE.shape[2]
    batch, heads = nn.logical_to_mesh_axes(("batch", "heads"))
    batch, heads = _dividing(mesh, batch, B), _dividing(mesh, heads, H)
    kv_heads = _dividing(mesh, heads, G)

    def local(q_BTHE: jax.Array, k_BTGE: jax.Array, v_BTGE: jax.Array) -> jax.Array:
        if kv_heads != heads:
            mine = q_BTHE.shape[2]
            head_H = jax.lax.axis_index(heads) * mine + jnp.arange(mine)
            k_BTGE, v_BTGE = (jnp.take(x, head_H // (H // G), axis=2) for x in (k_BTGE, v_BTGE))
        return attend(q_BTHE, k_BTGE, v_BTGE)

    q_spec, kv_spec = (PartitionSpec(batch, None, axes) for axes in (heads, kv_heads))
    # Pallas kernels do not say over which axes their results vary.
    return jax.shard_map(
        local, in_specs=(q_spec, kv_spec, kv_spec), out_specs=q_spec, check_vma=False
    )(q_BTHE, k_BTGE, v_BTGE)


def _dividing(mesh: AbstractMesh, axes: _Axes, size: int) -> _Axes:
    """The mesh axes if they divide an array's axis, else None."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None
