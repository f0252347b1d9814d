"""Runs a benchmark: predicts what is missing, shared by all processes, and scores all of it.

A benchmark has one part or two. Where answers are asked for: "answers". Where a model speaks on its
own: "teacher-forced", every turn judged on the true history, as VideoLLM-online does, and
"self-conditioned", the model's own words as history.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import progress

from videollm_mod_jax.data.annotations import Record
from videollm_mod_jax.data.pipeline import Examples
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation import captions, timing
from videollm_mod_jax.evaluation.answers import Decoding, answer_records
from videollm_mod_jax.evaluation.benchmarks import BENCHMARKS, Benchmark, Marking, Scores
from videollm_mod_jax.evaluation.judge import Judge
from videollm_mod_jax.evaluation.narrating import watch_records
from videollm_mod_jax.evaluation.prompts import split_reference
from videollm_mod_jax.evaluation.samples import INDEX, Row, Samples, in_order
from videollm_mod_jax.evaluation.stream import evaluate_stream
from videollm_mod_jax.evaluation.stream_metrics import StreamMetrics, mean_metrics
from videollm_mod_jax.evaluation.timing import Narration
from videollm_mod_jax.training import distributed
from videollm_mod_jax.training.checkpoint import LoadedModel

STREAM = "stream"
ANSWERS, TEACHER_FORCED, SELF_CONDITIONED = "answers", "teacher-forced", "self-conditioned"

# FlowNar's threshold (`evaluate_metrics.py` of zeyun-zhong/FlowNar).
_MIN_IOU = 0.5
_BATCHES_PER_CHUNK = 16
"""Teacher-forced streams are kept after so many batches, which every process has to finish."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated, and how.

    Attributes:
      model: weights, config and tokenizer.
      examples: of a split, undisturbed.
      labels: of the dataset.
      batch_size: conversations at a time, over all processes.
      answer_tokens: longest answer with its eos.
      silence_threshold: see `triggers.breaks_silence`.
      judge: of open answers.
      seed: of sampling.
    """

    model: LoadedModel
    examples: Examples
    labels: tuple[str, ...]
    batch_size: int
    answer_tokens: int
    silence_threshold: float | None
    judge: Judge
    seed: int

    @property
    def own_batch_size(self) -> int:
        """Conversations at a time in this process."""
        own, rest = divmod(self.batch_size, jax.process_count())
        if rest or not own:
            raise UserError(
                f"batch size: expected a multiple of the {jax.process_count()} processes, found "
                f"{self.batch_size}"
            )
        return own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One way in which a benchmark looks at all records.

    Attributes:
      name: of the part.
      settings: what its rows depend on beside the model and the records, as json types.
      predict: gives the rows of this process, of the records with these indices; all processes
        call it with the same ones.
      score: numbers by name, of the rows of all records.
    """

    name: str
    settings: dict[str, Any]
    predict: Callable[[Sequence[int]], Iterator[Row]]
    score: Callable[[Sequence[Row]], Scores]


def parts_of(kind: str, subject: Subject) -> tuple[Part, ...]:
    """The parts of a kind of benchmark.

    Raises:
      UserError: there is no such kind.
    """
    if kind == STREAM:
        return (_teacher_forced(subject), _self_conditioned(subject))
    if kind not in BENCHMARKS:
        raise UserError(
            f"the dataset's benchmark is {kind!r}; expected one of "
            f"{', '.join((STREAM, *BENCHMARKS))}; prepare the dataset again"
        )
    return (_answers(BENCHMARKS[kind], subject),)


def run_part(
    part: Part, examples: Examples, name: str, settings: dict[str, Any], out: Path
) -> Scores:
    """Predicts the rows that are missing in `out`, publishes all of them as NAME.jsonl, and scores.

    Args:
      part: which.
      examples: of the split.
      name: of the rows' file.
      settings: what the rows depend on beside those of the part, as json types.
      out: directory of the evaluation.

    Raises:
      UserError: rows of other settings are there, or a record cannot be evaluated.
    """
    process, processes = jax.process_index(), jax.process_count()
    with distributed.lead_first(name):
        samples = Samples(out, name, settings | part.settings, process, processes)
    done = set(itertools.chain.from_iterable(distributed.gather(list(samples.rows))))
    for row in part.predict([i for i in range(len(examples)) if i not in done]):
        samples.add(row)
    everyone = distributed.gather(list(samples.rows.values()))
    rows = in_order(everyone, [record.id for record in examples.records], name)
    if distributed.is_lead():
        samples.publish(rows)
    return part.score(rows)


def _answers(benchmark: Benchmark, subject: Subject) -> Part:
    decoding = Decoding(
        max_new_tokens=subject.answer_tokens,
        temperature=benchmark.temperature,
        samples=benchmark.samples,
        seed=subject.seed,
    )
    marking, examples = Marking(subject.labels, subject.judge), subject.examples
    settings = dataclasses.asdict(decoding)
    if benchmark.judged:
        settings["judge"] = subject.judge.name

    def predict(indices: Sequence[int]) -> Iterator[Row]:
        answered = answer_records(
            subject.model, examples, _own(indices), decoding, batch_size=subject.own_batch_size
        )
        for index, prompt, answers in _track(answered, ANSWERS, indices):
            record = examples.records[index]
            _, reference = split_reference(examples.conversation(index))
            said = {"answers": list(answers)} if len(answers) > 1 else {"answer": answers[0]}
            row = {"prompt": prompt.text, **said, "reference": reference}
            marks = _mark(benchmark, record, answers, reference, marking)
            yield _identity(index, record) | row | marks

    return Part(
        name=ANSWERS,
        settings=settings,
        predict=predict,
        score=lambda rows: benchmark.score(rows, marking),
    )


