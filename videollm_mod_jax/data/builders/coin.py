"""`coin_*`: five questions about the steps of instructional videos (COIN, Tang et al., CVPR 2019).

Questions, names and frames are those of VideoLLM-online (showlab/videollm-online, data/coin/coin.py
and data/coin/benchmarks.py), on whose COIN benchmark VideoLLM-MoD reports.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from videollm_mod_jax.data.annotations import (
    Dataset,
    FieldError,
    Parsed,
    Record,
    Source,
    field,
    seconds_field,
    shown,
    text_field,
)
from videollm_mod_jax.data.builders import coin_page
from videollm_mod_jax.data.builders.clips import clip_record, label
from videollm_mod_jax.data.builders.json_members import object_members
from videollm_mod_jax.data.builders.questions import StoredNames, count_records, listed
from videollm_mod_jax.errors import UserError

FILE = "COIN.json"
_CONCISELY = "Format your answer concisely. No extra text output."
_LISTING = (
    "Format your answer concisely, listing each action on a new line with a number prefix. "
    "No extra text output."
)
# Names with a comma: `_clean_step` of data/coin/coin.py.
_STEP_NAMES = {
    "process (crop, fold) paper": "crop and fold paper",
    "try to press gun head, spray residual old grease": (
        "try to press gun head to spray residual old grease"
    ),
}
# Acronyms that spaces before capitals break apart: `_clean_task` of data/coin/coin.py.
_ACRONYMS = {
    " t v": " TV",
    " c d": " CD",
    "s i m": "SIM",
    "n b a": "NBA",
    "s s d": "SSD",
    "r j45": "RJ45",
}


def task_name(name: str) -> str:
    """The name of a task in words.

    ```
    ReplaceCDDriveWithSSD   ->   replace CD drive with SSD
    ```
    """
    words = "".join(f" {c.lower()}" if c.isupper() else c for c in name)
    for broken, acronym in _ACRONYMS.items():
        words = words.replace(broken, acronym)
    return words.strip()


@dataclasses.dataclass(frozen=True)
class _Step:
    start: float
    end: float
    label: str


@dataclasses.dataclass(frozen=True)
class _Question:
    """A question about the clip of a step; the steps `range(first, stop)` from it are the answer.

    Attributes:
      goal: whether the question names the task.
    """

    first: int
    stop: int
    goal: bool = False

    def text(self, number: int, task: str) -> str:
        """The question, when `number` steps are the answer."""
        if self.first == 0:
            return f"What is the action in the video? {_CONCISELY}"
        what = f"To {task}, what" if self.goal else "What"
        if number == 1:
            return f"{what} is the next action for the video? {_CONCISELY}"
        return f"{what} is the next {number} actions for the video? {_LISTING}"

    def labels(self, steps: Sequence[_Step | None], index: int, where: str) -> list[str]:
        """The answer to the question about step `index`; None is a step that was dropped."""
        asked = steps[index + self.first : index + self.stop]
        if not asked:
            raise FieldError("no next step", where, "it is the last of its video")
        if None in asked:
            raise FieldError("unusable next step", where, "one that the answer lists was dropped")
        starts = [step.start for step in (steps[index], *asked)]
        if starts != sorted(starts):
            raise FieldError("unordered steps", where, f"it and the next begin at {shown(starts)}")
        return [step.label for step in asked]


def _read_steps(question: _Question, source: Source) -> Parsed:
    """One record per step that has an answer."""
    stored = StoredNames(source.videos)

    def records(entries: Iterable[tuple[str, tuple[str, Any]]]) -> Iterator[Record]:
        for where, (name, entry) in entries:
            try:
                video, task = stored.find(where, name), _task_name(entry, where)
                annotations = field(entry, "annotation", list, where)
            except FieldError as error:
                source.report.drop(
                    error.reason, error.where, error.what, len(listed(entry, "annotation"))
                )
                continue
            steps = [
                _step(source, step, f"{where}: step {i}") for i, step in enumerate(annotations)
            ]
            build = functools.partial(_step_record, source, question, name, video, task, steps)
            numbers = ((f"{where}: step {i}", i) for i, step in enumerate(steps) if step)
            yield from count_records(numbers, build, source.report)

    def labels(entry: Any) -> Iterator[str]:
        for step in listed(entry, "annotation"):
            with contextlib.suppress(FieldError):
                yield _step_label(step, FILE)

    return _read(source, records, labels, lambda entry: len(listed(entry, "annotation")))


def _step_record(
    source: Source,
    question: _Question,
    name: str,
    video: str,
    task: str,
    steps: Sequence[_Step | None],
    where: str,
    index: int,
) -> Record:
    labels = question.labels(steps, index, where)
    return clip_record(
        source,
        record_id=f"{name}/{index}",
        video=video,
        start=steps[index].start,
        end=steps[index].end,
        question=question.text(len(labels), task),
        labels=labels,
        where=f"{where}: field 'segment'",
    )


def _read_tasks(source: Source) -> Parsed:
    """One record per video, about the part that shows its task."""
    stored = StoredNames(source.videos)

    def build(where: str, named: tuple[str, Any]) -> Record:
        name, entry = named
        return clip_record(
            source,
            record_id=name,
            video=stored.find(where, name),
            start=seconds_field(entry, "start", where),
            end=seconds_field(entry, "end", where),
            question=f"What is the overall activity in the video? {_CONCISELY}",
            labels=[label(_task_name(entry, where))],
            where=f"{where}: fields 'start' and 'end'",
        )

    def labels(entry: Any) -> Iterator[str]:
        with contextlib.suppress(FieldError):
            yield label(_task_name(entry, FILE))

    return _read(
        source,
        lambda entries: count_records(entries, build, source.report),
        labels,
        lambda entry: 1,
    )


def _read(
    source: Source,
    records: Callable[[Iterable[tuple[str, tuple[str, Any]]]], Iterator[Record]],
    labels: Callable[[Any], Iterator[str]],
    count: Callable[[Any], int],
) -> Parsed:
    """Reads the file.

    Args:
      source: where it is.
      records: gives and counts the records of a split, given what error messages call each entry,
        its YouTube id and the entry.
      labels: those of an entry.
      count: number of annotations of an entry.
    """
    path = source.directory / FILE
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; download it from {coin_page.HOME}")
    splits: dict[str, list[tuple[str, tuple[str, Any]]]] = {"train": [], "test": []}
    classes, seen = set(), set()
    for name, entry in object_members(path, "database"):
        where = f"{FILE}: {name}"
        classes.update(labels(entry))
        try:
            if name in seen:
                raise FieldError("duplicate id", where, "an entry of that name came before")
            seen.add(name)
            splits[_split(entry, where)].append((where, (name, entry)))
        except FieldError as error:
            source.report.drop(error.reason, error.where, error.what, count(entry))
    return Parsed(
        splits={split: records(entries) for split, entries in splits.items()},
        # Sorted, because of several nearest labels the first counts.
        labels=tuple(sorted(classes)),
    )


def _split(entry: Any, where: str) -> str:
    """The split of a video: its subset contains "train" or "test", as data/coin/coin.py asks."""
    subset = text_field(entry, "subset", where)
    for split in ("train", "test"):
        if split in subset.lower():
            return split
    raise FieldError(
        "unknown subset",
        f"{where}: field 'subset'",
        f"expected 'training' or 'testing', found {shown(subset)}",
    )


def _step(source: Source, annotation: Any, where: str) -> _Step | None:
    """A step, or None for one that was dropped."""
    try:
        segment = field(annotation, "segment", list, where)
        if len(segment) != 2:
            raise FieldError(
                "wrong type",
                f"{where}: field 'segment'",
                f"expected a start and an end, found {shown(segment)}",
            )
        times = dict(zip(("start", "end"), segment, strict=True))
        return _Step(
            seconds_field(times, "start", f"{where}: field 'segment'"),
            seconds_field(times, "end", f"{where}: field 'segment'"),
            _step_label(annotation, where),
        )
    except FieldError as error:
        source.report.drop(error.reason, error.where, error.what)
        return None


def _step_label(annotation: Any, where: str) -> str:
    name = text_field(annotation, "label", where)
    return label(_STEP_NAMES.get(name, name))


def _task_name(entry: Any, where: str) -> str:
    return task_name(text_field(entry, "class", where))


DATASETS = (
    Dataset(
        name="coin_step",
        page=coin_page.STEP,
        read=functools.partial(_read_steps, _Question(0, 1)),
        benchmark="labels",
    ),
    Dataset(
        name="coin_next",
        page=coin_page.NEXT,
        read=functools.partial(_read_steps, _Question(1, 2)),
        benchmark="labels",
    ),
    Dataset(
        name="coin_task",
        page=coin_page.TASK,
        read=_read_tasks,
        benchmark="labels",
    ),
    Dataset(
        name="coin_procedure",
        page=coin_page.PROCEDURE,
        read=functools.partial(_read_steps, _Question(1, 6)),
        benchmark="steps",
    ),
    Dataset(
        name="coin_procedure_goal",
        page=coin_page.PROCEDURE_GOAL,
        read=functools.partial(_read_steps, _Question(1, 6, goal=True)),
        benchmark="steps",
    ),
)
