"""The plan verb: tables and json of steps that are compiled and never run."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

from configs import ego4d_narration, ego4d_narration_full
from tests import tiny, tiny_training
from videollm_mod_jax import experiment, planning, train
from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import full_computation
from videollm_mod_jax.models.flops import training_flops
from videollm_mod_jax.training import compiled

ROOT = Path(__file__).parents[1]
SMALL = (
    "--config.model.decoder.hidden_size=32",
    "--config.model.decoder.mlp_size=48",
    "--config.model.decoder.num_layers=2",
    "--config.training.sharding=fsdp",
    "--config.training.mesh=(1,-1,1)",
)


def verb(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "videollm_mod_jax.plan", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "140"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    done = verb(
        *("--config", "configs/digits.py", "--topology", "cpu:8", "--memory", "0.0001"),
        *("--compare", "full", "--json", str(file), *SMALL),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


def test_too_large_is_an_answer_and_not_a_failure(compared):
    table, numbers = compared
    assert table.count("does NOT fit") == 2
    assert [p["fits"] for p in numbers["plans"]] == [False, False]


def test_the_table_says_what_is_measured_and_what_is_estimated(compared):
    table, numbers = compared
    for line in ("peak of the step  [compiler]", "optimizer  [counted]", "floor  [analytic]"):
        assert line in table
    assert "[estimate]" not in table  # Nobody knows the peaks of a simulated device.
    assert numbers["versions"]["jax"] in table


def test_the_json_holds_both_models_on_all_devices(compared):
    _, numbers = compared
    routed, full = numbers["plans"]
    assert (routed["name"], full["name"]) == ("Mixture-of-Depths", "full computation")
    assert numbers["devices"] == 8
    assert routed["program"]["cost"]["flops"] < full["program"]["cost"]["flops"]
    kinds = {c["kind"] for c in routed["program"]["cost"]["collectives"]}
    assert "all-gather" in kinds
    # Adam's two moments, and two counters.
    assert routed["parts"]["optimizer"] == 2 * routed["parts"]["trained weights"] + 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "nowhere.py", "--topology", "v5e:4x4"), "no file nowhere.py"),
        (("--config", "configs/digits.py", "--topology", "v9:2"), "v5p:2x2x2"),
        (
            ("--config", "configs/digits.py", "--topology", "cpu:1", "--config.data.frame=3"),
            "frame",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = verb(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


DATA = dataclasses.replace(
    experiment.build(DataConfig, experiment.plain(ego4d_narration.get_config())["data"], "data"),
    batch_size=4,
    frames=6,
    text_tokens=64,
    labels=24,
)


@pytest.fixture(scope="module")
def planned():
    model, target = tiny_training.model_config(rank=2), compiled.find_target("cpu:1")
    training = tiny_training.training_config(trainable="lora")
    return planning.plan_training(model, DATA, training, target)


def test_a_plan_without_a_limit_does_not_guess(planned):
    assert (planned.fits, planned.limit_bytes, planned.seconds) == (None, None, None)


def test_the_floor_is_that_of_the_sequences_of_a_device(planned):
    model = tiny_training.model_config(rank=2)
    floor = training_flops(model, 6, 64, 24, trainable="lora", remat=True)
    assert planned.floor_flops == 4 * floor.total
    assert planned.recomputed_flops == 4 * floor.recomputed > 0


def test_the_tower_counts_where_the_compiler_does_not_see_it(planned):
    def fits(limit):
        return planning._plan(
            program=planned.program,
            target=compiled.find_target("cpu:1"),
            limit_bytes=limit,
            tower_bytes=planned.tower_bytes,
            **{k: getattr(planned, k) for k in ("name", "frames", "text_tokens", "parts")},
            floor_flops=1.0,
            recomputed_flops=0.0,
        ).fits

    needed = planned.program.peak_bytes + planned.tower_bytes
    assert planned.tower_bytes > 0
    assert (fits(needed), fits(needed - 1)) == (True, False)


def test_a_batch_that_does_not_divide_is_refused():
    data = dataclasses.replace(DATA, batch_size=3)
    training = tiny_training.training_config()
    with pytest.raises(UserError, match=r"data\.batch_size is 3"):
        planning.plan_training(
            tiny_training.model_config(), data, training, compiled.find_target("cpu:1")
        )


def test_a_stream_fills_the_memory_that_its_step_leaves():
    target, limit = compiled.find_target("cpu:1"), 2**24
    routed = planning.plan_streaming(tiny.CONFIG, DATA, target, limit)
    full = dataclasses.replace(tiny.CONFIG, routing=full_computation())
    dense = planning.plan_streaming(full, DATA, target, limit)
    # Keys and values of 2 heads of 8 numbers: a comma and 5 tokens, or 2 in every second layer.
    assert dense.cache_bytes_per_frame == 4 * (1 + 5) * 2 * 2 * 8 * 4
    assert routed.cache_bytes_per_frame == (2 * (1 + 5) + 2 * (1 + 2)) * 2 * 2 * 8 * 4
    assert routed.frames_until_full > dense.frames_until_full > 0
    # An entry has a position, too.
    kept = limit - dense.program.peak_bytes - dense.tower_bytes + dense.parts["caches"]
    stored = dense.cache_bytes_per_frame + 4 * (1 + 5) * 4
    assert dense.frames_until_full == kept // stored


def fake_plan(frames, fits):
    return dataclasses.replace(FAKE, frames=frames, fits=fits)


FAKE = planning.Plan(
    name="",
    frames=0,
    text_tokens=0,
    parts={},
    tower_bytes=0,
    program=compiled.refused("RESOURCE_EXHAUSTED"),
    limit_bytes=1,
    fits=False,
    floor_flops=1.0,
    recomputed_flops=0.0,
    seconds=None,
)


def search(plan, frames=160):
    tried = []
    best = planning.longest_stream(plan, frames, tried.append)
    assert len(tried) == len({p.frames for p in tried})
    return best.frames, [p.frames for p in tried]


@pytest.mark.parametrize("longest", [1, 40, 160, 517, 5000])
def test_bisection_finds_the_longest_stream(longest):
    """Even where the compiler only says no."""
    found, tried = search(lambda n: fake_plan(n, n <= longest))
    assert longest - longest // 64 <= found <= longest
    assert len(tried) <= 15


def needing(memory, limit):
    """Plans of a step that needs `memory(frames)` bytes, beside a tower of 3."""

    def plan(frames):
        needed = int(memory(frames))
        program = dataclasses.replace(FAKE.program, fits=True, peak_bytes=needed - 3)
        return dataclasses.replace(
            fake_plan(frames, needed <= limit), program=program, limit_bytes=limit, tower_bytes=3
        )

    return plan


def test_the_line_of_memory_leads_to_the_longest_stream():
    found, tried = search(needing(lambda n: 9000 + 100 * n, limit=99000), frames=600)
    assert tried == [600, 1200, 895, 905]
    assert found == 895


@pytest.mark.parametrize("bend", [0.8, 1.0, 1.2, 1.6])
@pytest.mark.parametrize("longest", [7, 150, 600, 31000])
def test_few_compilations_find_the_longest_stream_where_memory_bends(bend, longest):
    limit = 10**9
    slope = (limit - 10**8) / longest**bend
    found, tried = search(needing(lambda n: 10**8 + slope * n**bend, limit), frames=600)
    assert longest - max(1, longest // 64) <= found <= longest
    assert len(tried) <= 10


def test_a_misleading_line_only_costs_time():
    """Two sizes of nearly the same need, then a cliff: the line points far beyond."""
    found, tried = search(needing(lambda n: n if n <= 2000 else 10**9, limit=10**6), frames=600)
    assert 2000 - 32 <= found <= 2000
    assert len(tried) <= 30


def test_bisection_ends_where_nothing_fits():
    assert planning.longest_stream(lambda n: fake_plan(n, False), 160, lambda p: None) is None


def test_bisection_needs_a_limit():
    with pytest.raises(UserError, match="--memory"):
        planning.longest_stream(lambda n: fake_plan(n, None), 160, lambda p: None)


def test_text_grows_with_the_frames():
    data = planning.scale_frames(DATA, 12)
    assert (data.frames, data.text_tokens, data.labels) == (12, 128, 48)


@pytest.mark.parametrize("hardware", ego4d_narration.MICROBATCHES)
@pytest.mark.parametrize("config", [ego4d_narration, ego4d_narration_full])
def test_the_configs_of_the_paper_can_be_planned(config, hardware):
    table = experiment.plain(config.get_config(hardware))
    model, data, training = experiment.read_training(table)
    assert data.frames * model.tokens_per_frame == 6000
    chips = int(hardware.rpartition("-")[2]) // (2 if hardware.startswith("v5p") else 1)
    assert data.batch_size % (training.microbatches * chips) == 0
    assert bool(model.lora.rank) == (training.trainable == "lora")


def test_a_dataset_that_nobody_prepared_is_refused_before_anything_is_written(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="datasets/ego4d_narration"):
        train.train(ml_collections.ConfigDict(ego4d_narration.get_config()), workdir)
    assert not workdir.exists()
