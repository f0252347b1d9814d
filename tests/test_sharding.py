"""Layouts: names, meshes of one or several slices, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests import tiny_training
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import Execution, VideoLLM
from videollm_mod_jax.training import sharding


def test_every_logical_name_of_the_model_has_a_rule():
    layout = sharding.make_layout("fsdp_tensor", (-1, 1, 1))
    # Raises KeyError for a name that the rules do not know.
    sharding.abstract_variables(
        VideoLLM(tiny_training.model_config(rank=2), Execution(scan=True)), layout
    )
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
