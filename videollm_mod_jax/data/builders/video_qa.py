"""`video_qa_msvd`, `video_qa_msrvtt`, `video_qa_activitynet`: open questions about short videos."""

import contextlib
import functools
from collections.abc import Callable, Mapping
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

MSVD = MSRVTT = "https://github.com/xudejing/video-question-answering"
ACTIVITYNET = "https://github.com/MILVLG/activitynet-qa/tree/master/dataset"

_RECORDS = """
## Records
Splits: `train`, `validation`, `test`.

One per question: the whole video, then the question as published and nothing else, as
Video-ChatGPT, Video-LLaVA and LLaMA-VID put it (`run_inference_activitynet_qa.py`,
`run_inference_video_qa.py`, `model_activitynet_qa.py`), then the answer. A video of more than
`max_frames` frames is shown with a stride. A record is called after its split and question id:
`test/37348`. A split whose files are not there is left out.

## Dropped
- "unknown video", "ambiguous video", "no frames": what the features lack.
- "no answer": questions whose id is not in the file of answers, or whose answer there is damaged.
- "duplicate id": all questions of an id but the first.
- Fields that are missing, mistyped, empty, too long, or hold `<v>` or half of a surrogate pair.
"""

_ORIGINAL = """
For each split either the file of the dataset's authors (xudejing/video-question-answering),
`train_qa.json`, `val_qa.json`, `test_qa.json`, a list of

    {{"id": 37348, "video_id": 1301, "question": "what is a man doing?", "answer": "cook"}}

or, where that is absent, the two files of the zero-shot evaluation of Video-ChatGPT and
Video-LLaVA, `test_q.json` and `test_a.json`, lists of

    {{"video_name": "{name}", "question": "what is a man doing?", "question_id": "0"}}
    {{"answer": "cook", "question_id": "0"}}
"""

MSVD_PAGE = (
    """\
# video_qa_msvd

MSVD-QA: 50,505 questions about 1,970 clips, evaluated by a judge with open answers.

## Where to get it
https://github.com/xudejing/video-question-answering (Mendeley, h5j7cpwnvn); the videos with it, or
`YouTubeClips` of https://www.cs.utexas.edu/~ml/clamp/videoDescription/.

## Files
"""
    + _ORIGINAL.format(name="-4wsuPCjDBc_5_15").lstrip()
    + """
The videos are called `vid1301` (with the questions) or `-4wsuPCjDBc_5_15` (YouTubeClips). For the
latter put `youtube_mapping.txt`, with lines `-4wsuPCjDBc_5_15 vid1`, beside `*_qa.json`.
"""
    + _RECORDS
)

MSRVTT_PAGE = (
    """\
# video_qa_msrvtt

MSRVTT-QA: 243,000 questions about 10,000 clips, evaluated by a judge with open answers.

## Where to get it
https://github.com/xudejing/video-question-answering (Mendeley, bvxhs33bw6); the videos of MSR-VTT.

## Files
"""
    + _ORIGINAL.format(name="video7010").lstrip()
    + """
The videos are called `video7010`.
"""
    + _RECORDS
)

ACTIVITYNET_PAGE = (
    """\
# video_qa_activitynet

ActivityNet-QA: 32,000, 18,000 and 8,000 questions about 3,200, 1,800 and 800 videos for training,
validation and test, evaluated by a judge with open answers.

## Where to get it
https://github.com/MILVLG/activitynet-qa/tree/master/dataset; the videos of ActivityNet 200.

## Files
`train_q.json` and `train_a.json`, and the same for `val` and `test`, whichever there are: lists of

    {"video_name": "1QIUV7WYKXg", "question": "is the ...", "question_id": "v_1QIUV7WYKXg_3"}
    {"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"}

The videos are called `v_1QIUV7WYKXg` or `1QIUV7WYKXg`.
"""
    + _RECORDS
    + """
## Target
`type`: motion, spatial, temporal, yes/no, color, object, location, number or other (`type` 0 to 8),
by which the authors' `evaluation/eval.py` reports; absent where the answer has none.
"""
)

_TYPES = (
    "motion",
    "spatial",
    "temporal",
    "yes/no",
    "color",
    "object",
    "location",
    "number",
    "other",
)
_SPLITS = {"train": "train", "validation": "val", "test": "test"}

