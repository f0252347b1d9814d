"""`evaluate` needs the directory of a run and nothing else, and goes on where it was stopped."""

import importlib.util
import json
import pathlib
import re
import shutil

import jax
import pytest

from tests.ended import status_of
from videollm_mod_jax import evaluate
from videollm_mod_jax.data.sources import TRAINED_ON, Sources
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation import running, samples
from videollm_mod_jax.experiment import Experiment, plain
from videollm_mod_jax.models import VideoLLM, init_variables
from videollm_mod_jax.training.checkpoint import CONFIG_FILE, save_model, write_json

DIGITS = pathlib.Path(__file__).parent.parent / "configs" / "digits.py"
TEACHER_FORCED = "digits_stream.teacher-forced.jsonl"
SELF_CONDITIONED = "digits_stream.self-conditioned.jsonl"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run of a tiny untrained model on three short streams per split."""
    directory = tmp_path_factory.mktemp("runs") / "digits"
    spec = importlib.util.spec_from_file_location("digits", DIGITS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.decoder.update(hidden_size=16, mlp_size=16, num_layers=2, head_dim=8)
    config.data.draw.update(train=3, validation=3, test=3)
    config.evaluation.update(batch_size=2, answer_tokens=8)
    experiment = Experiment.from_table(plain(config))
    sources = Sources(experiment.data, directory)
    tokenizer = sources.make_tokenizer()
    config.model.decoder.vocab_size = tokenizer.vocab_size
    model = Experiment.from_table(plain(config)).model
    init = jax.jit(init_variables, static_argnums=0)
    variables = init(VideoLLM(model), jax.random.key(0))
    save_model(directory, model, variables, tokenizer, experiment.data.system)
    write_json(directory / CONFIG_FILE, plain(config))
    write_json(directory / TRAINED_ON, sources.training_stretches())
    return directory


@pytest.fixture(scope="module")
def results(run, tmp_path_factory):
    """The results of an evaluation that nobody stopped."""
    out = tmp_path_factory.mktemp("results") / "whole"
    evaluate.evaluate(run, out=out)
    return out


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(out):
    return {path.name: path.read_text() for path in out.iterdir()}


def test_writes_a_line_per_stream_and_prints_their_means(run, results, capsys):
    assert sorted(contents(results)) == [
        SELF_CONDITIONED,
        TEACHER_FORCED,
        "report.json",
        "report.md",
    ]
    # It is all there: only shown.
    assert evaluate.main(["--checkpoint", str(run), "--out", str(results)]) == 0
    printed = capsys.readouterr().out
    for heading in ("LM-PPL", "TimeDiff", "Fluency", "LM-Correctness", "3 records", "r=0.2"):
        assert heading in printed
    rows = read_rows(results / TEACHER_FORCED)
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert len({row["id"] for row in rows}) == 3
    mean = sum(row["lm_ppl"] for row in rows) / 3
    # A model that knows nothing: every token about equally likely.
    assert 50 < mean < 5000
    assert f"{mean:.2f}" in printed
    parts = json.loads((results / "report.json").read_text())["benchmarks"]["digits_stream"][
        "parts"
    ]
    assert parts["teacher-forced"]["scores"]["lm_ppl"] == pytest.approx(mean)
    watched = read_rows(results / SELF_CONDITIONED)
    assert [row["id"] for row in watched] == [row["id"] for row in rows]
    assert all(row["truth"] for row in watched)
    assert parts["self-conditioned"]["scores"].keys() >= {"f1", "f1_in_window", "cider"}


def test_what_the_report_has_the_tables_have(results, tmp_path, monkeypatch):
    """A kill may come between them; what the report has is not done again."""
    monkeypatch.setattr(evaluate, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.write_report(tmp_path, json.loads((results / "report.json").read_text()))
    assert (tmp_path / "report.md").read_text() == (results / "report.md").read_text()


@pytest.mark.parametrize("die_at", [0, 1, 4])
def test_an_evaluation_that_is_killed_goes_on(run, results, tmp_path, monkeypatch, die_at):
    out = tmp_path / "killed"
    add, count = running.Samples.add, iter(range(99))

    def add_or_die(self, row):
        if next(count) == die_at:
            # In the middle of a line.
            with open(self._path, "a") as file:
                file.write('{"index": 2, "id": "')
            raise KeyboardInterrupt
        add(self, row)

    monkeypatch.setattr(running.Samples, "add", add_or_die)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run, out=out)
    left = read_left(out)
    # What was written is not asked again.
    monkeypatch.setattr(
        running.Samples, "add", lambda self, row: again.append(row) or add(self, row)
    )
    again = []
    evaluate.evaluate(run, out=out)
    assert len(again) + left == 6
    assert left == die_at
    assert contents(out) == contents(results)


def read_left(out):
    """Complete samples that a killed evaluation left."""
    texts = [path.read_text() for path in out.rglob("*.jsonl")]
    return sum(text.count("\n") for text in texts if text)


def test_videos_that_were_learnt_are_refused_unless_forced(run, tmp_path, capsys):
    command = ["--checkpoint", str(run), "--split", "train", "--no-self-conditioned"]
    assert evaluate.main([*command, "--out", str(tmp_path / "refused")]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"error: digits_stream, split train: 3 of its 3 videos .*--force.*\n", error
    )
    assert not (tmp_path / "refused").exists()
    forced = tmp_path / "forced"
    assert evaluate.main([*command, "--out", str(forced), "--force"]) == 0
    report = json.loads((forced / "report.json").read_text())
    assert report["benchmarks"]["digits_stream"]["trained_on"] == 3
    for text in (capsys.readouterr().out, (forced / "report.md").read_text()):
        assert "†" in text
        assert "3 of its videos show" in text
    assert not (forced / SELF_CONDITIONED).exists()


def test_a_config_file_and_its_overrides_say_what_is_evaluated(run, results, tmp_path):
    config = ["--config", f"{DIGITS}", "--config.evaluation.answer_tokens=8"]
    sizes = [f"--config.data.draw.{split}=3" for split in ("train", "validation", "test")]
    out = tmp_path / "named"
    command = ["--checkpoint", str(run), "--out", str(out), *config, *sizes]
    assert evaluate.main([*command, "--benchmarks", "digits_stream", "--batch-size", "2"]) == 0
    assert contents(out) == contents(results)


def test_results_of_several_models_share_a_table(run, results, capsys):
    beside = ["--beside", str(results), str(results)]
    assert evaluate.main(["--checkpoint", str(run), "--out", str(results), *beside]) == 0
    assert capsys.readouterr().out.count("r=0.2") == 3


def test_a_model_of_8_bit_weights_is_named_so(run, results, tmp_path, capsys):
    beside = ["--beside", str(results)]
    out = ["--int8", "--no-self-conditioned", "--out", str(tmp_path / "int8")]
    assert evaluate.main(["--checkpoint", str(run), *out, *beside]) == 0
    names = [json.loads((path / "report.json").read_text())["model"]["name"]
             for path in (results, tmp_path / "int8")]  # fmt: skip
    assert names[1] == f"{names[0]}, int8"
    assert evaluate.main(["--checkpoint", str(run), "--int8", "--out", str(results)]) == 2
    assert "int8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "holdout"], "holdout"),
        (["--batch-size", "0"], "--batch-size is '0'; expected a whole number"),
        (["--silence-threshold", "-1"], "--silence-threshold is '-1'; expected a number in [0, 1]"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--benchmarks", "coin_step"], "--benchmarks names 'coin_step'"),
        (["--config", "nowhere.py"], "there is no file nowhere.py"),
        (["--beside", "nowhere"], "--beside: nowhere holds no report.json"),
        (["--bench", "a"], "unexpected argument '--bench'"),
        (["--judge-url", "ftp://x", "--judge-key", ""], "url of the judge is 'ftp://x'"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, more, message):
    out = tmp_path / "results"
    assert status_of(evaluate.main, ["--checkpoint", str(run), "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", error)
    assert not out.exists()


def test_results_of_other_settings_are_not_mixed(run, results, capsys):
    before = contents(results)
    command = ["--checkpoint", str(run), "--out", str(results)]
    assert evaluate.main([*command, "--silence-threshold", "0.5"]) == 2
    assert "silence_threshold is None there and 0.5 now" in capsys.readouterr().err
    assert contents(results) == before


@pytest.mark.parametrize("name", ["../../../victim", "/tmp/victim", ".."])
def test_no_bundle_names_a_directory_of_mine(run, tmp_path, capsys, name):
    bundle, victim = tmp_path / "a" / "b" / "bundle", tmp_path / "victim"
    shutil.copytree(run, bundle)
    victim.mkdir()
    (victim / "mine.txt").write_text("mine")
    config = json.loads((bundle / "config.json").read_text())
    data, evaluation = config["data"], config["evaluation"]
    data["sources"][name] = data["sources"]["digits_stream"] | {"records": "x", "features": "y"}
    evaluation["benchmarks"][name] = "test"
    (bundle / "config.json").write_text(json.dumps(config))
    assert evaluate.main(["--checkpoint", str(bundle)]) == 2
    error = capsys.readouterr().err
    assert f"the name of a dataset is '{name}'; expected a name" in error.splitlines()[-1]
    assert [path.name for path in victim.iterdir()] == ["mine.txt"]

    config["data"]["sources"].pop(name)
    evaluation["benchmarks"] = {"digits_stream": "../" + name}
    (bundle / "config.json").write_text(json.dumps(config))
    assert evaluate.main(["--checkpoint", str(bundle)]) == 2
    assert "evaluation.benchmarks.digits_stream is" in capsys.readouterr().err
    assert evaluate.main(["--checkpoint", str(run), "--split", name]) == 2
    assert f"--split is '{name}'" in capsys.readouterr().err


def test_what_an_evaluation_did_not_write_is_not_removed(tmp_path):
    unfinished = tmp_path / "unfinished" / "toy"
    samples.Samples(tmp_path, "toy", {}, 0, 1).add({"index": 0, "id": "a"})
    (tmp_path / "mine").mkdir()
    (unfinished / "link").symlink_to(tmp_path / "mine")
    (unfinished / "notes.txt").write_text("mine")
    samples.forget(tmp_path, "toy")
    assert sorted(path.name for path in unfinished.iterdir()) == ["link", "notes.txt"]
    with pytest.raises(UserError, match=r"name of a benchmark is '\.\./toy'"):
        samples.Samples(tmp_path, "../toy", {}, 0, 1)


def test_a_model_without_a_run_needs_a_config(run, tmp_path, capsys):
    for name in ("model.json", "tokenizer.json", "tokenizer_config.json", "dialogue.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "weights").symlink_to(run / "weights")
    assert evaluate.main(["--checkpoint", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err
