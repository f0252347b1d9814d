"""PEFT adapters over a language model or a LLaVA, beside its kernels or merged into them.

VideoLLM-online and VideoLLM-MoD are such adapters, with a connector and routers among their saved
modules: see `live.py`.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from videollm_mod_jax.conversion import live, llama, llava
from videollm_mod_jax.conversion.drafting import find_layout, find_tokenizer
from videollm_mod_jax.conversion.peft_adapter import (
    Adapter,
    adapted_linears,
    check_saved,
    check_shapes,
    open_adapter,
    target_name,
    uniform_lora,
)
from videollm_mod_jax.conversion.peft_config import CONFIG, lora_to_hf, read_lora
from videollm_mod_jax.conversion.peft_names import (
    base_table,
    linears,
    lora_rules,
    parse_names,
    saved_rules,
    spell,
    spell_saved,
)
from videollm_mod_jax.conversion.plan import Draft, Merge, Options, Part
from videollm_mod_jax.conversion.stored import TensorInfo
from videollm_mod_jax.conversion.table import Rule, Table
from videollm_mod_jax.errors import UserError, shown
from videollm_mod_jax.models import NO_LORA, LoraConfig, VideoLLMConfig, config_plan

FAMILY = "peft"

_EMBEDDING, _HEAD = "params/embedding", "params/lm_head/kernel"


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter of PEFT."""
    return (directory / CONFIG).is_file()


def draft_adapter(
    directory: Path, options: Options, draft_base: Callable[[Path, Options], Draft]
) -> Draft:
    """What an adapter becomes together with its base, unchecked but for what is PEFT's.

    Args:
      directory: of the adapter.
      options: `base` and `vision_tower` say what it was trained on; with `merge` it is added to the
        kernels.
      draft_base: drafts the base, from (directory, options).

    Raises:
      UserError: a variant that ours does not compute, a base or tower that is missing, tensors that
        do not belong to the configuration or to the base, or an adapter that fits only merged.
    """
    adapter = open_adapter(directory)
    base_directory = _base_directory(adapter, options)
    options_of_base = dataclasses.replace(options, base=None, merge=False)
    if not adapter.is_live:
        base = draft_base(base_directory, options_of_base)
        return _apply(adapter, base, options)
    where, hf = str(directory / "config.json"), live.read_config(directory)
    tower = live.find_tower(hf, options, directory)
    base = draft_base(base_directory, dataclasses.replace(options_of_base, vision_tower=tower))
    routing = live.find_routing(hf, adapter.names.routed, base.decoder.num_layers, options, where)
    vision = live.frame_tokens(base.vision, hf, where)
    base = dataclasses.replace(base, family=live.FAMILY, vision=vision, routing=routing)
    return _apply(adapter, base, options)


def export_adapter(
    config: VideoLLMConfig,
    layout: str,
    covered: Iterable[str],
    names: Iterable[str] = (),
    original: Mapping[str, Any] | None = None,
) -> tuple[Table, dict[str, Any]]:
    """The way back: what a PEFT adapter holds, and its `adapter_config.json`.

    Args:
      config: of a model with adapters.
      layout: `Part.layout` of the adapter that it came with; for one that was born here `hf` over
        a language model, `live` over one with a tower, `hf-5-modules` over a LLaVA.
      covered: paths of the variables that other directories hold; with the layout `live`, connector
        and routers that these lack become modules of the adapter.
      names: of the tensors that it came with, which are restored.
      original: the `adapter_config.json` that it came with; it is kept if it still holds.
    """
    config.require("decoder", *(["vision"] if layout in llava.LAYOUTS else []))
    known = parse_names(names, "the manifest")
    weighting = config.routing.weighting
    routed = tuple(i for i, spec in enumerate(config_plan(config)) if spec.keep is not None)
    table = base_table(
        config.decoder,
        config.vision,
        config.newline,
        layout,
        # Those of `paper` and `tanh1` mean something that the authors' code does not compute.
        routed if weighting in ("official", "none") else (),
        weighting == "official",
    )
    saved = {name: full for name, full in known.saved.items() if name in table.by_source()}
    elsewhere = set(covered)
    for entry in table.entries():
        if live.own_module(entry.source) and entry.target not in elsewhere:
            saved.setdefault(entry.source, spell_saved(entry.source))
    adapted = {
        module: path
        for module, path in linears(table).items()
        if config.lora.adapts(target_name(path))
    }
    pairs = {module: known.lora.get(module, spell(module)) for module in adapted}
    rules = [*saved_rules(table, saved), *lora_rules(adapted, pairs)]
    if original is None or not _describes(original, config.lora, adapted):
        original = lora_to_hf(config.lora, adapted, _whole_modules(saved))
    return Table(rules=tuple(rules)), dict(original)


def _base_directory(adapter: Adapter, options: Options) -> Path:
    if options.base is not None:
        return options.base
    name = adapter.hf.get("base_model_name_or_path")
    if not isinstance(name, str) or not os.path.isdir(name):
        raise UserError(
            f"{adapter.where}: base_model_name_or_path is {shown(name)}, which is no directory "
            "here; pass --base with the model that was adapted, its directory or name on the Hub"
        )
    return Path(name)


