"""What a directory of a model gives back, and what it refuses."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import tiny_training
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM, config_plan, stack_layers, unstack_layers
from videollm_mod_jax.training import checkpoint, sharding
from videollm_mod_jax.training.checkpoint import Checkpointer, load_model, save_model
from videollm_mod_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    merge_variables,
    split_variables,
)
from videollm_mod_jax.training.state import create_state

CONFIG = tiny_training.model_config(rank=2)
PLAN = config_plan(CONFIG)
OPTIMIZER = make_optimizer(
    tiny_training.OPTIMIZER, learning_rate_schedule(tiny_training.OPTIMIZER, 10)
)


def assert_bitwise(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "saved"
    save_model(directory, CONFIG, tiny_training.variables(CONFIG), tiny_training.TOKENIZER, "watch")
    return directory


@pytest.fixture
def copy(model_directory, tmp_path):
    return shutil.copytree(model_directory, tmp_path / "copy")


def write_run(directory, steps=(4, 8), scan=True):
    """A run's directory with states whose numbers are random; returns (last state, frozen)."""
    trained, frozen = split_variables(tiny_training.variables(CONFIG, scan), "lora")
    state = create_state(jax.tree.map(np.asarray, trained), OPTIMIZER, seed=0)
    checkpoint.write_description(directory, CONFIG, tiny_training.TOKENIZER, "watch")
    checkpoint.write_weights(directory, unstack_layers(frozen, PLAN))
    with Checkpointer(directory, keep=2) as checkpointer:
        for step in steps:
            rng = np.random.default_rng(step)
            state = jax.tree.map(
                lambda leaf, rng=rng: np.asarray(rng.normal(size=leaf.shape) * 99, leaf.dtype),
                state,
            ).replace(step=np.asarray(step, np.int32))
            checkpointer.save(step, unstack_layers(state, PLAN))
    return state, frozen


def test_a_saved_model_loads_bitwise(model_directory):
    loaded = load_model(model_directory)
    assert loaded.config == CONFIG
    assert loaded.system == "watch"
    assert loaded.tokenizer.eos_id == tiny_training.TOKENIZER.eos_id
    assert_bitwise(loaded.variables, tiny_training.variables(CONFIG))


def test_a_state_comes_back_bitwise_under_the_other_layer_layout(tmp_path):
    written, frozen = write_run(tmp_path, scan=True)
    layout = sharding.make_layout("replicate", (-1, 1, 1))
    target, target_frozen = sharding.abstract_training(VideoLLM(CONFIG), OPTIMIZER, "lora", layout)
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest_step() == 8
        unrolled = checkpointer.restore(8, target)
    assert_bitwise(unrolled, jax.tree.map(np.asarray, unstack_layers(written, PLAN)))
    assert_bitwise(stack_layers(unrolled, PLAN), written)
    assert_bitwise(stack_layers(checkpoint.read_weights(tmp_path, target_frozen), PLAN), frozen)


def test_loading_a_run_takes_the_newest_complete_checkpoint(tmp_path):
    state, frozen = write_run(tmp_path, steps=(4, 8, 12))
    # What a kill in the middle of a save leaves behind.
    newest = tmp_path / "checkpoints"
    shutil.copytree(newest / "12", newest / "16.orbax-checkpoint-tmp-0")
    expected = unstack_layers(merge_variables(state.trained, frozen), PLAN)
    assert_bitwise(load_model(tmp_path).variables, jax.tree.map(np.asarray, expected))
    routers = [k for k, v in expected["params"]["decoder"].items() if "router" in v]
    assert routers == ["layer_1", "layer_3"]
    assert sorted(p.name for p in newest.iterdir() if p.name.isdigit()) == ["12", "8"]


def write_checkpoints(directory, losses, **options):
    """Checkpoints of a run of `write_run`, with validation losses by step."""
    state, _ = write_run(directory, steps=())
    state = unstack_layers(state, PLAN)
    for step, loss in losses.items():
        # Opened anew, as by a run that was killed: losses come from the disk.
        with Checkpointer(directory, **options) as checkpointer:
            filled = jax.tree.map(lambda leaf, s=step: np.full(leaf.shape, s, leaf.dtype), state)
            checkpointer.save(step, filled, loss)


LOSSES = {2: 0.6, 4: 0.5, 6: None, 8: 0.7, 10: 0.5, 12: 0.9, 14: None, 16: 0.8}


