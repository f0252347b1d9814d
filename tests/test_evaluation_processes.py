"""Several processes share an evaluation, and one goes on with what they left: the same report."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny_benchmarks
from videollm_mod_jax import evaluate
from videollm_mod_jax.training import distributed

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_benchmarks.write_run(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def alone(run):
    """The results of one process."""
    evaluate.evaluate(run, out=run.parent / "alone")
    return contents(run.parent / "alone")


def start(run, out):
    """Two processes of two devices each that evaluate together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "videollm_mod_jax.evaluate"]
    command += ["--checkpoint", str(run), "--out", str(out)]
    started = []
    for index in range(2):
        devices = " --xla_force_host_platform_device_count=2"
        place = (f"127.0.0.1:{port}", "2", str(index))
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + devices,
            "JAX_COMPILATION_CACHE_DIR": str(run.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **dict(zip(distributed.ENVIRONMENT, place, strict=True)),
        }
        started.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def end(processes):
    """(status, stdout, stderr) of every process."""
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def contents(out):
    """What the files say; numbers to five digits, as devices that share a model round otherwise."""

    def number(text):
        return float(f"{float(text):.5g}")

    def read(path):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        is_text = path.suffix == ".md"
        return lines if is_text else [json.loads(line, parse_float=number) for line in lines]

    return {path.name: read(path) for path in out.iterdir()}


def test_two_processes_give_the_report_of_one(run, alone):
    out = run.parent / "two"
    ended = end(start(run, out))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert contents(out) == alone
    names = {"coin_step.jsonl", "ego4d_lta.jsonl", "report.json", "report.md"}
    assert names < alone.keys()
    # The first speaks for all of them.
    assert ("COIN" in ended[0][1], "COIN" in ended[1][1]) == (True, False)


def test_one_process_goes_on_where_two_were_killed(run, alone):
    out = run.parent / "killed"
    killed = start(run, out)
    while not any(path.stat().st_size for path in out.rglob("*-of-2.jsonl")):
        assert killed[1].poll() is None
        time.sleep(0.05)
    killed[1].send_signal(signal.SIGKILL)
    assert end(killed)[0][0] != 0, "one process went on without the other"
    left = {path.name: path.read_text() for path in out.rglob("coin_step/*-of-2.jsonl")}
    indices = {
        name: [json.loads(line)["index"] for line in left[name].splitlines()] for name in left
    }
    assert any(indices.values())
    # Every process has records of its own.
    assert all(index % 2 == int(name[0]) for name, own in indices.items() for index in own)
    evaluate.evaluate(run, out=out)
    assert contents(out) == alone
