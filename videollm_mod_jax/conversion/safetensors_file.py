"""The tensors of one `.safetensors` file, from its header alone.

    8 bytes    N, little endian
    N bytes    json: {"a": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [0, 24]},
                      "b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
                      "__metadata__": {"format": "pt"}}
    32 bytes   the elements of a and b in row-major order, without gaps; offsets count from here

(https://github.com/huggingface/safetensors, section Format.)
"""

import collections
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from videollm_mod_jax.conversion.stored import MOST_AXES, TensorInfo, contiguous_strides
from videollm_mod_jax.errors import UserError, shown

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("<i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "BOOL": np.dtype("?"),
}
"""By its name in a header: every dtype that is read."""
# The reference implementation reads headers of up to 100 MB, of which python would make a gigabyte.
# A shard of the largest models that are published has a tenth of this.
_MAX_HEADER_BYTES = 16 << 20

_AGAIN = "download it again"
_DAMAGED = "the file is damaged: download it again"


def safetensors_infos(file: Path) -> dict[str, TensorInfo]:
    """Reads the header of a file.

    Returns:
      By name, where each tensor is, in the order of the file's bytes.

    Raises:
      UserError: the file is cut short or damaged, a name is there twice, or a dtype is none that
        weights are converted from; file, tensor and what to do are named.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise UserError(
                f"{file} has no safetensors header of at most {_MAX_HEADER_BYTES} bytes; {_AGAIN}"
            )
        header = opened.read(length)
    if len(header) < length:
        raise _cut_short(file, 8 + length - size)
    entries = parse_json(header, str(file))
    entries.pop("__metadata__", None)
    infos = [(name, _info(file, name, entry, 8 + length)) for name, entry in entries.items()]
    infos.sort(key=lambda item: (item[1].offset, item[1].nbytes))
    end = 8 + length
    for name, info in infos:
        if info.offset != end:
            raise UserError(
                f"{file}: {shown(name)} begins at byte {info.offset}, not {end}; {_DAMAGED}"
            )
        end += info.nbytes
    if end > size:
        raise _cut_short(file, end - size)
    if end < size:
        raise UserError(f"{file} has {size - end} bytes behind its last tensor; {_DAMAGED}")
    return dict(infos)


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Reads a json object in which no key is there twice (`json` would keep the last).

    Args:
      text: in UTF-8.
      where: the file, for messages.

    Raises:
      UserError: it is not json or not an object, or a key is repeated.
    """

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            (twice, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
            raise UserError(f"{where} names {shown(twice)} twice; {_DAMAGED}")
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} does not hold json where it should ({error}); {_AGAIN}"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{where} holds json that is not an object; {_DAMAGED}")
    return values


def _info(file: Path, name: str, entry: Any, data: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            all(type(n) is int and n >= 0 for n in shape)
        ):
            pass
        case _:
            found = reprlib.repr(entry)
            raise UserError(f"{file}: the header describes {shown(name)} as {found}; {_DAMAGED}")
    if len(shape) > MOST_AXES:
        raise UserError(
            f"{file}: {shown(name)} has {len(shape)} axes; expected at most {MOST_AXES}; {_DAMAGED}"
        )
    if dtype not in DTYPES:
        raise UserError(
            f"{file}: {shown(name)} has the dtype {dtype:.80}; expected one of "
            f"{', '.join(DTYPES)}: use weights that are not quantised"
        )
    info = TensorInfo(
        file=file,
        offset=data + begin,
        shape=tuple(shape),
        strides=contiguous_strides(tuple(shape), DTYPES[dtype].itemsize),
        dtype=DTYPES[dtype],
    )
    if end - begin != info.nbytes:
        raise UserError(
            f"{file}: {shown(name)} has {end - begin} bytes; expected {info.nbytes} for {dtype} "
            f"of the shape {shown(shape)}; {_DAMAGED}"
        )
    return info


def _cut_short(file: Path, missing: int) -> UserError:
    return UserError(f"{file} is cut short: {missing} bytes are missing at its end; {_AGAIN}")
