"""An opened PEFT adapter, and what must be true of it beside its base.

Everything that is not refused here is used: every tensor belongs to a linear that the configuration
names, or to a module that was trained whole.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videollm_mod_jax.conversion import live
from videollm_mod_jax.conversion.hf_config import read_table
from videollm_mod_jax.conversion.peft_config import CONFIG, PeftLora, read_lora
from videollm_mod_jax.conversion.peft_names import (
    Names,
    linears,
    parse_names,
    spell,
    spell_saved,
)
from videollm_mod_jax.conversion.source import Source, open_source
from videollm_mod_jax.conversion.stored import TensorInfo
from videollm_mod_jax.conversion.table import Table
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import LoraConfig
from videollm_mod_jax.models.config import LINEAR_NAMES

_TARGETS = (*LINEAR_NAMES, "lm_head")
# LLaVA's own LoRA script writes its projector into a file that PEFT does not know.
_BESIDE = "non_lora_trainables.bin"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that is opened.

    Attributes:
      where: its adapter_config.json, for messages.
      hf: content of that file.
      lora: what it says.
      source: its tensors.
      names: what these are.
    """

    where: str
    hf: Mapping[str, Any]
    lora: PeftLora
    source: Source
    names: Names

    @property
    def is_live(self) -> bool:
        """Whether it is one of VideoLLM-online."""
        return any(name.startswith("connector.") for name in self.names.saved)


def open_adapter(directory: Path) -> Adapter:
    """Opens an adapter; reads no tensor.

    Raises:
      UserError: its configuration or files are missing, damaged, or of a kind that is not read.
    """
    path = directory / CONFIG
    hf = read_table(path, "an adapter")
    if (directory / _BESIDE).exists():
        raise UserError(
            f"{directory / _BESIDE} holds weights outside of the adapter, which are not read; "
            "merge them with the program that wrote them, and convert the whole"
        )
    source = open_source(directory, "adapter")
    names = parse_names(source.names, source.files[0])
    return Adapter(str(path), hf, read_lora(hf, str(path)), source, names)


def check_saved(
    adapter: Adapter, saved: Mapping[str, str], table: Table, tied: bool, base: Path
) -> None:
    """Checks that modules that were trained whole are whole, and that each tensor has a place.

    Args:
      adapter: the adapter.
      saved: by name in the base, the tensors that replace those of the base.
      table: names of the base in memory.
      tied: the base ties its output head to its embeddings.
      base: directory of the base, for messages.

    Raises:
      UserError: a tensor is missing, or has no place.
    """
    file, places = adapter.source.files[0], table.by_source()
    for name, full in saved.items():
        if name not in places and name not in table.same:
            raise UserError(
                f"{file} holds {full!r}, which is neither lora_A nor lora_B of a linear nor a "
                f"tensor of {base}; check that --base is the model that was adapted"
            )
        target = table.same.get(name) or places[name][0].target
        if name in table.same or (tied and target == "params/embedding"):
            raise UserError(
                f"{file} holds {full!r}, but {base} ties embeddings and output head; only adapters "
                "that leave both alone are supported"
            )
        if target.startswith("params/vision/"):
            raise _tower_error(adapter, full)
    for name in places:
        module = name.rpartition(".")[0]
        if name not in saved and (adapter.lora.saves(module) or live.own_module(name)):
            raise UserError(
                f"{file} has no {spell_saved(name)!r}, although other tensors of this module or "
                f"modules_to_save in {adapter.where} call for it"
            )


def adapted_linears(adapter: Adapter, table: Table, base: Path) -> dict[str, str]:
    """By module, the kernels that the configuration names and the adapter adapts.

    Args:
      adapter: the adapter.
      table: names of the base in memory.
      base: directory of the base, for messages.

    Raises:
      UserError: the two differ, or it adapts something else than linears of the language model and
        of the connector.
    """
    found, known = adapter.names.lora, linears(table)
    wanted = {module: path for module, path in known.items() if adapter.lora.targets(module)}
    file = adapter.source.files[0]
    for module in wanted:
        if module not in found:
            raise UserError(
                f"{file} has no {spell(module)[0]!r}, which target_modules in {adapter.where} "
                "calls for"
            )
    for module, (name, _) in found.items():
        if module in known and module not in wanted:
            raise UserError(
                f"{file} holds {name!r}, which target_modules in {adapter.where} does not name"
            )
        if module not in known:
            place = table.by_source().get(f"{module}.weight")
            if place and place[0].target.startswith("params/vision/"):
                raise _tower_error(adapter, name)
            raise UserError(
                f"{file} holds {name!r}, but {base} has no linear "
                f"{module}; check that --base is the model that was adapted"
            )
    if not found:
        raise UserError(f"{file} holds no lora_A; {adapter.where} says that it is a LoRA")
    return wanted


def check_shapes(
    adapter: Adapter, adapted: Mapping[str, str], weights: Mapping[str, TensorInfo]
) -> None:
    """Compares every pair with its rank and with the weight that it adapts.

    Args:
      adapter: the adapter.
      adapted: by module, its kernel.
      weights: by kernel, the weight [out, in] that becomes it, as far as it is there.

    Raises:
      UserError: a shape differs.
    """
    for module, path in adapted.items():
        if path not in weights:
            continue
        rank, (rows, columns) = adapter.lora.rank_of(module), weights[path].shape
        expected = ((rank, columns), (rows, rank))
        for name, shape in zip(adapter.names.lora[module], expected, strict=True):
            info = adapter.source.info(name)
            if tuple(info.shape) != shape:
                raise UserError(
                    f"{info.file}: {name} has the shape {list(info.shape)}; expected "
                    f"{list(shape)} of rank {rank} and a base weight of {[rows, columns]}; "
                    f"check r and rank_pattern in {adapter.where}, and that --base is the model "
                    "that was adapted"
                )


def uniform_lora(adapter: Adapter, adapted: Mapping[str, str], table: Table) -> LoraConfig:
    """The configuration of adapters that stay beside their kernels.

    Args:
      adapter: the adapter.
      adapted: by module, its kernel.
      table: names of the base in memory.

    Raises:
      UserError: not every linear of a name is adapted, or not all alike; such adapters can be
        merged.
    """
    lora, first = adapter.lora, next(iter(adapted))
    rank, alpha = lora.rank_of(first), lora.alpha_of(first)
    for module, path in adapted.items():
        if (kind := (lora.rank_of(module), lora.alpha_of(module))) != (rank, alpha):
            raise UserError(
                f"{adapter.where} gives {first} the rank and alpha {(rank, alpha)}, and {module} "
                f"{kind}; ours has one for all: add --merge"
            )
        if target_name(path) not in _TARGETS:
            raise UserError(
                f"{adapter.where} adapts {module}; beside their kernels only linears of the "
                "decoder have adapters: add --merge"
            )
    targets = {target_name(path) for path in adapted.values()}
    for module, path in linears(table).items():
        if target_name(path) in targets and module not in adapted:
            raise UserError(
                f"{adapter.where} adapts a linear {target_name(path)}, but not {module}; ours is "
                "adapted in every layer or in none: add --merge"
            )
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        dropout=lora.dropout,
        targets=tuple(name for name in _TARGETS if name in targets),
    )


def target_name(path: str) -> str:
    """The linear of a kernel: `params/decoder/layer_0/block/mlp/up/kernel` is of `up`."""
    return path.split("/")[-2]


def _tower_error(adapter: Adapter, name: str) -> UserError:
    return UserError(
        f"{adapter.source.files[0]} holds {name!r}, which changes the vision tower; only adapters "
        "that leave it as it is are supported: merge this one with PEFT first"
    )
