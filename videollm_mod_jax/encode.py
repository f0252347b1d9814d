"""Encodes the frames of a dataset once, so that training never runs the vision tower.

    python -m videollm_mod_jax.encode --checkpoint runs/digits --dataset digits_stream \
        --split test --out features/test

The dataset is one that TFDS finds by name below `--data-dir`, with `id`, `frames` and `fps` in its
records; its features go, in the same order, to a directory that must not exist yet.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from rich import progress

from videollm_mod_jax import cli
from videollm_mod_jax.data.features import FeatureMeta, FeatureSource, FeatureWriter
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.config import VideoLLMConfig
from videollm_mod_jax.models.vision import VisionTower, preprocess
from videollm_mod_jax.training import distributed
from videollm_mod_jax.training.checkpoint import load_tower, read_model_config

BATCH_SIZE = 128


def encode_split(
    config: VideoLLMConfig,
    tower_params: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    batch_size: int = BATCH_SIZE,
) -> None:
    """Writes the frame tokens of all records to a feature store, with a progress bar.

    Several processes call it together: each encodes its share, and the first joins them.

    Args:
      config: of the model that will read the features.
      tower_params: of its vision tower (`variables['params']['vision']`).
      records: with `id`, `fps` and `frames`, uint8 [F, A, A] or [F, A, A, 3], letterboxed.
      path: directory of the store; appears when it is complete.
      batch_size: frames per call of the tower.

    Raises:
      UserError: `path` exists, there are no records, or a record has no frames, frames that are
        not square uint8 images, or another frame rate or size than the first record.
    """
    if not len(records):
        raise UserError(f"{path}: there are no records to encode")
    tower = VisionTower(config.vision, config.dtype, config.param_dtype)

    @jax.jit
    def encode(images_BAAC: jax.Array) -> jax.Array:
        images_BAAC = preprocess(images_BAAC, config.vision)
        return tower.apply({"params": tower_params}, images_BAAC).astype(np.float32)

    path, process = Path(path), jax.process_index()
    if path.exists():
        raise UserError(f"{path}: exists already; remove it or write elsewhere")
    share = range(len(records))[_share(len(records), process, jax.process_count())]
    parts = [path.with_name(f".{path.name}.part{p}") for p in range(jax.process_count())]
    meta = FeatureMeta(
        features_per_frame=config.vision.features_per_frame,
        width=config.vision.width,
        fps=float(records[0]["fps"]),
        resolution=config.vision.image_size,
        tower=fingerprint(config, tower_params),
    )
    videos = _videos((records[i] for i in share), records[0])
    encoded = encode_videos(encode, videos, batch_size)
    alone = len(parts) == 1
    # What an encoding that was killed left behind.
    shutil.rmtree(parts[process], ignore_errors=True)
    with FeatureWriter(path if alone else parts[process], meta) as writer, _progress() as bar:
        for video_id, features_FNW in bar.track(encoded, total=len(share)):
            writer.add(video_id, features_FNW)
    if alone:
        return
    distributed.barrier("encoded")
    if distributed.is_lead():
        _join(parts, path, meta)
    distributed.barrier("joined")


def _share(count: int, process: int, processes: int) -> slice:
    """Which of `count` records a process encodes: as many as any other or one more, in order.

    ```
    count 5, processes 2:   0 1 2 | 3 4
    ```
    """
    each, rest = divmod(count, processes)
    start = process * each + min(process, rest)
    return slice(start, start + each + (process < rest))


def _join(parts: Sequence[Path], path: Path, meta: FeatureMeta) -> None:
    """Writes the records of several feature stores into one, and removes them."""
    with FeatureWriter(path, meta) as writer:
        for part in parts:
            source = FeatureSource(part)
            for name in source.videos.frames:
                writer.add(name, source.read(name))
    for part in parts:
        shutil.rmtree(part)


def encode_videos(
    encode: Callable[[np.ndarray], jax.Array],
    videos: Iterable[tuple[str, np.ndarray]],
    batch_size: int,
) -> Iterator[tuple[str, np.ndarray]]:
    """Encodes videos of any length in batches of one shape, which run across videos.

    ```
    videos   a a a b b b b b c      batch_size 4
    batches  [a a a b] [b b b b] [c . . .]      . is padding
    ```

    Args:
      encode: [batch_size, A, A, 3] uint8 to [batch_size, N, W].
      videos: ids and frames [F, A, A, 3].
      batch_size: of every call.

    Yields:
      Id and features [F, N, W] of each video, in order.
    """
    lengths: list[tuple[str, int]] = []

    def frames() -> Iterator[np.ndarray]:
        for video_id, frames_FAAC in videos:
            lengths.append((video_id, len(frames_FAAC)))
            yield from frames_FAAC

    ready: list[np.ndarray] = []
    stream = frames()
    while batch := tuple(itertools.islice(stream, batch_size)):
        padding = [batch[-1]] * (batch_size - len(batch))
        ready.extend(np.asarray(encode(np.stack([*batch, *padding])))[: len(batch)])
        while lengths and len(ready) >= lengths[0][1]:
            video_id, length = lengths.pop(0)
            yield video_id, np.stack(ready[:length])
            del ready[:length]


def fingerprint(config: VideoLLMConfig, tower_params: Mapping[str, Any]) -> str:
    """Sixteen hex digits that change with the tower's architecture, number type or weights."""
    vision = dataclasses.asdict(config.vision)
    digest = hashlib.sha256(json.dumps([vision, config.dtype], sort_keys=True).encode())
    for name, leaf in jax.tree.leaves_with_path(tower_params):
        digest.update(jax.tree_util.keystr(name).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Parses the flags and encodes one split."""
    parser = argparse.ArgumentParser(
        prog="python -m videollm_mod_jax.encode",
        description="Encodes the frames of a dataset with the vision tower of a model.",
    )
    parser.add_argument("--checkpoint", required=True, help="directory of the model")
    parser.add_argument("--dataset", required=True, help="TFDS name, such as digits_stream")
    parser.add_argument("--split", required=True, help="such as train")
    parser.add_argument("--out", required=True, help="directory of the features; must not exist")
    parser.add_argument("--data-dir", help="where the dataset is (default: CHECKPOINT/data)")
    cli.add_process_arguments(parser)
    flags = parser.parse_args()
    data_dir = Path(flags.data_dir or Path(flags.checkpoint) / "data")

    def run() -> None:
        cli.join_processes(flags)
        tower = load_tower(flags.checkpoint)
        config = read_model_config(Path(flags.checkpoint))
        records = _open(flags.dataset, data_dir, flags.split)
        encode_split(config, tower, records, flags.out)
        if distributed.is_lead():
            print(f"encoded {len(records)} videos into {flags.out}")

    sys.exit(cli.report_user_errors(run))


def _open(name: str, data_dir: Path, split: str) -> Sequence[Mapping[str, Any]]:
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(
            f"{data_dir} holds no TFDS dataset {name!r}; --data-dir says where to look"
        ) from error
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise UserError(f"the split is {split!r}; {name} in {data_dir} has {known}")
    return builder.as_data_source(split)


def _videos(
    records: Iterable[Mapping[str, Any]], first_record: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Ids and RGB frames; grey frames get three equal channels."""
    first = (float(first_record["fps"]), np.shape(first_record["frames"])[1:])
    for record in records:
        video_id, frames = record["id"], np.asarray(record["frames"])
        video_id = video_id.decode() if isinstance(video_id, bytes) else video_id
        if not len(frames):
            raise UserError(f"{video_id}: expected at least one frame, found none")
        kind = (float(record["fps"]), frames.shape[1:])
        if kind != first:
            raise UserError(
                f"{video_id}: expected {first[0]} frames per second of shape {first[1]}, as the "
                f"first video has, found {kind[0]} of {kind[1]}"
            )
        yield video_id, np.repeat(frames[..., None], 3, axis=-1) if frames.ndim == 3 else frames


def _progress() -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("Encoding"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        _Rate(),
        progress.TimeRemainingColumn(),
        disable=not distributed.is_lead(),
    )


class _Rate(progress.ProgressColumn):
    """Videos per second."""

    def render(self, task: progress.Task) -> str:
        """The text of the column."""
        return f"{task.speed or 0:.1f} videos/s"


if __name__ == "__main__":
    main()
