"""Encodes the frames of videos once, so that training never runs the vision tower.

    python -m videollm_mod_jax.encode --checkpoint MODEL --videos videos --out features

encodes every video and image below a directory at `--fps` frames per second; a video is named by
its path below it, without the ending. Other processes decode while the accelerator encodes.
`features.partial` becomes `features` when all is done: a run that was killed continues with the
same command, several processes share the videos, and the files are the same either way. A video
that cannot be read is skipped, listed at the end, and makes the exit status 1.

    python -m videollm_mod_jax.encode --checkpoint runs/digits --dataset digits_stream \
        --split test --out features/test

encodes a dataset that TFDS finds by name below `--data-dir`, with `id`, `frames` and `fps` in its
records.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from rich import progress

from videollm_mod_jax import cli
from videollm_mod_jax.data import files
from videollm_mod_jax.data.builders.tfds_files import FEATURES, TfdsExamples, check_tfds_files
from videollm_mod_jax.data.decoding import decode_shards
from videollm_mod_jax.data.encoding_plan import PLAN, EncodingPlan, sources_of
from videollm_mod_jax.data.feature_index import INDEX, META, FeatureMeta
from videollm_mod_jax.data.feature_shards import SHARDS, join_shards, shard_name
from videollm_mod_jax.data.features import FeatureSource
from videollm_mod_jax.data.frame_batches import Batch, batched
from videollm_mod_jax.data.video_folder import IMAGES, VIDEOS, about_frames, divide, find_videos
from videollm_mod_jax.encoding import EncodingBar, fingerprint, frame_encoder, write_shards
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.config import VideoLLMConfig
from videollm_mod_jax.names import check_name
from videollm_mod_jax.training import distributed
from videollm_mod_jax.training.checkpoint import load_tower, read_model_config

BATCH_SIZE = 128
# More processes than this are more than one accelerator's host can use.
MOST_WORKERS = 32
RESUMABLE = "interrupted; the same command continues where it stopped"


def encode_folder(
    config: VideoLLMConfig,
    tower_params: Mapping[str, Any],
    videos: str | os.PathLike[str],
    path: str | os.PathLike[str],
    fps: float,
    workers: int,
    batch_size: int,
) -> FeatureSource:
    """Writes the frame tokens of all videos below a directory to a feature store.

    Several processes call it together: each encodes its share of the shards, and the first joins
    their index. What an earlier call has encoded is kept, if it was of the same videos.

    Args:
      config: of the model that will read the features.
      tower_params: of its vision tower (`variables['params']['vision']`).
      videos: the directory; `find_videos` says which of its files are videos.
      path: directory of the store; appears when it is complete. PATH.partial until then.
      fps: frames per second, as `read_video` samples them.
      workers: processes that decode, for this process.
      batch_size: frames per call of the tower, on each device.

    Returns:
      The store; its `bad` names the videos that could not be read.

    Raises:
      UserError: no videos, `path` or PATH.partial is of other videos, another frame rate or tower,
        features that float16 cannot hold, or a process that decodes dies.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"fps is {fps}; expected more than 0")
    if workers < 1:
        raise UserError(f"workers is {workers}; expected 1 or more")
    videos, path = Path(videos), Path(path)
    partial = path.with_name(f"{path.name}.partial")
    meta = _meta(config, tower_params, fps)
    with distributed.holding(path, "encode", beside=True):
        with distributed.lead_first("planned") as lead:
            if lead:
                _plan(videos, meta, path, partial)
        if not path.exists():
            plan = EncodingPlan.read(partial)
            _encode_shards(config, tower_params, plan, videos, partial, workers, batch_size)
            _finish(partial, path, meta, len(plan.shards))
    return FeatureSource(path)


def _plan(videos: Path, meta: FeatureMeta, path: Path, partial: Path) -> None:
    """Sees to it that there is a plan, that it is the one for this folder, and nothing else."""
    found = find_videos(videos)
    sources = sources_of(found, videos)
    begun = path if path.exists() else partial
    if path.exists() or (partial / PLAN).exists():
        EncodingPlan.read(begun).check(meta, sources, begun)
    else:
        with ThreadPoolExecutor() as threads:
            lengths = threads.map(lambda file: about_frames(file, meta.fps), found.values())
            frames = list(progress.track(lengths, "Looking at videos", len(found)))
        shards = divide(frames, meta.frame_bytes)
        EncodingPlan(meta, sources, shards).write(partial)
    files.remove_leftovers(partial)


