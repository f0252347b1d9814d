"""How each kind of benchmark marks an answer, and what its marks amount to.

A `Dataset` names its kind. Kinds that ask for an answer are here, as two pure functions: `mark`
gives the fields of a sample's row that say how good the answers are, and `score` sums rows up.
Streaming kinds, which ask nothing, are in `running.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from videollm_mod_jax.data.annotations import Record
from videollm_mod_jax.evaluation import choices, labels, mme, pope
from videollm_mod_jax.evaluation.accuracy import accuracy
from videollm_mod_jax.evaluation.anticipation import (
    EditDistances,
    Taxonomy,
    edit_distances,
    mean_edit_distances,
    parse_actions,
)
from videollm_mod_jax.evaluation.judge import Judge, Verdict, judged_scores
from videollm_mod_jax.evaluation.samples import Row
from videollm_mod_jax.evaluation.vqa import exact_match

Scores = dict[str, float]

ANTICIPATED = 20
ATTEMPTS = 5


@dataclasses.dataclass(frozen=True)
class Marking:
    """What marking needs beside the record and the answers.

    Attributes:
      labels: of the dataset.
      judge: of open answers.
    """

    labels: tuple[str, ...]
    judge: Judge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A kind of benchmark that asks for answers.

    Attributes:
      mark: (record, answers, reference, marking) to fields of the sample's row. There is a
        reference, unless `needs_reference` is false.
      score: rows of all records and the marking to numbers by name.
      samples: answers per record.
      temperature: of sampling; 0 is greedy.
      judged: whether the numbers depend on the judge.
      needs_reference: whether a record without a true answer is an error. Otherwise the row says
        what was predicted, for a server that knows the truth.
    """

    mark: Callable[[Record, Sequence[str], str | None, Marking], dict[str, Any]]
    score: Callable[[Sequence[Row], Marking], Scores]
    samples: int = 1
    temperature: float = 0.0
    judged: bool = False
    needs_reference: bool = True


def _mark_labels(
    record: Record, answers: Sequence[str], reference: str | None, marking: Marking
) -> dict[str, Any]:
    """COIN's steps and tasks, and keysteps: the answer as a whole means one label."""
    del reference
    (truth,) = record.target["labels"]
    right = labels.label_correct(answers[0], truth, marking.labels)
    return {"means": labels.nearest_label(answers[0], marking.labels), "correct": right}


def _mark_steps(
    record: Record, answers: Sequence[str], reference: str | None, marking: Marking
) -> dict[str, Any]:
    del reference
    right = labels.steps_correct(answers[0], record.target["labels"], marking.labels)
    return {"correct": list(right)}


def _score_marks(rows: Sequence[Row], marking: Marking) -> Scores:
    """The share of right answers, or of right steps over all answers."""
    del marking
    marks = [row["correct"] for row in rows]
    each = [mark if isinstance(mark, list) else [mark] for mark in marks]
    return {"accuracy": accuracy(step for mark in each for step in mark)}


def _mark_exact(
    record: Record, answers: Sequence[str], reference: str | None, marking: Marking
) -> dict[str, Any]:
    del record, marking
    return {"correct": exact_match(answers[0], reference)}


def _mark_choice(
    record: Record, answers: Sequence[str], reference: str | None, marking: Marking
) -> dict[str, Any]:
    """Video-MME, whose target has a class of duration, or ScienceQA."""
    del marking
    if "duration" in record.target:
        letter, group = choices.videomme_letter(answers[0]), record.target["duration"]
    else:
        letter = choices.scienceqa_letter(answers[0], len(record.target["options"]))
        group = record.target["subject"]
    return {"letter": letter, "group": group, "correct": letter == reference}


def _score_choices(rows: Sequence[Row], marking: Marking) -> Scores:
    del marking
    found = choices.choice_scores(
        [row["letter"] for row in rows],
        [row["reference"] for row in rows],
        [row["group"] for row in rows],
    )
    overall = found["overall"]
    groups = {name: scores.accuracy for name, scores in found.items() if name != "overall"}
    return {"accuracy": overall.accuracy, "answered": overall.answered, **groups}


def _mark_yes_no(
    record: Record, answers: Sequence[str], reference: str | None, marking: Marking
) -> dict[str, Any]:
    del marking
    said = pope.yes_or_no(answers[0])
    return {"split": record.target["split"], "said": said, "correct": said == reference}


