"""What a run learns from, as its config file says it."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

from videollm_mod_jax.config_dict import COUNT_OR_NONE, SEED, SHARE, Checked, Interval
from videollm_mod_jax.data.example import Budget
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.names import check_name

DRAWN = ("digits_stream", "digits_scenes")
"""The datasets that are drawn where they are used; a run has one of them at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(Checked):
    """A dataset of a run.

    Attributes:
      weight: how often its training examples come in an epoch: 1.0 for all datasets is their
        concatenation; 0 for a dataset that is only evaluated.
      records: the directory that `prepare` wrote; empty for one that is drawn (`DRAWN`), in the
        working directory.
      features: the feature store that `encode` wrote; empty for one that is drawn.
    """

    weight: Annotated[float, Interval("[0, 1e6]")]
    records: str
    features: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawConfig(Checked):
    """How many streams are drawn per split."""

    train: Annotated[int, Interval("[1, 2**24]")]
    validation: Annotated[int, Interval("[0, 2**24]")]
    test: Annotated[int, Interval("[0, 2**24]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """The datasets and how their dialogues become batches.

    Attributes:
      sources: by name of the dataset.
      draw: of the dataset that is drawn; None without one.
      seed: of drawing, order and disturbance.
      epochs: passes over the training records, as often as their weights say, which decide the
        number of updates; 0 leaves it to `training.steps`.
      frames: most frames of an example; a drawn stream has as many, at 2 FPS.
      system: the instruction that opens every conversation.
      tokenizer: path of a Hugging Face `tokenizer.json`, or of its directory; empty takes that of
        the model in `init`, or else trains a byte-level BPE on what the drawn streams say.
      vocab_size: largest vocabulary of that BPE.
      text_tokens, labels: the other limits of an example. A training conversation that exceeds one
        ends at the last answer within it; where nothing is left, and in evaluation, it is an error
        that says so.
      disturb_probability, disturb_window: see `augment.Disturbance`.
      batch_size: examples per update, over all processes.
      num_workers: processes that load ahead; 0 loads in threads.
    """

    sources: Mapping[str, SourceConfig]
    draw: DrawConfig | None
    seed: SEED
    epochs: Annotated[float, Interval("[0, 1e6]")]
    frames: Annotated[int, Interval("[1, 2**20]")]
    system: str
    tokenizer: str
    vocab_size: Annotated[int, Interval("[1, 2**24]")]
    text_tokens: Annotated[int, Interval("[1, 2**24]")]
    labels: Annotated[int, Interval("[1, 2**24]")]
    disturb_probability: SHARE
    disturb_window: COUNT_OR_NONE
    batch_size: Annotated[int, Interval("[1, 2**20]")]
    num_workers: Annotated[int, Interval("[0, 1024]")]

    def __post_init__(self):
        super().__post_init__()
        for name, source in self.sources.items():
            check_name(name, "data.sources: the name of a dataset")
            where = f"data.sources.{name}"
            for field in ("records", "features"):
                if bool(getattr(source, field)) == (name in DRAWN):
                    expected = "empty, as it is drawn" if name in DRAWN else "a directory"
                    raise UserError(
                        f"{where}.{field} is {getattr(source, field)!r}; expected {expected}"
                    )
        if not any(source.weight for source in self.sources.values()):
            raise UserError("data.sources: no dataset has a weight above 0; nothing to learn from")
        drawn = [name for name in self.sources if name in DRAWN]
        if len(drawn) > 1:
            raise UserError(f"data.sources draws {' and '.join(drawn)}; expected one of them")
        if bool(drawn) != (self.draw is not None):
            raise UserError(
                f"data.draw is {self.draw}; expected the sizes of the splits of "
                f"{' or '.join(drawn or DRAWN)}, or None without it"
            )

    @property
    def drawn(self) -> str | None:
        """The name of the dataset that is drawn, if there is one."""
        return next((name for name in self.sources if name in DRAWN), None)

    @property
    def budget(self) -> Budget:
        """The static sizes of an example."""
        return Budget(frames=self.frames, text_tokens=self.text_tokens, labels=self.labels)
