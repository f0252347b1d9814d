"""The tensors of one `pytorch_model.bin`, without torch, and without running what is in it.

`torch.save` (torch 1.6 and later) writes an uncompressed zip archive:

    archive/data.pkl        a pickle of {name: tensor}; each tensor names a storage
    archive/data/0, 1, ...  the storages: elements of one dtype
    archive/byteorder       "little"; absent before torch 2.1

The pickle goes through `restricted_pickle`, so that all it can do is to rebuild tensors.
"""

import dataclasses
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from videollm_mod_jax.conversion.restricted_pickle import RefusedError, interpret
from videollm_mod_jax.conversion.stored import MOST_AXES, TensorInfo, extent
from videollm_mod_jax.errors import UserError, shown

_MOST_PICKLED = 16 << 20
"""Bytes of a pickle, and of the directory of an archive: hundreds of thousands of tensors."""

_RESAVE = "if you trust its origin, load it once with torch and save it as safetensors"
_DAMAGED = "the file is damaged: download it again"

# Torch before 1.6 began its files with this pickled number.
_OLD_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
# Of a member: the lengths of its name and of its padding.
_LOCAL_HEADER = struct.Struct("<26xHH")


@dataclasses.dataclass(frozen=True)
class _Storage:
    """`count` elements of one dtype, `offset` bytes from the beginning of a file."""

    file: Path
    offset: int
    count: int
    dtype: np.dtype


def torch_infos(file: Path) -> dict[str, TensorInfo]:
    """Reads where the tensors of a file are.

    Returns:
      By name, where each tensor is, in the order of the file's bytes; tied ones are at one place.

    Raises:
      UserError: the file is no such archive, is cut short, damaged or compressed, its pickle asks
        for anything but the rebuilding of tensors, or it is not a flat dict of tensors; the file
        and what is wrong in it are named.
    """
    members = _members(file)
    if _content(file, members, "byteorder", 16) == b"big":
        raise UserError(f"{file} holds big-endian numbers; {_RESAVE}")
    program = _content(file, members, "data.pkl", _MOST_PICKLED)

    def storage(persistent_id: Any) -> _Storage:
        return _storage(file, members, persistent_id)

    try:
        saved = interpret(program, _NAMES, storage)
    except UserError:
        raise
    except RefusedError as error:
        raise UserError(f"{file}: its pickle {error}; nothing was run; {_RESAVE}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file}: its pickle cannot be read ({reason}); {_DAMAGED}") from error
    if type(saved) is not dict:
        raise UserError(f"{file} is not a dict of tensors; save it as one, as safetensors")
    for name, value in saved.items():
        if type(name) is not str or not isinstance(value, TensorInfo):
            raise UserError(
                f"{file}: the entry {shown(name)} ({type(value).__name__}) is not a named tensor; "
                "load the file once with torch and save the named tensors alone, as safetensors"
            )
    return dict(sorted(saved.items(), key=lambda item: item[1].offset))


