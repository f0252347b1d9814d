"""`digits_scenes`: digits that no patch shows whole, and what is said of them."""

import numpy as np
import pytest

from videollm_mod_jax.data import digit_scenes, digits
from videollm_mod_jax.data.builders.digits_scenes import ScenesDataset
from videollm_mod_jax.data.builders.digits_stream import DigitsConfig
from videollm_mod_jax.data.config import DataConfig, DrawConfig, SourceConfig
from videollm_mod_jax.data.sources import Sources
from videollm_mod_jax.errors import UserError

FRAMES = 8


def scenes(split="train", count=60, seed=0):
    """Stories and their frames, things included."""
    for index in range(count):
        rng = np.random.default_rng((seed, digits.SPLITS.index(split), index))
        yield digit_scenes.tell(rng, FRAMES, digits.scans(split))


def visible(things):
    return [thing for thing in things if not thing.turned]


def test_every_digit_spans_four_patches_wherever_it_trembles():
    for scene in scenes():
        for thing in (thing for things in scene.things_F for thing in things):
            for axis in (0, 1):
                first = PATCH_START = digit_scenes.PATCH * thing.cell[axis]
                inside = thing.corner[axis] - first
                # Of 12 pixels, 3 or more on either side of the grid line, tremble included.
                assert inside - 1 >= 3
                assert inside + 1 <= 9
                assert PATCH_START + 2 * digit_scenes.PATCH <= digit_scenes.CANVAS


def test_the_mask_of_objects_covers_the_drawn_ink():
    """The frames with and without digits differ in marked patches alone."""
    split = "train"
    for scene in scenes(split, 10):
        bare = tuple(tuple(t for t in things if t.turned) for things in scene.things_F)
        images = []
        for things_F in (scene.things_F, bare):
            # The same clutter, and no noise or light that would differ: only the ink is looked at.
            ink = np.zeros((FRAMES, digit_scenes.CANVAS, digit_scenes.CANVAS), np.float32)
            for f, things in enumerate(things_F):
                for thing in things:
                    stamp = digit_scenes.stamps(split)[thing.row]
                    stamp = np.rot90(stamp) if thing.turned else stamp
                    corner = np.array(thing.corner)[:, None]
                    digits.stamp(ink[f : f + 1], np.array([0]), corner, stamp[None])
            images.append(ink)
        changed = np.abs(images[0] - images[1]).reshape(FRAMES, 5, 12, 5, 12).max(axis=(2, 4)) > 0
        marked = np.stack([digit_scenes.patches_of(things) for things in scene.things_F])
        assert not (changed.reshape(FRAMES, -1) & ~marked).any()
        assert (marked.sum(axis=1) > 0).tolist() == [
            bool(visible(things)) for things in scene.things_F
        ]


def test_no_test_scan_is_drawn_in_training_streams():
    drawn = {
        split: {
            int(digits.scans(split).ids[thing.row])
            for scene in scenes(split)
            for things in scene.things_F
            for thing in things
        }
        for split in ("train", "test")
    }
    assert drawn["train"]
    assert drawn["test"]
    assert not drawn["train"] & drawn["test"]


def test_narrations_agree_with_what_is_visible():
    """Every narration is true of its frame and the one before, and nothing goes unsaid."""
    kinds = set()
    for scene in scenes(count=120):
        said = {t["time"]: t["text"] for t in scene.turns if t["role"] == "assistant"}
        asked = {t["time"] for t in scene.turns if t["role"] == "user"}
        before = ()
        for f, things in enumerate(scene.things_F):
            old = {t.digit: t.place for t in visible(before)}
            new = {t.digit: t.place for t in visible(things)}
            came, left = new.keys() - old.keys(), old.keys() - new.keys()
            moved = {d for d in new.keys() & old.keys() if new[d] != old[d]}
            text = said.get(f / digits.FPS) if f / digits.FPS in said else None
            if not (came or left or moved):
                assert text is None or f / digits.FPS in asked
            else:
                assert len(came) + len(left) + len(moved) == 1
                (digit,) = came or left or moved
                assert digits.NUMBERS[digit] in text
                if moved:
                    assert text.endswith(f"moves to the {new[digit]}.")
                if left:
                    assert text.endswith("leaves.")
                if came and " of the " not in text:
                    assert text.endswith(f"at the {new[digit]}.")
                if came and " of the " in text:
                    ((other, _),) = old.items()
                    cells = {t.digit: t.cell[1] for t in visible(things)}
                    assert f"of the {digits.NUMBERS[other]}." in text
                    assert (cells[digit] < cells[other]) == ("left of" in text)
                kinds.add("moved" if moved else "left" if left else text.split()[2])
            before = things
    assert {"moved", "left", "at", "of"} & kinds == {"moved", "left", "at", "of"} or kinds


