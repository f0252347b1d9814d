"""Runs of eight and twenty actions, as VideoLLM-online asks for them; every action is counted."""

import pytest

from tests import tiny_ego4d
from tests.tiny_ego4d import NOUNS, VERBS, action, read_all, source_of, write, write_actions
from videollm_mod_jax.data.annotations import Videos, frame_range
from videollm_mod_jax.data.builders import ego4d_lta
from videollm_mod_jax.data.builders.ego4d_lta import answer_text, word
from videollm_mod_jax.data.dialogue import conversation_of, render
from videollm_mod_jax.errors import UserError


@pytest.fixture
def directory(tmp_path):
    write(tmp_path / ego4d_lta.TAXONOMY, {"verbs": VERBS, "nouns": NOUNS})
    return tmp_path


def read(directory, actions, **options):
    """The training records of these actions, and what was dropped."""
    write_actions(directory, "train", actions)
    source = source_of(directory, **options)
    records = read_all("ego4d_lta", source)["train"]
    assert source.report.kept + sum(source.report.dropped.values()) == len(actions)
    return records, dict(source.report.dropped)


def test_golden_records(tmp_path):
    source = source_of(tmp_path, tiny_ego4d.write_lta(tmp_path))
    splits = read_all("ego4d_lta", source)
    assert {split: [record.id for record in splits[split]] for split in splits} == {
        "train": ["clip-1_7", "clip-1_8"],
        "validation": ["clip-2_7"],
        "test": ["clip-3_7"],
    }
    record = splits["train"][0]
    # From 10 + 0.7 s to 10 + 28.7 + 8 s: both to the nearest frame, the last one inside.
    assert frame_range(record, 2.0) == range(21, 94)
    text = render(conversation_of(record, 2.0, "Watch."), 1, "<s>", "</s>").text
    question, _, answer = text.partition("\n[<v>" + ",<v>" * 72 + "]\nAssistant: ")
    assert question == (
        "<s>Watch.\n\nUser: After 73 video frames, anticipate the next 20 actions. Format your "
        "answer concisely, listing each action on a new line with a number prefix. No extra text "
        "output."
    )
    assert answer.startswith(
        "1. Put nuts.\n2. Take dough.\n3. Turn off dough.\n4. Put dough.\n5. T"
    )
    assert answer.endswith("\n20. Take dough.</s>")
    assert record.target == {
        "clip_uid": "clip-1",
        "last_visible_action_idx": 7,
        "verbs": [i % 3 for i in range(8, 28)],
        "nouns": [i // 3 % 3 for i in range(8, 28)],
    }
    test = splits["test"][0]
    assert [turn.role for turn in test.turns] == ["user"]
    assert test.target == {"clip_uid": "clip-3", "last_visible_action_idx": 7}
    assert (source.report.kept, dict(source.report.dropped)) == (29 + 28 + 28, {})


def test_every_frame_before_the_answer_is_learnt(tmp_path):
    source = source_of(tmp_path, tiny_ego4d.write_lta(tmp_path))
    _, _, stream, answer = conversation_of(read_all("ego4d_lta", source)["train"][0], 2.0, "")
    assert (stream.learn_frames, stream.num_frames, answer.learn) == (73, 73, True)


def test_labels_are_the_words_of_the_taxonomy(tmp_path):
    source = source_of(tmp_path, tiny_ego4d.write_lta(tmp_path))
    verbs = ("verb: take", "verb: turn off", "verb: put")
    assert ego4d_lta.read(source).labels == (*verbs, "noun: dough", "noun: flowerpot", "noun: nuts")


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("take_(pick,_grab,_get)", "take"),
        ("turn_off", "turn off"),
        ("pot_(planter)", "flowerpot"),
        ("bag_(bag,_grocery,_nylon)", "bag"),
        ("adjust_(regulate,_increase/reduce,_change)", "adjust"),
    ],
)
def test_words(name, called):
    assert word(name) == called


def test_the_drawn_answer():
    actions = [("take", "dough"), ("turn off", "oven")]
    assert answer_text(actions) == "1. Take dough.\n2. Turn off oven."


