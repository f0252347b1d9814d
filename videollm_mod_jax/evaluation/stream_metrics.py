"""The streaming metrics of VideoLLM-online, as numpy functions of what a model did in one turn.

A turn is the frames since the previous answer, and the answer that follows them. Everything is
teacher-forced: each turn is judged on the true history before it.

Source: `stream_evaluate` in `models/modeling_live.py` of showlab/videollm-online.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnPrediction:
    """What a model did in one turn.

    Attributes:
      breaks_silence: [learnt frames] bool, whether it would answer after each frame that carries a
        label. In a turn that the model opens itself the last of them is the frame to answer after;
        in a turn that a user's question ends, silence is right in all of them.
      asked: the answer follows a user's question.
      late_frames: only read where no frame broke silence and `asked` is false: how many frames
        after the right one the model spoke, or the number that it was given if it never did; 0
        where there was none to give.
      log_probs: [answer tokens] float32, log-probability of each token of the true answer.
      correct: [answer tokens] bool, whether that token was the most likely one.
    """

    breaks_silence: np.ndarray
    asked: bool
    late_frames: int
    log_probs: np.ndarray
    correct: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamMetrics:
    """The four metrics of a turn, a video or a split; NaN where nothing could be judged.

    Attributes:
      lm_ppl: LM-PPL, exp of the mean cross-entropy of an answer's tokens; lower is better.
      time_diff: TimeDiff in seconds, how early or late the answer came; lower is better.
      fluency: Fluency in [0, 1], share of leading labels of the turn predicted right.
      lm_correctness: LM-Correctness in [0, 1], share of leading answer tokens predicted right.
    """

    lm_ppl: float
    time_diff: float
    fluency: float
    lm_correctness: float


def frames_early(breaks_silence: np.ndarray, asked: bool) -> int | None:
    """Frames between the first break of silence and the right moment; None if there was no break.

    ```
    learnt frames     0 1 2 3 4
    narration         . . . . X    X: the frame to answer after, so the last learnt one
      broken at 4     . . . . x    0 early: on time
      broken at 2     . . x x .    2 early
    question          . . . . .X   the user speaks after one more frame, which has no label
      broken at 4     . . . . x    1 early
      not broken      . . . . .    None: silence was right
    ```
    """
    if not breaks_silence.any():
        return None
    due = len(breaks_silence) if asked else len(breaks_silence) - 1
    return due - int(np.argmax(breaks_silence))


def frame_difference(turn: TurnPrediction) -> int | None:
    """Frames early (positive) or late (negative); None for a turn without labelled frames.

    A turn that a user's question ends can only be early: the model is not expected to break the
    silence there, so keeping it is on time.
    """
    if len(turn.breaks_silence) == 0:
        return None
    early = frames_early(turn.breaks_silence, turn.asked)
    if early is not None:
        return early
    return 0 if turn.asked else -turn.late_frames


def leading_correct(correct: np.ndarray) -> int:
    """How many answer tokens are right before the first wrong one."""
    return int(np.logical_and.accumulate(correct).sum())


def turn_metrics(turn: TurnPrediction, fps: float) -> StreamMetrics:
    """Judges one turn.

    Fluency counts, as upstream does, the learnt frames minus those spoken too early (minus the one
    missed frame, if late), plus the leading right answer tokens if the timing was exact.

    ```
    4 learnt frames, answer of 6 tokens of which the first 3 are right
    on time            (4 + 3) / 10
    two frames early   (4 - 2) / 10
    one frame late     (4 - 1) / 10
    ```

    Args:
      turn: what the model did.
      fps: frames per second, to turn frames into seconds.

    Returns:
      The metrics; NaN for those that this turn does not have: `lm_ppl` and `lm_correctness`
      without answer tokens, `time_diff` without learnt frames, `fluency` without either.
    """
    frames, tokens = len(turn.breaks_silence), len(turn.correct)
    difference = frame_difference(turn)
    right_tokens = leading_correct(turn.correct)
    fluency = np.nan
    if frames and tokens:
        if difference == 0:
            right = frames + right_tokens
        else:
            right = frames - (difference if difference > 0 else 1)
        fluency = right / (frames + tokens)
    return StreamMetrics(
        lm_ppl=float(np.exp(-np.mean(turn.log_probs))) if tokens else np.nan,
        time_diff=np.nan if difference is None else abs(difference) / fps,
        fluency=fluency,
        lm_correctness=right_tokens / tokens if tokens else np.nan,
    )


def mean_metrics(metrics: Iterable[StreamMetrics]) -> StreamMetrics:
    """The mean of each metric over those that have it: over turns first, then over videos."""
    rows = np.array([dataclasses.astuple(m) for m in metrics], np.float64).reshape(-1, 4)
    present = ~np.isnan(rows)
    sums = np.where(present, rows, 0).sum(axis=0)
    counts = present.sum(axis=0)
    means = np.divide(sums, counts, out=np.full(4, np.nan), where=counts > 0)
    names = (field.name for field in dataclasses.fields(StreamMetrics))
    return StreamMetrics(**{name: float(mean) for name, mean in zip(names, means, strict=True)})
