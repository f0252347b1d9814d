"""Layer plans: insertion, keep ratios, scan groups, stacking."""

import jax
import numpy as np
import pytest

from tests import tiny
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import (
    Execution,
    VideoLLM,
    VideoLLMConfig,
    config_plan,
    early_exit,
    full_computation,
    init_variables,
    layer_skip,
    stack_layers,
    unstack_layers,
)
from videollm_mod_jax.models.config import RoutingConfig
from videollm_mod_jax.models.plan import (
    LayerSpec,
    keep_count,
    layer_plan,
    routed_layers,
    scan_groups,
)

D, m, k2 = LayerSpec(None), LayerSpec(2), LayerSpec(3)


@pytest.mark.parametrize(
    ("insertion", "layers"),
    [
        ("interleaved", (1, 3, 5, 7)),
        ("all", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("all-deep", (2, 3, 4, 5, 6, 7)),
        ("interleaved-deep", (3, 5, 7)),
        ((2, 6), (2, 6)),
        ((), ()),
    ],
)
def test_insertion_names_the_layers_of_its_drawn_example(insertion, layers):
    assert routed_layers(insertion, 8) == layers


def test_the_paper_routes_16_of_32_layers_interleaved_and_15_interleaved_deep():
    assert len(routed_layers("interleaved", 32)) == 16
    assert len(routed_layers("interleaved-deep", 32)) == 15


def test_keep_count_rounds_up_and_forgives_binary_rounding():
    counts = [keep_count(r, 10) for r in (0.0, 0.1, 0.2, 0.21, 0.3, 0.5, 1.0)]
    assert counts == [0, 1, 2, 3, 3, 5, 10]
    assert keep_count(0.07, 100) == 7


def test_baselines_are_plans_without_vision_tokens():
    none = LayerSpec(0)
    assert layer_plan(4, full_computation(), 10) == (D, D, D, D)
    assert layer_plan(4, early_exit(2, 4), 10) == (D, D, none, none)
    assert layer_plan(4, layer_skip(), 10) == (D, none, D, none)


def test_a_keep_ratio_per_layer_gives_each_layer_its_own_count():
    routing = RoutingConfig(
        insertion="all-deep",
        keep_ratio=(1.0, 1.0, 0.5, 0.2),
        selection="learned",
        weighting="tanh1",
        force_keep_last=False,
        exploration=0.0,
    )
    assert layer_plan(4, routing, 10) == (D, D, LayerSpec(5), LayerSpec(2))


@pytest.mark.parametrize(
    ("plan", "groups"),
    [
        ((D, m) * 4, (((D, m), 4),)),
        ((D, D, m, m, m, m), (((D,), 2), ((m,), 4))),
        ((D, D, D, m, D, m, D, m), (((D,), 2), ((D, m), 3))),
        ((D, m, k2), (((D, m, k2), 1),)),
        ((D,), (((D,), 1),)),
    ],
)
def test_scan_groups_are_the_drawn_examples(plan, groups):
    assert scan_groups(plan) == groups
    assert sum((period * repeats for period, repeats in groups), ()) == plan


@pytest.mark.parametrize("insertion", ["interleaved", "all-deep", (3,)])
def test_stacking_and_unstacking_are_inverse(insertion):
    config = tiny.routed(insertion=insertion)
    plan = config_plan(config)
    looped = init_variables(VideoLLM(config), jax.random.key(0))
    scanned = init_variables(VideoLLM(config, Execution(scan=True)), jax.random.key(0))
    stacked = stack_layers(looped, plan)
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, scanned)
    back = unstack_layers({"inner": (stacked, 3)}, plan)["inner"]
    assert jax.tree.structure(back) == jax.tree.structure((looped, 3))
    jax.tree.map(np.testing.assert_array_equal, back[0], looped)
    abstract = jax.eval_shape(lambda: looped)
    assert jax.tree.map(np.shape, stack_layers(abstract, plan)) == jax.tree.map(np.shape, stacked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"insertion": (1, 4)}, "names layer 4; the decoder has layers 0 to 3"),
        ({"insertion": (1, 1)}, "names a layer twice"),
        ({"keep_ratio": (0.2, 0.2)}, "2 entries; the decoder has 4 layers"),
        ({"insertion": "interlaced"}, "choose one of interleaved"),
        ({"keep_ratio": 1.5}, r"keep_ratio is 1.5; expected a number in \[0, 1\]"),
        ({"weighting": "tanh"}, "choose one of paper, official, tanh1, relative, none"),
        ({"exploration": -0.1}, r"exploration is -0.1; expected a number in \[0, 1\]"),
        ({"exploration": 0.3, "selection": "random"}, "'random': set exploration to 0"),
    ],
)
def test_a_wrong_routing_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        config_plan(tiny.routed(**change))


def test_model_json_survives_the_round_trip():
    import json

    config = tiny.routed(insertion=(1, 2), keep_ratio=(0.2, 0.4, 0.6, 0.8))
    assert VideoLLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("decoder", "rope_thetta"), 1.0, "did you mean 'rope_theta'"),
        (("decoder", "num_layers"), "four", "model.decoder.num_layers is 'four'; expected int"),
        (("vision", "pool"), [3], "model.vision.pool"),
        (("routing", "keep_ratio"), True, "model.routing.keep_ratio is True"),
        (("dtype",), "float16", "choose one of bfloat16, float32"),
    ],
)
def test_a_wrong_model_json_is_refused_by_field(path, value, message):
    values = tiny.CONFIG.to_dict()
    node = values
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    with pytest.raises(UserError, match=message):
        VideoLLMConfig.from_dict(values)


def test_a_missing_field_is_refused_by_name():
    values = tiny.CONFIG.to_dict()
    del values["decoder"]["norm_eps"]
    with pytest.raises(UserError, match=r"model\.decoder\.norm_eps is missing"):
        VideoLLMConfig.from_dict(values)
