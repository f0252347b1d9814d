"""VideoLLM-online and its authors' Mixture-of-Depths: what their adapters hold beside LoRA.

Follows `LiveLlamaForCausalLM` of showlab/videollm-online (models/live_llama, models/vision_live.py,
models/arguments_live.py), and for routers its unmerged commit 5bb806e. `PeftModel.save_pretrained`
writes no config.json, so that most adapters do not say how many tokens a frame has, nor how they
route; then the defaults of the released `v1plus` hold, and options say the rest.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videollm_mod_jax.conversion.hf_config import integer, read_table, refusal, require_one_of
from videollm_mod_jax.conversion.llama import decoder_table, linear
from videollm_mod_jax.conversion.plan import Options
from videollm_mod_jax.conversion.table import Rule, Table, join
from videollm_mod_jax.data.dialogue import INTERVAL
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import DecoderConfig, RoutingConfig, VisionConfig
from videollm_mod_jax.models.config import INSERTIONS, MOST_PATCHES
from videollm_mod_jax.models.plan import routed_layers

FAMILY = "videollm-online"
LAYOUT = "live"
"""`LiveLlamaForCausalLM`: the names of Llama, `connector.{0,2}`, `model.layers.N.router`."""

_TOWER = "google/siglip-large-patch16-384"
# By the name before `_` in vision_drop_strategy: insertion and selection.
_STRATEGIES = {
    "mod": ("interleaved", "learned"),
    "modall": ("all", "learned"),
    "moddeep": ("interleaved-deep", "learned"),
    "moddeepall": ("all-deep", "learned"),
    "modrandom": ("interleaved", "random"),
    "moduniform": ("interleaved", "uniform"),
}


def read_config(directory: Path) -> Mapping[str, Any]:
    """The `config.json` beside an adapter, without its null keys; empty where there is none.

    Raises:
      UserError: it is no table of keys, or its frames are separated by something else than ours.
    """
    path = directory / "config.json"
    if not path.exists():
        return {}
    hf = read_table(path, "a model")
    hf = {key: value for key, value in hf.items() if value is not None}
    if (interval := hf.get("frame_token_interval", INTERVAL)) != INTERVAL:
        raise refusal(
            str(path),
            "frame_token_interval",
            interval,
            f"{INTERVAL!r}, the silence of our dialogues; without this key the weights are "
            "converted nevertheless, for fine-tuning",
        )
    return hf


def find_tower(hf: Mapping[str, Any], options: Options, directory: Path) -> Path:
    """The directory of the vision tower that an adapter's connector takes its features from.

    Raises:
      UserError: none is given, and config.json names none that is a directory.
    """
    if options.vision_tower is not None:
        return options.vision_tower
    name = str(hf.get("vision_pretrained", _TOWER))
    if not os.path.isdir(name):
        raise UserError(
            f"{directory} holds the connector of {FAMILY} without its vision tower; pass "
            f"--vision-tower with {name:.120}, its directory or name on the Hub"
        )
    return Path(name)


def frame_tokens(vision: VisionConfig, hf: Mapping[str, Any], where: str) -> VisionConfig:
    """The tower with the frame tokens that a config states.

    ```
    frame_token_cls  frame_token_pooled    tokens per frame
    true             [3, 3]                CLS and 3 x 3: 10     also without these keys
    true             null                  CLS: 1
    false            [3, 3]                3 x 3: 9
    ```

    Args:
      vision: the tower, which has a CLS token.
      hf: from `read_config`.
      where: the file, for messages.

    Raises:
      UserError: a frame would have no token, or another number than `frame_num_tokens`.
    """
    stated = {"frame_token_cls": True, **hf}
    has_class = require_one_of(stated, "frame_token_cls", (True, False), where)
    pool = hf.get("frame_token_pooled", [0, 0] if "frame_token_cls" in hf else [3, 3])
    if (
        not isinstance(pool, list)
        or len(pool) != 2
        or not all(type(n) is int and 0 <= n <= MOST_PATCHES for n in pool)
    ):
        raise refusal(where, "frame_token_pooled", pool, "two whole numbers, or null")
    if not has_class and pool == [0, 0]:
        raise refusal(where, "frame_token_cls", False, "true, or a frame_token_pooled")
    summary = vision.summary if has_class else "none"
    vision = dataclasses.replace(vision, pool=tuple(pool), summary=summary)
    count = vision.tokens_per_frame
    if hf.get("frame_num_tokens", count) != count:
        found = integer(hf, "frame_num_tokens", where)
        raise refusal(where, "frame_num_tokens", found, f"{count}, of its frame_token_ keys")
    return vision


def find_routing(
    hf: Mapping[str, Any],
    routed: tuple[int, ...],
    num_layers: int,
    options: Options,
    where: str,
) -> RoutingConfig | None:
    """How an adapter routes: `vision_drop_strategy`, checked against the routers that it holds.

    ```
    vision_drop_strategy   routed layers        selection      weighting
    mod_0.2                interleaved          learned        official, or none: is_mod_weighted
    modall_0.2             all                  learned        the same
    moddeep_0.2            interleaved-deep     learned        the same
    moddeepall_0.2         all-deep             learned        the same
    modrandom_0.2          interleaved          random         none
    moduniform_0.2         interleaved          uniform        none
    ```

    The last two act on every frame, as the paper says; in the authors' code on the first one.

    Args:
      hf: from `read_config`.
      routed: the layers that the adapter holds routers of.
      num_layers: of the decoder.
      options: `mod` says what a config does not, and replaces what it does.
      where: the file, for messages.

    Returns:
      None lets the options decide: fresh routers, or none.

    Raises:
      UserError: an unknown strategy, or routers and strategy that do not belong together.
    """
    stated = _strategy(hf, where)
    if not routed and (stated is None or options.mod is not None):
        return None
    if stated is not None and stated.selection == "learned" and not routed:
        raise UserError(
            f"{where}: vision_drop_strategy is {hf['vision_drop_strategy']!r}, but the adapter "
            "holds no routers: its authors' LoRA script neither trains nor saves them; pass --mod "
            f"{stated.insertion}:{stated.keep_ratio} for fresh ones"
        )
    if stated is None and options.mod is None:
        raise UserError(
            f"{where} does not say what share of a frame's tokens the routers of layers "
            f"{_listed(routed)} keep; pass it: --mod {_insertion(routed, num_layers)}:RATIO"
        )
    routing = stated or _routing("interleaved", 0.0, "learned", hf)
    if options.mod is not None:
        insertion, keep_ratio = options.mod
        routing = dataclasses.replace(routing, insertion=insertion, keep_ratio=keep_ratio)
    found = tuple(sorted(routed_layers(routing.insertion, num_layers)))
    if routed and found != routed:
        raise UserError(
            f"{where}: the adapter holds routers of layers {_listed(routed)}, but not of "
            f"{_listed(found)}; pass --mod {_insertion(routed, num_layers)}:RATIO"
        )
    if options.weighting is not None:
        if options.weighting not in (("official", "none") if routed else ("none",)):
            raise UserError(
                f"--weighting is {options.weighting}, but {where} belongs to a model that was "
                f"trained with {routing.weighting}; leave --weighting out"
            )
        routing = dataclasses.replace(routing, weighting=options.weighting)
    return routing


def live_table(decoder: DecoderConfig, routed: tuple[int, ...], bias: bool) -> Table:
    """Where the tensors of a `LiveLlamaForCausalLM` go.

    ```
    connector.0.weight             [D, W] -> params/connector/fc1/kernel [W, D]
    connector.2.bias               [D]    -> params/connector/fc2/bias
    model.layers.1.router.weight   [1, D] -> params/decoder/layer_1/router/kernel [D]
    model.layers.1.router.bias     [1]    -> params/decoder/layer_1/router/bias []
    ```

    Args:
      decoder: of the model.
      routed: layers with a router.
      bias: our routers have one, which they do for the weighting `official` alone.
    """
    rules = []
    for theirs, ours in (("connector.0", "fc1"), ("connector.2", "fc2")):
        target = f"params/connector/{ours}"
        rules += [linear(theirs, target), Rule(source=f"{theirs}.bias", target=f"{target}/bias")]
    for theirs, ours in (("weight", "kernel"), ("bias", "bias"))[: 1 + bias]:
        source = "model.layers.{i}.router." + theirs
        target = "params/decoder/layer_{i}/router/" + ours
        rules.append(Rule(source=source, target=target, squeeze=True, layers=routed))
    left_out = {}
    if not bias:
        reason = "shifts all scores of a frame alike, which changes nothing without weighting"
        left_out = {r"model\.layers\.\d+\.router\.bias": reason}
    return join(decoder_table(decoder), Table(rules=tuple(rules), left_out=left_out))


def own_module(name: str) -> str | None:
    """`connector` or `router`, for a tensor of the base that belongs to one; None for others."""
    found = re.match(r"(connector)\.|model\.layers\.\d+\.(router)\.", name)
    return (found[1] or found[2]) if found else None


def _strategy(hf: Mapping[str, Any], where: str) -> RoutingConfig | None:
    text = hf.get("vision_drop_strategy")
    if not text:
        return None
    name, _, ratio = str(text).partition("_")
    try:
        insertion, selection = _STRATEGIES[name]
        keep_ratio = float(ratio)
    except (KeyError, ValueError) as error:
        known = ", ".join(f"{name}_RATIO" for name in _STRATEGIES)
        raise refusal(where, "vision_drop_strategy", text, f"one of {known}") from error
    return _routing(insertion, keep_ratio, selection, hf)


def _routing(
    insertion: str, keep_ratio: float, selection: str, hf: Mapping[str, Any]
) -> RoutingConfig:
    weighted = selection == "learned" and hf.get("is_mod_weighted", True)
    return RoutingConfig(
        insertion=insertion,
        keep_ratio=keep_ratio,
        selection=selection,
        weighting="official" if weighted else "none",
        force_keep_last=False,
        exploration=0.0,
    )


def _insertion(routed: tuple[int, ...], num_layers: int) -> str:
    """How `--mod` calls some layers."""
    named = (name for name in INSERTIONS if routed_layers(name, num_layers) == routed)
    return next(named, _listed(routed))


def _listed(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers)) or "none"
