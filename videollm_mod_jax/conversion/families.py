"""The families of checkpoints: which there are, and how a directory of one is converted."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from videollm_mod_jax.conversion import adapter, drafting, live, llama, llava, vision
from videollm_mod_jax.conversion.plan import Conversion, Draft, Options, complete
from videollm_mod_jax.conversion.source import Source, open_source
from videollm_mod_jax.conversion.table import Table
from videollm_mod_jax.errors import UserError, shown
from videollm_mod_jax.models import VideoLLMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """One directory that a part of a model is exported to.

    Attributes:
      table: what its tensors are made of.
      config: its `config.json`.
      note: what that cannot say of the model; empty if it says all.
    """

    table: Table
    config: Mapping[str, Any]
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
    """A kind of checkpoint, for `--help`, `inspect` and documentation.

    Attributes:
      name: as messages and `Part.family` say it.
      title: for people.
      examples: names on the Hub.
    """

    name: str
    title: str
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(Listed):
    """A kind of checkpoint that is no adapter.

    Attributes:
      model_types: in `config.json`.
      draft: from (config.json, tensors, options) to what becomes of them.
      export: from (model, layout, the config.json it came with or None) to one directory.
      layouts: of the names, which an export restores.
      layout: that of a directory made from a model that came from none.
    """

    model_types: tuple[str, ...]
    draft: Callable[[Mapping[str, Any], Source, Options], Draft]
    export: Callable[[VideoLLMConfig, str, Mapping[str, Any] | None], Export]
    layouts: tuple[str, ...]
    layout: str


def plan_conversion(directory: Path, options: Options) -> Conversion:
    """Recognises the family of a directory and plans its conversion; reads no tensor.

    Args:
      directory: as downloaded from the Hub.
      options: what the user asks for.

    Raises:
      UserError: an unknown family, a variant that our model does not compute, weights that do not
        fit their config.json, or options that do not fit the family.
    """
    if adapter.is_adapter(directory):
        return complete(adapter.draft_adapter(directory, options, draft_model), options)
    for flag, value in (("--base", options.base), ("--merge", options.merge)):
        if value:
            raise UserError(f"{flag} is for adapters; {directory} holds no adapter_config.json")
    return complete(draft_model(directory, options), options)


def draft_model(directory: Path, options: Options) -> Draft:
    """What a directory becomes that is no adapter, unchecked; adapters build on it.

    Raises:
      UserError: as `plan_conversion`, as far as configs alone tell.
    """
    hf = drafting.read_config(directory)
    family = find_family(hf, str(directory / drafting.CONFIG))
    return family.draft(hf, open_source(directory), options)


def check_supported(directory: Path) -> None:
    """Checks that a directory's config is one that can be converted; needs no weights.

    Raises:
      UserError: no family has its model type, or there is no config.
    """
    if not adapter.is_adapter(directory):
        find_family(drafting.read_config(directory), str(directory / drafting.CONFIG))


def export_plan(
    config: VideoLLMConfig,
    family: str,
    layout: str | None = None,
    original: Mapping[str, Any] | None = None,
) -> Export:
    """The way back of one part of a model.

    Args:
      config: of the model.
      family: of the part.
      layout: of its names; None takes the one that the newest transformers reads and writes.
      original: the config.json that it came with; None for a model that was made here.

    Raises:
      UserError: an unknown family or layout, or one that cannot say what the model computes.
    """
    found = next((one for one in FAMILIES if one.name == family), None)
    if found is None:
        known = ", ".join(one.name for one in FAMILIES)
        raise UserError(f"unknown family {family!r}; there are {known}")
    if layout is not None and layout not in found.layouts:
        raise UserError(
            f"{layout!r} is no layout of the family {family}; there are {', '.join(found.layouts)}"
        )
    return found.export(config, layout or found.layout, original)


def find_family(hf: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Args:
      hf: the config.
      where: its file, for messages.

    Raises:
      UserError: no family has its model type.
    """
    for family in FAMILIES:
        if hf.get("model_type") in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise UserError(f"{where}: model_type is {shown(hf.get('model_type'))}; supported are {known}")


