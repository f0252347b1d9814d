"""Conversations that are evaluated together, each on a device of its own."""

import math
from typing import TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from videollm_mod_jax.training.optimizer import Variables
from videollm_mod_jax.training.sharding import BATCH_AXES

Tree = TypeVar("Tree")


def put_rows(tree: Tree, rows: int, variables: Variables) -> Tree:
    """Splits rows over the devices of a model's mesh, if they divide; else every device has all.

    ```
    mesh (1, 4, 1)    rows 8   ->   0 1 | 2 3 | 4 5 | 6 7
                      rows 6   ->   all  | all | all | all
    ```

    Args:
      tree: arrays; of those whose leading axis is `rows` that axis is split.
      rows: how many there are.
      variables: of the model. Without a mesh, the arrays come back as they are.
    """
    sharding = jax.tree.leaves(variables)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return tree
    mesh = sharding.mesh
    divides = rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0

    def put(leaf: jax.Array) -> jax.Array:
        split = divides and leaf.shape[:1] == (rows,)
        spec = PartitionSpec(BATCH_AXES) if split else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)
