"""What a run learns from, as its config file says it."""

import dataclasses
from collections.abc import Mapping

from videollm_mod_jax.data.example import Budget
from videollm_mod_jax.errors import UserError

DRAWN = ("digits_stream", "digits_scenes")
"""The datasets that are drawn where they are used; a run has one of them at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A dataset of a run.

    Attributes:
      weight: how often its training examples come in an epoch: 1.0 for all datasets is their
        concatenation; 0 for a dataset that is only evaluated.
      records: the directory that `prepare` wrote; empty for one that is drawn (`DRAWN`), in the
        working directory.
      features: the feature store that `encode` wrote; empty for one that is drawn.
    """

    weight: float
    records: str
    features: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How many streams are drawn per split."""

    train: int
    validation: int
    test: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
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
    seed: int
    epochs: float
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
        for name, source in self.sources.items():
            where = f"data.sources.{name}"
            if source.weight < 0:
                raise UserError(f"{where}.weight is {source.weight}; expected 0 or more")
            for field in ("records", "features"):
                if bool(getattr(source, field)) == (name in DRAWN):
                    expected = "empty, as it is drawn" if name in DRAWN else "a directory"
                    raise UserError(
                        f"{where}.{field} is {getattr(source, field)!r}; expected {expected}"
                    )
        if self.epochs < 0:
            raise UserError(f"data.epochs is {self.epochs}; expected 0 or more")
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
