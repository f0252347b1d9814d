"""Looks at the files that describe a TFDS dataset before TFDS does, which believes them.

TFDS imports the Python class that `features.json` names, from the current directory too, and reads
the shards that `dataset_info.json` names, wherever they are. Datasets come from strangers.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from google.protobuf import json_format

from videollm_mod_jax.data.files import read_json_object
from videollm_mod_jax.errors import UserError, shown
from videollm_mod_jax.names import check_name

FEATURES, INFO = "features.json", "dataset_info.json"

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
