"""SIGKILL at any moment of a command: what the next one completes is what it would have been."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("command", "kills"), [("train", 1), ("encode", 3), ("prepare", 4), ("convert", 4)]
)
def test_a_command_that_was_killed_at_random_moments_ends_with_the_same_files(
    command, kills, tmp_path
):
    # More by hand, and of evaluate: python -m tests.kills evaluate WORK --kills 20
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.kills",
            command,
            str(tmp_path / "work"),
            "--kills",
            str(kills),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(re.findall(r"moment \d+ of \d+: -9", ended.stdout)) == kills
    assert ended.stdout.endswith(f"{command}: {kills} kills, 0 differences\n")
