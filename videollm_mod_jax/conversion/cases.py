"""The inputs on which a converted model and the PyTorch one are compared."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import PIL.Image

from videollm_mod_jax.conversion import llava
from videollm_mod_jax.conversion.plan import Conversion
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.data.video import read_video
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VisionConfig, anyres
from videollm_mod_jax.models.vision import preprocess

PROMPT = "The first thing that one sees here is"
FRAMES = 2
"""How many random frames stand for a video."""

MAX_FRAMES = 8
"""How many frames of a real one are seen, one per second."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Text, or a picture or frames between two pieces of text.

    ```
    before   pixels become `slots` tokens      after
    a b c    v v v v  v v v v                  a b c       logits are compared at `after`
    ```

    Attributes:
      name: `text`, `image`, `video`, or `tower` for pixels that meet no language model.
      before, after: ids of the text around the pixels.
      pixels_XCCA: float32 [X, C, C, 3], normalised: views of a picture, or frames; None for text.
      crops: how the family cuts a picture into crops; None where X are whole pictures or frames.
      size: (height, width) in pixels of a picture that is cut into crops.
      slots: how many tokens the pixels become.
    """

    name: str
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    pixels_XCCA: np.ndarray | None = None
    crops: anyres.AnyResolution | None = None
    size: anyres.Size | None = None
    slots: int = 0


def make_cases(
    conversion: Conversion, prompt: str | None, image: Path | None, video: Path | None
) -> list[Case]:
    """What a model can be compared on: text, a picture and a video, as far as it takes them.

    Args:
      conversion: the plan of the model.
      prompt: the text; None takes one of ours.
      image: a picture, prepared by the family's own image processor; None takes random pixels.
      video: a video, whose frames are letterboxed as in streaming; None takes random ones.

    Raises:
      UserError: a file cannot be read, or the model does not take what is given.
    """
    config, vision, rng = conversion.config, conversion.config.vision, np.random.default_rng(0)

    def random_pixels(count: int) -> np.ndarray:
        return rng.normal(size=(count, vision.image_size, vision.image_size, 3)).astype(np.float32)

    if config.decoder is None:
        return _tower_cases(conversion, prompt, image, video, random_pixels(FRAMES))
    ids = tuple(Tokenizer.load(conversion.tokenizer).encode(prompt or PROMPT).ids.tolist())
    text = Case(name="text", after=ids)
    if image or video:
        config.require("vision")
    if vision is None or any(path.startswith("params/connector") for path in conversion.fresh):
        return [text]

    crops = any_resolution(conversion)
    size = None if crops is None else (vision.image_size, 2 * vision.image_size)
    if image is not None:
        pixels, size = _prepared(_processor_directory(conversion), image)
    elif crops is not None:
        rows, columns = anyres.crop_grid(size, crops)
        pixels = random_pixels(1 + rows * columns)
    else:
        pixels = random_pixels(1)
    slots = vision.tokens_per_frame if crops is None else anyres.image_tokens(size, crops)
    picture = Case(
        name="image", before=ids, after=ids, pixels_XCCA=pixels, crops=crops, size=size, slots=slots
    )

    pixels = random_pixels(FRAMES) if video is None else _frames(video, vision)
    slots = len(pixels) * vision.tokens_per_frame + ends_videos_with_newline(conversion)
    frames = Case(name="video", before=ids, after=ids, pixels_XCCA=pixels, slots=slots)
    return [text, picture, frames]


def _tower_cases(
    conversion: Conversion,
    prompt: str | None,
    image: Path | None,
    video: Path | None,
    random_XCCA: np.ndarray,
) -> list[Case]:
    """What a tower alone is compared on: a picture, frames, or random pixels."""
    if prompt is not None:
        raise UserError(
            f"--prompt is text, and {conversion.parts[0].source.directory} is a vision tower "
            "without a language model; leave it out"
        )
    cases = []
    if image is not None:
        pixels, _ = _prepared(_processor_directory(conversion), image)
        cases.append(Case(name="image", pixels_XCCA=pixels))
    if video is not None:
        cases.append(Case(name="video", pixels_XCCA=_frames(video, conversion.config.vision)))
    return cases or [Case(name="tower", pixels_XCCA=random_XCCA)]


def _frames(video: Path, vision: VisionConfig) -> np.ndarray:
    frames = itertools.islice(read_video(video, 1.0, vision.image_size), MAX_FRAMES)
    return np.asarray(preprocess(np.stack([frame.image for frame in frames]), vision))


def any_resolution(conversion: Conversion) -> anyres.AnyResolution | None:
    """How the family cuts pictures into crops, or None where it does not."""
    part, vision = conversion.parts[0], conversion.config.vision
    if not conversion.config.newline:
        return None
    return llava.crops(part.config, vision, str(part.source.directory / "config.json"))


def ends_videos_with_newline(conversion: Conversion) -> bool:
    """Whether one newline follows the frames of a video, as in LLaVA-OneVision."""
    return conversion.parts[0].family == "llava_onevision"


def _processor_directory(conversion: Conversion) -> Path:
    towers = (part for part in conversion.parts if part.role == "vision_tower")
    return next(towers, conversion.parts[0]).source.directory


def _prepared(directory: Path, file: Path) -> tuple[np.ndarray, anyres.Size | None]:
    """Views of a picture, as the family's own image processor makes them, and its size if cut."""
    import transformers

    names = ("preprocessor_config.json", "processor_config.json")
    if not any((directory / name).is_file() for name in names):
        raise UserError(
            f"{directory} holds no {names[0]}, which says how a picture is prepared; download it, "
            "or leave --image out to compare on random pixels"
        )
    try:
        with PIL.Image.open(file) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise UserError(f"{file} cannot be read as a picture: {error}") from error
    processor = transformers.AutoImageProcessor.from_pretrained(directory)
    prepared = processor(images=picture, return_tensors="np")
    pixels = np.asarray(prepared["pixel_values"], np.float32)
    pixels_XACC = pixels[0] if pixels.ndim == 5 else pixels
    size = tuple(map(int, prepared["image_sizes"][0])) if "image_sizes" in prepared else None
    return pixels_XACC.transpose(0, 2, 3, 1), size
