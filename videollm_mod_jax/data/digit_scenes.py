"""Streams of small handwritten digits that no patch shows whole, among turned scans and clutter.

The harder sister of `digits`: several digits at once on a canvas of 5 x 5 patches. A digit is as
large as a patch and never aligned to the grid, so that it always spans four of them, and a model
has to put it together. Scans that lie on their side come, move and leave as well; nothing is said
of them. Narrations name a place or a relation, and users ask what can be seen. All is a function of
(seed, split, index), and the scans of one split are never drawn in another.

    patches 5 x 5       a digit of cell (1, 2)         cells 4 x 4, and how their places are called
    . . . . .           . . . . .                      top left    top     top     top right
    . . . . .           . . o o .                      left        centre  centre  right
    . . . . .           . . o o .                      left        centre  centre  right
    . . . . .           . . . . .                      bottom left bottom  bottom  bottom right
    . . . . .           . . . . .

Shape suffixes: F frames, P patches in reading order, O objects.
"""

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from videollm_mod_jax.data import digits
from videollm_mod_jax.data.digits import NUMBERS, PLACES, Scans, scans, turn_at

PATCH, GRID = 12, 5
CANVAS = PATCH * GRID
CELLS = GRID - 1
PATCHES = GRID * GRID
MAX_DIGITS, MAX_TURNED = 3, 2
NONE = 40  # label of a patch without a digit, in `random_frames`
SIDEWAYS = (2, 3, 4, 5, 7)  # classes that nobody takes for a digit when they lie on their side

HOW_MANY = "How many digits?"
WHICH = "Which digits?"

# Pixels between the corner of a digit and that of its cell's first patch: the digit reaches
# MARGIN pixels or more into all four, wherever it trembles.
_MARGIN, _TREMBLE = 4, 1
_APART = PATCH + 1 + 2 * _TREMBLE
_NAMES = (0, 1, 1, 2)  # thirds of the canvas by cell
_QUARTERS = np.arange(4).reshape(2, 2)
_STARTS = tuple(
    PATCH * cell + offset
    for cell in range(CELLS)
    for offset in range(_MARGIN + _TREMBLE, PATCH - _MARGIN - _TREMBLE + 1)
)
_CORNERS = tuple((y, x) for y in _STARTS for x in _STARTS)
# Frames from one event to the next, in turn: a busy stream, a calm one.
_PACES = ((1, 2), (2, 1), (2, 2), (2, 3))
_TURNED_CHANGES = 0.3


@dataclass(frozen=True)
class Thing:
    """A digit, or a scan that lies on its side.

    Attributes:
      row: of the split's scans.
      digit: its class.
      turned: whether it lies on its side, and is not to be reported.
      corner: (y, x) pixels of its top left.
    """

    row: int
    digit: int
    turned: bool
    corner: tuple[int, int]

    @property
    def cell(self) -> tuple[int, int]:
        """(row, column) of the first of its 2 x 2 patches."""
        return self.corner[0] // PATCH, self.corner[1] // PATCH

    @property
    def place(self) -> str:
        """What its place is called."""
        return place_of(self.corner)

    @property
    def name(self) -> str:
        """What its digit is called."""
        return NUMBERS[self.digit]


@dataclass(frozen=True)
class Scene:
    """What happens in a stream.

    Attributes:
      things_F: what is visible in every frame.
      turns: dicts role, time (seconds), text, in order of time.
    """

    things_F: tuple[tuple[Thing, ...], ...]
    turns: list[dict[str, object]]


@functools.cache
def stamps(split: str) -> np.ndarray:
    """(n, 12, 12) float32, the scans of a split as they are drawn.

    Raises:
      UserError: an unknown split.
    """
    grow = digits.bilinear(8, PATCH)
    return np.clip(1.25 * (grow @ scans(split).images @ grow.T) - 0.1, 0, 1).astype(np.float32)


