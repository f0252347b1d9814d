"""What a conversion is going to do: sources, tables, and the model that comes of them."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from videollm_mod_jax.conversion.source import Source
from videollm_mod_jax.conversion.table import Table, check_shape, match
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import (
    NO_LORA,
    DecoderConfig,
    LoraConfig,
    RoutingConfig,
    VideoLLM,
    VideoLLMConfig,
    VisionConfig,
    full_computation,
)
from videollm_mod_jax.training.sharding import abstract_variables

DTYPES = ("auto", "bfloat16", "float32")

ROLES = ("model", "vision_tower", "adapter")
"""Every `Part.role`; a part's directory in an export is called by it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks of a conversion.

    Attributes:
      base: the model that an adapter adapts; None takes the one that its config names.
      vision_tower: of a language model that holds none.
      mod: (insertion, keep_ratio) of Mixture-of-Depths, or None for the model as it is.
      weighting: of its routers; None takes `tanh1`, with which a pretrained block starts unchanged.
      pool: (h, w) spatial tokens per frame; None takes the family's.
      dtype: of frozen weights, one of `DTYPES`; `auto` keeps float32 and makes bfloat16 of halves.
      merge: adds an adapter to the kernels instead of keeping it beside them.
      tokenizer: directory of `tokenizer.json`; None takes the one beside the language model.
      system: the instruction that opens every conversation.
      resize_embeddings: adds rows to embeddings and head for tokens that the weights have none of.
    """

    base: Path | None = None
    vision_tower: Path | None = None
    mod: tuple[str | tuple[int, ...], float] | None = None
    weighting: str | None = None
    pool: tuple[int, int] | None = None
    dtype: str = "auto"
    merge: bool = False
    tokenizer: Path | None = None
    system: str = ""
    resize_embeddings: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One directory of weights and its table.

    Attributes:
      role: one of `ROLES`.
      family: of this directory alone, such as `clip`.
      layout: name of the key layout that its names have, such as `hf-4.52`.
      source: its tensors.
      table: what becomes of them; targets are full paths of variables.
      config: its `config.json` (`adapter_config.json` of an adapter), word by word.
    """

    role: str
    family: str
    layout: str
    source: Source
    table: Table
    config: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """A low-rank update that is added to a kernel: W + scale (B A) transposed.

    Attributes:
      a, b: names of lora_A [R, in] and lora_B [out, R] in the adapter's source.
      scale: alpha / R, or what the adapter's config says instead.
    """

    a: str
    b: str
    scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """What a family reads out of its directories, before anything is checked against anything.

    Attributes:
      family: as in `Conversion`.
      parts: language model first.
      decoder, vision, newline: as in `VideoLLMConfig`.
      tokenizer: directory with `tokenizer.json`, or None where there is none.
      routing: what the weights were trained with, or None to let the options decide.
      lora: adapters that stay beside the kernels.
      merges: adapters that do not, by path of the kernel; their tensors are in the `left_out` of
        their part's table.
    """

    family: str
    parts: tuple[Part, ...]
    decoder: DecoderConfig | None
    vision: VisionConfig | None
    newline: bool
    tokenizer: Path | None
    routing: RoutingConfig | None = None
    lora: LoraConfig = NO_LORA
    merges: Mapping[str, Merge] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """A checked plan: every tensor of every part is used once, every variable is filled once.

    Attributes:
      family: name of the family, such as `llava`.
      config: of the model that comes of it.
      parts: language model first; together they fill every variable that is not in `fresh`.
      fresh: paths of variables that no source has and that are initialised: a connector between a
        language model and a tower that have not met, routers.
      merges: by path of the kernel, the adapter that is merged into it on the way.
      tokenizer: directory with `tokenizer.json`, or None for a vision tower alone.
      system: the instruction that opens every conversation.
      added_rows: how many of the last rows of embeddings and head no source has; each is the mean
        of the others.
    """

    family: str
    config: VideoLLMConfig
    parts: tuple[Part, ...]
    fresh: tuple[str, ...]
    merges: Mapping[str, Merge]
    tokenizer: Path | None
    system: str
    added_rows: int = 0

    @property
    def layout(self) -> str:
        """Name of the key layout of the first part."""
        return self.parts[0].layout


