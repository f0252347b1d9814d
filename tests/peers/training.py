"""Times the training update of ours, Full and MoD, beside the peer's, in one process."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.peers import running
from tests.peers.model import Peer, as_tensors
from tests.peers.update import Update
from videollm_mod_jax.benchmarking.filled import Context
from videollm_mod_jax.benchmarking.timing import measure
from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.data.example import LANGUAGE, STREAM
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import (
    VideoLLM,
    VideoLLMConfig,
    full_computation,
    init_variables,
    stack_layers,
)
from videollm_mod_jax.training import sharding
from videollm_mod_jax.training.optimizer import Variables, learning_rate_schedule
from videollm_mod_jax.training.run import Run, TrainingConfig
from videollm_mod_jax.training.state import create_state
from videollm_mod_jax.training.step import HostBatch


def benchmark_training(
    config: VideoLLMConfig,
    data: DataConfig,
    training: TrainingConfig,
    *,
    rounds: int,
    warmup: int,
    compiled: bool,
) -> dict[str, Any]:
    """Times `ours_full`, `ours_mod`, `peer` and, if asked for, `peer_compiled`, in turn.

    All start from the same weights and see the same batch at every call.

    Args:
      config: with Mixture-of-Depths; Full is the same without.
      data: batch size and budget of an example.
      training: how it is trained; both follow it.
      rounds: timed calls of each.
      warmup: calls before them.
      compiled: time the peer with compiled layers, too.

    Returns:
      seconds by variant, the ratios of their medians, and the loss of each before its first
      update: those of Full and the peers agree.

    Raises:
      UserError: full fine-tuning, or a model that the peer does not have.
    """
    if training.trainable != "lora":
        raise UserError(
            f"training.trainable is {training.trainable!r}; the peer trains adapters: 'lora'"
        )
    device = running.torch_device()
    variables = init_variables(VideoLLM(config), jax.random.key(0))
    batch = random_batch(config, data, seed=0)
    full = dataclasses.replace(config, routing=full_computation())
    steps = {
        "ours_full": our_update(full, training, variables, batch),
        "ours_mod": our_update(config, training, variables, batch),
    }
    schedule = learning_rate_schedule(training.optimizer, training.steps)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(1 + warmup + rounds)))
    for name in ("peer", "peer_compiled")[: 1 + compiled]:
        peer = Peer(full, device)
        peer.load(variables)
        update = Update(peer, training, compiled=name == "peer_compiled")
        steps[name] = _peer_update(update, as_tensors(batch, device), rates)
    # What is trained and what is stacked was copied.
    del variables
    losses = {name: float(step()) for name, step in steps.items()}
    timings = measure(steps, rounds, warmup)
    medians = {name: timing.median for name, timing in timings.items()}
    return {
        "seconds": {name: timing.to_dict() for name, timing in timings.items()},
        "ratios": running.ratios(medians, [name for name in steps if name.startswith("peer")]),
        "first_losses": losses,
    }


def random_batch(config: VideoLLMConfig, data: DataConfig, seed: int) -> HostBatch:
    """Examples as long as the budget: text spread evenly before the frames, half of J per kind.

    ```
    frames 2, text 3, N = 3       a v v v b c w w w      frame_starts 1 6
    ```
    """
    rng, N = np.random.default_rng(seed), config.tokens_per_frame
    B, F, T, J = data.batch_size, data.frames, data.text_tokens, data.labels
    context = Context(F, T)
    starts_F = np.cumsum([context.text_before(f) for f in range(F)]) + N * np.arange(F)
    S, V = T + F * N, config.decoder.vocab_size
    features = (B, F, config.vision.features_per_frame, config.vision.width)
    return {
        "tokens": rng.integers(0, V, (B, S), np.int32),
        "frame_starts": np.tile(starts_F.astype(np.int32), (B, 1)),
        "features": rng.normal(size=features).astype(np.float32),
        "label_positions": np.tile(np.linspace(0, S - 1, J).astype(np.int32), (B, 1)),
        "labels": rng.integers(0, V, (B, J), np.int32),
        "label_kinds": np.tile(
            np.where(np.arange(J) % 2, STREAM, LANGUAGE).astype(np.int8), (B, 1)
        ),
    }


def our_update(
    config: VideoLLMConfig, training: TrainingConfig, variables: Variables, batch: HostBatch
) -> Callable[[], jax.Array]:
    """A function that does one update of ours and returns the loss before it."""
    run = Run.build(training, config)
    flat = flatten_dict(variables)

    def laid_out(stored: Variables, target: Variables) -> Variables:
        tree = unflatten_dict({path: flat[path] for path in flatten_dict(stored)})
        tree = stack_layers(tree, run.plan) if training.scan else tree
        return jax.device_put(tree, sharding.shardings(target))

    trained = laid_out(run.stored[0].trained, run.target[0].trained)
    # The state is donated, and others start from the same weights.
    trained = jax.tree.map(jnp.copy, trained)
    state = create_state(trained, run.optimizer, training.seed)
    frozen = laid_out(run.stored[1], run.target[1])
    placed = run.layout.put_batch(batch)

    def step() -> jax.Array:
        nonlocal state
        with run.layout.active():
            state, sums = run.train_step(state, frozen, placed)
        total, count = sums["loss"]
        return total / count

    return step


def _peer_update(
    update: Update, batch: Mapping[str, torch.Tensor], rates: np.ndarray
) -> Callable[[], torch.Tensor]:
    remaining = iter(rates.tolist())

    def step() -> torch.Tensor:
        loss = update(batch, next(remaining))
        running.wait(loss.device)
        return loss

    return step
