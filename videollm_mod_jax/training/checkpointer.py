"""The numbered checkpoints of a run: saved while it goes on, kept or dropped, restored exactly."""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from videollm_mod_jax.config_dict import build
from videollm_mod_jax.data import files
from videollm_mod_jax.errors import UserError, shown
from videollm_mod_jax.training import integrity
from videollm_mod_jax.training.metrics import METRICS_FILE, Written
from videollm_mod_jax.training.state import TrainState

FORMAT = 1
CHECKPOINTS = "checkpoints"
_VALIDATION_LOSS = "validation_loss"
_DELETION_SECONDS = 2.0
"""What a run may need to delete a checkpoint that it no longer keeps."""


class Checkpointer:
    """Saves and restores the `checkpoints/` of a run; a context manager, since saving goes on.

    States go in and out with their layers unstacked.
    """

    def __init__(self, directory: Path, *, keep: int, keep_best: int = 0):
        """Opens the checkpoints of a run.

        Args:
          directory: of the run.
          keep: how many of the newest to keep.
          keep_best: how many of those with the lowest validation loss to keep as well.

        Raises:
          UserError: a checkpoint is damaged.
        """
        self._path = (directory / CHECKPOINTS).absolute()
        # Orbax reads them all when it opens, and does not say which it cannot read.
        for step in checkpoint_steps(directory):
            _read_loss(self._path / str(step))
        newest = preservation_policy.LatestN(keep)
        best = preservation_policy.BestN(
            get_metric_fn=_validation_loss,
            reverse=True,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            # The policy decides what is kept; without `best_fn`, no metrics are written.
            preservation_policy=preservation_policy.AnyPreservationPolicy([newest, best]),
            best_fn=_validation_loss,
            best_mode="min",
            temporary_path_class=integrity.CheckedPath,
        )
        self._manager = ocp.CheckpointManager(self._path, options=options)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        # Waits for a save in flight, also when the run failed.
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        validation_loss: float | None = None,
        written: Written | None = None,
    ) -> None:
        """Starts saving the state after update `step`; returns when it may be donated.

        Args:
          step: of the checkpoint.
          state: after it.
          validation_loss: of that state; None if it was not validated.
          written: what the run's `metrics.jsonl` holds; None if nobody knows.
        """
        # One batch per update: the step is the data position as well.
        meta = {"format": FORMAT, "step": step, "batches": step}
        if written is not None:
            meta[METRICS_FILE] = dataclasses.asdict(written)
        optimizer = {"opt_state": state.opt_state, "rng": state.rng}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                trained=ocp.args.StandardSave(state.trained),
                optimizer=ocp.args.StandardSave(optimizer),
                meta=ocp.args.JsonSave(meta),
            ),
            metrics={} if validation_loss is None else {_VALIDATION_LOSS: validation_loss},
            force=True,
        )

    def written(self, step: int) -> Written | None:
        """Returns what the checkpoint of update `step` says of `metrics.jsonl`; None if nothing.

        Raises:
          UserError: it is damaged.
        """
        path = self._path / str(step)
        check_step(path, verify=True)
        meta = path / "meta" / "metadata"
        found = _read_object(meta).get(METRICS_FILE)
        return None if found is None else build(Written, found, f"{meta}: {METRICS_FILE}")

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Restores a state exactly, into the shapes, dtypes and shardings of `target`.

        Raises:
          UserError: the checkpoint is damaged, of another format, or not the state of `target`.
        """
        path = self._path / str(step)
        check_step(path, verify=True)
        for item in ("trained", "optimizer"):
            integrity.verify_together(path / item, remedy(path))
        args = {
            "trained": ocp.args.StandardRestore(target.trained),
            "optimizer": ocp.args.StandardRestore(
                {"opt_state": target.opt_state, "rng": target.rng}
            ),
        }
        with reading(path):
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return target.replace(
            step=jax.numpy.asarray(step, jax.numpy.int32),
            trained=restored.trained,
            **restored.optimizer,
        )


def checkpoint_steps(directory: Path) -> list[int]:
    """The updates whose complete checkpoints a model's directory holds, in order.

    Raises:
      UserError: `checkpoints` is no directory, or cannot be read.
    """
    path = directory / CHECKPOINTS
    try:
        # As Orbax has it; other names are no checkpoints: those that are being written, say.
        names = [entry.name for entry in path.iterdir() if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; expected the directory of a run's "
            "checkpoints"
        ) from error
    numbers = [name for name in names if name.isascii() and name.isdecimal()]
    return sorted(int(name) for name in numbers if len(name) < 19 and name == str(int(name)))


def best_step(directory: str | Path) -> int:
    """The update of a run's kept checkpoint with the lowest validation loss; of equals, the newest.

    Raises:
      UserError: no checkpoint has a validation loss, or one is damaged.
    """
    directory = Path(directory)
    losses = {}
    for step in checkpoint_steps(directory):
        try:
            losses[step] = _read_loss(directory / CHECKPOINTS / str(step))
        except UserError:
            # Perhaps the run that goes on here is just deleting it.
            time.sleep(_DELETION_SECONDS)
            if step in checkpoint_steps(directory):
                raise
    best = min(losses, key=lambda step: (losses[step], -step), default=None)
    if best is None or losses[best] == math.inf:
        raise UserError(
            f"{directory} has no checkpoint with a validation loss, so that none is the best; take "
            "the newest, or train with training.validate_every"
        )
    return best


def check_step(path: Path, *, verify: bool) -> None:
    """Checks that a checkpoint is of the update and of the format that it should be.

    Args:
      path: of the checkpoint.
      verify: whether to compare its small files, and the checksums of its parts, with theirs.

    Raises:
      UserError: it is not, or is damaged.
    """
    if verify:
        integrity.verify(path, remedy(path))
        integrity.verify(path / "meta", remedy(path))
    expected = {"format": FORMAT, "step": int(path.name)}
    meta = _read_object(path / "meta" / "metadata")
    if {key: meta.get(key) for key in expected} != expected:
        raise UserError(
            f"{path}/meta is {shown(meta)}; expected format {FORMAT} and step {path.name}; "
            "it was renamed, or written by another version: load it with that version"
        )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what Orbax raises for the files of a directory into one line that names it.

    Raises:
      UserError: Orbax cannot read it.
    """
    _ignore_late_reads()
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        # The device is full: nothing is wrong with the files.
        raise
    except Exception as error:
        # Of every type, bare `Exception` too, and all about files that anyone may have written.
        first_line = str(error).strip().partition("\n")[0][:300]
        what = f"it cannot be read ({type(error).__name__}: {first_line})"
        raise integrity.damaged(path, what, remedy(path)) from error


