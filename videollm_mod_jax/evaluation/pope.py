"""POPE: does a model see objects that are not there? Yes or no, in three splits.

Source: `llava/eval/eval_pope.py` of haotian-liu/LLaVA. The one number that LLaVA-1.5 and later
papers report as "POPE" is the mean F1 of the splits random, popular and adversarial.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from videollm_mod_jax.evaluation.accuracy import accuracy

SPLITS = ("random", "popular", "adversarial")


@dataclasses.dataclass(frozen=True)
class PopeScores:
    """Scores of a split, all in [0, 1]; "yes" is the positive answer.

    Attributes:
      accuracy: share of right answers.
      precision: share of right ones among "yes"; 0 without any (upstream fails).
      recall: share of true "yes" that were answered so; 0 without any (upstream fails).
      f1: harmonic mean of precision and recall; 0 if both are.
      yes_ratio: share of "yes" among the answers.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def yes_or_no(text: str) -> str:
    """What an answer says, by LLaVA's rule: "no" if its first sentence says no, else "yes".

    ```
    Yes, there is a dog.            -> yes
    No, there is not.               -> no
    There is no dog. Yes, a cat.    -> no: the first sentence counts
    I cannot see it. No.            -> yes: neither "No", "no" nor "not" is a word of it
    NO                              -> yes: the same
    (nothing)                       -> yes
    ```
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_scores(predictions: Sequence[str], labels: Sequence[str]) -> PopeScores:
    """The scores of one split.

    Args:
      predictions: "yes" or "no" per question, see `yes_or_no`.
      labels: the true ones.

    Raises:
      ValueError: no questions, unequal lengths, or anything but "yes" and "no".
    """
    if not labels or len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    for word in (*predictions, *labels):
        if word not in ("yes", "no"):
            raise ValueError(f"found {word!r}; expected 'yes' or 'no'")
    pairs = list(zip(predictions, labels, strict=True))
    right_yes = pairs.count(("yes", "yes"))
    said_yes, true_yes = predictions.count("yes"), labels.count("yes")
    return PopeScores(
        accuracy=accuracy(prediction == label for prediction, label in pairs),
        precision=right_yes / said_yes if said_yes else 0.0,
        recall=right_yes / true_yes if true_yes else 0.0,
        # The harmonic mean of right / said and right / true.
        f1=2 * right_yes / (said_yes + true_yes) if right_yes else 0.0,
        yes_ratio=said_yes / len(pairs),
    )


def mean_f1(splits: Mapping[str, PopeScores]) -> float:
    """The number that papers report: the mean F1 of the three splits, in [0, 1].

    Raises:
      ValueError: a split is missing or another is there.
    """
    if set(splits) != set(SPLITS):
        raise ValueError(f"splits {sorted(splits)}; expected {sorted(SPLITS)}")
    return sum(scores.f1 for scores in splits.values()) / len(SPLITS)
