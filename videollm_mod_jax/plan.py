r"""Compiles a config's training step for hardware that need not be here, and says what it needs.

    python -m videollm_mod_jax.plan --config configs/ego4d_narration.py:v5p-16 --topology v5p:2x2x2
    python -m videollm_mod_jax.plan --config configs/ego4d_narration.py:gpu-8 --topology h200:8
    python -m videollm_mod_jax.plan --config configs/digits.py --topology cpu:8 --memory 0.5

The step is the very one that `train` runs. Memory and operations are read from the compiled
program; times are estimates from the chip's peaks. Any key of the config can be overridden:
--config.training.microbatches=4. TPU topologies need `pip install -e ".[tpu]"` and no TPU; GPUs
need `pip install jax-cuda12-plugin jax-cuda12-pjrt` and no GPU.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from videollm_mod_jax import cli
from videollm_mod_jax.console import make_console
from videollm_mod_jax.experiment import plain, read_training
from videollm_mod_jax.models import VideoLLMConfig
from videollm_mod_jax.models.config import full_computation
from videollm_mod_jax.planning import (
    Plan,
    longest_stream,
    plan_streaming,
    plan_training,
    scale_frames,
)
from videollm_mod_jax.training import compiled
from videollm_mod_jax.training.checkpoint import write_json
from videollm_mod_jax.training.chips import GIB


def _rows(plan: Plan) -> dict[str, str]:
    """What the table says of a plan, by line."""
    program = plan.program
    verdict = {True: "fits", False: "does NOT fit", None: "memory unknown: give --memory"}
    rows = {"verdict": verdict[plan.fits]}
    if plan.limit_bytes is not None:
        rows["memory limit"] = _gib(plan.limit_bytes)
    if program.fits:
        rows["memory needed"] = _gib(plan.needed_bytes)
        rows["  vision tower, beside the step  [counted]"] = _gib(plan.tower_bytes)
        rows["  peak of the step  [compiler]"] = _gib(program.peak_bytes)
        rows["    arguments  [compiler]"] = _gib(program.argument_bytes)
    else:
        needed = program.needed_bytes
        rows["  needed by the step  [compiler]"] = "not said" if needed is None else _gib(needed)
    for part, size in plan.parts.items():
        rows[f"      {part}  [counted]"] = _gib(size)
    if program.fits:
        rest = program.peak_bytes - program.argument_bytes
        rows["    activations, gradients, workspace  [peak - arguments]"] = _gib(rest)
        rows["TFLOPs, matrix products  [compiled program]"] = f"{program.cost.flops / 1e12:.4g}"
        if program.flops_loops_once is not None:
            rows["TFLOPs, loop bodies once  [XLA]"] = f"{program.flops_loops_once / 1e12:.4g}"
    rows["TFLOPs, floor  [analytic]"] = f"{plan.floor_flops / 1e12:.4g}"
    if plan.recomputed_flops:
        without = plan.floor_flops - plan.recomputed_flops
        rows["  without recomputation  [analytic]"] = f"{without / 1e12:.4g}"
    if program.fits:
        rows["  compiled / floor"] = f"{program.cost.flops / plan.floor_flops:.3f}"
    if program.fits:
        for collective in program.cost.collectives:
            rows[f"{collective.kind}  [compiled program]"] = (
                f"{collective.count} x, {_gib(collective.result_bytes)}"
            )
        if program.cost.unknown_loops:
            rows["loops of unknown length, counted once"] = str(program.cost.unknown_loops)
        for kernel in program.cost.unknown_kernels:
            rows[f"not counted: {kernel}"] = "unknown"
    if plan.seconds:
        for resource, seconds in plan.seconds.items():
            rows[f"{resource} at peak  [estimate]"] = _milliseconds(seconds)
        rows["step, by the slowest of them  [estimate]"] = _milliseconds(max(plan.seconds.values()))
    if plan.cache_bytes_per_frame is not None:
        rows["cache per frame  [counted]"] = f"{plan.cache_bytes_per_frame / 2**20:.4g} MiB"
    if plan.frames_until_full is not None:
        rows["frames until full  [estimate]"] = str(plan.frames_until_full)
    return rows


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def _gib(size: int) -> str:
    return f"{size / GIB:.4g} GiB"


def _table(title: str, plans: Sequence[Plan]) -> Table:
    table = Table(title=title)
    table.add_column("per device")
    columns = [_rows(plan) for plan in plans]
    for plan in plans:
        table.add_column(f"{plan.name}, {plan.frames} frames", justify="right")
    for row in dict.fromkeys(row for column in columns for row in column):
        table.add_row(row, *(column.get(row, "") for column in columns))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments, overrides = _parser().parse_known_args(argv)
    return cli.report_user_errors(lambda: _run(arguments, overrides))


def _run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    compiled.claim_no_device(arguments.topology)
    model, data, training = read_training(plain(cli.read_config(arguments.config, overrides)))
    target = compiled.find_target(arguments.topology)
    limit = None if arguments.memory is None else int(arguments.memory * GIB)
    models = [model]
    if arguments.compare:
        models.append(dataclasses.replace(model, routing=full_computation()))

    def plan(model: VideoLLMConfig, frames: int) -> Plan:
        scaled = scale_frames(data, frames)
        if arguments.serve:
            return plan_streaming(model, scaled, target, limit)
        return plan_training(model, scaled, training, target, limit)

    console, plans = make_console(), []

    def report(plan: Plan) -> None:
        console.print(f"{plan.name}, {plan.frames} frames: {_rows(plan)['verdict']}")

    for variant in models:
        if arguments.max_frames:
            best = longest_stream(lambda n, m=variant: plan(m, n), data.frames, report)
            plans += [best] if best else []
        else:
            plans.append(plan(variant, data.frames))
    versions = compiled.versions()
    step = "streaming step, one device" if arguments.serve else "training step"
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.print(_table(f"{step} on {arguments.topology} ({named})", plans))
    if arguments.json:
        out = {"config": arguments.config, "overrides": overrides, "step": step}
        out |= {"topology": arguments.topology, "devices": len(target.devices)}
        out |= {"versions": versions, "plans": [dataclasses.asdict(plan) for plan in plans]}
        write_json(Path(arguments.json), out)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m videollm_mod_jax.plan",
        description="Compiles a config's step for hardware that need not be here. Keys of the "
        "config are overridden as in train: --config.training.microbatches=4.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a file of configs/")
    add("--topology", required=True, metavar="NAME", help="v5e:4x4, v5p:2x2x2, h200:8, cpu:8")
    add(
        "--memory",
        type=cli.number("(0, 1e6]"),
        metavar="GB",
        help="GiB per device; by default the chip's",
    )
    add("--json", metavar="FILE", help="write the numbers there, too")
    add("--compare", choices=["full"], help="put the model without routing beside it")
    add("--max-frames", action="store_true", help="find the longest stream that fits")
    add("--serve", action="store_true", help="plan the streaming step, not the training step")
    return parser


if __name__ == "__main__":
    cli.leave(main())
