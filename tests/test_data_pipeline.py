"""Batches: processes, workers and restarts change nothing; no record is lost or doubled."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest

from videollm_mod_jax.data import digits
from videollm_mod_jax.data.annotations import Record, Turn
from videollm_mod_jax.data.augment import Disturbance
from videollm_mod_jax.data.dialogue import (
    Assistant,
    Stream,
    User,
    conversation_of,
    count_frames,
    render,
)
from videollm_mod_jax.data.example import Budget, build_example, fit
from videollm_mod_jax.data.features import FeatureMeta, FeatureSource, FeatureWriter
from videollm_mod_jax.data.pipeline import (
    Examples,
    evaluation_batches,
    training_batches,
)
from videollm_mod_jax.data.tokenizer import BOS, EOS, train_bpe
from videollm_mod_jax.errors import UserError

COUNT, FRAMES, TOKENS, WIDTH, SYSTEM = 10, 8, 2, 3, "Watch."
META = FeatureMeta(features_per_frame=TOKENS, width=WIDTH, fps=2.0, resolution=48, tower="t")


def features_of(i):
    """Every value of video i is i, so that a batch shows which videos it holds."""
    return np.full((FRAMES, TOKENS, WIDTH), i, np.float32)


def record_of(stream):
    turns = tuple(Turn(**turn) for turn in stream["turns"])
    return Record(id=stream["id"], video=stream["id"], start=0.0, stop=FRAMES / 2, turns=turns)


def make_examples(path, disturb=None):
    records = [record_of(digits.make_stream("train", i, 0, FRAMES)) for i in range(COUNT)]
    if not path.exists():
        with FeatureWriter(path, META) as writer:
            for i, record in enumerate(records):
                writer.add(record.id, features_of(i))
    texts = [render(conversation_of(record, 2.0, SYSTEM), 1, BOS, EOS).text for record in records]
    tokenizer = train_bpe(texts, 300)
    return Examples(
        records,
        FeatureSource(path),
        tokenizer,
        TOKENS,
        SYSTEM,
        Budget(FRAMES, 150, 130),
        disturb=disturb,
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("features") / "train"


@pytest.fixture(scope="module")
def examples(path):
    return make_examples(path, Disturbance(0.5, 1))


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def videos(batches):
    return np.concatenate([batch["features"][:, 0, 0, 0] for batch in batches]).astype(int)


def assert_same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_an_epoch_holds_every_record_once_and_the_next_is_shuffled_anew(examples):
    order = videos(take(training_batches([(examples, 1.0)], 4, seed=0), 5))  # two epochs of 10
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert (
        order.tolist() != videos(take(training_batches([(examples, 1.0)], 4, seed=1), 5)).tolist()
    )


def test_rows_are_the_examples(path):
    plain = make_examples(path)
    (batch,) = take(training_batches([(plain, 1.0)], 4, seed=0), 1)
    for row, i in enumerate(videos([batch])):
        record = plain.records[i]
        conversation = conversation_of(record, 2.0, SYSTEM)
        one = build_example(conversation, features_of(i), plain.tokenizer, TOKENS, plain.budget)
        assert_same([one], [{key: array[row] for key, array in batch.items()}])


@pytest.mark.parametrize("start", [1, 3, 7])
def test_start_batch_equals_skipping(examples, start):
    whole = take(training_batches([(examples, 1.0)], 4, seed=0), start + 3)
    resumed = take(training_batches([(examples, 1.0)], 4, seed=0, start_batch=start), 3)
    assert_same(resumed, whole[start:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(examples, processes):
    whole = take(training_batches([(examples, 1.0)], 4, seed=0, start_batch=1), 4)
    parts = [
        take(training_batches([(examples, 1.0)], 4, 0, p, processes, start_batch=1), 4)
        for p in range(processes)
    ]
    joined = [
        {key: np.concatenate([part[b][key] for part in parts]) for key in whole[b]}
        for b in range(4)
    ]
    assert_same(joined, whole)


def test_disturbance_is_new_in_every_epoch(examples):
    by_video = {}
    for batch in take(training_batches([(examples, 1.0)], 1, seed=0), 100):
        for i, kinds in zip(videos([batch]), batch["label_kinds"], strict=True):
            by_video.setdefault(int(i), set()).add(kinds.tobytes())
    assert sum(len(kinds) > 1 for kinds in by_video.values()) >= 7


def test_evaluation_is_in_order_undisturbed_and_padded_with_a_mask(examples, path):
    batches = list(evaluation_batches(examples, 4))
    assert [b["example_valid"].tolist() for b in batches] == [[True] * 4] * 2 + [
        [True] * 2 + [False] * 2
    ]
    index = np.concatenate([b["example_index"][b["example_valid"]] for b in batches])
    assert index.tolist() == list(range(10))
    assert not batches[-1]["label_kinds"][2:].any()
    plain = make_examples(path)
    for batch in batches:
        for row in np.flatnonzero(batch["example_valid"]):
            one = plain.load(int(batch["example_index"][row]))
            assert_same([one], [{key: batch[key][row] for key in one}])
    parts = [list(evaluation_batches(examples, 4, p, 2)) for p in range(2)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
    assert_same(joined, batches)


def test_turns_belong_to_the_example(examples):
    example, turns = examples.load(0), examples.turns(0)
    said = [turn.text for turn in examples.records[0].turns if turn.role == "assistant"]
    found = [examples.tokenizer.decode(example["labels"][t.answer_slots]) for t in turns]
    assert [text.strip() for text in found] == [f"Assistant: {text}" for text in said]


def replaced(examples, **changes):
    return dataclasses.replace(examples, **changes)


def test_a_record_shows_its_stretch_of_the_video(path):
    examples = make_examples(path)
    said = (Turn("user", 1.0, "Q"), Turn("assistant", 2.5, "A"))
    middle = Record(id="middle", video="train-00003", start=1.0, stop=3.0, turns=said)
    short = replaced(examples, records=[middle])
    frames = np.arange(FRAMES)[:, None, None] * np.ones((FRAMES, TOKENS, WIDTH))
    with FeatureWriter(path.parent / "numbered", META) as writer:
        writer.add("train-00003", frames)
    loaded = replaced(short, features=FeatureSource(path.parent / "numbered")).load(0)
    assert loaded["features"][:, 0, 0].tolist() == [2, 3, 4, 5, 0, 0, 0, 0]
    assert short.conversation(0)[1:] == (User("Q"), Stream(4, learn=4), Assistant("A"))


def test_features_that_are_not_there_are_refused(examples, tmp_path):
    with FeatureWriter(tmp_path / "other", META) as writer:
        writer.add("train-00001", features_of(1)[:-1])
    other = replaced(examples, features=FeatureSource(tmp_path / "other"))
    with pytest.raises(UserError, match="other: train-00002: no such video was encoded"):
        other.load(2)
    with pytest.raises(
        UserError, match=r"train-00001: expected frames of 0 \.\.\. 7, found 0 \.\.\. 8"
    ):
        other.load(1)


def test_a_bad_record_is_named_by_the_pipeline(examples):
    records = [
        dataclasses.replace(record, turns=(Turn("assistant", 1.0, " "),))
        for record in examples.records
    ]
    bad = replaced(examples, records=records)
    with pytest.raises(UserError, match=r"train-0000\d: turn 0: field 'text'"):
        next(training_batches([(bad, 1.0)], 4, seed=0))


def test_a_conversation_that_is_too_long_is_cut_in_training_and_refused_in_evaluation(path):
    examples = make_examples(path)
    index = max(range(COUNT), key=lambda i: len(examples.records[i].turns))
    whole = examples.conversation(index)
    budget = dataclasses.replace(examples.budget, text_tokens=examples.budget.text_tokens // 3)
    with pytest.raises(UserError, match="text_tokens: expected at most 50"):
        replaced(examples, budget=budget).load(index)
    training = replaced(examples, budget=budget, training=True)
    cut, looked_at = training.count_cut(100)
    assert 0 < cut < looked_at == COUNT
    assert replaced(training, budget=examples.budget).count_cut(100) == (0, COUNT)
    loaded = training.load(index)
    cut = fit(whole, examples.tokenizer, TOKENS, budget)
    expected = build_example(
        cut, features_of(index)[: count_frames(cut)], examples.tokenizer, TOKENS, budget
    )
    assert_same([loaded], [expected])


# Two shares to one: every window of three batches of four holds eight of one and four of the other.
SHARES = (2.0, 1.0)


@pytest.fixture(scope="module")
def mixture(examples, path):
    few = replaced(make_examples(path), records=examples.records[:3])
    with FeatureWriter(path.parent / "few", META) as writer:
        for i in range(3):
            writer.add(few.records[i].id, features_of(100 + i))
    few = replaced(few, features=FeatureSource(path.parent / "few"))
    return list(zip((examples, few), SHARES, strict=True))


def test_the_datasets_of_a_mixture_take_turns_by_their_shares(mixture):
    order = videos(take(training_batches(mixture, 4, seed=0), 15))
    assert [(order[i : i + 12] >= 100).sum() for i in range(0, 60, 12)] == [4] * 5
    many, few = order[order < 100], order[order >= 100]
    assert sorted(many[:10]) == sorted(many[10:20]) == list(range(10))
    assert all(sorted(few[i : i + 3]) == [100, 101, 102] for i in range(0, 18, 3))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mixture_goes_on_where_it_stopped(mixture, processes):
    whole = take(training_batches(mixture, 4, seed=0), 7)
    parts = [take(training_batches(mixture, 4, 0, p, processes, 3), 4) for p in range(processes)]
    joined = [
        {key: np.concatenate([part[b][key] for part in parts]) for key in whole[b]}
        for b in range(4)
    ]
    assert_same(joined, whole[3:])


def test_a_mixture_of_one_dataset_is_that_dataset(examples):
    one = take(training_batches([(examples, 0.3)], 4, seed=0), 6)
    assert_same(one, take(training_batches([(examples, 1.0)], 4, seed=0), 6))


@pytest.mark.parametrize("share", [0.0, -1.0])
def test_a_share_of_nothing_is_refused(examples, share):
    with pytest.raises(UserError, match="expected more than 0"):
        training_batches([(examples, share)], 4, seed=0)


def test_batch_size_must_divide(examples):
    with pytest.raises(UserError, match="multiple of the 3 processes, found 4"):
        training_batches([(examples, 1.0)], 4, 0, 0, 3)


WORKERS = """
import pathlib, sys
from absl import flags
from tests.test_data_pipeline import Disturbance, assert_same, make_examples, take, training_batches

if __name__ == "__main__":
    examples = make_examples(pathlib.Path(sys.argv[1]), Disturbance(0.5, 1))
    alone = take(training_batches([(examples, 1.0)], 4, seed=0, start_batch=2), 5)
    helped = take(training_batches([(examples, 1.0)], 4, seed=0, start_batch=2, num_workers=2), 5)
    assert_same(helped, alone)
    print("same")
"""


def test_workers_change_nothing(examples, path, tmp_path):
    """In a script of its own, because workers import the main module again."""
    script = tmp_path / "main.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, script, path],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu", "PATH": ""},
        check=False,
    )
    assert done.stdout == "same\n", done.stderr
