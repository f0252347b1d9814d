"""The files of a feature store as they are written: shards, each with an index, and their join.

    DIR/meta.json                              FeatureMeta
    DIR/index.json                             where every video is; see `join_shards`
    DIR/features-00000-of-00002.array_record   a record per 128 frames of a video

A record is (frames, N, W) float16, fewer than 128 frames at the end of a video. The last record of
a shard is its index as json, so that a shard that is there is whole and says what it holds.

float16 holds what a bfloat16 tower gives exactly down to 2^-14 (to 2^-25 below), keeps 11 bits of
what a float32 tower gives, and is read by NumPy alone.

Shape suffixes: F frames, N tokens per frame, W width of the features.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from array_record.python import array_record_module

from videollm_mod_jax.config_dict import build
from videollm_mod_jax.data import files
from videollm_mod_jax.data.feature_index import FeatureIndex, FeatureMeta, Place, ShardIndex
from videollm_mod_jax.errors import UserError

FRAMES_PER_RECORD = 128
# Compression would save 8% of float16 features and make reading them three times slower.
_OPTIONS = "group_size:1,uncompressed"


SHARDS = "features-*-of-*.array_record"
"""Glob of all that `shard_name` gives."""


def shard_name(index: int, count: int) -> str:
    """The file name of shard `index` of `count`."""
    return f"features-{index:05}-of-{count:05}.array_record"


class ShardWriter:
    """Writes one shard, video by video; a context manager.

    The file appears, complete, when the block ends; an error inside leaves nothing.

        with ShardWriter(path, meta) as shard:
            shard.append("a", features_FNW)   # the first frames of a
            shard.append("a", features_FNW)   # and the rest
            shard.end("a")
            shard.fail("b", "cannot read the video")

    Frames of a video that fails after its first record stay in the file, where nothing refers to
    them: what follows need not wait for the end of a long video.
    """

    def __init__(self, path: str | os.PathLike, meta: FeatureMeta):
        """Args: path: the file; meta: what the videos share."""
        self._path, self._meta = pathlib.Path(path), meta
        self._videos: dict[str, dict[str, int]] = {}
        self._bad: dict[str, str] = {}
        self._records = 0
        self._restart()

    def __enter__(self) -> "ShardWriter":
        with contextlib.ExitStack() as stack:
            aside = stack.enter_context(files.written_aside(self._path))
            self._writer = array_record_module.ArrayRecordWriter(str(aside), _OPTIONS)
            stack.callback(self._close)
            self._stack = stack.pop_all()
        return self

    def append(self, name: str, features_FNW: np.ndarray) -> None:
        """Adds the next frames of a video, stored as float16.

        Raises:
          UserError: another N or W than the store's, or values that float16 cannot hold.
        """
        expected = (self._meta.features_per_frame, self._meta.width)
        if features_FNW.ndim != 3 or features_FNW.shape[1:] != expected:
            raise UserError(
                f"{self._path}: {name}: expected features (frames, {expected[0]}, "
                f"{expected[1]}), found {features_FNW.shape}"
            )
        with np.errstate(over="ignore"):
            half_FNW = np.asarray(features_FNW).astype(np.float16)
        if not np.isfinite(half_FNW).all():
            raise UserError(f"{self._path}: {name}: features are not finite in float16")
        self._frames += len(half_FNW)
        self._waiting = np.concatenate([self._waiting, half_FNW])
        while len(self._waiting) >= FRAMES_PER_RECORD:
            self._write(self._waiting[:FRAMES_PER_RECORD].tobytes())
            self._waiting = self._waiting[FRAMES_PER_RECORD:]

    def end(self, name: str) -> None:
        """Says that the frames since the last video are the whole of this one.

        Raises:
          UserError: there are none, or the shard holds a video of this name.
        """
        if name in self._videos or not self._frames:
            what = "two videos have this name" if self._frames else "the video has no frames"
            raise UserError(f"{self._path}: {name}: {what}")
        if len(self._waiting):
            self._write(self._waiting.tobytes())
        self._videos[name] = {"record": self._first, "frames": self._frames}
        self._restart()

    def fail(self, name: str, error: str) -> None:
        """Says that a video cannot be encoded, and drops its frames since the last one."""
        self._bad[name] = error
        self._restart()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._stack.__exit__(kind, error, trace)

    def _close(self) -> None:
        index = {"records": self._records, "videos": self._videos, "bad": self._bad}
        try:
            self._writer.write(json.dumps(index).encode())
            self._writer.close()
        except RuntimeError as problem:
            raise UserError(f"{self._path} cannot be written: {problem}") from problem

    def _write(self, record: bytes) -> None:
        self._writer.write(record)
        self._records += 1

    def _restart(self) -> None:
        self._first, self._frames = self._records, 0
        shape = (0, self._meta.features_per_frame, self._meta.width)
        self._waiting = np.zeros(shape, np.float16)


def read_shard_index(path: str | os.PathLike) -> ShardIndex:
    """Reads what a shard says of itself.

    Raises:
      UserError: the file is damaged.
    """
    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        try:
            last = reader.read([reader.num_records() - 1])[0]
        finally:
            reader.close()
        return build(ShardIndex, files.parse_json(last, f"{path}: its index"), f"{path}: its index")
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged: {error}; remove it and encode again") from error


def join_shards(directory: pathlib.Path, shards: Sequence[str]) -> FeatureIndex:
    """Returns the index of a store from those of its shards, whose records are counted through.

    ```
    shard 0   a: 300 frames, b: 20 frames      records 0 1 2 | 3
    shard 1   c: 130 frames, d cannot be read  records 4 5

    frames_per_record  128
    shards             features-00000-of-00002.array_record: 4, features-00001-of-...: 2
    record             a: 0, b: 3, c: 4
    frames             a: 300, b: 20, c: 130
    bad                d: cannot read the video
    ```

    Args:
      directory: of the shards.
      shards: their file names, in order.

    Raises:
      UserError: two shards hold a video of one name, or one is damaged.
    """
    records: dict[str, int] = {}
    places: dict[str, Place] = {}
    bad: dict[str, str] = {}
    before = 0
    for shard in shards:
        index = read_shard_index(directory / shard)
        for name, place in index.videos.items():
            if name in places:
                raise UserError(f"{directory}: {name}: two videos have this name")
            places[name] = Place(before + place.record, place.frames)
        records[shard] = index.records
        bad |= index.bad
        before += index.records
    return FeatureIndex(
        frames_per_record=FRAMES_PER_RECORD,
        shards=records,
        record={name: place.record for name, place in places.items()},
        frames={name: place.frames for name, place in places.items()},
        bad=bad,
    )
