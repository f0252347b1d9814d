"""Weights as 8-bit integers: half the memory and half the traffic of bfloat16 when decoding."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import qwix

from videollm_mod_jax.models import NO_LORA, VideoLLMConfig, merge_lora
from videollm_mod_jax.training.checkpoint import LoadedModel


def quantize(model: LoadedModel) -> LoadedModel:
    """The same model, rounded as by `quantize_variables`.

    Args:
      model: any; it is left as it was. Drop it to have its memory.

    Returns:
      A model that can stream and be evaluated, but neither trained nor saved.
    """
    config, variables = quantize_variables(model.config, model.variables)
    return dataclasses.replace(model, config=config, variables=variables)


def quantize_variables(
    config: VideoLLMConfig, variables: Mapping[str, Any]
) -> tuple[VideoLLMConfig, dict[str, Any]]:
    """Rounds the kernels of the decoder and its output head to 8 bits, one scale per output.

    ```
    column of a kernel   0.5  -1.0   0.25      scale 1 / 127.5
    stored               64   -127   32
    ```

    Adapters are merged into their kernels before. Embedding, norms, routers, connector and vision
    tower stay as they are, and so does a tied output head, which is the embedding.

    Args:
      config: the model.
      variables: its variables, layers not stacked.

    Returns:
      The model without adapters, and its variables, whose large kernels are `qwix.QArray`s.
    """
    if config.lora.rank:
        variables = merge_lora(variables, config.lora)
        config = dataclasses.replace(config, lora=NO_LORA)
    params = dict(variables["params"])
    for part in ("decoder", "lm_head"):
        if part in params:
            params[part] = _with_kernels(params[part])
    return config, {**variables, "params": params}


def _with_kernels(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of parameters, its matrices quantized. A router's kernel is a vector, and stays."""
    out = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out[name] = _with_kernels(value)
        else:
            out[name] = _round(value) if name == "kernel" and value.ndim == 2 else value
    return out


@jax.jit
def _round(kernel: jax.Array) -> qwix.QArray:
    return qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=(1,))
