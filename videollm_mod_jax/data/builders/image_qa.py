"""`image_qa_gqa`, `image_qa_scienceqa`, and, of `image_yes_no`, `image_qa_pope`, `image_qa_mme`."""

from collections.abc import Iterator
from typing import Any

from videollm_mod_jax.data.annotations import (
    Dataset,
    FieldError,
    Parsed,
    Record,
    Source,
    field,
    shown,
    text_field,
)
from videollm_mod_jax.data.builders import image_yes_no, questions
from videollm_mod_jax.errors import UserError

GQA_PAGE = """\
# image_qa_gqa

GQA, test-dev balanced: 12,578 questions with short answers.

## Where to get it
https://cs.stanford.edu/people/dorarad/gqa/download.html: `questions1.2.zip` and `images.zip`.

## Files
`testdev_balanced_questions.json`: an object from question id to

    {"question": "Is it overcast?", "imageId": "n161313", "answer": "no", "types": {...}, ...}

LLaVA's `llava_gqa_testdev_balanced.jsonl` has the same questions without answers, so it is not
needed. Encode the folder of `images`.

## Records
Splits: `test`.

It is test-dev, whose answers are published, and on which papers report. One per question, called by
its id: the image, the question as LLaVA-1.5 puts it (docs/Evaluation.md), and `answer`.

    Is it overcast?
    Answer the question using a single word or phrase.

## Dropped
- "unknown video", "ambiguous video", "no frames": images that the features lack.
- Fields that are missing, mistyped, empty, too long, or hold `<v>` or half of a surrogate pair.
"""

SCIENCEQA_PAGE = """\
# image_qa_scienceqa

ScienceQA, the questions that have an image: 2,017 of the 4,241 of the test split, which papers call
SQA-IMG or SQA-I.

## Where to get it
https://github.com/lupantech/ScienceQA: `problems.json`, `pid_splits.json` and the images.

## Files
`problems.json`, an object from problem id to

    {"question": "Which ...?", "choices": ["A fox", "A bee"], "answer": 1, "hint": "", "image":
     "image.png", "subject": "natural science", ...}

(`image` is null without one), and `pid_splits.json`, an object from `train`, `val` and `test` to
lists of problem ids. Images are called `test/1/image` or `1/image`: encode the folder of `images`.

## Records
Splits: `train`, `validation`, `test`.

One per problem with an image, called by its published split and id, such as `val/1`: the image, the
problem, and the letter of the right choice. The text is that of LLaVA's `llava_test_CQM-A.json`
(scripts/convert_sqa_to_llava_base_prompt.py) with what `model_vqa_science.py --single-pred-prompt`
adds:

    Context: N/A
    Question: Which ...?
    Options: (A) A fox (B) A bee
    Answer with the option's letter from the given choices directly.

## Target
`options` (the choices), `subject` (natural, social or language science).

## Dropped
- "no image": problems without one. A stream without frames is nothing that this model sees; the
  accuracy that is left is that of LLaVA's "IMG-Accuracy".
- "unknown problem": ids of `pid_splits.json` that `problems.json` lacks.
- "bad choices", "unknown answer": not 2 to 5 texts, not the place of one.
- "unknown video", "ambiguous video", "no frames": images that the features lack.
- "duplicate id".
- Fields that are missing, mistyped, empty, too long, or hold `<v>` or half of a surrogate pair.
"""

_GQA = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
_SCIENCEQA = "https://github.com/lupantech/ScienceQA"
_SPLITS = {"train": "train", "validation": "val", "test": "test"}


