"""Processes beside each other, each with a device for itself."""

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from videollm_mod_jax import signals
from videollm_mod_jax.config_dict import COUNT, Checked, Interval

LOG = "workers.log"

Slot = tuple[str, str]
"""An environment variable, or "cpu", and the number of the device; empty for all devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices(Checked):
    """Where a study runs, and for how long it has.

    Attributes:
      platform: of JAX.
      ids: of its devices.
      seconds: that the study has taken so far.
      workers: runs at a time.
    """

    platform: str
    ids: tuple[Annotated[int, Interval("[0, 2**31)")], ...]
    seconds: Annotated[float, Interval("[0, 1e10]")]
    workers: COUNT


def slots_of(here: Devices) -> list[Slot]:
    """What each run at a time has for itself: (environment variable or "cpu", number)."""
    if here.platform == "gpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else map(str, here.ids)
        return [("CUDA_VISIBLE_DEVICES", name) for name in names]
    if here.platform == "cpu":
        return [("cpu", str(core)) for core in sorted(os.sched_getaffinity(0))]
    return [("", "")]


@contextlib.contextmanager
def pool_of(workdir: Path, workers: int, slots: Sequence[Slot]) -> Iterator[ProcessPoolExecutor]:
    """Processes that each have a slot for themselves, and print to `LOG` of the workdir."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for slot in slots:
        queue.put(slot)
    with ProcessPoolExecutor(workers, context, _start_worker, (queue, workdir / LOG)) as pool:
        yield pool


def in_process(function: Callable[..., Any], workdir: Path, *arguments: Any) -> Any:
    """Calls a function in a process of its own, which holds devices no longer than it runs."""
    with pool_of(workdir, 1, [("", "")]) as pool:
        return pool.submit(function, *arguments).result()


def _start_worker(queue: Any, log: Path) -> None:
    """Gives a process its device, before JAX looks for any, and a file for what it prints."""
    signals.end_with_parent()
    kind, number = queue.get()
    if kind == "cpu":
        os.sched_setaffinity(0, {int(number)})
    elif kind:
        os.environ[kind] = number
        # More runs than GPUs share one.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    printed = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(printed, stream)
