"""Tiny random models of transformers, from their real config classes, saved as the Hub has them.

Importing this file needs torch and transformers; tests that use it begin with `importorskip`.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.tiny_conversion import LINES
from videollm_mod_jax.conversion.families import plan_conversion
from videollm_mod_jax.conversion.loading import load_hf
from videollm_mod_jax.conversion.plan import Options
from videollm_mod_jax.data.tokenizer import BOS, EOS, train_bpe
from videollm_mod_jax.models import full_computation
from videollm_mod_jax.training.checkpoint import LoadedModel

IMAGE, VIDEO = "<image>", "<video>"
IMAGE_ID, VIDEO_ID = 291, 292  # behind the tokens that `train_bpe` finds in the lines
TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
}
CLIP = {**VISION, "model_type": "clip_vision_model", "image_size": 16}
# Two pixels more than three patches, as SigLIP so400m has six more than 27.
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "image_size": 14}


def pinpoints(size: int) -> list[list[int]]:
    """Crops of up to 3 x 3."""
    return [[size * rows, size * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def perturbed(model, seed: int = 0):
    """The model in evaluation mode, with noise on every parameter.

    Norm scales and biases are one and zero at the start, and logits nearly flat; with noise, any
    tensor that is skipped or swapped shows.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.15 if parameter.ndim > 1 else 0.1
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def made(model_class, config):
    """A random model, the same one every time."""
    torch.manual_seed(0)
    return perturbed(model_class(config))


def llama(**changes):
    """LlamaForCausalLM with grouped queries."""
    config = transformers.LlamaConfig(**{**TEXT, **changes})
    return made(transformers.LlamaForCausalLM, config)


def qwen2(**changes):
    """Qwen2ForCausalLM, which has biases on q, k and v."""
    config = transformers.Qwen2Config(**{**TEXT, **changes})
    return made(transformers.Qwen2ForCausalLM, config)


def siglip(**changes):
    """SiglipVisionModel with its pooling head."""
    config = transformers.SiglipVisionConfig(**{**SIGLIP, **changes})
    return made(transformers.SiglipVisionModel, config)


def clip(**changes):
    """CLIPVisionModel."""
    config = transformers.CLIPVisionConfig(**{**CLIP, **changes})
    return made(transformers.CLIPVisionModel, config)


def llava(**changes):
    """LLaVA-1.5: Llama and CLIP, read behind all blocks but one."""
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=CLIP,
        image_token_index=IMAGE_ID,
        **changes,
    )
    return made(transformers.LlavaForConditionalGeneration, config)


def llava_next_video(**changes):
    """LLaVA-NeXT-Video: pictures in crops, video frames averaged over 2 x 2 patches."""
    rope = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10_000.0}
    config = transformers.LlavaNextVideoConfig(
        text_config={**TEXT, "model_type": "llama", "rope_parameters": rope},
        vision_config=CLIP,
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        image_grid_pinpoints=pinpoints(16),
        **changes,
    )
    return made(transformers.LlavaNextVideoForConditionalGeneration, config)


def llava_onevision(**changes):
    """LLaVA-OneVision: Qwen2 and SigLIP, which is read behind its last block."""
    config = transformers.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**SIGLIP, "vision_use_head": False},
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        image_grid_pinpoints=pinpoints(14),
        vision_aspect_ratio="anyres_max_4",
        **changes,
    )
    return made(transformers.LlavaOnevisionForConditionalGeneration, config)


def tokenizer(directory: Path):
    """A byte-level BPE with the tokens for pictures and videos, as transformers wraps it."""
    train_bpe(LINES, 300).save(directory)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=[IMAGE, VIDEO],
    )
    assert made.convert_tokens_to_ids([IMAGE, VIDEO]) == [IMAGE_ID, VIDEO_ID]
    return made


