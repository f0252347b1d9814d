"""The LLaVA families: configs and names, in and out.

Follows `LlavaForConditionalGeneration`, `LlavaNextVideoForConditionalGeneration` and
`LlavaOnevisionForConditionalGeneration` of huggingface/transformers, and `llava_arch.py`,
`clip_encoder.py` of haotian-liu/LLaVA for the original layout.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from videollm_mod_jax.conversion.hf_config import (
    inside,
    integer,
    named,
    refusal,
    refuse_keys,
    require_one_of,
    table,
    with_defaults,
)
from videollm_mod_jax.conversion.llama import decoder_from_hf, decoder_table, decoder_to_hf, linear
from videollm_mod_jax.conversion.table import Rule, Table, join
from videollm_mod_jax.conversion.vision import vision_from_hf, vision_table, vision_to_hf
from videollm_mod_jax.errors import UserError, shown
from videollm_mod_jax.models import DecoderConfig, VideoLLMConfig, VisionConfig, anyres


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What the names of each component begin with.

    Attributes:
      decoder: names inside the language model.
      head: names of its output head.
      vision: names inside the tower; None where it lies in a directory of its own.
      connector: its two linears.
      newline: the whole name of the embedding that ends a row.
    """

    decoder: str
    head: str
    vision: str | None
    connector: tuple[str, str]
    newline: str

    def probes(self) -> tuple[str, ...]:
        """One name per component, by which the layout is recognised."""
        probes = (f"{self.decoder}norm.weight", f"{self.connector[0]}.weight")
        if self.vision is None:
            return probes
        return (*probes, f"{self.vision}embeddings.patch_embedding.weight")


def _hf_layout(inner: str, decoder: str, head: str, vision: str) -> Layout:
    projector = inner + "multi_modal_projector."
    return Layout(
        decoder=decoder,
        head=head,
        vision=inner + vision,
        connector=(projector + "linear_1", projector + "linear_2"),
        newline=inner + "image_newline",
    )


_ORIGINAL = Layout(
    decoder="model.",
    head="lm_head.",
    vision=None,
    connector=("model.mm_projector.0", "model.mm_projector.2"),
    newline="model.image_newline",
)
HF_LAYOUTS: Mapping[str, Layout] = {
    "hf-4.0": _hf_layout(
        "", "language_model.model.", "language_model.lm_head.", "vision_tower.vision_model."
    ),
    "hf-4.52": _hf_layout(
        "model.", "model.language_model.", "lm_head.", "vision_tower.vision_model."
    ),
    # What `save_pretrained` of transformers 5 writes, and the names of its modules.
    "hf-5": _hf_layout("", "language_model.model.", "language_model.lm_head.", "vision_tower."),
    "hf-5-modules": _hf_layout("model.", "model.language_model.", "lm_head.", "vision_tower."),
}
ORIGINAL_LAYOUTS: Mapping[str, Layout] = {
    "original": _ORIGINAL,
    "original-with-tower": dataclasses.replace(
        _ORIGINAL, vision="model.vision_tower.vision_tower.vision_model."
    ),
}

LAYOUTS: Mapping[str, Layout] = {**HF_LAYOUTS, **ORIGINAL_LAYOUTS}
"""By name: every key layout of a LLaVA."""

_ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
_DEFAULTS: Mapping[str, Any] = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llava": _DEFAULTS,
    "llava_next_video": {
        **_DEFAULTS,
        "spatial_pool_mode": "average",
        "spatial_pool_stride": 2,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "llava_onevision": {
        **_DEFAULTS,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        "vision_aspect_ratio": "anyres_max_9",
    },
}
"""By model type: what transformers takes for keys that a config.json does not state."""

# Of sub-configs that do not state their model type.
TEXT_TYPE = {"llava": "llama", "llava_next_video": "llama", "llava_onevision": "qwen2"}
VISION_TYPE = {
    "llava": "clip_vision_model",
    "llava_next_video": "clip_vision_model",
    "llava_onevision": "siglip_vision_model",
}


