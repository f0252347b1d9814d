"""The loop: resuming, refusing, and what a run leaves behind."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny_training
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.training import checkpoint, loop, metrics, validation
from videollm_mod_jax.training.checkpoint import load_model, save_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(directory, returned model) of a run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    save = checkpoint.Checkpointer.save

    def checked_save(self, step, state, loss, written):
        # A kill right after a checkpoint must not lose a line that the resumed run skips.
        assert metrics.read_metrics(directory)[-1]["step"] == step
        validated = metrics.read_validation(directory)[-1]
        assert (validated["step"], validated["validation_loss"]) == (step, loss)
        save(self, step, state, loss, written)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpointer, "save", checked_save)
        return directory, tiny_training.train(directory)


def assert_bitwise(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_one(whole, tmp_path):
    command = [sys.executable, "-m", "tests.tiny_training", str(tmp_path), "7"]
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root)}
    killed = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = metrics.read_metrics(tmp_path)
    assert 4 <= len(before) < 10
    assert (tmp_path / "checkpoints" / "4").exists()

    resumed = tiny_training.train(tmp_path)
    logs = [directory / metrics.METRICS_FILE for directory in (tmp_path, whole[0])]
    assert logs[0].read_bytes() == logs[1].read_bytes()
    assert checkpoint.best_step(tmp_path) == checkpoint.best_step(whole[0])
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == list(range(1, 11))
    assert_bitwise(resumed.variables, whole[1].variables)


def test_validation_measures_the_objective_without_dropout_on_the_saved_weights(whole):
    directory, trained = whole
    lines = metrics.read_validation(directory)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    text = (directory / metrics.METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in text[:4]] == [1, 2, 2, 3]
    assert json.loads(text[2]) == lines[0], "a validation comes after the update"
    totals = np.zeros(2)
    for batch in tiny_training.validation_batches():
        inputs = (batch[k] for k in ("tokens", "features", "frame_starts", "label_positions"))
        logits_BJV = VideoLLM(trained.config).apply(trained.variables, *inputs).logits_BJV
        log_BJV = np.asarray(jax.nn.log_softmax(logits_BJV), np.float64)
        picked_BJ = np.take_along_axis(log_BJV, batch["labels"][..., None], -1)[..., 0]
        labelled_BJ = batch["label_kinds"] > 0
        totals += (-picked_BJ[labelled_BJ].sum(), labelled_BJ.sum())
    assert lines[-1]["validation_loss"] == pytest.approx(totals[0] / totals[1], rel=1e-5)
    assert {name.removeprefix("validation_") for name in lines[-1]} == {
        "step",
        "loss",
        "language_loss",
        "stream_loss",
        "language_accuracy",
        "stream_accuracy",
    }


def test_validation_changes_nothing_that_is_learnt(whole, tmp_path):
    without = tiny_training.train(tmp_path, validate_every=0, keep_best=0)
    assert metrics.read_validation(tmp_path) == []
    assert metrics.read_metrics(tmp_path) == metrics.read_metrics(whole[0])
    assert_bitwise(without.variables, whole[1].variables)


def test_a_run_may_be_validated_and_kept_otherwise_when_it_is_resumed(whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "10")
    again = tiny_training.train(run, validate_every=4, keep_best=3)
    assert_bitwise(again.variables, whole[1].variables)
    # The last update is validated whatever the interval.
    assert metrics.read_validation(run) == metrics.read_validation(whole[0])


def test_a_validation_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
    tmp_path, monkeypatch
):
    def batches():
        batch = tiny_training.batch(0)
        batch["features"][0] = np.inf
        yield batch

    monkeypatch.setattr(tiny_training, "validation_batches", batches)
    with pytest.raises(FloatingPointError, match=r"step 4: not finite: .*validation_loss = nan"):
        tiny_training.train(tmp_path, validate_every=4)
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "checkpoints" / "4").exists()


def unlabelled():
    batch = tiny_training.batch(0)
    yield batch | {"label_kinds": np.zeros_like(batch["label_kinds"])}


@pytest.mark.parametrize(("batches", "count"), [(unlabelled, 1), (lambda: iter(()), 0)])
def test_validation_data_without_labels_are_refused(batches, count, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_training, "validation_batches", batches)
    with pytest.raises(UserError, match=rf"the validation data hold no label \({count} batches\)"):
        tiny_training.train(tmp_path)


def test_add_example():
    parts = [{"loss": (6.0, 3.0)}, {"loss": (2.0, 1.0)}]
    assert validation.add(parts) == {"loss": (8.0, 4.0)}


def test_routers_and_adapters_are_trained_and_saved(whole):
    directory, trained = whole
    initial = tiny_training.variables(trained.config)
    loaded = load_model(directory)
    assert_bitwise(loaded.variables, trained.variables)
    for layer in ("layer_1", "layer_3"):
        router = loaded.variables["params"]["decoder"][layer]["router"]["kernel"]
        assert (router != initial["params"]["decoder"][layer]["router"]["kernel"]).all()
    for before, after in zip(
        jax.tree.leaves(initial["lora"]), jax.tree.leaves(loaded.variables["lora"]), strict=True
    ):
        assert (before != after).any()
    assert_bitwise(loaded.variables["params"]["vision"], initial["params"]["vision"])
    np.testing.assert_array_equal(
        loaded.variables["params"]["embedding"], initial["params"]["embedding"]
    )


def test_training_lowers_the_loss_and_leaves_its_files(whole):
    directory, _ = whole
    lines = metrics.read_metrics(directory)
    assert lines[-1]["loss"] < lines[0]["loss"]
    present = {path.name for path in directory.iterdir()}
    assert {
        "model.json",
        "config.json",
        "dialogue.json",
        "tokenizer.json",
        "weights",
        "checkpoints",
        "metrics.jsonl",
        "loss.png",
    } <= present
    assert any(name.startswith("events.") for name in present)
    assert not [name for name in present if "partial" in name]
    assert {p.name for p in (directory / "checkpoints").iterdir()} == {"8", "10"}


def test_a_finished_run_is_only_loaded_again(whole):
    directory, trained = whole
    before = (directory / "metrics.jsonl").read_bytes()
    files = {path.name for path in directory.iterdir()}
    again = tiny_training.train(directory, kill_at=0)
    assert_bitwise(again.variables, trained.variables)
    assert (directory / "metrics.jsonl").read_bytes() == before
    assert {path.name for path in directory.iterdir()} == files


def test_resuming_with_another_configuration_names_the_keys(whole):
    optimizer = dataclasses.replace(tiny_training.OPTIMIZER, learning_rate=0.5)
    with pytest.raises(
        UserError,
        match=r"training\.optimizer\.learning_rate is 0\.5 \(was 0\.003\); training\.seed",
    ):
        tiny_training.train(whole[0], optimizer=optimizer, seed=4, log_every=2)


def test_differences_example():
    old, new = {"a": {"b": 1}, "c": 2, "evaluation": {"d": 1}}, {"a": {"b": 3}, "evaluation": {}}
    assert loop.differences(old, new) == ["a.b is 3 (was 1)", "c is absent (was 2)"]
    assert loop.differences({"training": {"scan": True}}, {"training": {"scan": False}}) == []


def test_a_directory_that_holds_a_model_is_not_trained_in(tmp_path):
    config = tiny_training.model_config(rank=2)
    save_model(tmp_path, config, tiny_training.variables(config), tiny_training.TOKENIZER, "")
    with pytest.raises(UserError, match="holds a model and no training run"):
        tiny_training.train(tmp_path)
    load_model(tmp_path)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"batch of 4 examples .* training\.microbatches = 3"):
        tiny_training.train(tmp_path, microbatches=3)


def test_data_that_ends_early_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_training, "batches_from", lambda *arguments: iter(()))
    with pytest.raises(UserError, match="data ended before update 1 of 10"):
        tiny_training.train(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    def batches(start, *arguments):
        for index in range(start, 9):
            batch = tiny_training.batch(index)
            if index == 1:
                batch["features"][0] = np.nan
            yield batch

    monkeypatch.setattr(tiny_training, "batches_from", batches)
    with pytest.raises(FloatingPointError, match=r"step 2: not finite: .*\bloss = nan"):
        tiny_training.train(tmp_path, rank=0, trainable="full")
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1]
    assert not (tmp_path / "checkpoints" / "4").exists()


def test_validation_without_data_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_training, "validation_batches", None)
    with pytest.raises(UserError, match=r"validate_every is 2, and there are no validation data"):
        tiny_training.train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"TrainingConfig\.steps is 0; expected a number in "),
        ({"validate_every": -1}, r"validate_every is -1; expected a number in "),
        ({"validate_every": 3}, r"validate_every is 3 and .*every is 4; make one a multiple"),
        ({"validate_every": 0}, r"keep_best is 1 and training\.validate_every is 0"),
        ({"sharding": "zero"}, "sharding is 'zero'; choose one of replicate, fsdp, fsdp_tensor"),
        ({"mesh": (3, 5, 1)}, r"mesh is \(3, 5, 1\)"),
        ({"mesh": (-1, -1, 1)}, "one size may be -1"),
        ({"trainable": "lora", "rank": 0}, r"lora\.rank is 0"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, change, message
):
    with pytest.raises(UserError, match=message):
        tiny_training.train(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()
