"""`benchmark train`: a config's very training step, with routing and without, in turn."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from videollm_mod_jax.benchmarking import device
from videollm_mod_jax.benchmarking.batch import random_batch
from videollm_mod_jax.benchmarking.device import Peaks
from videollm_mod_jax.benchmarking.sides import Side, draw_weights, weights_for
from videollm_mod_jax.benchmarking.timing import Timing, measure
from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import (
    VideoLLMConfig,
    config_plan,
    full_computation,
)
from videollm_mod_jax.models.flops import training_flops
from videollm_mod_jax.training import compiled, sharding
from videollm_mod_jax.training.compiled import Program, Target
from videollm_mod_jax.training.run import Run, TrainingConfig


def variants(model: VideoLLMConfig) -> dict[str, VideoLLMConfig]:
    """The model of a config, `mod`, and the same without routing, `full`.

    Raises:
      UserError: it routes nowhere, so that there is nothing to compare.
    """
    if all(spec.keep is None for spec in config_plan(model)):
        raise UserError(
            "model.routing.insertion routes nowhere, so that there is nothing to compare with full "
            "computation; give a config with routing"
        )
    return {"full": dataclasses.replace(model, routing=full_computation()), "mod": model}


def benchmark_training(
    model: VideoLLMConfig,
    data: Sequence[DataConfig],
    training: TrainingConfig,
    *,
    rounds: int,
    warmup: int,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Times the step of both variants for every budget, with the same weights and batch.

    Args:
      model: with routing.
      data: budgets of an example, one row of the result each.
      training: how it is trained.
      rounds, warmup: see `measure`.
      announce: called with what comes next.

    Returns:
      What `report.write` writes: `model`, `training`, `settings`, `peaks`, and `rows`, each with
      its shapes, `full`, `mod` and `ratio` (mod / full). Times are seconds, bytes and operations
      are per device. What does not fit into memory has no times.

    Raises:
      UserError: the model routes nowhere, or the batch does not divide over the devices.
    """
    configs = variants(model)
    layout = sharding.make_layout(training.sharding, training.mesh)
    runs = {name: Run.build(training, config, layout) for name, config in configs.items()}
    target = Target("these devices", list(layout.mesh.devices.flat), None)
    announce("measuring the device")
    peaks = device.measured_peaks(model.dtype)
    announce("drawing weights")
    weights = {"mod": draw_weights(runs["mod"], model)}
    rows = []
    for budget in data:
        shapes = {
            "frames": budget.frames,
            "tokens_per_frame": model.tokens_per_frame,
            "text_tokens": budget.text_tokens,
            "labels": budget.labels,
            "sequence_length": budget.text_tokens + budget.frames * model.tokens_per_frame,
            "batch_size": budget.batch_size,
        }
        abstract = compiled.abstract_batch(
            model, budget.batch_size, budget.frames, budget.text_tokens, budget.labels
        )
        batch = layout.put_batch(random_batch(model, budget))
        sides, programs, device_peaks = {}, {}, {}
        # The smaller one first: the device only knows the most that was ever in use.
        for name in ("mod", "full"):
            announce(f"{budget.frames} frames, {name}: compiling")
            run = runs[name]
            programs[name] = compiled.compile_program(run.lower(abstract), target)
            if not programs[name].fits:
                continue
            if name not in weights:
                weights[name] = weights_for(run, runs["mod"], weights["mod"])
            side = Side(run, *weights[name], batch)
            device_peaks[name] = side.try_out()
            if side.fits:
                sides[name] = side
        announce(f"{budget.frames} frames: timing")
        timings = measure({n: sides[n].step for n in configs if n in sides}, rounds, warmup)
        measured = {
            name: {
                **figures(
                    config, budget, training, target, programs[name], timings.get(name), peaks
                ),
                "device_peak_bytes": device_peaks.get(name),
            }
            for name, config in configs.items()
        }
        rows.append(shapes | measured | {"ratio": ratios(measured)})
        del sides, side, batch
    return {
        "model": model.to_dict(),
        "training": dataclasses.asdict(training),
        "settings": {"rounds": rounds, "warmup": warmup},
        "peaks": dataclasses.asdict(peaks),
        "rows": rows,
    }


def figures(
    config: VideoLLMConfig,
    data: DataConfig,
    training: TrainingConfig,
    target: Target,
    program: Program,
    timing: Timing | None,
    peaks: Peaks,
) -> dict[str, Any]:
    """What one variant costs: bytes and operations per device, beside the floor.

    Args:
      config: of the variant.
      data: budget and batch size.
      training: how it is trained.
      target: the devices.
      program: the compiled step.
      timing: of the step; None if it did not fit into memory.
      peaks: of one device.
    """
    sequences = data.batch_size / len(target.devices)

    def floor(remat: bool) -> float:
        count = training_flops(
            config,
            data.frames,
            data.text_tokens,
            data.labels,
            trainable=training.trainable,
            remat=remat,
        )
        return sequences * count.total

    floor_flops, model_flops = floor(training.remat), floor(remat=False)
    figures = {
        "fits": timing is not None,
        "compiled_flops": program.cost.flops if program.fits else None,
        "floor_flops": floor_flops,
        "floor_seconds": floor_flops / peaks.flops,
        "compiler_peak_bytes": program.peak_bytes or program.needed_bytes,
    }
    if timing is None:
        return figures
    tokens = data.text_tokens + data.frames * config.tokens_per_frame
    return figures | {
        "seconds": timing.to_dict(),
        "sequences_per_second": data.batch_size / timing.median,
        "tokens_per_second": data.batch_size * tokens / timing.median,
        "share_of_floor": floor_flops / peaks.flops / timing.median,
        "model_flops_utilisation": model_flops / peaks.flops / timing.median,
    }


def ratios(row: Mapping[str, Any]) -> dict[str, float]:
    """Mod over full of every number, or median, that both have."""
    out = {}
    for key in row["full"]:
        mod, full = (_number(row[name].get(key)) for name in ("mod", "full"))
        if mod is not None and full:
            out[key] = mod / full
    return out


def _number(value: Any) -> float | None:
    if isinstance(value, Mapping):
        return value["median"]
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