def test_times_are_rounded_to_the_nearest_frame(directory):
    actions = [action(i, start=0.35 + i) for i in range(28)]
    records, _ = read(directory, actions)
    # From 10.35 s, nearest to 10.5, to 25.35 s, nearest to 25.5.
    assert frame_range(records[0], 2.0) == range(21, 52)


def test_times_are_moved_into_the_video(directory):
    actions = [action(i, start=-10.4 + 0.3 * i) for i in range(28)]
    records, _ = read(directory, actions, videos=Videos(2.0, {"e": 15}))
    # From -0.4 s; the eighth action lasts to 9.7 s, the video to 7 s.
    assert frame_range(records[0], 2.0) == range(15)


def test_a_clip_of_too_few_actions_is_counted(directory):
    records, dropped = read(directory, [action(i) for i in range(27)])
    assert (records, dropped) == ([], {"in no run of 28 actions and 1200 frames": 27})


def test_runs_that_do_not_fit_are_counted(directory):
    records, dropped = read(directory, [action(i) for i in range(30)], max_frames=72)
    assert (records, dropped) == ([], {"in no run of 28 actions and 72 frames": 30})


DAMAGE = [
    ({"verb_label": 3}, "unknown class"),
    ({"noun_label": -1}, "unknown class"),
    ({"verb_label": None}, "wrong type"),
    ({"video_uid": "zz"}, "unknown video"),
    ({"clip_parent_start_sec": -1.0}, "bad time"),
    ({"action_clip_start_sec": float("nan")}, "bad time"),
    ({"action_clip_end_sec": 10**400}, "bad time"),
    ({"action_clip_end_sec": 0.0}, "unordered times"),
    (
        {"action_clip_start_sec": 9000.0, "action_clip_end_sec": 9008.0},
        "after the end of the video",
    ),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_no_run_goes_over_a_damaged_action(directory, damage, reason):
    actions = [action(i, start=2.0 * i) for i in range(60)]
    actions[29] |= damage
    records, dropped = read(directory, actions)
    seen = [int(record.id.rpartition("_")[2]) for record in records]
    assert seen == [7, 8, 37, 38, 39]
    assert dropped == {reason: 1}


def test_an_action_of_no_known_place_spoils_its_clip(directory):
    actions = [action(i) for i in range(29)] + [action(i, clip="other") for i in range(28)]
    actions[3] |= {"action_idx": "3"}
    records, dropped = read(directory, actions)
    assert [record.id for record in records] == ["other_7"]
    assert dropped == {"wrong type": 1, "in no run of 28 actions and 1200 frames": 28}


def test_repeated_actions_are_counted(directory):
    records, dropped = read(directory, [action(i) for i in (*range(28), 5)])
    assert len(records) == 1
    assert dropped == {"duplicate action": 1}


TAXONOMIES = [
    [],
    {"verbs": ["a"]},
    {"verbs": ["a"], "nouns": ["", "b"]},
    {"verbs": ["a"], "nouns": ["<v>"]},
    {"verbs": ["<V>"], "nouns": ["a"]},
    {"verbs": ["a"], "nouns": ["\ud800"]},
]


@pytest.mark.parametrize("taxonomy", TAXONOMIES)
def test_a_damaged_taxonomy_is_an_error(directory, taxonomy):
    write(directory / ego4d_lta.TAXONOMY, taxonomy)
    with pytest.raises(UserError, match=r"fho_lta_taxonomy\.json: .*download"):
        read_all("ego4d_lta", source_of(directory))


def test_missing_files_are_errors_that_say_where_to_get_them(directory):
    with pytest.raises(
        UserError, match=r"expected fho_lta_train\.json or .*, found none; download"
    ):
        read_all("ego4d_lta", source_of(directory))
    (directory / ego4d_lta.TAXONOMY).unlink()
    with pytest.raises(UserError, match=r"fho_lta_taxonomy\.json cannot be read"):
        read_all("ego4d_lta", source_of(directory))
