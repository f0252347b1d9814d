"""A tensor as it lies in a file, and reading it or a slice of it."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from videollm_mod_jax.conversion.table import Index
from videollm_mod_jax.errors import UserError

# Mapped pages count as resident memory, so no more than this of a file is mapped at a time.
_MAPPED_BYTES = 8 * 2**20

MOST_AXES = 32
"""Of a tensor; those of models have four."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where the elements of one tensor are.

    ```
    A matrix [2, 3] of float16 that lies transposed behind 64 bytes of header:

    file     64 bytes | a00 a10 | a01 a11 | a02 a12        offset 64
    element  a[i, j]  at  64 + 2 i + 4 j                   strides (2, 4)
    ```

    Attributes:
      file: that holds them.
      offset: of the first element, in bytes.
      shape: of the tensor.
      strides: from an element to the next along each axis, in bytes, not negative.
      dtype: of the elements, little endian; `ml_dtypes.bfloat16` for bfloat16.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor in memory, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: Index) -> np.ndarray:
        """Reads a slice, one `slice` without a step per axis, into an array of its own.

        Only pages of the file that hold wanted elements are touched, and few of them at a time.

        Raises:
          UserError: the file is gone or has become shorter since it was opened.
        """
        bounds = [s.indices(n) for s, n in zip(index, self.shape, strict=True)]
        if any(step != 1 for *_, step in bounds):
            raise ValueError(f"a slice of {self.file} has a step: {index}")
        shape = tuple(max(0, stop - start) for start, stop, _ in bounds)
        offset = self.offset + sum(
            start * stride for (start, *_), stride in zip(bounds, self.strides, strict=True)
        )
        result = np.empty(shape, self.dtype)
        try:
            if result.size:
                _fill(result, self.file, offset, self.strides)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file} cannot be read any more: {error}") from error
        return result


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a tensor in row-major order.

    ```
    shape (2, 3, 4), 2 bytes each  ->  (24, 8, 2)
    ```
    """
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    """Bytes from the first element of a tensor to the end of its last; 0 when it has none.

    ```
    shape (2, 3), strides (2, 4), 2 bytes each  ->  1 * 2 + 2 * 4 + 2 = 12
    ```
    """
    if 0 in shape:
        return 0
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + itemsize


def _fill(result: np.ndarray, file: Path, offset: int, strides: tuple[int, ...]) -> None:
    """Copies elements of a file, along the axis on which they lie farthest apart."""
    if not result.ndim:
        result, strides = result.reshape(1), (result.itemsize,)
    axis = max(range(result.ndim), key=lambda a: (result.shape[a] > 1, strides[a]))
    step = max(1, _MAPPED_BYTES // max(1, strides[axis]))
    target = np.moveaxis(result, axis, 0)
    strides = (strides[axis], *strides[:axis], *strides[axis + 1 :])
    for start in range(0, len(target), step):
        block = target[start : start + step]
        size = extent(block.shape, strides, block.itemsize)
        mapped = np.memmap(file, np.uint8, "r", offset + start * strides[0], (size,))
        block[...] = np.ndarray(block.shape, block.dtype, mapped, strides=strides)
