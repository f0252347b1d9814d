"""Several processes that work as one: how they find each other, wait, share work and end.

A process on a machine with accelerators sees that machine's devices; JAX joins the processes, so
that arrays and meshes span all of them. Process 0 leads: it alone writes small files and prints.
One process without any of this is the plain case, in which every function here does the obvious.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from videollm_mod_jax import locks, signals
from videollm_mod_jax.data import files
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training import liveness
from videollm_mod_jax.training.coordinator import (
    TIMEOUT,
    Relay,
    check_free,
    limited,
    parse_address,
    wait_until_reached,
)
from videollm_mod_jax.training.sharding import MESH_AXES, Layout, make_layout

ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""What may be set instead of `--coordinator`, `--num-processes` and `--process-id`."""

_GRACE = 5.0
"""Seconds that process 0 waits longer than the others, so that each has its own say."""

_barriers = itertools.count()


class Stopped(Exception):
    """A run was asked to end (SIGTERM, Ctrl-C), has saved its state, and can be continued.

    Attributes:
      status: exit status of the command: 0 after SIGTERM, which schedulers send, 130 after Ctrl-C.
    """

    def __init__(self, message: str, signum: int = signal.SIGTERM):
        super().__init__(message)
        self.status = 0 if signum == signal.SIGTERM else signals.status_of(signum)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = TIMEOUT,
) -> None:
    """Joins the other processes of this job, if there are any; call it before anything else.

    On Cloud TPU, GKE, SLURM and under Open MPI, JAX finds out by itself; elsewhere the arguments or
    the variables of `ENVIRONMENT` say it. Without any of these the process stays alone. Also keeps
    compiled programs in the user's cache directory, so that a restart does not compile again;
    `JAX_COMPILATION_CACHE_DIR` names another one.

    Args:
      coordinator: host:port of process 0; any free port.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout: seconds to wait for the others. A process whose wait is over says so on stderr, and
        leaves with status 2.

    Raises:
      UserError: some of the three are given, and the rest is neither given nor found; they make no
        sense; the port is in use, or process 0 was not reached in time.
    """
    coordinator = coordinator or os.environ.get(ENVIRONMENT[0])
    num_processes = _number(num_processes, ENVIRONMENT[1])
    process_id = _number(process_id, ENVIRONMENT[2])
    if not 0 < timeout <= 86400:
        raise UserError(f"--coordinator-timeout is {timeout}; expected a number in (0, 86400]")
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    relay = None
    if all(given):
        address = parse_address(coordinator)
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--process-id is {process_id} and --num-processes {num_processes}; expected 1 or "
                "more processes, numbered from 0"
            )
        if process_id:
            wait_until_reached(address, timeout)
            relay = Relay(address)
        else:
            check_free(address)

    def give_up() -> None:
        where = f" at {coordinator}" if coordinator else ""
        count = f"{num_processes} processes" if num_processes else "processes"
        # Said last by process 0, whose end makes JAX abort the others.
        time.sleep(0 if process_id else _GRACE)
        print(
            f"error: not all {count} of this job have met{where} after {timeout:g} s; start all of "
            "them, with the same --num-processes, or wait longer: --coordinator-timeout",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    alone = False
    try:
        with limited(timeout, give_up):
            jax.distributed.initialize(
                relay.address if relay else coordinator,
                num_processes,
                process_id,
                cluster_detection_method="deactivate" if all(given) else None,
                # Longer than ours, since it ends in the trace of a C++ stack.
                initialization_timeout=int(timeout) + 600,
            )
    except ValueError as error:
        if any(given):
            raise UserError(
                f"--coordinator is {coordinator}, --num-processes {num_processes} and --process-id "
                f"{process_id}: {error} Give all three, or the variables {', '.join(ENVIRONMENT)}"
            ) from error
        alone = True
    except RuntimeError as error:
        if any(given) or isinstance(error, jax.errors.JaxRuntimeError):
            raise
        # JAX runs already: a verb that a notebook calls. There is nobody to join.
        return
    if jax.config.jax_compilation_cache_dir is None:
        # Without a home (an unknown user), programs are compiled each time.
        with contextlib.suppress(RuntimeError):
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            compiled = cache / "videollm_mod_jax" / "compiled"
            jax.config.update("jax_compilation_cache_dir", str(compiled))
    if alone:
        return
    liveness.watch(relay, coordinator)


def is_lead() -> bool:
    """Whether this process writes small files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here; all must pass the same barriers in one order."""
    if jax.process_count() > 1:
        liveness.client().wait_at_barrier(f"{name}/{next(_barriers)}", liveness.PATIENCE_MS)


@contextlib.contextmanager
def lead_first(name: str) -> Iterator[bool]:
    """Process 0 runs the block, then all others do, who find on disk what it made.

    Yields:
      Whether this is process 0.
    """
    lead = is_lead()
    if not lead:
        barrier(name)
    yield lead
    if lead:
        barrier(name)


@contextlib.contextmanager
def holding(directory: str | os.PathLike, command: str, *, beside: bool = False) -> Iterator[None]:
    """Holds a directory for this job in the block: process 0 locks it, and clears it of what killed
    processes left.

    Args:
      directory: what the job writes.
      command: for the message to others.
      beside: see `locks.locked`.

    Raises:
      UserError: another process holds it.
    """
    if not is_lead():
        yield
        return
    with locks.locked(directory, command, beside=beside):
        if beside:
            files.remove_leftovers_of(directory)
        else:
            files.remove_leftovers(directory)
        yield


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; values are json types."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text))).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def own_layout(rule_set: str, mesh_shape: tuple[int, int, int]) -> Layout:
    """How a whole model lies on the devices of this process alone, for work that is not shared.

    Args:
      rule_set: as in `make_layout`, whose layout a process has that is alone.
      mesh_shape: of all devices of all processes; several have all of their own along fsdp.
    """
    layout = make_layout(rule_set, mesh_shape)
    if jax.process_count() == 1:
        return layout
    devices = np.asarray(jax.local_devices()).reshape(1, -1, 1)
    mesh = Mesh(devices, MESH_AXES, axis_types=layout.mesh.axis_types)
    return Layout(mesh, layout.rules)


class StopSignal:
    """Notices SIGTERM and Ctrl-C, so that a run can save before it ends; a context manager.

    Schedulers send SIGTERM before they take a machine away. Alone, a process stops after the update
    in progress. Of several, any of which may get SIGTERM, all stop after the same update: JAX
    agrees on one that none has passed; Ctrl-C ends them at once.

    Attributes:
      signum: the signal that came; SIGTERM among several processes.
    """

    def __enter__(self) -> "StopSignal":
        self.signum: int = signal.SIGTERM
        self._received = False
        self._stack = contextlib.ExitStack()
        # JAX handles the signal itself once it has joined processes.
        self._waits = (
            not jax.distributed.is_initialized()
            and threading.current_thread() is threading.main_thread()
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this update; ask in all processes, at every update."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        if self._waits:
            # Not before the first update, which compiles for minutes and leaves nothing to save.
            self._stack.enter_context(signals.stopping_softly(self._receive))
            self._waits = False
        return self._received

    def _receive(self, signum: int) -> None:
        self.signum, self._received = signum, True


def _number(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or not text:
        return value
    if not text.isdigit():
        raise UserError(f"{variable} is {text!r}; expected a number")
    return int(text)
