"""Frames as a vision tower wants them, and with what it made of them."""

import dataclasses

import jax
import numpy as np
from PIL import Image

from videollm_mod_jax.data.video import Frame
from videollm_mod_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EncodedFrame(Frame):
    """A frame on its way through the vision tower, or behind it.

    Attributes:
      features_BNW: of the tower, B = 1; the device may still be at work on them.
    """

    features_BNW: jax.Array


def check_image(frame: Frame) -> None:
    """Raises UserError unless a frame is uint8 RGB."""
    image = frame.image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(
            f"the frame at {frame.time:g} s is {image.dtype}{list(image.shape)}; expected "
            "uint8[height, width, 3]"
        )


def letterbox(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Fits a picture into a square, aspect ratio kept, zeros on both sides of the shorter one.

    Args:
      image_HWC: uint8 RGB.
      size: side of the square; a picture of that size is returned as it is.

    Returns:
      uint8 [size, size, 3], as `read_video(..., size=size)` gives it up to rounding.
    """
    height, width = image_HWC.shape[:2]
    if height == width == size:
        return image_HWC
    scale = size / max(height, width)
    width, height = (max(1, round(side * scale)) for side in (width, height))
    resized = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (size - height) // 2, (size - width) // 2
    square = np.zeros((size, size, 3), np.uint8)
    square[top : top + height, left : left + width] = np.asarray(resized)
    return square
