"""Full and MoD beside each other: equal weights, a valid batch, and figures that hold together."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from videollm_mod_jax import benchmark, cli
from videollm_mod_jax.benchmarking import sides
from videollm_mod_jax.benchmarking.batch import random_batch
from videollm_mod_jax.benchmarking.sides import Side, draw_weights, weights_for
from videollm_mod_jax.benchmarking.training import ratios, variants
from videollm_mod_jax.data.example import LANGUAGE, PADDING, STREAM
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.experiment import plain, read_training
from videollm_mod_jax.models import full_computation, unstack_layers
from videollm_mod_jax.models.flops import training_flops
from videollm_mod_jax.planning import plan_training
from videollm_mod_jax.training import compiled
from videollm_mod_jax.training.optimizer import merge_variables
from videollm_mod_jax.training.run import Run

CONFIG = "configs/benchmark.py:tiny"
SMALL = (
    "--config.model.decoder.hidden_size=32",
    "--config.model.decoder.mlp_size=48",
    "--config.model.decoder.num_layers=4",
    "--config.model.decoder.num_heads=2",
    "--config.model.decoder.num_kv_heads=1",
    "--config.model.decoder.head_dim=16",
    "--config.data.frames=8",
    "--config.data.text_tokens=20",
    "--config.data.labels=12",
    "--config.training.mesh=(1,1,-1)",
)


@pytest.fixture(scope="module")
def parts():
    return read_training(plain(cli.read_config(CONFIG, SMALL)))


@pytest.fixture(scope="module")
def drawn(parts):
    """A run with routing, its weights, and a batch on the device."""
    model, data, training = parts
    run = Run.build(training, model)
    return run, draw_weights(run, model), run.layout.put_batch(random_batch(model, data))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What `benchmark train` writes, and where."""
    out = tmp_path_factory.mktemp("benchmark") / "out"
    arguments = ("--out", str(out), "--frames", "8", "--rounds", "3", "--warmup", "1")
    assert benchmark.main(["train", "--config", CONFIG, *arguments, *SMALL]) == 0
    return json.loads((out / "train.json").read_text()), out


def test_the_json_says_on_what_and_of_what_its_numbers_are(result, parts):
    model, _, training = parts
    found, _ = result
    assert found["benchmark"] == "train"
    assert (found["config"], found["overrides"]) == (CONFIG, list(SMALL))
    assert found["device"]["platform"] == "cpu"
    assert found["device"]["versions"]["jax"] == jax.__version__
    assert found["model"] == json.loads(json.dumps(model.to_dict()))
    assert found["training"]["optimizer"]["learning_rate"] == training.optimizer.learning_rate
    shapes = ("frames", "tokens_per_frame", "text_tokens", "sequence_length", "batch_size")
    assert [[row[key] for key in shapes] for row in found["rows"]] == [[8, 10, 20, 100, 1]]


def test_times_are_raw_and_what_follows_from_them(result):
    found, _ = result
    for row in found["rows"]:
        for name in ("full", "mod"):
            side = row[name]
            seconds = side["seconds"]["seconds"]
            assert len(seconds) == 3
            assert side["seconds"]["median"] == sorted(seconds)[1]
            assert side["tokens_per_second"] * sorted(seconds)[1] == pytest.approx(
                row["sequence_length"]
            )
            assert side["floor_seconds"] == side["floor_flops"] / found["peaks"]["flops"]
            assert side["share_of_floor"] == side["floor_seconds"] / side["seconds"]["median"]
            assert side["model_flops_utilisation"] < side["share_of_floor"]
        medians = [row[name]["seconds"]["median"] for name in ("mod", "full")]
        assert row["ratio"]["seconds"] == medians[0] / medians[1]


def test_operations_and_memory_are_those_of_the_plan_on_this_device(result, parts):
    model, data, training = parts
    target = compiled.find_target(f"cpu:{jax.device_count()}")
    row = result[0]["rows"][0]
    programs = {
        name: plan_training(config, data, training, target).program
        for name, config in variants(model).items()
    }
    for name, config in variants(model).items():
        assert row[name]["compiled_flops"] == programs[name].cost.flops
        assert row[name]["compiler_peak_bytes"] == programs[name].peak_bytes
        floor = training_flops(config, 8, 20, 12, trainable="lora", remat=True)
        assert row[name]["floor_flops"] == floor.total / jax.device_count()
    compiled_ratio = programs["mod"].cost.flops / programs["full"].cost.flops
    assert row["ratio"]["compiled_flops"] == compiled_ratio < 1


