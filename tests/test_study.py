"""The study: its variants, its verdicts, its report, and a tiny one through the real command."""

import json
from pathlib import Path

import numpy as np
import pytest

from videollm_mod_jax import cli, study
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.experiment import plain
from videollm_mod_jax.models import config_plan
from videollm_mod_jax.studying import orderings, tables
from videollm_mod_jax.studying.orderings import Ordering, judge
from videollm_mod_jax.studying.variants import TABLES, chosen, decaying, variants
from videollm_mod_jax.training.metrics import read_metrics

CONFIG = Path(__file__).parent.parent / "configs" / "study_digits.py"
TINY = (
    "--config.model.decoder.num_layers=2",
    "--config.model.decoder.hidden_size=16",
    "--config.model.decoder.mlp_size=16",
    "--config.model.decoder.head_dim=8",
    "--config.data.draw.train=4",
    "--config.data.draw.test=2",
    "--config.data.batch_size=2",
    "--config.tower.steps=2",
    "--config.tower.batch_size=4",
    "--config.training.steps=2",
    "--config.training.log_every=1",
    "--config.evaluation.batch_size=2",
    "--config.evaluation.answer_tokens=2",
    "--config.study.pretraining_steps=2",
    "--config.study.seeds=(0,)",
    "--config.study.rounds=1",
    "--config.study.warmup=1",
    "--config.study.stream_frames=4",
)


def table(*overrides):
    return plain(cli.read_config(str(CONFIG), overrides))


@pytest.fixture(scope="module")
def model():
    return study.read(table())[1].model


def test_variants_differ_in_what_they_compute(model):
    plans = {name: config_plan(variant.model(model)) for name, variant in variants(model).items()}
    by_ratio = [plans[name][1].keep for name in ("keep-0.1", "mod", "keep-0.3", "keep-0.5")]
    assert by_ratio == [3, 6, 8, 13]
    routings = {(variant.routing, variant.summary_only) for variant in variants(model).values()}
    assert len(routings) == len(variants(model))
    insertions = {name: plans[name] for name in ("all", "all-deep", "mod", "interleaved-deep")}
    assert len(set(insertions.values())) == 4
    assert len({plans[name] for name in ("full", "early-exit", "layer-skip", "mod")}) == 4


def test_every_row_of_a_table_is_a_variant_and_every_variant_has_a_row(model):
    rows = [name for one in TABLES for name in one.rows]
    assert set(rows) == set(variants(model))


def test_a_decaying_schedule_keeps_as_much_on_average(model):
    ratios = decaying(model.routing, model.decoder.num_layers)
    kept = [ratio for ratio in ratios if ratio]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) > 1
    assert np.mean(kept) == pytest.approx(model.routing.keep_ratio)


def test_unknown_variants_are_refused_by_name(model):
    with pytest.raises(UserError, match="--only lerned: there is no such variant; known: full"):
        chosen(model, ("full", "lerned"))


@pytest.mark.parametrize(
    ("better", "worse", "strict", "verdict"),
    [
        ((0.9, 0.91, 0.92), (0.8, 0.81, 0.82), True, orderings.HOLDS),
        ((0.8, 0.81, 0.82), (0.9, 0.91, 0.92), True, orderings.FAILS),
        ((0.9, 0.8, 0.85), (0.84, 0.86, 0.84), True, orderings.OPEN),
        ((0.9, 0.8, 0.85), (0.84, 0.86, 0.84), False, orderings.HOLDS),
        ((0.8, 0.81, 0.82), (0.9, 0.91, 0.92), False, orderings.FAILS),
        ((0.9,), (0.8,), True, orderings.OPEN),
        ((), (0.8,), True, orderings.MISSING),
    ],
)
def test_orderings_are_judged_by_the_spread_over_paired_seeds(better, worse, strict, verdict):
    values = {"a": dict(enumerate(better)), "b": dict(enumerate(worse))}
    assert judge(Ordering("a", "b", strict), values, higher_is_better=True).verdict == verdict


def test_a_lower_perplexity_is_ahead():
    values = {"a": {0: 1.1, 1: 1.2}, "b": {0: 1.5, 1: 1.6}}
    judged = judge(Ordering("a", "b"), values, higher_is_better=False)
    assert judged.difference == pytest.approx(0.4)
    assert judged.verdict == orderings.HOLDS


def run_result(correctness):
    scores = {"lm_ppl": 1.2, "time_diff": 0.1, "fluency": 0.5, "lm_correctness": correctness}
    return {"teacher_forced": scores, "self_conditioned": {"f1": 0.4}, "answers": 0.3, "loss": 1.0}


def test_a_report_says_what_was_not_run_and_what_failed(model):
    results = {
        "full": {0: run_result(0.7), 1: run_result(0.8)},
        "mod": {0: {"failed": "loss is nan at step 3"}},
    }
    text = tables.report(variants(model), results, None, None, {"command": "study"})
    full = next(line for line in text.splitlines() if line.startswith("| Full computation"))
    assert "75.0 ± 7.1" in full
    assert "49.0" in full  # the paper's
    assert "| not run |" in next(line for line in text.splitlines() if "LayerSkip" in line)
    assert "mod, seed 0: loss is nan at step 3" in text
    assert "| mod above random | LM-Corr | - | - | 0 | not run |" in text


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A study of two variants that was killed before the second had its result, and continued."""
    directory = tmp_path_factory.mktemp("study")
    command = ["--config", str(CONFIG), "--workdir", str(directory), *TINY]
    command += ["--workers", "2", "--only", "full,mod"]
    assert study.main(command) == 0
    kept = [directory / "runs/full/seed-0/result.json", directory / "baselines.json"]
    stamps = [path.stat().st_mtime_ns for path in kept]
    (directory / "runs/mod/seed-0/result.json").unlink()
    assert study.main(command) == 0
    assert stamps == [path.stat().st_mtime_ns for path in kept]
    return directory


def test_a_killed_study_goes_on_and_reruns_nothing_finished(workdir):
    results = sorted(path.parent.parent.name for path in workdir.glob("runs/*/*/result.json"))
    assert results == ["full", "mod"]
    mod = json.loads((workdir / "runs/mod/seed-0/result.json").read_text())
    assert set(mod["kept"]) == {"1"}


def test_all_runs_go_on_from_the_pretrained_model(workdir):
    """Seed 0 shows the pretrained and the run the same first batch; only the weights differ."""
    untrained, *_ = read_metrics(workdir / "start")
    started, *_ = read_metrics(workdir / "runs/full/seed-0")
    assert started["step"] == untrained["step"] == 1
    assert started["loss"] < untrained["loss"]


def test_the_report_has_costs_baselines_and_figures(workdir):
    text = (workdir / "report.md").read_text()
    assert "2 of 21" in text
    assert "start: one model after 2 updates with full computation" in text
    assert "always silent" in text
    assert "GFLOP/s" in text
    for picture in ("table-1.png", "trade-off.png", "kept.png", "cost-ratios.png"):
        assert f"({picture})" in text
        assert (workdir / picture).stat().st_size > 1000


def test_another_study_in_the_same_directory_is_refused(workdir, capsys):
    command = ["--config", str(CONFIG), "--workdir", str(workdir), *TINY]
    assert study.main([*command, "--config.training.steps=3"]) == 2
    assert "training.steps is 3 (was 2)" in capsys.readouterr().err
