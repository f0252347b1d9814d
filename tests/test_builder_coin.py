"""The five COIN datasets: golden conversations, frames against upstream's formula, every drop."""

import json
import math

import numpy as np
import pytest

from tests import tiny_coin
from videollm_mod_jax.data import dialogue
from videollm_mod_jax.data.annotations import Report, Source, Videos, frame_range
from videollm_mod_jax.data.builders import clips, coin
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation.benchmarks import BENCHMARKS, Marking

DATASETS = {dataset.name: dataset for dataset in coin.DATASETS}
CONCISELY = "Format your answer concisely. No extra text output."
LISTING = (
    "Format your answer concisely, listing each action on a new line with a number prefix. "
    "No extra text output."
)


def source_of(directory, entries=None, videos=tiny_coin.VIDEOS, max_frames=100):
    tiny_coin.write(directory, tiny_coin.DATABASE if entries is None else entries)
    return Source(directory, videos, max_frames, Report())


def read(name, source):
    parsed = DATASETS[name].read(source)
    records = {split: list(records) for split, records in parsed.splits.items()}
    return records, parsed.labels


def rendered(record, fps=2.0):
    """The text of a record, `/` for a line end, and `^` below what of it is learnt."""
    conversation = dialogue.conversation_of(record, fps, "S")
    written = dialogue.render(conversation, 1, "", "</s>")
    marks = [" "] * len(written.text)
    for start, stop in written.learn_ranges:
        marks[start:stop] = "^" * (stop - start)
    return written.text.replace("\n", "/"), "".join(marks).rstrip()


def test_golden_step(tmp_path):
    (first, second, third), test = read("coin_step", source_of(tmp_path))[0].values()
    question = f"S//User: What is the action in the video? {CONCISELY}"
    text, marks = rendered(first)
    assert text == f"{question}/[<v>,<v>]/Assistant: Take out the laptop cd drive.</s>"
    # 1.2 s and 2.0 s at 2 fps are frames 3 and 4; all silence is learnt.
    assert marks == " " * len(f"{question}/[<v>") + "^   ^^" + "^" * len(
        "Assistant: Take out the laptop cd drive.</s>"
    )
    assert [frame_range(one, 2.0) for one in (first, second, third)] == [
        range(3, 5),
        range(5, 7),
        range(1, 4),
    ]
    assert (first.id, first.video) == ("LtRSn-ntcLY/0", "131/LtRSn-ntcLY")
    assert first.target == {"labels": ["Take out the laptop cd drive."]}
    assert third.turns[-1].text == "Crop and fold paper."
    assert [one.id for one in test] == [f"tire_000001/{i}" for i in range(7)]


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("coin_next", "What is the next action for the video? ", "Jack up the car."),
        (
            "coin_procedure",
            "What is the next 5 actions for the video? ",
            "1. Jack up the car./2. Remove the tire./3. Put on the tire./4. Unscrew the screw."
            "/5. Jack up the car.",
        ),
        (
            "coin_procedure_goal",
            "To change car tire, what is the next 5 actions for the video? ",
            "1. Jack up the car./2. Remove the tire./3. Put on the tire./4. Unscrew the screw."
            "/5. Jack up the car.",
        ),
    ],
)
def test_golden_next_steps(tmp_path, name, question, answer):
    records = read(name, source_of(tmp_path))[0]["test"]
    suffix = CONCISELY if name == "coin_next" else LISTING
    text = f"S//User: {question}{suffix}/[<v>,<v>]/Assistant: {answer}</s>"
    assert rendered(records[0])[0] == text
    assert len(records) == 6
    # The last but one asks for a single step, without a number.
    single = question.replace("the next 5 actions", "the next action") + CONCISELY
    assert rendered(records[-1])[0] == (
        f"S//User: {single}/[<v>,<v>]/Assistant: Remove the tire.</s>"
    )


def test_golden_task(tmp_path):
    records, labels = read("coin_task", source_of(tmp_path))
    text = (
        f"S//User: What is the overall activity in the video? {CONCISELY}"
        "/[<v>,<v>,<v>,<v>]/Assistant: Replace cd drive with ssd.</s>"
    )
    assert rendered(records["train"][0])[0] == text
    assert frame_range(records["train"][0], 2.0) == range(3, 7)
    assert labels == (
        "Change car tire.",
        "Cut and restore rope trick.",
        "Replace cd drive with ssd.",
    )


@pytest.mark.parametrize(
    ("name", "kept", "last"),
    [
        ("coin_step", 10, 0),
        ("coin_next", 7, 3),
        ("coin_task", 3, 0),
        ("coin_procedure", 7, 3),
        ("coin_procedure_goal", 7, 3),
    ],
)
def test_every_annotation_is_kept_or_counted(tmp_path, name, kept, last):
    source = source_of(tmp_path)
    records, labels = read(name, source)
    assert source.report.kept == sum(map(len, records.values())) == kept
    assert dict(source.report.dropped) == ({"no next step": last} if last else {})
    assert kept + last == (len(tiny_coin.DATABASE) if name == "coin_task" else tiny_coin.STEPS)
    for record in (*records["train"], *records["test"]):
        assert set(record.target["labels"]) <= set(labels)
        assert record.turns[-1].text == clips.answer_text(record.target["labels"])


