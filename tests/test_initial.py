"""Starting from a model that exists."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from tests import tiny, tiny_stream, tiny_training
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import LoraConfig, VideoLLM, full_computation
from videollm_mod_jax.training import checkpoint
from videollm_mod_jax.training.checkpoint import load_model, load_tower, save_model
from videollm_mod_jax.training.initial import check_start, init_part, variables_from
from videollm_mod_jax.training.optimizer import merge_variables, split_variables
from videollm_mod_jax.training.sharding import abstract_variables, make_layout
from videollm_mod_jax.training.state import create_state

LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.0, targets=("q", "down", "lm_head"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The directory of a model without routers or adapters."""
    directory = tmp_path_factory.mktemp("dense")
    model = tiny_stream.loaded_model(silence=0.0)
    config = dataclasses.replace(model.config, routing=full_computation())
    for layer in model.variables["params"]["decoder"].values():
        layer.pop("router", None)
    save_model(directory, config, model.variables, model.tokenizer, model.system)
    return directory


def test_fresh_adapters_and_routers_leave_the_model_as_it_was(dense):
    start = load_model(dense)
    batch = tiny.batch(0, text=6, frames=2, config=start.config)
    expected = VideoLLM(start.config).apply(start.variables, **batch).logits_BJV
    config = tiny.routed(start.config, insertion="all", keep_ratio=1.0, selection="learned")
    config = dataclasses.replace(tiny.routed(config, weighting="tanh1"), lora=LORA)
    variables = variables_from(dense, config, jax.random.key(0), None)
    found = VideoLLM(config).apply(variables, **batch).logits_BJV
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.any(variables["lora"]["decoder"]["layer_0"]["block"]["attention"]["q"]["a"])


def test_a_run_starts_from_what_another_run_trained(tmp_path):
    """Adapters, connector and routers of its newest checkpoint, over its frozen weights."""
    config = tiny_training.model_config(rank=2)
    trained, frozen = split_variables(tiny_training.variables(config), "lora")
    checkpoint.write_description(tmp_path, config, tiny_training.TOKENIZER, "watch")
    checkpoint.write_weights(tmp_path, frozen)
    with checkpoint.Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (4, 8):
            learnt = jax.tree.map(lambda leaf, step=step: step + leaf, trained)
            checkpointer.save(step, create_state(learnt, optax.sgd(1.0), seed=0))
    found = variables_from(tmp_path, config, jax.random.key(0), None)
    jax.tree.map(np.testing.assert_array_equal, found, merge_variables(learnt, frozen))


def test_routers_that_the_new_model_lacks_are_left_behind(tmp_path):
    model = tiny_stream.loaded_model(silence=0.0)
    save_model(tmp_path, model.config, model.variables, model.tokenizer, model.system)
    config = tiny.routed(model.config, insertion=(3,), weighting="none")
    variables = variables_from(tmp_path, config, jax.random.key(0), None)
    routed = [k for k, layer in variables["params"]["decoder"].items() if "router" in layer]
    assert routed == ["layer_3"]
    kernel, stored = (
        v["params"]["decoder"]["layer_3"]["router"]["kernel"] for v in (variables, model.variables)
    )
    np.testing.assert_array_equal(kernel, stored)


def test_variables_come_in_the_dtypes_and_on_the_mesh_of_the_new_model(dense):
    config = dataclasses.replace(load_model(dense).config, param_dtype="bfloat16", lora=LORA)
    layout = make_layout("fsdp", (1, -1, 1))
    found = flatten_dict(variables_from(dense, config, jax.random.key(0), layout), sep="/")
    wanted = flatten_dict(abstract_variables(VideoLLM(config), layout), sep="/")
    assert set(found) == set(wanted)
    for path, leaf in wanted.items():
        assert (found[path].dtype, found[path].sharding) == (leaf.dtype, leaf.sharding), path


def test_a_part_is_initialised_as_the_whole_is(dense):
    model = VideoLLM(dataclasses.replace(load_model(dense).config, lora=LORA))
    abstract = flatten_dict(abstract_variables(model, None), sep="/")
    key = jax.random.key(3)
    whole = init_part(model, key, abstract, list(abstract))
    paths = ["lora/lm_head/a", "params/connector/fc1/kernel"]
    part = init_part(model, key, abstract, paths)
    assert list(part) == paths
    for path in paths:
        np.testing.assert_array_equal(part[path], whole[path])


def test_adapters_of_another_kind_are_refused(tmp_path):
    model = tiny_stream.loaded_model(silence=0.0)
    config = dataclasses.replace(model.config, lora=LORA)
    variables = {"params": model.variables["params"]}
    wanted = abstract_variables(VideoLLM(config), None)["lora"]
    variables["lora"] = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), wanted)
    save_model(tmp_path, config, variables, model.tokenizer, model.system)
    check_start(tmp_path, config)
    with pytest.raises(UserError, match="merge them when you convert it"):
        check_start(tmp_path, dataclasses.replace(config, lora=dataclasses.replace(LORA, rank=4)))


def test_the_tower_loads_alone(dense):
    whole = load_model(dense).variables["params"]["vision"]
    jax.tree.map(np.testing.assert_array_equal, load_tower(dense), whole)


def test_a_model_without_a_tower_has_none_to_load(tmp_path, dense):
    model = load_model(dense)
    config = dataclasses.replace(model.config, vision=None)
    params = {
        k: v for k, v in model.variables["params"].items() if k not in ("vision", "connector")
    }
    save_model(tmp_path, config, {"params": params}, model.tokenizer, "")
    with pytest.raises(UserError, match="the model has no vision"):
        load_tower(tmp_path)
    with pytest.raises(UserError, match="the model has no vision"):
        check_start(tmp_path, model.config)
