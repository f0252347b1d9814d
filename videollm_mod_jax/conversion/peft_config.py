"""PEFT's `adapter_config.json` of a LoRA: read strictly, and written.

Follows `LoraConfig`, `check_target_module_exists` and `get_pattern_key` of huggingface/peft.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from videollm_mod_jax.conversion.hf_config import (
    inside,
    integer,
    number,
    refusal,
    require_one_of,
    table,
    with_defaults,
)
from videollm_mod_jax.conversion.patterns import PatternError, check, ends, matches
from videollm_mod_jax.models import LoraConfig

CONFIG = "adapter_config.json"

_DEFAULTS = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "exclude_modules": [],
    "modules_to_save": [],
    "layers_pattern": [],
}
_READ = {*_DEFAULTS, "peft_type", "target_modules", "layers_to_transform"}
# They do not change what an adapter computes, or come with a key that is refused. PEFT itself
# ignores `fan_in_fan_out` for the linears that we have.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights when they are loaded.
_INITIALISERS = (True, False, "gaussian", "eva", "orthogonal")

Modules = str | tuple[str, ...]
"""A regular expression of whole names, or the ends of names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftLora:
    """Which modules a LoRA of PEFT adapts, and how.

    ```
    target_modules ["q_proj", "lm_head"], layers_to_transform [1], modules_to_save ["connector"]
    targets  model.layers.1.self_attn.q_proj  lm_head      not  model.layers.0.self_attn.q_proj
    saves    connector  connector.0                        not  lm_head
    ```

    Attributes:
      rank, alpha, dropout: of modules without a pattern of their own.
      target_modules, exclude_modules: as in PEFT.
      modules_to_save: modules that are trained whole.
      layers: indices of the layers that are adapted, or None for all.
      layers_pattern: names of the lists that these layers are in; `()` for any list.
      rank_pattern, alpha_pattern: by regular expression of the end of a name.
      use_rslora: the scale is alpha / sqrt(rank) instead of alpha / rank.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: Modules
    exclude_modules: Modules
    modules_to_save: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def targets(self, module: str) -> bool:
        """Whether a linear carries an adapter."""
        if _is_named(self.exclude_modules, module) or self.saves(module):
            return False
        if not _is_named(self.target_modules, module):
            return False
        # PEFT lets a module that is named in full pass, whatever its layer.
        in_full = isinstance(self.target_modules, str) or module in self.target_modules
        if self.layers is None or in_full:
            return True
        lists = self.layers_pattern or (r"[^.]*",)
        for name in lists:
            for end in sorted(ends(rf"(.*\.)?({name})\.", module)):
                index, dot, _ = module[end:].partition(".")
                if dot and index.isdecimal():
                    return int(index) in self.layers
        return False

    def saves(self, module: str) -> bool:
        """Whether a module is trained whole, alone or as part of another one."""
        return any(matches(rf"(.*\.)?({m})(\..*)?", module) for m in self.modules_to_save)

    def rank_of(self, module: str) -> int:
        """Rank of a module's adapter."""
        return _first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of a module's adapter, whose scale is alpha / rank."""
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha * math.sqrt(self.rank_of(module)) if self.use_rslora else alpha


def read_lora(hf: Mapping[str, Any], where: str) -> PeftLora:
    """The LoRA that an `adapter_config.json` describes.

    Args:
      hf: its content; keys that do not change the result are ignored.
      where: the file, for messages.

    Raises:
      UserError: another kind of adapter than LoRA on linears without biases, or a key that is not
        understood; it is named.
    """
    hf = with_defaults(_DEFAULTS, hf)
    require_one_of(hf, "peft_type", ("LORA",), where)
    require_one_of(hf, "bias", ("none",), where)
    if hf["init_lora_weights"] not in _INITIALISERS:
        expected = "one of " + ", ".join(map(str, _INITIALISERS))
        expected += ": others change the base's weights; convert it with PEFT to a plain LoRA first"
        raise refusal(where, "init_lora_weights", hf["init_lora_weights"], expected)
    for key, value in hf.items():
        # PEFT writes the keys of all its variants; those that are off are false or empty.
        if key not in _READ | _IGNORED and value:
            raise refusal(where, key, value, "nothing: this variant of LoRA is not supported")
    layers = hf.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not isinstance(layers, list):
        raise refusal(where, "layers_to_transform", layers, "whole numbers")
    if layers is not None and not all(isinstance(layer, int) for layer in layers):
        raise refusal(where, "layers_to_transform", layers, "whole numbers")
    return PeftLora(
        rank=_positive(hf, "r", where),
        alpha=number(hf, "lora_alpha", where, (LoraConfig, "alpha")),
        dropout=number(hf, "lora_dropout", where, (LoraConfig, "dropout")),
        target_modules=_modules(hf, "target_modules", where),
        exclude_modules=_modules(hf, "exclude_modules", where),
        modules_to_save=_strings(hf, "modules_to_save", where),
        layers=tuple(layers) if layers else None,
        layers_pattern=_strings(hf, "layers_pattern", where),
        rank_pattern=_pattern(hf, "rank_pattern", _positive, where),
        alpha_pattern=_pattern(hf, "alpha_pattern", _alpha, where),
        use_rslora=require_one_of(hf, "use_rslora", (True, False), where),
    )


def lora_to_hf(
    lora: LoraConfig, modules: Iterable[str], modules_to_save: Iterable[str]
) -> dict[str, Any]:
    """The `adapter_config.json` of adapters of ours.

    Args:
      lora: their configuration.
      modules: full names of the linears that carry one, so that no linear of the same name in the
        vision tower does.
      modules_to_save: names of the modules that are saved whole.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": list(modules),
        "modules_to_save": list(modules_to_save) or None,
    }


def _is_named(modules: Modules, name: str) -> bool:
    if isinstance(modules, str):
        return matches(modules, name)
    parts = name.split(".")
    return any(".".join(parts[i:]) in modules for i in range(len(parts)))


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((v for k, v in patterns.items() if matches(rf"(.*\.)?({k})", module)), default)


def _modules(hf: Mapping[str, Any], key: str, where: str) -> Modules:
    value = hf.get(key)
    if not isinstance(value, str):
        return _strings(hf, key, where, of_regexes=False)
    _check_regex(value, key, where)
    return value


def _strings(
    hf: Mapping[str, Any], key: str, where: str, of_regexes: bool = True
) -> tuple[str, ...]:
    value = hf.get(key)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise refusal(where, key, value, "names of modules")
    for text in values if of_regexes else ():
        _check_regex(text, key, where)
    return tuple(values)


def _pattern(hf: Mapping[str, Any], key: str, read: Any, where: str) -> dict[str, Any]:
    values = table(hf, key, where)
    for text in values:
        _check_regex(text, key, where)
    return {text: read(values, text, inside(where, key)) for text in values}


def _positive(hf: Mapping[str, Any], key: str, where: str) -> int:
    value = integer(hf, key, where, (LoraConfig, "rank"))
    if value < 1:
        raise refusal(where, key, value, "at least 1")
    return value


def _alpha(hf: Mapping[str, Any], key: str, where: str) -> float:
    return number(hf, key, where, (LoraConfig, "alpha"))


def _check_regex(text: str, key: str, where: str) -> None:
    try:
        check(text)
    except PatternError as error:
        raise refusal(where, key, text, f"a regular expression ({error})") from error
