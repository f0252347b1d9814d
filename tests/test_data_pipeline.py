"""Batches: processes, workers and restarts change nothing; no record is lost or doubled."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from videollm_mod_jax.data import digits
from videollm_mod_jax.data.augment import Disturbance
from videollm_mod_jax.data.dialogue import conversation_from_turns, render
from videollm_mod_jax.data.example import Budget, build_example
from videollm_mod_jax.data.features import FeatureMeta, FeatureSource, FeatureWriter
from videollm_mod_jax.data.pipeline import (
    Examples,
    evaluation_batches,
    training_batches,
    turns_of_record,
)
from videollm_mod_jax.data.tokenizer import BOS, EOS, train_bpe
from videollm_mod_jax.errors import UserError

COUNT, FRAMES, TOKENS, WIDTH, SYSTEM = 10, 8, 2, 3, "Watch."
META = FeatureMeta(features_per_frame=TOKENS, width=WIDTH, fps=2.0, resolution=48, tower="t")


def features_of(i):
    """Every value of video i is i, so that a batch shows which videos it holds."""
    return np.full((FRAMES, TOKENS, WIDTH), i, np.float32)


def make_examples(path, disturb=None):
    records = [digits.make_stream("train", i, 0, FRAMES) for i in range(COUNT)]
    if not path.exists():
        with FeatureWriter(path, META) as writer:
            for i, record in enumerate(records):
                writer.add(record["id"], features_of(i))
    texts = [
        render(conversation_from_turns(r["turns"], FRAMES, 2.0, SYSTEM), 1, BOS, EOS).text
        for r in records
    ]
    tokenizer = train_bpe(texts, 300)
    return Examples(
        records, FeatureSource(path), tokenizer, TOKENS, SYSTEM, Budget(FRAMES, 150, 130), disturb
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
    order = videos(take(training_batches(examples, 4, seed=0), 5))  # two epochs of 10
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert order.tolist() != videos(take(training_batches(examples, 4, seed=1), 5)).tolist()


def test_rows_are_the_examples(path):
    plain = make_examples(path)
    (batch,) = take(training_batches(plain, 4, seed=0), 1)
    for row, i in enumerate(videos([batch])):
        record = plain.records[i]
        conversation = conversation_from_turns(record["turns"], FRAMES, 2.0, SYSTEM)
        one = build_example(conversation, features_of(i), plain.tokenizer, TOKENS, plain.budget)
        assert_same([one], [{key: array[row] for key, array in batch.items()}])


@pytest.mark.parametrize("start", [1, 3, 7])
def test_start_batch_equals_skipping(examples, start):
    whole = take(training_batches(examples, 4, seed=0), start + 3)
    resumed = take(training_batches(examples, 4, seed=0, start_batch=start), 3)
    assert_same(resumed, whole[start:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(examples, processes):
    whole = take(training_batches(examples, 4, seed=0, start_batch=1), 4)
    parts = [
        take(training_batches(examples, 4, 0, p, processes, start_batch=1), 4)
        for p in range(processes)
    ]
    joined = [
        {key: np.concatenate([part[b][key] for part in parts]) for key in whole[b]}
        for b in range(4)
    ]
    assert_same(joined, whole)


def test_disturbance_is_new_in_every_epoch(examples):
    by_video = {}
    for batch in take(training_batches(examples, 1, seed=0), 100):
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
    said = [t["text"] for t in examples.records[0]["turns"] if t["role"] == "assistant"]
    found = [examples.tokenizer.decode(example["labels"][t.answer_slots]) for t in turns]
    assert [text.strip() for text in found] == [f"Assistant: {text}" for text in said]


def test_turns_are_read_as_rows_or_as_columns():
    rows = [
        {"role": "user", "time": 1.0, "text": "a"},
        {"role": "assistant", "time": 1.0, "text": "b"},
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    assert turns_of_record({"turns": rows}) == turns_of_record({"turns": columns}) == rows
    assert turns_of_record({"turns": {"role": [], "time": [], "text": []}}) == []


def test_features_of_other_videos_are_refused(examples, tmp_path):
    with FeatureWriter(tmp_path / "short", META) as writer:
        writer.add("train-00000", features_of(0))
    with pytest.raises(UserError, match="short: expected features of 10 videos, found 1"):
        Examples(
            examples.records,
            FeatureSource(tmp_path / "short"),
            examples.tokenizer,
            TOKENS,
            "",
            Budget(1, 1, 1),
        )
    with FeatureWriter(tmp_path / "mixed", META) as writer:
        for i in reversed(range(COUNT)):
            writer.add(f"train-{i:05d}", features_of(i))
    mixed = Examples(
        examples.records,
        FeatureSource(tmp_path / "mixed"),
        examples.tokenizer,
        TOKENS,
        SYSTEM,
        examples.budget,
    )
    with pytest.raises(
        UserError, match="record 2: expected features of 'train-00002', found 'train-00007'"
    ):
        mixed.load(2)


def test_a_bad_record_is_named_by_the_pipeline(examples):
    records = [dict(record) for record in examples.records]
    for record in records:
        record["turns"] = [{"role": "assistant", "time": 1.0, "text": ""}]
    bad = Examples(records, examples.features, examples.tokenizer, TOKENS, SYSTEM, examples.budget)
    with pytest.raises(UserError, match=r"train-0000\d: turn 0: field 'text'"):
        next(training_batches(bad, 4, seed=0))


def test_batch_size_must_divide(examples):
    with pytest.raises(UserError, match="multiple of the 3 processes, found 4"):
        training_batches(examples, 4, 0, 0, 3)


WORKERS = """
import pathlib, sys
from absl import flags
from tests.test_data_pipeline import Disturbance, assert_same, make_examples, take, training_batches

if __name__ == "__main__":
    examples = make_examples(pathlib.Path(sys.argv[1]), Disturbance(0.5, 1))
    alone = take(training_batches(examples, 4, seed=0, start_batch=2), 5)
    helped = take(training_batches(examples, 4, seed=0, start_batch=2, num_workers=2), 5)
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
