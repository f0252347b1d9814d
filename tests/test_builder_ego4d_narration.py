"""Narrations become the streams that VideoLLM-online learns from, and every one is counted."""

import itertools
import json
import math

import numpy as np
import pytest

from tests import tiny_ego4d
from tests.tiny_ego4d import narrated, narration, read_all, source_of, write
from videollm_mod_jax.data.annotations import Report, Videos, frame_range
from videollm_mod_jax.data.builders.ego4d_narration import (
    INSTRUCTIONS,
    REFINED_INSTRUCTIONS,
    Narration,
    clean_text,
    place,
)
from videollm_mod_jax.data.dialogue import conversation_of, render
from videollm_mod_jax.errors import UserError

ASK = f"\nUser: {INSTRUCTIONS[0]}"


def rendered(record):
    return render(conversation_of(record, 2.0, "Watch."), 1, "<s>", "</s>")


def counted(report):
    return report.kept + sum(report.dropped.values())


def dropped_of(tmp_path, *narrations, frames=20, max_frames=1200):
    """The records of one training video with these narrations, and what was dropped."""
    tiny_ego4d.write_benchmarks(tmp_path)
    write(tmp_path / "all_narrations_redacted.json", {"videos": {"a": narrated(*narrations)}})
    source = source_of(tmp_path, Videos(2.0, {"a": frames}), max_frames)
    records = read_all("ego4d_narration", source)["train"]
    assert counted(source.report) == len(narrations)
    return records, dict(source.report.dropped)


WRITERS = [tiny_ego4d.write_narration, tiny_ego4d.write_narration_passes]


@pytest.mark.parametrize("writer", WRITERS)
def test_both_layouts_give_the_same_golden_streams(tmp_path, writer):
    source = source_of(tmp_path, writer(tmp_path))
    splits = read_all("ego4d_narration", source)
    assert {split: [record.id for record in splits[split]] for split in splits} == {
        "train": ["a/g1", "a/g2"],
        "validation": ["b/g1"],
        "test": ["c/g1"],
    }
    first = splits["train"][0]
    assert frame_range(first, 2.0) == range(3, 8)
    text, learnt = rendered(first).text, rendered(first).learn_ranges
    assert text == (
        f"<s>Watch.\n\n[<v>]{ASK}\nAssistant: C opens the fridge.</s>"
        "\n[<v>]\nAssistant: A man X walks around.</s>"
        "\n[<v>,<v>,<v>]\nAssistant: C closes the fridge.</s>"
    )
    assert [text[a:b] for a, b in learnt] == [
        "Assistant: C opens the fridge.</s>",
        "]\n",
        "Assistant: A man X walks around.</s>",
        ",",
        ",",
        "]\n",
        "Assistant: C closes the fridge.</s>",
    ]
    assert rendered(splits["train"][1]).text == f"<s>Watch.\n\n[<v>]{ASK}\nAssistant: C sings.</s>"
    assert frame_range(splits["validation"][0], 2.0) == range(2)
    assert (source.report.kept, dict(source.report.dropped)) == (7, {})


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("#C C picks a bag #unsure", "C picks a bag."),
        ("#O a man X walks, around the,.", "A man X walks, around the."),
        ("#unsure", "."),
        ("#c @c  HELLO\nthere ..", "Hello there."),
        ("#Unsure 3.5 m", "3.5 m."),
    ],
)
def test_cleaning(text, cleaned):
    assert clean_text(text) == cleaned


def test_what_has_fewer_than_two_words_is_dropped(tmp_path):
    texts = ["#unsure", "C.", "#C C sits"]
    found = [narration(i, text) for i, text in enumerate(texts)]
    records, dropped = dropped_of(tmp_path, *found)
    assert [turn.text for turn in records[0].turns[1:]] == ["C sits."]
    assert dropped == {"fewer than two words": 2}


