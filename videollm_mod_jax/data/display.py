"""Decoded pictures as a player shows them: turned, mirrored, and with square pixels."""

import fractions
import os

import av
import numpy as np
import PIL.Image
from av.sidedata.sidedata import Type

Matrix = tuple[int, int, int, int]
"""(a, b, c, d): what is at (x, y) is shown at (a x + c y, b x + d y), x to the right, y down."""

UPRIGHT: Matrix = (1, 0, 0, 1)

# By the orientation of EXIF (its tag 274).
_EXIF: dict[int, Matrix] = {
    1: UPRIGHT,
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
_ORIENTATION = 274
# Pixels that are longer by more are a mistake, and taken for square.
_MOST = 16


def exif_orientation(path: str | os.PathLike) -> Matrix | None:
    """How the EXIF of a picture's file has it shown; None where it is no picture, or says nothing.

    FFmpeg knows it, too, but hands out how far to turn alone, without a mirror.
    """
    try:
        with PIL.Image.open(path) as picture:
            return _EXIF.get(picture.getexif().get(_ORIENTATION))
    # Whatever Pillow thinks of it, FFmpeg reads it.
    except Exception:
        return None


def display_matrix(frame: av.VideoFrame) -> Matrix:
    """How the file of a frame has it shown, in quarter turns and mirrors.

    A telephone stores frames as its sensor lies, and beside them a matrix.
    """
    try:
        data = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:
        # Beside something that PyAV has no name for.
        data = None
    if data is None:
        turns = round(frame.rotation / 90) % 4
        return (UPRIGHT, _EXIF[8], _EXIF[3], _EXIF[6])[turns]
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if abs(a * d) >= abs(b * c):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)


def turned(image: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Shows an image (H, W, ...) as a matrix says.

    ```
    1 2    (-1, 0, 0, 1)  2 1    (0, 1, -1, 0)  3 1    (0, 1, 1, 0)  1 3
    3 4    mirrored       4 3    a quarter      4 2    transposed    2 4
    ```
    """
    a, b, c, d = matrix
    if a == 0:
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def shown_size(frame: av.VideoFrame, aspect: fractions.Fraction | None) -> tuple[int, int]:
    """Width and height in square pixels of a frame before it is turned; no pixel is lost.

    ```
    720 x 576, pixels 64:45    1024 x 576        720 x 480, pixels 8:9    720 x 540
    ```

    Args:
      frame: as it is stored.
      aspect: width of a pixel by its height; None or nonsense is 1.
    """
    if not aspect or not 1 / _MOST <= aspect <= _MOST:
        return frame.width, frame.height
    if aspect >= 1:
        return round(frame.width * aspect), frame.height
    return frame.width, round(frame.height / aspect)
