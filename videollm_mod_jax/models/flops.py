"""What a sequence costs: arithmetic by part, and the KV cache it leaves.

Everything follows from the layer plan: a dense layer computes `text + frames * N` rows, a routed
one `text + frames * K`.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from videollm_mod_jax.models.cache import layer_capacities
from videollm_mod_jax.models.config import LINEAR_NAMES, DecoderConfig, VideoLLMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating point operations of one forward pass over one sequence, from frame features on.

    A multiply-add counts as two. Left out: norms, softmax, activations, router scores (one dot
    product per vision token), and the vision tower, which runs once per video (see `encode`).

    Attributes:
      linears: the seven linears of every decoder layer, with their LoRA.
      attention: scores and weighted values, over the causal pairs only.
      lm_head: the output head, with its LoRA, at the labelled positions.
      connector: the two linears of the connector.
    """

    linears: int
    attention: int
    lm_head: int
    connector: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.linears + self.attention + self.lm_head + self.connector

    @property
    def paper_macs(self) -> int:
        """What the tables of arXiv 2408.16730 print as "FLOPs".

        Multiply-adds (counted once) of `linears` alone, for 6000 vision tokens (600 frames of 10),
        601 other tokens and LoRA of rank 128.
        """
        return self.linears // 2


def flops(config: VideoLLMConfig, frames: int, text_tokens: int, labelled_tokens: int) -> Flops:
    """Counts one forward pass.

    Args:
      config: the model.
      frames: F, of `config.tokens_per_frame` tokens each.
      text_tokens: all other tokens, the interval tokens between frames included.
      labelled_tokens: J, positions whose logits are computed.
    """
    decoder, lora = config.decoder, config.lora
    vision_tokens = frames * config.tokens_per_frame
    linear_macs = sum(
        _linear_macs(*shape, lora.rank if lora.adapts(name) else 0)
        for name, shape in _linear_shapes(decoder).items()
    )
    head_rank = lora.rank if lora.adapts("lm_head") else 0
    head_macs = _linear_macs(decoder.hidden_size, decoder.vocab_size, head_rank)
    width, hidden = config.vision.width, decoder.hidden_size

    rows = layer_capacities(config, text_tokens, frames)
    causal_pairs = sum(count * (count + 1) // 2 for count in rows)
    return Flops(
        linears=2 * linear_macs * sum(rows),
        attention=2 * 2 * decoder.num_heads * decoder.head_dim * causal_pairs,
        lm_head=2 * head_macs * labelled_tokens,
        connector=2 * (width * hidden + hidden * hidden) * vision_tokens,
    )


def kv_cache_bytes(config: VideoLLMConfig, frames: int, text_tokens: int, dtype: DTypeLike) -> int:
    """Bytes of keys and values that a stream leaves in the caches of all layers.

    Args:
      config: the model.
      frames: F, frames seen.
      text_tokens: all other tokens, the interval tokens between frames included.
      dtype: of the caches.
    """
    decoder = config.decoder
    entry = 2 * decoder.num_kv_heads * decoder.head_dim * jnp.dtype(dtype).itemsize
    return entry * sum(layer_capacities(config, text_tokens, frames))


def _linear_shapes(decoder: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's linears, by name."""
    hidden, mlp = decoder.hidden_size, decoder.mlp_size
    queries = decoder.num_heads * decoder.head_dim
    keys = decoder.num_kv_heads * decoder.head_dim
    shapes = (
        (hidden, queries),
        (hidden, keys),
        (hidden, keys),
        (queries, hidden),
        (hidden, mlp),
        (hidden, mlp),
        (mlp, hidden),
    )
    return dict(zip(LINEAR_NAMES, shapes, strict=True))


def _linear_macs(inputs: int, outputs: int, rank: int) -> int:
    """Multiply-adds per token of a linear and its adapter."""
    return inputs * outputs + rank * (inputs + outputs)
