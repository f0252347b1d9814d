"""Stored frame features: an ArrayRecord file with one record per video, and what made them.

    DIR/meta.json              FeatureMeta and the number of videos
    DIR/features.array_record  record i: id of video i, a zero byte, then (F, N, W) float16

Shape suffixes: F frames, N tokens per frame, W width of the features.
"""

import dataclasses
import json
import os
import pathlib
from dataclasses import dataclass

import grain
import numpy as np
from array_record.python import array_record_module

from videollm_mod_jax.data import files
from videollm_mod_jax.errors import UserError

_META, _RECORDS = "meta.json", "features.array_record"


@dataclass(frozen=True)
class FeatureMeta:
    """What every video of a feature store shares.

    Attributes:
      features_per_frame: vectors per frame, as the tower gives them: N, unless the model pools
        them behind its connector.
      width: W.
      fps: frames per second.
      resolution: side in pixels of the square that the tower saw.
      tower: fingerprint of the vision tower's configuration and weights.
    """

    features_per_frame: int
    width: int
    fps: float
    resolution: int
    tower: str


class FeatureWriter:
    """Writes a feature store; use as a context manager.

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
        self._aside = files.written_aside(self._path)
        self._directory = self._aside.__enter__()
        self._directory.mkdir()
        self._records = array_record_module.ArrayRecordWriter(
            str(self._directory / _RECORDS), "group_size:1"
        )
        self._count = 0
        return self

    def add(self, video_id: str, features_FNW: np.ndarray) -> None:
        """Appends a video's features (F, N, W), stored as float16.

        Raises:
          UserError: another N or W than the store's, or values that float16 cannot hold.
        """
        expected = (self._meta.features_per_frame, self._meta.width)
        if features_FNW.ndim != 3 or features_FNW.shape[1:] != expected:
            raise UserError(
                f"{self._path}: {video_id}: expected features (frames, {expected[0]}, "
                f"{expected[1]}), found {features_FNW.shape}"
            )
        with np.errstate(over="ignore"):
            half = np.asarray(features_FNW).astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(f"{self._path}: {video_id}: features are not finite in float16")
        self._records.write(video_id.encode() + b"\0" + half.tobytes())
        self._count += 1

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._records.close()
        if kind is None:
            meta = dataclasses.asdict(self._meta) | {"videos": self._count}
            (self._directory / _META).write_text(json.dumps(meta, indent=2) + "\n")
        self._aside.__exit__(kind, error, trace)


class FeatureSource:
    """Random access to a feature store: `source[i]` is (F, N, W) float16; picklable.

    Attributes:
      path: its directory.
      meta: its FeatureMeta.
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
        try:
            meta = json.loads((self.path / _META).read_text())
            self._count = meta.pop("videos")
            self.meta = FeatureMeta(**meta)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a feature store (no valid {_META}); encode the videos first"
            ) from error
        for field, value in expected.items():
            found = getattr(self.meta, field)
            if found != value:
                raise UserError(
                    f"{self.path / _META}: field '{field}': expected {value}, found {found}; "
                    "encode the videos again"
                )
        self._records = grain.sources.ArrayRecordDataSource(str(self.path / _RECORDS))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        return self.read(index)[1]

    def read(self, index: int) -> tuple[str, np.ndarray]:
        """The id of video `index` and its features (F, N, W) float16."""
        record = self._records[index]
        end = record.index(b"\0")
        features = np.frombuffer(record, np.float16, offset=end + 1)
        shape = (-1, self.meta.features_per_frame, self.meta.width)
        return record[:end].decode(), features.reshape(shape)
