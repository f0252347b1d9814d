"""Stored frame features by the name of the video; `feature_shards` says what lies in the directory.

Shape suffixes: F frames, N tokens per frame, W width of the features.
"""

import contextlib
import os
import pathlib

import grain
import numpy as np

from videollm_mod_jax.data import files
from videollm_mod_jax.data.annotations import Videos
from videollm_mod_jax.data.feature_index import INDEX, META, FeatureMeta, damaged, read_store
from videollm_mod_jax.data.feature_shards import ShardWriter, join_shards, shard_name
from videollm_mod_jax.errors import UserError


class FeatureSource:
    """Random access to the frames of a feature store; picklable.

        source = FeatureSource("features", fps=2.0)
        source.read("kitchen/0017", 20, 60)     # its frames 20 ... 59, (40, N, W) float16

    Attributes:
      path: its directory.
      meta: its FeatureMeta.
      videos: frames per second, and the number of frames of every video by name.
      bad: why a video could not be encoded, by name.
    """

    def __init__(self, path: str | os.PathLike, **expected: object):
        """Opens a feature store.

        Args:
          path: its directory.
          **expected: values that fields of `meta` must have, such as `features_per_frame=10`.

        Raises:
          UserError: no feature store there, or a field that is not as expected.
        """
        self.path = pathlib.Path(path)
        self.meta, index, has_checksum = read_store(self.path)
        if not has_checksum and index != join_shards(self.path, list(index.shards)):
            raise damaged(self.path, f"{INDEX} is not that of its shards")
        self.bad = index.bad
        self._frames_per_record, self._first = index.frames_per_record, index.record
        for field, value in expected.items():
            found = getattr(self.meta, field)
            if found != value:
                raise UserError(
                    f"{self.path / META}: field '{field}': expected {value}, found {found}; "
                    "encode the videos again"
                )
        self.videos = Videos(self.meta.fps, index.frames)
        # With the number of records given, a shard is opened when it is first read.
        paths = [f"{self.path / shard}[0:{records}]" for shard, records in index.shards.items()]
        self._records = grain.sources.ArrayRecordDataSource(paths)

    def __contains__(self, name: object) -> bool:
        return name in self._first

    def read(
        self, name: str, start: int = 0, stop: int | None = None, stride: int = 1
    ) -> np.ndarray:
        """Frames `range(start, stop, stride)` of a video; only their records are read.

        Args:
          name: of the video.
          start: number of the first frame.
          stop: number of the frame behind the last one; None for all to the end.
          stride: takes every stride-th frame, 1 or more.

        Returns:
          (F, N, W) float16.

        Raises:
          UserError: the store does not hold the video or these frames of it, or is damaged.
        """
        if name not in self._first:
            why = self.bad.get(name, "no such video was encoded")
            raise UserError(f"{self.path}: {name}: {why}")
        frames = self.videos.frames[name]
        stop = frames if stop is None else stop
        if not (0 <= start <= stop <= frames and stride >= 1):
            raise UserError(
                f"{self.path}: {name}: expected frames of 0 ... {frames}, found {start} ... {stop} "
                f"by {stride}"
            )
        numbers_F = np.arange(start, stop, stride)
        records_F, rows_F = np.divmod(numbers_F, self._frames_per_record)
        shape = (-1, self.meta.features_per_frame, self.meta.width)
        features_FNW = np.empty((len(numbers_F), *shape[1:]), np.float16)
        try:
            for record in np.unique(records_F):
                stored = self._records[self._first[name] + record]
                stored_FNW = np.frombuffer(stored, np.float16).reshape(shape)
                here_F = records_F == record
                features_FNW[here_F] = stored_FNW[rows_F[here_F]]
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise UserError(
                f"{self.path}: {name}: the stored features are damaged ({error}); encode the "
                "videos again"
            ) from error
        return features_FNW


class FeatureWriter:
    """Writes a store of one shard from features that are at hand; a context manager.

    The directory appears, complete, when the block ends; an error inside leaves nothing.

        with FeatureWriter("features/train", meta) as writer:
            writer.add("video-0", features_FNW)
    """

    def __init__(self, path: str | os.PathLike, meta: FeatureMeta):
        """Args: path: the directory, which must not exist; meta: what the videos share."""
        self._path, self._meta = pathlib.Path(path), meta
        if self._path.exists():
            raise UserError(f"{path}: exists already; remove it or write elsewhere")

    def __enter__(self) -> "FeatureWriter":
        with contextlib.ExitStack() as stack:
            self._directory = stack.enter_context(files.written_aside(self._path))
            stack.push(self._join)
            shard = ShardWriter(self._directory / shard_name(0, 1), self._meta)
            self._shard = stack.enter_context(shard)
            self._stack = stack.pop_all()
        return self

    def add(self, name: str, features_FNW: np.ndarray) -> None:
        """Adds a video's features (F, N, W), stored as float16.

        Raises:
          UserError: another N or W than the store's, no frames, values that float16 cannot hold,
            or a second video of one name.
        """
        self._shard.append(name, features_FNW)
        self._shard.end(name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._stack.__exit__(kind, error, trace)

    def _join(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            join_shards(self._directory, [shard_name(0, 1)]).write(self._directory, self._meta)
