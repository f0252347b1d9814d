"""MME: fourteen tasks of yes-or-no questions, two for every image.

A task's score is 100 times the sum of its accuracy over questions and its accuracy over images,
where an image counts if both its questions are answered right (acc and acc+): 0 to 200. Perception
sums ten tasks (0 to 2000), cognition four (0 to 800). Papers that give one number give perception.

Source: `eval_tool/calculation.py` of the benchmark's authors.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from videollm_mod_jax.data.builders.image_yes_no import COGNITION, PERCEPTION
from videollm_mod_jax.evaluation.accuracy import accuracy


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmeAnswer:
    """A question of MME and how it was answered.

    Attributes:
      task: one of `PERCEPTION` and `COGNITION`.
      image: name, unique in the task.
      truth: "yes" or "no".
      prediction: "yes", "no" or "other", see `yes_no_or_other`.
    """

    task: str
    image: str
    truth: str
    prediction: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmeTask:
    """The scores of one task.

    Attributes:
      accuracy: share of questions answered right, in [0, 1].
      accuracy_plus: share of images with both questions answered right, in [0, 1].
      other: share of answers that are neither yes nor no, in [0, 1]; they are wrong.
    """

    accuracy: float
    accuracy_plus: float
    other: float

    @property
    def score(self) -> float:
        """The task's score, 0 to 200."""
        return 100 * (self.accuracy + self.accuracy_plus)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmeScores:
    """The scores of all tasks.

    Attributes:
      tasks: by name, in the benchmark's order; those without questions are absent.
      perception: sum of the scores of the ten tasks, 0 to 2000; None unless all are there.
      cognition: sum of the scores of the four tasks, 0 to 800; None unless all are there.
    """

    tasks: Mapping[str, MmeTask]
    perception: float | None
    cognition: float | None


def yes_no_or_other(text: str) -> str:
    """What an answer says: which of the two its first four characters hold, in lower case.

    ```
    Yes.           -> yes
    No, it is.     -> no
    not sure       -> no
    It is a dog    -> other
    ```
    """
    start = text.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def mme_scores(answers: Iterable[MmeAnswer]) -> MmeScores:
    """The scores of a run, complete or not.

    ```
    image 1: right right    image 2: right wrong
    acc 3 / 4, acc+ 1 / 2: score 100 * (0.75 + 0.5) = 125
    ```

    Raises:
      ValueError: no answers, an unknown task, an image without exactly two questions, or a word
        that is none of those above.
    """
    images: dict[str, dict[str, list[MmeAnswer]]] = collections.defaultdict(dict)
    for answer in answers:
        where = f"{answer.task}/{answer.image}"
        if answer.task not in PERCEPTION + COGNITION:
            raise ValueError(f"{where}: unknown task; expected one of {PERCEPTION + COGNITION}")
        if answer.truth not in ("yes", "no") or answer.prediction not in ("yes", "no", "other"):
            raise ValueError(
                f"{where}: truth {answer.truth!r}, prediction {answer.prediction!r}; expected "
                "'yes' or 'no', or 'other' for a prediction"
            )
        images[answer.task].setdefault(answer.image, []).append(answer)
    if not images:
        raise ValueError("MME without answers")
    for task, questions in images.items():
        for image, pair in questions.items():
            if len(pair) != 2:
                raise ValueError(f"{task}/{image}: {len(pair)} questions; expected 2")
    tasks = {
        name: _task(list(images[name].values()))
        for name in PERCEPTION + COGNITION
        if name in images
    }
    return MmeScores(
        tasks=tasks, perception=_total(tasks, PERCEPTION), cognition=_total(tasks, COGNITION)
    )


def _task(images: list[list[MmeAnswer]]) -> MmeTask:
    answers = [answer for pair in images for answer in pair]
    return MmeTask(
        accuracy=accuracy(a.prediction == a.truth for a in answers),
        accuracy_plus=accuracy(all(a.prediction == a.truth for a in pair) for pair in images),
        other=accuracy(a.prediction == "other" for a in answers),
    )


def _total(tasks: Mapping[str, MmeTask], names: tuple[str, ...]) -> float | None:
    return sum(tasks[name].score for name in names) if tasks.keys() >= set(names) else None
