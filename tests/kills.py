"""Kills a command at random moments until it had enough, and compares with a run that was not.

    python -m tests.kills train WORK --kills 20 --seed 0

A moment is a change of a file below the output: opening it to write, renaming, removing, making
a directory. They are counted, not timed, so that a seed means the same on a busy machine. The
command runs in forks of this process, which has imported what takes long, and starts no JAX itself.
"""

import argparse
import dataclasses
import importlib
import os
import random
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

_CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link"}

TRAIN = {
    "data.draw.train": 8,
    "data.draw.validation": 2,
    "data.draw.test": 4,
    "data.batch_size": 4,
    "tower.steps": 2,
    "tower.batch_size": 4,
    "training.steps": 6,
    "training.checkpoint_every": 2,
    "training.validate_every": 2,
    "training.log_every": 1,
    "evaluation.batch_size": 4,
    "model.decoder.num_layers": 2,
    "model.decoder.hidden_size": 32,
    "model.decoder.mlp_size": 32,
    "model.decoder.num_heads": 2,
    "model.decoder.head_dim": 16,
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A verb to kill.

    Attributes:
      module: of the package.
      arguments: of a working directory, which `prepare` filled, and an output.
      prepare: makes what the command reads.
    """

    module: str
    arguments: Callable[[Path, Path], Sequence[str]]
    prepare: Callable[[Path], None] = lambda work: None


def _train(work: Path, out: Path) -> list[str]:
    del work
    overrides = [f"--config.{key}={value}" for key, value in TRAIN.items()]
    return ["--config=configs/digits.py", f"--workdir={out}", *overrides]


def _make_videos(work: Path) -> None:
    from tests import tiny_videos

    tiny_videos.write_model(work / "model")
    tiny_videos.write_folder(work / "videos")


def _encode(work: Path, out: Path) -> list[str]:
    flags = {"--checkpoint": work / "model", "--videos": work / "videos", "--out": out}
    return [str(word) for flag in flags.items() for word in flag] + ["--workers", "2"]


def _make_annotations(work: Path) -> None:
    from tests import tiny_sources
    from videollm_mod_jax.data.feature_index import FeatureMeta
    from videollm_mod_jax.data.features import FeatureWriter

    (work / "source").mkdir()
    videos = tiny_sources.SOURCES["own"](work / "source")
    meta = FeatureMeta(
        features_per_frame=1, width=2, fps=videos.fps, resolution=8, tower="fingerprint"
    )
    with FeatureWriter(work / "features", meta) as writer:
        for name, frames in videos.frames.items():
            writer.add(name, np.zeros((frames, 1, 2)))


def _prepare(work: Path, out: Path) -> list[str]:
    flags = {"--source": work / "source", "--features": work / "features", "--out": out}
    return ["--dataset", "own", *(str(word) for flag in flags.items() for word in flag)]


def _make_source(work: Path) -> None:
    from tests.test_conversion_exporting import make_source

    make_source(work / "source", "llava")


def _convert(work: Path, out: Path) -> list[str]:
    return ["from-hf", str(work / "source"), str(out)]


def _make_run(work: Path) -> None:
    command = [sys.executable, "-m", "videollm_mod_jax.train", *_train(work, work / "run")]
    subprocess.run(command, check=True)


def _evaluate(work: Path, out: Path) -> list[str]:
    return ["--checkpoint", str(work / "run"), "--out", str(out)]


COMMANDS = {
    "train": Command("train", _train),
    "encode": Command("encode", _encode, _make_videos),
    "prepare": Command("prepare", _prepare, _make_annotations),
    "convert": Command("convert", _convert, _make_source),
    "evaluate": Command("evaluate", _evaluate, _make_run),
}


def kill_often(command: Command, work: Path, kills: int, seed: int) -> list[str]:
    """Runs a command to its end with kills in between.

    Args:
      command: to run.
      work: an empty directory.
      kills: how many times to kill it.
      seed: of the moments.

    Returns:
      The differences from the run that was not killed.
    """
    importlib.import_module(f"videollm_mod_jax.{command.module}")
    assert _in_fork(lambda: command.prepare(work)) == 0
    whole, killed = work / "whole", work / "killed"
    counted = work / "counted"
    status = _run(command, work, whole, counted=counted)
    assert status == 0, status
    moments = int(counted.read_text())
    rng = random.Random(seed)
    done = 0
    while done < kills:
        # Also late moments, which a run that goes on may not have: it comes to its end then.
        at = rng.randint(1, moments)
        status = _run(command, work, killed, at=at)
        print(f"moment {at} of {moments}: {status}", flush=True)
        if status == -signal.SIGKILL:
            done += 1
        else:
            faults = differences(whole, killed)
            # One that refuses what is complete, as `convert` does, was killed at its very end.
            assert status == 0 or not faults, status
            if faults:
                return faults
            # Complete, as it should be: begin once more.
            killed = killed.with_name(f"killed.{done}")
    status = _run(command, work, killed)
    faults = differences(whole, killed)
    assert status == 0 or not faults, status
    return faults


def differences(whole: Path, other: Path) -> list[str]:
    """Names of files that are not the same in both; Orbax's are compared by their arrays."""
    found = [_contents(whole), _contents(other)]
    names = sorted({*found[0], *found[1]})
    return [name for name in names if found[0].get(name) != found[1].get(name)]


def _contents(directory: Path) -> dict[str, bytes]:
    """Of every file by name, and of every array of the stored weights and checkpoints."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.close(read)
        with os.fdopen(write, "w") as out:
            out.write(repr(_stored_contents(directory)))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as text:
        contents = eval(text.read())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return contents


def _stored_contents(directory: Path) -> dict[str, str]:
    import hashlib

    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from videollm_mod_jax.training import integrity

    contents: dict[str, str] = {}
    stored: list[Path] = []
    for path in directory.rglob("checksums.json"):
        # A checkpoint has them for its parts; those that hold arrays have tables of these.
        integrity.verify(path.parent, "")
        stored += [path.parent] if (path.parent / "_METADATA").exists() else []
    for part in sorted(stored):
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(part.absolute())
        for path, leaf in jax.tree.leaves_with_path(tree):
            name = f"{part.relative_to(directory)}{jax.tree_util.keystr(path)}"
            contents[name] = hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    for path in sorted(directory.rglob("*")):
        pieces = path.relative_to(directory).parts
        if path.is_file() and not any(map(_is_left_out, pieces)):
            contents["/".join(pieces)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return contents


def _is_left_out(name: str) -> bool:
    """Whether it is compared by its arrays, belongs to nobody, or has times in it."""
    return name in ("weights", "checkpoints") or name.startswith((".", "events.out.tfevents"))


def _run(
    command: Command, work: Path, out: Path, at: int | None = None, counted: Path | None = None
) -> int:
    """Runs it in a fork, to the end or to a moment; gives its status."""

    def child() -> None:
        state = {"moments": 0}

        def hook(event: str, arguments: tuple) -> None:
            if event not in _CHANGES or not isinstance(arguments[0], (str, bytes, os.PathLike)):
                return
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            if not os.fsdecode(arguments[0]).startswith(str(out)):
                return
            state["moments"] += 1
            if state["moments"] == at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        sys.argv = [command.module, *command.arguments(work, out)]
        status = 0
        # It runs as the main module; what it imports stays.
        del sys.modules[f"videollm_mod_jax.{command.module}"]
        try:
            runpy.run_module(f"videollm_mod_jax.{command.module}", run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        if counted:
            counted.write_text(str(state["moments"]))
        sys.exit(status)

    return _in_fork(child)


def _in_fork(work: Callable[[], None]) -> int:
    if not (child := os.fork()):
        status = 1
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
            work()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Kills a command; says what differs, which is nothing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    flags.work.mkdir(parents=True)
    found = kill_often(COMMANDS[flags.command], flags.work.absolute(), flags.kills, flags.seed)
    print(f"{flags.command}: {flags.kills} kills, {len(found)} differences", *found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
