"""Ctrl-C and SIGTERM, at any moment of a command, whatever it is doing.

    the first     work that can save is asked to (`stopping_softly`); all other work is interrupted
                  by `Interrupted`, and where that is not heard within seconds (a compiler at work,
                  a library that swallows it) the process ends all the same
    the second    ends the process at once

Python runs handlers between two of its instructions only, which may be minutes apart. So a thread
hears of signals as well, and is the one that ends the process in the end. That is as safe as a kill
is, after which every command goes on.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

PATIENCE = 5.0
"""Seconds that interrupted work has to come to its end."""

_HEARD = (signal.SIGINT, signal.SIGTERM)

_softly: Callable[[int], None] | None = None


class Interrupted(KeyboardInterrupt):
    """Somebody asked the command to end; `signum` is the signal."""

    def __init__(self, signum: int):
        super().__init__()
        self.signum = signum


def status_of(signum: int) -> int:
    """Return the exit status of a process that a signal ended: 130 of Ctrl-C, 143 of SIGTERM."""
    return 128 + signum


@functools.cache
def end_with_parent() -> None:
    """Have this process, a worker, end when the one that started it does, killed or not.

    Otherwise it would wait for ever, and hold its memory and its locks. Does nothing in a process
    that is nobody's worker, nor the second time.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def interruptible(leave: Callable[[int, bool], None], say: Callable[[str], None]) -> Iterator[None]:
    """Has signals interrupt the block, for certain; does nothing outside the main thread.

    Args:
      leave: ends the process, called in a thread with the signal, and whether it was the second.
      say: tells the user that the work saves before it ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, tells = socket.socketpair()
    for end in (heard, tells):
        end.setblocking(end is heard)
    over = threading.Event()

    def listen() -> None:
        first = True
        while numbers := heard.recv(1):
            if numbers[0] not in _HEARD:
                continue
            if not first:
                leave(numbers[0], True)
            first = False
            if _softly is not None:
                say("stopping after this update; once more to stop at once")
            elif not _ends(over, heard, leave):
                leave(numbers[0], False)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        del frame
        if _softly is None:
            raise Interrupted(signum)
        _softly(signum)

    report = sys.unraisablehook

    def swallowed(error: Any) -> None:
        # In a destructor or a callback of the collector, which raise nothing; `listen` sees to it.
        if not isinstance(error.exc_value, Interrupted):
            report(error)

    sys.unraisablehook = swallowed
    before = {number: signal.signal(number, interrupt) for number in _HEARD}
    wakeup = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = report
        tells.close()
        thread.join()
        heard.close()


def _ends(over: threading.Event, heard: socket.socket, leave: Callable[[int, bool], None]) -> bool:
    """Return whether the work came to its end in time; a second signal meanwhile ends it."""
    heard.settimeout(PATIENCE)
    try:
        while numbers := heard.recv(1):
            if numbers[0] in _HEARD:
                leave(numbers[0], True)
        return True
    except TimeoutError:
        return over.is_set()
    finally:
        heard.settimeout(None)


@contextlib.contextmanager
def stopping_softly(stop: Callable[[int], None]) -> Iterator[None]:
    """Has the first signal call `stop` in the block, instead of interrupting it.

    Args:
      stop: notes that the work should save and end; it gets the signal, in the main thread, where
        this must be called, too.
    """
    global _softly
    before = {n: signal.signal(n, lambda number, frame: stop(number)) for n in _HEARD}
    _softly = stop
    try:
        yield
    finally:
        _softly = None
        for number, handler in before.items():
            signal.signal(number, handler)
