"""From directories to drafts: reading configs, recognising key layouts, building tables."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from videollm_mod_jax.conversion import llama, llava, vision
from videollm_mod_jax.conversion.hf_config import read_table, table
from videollm_mod_jax.conversion.links import check_inside
from videollm_mod_jax.conversion.plan import Draft, Options, Part
from videollm_mod_jax.conversion.source import Source, open_source
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import DecoderConfig, VisionConfig

CONFIG = "config.json"


def read_config(directory: Path) -> Mapping[str, Any]:
    """The config.json of a directory.

    Raises:
      UserError: it is missing, a link out of the directory, or not a table of keys.
    """
    return read_table(directory / CONFIG, "a model")


def draft_decoder(hf: Mapping[str, Any], source: Source, options: Options) -> Draft:
    """A language model: with `vision_tower`, a whole with a tower that it has not met."""
    decoder = llama.decoder_from_hf(hf, str(source.directory / CONFIG))
    _check_layers(source, "model.layers.", decoder.num_layers, "num_hidden_layers")
    part = Part(
        role="model",
        family=hf["model_type"],
        layout=llama.LAYOUT,
        source=source,
        table=llama.decoder_table(decoder),
        config=hf,
    )
    parts, tower = (part,), None
    if options.vision_tower is not None:
        tower_part, tower = draft_tower(options.vision_tower)
        parts = (part, tower_part)
    return Draft(
        family=part.family,
        parts=parts,
        decoder=decoder,
        vision=tower,
        newline=False,
        tokenizer=find_tokenizer(options, source.directory),
    )


def draft_tower_alone(hf: Mapping[str, Any], source: Source, options: Options) -> Draft:
    """A vision tower without a language model."""
    _refuse_second_tower(options, source)
    config = _tower_config(hf, source.directory)
    return Draft(
        family=config.architecture,
        parts=(_tower_part("model", hf, source, config),),
        decoder=None,
        vision=config,
        newline=False,
        tokenizer=None,
    )


def draft_llava(hf: Mapping[str, Any], source: Source, options: Options) -> Draft:
    """A LLaVA in one of the layouts of transformers, or in the original one."""
    if "mm_vision_tower" in hf or "mm_projector_type" in hf:
        return _draft_original(hf, source, options)
    _refuse_second_tower(options, source)
    where = str(source.directory / CONFIG)
    decoder, tower = llava.llava_from_hf(hf, read_processor(source.directory), where)
    family, newline = hf["model_type"], hf["model_type"] != "llava"
    layout = _llava_layout(llava.HF_LAYOUTS, source)
    _check_llava_layers(source, layout, decoder, tower, "text_config.")
    part = Part(
        role="model",
        family=family,
        layout=layout,
        source=source,
        table=llava.llava_table(decoder, tower, newline, llava.LAYOUTS[layout]),
        config=hf,
    )
    return Draft(
        family=family,
        parts=(part,),
        decoder=decoder,
        vision=tower,
        newline=newline,
        tokenizer=find_tokenizer(options, source.directory),
    )


def draft_tower(directory: Path) -> tuple[Part, VisionConfig]:
    """A vision tower in its own directory, for a language model in another one.

    Raises:
      UserError: it is no tower, or one that ours does not compute.
    """
    hf, source = read_config(directory), open_source(directory)
    config = _tower_config(hf, directory)
    return _tower_part("vision_tower", hf, source, config), config


def find_tokenizer(options: Options, *directories: Path) -> Path | None:
    """The directory that `--tokenizer` names, or the first of some that holds `tokenizer.json`.

    Raises:
      UserError: its files are links out of the directory.
    """
    if options.tokenizer is not None:
        return options.tokenizer
    found = next((d for d in directories if (d / "tokenizer.json").is_file()), None)
    if found is not None:
        check_inside(found, [found / "tokenizer.json", found / "tokenizer_config.json"])
    return found


def find_layout(probes: Mapping[str, Iterable[str]], names: Iterable[str]) -> str:
    """The layout most of whose probe names are there; the first of them in a tie.

    ```
    hf-4.0   a.norm  b.weight        names  a.norm  c.weight  ...
    hf-5     a.norm  c.weight        gives  hf-5
    ```
    """
    present = set(names)
    return max(probes, key=lambda layout: len(present.intersection(probes[layout])))


def read_processor(directory: Path) -> Mapping[str, Any] | None:
    """How a directory's images are prepared, or None where it does not say.

    `preprocessor_config.json`, or, since transformers 5, a table inside `processor_config.json`.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).is_file():
            values = read_table(directory / name, "a processor")
            if name.startswith("pre") or values.get("image_processor") is None:
                return values if name.startswith("pre") else None
            return table(values, "image_processor", str(directory / name))
    return None


