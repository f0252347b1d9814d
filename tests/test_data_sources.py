"""The datasets of a run: shares, updates, manifests, and what is refused."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.test_data_pipeline import META, TOKENS, WIDTH
from videollm_mod_jax.data.annotations import Dataset, Parsed, Record, Report, Source, Turn, Videos
from videollm_mod_jax.data.builders.stored import write_dataset
from videollm_mod_jax.data.config import DataConfig, DrawConfig, SourceConfig
from videollm_mod_jax.data.features import FeatureWriter
from videollm_mod_jax.data.sources import Sources, check_stored, merge_stretches
from videollm_mod_jax.data.tokenizer import train_bpe
from videollm_mod_jax.errors import UserError

COUNTS = {"ego4d_narration": 6, "coin_step": 3}
SECONDS = 4.0


def prepare(name, count, root):
    """A dataset of `count` videos of eight frames, the last of which are for validation."""
    names = [f"{name}-{i}" for i in range(count + 1)]
    records = [
        Record(id=video, video=video, start=0.0, stop=SECONDS, turns=(Turn("assistant", 1.0, "a"),))
        for video in names
    ]
    splits = {"train": records[:-1], "validation": records[-1:]}

    def read(source):
        source.report.keep(len(records))
        return Parsed(splits=splits)

    dataset = Dataset(name=name, page="", read=read, benchmark="stream")
    videos = Videos(2.0, dict.fromkeys(names, 8))
    write_dataset(dataset, Source(root, videos, 100, Report()), root / "datasets")
    with FeatureWriter(root / "features" / name, META) as writer:
        for i, video in enumerate(names):
            writer.add(video, np.full((8, TOKENS, WIDTH), i + 100 * (name == "coin_step")))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    for name, count in COUNTS.items():
        prepare(name, count, root)
    return root


def config(root, **weights):
    return DataConfig(
        sources={
            name: SourceConfig(
                weight=weight,
                records=str(root / "datasets" / name),
                features=str(root / "features" / name),
            )
            for name, weight in weights.items()
        },
        draw=None,
        seed=0,
        epochs=0.0,
        frames=8,
        system="Watch.",
        tokenizer="",
        vocab_size=300,
        text_tokens=64,
        labels=32,
        disturb_probability=0.0,
        disturb_window=1,
        batch_size=3,
        num_workers=0,
    )


TOKENIZER = train_bpe(["\nUser: Assistant: [ , ]", "Watch."] * 4, vocab_size=300)


def examples(sources, name, split="train"):
    return sources.examples(name, split, TOKENIZER, tokens_per_frame=TOKENS, training=True)


def test_an_epoch_of_equal_weights_is_the_concatenation(root, tmp_path):
    sources = Sources(config(root, ego4d_narration=1.0, coin_step=1.0), tmp_path)
    learnt = {name: examples(sources, name) for name in sources.trained}
    batches = sources.training_batches(learnt, 0, 0, 1)
    epoch = list(itertools.islice(batches, 3))
    batches.close()
    seen = sorted(int(value) for batch in epoch for value in batch["features"][:, 0, 0, 0])
    assert seen == [*range(6), *range(100, 103)]


def test_epochs_decide_the_updates_and_weights_the_length_of_an_epoch(root, tmp_path):
    once = dataclasses.replace(config(root, ego4d_narration=1.0, coin_step=1.0), epochs=1.5)
    assert Sources(once, tmp_path).updates(7) == 5  # 13.5 examples in batches of 3
    twice = dataclasses.replace(config(root, ego4d_narration=1.0, coin_step=2.0), epochs=1.0)
    assert Sources(twice, tmp_path).updates(7) == 4
    steps = config(root, ego4d_narration=1.0)
    assert Sources(steps, tmp_path).updates(7) == 7


def test_a_dataset_without_weight_is_opened_and_not_learnt_from(root, tmp_path):
    sources = Sources(config(root, ego4d_narration=1.0, coin_step=0.0), tmp_path)
    assert sources.names == ("ego4d_narration", "coin_step")
    assert sources.trained == ("ego4d_narration",)
    assert sources.training_stretches() == {
        "ego4d_narration": {f"ego4d_narration-{i}": [[0.0, SECONDS]] for i in range(6)}
    }
    assert len(examples(sources, "coin_step", "validation")) == 1


def test_drawn_example_of_merged_stretches():
    stretches = [("a", 0, 10), ("a", 20, 30), ("b", 0, 5), ("a", 8, 15)]
    records = [Record(id="", video=v, start=a, stop=b, turns=()) for v, a, b in stretches]
    assert merge_stretches(records) == {"a": [[0, 15], [20, 30]], "b": [[0, 5]]}


def test_what_is_missing_or_misnamed_is_refused(root, tmp_path):
    good = config(root, ego4d_narration=1.0)
    check_stored(good)

    def changed(**values):
        source = dataclasses.replace(good.sources["ego4d_narration"], **values)
        return dataclasses.replace(good, sources={"ego4d_narration": source})

    with pytest.raises(UserError, match="nowhere"):
        check_stored(changed(records=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="nowhere: not a feature store"):
        check_stored(changed(features=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="holds the dataset 'coin_step'; name the source so"):
        check_stored(changed(records=str(root / "datasets" / "coin_step")))
    sources = Sources(good, tmp_path)
    with pytest.raises(UserError, match="the split is 'test'; ego4d_narration has train"):
        sources.records("ego4d_narration", "test")
    with pytest.raises(UserError, match="the dataset is 'own'; the config has ego4d_narration"):
        sources.dataset("own")
    with pytest.raises(UserError, match=r"data\.tokenizer is empty"):
        sources.make_tokenizer()
    with pytest.raises(UserError, match="field 'tower': expected x, found t"):
        sources.examples("ego4d_narration", "train", TOKENIZER, tokens_per_frame=TOKENS, tower="x")


def test_a_config_of_sources_that_makes_no_sense_is_refused(root):
    good = config(root, ego4d_narration=1.0)
    with pytest.raises(UserError, match=r"SourceConfig\.weight is -1\.0"):
        config(root, coin_step=-1.0)
    with pytest.raises(UserError, match="no dataset has a weight above 0"):
        config(root, coin_step=0.0)
    with pytest.raises(UserError, match=r"data\.draw is DrawConfig"):
        dataclasses.replace(good, draw=DrawConfig(train=1, validation=1, test=1))
    nowhere = SourceConfig(weight=1.0, records="", features="f")
    with pytest.raises(UserError, match=r"data\.sources\.own\.records is ''"):
        dataclasses.replace(good, sources={"own": nowhere})
