"""`llava_instruct`: conversations about images and videos, to learn to follow instructions."""

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
from videollm_mod_jax.data.builders import questions
from videollm_mod_jax.errors import UserError

PAGE = """\
# llava_instruct

Conversations about images and videos in the layout of LLaVA: what LLaVA-1.5, Video-LLaVA,
LLaVA-Video and Video-ChatGPT learn from.

## Where to get it
- Images: `llava_v1_5_mix665k.json` from https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K
  (665,298 samples); its README and haotian-liu/LLaVA, "Visual Instruction Tuning", say where the
  images of COCO, GQA, OCR-VQA, TextVQA and Visual Genome come from.
- Videos: `VideoInstruct100K.json` from https://huggingface.co/datasets/MBZUAI/VideoInstruct-100K,
  or the json files of https://huggingface.co/datasets/lmms-lab/LLaVA-Video-178K.

## Files
Every `*.json` directly in the source directory is read, in order of name, so give these files a
directory of their own. Each is a list of samples like

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                       {"from": "gpt", "value": "A bus."}]}

with `video` instead of `image` for videos, or, as VideoInstruct100K is published,

    {"q": "What is it?", "a": "A bus.", "video_id": "v_k_ZXmr8pmrs"}

Encode the folder to which the paths are relative (LLaVA's `playground/data`); a path also finds the
only stored video or image whose name ends in it. Extensions do not matter.

## Records
Splits: `train`.

One per sample. As in LLaVA (llava/train/train.py, `preprocess_multimodal`) `<image>` and `<video>`
are taken out of the text, and the image or video comes first; then all turns, at its end. All
answers are learnt. A video of more than `max_frames` frames is shown with a stride. Ids of samples
repeat in the published files, so a record is called after its file and place:
`llava_v1_5_mix665k/17`.

## Dropped
- "no image or video": text-only samples, 40,688 in `llava_v1_5_mix665k.json` (ShareGPT; see
  haotian-liu/LLaVA issue 546). A stream without frames is nothing that this model sees.
- "image and video": samples with both.
- "unpaired turns", "turn out of order": conversations other than human, gpt, human, gpt ...
- "unknown video", "ambiguous video", "no frames": what the features lack. Some OCR-VQA images are
  no longer online.
- Fields that are missing, mistyped, empty, too long, or hold `<v>` or half of a surrogate pair.
"""

_DOWNLOAD = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"
_SPEAKERS = ("human", "gpt")


def _read(source: Source) -> Parsed:
    paths = sorted(source.directory.glob("*.json"))
    if not paths:
        raise UserError(
            f"{source.directory}: there is no *.json; download llava_v1_5_mix665k.json from "
            f"{_DOWNLOAD} to it"
        )
    names = questions.StoredNames(source.videos)

    def samples() -> Iterator[tuple[str, tuple[str, Any]]]:
        for path in paths:
            for i, (where, sample) in enumerate(questions.numbered(path, _DOWNLOAD)):
                yield where, (f"{path.stem}/{i}", sample)

    def build(where: str, named: tuple[str, Any]) -> Record:
        record_id, sample = named
        video, exchanges = _conversation(where, sample)
        return questions.whole_video(record_id, names.find(where, video), exchanges, source, {})

    return Parsed({"train": questions.count_records(samples(), build, source.report)})


def _conversation(where: str, sample: Any) -> tuple[str, list[tuple[str, str]]]:
    """The video of a sample, and its questions with their answers."""
    if isinstance(sample, dict) and "q" in sample:
        exchange = (text_field(sample, "q", where), text_field(sample, "a", where))
        return text_field(sample, "video_id", where), [exchange]
    turns = field(sample, "conversations", list, where)
    kinds = [kind for kind in ("image", "video") if sample.get(kind) is not None]
    if len(kinds) != 1:
        reason = " and ".join(kinds) or "no image or video"
        raise FieldError(reason, where, f"expected 'image' or 'video' in {shown(sorted(sample))}")
    video = questions.without_extension(text_field(sample, kinds[0], where))
    if not turns or len(turns) % 2:
        raise FieldError(
            "unpaired turns",
            f"{where}: field 'conversations'",
            f"expected questions with their answers, found {len(turns)} turns",
        )
    texts = [_text(turn, i, f"{where}: turn {i}") for i, turn in enumerate(turns)]
    return video, list(zip(texts[::2], texts[1::2], strict=True))


def _text(turn: Any, place: int, where: str) -> str:
    speaker, text = text_field(turn, "from", where), text_field(turn, "value", where)
    expected = _SPEAKERS[place % 2]
    if speaker != expected:
        raise FieldError(
            "turn out of order",
            f"{where}: field 'from'",
            f"expected '{expected}', found {shown(speaker)}",
        )
    text = text.replace("<image>", "").replace("<video>", "").strip()
    if not text:
        raise FieldError("empty text", f"{where}: field 'value'", "expected more than an image")
    return text


DATASETS = (Dataset(name="llava_instruct", page=PAGE, read=_read, benchmark="stream"),)