# The names that a video may have in the feature store, given how the questions call it.
_Naming = Callable[[str], tuple[str, ...]]


def _read(source: Source, *, naming: Callable[[Path], _Naming], download: str) -> Parsed:
    names, stored = naming(source.directory), questions.StoredNames(source.videos)

    def build(split: str, answers: Mapping[str, Any] | None, where: str, question: Any) -> Record:
        identity = _identity(question, ("question_id", "id"), where)
        asked = text_field(question, "question", where)
        entry = question if answers is None else answers.get(identity)
        if entry is None:
            raise FieldError("no answer", where, f"none has the question_id {shown(identity)}")
        answer = text_field(entry, "answer", where)
        video = stored.find(where, *names(_identity(question, ("video_name", "video_id"), where)))
        return questions.whole_video(
            f"{split}/{identity}", video, [(asked, answer)], source, _target(entry, where)
        )

    splits = {}
    for split, prefix in _SPLITS.items():
        both, asked = (source.directory / f"{prefix}_{kind}.json" for kind in ("qa", "q"))
        if both.is_file():
            entries, answers = questions.numbered(both, download), None
        elif asked.is_file():
            entries = questions.numbered(asked, download)
            answers = _answers(source.directory / f"{prefix}_a.json", download)
        else:
            continue
        splits[split] = questions.count_records(
            entries, functools.partial(build, split, answers), source.report
        )
    if not splits:
        raise UserError(
            f"{source.directory}: expected the questions of a split, such as test_qa.json, or "
            f"test_q.json and test_a.json, found none; download them from {download}"
        )
    return Parsed(splits)


def _answers(path: Path, download: str) -> dict[str, Any]:
    """The entries of a file of answers by question id."""
    answers: dict[str, Any] = {}
    for where, entry in questions.numbered(path, download):
        # A damaged one is counted with the question that it leaves without an answer.
        with contextlib.suppress(FieldError):
            answers.setdefault(_identity(entry, ("question_id",), where), entry)
    return answers


def _identity(entry: Any, names: tuple[str, ...], where: str) -> str:
    """The field of an entry that says which question or video it is, of those it may have."""
    name = next((n for n in names if isinstance(entry, dict) and n in entry), names[0])
    value = field(entry, name, (str, int), where)
    return str(value) if isinstance(value, int) else text_field(entry, name, where)


def _target(answer: Mapping[str, Any], where: str) -> dict[str, str]:
    if "type" not in answer:
        return {}
    kind = field(answer, "type", int, where)
    if not 0 <= kind < len(_TYPES):
        raise FieldError(
            "unknown type", f"{where}: field 'type'", f"expected 0 to 8, found {shown(kind)}"
        )
    return {"type": _TYPES[kind]}


def _msvd_naming(directory: Path) -> _Naming:
    path, titles = directory / "youtube_mapping.txt", {}
    if path.is_file():
        for _, line in questions.lines(path, MSVD):
            title, _, number = line.partition(" ")
            titles[number.strip()] = title

    def names(video: str) -> tuple[str, ...]:
        name = f"vid{video}" if video.isdigit() else video
        return (name, titles[name]) if name in titles else (name,)

    return names


def _msrvtt_naming(directory: Path) -> _Naming:
    del directory  # no file says how videos are called
    return lambda video: (f"video{video}" if video.isdigit() else video,)


def _activitynet_naming(directory: Path) -> _Naming:
    del directory
    return lambda video: (f"v_{video}", video)


def _dataset(name: str, page: str, naming: Callable[[Path], _Naming], download: str) -> Dataset:
    read = functools.partial(_read, naming=naming, download=download)
    return Dataset(name=name, page=page, read=read, benchmark="open_qa")


DATASETS = (
    _dataset("video_qa_msvd", MSVD_PAGE, _msvd_naming, MSVD),
    _dataset("video_qa_msrvtt", MSRVTT_PAGE, _msrvtt_naming, MSRVTT),
    _dataset("video_qa_activitynet", ACTIVITYNET_PAGE, _activitynet_naming, ACTIVITYNET),
)
