"""Draws what a model said onto the frames that it said it about."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_WIDTH = 384
"""Narrower pictures are enlarged by a whole factor to at least this width, so that text fits."""

ROWS = 5
"""Rows of text under the picture, below the row that shows the time."""

_PANEL = (18, 20, 24)
_TIME = (140, 148, 160)
_EARLIER = (140, 148, 160)
_QUESTION = (120, 190, 255)
_ANSWER = (255, 255, 255)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption:
    """One thing that the model said.

    Attributes:
      time: seconds in the video.
      text: what it said.
      question: what the user had asked, or None where the model spoke by itself.
    """

    time: float
    text: str
    question: str | None


def draw_narration(image_HWC: np.ndarray, time: float, captions: Sequence[Caption]) -> np.ndarray:
    """The picture with a panel below it: the time, and the latest things said.

    ```
    +----------------------+
    |       picture        |
    +----------------------+
    | 14.0 s               |
    | Earlier answer.      |   grey
    | You: how many?       |   blue
    | Latest answer.       |   white, until the next one
    +----------------------+
    ```

    Args:
      image_HWC: uint8 RGB.
      time: seconds in the video.
      captions: everything said up to now, oldest first.

    Returns:
      uint8 RGB; its size depends on the size of `image_HWC` only, and both sides are even, as
      H.264 wants them.
    """
    height, width = image_HWC.shape[:2]
    scale = -(-MIN_WIDTH // width) if width < MIN_WIDTH else 1
    picture = Image.fromarray(image_HWC).resize(
        (width * scale, height * scale), Image.Resampling.NEAREST
    )
    letters = font(min(max(picture.width // 26, 15), 32))
    row, margin = int(letters.size * 1.4), letters.size // 2
    panel_height = margin * 2 + row * (ROWS + 1)
    canvas = Image.new(
        "RGB",
        (picture.width + picture.width % 2, (picture.height + panel_height + 1) // 2 * 2),
        _PANEL,
    )
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    y = picture.height + margin
    draw.text((margin, y), f"{time:.1f} s", font=letters, fill=_TIME)
    for line, colour in _latest_rows(captions, letters, canvas.width - 2 * margin):
        y += row
        draw.text((margin, y), line, font=letters, fill=colour)
    return np.asarray(canvas)


def _latest_rows(
    captions: Sequence[Caption], font: ImageFont.FreeTypeFont, width: int
) -> list[tuple[str, tuple[int, int, int]]]:
    """The last captions that fit `ROWS` rows whole; the last one is cut to fit, if it must be."""
    rows: list[tuple[str, tuple[int, int, int]]] = []
    for caption in reversed(captions):
        is_latest = not rows
        asked = [] if caption.question is None else wrap(f"You: {caption.question}", font, width)
        said = wrap(caption.text, font, width)
        block = [(line, _QUESTION if is_latest else _EARLIER) for line in asked]
        block += [(line, _ANSWER if is_latest else _EARLIER) for line in said]
        if is_latest and len(block) > ROWS:
            line, colour = block[ROWS - 1]
            block = [*block[: ROWS - 1], (f"{line.rpartition(' ')[0]} …", colour)]
        if len(rows) + len(block) > ROWS:
            break
        rows = block + rows
    return rows


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks text into lines of at most `width` pixels, between words where it can."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The letters of all pictures."""
    # matplotlib ships DejaVu Sans, which has Latin, Greek and Cyrillic letters on every machine.
    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, size)
