"""A run's configuration, checked, and the data and model that it describes.

The files in `configs/` hold ConfigDicts, which flags can override; here they become frozen
dataclasses, once, so that a misspelt or wrongly typed key is an error that names it before anything
is drawn, trained or written.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import ml_collections

from videollm_mod_jax.config_dict import Checked, Interval, build
from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.data.pipeline import Examples
from videollm_mod_jax.data.sources import Sources
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.config import VideoLLMConfig
from videollm_mod_jax.models.plan import config_plan
from videollm_mod_jax.models.presets import decoder_preset, vision_preset
from videollm_mod_jax.names import check_name
from videollm_mod_jax.training.checkpoint import read_model_config
from videollm_mod_jax.training.run import TrainingConfig
from videollm_mod_jax.training.sharding import make_layout
from videollm_mod_jax.training.tower import CANVASES, Canvas, TowerConfig, check_vision


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Checked):
    """How a run is judged.

    Attributes:
      benchmarks: split by name of the dataset, of those in `data.sources`.
      around_training: the one among them whose streaming metrics `train` computes before and after
        training; empty for none, when `evaluate` alone judges the run.
      batch_size: conversations at a time, over all processes.
      answer_tokens: longest answer that the model may generate.
    """

    benchmarks: Mapping[str, str]
    around_training: str
    batch_size: Annotated[int, Interval("[1, 2**20]")]
    answer_tokens: Annotated[int, Interval("[1, 2**20]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Checked):
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
        super().__post_init__()
        # What only shows when the model is built should show before anything is written.
        config_plan(self.model)
        for name, split in self.evaluation.benchmarks.items():
            check_name(split, f"evaluation.benchmarks.{name}")
            if name not in self.data.sources:
                raise UserError(
                    f"evaluation.benchmarks.{name} is no dataset of data.sources, which has "
                    f"{', '.join(self.data.sources)}; add it there (weight 0: not learnt from)"
                )
        around = self.evaluation.around_training
        if around and around not in self.evaluation.benchmarks:
            raise UserError(
                f"evaluation.around_training is {around!r}; expected one of "
                f"evaluation.benchmarks, {', '.join(self.evaluation.benchmarks)}, or nothing"
            )
        if bool(self.init) == (self.tower is not None):
            raise UserError(
                f"init is {self.init!r} and tower is {self.tower}; give one of them: a model to "
                "start from, or how to pretrain a vision tower"
            )
        if not self.init:
            check_vision(self.model.vision, self.canvas)
        layout = make_layout(self.training.sharding, self.training.mesh)
        parts = self.training.microbatches * layout.batch_shards
        if self.data.batch_size % parts:
            raise UserError(
                f"data.batch_size is {self.data.batch_size}; expected a multiple of {parts}, "
                f"training.microbatches = {self.training.microbatches} times "
                f"{layout.batch_shards} devices along data and fsdp"
            )
        if self.training.trainable == "lora" and not self.model.lora.rank:
            raise UserError(
                "training.trainable is 'lora' and model.lora.rank is 0; give the model adapters, "
                "or train 'full'"
            )

    @property
    def canvas(self) -> Canvas:
        """What its vision tower is pretrained on: the dataset that is drawn, or `digits_stream`."""
        return CANVASES[self.data.drawn or "digits_stream"]

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


def examples_for(
    model: VideoLLMConfig,
    tower: str,
    sources: Sources,
    name: str,
    split: str,
    tokenizer: Tokenizer,
    training: bool = False,
) -> Examples:
    """The examples of a split, whose features must be those that the model's tower gives.

    Args:
      model: that will read them.
      tower: fingerprint of its vision tower (`encode.fingerprint`).
      sources: of the run.
      name: of the dataset.
      split: of it.
      tokenizer: of the model.
      training: see `Examples`.

    Raises:
      UserError: an unknown dataset or split, no features, or features of another tower.
    """
    return sources.examples(
        name,
        split,
        tokenizer,
        tokens_per_frame=model.tokens_per_frame,
        training=training,
        features_per_frame=model.vision.features_per_frame,
        width=model.vision.width,
        resolution=model.vision.image_size,
        tower=tower,
    )
