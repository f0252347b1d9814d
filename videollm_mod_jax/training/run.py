"""A run: its configuration, its layout on the devices, and the one step that it repeats."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import optax

from videollm_mod_jax.config_dict import (
    COUNT,
    COUNT_OR_NONE,
    SEED,
    Checked,
    Interval,
    require_choice,
)
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import (
    Execution,
    VideoLLM,
    VideoLLMConfig,
    config_plan,
    stack_layers,
    unstack_layers,
)
from videollm_mod_jax.training import checkpoint, distributed, metrics, sharding
from videollm_mod_jax.training.optimizer import (
    TRAINABLE,
    OptimizerConfig,
    Variables,
    learning_rate_schedule,
    make_optimizer,
    split_variables,
)
from videollm_mod_jax.training.sharding import Layout, make_layout
from videollm_mod_jax.training.state import TrainState, create_state
from videollm_mod_jax.training.step import (
    BATCH_KEYS,
    HostBatch,
    TrainStep,
    ValidationStep,
    make_train_step,
    make_validation_step,
)
from videollm_mod_jax.training.validation import ValidationBatches, validate

_DEVICES = Annotated[int, Interval("[-1, 2**20]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Checked):
    """How to train, every number stated.

    Attributes:
      steps: updates in all.
      seed: of dropout.
      trainable: `lora` (adapters, connector, routers) or `full` (all but the vision tower).
      stream_weight: sigma of the streaming loss.
      microbatches: parts of a batch that are worked through one after the other.
      scan: scan over the decoder's layers (compiles fast) instead of unrolling them.
      remat: recompute decoder blocks in the backward pass (less memory, a third more work).
      kernels, row_chunk, vocab_chunk: see `models.Execution`.
      sharding: rule set of `training/sharding.py`: `replicate`, `fsdp` or `fsdp_tensor`.
      mesh: devices along data, fsdp and tensor; one may be -1, "the rest".
      log_every: updates between lines of `metrics.jsonl`.
      checkpoint_every: updates between checkpoints; the last update is always saved.
      validate_every: updates between validations; 0 for none, otherwise the last update is always
        validated. A multiple or a divisor of `checkpoint_every`: a checkpoint of an update that is
        validated has the loss of its weights, another has none.
      keep_checkpoints: how many of the newest checkpoints to keep.
      keep_best: how many of the checkpoints with the lowest validation loss to keep as well, be
        they among the newest or not.
      optimizer: AdamW and its schedule.
    """

    steps: COUNT
    seed: SEED
    trainable: str
    stream_weight: Annotated[float, Interval("[0, 1e6]")]
    microbatches: Annotated[int, Interval("[1, 2**20]")]
    scan: bool
    remat: bool
    kernels: str
    row_chunk: COUNT_OR_NONE
    vocab_chunk: COUNT_OR_NONE
    sharding: str
    mesh: tuple[_DEVICES, _DEVICES, _DEVICES]
    log_every: COUNT
    checkpoint_every: COUNT
    validate_every: COUNT_OR_NONE
    keep_checkpoints: COUNT
    keep_best: COUNT_OR_NONE
    optimizer: OptimizerConfig

    def __post_init__(self):
        super().__post_init__()
        require_choice("training.trainable", self.trainable, TRAINABLE)
        shorter, longer = sorted((self.validate_every, self.checkpoint_every))
        if shorter and longer % shorter:
            raise UserError(
                f"training.validate_every is {self.validate_every} and training.checkpoint_every "
                f"is {self.checkpoint_every}; make one a multiple of the other, so that what is "
                "validated is also saved"
            )
        if self.keep_best and not self.validate_every:
            raise UserError(
                f"training.keep_best is {self.keep_best} and training.validate_every is 0; the "
                "best checkpoints are those of the lowest validation loss: set validate_every, or "
                "keep_best to 0"
            )
        # Refuses what is out of range.
        self.execution()

    def execution(self) -> Execution:
        """How the step is computed."""
        return Execution(
            scan=self.scan,
            remat=self.remat,
            kernels=self.kernels,
            row_chunk=self.row_chunk,
            vocab_chunk=self.vocab_chunk,
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
      validation_step: jitted.
      target: abstract (state, frozen) as the step takes them: layers stacked if `config.scan`.
      stored: the same as they lie on disk: one entry per layer.
    """

    config: TrainingConfig
    layout: Layout
    plan: Any
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    validation_step: ValidationStep
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
        model = VideoLLM(model_config, config.execution())
        train_step = make_train_step(
            model,
            optimizer,
            schedule,
            stream_weight=config.stream_weight,
            microbatches=config.microbatches,
        )
        validation_step = make_validation_step(model, stream_weight=config.stream_weight)

        def abstract(scan: bool) -> tuple[TrainState, Variables]:
            model = VideoLLM(model_config, Execution(scan=scan))
            return sharding.abstract_training(model, optimizer, config.trainable, layout)

        target = abstract(config.scan)
        out = (sharding.shardings(target[0]), layout.replicated)
        return cls(
            config=config,
            layout=layout,
            plan=config_plan(model_config),
            optimizer=optimizer,
            train_step=jax.jit(train_step, donate_argnums=0, out_shardings=out),
            validation_step=jax.jit(validation_step, out_shardings=layout.replicated),
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
        validation_batches: ValidationBatches | None,
        workdir: Path,
        checkpointer: checkpoint.Checkpointer,
        profile_steps: int,
    ) -> None:
        """Runs the updates after `done`, validating, logging and saving on the way and at the end.

        Raises:
          Stopped: SIGTERM came; the last update was saved.
        """
        config = self.config
        batches = iter(batches_from(done))
        with (
            metrics.Log(
                workdir,
                done,
                config.steps,
                config.log_every,
                checkpointer.written(done) if done else None,
            ) as log,
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
                validates = self._is_due(step, config.validate_every)
                saves = stop or self._is_due(step, config.checkpoint_every)
                if validates or saves:
                    # Lines go to disk before the checkpoint: a resumed run does not write them.
                    log.catch_up()
                loss = None
                if validates:
                    means = validate(
                        self.validation_step,
                        self.layout,
                        state.trained,
                        frozen,
                        validation_batches(),
                    )
                    log.validated(step, means)
                    loss = means["loss"]
                if saves:
                    checkpointer.save(step, self._unstack(state), loss, log.written())
                if stop and step < config.steps:
                    raise distributed.Stopped(
                        f"stopped after update {step} of {config.steps}, which is saved in "
                        f"{workdir}; the same command continues there",
                        stop_signal.signum,
                    )

    def _is_due(self, step: int, every: int) -> bool:
        """Whether what happens every so many updates, and after the last, happens after `step`."""
        return every > 0 and (step % every == 0 or step == self.config.steps)

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