def test_the_drawn_example_of_placing():
    times = [(1.2, "A"), (1.4, "B"), (2.0, "C"), (2.1, "C"), (3.2, "D"), (3.5, "E")]
    narrations = [Narration(time, text, text) for time, text in times]
    report = Report()
    assert place(narrations, 2.0, 8, 7, report) == [(3, "B"), (4, "C"), (7, "D")]
    assert report.dropped == {
        "two narrations in one frame": 1,
        "repeats the narration before it": 1,
        "after the last frame was narrated": 1,
    }
    assert place(narrations, 2.0, 8, 4, Report()) == [(3, "B"), (4, "C")]


def expected_frames(narrations, fps, num_frames, max_frames):
    """Said at each frame: runs of one text once, the last of a frame, none after the last frame."""
    runs = itertools.groupby(sorted(narrations), key=lambda one: one[1])
    at = {}
    for time, text in (next(run) for _, run in runs):
        if num_frames - 1 in at:
            break
        at[min(math.ceil(time * fps), num_frames - 1)] = text
    return [(frame, text) for frame, text in at.items() if frame < min(at) + max_frames]


def test_frames_agree_with_another_way_to_find_them():
    rng = np.random.default_rng(0)
    for _ in range(500):
        num_frames, max_frames = int(rng.integers(1, 30)), int(rng.integers(1, 30))
        count = int(rng.integers(1, 20))
        times = rng.permutation(np.round(np.linspace(0, num_frames / 2, 200), 2))[:count].tolist()
        pairs = [(time, "ABC"[rng.integers(3)]) for time in times]
        report = Report()
        narrations = [Narration(time, text, "") for time, text in pairs]
        found = place(narrations, 2.0, num_frames, max_frames, report)
        assert found == expected_frames(pairs, 2.0, num_frames, max_frames)
        assert counted(report) == count


def test_a_record_is_cut_at_max_frames(tmp_path):
    found = [narration(i, f"C does {i}") for i in range(6)]
    records, dropped = dropped_of(tmp_path, *found, max_frames=5)
    assert frame_range(records[0], 2.0) == range(5)
    assert [turn.text for turn in records[0].turns[1:]] == ["C does 0.", "C does 1.", "C does 2."]
    assert dropped == {"more than 5 frames into the record": 3}


def test_only_what_comes_within_a_frame_of_the_end_is_moved_to_the_last_frame(tmp_path):
    records, dropped = dropped_of(tmp_path, narration(10.4, "C sits"), narration(10.6, "C sings"))
    assert [record.start for record in records] == [9.5]
    assert dropped == {"after the end of the video": 1}


