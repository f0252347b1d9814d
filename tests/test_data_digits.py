"""Digit streams: disjoint scans, narrations that tell the truth, determinism, the TFDS build."""

import pickle
import re

import numpy as np
import pytest
from sklearn import datasets

from videollm_mod_jax.data import digits
from videollm_mod_jax.data.annotations import Turn
from videollm_mod_jax.data.builders import digits_stream
from videollm_mod_jax.data.video import read_video
from videollm_mod_jax.errors import UserError

NUMBER = {name: n for n, name in enumerate(digits.NUMBERS)}
FRAMES = 20


@pytest.fixture(scope="module")
def streams():
    return [digits.make_stream("test", i, 0, FRAMES) for i in range(120)]


def test_splits_share_no_scan_and_use_all():
    ids = {split: set(digits.scans(split).ids.tolist()) for split in digits.SPLITS}
    assert not ids["train"] & ids["validation"]
    assert not ids["train"] & ids["test"]
    assert not ids["validation"] & ids["test"]
    assert set().union(*ids.values()) == set(range(1797))
    scanned = datasets.load_digits()
    for split in digits.SPLITS:
        one = digits.scans(split)
        np.testing.assert_array_equal(one.labels, scanned.target[one.ids])
        np.testing.assert_allclose(one.images * 16, scanned.images[one.ids])
        assert np.bincount(one.labels, minlength=10).min() >= 8
        for c in range(10):
            assert set(one.labels[one.first[c] : one.first[c + 1]].tolist()) == {c}
    with pytest.raises(UserError, match="split: expected one of train, validation, test"):
        digits.scans("dev")


