"""A few mutants of every file that is read; thousands by hand: python -m tests.fuzzing --help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzzing import READERS

ROOT = Path(__file__).parents[1]
MUTANTS = 8


@pytest.mark.parametrize("readers", [list(READERS)[::2], list(READERS)[1::2]])
def test_damaged_files_are_read_or_refused_in_a_line(readers):
    # In a process of its own, whose memory is limited, and which a fault in native code may end.
    ended = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing", *readers, "--mutants", str(MUTANTS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    assert re.findall(rf"^.*?(\w+): {MUTANTS} mutants: \d", ended.stdout, re.MULTILINE) == readers


def test_faults_are_told_from_refusals(tmp_path):
    program = """
from tests import fuzzing
from videollm_mod_jax.errors import UserError

def make(work):
    (work / "a").write_bytes(bytes(range(256)) * 4)

def read(work):
    content = (work / "a").read_bytes()
    if len(content) % 3 == 0:
        raise UserError("a: refused")
    if len(content) % 3 == 1 and len(content) != 1024:
        raise KeyError("fault")
    if content.count(b"[") > 1000:
        return bytearray(1 << 33)
    return content

found = {kind for _, kind, _ in fuzzing.fuzz(fuzzing.Reader(make, read, guarded="a"), 200, 0)}
print(sorted(found))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("['KeyError', 'memory', 'refused', 'silent']\n"), ended.stdout[
        -300:
    ]