def test_the_true_answers_score_one_and_swapped_ones_less(tmp_path):
    for name, dataset in DATASETS.items():
        records, labels = read(name, source_of(tmp_path))
        kind, marking = BENCHMARKS[dataset.benchmark], Marking(labels, judge=None)
        test, scores = records["test"] + records["train"], []
        for shift in (0, 1):
            answers = [record.turns[-1].text for record in test[shift:] + test[:shift]]
            rows = [
                kind.mark(record, [answer], record.turns[-1].text, marking)
                for record, answer in zip(test, answers, strict=True)
            ]
            scores.append(kind.score(rows, marking)["accuracy"])
        assert scores[0] == 1.0 > scores[1]
        assert dataset.benchmark == ("steps" if "procedure" in name else "labels")


def test_frames_are_upstreams():
    """Against the formula of data/coin/benchmarks.py and `ceil_time_by_fps` of data/utils.py."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        num_frames = int(rng.integers(1, 50))
        duration = (num_frames - 1) / 2

        def frame(seconds, duration=duration):
            return int(min(max(math.ceil(seconds * 2) / 2, 0), duration) * 2)

        start, end = sorted(rng.choice([0.5, 0.01]) * rng.integers(0, 60, 2))
        expected = range(frame(start), frame(end) + 1)
        assert clips.clip_frames(start, end, 2.0, num_frames) == expected


def test_drawn_examples_are_true():
    assert clips.clip_frames(1.2, 3.0, 2.0, 12) == range(3, 7)
    assert clips.clip_frames(5.0, 9.0, 2.0, 12) == range(10, 12)
    assert clips.clip_frames(5.0, 1e308, 2.0, 12) == range(10, 12)
    assert clips.clip_frames(7 / 25, 7 / 25, 25.0, 12) == range(7, 8)
    assert clips.answer_text(["Jack up the car."]) == "Jack up the car."
    assert clips.answer_text(["Jack up the car.", "Remove the tire."]).replace("\n", "/") == (
        "1. Jack up the car./2. Remove the tire."
    )
    assert clips.label("take out the laptop CD drive") == "Take out the laptop cd drive."
    assert coin.task_name("ReplaceCDDriveWithSSD") == "replace CD drive with SSD"
    for function, drawn in (
        (clips.clip_frames, "1.2 s to 3.0 s   ->   frames 3 4 5 6"),
        (clips.clip_frames, "5.0 s to 9.0 s   ->   frames 10 11"),
        (clips.answer_text, "1. Jack up the car./2. Remove the tire."),
        (clips.label, "Take out the laptop cd drive."),
        (coin.task_name, "replace CD drive with SSD"),
    ):
        assert drawn in function.__doc__


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("PutOnHairExtensions", "put on hair extensions"),
        ("InstallTVBracket", "install TV bracket"),
        ("ReplaceSIMCard", "replace SIM card"),
        ("ShootNBAStyle", "shoot NBA style"),
        ("MakeRJ45Cable", "make RJ45 cable"),
    ],
)
def test_task_names_keep_their_acronyms(name, words):
    assert coin.task_name(name) == words


def test_a_clip_of_one_frame_is_shown_before_the_answer(tmp_path):
    entries = tiny_coin.database()
    entries["tire_000001"]["annotation"][0]["segment"] = [0.0, 0.0]
    entries["tire_000001"]["annotation"][3]["segment"] = [3.5, 3.5]
    first, *_, record = read("coin_step", source_of(tmp_path, entries))[0]["test"][:4]
    assert frame_range(first, 2.0) == range(1)
    assert rendered(first)[0].endswith(f"{CONCISELY}/[<v>]/Assistant: Unscrew the screw.</s>")
    assert frame_range(record, 2.0) == range(7, 8)
    assert rendered(record)[0].endswith(f"{CONCISELY}/[<v>]/Assistant: Put on the tire.</s>")


def test_a_long_clip_is_shown_with_a_stride(tmp_path):
    record = read("coin_task", source_of(tmp_path, max_frames=6))[0]["test"][0]
    # 0 s to 8 s of 16 frames: all of them, every third.
    assert frame_range(record, 2.0) == range(0, 16, 3)
    assert rendered(record)[0].endswith(
        "/[<v>,<v>,<v>,<v>,<v>,<v>]/Assistant: Change car tire.</s>"
    )


def test_labels_do_not_depend_on_what_is_encoded(tmp_path):
    all_labels = read("coin_step", source_of(tmp_path))[1]
    alone = Videos(2.0, {"tire_000001": 16})
    source = source_of(tmp_path, videos=alone)
    records, labels = read("coin_step", source)
    assert labels == all_labels == tuple(sorted(all_labels))
    assert len(labels) == 7
    assert len(records["test"]) == 7
    assert source.report.dropped == {"unknown video": 3}


def change(*path):
    """A function that replaces the value at a path of the entries, or removes it for `...`."""
    *keys, last, value = path

    def apply(entries):
        inner = entries
        for key in keys:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value

    return apply


STEP = ("tire_000001", "annotation", 2)
BAD_STEPS = [
    (change(*STEP, "label", ...), "missing field", 1),
    (change(*STEP, "label", "  "), "empty text", 1),
    (change(*STEP, "label", 7), "wrong type", 1),
    (change(*STEP, "label", "\ud800"), "not Unicode", 1),
    (change(*STEP, "label", "a <v>"), "reserved text", 1),
    (change(*STEP, "label", "A <V>"), "reserved text", 1),
    (change(*STEP, "segment", ...), "missing field", 1),
    (change(*STEP, "segment", [1.0]), "wrong type", 1),
    (change(*STEP, "segment", [1.0, 2.0, 3.0]), "wrong type", 1),
    (change(*STEP, "segment", [1.0, None]), "wrong type", 1),
    (change(*STEP, "segment", [-1.0, 2.0]), "bad time", 1),
    (change(*STEP, "segment", [1.0, math.nan]), "bad time", 1),
    (change(*STEP, "segment", [1.0, 10**400]), "bad time", 1),
    (change(*STEP, "segment", [2.0, 1.0]), "unordered times", 1),
    (change(*STEP, "segment", [8.0, 9.0]), "outside the video", 1),
    (change(*STEP, None), "not an object", 1),
    (change("tire_000001", "annotation", None), "wrong type", 1),
    (change("tire_000001", "class", ...), "missing field", 7),
    (change("tire_000001", "subset", "validation"), "unknown subset", 7),
    (change("tire_000001", "subset", ...), "missing field", 7),
    (change("tire_000001", None), "not an object", 1),
]


@pytest.mark.parametrize(("damage", "reason", "count"), BAD_STEPS)
def test_bad_steps_are_counted_with_their_name(tmp_path, damage, reason, count):
    entries = tiny_coin.database()
    damage(entries)
    source = source_of(tmp_path, entries)
    records, labels = read("coin_step", source)
    assert source.report.dropped == {reason: count}
    assert source.report.examples[reason][0].startswith("COIN.json: tire_000001")
    lost = 7 if count == 7 or "tire_000001: step" not in source.report.examples[reason][0] else 1
    assert source.report.kept == sum(map(len, records.values())) == tiny_coin.STEPS - lost
    assert not any("\ud800" in label for label in labels)


def test_steps_whose_answer_is_damaged_or_out_of_order_are_counted(tmp_path):
    entries = tiny_coin.database()
    del entries["tire_000001"]["annotation"][6]["label"]
    entries["tire_000001"]["annotation"][1]["segment"] = [0.0, 0.5]
    entries["tire_000001"]["annotation"][0]["segment"] = [1.0, 1.5]
    source = source_of(tmp_path, entries)
    records = read("coin_procedure", source)[0]["test"]
    # Steps 2 to 5 list step 6, step 1 too; step 0 begins after step 1.
    assert not records
    assert source.report.dropped == {
        "missing field": 1,
        "unusable next step": 5,
        "unordered steps": 1,
        "no next step": 2,
    }
    source = source_of(tmp_path, entries)
    assert [one.id[-1] for one in read("coin_next", source)[0]["test"]] == ["1", "2", "3", "4"]
    assert source.report.kept + source.report.dropped.total() == tiny_coin.STEPS


def test_an_entry_that_comes_twice_counts_once(tmp_path):
    source = source_of(tmp_path)
    first = json.dumps(tiny_coin.DATABASE["tire_000001"])
    text = (tmp_path / "COIN.json").read_text()
    (tmp_path / "COIN.json").write_text(text[:-2] + f', "tire_000001": {first}}}}}')
    assert len(read("coin_step", source)[0]["test"]) == 7
    assert source.report.dropped == {"duplicate id": 7}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; download it from https://coin-dataset.github.io"),
        (b'{"database": {"a": ', "not json"),
        (b'{"database": []}', "COIN.json"),
        (b'{"videos": {}}', "field 'database'"),
        (b"\xff\xfe", "COIN.json"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "COIN.json").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        DATASETS["coin_step"].read(Source(tmp_path, tiny_coin.VIDEOS, 100, Report()))
    assert "COIN.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pages_show_the_questions_that_are_asked(tmp_path):
    for name, dataset in DATASETS.items():
        record = read(name, source_of(tmp_path))[0]["test"][0]
        asked = record.turns[0].text.replace("next 5", "next 2")
        assert asked in " ".join(dataset.page.split())
        assert dataset.page.startswith(f"# {name}\n")