def retell(narrations):
    """Places by frame and the number of appearances, from the narrations' words alone."""
    now, seen, places, counts = {}, 0, [], []
    for f in range(FRAMES):
        text = narrations.get(f, "")
        if m := re.fullmatch(r"(?:A|An) (\w+) appears at the (.+)\.", text):
            assert NUMBER[m[1]] not in now
            assert m[2] not in now.values()
            now[NUMBER[m[1]]] = m[2]
            seen += 1
        elif m := re.fullmatch(r"The (\w+) moves to the (.+)\.", text):
            old, new = (digits.PLACES.index(p) for p in (now[NUMBER[m[1]]], m[2]))
            assert abs(old // 3 - new // 3) + abs(old % 3 - new % 3) == 1
            assert m[2] not in now.values()
            now[NUMBER[m[1]]] = m[2]
        elif m := re.fullmatch(r"The (\w+) leaves\.", text):
            del now[NUMBER[m[1]]]
        else:
            assert not text
        at = {digits.PLACES.index(place): c for c, place in now.items()}
        places.append([at.get(p, digits.EMPTY) for p in range(9)])
        counts.append(seen)
    return np.array(places), counts


def test_narrations_and_answers_tell_what_is_seen(streams):
    asked, before_an_event = {digits.HOW_MANY: 0, digits.WHICH: 0}, 0
    for stream in streams:
        narrations, questions = {}, []
        turns = stream["turns"]
        for turn, following in zip(turns, [*turns[1:], None], strict=True):
            f = int(turn["time"] * 2)
            assert f == turn["time"] * 2
            if turn["role"] == "user":
                assert following["time"] == turn["time"]
                questions.append((f, turn["text"], following["text"]))
            elif not questions or (f, turn["text"]) != questions[-1][::2]:
                assert f not in narrations  # one event per frame
                narrations[f] = turn["text"]
        places, counts = retell(narrations)
        np.testing.assert_array_equal(stream["places"], places)
        assert (np.diff(sorted(narrations)) >= 2).all()
        assert ((places != digits.EMPTY).sum(1) <= 3).all()
        for f, question, answer in questions:
            asked[question] += 1
            before_an_event += f in narrations
            if question == digits.HOW_MANY:
                assert NUMBER[answer.rstrip(".").lower()] == counts[f - 1]
            else:
                words = re.findall(r"an? (\w+)", answer.lower())
                visible = places[f - 1][places[f - 1] != digits.EMPTY].tolist()
                assert [NUMBER[w] for w in words] == visible
                assert visible or answer == "None."
    assert 0.35 * len(streams) < sum(asked.values()) < 0.65 * len(streams)
    assert min(asked.values()) > 10
    # Otherwise a model learns that nothing happens after a question.
    assert 0 < before_an_event < sum(asked.values())


def test_most_frames_are_silent_but_few_streams_are(streams):
    spoken = [len({t["time"] for t in s["turns"] if t["role"] == "assistant"}) for s in streams]
    assert 0.25 < np.mean(spoken) / FRAMES < 0.45
    assert min(spoken) >= 3


def test_articles_and_lists_read_well():
    def listed(*classes):
        return digits._list(np.array(classes))

    assert listed(-1, 2, -1, 7, 8) == "A two, a seven and an eight."
    assert listed(8, 0) == "An eight and a zero."
    assert listed(-1, 8) == "An eight."
    assert listed(-1, -1) == "None."


def test_digits_are_drawn_where_they_are_said_to_be(streams):
    """A place with a digit is bright, one without is not, where jitter does not reach."""
    bright, dim = [], []
    for stream in streams[:40]:
        cells = stream["frames"].reshape(FRAMES, 3, 16, 3, 16).transpose(0, 1, 3, 2, 4)
        peaks = cells[..., 4:12, 4:12].max((-1, -2)).reshape(FRAMES, 9)
        there = stream["places"] != digits.EMPTY
        bright += peaks[there].tolist()
        dim += peaks[~there].tolist()
    assert np.quantile(bright, 0.01) > 190
    assert np.quantile(dim, 0.99) < 170


def test_only_scans_of_the_split_are_drawn(monkeypatch):
    """With the scans of the other splits blanked out nothing changes."""
    before = digits.make_stream("test", 3, 0, FRAMES)["frames"]
    scanned = datasets.load_digits()
    others = np.setdiff1d(np.arange(1797), digits.scans("test").ids)
    scanned.images[others] = 0
    monkeypatch.setattr(datasets, "load_digits", lambda: scanned)
    digits.scans.cache_clear()
    after = digits.make_stream("test", 3, 0, FRAMES)["frames"]
    scanned.images[:] = 0
    digits.scans.cache_clear()
    with np.errstate(invalid="ignore"):
        scanned.images[0, 0, 0] = 16  # the scale divides by the largest value
        blank = digits.make_stream("test", 3, 0, FRAMES)["frames"]
    digits.scans.cache_clear()
    np.testing.assert_array_equal(after, before)
    assert (blank != before).any()


def test_streams_depend_on_seed_split_and_index_only():
    def frames(split, index, seed):
        return digits.make_stream(split, index, seed, 6)["frames"].tobytes()

    one = frames("train", 5, 1)
    digits.random_frames("train", 3, np.random.default_rng(0))
    assert frames("train", 5, 1) == one
    others = {frames("train", 6, 1), frames("train", 5, 2), frames("validation", 5, 1)}
    assert len(others | {one}) == 4
    # Not only the scans: the stories differ, too.
    times = [
        [[t["time"] for t in digits.make_stream(split, i, 0, FRAMES)["turns"]] for i in range(5)]
        for split in digits.SPLITS
    ]
    assert all(len({str(split[i]) for split in times}) == 3 for i in range(5))


def test_random_frames_are_labelled_and_look_like_streams(streams):
    images, labels = digits.random_frames("test", 400, np.random.default_rng(0))
    assert images.shape == (400, 48, 48)
    assert images.dtype == np.uint8
    assert labels.shape == (400, 9)
    shown = labels != digits.BACKGROUND
    assert set(shown.sum(1).tolist()) == {0, 1, 2, 3}
    assert set(np.unique(labels).tolist()) == set(range(11))
    for row, there in zip(labels, shown, strict=True):
        assert len(set(row[there].tolist())) == there.sum()
    cells = images.reshape(400, 3, 16, 3, 16)[:, :, 4:12, :, 4:12].max((2, 4)).reshape(400, 9)
    assert np.quantile(cells[shown], 0.01) > 190
    assert np.quantile(cells[~shown], 0.99) < 170
    frames = np.concatenate([s["frames"] for s in streams])
    assert abs(float(images[shown.sum(1) == 2].mean()) - frames.mean()) < 12


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    config = digits_stream.DigitsConfig(train=5, validation=2, test=3, frames=8, seed=1)
    return digits_stream.DigitsDataset(tmp_path_factory.mktemp("tfds"), config)


def test_the_dataset_holds_the_streams_in_order(drawn):
    assert set(drawn.splits) == set(digits.SPLITS)
    for split, count in (("train", 5), ("validation", 2), ("test", 3)):
        records, streams = drawn.records(split), drawn.streams(split)
        assert len(records) == len(streams) == count
        assert drawn.videos(split) == tuple(record.video for record in records)
        for i in range(count):
            stream, record = digits.make_stream(split, i, 1, 8), records[i]
            assert (record.id, record.video) == (stream["id"], stream["id"])
            assert (record.start, record.stop) == (0.0, 8 / stream["fps"])
            assert record.turns == tuple(Turn(**turn) for turn in stream["turns"])
            np.testing.assert_array_equal(streams[i]["frames"], stream["frames"])
            np.testing.assert_array_equal(streams[i]["places"], stream["places"])


def test_records_can_be_read_by_other_processes(drawn):
    records = drawn.records("train")
    assert pickle.loads(pickle.dumps(records))[1] == records[1]


def test_tfds_build_is_reused(tmp_path, monkeypatch):
    config = digits_stream.DigitsConfig(train=1, validation=1, test=1, frames=4)
    first = digits_stream.DigitsDataset(tmp_path, config)
    assert (tmp_path / "digits_stream" / "1-1-1-f4-s0" / "1.0.0").is_dir()
    monkeypatch.setattr(digits, "make_stream", None)  # nothing is drawn a second time
    again = digits_stream.DigitsDataset(tmp_path, config)
    assert again.records("train")[0] == first.records("train")[0]


def test_damage_names_the_record_and_what_helps(tmp_path):
    config = digits_stream.DigitsConfig(train=3, validation=1, test=1, frames=4)
    digits_stream.DigitsDataset(tmp_path, config)
    (shard,) = tmp_path.rglob("digits_stream-train.array_record*")
    content = shard.read_bytes()
    at = content.index(b"appears")
    shard.write_bytes(content[:at] + b"APPEARS" + content[at + 7 :])
    remedy = re.escape(f"remove {shard.parent}, and it is drawn again")
    dataset = digits_stream.DigitsDataset(tmp_path, config)
    with pytest.raises(UserError, match=rf"record \d of train is damaged \(.*; {remedy}"):
        list(dataset.records("train"))
    info = shard.parent / "dataset_info.json"
    info.write_text("\ufeff" + info.read_text())
    with pytest.raises(UserError, match=rf"dataset_info\.json is no .*; {remedy}"):
        digits_stream.DigitsDataset(tmp_path, config)


def test_tfds_build_of_a_listed_configuration(tmp_path, monkeypatch):
    """Such as the default one, made small: TFDS treats it unlike one of the caller's own."""
    small = digits_stream.DigitsConfig(train=2, validation=1, test=1, frames=4)
    monkeypatch.setattr(digits_stream.DigitsStream, "BUILDER_CONFIGS", (small,))
    same = digits_stream.DigitsConfig(train=2, validation=1, test=1, frames=4)
    assert len(digits_stream.DigitsDataset(tmp_path, same).records("train")) == 2


def test_an_interrupted_build_leaves_no_dataset(tmp_path, monkeypatch):
    make, config = (
        digits.make_stream,
        digits_stream.DigitsConfig(train=3, validation=1, test=1, frames=4),
    )

    def interrupted(split, index, seed, frames):
        if index == 2:
            raise KeyboardInterrupt
        return make(split, index, seed, frames)

    monkeypatch.setattr(digits, "make_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits_stream.DigitsDataset(tmp_path, config)
    assert not list(tmp_path.glob("digits_stream/*/1.0.0"))
    monkeypatch.setattr(digits, "make_stream", make)
    assert len(digits_stream.DigitsDataset(tmp_path, config).records("train")) == 3


def test_a_stream_becomes_a_video_and_comes_back(drawn, tmp_path):
    record = drawn.streams("test")[0]
    digits.stream_to_video(record, tmp_path / "a.mp4")
    frames = list(read_video(tmp_path / "a.mp4", digits.FPS, size=48))
    assert [f.time for f in frames] == [i / 2 for i in range(8)]
    assert next(read_video(tmp_path / "a.mp4", 2.0)).image.shape == (384, 384, 3)
    images = np.stack([f.image for f in frames]).astype(int)
    # The noise of a pixel is 6 grey levels; the codec and the resizing add less than that.
    assert np.abs(images - record["frames"][..., None].astype(int)).mean() < 5
