"""`ego4d_lta`: after eight actions, which twenty come next?

Questions, answers and frames are those of VideoLLM-online (showlab/videollm-online,
data/ego4d/lta.py), which follow the benchmark of EGO4D/forecasting.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from videollm_mod_jax.data.annotations import (
    Dataset,
    FieldError,
    Parsed,
    Record,
    Source,
    Turn,
    check_text,
    field,
    seconds_field,
    shown,
    text_field,
)
from videollm_mod_jax.data.builders.ego4d_stream import check_inside
from videollm_mod_jax.data.builders.json_members import array_members, whole_object
from videollm_mod_jax.errors import UserError

SEEN, ASKED = 8, 20
MAX_SECONDS = 1e6  # no video is that long
TAXONOMY = "fho_lta_taxonomy.json"
FILES = {
    "train": "fho_lta_train.json",
    "validation": "fho_lta_val.json",
    "test": "fho_lta_test_unannotated.json",
}

PAGE = f"""\
Long-term action anticipation of Ego4D: the model watches {SEEN} actions and lists the next {ASKED}.

**Get it.** Sign the licence at ego4d-data.org, then
`ego4d -o DIR --version v2_1 --datasets annotations full_scale`. `--source` is
`DIR/v2/annotations`; features are of the videos in `DIR/v2/full_scale`, named by their uid.

**Files.**

- `{TAXONOMY}`: `{{"verbs": [...], "nouns": [...]}}`
- {", ".join(f"`{name}`" for name in FILES.values())}, or some of them:
  `{{"clips": [{{"video_uid", "clip_uid", "clip_parent_start_sec", "action_clip_start_sec",
  "action_clip_end_sec", "action_idx", "verb_label", "noun_label"}}]}}`, one entry for each action;
  the last file has no labels.

Splits: `train`, `validation`, `test`.

They are the files. The benchmark splits clips, not videos: another clip of a video of `validation`
may be in `train`.

**Records.** One for each run of {SEEN + ASKED} actions of a clip, in order of `action_idx`:
question, frames from the beginning of the first to the end of the {SEEN}th (both rounded to the
nearest frame, inside the video), answer:

    After 33 video frames, anticipate the next {ASKED} actions. Format your answer concisely,
    listing each action on a new line with a number prefix. No extra text output.

    1. Take dough.
    2. Put dough.
    ...

A verb or noun is called by the first word of its class, `take_(pick,_grab,_get)` by "take", but
for a few that would be called the same. `labels` has all of these words, "verb: take" and
"noun: dough", in the order of their ids. `target` has the {ASKED} ids of each, and what the server
of the benchmark calls the record: `{{"verbs", "nouns", "clip_uid", "last_visible_action_idx"}}`.
In `test`, where there is no answer, it has only the latter two.

