"""Streams of real handwritten digits on a cluttered canvas, with timed narrations and questions.

The digits are the 1797 scans of scikit-learn's `load_digits`, split by scan: no scan of one split
is ever drawn in another, not even as clutter. The canvas has 3 x 3 places; digits appear, move to a
neighbouring place and leave, at most one event per frame and never in two frames running, no two
visible digits of one class. All is a function of (seed, split, index).

Shape suffixes: F frames; places are numbered 0..8 in reading order.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from videollm_mod_jax.data import video
from videollm_mod_jax.errors import UserError

CANVAS, CELL = 48, 16  # pixels; a digit is as large as its place and trembles by JITTER
JITTER = 2
FPS = 2.0
EMPTY = -1  # class of a place without a digit, in a stream
BACKGROUND = 10  # the same as a class label, in `random_frames`
MAX_VISIBLE = 3
PLACES = (
    "top left", "top", "top right",
    "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
HOW_MANY = "How many digits so far?"
WHICH = "Which digits are there?"
SPLITS = ("train", "validation", "test")
_SHARES = (0.80, 0.05, 0.15)  # of the scans of each class
_NEIGHBOURS = tuple(
    tuple(q for q in range(9) if abs(p // 3 - q // 3) + abs(p % 3 - q % 3) == 1) for p in range(9)
)
# Frames from one event to the next: a busy stream, a calm one.
_PACES = ((2, 3, 4), (3, 4), (4, 5, 6))


@dataclass(frozen=True)
class Scans:
    """The scans of a split, sorted by class.

    Attributes:
      images: (n, 8, 8) float32 in 0..1, ink is 1.
      labels: (n,) int64, 0..9, ascending.
      ids: (n,) int64, row of `load_digits`.
      stamps: (n, 16, 16) float32, the images as they are drawn.
      first: (11,) int64, `first[c]:first[c + 1]` are the rows of class c.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    stamps: np.ndarray
    first: np.ndarray


@functools.cache
def scans(split: str) -> Scans:
    """The scans of `split`: 80% of each class for train, 5% for validation, 15% for test.

    Raises:
      UserError: an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
    from sklearn import datasets  # a second to import; only streams that are drawn need it

    digits = datasets.load_digits()
    rng, chosen = np.random.default_rng(0), []
    for c in range(10):
        ids = rng.permutation(np.flatnonzero(digits.target == c))
        cuts = np.round(np.cumsum(_SHARES)[:-1] * len(ids)).astype(int)
        chosen.append(np.split(ids, cuts)[SPLITS.index(split)])
    ids = np.concatenate(chosen)
    images = (digits.images[ids] / digits.images.max()).astype(np.float32)
    grow = bilinear(8, CELL)
    return Scans(
        images,
        digits.target[ids],
        ids,
        # Steeper than bilinear, so that the strokes keep a white core and thin edges.
        np.clip(1.25 * (grow @ images @ grow.T) - 0.1, 0, 1).astype(np.float32),
        np.cumsum([0] + [len(c) for c in chosen]),
    )


@dataclass(frozen=True)
class Story:
    """What happens in a stream.

    Attributes:
      places_F9: (F, 9) int8, the class at each place, -1 where none.
      scans_F9: (F, 9) int64, the row of `scans(split)` that is drawn there, -1 where none.
      turns: dicts role, time (seconds), text, in order of time.
    """

    places_F9: np.ndarray
    scans_F9: np.ndarray
    turns: list[dict[str, object]]


def tell(rng: np.random.Generator, num_frames: int, split_scans: Scans) -> Story:
    """Invents a story: events, their narrations at the frame's time, and perhaps a question.

    Half of the streams have one question, at the time of any frame but the first three; it comes
    before that frame and is answered from the frames before.
    """
    scan_F9 = np.full((num_frames, 9), EMPTY)
    now = np.full(9, EMPTY)  # rows of split_scans
    narrations, appearances = {}, np.zeros(num_frames, np.int64)
    pace = _PACES[rng.integers(len(_PACES))]
    due = int(rng.integers(4))
    for f in range(num_frames):
        if f == due:
            narrations[f], appeared = _event(rng, now, split_scans)
            appearances[f:] += appeared
            due += int(rng.choice(pace))
        scan_F9[f] = now
    # An index of -1 takes the last label; where() puts EMPTY over it.
    class_F9 = np.where(scan_F9 == EMPTY, EMPTY, split_scans.labels[scan_F9])
    asked = int(rng.integers(3, num_frames)) if num_frames > 3 and rng.random() < 0.5 else None
    turns = []
    for f in range(num_frames):
        if f == asked:
            turns += _question(rng, f, int(appearances[f - 1]), class_F9[f - 1])
        if f in narrations:
            turns.append(turn_at("assistant", f, narrations[f]))
    return Story(class_F9.astype(np.int8), scan_F9, turns)


def make_stream(split: str, index: int, seed: int, num_frames: int) -> dict[str, object]:
    """Draws stream `index` of a split.

    Returns:
      id "SPLIT-INDEX"; frames (F, 48, 48) uint8; fps; turns (list of dicts role, time, text);
      places (F, 9) int8, the class at each place, -1 where none.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    split_scans = scans(split)
    story = tell(rng, num_frames, split_scans)
    clutter = draw_clutter(rng, 1, split_scans.stamps, CANVAS)
    return {
        "id": f"{split}-{index:05d}",
        "frames": _draw(rng, clutter, story.scans_F9, split_scans),
        "fps": FPS,
        "turns": story.turns,
        "places": story.places_F9,
    }