def _export_decoder(
    config: VideoLLMConfig, layout: str, original: Mapping[str, Any] | None
) -> Export:
    config.require("decoder")
    return Export(
        table=llama.decoder_table(config.decoder),
        config=(
            llama.with_vocabulary(original, config.decoder)
            if original
            else llama.decoder_to_hf(config.decoder)
        ),
    )


def _export_tower(
    config: VideoLLMConfig, layout: str, original: Mapping[str, Any] | None
) -> Export:
    config.require("vision")
    # The text side of a whole SigLIP or CLIP was left out, so it is a tower from now on.
    is_tower = original is not None and original.get("model_type") in vision.DEFAULTS
    return Export(
        table=vision.vision_table(config.vision, vision.LAYOUTS[layout]),
        config=original if is_tower else vision.vision_to_hf(config.vision),
    )


def _llava_exporter(
    family: str,
) -> Callable[[VideoLLMConfig, str, Mapping[str, Any] | None], Export]:
    def export(config: VideoLLMConfig, layout: str, original: Mapping[str, Any] | None) -> Export:
        config.require("decoder", "vision")
        names = llava.LAYOUTS[layout]
        if original:
            hf = llama.with_vocabulary(original, config.decoder)
        else:
            hf = llava.llava_to_hf(config, family)
        note = ""
        if "mm_vision_tower" not in hf:
            there = llava.llava_from_hf(hf, None, drafting.CONFIG)[1].tokens_per_frame
            if there != config.tokens_per_frame:
                note = (
                    f"a frame has {config.tokens_per_frame} tokens here and {there} in "
                    "transformers, whose config.json cannot say otherwise (--pool)"
                )
        return Export(
            table=llava.llava_table(config.decoder, config.vision, config.newline, names),
            config=hf,
            note=note,
        )

    return export


def _decoder(name: str, title: str, *examples: str) -> Family:
    return Family(
        name=name,
        title=title,
        model_types=(name,),
        examples=examples,
        draft=drafting.draft_decoder,
        export=_export_decoder,
        layouts=(llama.LAYOUT,),
        layout=llama.LAYOUT,
    )


def _tower(name: str, title: str, *examples: str) -> Family:
    return Family(
        name=name,
        title=title,
        model_types=(f"{name}_vision_model", name),
        examples=examples,
        draft=drafting.draft_tower_alone,
        export=_export_tower,
        layouts=tuple(vision.LAYOUTS),
        layout="hf-5",
    )


def _llava(name: str, title: str, *examples: str, model_types: tuple[str, ...] = ()) -> Family:
    return Family(
        name=name,
        title=title,
        model_types=(name, *model_types),
        examples=examples,
        draft=drafting.draft_llava,
        export=_llava_exporter(name),
        layouts=tuple(llava.LAYOUTS),
        layout="hf-5",
    )


FAMILIES: tuple[Family, ...] = (
    _llava(
        "llava",
        "LLaVA-1.5",
        "llava-hf/llava-1.5-7b-hf",
        "liuhaotian/llava-v1.5-7b",
        model_types=("llava_llama",),
    ),
    _llava("llava_next_video", "LLaVA-NeXT-Video", "llava-hf/LLaVA-NeXT-Video-7B-hf"),
    _llava("llava_onevision", "LLaVA-OneVision", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    _decoder(
        "llama",
        "Llama 2, 3 and 3.1",
        "meta-llama/Llama-2-7b-chat-hf",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
    _decoder("qwen2", "Qwen2", "Qwen/Qwen2-7B-Instruct"),
    _tower(
        "siglip",
        "SigLIP vision tower",
        "google/siglip-large-patch16-384",
        "google/siglip-so400m-patch14-384",
    ),
    _tower("clip", "CLIP vision tower", "openai/clip-vit-large-patch14-336"),
)
"""Every family that `config.json` tells apart."""

ADAPTERS: tuple[Listed, ...] = (
    Listed(
        name=live.FAMILY,
        title="VideoLLM-online and VideoLLM-MoD, over Llama 3 and SigLIP",
        examples=("chenjoya/videollm-online-8b-v1plus",),
    ),
    Listed(name=adapter.FAMILY, title="PEFT LoRA adapters of any of these", examples=()),
)
"""Every kind of adapter; `adapter_config.json` tells that it is one, its tensors which."""
