"""Prepared datasets: the records of any `annotations.Dataset` as TFDS ArrayRecord files, and back.

    OUT/ego4d_narration/1.0.0/
      dataset_info.json, features.json, ego4d_narration-train.array_record-00000-of-00001, ...
      dataset.json      what the records share, and the report of their preparation
      videos.json       names of the videos by split

TFDS reads it too: `tfds.data_source("ego4d_narration", data_dir=OUT, split="train")`. No TensorFlow
is needed to write or read it.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tensorflow_datasets as tfds
from rich import progress

from videollm_mod_jax.config_dict import COUNT, Checked, Interval, build
from videollm_mod_jax.console import make_console
from videollm_mod_jax.data import files
from videollm_mod_jax.data.annotations import Dataset, Record, Source, Turn
from videollm_mod_jax.data.builders.counting import CountedSplit, Split
from videollm_mod_jax.data.builders.tfds_files import TfdsExamples, check_tfds_files
from videollm_mod_jax.errors import UserError, shown
from videollm_mod_jax.names import check_name

VERSION = tfds.core.Version("1.0.0")
_DATASET, _VIDEOS = "dataset.json", "videos.json"
_REMEDY = "remove it and prepare it again"

# TFDS keeps numbers as float32, which moves 5400.1 s at 30 fps by a frame; bytes keep all digits.
_SECONDS = {"dtype": np.float64, "encoding": "bytes"}
_FEATURES = {
    "id": tfds.features.Text(),
    "video": tfds.features.Text(),
    "start": tfds.features.Tensor(shape=(), **_SECONDS),
    "stop": tfds.features.Tensor(shape=(), **_SECONDS),
    "stride": np.int32,
    # Arrays side by side are written fourteen times as fast as a Sequence of dicts.
    "turns": {
        "role": tfds.features.Tensor(shape=(None,), dtype=np.object_),
        "time": tfds.features.Tensor(shape=(None,), **_SECONDS),
        "text": tfds.features.Tensor(shape=(None,), dtype=np.object_),
        "learn": tfds.features.Tensor(shape=(None,), dtype=np.bool_),
    },
    "target": tfds.features.Text(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description(Checked):
    """What `dataset.json` says of a prepared dataset; see `StoredDataset`.

    Attributes:
      sha256: of the records of each split, in order.
    """

    name: str
    benchmark: str
    labels: tuple[str, ...]
    fps: Annotated[float, Interval("(0, 1000]")]
    max_frames: COUNT
    splits: Mapping[str, Split]
    sha256: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredDataset:
    """A prepared dataset.

    Attributes:
      directory: of its files.
      name: of the dataset, as in `registry.DATASETS`.
      benchmark: how it is evaluated: a name of `evaluation/benchmarks.py`.
      labels: the answers among which a benchmark looks for the nearest; () for open answers.
      fps: frames per second of the features that it was prepared for.
      max_frames: longest stretch of a record.
      splits: those that have records.
    """

    directory: Path
    name: str
    benchmark: str
    labels: tuple[str, ...]
    fps: float
    max_frames: int
    splits: Mapping[str, Split]

    def records(self, split: str) -> "StoredRecords":
        """Random access to the records of a split, in the order in which they were prepared.

        Raises:
          UserError: no such split.
        """
        self._check(split)
        return StoredRecords(self.directory, split)

    def videos(self, split: str) -> tuple[str, ...]:
        """Names of the videos of a split, each once, in the order of the records.

        Raises:
          UserError: no such split.
        """
        self._check(split)
        path = self.directory / str(VERSION) / _VIDEOS
        names = _read_json(path).get(split)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"{path}: {split} is {shown(names)}; expected the names of its videos; remove the "
                "dataset and prepare it again"
            )
        return tuple(names)

    def _check(self, split: str) -> None:
        if split not in self.splits:
            raise UserError(
                f"{self.directory}: the split is {split!r}; expected one of "
                + ", ".join(self.splits)
            )


class StoredRecords(Sequence[Record]):
    """The records of a split; picklable, for the workers of a pipeline."""

    def __init__(self, directory: str | os.PathLike, split: str):
        """Args: directory: of a `StoredDataset`; split: one that it has."""
        self._examples = TfdsExamples(Path(directory) / str(VERSION), split, _REMEDY)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        return self._examples.read(index, _record)


def write_dataset(dataset: Dataset, source: Source, out: Path) -> Path:
    """Reads a dataset and writes its records, with a progress bar.

    An interrupted run leaves no dataset, and the same command makes it from the beginning; where it
    was made before, of the same records, nothing is written. What became of the annotations is in
    `source.report` afterwards.

    Args:
      dataset: what to read.
      source: where to read it from.
      out: its files go to the new directory OUT/NAME.

    Returns:
      OUT/NAME, for `open_dataset`.

    Raises:
      UserError: OUT/NAME exists and holds something else, a file of the source cannot be used, or
        no annotation can.
    """
    target = Path(out) / dataset.name
    labels, splits = _read(dataset, source)
    if target.exists():
        found = _read_existing(target)
        for name, split in splits.items():
            for _ in _tracked(split, f"Comparing {name}"):
                pass
        if found != _describe(dataset, source, labels, splits):
            raise UserError(
                f"{target}: exists already, made of other records; remove it or write elsewhere"
            )
        return target
    tfds.disable_progress_bar()  # ours is that of `_Builder`
    with files.written_aside(target) as aside:
        tree = aside / "tfds"  # TFDS leaves more than the dataset in it
        builder = _Builder(dataset, splits, data_dir=os.fspath(tree), file_format="array_record")
        # It says that it downloads, and to where it is written aside.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        written = Path(builder.data_dir)
        shared = dataclasses.asdict(_describe(dataset, source, labels, splits))
        _write_json(written / _DATASET, shared | {"report": vars(source.report)})
        _write_json(written / _VIDEOS, {name: list(s.videos) for name, s in splits.items()})
        written.rename(aside / str(VERSION))
        shutil.rmtree(tree)  # made above
    return target


def check_dataset(dataset: Dataset, source: Source) -> dict[str, Split]:
    """Reads a dataset as `write_dataset` does, and writes nothing.

    Returns:
      What its splits would amount to.

    Raises:
      UserError: as `write_dataset`.
    """
    _, splits = _read(dataset, source)
    for name, split in splits.items():
        for _ in _tracked(split, f"Checking {name}"):
            pass
    return {name: split.counts for name, split in splits.items()}


def open_dataset(directory: str | os.PathLike) -> StoredDataset:
    """Opens a prepared dataset.

    Args:
      directory: as `write_dataset` returned it.

    Raises:
      UserError: there is none, or its files are damaged.
    """
    directory = Path(directory)
    shared = _read_description(directory)
    features = tfds.features.FeaturesDict(_FEATURES)
    check_tfds_files(directory / str(VERSION), _REMEDY, features)
    return StoredDataset(
        directory=directory,
        name=shared.name,
        benchmark=shared.benchmark,
        labels=shared.labels,
        fps=shared.fps,
        max_frames=shared.max_frames,
        splits=shared.splits,
    )


def _describe(
    dataset: Dataset,
    source: Source,
    labels: tuple[str, ...],
    splits: Mapping[str, CountedSplit],
) -> Description:
    """What the records share, once all of them have passed."""
    return Description(
        name=dataset.name,
        benchmark=dataset.benchmark,
        labels=labels,
        fps=source.videos.fps,
        max_frames=source.max_frames,
        splits={name: split.counts for name, split in splits.items()},
        sha256={name: split.sha256 for name, split in splits.items()},
    )


def _read_description(directory: Path) -> Description:
    path = directory / str(VERSION) / _DATASET
    values = _read_json(path)
    # Older versions wrote no checksums.
    fields = {"sha256": {}} | {key: values[key] for key in values if key != "report"}
    try:
        described = build(Description, fields, str(path))
        for name in (described.name, *described.splits):
            check_name(name, f"{path}: a name")
    except UserError as error:
        raise UserError(f"{error}; {_REMEDY}") from error
    return described


def _read_existing(target: Path) -> Description:
    try:
        return _read_description(target)
    except UserError as error:
        raise UserError(
            f"{target}: exists already, and holds no prepared dataset ({error}); remove it or "
            "write elsewhere"
        ) from error


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes records of any dataset, in order."""

    VERSION = VERSION

    def __init__(self, dataset: Dataset, splits: Mapping[str, CountedSplit], **arguments: object):
        self.name, self._page, self._splits = dataset.name, dataset.page, splits
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._page,
            disable_shuffling=True,
            features=tfds.features.FeaturesDict(_FEATURES),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # downloads need licences, which a person accepts
        return {name: self._generate_examples(name) for name in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, object]]]:
        records = _tracked(self._splits[split], f"Preparing {split}")
        return ((index, _example(record)) for index, record in enumerate(records))


