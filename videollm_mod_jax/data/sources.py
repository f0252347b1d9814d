"""The datasets of a run, opened: their records, features and tokenizer.

    WORKDIR/data/               the dataset that is drawn, if there is one
    WORKDIR/features/SPLIT/     the features of its frames

All other datasets lie where the config says.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from videollm_mod_jax.data import augment, dialogue
from videollm_mod_jax.data.annotations import Record
from videollm_mod_jax.data.builders.digits_scenes import ScenesDataset
from videollm_mod_jax.data.builders.digits_stream import DigitsConfig, DigitsDataset
from videollm_mod_jax.data.builders.stored import StoredDataset, open_dataset
from videollm_mod_jax.data.config import DRAWN, DataConfig, SourceConfig
from videollm_mod_jax.data.features import FeatureSource
from videollm_mod_jax.data.pipeline import Examples, training_batches
from videollm_mod_jax.data.tokenizer import Tokenizer, train_bpe
from videollm_mod_jax.errors import UserError

TRAIN = "train"

TRAINED_ON = "trained_on.json"
"""The file of a run's directory that keeps its `Sources.training_stretches`."""

_DRAWERS = {"digits_stream": DigitsDataset, "digits_scenes": ScenesDataset}


def check_stored(config: DataConfig) -> None:
    """Looks whether every dataset that is not drawn, and its features, are there.

    Raises:
      UserError: one is missing, damaged, or another than its name says.
    """
    for name, source in config.sources.items():
        if name not in DRAWN:
            _open_stored(name, source)
            FeatureSource(source.features)


def _open_stored(name: str, source: SourceConfig) -> StoredDataset:
    opened = open_dataset(Path(source.records))
    if opened.name != name:
        raise UserError(
            f"data.sources.{name}.records is {source.records!r}, which holds the dataset "
            f"{opened.name!r}; name the source so, or give another directory"
        )
    return opened


class Sources:
    """The datasets of a run.

    Attributes:
      config: what they are.
      names: of all.
      trained: names of those that are learnt from.
    """

    def __init__(self, config: DataConfig, workdir: Path):
        """Opens the datasets; draws what is to be drawn unless it is there.

        Raises:
          UserError: a dataset is missing, damaged, or another than its name says.
        """
        self.config, self._workdir = config, Path(workdir)
        self.names = tuple(config.sources)
        self.trained = tuple(name for name in self.names if config.sources[name].weight)
        self._opened = {name: self._open(name) for name in self.names}

    def _open(self, name: str) -> DigitsDataset | StoredDataset:
        config = self.config
        if name not in DRAWN:
            return _open_stored(name, config.sources[name])
        drawn = DigitsConfig(
            **dataclasses.asdict(config.draw), frames=config.frames, seed=config.seed
        )
        return _DRAWERS[name](self._workdir / "data", drawn)

    def dataset(self, name: str) -> DigitsDataset | StoredDataset:
        """A dataset of the run.

        Raises:
          UserError: the run has none of that name.
        """
        if name not in self._opened:
            raise UserError(f"the dataset is {name!r}; the config has {', '.join(self.names)}")
        return self._opened[name]

    def records(self, name: str, split: str) -> Sequence[Record]:
        """The records of a split.

        Raises:
          UserError: an unknown dataset or split.
        """
        dataset = self.dataset(name)
        if split not in dataset.splits:
            raise UserError(f"the split is {split!r}; {name} has {', '.join(dataset.splits)}")
        return dataset.records(split)

    def features_path(self, name: str, split: str) -> Path:
        """Where the features of a split are stored."""
        if name in DRAWN:
            return self._workdir / "features" / split
        return Path(self.config.sources[name].features)

    def unencoded(self, name: str, split: str) -> Sequence[Mapping[str, Any]] | None:
        """The streams of a drawn split whose frames have no features yet, or None."""
        self.records(name, split)  # refuses an unknown split
        if name not in DRAWN or self.features_path(name, split).exists():
            return None
        return self.dataset(name).streams(split)

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer that the config names, or one trained on what the drawn streams say.

        Raises:
          UserError: no usable tokenizer at that path, or nothing to train one on.
        """
        if self.config.tokenizer:
            return Tokenizer.load(self.config.tokenizer)
        if self.config.drawn is None:
            raise UserError(
                "data.tokenizer is empty; name a tokenizer.json, or start from a model (init)"
            )
        drawn = self.dataset(self.config.drawn).records(TRAIN)
        texts = (turn.text for record in drawn for turn in record.turns)
        frame = [dialogue.System(self.config.system), dialogue.Stream(2, True)]
        template = dialogue.render(
            (*frame, dialogue.User(""), dialogue.Assistant("", True)), 1, "", ""
        )
        return train_bpe([template.text, *texts], self.config.vocab_size)

    def examples(
        self,
        name: str,
        split: str,
        tokenizer: Tokenizer,
        *,
        tokens_per_frame: int,
        training: bool = False,
        **expected: object,
    ) -> Examples:
        """The examples of a split, whose features must have been encoded.

        Args:
          name: of the dataset.
          split: of it.
          tokenizer: encodes the dialogue.
          tokens_per_frame: N of the model.
          training: see `Examples`.
          **expected: what `FeatureMeta` must say, such as `width=1024`.

        Raises:
          UserError: an unknown split, no features, or features of another tower.
        """
        config = self.config
        disturb = augment.Disturbance(config.disturb_probability, config.disturb_window)
        return Examples(
            records=self.records(name, split),
            features=FeatureSource(self.features_path(name, split), **expected),
            tokenizer=tokenizer,
            tokens_per_frame=tokens_per_frame,
            system=config.system,
            budget=config.budget,
            training=training,
            disturb=disturb if training else None,
        )

    def training_batches(
        self,
        examples: Mapping[str, Examples],
        start: int,
        process_index: int,
        process_count: int,
    ) -> Iterator[dict[str, Any]]:
        """A process's batches from the `start`-th on; `examples` are the `trained` ones by name."""
        return training_batches(
            [(examples[name], self._share(name)) for name in self.trained],
            self.config.batch_size,
            self.config.seed,
            process_index=process_index,
            process_count=process_count,
            start_batch=start,
            num_workers=self.config.num_workers,
        )

    def updates(self, steps: int) -> int:
        """Updates that the run makes: as `data.epochs` says, or else `steps`."""
        if not self.config.epochs:
            return steps
        epoch = sum(self._share(name) for name in self.trained)
        return math.ceil(self.config.epochs * epoch / self.config.batch_size)

    def training_stretches(self) -> dict[str, dict[str, list[list[float]]]]:
        """What of every video is learnt from, by dataset and video: [start, stop] in seconds.

        ```
        records  a 0-10, a 20-30, b 0-5, a 8-15    ->   {a: [[0, 15], [20, 30]], b: [[0, 5]]}
        ```
        """
        return {name: merge_stretches(self.dataset(name).records(TRAIN)) for name in self.trained}

    def _share(self, name: str) -> float:
        """How many examples of a dataset an epoch holds."""
        return self.config.sources[name].weight * len(self.records(name, TRAIN))


def merge_stretches(records: Iterable[Record]) -> dict[str, list[list[float]]]:
    """The stretches of records by video, those that overlap or touch made one, in order of time."""
    merged: dict[str, list[list[float]]] = {}
    for record in sorted(records, key=lambda record: (record.video, record.start)):
        stretches = merged.setdefault(record.video, [])
        if stretches and record.start <= stretches[-1][1]:
            stretches[-1][1] = max(stretches[-1][1], record.stop)
        else:
            stretches.append([record.start, record.stop])
    return merged