def _encode_shards(
    config: VideoLLMConfig,
    tower_params: Mapping[str, Any],
    plan: EncodingPlan,
    videos: Path,
    directory: Path,
    workers: int,
    batch_size: int,
) -> None:
    """Encodes those shards of this process that are not there yet."""
    count = len(plan.shards)
    own = range(count)[jax.process_index() :: jax.process_count()]
    missing = [shard for shard in own if not (directory / shard_name(shard, count)).exists()]
    of_shards = {shard: plan.names(shard) for shard in own}
    done = sum(len(names) for shard, names in of_shards.items() if shard not in missing)
    decoded = decode_shards(
        {
            shard: [(name, videos / plan.sources[name][0]) for name in of_shards[shard]]
            for shard in missing
        },
        plan.meta.fps,
        plan.meta.resolution,
        batch_size * jax.local_device_count(),
        workers,
    )
    encode = frame_encoder(config, tower_params)
    with EncodingBar(sum(map(len, of_shards.values())), done) as bar:
        write_shards(encode, decoded, directory, plan.meta, count, bar)


def encode_split(
    config: VideoLLMConfig,
    tower_params: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    batch_size: int = BATCH_SIZE,
) -> None:
    """Writes the frame tokens of all records to a feature store, with a progress bar.

    Several processes call it together: each encodes its share, and the first joins their index.

    Args:
      config: of the model that will read the features.
      tower_params: of its vision tower (`variables['params']['vision']`).
      records: with `id`, `fps` and `frames`, uint8 [F, A, A] or [F, A, A, 3], letterboxed.
      path: directory of the store; appears when it is complete.
      batch_size: frames per call of the tower, on each device.

    Raises:
      UserError: `path` exists, there are no records, or a record has no frames, frames that are
        not square uint8 images, or another frame rate or size than the first record.
    """
    path = Path(path)
    if not len(records):
        raise UserError(f"{path}: there are no records to encode")
    with distributed.holding(path, "encode", beside=True):
        if path.exists():
            raise UserError(f"{path}: exists already; remove it or write elsewhere")
        _encode_records(config, tower_params, records, path, batch_size)


def _encode_records(
    config: VideoLLMConfig,
    tower_params: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    path: Path,
    batch_size: int,
) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with distributed.lead_first("removed") as lead:
        if lead:
            _remove_partial(partial)
    first = (float(records[0]["fps"]), np.shape(records[0]["frames"])[1:])
    meta = _meta(config, tower_params, first[0])
    frames = len(records[0]["frames"])
    shards = divide([frames] * len(records), meta.frame_bytes)
    own = range(len(shards))[jax.process_index() :: jax.process_count()]

    def batches() -> Iterator[tuple[int, Batch]]:
        for shard in own:
            videos = (_video(records[i], first) for i in shards[shard])
            for batch in batched(videos, batch_size * jax.local_device_count(), first[1][0]):
                yield shard, batch

    try:
        with EncodingBar(sum(len(shards[shard]) for shard in own)) as bar:
            encode = frame_encoder(config, tower_params)
            write_shards(encode, batches(), partial, meta, len(shards), bar)
        _finish(partial, path, meta, len(shards))
    except BaseException:
        # Others may still be writing there; the next run removes it.
        if jax.process_count() == 1:
            _remove_partial(partial)
        raise


def _remove_partial(partial: Path) -> None:
    """Removes the shards of an encoding that was killed, and nothing that is not one's."""
    if partial.is_dir() and not partial.is_symlink():
        files.remove_leftovers(partial)
        for shard in partial.glob(SHARDS):
            shard.unlink()
        for name in (META, INDEX):
            (partial / name).unlink(missing_ok=True)
        try:
            partial.rmdir()
        except OSError as error:
            raise UserError(
                f"{partial} is in the way, and holds what no encoding wrote; move it elsewhere"
            ) from error


