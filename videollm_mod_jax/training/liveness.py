"""How several processes that work as one notice the end of another, and end together.

A collective waits for all processes, so one that is gone would keep the others until a timeout of
minutes, which ends in an abort of JAX. Here each gives signs of life in the store of JAX's
coordinator, and one that ends says so there.
"""

import atexit
import contextlib
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

import jax

from videollm_mod_jax.training.coordinator import Relay

PATIENCE_MS = 7 * 24 * 3600 * 1000
"""Waiting for process 0 to draw a dataset may take hours; a process that died is noticed anyway."""

SILENCE = 30.0
"""Seconds without a sign of life until a process is gone."""

_BEAT = 2.0
_END = "videollm_mod_jax/end"
_LIFE = "videollm_mod_jax/life"


def watch(relay: Relay | None, coordinator: str | None) -> None:
    """Begins to give signs of life and to watch those of the others; JAX has joined them.

    Args:
      relay: between JAX and the coordinator; None in process 0, and where JAX found the coordinator
        by itself, which then aborts when process 0 is gone.
      coordinator: its address, for the message.
    """
    if relay is not None:
        relay.watch(lambda: _coordinator_gone(coordinator))
    ends = threading.Thread(target=_end_with_the_others, daemon=True)
    ends.start()
    threading.Thread(target=_live, daemon=True).start()
    atexit.register(_finish, ends, relay)


def end_all(status: int, message: str | None) -> NoReturn:
    """Ends all processes of the job with one message, whatever the others are waiting for.

    A process that just left would keep the others in their next collective until a timeout.

    Args:
      status: exit status of all of them.
      message: printed on stderr if this process is the first to end; None for the traceback of
        the exception being handled.
    """
    message = traceback.format_exc().rstrip() if message is None else message
    try:
        client().key_value_set(_END, f"{status} {jax.process_index()}")
    except jax.errors.JaxRuntimeError as error:
        # Another one was first: it has spoken, and the thread below ends this process.
        if "ALREADY_EXISTS" in str(error):
            threading.Event().wait()
    print(message, file=sys.stderr)
    _leave(status)


def client() -> Any:
    """JAX's client of the coordinator's store."""
    # It has no public name; Orbax takes it from the same place.
    from jax._src import distributed

    return distributed.global_state.client


def _coordinator_gone(coordinator: str | None) -> None:
    # A process that ends the job says so first, and leaves a moment later.
    time.sleep(_BEAT)
    print(
        f"error: process 0 of {jax.process_count()}, at {coordinator}, is gone, and process "
        f"{jax.process_index()} ends; the same command goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _end_with_the_others() -> None:
    """Waits, in a thread, for a process that ends all of them."""
    try:
        status, first = map(int, client().blocking_key_value_get(_END, PATIENCE_MS).split())
    except jax.errors.JaxRuntimeError:
        # Process 0 is gone, which JAX reports itself.
        return
    if status and first != jax.process_index():
        _leave(status)


def _live() -> None:
    """Gives signs of life, in a thread; process 0 ends the job when those of another fail to come.

    JAX notices it, too, later, and aborts.
    """
    store, own = client(), jax.process_index()
    seen = {i: ("", time.monotonic()) for i in range(jax.process_count())}
    for beat in itertools.count():
        try:
            store.key_value_set(f"{_LIFE}/{own}", str(beat), allow_overwrite=True)
            if own == 0:
                _check_alive(dict(store.key_value_dir_get(_LIFE)), seen)
        except jax.errors.JaxRuntimeError:
            # The job is at its end, or process 0 is gone, which JAX reports itself.
            return
        time.sleep(_BEAT)


def _check_alive(found: Mapping[str, str], seen: dict[int, tuple[str, float]]) -> None:
    now = time.monotonic()
    for index, (beat, since) in seen.items():
        latest = found.get(f"{_LIFE}/{index}", "")
        if latest != beat:
            seen[index] = latest, now
        elif now - since > SILENCE:
            end_all(
                1,
                f"error: process {index} of {len(seen)} has given no sign of life for "
                f"{SILENCE:.0f} s, and the others end; the same command goes on from the last "
                "checkpoint",
            )


def _finish(ends: threading.Thread, relay: Relay | None) -> None:
    """Releases the threads when the work is done: a waiting one would crash the interpreter."""
    if relay is not None:
        relay.release()
    if jax.process_index() == 0:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client().key_value_set(_END, "0 0")
    ends.join()


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        # It serves the others, who are still to hear of the end.
        time.sleep(1)
    # Not sys.exit: the main thread may be in a collective that never returns.
    os._exit(status)