def _score_yes_no(rows: Sequence[Row], marking: Marking) -> Scores:
    """POPE: every number of each split, and the mean F1 where all splits are there."""
    del marking
    by_split = {}
    for split in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == split]
        by_split[split] = pope.pope_scores(
            [row["said"] for row in own], [row["reference"] for row in own]
        )
    scores = {
        f"{split} {name}": value
        for split, found in by_split.items()
        for name, value in dataclasses.asdict(found).items()
    }
    if set(by_split) == set(pope.SPLITS):
        scores["f1"] = pope.mean_f1(by_split)
    return scores


def _mark_mme(
    record: Record, answers: Sequence[str], reference: str | None, marking: Marking
) -> dict[str, Any]:
    del marking
    said = mme.yes_no_or_other(answers[0])
    where = {key: record.target[key] for key in ("task", "image")}
    return where | {"said": said, "correct": said == reference.lower()}


def _score_mme(rows: Sequence[Row], marking: Marking) -> Scores:
    """The totals that are complete, then the score of every task."""
    del marking
    found = mme.mme_scores(
        mme.MmeAnswer(
            task=row["task"],
            image=row["image"],
            truth=row["reference"].lower(),
            prediction=row["said"],
        )
        for row in rows
    )
    totals = {"perception": found.perception, "cognition": found.cognition}
    complete = {name: total for name, total in totals.items() if total is not None}
    return complete | {name: task.score for name, task in found.tasks.items()}


def _mark_judged(
    record: Record, answers: Sequence[str], reference: str | None, marking: Marking
) -> dict[str, Any]:
    question = [turn.text for turn in record.turns if turn.role == "user"][-1]
    verdict = marking.judge.judge(question, reference, answers[0])
    return {"correct": verdict.correct, "score": verdict.score}


def _score_judged(rows: Sequence[Row], marking: Marking) -> Scores:
    verdicts = [Verdict(correct=row["correct"], score=row["score"]) for row in rows]
    found = judged_scores(marking.judge, verdicts)
    scores = {"accuracy": found.accuracy}
    return scores if found.score is None else scores | {"score": found.score}


@functools.lru_cache(maxsize=1)
def taxonomy_of(names: tuple[str, ...]) -> Taxonomy:
    """The verbs and nouns among the labels of a dataset.

    ```
    ("verb: take", "verb: put", "noun: dough")   ->   verbs take, put; nouns dough
    ```
    """

    def words(kind: str) -> tuple[str, ...]:
        prefix = f"{kind}: "
        return tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    return Taxonomy(words("verb"), words("noun"))


def _mark_actions(
    record: Record, answers: Sequence[str], reference: str | None, marking: Marking
) -> dict[str, Any]:
    """The ids of all attempts, as the benchmark's server takes them, and how near the best is."""
    taxonomy = taxonomy_of(marking.labels)
    attempts = [parse_actions(answer, taxonomy, ANTICIPATED) for answer in answers]
    verbs, nouns = ([[pair[i] for pair in attempt] for attempt in attempts] for i in range(2))
    predicted = {"predicted_verbs": verbs, "predicted_nouns": nouns}
    if reference is None:
        return predicted
    truth = list(zip(record.target["verbs"], record.target["nouns"], strict=True))
    return predicted | dataclasses.asdict(edit_distances(attempts, truth, taxonomy))


def _score_actions(rows: Sequence[Row], marking: Marking) -> Scores:
    del marking
    names = [field.name for field in dataclasses.fields(EditDistances)]
    known = [row for row in rows if row["reference"] is not None]
    clips = [EditDistances(*(row[name] for name in names)) for row in known]
    return dataclasses.asdict(mean_edit_distances(clips)) if clips else {}


BENCHMARKS: Mapping[str, Benchmark] = {
    "labels": Benchmark(mark=_mark_labels, score=_score_marks),
    # As upstream reads a procedure: line by line even where a single step was asked for.
    "steps": Benchmark(mark=_mark_steps, score=_score_marks),
    "vqa": Benchmark(mark=_mark_exact, score=_score_marks),
    "choices": Benchmark(mark=_mark_choice, score=_score_choices),
    "yes_no": Benchmark(mark=_mark_yes_no, score=_score_yes_no),
    "mme": Benchmark(mark=_mark_mme, score=_score_mme),
    "open_qa": Benchmark(mark=_mark_judged, score=_score_judged, judged=True),
    # Best of five, as published; upstream takes them from a beam, here they are drawn.
    "anticipation": Benchmark(
        mark=_mark_actions,
        score=_score_actions,
        samples=ATTEMPTS,
        temperature=1.0,
        needs_reference=False,
    ),
}
"""By the name that `annotations.Dataset.benchmark` gives."""
