"""The model of a `VideoLLMConfig` as the PyTorch stack has it: transformers, PEFT, a connector.

Importing this file needs torch, transformers and peft. Every layer computes every token: the stack
has no Mixture-of-Depths.
"""

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import peft
import torch
import transformers
from flax.traverse_util import flatten_dict

from videollm_mod_jax.conversion.live import live_table
from videollm_mod_jax.conversion.llama import decoder_to_hf
from videollm_mod_jax.models import VideoLLMConfig

MODULES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "lm_head": "lm_head",
}
"""What the linears of ours are called in transformers."""

Batch = Mapping[str, torch.Tensor]
"""The arrays of `training.step.BATCH_KEYS`."""


class Peer(torch.nn.Module):
    """A language model of transformers, PEFT's adapters if the config has any, and a connector.

    Weights have `param_dtype`, adapters and connector float32, and matrix products `dtype`, as in
    ours: under autocast, which is how the stack trains bfloat16 models.

    Attributes:
      llm: the language model, wrapped by PEFT if it has adapters.
      connector: Linear, GELU, Linear.
    """

    def __init__(self, config: VideoLLMConfig, device: torch.device):
        super().__init__()
        decoder, lora = config.decoder, config.lora
        self._config = config
        hf = transformers.AutoConfig.for_model(**decoder_to_hf(decoder))
        with device:
            self.llm = transformers.AutoModelForCausalLM.from_config(
                hf, dtype=getattr(torch, config.param_dtype), attn_implementation="sdpa"
            )
            self.connector = torch.nn.Sequential(
                torch.nn.Linear(config.vision.width, decoder.hidden_size),
                torch.nn.GELU(),
                torch.nn.Linear(decoder.hidden_size, decoder.hidden_size),
            )
        if lora.rank:
            settings = peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=[MODULES[target] for target in lora.targets],
                task_type="CAUSAL_LM",
            )
            self.llm = peft.get_peft_model(self.llm, settings)

    @property
    def causal_lm(self) -> torch.nn.Module:
        """The `LlamaForCausalLM`, whose linears carry the adapters."""
        return self.llm.get_base_model() if self._config.lora.rank else self.llm

    def arithmetic(self) -> contextlib.AbstractContextManager:
        """The context in which matrix products have the config's dtype.

        PEFT would take an adapter's input to float32 first, and autocast back to bfloat16.
        """
        if self._config.dtype == self._config.param_dtype == "float32":
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        device, dtype = next(self.parameters()).device.type, getattr(torch, self._config.dtype)
        stack.enter_context(torch.autocast(device, dtype))
        stack.enter_context(peft.helpers.disable_input_dtype_casting(self.llm))
        return stack

    def embed(
        self, tokens_BS: torch.Tensor, features_BFNW: torch.Tensor, frame_starts_BF: torch.Tensor
    ) -> torch.Tensor:
        """Embeddings [B, S, D] of text, with those of the frames in their places."""
        x_BSD = self.causal_lm.get_input_embeddings()(tokens_BS)
        vision_BFND = self.connector(features_BFNW)
        B, F, N, D = vision_BFND.shape
        offset_N = torch.arange(N, device=tokens_BS.device)
        rows_BR = (frame_starts_BF[:, :, None] + offset_N).reshape(B, F * N, 1).expand(-1, -1, D)
        return x_BSD.scatter(1, rows_BR, vision_BFND.reshape(B, F * N, D).to(x_BSD.dtype))

    def logits(self, batch: Batch) -> torch.Tensor:
        """Float32 next-token logits [B, J, V] at the labelled positions, and at no other."""
        x_BSD = self.embed(batch["tokens"], batch["features"], batch["frame_starts"])
        hidden_BSD = self.causal_lm.model(inputs_embeds=x_BSD, use_cache=False).last_hidden_state
        index_BJD = batch["label_positions"][:, :, None].expand(-1, -1, hidden_BSD.shape[-1])
        return self.causal_lm.lm_head(hidden_BSD.gather(1, index_BJD)).float()

    def tensors(self, variables: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """By the peer's names, the arrays of a model of ours that routes nowhere, or of a part.

        ```
        params/decoder/layer_0/block/mlp/up/kernel   [D, I]   model.layers.0.mlp.up_proj.weight
        lora/decoder/layer_0/block/mlp/up/a          [D, R]   ....up_proj.lora_A.default.weight
        params/connector/fc2/bias                    [D]      connector.2.bias
        ```

        Args:
          variables: one array per layer; or gradients, or a part of either.

        Returns:
          tensors that share memory with the arrays, transposed as the peer has them.
        """
        flat = flatten_dict(variables, sep="/")
        found = {}
        for entry in live_table(self._config.decoder, (), bias=False).entries():
            if entry.target in flat:
                found[entry.source] = _transposed(flat[entry.target], entry.axes)
            adapter = entry.target.replace("params/", "lora/", 1).removesuffix("/kernel")
            for theirs, ours in (("lora_A", "a"), ("lora_B", "b")):
                if f"{adapter}/{ours}" in flat:
                    module = entry.source.removesuffix(".weight")
                    found[f"{module}.{theirs}.default.weight"] = _transposed(
                        flat[f"{adapter}/{ours}"], (1, 0)
                    )
        return found

    def parameters_by_name(self) -> dict[str, torch.nn.Parameter]:
        """All parameters, by names as transformers has them without PEFT."""
        wrapping = r"^llm\.(base_model\.model\.)?|base_layer\."
        return {re.sub(wrapping, "", name): p for name, p in self.named_parameters()}

    @torch.no_grad()
    def load(self, variables: Mapping[str, Any]) -> None:
        """Takes the weights of a model of ours that routes nowhere, one array per layer.

        Raises:
          KeyError: a parameter of the peer has no variable.
        """
        tensors = self.tensors(variables)
        for name, parameter in self.parameters_by_name().items():
            parameter.copy_(tensors[name])


def as_tensors(batch: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of ours for the peer; indices are int64, which torch wants."""
    tensors = {name: torch.tensor(np.asarray(leaf), device=device) for name, leaf in batch.items()}
    return {k: t if t.is_floating_point() else t.long() for k, t in tensors.items()}


def _transposed(array: jax.Array, axes: tuple[int, ...] | None) -> torch.Tensor:
    tensor = torch.from_dlpack(array)
    return tensor if axes is None else tensor.permute(axes)
