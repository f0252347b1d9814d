"""The training loop: build or restore everything, then update, log and save until done."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from videollm_mod_jax.data import files
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLMConfig
from videollm_mod_jax.training import checkpoint, distributed, metrics
from videollm_mod_jax.training.checkpoint import LoadedModel
from videollm_mod_jax.training.optimizer import Variables
from videollm_mod_jax.training.run import Run, TrainingConfig
from videollm_mod_jax.training.sharding import Layout
from videollm_mod_jax.training.step import HostBatch
from videollm_mod_jax.training.validation import ValidationBatches

MAY_CHANGE = (
    "evaluation",
    "data.num_workers",
    *(
        f"training.{field}"
        for field in (
            "scan",
            "remat",
            "kernels",
            "row_chunk",
            "vocab_chunk",
            "sharding",
            "mesh",
            "log_every",
            "checkpoint_every",
            "validate_every",
            "keep_checkpoints",
            "keep_best",
        )
    ),
)
"""Keys of a run's configuration that may change on resuming: they do not alter what is learnt."""


def train(
    config: TrainingConfig,
    workdir: str | Path,
    *,
    run_config: Mapping[str, Any],
    model_config: VideoLLMConfig,
    initial_variables: Callable[[Layout], Variables],
    tokenizer: Tokenizer,
    system: str,
    batches_from: Callable[[int], Iterator[HostBatch]],
    validation_batches: ValidationBatches | None = None,
    profile_steps: int = 0,
) -> LoadedModel:
    """Trains a model to the end, from the beginning or from where `workdir` stopped.

    Deterministic: a run that was killed and started again logs the very losses of one that was not.
    Several processes call it together, with one `workdir` that all of them see.

    Args:
      config: of the training.
      workdir: directory of the run, made if missing; its layout is in `training/checkpoint.py`.
      run_config: everything that the run depends on, as json types; kept as `config.json`, and
        compared when the run is resumed.
      model_config: the architecture.
      initial_variables: gives the variables of `VideoLLM(model_config)` to start from;
        called only when there is no checkpoint.
      tokenizer: saved with the model.
      system: the instruction that opens every conversation, saved with the model.
      batches_from: `batches_from(n)` iterates over the batches from the n-th on; each is a dict of
        this process's examples, stacked (`step.Batch` names the keys). One is used per update.
      validation_batches: what the loss is measured on every `config.validate_every` updates; None
        if that is 0.
      profile_steps: how many updates to trace into `profile/` of the workdir, once warm.

    Returns:
      The trained model, on the devices of this process.

    Raises:
      Stopped: SIGTERM came before the last update; the state is saved.
      UserError: the workdir holds something else or a run with another configuration, or the
        configuration does not fit the model, the devices or the batches.
      FloatingPointError: a loss or gradient is not finite; the step is named.
    """
    workdir = Path(workdir)
    if config.validate_every and validation_batches is None:
        raise UserError(
            f"training.validate_every is {config.validate_every}, and there are no validation "
            "data; set it to 0"
        )
    run = Run.build(config, model_config)
    claim_workdir(workdir, run_config)
    if distributed.is_lead():
        checkpoint.write_description(workdir, model_config, tokenizer, system)
    keep, keep_best = config.keep_checkpoints, config.keep_best
    with checkpoint.Checkpointer(workdir, keep=keep, keep_best=keep_best) as checkpointer:
        # 1. The newest complete checkpoint of the workdir, with the frozen weights beside it.
        # 2. What the caller starts from: a loaded model, a pretrained tower, random weights.
        # A run killed before its first checkpoint is case 2 and writes its frozen weights again;
        # a half-written checkpoint does not count, and its step is trained and saved anew.
        step = checkpointer.latest_step() or 0
        if step:
            state, frozen = run.restore(workdir, checkpointer, step)
        else:
            state, frozen = run.start(workdir, initial_variables(run.layout))
        if step < config.steps:
            run.advance(
                state,
                frozen,
                step,
                batches_from,
                validation_batches,
                workdir,
                checkpointer,
                profile_steps,
            )
    if distributed.is_lead():
        metrics.draw_loss_curve(workdir)
    return checkpoint.load_model(workdir, distributed.own_layout(config.sharding, config.mesh))


def claim_workdir(workdir: str | Path, run_config: Mapping[str, Any]) -> None:
    """Makes a directory this run's: writes `config.json`, once it is sure to overwrite no other.

    Args:
      workdir: of the run; made if missing.
      run_config: everything that the run depends on, as json types.

    Raises:
      UserError: the directory holds a model without a run, or a run with another configuration;
        the keys that differ are named (those of `MAY_CHANGE` may).
    """
    workdir = Path(workdir)
    run_config = json.loads(json.dumps(run_config))
    with distributed.lead_first("claim") as lead:
        _check_workdir(workdir, run_config)
        if lead:
            checkpoint.write_json(workdir / checkpoint.CONFIG_FILE, run_config)


def _check_workdir(workdir: Path, run_config: Mapping[str, Any]) -> None:
    path = workdir / checkpoint.CONFIG_FILE
    if path.exists():
        different = differences(files.read_json(path), run_config)
        if different:
            raise UserError(
                f"{workdir} holds a run with another configuration: {'; '.join(different)}; give "
                "these keys their old values to resume it, or choose another workdir, or delete it"
            )
    elif (workdir / checkpoint.WEIGHTS).exists():
        raise UserError(
            f"{workdir} holds a model and no training run; choose another workdir, so that "
            "training does not overwrite the model"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lists the keys that two run configurations disagree on, `MAY_CHANGE` excepted.

    ```
    {'a': {'b': 1}, 'c': 2}, {'a': {'b': 3}}   ->   ['a.b is 3 (was 1)', 'c is absent (was 2)']
    ```
    """
    old, new = _flatten(old), _flatten(new)
    return [
        f"{key} is {new.get(key, 'absent')} (was {old.get(key, 'absent')})"
        for key in sorted({**old, **new})
        if old.get(key, "absent") != new.get(key, "absent")
        and not any(f"{key}.".startswith(f"{free}.") for free in MAY_CHANGE)
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= _flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