def _apply(adapter: Adapter, base: Draft, options: Options) -> Draft:
    """The base with the adapter as one more part."""
    if base.decoder is None:
        raise UserError(
            f"{base.parts[0].source.directory} is a vision tower; pass --base with the language "
            f"model or LLaVA that {adapter.where} adapts"
        )
    layout, table = _find_table(adapter, base)
    where, tied = base.parts[0].source.directory, base.decoder.tie_embeddings
    left_out, saved = _split(adapter, table)
    check_saved(adapter, saved, table, tied, where)
    adapted = adapted_linears(adapter, table, where)
    if options.merge and tied and _HEAD in adapted.values():
        raise UserError(
            f"{adapter.where} adapts an output head that is tied to the embeddings, which cannot "
            "be merged; leave --merge out"
        )
    rules = saved_rules(table, saved)
    check_shapes(adapter, adapted, _weights(base, rules, adapter))
    merges, lora = {}, NO_LORA
    if options.merge:
        for module, path in adapted.items():
            a, b = adapter.names.lora[module]
            scale = adapter.lora.alpha_of(module) / adapter.lora.rank_of(module)
            merges[path] = Merge(a=a, b=b, scale=scale)
            left_out |= dict.fromkeys((re.escape(a), re.escape(b)), "is merged into its kernel")
    else:
        lora = uniform_lora(adapter, adapted, table)
        rules += lora_rules(adapted, adapter.names.lora)
    base = _without_replaced(base, rules, adapter)
    part = Part(
        role="adapter",
        family=live.FAMILY if adapter.is_live else FAMILY,
        layout=layout,
        source=adapter.source,
        table=Table(rules=tuple(rules), left_out=left_out),
        config=adapter.hf,
    )
    return dataclasses.replace(
        base,
        parts=(*base.parts, part),
        tokenizer=find_tokenizer(options, adapter.source.directory, where),
        lora=lora,
        merges=merges,
    )


def _find_table(adapter: Adapter, base: Draft) -> tuple[str, Table]:
    """The layout of the base's names in memory that most of the adapter's names belong to."""
    layouts: tuple[str, ...] = (live.LAYOUT if adapter.is_live else llama.LAYOUT,)
    if base.parts[0].family in llava.DEFAULTS:
        layouts = tuple(llava.LAYOUTS)
    bias = base.routing is not None and base.routing.weighting == "official"
    tables = {
        name: base_table(base.decoder, base.vision, base.newline, name, adapter.names.routed, bias)
        for name in layouts
    }
    layout = find_layout({n: t.by_source() for n, t in tables.items()}, adapter.names.subjects)
    return layout, tables[layout]


def _split(adapter: Adapter, table: Table) -> tuple[dict[str, str], dict[str, str]]:
    """Why tensors have no place in our model, by pattern, and the whole tensors that have."""
    left_out, saved = {}, {}
    for name, full in adapter.names.saved.items():
        reasons = [why for pattern, why in table.left_out.items() if re.fullmatch(pattern, name)]
        if reasons:
            left_out[re.escape(full)] = reasons[0]
        else:
            saved[name] = full
    return left_out, saved


def _weights(base: Draft, rules: list[Rule], adapter: Adapter) -> dict[str, TensorInfo]:
    """By kernel, the matrix that becomes it: the adapter's, where it replaces the base's."""
    named = [(entry, part.source) for part in base.parts for entry in part.table.entries()]
    named += [(rule, adapter.source) for rule in rules]
    found = {
        n.target: source.tensors[n.source] for n, source in named if n.source in source.tensors
    }
    if base.decoder.tie_embeddings:
        found[_HEAD] = found.get(_EMBEDDING)
    # What is missing or no matrix is refused when names and shapes of the base are checked.
    return {path: info for path, info in found.items() if info and len(info.shape) == 2}


def _without_replaced(base: Draft, rules: list[Rule], adapter: Adapter) -> Draft:
    """The base without the tensors that the adapter replaces."""
    replaced = {rule.target: rule.source for rule in rules}
    decoder = base.decoder
    if _EMBEDDING in replaced:
        # The adapter may have been trained with a larger vocabulary.
        rows = adapter.source.info(replaced[_EMBEDDING]).shape[0]
        decoder = dataclasses.replace(decoder, vocab_size=rows)
    parts = []
    for part in base.parts:
        gone = [entry.source for entry in part.table.entries() if entry.target in replaced]
        kept = [rule for rule in part.table.rules if not _fills(rule, replaced)]
        for rule in part.table.rules:
            if _fills(rule, replaced):
                others = [entry for entry in rule.entries() if entry.target not in replaced]
                kept += [Rule(source=e.source, target=e.target, axes=e.axes) for e in others]
        left_out = dict.fromkeys(map(re.escape, gone), "is replaced by a tensor of the adapter")
        table = dataclasses.replace(
            part.table, rules=tuple(kept), left_out={**part.table.left_out, **left_out}
        )
        parts.append(dataclasses.replace(part, table=table))
    return dataclasses.replace(base, decoder=decoder, parts=tuple(parts))


def _fills(rule: Rule, paths: Container[str]) -> bool:
    return any(entry.target in paths for entry in rule.entries())


def _describes(hf: Mapping[str, Any], lora: LoraConfig, modules: Mapping[str, str]) -> bool:
    """Whether an adapter_config.json says what a configuration of ours does."""
    theirs = read_lora(hf, CONFIG)
    return theirs.dropout == lora.dropout and all(
        theirs.targets(module)
        and (theirs.rank_of(module), theirs.alpha_of(module)) == (lora.rank, lora.alpha)
        for module in modules
    )


def _whole_modules(saved: Mapping[str, str]) -> list[str]:
    """What PEFT has to save whole; it does so itself with the weight under an adapter."""
    modules = (
        live.own_module(name) or name.rpartition(".")[0]
        for name, full in saved.items()
        if ".base_layer." not in full
    )
    return list(dict.fromkeys(modules))