def _draft_original(hf: Mapping[str, Any], source: Source, options: Options) -> Draft:
    where = str(source.directory / CONFIG)
    if options.vision_tower is None:
        raise UserError(
            f"{where} names its vision tower, {hf.get('mm_vision_tower')!r}, without describing "
            "it; download that one as well and pass --vision-tower DIR"
        )
    tower_hf = read_config(options.vision_tower)
    found = _tower_config(tower_hf, options.vision_tower)
    decoder, tower = llava.original_from_hf(hf, found, where, str(options.vision_tower))
    layout = _llava_layout(llava.ORIGINAL_LAYOUTS, source)
    _check_llava_layers(source, layout, decoder, tower, "")
    part = Part(
        role="model",
        family="llava",
        layout=layout,
        source=source,
        table=llava.llava_table(decoder, tower, False, llava.LAYOUTS[layout]),
        config=hf,
    )
    parts = (part,)
    if llava.LAYOUTS[layout].vision is None:
        tower_source = open_source(options.vision_tower)
        parts = (part, _tower_part("vision_tower", tower_hf, tower_source, tower))
    return Draft(
        family="llava",
        parts=parts,
        decoder=decoder,
        vision=tower,
        newline=False,
        tokenizer=find_tokenizer(options, source.directory),
    )


def _check_layers(source: Source, prefix: str, said: int, key: str) -> None:
    """Compares a number of layers with the names of the tensors, before there is a table of them.

    Args:
      source: of the tensors.
      prefix: of the names of all layers, such as `model.layers.`.
      said: how many layers config.json says there are.
      key: of it there.

    Raises:
      UserError: the weights have fewer.
    """
    found = re.compile(re.escape(prefix) + r"(\d{1,9})\.")
    layers = {int(m[1]) for name in source.names if (m := found.match(name))}
    if layers and len(layers) < said:
        raise UserError(
            f"{source.directory / CONFIG}: {key} is {said}; the weights beside it have "
            f"{len(layers)} ({prefix}*): check that the two belong together"
        )


def _check_llava_layers(
    source: Source, layout: str, decoder: DecoderConfig, tower: VisionConfig, text: str
) -> None:
    names, key = llava.LAYOUTS[layout], "num_hidden_layers"
    _check_layers(source, f"{names.decoder}layers.", decoder.num_layers, text + key)
    if names.vision is not None and text:
        prefix = f"{names.vision}encoder.layers."
        _check_layers(source, prefix, tower.num_layers, f"vision_config.{key}")


def _llava_layout(layouts: Mapping[str, llava.Layout], source: Source) -> str:
    return find_layout({name: one.probes() for name, one in layouts.items()}, source.names)


def _tower_config(hf: Mapping[str, Any], directory: Path) -> VisionConfig:
    return vision.vision_from_hf(hf, read_processor(directory), str(directory / CONFIG))


def _tower_part(role: str, hf: Mapping[str, Any], source: Source, config: VisionConfig) -> Part:
    probe = "embeddings.patch_embedding.weight"
    probes = {name: (prefix + probe,) for name, prefix in vision.LAYOUTS.items()}
    layout = find_layout(probes, source.names)
    prefix = f"{vision.LAYOUTS[layout]}encoder.layers."
    _check_layers(source, prefix, config.num_layers, "num_hidden_layers")
    return Part(
        role=role,
        family=config.architecture,
        layout=layout,
        source=source,
        table=vision.tower_table(config, vision.LAYOUTS[layout]),
        config=hf,
    )


def _refuse_second_tower(options: Options, source: Source) -> None:
    if options.vision_tower is not None:
        raise UserError(
            f"--vision-tower is for language models without one; {source.directory} has its own"
        )
