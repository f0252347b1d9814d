"""Published architectures by name, with the Hugging Face config that each one repeats."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.config import DecoderConfig, VisionConfig

Config = TypeVar("Config")

DECODERS: Mapping[str, DecoderConfig] = {
    # For tests and the digits_stream task; the vocabulary is replaced by the tokenizer's.
    "tiny": DecoderConfig(
        vocab_size=512,
        hidden_size=128,
        mlp_size=384,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=10_000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
    ),
    # meta-llama/Meta-Llama-3-8B-Instruct; the rescaled RoPE came with Llama 3.1.
    "llama3-8b": DecoderConfig(
        vocab_size=128_256,
        hidden_size=4096,
        mlp_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500_000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
    ),
    # meta-llama/Llama-2-7b-chat-hf
    "llama2-7b": DecoderConfig(
        vocab_size=32_000,
        hidden_size=4096,
        mlp_size=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        rope_theta=10_000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
    ),
    # Qwen/Qwen2-7B-Instruct
    "qwen2-7b": DecoderConfig(
        vocab_size=152_064,
        hidden_size=3584,
        mlp_size=18_944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        rope_theta=1_000_000.0,
        rope_scaling=None,
        norm_eps=1e-6,
        qkv_bias=True,
        tie_embeddings=False,
    ),
}

VISION: Mapping[str, VisionConfig] = {
    # Small SigLIP-like tower for digits_stream. A patch is as large as a place of the canvas, and a
    # trembling digit reaches into its neighbours; patches of 8 learn identity ten times slower.
    "digits-vit": VisionConfig(
        architecture="siglip",
        image_size=48,
        patch_size=16,
        width=64,
        mlp_width=256,
        num_layers=2,
        unused_blocks=0,
        num_heads=4,
        norm_eps=1e-6,
        activation="gelu_tanh",
        final_norm=True,
        pooling_head=True,
        summary="attention_pool",
        pool=(3, 3),
        pooling="average",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    # For digits_scenes: no block, so that every patch stands for itself and the decoder has to put
    # digits together; only the CLS token sees the whole frame.
    "scenes-vit": VisionConfig(
        architecture="siglip",
        image_size=60,
        patch_size=12,
        width=64,
        mlp_width=128,
        num_layers=0,
        unused_blocks=0,
        num_heads=4,
        norm_eps=1e-6,
        activation="gelu_tanh",
        final_norm=True,
        pooling_head=True,
        summary="attention_pool",
        pool=(5, 5),
        pooling="average",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    # google/siglip-large-patch16-384
    "siglip-l16-384": VisionConfig(
        architecture="siglip",
        image_size=384,
        patch_size=16,
        width=1024,
        mlp_width=4096,
        num_layers=24,
        unused_blocks=0,
        num_heads=16,
        norm_eps=1e-6,
        activation="gelu_tanh",
        final_norm=True,
        pooling_head=True,
        summary="attention_pool",
        pool=(3, 3),
        pooling="average",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    # google/siglip-so400m-patch14-384
    "siglip-so400m-384": VisionConfig(
        architecture="siglip",
        image_size=384,
        patch_size=14,
        width=1152,
        mlp_width=4304,
        num_layers=27,
        unused_blocks=0,
        num_heads=16,
        norm_eps=1e-6,
        activation="gelu_tanh",
        final_norm=True,
        pooling_head=True,
        summary="attention_pool",
        pool=(3, 3),
        pooling="average",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    # openai/clip-vit-large-patch14-336
    "clip-l14-336": VisionConfig(
        architecture="clip",
        image_size=336,
        patch_size=14,
        width=1024,
        mlp_width=4096,
        num_layers=24,
        unused_blocks=0,
        num_heads=16,
        norm_eps=1e-5,
        activation="quick_gelu",
        final_norm=False,
        pooling_head=False,
        summary="class_token",
        pool=(3, 3),
        pooling="average",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
}


def decoder_preset(name: str) -> DecoderConfig:
    """The decoder called `name`, a key of `DECODERS`.

    Raises:
      UserError: there is none; the message lists those there are.
    """
    return _look_up(DECODERS, name, "decoder")


def vision_preset(name: str) -> VisionConfig:
    """The vision tower called `name`, a key of `VISION`.

    Raises:
      UserError: there is none; the message lists those there are.
    """
    return _look_up(VISION, name, "vision")


def _look_up(presets: Mapping[str, Config], name: str, kind: str) -> Config:
    if name not in presets:
        close = difflib.get_close_matches(name, presets, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown {kind} preset {name!r}; {hint}known: {', '.join(presets)}")
    return presets[name]
