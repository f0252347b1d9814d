"""The layer plan: what each decoder layer computes, as explicit data.

Routing, early exit and layer skipping are all the same decoder with another plan. Training scans
over the plan's periods, decoding unrolls it; the two parameter trees differ only in stacking, and
`stack_layers` / `unstack_layers` are inverse functions between them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.config import RoutingConfig, VideoLLMConfig


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one decoder layer does.

    Attributes:
      keep: tokens of each frame that the layer computes, 0 <= keep <= N, chosen by its router;
        None for a dense layer, which computes every token and has no router.
    """

    keep: int | None


Plan = tuple[LayerSpec, ...]

MAX_PERIOD = 4
"""Longest period that `scan_groups` looks for."""


def keep_count(keep_ratio: float, tokens_per_frame: int) -> int:
    """K = ceil(keep_ratio * N), the kept tokens of a frame.

    A product that is whole up to rounding counts as whole: 0.07 * 100 is 7.000000000000001 in
    binary floating point, and keeps 7.
    """
    return math.ceil(round(keep_ratio * tokens_per_frame, 6))


def routed_layers(insertion: str | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Indices of the routed layers.

    ```
    num_layers = 8
    interleaved          1 3 5 7
    all                  0 1 2 3 4 5 6 7
    all-deep             2 3 4 5 6 7
    interleaved-deep     3 5 7
    (2, 6)               2 6
    ```

    Raises:
      UserError: an explicit index outside the decoder, or given twice.
    """
    named = {
        "interleaved": range(1, num_layers, 2),
        "all": range(num_layers),
        "all-deep": range(2, num_layers),
        "interleaved-deep": range(3, num_layers, 2),
    }
    layers = tuple(named[insertion]) if isinstance(insertion, str) else tuple(insertion)
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UserError(
                f"routing.insertion names layer {layer}; the decoder has layers 0 to "
                f"{num_layers - 1}"
            )
    if len(set(layers)) != len(layers):
        raise UserError(f"routing.insertion names a layer twice: {layers}")
    return layers


def layer_plan(num_layers: int, routing: RoutingConfig, tokens_per_frame: int) -> Plan:
    """One `LayerSpec` per decoder layer.

    Raises:
      UserError: `keep_ratio` is a tuple of another length than `num_layers`.
    """
    ratios = routing.keep_ratio
    if not isinstance(ratios, tuple):
        ratios = (ratios,) * num_layers
    if len(ratios) != num_layers:
        raise UserError(
            f"routing.keep_ratio has {len(ratios)} entries; the decoder has {num_layers} layers, "
            "and needs one number or one entry per layer"
        )
    routed = set(routed_layers(routing.insertion, num_layers))
    return tuple(
        LayerSpec(keep=keep_count(ratios[i], tokens_per_frame) if i in routed else None)
        for i in range(num_layers)
    )


def config_plan(config: VideoLLMConfig) -> Plan:
    """The layer plan of a whole model."""
    return layer_plan(config.decoder.num_layers, config.routing, config.tokens_per_frame)


def scan_groups(plan: Plan) -> tuple[tuple[Plan, int], ...]:
    """Splits a plan into runs of repeated periods, each of which one scan can cover.

    Of all splits into periods of up to `MAX_PERIOD` layers it takes one that traces the fewest
    layers, and of those one with the fewest scans.

    ```
    plan                       groups
    D m D m D m D m            ((D m), 4)
    D D m m m m                ((D), 2) ((m), 4)
    D D D m D m D m            ((D), 2) ((D m), 3)
    ```
    """
    # best[i]: (layers traced, scans, groups) of plan[i:].
    best = {len(plan): (0, 0, ())}
    for start in reversed(range(len(plan))):
        options = []
        for period in range(1, min(MAX_PERIOD, len(plan) - start) + 1):
            unit, repeats = plan[start : start + period], 1
            while True:
                end = start + repeats * period
                traced, scans, groups = best[end]
                options.append((traced + period, scans + 1, ((unit, repeats), *groups)))
                if plan[end : end + period] != unit:
                    break
                repeats += 1
        best[start] = min(options, key=lambda option: option[:2])
    return best[0][2]


def unstack_layers(tree: Any, plan: Plan) -> Any:
    """Turns scanned decoder layers into one entry per layer; `stack_layers` is the inverse.

    ```
    'decoder': {'group_0': {                         'decoder': {'layer_0': {'w': [...]},
        'layer_0': {'w': [16, ...]},            ->               'layer_1': {'w': [...]},
        'layer_1': {'w': [16, ...]}},                            ...
      'norm': ...}                                               'layer_31': ..., 'norm': ...}
    ```

    Changes every dict called `decoder` inside `tree` (parameters, LoRA, optimizer moments; entries
    may be missing where nothing is trained) and leaves the rest alone. Leaves may be arrays or
    `jax.ShapeDtypeStruct`s.
    """

    def unstack(node: Mapping[str, Any]) -> dict[str, Any]:
        layers = {k: v for k, v in node.items() if not k.startswith("group_")}
        for group, slot, members in _members(plan):
            if slot in node.get(group, {}):
                for r, name in enumerate(members):
                    layers[name] = jax.tree.map(lambda x, r=r: _take(x, r), node[group][slot])
        return layers

    return _map_decoders(tree, unstack)


def stack_layers(tree: Any, plan: Plan) -> Any:
    """Stacks per-layer entries for scanning; the inverse of `unstack_layers`, drawn there."""

    def stack(node: Mapping[str, Any]) -> dict[str, Any]:
        groups = {k: v for k, v in node.items() if not k.startswith("layer_")}
        for group, slot, members in _members(plan):
            if members[0] in node:
                layers = [node[name] for name in members]
                groups.setdefault(group, {})[slot] = jax.tree.map(lambda *x: _stack(x), *layers)
        return groups

    return _map_decoders(tree, stack)


def _members(plan: Plan) -> Iterator[tuple[str, str, list[str]]]:
    """Yields (group, slot in its period, names of the layers stacked there)."""
    first = 0
    for g, (period, repeats) in enumerate(scan_groups(plan)):
        for j in range(len(period)):
            members = [f"layer_{first + r * len(period) + j}" for r in range(repeats)]
            yield f"group_{g}", f"layer_{j}", members
        first += len(period) * repeats


def _map_decoders(tree: Any, change: Callable[[Mapping], Mapping]) -> Any:
    def is_match(node: Any) -> bool:
        return isinstance(node, Mapping) and "decoder" in node

    return jax.tree.map(
        lambda n: n | {"decoder": change(n["decoder"])} if is_match(n) else n,
        tree,
        is_leaf=is_match,
    )


def _take(leaf: Any, index: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[index]


def _stack(leaves: tuple[Any, ...]) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)
