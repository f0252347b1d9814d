"""Faults of the machine, and signals, end a command in one line and with the documented status."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from videollm_mod_jax import cli
from videollm_mod_jax.errors import UserError, fault_of_machine

ROOT = Path(__file__).parents[1]


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied; give"),
        (
            ValueError("INTERNAL: No space left on device"),
            "No space left on device (ValueError); m",
        ),
        (
            caused(RuntimeError("save"), OSError(errno.ENOSPC, "full", "y")),
            "y: No space left on de",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "z/a"), "z/a: Not a directory"),
    ],
)
def test_a_fault_of_the_machine_is_one_line(capsys, error, line):
    def run():
        raise error

    assert fault_of_machine(error).startswith(line)
    assert cli.report_user_errors(run) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_what_a_message_quotes_stays_within_its_line():
    found = "two\nlines" * 10**6
    said = str(UserError(f"a.json: found {found}\x1b[2J; expected a table"))
    assert said.startswith(r"a.json: found two\nlinestwo")
    assert said.endswith(r"lines\x1b[2J; expected a table")
    assert len(said) <= 1000
    assert str(UserError("a.json: é is missing")) == "a.json: é is missing"


@pytest.mark.parametrize(
    "error", [KeyError("loss"), caused(KeyError("a"), FileNotFoundError(2, "b"))]
)
def test_a_mistake_of_ours_keeps_its_traceback(error):
    def run():
        raise error

    assert fault_of_machine(error) is None
    with pytest.raises(KeyError) as caught:
        cli.report_user_errors(run)
    assert "Please report it" in caught.value.__notes__[0]


RUN = """
import sys, time
from videollm_mod_jax import cli, signals
signals.PATIENCE = 0.5

def deaf():
    print("ready", flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass

def listening():
    print("ready", flush=True)
    time.sleep(60)

def printing():
    print("much" * 10000)

sys.exit(cli.report_user_errors({work}, "interrupted; go on"))
"""


def start(work, **streams):
    command = [sys.executable, "-c", RUN.replace("{work}", work)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, **streams)


@pytest.mark.parametrize("work", ["listening", "deaf"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_work_even_if_it_is_swallowed(work, number, status):
    with start(work, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(20) == status
        assert process.stderr.read() == "interrupted; go on\n"


def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full, start("printing", stdout=full) as process:
        assert process.wait(60) == 2
        assert process.stderr.read().startswith("error: No space left on device")


def test_a_closed_standard_output_is_no_fault():
    closes = {"preexec_fn": lambda: os.close(1)}
    with start("printing", **closes) as process:
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize("command", ["train", "stream", "evaluate", "convert"])
def test_ctrl_c_while_modules_load_prints_no_traceback(tmp_path, command):
    (tmp_path / "numpy.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-m", f"videollm_mod_jax.{command}", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (-signal.SIGINT, "")
