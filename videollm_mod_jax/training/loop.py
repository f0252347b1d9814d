"""The training loop: build or restore everything, then update, log and save until done."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import (
    VideoLLM,
    VideoLLMConfig,
    config_plan,
    stack_layers,
    unstack_layers,
)
from videollm_mod_jax.training import checkpoint, metrics, sharding
from videollm_mod_jax.training.checkpoint import LoadedModel
from videollm_mod_jax.training.optimizer import (
    OptimizerConfig,
    Variables,
    learning_rate_schedule,
    make_optimizer,
    split_variables,
)
from videollm_mod_jax.training.sharding import Layout, make_layout
from videollm_mod_jax.training.state import TrainState, create_state
from videollm_mod_jax.training.step import BATCH_KEYS, TrainStep, make_train_step

HostBatch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train, every number stated.

    Attributes:
      steps: updates in all.
      seed: of dropout.
      trainable: `lora` (adapters, connector, routers) or `full` (all but the vision tower).
      stream_weight: sigma of the streaming loss.
      microbatches: parts of a batch that are worked through one after the other.
      scan: scan over the decoder's layers (compiles fast) instead of unrolling them.
      remat: recompute decoder blocks in the backward pass (less memory, a third more work).
      sharding: rule set of `training/sharding.py`: `replicate`, `fsdp` or `fsdp_tensor`.
      mesh: devices along data, fsdp and tensor; one may be -1, "the rest".
      log_every: updates between lines of `metrics.jsonl`.
      checkpoint_every: updates between checkpoints; the last update is always saved.
      keep_checkpoints: how many of the newest checkpoints to keep.
      optimizer: AdamW and its schedule.
    """

    steps: int
    seed: int
    trainable: str
    stream_weight: float
    microbatches: int
    scan: bool
    remat: bool
    sharding: str
    mesh: tuple[int, int, int]
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    optimizer: OptimizerConfig

    def __post_init__(self):
        for field in ("steps", "microbatches", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise UserError(
                    f"training.{field} is {getattr(self, field)}; it must be at least 1"
                )


MAY_CHANGE = (
    "evaluation",
    "data.num_workers",
    *(
        f"training.{field}"
        for field in (
            "scan",
            "remat",
            "sharding",
            "mesh",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
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
) -> LoadedModel:
    """Trains a model to the end, from the beginning or from where `workdir` stopped.

    Deterministic: a run that was killed and started again logs the very losses of one that was not.

    Args:
      config: of the training.
      workdir: directory of the run, made if missing; its layout is in `training/checkpoint.py`.
      run_config: everything that the run depends on, as json types; kept as `config.json`, and
        compared when the run is resumed.
      model_config: the architecture.
      initial_variables: gives the variables of `VideoLLM(model_config, scan=False)` to start from;
        called only when there is no checkpoint.
      tokenizer: saved with the model.
      system: the instruction that opens every conversation, saved with the model.
      batches_from: `batches_from(n)` iterates over the batches from the n-th on; each is a dict of
        this process's examples, stacked (`step.Batch` names the keys). One is used per update.

    Returns:
      The trained model.

    Raises:
      UserError: the workdir holds something else or a run with another configuration, or the
        configuration does not fit the model, the devices or the batches.
      FloatingPointError: a loss or gradient is not finite; the step is named.
    """
    workdir = Path(workdir)
    run = _Run.build(config, model_config)
    claim_workdir(workdir, run_config)
    checkpoint.write_description(workdir, model_config, tokenizer, system)
    with checkpoint.Checkpointer(workdir, keep=config.keep_checkpoints) as checkpointer:
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
            run.advance(state, frozen, step, batches_from, workdir, checkpointer)
    metrics.draw_loss_curve(workdir)
    return checkpoint.load_model(workdir, run.layout)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What stays the same from the first step to the last.

    Attributes:
      config: of the training.
      layout: of the arrays on the mesh.
      plan: the decoder's layer plan.
      optimizer: of the trained variables.
      train_step: jitted.
      target: abstract (state, frozen) as the step takes them: layers stacked if `config.scan`.
      stored: the same as they lie on disk: one entry per layer.
    """

    config: TrainingConfig
    layout: Layout
    plan: Any
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    target: tuple[TrainState, Variables]
    stored: tuple[TrainState, Variables]

    @classmethod
    def build(cls, config: TrainingConfig, model_config: VideoLLMConfig) -> "_Run":
        layout = make_layout(config.sharding, config.mesh)
        schedule = learning_rate_schedule(config.optimizer, config.steps)
        optimizer = make_optimizer(config.optimizer, schedule)
        model = VideoLLM(model_config, scan=config.scan, remat=config.remat)
        train_step = make_train_step(
            model,
            optimizer,
            schedule,
            stream_weight=config.stream_weight,
            microbatches=config.microbatches,
        )

        def abstract(scan: bool) -> tuple[TrainState, Variables]:
            model = VideoLLM(model_config, scan=scan)
            return sharding.abstract_training(model, optimizer, config.trainable, layout)

        target = abstract(config.scan)
        out = (sharding.shardings(target[0]), layout.replicated)
        return cls(
            config=config,
            layout=layout,
            plan=config_plan(model_config),
            optimizer=optimizer,
            train_step=jax.jit(train_step, donate_argnums=0, out_shardings=out),
            target=target,
            stored=abstract(False),
        )

    def start(self, workdir: Path, variables: Variables) -> tuple[TrainState, Variables]:
        """The state before the first update; writes the frozen weights."""
        trained, frozen = split_variables(variables, self.config.trainable)
        frozen = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf.astype(like.dtype), like.sharding),
            frozen,
            self.stored[1],
        )
        trained = jax.device_put(trained, sharding.shardings(self.stored[0].trained))
        checkpoint.write_weights(workdir, frozen)
        create = jax.jit(
            lambda tree: create_state(self._stack(tree), self.optimizer, self.config.seed),
            out_shardings=sharding.shardings(self.target[0]),
        )
        return create(trained), self._stack_onto(frozen, self.target[1])

    def restore(
        self, workdir: Path, checkpointer: checkpoint.Checkpointer, step: int
    ) -> tuple[TrainState, Variables]:
        """The state after update `step`."""
        state = checkpointer.restore(step, self.stored[0])
        frozen = checkpoint.read_weights(workdir, self.stored[1])
        return self._stack_onto(state, self.target[0]), self._stack_onto(frozen, self.target[1])

    def advance(
        self,
        state: TrainState,
        frozen: Variables,
        done: int,
        batches_from: Callable[[int], Iterator[HostBatch]],
        workdir: Path,
        checkpointer: checkpoint.Checkpointer,
    ) -> None:
        """Runs the updates after `done`, logging and saving on the way and at the end."""
        config = self.config
        batches = iter(batches_from(done))
        with metrics.Log(workdir, done, config.steps, config.log_every) as log:
            for step in range(done + 1, config.steps + 1):
                batch = self._put(next(batches, None), step)
                with self.layout.active(), jax.transfer_guard("disallow"):
                    state, sums = self.train_step(state, frozen, batch)
                # This step's metrics are fetched when the next step keeps the device busy.
                log.record(step, sums)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    # Lines go to disk before the checkpoint: a resumed run does not write them.
                    log.catch_up()
                    checkpointer.save(step, self._unstack(state))

    def _put(self, batch: HostBatch | None, step: int) -> dict[str, jax.Array]:
        if batch is None:
            raise UserError(
                f"the data ended before update {step} of {self.config.steps}; let it repeat, or "
                "lower training.steps"
            )
        size = len(batch["tokens"]) * jax.process_count()
        parts = self.config.microbatches * self.layout.batch_shards
        if size % parts:
            raise UserError(
                f"a batch of {size} examples does not divide into training.microbatches = "
                f"{self.config.microbatches} times {self.layout.batch_shards} devices along "
                "data and fsdp; make it a multiple of their product"
            )
        return self.layout.put_batch({name: batch[name] for name in BATCH_KEYS})

    def _stack(self, tree: Any) -> Any:
        return stack_layers(tree, self.plan) if self.config.scan else tree

    def _stack_onto(self, tree: Any, target: Any) -> Any:
        return jax.jit(self._stack, out_shardings=sharding.shardings(target))(tree)

    def _unstack(self, state: TrainState) -> TrainState:
        if not self.config.scan:
            return state
        out = sharding.shardings(self.stored[0])
        return jax.jit(lambda tree: unstack_layers(tree, self.plan), out_shardings=out)(state)


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
    path = workdir / checkpoint.CONFIG_FILE
    if path.exists():
        different = differences(checkpoint.read_json(path), run_config)
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
    checkpoint.write_json(path, run_config)


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