def test_questions_are_about_the_frame_before():
    found = set()
    for scene in scenes(count=120):
        for turn, answer in zip(scene.turns, scene.turns[1:], strict=False):
            if turn["role"] != "user":
                continue
            now = visible(scene.things_F[round(turn["time"] * digits.FPS) - 1])
            text = answer["text"].lower()
            found.add(turn["text"].split()[0])
            if turn["text"] == digit_scenes.HOW_MANY:
                assert text == digits.NUMBERS[len(now)] + "."
            elif turn["text"] == digit_scenes.WHICH:
                names = [digits.NUMBERS[d] for d in sorted(t.digit for t in now)]
                assert text == (" and ".join(names) or "none") + "."
            else:
                (thing,) = (t for t in now if t.name in turn["text"])
                assert text == f"at the {thing.place}."
    assert found == {"How", "Which", "Where"}


def test_turned_scans_come_and_go_and_are_never_named():
    turned = [
        thing for scene in scenes() for things in scene.things_F for thing in things if thing.turned
    ]
    assert {thing.digit for thing in turned} == set(digit_scenes.SIDEWAYS)


def test_labels_of_random_frames_name_digit_and_quarter():
    images, labels = digit_scenes.random_frames("train", 40, np.random.default_rng(0))
    assert images.shape == (40, 60, 60)
    assert images.dtype == np.uint8
    assert labels.shape == (40, digit_scenes.PATCHES)
    assert labels.min() >= 0
    assert labels.max() == digit_scenes.NONE
    whole = labels.reshape(40, 5, 5)
    seen = whole < digit_scenes.NONE
    # The first quarter of a digit has the second to its right, unless another digit lies over it.
    first = seen & (whole % 4 == 0)
    right = np.roll(whole, -1, axis=2)
    assert (right == whole + 1)[first].mean() > 0.8


def sources(tmp_path, **changes):
    values = {
        "sources": {"digits_scenes": SourceConfig(weight=1.0, records="", features="")},
        "draw": DrawConfig(train=3, validation=1, test=2),
        "seed": 0,
        "epochs": 0.0,
        "frames": 6,
        "system": "Watch.",
        "tokenizer": "",
        "vocab_size": 300,
        "text_tokens": 200,
        "labels": 150,
        "disturb_probability": 0.0,
        "disturb_window": 0,
        "batch_size": 1,
        "num_workers": 0,
    }
    return Sources(DataConfig(**(values | changes)), tmp_path)


def test_streams_go_through_the_records_of_all_datasets_with_their_objects(tmp_path):
    drawn = sources(tmp_path)
    (record, _) = drawn.records("digits_scenes", "test")
    stream = drawn.unencoded("digits_scenes", "test")[0]
    made = digit_scenes.make_stream("test", 0, 0, 6)
    assert record.id == made["id"]
    assert [turn.text for turn in record.turns] == [turn["text"] for turn in made["turns"]]
    assert np.array_equal(stream["frames"], made["frames"])
    assert stream["objects"].dtype == bool
    assert np.array_equal(stream["objects"], made["objects"])


def test_a_run_draws_one_dataset_at_most(tmp_path):
    source = SourceConfig(weight=1.0, records="", features="")
    with pytest.raises(UserError, match="draws digits_scenes and digits_stream; expected one"):
        sources(tmp_path, sources={"digits_scenes": source, "digits_stream": source})


def test_the_two_drawn_datasets_lie_in_directories_of_their_own(tmp_path):
    ScenesDataset(tmp_path, DigitsConfig(train=1, validation=1, test=1, frames=4))
    assert (tmp_path / "digits_scenes" / "1-1-1-f4-s0" / "1.0.0").is_dir()
