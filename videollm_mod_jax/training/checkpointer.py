"""The numbered checkpoints of a run: saved while it goes on, kept or dropped, restored exactly."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training.state import TrainState

FORMAT = 1
CHECKPOINTS = "checkpoints"
_VALIDATION_LOSS = "validation_loss"


class Checkpointer:
    """The `checkpoints/` of a run; a context manager, since saving is asynchronous.

    States go in and out with their layers unstacked.
    """

    def __init__(self, directory: Path, *, keep: int | None, keep_best: int = 0):
        """Opens the checkpoints of a run.

        Args:
          directory: of the run.
          keep: how many of the newest to keep, or None to open for reading only.
          keep_best: how many of those with the lowest validation loss to keep as well.

        Raises:
          UserError: a checkpoint is damaged.
        """
        self._path = (directory / CHECKPOINTS).absolute()
        self._check_metrics()
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
            read_only=keep is None,
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

    def steps(self) -> list[int]:
        """The updates whose complete checkpoints are there, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The kept checkpoint with the lowest validation loss; None when none has one."""
        step = self._manager.best_step()
        return step if step is not None and self._manager.metrics(step) else None

    def save(self, step: int, state: TrainState, validation_loss: float | None = None) -> None:
        """Starts saving the state after update `step`; returns when it may be donated.

        Args:
          step: of the checkpoint.
          state: after it.
          validation_loss: of that state; None if it was not validated.
        """
        optimizer = {"opt_state": state.opt_state, "rng": state.rng}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                trained=ocp.args.StandardSave(state.trained),
                optimizer=ocp.args.StandardSave(optimizer),
                # One batch per update: the step is the data position as well.
                meta=ocp.args.JsonSave({"format": FORMAT, "step": step, "batches": step}),
            ),
            metrics={} if validation_loss is None else {_VALIDATION_LOSS: validation_loss},
            force=True,
        )

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Restores a state exactly, into the shapes, dtypes and shardings of `target`.

        Raises:
          UserError: the checkpoint is damaged, of another format, or not the state of `target`.
        """
        path = self._path / str(step)
        args = {
            "trained": ocp.args.StandardRestore(target.trained),
            "optimizer": ocp.args.StandardRestore(
                {"opt_state": target.opt_state, "rng": target.rng}
            ),
            "meta": ocp.args.JsonRestore(),
        }
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except (ValueError, KeyError, OSError) as error:
            raise damaged(path, error) from error
        if restored.meta.get("format") != FORMAT or restored.meta.get("step") != step:
            raise UserError(
                f"{path}/meta is {restored.meta}; expected format {FORMAT} and step {step}; it "
                "was written by another version: load it with that version"
            )
        return target.replace(
            step=jax.numpy.asarray(step, jax.numpy.int32),
            trained=restored.trained,
            **restored.optimizer,
        )

    def _check_metrics(self) -> None:
        # Orbax reads them all when it opens, and does not say which it cannot read.
        for path in self._path.glob("*/metrics/metrics"):
            if path.parts[-3].isdigit():
                try:
                    json.loads(path.read_text(encoding="utf-8"))
                except FileNotFoundError:
                    # The run that goes on here has just deleted this checkpoint.
                    continue
                except (ValueError, OSError) as error:
                    raise damaged(path.parents[1], error) from error


def _validation_loss(metrics: Mapping[str, float]) -> float:
    """What ranks a checkpoint; one that was not validated is never among the best."""
    return metrics.get(_VALIDATION_LOSS, math.inf)


def damaged(path: Path, error: Exception) -> UserError:
    """The error of an Orbax directory that cannot be read: says what to do."""
    first_line = str(error).strip().partition("\n")[0]
    remedy = "train or convert the model again"
    if CHECKPOINTS in path.parts:
        remedy = "delete this checkpoint to go on from the one before it"
    return UserError(
        f"{path} cannot be read and is probably damaged ({type(error).__name__}: {first_line}); "
        f"restore it from a copy, or {remedy}"
    )
