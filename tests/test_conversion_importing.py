"""Whatever the checkpoint, the converted model is complete, exact, and absent until it is."""

import numpy as np
import rich.console
from flax.traverse_util import flatten_dict

from tests.tiny import CONFIG
from tests.tiny_conversion import make_conversion
from videollm_mod_jax.conversion import importing, loading
from videollm_mod_jax.conversion.importing import import_model
from videollm_mod_jax.training.checkpoint import load_model

CONSOLE = rich.console.Console(quiet=True)
ROUTERS = ("params/decoder/layer_1/router/kernel", "params/decoder/layer_3/router/kernel")


def run(conversion, destination, overwrite=False):
    return import_model(conversion, destination, overwrite=overwrite, console=CONSOLE)


def loaded(directory):
    return flatten_dict(load_model(directory).variables, sep="/")


def assert_bitwise(found, expected):
    assert set(found) == set(expected)
    for path, value in expected.items():
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_converted_model_loads_with_every_value_in_its_place(tmp_path):
    conversion, expected = make_conversion(tmp_path / "source")
    run(conversion, tmp_path / "model")
    assert_bitwise(loaded(tmp_path / "model"), expected)
    model = load_model(tmp_path / "model")
    assert model.config == CONFIG
    assert model.system == "Watch."
    assert model.tokenizer.encode("a cat").ids.tolist()
    assert not (tmp_path / "model.partial").exists()


def test_large_tensors_are_read_in_slabs(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SLAB_BYTES", 100)
    monkeypatch.setattr(loading, "CACHED_BYTES", 40)
    monkeypatch.setattr(importing, "BATCH_BYTES", 3000)
    conversion, expected = make_conversion(tmp_path / "source")
    run(conversion, tmp_path / "model")
    assert_bitwise(loaded(tmp_path / "model"), expected)


def test_slabs_are_as_drawn():
    slabs = list(loading.slabs((10, 4), 0, 2, 24))
    assert [(s.start, s.stop) for s in slabs] == [(0, 3), (3, 6), (6, 9), (9, 10)]
