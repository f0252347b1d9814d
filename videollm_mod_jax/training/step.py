"""One update, and the loss of one batch without it, as pure functions.

Shapes: B batch, S tokens, F frames, J labelled positions, A microbatches.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.training.losses import Sums, judge_in_chunks, streaming_loss
from videollm_mod_jax.training.optimizer import Variables, merge_variables
from videollm_mod_jax.training.state import TrainState

BATCH_KEYS = ("tokens", "frame_starts", "features", "label_positions", "labels", "label_kinds")

Batch = Mapping[str, jax.Array]
"""The arrays of `BATCH_KEYS`: BS, BF, BFNW, BJ, BJ, BJ."""

HostBatch = Mapping[str, np.ndarray]
"""One process's rows of a `Batch`, before they are on its devices."""

TrainStep = Callable[[TrainState, Variables, Batch], tuple[TrainState, Sums]]
ValidationStep = Callable[[Variables, Variables, Batch], Sums]


def make_train_step(
    model: VideoLLM,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    stream_weight: float,
    microbatches: int,
) -> TrainStep:
    """Builds the update `(state, frozen, batch) -> (state, metrics)`.

    The batch is worked through in `microbatches` equal parts, whose gradients and losses are
    summed and divided once by the number of labelled positions of the whole batch: a mean of the
    parts' means would weigh a label by how empty its part is.

    Args:
      model: its layer layout is the one of the variables.
      optimizer: of the trained variables.
      schedule: the learning rate by step, for the metrics.
      stream_weight: sigma of the streaming loss.
      microbatches: divides B.

    Returns:
      A function to jit, donating the state. Its metrics are those of `streaming_loss`, and
      `gradient_norm` (before clipping) and `learning_rate`, all as (sum, weight).
    """

    def loss(
        trained: Variables, frozen: Variables, batch: Batch, dropout_key: jax.Array
    ) -> tuple[jax.Array, Sums]:
        variables = merge_variables(trained, frozen)
        sums = _batch_loss(model, variables, batch, stream_weight, {"dropout": dropout_key})
        return sums["loss"][0], sums

    def train_step(state: TrainState, frozen: Variables, batch: Batch) -> tuple[TrainState, Sums]:
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def accumulate(total, part):
            index, microbatch = part
            key = _dropout_key(jax.random.fold_in(step_key, index))
            (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(
                state.trained, frozen, microbatch, key
            )
            return jax.tree.map(jnp.add, total, (gradients, sums)), None

        parts = (jnp.arange(microbatches), split_batch(batch, microbatches))
        first = jax.tree.map(lambda leaf: leaf[0], parts[1])
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            (state.trained, jax.eval_shape(loss, state.trained, frozen, first, step_key)[1]),
        )
        (gradients, sums), _ = jax.lax.scan(accumulate, zeros, parts)
        # A batch without any label has gradient 0, not 0/0.
        count = jnp.maximum(sums["loss"][1], 1.0)
        gradients = jax.tree.map(lambda leaf: leaf / count, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
        metrics = sums | {
            "gradient_norm": (optax.global_norm(gradients), jnp.ones(())),
            "learning_rate": (jnp.asarray(schedule(state.step), jnp.float32), jnp.ones(())),
        }
        state = state.replace(
            step=state.step + 1,
            trained=optax.apply_updates(state.trained, updates),
            opt_state=opt_state,
        )
        return state, metrics

    return train_step


def make_validation_step(model: VideoLLM, *, stream_weight: float) -> ValidationStep:
    """Builds `(trained, frozen, batch) -> sums`: the objective of `make_train_step`, no dropout.

    Args:
      model: as in `make_train_step`.
      stream_weight: sigma of the streaming loss.

    Returns:
      A function to jit. Its sums are those of `streaming_loss`: add them up over batches, then
      divide once.
    """

    def validation_step(trained: Variables, frozen: Variables, batch: Batch) -> Sums:
        return _batch_loss(model, merge_variables(trained, frozen), batch, stream_weight, {})

    return validation_step


def _dropout_key(key: jax.Array) -> jax.Array:
    """The same key for the generator that the device has: Threefry takes much longer for a mask."""
    data = jax.random.key_data(key)
    return jax.random.wrap_key_data(jnp.concatenate([data, data]), impl="rbg")


def _batch_loss(
    model: VideoLLM,
    variables: Variables,
    batch: Batch,
    stream_weight: float,
    rngs: Mapping[str, jax.Array],
) -> Sums:
    hidden_BJD, low_rank_BJR, head = model.apply(
        variables,
        batch["tokens"],
        batch["features"],
        batch["frame_starts"],
        batch["label_positions"],
        rngs=rngs,
        method="before_logits",
    )
    judged = judge_in_chunks(
        hidden_BJD, low_rank_BJR, head, batch["labels"], model.execution.vocab_chunk
    )
    return streaming_loss(judged, batch["labels"], batch["label_kinds"], stream_weight)


def split_batch(batch: Batch, microbatches: int) -> Batch:
    """Splits [B, ...] arrays into [A, B/A, ...], every A-th example into the same microbatch.

    ```
    B = 6, A = 2:   0 1 2 3 4 5   ->   [[0 2 4], [1 3 5]]
    ```

    Strided, so that each device of a batch sharded in contiguous blocks keeps its own examples.
    """

    def split(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(-1, microbatches, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)
