"""`digits_stream` as a TFDS dataset (ArrayRecord, without TensorFlow)."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from rich import progress

from videollm_mod_jax.data import digits
from videollm_mod_jax.data.annotations import Record, Turn
from videollm_mod_jax.data.builders.tfds_files import TfdsExamples, check_tfds_files


@dataclasses.dataclass(eq=False, kw_only=True)
class DigitsConfig(tfds.core.BuilderConfig):
    """How much to draw; the name, and so the directory, follows from the numbers.

    Attributes:
      train, validation, test: streams per split.
      frames: frames per stream.
      seed: of the generator; the splits differ for every seed.
    """

    name: str = dataclasses.field(init=False, default="")
    train: int = 3000
    validation: int = 64
    test: int = 200
    frames: int = 20
    seed: int = 0

    def __post_init__(self):
        self.name = f"{self.train}-{self.validation}-{self.test}-f{self.frames}-s{self.seed}"


def stream_features(
    frames: int, side: int, **more: tfds.features.FeatureConnector
) -> tfds.features.FeaturesDict:
    """What the records of a drawn dataset hold.

    Args:
      frames: of a stream.
      side: of a frame, pixels.
      **more: fields that the dataset has beside those of all.
    """
    turn = {"role": tfds.features.Text(), "time": np.float32, "text": tfds.features.Text()}
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "frames": tfds.features.Tensor(
                shape=(frames, side, side), dtype=np.uint8, encoding="zlib"
            ),
            "fps": np.float32,
            "turns": tfds.features.Sequence(turn),
            **more,
        }
    )


class DigitsStream(tfds.core.GeneratorBasedBuilder):
    """Narrated streams of handwritten digits; see `data/digits.py`.

    Features: id; frames (F, 48, 48) uint8; fps; turns (role, time, text); places (F, 9) int8, the
    class of the digit at each place, -1 where none.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (DigitsConfig(),)
    scenery = digits

    def _info(self) -> tfds.core.DatasetInfo:
        frames, side = self.builder_config.frames, digits.CANVAS
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits that appear, move and leave, with timed narrations.",
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
            # Record i of a split is stream i, so that features stored in order match it.
            disable_shuffling=True,
            features=stream_features(
                frames, side, places=tfds.features.Tensor(shape=(frames, 9), dtype=np.int8)
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # everything is drawn
        return {
            split: self._generate_examples(split, getattr(self.builder_config, split))
            for split in digits.SPLITS
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        for index in progress.track(range(count), f"Drawing {split} streams"):
            yield index, self.scenery.make_stream(split, index, config.seed, config.frames)


class DigitsDataset:
    """The streams as other datasets offer theirs (`builders/stored.py`), and their frames.

    Attributes:
      builder: draws it.
      benchmark: how it is evaluated.
      labels: none; its answers are open.
    """

    builder = DigitsStream
    benchmark = "stream"
    labels = ()

    def __init__(self, data_dir: str | os.PathLike, config: DigitsConfig):
        """Draws the streams below `data_dir` unless they are there.

        An interrupted run leaves no dataset directory, and the next run starts again.
        """
        # TFDS wants its own object for a configuration that the class lists.
        config = self.builder.builder_configs.get(config.name, config)
        drawn = Path(data_dir) / self.builder.name / config.name / str(self.builder.VERSION)
        if drawn.exists():
            # The builder reads these files when it is made.
            check_tfds_files(drawn, _remedy(drawn))
        builder = self.builder(
            data_dir=os.fspath(data_dir), config=config, file_format="array_record"
        )
        if drawn.exists():
            check_tfds_files(drawn, _remedy(drawn), builder.info.features)
        tfds.disable_progress_bar()  # ours is the one of `_generate_examples`
        builder.download_and_prepare()
        self._directory, self.splits = drawn, tuple(builder.info.splits)

    def streams(self, split: str) -> Sequence[Mapping[str, Any]]:
        """The streams of a split as TFDS reads them: `make_stream`, texts in bytes."""
        # Reopened, because sources of a builder with a configuration of its own do not unpickle in
        # the workers of a pipeline.
        return TfdsExamples(self._directory, split, _remedy(self._directory))

    def records(self, split: str) -> Sequence[Record]:
        """The streams of a split without their frames."""
        return DigitsRecords(self.streams(split))

    def videos(self, split: str) -> tuple[str, ...]:
        """The names of the streams of a split."""
        return tuple(record.video for record in self.records(split))


@dataclasses.dataclass(frozen=True)
class DigitsRecords(Sequence[Record]):
    """Records of streams as TFDS reads them."""

    streams: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"stream {index} of {len(self)}")
        stream = self.streams[index]
        name, turns = stream["id"].decode(), stream["turns"]
        rows = zip(turns["role"], turns["time"], turns["text"], strict=True)
        return Record(
            id=name,
            video=name,
            start=0.0,
            stop=len(stream["frames"]) / float(stream["fps"]),
            turns=tuple(Turn(role.decode(), float(t), text.decode()) for role, t, text in rows),
        )


def _remedy(directory: Path) -> str:
    return f"remove {directory}, and it is drawn again"
