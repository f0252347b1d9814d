"""Memory by frames: the plans of both variants, put beside each other and drawn."""

import dataclasses

import numpy as np
import pytest

from tests.test_benchmark_training import CONFIG, SMALL
from videollm_mod_jax import benchmark, cli
from videollm_mod_jax.benchmarking import plots, tables
from videollm_mod_jax.benchmarking.memory import benchmark_memory
from videollm_mod_jax.benchmarking.training import variants
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.experiment import plain, read_training
from videollm_mod_jax.models.flops import kv_cache_bytes
from videollm_mod_jax.planning import plan_streaming, plan_training, scale_frames
from videollm_mod_jax.training import compiled


@pytest.fixture(scope="module")
def model():
    return read_training(plain(cli.read_config(CONFIG, SMALL)))[0]


def plan(model, frames):
    """A plan that the frames alone decide, MoD's at three quarters of full's."""
    size = frames * (400 if model.routing.insertion == () else 300)
    return {
        "frames": frames,
        "text_tokens": 2 * frames,
        "fits": True,
        "parts": {"caches": 10 * size},
        "tower_bytes": 5,
        "program": {"peak_bytes": size, "needed_bytes": None, "cost": {"flops": 7 * size}},
        "floor_flops": 6 * size,
        "seconds": {"compute": size / 100, "memory": size / 200},
        "cache_bytes_per_frame": size,
        "frames_until_full": 1_200_000 // size,
    }


def measured(model, frames=(2, 4), longest=None, train=plan):
    return benchmark_memory(
        model,
        frames,
        plan_training=train,
        plan_streaming=plan,
        longest=longest,
        announce=lambda text: None,
    )


def test_rows_hold_both_variants_and_their_ratio(model):
    result = measured(model, longest=lambda model: plan(model, 12))
    assert [row["frames"] for row in result["rows"]] == [2, 4]
    row = result["rows"][1]
    assert (row["text_tokens"], row["full"]["peak_bytes"], row["mod"]["peak_bytes"]) == (
        8,
        1600,
        1200,
    )
    assert row["full"]["step_seconds"] == 16.0
    assert set(row["ratio"].values()) == {0.75, 1.0}
    stream = result["stream"]
    assert (stream["frames"], stream["full"]["cache_bytes"]) == (4, 16_000)
    without_text = [kv_cache_bytes(config, 1, 0, "float32") for config in variants(model).values()]
    found = [stream[name]["cache_bytes_per_frame_without_text"] for name in ("full", "mod")]
    # Ten tokens in four layers; ten in two and two in two.
    assert found == without_text
    assert without_text[0] / without_text[1] == 40 / 24
    assert result["longest"] == {
        "full": {"frames": 12},
        "mod": {"frames": 12},
        "ratio": {"frames": 1.0},
    }


def test_what_does_not_fit_has_what_it_would_need(model):
    def refuse(model, frames):
        program = {"peak_bytes": None, "needed_bytes": 9000, "cost": None}
        return plan(model, frames) | {"program": program, "fits": False, "seconds": None}

    result = measured(model, train=refuse, longest=lambda model: None)
    full = result["rows"][0]["full"]
    assert (full["fits"], full["peak_bytes"]) == (False, 9000)
    assert (full["compiled_flops"], full["step_seconds"]) == (None, None)
    assert result["longest"]["full"] == {"frames": 0}


def test_the_plans_are_those_of_the_compiler(model):
    _, data, training = read_training(plain(cli.read_config(CONFIG, SMALL)))
    target = compiled.find_target("cpu:1")

    plans = []

    def train(model, frames):
        plans.append(plan_training(model, scale_frames(data, frames), training, target))
        return dataclasses.asdict(plans[-1])

    def stream(model, frames):
        return dataclasses.asdict(plan_streaming(model, scale_frames(data, frames), target))

    result = benchmark_memory(
        model,
        (8,),
        plan_training=train,
        plan_streaming=stream,
        longest=None,
        announce=lambda text: None,
    )
    row, stream = result["rows"][0], result["stream"]
    for name, planned in zip(("full", "mod"), plans, strict=True):
        assert row[name]["peak_bytes"] == planned.program.peak_bytes
        assert row[name]["compiled_flops"] == planned.program.cost.flops
    assert row["full"]["step_seconds"] is None
    assert "longest" not in result
    for name, config in variants(model).items():
        assert stream[name]["cache_bytes"] >= kv_cache_bytes(config, 8, 20, "float32")


def test_pictures_and_tables_hold_every_row(model, tmp_path):
    from matplotlib.image import imread

    device = {"platform": "cpu", "kind": "Some CPU", "count": 1, "host_cores": 2}
    result = measured(model, longest=lambda model: plan(model, 12))
    result |= {"device": device, "batch_size": 3, "target": {"topology": "v5p:2x2x2"}}
    files = plots.draw_memory(result, tmp_path)
    assert [file.name for file in files] == ["memory.png", "memory-time.png"]
    for file in files:
        assert file.stat().st_size < 60_000
        # The line of MoD is the only thing with a colour.
        assert (np.ptp(imread(file)[..., :3], axis=-1) > 0.3).sum() > 200
    training, streaming = tables.memory_tables(result)
    assert "v5p:2x2x2, batch 3" in training.title
    # Three lines for each of two lengths, and the longest stream.
    assert (training.row_count, streaming.row_count) == (7, 4)


def test_an_unknown_topology_is_one_line(tmp_path, capsys):
    arguments = ("--topology", "v9:3", "--out", str(tmp_path))
    assert benchmark.main(["memory", "--config", CONFIG, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: topology is 'v9:3'")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_frames_rise(model):
    with pytest.raises(UserError, match="--frames 4 4: expected rising numbers"):
        measured(model, frames=(4, 4))
