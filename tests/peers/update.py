"""The peer's training update: what `training.step.make_train_step` does, as the stack does it."""

import torch

from tests.peers.model import Batch, Peer
from videollm_mod_jax.data.example import STREAM
from videollm_mod_jax.training.run import TrainingConfig


class Update:
    """AdamW on adapters and connector, one call per batch.

    Attributes:
      peer: the model, which it changes.
      optimizer: fused AdamW.
    """

    def __init__(self, peer: Peer, config: TrainingConfig, *, compiled: bool):
        """Prepares the peer for training.

        Args:
          peer: the model.
          config: how it is trained; both follow it.
          compiled: run every decoder layer through torch.compile, as one region.
        """
        self.peer, self._config = peer, config
        if config.remat:
            peer.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            # Not the whole model: compiled, transformers would make a mask, and SDPA would not
            # take its flash kernel.
            for layer in peer.causal_lm.model.layers:
                layer.forward = torch.compile(layer.forward)
        settings = config.optimizer
        trained = [(n, p) for n, p in peer.named_parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for n, p in trained if n.endswith("bias") == is_bias],
                "weight_decay": 0.0 if is_bias else settings.weight_decay,
            }
            for is_bias in (False, True)
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True
        )
        peer.train()

    def loss(self, batch: Batch) -> torch.Tensor:
        """The objective of `training.losses.streaming_loss`, summed over the labels."""
        with self.peer.arithmetic():
            logits_BJV = self.peer.logits(batch)
        cross_entropy_BJ = torch.nn.functional.cross_entropy(
            logits_BJV.transpose(1, 2), batch["labels"], reduction="none"
        )
        kinds_BJ = batch["label_kinds"]
        weight_BJ = torch.where(kinds_BJ == STREAM, self._config.stream_weight, 1.0)

        return (cross_entropy_BJ * weight_BJ * (kinds_BJ > 0)).sum()

    def gradients(self, batch: Batch) -> torch.Tensor:
        """Leaves the gradient of the mean loss in the parameters; returns that loss."""
        self.optimizer.zero_grad()
        parts = self._config.microbatches
        count = (batch["label_kinds"] > 0).sum().clamp(min=1)
        mean = 0.0
        for part in range(parts):
            total = self.loss({name: leaf[part::parts] for name, leaf in batch.items()})
            (total / count).backward()
            mean = mean + total.detach() / count
        return mean

    def __call__(self, batch: Batch, learning_rate: float) -> torch.Tensor:
        """Does one update; returns the loss before it, on the device."""
        loss = self.gradients(batch)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, self._config.optimizer.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return loss
