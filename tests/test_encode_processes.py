"""Encoding killed again and again, or shared by processes, gives the same files byte for byte."""

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_videos import write_folder, write_model
from videollm_mod_jax.data.features import FeatureSource
from videollm_mod_jax.training import distributed

ROOT = Path(__file__).parents[1]
FRAMES = {f"folder/{i}": 7 + 5 * (i % 4) for i in range(30)}
KILLS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, and a folder with one bad video."""
    directory = tmp_path_factory.mktemp("encode")
    write_model(directory / "model")
    write_folder(directory / "videos", FRAMES)
    (directory / "videos" / "bad.mp4").write_text("no video")
    return directory


class Job:
    """Processes of tests/encode_loop.py that encode together."""

    def __init__(self, data, out, processes=1, videos="videos"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for index in range(processes):
            several = (f"127.0.0.1:{port}", str(processes), str(index)) if processes > 1 else ()
            env = os.environ | dict(zip(distributed.ENVIRONMENT, several, strict=False))
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.encode_loop", data / "model", data / videos, out],
                    cwd=ROOT,
                    env=env | {"PYTHONPATH": str(ROOT)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def begin(self, word="begun"):
        """Starts an encoding; returns the id of its first process when it has said a word."""
        for process in self.processes:
            print("go", file=process.stdin, flush=True)
        first, *_ = [int(self._wait_for(process, word)) for process in self.processes]
        return first

    def end(self):
        """Statuses of the encoding."""
        return [int(self._wait_for(process, "ended")) for process in self.processes]

    def close(self):
        """What each process has said on stderr."""
        return [process.communicate(timeout=60)[1] for process in self.processes]

    @staticmethod
    def _wait_for(process, word):
        for line in process.stdout:
            if line.startswith(word):
                return line.split()[1]
        raise AssertionError(process.stderr.read())


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(data):
    """The files of an uninterrupted encoding by one process, and its seconds of work."""
    job = Job(data, data / "whole")
    job.begin("encoding")
    begun = time.monotonic()
    assert job.end() == [1]
    seconds = time.monotonic() - begun
    (said,) = job.close()
    assert "  bad: cannot read the video: Invalid data found when processing input; " in said
    return contents(data / "whole"), seconds


def test_kills_at_random_moments_change_nothing(data, whole, tmp_path):
    files, seconds = whole
    rng = random.Random(0)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    job, kept = Job(data, out), []
    for kill in range(KILLS):
        # Some kills come before there is a plan, most in the middle of the work.
        process = job.begin("encoding" if kill % 3 else "begun")
        time.sleep(rng.uniform(0, seconds / 3))
        os.kill(process, signal.SIGKILL)
        assert job.end() == [-signal.SIGKILL]
        if out.exists():
            break
        kept.append({path.name: path.stat() for path in partial.glob("features-*")})
    assert any(0 < len(shards) < len(files) - 3 for shards in kept), "no kill met a shard"
    for before, after in itertools.pairwise(kept):
        assert all(after[name].st_mtime_ns == before[name].st_mtime_ns for name in before)
    job.begin()
    assert job.end() == [1]
    job.close()
    assert contents(out) == files
    assert list(tmp_path.iterdir()) == [out]


def test_two_processes_write_the_store_of_one(data, whole, tmp_path):
    files, _ = whole
    job = Job(data, tmp_path / "out", processes=2)
    job.begin()
    assert job.end() == [1, 1]
    assert ["bad: cannot read" in said for said in job.close()] == [True, False]
    assert contents(tmp_path / "out") == files


def test_fewer_videos_than_processes(data, tmp_path):
    write_folder(data / "one", {"only": 5})
    job = Job(data, tmp_path / "out", processes=2, videos="one")
    job.begin()
    assert job.end() == [0, 0], job.close()
    job.close()
    assert FeatureSource(tmp_path / "out").videos.frames == {"only": 5}