def llava_from_hf(
    hf: Mapping[str, Any], processor: Mapping[str, Any] | None, where: str
) -> tuple[DecoderConfig, VisionConfig]:
    """The decoder and the tower that a `config.json` of transformers describes.

    A video frame has the tokens that the family gives it: LLaVA-1.5 all patches, LLaVA-NeXT-Video
    the patches averaged over squares of `spatial_pool_stride`, LLaVA-OneVision the embedded patches
    resized to half the side, rounded up.

    Args:
      hf: model type `llava`, `llava_next_video` or `llava_onevision`.
      processor: the `preprocessor_config.json` beside it, or None.
      where: the file, for messages.

    Raises:
      UserError: a variant that our model does not compute; the key is named.
    """
    family = require_one_of(hf, "model_type", tuple(DEFAULTS), where)
    values = with_defaults(DEFAULTS[family], hf)
    refuse_keys(values, {"quantization_config": "take the model that is not quantised"}, where)
    require_one_of(values, "projector_hidden_act", ("gelu",), where)
    require_one_of(values, "multimodal_projector_bias", (True,), where)
    text = with_defaults({"model_type": TEXT_TYPE[family]}, table(values, "text_config", where))
    if require_one_of(values, "tie_word_embeddings", (True, False), where):
        text["tie_word_embeddings"] = True
    vision_hf = with_defaults(
        {"model_type": VISION_TYPE[family]}, table(values, "vision_config", where)
    )
    vision = vision_from_hf(vision_hf, processor, inside(where, "vision_config"))
    vision = _features(
        vision,
        layer=values["vision_feature_layer"],
        has_class_token=_keeps_class_token(family, values, vision, where),
        where=named(where, "vision_feature_layer"),
    )
    if family == "llava_next_video":
        vision = dataclasses.replace(vision, pool=_strided(values, vision, where))
    elif family == "llava_onevision":
        half = -(-vision.patches_per_side // 2)
        vision = dataclasses.replace(vision, pool=(half, half), pooling="bilinear")
    return decoder_from_hf(text, inside(where, "text_config")), vision


def crops(hf: Mapping[str, Any], vision: VisionConfig, where: str) -> anyres.AnyResolution:
    """How a family cuts pictures into crops.

    Args:
      hf: model type `llava_next_video` or `llava_onevision`.
      vision: the tower.
      where: the file, for messages.

    Raises:
      UserError: a size of `image_grid_pinpoints` is none, or `vision_aspect_ratio` is none that the
        family has.
    """
    values = with_defaults(DEFAULTS[hf["model_type"]], hf)
    key, side = "image_grid_pinpoints", (VisionConfig, "image_size")
    pinpoints = values[key]
    if not isinstance(pinpoints, list) or not 0 < len(pinpoints) <= 256:
        raise refusal(where, key, pinpoints, "1 to 256 pairs [height, width]")
    for i, pair in enumerate(pinpoints):
        if not isinstance(pair, list) or len(pair) != 2:
            raise refusal(where, f"{key}[{i}]", pair, "[height, width] in pixels")
        for j, pixels in enumerate(pair):
            name = f"{key}[{i}][{j}]"
            integer({name: pixels}, name, where, side)
            if pixels % vision.image_size:
                expected = f"a multiple of the tower's image_size = {vision.image_size}"
                raise refusal(where, name, pixels, expected)
    most = None
    if "vision_aspect_ratio" in values:
        ratio = values["vision_aspect_ratio"]
        found = re.fullmatch(r"anyres_max_([1-9]\d{0,2})", str(ratio))
        if found is None:
            raise refusal(where, "vision_aspect_ratio", ratio, "anyres_max_N, such as anyres_max_9")
        most = int(found[1])
    return anyres.AnyResolution(
        pinpoints=tuple(map(tuple, pinpoints)),
        image_size=vision.image_size,
        side=vision.patches_per_side,
        max_crops=most if hf["model_type"] == "llava_onevision" else None,
    )


def original_from_hf(
    hf: Mapping[str, Any], vision: VisionConfig, where: str, vision_where: str
) -> tuple[DecoderConfig, VisionConfig]:
    """The decoder and the tower that a `config.json` of the original LLaVA-1.5 describes.

    Args:
      hf: of the language model, with keys `mm_*`.
      vision: the tower that its `mm_vision_tower` names, from its own directory.
      where: the file, for messages.
      vision_where: the tower's directory, for messages.

    Raises:
      UserError: a variant that our model does not compute; the key is named.
    """
    values = with_defaults(
        {
            "mm_projector_type": "linear",
            "mm_vision_select_feature": "patch",
            "mm_patch_merge_type": "flat",
        },
        hf,
    )
    require_one_of(values, "model_type", ("llava", "llava_llama"), where)
    require_one_of(values, "mm_projector_type", ("mlp2x_gelu",), where)
    require_one_of(values, "mm_patch_merge_type", ("flat",), where)
    features = ("patch", "cls_patch")
    feature = require_one_of(values, "mm_vision_select_feature", features, where)
    if vision.architecture != "clip":
        raise UserError(
            f"{vision_where} holds a SigLIP tower; {where} asks for "
            f"{shown(hf.get('mm_vision_tower'))}, and the original LLaVA reads CLIP towers only"
        )
    layer = values.get("mm_vision_select_layer")
    where_layer = named(where, "mm_vision_select_layer")
    vision = _features(vision, layer, feature == "cls_patch", where_layer)
    return decoder_from_hf({**hf, "model_type": "llama"}, where), vision


def llava_to_hf(config: VideoLLMConfig, family: str) -> dict[str, Any]:
    """The `config.json` of a model that was made here; the inverse of `llava_from_hf`.

    Ids of image and video tokens belong to a tokenizer's vocabulary and are left to transformers'
    defaults.

    Args:
      config: with decoder and tower.
      family: `llava`, `llava_next_video` or `llava_onevision`.

    Raises:
      UserError: the family cannot say what the model computes.
    """
    config.require("decoder", "vision")
    vision, side = config.vision, config.vision.patches_per_side
    half = -(-side // 2)
    stride = max(side // max(vision.pool[0], 1), 1)
    pools = {
        "llava": ((side, side), vision.pooling),
        "llava_next_video": ((side // stride, side // stride), "average"),
        "llava_onevision": ((half, half), "bilinear"),
    }
    strategy = "default" if vision.architecture == "clip" else "full"
    if vision.summary == "class_token" and family == "llava":
        strategy = "full"
    elif vision.summary != "none":
        raise _inexpressible("vision.summary", vision.summary, family)
    if vision.final_norm:
        raise _inexpressible("vision.final_norm", vision.final_norm, family)
    if (vision.pool, vision.pooling) != pools[family] or (side % stride and family != "llava"):
        raise _inexpressible("vision.pool", f"{vision.pool} ({vision.pooling})", family)
    if config.newline != (family != "llava"):
        raise _inexpressible("newline", config.newline, family)
    hf = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "text_config": decoder_to_hf(config.decoder),
        "vision_config": vision_to_hf(vision),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1 - vision.unused_blocks,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": config.decoder.tie_embeddings,
    }
    if family == "llava_next_video":
        hf |= {"spatial_pool_mode": "average", "spatial_pool_stride": stride}
    return hf


def llava_table(
    decoder: DecoderConfig, vision: VisionConfig, newline: bool, layout: Layout
) -> Table:
    """Where the tensors of a LLaVA go.

    Args:
      decoder: of the model.
      vision: of the model.
      newline: the model has the embedding that ends a row.
      layout: one of `LAYOUTS`.
    """
    connector = []
    for theirs, ours in zip(layout.connector, ("fc1", "fc2"), strict=True):
        target = f"params/connector/{ours}"
        bias = Rule(source=f"{theirs}.bias", target=f"{target}/bias")
        connector += [linear(theirs, target), bias]
    if newline:
        connector.append(Rule(source=layout.newline, target="params/newline"))
    tables = [
        decoder_table(decoder, layout.decoder, layout.head),
        Table(rules=tuple(connector)),
    ]
    if layout.vision is not None:
        tables.append(vision_table(vision, layout.vision))
    return join(*tables)


def _features(vision: VisionConfig, layer: Any, has_class_token: bool, where: str) -> VisionConfig:
    """The tower read at a hidden state, which transformers counts from the input of block 0.

    ```
    24 blocks   hidden state 0 (or -25): input of block 0     not supported
                             23 (or -2): behind 23 blocks     unused_blocks 1
                             24 (or -1): behind all blocks    unused_blocks 0
    ```
    """
    num_layers = vision.num_layers
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise UserError(f"{where} is {shown(layer)}; expected one whole number")
    blocks = layer if layer >= 0 else num_layers + 1 + layer
    if not 1 <= blocks <= num_layers:
        raise UserError(
            f"{where} is {shown(layer)}; expected the output of one of {num_layers} blocks"
        )
    side = vision.patches_per_side
    return dataclasses.replace(
        vision,
        unused_blocks=num_layers - blocks,
        final_norm=False,
        summary="class_token" if has_class_token else "none",
        pool=(side, side),
    )


def _keeps_class_token(
    family: str, values: Mapping[str, Any], vision: VisionConfig, where: str
) -> bool:
    """Whether the first token is a class token that reaches the connector (strategy `full`)."""
    key = "vision_feature_select_strategy"
    strategy = require_one_of(values, key, ("default", "full"), where)
    if vision.architecture == "siglip":
        if strategy == "default":
            raise refusal(where, key, strategy, "'full': it would drop a patch of a SigLIP tower")
        return False
    if strategy == "full" and family != "llava":
        raise refusal(where, key, strategy, "'default': a class token has no place in pooled rows")
    return strategy == "full"


def _strided(values: Mapping[str, Any], vision: VisionConfig, where: str) -> tuple[int, int]:
    require_one_of(values, "spatial_pool_mode", ("average",), where)
    stride, side = integer(values, "spatial_pool_stride", where), vision.patches_per_side
    if stride < 1 or side % stride:  # so that every patch is in one square
        raise refusal(where, "spatial_pool_stride", stride, f"a divisor of {side}, the patch side")
    return side // stride, side // stride


def _inexpressible(field: str, value: Any, family: str) -> UserError:
    return UserError(
        f"{field} is {value}, which the config.json of a {family} cannot say; export the parts "
        "one by one instead"
    )
