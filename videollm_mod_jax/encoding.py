"""Frames through the vision tower into shards of features, while the next ones are decoded."""

import collections
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich import progress

from videollm_mod_jax.data.feature_index import FeatureMeta
from videollm_mod_jax.data.feature_shards import ShardWriter, shard_name
from videollm_mod_jax.data.frame_batches import Batch
from videollm_mod_jax.models.config import VideoLLMConfig
from videollm_mod_jax.models.vision import VisionTower, preprocess
from videollm_mod_jax.training import distributed


def fingerprint(config: VideoLLMConfig, tower_params: Mapping[str, Any]) -> str:
    """Sixteen hex digits that change with the tower's architecture, number type or weights."""
    vision = dataclasses.asdict(config.vision)
    digest = hashlib.sha256(json.dumps([vision, config.dtype], sort_keys=True).encode())
    for name, leaf in jax.tree.leaves_with_path(tower_params):
        digest.update(jax.tree_util.keystr(name).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def frame_encoder(
    config: VideoLLMConfig, tower_params: Mapping[str, Any]
) -> Callable[[np.ndarray], jax.Array]:
    """The vision tower on all devices of this process, each with its share of the frames.

    Returns:
      A function of frames, uint8 [B, A, A, 3], that gives frame tokens, float32 [B, N, W]; B is a
      multiple of the number of devices.
    """
    tower = VisionTower(config.vision, config.dtype, config.param_dtype)
    mesh = Mesh(np.asarray(jax.local_devices()), ("device",), axis_types=(AxisType.Auto,))
    params = jax.device_put(tower_params, NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def encode(params: Any, images_BAAC: jax.Array) -> jax.Array:
        images_BAAC = preprocess(images_BAAC, config.vision)
        return tower.apply({"params": params}, images_BAAC).astype(np.float32)

    shares = NamedSharding(mesh, PartitionSpec("device"))
    return lambda images_BAAC: encode(params, jax.device_put(images_BAAC, shares))


def write_shards(
    encode: Callable[[np.ndarray], jax.Array],
    decoded: Iterator[tuple[int, Batch]],
    directory: Path,
    meta: FeatureMeta,
    count: int,
    bar: "EncodingBar",
) -> None:
    """Encodes the batches of several shards as they come, and writes each shard when it is whole.

    Args:
      encode: frames [B, A, A, 3] uint8 to features [B, N, W].
      decoded: numbers of shards and their batches, each shard's in order.
      directory: of the shards.
      meta: what the videos share.
      count: shards of the whole store.
      bar: told of every frame and video.

    Raises:
      UserError: features that float16 cannot hold, or what `decoded` raises.
    """
    shards: dict[int, tuple[contextlib.ExitStack, ShardWriter]] = {}
    with contextlib.ExitStack() as all_shards, contextlib.closing(decoded):
        for shard, batch, features_BNW in _encoded(encode, decoded):
            if shard not in shards:
                one = all_shards.enter_context(contextlib.ExitStack())
                writer = ShardWriter(directory / shard_name(shard, count), meta)
                shards[shard] = one, one.enter_context(writer)
            one, writer = shards[shard]
            for part in batch.parts:
                frames_FNW, features_BNW = np.split(features_BNW, [part.frames])
                writer.append(part.name, frames_FNW)
                if part.error is not None:
                    writer.fail(part.name, part.error)
                elif part.ends:
                    writer.end(part.name)
                bar.advance(part.frames, part.ends)
            if batch.last:
                del shards[shard]
                one.close()


def _encoded(
    encode: Callable[[np.ndarray], jax.Array], decoded: Iterator[tuple[int, Batch]]
) -> Iterator[tuple[int, Batch, np.ndarray]]:
    """Batches with their features; the device has the next one before we wait for one."""
    ahead = collections.deque()
    for shard, batch in decoded:
        ahead.append((shard, batch, encode(batch.images_BAAC)))
        if len(ahead) > 1:
            shard, batch, features_BNW = ahead.popleft()
            yield shard, batch, np.asarray(features_BNW)
    for shard, batch, features_BNW in ahead:
        yield shard, batch, np.asarray(features_BNW)


class EncodingBar:
    """A progress bar of the first process: its videos, their rate, frames per second, time left."""

    def __init__(self, videos: int, done: int = 0):
        """Args: videos: of this process; done: of these, before this run."""
        self._bar = progress.Progress(
            progress.TextColumn("Encoding"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            _Rates(),
            progress.TimeRemainingColumn(),
            disable=not distributed.is_lead(),
        )
        self._task = self._bar.add_task("", total=videos, completed=done, frames=0, videos=0)

    def __enter__(self) -> "EncodingBar":
        self._bar.start()
        return self

    def advance(self, frames: int, ends: bool) -> None:
        """Says that frames of a video have been encoded, and whether they were its last."""
        fields = self._bar.tasks[0].fields
        self._bar.update(
            self._task,
            advance=int(ends),
            frames=fields["frames"] + frames,
            videos=fields["videos"] + ends,
        )

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


class _Rates(progress.ProgressColumn):
    """Frames and videos per second since the bar began."""

    def render(self, task: progress.Task) -> str:
        """The text of the column."""
        seconds = task.elapsed or float("inf")
        frames, videos = task.fields["frames"] / seconds, task.fields["videos"] / seconds
        return f"{frames:.0f} frames/s, {videos:.2f} videos/s"