@pytest.mark.parametrize(
    ("keep", "keep_best", "kept"),
    [
        (2, 0, [14, 16]),
        (2, 1, [10, 14, 16]),
        (2, 3, [2, 4, 10, 14, 16]),
        (4, 1, [10, 12, 14, 16]),
        # Checkpoints that were not validated are not among the best, however many these may be.
        (1, 6, [2, 4, 8, 10, 12, 16]),
    ],
)
def test_the_newest_and_the_best_checkpoints_survive(tmp_path, keep, keep_best, kept):
    write_checkpoints(tmp_path, LOSSES, keep=keep, keep_best=keep_best)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept
    assert checkpoint.checkpoint_steps(tmp_path) == kept
    with Checkpointer(tmp_path, keep=keep, keep_best=keep_best) as checkpointer:
        assert checkpointer.latest_step() == 16
    best = {step: LOSSES[step] for step in kept if LOSSES[step]}
    # Of equals, the newest.
    assert checkpoint.best_step(tmp_path) == min(best, key=lambda step: (best[step], -step))


def test_checkpoints_from_before_losses_were_stored_are_not_kept_for_ever(tmp_path):
    write_checkpoints(tmp_path, {2: 0.5, 4: None}, keep=2)
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "metrics")
    write_checkpoints(tmp_path, {6: 0.6, 8: 0.7}, keep=2, keep_best=1)
    assert checkpoint.checkpoint_steps(tmp_path) == [2, 6, 8]


def test_a_model_loads_from_the_checkpoint_that_is_asked_for(tmp_path, model_directory):
    write_checkpoints(tmp_path, {4: 0.5, 8: 0.7}, keep=2)

    def loaded(**arguments):
        return set(np.unique(load_model(tmp_path, **arguments).variables["lora"]["lm_head"]["a"]))

    assert loaded() == loaded(step=8) == {8}
    assert loaded(step=checkpoint.best_step(tmp_path)) == {4}
    with pytest.raises(UserError, match=r"no checkpoint of update 5; it has 4, 8$"):
        load_model(tmp_path, step=5)
    with pytest.raises(UserError, match=r"no checkpoint of update 5; it has none$"):
        load_model(model_directory, step=5)


def test_without_validation_no_checkpoint_is_the_best(tmp_path, model_directory):
    write_checkpoints(tmp_path, {4: None}, keep=2)
    for directory in (tmp_path, model_directory):
        with pytest.raises(UserError, match="no checkpoint with a validation loss"):
            checkpoint.best_step(directory)


def test_what_a_run_trains_loads_without_what_it_does_not(tmp_path, model_directory):
    write_checkpoints(tmp_path, {4: 0.5, 8: 0.7}, keep=2)
    expected, _ = split_variables(load_model(tmp_path).variables, "lora")
    earlier, _ = split_variables(load_model(tmp_path, step=4).variables, "lora")
    shutil.rmtree(tmp_path / "weights")
    assert_bitwise(checkpoint.load_trained(tmp_path), expected)
    assert_bitwise(checkpoint.load_trained(tmp_path, step=4), earlier)
    with pytest.raises(UserError, match="holds no checkpoint; expected the directory of a train"):
        checkpoint.load_trained(model_directory)
    decoder = dataclasses.replace(CONFIG.decoder, hidden_size=40)
    other = dataclasses.replace(CONFIG, decoder=decoder)
    (tmp_path / "model.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(UserError, match=r"should be \(.*40.*\) and is \("):
        checkpoint.load_trained(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(tiny_training.model_config(0).to_dict()))
    with pytest.raises(UserError, match=r"lora/.* should be absent and is \("):
        checkpoint.load_trained(tmp_path)


def test_damaged_metrics_name_their_checkpoint(tmp_path):
    write_checkpoints(tmp_path, {4: 0.5, 8: 0.7}, keep=2)
    (tmp_path / "checkpoints" / "4" / "metrics" / "metrics").write_text("")
    message = r"checkpoints/4/metrics/metrics is damaged: .* delete .*/checkpoints/4 to go on"
    with pytest.raises(UserError, match=message):
        Checkpointer(tmp_path, keep=2)
    with pytest.raises(UserError, match=message):
        checkpoint.best_step(tmp_path)
    # What needs no metrics reads none.
    load_model(tmp_path)


def test_arrays_load_in_the_dtype_of_the_model(copy):
    config = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(config | {"param_dtype": "bfloat16"}))
    variables = load_model(copy).variables

    def dtypes(tree):
        return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}

    # What LoRA training updates stays float32.
    connector, frozen = variables["params"].pop("connector"), variables["params"]
    routers = [layer.pop("router") for layer in frozen["decoder"].values() if "router" in layer]
    assert dtypes(frozen) == {"bfloat16"}
    assert dtypes([connector, routers]) == {"float32"}
    assert routers


