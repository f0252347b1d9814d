"""Answers that mean one of a closed set of labels: COIN's five tasks and keystep recognition.

A model answers in words. What it means is the label with the smallest Levenshtein distance to
those words, letter by letter: nothing is stripped, lower-cased or cut off before, as published.

Sources: `fuzzy_match` and both `compute_metrics` in `data/coin/benchmarks.py` of
showlab/videollm-online (step, next and task: the whole answer; procedure and procedure with goal:
its lines). Keystep top-1 accuracy of Ego-Exo4D is the share of clips whose step is named right;
how words become a step is not published for it, so it is the same rule.
"""

from collections.abc import Sequence

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein


def nearest_label(text: str, labels: Sequence[str]) -> str:
    """The label that a text means: the one at the smallest edit distance, the first of several.

    ```
                  Cut potato.  Peel potato.  Cut tomato.
    Cut a potato       3            6             5       -> Cut potato.
    Cut                8           11             8       -> Cut potato., the first
    (nothing)         11           12            11       -> Cut potato., the first shortest
    ```

    Args:
      text: an answer, without special tokens.
      labels: the set, in its order.

    Raises:
      ValueError: there are no labels.
    """
    if not labels:
        raise ValueError("no labels to compare an answer with")
    distances = process.cdist([text], labels, scorer=Levenshtein.distance, dtype=np.int32)
    return labels[int(np.argmin(distances[0]))]


def label_correct(answer: str, truth: str, labels: Sequence[str]) -> bool:
    """Whether an answer as a whole means the true label (COIN step, next, task; keysteps).

    Raises:
      ValueError: the truth is none of the labels.
    """
    _check_known([truth], labels)
    return nearest_label(answer, labels) == truth


def steps_correct(answer: str, truths: Sequence[str], labels: Sequence[str]) -> tuple[bool, ...]:
    """Which steps of a procedure an answer names right, line by line (COIN procedure tasks).

    A line is compared with the labels as it is, with its number, so even a right one is the three
    edits of "1. " away. Lines beyond the true steps are not judged, steps without a line are wrong.

    ```
    truths            Pour milk.      Stir.       Serve.
    answer's lines    1. Pour milk.   2. Serve.
    they mean         Pour milk.      Serve.      (no line)
    correct           True            False       False
    ```

    The accuracy of a task is the share of right steps over all answers, not a mean of shares.

    Args:
      answer: one step per line.
      truths: the true steps, in order.
      labels: the set that they are of.

    Returns:
      One mark per true step.

    Raises:
      ValueError: there are no true steps, or one is none of the labels.
    """
    if not truths:
        raise ValueError("a procedure without steps")
    _check_known(truths, labels)
    lines = answer.split("\n")[: len(truths)]
    meant = [nearest_label(line, labels) for line in lines]
    meant += [None] * (len(truths) - len(meant))
    return tuple(label == truth for label, truth in zip(meant, truths, strict=True))


def _check_known(truths: Sequence[str], labels: Sequence[str]) -> None:
    for truth in truths:
        if truth not in labels:
            raise ValueError(f"true label {truth!r} is none of the {len(labels)} labels")
