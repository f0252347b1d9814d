"""Still images of any size as tokens: a view of the whole image, and crops of it in full detail.

Follows `select_best_resolution`, `unpad_image` and `pack_image_features` of LLaVA-NeXT-Video and
LLaVA-OneVision in huggingface/transformers. Which crops there are, and which of their patches show
padding, follows from the size of the image alone, so it is arithmetic on the host.

Sizes are (height, width) everywhere. Axes: X views (the whole image first, then the crops row by
row), P patches of a view, D width, H and W the rows and columns of the image's canvas of patches.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from videollm_mod_jax.errors import UserError

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyResolution:
    """How a family cuts still images up.

    Attributes:
      pinpoints: sizes that an image may be enlarged to, in pixels, multiples of `image_size`
        (`image_grid_pinpoints` of a `config.json`).
      image_size: side of a crop, in pixels: what the tower sees.
      side: patches along one side of a crop.
      max_crops: a canvas of more patches than so many crops have, by 21 %, is scaled down to it
        (`anyres_max_9` of LLaVA-OneVision); None never does (LLaVA-NeXT-Video).
    """

    pinpoints: tuple[Size, ...]
    image_size: int
    side: int
    max_crops: int | None


def best_pinpoint(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint in which an image keeps most of its pixels, and of those the smallest.

    ```
    image (200, 400), pinpoints (336, 336)  (336, 672)  (672, 672)
    fits as              (168, 336) (336, 672) (336, 672)
    pixels kept           56,448     80,000     80,000
    pixels wasted         56,448    145,792    371,584        -> (336, 672)
    ```

    Args:
      size: of the image, pixels.
      pinpoints: at least one; the first wins among equals.

    Raises:
      UserError: the image has no pixels, or there is no pinpoint.
    """
    height, width = size
    if height < 1 or width < 1 or not pinpoints:
        raise UserError(
            f"the image has {height} x {width} pixels and {len(pinpoints)} sizes to choose from; "
            "expected at least one of each"
        )

    def kept_and_saved(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return tuple(max(pinpoints, key=kept_and_saved))


def crop_grid(size: Size, settings: AnyResolution) -> Size:
    """Rows and columns of crops that an image of `size` pixels has."""
    height, width = best_pinpoint(size, settings.pinpoints)
    return height // settings.image_size, width // settings.image_size


def canvas_indices(size: Size, settings: AnyResolution) -> np.ndarray:
    """The patches that show the image, as they lie in it.

    ```
    An image twice as wide as high in 2 x 2 crops of 2 x 2 patches. Patches 0 to 3 are those of the
    whole image.

     4  5    8  9    padding
     6  7   10 11    image             [[ 6  7 10 11]
    12 13   16 17    image       ->     [12 13 16 17]]
    14 15   18 19    padding
    ```

    Returns:
      int32 [H, W], indices into the patches of all views, [X * P].
    """
    rows, columns = crop_grid(size, settings)
    side = settings.side
    first, patches = side**2, rows * columns * side**2  # those before are of the whole image
    canvas = np.arange(first, first + patches, dtype=np.int32)
    canvas = canvas.reshape(rows, columns, side, side).swapaxes(1, 2)
    canvas = canvas.reshape(rows * side, columns * side)
    (height, width), (full_height, full_width) = size, canvas.shape
    # int(49 * (2 / 98)) is 0: rounding first keeps a row that is whole up to floating point.
    if width / height > full_width / full_height:
        shown = int(round(height * (full_width / width), 7))
        padding = (full_height - shown) // 2
        return canvas[padding : full_height - padding]
    shown = int(round(width * (full_height / height), 7))
    padding = (full_width - shown) // 2
    return canvas[:, padding : full_width - padding]


def canvas_shape(size: Size, settings: AnyResolution) -> Size:
    """Rows and columns of patches that become tokens, after scaling down if that is due.

    ```
    max_crops 9, side 27, canvas    (162, 54)    (81, 108)    (108, 108)
    ratio sqrt(H W / (9 * 27²))       1.15         1.15          1.33
    becomes                         (140, 46)    (70, 93)      (81, 81)
    ```
    """
    height, width = canvas_indices(size, settings).shape
    if settings.max_crops is not None:
        ratio = math.sqrt(height * width / (settings.max_crops * settings.side**2))
        if ratio > 1.1:
            return int(height // ratio), int(width // ratio)
    return height, width


def image_tokens(size: Size, settings: AnyResolution) -> int:
    """Tokens of an image of `size` pixels: the whole view, and the canvas with its newlines."""
    height, width = canvas_shape(size, settings)
    return settings.side**2 + height * (width + 1)


def pack_image(
    patches_XPD: jax.Array, newline_D: jax.Array, size: Size, settings: AnyResolution
) -> jax.Array:
    """The tokens of an image: the whole view, then its canvas row by row, each with a newline.

    ```
    the image of `canvas_indices`, n the newline:   0 1 2 3   6 7 10 11 n   12 13 16 17 n
    ```

    Args:
      patches_XPD: from `VideoLLM.embed_patches`.
      newline_D: the model's `newline`.
      size: of the image before it was cut up, pixels.
      settings: of the family.

    Returns:
      [`image_tokens`, D] in the patches' dtype.

    Raises:
      UserError: there are more or fewer views than an image of this size has.
    """
    X, P, D = patches_XPD.shape
    rows, columns = crop_grid(size, settings)
    views = 1 + rows * columns
    if views != X or settings.side**2 != P:
        raise UserError(
            f"an image of {size[0]} x {size[1]} pixels has {views} views of "
            f"{settings.side**2} patches; found {X} of {P}"
        )
    canvas_HWD = patches_XPD.reshape(X * P, D)[canvas_indices(size, settings)]
    height, width = canvas_shape(size, settings)
    # PyTorch's `interpolate(mode="bilinear")`: two neighbours, no filter against aliasing.
    scaled_HWD = canvas_HWD.astype(jnp.float32)
    scaled_HWD = jax.image.resize(scaled_HWD, (height, width, D), "linear", antialias=False)
    newline_H1D = jnp.broadcast_to(newline_D, (height, 1, D))
    lines_HWD = jnp.concatenate([scaled_HWD, newline_H1D], axis=1).astype(patches_XPD.dtype)
    return jnp.concatenate([patches_XPD[0], lines_HWD.reshape(-1, D)])
