"""Worker processes end with the one that started them, also when it is killed."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

from videollm_mod_jax import locks
from videollm_mod_jax.errors import UserError

ROOT = Path(__file__).parents[1]

LOADING = """
import os, pathlib, signal, sys, time
from tests.test_data_pipeline import make_examples, training_batches

if __name__ == "__main__":
    examples = make_examples(pathlib.Path(sys.argv[1]))
    batches = training_batches([(examples, 1.0)], 4, seed=0, num_workers=1)
    next(batches)
    # The worker is ahead as far as it may be, and waits.
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""

STUDYING = """
import os, pathlib, signal, sys, time
from tests.test_workers import hold
from videollm_mod_jax.studying.workers import pool_of

if __name__ == "__main__":
    workdir = pathlib.Path(sys.argv[1])
    with pool_of(workdir, 1, [("", "")]) as pool:
        pool.submit(hold, workdir)
        while not (workdir / "held").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def hold(workdir):
    """Holds a directory for longer than any test, in a worker."""
    with locks.locked(workdir / "run", "study"):
        (workdir / "held").touch()
        time.sleep(1000)


def killed(program, directory):
    """Runs a program that kills itself; returns when all that have its stdout have ended."""
    script = directory / "main.py"
    script.write_text(program)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, script, directory / "inside"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -9, done.stderr


def test_those_that_load_data_end(tmp_path):
    killed(LOADING, tmp_path)


def test_those_of_a_study_end_and_let_go_of_what_they_held(tmp_path):
    (tmp_path / "inside").mkdir()
    killed(STUDYING, tmp_path)
    assert (tmp_path / "inside" / "held").exists()
    for wait in itertools.count():
        try:
            with locks.locked(tmp_path / "inside" / "run", "test"):
                break
        except UserError:
            assert wait < 100, "still held"
            time.sleep(0.1)