def place_of(corner: tuple[int, int]) -> str:
    """What the place of a thing with its top left at (y, x) pixels is called."""
    row, column = (_NAMES[at // PATCH] for at in corner)
    return PLACES[3 * row + column]


def patches_of(things: tuple[Thing, ...]) -> np.ndarray:
    """Which patches show a digit: (P,) bool. Turned scans are no digits."""
    mask = np.zeros((GRID, GRID), bool)
    for thing in things:
        if not thing.turned:
            y, x = thing.cell
            mask[y : y + 2, x : x + 2] = True
    return mask.reshape(-1)


def tell(rng: np.random.Generator, num_frames: int, split_scans: Scans) -> Scene:
    """Invents a scene: events of the digits with their narrations, turned scans, a question.

    A digit that appears is reported with its relation to the other one where it is the second, and
    with its place otherwise. Most streams have one question, at the time of any frame but the first
    two; it comes before that frame and is about the frame before.
    """
    now: list[Thing] = []
    frames: list[tuple[Thing, ...]] = []
    narrations: dict[int, str] = {}
    pace = _PACES[rng.integers(len(_PACES))]
    due = int(rng.integers(2))
    for f in range(num_frames):
        if f == due:
            narrations[f] = _event(rng, now, split_scans)
            due += pace[len(narrations) % 2]
        _change_turned(rng, now, split_scans)
        frames.append(tuple(now))
    asked = int(rng.integers(2, num_frames)) if num_frames > 2 and rng.random() < 0.7 else None
    turns = []
    for f in range(num_frames):
        if f == asked:
            question, answer = _question(rng, _digits(frames[f - 1]))
            turns += [turn_at("user", f, question), turn_at("assistant", f, answer)]
        if f in narrations:
            turns.append(turn_at("assistant", f, narrations[f]))
    return Scene(tuple(frames), turns)


def make_stream(split: str, index: int, seed: int, num_frames: int) -> dict[str, object]:
    """Draws stream `index` of a split.

    Returns:
      id "SPLIT-INDEX"; frames (F, 60, 60) uint8; fps; turns (list of dicts role, time, text);
      objects (F, P) bool, the patches that show a digit, in reading order.

    Raises:
      UserError: an unknown split.
    """
    split_scans = scans(split)
    rng = np.random.default_rng((seed, digits.SPLITS.index(split), index))
    scene = tell(rng, num_frames, split_scans)
    return {
        "id": f"{split}-{index:05d}",
        "frames": _draw(rng, split, scene.things_F, shared_clutter=True),
        "fps": digits.FPS,
        "turns": scene.turns,
        "objects": np.stack([patches_of(things) for things in scene.things_F]),
    }


def random_frames(
    split: str, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Labelled single frames as they occur in the streams of a split, each on its own clutter.

    Returns:
      images (count, 60, 60) uint8 and labels (count, P) int32: 4 * digit + quarter of the digit
      that reaches into the patch (of the later one, where two do), quarters in reading order; NONE
      where none does.
    """
    split_scans = scans(split)
    frames, labels = [], np.full((count, GRID, GRID), NONE, np.int32)
    for n in range(count):
        now: list[Thing] = []
        for turned in (False,) * rng.integers(MAX_DIGITS + 1) + (True,) * rng.integers(2):
            thing = _appear(rng, now, split_scans, turned)
            if thing is not None:
                now.append(thing)
                if not turned:
                    y, x = thing.cell
                    labels[n, y : y + 2, x : x + 2] = 4 * thing.digit + _QUARTERS
        frames.append(tuple(now))
    images = _draw(rng, split, tuple(frames), shared_clutter=False)
    return images, labels.reshape(count, PATCHES)


def _digits(things: tuple[Thing, ...] | list[Thing]) -> list[Thing]:
    return [thing for thing in things if not thing.turned]


def _appear(
    rng: np.random.Generator, now: list[Thing], split_scans: Scans, turned: bool
) -> Thing | None:
    """A new thing at a free corner, or None where there is no room; no two digits of one class."""
    corner = _free_corner(rng, now)
    if corner is None:
        return None
    classes = SIDEWAYS if turned else range(10)
    free = np.setdiff1d(classes, [] if turned else [thing.digit for thing in _digits(now)])
    digit = int(rng.choice(free))
    row = int(digits.pick(rng, np.array(digit), split_scans))
    return Thing(row, digit, turned, corner)


def _free_corner(
    rng: np.random.Generator, others: list[Thing], elsewhere: str | None = None
) -> tuple[int, int] | None:
    """A corner where a thing touches no other, at a place of another name if one is given."""
    free = [
        corner
        for corner in _CORNERS
        if place_of(corner) != elsewhere
        and all(
            max(abs(corner[0] - t.corner[0]), abs(corner[1] - t.corner[1])) >= _APART
            for t in others
        )
    ]
    return free[rng.integers(len(free))] if free else None


def _move(rng: np.random.Generator, now: list[Thing], thing: Thing) -> Thing | None:
    """The thing at another place, or None where there is no room."""
    others = [other for other in now if other is not thing]
    corner = _free_corner(rng, others, thing.place)
    return dataclasses.replace(thing, corner=corner) if corner else None


def _event(rng: np.random.Generator, now: list[Thing], split_scans: Scans) -> str:
    """Changes what is visible by one event of a digit; returns the narration."""
    visible = _digits(now)
    kinds = ["appear"] * 2 if len(visible) < MAX_DIGITS else []
    kinds += ["move", "leave"] if visible else []
    kind = kinds[rng.integers(len(kinds))]
    if kind == "appear":
        thing = _appear(rng, now, split_scans, turned=False)
        if thing is not None:
            now.append(thing)
            side = _side_of(thing, visible[0]) if len(visible) == 1 else None
            where = f"{side} of the {visible[0].name}" if side else f"at the {thing.place}"
            return f"{digits.article(thing.digit).capitalize()} {where}."
    if not visible:
        # Turned scans leave room for a digit wherever they lie.
        raise AssertionError("no room for a first digit")
    thing = visible[rng.integers(len(visible))]
    moved = _move(rng, now, thing) if kind == "move" else None
    if moved is not None:
        now[now.index(thing)] = moved
        return f"The {thing.name} moves to the {moved.place}."
    now.remove(thing)
    return f"The {thing.name} leaves."


def _side_of(thing: Thing, other: Thing) -> str | None:
    """Whether a thing is left or right of another, by their columns; None in one column."""
    columns = thing.cell[1], other.cell[1]
    return None if columns[0] == columns[1] else "left" if columns[0] < columns[1] else "right"


def _change_turned(rng: np.random.Generator, now: list[Thing], split_scans: Scans) -> None:
    """Lets a turned scan come, move or leave now and then, whatever the digits do."""
    if rng.random() >= _TURNED_CHANGES:
        return
    turned = [thing for thing in now if thing.turned]
    kinds = ["appear"] if len(turned) < MAX_TURNED else []
    kinds += ["move", "leave"] if turned else []
    kind = kinds[rng.integers(len(kinds))]
    thing = turned[rng.integers(len(turned))] if turned else None
    if kind == "leave":
        now.remove(thing)
        return
    new = _appear(rng, now, split_scans, True) if kind == "appear" else _move(rng, now, thing)
    if kind == "move":
        now.remove(thing)
    if new is not None:
        now.append(new)


def _question(rng: np.random.Generator, visible: list[Thing]) -> tuple[str, str]:
    """A question about the digits that can be seen, and its answer."""
    kind = rng.integers(3)
    if kind == 0:
        return HOW_MANY, NUMBERS[len(visible)].capitalize() + "."
    if kind == 1 or not visible:
        names = [thing.name for thing in sorted(visible, key=lambda thing: thing.digit)]
        return WHICH, (" and ".join(names) or "none").capitalize() + "."
    thing = visible[rng.integers(len(visible))]
    return f"Where is the {thing.name}?", f"At the {thing.place}."


def _draw(
    rng: np.random.Generator,
    split: str,
    things_F: tuple[tuple[Thing, ...], ...],
    *,
    shared_clutter: bool,
) -> np.ndarray:
    """Draws things over clutter, with tremble and noise: (F, 60, 60) uint8."""
    drawn = stamps(split)
    clutter = digits.draw_clutter(rng, 1 if shared_clutter else len(things_F), drawn, CANVAS)
    placed = [(f, thing) for f, things in enumerate(things_F) for thing in things]
    ink = np.zeros((len(things_F), CANVAS, CANVAS), np.float32)
    if placed:
        frame = np.array([f for f, _ in placed])
        corner = np.array([thing.corner for _, thing in placed]).T
        corner = corner + rng.integers(-_TREMBLE, _TREMBLE + 1, corner.shape)
        images = [np.rot90(drawn[t.row]) if t.turned else drawn[t.row] for _, t in placed]
        digits.stamp(ink, frame, corner, np.stack(images))
    light = rng.uniform(0.88, 1.0, (len(things_F), 1, 1)).astype(np.float32)
    image = clutter + ink * (light - clutter)
    image += 0.025 * rng.standard_normal(image.shape, np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
