"""Tiny models and batches that several test files share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from videollm_mod_jax.models import (
    NO_LORA,
    DecoderConfig,
    RoutingConfig,
    VideoLLMConfig,
    VisionConfig,
)

DECODER = DecoderConfig(
    vocab_size=48,
    hidden_size=32,
    mlp_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=10_000.0,
    rope_scaling=None,
    norm_eps=1e-5,
    qkv_bias=False,
    tie_embeddings=False,
)

VISION = VisionConfig(
    architecture="siglip",
    image_size=16,
    patch_size=4,
    width=12,
    mlp_width=24,
    num_layers=1,
    unused_blocks=0,
    num_heads=2,
    norm_eps=1e-6,
    activation="gelu_tanh",
    final_norm=True,
    pooling_head=True,
    summary="attention_pool",
    pool=(2, 2),
    pooling="average",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)

ROUTING = RoutingConfig(
    insertion="interleaved",
    keep_ratio=0.4,
    selection="learned",
    weighting="paper",
    force_keep_last=False,
    exploration=0.0,
)

CONFIG = VideoLLMConfig(
    decoder=DECODER,
    routing=ROUTING,
    lora=NO_LORA,
    vision=VISION,
    newline=False,
    dtype="float32",
    param_dtype="float32",
)


def routed(config: VideoLLMConfig = CONFIG, **changes) -> VideoLLMConfig:
    """`config` with its routing changed."""
    return dataclasses.replace(config, routing=dataclasses.replace(config.routing, **changes))


def layout(rng: np.random.Generator, text: int, frames: int, tokens_per_frame: int):
    """A random temporal interleaving: (sequence length, frame_starts_F)."""
    after = np.sort(rng.integers(0, text + 1, size=frames))
    starts = after + np.arange(frames) * tokens_per_frame
    return text + frames * tokens_per_frame, starts.astype(np.int32)


def batch(seed: int, text: int, frames: int, batch_size: int = 2, config: VideoLLMConfig = CONFIG):
    """Random arguments of `VideoLLM.__call__`, each example with its own interleaving.

    Logits are asked for at every position.
    """
    rng = np.random.default_rng(seed)
    N, W = config.tokens_per_frame, config.vision.width
    layouts = [layout(rng, text, frames, N) for _ in range(batch_size)]
    S = layouts[0][0]
    return {
        "tokens_BS": jnp.asarray(rng.integers(0, config.decoder.vocab_size, (batch_size, S))),
        "features_BFNW": jnp.asarray(
            rng.normal(size=(batch_size, frames, N, W)).astype(np.float32)
        ),
        "frame_starts_BF": jnp.asarray(np.stack([starts for _, starts in layouts])),
        "logit_positions_BJ": jnp.tile(jnp.arange(S), (batch_size, 1)),
    }


def spread(variables, scale: float = 1.0, seed: int = 5):
    """Random routers and adapters, so that no gate or update is trivially zero."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(variables)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def change(path, leaf, key):
        names = [entry.key for entry in path]
        if "router" in names or names[0] == "lora":
            width = leaf.shape[-1] if leaf.ndim else 1
            return scale * jax.random.normal(key, leaf.shape, leaf.dtype) * width**-0.5
        return leaf

    return jax.tree.unflatten(
        structure, [change(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    )
