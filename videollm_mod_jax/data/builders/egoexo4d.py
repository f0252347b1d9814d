"""`egoexo4d_keystep`: fine-grained keystep recognition in Ego-Exo4D, from the ego camera.

The layout of the annotations is that of EGO4D/Ego-Exo4D-docs (docs/annotations/keystep.md), the
classes are those of its benchmark (docs/benchmarks/keystep/keystep_recoginition.md).
"""

import collections
import csv
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from videollm_mod_jax.data.annotations import (
    Dataset,
    FieldError,
    Parsed,
    Record,
    Source,
    Videos,
    field,
    seconds_field,
    shown,
    text_field,
)
from videollm_mod_jax.data.builders.clips import clip_record, label
from videollm_mod_jax.data.builders.json_members import object_members
from videollm_mod_jax.data.builders.questions import count_records, listed
from videollm_mod_jax.errors import UserError

CLASSES = "keystep_benchmark/label_mapping.csv"
_FILES = {"train": "keystep_train.json", "validation": "keystep_val.json"}
_DOWNLOAD = "egoexo -o DIR --parts annotations --benchmarks keystep"
_QUESTION = "What is the action in the video? Format your answer concisely. No extra text output."
# Aria's RGB stream; 1201-1, 1201-2 and 211-1 are the side and eye cameras (docs/data/metadata.md).
_EGO_CAMERA = re.compile(r"aria\d+_214-1")

PAGE = f"""\
# egoexo4d_keystep

Which of 278 keysteps of cooking, bicycle repair and health the camera wearer does in a clip.
VideoLLM-MoD names 44.85% right with version 1 of the annotations and 42.62% with version 2.

## Where to get it
https://ego-exo4d-data.org, after its licence (two days), with the `egoexo` command of
https://github.com/facebookresearch/Ego4d:

    {_DOWNLOAD} --release v2

`--release v1` for version 1. `--parts downscaled_takes/448 --views ego` fetches the videos.

## Files
The source directory is DIR/annotations. It has, as published, `keystep_train.json` and
`keystep_val.json`:

    {{"annotations": {{
       "77cd56fc-6b68-4c7f-814b-81545484dd2d": {{      the uid of the take
         "take_name": "georgiatech_covid_07_6",
         "scenario": "Covid-19 Rapid Antigen Test",
         "segments": [
           {{"start_time": 0.85598, "end_time": 33.20377, "step_unique_id": 843,
            "step_name": "Unbox package", "step_id": 31, "step_description": "...",
            "is_essential": true}}, ...]}}, ...}},
     "taxonomy": {{...}}, "vocabulary": {{...}}}}

and `{CLASSES}`, the classes of the benchmark:

    label_id,step_unique_id,step_name,scenario_name
    0,1567,Stir the mixture,cooking

It is published for version 2 only; put the same file there for version 1. A segment whose name is
another than that of its class is dropped, should the versions number their steps differently.

The features are those of the ego camera, encoded from the folder `takes`: a video belongs to a
take when one of its folders is called like the take and it ends in the RGB stream of the glasses,
such as `georgiatech_covid_07_6/frame_aligned_videos/downscaled/448/aria02_214-1`. Other cameras may
be there, but not the same one at two sizes.

## Records
Splits: `train`, `validation`.

The labels of the test split are not published; ProVideLLM (arXiv 2504.13915) takes the results of
VideoLLM-MoD for those of the validation split. One record per segment, essential or not:

    User: {_QUESTION}
    [the frames of the segment]
    Assistant: Unbox package.

The classes are the 278 keysteps that have 20 segments or more. VideoLLM-MoD has published neither
question nor layout; these are the ones of `coin_step`. The first and the last frame are those at or
after the beginning and the end of the segment, and all silence is learnt. Names begin with a
capital and end with a full stop, the rest is in lower case. A segment of more than `max_frames`
frames is shown with a stride. The target is `{{"labels": ["Unbox package."]}}`; the labels of the
dataset are the classes, in alphabetical order.

## Dropped
One annotation is one segment.
- "not a class": a keystep that the benchmark leaves out.
- "another name": a segment that is called differently from the class of its `step_unique_id`.
- "unknown video", "ambiguous video", "no frames": what the features lack.
- "duplicate id": a take that comes a second time, also in the other file.
- "unordered times", "outside the video": a segment that ends before it begins, or begins after the
  features end.
- Fields that are missing, mistyped, empty, too long, or hold `<v>` or half of a surrogate pair.
"""