def processor(model, directory: Path):
    """The family's own processor.

    Without torchvision, transformers cannot make the ones for video; ours then takes its place,
    behind the same resizing, cropping and normalising.
    """
    vision = model.config.vision_config
    kind, size = model.config.model_type, vision.image_size
    names = {
        "llava": "Llava",
        "llava_next_video": "LlavaNextVideo",
        "llava_onevision": "LlavaOnevision",
    }
    pieces = {"tokenizer": tokenizer(directory)}
    square = {"height": size, "width": size}
    if kind == "llava":
        pieces["image_processor"] = transformers.CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size=square
        )
    elif kind == "llava_next_video":
        pieces["image_processor"] = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": size}, crop_size=square, image_grid_pinpoints=pinpoints(size)
        )
    else:
        pieces["image_processor"] = transformers.LlavaOnevisionImageProcessor(
            size=square, image_grid_pinpoints=pinpoints(size)
        )
    settings = {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}
    if kind == "llava_onevision":
        settings["num_image_tokens"] = (size // vision.patch_size) ** 2
        settings["vision_aspect_ratio"] = model.config.vision_aspect_ratio
    else:
        settings |= {"patch_size": vision.patch_size, "num_additional_image_tokens": 1}
    made = getattr(transformers, f"{names[kind]}Processor")
    if kind != "llava":
        pieces["video_processor"], made = _video_processor(made, kind, square)
    return made(**pieces, **settings)


def save(model, directory: Path) -> Path:
    """Writes weights, config and, with a language model, the tokenizer."""
    model.save_pretrained(directory)
    if not model.config.model_type.endswith("vision_model"):
        tokenizer(directory).save_pretrained(directory)
    return directory


def _video_processor(processor_class, kind: str, square: dict):
    names = {
        "llava_next_video": "LlavaNextVideoVideoProcessor",
        "llava_onevision": "LlavaOnevisionVideoProcessor",
    }
    try:
        import torchvision  # noqa: F401

        size = (
            {"size": square}
            if kind == "llava_onevision"
            else {"size": {"shortest_edge": square["height"]}, "crop_size": square}
        )
        return getattr(transformers, names[kind])(**size), processor_class
    except (ImportError, RuntimeError):
        pass

    class WithoutTorchvision(processor_class):
        def check_argument_for_proper_class(self, argument_name, argument):
            pass

    return _FrameProcessor(square), WithoutTorchvision


class _FrameProcessor:
    """Frames of a video through CLIP's image processor."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, square: dict):
        self._frames = transformers.CLIPImageProcessor(
            size={"shortest_edge": square["height"]}, crop_size=square
        )

    def __call__(self, videos, **_):
        pixels = self._frames(images=list(videos), return_tensors="np")["pixel_values"]
        return {"pixel_values_videos": torch.from_numpy(np.asarray(pixels))[None]}


def save_original(model, directory: Path, *, with_tower: bool = False) -> dict[str, Path]:
    """Writes a `llava` as its authors did: language model and connector here, the tower there.

    Args:
      model: from `llava`.
      directory: of both.
      with_tower: repeats the tower inside the language model's file.

    Returns:
      the directories, `model` and `vision_tower`.
    """
    config, state, towers = model.config, {}, {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            tower_name = "vision_model." + name.removeprefix("model.vision_tower.")
            towers[tower_name] = tensor
            if with_tower:
                state["model.vision_tower.vision_tower." + tower_name] = tensor.clone()
        elif ".multi_modal_projector." in name:
            place = "0" if "linear_1" in name else "2"
            state[f"model.mm_projector.{place}.{name.rpartition('.')[2]}"] = tensor
        else:
            state[name.replace("model.language_model.", "model.")] = tensor
    hf = {
        **config.text_config.to_dict(),
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": "somebody/a-clip",
    }
    parts = {"model": (state, hf), "vision_tower": (towers, config.vision_config.to_dict())}
    for role, (tensors, values) in parts.items():
        (directory / role).mkdir(parents=True)
        torch.save(tensors, directory / role / "pytorch_model.bin")
        (directory / role / "config.json").write_text(json.dumps(values))
    tokenizer(directory / "model").save_pretrained(directory / "model")
    return {role: directory / role for role in parts}


def convert(directory: Path, **options) -> LoadedModel:
    """The converted model of a directory, computing every token."""
    loaded = load_hf(plan_conversion(directory, Options(**options)))
    config = dataclasses.replace(loaded.config, routing=full_computation())
    return dataclasses.replace(loaded, config=config)