def random_frames(
    split: str, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Labelled single frames as they occur in the streams of a split, each on its own clutter.

    Returns:
      images (count, 48, 48) uint8 and labels (count, 9) int32, the class at each place, 10 where
      none.
    """
    split_scans = scans(split)
    visible = rng.integers(0, MAX_VISIBLE + 1, count)
    places = np.argsort(rng.random((count, 9)), axis=1)[:, :MAX_VISIBLE]
    classes = np.argsort(rng.random((count, 10)), axis=1)[:, :MAX_VISIBLE]
    rows = pick(rng, classes, split_scans)
    row_N9 = np.full((count, 9), EMPTY)
    shown = np.arange(MAX_VISIBLE) < visible[:, None]
    row_N9[np.nonzero(shown)[0], places[shown]] = rows[shown]
    images = _draw(rng, draw_clutter(rng, count, split_scans.stamps, CANVAS), row_N9, split_scans)
    labels = np.where(row_N9 == EMPTY, BACKGROUND, split_scans.labels[row_N9])
    return images, labels.astype(np.int32)


def stream_to_video(record: Mapping[str, object], path: str | os.PathLike, scale: int = 8) -> None:
    """Writes a stream (as `make_stream` returns it, or read back) as an H.264 .mp4.

    Args:
      record: a stream with `frames` and `fps`.
      path: the file to write.
      scale: side of the square that a pixel becomes.
    """
    frames = np.asarray(record["frames"])
    large = (f.repeat(scale, 0).repeat(scale, 1)[..., None].repeat(3, -1) for f in frames)
    video.write_video(path, large, float(record["fps"]))


def _event(rng: np.random.Generator, now: np.ndarray, split_scans: Scans) -> tuple[str, bool]:
    """Changes the rows at the nine places; returns the narration and whether a digit appeared."""
    taken = np.flatnonzero(now != EMPTY)
    kinds = ["appear"] * 2 if len(taken) < MAX_VISIBLE else []
    kinds += ["move", "leave"] if len(taken) else []
    kind = kinds[rng.integers(len(kinds))]
    if kind == "appear":
        place = rng.choice(np.flatnonzero(now == EMPTY))
        digit = rng.choice(np.setdiff1d(np.arange(10), split_scans.labels[now[taken]]))
        now[place] = pick(rng, digit, split_scans)
        return f"{article(digit).capitalize()} appears at the {PLACES[place]}.", True
    moves = [(p, q) for p in taken for q in _NEIGHBOURS[p] if now[q] == EMPTY]
    place, to = moves[rng.integers(len(moves))]
    name = NUMBERS[split_scans.labels[now[place]]]
    if kind == "move":
        now[to] = now[place]
    now[place] = EMPTY
    return f"The {name} " + (f"moves to the {PLACES[to]}." if kind == "move" else "leaves."), False


def _question(
    rng: np.random.Generator, frame: int, appearances: int, class_9: np.ndarray
) -> list[dict[str, object]]:
    """A question at the time of `frame` and its answer, given what was there before it."""
    if rng.random() < 0.5:
        question, answer = HOW_MANY, _number(appearances).capitalize() + "."
    else:
        question, answer = WHICH, _list(class_9)
    return [turn_at("user", frame, question), turn_at("assistant", frame, answer)]


def pick(rng: np.random.Generator, classes: np.ndarray, split_scans: Scans) -> np.ndarray:
    """A random row of `split_scans` for each class."""
    first, end = split_scans.first[classes], split_scans.first[np.add(classes, 1)]
    return rng.integers(first, end)


def _draw(
    rng: np.random.Generator, clutter: np.ndarray, row_N9: np.ndarray, split_scans: Scans
) -> np.ndarray:
    """Draws digits over clutter (N or 1, 48, 48), with jitter and noise: (N, 48, 48) uint8."""
    frame, place = np.nonzero(row_N9 != EMPTY)
    jitter = rng.integers(-JITTER, JITTER + 1, (2, len(frame)))
    corner = np.clip(np.stack([place // 3, place % 3]) * CELL + jitter, 0, CANVAS - CELL)
    ink = np.zeros((len(row_N9), CANVAS, CANVAS), np.float32)
    stamp(ink, frame, corner, split_scans.stamps[row_N9[frame, place]])
    light = rng.uniform(0.88, 1.0, (len(row_N9), 1, 1)).astype(np.float32)
    image = clutter + ink * (light - clutter)
    image += 0.025 * rng.standard_normal(image.shape, np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def draw_clutter(
    rng: np.random.Generator, count: int, stamps: np.ndarray, canvas: int
) -> np.ndarray:
    """Dim backgrounds: blobs, strokes and halves of turned scans.

    Args:
      rng: draws them.
      count: how many.
      stamps: (n, side, side) float32, the scans to cut pieces from.
      canvas: side of a background, pixels.

    Returns:
      (count, canvas, canvas) float32 in 0..1.
    """
    grow = bilinear(7, canvas)
    image = grow @ rng.uniform(0.02, 0.28, (count, 7, 7)).astype(np.float32) @ grow.T
    marks = np.zeros_like(image)
    y, x = np.mgrid[:canvas, :canvas].astype(np.float32)
    for _ in range(5):
        centre_y, centre_x = rng.uniform(0, canvas, (2, count, 1, 1)).astype(np.float32)
        angle = rng.uniform(0, np.pi, (count, 1, 1)).astype(np.float32)
        half = rng.uniform(4, 9, (count, 1, 1)).astype(np.float32)
        shade = rng.uniform(0.15, 0.4, (count, 1, 1)).astype(np.float32)
        sine, cosine = np.sin(angle), np.cos(angle)
        along = (y - centre_y) * sine + (x - centre_x) * cosine
        across = (y - centre_y) * cosine - (x - centre_x) * sine
        distance = np.hypot(across, along - np.clip(along, -half, half))
        np.maximum(marks, shade * np.clip(1.8 - distance, 0, 1), out=marks)
    pieces, side = 5, stamps.shape[1]
    chosen = stamps[rng.integers(len(stamps), size=(count * pieces))]
    chosen = np.rot90(chosen, axes=(1, 2))[:, : side // 2]
    shades = rng.uniform(0.15, 0.4, (count * pieces, 1, 1)).astype(np.float32)
    corner = rng.integers(0, [[canvas - side // 2 + 1], [canvas - side + 1]], (2, count * pieces))
    stamp(marks, np.repeat(np.arange(count), pieces), corner, chosen * shades)
    return np.maximum(image, marks)


def stamp(canvas: np.ndarray, image: np.ndarray, corner: np.ndarray, stamps: np.ndarray) -> None:
    """Lays stamps (n, h, w) onto canvas[image (n,)], top left at corner (2, n); maximum wins."""
    rows = corner[0][:, None, None] + np.arange(stamps.shape[1])[:, None]
    columns = corner[1][:, None, None] + np.arange(stamps.shape[2])
    np.maximum.at(canvas, (image[:, None, None], rows, columns), stamps)


def bilinear(small: int, large: int) -> np.ndarray:
    """The (large, small) matrix that resamples a line with pixel centres aligned."""
    at = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(small))).astype(np.float32)


def turn_at(role: str, frame: int, text: str) -> dict[str, object]:
    """What is said at a frame, as the turns of a stream hold it."""
    return {"role": role, "time": frame / FPS, "text": text}


def _number(n: int) -> str:
    return NUMBERS[n] if n < len(NUMBERS) else str(n)


def article(digit: int) -> str:
    """The name of a digit with its article: "a seven", "an eight"."""
    return ("an " if digit == 8 else "a ") + NUMBERS[digit]


def _list(class_9: np.ndarray) -> str:
    """[-1, 2, .., 7, .., 8] -> "A two, a seven and an eight."; all empty -> "None."."""
    names = [article(c) for c in class_9 if c != EMPTY] or ["none"]
    text = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return text[0].upper() + text[1:] + "."