def test_a_missing_or_foreign_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no model\.json"):
        load_model(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_by_name_and_shape(copy):
    decoder = dataclasses.replace(CONFIG.decoder, mlp_size=50)
    other = dataclasses.replace(CONFIG, decoder=decoder)
    (copy / "model.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(UserError, match=r"mlp/.*should be \(.*50.*\) and is \(.*48.*\)"):
        load_model(copy)


def test_a_model_json_that_is_not_json_is_refused(copy):
    (copy / "model.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.json is not json"):
        load_model(copy)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "{}",
        '{"system": 3}',
        '{"system": null}',
        '{"system": "a", "b": 1}',
        "[" * 10**6,
    ],
)
def test_a_dialogue_json_of_another_shape_is_refused(copy, content):
    (copy / "dialogue.json").write_text(content)
    with pytest.raises(UserError, match=r"dialogue\.json"):
        load_model(copy)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("decoder", {"num_layers": 10**6}, r"model.decoder.num_layers is 1000000; expected a num"),
        ("decoder", {"hidden_size": 10**9}, r"model.decoder.hidden_size is 1000000000; expected "),
        ("decoder", {"vocab_size": 10**15}, "model.decoder.vocab_size is 10"),
        ("vision", {"pool": [3, 3_000_000]}, r"model.vision.pool\[1\] is 3000000; expected a num"),
        ("decoder", {"num_layers": 1024}, "decoder.num_layers should be 1024 and is 4"),
        ("decoder", {"vocab_size": 2**24}, "params/embedding should be"),
        ("vision", {"image_size": 2**14, "patch_size": 128, "pool": [127, 127]}, "position_embed"),
    ],
)
def test_absurd_sizes_are_refused_before_the_model_is_traced(
    copy, monkeypatch, part, changes, message
):
    model = json.loads((copy / "model.json").read_text())
    model[part] |= changes
    (copy / "model.json").write_text(json.dumps(model))
    monkeypatch.setattr(checkpoint, "abstract_variables", None)
    with pytest.raises(UserError, match=message):
        load_model(copy)


def test_missing_weights_are_refused(copy):
    shutil.rmtree(copy / "weights")
    with pytest.raises(UserError, match="weights is missing"):
        load_model(copy)


@pytest.mark.parametrize("pattern", ["**/[!c]*", "**/_METADATA", "**/d/*"])
def test_damaged_weights_are_refused(copy, pattern):
    files = [path for path in (copy / "weights").glob(pattern) if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(b"")
    message = r"weights/.* is damaged: it has 0 bytes where \d+ were written; restore it"
    with pytest.raises(UserError, match=message):
        load_model(copy)
    with pytest.raises(UserError, match=r"weights(/_METADATA)? is damaged: .*cannot be read"):
        load_model(copy, verify=False)


def test_damage_that_many_reads_meet_is_one_line(copy):
    files = [path for path in (copy / "weights").glob("**/d/*") if path.is_file()]
    for path in files:
        path.write_bytes(bytes(path.stat().st_size))
    code = "import sys; from videollm_mod_jax.training.checkpoint import load_model\n"
    code += "try: load_model(sys.argv[1], verify=False)\nexcept ValueError as e: print(e)"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(copy)], capture_output=True, text=True, check=True
    )
    assert "weights" in ended.stdout
    assert "Event loop" not in ended.stderr


def test_a_damaged_checkpoint_is_refused(tmp_path):
    write_run(tmp_path, steps=(4,))
    for path in (tmp_path / "checkpoints" / "4" / "optimizer").rglob("*"):
        if path.is_file() and not path.name.startswith("_"):
            path.write_bytes(b"")
    layout = sharding.make_layout("replicate", (-1, 1, 1))
    target, _ = sharding.abstract_training(VideoLLM(CONFIG), OPTIMIZER, "lora", layout)
    with (
        Checkpointer(tmp_path, keep=2) as checkpointer,
        pytest.raises(
            UserError, match=r"4/optimizer/.* is damaged: .* delete .*/checkpoints/4 to go"
        ),
    ):
        checkpointer.restore(4, target)


def test_saving_a_model_over_a_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a training run"):
        save_model(tmp_path, CONFIG, {}, tiny_training.TOKENIZER, "watch")
