"""A run: its configuration, its layout on the devices, and the one step that it repeats."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import (
    VideoLLM,
    VideoLLMConfig,
    config_plan,
    stack_layers,
    unstack_layers,
)
from videollm_mod_jax.training import checkpoint, distributed, metrics, sharding
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


@dataclasses.dataclass(frozen=True)
class Run:
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
    def build(
        cls, config: TrainingConfig, model_config: VideoLLMConfig, layout: Layout | None = None
    ) -> "Run":
        """Everything that follows from the configuration; nothing is allocated.

        Args:
          config: of the training.
          model_config: the architecture.
          layout: of other devices than those that are here; None lays the run out on these.
        """
        layout = layout or make_layout(config.sharding, config.mesh)
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

    def lower(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Lowered:
        """Lowers the step that `advance` runs, for a batch of these shapes, without data."""
        batch = {
            name: jax.ShapeDtypeStruct(
                batch[name].shape, batch[name].dtype, sharding=self.layout.batch
            )
            for name in BATCH_KEYS
        }
        with self.layout.active():
            return self.train_step.lower(*self.target, batch)

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
        profile_steps: int,
    ) -> None:
        """Runs the updates after `done`, logging and saving on the way and at the end.

        Raises:
          Stopped: SIGTERM came; the last update was saved.
        """
        config = self.config
        batches = iter(batches_from(done))
        with (
            metrics.Log(workdir, done, config.steps, config.log_every) as log,
            metrics.Profile(workdir, done, profile_steps) as profile,
            distributed.StopSignal() as stop_signal,
        ):
            for step in range(done + 1, config.steps + 1):
                profile.before(step, state)
                batch = self._put(next(batches, None), step)
                with (
                    self.layout.active(),
                    jax.transfer_guard("disallow"),
                    jax.profiler.StepTraceAnnotation("update", step_num=step),
                ):
                    state, sums = self.train_step(state, frozen, batch)
                # This step's metrics are fetched when the next step keeps the device busy.
                log.record(step, sums)
                stop = stop_signal.reached(step)
                if stop or step % config.checkpoint_every == 0 or step == config.steps:
                    # Lines go to disk before the checkpoint: a resumed run does not write them.
                    log.catch_up()
                    checkpointer.save(step, self._unstack(state))
                if stop and step < config.steps:
                    raise distributed.Stopped(
                        f"stopped after update {step} of {config.steps}, which is saved in "
                        f"{workdir}; the same command continues there"
                    )

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