def complete(draft: Draft, options: Options) -> Conversion:
    """Applies the options to a draft and checks names and shapes of every tensor.

    Reads no tensor. Nothing is left that could fail later but the values themselves.

    Raises:
      UserError: an option does not fit the model, a tensor is missing, unknown, of a wrong shape or
        not of floating point, there is no tokenizer, or it has tokens that the embeddings lack.
    """
    config = _config(draft, options)
    # Tracing a model of absurd sizes takes minutes: names and the largest shapes cost nothing.
    for part in draft.parts:
        match(part.table, part.source.names, str(part.source.directory))
    _check_sizes(draft)
    variables = flatten_dict(abstract_variables(VideoLLM(config), None), sep="/")
    shapes = {path: tuple(leaf.shape) for path, leaf in variables.items()}
    for part in draft.parts:
        _check_part(part, shapes)
    filled = [entry.target for part in draft.parts for entry in part.table.entries()]
    fresh = tuple(path for path in shapes if path not in set(filled))
    for path in fresh:
        if not re.search("^params/connector/|/router/", path):
            raise ValueError(f"no rule of {draft.family} fills {path}")
    if config.decoder is not None and draft.tokenizer is None:
        raise UserError(
            f"{draft.parts[0].source.directory} holds no tokenizer.json; pass --tokenizer DIR with "
            "one: that of the same model saved by transformers' fast tokenizer"
        )
    rows = _missing_rows(draft, options)
    if rows:
        vocab_size = draft.decoder.vocab_size + rows
        decoder = dataclasses.replace(draft.decoder, vocab_size=vocab_size)
        config = dataclasses.replace(config, decoder=decoder)
    return Conversion(
        family=draft.family,
        config=config,
        parts=draft.parts,
        fresh=fresh,
        merges=draft.merges,
        tokenizer=draft.tokenizer if config.decoder is not None else None,
        system=options.system,
        added_rows=rows,
    )


def _missing_rows(draft: Draft, options: Options) -> int:
    """How many rows embeddings and head must get for the tokens that they lack."""
    if draft.decoder is None:
        return 0
    tokenizer, rows = Tokenizer.load(draft.tokenizer), draft.decoder.vocab_size
    if not options.resize_embeddings:
        where = str(draft.parts[0].source.directory)
        tokenizer.check_rows(rows, where, "add --resize-embeddings, or --tokenizer with another")
    return max(0, tokenizer.vocab_size - rows)


def _config(draft: Draft, options: Options) -> VideoLLMConfig:
    vision = draft.vision
    if options.pool is not None:
        if vision is None:
            raise UserError("--pool pools the patches of a frame; pass --vision-tower as well")
        vision = dataclasses.replace(vision, pool=options.pool)
    dtype = options.dtype
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if dtype == "auto":
        # The language model decides: towers are often stored more finely than they are used.
        # Buffers and what is left out do not become weights.
        source, table = draft.parts[0].source, draft.parts[0].table
        kinds = {source.info(name).dtype for name in table.by_source() if name in source.tensors}
        halves = {np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)}
        dtype = "bfloat16" if kinds & halves else "float32"
    return VideoLLMConfig(
        decoder=draft.decoder,
        routing=_routing(draft, options),
        lora=draft.lora,
        vision=vision,
        newline=draft.newline,
        dtype=dtype,
        param_dtype=dtype,
    )


def _routing(draft: Draft, options: Options) -> RoutingConfig:
    if draft.routing is not None:
        return draft.routing
    if options.mod is None:
        if options.weighting is not None:
            raise UserError(
                f"--weighting is {options.weighting}, of no routers; pass --mod as well"
            )
        return full_computation()
    if draft.decoder is None or draft.vision is None:
        raise UserError(
            "--mod routes vision tokens through a language model; convert the language model with "
            "--vision-tower DIR"
        )
    insertion, keep_ratio = options.mod
    return RoutingConfig(
        insertion=insertion,
        keep_ratio=keep_ratio,
        selection="learned",
        weighting=options.weighting or "tanh1",
        force_keep_last=False,
        exploration=0.0,
    )


def _check_sizes(draft: Draft) -> None:
    """Compares vocabulary, widths and patches with the tensors that have them, before tracing."""
    shapes = {}
    if decoder := draft.decoder:
        shapes["params/embedding"] = (decoder.vocab_size, decoder.hidden_size)
    if vision := draft.vision:
        positions = vision.patches_per_side**2 + (vision.architecture == "clip")
        shapes["params/vision/position_embedding"] = (positions, vision.width)
    for part in draft.parts:
        for entry in part.table.entries():
            if entry.target in shapes:
                info = part.source.info(entry.source)
                check_shape(entry, shapes[entry.target], info.shape, str(info.file))


def _check_part(part: Part, shapes: Mapping[str, tuple[int, ...]]) -> None:
    source = part.source
    for entry in part.table.entries():
        if entry.target not in shapes:
            raise ValueError(f"{part.family} fills {entry.target}, which the model does not have")
        info = source.info(entry.source)
        check_shape(entry, shapes[entry.target], info.shape, str(info.file))
        if not _is_floating(info.dtype):
            raise UserError(
                f"{info.file}: {entry.source} is {info.dtype.name}; expected floating point: "
                "quantised weights are not supported, take the model that is not quantised"
            )


def _is_floating(dtype: np.dtype) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16