DAMAGE = [
    (lambda one: one.pop("time"), "missing field"),
    (lambda one: one.update(time="1.0"), "wrong type"),
    (lambda one: one.update(time=True), "wrong type"),
    (lambda one: one.update(time=-0.1), "bad time"),
    (lambda one: one.update(time=float("nan")), "bad time"),
    (lambda one: one.update(time=10**400), "bad time"),
    (lambda one: one.update(time=1e9), "after the end of the video"),
    (lambda one: one.update(text=None), "wrong type"),
    (lambda one: one.update(text=" \n"), "empty text"),
    (lambda one: one.update(text="C " + "x" * 100_000), "text too long"),
    (lambda one: one.update(text="C \ud800"), "not Unicode"),
    (lambda one: one.update(text="C sees <v>"), "reserved text"),
    (lambda one: one.update(text="C sees <#Cv>"), "reserved text"),
    (lambda one: one.update(_annotation_uid=7), "wrong type"),
    (lambda one: one.pop("_annotation_uid"), "missing field"),
    (lambda one: one.update(_annotation_uid="\udfff"), "not Unicode"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_a_damaged_narration_is_counted_and_located(tmp_path, damage, reason):
    tiny_ego4d.write_benchmarks(tmp_path)
    damaged = narration(1.0, "#C C sits")
    damage(damaged)
    videos = {"a": narrated(narration(0.0, "#C C stands"), damaged)}
    (tmp_path / "all_narrations_redacted.json").write_text(json.dumps({"videos": videos}))
    source = source_of(tmp_path)
    assert len(read_all("ego4d_narration", source)["train"]) == 1
    assert (source.report.kept, dict(source.report.dropped)) == (1, {reason: 1})
    where = source.report.examples[reason][0]
    assert where.startswith("all_narrations_redacted.json: a: narrations: 1")


def test_videos_that_cannot_be_used_are_counted_by_narration(tmp_path):
    tiny_ego4d.write_benchmarks(tmp_path)
    one = json.dumps(narrated(narration(0.0, "C sits")))
    two = json.dumps(narrated(narration(0.0, "C sits"), narration(1.0, "C sings")))
    videos = f'"a": {one}, "a": {two}, "zz": {two}, "d": 5, "e": {{"narrations": {{}}}}, "b": null'
    (tmp_path / "all_narrations_redacted.json").write_text('{"videos": {' + videos + "}}")
    source = source_of(tmp_path)
    read_all("ego4d_narration", source)
    assert source.report.kept == 1
    assert source.report.dropped == {
        "duplicate video": 2,
        "unknown video": 2,
        "not an object": 2,
        "wrong type": 1,
    }


def test_videos_in_no_list_are_counted_once(tmp_path):
    tiny_ego4d.write_narration(tmp_path)
    write(tmp_path / "narration_stream_video_uids_train.json", ["b"])
    source = source_of(tmp_path)
    splits = read_all("ego4d_narration", source)
    assert [[record.video for record in splits[split]] for split in splits] == [["b"], [], []]
    assert (source.report.kept, dict(source.report.dropped)) == (2, {"video in no list": 5})


def test_refined_narrations_are_kept_as_they_are(tmp_path):
    source = source_of(tmp_path, tiny_ego4d.write_refined(tmp_path))
    splits = read_all("ego4d_refined_narration", source)
    (train,), (validation,) = splits["train"], splits["validation"]
    assert train.turns[0].text in REFINED_INSTRUCTIONS
    assert rendered(train).text == (
        f"<s>Watch.\n\n[<v>]\nUser: {train.turns[0].text}\nAssistant: You open the fridge.</s>"
        "\n[<v>]\nAssistant: Ok.</s>"
    )
    assert frame_range(train, 2.0) == range(3, 5)
    assert validation.id == "b/g1"
    # Video b is in both files: it validates.
    assert source.report.kept == 3
    assert source.report.dropped == {"video of the validation file": 1}


def test_a_damaged_name_of_a_refined_stream_is_counted(tmp_path):
    narrations = [{"time": 0.0, "text": "You sit."}, {"time": 1.0, "text": "You stand."}]
    write(tmp_path / "refined_narration_stream_train.json", {"a": {"\ud800": narrations}})
    source = source_of(tmp_path)
    assert read_all("ego4d_refined_narration", source)["train"] == []
    assert (source.report.kept, dict(source.report.dropped)) == (0, {"not Unicode": 2})


def test_one_file_of_refined_narrations_is_enough(tmp_path):
    tiny_ego4d.write_refined(tmp_path)
    (tmp_path / "refined_narration_stream_train.json").unlink()
    assert list(read_all("ego4d_refined_narration", source_of(tmp_path))) == ["validation"]


def test_all_requests_for_narration_occur(tmp_path):
    groups = {str(i): [{"time": 0.0, "text": "You sit."}] for i in range(200)}
    write(tmp_path / "refined_narration_stream_train.json", {"a": groups})
    records = read_all("ego4d_refined_narration", source_of(tmp_path))["train"]
    assert {record.turns[0].text for record in records} == set(REFINED_INSTRUCTIONS)


@pytest.mark.parametrize("name", ["ego4d_narration", "ego4d_refined_narration"])
def test_no_file_is_an_error_that_says_where_to_get_it(tmp_path, name):
    with pytest.raises(UserError, match=r"found neither; download"):
        read_all(name, source_of(tmp_path))
