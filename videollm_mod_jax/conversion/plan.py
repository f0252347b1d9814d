"""What a conversion is going to do: sources, tables, and the model that comes of them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videollm_mod_jax.conversion.source import Source
from videollm_mod_jax.conversion.table import Table
from videollm_mod_jax.models import VideoLLMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One directory of weights and its table.

    Attributes:
      role: `model`, `vision_tower` or `adapter`.
      source: its tensors.
      table: what becomes of them; targets are full paths of variables.
      config: its `config.json` (`adapter_config.json` of an adapter), word by word.
    """

    role: str
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
class Conversion:
    """A checked plan: every tensor of every part is used once, every variable is filled once.

    Attributes:
      family: name of the family, such as `llava`.
      layout: name of the key layout that the model's names have, such as `hf-4.52`.
      config: of the model that comes of it.
      parts: base model first; together they fill every variable that is not in `fresh`.
      fresh: paths of variables that no source has and that are initialised: a connector between a
        language model and a tower that have not met, routers, adapters.
      merges: by path of the kernel, the adapter that is merged into it on the way.
      tokenizer: directory with `tokenizer.json`, or None for a vision tower alone.
      system: the instruction that opens every conversation.
    """

    family: str
    layout: str
    config: VideoLLMConfig
    parts: tuple[Part, ...]
    fresh: tuple[str, ...]
    merges: Mapping[str, Merge]
    tokenizer: Path | None
    system: str
