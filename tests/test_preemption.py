"""SIGTERM to a run of one process: it saves, says how to go on, and goes on as if nothing was."""

import os
import signal

import jax

from tests import tiny_training
from videollm_mod_jax import cli
from videollm_mod_jax.training import metrics


def interrupted_batches(start, *arguments):
    for index in range(start, 99):
        if index == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        yield tiny_training.batch(index)


def test_sigterm_saves_the_update_at_hand_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    tiny_training.train(tmp_path / "whole", profile_steps=2)
    (trace,) = (tmp_path / "whole" / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    assert [dict(e.stats)["step_num"] for e in events if e.name == "update"] == [4, 5]

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(tiny_training, "batches_from", interrupted_batches)
        assert cli.report_user_errors(lambda: tiny_training.train(tmp_path / "run")) == 0
    assert "stopped after update 6 of 10, which is saved in" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == handler
    steps = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert steps == {"4", "6"}

    tiny_training.train(tmp_path / "run")
    assert metrics.read_metrics(tmp_path / "run") == metrics.read_metrics(tmp_path / "whole")
