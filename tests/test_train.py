"""The train verb: configs, a whole small run, and what a user may get wrong."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import videollm_mod_jax as vm
from configs import ego4d_narration
from tests import tiny, tiny_stream
from videollm_mod_jax import experiment
from videollm_mod_jax.data.builders import registry
from videollm_mod_jax.data.sources import Sources
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM, init_variables
from videollm_mod_jax.models.plan import routed_layers
from videollm_mod_jax.train import train
from videollm_mod_jax.training import optimizer, sharding
from videollm_mod_jax.training.checkpoint import save_model
from videollm_mod_jax.training.step import make_train_step

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def config_of(path, *arguments):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A model directory without a run, as a conversion leaves it: dense, without adapters."""
    directory = tmp_path_factory.mktemp("converted")
    words = tiny_stream.tokenizer()
    vision = dataclasses.replace(tiny.VISION, image_size=24, patch_size=8, pool=(3, 3))
    decoder = dataclasses.replace(tiny.DECODER, vocab_size=words.vocab_size + 5)
    routing = dataclasses.replace(tiny.ROUTING, weighting="tanh1")
    config = dataclasses.replace(tiny.CONFIG, decoder=decoder, vision=vision, routing=routing)
    variables = init_variables(VideoLLM(config), jax.random.key(1))
    save_model(directory, config, variables, words, "")
    (directory / "conversion.json").write_text("{}")
    return directory


def small():
    """configs/digits.py with everything that takes time made small."""
    config = config_of(ROOT / "configs" / "digits.py")
    config.data.draw.update({"train": 8, "validation": 2, "test": 4})
    config.data.batch_size = 4
    config.tower.update({"steps": 2, "batch_size": 4})
    config.training.update({"steps": 4, "checkpoint_every": 2, "log_every": 1})
    config.evaluation.batch_size = 4
    decoder = {"num_layers": 2, "hidden_size": 32, "mlp_size": 32, "num_heads": 2, "head_dim": 16}
    config.model.decoder.update(decoder)
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_traces_its_train_step(path, converted):
    assert path.read_text().split("\n")[2].strip().startswith("python -m videollm_mod_jax.")
    arguments = [str(converted)] if path.stem in ("finetune", "own") else []
    table = experiment.plain(config_of(path, *arguments))
    config, data, training = experiment.read_training(table)
    layout = sharding.make_layout(training.sharding, training.mesh)
    schedule = optimizer.learning_rate_schedule(training.optimizer, training.steps)
    adamw = optimizer.make_optimizer(training.optimizer, schedule)
    model = VideoLLM(config, training.execution())
    state, frozen = sharding.abstract_training(model, adamw, training.trainable, layout)
    step = make_train_step(
        model,
        adamw,
        schedule,
        stream_weight=training.stream_weight,
        microbatches=training.microbatches,
    )
    budget, batch, frame = data.budget, data.batch_size, config.tokens_per_frame
    shapes = {
        "tokens": (budget.text_tokens + budget.frames * frame,),
        "frame_starts": (budget.frames,),
        "features": (budget.frames, frame, config.vision.width),
        "label_positions": (budget.labels,),
        "labels": (budget.labels,),
        "label_kinds": (budget.labels,),
    }
    arrays = {
        key: jax.ShapeDtypeStruct((batch, *shape), "float32" if key == "features" else "int32")
        for key, shape in shapes.items()
    }
    new_state, sums = jax.eval_shape(step, state, frozen, arrays)
    assert jax.tree.map(np.shape, new_state) == jax.tree.map(np.shape, state)
    assert sums["loss"][0].shape == ()


PAPER = (
    "ego4d_narration",
    "ego4d_narration_full",
    "ego4d_lta",
    "coin",
    "egoexo4d_keystep",
    "llava",
)


