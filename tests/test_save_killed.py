"""SIGKILL in the middle of a save, again and again: the next start resumes from what is whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.save_loop import INTERVAL

ROOT = Path(__file__).parents[1]
KILLS = 20


def test_twenty_kills_during_saves_lose_one_interval_each_at_most(tmp_path):
    rng = random.Random(0)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.save_loop", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    last, left_behind = 0, 0
    try:
        for kill in range(KILLS + 1):
            print("go", file=server.stdin, flush=True)
            said = server.stdout.readline().split()
            assert said[:1] == ["resumed"], server.communicate()[1]
            resumed, child = int(said[1]), int(said[2])
            # The save that was under way may be lost, and no step before it; the kill may also
            # come between a save and its announcement.
            assert max(0, last - INTERVAL) <= resumed <= last + INTERVAL, kill
            for _ in range(rng.randint(1, 3)):
                name, step = server.stdout.readline().split()
                assert name == "saving"
                last = int(step)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            while (line := server.stdout.readline()) != "dead\n":
                last = int(line.split()[1])
            left_behind += any("tmp" in p.name for p in (tmp_path / "checkpoints").iterdir())
    finally:
        server.kill()
    # Otherwise no kill met a save, and nothing was shown.
    assert left_behind >= KILLS // 4
