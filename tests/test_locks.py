"""A directory has one writer at a time, whoever dies."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.locks import LOCK, locked

HOLD = """
import sys, time
from videollm_mod_jax.locks import locked
with locked(sys.argv[1], "train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_who_is_first(tmp_path, holder):
    with (
        pytest.raises(UserError, match=rf"run is in use by `train`, process {holder.pid} on .*"),
        locked(tmp_path / "run", "encode"),
    ):
        pass


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "run", "train"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_a_process_may_enter_what_it_holds(tmp_path):
    with locked(tmp_path / "run", "study"), locked(tmp_path / "run", "train"):
        pass
    with locked(tmp_path / "run", "train"):
        pass


def test_nothing_is_left(tmp_path):
    with locked(tmp_path / "a" / "b" / "run", "train"), locked(tmp_path / "c" / "d", "encode"):
        pass
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "run", "train"):
        (tmp_path / "run" / "model.json").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "model.json"]


def test_the_lock_of_a_file_that_is_gone_does_not_count(tmp_path, monkeypatch):
    """Between opening the file and locking it, its holder removes it and ends."""
    flock, removed = fcntl.flock, []

    def late(descriptor, operation):
        if operation & fcntl.LOCK_EX and not removed:
            removed.append((tmp_path / "run" / LOCK).unlink())
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / "run", "train"):
        assert removed
        assert (tmp_path / "run" / LOCK).exists()


def test_a_lock_lies_next_to_what_is_not_there_yet(tmp_path):
    with locked(tmp_path / "store", "encode", beside=True):
        assert not (tmp_path / "store").exists()
        assert (tmp_path / f".store{LOCK}").exists()


@pytest.mark.parametrize("text", ["", "[]", "null", '{"pid": 1}', "\xff"])
def test_a_lock_file_that_says_nothing_is_named(tmp_path, holder, text):
    (tmp_path / "run" / LOCK).write_bytes(text.encode("latin-1"))
    with (
        pytest.raises(UserError, match=r"in use by another process \(see .*lock\)"),
        locked(tmp_path / "run", "train"),
    ):
        pass


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "run", "train"):
        pass
    assert not (tmp_path / "victim").exists()
