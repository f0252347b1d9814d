"""`evaluate` needs the directory of a run and nothing else."""

import importlib.util
import json
import pathlib
import re

import jax
import pytest

from videollm_mod_jax import evaluate
from videollm_mod_jax.data.sources import Sources
from videollm_mod_jax.experiment import Experiment, plain
from videollm_mod_jax.models import VideoLLM, init_variables
from videollm_mod_jax.training.checkpoint import CONFIG_FILE, save_model, write_json

DIGITS = pathlib.Path(__file__).parent.parent / "configs" / "digits.py"


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
    config.evaluation.batch_size = 2
    experiment = Experiment.from_table(plain(config))
    tokenizer = Sources(experiment.data, directory).make_tokenizer()
    config.model.decoder.vocab_size = tokenizer.vocab_size
    model = Experiment.from_table(plain(config)).model
    init = jax.jit(init_variables, static_argnums=0)
    variables = init(VideoLLM(model), jax.random.key(0))
    save_model(directory, model, variables, tokenizer, experiment.data.system)
    write_json(directory / CONFIG_FILE, plain(config))
    return directory


def test_prints_the_metrics_and_writes_a_line_per_stream(run, tmp_path, capsys):
    out = tmp_path / "samples.jsonl"
    assert evaluate.main(["--checkpoint", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for column in ("LM-PPL", "TimeDiff", "Fluency", "LM-Correctness", "3 streams"):
        assert column in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 3
    mean = sum(row["lm_ppl"] for row in rows) / 3
    assert f"{mean:.3f}" in printed
    # A model that knows nothing: every token about equally likely.
    assert 50 < mean < 5000
    # Another split has no stored features yet: they are encoded on the way.
    assert evaluate.main(["--checkpoint", str(run), "--split", "validation"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "holdout"], "holdout"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--silence-threshold", "-1"], "silence_threshold is -1"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, more, message):
    out = tmp_path / "samples.jsonl"
    assert evaluate.main(["--checkpoint", str(run), "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", error)
    assert not out.exists()


def test_a_model_without_a_run_is_refused(run, tmp_path, capsys):
    for name in ("model.json", "tokenizer.json", "tokenizer_config.json", "dialogue.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "weights").symlink_to(run / "weights")
    assert evaluate.main(["--checkpoint", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err
