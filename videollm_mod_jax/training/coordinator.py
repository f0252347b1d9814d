"""Finds the coordinator of several processes before JAX does, which aborts where it cannot.

Process 0 of a job serves the others at `--coordinator HOST:PORT`. Where the port is taken, or the
host cannot be reached, or a process never comes, JAX ends with the trace of a C++ stack, after
minutes; what stands here says it in a line.
"""

import contextlib
import dataclasses
import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

from videollm_mod_jax.errors import UserError, shown

TIMEOUT = 300.0
"""Seconds to wait for the other processes."""

_BIND = "JAX_COORDINATOR_BIND_ADDRESS"
_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\[\]:/\s]+):(?P<port>[0-9]{1,5})")


def parse_address(text: str, name: str = "--coordinator") -> tuple[str, int]:
    """Returns the host and the port of an address.

    ```
    node-0:8476    ("node-0", 8476)        [::1]:8476    ("::1", 8476)
    node-0   node-0:x   node-0:70000   ::1:8476          refused
    ```

    Args:
      text: as it was given.
      name: of what gave it, for the message.

    Raises:
      UserError: it is no such address.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 2**16:
        raise UserError(
            f"{name} is {shown(text)}; expected host:port of process 0, with a port of 1 to 65535, "
            "and an IPv6 address in brackets: node-0:8476, [::1]:8476"
        )
    return match["host"].strip("[]"), int(match["port"])


def check_free(address: tuple[str, int]) -> None:
    """Looks, in process 0, whether JAX's coordinator can listen at its port.

    Args:
      address: the host and port that the others connect to.

    Raises:
      UserError: another program listens there, or this process may not.
    """
    bind = os.environ.get(_BIND)
    host, port = parse_address(bind, _BIND) if bind else ("::", address[1])
    try:
        _bind(host, port)
    except OSError as error:
        what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error}"
        raise UserError(
            f"--coordinator {_spell(address)}: port {port} of this machine {what}; end what "
            "listens there, or give all processes another port"
        ) from error


def _bind(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        # A machine without IPv6, where all interfaces are those of IPv4.
        listener, host = socket.socket(socket.AF_INET, socket.SOCK_STREAM), "0.0.0.0"
    with listener:
        # As the coordinator does: not hindered by connections of a job that has just ended.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, port))


def wait_until_reached(address: tuple[str, int], timeout: float) -> None:
    """Waits, in all processes but the first, until the coordinator listens.

    Args:
      address: of it.
      timeout: seconds.

    Raises:
      UserError: it could not be reached in this time.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(address, timeout=min(5.0, timeout)).close()
        except OSError as error:
            # Names of hosts come up late, too, as pods do.
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator {_spell(address)} was not reached for {timeout:g} s "
                    f"({error.strerror or error}); start process 0 there, let the others reach its "
                    "port, or wait longer: --coordinator-timeout"
                ) from error
            time.sleep(min(0.5, timeout / 10))
        else:
            return


class Relay:
    """Carries the bytes between JAX in this process and the coordinator, and sees when it is gone.

    JAX aborts, with the trace of a C++ stack, at the moment its connection breaks. The one to a
    relay never does while it is watched, so that this process can say who is gone, and leave.

    Attributes:
      address: host:port that JAX connects to instead of the coordinator's; of this machine alone.
    """

    def __init__(self, coordinator: tuple[str, int]):
        """Listens.

        Args:
          coordinator: host and port; it listens already.
        """
        self._coordinator = coordinator
        self._gone: Callable[[], None] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def watch(self, gone: Callable[[], None]) -> None:
        """Has `gone`, which ends the process, called in a thread when the coordinator is gone."""
        self._gone = gone

    def release(self) -> None:
        """Lets connections end: the work is done."""
        self._gone = None

    def _serve(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(self._coordinator)
            except OSError:
                self._end(near)
                continue
            connection = _Connection(near, far)
            for carry in (self._send, self._receive):
                threading.Thread(target=carry, args=(connection,), daemon=True).start()

    def _send(self, connection: "_Connection") -> None:
        with contextlib.suppress(OSError):
            while sent := connection.near.recv(2**16):
                try:
                    connection.far.sendall(sent)
                except OSError:
                    self._end(connection.near)
        # JAX ended this one; what comes back is no sign of the coordinator's end.
        connection.ended = True
        _shut(connection.far)

    def _receive(self, connection: "_Connection") -> None:
        with contextlib.suppress(OSError):
            while received := connection.far.recv(2**16):
                try:
                    connection.near.sendall(received)
                except OSError:
                    return
        if not connection.ended:
            self._end(connection.near)

    def _end(self, near: socket.socket) -> None:
        """Ends a connection that the coordinator has ended."""
        if self._gone is not None:
            # A process that is killed closes its connections one after another.
            time.sleep(1)
            try:
                # It may have refused what somebody else on this machine sent.
                socket.create_connection(self._coordinator, timeout=5).close()
            except OSError:
                self._gone()
        _shut(near)


@dataclasses.dataclass
class _Connection:
    near: socket.socket
    far: socket.socket
    ended: bool = False
    """By JAX in this process."""


def _shut(connection: socket.socket) -> None:
    # Not close: another thread waits in `recv`, which this wakes.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def limited(seconds: float, end: Callable[[], None]) -> Iterator[None]:
    """Calls `end`, which leaves the process, unless the block ends in time.

    Nothing else ends what waits in C++.
    """
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _spell(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
