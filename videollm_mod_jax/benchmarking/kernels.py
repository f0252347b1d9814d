"""`benchmark kernels`: the parts of a layer at a config's shapes, each beside its floor."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.table import Table

from videollm_mod_jax.benchmarking import device, floors, kernel_cases, report
from videollm_mod_jax.benchmarking.kernel_cases import BLOCK, BOTH, FORWARD, ROUTED, Case, Shapes
from videollm_mod_jax.benchmarking.timing import measure
from videollm_mod_jax.benchmarking.training import variants
from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.models import VideoLLMConfig
from videollm_mod_jax.models.execution import KERNELS
from videollm_mod_jax.training.run import TrainingConfig

MLP_ROWS = (1024, 2048)
"""Rows of a sequence that the MLP is also timed on at a time."""

WORDS = (8192, 32_768)
"""Words of the vocabulary whose logits the loss is also timed on at a time."""

Rows = Sequence[Mapping[str, Any]]


def benchmark_kernels(
    model: VideoLLMConfig,
    data: DataConfig,
    training: TrainingConfig,
    *,
    lengths: Sequence[int],
    rounds: int,
    warmup: int,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Times every part, its cases in turn.

    Args:
      model: with routing.
      data: budget of an example.
      training: how it is trained.
      lengths: filled entries of a cache; the largest is its capacity.
      rounds, warmup: see `measure`.
      announce: called with what comes next.

    Returns:
      What `report.write` writes: `model`, `training`, `settings`, `shapes`, `peaks`; `parts`, by
      name a list of cases, each with its floors, times in seconds, and `from_xla`; and
      `routing_overhead`.

    Raises:
      UserError: the model routes nowhere.
    """
    variants(model)
    shapes = Shapes.of(model, data, training)
    announce("measuring the device")
    peaks = device.measured_peaks(model.dtype)
    parts = {
        "attention": lambda: kernel_cases.attention_cases(model, shapes),
        "layer": lambda: kernel_cases.layer_cases(model, shapes, training),
        "mlp": lambda: kernel_cases.mlp_cases(model, shapes, training, MLP_ROWS),
        "head and loss": lambda: kernel_cases.head_cases(model, shapes, training, WORDS),
        "attention to a cache": lambda: kernel_cases.cached_attention_cases(model, shapes, lengths),
    }
    rows = {}
    for part, make in parts.items():
        announce(part)
        # A part's arrays are made when it comes to it, and are gone behind it.
        cases = {(case.name, case.direction): case for case in make()}
        timings = measure(
            {", ".join(key): case.step for key, case in cases.items()}, rounds, warmup
        )
        rows[part] = [
            {"name": case.name, "direction": case.direction, "rows": case.rows}
            | {"from_xla": from_xla(case, cases)}
            | floors.measured(timings[", ".join(key)], case.work, peaks)
            for key, case in cases.items()
        ]
        del cases
    return {
        "model": model.to_dict(),
        "training": dataclasses.asdict(training),
        "settings": {"lengths": list(lengths), "rounds": rounds, "warmup": warmup},
        "shapes": dataclasses.asdict(shapes),
        "peaks": dataclasses.asdict(peaks),
        "parts": rows,
        "routing_overhead": routing_overhead(rows["layer"]),
    }


def from_xla(case: Case, cases: Mapping[tuple[str, str], Case]) -> float | None:
    """How far a kernel's results are from those of `xla` kernels, ‖a - b‖ / ‖b‖ of all arrays.

    Args:
      case: such as `full, gpu`.
      cases: by name and direction, `full, xla` among them.

    Returns:
      None for a case that no other one computes in plain XLA.
    """
    kind, _, rest = case.name.partition(", ")
    kernels, *more = rest.split(", ")
    plain = cases.get((", ".join((kind, "xla", *more)), case.direction))
    if kernels not in KERNELS or plain is None or plain is case:
        return None
    found, expected = (
        jax.tree.map(lambda x: x.astype(jnp.float32), each.step()) for each in (case, plain)
    )
    gap = optax.global_norm(jax.tree.map(jnp.subtract, found, expected))
    return float(gap / optax.global_norm(expected))


def routing_overhead(cases: Rows) -> dict[str, float]:
    """What a router, gate, gather and scatter add to the block of a layer, by direction.

    ```
    routed layer 10.4 ms      its block alone 10 ms      0.04
    ```

    Args:
      cases: of the part `layer`.
    """
    median = {(case["name"], case["direction"]): case["median"] for case in cases}
    return {
        direction: median[ROUTED, direction] / median[BLOCK, direction] - 1
        for direction in (FORWARD, BOTH)
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    """What `benchmark_kernels` returned, for the terminal."""
    columns = (
        "rows",
        "ms",
        "quartiles apart, ms",
        "floor, ms",
        "share of the floor, %",
        "from xla",
    )
    out = []
    for part, cases in result["parts"].items():
        rows = {
            f"{case['name']}, {case['direction']}": (
                str(case["rows"]),
                f"{1e3 * case['median']:.4g}",
                f"{1e3 * case['spread']:.3g}",
                f"{1e3 * max(case['flops_floor'], case['bytes_floor']):.4g}",
                f"{100 * case['share_of_floor']:.3g}",
                "" if case["from_xla"] is None else f"{case['from_xla']:.2g}",
            )
            for case in cases
        }
        out.append(report.table(part, columns, rows))
    rows = {
        direction: (f"{100 * share:.3g}",)
        for direction, share in result["routing_overhead"].items()
    }
    out.append(report.table("routing, on top of the block", ("%",), rows))
    return out