Dropped and counted: an action with fields that are missing, mistyped, empty, too long, or hold
`<v>` or half of a surrogate pair, or with the index of another; and one that is in no run of
{SEEN + ASKED}, because its clip has fewer, or those with it hold a dropped action, more than
`max_frames` frames or fewer than two.
"""

# Words that two classes would share: `get_no_overlap_word` of upstream.
_OWN_WORDS = {
    "pot_(planter)": "flowerpot",
    "bat_(sports)": "sport bat",
    "bat_(tool)": "bat",
    "nut_(food)": "nuts",
    "nut_(tool)": "nut",
    "chip_(food)": "snack",
    "chip_(wood'_metal),": "chips",
    "chip_(wood,_metal)": "chip",
}


class _Taxonomy(NamedTuple):
    """What classes are called, by id."""

    verbs: Sequence[str]
    nouns: Sequence[str]


class _Action(NamedTuple):
    """An action: seconds from the beginning of the video; ids are -1 in `test`."""

    video: str
    start: float
    end: float
    verb: int
    noun: int
    where: str


def word(name: str) -> str:
    """What a class is called: `get_no_overlap_word` of upstream.

    ```
    "take_(pick,_grab,_get)"  ->  "take"
    "turn_off"                ->  "turn off"
    "pot_(planter)"           ->  "flowerpot"
    ```
    """
    return _OWN_WORDS.get(name, name.partition("(")[0].removesuffix("_").replace("_", " "))


def answer_text(actions: Sequence[tuple[str, str]]) -> str:
    r"""What the model says: `verb_noun_labels_to_text` of upstream.

    ```
    ("take", "dough"), ("turn off", "oven")  ->  "1. Take dough.\n2. Turn off oven."
    ```
    """
    lines = enumerate(actions, start=1)
    return "\n".join(f"{number}. {verb.capitalize()} {noun}." for number, (verb, noun) in lines)


def question_text(num_frames: int) -> str:
    """What the user asks: `get_user_message` of upstream."""
    return (
        f"After {num_frames} video frames, anticipate the next {ASKED} actions. Format your answer "
        "concisely, listing each action on a new line with a number prefix. No extra text output."
    )


def read(source: Source) -> Parsed:
    """Reads `ego4d_lta`; see PAGE.

    Raises:
      UserError: no taxonomy, or none of the other files.
    """
    taxonomy = _read_taxonomy(source.directory / TAXONOMY)
    splits = {
        split: _records(source, file, taxonomy)
        for split, file in FILES.items()
        if (source.directory / file).exists()
    }
    if not splits:
        raise UserError(
            f"{source.directory}: expected {' or '.join(FILES.values())}, found none; download the "
            "annotations of Ego4D (ego4d-data.org)"
        )
    labels = [f"verb: {verb}" for verb in taxonomy.verbs]
    labels += [f"noun: {noun}" for noun in taxonomy.nouns]
    return Parsed(splits, tuple(labels))


def _read_taxonomy(path: Path) -> _Taxonomy:
    taxonomy = whole_object(path)
    try:
        names = [field(taxonomy, kind, list, str(path)) for kind in ("verbs", "nouns")]
        for name in itertools.chain(*names):
            if not isinstance(name, str) or not word(name).strip():
                raise FieldError("", str(path), f"expected names of classes, found {shown(name)}")
            check_text(answer_text([(word(name), word(name))]), str(path))
    except FieldError as error:
        raise UserError(f"{error}; download the file again") from error
    return _Taxonomy(*([word(name) for name in kind] for kind in names))


def _records(source: Source, file: str, taxonomy: _Taxonomy) -> Iterator[Record]:
    clips: dict[str, dict[int, _Action | None]] = collections.defaultdict(dict)
    unordered: set[str] = set()
    for i, entry in enumerate(array_members(source.directory / file, "clips")):
        where = f"{file}: clips: {i}"
        try:
            clip = text_field(entry, "clip_uid", where)
            if type(entry.get("action_idx")) is not int:
                unordered.add(clip)  # it may be missing in any run of its clip
            index = field(entry, "action_idx", int, where)
            if index in clips[clip]:
                raise FieldError("duplicate action", where, f"action {index} of clip {clip}")
            clips[clip][index] = None
            clips[clip][index] = _action(entry, source, taxonomy, file != FILES["test"], where)
        except FieldError as error:
            source.report.drop(error.reason, error.where, error.what)
    for clip, by_index in clips.items():
        used: set[int] = set()
        actions = [(index, by_index[index]) for index in sorted(by_index)]
        runs = 0 if clip in unordered else len(actions) - SEEN - ASKED + 1
        for i in range(runs):
            run = actions[i : i + SEEN + ASKED]
            if record := _record(source, clip, run, taxonomy):
                used.update(index for index, _ in run)
                yield record
        source.report.keep(len(used))
        for index, action in actions:
            if action and index not in used:
                reason = f"in no run of {SEEN + ASKED} actions and {source.max_frames} frames"
                source.report.drop(reason, action.where, f"action {index} of clip {clip}")


def _action(entry: Any, source: Source, taxonomy: _Taxonomy, labelled: bool, where: str) -> _Action:
    video = text_field(entry, "video_uid", where)
    if not source.videos.frames.get(video):
        raise FieldError("unknown video", where, f"there are no features of {video}")
    clip = seconds_field(entry, "clip_parent_start_sec", where)
    start, end = (
        clip + _offset(entry, name, where)
        for name in ("action_clip_start_sec", "action_clip_end_sec")
    )
    if end < start:
        raise FieldError("unordered times", where, f"from {start:g} s to {end:g} s")
    check_inside(start, video, source.videos, where)
    verb, noun = (
        _class(entry, name, words, where) if labelled else -1
        for name, words in (("verb_label", taxonomy.verbs), ("noun_label", taxonomy.nouns))
    )
    return _Action(video, start, end, verb, noun, where)


def _offset(entry: Any, name: str, where: str) -> float:
    """Seconds from the beginning of a clip: negative ones are before it, even before the video."""
    seconds = field(entry, name, (int, float), where)
    if not abs(seconds) < MAX_SECONDS:
        raise FieldError(
            "bad time", f"{where}: field '{name}'", f"expected seconds, found {shown(seconds)}"
        )
    return seconds


def _class(entry: Any, name: str, words: Sequence[str], where: str) -> int:
    label = field(entry, name, int, where)
    if not 0 <= label < len(words):
        raise FieldError(
            "unknown class",
            f"{where}: field '{name}'",
            f"expected 0 to {len(words) - 1}, found {label}",
        )
    return label


def _record(
    source: Source,
    clip: str,
    run: Sequence[tuple[int, _Action | None]],
    taxonomy: _Taxonomy,
) -> Record | None:
    """The record of a run of actions; None if it cannot be one."""
    actions = [action for _, action in run if action]
    if len(actions) < len(run) or len({action.video for action in actions}) > 1:
        return None
    video, fps = actions[0].video, source.videos.fps
    last = source.videos.frames[video] - 1
    # `round_time_by_fps` of upstream: to the nearest frame, inside the video.
    first, end = (
        round(min(max(seconds, 0.0), last / fps) * fps)
        for seconds in (actions[0].start, actions[SEEN - 1].end)
    )
    if not 1 < end - first + 1 <= source.max_frames:
        return None
    index, asked = run[SEEN - 1][0], actions[SEEN:]
    turns = [Turn("user", first / fps, question_text(end - first + 1))]
    target: dict[str, Any] = {"clip_uid": clip, "last_visible_action_idx": index}
    if asked[0].verb >= 0:
        words = [(taxonomy.verbs[one.verb], taxonomy.nouns[one.noun]) for one in asked]
        turns.append(Turn("assistant", end / fps, answer_text(words)))
        target |= {"verbs": [one.verb for one in asked], "nouns": [one.noun for one in asked]}
    return Record(
        id=f"{clip}_{index}",
        video=video,
        start=first / fps,
        stop=(end + 1) / fps,
        turns=tuple(turns),
        target=target,
    )


DATASETS = (Dataset(name="ego4d_lta", page=PAGE, read=read, benchmark="anticipation"),)
