"""Writes safetensors files larger than memory: the header first, then any tensor in any order.

8 bytes           n, little endian
n bytes           JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}
the rest          the elements, row-major, without gaps
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from videollm_mod_jax.conversion.safetensors_file import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def create_file(
    path: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
) -> dict[str, int]:
    """Writes the header of a file and gives it its full size; the elements are zero.

    Args:
      path: of the new file.
      tensors: dtype and shape by name, in the order of the file.

    Returns:
      where the elements of each tensor begin, in bytes from the start of the file.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # The elements begin at a multiple of 8, as readers that map files expect.
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors}