def _read(source: Source) -> Parsed:
    classes = _read_classes(source.directory / CLASSES)
    paths = {split: source.directory / file for split, file in _FILES.items()}
    for path in paths.values():
        _require(path)
    stored, seen = _ego_videos(source.videos), set()

    def records(path: Path) -> Iterator[Record]:
        for uid, take in object_members(path, "annotations"):
            where = f"{path.name}: {uid}"
            try:
                if uid in seen:
                    raise FieldError("duplicate id", where, "a take of that uid came before")
                seen.add(uid)
                segments = field(take, "segments", list, where)
                video = _find(source.videos, stored, text_field(take, "take_name", where), where)
            except FieldError as error:
                source.report.drop(
                    error.reason, error.where, error.what, len(listed(take, "segments"))
                )
                continue
            build = functools.partial(_record, source, classes, uid, video)
            places = ((f"{where}: segment {i}", (i, one)) for i, one in enumerate(segments))
            yield from count_records(places, build, source.report)

    return Parsed(
        splits={split: records(path) for split, path in paths.items()},
        # Sorted, because of several nearest labels the first counts.
        labels=tuple(sorted({label(name) for name in classes.values()})),
    )


def _record(
    source: Source,
    classes: Mapping[int, str],
    uid: str,
    video: str,
    where: str,
    numbered: tuple[int, Any],
) -> Record:
    number, segment = numbered
    return clip_record(
        source,
        record_id=f"{uid}/{number}",
        video=video,
        start=seconds_field(segment, "start_time", where),
        end=seconds_field(segment, "end_time", where),
        question=_QUESTION,
        labels=[label(_class_of(segment, classes, where))],
        where=where,
    )


def _read_classes(path: Path) -> dict[int, str]:
    """The names of the classes by `step_unique_id`."""
    _require(path)
    classes: dict[int, str] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, strict=True):
                number, name = int(row["step_unique_id"]), row["step_name"].strip()
                if not name or number in classes:
                    raise ValueError(f"step_unique_id {number} has no name, or comes twice")
                classes[number] = name
    except (OSError, KeyError, TypeError, AttributeError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: expected lines label_id,step_unique_id,step_name,scenario_name, found "
            f"{type(error).__name__}: {error}; download it again: {_DOWNLOAD}"
        ) from error
    if not classes:
        raise UserError(f"{path}: expected classes, found none; download it again: {_DOWNLOAD}")
    return classes


def _require(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; download it: {_DOWNLOAD}")


def _ego_videos(videos: Videos) -> Mapping[str, list[str]]:
    """The videos of ego cameras by every folder of their names."""
    stored = collections.defaultdict(list)
    for name in videos.frames:
        *folders, last = name.split("/")
        if _EGO_CAMERA.fullmatch(last):
            for folder in set(folders):
                stored[folder].append(name)
    return stored


def _find(videos: Videos, stored: Mapping[str, list[str]], take: str, where: str) -> str:
    """The name in the feature store of the ego video of a take."""
    found = stored.get(take, [])
    if not found:
        raise FieldError("unknown video", where, f"there are no ego features of {shown(take)}")
    if len(found) > 1:
        raise FieldError("ambiguous video", where, f"features of {shown(found)}; keep one")
    if not videos.frames[found[0]]:
        raise FieldError("no frames", where, f"{shown(found[0])} has no frames")
    return found[0]


def _class_of(segment: Any, classes: Mapping[int, str], where: str) -> str:
    """The name of the class of a segment."""
    number = field(segment, "step_unique_id", int, where)
    name = text_field(segment, "step_name", where)
    if number not in classes:
        raise FieldError("not a class", where, f"{number}, {shown(name)}")
    if _words(name) != _words(classes[number]):
        raise FieldError(
            "another name",
            f"{where}: field 'step_name'",
            f"expected {shown(classes[number])}, the class {number}, found {shown(name)}",
        )
    return classes[number]


def _words(name: str) -> list[str]:
    return name.lower().split()


DATASETS = (Dataset(name="egoexo4d_keystep", page=PAGE, read=_read, benchmark="labels"),)
