"""The named tensors of a checkpoint directory, as downloaded from the Hub.

    model.safetensors      or  model.safetensors.index.json   and the shards that it names
    pytorch_model.bin      or  pytorch_model.bin.index.json   and the shards that it names
    adapter_model.safetensors  or  adapter_model.bin          of PEFT

Safetensors are preferred, as transformers does. Opening reads headers only and checks that every
tensor is there exactly once; elements are read when they are asked for.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from videollm_mod_jax.conversion.links import check_inside
from videollm_mod_jax.conversion.safetensors_file import parse_json, safetensors_infos
from videollm_mod_jax.conversion.stored import TensorInfo
from videollm_mod_jax.conversion.table import Index
from videollm_mod_jax.conversion.torch_bin import torch_infos
from videollm_mod_jax.data.files import LARGEST_JSON
from videollm_mod_jax.errors import UserError, shown

# By kind of weights, the files that can hold them, the preferred one first.
_FILES = {
    "model": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "adapter": ("adapter_model.safetensors", "adapter_model.bin"),
}
_SHARD = re.compile(r"[\w.-]+\.(safetensors|bin)")
_OTHER_FORMATS = ("*.gguf", "*.pth", "*.msgpack", "*.h5")
_POINTER = b"version https://git-lfs.github.com/spec/"
_MIXED = "they are not of one checkpoint: download it again, into an empty directory"


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of one checkpoint.

    Attributes:
      directory: of the checkpoint.
      files: that hold its weights: one file or all shards.
      tensors: by name, where each tensor is, in the order of the files and of their bytes.
    """

    directory: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors; reading them in this order reads the files from front to back."""
        return tuple(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place of a tensor."""
        return self.tensors[name]

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, in an array of its own and in the dtype of the file."""
        info = self.tensors[name]
        return info.read((slice(None),) * len(info.shape))

    def read_slice(self, name: str, index: Index) -> np.ndarray:
        """The slice `index` of a tensor, one `slice` without a step per axis, in its own array."""
        return self.tensors[name].read(index)

    def hash(self, file: Path) -> str:
        """SHA-256 of one of `files`, in hexadecimal."""
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()


def open_source(directory: Path, weights: str = "model") -> Source:
    """Opens a checkpoint.

    Args:
      directory: that holds it.
      weights: `model` or `adapter`; a directory may hold both.

    Raises:
      UserError: the directory or its weights are missing, a file is a link out of it, cannot be
        read, is damaged or holds more than tensors, or index and shards do not name the same
        tensors once; file and tensor are named.
    """
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"{directory} {found}; expected the directory of a checkpoint")
    first = _first(directory, _FILES[weights])
    if first is None:
        raise _no_weights(directory, weights)
    check_inside(directory, [first])
    try:
        if first.suffix == ".json":
            return _open_shards(directory, first)
        return Source(directory, (first,), _infos(first))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def _first(directory: Path, names: tuple[str, ...]) -> Path | None:
    return next((directory / name for name in names if (directory / name).is_file()), None)


def _open_shards(directory: Path, index: Path) -> Source:
    places = _weight_map(index)
    files = tuple(directory / shard for shard in sorted(set(places.values())))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        others = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UserError(
            f"{directory} lacks the shard {absent[0]}{others}, which {index.name} names; "
            "download it too"
        )
    check_inside(directory, files)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _infos(file).items():
            if name in tensors:
                raise UserError(f"{shown(name)} is in {tensors[name].file} and in {file}; {_MIXED}")
            tensors[name] = info
    for name, info in tensors.items():
        if places.get(name) != info.file.name:
            place = f"in {places[name]}" if name in places else "nowhere"
            raise UserError(
                f"{info.file} holds {shown(name)}, which {index.name} has {place}; {_MIXED}"
            )
    for name, shard in places.items():
        if name not in tensors:
            raise UserError(
                f"{directory / shard} lacks {shown(name)}, which {index.name} has there; {_MIXED}"
            )
    return Source(directory, files, tensors)


def _weight_map(index: Path) -> dict[str, str]:
    """By tensor, the name of the shard that holds it."""
    _refuse_pointer(index)
    if index.stat().st_size > LARGEST_JSON:
        raise UserError(f"{index} has more than {LARGEST_JSON} bytes; download it again")
    places = parse_json(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index} has no table 'weight_map'; download it again")
    for name, shard in places.items():
        # A shard elsewhere is no part of what was downloaded.
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise UserError(
                f"{index}: {shown(name)} is in {shown(shard)}; expected a .safetensors or "
                ".bin file beside it"
            )
    return places


def _infos(file: Path) -> dict[str, TensorInfo]:
    _refuse_pointer(file)
    return torch_infos(file) if file.suffix == ".bin" else safetensors_infos(file)


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{file} is a pointer of git-lfs, not the weights; run 'git lfs pull' in "
                f"{file.parent}"
            )


def _no_weights(directory: Path, weights: str) -> UserError:
    """The error that says what was looked for, and what is there instead."""
    found = "download them into it"
    shards = sorted(directory.glob(f"*{weights}-*-of-*"))
    formats = sorted(file for pattern in _OTHER_FORMATS for file in directory.glob(pattern))
    if shards:
        found = f"it holds {shards[0].name} without an index: download the index too"
    elif others := [kind for kind in _FILES if _first(directory, _FILES[kind])]:
        found = f"it holds {others[0]} weights: give the directory of the {weights} instead"
    elif formats:
        found = f"it holds {formats[0].name}, a format that is not read: download one of those"
    looked_for = ", ".join(_FILES[weights])
    return UserError(f"{directory} holds no {weights} weights ({looked_for}); {found}")