@functools.cache
def _ignore_late_reads() -> None:
    """Has Python print no traceback for reads that end when Orbax has given up on another.

    TensorStore reports each to an event loop that Orbax has closed by then.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook


def remedy(path: Path) -> str:
    """What to do about a damaged directory of Orbax: a checkpoint, or a part of it, or weights.

    ```
    run/checkpoints/400, run/checkpoints/400/trained     delete run/checkpoints/400 to go on ...
    run/weights                                          train or convert the model again
    ```
    """
    for step in (path, path.parent):
        if step.parent.name == CHECKPOINTS and step.name.isdecimal():
            return f"delete {step} to go on from the checkpoint before it"
    return "train or convert the model again"


def _read_loss(path: Path) -> float:
    """What ranks a checkpoint, from its metrics, which are always verified: they are tiny."""
    if not (path / "metrics").is_dir():
        return math.inf
    integrity.verify(path / "metrics", remedy(path))
    metrics = _read_object(path / "metrics" / "metrics")
    loss = metrics.get(_VALIDATION_LOSS, math.inf)
    if not isinstance(loss, (int, float)):
        raise integrity.damaged(path / "metrics" / "metrics", "it holds no metrics", remedy(path))
    return loss


def _validation_loss(metrics: Mapping[str, float]) -> float:
    """What ranks a checkpoint; one that was not validated is never among the best."""
    return metrics.get(_VALIDATION_LOSS, math.inf)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return files.read_json_object(path)
    except UserError as error:
        raise UserError(f"{error}; {remedy(path.parents[1])}") from error