def _mark(
    benchmark: Benchmark,
    record: Record,
    answers: Sequence[str],
    reference: str | None,
    marking: Marking,
) -> dict[str, Any]:
    if reference is None and benchmark.needs_reference:
        raise UserError(
            f"{record.id}: field 'turns': expected an answer of the assistant, found none; choose "
            "a split whose answers are published"
        )
    try:
        return benchmark.mark(record, answers, reference, marking)
    except UserError:
        raise
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{record.id}: field 'target': expected what its benchmark needs, found "
            f"{dict(record.target)} ({error}); prepare the dataset again"
        ) from error


def _teacher_forced(subject: Subject) -> Part:
    examples, names = subject.examples, [f.name for f in dataclasses.fields(StreamMetrics)]

    def predict(indices: Sequence[int]) -> Iterator[Row]:
        size = _BATCHES_PER_CHUNK * subject.batch_size
        for start in range(0, len(indices), size):
            chunk = indices[start : start + size]
            report = evaluate_stream(
                subject.model,
                dataclasses.replace(examples, records=[examples.records[i] for i in chunk]),
                batch_size=subject.batch_size,
                silence_threshold=subject.silence_threshold,
            )
            for index, sample in zip(chunk, report.samples, strict=True):
                metrics = dataclasses.asdict(sample.metrics)
                if distributed.is_lead():
                    row = _identity(index, examples.records[index]) | {"turns": sample.turns}
                    yield row | {k: None if math.isnan(v) else v for k, v in metrics.items()}

    def score(rows: Sequence[Row]) -> Scores:
        values = ({n: math.nan if row[n] is None else row[n] for n in names} for row in rows)
        means = dataclasses.asdict(mean_metrics(StreamMetrics(**value) for value in values))
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}

    settings = {"silence_threshold": subject.silence_threshold}
    return Part(name=TEACHER_FORCED, settings=settings, predict=predict, score=score)


def _self_conditioned(subject: Subject) -> Part:
    examples = subject.examples

    def predict(indices: Sequence[int]) -> Iterator[Row]:
        watched = watch_records(
            subject.model,
            examples,
            _own(indices),
            batch_size=subject.own_batch_size,
            max_new_tokens=subject.answer_tokens,
            silence_threshold=subject.silence_threshold,
        )
        for index, said in _track(watched, SELF_CONDITIONED, indices):
            yield _identity(index, examples.records[index]) | {
                "start": said.start,
                "narrations": [[one.time, one.text] for one in said.narrations],
                "truth": [[one.time, one.text] for one in said.truth],
                "answers": [list(one) for one in said.answers],
                "full_at": said.full_at,
            }

    settings = {
        "silence_threshold": subject.silence_threshold,
        "answer_tokens": subject.answer_tokens,
    }
    fps = examples.features.meta.fps
    return Part(
        name=SELF_CONDITIONED,
        settings=settings,
        predict=predict,
        score=lambda rows: narration_scores(rows, window=1 / fps),
    )


def narration_scores(rows: Sequence[Row], *, window: float) -> Scores:
    """Timing and words of what was said unasked, over videos that have true narrations.

    `f1` and `cider` are FlowNar's: stretches that overlap by half, and the words of the nearest
    stretch for every true narration. `f1_in_window` asks for the right moment instead. A stretch
    holds the frames that were seen for its narration, so that what is said at the first frame has
    a stretch of one frame.

    Args:
      rows: with `start`, `narrations` and `truth`.
      window: seconds by which a narration may be early or late: one frame.

    Returns:
      precision, recall, f1 and f1_in_window in [0, 1], cider in [0, 10]; nothing where no video has
      a narration.
    """
    videos = [
        ([Narration(*n) for n in row["narrations"]], [Narration(*n) for n in row["truth"]], row)
        for row in rows
        if row["truth"]
    ]
    if not videos:
        return {}
    segments = timing.mean_scores(
        timing.segment_scores(said, true, start=row["start"] - window, min_iou=_MIN_IOU)
        for said, true, row in videos
    )
    windows = timing.mean_scores(
        timing.window_scores(said, true, window=window) for said, true, _ in videos
    )
    pairs = [
        pair
        for said, true, row in videos
        for pair in timing.segment_pairs(said, true, start=row["start"] - window)
    ]
    words = captions.cider([said for said, _ in pairs], [[true] for _, true in pairs])
    return {
        **dataclasses.asdict(segments),
        "f1_in_window": windows.f1,
        "cider": words.mean,
    }


def _identity(index: int, record: Record) -> Row:
    return {INDEX: index, "id": record.id, "video": record.video}


def _own(indices: Sequence[int]) -> Sequence[int]:
    """This process's share of records."""
    return indices[jax.process_index() :: jax.process_count()]


def _track(rows: Iterable[Any], title: str, indices: Sequence[int]) -> Iterable[Any]:
    """A progress bar over this process's records, shown by the first one."""
    total = len(_own(indices))
    return progress.track(rows, title, total=total, disable=not distributed.is_lead())
