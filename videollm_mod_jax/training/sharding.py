"""How arrays lie on a mesh of devices: logical axis names in, shardings out.

Modules name the axes of their parameters (`embed`, `heads`, ...); what a name means on the mesh is
said here, as data, and nowhere else. One device is a mesh of one.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM, init_variables
from videollm_mod_jax.training.optimizer import Variables, split_variables
from videollm_mod_jax.training.state import TrainState, create_state

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules = Mapping[str, str | tuple[str, ...] | None]

_REPLICATE: Rules = {
    "batch": BATCH_AXES,
    # Never sharded: a routed layer gathers rows of any position.
    "sequence": None,
    "residual": None,
    "embed": None,
    "inner": None,
    "embed_out": None,
    "vision": None,
    "heads": None,
    "kv_heads": None,
    "mlp": None,
    "vocab": None,
    "lora_rank": None,
    "layers": None,
}
# The projections back to the residual stream, [inner, embed_out], are split by rows where they can
# be, as those to it are: a layer's weight, gathered along its first axis, needs no transposed copy,
# and the stack of all layers none that lasts the whole step.
_FSDP: Rules = dict.fromkeys(("embed", "lora_rank", "inner"), "fsdp")
_TENSOR: Rules = dict.fromkeys(("heads", "kv_heads", "mlp", "vocab", "inner"), "tensor")

RULES: Mapping[str, Rules] = {
    "replicate": _REPLICATE,
    "fsdp": {**_REPLICATE, **_FSDP},
    "fsdp_tensor": {**_REPLICATE, **_FSDP, **_TENSOR, "embed_out": "fsdp"},
}
"""By rule set: the mesh axes over which each logical axis is split."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that lay arrays on it.

    Attributes:
      mesh: with the axes `MESH_AXES`.
      rules: one of `RULES`.
    """

    mesh: Mesh
    rules: Rules

    @property
    def batch(self) -> NamedSharding:
        """Of a batch's leading axis."""
        return NamedSharding(self.mesh, PartitionSpec(self.rules["batch"]))

    @property
    def replicated(self) -> NamedSharding:
        """Of small arrays that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Where the train step must be traced and run: constraints inside the model take effect."""
        # `with mesh:` would silently turn every constraint of the model into nothing.
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(tuple(self.rules.items())):
            yield

    def axes(self, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Mesh axes of an array with logical axis names, given its shape.

        An axis whose size the mesh does not divide stays whole (key/value heads on a large tensor
        axis). Where two claim the same mesh axis, the longer one has it: `lora_rank` is split only
        where the other side of an adapter is not.

        ```
        mesh (1, 8, 1), rules fsdp       embed, lora_rank  [4096, 128]  ->  fsdp, None
                                         lora_rank, heads  [128, 4096]  ->  fsdp, None
                                         lora_rank, embed  [128, 4096]  ->  None, fsdp
        ```

        Raises:
          KeyError: a name that the rules do not know.
        """
        axes: list[str | None] = [None] * len(shape)
        for i in sorted(range(len(shape)), key=lambda i: -shape[i]):
            axis = None if names[i] is None else self.rules[names[i]]
            if axis is not None and axis not in axes and shape[i] % self.mesh.shape[axis] == 0:
                axes[i] = axis
        return PartitionSpec(*axes)

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this process's part of a batch on its devices."""
        return {
            name: jax.make_array_from_process_local_data(self.batch, value)
            for name, value in batch.items()
        }


def make_layout(
    rule_set: str, mesh_shape: tuple[int, int, int], devices: Sequence[jax.Device] | None = None
) -> Layout:
    """Makes a mesh of all devices there are.

    Args:
      rule_set: a name in `RULES`.
      mesh_shape: devices along data, fsdp and tensor; one of them may be -1, "the rest".
      devices: to make it of; None takes those of all processes.

    Raises:
      UserError: an unknown rule set, or a shape that does not fit the devices.
    """
    if rule_set not in RULES:
        raise UserError(f"sharding is {rule_set!r}; choose one of {', '.join(RULES)}")
    devices = jax.devices() if devices is None else devices
    count, given = len(devices), [size for size in mesh_shape if size != -1]
    rest = count // max(math.prod(given), 1)
    shape = tuple(rest if size == -1 else size for size in mesh_shape)
    if len(given) < 2 or min(shape) < 1 or math.prod(shape) != count:
        raise UserError(
            f"mesh is {mesh_shape} (devices along {', '.join(MESH_AXES)}); it does not fit the "
            f"{count} devices here: the product must be {count}, and one size may be -1"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Auto, not the default Explicit: under Explicit axes every gather needs a sharding by hand.
    types = (AxisType.Auto,) * len(MESH_AXES)
    if slices == 1:
        mesh = jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    else:
        mesh = Mesh(arrange_slices(shape, slices, devices), MESH_AXES, axis_types=types)
    process = np.vectorize(lambda device: device.process_index)(mesh.devices)
    if np.any(process != process[:, :, :1]):
        # They would hold the same rows of a batch, of which each reads its own.
        raise UserError(
            f"mesh is {shape} (devices along {', '.join(MESH_AXES)}), which puts the devices along "
            "tensor into several processes; make the last size smaller, so that one suffices"
        )
    return Layout(mesh, RULES[rule_set])


def arrange_slices(
    shape: tuple[int, int, int], slices: int, devices: Sequence[jax.Device]
) -> np.ndarray:
    """Places the devices of several slices, which a slow network connects, on a mesh.

    The network between slices carries the outermost axis that can be: data, whose devices meet
    once per update, and what data is too short for, fsdp. Tensor stays inside a slice.

    ```
    slices 2, shape (2, 4, 1)    data 0: slice 0 0 0 0      shape (1, 8, 1)    0 0 0 0 1 1 1 1
                                 data 1: slice 1 1 1 1
    ```

    Args:
      shape: devices along data, fsdp and tensor; its product is their number.
      slices: how many `slice_index`es the devices have.
      devices: as many of each slice.

    Returns:
      Array of devices of that shape.

    Raises:
      UserError: tensor would have to cross slices.
    """
    data = math.gcd(shape[0], slices)
    fsdp = slices // data
    if shape[1] % fsdp:
        raise UserError(
            f"mesh is {shape} (devices along {', '.join(MESH_AXES)}), which does not fit {slices} "
            f"slices: make the first size a multiple of {slices}, so that slices share gradients "
            "alone"
        )
    inside = (shape[0] // data, shape[1] // fsdp, shape[2])
    return mesh_utils.create_hybrid_device_mesh(
        inside,
        (data, fsdp, 1),
        devices,
        # As jax.make_mesh does where the links of a slice form a plane.
        allow_split_physical_axes=devices[0].device_kind in ("TPU v5 lite", "TPU v5e"),
    )


def abstract_variables(model: VideoLLM, layout: Layout | None) -> Variables:
    """The variables of a model as `jax.ShapeDtypeStruct`s with shardings.

    Args:
      model: any; nothing is allocated.
      layout: None places everything on this process's first device.
    """
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), method="init_all"))
    if layout is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            nn.meta.unbox(boxed),
        )
    specs = nn.get_partition_spec(boxed)

    def place(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        names = tuple(spec) + (None,) * (len(leaf.shape) - len(spec))
        sharding = NamedSharding(layout.mesh, layout.axes(names, leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, nn.meta.unbox(boxed), specs)


def abstract_training(
    model: VideoLLM, optimizer: optax.GradientTransformation, trainable: str, layout: Layout
) -> tuple[TrainState, Variables]:
    """State and frozen variables of a run as `jax.ShapeDtypeStruct`s with shardings.

    Optimizer moments are laid out as the variables that they belong to.

    Raises:
      UserError: see `split_variables`.
    """
    trained, frozen = split_variables(abstract_variables(model, layout), trainable)
    state = jax.eval_shape(lambda tree: create_state(tree, optimizer, seed=0), trained)

    def like(leaf: jax.ShapeDtypeStruct, variable: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=variable.sharding)

    def whole(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.replicated)

    state = TrainState(
        step=whole(state.step),
        trained=jax.tree.map(like, state.trained, trained),
        opt_state=optax.tree_map_params(
            optimizer, like, state.opt_state, trained, transform_non_params=whole
        ),
        rng=whole(state.rng),
    )
    return state, frozen


def shardings(tree: Any) -> Any:
    """The sharding of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def init_sharded(model: VideoLLM, key: jax.Array, layout: Layout) -> Variables:
    """Random variables, each device making only its own part of them."""
    out = shardings(abstract_variables(model, layout))
    return jax.jit(lambda key: init_variables(model, key), out_shardings=out)(key)
