"""Times the training update of ours, Full and MoD, beside the peer's, in one process."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.peers import running
from tests.peers.model import Peer, as_tensors
from tests.peers.update import Update
from videollm_mod_jax.benchmarking.batch import random_batch
from videollm_mod_jax.benchmarking.sides import Side, draw_weights, weights_for
from videollm_mod_jax.benchmarking.timing import measure
from videollm_mod_jax.benchmarking.training import variants
from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLMConfig, unstack_layers
from videollm_mod_jax.training.optimizer import learning_rate_schedule, merge_variables
from videollm_mod_jax.training.run import Run, TrainingConfig


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
      UserError: full fine-tuning, or a config that routes nowhere.
    """
    if training.trainable != "lora":
        raise UserError(
            f"training.trainable is {training.trainable!r}; the peer trains adapters: 'lora'"
        )
    device = running.torch_device()
    configs = variants(config)
    runs = {name: Run.build(training, each) for name, each in configs.items()}
    weights = {"mod": draw_weights(runs["mod"], config)}
    weights["full"] = weights_for(runs["full"], runs["mod"], weights["mod"])
    batch = random_batch(config, data)
    schedule = learning_rate_schedule(training.optimizer, training.steps)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(1 + warmup + rounds)))
    steps: dict[str, Callable[[], Any]] = {}
    for name, run in runs.items():
        steps[f"ours_{name}"] = Side(run, *weights[name], run.layout.put_batch(batch)).step
    for name in ("peer", "peer_compiled")[: 1 + compiled]:
        peer = Peer(configs["full"], device)
        variables = merge_variables(*weights["full"])
        plan = runs["full"].plan
        peer.load(unstack_layers(variables, plan) if training.scan else variables)
        update = Update(peer, training, compiled=name == "peer_compiled")
        steps[name] = _peer_update(update, as_tensors(batch, device), rates)
    losses = {name: _loss(step()) for name, step in steps.items()}
    timings = measure(steps, rounds, warmup)
    medians = {name: timing.median for name, timing in timings.items()}
    return {
        "seconds": {name: timing.to_dict() for name, timing in timings.items()},
        "ratios": running.ratios(medians, [name for name in steps if name.startswith("peer")]),
        "first_losses": losses,
    }


def _loss(result: Any) -> float:
    """Of what a step returns: ours a state and sums, the peer the loss."""
    if isinstance(result, torch.Tensor):
        return float(result)
    _, sums = result
    total, count = sums["loss"]
    return float(total / count)


def _peer_update(
    update: Update, batch: Mapping[str, torch.Tensor], rates: np.ndarray
) -> Callable[[], torch.Tensor]:
    remaining = iter(rates.tolist())

    def step() -> torch.Tensor:
        loss = update(batch, next(remaining))
        running.wait(loss.device)
        return loss

    return step