@pytest.mark.parametrize("row", ego4d_narration.ROUTING)
@pytest.mark.parametrize("name", PAPER)
def test_every_row_of_the_papers_tables_is_a_config(name, row, tmp_path):
    source = config_of(ROOT / "configs" / f"{name}.py", f"v5p-16,{row}")
    table = experiment.plain(source)
    config, data, _ = experiment.read_training(table)
    assert config.tokens_per_frame == (1 if row == "online" else 10)
    assert bool(routed_layers(config.routing.insertion, 32)) == (row not in ("full", "online"))
    assert set(data.sources) <= set(registry.DATASETS)
    settings = experiment.build(
        experiment.EvaluationConfig, table["evaluation"], "config.evaluation"
    )
    assert set(settings.benchmarks) <= set(data.sources)
    with pytest.raises(UserError, match="datasets/"):
        train(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(small(), workdir)


def test_a_run_evaluates_before_and_after_and_leaves_all_that_readme_draws(run):
    workdir, report = run
    assert json.loads((workdir / "evaluation.json").read_text()) == report
    assert report["before"] != report["after"]
    for values in report.values():
        assert set(values) == {"lm_ppl", "time_diff", "fluency", "lm_correctness"}
    drawn = (ROOT / "README.md").read_text().split("runs/digits/\n", 1)[1].split("```")[0]
    names = [word for line in drawn.splitlines() for word in line[:69].split()]
    assert len(names) >= 15
    for name in names:
        pattern = name.replace("...", "*").replace("checkpoints/1400/", "checkpoints/*/")
        assert list(workdir.glob(pattern.rstrip("/"))), name
    assert len((workdir / "samples.jsonl").read_text().splitlines()) == 4


def finetune(converted):
    """configs/finetune.py with everything that takes time made small."""
    config = config_of(ROOT / "configs" / "finetune.py", str(converted))
    config.model.lora.rank = 4
    config.data.draw.update({"train": 4, "validation": 2, "test": 2})
    config.data.update({"batch_size": 4, "frames": 4})
    config.training.update({"steps": 2, "checkpoint_every": 2, "log_every": 1})
    config.training.update({"sharding": "replicate", "mesh": (-1, 1, 1)})
    config.evaluation.batch_size = 2
    return config


def test_a_run_that_starts_from_a_model_trains_its_adapters_and_keeps_the_rest(converted, tmp_path):
    train(finetune(converted), tmp_path / "run")
    start, tuned = vm.load(converted), vm.load(tmp_path / "run")
    assert tuned.config.decoder == start.config.decoder
    assert (tmp_path / "run" / "conversion.json").exists()
    frozen, trained = optimizer.split_variables(tuned.variables, "lora")[::-1]
    for path, leaf in jax.tree.leaves_with_path(frozen):
        np.testing.assert_array_equal(
            leaf, functools.reduce(lambda n, k: n[k.key], path, start.variables)
        )
    # The last layer's router weights tokens that no label is read from: it has no gradient.
    trained["params"]["decoder"].pop("layer_3")
    assert all(np.any(leaf) for leaf in jax.tree.leaves(trained))
    connectors = [m.variables["params"]["connector"]["fc1"]["kernel"] for m in (start, tuned)]
    assert np.any(np.asarray(connectors[0]) != np.asarray(connectors[1]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("init", "", "init is '' and tower is None; give one of them"),
        ("init", "nowhere", "nowhere does not exist"),
        ("model.decoder.num_layers", 2, "model.decoder.num_layers is 2, and the model in .* has 4"),
        ("model.newline", True, "model.newline is True, and the model in .* has False"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(
    key, value, message, converted, tmp_path
):
    config = finetune(converted)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_same_command_again_changes_nothing(run):
    workdir, report = run
    log = (workdir / "metrics.jsonl").read_bytes()
    assert train(small(), workdir) == report
    assert (workdir / "metrics.jsonl").read_bytes() == log


def test_the_ten_lines_of_the_readme_run_as_they_are(run, capsys):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 10
    exec(code.replace("runs/digits", str(run[0])), {})
    assert capsys.readouterr().out.strip()


def test_another_configuration_is_refused_by_key_and_writes_nothing(run):
    workdir, _ = run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    config = small()
    config.training.optimizer.learning_rate = 1e-4
    with pytest.raises(UserError, match=r"training\.optimizer\.learning_rate is 0\.0001"):
        train(config, workdir)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.routing.insertion", (1, 9), "routing.insertion names layer 9"),
        ("training.trainable", "lora", "model.lora.rank is 0"),
        ("training.sharding", "zero", "replicate"),
        ("training.mesh", (3, 1, 1), "mesh"),
        ("model.vision.pool", (2, 2), r"model.vision.pool is \(2, 2\)"),
        ("data.sources.digits_stream.weight", 0.0, "nothing to learn from"),
        ("data.sources.digits_stream.records", "datasets", "expected empty, as it is drawn"),
        ("data.draw", None, "data.draw is None; expected the sizes"),
        ("data.epochs", -1.0, "data.epochs is -1.0"),
        ("evaluation.around_training", "coin_step", "expected one of evaluation.benchmarks"),
        ("training.steps", 0, "training.steps is 0"),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_anything_is_written(
    key, value, message, tmp_path
):
    config = small()
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_config_and_an_unknown_preset_in_one_are_one_line_and_status_2(tmp_path):
    source = (ROOT / "configs" / "digits.py").read_text()
    (tmp_path / "typo.py").write_text(source.replace('"tiny"', '"tinyy"'))
    for name, message in (("none.py", "there is no file"), ("typo.py", "did you mean 'tiny'?")):
        command = [sys.executable, "-m", "videollm_mod_jax.train", "--config", tmp_path / name]
        done = subprocess.run(
            [*command, "--workdir", tmp_path / "run"], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.training.stepps=3"], "the config has no key 'stepps'; did you mean \"steps\""),
        (["--config.data.zebra=3"], "the config has no key 'zebra'"),
        (["--config.training.steps=many"], "many"),
        (["--config.training.steps=0"], "training.steps is 0; expected a number in [1, 2**31)"),
        (["extra"], "unexpected argument 'extra'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(arguments, message, tmp_path):
    command = [sys.executable, "-m", "videollm_mod_jax.train", "--config", "configs/digits.py"]
    command += ["--workdir", str(tmp_path / "run"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_unknown_presets_are_refused_with_a_suggestion():
    with pytest.raises(UserError, match=r"did you mean 'llama3-8b'\?"):
        experiment.model_table("llama-3-8b", "digits-vit")
    with pytest.raises(UserError, match="unknown vision preset 'siglip'"):
        experiment.model_table("tiny", "siglip")


def test_a_run_takes_a_tokenizer_by_path_and_refuses_one_without_eos(run, tmp_path):
    config = small()
    config.data.tokenizer = str(run[0] / "tokenizer.json")
    data = experiment.Experiment.from_table(experiment.plain(config)).data
    assert Sources(data, run[0]).make_tokenizer().vocab_size == vm.load(run[0]).tokenizer.vocab_size
    (tmp_path / "tokenizer.json").write_bytes((run[0] / "tokenizer.json").read_bytes())
    config.data.tokenizer = str(tmp_path)
    with pytest.raises(UserError, match="has no eos token"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loaded_model_saves_and_loads_alone(run, tmp_path):
    model = vm.load(run[0])
    vm.save_model(tmp_path / "alone", model.config, model.variables, model.tokenizer, model.system)
    again = vm.load(tmp_path / "alone")
    assert (again.config, again.system) == (model.config, model.system)
    jax.tree.map(np.testing.assert_array_equal, again.variables, model.variables)
    assert isinstance(again.tokenizer, Tokenizer)


def test_a_checkpoint_of_another_model_is_refused_by_parameter(run, tmp_path):
    model = vm.load(run[0])
    wide = dataclasses.replace(model.config.decoder, mlp_size=48)
    other = dataclasses.replace(model.config, decoder=wide)
    vm.save_model(tmp_path / "alone", model.config, model.variables, model.tokenizer, model.system)
    (tmp_path / "alone" / "model.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(UserError, match="mlp/down/kernel should be"):
        vm.load(tmp_path / "alone")
