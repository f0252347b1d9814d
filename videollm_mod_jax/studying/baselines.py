"""What is got without looking: silence, chatter, and the most common words at the right moment."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.example import Turn
from videollm_mod_jax.data.pipeline import Examples
from videollm_mod_jax.evaluation.stream import frames_to_wait
from videollm_mod_jax.evaluation.stream_metrics import (
    TurnPrediction,
    mean_metrics,
    turn_metrics,
)

Prefix = tuple[int, ...]
Counts = Mapping[tuple[str, Prefix], Mapping[int, int]]

SILENT, SPEAKING, BLIND = "always silent", "always speaks", "blind, at the right moment"


def baselines(learnt: Examples, judged: Examples) -> dict[str, dict[str, float]]:
    """The streaming metrics of models that see nothing.

    All three say the same: after every true beginning of an answer the token that most often came
    next in the training split, given the question. They differ in when they speak.

    Args:
      learnt: examples of the training split, whose words are counted.
      judged: examples of the test split.

    Returns:
      `StreamMetrics` as dicts: of a model that never speaks unasked, of one that speaks after every
      frame, and of one that knows when to.
    """
    counts = count_words(learnt)
    vocabulary = learnt.tokenizer.vocab_size
    out = {}
    for name in (SILENT, SPEAKING, BLIND):
        videos = []
        for index in range(len(judged)):
            turns, answers = judged.turns(index), list(_answers(judged, index))
            predicted = [
                _predict(name, turns, t, *_guess(counts, *answers[t], vocabulary))
                for t in range(len(turns))
            ]
            fps = judged.features.meta.fps
            videos.append(mean_metrics(turn_metrics(turn, fps) for turn in predicted))
        out[name] = dataclasses.asdict(mean_metrics(videos))
    return out


def count_words(learnt: Examples) -> Counts:
    """How often every token came after every beginning of an answer, by question ("" for none)."""
    counts: dict[tuple[str, Prefix], Any] = collections.defaultdict(collections.Counter)
    for index in range(len(learnt)):
        for question, tokens in _answers(learnt, index):
            for i, token in enumerate(tokens):
                counts[question, tuple(tokens[:i])][token] += 1
    return counts


def _answers(examples: Examples, index: int) -> Iterator[tuple[str, list[int]]]:
    """Question and labelled answer tokens of every turn."""
    conversation = examples.conversation(index)
    labels_J = examples.load(index)["labels"]
    spoken = [i for i, said in enumerate(conversation) if isinstance(said, dialogue.Assistant)]
    for i, turn in zip(spoken, examples.turns(index), strict=True):
        before = conversation[i - 1]
        question = before.text if isinstance(before, dialogue.User) else ""
        yield question, labels_J[turn.answer_slots].tolist()


def _guess(
    counts: Counts, question: str, tokens: list[int], vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of every true token, and whether it is the likeliest.

    One count is spread over the vocabulary, so that nothing is impossible.
    """
    log_probs, correct = [], []
    for i, token in enumerate(tokens):
        seen = counts.get((question, tuple(tokens[:i])), {})
        total = sum(seen.values()) + 1
        log_probs.append(np.log((seen.get(token, 0) + 1 / vocabulary) / total))
        correct.append(bool(seen) and max(seen, key=seen.__getitem__) == token)
    return np.array(log_probs, np.float32), np.array(correct, bool)


def _predict(
    name: str, turns: tuple[Turn, ...], index: int, log_probs: np.ndarray, correct: np.ndarray
) -> TurnPrediction:
    turn = turns[index]
    breaks = np.full(turn.learn_frames, name == SPEAKING)
    if name == BLIND and not turn.asked and len(breaks):
        breaks[-1] = True
    return TurnPrediction(
        breaks_silence=breaks,
        asked=turn.asked,
        late_frames=0 if turn.asked or breaks.any() else frames_to_wait(turns, index),
        log_probs=log_probs,
        correct=correct,
    )
