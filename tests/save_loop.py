"""Saves without end, and says what it does; a script that is killed in the middle of a save.

    python -m tests.save_loop WORKDIR

Every line of its input starts a child that verifies all checkpoints, resumes from the newest, which
must hold the very state of its step, and goes on; the child is killed by whoever reads its output.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np

from tests.killed import say
from videollm_mod_jax.training import integrity
from videollm_mod_jax.training.checkpoint import Checkpointer
from videollm_mod_jax.training.checkpointer import CHECKPOINTS, checkpoint_steps
from videollm_mod_jax.training.state import TrainState

INTERVAL = 5


def state_of(step: int) -> TrainState:
    """A state whose every number tells its step."""
    return TrainState(
        step=np.int32(step),
        trained={f"layer_{i}": np.full((256, 256), step + i, np.float32) for i in range(8)},
        opt_state={"moment": np.full((512, 512), -step, np.float32)},
        rng=np.full(2, step, np.uint32),
    )


def main(workdir: Path) -> None:
    """Resumes, checks, and saves every `INTERVAL` steps."""
    with Checkpointer(workdir, keep=2) as checkpointer:
        for kept in sorted(checkpoint_steps(workdir))[-2:]:
            # A checkpoint that has its name is complete, whenever the kill came; one that is no
            # longer kept may have been killed while it was deleted.
            for path in (workdir / CHECKPOINTS / str(kept)).rglob(integrity.CHECKSUMS):
                integrity.verify(path.parent, "nothing")
        step = checkpointer.latest_step() or 0
        if step:
            restored = checkpointer.restore(step, state_of(0))
            jax.tree.map(np.testing.assert_array_equal, restored, state_of(step))
        say(f"resumed {step} {os.getpid()}")
        while True:
            step += INTERVAL
            # Returns when the save before it is whole, and goes on in the background.
            checkpointer.save(step, state_of(step))
            say(f"saving {step}")


if __name__ == "__main__":
    # Forked before JAX starts: importing takes longer than all that is tested.
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            main(Path(sys.argv[1]))
        os.waitpid(child, 0)
        say("dead")
