"""Vision towers (SigLIP, CLIP): configs and names, in and out.

Follows `SiglipVisionModel` and `CLIPVisionModel` of huggingface/transformers. Of a whole SigLIP or
CLIP only the tower is read; its text side has no place in a video LLM.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from videollm_mod_jax.conversion.hf_config import (
    inside,
    integer,
    number,
    refusal,
    require_one_of,
    require_type,
    table,
    with_defaults,
)
from videollm_mod_jax.conversion.llama import linear
from videollm_mod_jax.conversion.table import Rule, Table
from videollm_mod_jax.models import VisionConfig
from videollm_mod_jax.models.config import MOST_PATCHES

LAYOUTS: Mapping[str, str] = {"hf": "vision_model.", "hf-5": ""}
"""By layout: what the names of a tower begin with. transformers 5 dropped the prefix."""

POOL = (3, 3)
"""The spatial tokens of VideoLLM-online and VideoLLM-MoD, for a tower that states no others."""

_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "siglip_vision_model": {
        **_SIZES,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
    "clip_vision_model": {
        **_SIZES,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}
"""By model type: what transformers takes for keys that a config.json does not state."""

_WHOLE = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "gelu": "gelu"}
_MEAN_STD = {
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip_vision_model": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}


def vision_from_hf(
    hf: Mapping[str, Any], processor: Mapping[str, Any] | None, where: str
) -> VisionConfig:
    """The tower that a `config.json`, or a `vision_config` inside one, describes.

    Frame tokens are those of VideoLLM-online: the CLS token, if the tower has one, and 3 x 3 pooled
    patches.

    Args:
      hf: of a tower, or of a whole SigLIP or CLIP; it may state only what differs from
        transformers' defaults.
      processor: the `preprocessor_config.json` beside it, which states mean and standard deviation
        of pixels; None takes those of the family.
      where: the file, and the key inside it, for messages.

    Raises:
      UserError: another model type, or a variant that our tower does not compute; the key is named.
    """
    model_type = require_type(hf, (*DEFAULTS, *_WHOLE), "a vision tower", where)
    if model_type in _WHOLE:
        # Old CLIP configs hold both, and transformers lets this one win.
        key = "vision_config_dict" if hf.get("vision_config_dict") else "vision_config"
        hf, where = table(hf, key, where), inside(where, key)
        model_type = _WHOLE[model_type]
    values = with_defaults(DEFAULTS[model_type], hf)
    require_one_of(values, "num_channels", (3,), where)
    is_clip = model_type == "clip_vision_model"
    has_head = not is_clip and require_one_of(values, "vision_use_head", (True, False), where)
    summary = "class_token" if is_clip else "attention_pool" if has_head else "none"
    mean, std = _mean_std(model_type, processor, where)
    image_size = integer(values, "image_size", where, (VisionConfig, "image_size"))
    patch_size = integer(values, "patch_size", where, (VisionConfig, "patch_size"))
    if not 1 <= image_size // patch_size <= MOST_PATCHES:
        expected = f"1 to {MOST_PATCHES} patches along the side of image_size = {image_size}"
        raise refusal(where, "patch_size", patch_size, expected)
    width = integer(values, "hidden_size", where, (VisionConfig, "width"))
    num_heads = integer(values, "num_attention_heads", where, (VisionConfig, "num_heads"))
    if width % num_heads:
        expected = f"a divisor of hidden_size = {width}"
        raise refusal(where, "num_attention_heads", num_heads, expected)
    return VisionConfig(
        architecture="clip" if is_clip else "siglip",
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        mlp_width=integer(values, "intermediate_size", where, (VisionConfig, "mlp_width")),
        num_layers=integer(values, "num_hidden_layers", where, (VisionConfig, "num_layers")),
        unused_blocks=0,
        num_heads=num_heads,
        norm_eps=number(values, "layer_norm_eps", where, (VisionConfig, "norm_eps")),
        activation=_ACTIVATIONS[require_one_of(values, "hidden_act", tuple(_ACTIVATIONS), where)],
        final_norm=not is_clip,
        pooling_head=has_head,
        summary=summary,
        pool=POOL,
        pooling="average",
        mean=mean,
        std=std,
    )


def vision_to_hf(config: VisionConfig) -> dict[str, Any]:
    """The `config.json` of a tower; the inverse, but for frame tokens and pixel statistics."""
    is_clip = config.architecture == "clip"
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    hf = {
        "architectures": ["CLIPVisionModel" if is_clip else "SiglipVisionModel"],
        "model_type": "clip_vision_model" if is_clip else "siglip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": names[config.activation],
        "layer_norm_eps": config.norm_eps,
    }
    return hf if is_clip else {**hf, "vision_use_head": config.pooling_head}


def vision_table(config: VisionConfig, prefix: str) -> Table:
    """Where a tower's tensors go.

    Blocks behind the one whose output is read never run, but stay for the way back:

    ```
    num_layers 24, unused_blocks 1 (LLaVA-1.5)
    encoder.layers.0 ... encoder.layers.22     params/vision/blocks/...          [23, ...]
    encoder.layers.23                          params/vision/unused_blocks/...   [1, ...]
    ```

    Args:
      config: of the tower.
      prefix: of the names, such as `vision_tower.vision_model.`.
    """
    vision = "params/vision/"
    rules = [
        Rule(
            source=f"{prefix}embeddings.patch_embedding.weight",  # [W, 3, size, size]
            target=vision + "patch_embedding/kernel",  # [size, size, 3, W]
            axes=(2, 3, 1, 0),
        ),
        Rule(
            source=f"{prefix}embeddings.position_embedding.weight",
            target=vision + "position_embedding",
        ),
        *_norm(f"{prefix}post_layernorm", vision + "post_norm"),
    ]
    tokens = config.patches_per_side**2
    if config.architecture == "clip":
        tokens += 1
        source = f"{prefix}embeddings.class_embedding"
        rules.append(Rule(source=source, target=vision + "class_embedding"))
        rules.extend(_norm(f"{prefix}pre_layrnorm", vision + "pre_norm"))
    else:
        source = f"{prefix}embeddings.patch_embedding.bias"
        rules.append(Rule(source=source, target=vision + "patch_embedding/bias"))
    used = config.num_layers - config.unused_blocks
    unused = tuple(range(used, config.num_layers))
    rules.extend(_blocks(prefix, vision + "blocks/", tuple(range(used))))
    if unused:
        rules.extend(_blocks(prefix, vision + "unused_blocks/", unused))
    if config.pooling_head:
        rules.extend(_head(f"{prefix}head.", vision + "head/"))
    return Table(
        rules=tuple(rules),
        buffers={f"{prefix}embeddings.position_ids": lambda: np.arange(tokens)[None]},
    )


def tower_table(config: VisionConfig, prefix: str) -> Table:
    """The same for a tower in its own directory, which may be that of a whole SigLIP or CLIP."""
    text = "belongs to the text side, which a video LLM does not have"
    names = (r"text_model\..*", r"(text|visual)_projection\.weight", "logit_scale", "logit_bias")
    tower = vision_table(config, prefix)
    return Table(rules=tower.rules, buffers=tower.buffers, left_out=dict.fromkeys(names, text))


def _blocks(prefix: str, target: str, layers: tuple[int, ...]) -> list[Rule]:
    source = prefix + "encoder.layers.{i}."
    rules = [
        *_norm(source + "layer_norm1", target + "norm1", layers),
        *_norm(source + "layer_norm2", target + "norm2", layers),
    ]
    for theirs, ours in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
        rules.extend(_affine(f"{source}self_attn.{theirs}", f"{target}attention/{ours}", layers))
    for name in ("fc1", "fc2"):
        rules.extend(_affine(f"{source}mlp.{name}", f"{target}mlp/{name}", layers))
    return rules


def _head(source: str, target: str) -> list[Rule]:
    """SigLIP's pooling head, whose query, key and value kernels are one tensor [3 W, W]."""
    rules = [Rule(source=source + "probe", target=target + "probe")]
    for p, name in enumerate("qkv"):
        ours = f"{target}attention/{name}"
        part, packed = (p, 3), f"{source}attention.in_proj_"
        kernel = Rule(source=packed + "weight", target=f"{ours}/kernel", axes=(1, 0), part=part)
        rules += [kernel, Rule(source=packed + "bias", target=f"{ours}/bias", part=part)]
    rules.extend(_affine(f"{source}attention.out_proj", f"{target}attention/o"))
    rules.extend(_norm(f"{source}layernorm", f"{target}norm"))
    for name in ("fc1", "fc2"):
        rules.extend(_affine(f"{source}mlp.{name}", f"{target}mlp/{name}"))
    return rules


def _affine(source: str, target: str, layers: tuple[int, ...] = ()) -> list[Rule]:
    bias = Rule(source=f"{source}.bias", target=f"{target}/bias", layers=layers)
    return [linear(source, target, layers), bias]


def _norm(source: str, target: str, layers: tuple[int, ...] = ()) -> list[Rule]:
    return [
        Rule(source=f"{source}.weight", target=f"{target}/scale", layers=layers),
        Rule(source=f"{source}.bias", target=f"{target}/bias", layers=layers),
    ]


def _mean_std(
    model_type: str, processor: Mapping[str, Any] | None, where: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    statistics, where = [], f"{where} (its processor)"
    fields = (("image_mean", "mean"), ("image_std", "std"))
    for (key, field), default in zip(fields, _MEAN_STD[model_type], strict=True):
        value = (processor or {}).get(key)
        value = list(default) if value is None else value
        if not isinstance(value, list) or len(value) != 3:
            raise refusal(where, key, value, "a list of three numbers")
        numbers = {f"{key}[{i}]": v for i, v in enumerate(value)}
        becomes = (VisionConfig, field)
        statistics.append(tuple(number(numbers, name, where, becomes) for name in numbers))
    return statistics[0], statistics[1]
