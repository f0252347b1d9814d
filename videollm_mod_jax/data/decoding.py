"""Decodes the videos of several shards at once, each in a process of its own.

The processes run this module with a connection to the one that started them: `decode_shards`. They
import neither JAX nor the caller's main module, and end when their connection does.
"""

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from videollm_mod_jax.data.frame_batches import Batch, Part, VideoError, batched
from videollm_mod_jax.data.video import read_video
from videollm_mod_jax.errors import UserError


def decode_shards(
    shards: Mapping[int, Sequence[tuple[str, Path]]],
    fps: float,
    side: int,
    batch_size: int,
    workers: int,
) -> Iterator[tuple[int, Batch]]:
    """Decodes videos in other processes.

    A shard is decoded by one process and has batches of its own, so that these depend neither on
    the number of processes nor on which of them is faster.

    Args:
      shards: names and files of the videos of each shard, by its number.
      fps: frames per second to sample.
      side: of the square that frames are letterboxed to.
      batch_size: frames of a batch.
      workers: most processes at a time.

    Yields:
      Numbers of shards and their batches: those of one shard in order, up to its last.

    Raises:
      UserError: a process died.
    """
    waiting = collections.deque(shards.items())
    running: dict[Connection, _Worker] = {}
    common = {"fps": fps, "side": side, "batch_size": batch_size}
    try:
        while waiting and len(running) < workers:
            worker = _Worker(common)
            running[worker.connection] = worker
            worker.begin(*waiting.popleft())
        while running:
            for connection in wait(list(running)):
                worker = running[connection]
                batch = worker.receive()
                if batch is None:
                    continue
                if batch.last and waiting:
                    shard = worker.shard
                    worker.begin(*waiting.popleft())
                    yield shard, batch
                elif batch.last:
                    running.pop(connection).end()
                    yield worker.shard, batch
                else:
                    yield worker.shard, batch
    finally:
        for worker in running.values():
            worker.end()


class _Worker:
    """A process that decodes, seen from the one that started it."""

    def __init__(self, common: Mapping[str, Any]):
        self.connection, theirs = Pipe()
        self.shard: int | None = None
        self._video = None
        self._shape = (common["batch_size"], common["side"], common["side"], 3)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno()), json.dumps(common)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()

    def begin(self, shard: int, videos: Sequence[tuple[str, Path]]) -> None:
        """Has it decode another shard."""
        self.shard = shard
        task = json.dumps([(name, os.fspath(path)) for name, path in videos])
        try:
            self.connection.send_bytes(task.encode())
        except OSError:
            self._died()

    def receive(self) -> Batch | None:
        """The batch that it has for us, None if it only says which video it begins."""
        try:
            said = json.loads(self.connection.recv_bytes())
            if "begins" in said:
                self._video = said["begins"]
                return None
            images_BAAC = np.frombuffer(self.connection.recv_bytes(), np.uint8)
        except (EOFError, OSError):
            self._died()
        parts = tuple(Part(**part) for part in said["parts"])
        return Batch(images_BAAC.reshape(self._shape), parts, said["last"])

    def end(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def _died(self) -> None:
        status = self._process.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        where = "before its first video" if self._video is None else f"decoding {self._video}"
        raise UserError(
            f"a decoding process ended with {how} {where}; the same command continues; use fewer "
            "--workers if memory ran out, and remove the video if it happens again"
        )


def _serve(connection: Connection, fps: float, side: int, batch_size: int) -> None:
    """Decodes what it is asked to until the connection ends."""

    def frames(path: str) -> Iterator[np.ndarray]:
        connection.send_bytes(json.dumps({"begins": path}).encode())
        try:
            for frame in read_video(path, fps, side):
                yield frame.image
        except UserError as error:
            raise VideoError(str(error).removeprefix(f"{path}: ")) from error
        # Whatever a damaged file makes a library raise concerns this file alone.
        except Exception as error:
            what = " ".join(str(error).split())
            raise VideoError(f"cannot decode the video: {type(error).__name__} {what}") from error

    while True:
        videos = json.loads(connection.recv_bytes())
        named = ((name, frames(path)) for name, path in videos)
        for batch in batched(named, batch_size, side):
            parts = [dataclasses.asdict(part) for part in batch.parts]
            connection.send_bytes(json.dumps({"parts": parts, "last": batch.last}).encode())
            connection.send_bytes(memoryview(batch.images_BAAC).cast("B"))


if __name__ == "__main__":
    # Ctrl-C goes to all processes of a terminal; this one ends with its connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _serve(Connection(int(sys.argv[1])), **json.loads(sys.argv[2]))
    except (EOFError, OSError):
        sys.exit()
