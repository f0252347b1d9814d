"""Did a model that narrates on its own speak at the right times, and about the right moments?

Two measures. `segment_scores` and `segment_pairs` are those of FlowNar's self-conditioned
evaluation (`evaluate_metrics.py` of zeyun-zhong/FlowNar), for comparison with its numbers: a
narration stands for the stretch since the one before it, and stretches are compared. In
`window_matches` a narration is the moment at which it comes, right within a window: the event-based
score of sound event detection and onset detection (mir_eval, Raffel et al. 2014), with a maximum
one-to-one matching.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

_TINY = 1e-8  # seconds; upstream's guard against stretches without length


@dataclasses.dataclass(frozen=True)
class Narration:
    """What is said at a moment.

    Attributes:
      time: seconds.
      text: what is said.
    """

    time: float
    text: str


@dataclasses.dataclass(frozen=True)
class TimingScores:
    """How well the times of two series agree, each in [0, 1].

    Attributes:
      precision: share of predicted narrations at a right time.
      recall: share of true narrations for which there is a predicted one.
      f1: harmonic mean of both; 0 if both are.
    """

    precision: float
    recall: float
    f1: float


def segment_scores(
    predicted: Sequence[Narration], true: Sequence[Narration], *, start: float, min_iou: float
) -> TimingScores:
    """Compares the stretches that narrations end: intersection over union (IoU).

    FlowNar takes min_iou 0.5. Above it no stretch can match two, since those of one series do not
    overlap.

    ```
    start 0   seconds  0   1   2   3   4   5   6
    true               |-----A-----|-------B---|      at 3 and 6
    predicted          |---a---|-----b-----|-c-|      at 2, 5 and 6
    IoU                A a 2/3,  B b 2/4,  B c 1/3
    min_iou 0.5: precision 2/3, recall 2/2, F1 0.8
    ```

    Args:
      predicted: in order of time.
      true: in order of time, at least one; leave out videos without any, as FlowNar does.
      start: seconds at which the first stretch of both begins.
      min_iou: at least this much counts as a match.

    Raises:
      ValueError: no true narrations, times that are unordered, not finite or before the start, or
        min_iou outside (0, 1].
    """
    if not 0 < min_iou <= 1:
        raise ValueError(f"min_iou is {min_iou}; expected in (0, 1]")
    matches = _overlaps(predicted, true, start)[0] >= min_iou
    return _scores(
        int(matches.any(axis=0).sum()), len(predicted), int(matches.any(axis=1).sum()), len(true)
    )


def segment_pairs(
    predicted: Sequence[Narration], true: Sequence[Narration], *, start: float
) -> tuple[tuple[str, str], ...]:
    """The (predicted, true) texts that FlowNar compares: for each true narration the nearest.

    The nearest has the highest generalized IoU (IoU minus the share of the gap in both stretches'
    hull), the first of several. Every true narration counts, matched in time or not; without any
    prediction its text is compared with nothing.

    In the drawing of `segment_scores`: (a, A), (b, B).

    Args:
      predicted: in order of time; may be empty.
      true: in order of time, at least one.
      start: seconds at which the first stretch of both begins.

    Raises:
      ValueError: no true narrations, or times that are unordered, not finite or before the start.
    """
    if not predicted:
        _check(predicted, true, start)
        return tuple(("", narration.text) for narration in true)
    nearest = _overlaps(predicted, true, start)[1].argmax(axis=1)
    return tuple(
        (predicted[index].text, narration.text)
        for index, narration in zip(nearest, true, strict=True)
    )


def window_matches(
    predicted: Sequence[Narration], true: Sequence[Narration], *, window: float
) -> tuple[tuple[int, int], ...]:
    """The largest one-to-one matching of narrations that are at most a window apart.

    ```
    window 1   seconds  0   1   2   3   4   5   6
    true                    A   B               C
    predicted           a   b           c            a-A, b-B; c is too far from C
    ```

    Args:
      predicted, true: in order of time.
      window: seconds, inclusive.

    Returns:
      Pairs (index of predicted, index of true) in order of time.

    Raises:
      ValueError: no true narrations, times that are unordered or not finite, or a window that is
        negative or not finite.
    """
    if not (math.isfinite(window) and window >= 0):
        raise ValueError(f"window is {window}; expected seconds >= 0")
    _check(predicted, true, -math.inf)
    pairs, index = [], 0
    # With one window for all, to give each true narration the earliest free one loses no match.
    for true_index, narration in enumerate(true):
        while index < len(predicted) and predicted[index].time < narration.time - window:
            index += 1
        if index < len(predicted) and predicted[index].time <= narration.time + window:
            pairs.append((index, true_index))
            index += 1
    return tuple(pairs)


def window_scores(
    predicted: Sequence[Narration], true: Sequence[Narration], *, window: float
) -> TimingScores:
    """Precision, recall and F1 of `window_matches`; the same arguments and errors."""
    matches = len(window_matches(predicted, true, window=window))
    return _scores(matches, len(predicted), matches, len(true))


def mean_scores(videos: Iterable[TimingScores]) -> TimingScores:
    """The mean of each score over videos, as FlowNar averages: F1 too, not that of the means.

    Raises:
      ValueError: there are no videos.
    """
    rows = [dataclasses.astuple(scores) for scores in videos]
    if not rows:
        raise ValueError("mean timing of no videos")
    return TimingScores(*(float(mean) for mean in np.mean(rows, axis=0)))


def _scores(right: int, predicted: int, found: int, true: int) -> TimingScores:
    precision = right / predicted if predicted else 0.0
    recall = found / true
    both = precision + recall
    return TimingScores(precision, recall, 2 * precision * recall / both if both else 0.0)


def _overlaps(
    predicted: Sequence[Narration], true: Sequence[Narration], start: float
) -> tuple[np.ndarray, np.ndarray]:
    """IoU and generalized IoU of every stretch with every other, [true, predicted] float64."""
    _check(predicted, true, start)
    true_ends = np.array([narration.time for narration in true])[:, None]
    true_starts = np.concatenate([[[start]], true_ends[:-1]])
    ends = np.array([narration.time for narration in predicted])
    starts = np.concatenate([[start], ends])[: len(ends)]
    shared = np.maximum(0.0, np.minimum(true_ends, ends) - np.maximum(true_starts, starts))
    union = (true_ends - true_starts) + (ends - starts) - shared
    hull = np.maximum(true_ends, ends) - np.minimum(true_starts, starts)
    iou = shared / np.maximum(union, _TINY)
    return iou, iou - (hull - union) / np.maximum(hull, _TINY)


def _check(predicted: Sequence[Narration], true: Sequence[Narration], start: float) -> None:
    if not true:
        raise ValueError("no true narrations to compare with")
    for name, narrations in (("predicted", predicted), ("true", true)):
        times = [narration.time for narration in narrations]
        if not all(math.isfinite(time) and time >= start for time in times):
            raise ValueError(f"{name} times {times}; expected finite seconds from {start:g} on")
        if times != sorted(times):
            raise ValueError(f"{name} times {times} are not in order")