class _Bounded:
    """An open file that reads so much at once as the directory of an archive has, and no more."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.close = file.close

    def read(self, size: int = -1) -> bytes:
        """Reads up to `size` bytes.

        Raises:
          ValueError: they are too many.
        """
        data = self._file.read(min(size, _MOST_PICKLED) if size >= 0 else _MOST_PICKLED)
        if len(data) == _MOST_PICKLED:
            raise ValueError(f"its directory has {_MOST_PICKLED} bytes or more")
        return data


def _members(file: Path) -> dict[str, range]:
    """The bytes of each member of the archive, by its name without the archive's own name."""
    try:
        with file.open("rb") as opened, zipfile.ZipFile(_Bounded(opened)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise _not_an_archive(file) from error
    pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
    if not pickles:
        raise UserError(f"{file} is a zip archive without data.pkl, so none of torch.save")
    root = pickles[0].removesuffix("data.pkl")
    members = {}
    with file.open("rb") as opened:
        for entry in entries:
            name = entry.filename.removeprefix(root)
            if name in members:
                raise UserError(f"{file}: {shown(entry.filename)} is in it twice; {_DAMAGED}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{file}: {shown(entry.filename)} in it is compressed; {_RESAVE}")
            members[name] = _place(file, opened, entry)
    return members


def _place(file: Path, opened: BinaryIO, entry: zipfile.ZipInfo) -> range:
    """The bytes of a member; its name and padding there may be longer than the directory says."""
    size, header = file.stat().st_size, b""
    if 0 <= entry.header_offset < size:
        opened.seek(entry.header_offset)
        header = opened.read(_LOCAL_HEADER.size)
    if header.startswith(b"PK\3\4") and len(header) == _LOCAL_HEADER.size:
        start = entry.header_offset + len(header) + sum(_LOCAL_HEADER.unpack(header))
        if start + entry.file_size <= size:
            return range(start, start + entry.file_size)
    raise UserError(f"{file}: {shown(entry.filename)} in it is not where it should be; {_DAMAGED}")


def _not_an_archive(file: Path) -> UserError:
    with file.open("rb") as opened:
        start = opened.read(len(_OLD_MAGIC))
    if start == _OLD_MAGIC:
        return UserError(f"{file} was written by torch before 1.6; {_RESAVE}")
    if start.startswith(b"PK"):
        return UserError(f"{file} is cut short; download it again")
    return UserError(f"{file} is not a file of torch.save; download it again")


def _content(file: Path, members: Mapping[str, range], name: str, most: int) -> bytes:
    place = members.get(name, range(0))
    if len(place) > most:
        raise UserError(
            f"{file}: {name!r} in it has {len(place)} bytes; expected at most {most}; {_DAMAGED}"
        )
    with file.open("rb") as opened:
        opened.seek(place.start)
        return opened.read(len(place))


def _storage(file: Path, members: Mapping[str, range], persistent_id: Any) -> _Storage:
    match persistent_id:
        case ("storage", np.dtype() as dtype, str(key), str(), int(count)):
            pass
        case _:
            raise ValueError(f"{reprlib.repr(persistent_id)} is no storage")
    name = f"data/{key}"
    place = members.get(name)
    if place is None:
        raise UserError(f"{file}: the storage {shown(name)} is absent; {_DAMAGED}")
    if count * dtype.itemsize > len(place):
        missing = count * dtype.itemsize - len(place)
        raise UserError(
            f"{file}: {missing} bytes of the storage {shown(name)} are missing; {_DAMAGED}"
        )
    return _Storage(file, place.start, count, dtype)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any
) -> TensorInfo:
    """Stands in for torch._utils._rebuild_tensor_v2; offset and strides count elements."""
    if not isinstance(storage, _Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise TypeError("a tensor is rebuilt of something else than a storage and a shape")
    if len(shape) > MOST_AXES:
        raise ValueError(f"a tensor has {len(shape)} axes, more than {MOST_AXES}")
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
        found = reprlib.repr((offset, shape, strides))
        raise ValueError(f"offset, shape and strides of a tensor are {found}")
    if offset + extent(shape, strides, 1) > storage.count:
        raise ValueError(f"a tensor of shape {shown(shape)} reaches beyond its storage")
    return TensorInfo(
        file=storage.file,
        offset=storage.offset + offset * storage.dtype.itemsize,
        shape=shape,
        strides=tuple(n * storage.dtype.itemsize for n in strides),
        dtype=storage.dtype,
    )


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> TensorInfo:
    """Stands in for torch._utils._rebuild_parameter."""
    if not isinstance(tensor, TensorInfo):
        raise TypeError("a parameter is rebuilt of something else than a tensor")
    return tensor


def _ordered_dict() -> dict[Any, Any]:
    return {}


_NAMES = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.CharStorage": np.dtype("<i1"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.ByteStorage": np.dtype("<u1"),
    "torch.BoolStorage": np.dtype("?"),
}
