"""Layouts: the same step on eight devices, and constraints that are really there."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests import tiny_training
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.training import sharding

ROOT = Path(__file__).parents[1]

EIGHT_DEVICES = """
import jax, numpy as np, optax
from tests import tiny_training
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.training import sharding
from videollm_mod_jax.training.optimizer import split_variables
from videollm_mod_jax.training.state import create_state
from videollm_mod_jax.training.step import make_train_step

assert jax.device_count() == 8
config = tiny_training.model_config(rank=2)
model, optimizer = VideoLLM(config, scan=True), optax.sgd(1.0, momentum=0.9)
step = make_train_step(model, optimizer, lambda s: 1.0, stream_weight=1.0, microbatches=2)
trained, frozen = split_variables(tiny_training.variables(config, scan=True), "full")
batch = tiny_training.batch(0, batch_size=16)
one, sums_one = jax.jit(step)(create_state(trained, optimizer, 0), frozen, batch)

for rules, shape in (("replicate", (-1, 1, 1)), ("fsdp", (2, -1, 1)), ("fsdp_tensor", (2, 2, 2))):
    layout = sharding.make_layout(rules, shape)
    target, target_frozen = sharding.abstract_training(model, optimizer, "full", layout)
    create = jax.jit(
        lambda tree: create_state(tree, optimizer, 0), out_shardings=sharding.shardings(target)
    )
    state = create(jax.device_put(trained, sharding.shardings(target.trained)))
    pieces = {"replicate": 1, "fsdp": 4, "fsdp_tensor": 4}[rules]
    for tree in (state.trained, state.opt_state[0].trace):
        leaf = tree["params"]["decoder"]["group_0"]["layer_0"]["block"]["mlp"]["up"]["kernel"]
        assert leaf.size == pieces * leaf.addressable_shards[0].data.size, (rules, leaf.sharding)
    frozen_here = jax.device_put(frozen, sharding.shardings(target_frozen))
    arguments = (state, frozen_here, layout.put_batch(batch))
    with layout.active():
        lowered = jax.jit(step, donate_argnums=0).lower(*arguments)
        text = lowered.as_text()
        assert text.count("sharding_constraint") + text.count("@Sharding") > 0, rules
        if rules == "fsdp_tensor":  # which splits everything that the other two split
            eight, sums_eight = lowered.compile()(*arguments)
            before = jax.tree.map(np.asarray, one.trained)
            difference = jax.tree.map(lambda a, b: a - np.asarray(b), before, eight.trained)
            assert optax.global_norm(difference) < 1e-5 * sums_one["gradient_norm"][0]
            np.testing.assert_allclose(sums_one["loss"], sums_eight["loss"], rtol=1e-5)

# The last layout: every device makes only its own part of the weights.
fresh = sharding.init_sharded(model, jax.random.key(0), layout)
expected = sharding.abstract_variables(model, layout)
assert sharding.shardings(fresh) == sharding.shardings(expected)
print("same")
"""


def test_the_step_on_eight_devices_equals_the_step_on_one():
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def test_every_logical_name_of_the_model_has_a_rule():
    layout = sharding.make_layout("fsdp_tensor", (-1, 1, 1))
    # Raises KeyError for a name that the rules do not know.
    sharding.abstract_variables(VideoLLM(tiny_training.model_config(rank=2), scan=True), layout)
    with pytest.raises(KeyError):
        layout.axes(("typo",), (4,))


def test_rule_sets_agree_on_the_names():
    names = [set(rules) for rules in sharding.RULES.values()]
    assert all(other == names[0] for other in names)


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = AbstractMesh((1, 2, 4), sharding.MESH_AXES)
    layout = sharding.Layout(mesh, sharding.RULES["fsdp_tensor"])
    assert layout.axes(("embed", "kv_heads"), (8, 6)) == PartitionSpec("fsdp", None)
    assert layout.axes(("embed", "kv_heads"), (8, 8)) == PartitionSpec("fsdp", "tensor")


def test_one_device_is_a_mesh_of_one():
    layout = sharding.make_layout("fsdp_tensor", (1, -1, 1))
    assert layout.mesh.size == jax.device_count() == 1
    assert layout.batch_shards == 1


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What a mesh asks of a device of a multi-slice job."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "fake"
    device_kind: str = "fake"


@dataclasses.dataclass(frozen=True)
class FakeMesh:
    """A mesh of fake devices."""

    devices: np.ndarray
    axis_names: tuple[str, ...]
    axis_types: tuple


def slices_on_mesh(shape, slices=2, each=4):
    # Not in the order of their slices, as jax.devices() need not be.
    devices = [FakeDevice(i, i % slices) for i in range(slices * each)]
    return np.vectorize(lambda device: device.slice_index)(
        sharding.arrange_slices(shape, slices, devices)
    )


def test_data_crosses_slices_and_the_other_axes_stay_inside_them():
    # The example of the docstring.
    np.testing.assert_array_equal(slices_on_mesh((2, 4, 1))[..., 0], [[0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(slices_on_mesh((1, 8, 1)).ravel(), [0, 0, 0, 0, 1, 1, 1, 1])
    for shape in ((4, 1, 2), (2, 2, 2), (4, 2, 1), (8, 1, 1)):
        on_mesh = slices_on_mesh(shape)
        assert (on_mesh == on_mesh[:, :1, :1]).all(), shape
        assert [list(on_mesh[:, 0, 0]).count(i) for i in (0, 1)] == [shape[0] // 2] * 2
    with pytest.raises(UserError, match="make the first size a multiple of 2"):
        slices_on_mesh((1, 1, 8))


def test_devices_that_form_slices_are_arranged_by_them(monkeypatch):
    # Mesh takes real devices only; what matters is which arrangement it is given.
    monkeypatch.setattr(sharding, "Mesh", FakeMesh)
    devices = [FakeDevice(i, i // 4) for i in range(8)]
    layout = sharding.make_layout("fsdp", (2, -1, 1), devices)
    ids = np.vectorize(lambda device: device.id)(layout.mesh.devices)
    np.testing.assert_array_equal(ids[..., 0], [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_processes_that_would_share_rows_of_a_batch_are_refused(monkeypatch):
    monkeypatch.setattr(sharding, "Mesh", FakeMesh)
    devices = [FakeDevice(i, slice_index=i // 4, process_index=i // 2) for i in range(8)]
    sharding.make_layout("fsdp_tensor", (2, 2, 2), devices)
    with pytest.raises(UserError, match="tensor into several processes"):
        sharding.make_layout("fsdp_tensor", (2, 1, 4), devices)


@pytest.mark.parametrize("mesh", [(2, 1, 1), (-1, -1, 1), (0, -1, 1), (-1, 2, 1), (-2, -1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh):
    with pytest.raises(UserError, match="it does not fit the 1 devices here"):
        sharding.make_layout("fsdp", mesh)
