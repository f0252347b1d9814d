"""The update: accumulation, what is trained, what is not."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from tests import tiny_training
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import Execution, VideoLLM
from videollm_mod_jax.training import sharding
from videollm_mod_jax.training.checkpoint import Checkpointer
from videollm_mod_jax.training.losses import judge_logits, streaming_loss
from videollm_mod_jax.training.metrics import means
from videollm_mod_jax.training.optimizer import (
    decays,
    learning_rate_schedule,
    make_optimizer,
    merge_variables,
    split_variables,
)
from videollm_mod_jax.training.state import create_state
from videollm_mod_jax.training.step import make_train_step, make_validation_step, split_batch


def names(tree):
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths}


SCHEDULE = learning_rate_schedule(tiny_training.OPTIMIZER, 10)
ADAMW = make_optimizer(tiny_training.OPTIMIZER, SCHEDULE)
# Its update is the gradient itself, which it also keeps.
DESCENT = optax.sgd(1.0, momentum=0.9)


@functools.cache
def train_step(rank, microbatches, optimizer):
    model = VideoLLM(tiny_training.model_config(rank), Execution(scan=True, remat=True))
    step = make_train_step(model, optimizer, SCHEDULE, stream_weight=0.7, microbatches=microbatches)
    return jax.jit(step)


def run(trainable, rank, microbatches, optimizer, steps=1):
    """Returns (variables before, state after, frozen, metrics of the last step)."""
    variables = tiny_training.variables(tiny_training.model_config(rank), scan=True)
    trained, frozen = split_variables(variables, trainable)
    state = create_state(trained, optimizer, seed=0)
    for index in range(steps):
        step = train_step(rank, microbatches, optimizer)
        state, metrics = step(state, frozen, tiny_training.batch(index))
    return variables, state, frozen, means(jax.device_get(metrics))


def test_four_microbatches_give_the_gradient_of_one_batch():
    _, one, _, metrics_one = run("full", 0, 1, DESCENT)
    _, four, _, metrics_four = run("full", 0, 4, DESCENT)
    counts = (tiny_training.batch(0)["label_kinds"] > 0).sum(axis=1)
    assert len(set(counts.tolist())) > 1, "a mean of means would go unnoticed"
    gradient_one, gradient_four = one.opt_state[0].trace, four.opt_state[0].trace
    difference = jax.tree.map(lambda a, b: a - b, gradient_one, gradient_four)
    assert optax.global_norm(difference) < 1e-6 * metrics_one["gradient_norm"]
    assert metrics_one == pytest.approx(metrics_four, abs=1e-5)


def test_the_update_is_the_gradient_of_the_mean_over_labels():
    config = tiny_training.model_config()
    variables, state, frozen, metrics = run("full", 0, 1, DESCENT)
    batch = tiny_training.batch(0)

    def mean_loss(trained):
        output = VideoLLM(config, Execution(scan=True)).apply(
            merge_variables(trained, frozen),
            *(batch[k] for k in ("tokens", "features", "frame_starts", "label_positions")),
        )
        logits_BJV, labels_BJ, kinds_BJ = output.logits_BJV, batch["labels"], batch["label_kinds"]
        total = 0.0
        for kind, weight in ((1, 1.0), (2, 0.7)):
            log_BJV = jax.nn.log_softmax(logits_BJV)
            log_BJ = (log_BJV * jax.nn.one_hot(labels_BJ, log_BJV.shape[-1])).sum(-1)
            total -= weight * (log_BJ * (kinds_BJ == kind)).sum()
        return total / (kinds_BJ > 0).sum()

    before, _ = split_variables(variables, "full")
    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(before)
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-5)
    expected = jax.tree.map(lambda a, g: a - g, before, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.trained, expected)


def test_lora_training_moves_adapters_connector_and_routers_and_nothing_else():
    variables, state, frozen, _ = run("lora", 2, 1, ADAMW, steps=3)
    moved, _ = split_variables(variables, "lora")
    assert names(state.trained) == names(moved)
    groups = {"lora": 0, "connector": 0, "router": 0}
    for path, before in jax.tree.leaves_with_path(moved):
        after = state.trained
        for key in path:
            after = after[key.key]
        parts = [key.key for key in path]
        (group,) = [g for g in groups if g in parts]
        groups[group] += 1
        assert (np.asarray(before) != np.asarray(after)).any(), parts
    assert all(groups.values())
    assert names(frozen).isdisjoint(names(state.trained))
    moments = [n for n in names(state.opt_state) if "vision" in n or "kernel" in n]
    assert all("connector" in n or "router" in n for n in moments)


def test_merging_is_the_inverse_of_splitting():
    variables = tiny_training.variables(tiny_training.model_config(rank=2))
    for trainable in ("lora", "full"):
        trained, frozen = split_variables(variables, trainable)
        merged = merge_variables(trained, frozen)
        assert jax.tree.structure(merged) == jax.tree.structure(variables)
        jax.tree.map(np.testing.assert_array_equal, merged, variables)
    assert set(split_variables(variables, "full")[1]["params"]) == {"vision"}


def test_split_example_of_the_docstring():
    attention = {"attention": "a"}
    routed = {"attention": "b", "router": "r"}
    variables = {
        "params": {
            "connector": "c",
            "decoder": {"layer_0": attention, "layer_1": routed},
            "vision": "v",
        },
        "lora": "x",
    }
    assert split_variables(variables, "lora") == (
        {"params": {"connector": "c", "decoder": {"layer_1": {"router": "r"}}}, "lora": "x"},
        {
            "params": {
                "decoder": {"layer_0": {"attention": "a"}, "layer_1": {"attention": "b"}},
                "vision": "v",
            }
        },
    )
    assert split_variables(variables, "full")[1] == {"params": {"vision": "v"}}


def test_lora_training_needs_adapters():
    variables = tiny_training.variables(tiny_training.model_config(rank=0))
    with pytest.raises(UserError, match=r"lora\.rank is 0"):
        split_variables(variables, "lora")
    with pytest.raises(UserError, match="choose one of lora, full"):
        split_variables(variables, "half")


def test_a_bfloat16_first_moment_is_stored_and_resumed_bitwise(tmp_path):
    config = dataclasses.replace(tiny_training.OPTIMIZER, moment_dtype="bfloat16")
    optimizer = make_optimizer(config, SCHEDULE)
    model = VideoLLM(tiny_training.model_config(2), Execution(scan=True, remat=True))
    _, whole, frozen, _ = run("lora", 2, 1, optimizer, steps=1)
    moments = {name: optax.tree_utils.tree_get(whole.opt_state, name) for name in ("mu", "nu")}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(moments["mu"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(moments["nu"])} == {"float32"}

    layout = sharding.make_layout("replicate", (-1, 1, 1))
    target, _ = sharding.abstract_training(model, optimizer, "lora", layout)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, whole)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        resumed = checkpointer.restore(1, target)
    step = train_step(2, 1, optimizer)
    after, after_resumed = (step(s, frozen, tiny_training.batch(1))[0] for s in (whole, resumed))
    jax.tree.map(np.testing.assert_array_equal, after_resumed, after)


def test_an_unknown_moment_dtype_is_refused():
    with pytest.raises(UserError, match="moment_dtype is 'float16'; choose one of float32, bfloat"):
        dataclasses.replace(tiny_training.OPTIMIZER, moment_dtype="float16")


def test_weight_decay_spares_biases_and_stacked_norm_scales():
    variables = tiny_training.variables(tiny_training.model_config(rank=2), scan=True)
    for path, decayed in jax.tree.leaves_with_path(decays(variables)):
        parts = [key.key for key in path]
        assert decayed == (parts[-1] not in ("scale", "bias")), parts


def test_dropout_differs_between_steps_and_microbatches_and_repeats():
    variables, _, frozen, _ = run("lora", 2, 1, ADAMW)
    state = create_state(split_variables(variables, "lora")[0], ADAMW, seed=0)
    batch = tiny_training.batch(0)
    # Two microbatches, each of them the whole batch.
    twice = {key: np.repeat(value, 2, axis=0) for key, value in batch.items()}

    def loss(microbatches, step, batch):
        here = state.replace(step=np.asarray(step, np.int32))
        _, metrics = train_step(2, microbatches, ADAMW)(here, frozen, batch)
        return means(jax.device_get(metrics))["loss"]

    first = loss(1, 0, batch)
    assert loss(1, 0, batch) == first
    assert abs(loss(1, 1, batch) - first) > 1e-4
    assert abs(loss(2, 0, twice) - first) > 1e-4
    model = VideoLLM(tiny_training.model_config(2), Execution(scan=True))
    inputs = (batch[k] for k in ("tokens", "features", "frame_starts", "label_positions"))
    logits_BJV = jax.jit(model.apply)(variables, *inputs).logits_BJV
    judged = judge_logits(logits_BJV, batch["labels"])
    without = streaming_loss(judged, batch["labels"], batch["label_kinds"], 0.7)
    assert abs(means(without)["loss"] - first) > 1e-4


def test_validation_measures_the_loss_of_the_update():
    variables, _, frozen, metrics = run("full", 0, 4, ADAMW)
    model = VideoLLM(tiny_training.model_config(0), Execution(scan=True))
    step = jax.jit(make_validation_step(model, stream_weight=0.7))
    trained, _ = split_variables(variables, "full")
    found = means(jax.device_get(step(trained, frozen, tiny_training.batch(0))))
    assert found == pytest.approx({name: metrics[name] for name in found}, rel=1e-5)
    assert found["loss"] != pytest.approx(found["language_loss"], rel=1e-2)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    schedule = learning_rate_schedule(tiny_training.OPTIMIZER, 100)
    assert [float(schedule(s)) for s in (0, 5, 10, 55, 100)] == pytest.approx(
        [0, 1.5e-3, 3e-3, 1.5e-3, 0], abs=1e-9
    )


def test_split_batch_example():
    split = split_batch({"x": np.arange(6)}, 2)["x"]
    assert split.tolist() == [[0, 2, 4], [1, 3, 5]]


def test_a_batch_without_labels_changes_nothing_to_nan():
    batch = tiny_training.batch(0)
    batch["label_kinds"] = np.zeros_like(batch["label_kinds"])
    _, state, frozen, _ = run("full", 0, 1, DESCENT)
    state, metrics = train_step(0, 1, DESCENT)(state, frozen, batch)
    assert "loss" not in means(jax.device_get(metrics))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trained))
