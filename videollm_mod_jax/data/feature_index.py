"""The two json files of a feature store: what its videos share, and where each of them is.

    DIR/meta.json     FeatureMeta
    DIR/index.json    FeatureIndex, and the SHA-256 of both

Both may come from a stranger, or be damaged: they are compared with each other by their checksum,
and with the sizes of the shards before anything is read from these.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from videollm_mod_jax.config_dict import COUNT, COUNT_OR_NONE, Checked, Interval, build
from videollm_mod_jax.data import files
from videollm_mod_jax.errors import UserError, shown

META, INDEX = "meta.json", "index.json"
BYTES_PER_NUMBER = 2  # float16

_DIGEST = "sha256"
_LARGEST = 256 << 20
"""Bytes of an index, which has some 60 for a video."""
_SHARD = re.compile(r"features-\d{5,}-of-\d{5,}\.array_record")


@dataclasses.dataclass(frozen=True)
class FeatureMeta(Checked):
    """What every video of a feature store shares.

    Attributes:
      features_per_frame: vectors per frame, as the tower gives them: N, unless the model pools
        them behind its connector.
      width: W.
      fps: frames per second.
      resolution: side in pixels of the square that the tower saw.
      tower: fingerprint of the vision tower's configuration and weights.
    """

    features_per_frame: COUNT
    width: COUNT
    fps: Annotated[float, Interval("(0, 1000]")]
    resolution: COUNT
    tower: str

    @property
    def frame_bytes(self) -> int:
        """What a frame takes in a shard."""
        return self.features_per_frame * self.width * BYTES_PER_NUMBER


@dataclasses.dataclass(frozen=True)
class Place(Checked):
    """Where a video is.

    Attributes:
      record: its first.
      frames: how many it has.
    """

    record: COUNT_OR_NONE
    frames: COUNT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardIndex(Checked):
    """What a shard says of itself, in its last record.

    Attributes:
      records: of frames.
      videos: by name, in the order of their records.
      bad: why a video could not be encoded, by name.
    """

    records: COUNT_OR_NONE
    videos: Mapping[str, Place]
    bad: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureIndex:
    """Where the videos of a store are, its records counted through all shards.

    Attributes:
      frames_per_record: at most; fewer at the end of a video.
      shards: records of each, by file name, in order.
      record: the first of each video, by name, in order.
      frames: of each video, by name.
      bad: why a video could not be encoded, by name.
    """

    frames_per_record: int
    shards: Mapping[str, int]
    record: Mapping[str, int]
    frames: Mapping[str, int]
    bad: Mapping[str, str]

    def write(self, directory: Path, meta: FeatureMeta) -> None:
        """Writes it and what the videos share; the store is complete then."""
        videos = {
            "name": list(self.record),
            "record": list(self.record.values()),
            "frames": list(self.frames.values()),
        }
        index = {
            "frames_per_record": self.frames_per_record,
            "shards": dict(self.shards),
            "videos": videos,
            "bad": dict(self.bad),
        }
        index[_DIGEST] = _digest(dataclasses.asdict(meta), index)
        for name, value in ((META, dataclasses.asdict(meta)), (INDEX, index)):
            with files.written_aside(directory / name) as aside:
                aside.write_text(json.dumps(value) + "\n")


def read_store(directory: Path) -> tuple[FeatureMeta, FeatureIndex, bool]:
    """Reads what a store's videos share, and where they are.

    Args:
      directory: of the store.

    Returns:
      Both, and whether they had the checksum that stores have since they have one; without, only
      the shards can tell that they are right.

    Raises:
      UserError: there is no store, or the files are damaged, or do not fit the shards.
    """
    if not (directory / META).exists() or not (directory / INDEX).exists():
        raise UserError(
            f"{directory}: not a feature store (no valid {META} and {INDEX}); encode the videos "
            "first"
        )
    table = files.read_json_object(directory / META)
    values = files.read_json_object(directory / INDEX, largest=_LARGEST)
    meta = build(FeatureMeta, table, str(directory / META))
    has_digest = _DIGEST in values
    if has_digest and values.pop(_DIGEST) != _digest(table, values):
        raise damaged(directory, f"{META} and {INDEX} are not what was written together")
    index = _index(directory, values)
    _check_sizes(directory, meta, index)
    return meta, index, has_digest


def damaged(directory: Path, what: str) -> UserError:
    """Returns the error of a store that is damaged."""
    return UserError(f"{directory}: {what}; encode the videos again, or restore the store")


def _digest(meta: Mapping[str, Any], index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([meta, index], sort_keys=True).encode()).hexdigest()


def _index(directory: Path, values: Mapping[str, Any]) -> FeatureIndex:
    """Checks the types of an index; by column, since there may be a million videos."""
    match values:
        case {
            "frames_per_record": int(frames_per_record),
            "shards": dict(shards),
            "videos": {"name": [*names], "record": [*records], "frames": [*frames]},
            "bad": dict(bad),
            **others,
        } if not others:
            pass
        case _:
            raise damaged(directory, f"{INDEX} is {shown(values)}, which is no index")
    texts = (*names, *shards, *bad, *bad.values())
    numbers = (frames_per_record, *shards.values(), *records, *frames)
    if (
        not all(type(text) is str for text in texts)
        or not all(type(number) is int and 0 <= number < 2**31 for number in numbers)
        or not len(names) == len(set(names)) == len(records) == len(frames)
        or not all(map(_SHARD.fullmatch, shards))
        or not frames_per_record
        or not all(frames)
    ):
        raise damaged(directory, f"{INDEX} holds names or numbers that no index has")
    return FeatureIndex(
        frames_per_record=frames_per_record,
        shards=shards,
        record=dict(zip(names, records, strict=True)),
        frames=dict(zip(names, frames, strict=True)),
        bad=bad,
    )


def _check_sizes(directory: Path, meta: FeatureMeta, index: FeatureIndex) -> None:
    """Compares an index with the sizes of its shards, so that no read takes more than they hold.

    ```
    frames per record 128    a: record 0, 300 frames    b: record 3, 20 frames    records: 4
                             0 1 2                      3                         fits
    ```
    """
    stored = 0
    for shard in index.shards:
        if not (directory / shard).is_file():
            raise UserError(f"{directory / shard} is missing; encode the videos again")
        stored += (directory / shard).stat().st_size
    if sum(index.frames.values()) * meta.frame_bytes > stored:
        raise damaged(
            directory,
            f"{INDEX} has {sum(index.frames.values()):,} frames of {meta.frame_bytes:,} bytes, "
            f"and its shards have {stored:,} bytes",
        )
    first_V = np.array(list(index.record.values()), np.int64)
    frames_V = np.array(list(index.frames.values()), np.int64)
    behind_V = first_V - (-frames_V // index.frames_per_record)
    ends = [*first_V[1:], sum(index.shards.values())]
    if (behind_V > ends).any():
        name = list(index.record)[int(np.argmax(behind_V > ends))]
        raise damaged(directory, f"{INDEX} has {shown(name)} where other records are")
