"""What a step cannot do without: operations, and bytes of weights, caches and activations.

No step is faster than its operations at the device's peak, nor than its bytes at the device's
bandwidth.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from videollm_mod_jax.benchmarking.device import Peaks
from videollm_mod_jax.benchmarking.filled import Context
from videollm_mod_jax.benchmarking.timing import Timing
from videollm_mod_jax.models import (
    VideoLLM,
    VideoLLMConfig,
    VisionConfig,
    full_computation,
    init_variables,
    layer_capacities,
)
from videollm_mod_jax.models.flops import flops, kv_cache_bytes, training_flops
from videollm_mod_jax.streaming.int8 import quantize_variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one step must compute and move.

    Attributes:
      flops: of its matrix products; a multiply-add counts as two.
      weight_bytes: of the weights that it needs, each read once.
      cache_bytes: of the filled cache entries, each read once, and of new ones, written once.
      activation_bytes: of inputs and results, where they count.
    """

    flops: int
    weight_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0

    @property
    def bytes_moved(self) -> int:
        """All of them."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


def measured(timing: Timing, work: Work, peaks: Peaks) -> dict[str, Any]:
    """A row of a result: times in seconds, the floors, and the share of the higher one reached."""
    floors = {
        "flops_floor": work.flops / peaks.flops,
        "bytes_floor": work.bytes_moved / peaks.bandwidth,
    }
    share = max(floors.values()) / timing.median
    return timing.to_dict() | dataclasses.asdict(work) | floors | {"share_of_floor": share}


def append_work(
    config: VideoLLMConfig,
    context: Context,
    *,
    streams: int,
    frames: int,
    text: int,
    int8: bool = False,
) -> Work:
    """Work of one append to several streams: text tokens, frames, then one row of logits.

    Args:
      config: the model.
      context: what each stream has seen before.
      streams: B.
      frames, text: that are appended to each.
      int8: the decoder's weights are rounded to 8 bits.
    """
    decoder = config.decoder
    filled = layer_capacities(config, context.text, context.frames)
    new = layer_capacities(config, text, frames)
    old_pairs = sum(old * more for old, more in zip(filled, new, strict=True))
    step = flops(config, frames, text, labelled_tokens=1).total
    step += 2 * 2 * decoder.num_heads * decoder.head_dim * old_pairs
    moved = kv_cache_bytes(config, context.frames + frames, context.text + text, config.dtype)
    unread = {"vision", "newline"}
    if not frames:
        unread |= {"connector", "router"}
    if not decoder.tie_embeddings:
        # A few of its rows are read, which do not count.
        unread.add("embedding")
    return Work(
        flops=streams * step,
        weight_bytes=_bytes_without(config, unread, int8),
        cache_bytes=streams * moved,
    )


def one_layer(config: VideoLLMConfig) -> VideoLLMConfig:
    """A model with one dense layer of the same shapes."""
    decoder = dataclasses.replace(config.decoder, num_layers=1)
    return dataclasses.replace(config, decoder=decoder, routing=full_computation())


def layer_work(
    config: VideoLLMConfig, batch_size: int, rows: int, *, trainable: str, remat: bool
) -> tuple[Work, Work]:
    """Work of one layer on so many rows: forward, and forward and backward."""
    layer = one_layer(config)
    forward = flops(layer, 0, rows, labelled_tokens=0).total
    both = training_flops(layer, 0, rows, 0, trainable=trainable, remat=remat).total
    return Work(flops=batch_size * forward), Work(flops=batch_size * both)


def mlp_work(
    config: VideoLLMConfig, batch_size: int, rows: int, trainable: str
) -> tuple[Work, Work]:
    """Work of the MLP of a layer: forward, and forward and backward, nothing recomputed."""
    hidden, mlp = config.decoder.hidden_size, config.decoder.mlp_size
    adapted = sum(config.lora.adapts(name) for name in ("gate", "up", "down"))
    return _linear_work(
        batch_size * rows,
        base=3 * hidden * mlp,
        adapters=adapted * config.lora.rank * (hidden + mlp),
        trainable=trainable,
    )


def head_work(
    config: VideoLLMConfig, batch_size: int, labels: int, trainable: str
) -> tuple[Work, Work]:
    """Work of the output head at labelled positions: forward, and forward and backward."""
    hidden, vocab = config.decoder.hidden_size, config.decoder.vocab_size
    rank = config.lora.rank if config.lora.adapts("lm_head") else 0
    return _linear_work(
        batch_size * labels,
        base=hidden * vocab,
        adapters=rank * (hidden + vocab),
        trainable=trainable,
    )


def attention_work(config: VideoLLMConfig, batch_size: int, rows: int) -> tuple[Work, Work]:
    """Work of causal attention: forward, and forward and backward, whose scores are not stored.

    Two products forward, five backward (arXiv 2205.14135). Queries, keys, values and the result are
    moved once forward; backward they and their gradients.
    """
    decoder = config.decoder
    forward = batch_size * flops(one_layer(config), 0, rows, labelled_tokens=0).attention
    heads = 2 * (decoder.num_heads + decoder.num_kv_heads)
    arrays = batch_size * rows * heads * decoder.head_dim * jnp.dtype(config.dtype).itemsize
    return (
        Work(flops=forward, activation_bytes=arrays),
        Work(flops=7 * forward // 2, activation_bytes=3 * arrays),
    )


def cached_attention_work(config: VideoLLMConfig, length: int, new: int) -> Work:
    """Work of the last entries of a cache attending to all up to their own."""
    decoder = config.decoder
    pairs = new * (length - new) + new * (new + 1) // 2
    return Work(
        flops=2 * 2 * decoder.num_heads * decoder.head_dim * pairs,
        cache_bytes=kv_cache_bytes(one_layer(config), 0, length, config.dtype),
    )


def stored_bytes(config: VideoLLMConfig, *, tower: bool, int8: bool = False) -> int:
    """Bytes of all weights, with or without those of the vision tower."""
    return _bytes_without(config, set() if tower else {"vision"}, int8)


def tower_work(config: VideoLLMConfig, images: int) -> Work:
    """Work of the vision tower on some images; pooling its patches is left out."""
    unread = {"decoder", "embedding", "lm_head", "connector", "newline", "unused_blocks"}
    if config.vision.summary != "attention_pool":
        unread.add("head")
    return Work(
        flops=images * tower_flops(config.vision),
        weight_bytes=_bytes_without(config, unread),
    )


def tower_flops(vision: VisionConfig) -> int:
    """Floating point operations of the tower's matrix products on one image, pooling left out."""
    W, patches = vision.width, vision.patches_per_side**2
    tokens = patches + (vision.architecture == "clip")
    mlp = 2 * W * vision.mlp_width
    block = tokens * (4 * W * W + mlp) + 2 * tokens * tokens * W
    macs = 3 * vision.patch_size**2 * W * patches
    macs += (vision.num_layers - vision.unused_blocks) * block
    if vision.summary == "attention_pool":
        # Keys and values of all patches, query and output of the probe, scores and their use.
        macs += 2 * W * W * (patches + 1) + 2 * W * patches + mlp
    return 2 * macs


def _linear_work(rows: int, *, base: int, adapters: int, trainable: str) -> tuple[Work, Work]:
    """Of linears with so many multiply-adds per row in their kernels and in their adapters."""
    forward = 2 * rows * (base + adapters)
    weight_gradients = forward if trainable == "full" else 2 * rows * adapters
    return Work(flops=forward), Work(flops=2 * forward + weight_gradients)


def _bytes_without(config: VideoLLMConfig, unread: set[str], int8: bool = False) -> int:
    """Bytes of all variables but those below one of these names."""
    return sum(size for names, size in _sizes(config, int8) if not unread & names)


@functools.cache
def _sizes(config: VideoLLMConfig, int8: bool) -> tuple[tuple[frozenset[str], int], ...]:
    """Of every variable the names on its path, and its bytes. Tracing a large model takes long."""

    def make() -> dict[str, Any]:
        variables = init_variables(VideoLLM(config), jax.random.key(0))
        return quantize_variables(config, variables)[1] if int8 else variables

    return tuple(
        (
            # The parts of a quantized kernel are attributes and have no key.
            frozenset(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)),
            leaf.size * leaf.dtype.itemsize,
        )
        for path, leaf in jax.tree.leaves_with_path(jax.eval_shape(make))
    )