def test_pictures_are_drawn_and_small(result):
    from matplotlib.image import imread

    _, out = result
    for name in ("train-time.png", "train-memory.png"):
        assert (out / name).stat().st_size < 60_000
        picture = imread(out / name)[..., :3]
        # Lines in both colours of the variants, on white.
        assert (np.ptp(picture, axis=-1) > 0.3).sum() > 100
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_a_result_that_is_there_is_kept(result, capsys):
    _, out = result
    before = (out / "train.json").read_text()
    assert benchmark.main(["train", "--config", CONFIG, "--out", str(out), *SMALL]) == 2
    assert "train.json exists; give another --out" in capsys.readouterr().err
    assert (out / "train.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frames", "8", "4"), "--frames 8 4: expected rising numbers"),
        (("--frames", "0"), "--frames 0: expected rising numbers"),
        (("--config.data.frame=8",), "has no key"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, tmp_path, capsys):
    done = benchmark.main(["train", "--config", CONFIG, "--out", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert done == 2
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_batch_is_laid_out_as_drawn(parts):
    model, data, _ = parts
    vision = dataclasses.replace(model.vision, summary="none", pool=(1, 2))
    model = dataclasses.replace(model, vision=vision)
    data = dataclasses.replace(data, frames=2, text_tokens=4, labels=5, batch_size=2)
    batch = random_batch(model, data)
    np.testing.assert_array_equal(batch["frame_starts"], [[1, 4]] * 2)
    np.testing.assert_array_equal(batch["label_positions"], [[2, 5, 6, 0, 0]] * 2)
    kinds = [STREAM, STREAM, LANGUAGE, PADDING, PADDING]
    np.testing.assert_array_equal(batch["label_kinds"], [kinds] * 2)
    tokens, labels = batch["tokens"], batch["labels"]
    np.testing.assert_array_equal(labels[:, :3], tokens[:, [3, 6, 7]])
    assert not labels[:, 3:].any()
    assert not tokens[:, [1, 2, 4, 5]].any()
    assert batch["features"].shape == (2, 2, 2, model.vision.width)
    assert len(random_batch(model, dataclasses.replace(data, labels=2))["labels"][0]) == 2


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_both_have_the_same_weights_but_for_the_routers(parts, scan, trainable):
    model, _, training = parts
    training = dataclasses.replace(training, scan=scan, trainable=trainable)
    configs = variants(model)
    runs = {name: Run.build(training, config) for name, config in configs.items()}
    drawn = draw_weights(runs["mod"], model)
    routed = merge_variables(*drawn)
    trained, frozen = weights_for(runs["full"], runs["mod"], drawn)
    assert jax.tree.structure(trained) == jax.tree.structure(runs["full"].target[0].trained)
    assert jax.tree.structure(frozen) == jax.tree.structure(runs["full"].target[1])
    full = merge_variables(trained, frozen)
    if scan:
        routed = unstack_layers(routed, runs["mod"].plan)
        full = unstack_layers(full, runs["full"].plan)
    paths = {str(path): leaf for path, leaf in jax.tree.leaves_with_path(routed)}
    found = {str(path): leaf for path, leaf in jax.tree.leaves_with_path(full)}
    assert all("router" in path for path in set(paths) - set(found))
    assert len(paths) - len(found) == 2
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, paths[path])


def test_what_is_no_layer_is_the_same_memory(parts, drawn):
    model, _, training = parts
    full = Run.build(training, variants(model)["full"])
    routed, weights, _ = drawn
    _, frozen = weights_for(full, routed, weights)
    assert frozen["params"]["embedding"] is weights[1]["params"]["embedding"]
    assert frozen["params"]["vision"] == weights[1]["params"]["vision"]


@pytest.mark.parametrize(
    ("before", "after", "others", "peak"),
    [
        ((1000, 1500), (1000, 5000), 300, 4700),
        ((1000, 5000), (1000, 5000), 300, None),
        (None, None, 300, None),
    ],
)
def test_a_peak_counts_without_what_else_lies_there(
    drawn, monkeypatch, before, after, others, peak
):
    run, weights, batch = drawn
    side = Side(run, *weights, batch)
    readings = iter([before, after])
    monkeypatch.setattr(sides.device, "memory_in_use", lambda: next(readings))
    monkeypatch.setattr(sides, "bytes_per_device", lambda tree: 1000 - others)
    monkeypatch.setattr(Side, "step", lambda self: ())
    assert side.try_out() == peak


def test_what_does_not_fit_is_an_answer(drawn, monkeypatch):
    run, weights, batch = drawn
    side = Side(run, *weights, batch)

    def refuse(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(Side, "step", refuse)
    assert side.try_out() is None
    assert not side.fits


def test_without_routing_there_is_nothing_to_compare(parts):
    model = dataclasses.replace(parts[0], routing=full_computation())
    with pytest.raises(UserError, match="routes nowhere"):
        variants(model)


def test_a_ratio_needs_a_number_of_both():
    row = {
        "full": {"a": 4, "b": None, "c": 0, "fits": True, "seconds": {"median": 2.0}},
        "mod": {"a": 3, "b": 1, "c": 0, "fits": True, "seconds": {"median": 1.0}},
    }
    assert ratios(row) == {"a": 0.75, "seconds": 0.5}
