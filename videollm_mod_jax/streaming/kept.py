"""What routing keeps of a clip: pictures of it, and whether it is what there is to see.

Letters: L decoder layers, R those of them that route, F frames, N tokens per frame, P patches of a
frame (its spatial tokens), row by row.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from videollm_mod_jax.data.files import written_aside
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLMConfig, VisionConfig, config_plan
from videollm_mod_jax.streaming.narrate import MIN_WIDTH, font

_SKIPPED, _SEEN, _EDGE = (38, 42, 50), (255, 200, 60), (18, 20, 24)
_TEXT = (205, 210, 218)


def routed_layers(config: VideoLLMConfig) -> list[int]:
    """Indices of the layers that choose among a frame's tokens.

    Raises:
      UserError: there are none, or a frame has no patches, so that there is nothing to show.
    """
    layers = [i for i, spec in enumerate(config_plan(config)) if spec.keep]
    if not layers:
        raise UserError(
            "no layer of this model chooses among a frame's tokens, so there is no routing to "
            "show; take a model trained with model.routing.insertion and a keep_ratio above 0"
        )
    if config.vision.pool == (0, 0):
        raise UserError(
            "a frame of this model is its CLS token alone, so there is no routing to show; take a "
            "model with model.vision.pool of several patches"
        )
    return layers


def patch_boxes(vision: VisionConfig, height: int, width: int) -> np.ndarray:
    """Where the patches of a frame lie in a picture that was letterboxed for the tower.

    ```
    a picture twice as wide as high, pool (2, 2): the square has bars above and below it
    . . . .
    0 0 1 1      0: left 0, top 0, right w / 2, bottom h / 2
    2 2 3 3
    . . . .
    ```

    Args:
      vision: of the model.
      height, width: of the picture, pixels.

    Returns:
      float [P, 4]: left, top, right, bottom in pixels of the picture; a patch that lies in a bar
      has no area.
    """
    side, grid, square = max(height, width), vision.patches_per_side, vision.image_size
    rows, columns = vision.pool
    boxes = []
    for cell in range(rows * columns):
        edges = []
        for index, count, length in (
            (cell % columns, columns, width),
            (cell // columns, rows, height),
        ):
            # The bins of `vision.pooling_matrix`, in patches of the square.
            first, end = index * grid // count, -(-(index + 1) * grid // count)
            pixels = np.array([first, end]) * vision.patch_size * side / square
            edges.append(np.clip(pixels - (side - length) / 2, 0, length))
        (left, right), (top, bottom) = edges
        boxes.append((left, top, right, bottom))
    return np.array(boxes)


def draw_kept(image_HWC: np.ndarray, kept_LN: np.ndarray, config: VideoLLMConfig) -> np.ndarray:
    """A frame with what its routed layers keep.

    Patches are as bright as many layers keep them, and outlined where any does; beside the picture
    stand the choices of every layer: a square for the CLS token, and the patches under it.

    ```
    +-----------+  layer 1   layer 3
    |           |  [x]       [ ]         CLS kept by layer 1
    |  picture  |  . x .     . x .
    |           |  . . .     . x .
    +-----------+  . . .     . . .
    ```

    Args:
      image_HWC: uint8 RGB.
      kept_LN: bool, from `StreamingSession.kept_tokens`, of one frame.
      config: of the model.

    Returns:
      uint8 RGB; its size depends on the size of `image_HWC` and the model only.

    Raises:
      UserError: nothing routes; see `routed_layers`.
    """
    layers = routed_layers(config)
    kept_RN = kept_LN[layers]
    has_summary = config.vision.summary != "none"
    kept_RP = kept_RN[:, has_summary:]
    height, width = image_HWC.shape[:2]
    scale = -(-MIN_WIDTH // width) if width < MIN_WIDTH else 1
    size = (width * scale, height * scale)
    picture = Image.fromarray(image_HWC).resize(size, Image.Resampling.NEAREST)
    boxes_P4 = (scale * patch_boxes(config.vision, height, width)).round().astype(int)

    share_P = kept_RP.mean(0)
    light = Image.new("L", size, 0)
    draw = ImageDraw.Draw(light)
    # The least kept first: bins of a pool that does not divide the grid overlap.
    order = np.argsort(share_P, kind="stable")
    for left, top, right, bottom in boxes_P4[order[share_P[order] == 0]]:
        draw.rectangle((left, top, right, bottom), fill=90)
    for patch in order[share_P[order] > 0]:
        left, top, right, bottom = boxes_P4[patch]
        draw.rectangle((left, top, right, bottom), fill=int(140 + 115 * share_P[patch]))
    picture = Image.composite(picture, Image.new("RGB", size, _EDGE), light)
    draw = ImageDraw.Draw(picture)
    for patch in order[share_P[order] > 0]:
        left, top, right, bottom = boxes_P4[patch]
        if right - left > 2 and bottom - top > 2:
            outline = max(1, round(share_P[patch] * size[0] / 96))
            draw.rectangle((left, top, right - 1, bottom - 1), outline=_SEEN, width=outline)

    panel = _layers_panel(layers, kept_RN, config.vision, size[1])
    canvas = Image.new("RGB", (size[0] + panel.width, max(size[1], panel.height)), _EDGE)
    canvas.paste(picture, (0, 0))
    canvas.paste(panel, (size[0], 0))
    return np.asarray(canvas)


def _layers_panel(
    layers: Sequence[int], kept_RN: np.ndarray, vision: VisionConfig, height: int
) -> Image.Image:
    """The choices of every layer, small, in columns as high as the picture, if they fit."""
    rows, columns = vision.pool
    has_summary = vision.summary != "none"
    letters = font(13)
    cell = max(3, min(16, 64 // max(rows, columns)))
    gap, title = 12, 18
    one_height = title + (rows + has_summary) * cell + gap
    one_width = max(columns * cell, int(letters.getlength("layer 00"))) + gap
    per_column = max(1, (height - gap) // one_height)
    stacks = -(-len(layers) // per_column)
    panel = Image.new(
        "RGB", (gap + stacks * one_width, gap + min(per_column, len(layers)) * one_height), _EDGE
    )
    draw = ImageDraw.Draw(panel)
    for i, (layer, kept_N) in enumerate(zip(layers, kept_RN, strict=True)):
        x = gap + i // per_column * one_width
        y = gap + i % per_column * one_height
        draw.text((x, y), f"layer {layer}", font=letters, fill=_TEXT)
        y += title
        for token, kept in enumerate(kept_N):
            place = token - has_summary
            row, column = divmod(place, columns) if place >= 0 else (-1, 0)
            left, top = x + column * cell, y + (row + has_summary) * cell
            draw.rectangle(
                (left, top, left + cell - 2, top + cell - 2), fill=_SEEN if kept else _SKIPPED
            )
            if place < 0:
                draw.text((left + cell + 2, top - 3), "CLS", font=font(10), fill=_TEXT)
    return panel


def draw_heat_map(kept_LFN: np.ndarray, config: VideoLLMConfig, path: str | os.PathLike) -> None:
    """Writes a PNG: how often every routed layer keeps every token of a frame.

    Args:
      kept_LFN: bool, of as many frames as there are.
      config: of the model.
      path: the file; it appears when it is complete.

    Raises:
      UserError: nothing routes; see `routed_layers`.
    """
    layers = routed_layers(config)
    share_RN = kept_LFN[layers].mean(1)
    rows, columns = config.vision.pool
    has_summary = config.vision.summary != "none"
    figure = Figure(figsize=(max(5, 0.34 * share_RN.shape[1] + 2), 0.34 * len(layers) + 1.6))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share_RN, vmin=0, vmax=1, cmap="magma", aspect="auto")
    axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    names = ["CLS"] * has_summary + [f"{r},{c}" for r in range(rows) for c in range(columns)]
    step = -(-len(names) // 24)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=8)
    axes.set_xlabel("token of a frame: the CLS token, and patches as row,column")
    figure.colorbar(image, label="share of frames that keep it")
    axes.set_title(
        f"What {len(layers)} routed layers keep of {kept_LFN.shape[1]} frames", fontsize=10
    )
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)


def describe_kept(kept_LFN: np.ndarray, config: VideoLLMConfig) -> str:
    """A line per routed layer: how much of a frame it keeps, and what most often.

    ```
    layer 1 keeps 2 of 10 tokens: CLS in 85% of the frames, patch 1,1 in 40%, patch 0,2 in 31%
    ```

    Raises:
      UserError: nothing routes; see `routed_layers`.
    """
    columns, has_summary = config.vision.pool[1], config.vision.summary != "none"
    lines = []
    for layer in routed_layers(config):
        share_N = kept_LFN[layer].mean(0)
        often = []
        for token in np.argsort(-share_N, kind="stable")[:3]:
            place = divmod(int(token) - has_summary, columns)
            name = "CLS" if token < has_summary else f"patch {place[0]},{place[1]}"
            often.append(f"{name} in {share_N[token]:.0%}")
        often[0] += " of the frames"
        kept = int(kept_LFN[layer, 0].sum())
        lines.append(f"layer {layer} keeps {kept} of {len(share_N)} tokens: {', '.join(often)}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class OnObjects:
    """Whether kept patches are those with something on them; a row per layer.

    Attributes:
      share_L: of the kept patches, those on objects; nan where a layer keeps none.
      chance: of all patches, those on objects: what random choices would come to.
    """

    share_L: np.ndarray
    chance: float

    @property
    def ratio_L(self) -> np.ndarray:
        """How many times as often as by chance."""
        return self.share_L / self.chance


def on_objects(kept_LFP: np.ndarray, objects_FP: np.ndarray) -> OnObjects:
    """Compares kept patches with where the objects are.

    ```
    objects   x x . .      kept  x . . x      one of two is on an object: 0.5, and so is chance
    ```

    Args:
      kept_LFP: bool, without the CLS token.
      objects_FP: bool, which patches have an object.

    Raises:
      UserError: no patch of any frame has an object.
    """
    if not objects_FP.any():
        raise UserError("objects: expected a patch with an object in some frame, found none")
    kept_L = kept_LFP.sum((1, 2))
    both_L = (kept_LFP & objects_FP).sum((1, 2))
    share_L = np.where(kept_L > 0, both_L / np.maximum(kept_L, 1), np.nan)
    return OnObjects(share_L, float(objects_FP.mean()))


def last_patches(objects_FP: np.ndarray, columns: int) -> np.ndarray:
    """The last patch of every object in reading order: the only one that can have seen all of it.

    Attention is causal inside a frame, too. Where objects touch, they count as one.

    ```
    objects   x x .      last   . . .        columns 3
              x x .             . x .
    ```

    Args:
      objects_FP: bool, which patches have an object, in reading order.
      columns: patches in a row of the frame.

    Returns:
      bool [F, P]: patches with an object, and with none to the right or below.
    """
    grid_FYX = np.pad(objects_FP.reshape(len(objects_FP), -1, columns), ((0, 0), (0, 1), (0, 1)))
    last_FYX = grid_FYX[:, :-1, :-1] & ~grid_FYX[:, 1:, :-1] & ~grid_FYX[:, :-1, 1:]
    return last_FYX.reshape(objects_FP.shape)
