"""One of several processes that train the tiny model together on simulated devices; a script.

    python -m tests.distributed_worker TASK WORKDIR

The variables of `distributed.ENVIRONMENT` say which process it is; TASK is one of `TASKS`.
"""

import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tests import tiny_training
from videollm_mod_jax import cli
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training import checkpoint, distributed, liveness, loop, sharding

BATCH_SIZE = 8
STEPS = 6
SILENCE = 15.0
VALIDATION = (2000, 2001)
CHANGES = {"steps": STEPS, "checkpoint_every": 2, "sharding": "fsdp", "mesh": (2, -1, 1)}
# Before this batch a run that is to be interrupted says so and waits.
WAIT_AT = 4


def batches_from(start: int, waits: bool) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the batches from `start` on."""
    for index in range(start, 99):
        if waits and index == WAIT_AT:
            print("ready", flush=True)
            time.sleep(5)
        yield own_rows(index)


def validation_batches() -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of two batches that are not learnt from."""
    return map(own_rows, VALIDATION)


def own_rows(index: int) -> dict[str, np.ndarray]:
    """This process's rows of a batch."""
    rows = np.array_split(np.arange(BATCH_SIZE), jax.process_count())[jax.process_index()]
    batch = tiny_training.batch(index, BATCH_SIZE)
    return {name: array[rows] for name, array in batch.items()}


def train(workdir: Path, waits: bool = False) -> None:
    """Trains the tiny model and prints a digest of its weights."""
    config = tiny_training.training_config(**CHANGES, trainable="lora", microbatches=1)
    model = tiny_training.model_config(rank=2)
    trained = loop.train(
        config,
        workdir,
        run_config={"model": model.to_dict(), "training": dataclasses.asdict(config)},
        model_config=model,
        initial_variables=lambda layout: tiny_training.variables(model),
        tokenizer=tiny_training.TOKENIZER,
        system="watch",
        batches_from=lambda start: batches_from(start, waits),
        validation_batches=validation_batches,
        profile_steps=1,
    )
    print(digest(trained.variables))


def restore(workdir: Path) -> None:
    """Prints the digest of the weights as they load on one, two and eight devices."""
    for count in (1, 2, 8):
        devices = np.asarray(jax.devices()[:count]).reshape(1, -1, 1)
        mesh = Mesh(devices, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
        layout = sharding.Layout(mesh, sharding.RULES["fsdp"])
        variables = checkpoint.load_model(workdir, layout).variables
        assert len(variables["params"]["embedding"].sharding.device_set) == count
        print(digest(variables))


def load(workdir: Path) -> None:
    """Loads the model in every process, which hash a share of its files each."""
    layout = distributed.own_layout("fsdp", (1, -1, 1))
    print(digest(checkpoint.load_model(workdir, layout).variables))


def fail(workdir: Path) -> None:
    """The second process finds a mistake while the first waits for it."""
    if jax.process_index() == 1:
        raise UserError(f"{workdir} is not good")
    distributed.barrier("never")


def wait(workdir: Path) -> None:
    """Waits for the others, as a collective does, after all have come."""
    distributed.barrier("come")
    print("ready", flush=True)
    distributed.barrier("never" if jax.process_index() else "sooner")


def gather(workdir: Path) -> None:
    """Prints what all processes say, from all of them."""
    with distributed.lead_first("file") as lead:
        if lead:
            time.sleep(0.5)
            (workdir / "made").touch()
        assert (workdir / "made").exists()
    said = [jax.process_index()] * (1 + 2 * jax.process_index())
    print(distributed.gather({"said": said, "nothing": float("nan")}))


def digest(variables) -> str:
    """Of every bit of all variables."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(variables)):
        sha.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return f"digest {sha.hexdigest()}"


TASKS = {
    "train": train,
    "interrupted": lambda workdir: train(workdir, waits=True),
    "restore": restore,
    "load": load,
    "fail": fail,
    "gather": gather,
    "wait": wait,
}

if __name__ == "__main__":

    def run():
        liveness.SILENCE = SILENCE
        distributed.initialize(timeout=float(os.environ.get("TIMEOUT", "120")))
        TASKS[sys.argv[1]](Path(sys.argv[2]))

    sys.exit(cli.report_user_errors(run))
