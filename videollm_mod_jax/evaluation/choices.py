"""Multiple choice: the option's letter in an answer, and accuracies by group.

Sources: `extract_characters_regex` in Video-MME's `eval_your_results.py`; ScienceQA as in
`llava/eval/eval_science_qa.py` of haotian-liu/LLaVA.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from videollm_mod_jax.evaluation.accuracy import accuracy

_SCIENCEQA_LETTERS = "ABCDE"


@dataclasses.dataclass(frozen=True)
class ChoiceScores:
    """What became of the questions of a group.

    Attributes:
      questions: how many.
      answered: share in [0, 1] in whose answers a letter was found.
      accuracy: share in [0, 1] answered right; a question without a letter is wrong.
      accuracy_answered: share in [0, 1] of the answered ones that are right, which is what
        Video-MME's own script prints; 0 if none is answered.
    """

    questions: int
    answered: float
    accuracy: float
    accuracy_answered: float


def videomme_letter(response: str) -> str | None:
    """The option that an answer names, as Video-MME reads it: its first capital A, B, C or D.

    Upstream removes phrases such as "The best answer is" before; none holds one of these capitals
    (but for one that two missing commas make of four), so nothing depends on it. The rule is meant
    for answers that are little more than a letter; it reads others wrongly.

    ```
    C. A red cup.              -> C
    The best answer is: (D)    -> D
    A red cup, so C            -> A
    Answer: C                  -> A
    none of them               -> None
    ```
    """
    match = re.search("[ABCD]", response)
    return match[0] if match else None


def scienceqa_letter(response: str, options: int) -> str | None:
    """The option that an answer names, as LLaVA reads answers to ScienceQA.

    ```
    B                          -> B
    B. The left one            -> B
    So: The answer is B.       -> B
    The answer is A. The answer is B.   -> None: two of them
    B. The left one, of 1 option        -> None: there is no B
    The left one               -> None
    ```

    Args:
      response: the model's answer.
      options: how many there are to choose from, 2 to 5 in ScienceQA.

    Raises:
      ValueError: options is not 1 to 5.
    """
    if not 1 <= options <= len(_SCIENCEQA_LETTERS):
        raise ValueError(f"{options} options; expected 1 to {len(_SCIENCEQA_LETTERS)}")
    text = response.strip()
    if re.fullmatch(r"[A-E]", text) or re.match(r"[A-E]\. ", text):
        letter = text[0]
    else:
        # The full stop stands for any character, upstream too.
        named = re.findall(r"The answer is ([A-Z]).", text)
        letter = named[0] if len(named) == 1 else ""
    return letter if letter and letter in _SCIENCEQA_LETTERS[:options] else None


def choice_scores(
    letters: Sequence[str | None], answers: Sequence[str], groups: Sequence[str]
) -> Mapping[str, ChoiceScores]:
    """Scores of all questions and of each group, such as Video-MME's short, medium and long.

    Args:
      letters: per question, what was found in the answer.
      answers: per question, the right letter.
      groups: per question, the group that it is of.

    Returns:
      Scores by group, in the order in which groups come, after "overall".

    Raises:
      ValueError: no questions, unequal lengths, a group named "overall", or a right answer that
        is not one capital letter.
    """
    if not (letters and len(letters) == len(answers) == len(groups)):
        raise ValueError(
            f"{len(letters)} letters, {len(answers)} answers and {len(groups)} groups; expected "
            "equally many and at least one"
        )
    for answer in answers:
        if not re.fullmatch("[A-Z]", answer):
            raise ValueError(f"right answer {answer!r}; expected one capital letter")
    rows = list(zip(letters, answers, groups, strict=True))
    if "overall" in groups:
        raise ValueError("a group is named 'overall'")
    scores = {"overall": _scores(rows)}
    for name in dict.fromkeys(groups):
        scores[name] = _scores([row for row in rows if row[2] == name])
    return scores


def _scores(rows: Sequence[tuple[str | None, str, str]]) -> ChoiceScores:
    answered = accuracy(letter is not None for letter, _, _ in rows)
    right = accuracy(letter == answer for letter, answer, _ in rows)
    return ChoiceScores(
        questions=len(rows),
        answered=answered,
        accuracy=right,
        accuracy_answered=right / answered if answered else 0.0,
    )
