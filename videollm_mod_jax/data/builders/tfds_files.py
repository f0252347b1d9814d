"""Looks at the files that describe a TFDS dataset before TFDS does, which believes them.

TFDS imports the Python class that `features.json` names, from the current directory too, and reads
the shards that `dataset_info.json` names, wherever they are. Datasets come from strangers.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.core.proto import dataset_info_pb2

from videollm_mod_jax.data.files import read_bytes, read_json_object
from videollm_mod_jax.errors import UserError, shown
from videollm_mod_jax.names import check_name

FEATURES, INFO = "features.json", "dataset_info.json"

_T = TypeVar("_T")
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_OF_TFDS = "tensorflow_datasets.core.features."


def check_tfds_files(
    directory: Path, remedy: str, features: tfds.features.FeaturesDict | None = None
) -> None:
    """Refuses the directory of a dataset's version that TFDS must not see.

    Args:
      directory: that holds `features.json` and `dataset_info.json`.
      remedy: what to do about it, for the message.
      features: what its records must hold; None takes whatever consists of features of TFDS itself.

    Raises:
      UserError: it has other features, or such as are no part of TFDS; or shards that are not
        ArrayRecord files in the directory, as many as it says.
    """
    try:
        _check_features(directory / FEATURES, features)
        _check_info(directory)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error


class TfdsExamples(Sequence[Mapping[str, Any]]):
    """The examples of a split of a dataset that `check_tfds_files` has seen; picklable.

    Raises:
      UserError: from every method: its files are damaged.
    """

    def __init__(self, directory: Path, split: str, remedy: str):
        """Opens a split.

        Args:
          directory: of the dataset's version.
          split: that it has.
          remedy: what to do about damage, for messages.
        """
        self._directory, self._split, self._remedy = directory, split, remedy
        with self._refusing("the dataset"):
            self._source = tfds.builder_from_directory(directory).as_data_source(split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.read(index, lambda example: example)

    def read(self, index: int, decode: Callable[[Mapping[str, Any]], _T]) -> _T:
        """Returns what `decode` makes of an example, which may be damaged in any way."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        with self._refusing(f"record {index} of {self._split}"):
            return decode(self._source[index])

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Turns what TFDS raises for damaged files into a UserError."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        # The libraries below raise whatever they trip over.
        except Exception as error:
            raise UserError(
                f"{self._directory}: {what} is damaged ({type(error).__name__}); {self._remedy}"
            ) from error


def _check_features(path: Path, features: tfds.features.FeaturesDict | None) -> None:
    stored = read_json_object(path)
    for name in _class_names(stored):
        if not isinstance(name, str) or not name.startswith(_OF_TFDS):
            raise UserError(
                f"{path} names the Python class {shown(name)}; expected one of {_OF_TFDS}*, as no "
                "other is trusted"
            )
    if features is not None and stored != _as_json(features):
        raise UserError(f"{path} describes other records than ours")


def _as_json(features: tfds.features.FeaturesDict) -> dict[str, Any]:
    """Return what TFDS writes as `features.json`."""
    return json_format.MessageToDict(features.to_proto())


def _class_names(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ("pythonClassName", "python_class_name"):
                yield inner
            else:
                yield from _class_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _class_names(inner)


def _check_info(directory: Path) -> None:
    path = directory / INFO
    info = read_json_object(path)
    _check_splits(directory, info)
    try:
        # As TFDS reads it, which takes no byte order mark.
        json_format.Parse(read_bytes(path).decode(), dataset_info_pb2.DatasetInfo())
    except (json_format.ParseError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no dataset_info of TFDS: {error}") from error


def _check_splits(directory: Path, info: Mapping[str, Any]) -> None:
    path = directory / INFO
    dataset = check_name(info.get("name"), f"{path}: name")
    if info.get("fileFormat") != "array_record":
        raise UserError(
            f"{path}: fileFormat is {shown(info.get('fileFormat'))}; expected 'array_record'"
        )
    splits = info.get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, Mapping) for split in splits):
        raise UserError(f"{path}: splits is {shown(splits)}; expected a list of tables")
    for split in splits:
        name = check_name(split.get("name"), f"{path}: name of a split")
        if split.get("filepathTemplate", _TEMPLATE) != _TEMPLATE:
            raise UserError(
                f"{path}: split {name}: filepathTemplate is {shown(split['filepathTemplate'])}; "
                f"expected {_TEMPLATE}"
            )
        lengths = split.get("shardLengths")
        # Whole numbers are texts in the JSON of protocol buffers.
        if not isinstance(lengths, list) or not all(
            isinstance(length, str) and length.isdecimal() and len(length) < 16
            for length in lengths
        ):
            raise UserError(
                f"{path}: split {name}: shardLengths is {shown(lengths)}; expected numbers of "
                "records"
            )
        for index in range(len(lengths)):
            shard = f"{dataset}-{name}.array_record-{index:05}-of-{len(lengths):05}"
            if not (directory / shard).is_file():
                raise UserError(
                    f"{directory / shard} is missing, of the {len(lengths)} shards that {INFO} "
                    "names"
                )
