"""A run's configuration, checked, and the data and model that it describes.

The files in `configs/` hold ConfigDicts, which flags can override; here they become frozen
dataclasses, once, so that a misspelt or wrongly typed key is an error that names it before anything
is drawn, trained or written.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from videollm_mod_jax.data import augment, dialogue
from videollm_mod_jax.data.builders import digits_stream
from videollm_mod_jax.data.example import Budget
from videollm_mod_jax.data.features import FeatureSource
from videollm_mod_jax.data.pipeline import Examples, training_batches, turns_of_record
from videollm_mod_jax.data.tokenizer import Tokenizer, train_bpe
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.building import build
from videollm_mod_jax.models.config import VideoLLMConfig
from videollm_mod_jax.models.plan import config_plan
from videollm_mod_jax.models.presets import decoder_preset, vision_preset
from videollm_mod_jax.training.checkpoint import read_model_config
from videollm_mod_jax.training.run import TrainingConfig
from videollm_mod_jax.training.sharding import make_layout
from videollm_mod_jax.training.tower import TowerConfig, check_vision

DATASETS = ("digits_stream", "ego4d_narration")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dataset and how its dialogues become batches.

    Attributes:
      dataset: `digits_stream`, which is drawn; or `ego4d_narration`, which can be planned but not
        yet trained on, because nothing here prepares it.
      seed: of drawing, order and disturbance.
      train, validation, test: streams drawn per split.
      frames: per stream, at 2 FPS; also the frame budget of an example.
      system: the instruction that opens every conversation.
      tokenizer: path of a Hugging Face `tokenizer.json`, or of its directory; empty takes that of
        the model in `init`, or else trains a byte-level BPE on the narrations.
      vocab_size: largest vocabulary of that BPE.
      text_tokens, labels: budget of an example; a longer conversation is an error that says so.
      disturb_probability, disturb_window: see `augment.Disturbance`.
      batch_size: examples per update, over all processes.
      num_workers: processes that load ahead; 0 loads in threads.
    """

    dataset: str
    seed: int
    train: int
    validation: int
    test: int
    frames: int
    system: str
    tokenizer: str
    vocab_size: int
    text_tokens: int
    labels: int
    disturb_probability: float
    disturb_window: int
    batch_size: int
    num_workers: int

    def __post_init__(self):
        if self.dataset not in DATASETS:
            raise UserError(f"data.dataset is {self.dataset!r}; known: {', '.join(DATASETS)}")

    @property
    def budget(self) -> Budget:
        """The static sizes of an example."""
        return Budget(frames=self.frames, text_tokens=self.text_tokens, labels=self.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which split is evaluated, and how many streams at a time."""

    split: str
    batch_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A whole run.

    Attributes:
      init: directory of a converted or trained model to start from; empty starts from random
        weights.
      model: the architecture. Without `init`, its vocabulary size is replaced by the tokenizer's.
      data: what it learns from.
      tower: how its vision tower is pretrained; None with `init`, which brings one.
      training: how it is trained.
      evaluation: how it is evaluated, before and after.
    """

    init: str
    model: VideoLLMConfig
    data: DataConfig
    tower: TowerConfig | None
    training: TrainingConfig
    evaluation: EvaluationConfig

    def __post_init__(self):
        # What only shows when the model is built should show before anything is written.
        config_plan(self.model)
        if self.data.dataset != "digits_stream":
            raise UserError(
                f"data.dataset is {self.data.dataset!r}, which nothing here prepares yet; choose "
                "digits_stream, or plan this config without data: python -m videollm_mod_jax.plan"
            )
        if bool(self.init) == (self.tower is not None):
            raise UserError(
                f"init is {self.init!r} and tower is {self.tower}; give one of them: a model to "
                "start from, or how to pretrain a vision tower"
            )
        if not self.init:
            check_vision(self.model.vision)
        make_layout(self.training.sharding, self.training.mesh)
        if self.training.trainable == "lora" and not self.model.lora.rank:
            raise UserError(
                "training.trainable is 'lora' and model.lora.rank is 0; give the model adapters, "
                "or train 'full'"
            )

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Experiment":
        """Checks the nested values of a config file or of a run's `config.json`.

        Raises:
          UserError: an unknown, missing or wrongly typed key, named.
        """
        return build(cls, table, "config")


def read_training(
    table: Mapping[str, Any],
) -> tuple[VideoLLMConfig, DataConfig, TrainingConfig]:
    """What the training step of a config depends on, without asking whether it can run here.

    Raises:
      UserError: an unknown, missing or wrongly typed key of these parts, named.
    """
    parts = (("model", VideoLLMConfig), ("data", DataConfig), ("training", TrainingConfig))
    model, data, training = (build(cls, table[name], f"config.{name}") for name, cls in parts)
    config_plan(model)
    model.require("decoder", "vision")
    return model, data, training


def model_table(decoder: str, vision: str) -> ml_collections.ConfigDict:
    """Two presets as a table whose every number a config file or a flag may override.

    Raises:
      UserError: an unknown preset.
    """
    return ml_collections.ConfigDict(
        {
            "decoder": dataclasses.asdict(decoder_preset(decoder)),
            "vision": dataclasses.asdict(vision_preset(vision)),
        }
    )


def model_of(directory: str | Path) -> ml_collections.ConfigDict:
    """The architecture of a converted or trained model, for a config that starts from it.

    Raises:
      UserError: there is no model in the directory.
    """
    return ml_collections.ConfigDict(read_model_config(Path(directory)).to_dict())


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The nested values of a ConfigDict as JSON would give them back."""
    return json.loads(json.dumps(config.to_dict()))


class Dataset:
    """The records, tokenizer and features of an experiment, in its working directory.

    ```
    WORKDIR/data/               the TFDS dataset
    WORKDIR/features/SPLIT/     the features of its frames
    ```
    """

    def __init__(self, config: DataConfig, workdir: Path):
        """Draws the dataset unless it is there."""
        self.config, self.workdir = config, Path(workdir)
        self._builder = digits_stream.prepare(
            self.workdir / "data",
            digits_stream.DigitsConfig(
                train=config.train,
                validation=config.validation,
                test=config.test,
                frames=config.frames,
                seed=config.seed,
            ),
        )

    def records(self, split: str) -> Sequence[Mapping[str, Any]]:
        """The records of a split.

        Raises:
          UserError: an unknown split.
        """
        if split not in self._builder.info.splits:
            known = ", ".join(self._builder.info.splits)
            raise UserError(f"the split is {split!r}; {self.config.dataset} has {known}")
        return self._builder.as_data_source(split)

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer that the config names, or one trained on the training narrations.

        Raises:
          UserError: no usable tokenizer at that path.
        """
        if self.config.tokenizer:
            return Tokenizer.load(self.config.tokenizer)
        texts = (turn["text"] for record in self.records("train") for turn in _turns(record))
        frame = [dialogue.System(self.config.system), dialogue.Stream(2, True)]
        template = dialogue.render(
            (*frame, dialogue.User(""), dialogue.Assistant("", True)), 1, "", ""
        )
        return train_bpe([template.text, *texts], self.config.vocab_size)

    def features_path(self, split: str) -> Path:
        """Where the features of a split are stored."""
        return self.workdir / "features" / split

    def examples(self, split: str, tokenizer: Tokenizer, model: VideoLLMConfig) -> Examples:
        """The examples of a split, whose features must have been encoded.

        Raises:
          UserError: no features, or features of another tower.
        """
        config = self.config
        disturb = augment.Disturbance(config.disturb_probability, config.disturb_window)
        return Examples(
            records=self.records(split),
            features=FeatureSource(
                self.features_path(split),
                features_per_frame=model.vision.features_per_frame,
                width=model.vision.width,
            ),
            tokenizer=tokenizer,
            tokens_per_frame=model.tokens_per_frame,
            system=config.system,
            budget=config.budget,
            disturb=disturb if split == "train" else None,
        )

    def training_batches(self, examples: Examples, start: int) -> Iterator[dict[str, Any]]:
        """This process's batches from the `start`-th on."""
        return training_batches(
            examples,
            self.config.batch_size,
            self.config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_batch=start,
            num_workers=self.config.num_workers,
        )


def _turns(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        turn | {"text": turn["text"].decode()} if isinstance(turn["text"], bytes) else turn
        for turn in turns_of_record(record)
    ]
