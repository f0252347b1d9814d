"""`image_qa_pope` and `image_qa_mme`: questions about images that are answered by yes or no."""

from collections.abc import Iterator
from pathlib import Path
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
from videollm_mod_jax.data.builders import questions
from videollm_mod_jax.errors import UserError

POPE_PAGE = """\
# image_qa_pope

POPE on COCO: whether an object is in an image, where the absent objects are random, popular, or
likely beside those that are there (adversarial): about 3,000 questions each, on 500 images.

## Where to get it
https://github.com/AoiDragon/POPE, folder `output/coco` (LLaVA-1.5 takes it at commit e3e3926);
images of COCO, `val2014`.

## Files
`coco_pope_random.json`, `coco_pope_popular.json` and `coco_pope_adversarial.json`, whichever there
are: one object per line,

    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in
     the image?", "label": "yes"}

(not broken as here). Encode `val2014`.

## Records
Splits: `test`.

One per question, called by its file and question_id, such as `adversarial/1`: the image, the
question as LLaVA-1.5 puts it, and `label`.

    Is there a snowboard in the image?
    Answer the question using a single word or phrase.

## Target
`split`: random, popular or adversarial.

## Dropped
- "not json": damaged lines. "unknown label": neither yes nor no. "duplicate id".
- "unknown video", "ambiguous video", "no frames": images that the features lack.
- Fields that are missing, mistyped, empty, too long, or hold `<v>` or half of a surrogate pair.
"""

MME_PAGE = """\
# image_qa_mme

MME: 14 tasks of yes-or-no questions, two for every image: 2,374 questions.

## Where to get it
https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation:
`MME_Benchmark_release_version.zip`.

## Files
The source directory holds the folders of the tasks (`MME_Benchmark_release_version`, in some
archives its folder `MME_Benchmark`), whichever there are: existence, count, position, color,
posters, celebrity, scene, landmark, artwork, OCR (perception); commonsense_reasoning,
numerical_calculation, text_translation, code_reasoning (cognition). In each, beside the images or
in `questions_answers_YN`, one text file per image, `000000006040.txt`, with a question, a tab and
the answer on each line:

    Is there a pottedplant in this image? Please answer yes or no.  Yes

Encode the source directory itself: images are then called `existence/000000006040`, or
`artwork/images/14777` where they have a folder of their own.

## Records
Splits: `test`.

One per question, such as `existence/000000006040/1`: the image, the question as LLaVA-1.5 puts it
("Please answer yes or no." replaced by its own instruction), and the answer.

    Is there a pottedplant in this image?
    Answer the question using a single word or phrase.

## Target
`task` and `image` (its name in the task), by which acc+ finds the two questions of an image.

## Dropped
- "bad line": not a question, a tab, and yes or no. "reserved text": a question with `<v>`.
- "unpaired question": the other lines of an image that does not have exactly two good ones, for
  which acc+ is not defined.
- "unknown video", "ambiguous video", "no frames": images that the features lack.
"""

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
"""Tasks of MME, in the order of its table."""
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)

_POPE = "https://github.com/AoiDragon/POPE"
_MME = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
_POPE_SPLITS = ("random", "popular", "adversarial")
_MME_INSTRUCTION = "Please answer yes or no."


def _read_pope(source: Source) -> Parsed:
    paths = {name: source.directory / f"coco_pope_{name}.json" for name in _POPE_SPLITS}
    paths = {name: path for name, path in paths.items() if path.is_file()}
    if not paths:
        raise UserError(
            f"{source.directory}: expected coco_pope_random.json, coco_pope_popular.json or "
            f"coco_pope_adversarial.json, found none; download them from {_POPE}"
        )
    names = questions.StoredNames(source.videos)

    def annotations() -> Iterator[tuple[str, tuple[str, str]]]:
        for split, path in paths.items():
            for where, line in questions.lines(path, _POPE):
                yield where, (split, line)

    def build(where: str, placed: tuple[str, str]) -> Record:
        split, line = placed
        entry = questions.parsed_line(where, line)
        question_id = field(entry, "question_id", int, where)
        label = text_field(entry, "label", where)
        if label not in ("yes", "no"):
            raise FieldError(
                "unknown label",
                f"{where}: field 'label'",
                f"expected yes or no, found {shown(label)}",
            )
        exchange = (text_field(entry, "text", where) + questions.SHORT_ANSWER, label)
        image = names.find(where, questions.without_extension(text_field(entry, "image", where)))
        return questions.whole_video(
            f"{split}/{question_id}", image, [exchange], source, {"split": split}
        )

    return Parsed({"test": questions.count_records(annotations(), build, source.report)})


def _read_mme(source: Source) -> Parsed:
    tasks = [task for task in PERCEPTION + COGNITION if (source.directory / task).is_dir()]
    if not tasks:
        raise UserError(
            f"{source.directory}: expected folders of tasks, such as existence, found none; "
            f"download them from {_MME} and give the folder that holds them"
        )
    names = questions.StoredNames(source.videos)

    def annotations() -> Iterator[tuple[str, Any]]:
        for task in tasks:
            folder = source.directory / task
            separate = folder / "questions_answers_YN"
            for path in sorted((separate if separate.is_dir() else folder).glob("*.txt")):
                for number, (where, *rest) in enumerate(_pair(path), start=1):
                    yield f"{task}: {where}", (task, path.stem, number, *rest)

    def build(where: str, entry: Any) -> Record:
        task, image, number, line, exchange, complete = entry
        if exchange is None:
            raise FieldError(
                "bad line", where, f"expected a question, a tab, and yes or no, found {shown(line)}"
            )
        if not complete:
            raise FieldError("unpaired question", where, "expected two good lines in the file")
        stored = names.find(where, f"{task}/images/{image}", f"{task}/{image}")
        target = {"task": task, "image": image}
        return questions.whole_video(f"{task}/{image}/{number}", stored, [exchange], source, target)

    return Parsed({"test": questions.count_records(annotations(), build, source.report)})


def _pair(path: Path) -> list[tuple[str, str, tuple[str, str] | None, bool]]:
    """Each line of an image: where it is, its text, its exchange, whether all two are good."""
    lines = list(questions.lines(path, _MME))
    exchanges = [_exchange(line) for _, line in lines]
    complete = len(exchanges) == 2 and None not in exchanges
    return [
        (where, line, exchange, complete)
        for (where, line), exchange in zip(lines, exchanges, strict=True)
    ]


def _exchange(line: str) -> tuple[str, str] | None:
    question, tab, answer = line.rpartition("\t")
    question, answer = question.replace(_MME_INSTRUCTION, "").strip(), answer.strip()
    if not (tab and question and answer in ("Yes", "No")):
        return None
    return question + questions.SHORT_ANSWER, answer


DATASETS = (
    Dataset(name="image_qa_pope", page=POPE_PAGE, read=_read_pope, benchmark="yes_no"),
    Dataset(name="image_qa_mme", page=MME_PAGE, read=_read_mme, benchmark="mme"),
)