def _read_gqa(source: Source) -> Parsed:
    path = source.directory / "testdev_balanced_questions.json"
    entries = questions.keyed(path, _GQA)
    names = questions.StoredNames(source.videos)

    def annotations() -> Iterator[tuple[str, tuple[str, Any]]]:
        for question_id, entry in entries:
            yield f"{path.name}: {shown(question_id)}", (question_id, entry)

    def build(where: str, keyed: tuple[str, Any]) -> Record:
        question_id, entry = keyed
        exchange = (
            text_field(entry, "question", where) + questions.SHORT_ANSWER,
            text_field(entry, "answer", where),
        )
        image = text_field(entry, "imageId", where)
        # The same image may be in the store a second time, as one of Visual Genome.
        stored = names.find(where, f"images/{image}", image)
        return questions.whole_video(question_id, stored, [exchange], source, {})

    return Parsed({"test": questions.count_records(annotations(), build, source.report)})


def _read_scienceqa(source: Source) -> Parsed:
    problems = questions.whole(source.directory / "problems.json", _SCIENCEQA)
    splits = questions.whole(source.directory / "pid_splits.json", _SCIENCEQA)
    for prefix in _SPLITS.values():
        if not isinstance(splits.get(prefix), list):
            raise UserError(
                f"{source.directory / 'pid_splits.json'}: field '{prefix}': expected a list of "
                f"problem ids, found {shown(splits.get(prefix))}; download it from {_SCIENCEQA}"
            )
    names = questions.StoredNames(source.videos)

    def annotations(prefix: str) -> Iterator[tuple[str, tuple[str, Any]]]:
        for i, problem_id in enumerate(splits[prefix]):
            yield f"pid_splits.json: {prefix}: problem {i}", (prefix, problem_id)

    def build(where: str, placed: tuple[str, Any]) -> Record:
        prefix, problem_id = placed
        if not isinstance(problem_id, str) or problem_id not in problems:
            raise FieldError("unknown problem", where, f"problems.json has no {shown(problem_id)}")
        where, problem = f"problems.json: {shown(problem_id)}", problems[problem_id]
        if field(problem, "image", (str, type(None)), where) is None:
            raise FieldError("no image", where, "the problem has none")
        exchange, target = _problem(where, problem)
        folder = f"{problem_id}/{questions.without_extension(problem['image'])}"
        stored = names.find(where, f"{prefix}/{folder}", folder)
        return questions.whole_video(f"{prefix}/{problem_id}", stored, [exchange], source, target)

    return Parsed(
        {
            split: questions.count_records(annotations(prefix), build, source.report)
            for split, prefix in _SPLITS.items()
        }
    )


def _problem(where: str, problem: Any) -> tuple[tuple[str, str], dict[str, Any]]:
    """The question and answer of a problem of ScienceQA, and its target."""
    choices = field(problem, "choices", list, where)
    if not 2 <= len(choices) <= len(questions.OPTIONS) or not all(
        isinstance(choice, str) and choice.strip() for choice in choices
    ):
        raise FieldError(
            "bad choices",
            f"{where}: field 'choices'",
            f"expected 2 to {len(questions.OPTIONS)} texts, found {shown(choices)}",
        )
    answer = field(problem, "answer", int, where)
    if not 0 <= answer < len(choices):
        raise FieldError(
            "unknown answer",
            f"{where}: field 'answer'",
            f"expected 0 to {len(choices) - 1}, found {shown(answer)}",
        )
    context = field(problem, "hint", str, where).strip() or "N/A"
    question = text_field(problem, "question", where)
    listed = " ".join(
        f"({letter}) {choice}" for letter, choice in zip(questions.OPTIONS, choices, strict=False)
    )
    text = f"Context: {context}\nQuestion: {question}\nOptions: {listed}"
    # LLaVA's script does this to the whole text.
    text = text.replace("  ", " ").strip() + questions.OPTION_LETTER
    target = {"options": choices, "subject": text_field(problem, "subject", where)}
    return (text, questions.OPTIONS[answer]), target


DATASETS = (
    Dataset(name="image_qa_gqa", page=GQA_PAGE, read=_read_gqa, benchmark="vqa"),
    Dataset(
        name="image_qa_scienceqa", page=SCIENCEQA_PAGE, read=_read_scienceqa, benchmark="choices"
    ),
    *image_yes_no.DATASETS,
)
