"""What a sequence costs: arithmetic of a pass and of a training step, and the KV cache it leaves.

Everything follows from the layer plan: a dense layer computes `text + frames * N` rows, a routed
one `text + frames * K`.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from videollm_mod_jax.models.cache import layer_capacities
from videollm_mod_jax.models.config import LINEAR_NAMES, VideoLLMConfig


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
    decoder = config.decoder
    rows = layer_capacities(config, text_tokens, frames)
    causal_pairs = sum(count * (count + 1) // 2 for count in rows)
    linear_macs = sum(linear.base + linear.adapter for linear in _layer_macs(config).values())
    head, connector = _head_macs(config), _connector_macs(config)
    return Flops(
        linears=2 * linear_macs * sum(rows),
        attention=2 * 2 * decoder.num_heads * decoder.head_dim * causal_pairs,
        lm_head=2 * (head.base + head.adapter) * labelled_tokens,
        connector=2 * sum(connector) * frames * config.vision.features_per_frame,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """Floating point operations that a training step cannot do without, for one sequence.

    What `Flops` leaves out is left out here, too; so are the loss, the optimizer and the embedding
    table, whose rows are looked up, and whose gradient is summed up, without a product.

    Attributes:
      forward: one pass, as `flops` counts it.
      recomputed: of the decoder's blocks in the backward pass; 0 without rematerialisation. All of
        a block but the product of its last linear, `down`, which no gradient needs: a routed layer
        weights the rows before it. An adapter of `down` has its first product recomputed, which the
        gradient of the second factor needs.
      input_gradients: of every product with respect to what it was given. Attention takes five
        products of the size of the two of its forward pass, because scores are not stored
        (arXiv 2205.14135, algorithm 4). The connector's first linear reads features, which need
        none; everything behind it does, since the connector is trained.
      weight_gradients: of adapters and connector; with `trainable='full'` of every linear.
    """

    forward: int
    recomputed: int
    input_gradients: int
    weight_gradients: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.forward + self.recomputed + self.input_gradients + self.weight_gradients


def training_flops(
    config: VideoLLMConfig,
    frames: int,
    text_tokens: int,
    labelled_tokens: int,
    *,
    trainable: str,
    remat: bool,
) -> TrainingFlops:
    """The floor of one training step: what its gradients need, and nothing twice but by `remat`.

    ```
                      forward  recomputed  input gradients  weight gradients
    linears                 1     1 - down               1   adapters, or all
    attention               1            1             2.5                  -
    head, connector         1            -               1   adapters, or all
    ```

    Args:
      config: the model.
      frames: F, of `config.tokens_per_frame` tokens each.
      text_tokens: all other tokens, the interval tokens between frames included.
      labelled_tokens: J, positions whose logits are computed.
      trainable: `lora` (adapters, connector, routers) or `full` (all but the vision tower).
      remat: whether blocks are recomputed in the backward pass.
    """
    forward = flops(config, frames, text_tokens, labelled_tokens)
    rows = sum(layer_capacities(config, text_tokens, frames))
    linears, head = _layer_macs(config), _head_macs(config)
    first, _ = _connector_macs(config)
    first_connector = 2 * first * frames * config.vision.features_per_frame

    mlp = config.decoder.mlp_size
    kept_of_down = config.lora.rank * mlp if linears["down"].adapter else 0
    down = linears["down"].base + linears["down"].adapter - kept_of_down
    recomputed = forward.linears - 2 * down * rows + forward.attention if remat else 0

    if trainable == "full":
        weight_gradients = forward.linears + forward.lm_head
    else:
        adapters = sum(linear.adapter for linear in linears.values())
        weight_gradients = 2 * (adapters * rows + head.adapter * labelled_tokens)
    return TrainingFlops(
        forward=forward.total,
        recomputed=recomputed,
        input_gradients=forward.total - first_connector + 3 * forward.attention // 2,
        weight_gradients=weight_gradients + forward.connector,
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


@dataclasses.dataclass(frozen=True)
class _Macs:
    """Multiply-adds per token of a linear and of its adapter."""

    base: int
    adapter: int


def _layer_macs(config: VideoLLMConfig) -> dict[str, _Macs]:
    """Of a decoder layer's linears, by name."""
    decoder = config.decoder
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
    return {
        name: _macs(config, name, *shape) for name, shape in zip(LINEAR_NAMES, shapes, strict=True)
    }


def _head_macs(config: VideoLLMConfig) -> _Macs:
    return _macs(config, "lm_head", config.decoder.hidden_size, config.decoder.vocab_size)


def _macs(config: VideoLLMConfig, name: str, inputs: int, outputs: int) -> _Macs:
    rank = config.lora.rank if config.lora.adapts(name) else 0
    return _Macs(base=inputs * outputs, adapter=rank * (inputs + outputs))


def _connector_macs(config: VideoLLMConfig) -> tuple[int, int]:
    """Of its two linears."""
    width, hidden = config.vision.width, config.decoder.hidden_size
    return width * hidden, hidden * hidden