def _read(dataset: Dataset, source: Source) -> tuple[tuple[str, ...], dict[str, CountedSplit]]:
    """Its labels, and the splits that have records."""
    parsed = dataset.read(source)
    splits = {name: CountedSplit(records, source.videos) for name, records in parsed.splits.items()}
    splits = {name: split for name, split in splits.items() if not split.empty}
    if not splits:
        dropped = source.report.dropped
        found = "there is none"
        if dropped:
            reason, count = dropped.most_common(1)[0]
            found = f"{dropped.total():,} were dropped, {count:,} of them for {reason!r}"
        raise UserError(f"{source.directory}: no annotation of {dataset.name} can be used; {found}")
    return parsed.labels, splits


def _tracked(records: Iterable[Record], task: str) -> Iterator[Record]:
    """The records, with a progress bar; nobody knows how many there will be."""
    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        progress.TextColumn("{task.completed:,.0f} records"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=make_console(stderr=True)) as bar:
        yield from bar.track(records, description=task)


def _example(record: Record) -> dict[str, object]:
    turns = record.turns
    return {
        "id": record.id,
        "video": record.video,
        "start": record.start,
        "stop": record.stop,
        "stride": record.stride,
        "turns": {
            "role": np.array([turn.role.encode() for turn in turns], object),
            "time": np.array([turn.time for turn in turns], np.float64),
            "text": np.array([turn.text.encode() for turn in turns], object),
            "learn": np.array([turn.learn for turn in turns], bool),
        },
        "target": json.dumps(record.target),
    }


def _record(example: Mapping[str, Any]) -> Record:
    turns = example["turns"]
    rows = zip(turns["role"], turns["time"], turns["text"], turns["learn"], strict=True)
    return Record(
        id=example["id"].decode(),
        video=example["video"].decode(),
        start=float(example["start"]),
        stop=float(example["stop"]),
        stride=int(example["stride"]),
        turns=tuple(
            Turn(role.decode(), float(time), text.decode(), bool(learn))
            for role, time, text, learn in rows
        ),
        target=json.loads(example["target"]),
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: expected a prepared dataset, found none; prepare it")
    try:
        return files.read_json_object(path)
    except UserError as error:
        raise UserError(f"{error}; remove the dataset and prepare it again") from error