def _video(
    record: Mapping[str, Any], first: tuple[float, tuple[int, ...]]
) -> tuple[str, np.ndarray]:
    """The id and the RGB frames of a record; grey frames get three equal channels."""
    name, frames = record["id"], np.asarray(record["frames"])
    name = name.decode() if isinstance(name, bytes) else name
    if not len(frames):
        raise UserError(f"{name}: expected at least one frame, found none")
    kind = (float(record["fps"]), frames.shape[1:])
    if kind != first:
        raise UserError(
            f"{name}: expected {first[0]} frames per second of shape {first[1]}, as the first "
            f"video has, found {kind[0]} of {kind[1]}"
        )
    return name, np.repeat(frames[..., None], 3, axis=-1) if frames.ndim == 3 else frames


def _meta(config: VideoLLMConfig, tower_params: Mapping[str, Any], fps: float) -> FeatureMeta:
    return FeatureMeta(
        features_per_frame=config.vision.features_per_frame,
        width=config.vision.width,
        fps=fps,
        resolution=config.vision.image_size,
        tower=fingerprint(config, tower_params),
    )


def _finish(partial: Path, path: Path, meta: FeatureMeta, count: int) -> None:
    """Joins the shards, once all processes have written theirs, and gives the store its name."""
    distributed.barrier("encoded")
    with distributed.lead_first("joined") as lead:
        if lead:
            shards = [shard_name(shard, count) for shard in range(count)]
            join_shards(partial, shards).write(partial, meta)
            os.rename(partial, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    flags = _parser().parse_args(argv)
    bad: dict[str, str] = {}

    def run() -> None:
        if flags.dataset is not None and flags.split is None:
            raise UserError("--dataset needs --split, such as train")
        cli.join_processes(flags)
        tower = load_tower(flags.checkpoint, verify=flags.verify)
        config = read_model_config(Path(flags.checkpoint))
        if flags.dataset is not None:
            data_dir = Path(flags.data_dir or Path(flags.checkpoint) / "data")
            encode_split(config, tower, _open(flags.dataset, data_dir, flags.split), flags.out)
            source = FeatureSource(flags.out)
        else:
            source = encode_folder(
                config, tower, flags.videos, flags.out, flags.fps, flags.workers, BATCH_SIZE
            )
        bad.update(source.bad)
        if distributed.is_lead():
            _report(source)

    interrupted = "interrupted" if flags.videos is None else RESUMABLE
    return cli.report_user_errors(run, interrupted) or int(bool(bad))


def _report(source: FeatureSource) -> None:
    frames = source.videos.frames
    print(f"{source.path} holds {len(frames)} videos, {sum(frames.values())} frames")
    if source.bad:
        count = len(source.bad) + len(frames)
        print(f"{len(source.bad)} of {count} videos could not be read:", file=sys.stderr)
        for name, error in source.bad.items():
            print(f"  {name}: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m videollm_mod_jax.encode",
        description="Encodes the frames of videos with the vision tower of a model.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="directory of the model")
    cli.add_verify_argument(add)
    add("--out", required=True, metavar="DIR", help="directory of the features")
    what = parser.add_mutually_exclusive_group(required=True)
    endings = " ".join(sorted(VIDEOS | IMAGES))
    what.add_argument("--videos", metavar="DIR", help=f"encodes all files below it of {endings}")
    what.add_argument("--dataset", metavar="NAME", help="encodes a TFDS dataset that has frames")
    add(
        "--fps",
        type=cli.number("[1e-3, 1000]"),
        default=2.0,
        help="frames per second of --videos (default: 2)",
    )
    add(
        "--workers",
        type=cli.whole_number("[1, 1024]"),
        metavar="N",
        default=min(os.cpu_count() or 1, MOST_WORKERS),
        help="processes that decode (default: one per core, at most 32)",
    )
    add("--split", help="of the dataset, such as train")
    add("--data-dir", metavar="DIR", help="where the dataset is (default: CHECKPOINT/data)")
    cli.add_process_arguments(parser)
    return parser


def _open(name: str, data_dir: Path, split: str) -> Sequence[Mapping[str, Any]]:
    base = re.split("[/:]", name)[0]
    for features in sorted((data_dir / check_name(base, "--dataset")).rglob(FEATURES)):
        check_tfds_files(features.parent, "take a dataset that you trust")
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(
            f"{data_dir} holds no TFDS dataset {name!r}; --data-dir says where to look"
        ) from error
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise UserError(f"the split is {split!r}; {name} in {data_dir} has {known}")
    return TfdsExamples(Path(builder.data_dir), split, "take another copy of it")


if __name__ == "__main__":
    cli.leave(main())
