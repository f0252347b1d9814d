"""The names of tensors in a PEFT adapter, read and written.

They are those of the base's modules in memory, which are not always those in the base's files:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [R, in]    the adapter of a
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   [out, R]   linear
    base_model.model.connector.0.weight               a tensor of a module that was trained whole
    base_model.model.lm_head.base_layer.weight        a copy of a weight under an adapter
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from videollm_mod_jax.conversion import live, llava
from videollm_mod_jax.conversion.llama import decoder_table
from videollm_mod_jax.conversion.table import Rule, Table
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import DecoderConfig, VisionConfig

_PREFIX = "base_model.model."
# Programs that save without PEFT leave the adapter's name, `default`, in the names.
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_WRAPPER = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")

Pair = tuple[str, str]
"""Names of a linear's lora_A and lora_B."""


@dataclasses.dataclass(frozen=True)
class Names:
    """What the tensors of an adapter are.

    Attributes:
      lora: by module, its pair.
      saved: by name in the base, the tensor that replaces it.
    """

    lora: Mapping[str, Pair]
    saved: Mapping[str, str]

    @property
    def subjects(self) -> frozenset[str]:
        """Names of the base's tensors that the adapter changes."""
        return frozenset([*self.saved, *(f"{module}.weight" for module in self.lora)])

    @property
    def routed(self) -> tuple[int, ...]:
        """Layers with a router."""
        found = (re.fullmatch(r"model\.layers\.(\d+)\.router\.weight", name) for name in self.saved)
        return tuple(sorted(int(match[1]) for match in found if match))


def parse_names(names: Iterable[str], where: Path | str) -> Names:
    """Sorts the names of an adapter.

    ```
    base_model.model.lm_head.lora_A.default.weight         lora["lm_head"], with lm_head.lora_B
    base_model.model.lm_head.base_layer.weight             saved["lm_head.weight"]
    base_model.model.connector.modules_to_save.default.0.bias     saved["connector.0.bias"]
    ```

    Args:
      names: of all tensors.
      where: their file, for messages.

    Raises:
      UserError: a name without the prefix of PEFT, half a pair, or two tensors for one.
    """
    halves: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for name in names:
        if not name.startswith(_PREFIX):
            raise UserError(f"{where} holds {name!r}; expected names that begin with {_PREFIX!r}")
        subject = name.removeprefix(_PREFIX)
        if found := _LORA.fullmatch(subject):
            group, key = halves.setdefault(found[1], {}), found[2]
        else:
            group, key = saved, _WRAPPER.sub("", subject)
        if key in group:
            raise UserError(f"{where} holds both {group[key]!r} and {name!r}; one may be there")
        group[key] = name
    for pair in halves.values():
        if len(pair) == 1:
            (half,) = pair.values()
            raise UserError(f"{where} holds {half!r} without its other half; save it again")
    return Names({module: (pair["A"], pair["B"]) for module, pair in halves.items()}, saved)


def spell(module: str) -> Pair:
    """The pair of a module, as `PeftModel.save_pretrained` names it."""
    return (f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight")


def spell_saved(name: str) -> str:
    """The tensor that replaces one of the base, as `PeftModel.save_pretrained` names it."""
    return _PREFIX + name


def base_table(
    decoder: DecoderConfig,
    vision: VisionConfig | None,
    newline: bool,
    layout: str,
    routed: tuple[int, ...],
    bias: bool,
) -> Table:
    """What the tensors of the base are called in memory.

    Args:
      decoder, vision, newline: of the model.
      layout: `hf` of a language model, `live` of VideoLLM-online, or one of `llava.LAYOUTS`.
      routed, bias: as in `live.live_table`.
    """
    if layout in llava.LAYOUTS:
        return llava.llava_table(decoder, vision, newline, llava.LAYOUTS[layout])
    if layout == live.LAYOUT:
        return live.live_table(decoder, routed, bias)
    return decoder_table(decoder)


def linears(table: Table) -> dict[str, str]:
    """By module, the kernels that can be adapted; a tied head is among them without having one.

    ```
    model.layers.1.mlp.up_proj   params/decoder/layer_1/block/mlp/up/kernel
    lm_head                      params/lm_head/kernel
    ```
    """
    found = {
        entry.source.removesuffix(".weight"): entry.target
        for entry in table.entries()
        if entry.target.endswith("/kernel") and entry.axes == (1, 0) and entry.row is None
    }
    tied = {name.removesuffix(".weight"): "params/lm_head/kernel" for name in table.same}
    return found | tied


def lora_rules(modules: Mapping[str, str], pairs: Mapping[str, Pair]) -> list[Rule]:
    """Where adapters go that stay beside their kernels.

    ```
    model.layers.1.mlp.up_proj.lora_A.weight  [R, D] -> lora/decoder/layer_1/block/mlp/up/a [D, R]
    model.layers.1.mlp.up_proj.lora_B.weight  [I, R] -> lora/decoder/layer_1/block/mlp/up/b [R, I]
    ```

    Args:
      modules: by module, its kernel.
      pairs: by module, its pair.
    """
    rules = []
    for module, path in modules.items():
        target = path.replace("params/", "lora/", 1).removesuffix("kernel")
        for name, half in zip(pairs[module], "ab", strict=True):
            rules.append(Rule(source=name, target=target + half, axes=(1, 0)))
    return rules


def saved_rules(table: Table, saved: Mapping[str, str]) -> list[Rule]:
    """Where tensors go that replace those of the base, each by its name there."""
    return [
        Rule(source=saved[entry.source], target=entry.target, axes=entry.axes,
             squeeze=entry.squeeze)
        for entry in table.entries()
        if entry.source in saved
    ]  # fmt: skip
