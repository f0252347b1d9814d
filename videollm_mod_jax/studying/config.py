"""What a study is, as its config file says it."""

import dataclasses

from videollm_mod_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How often everything is run, and what is measured apart.

    Attributes:
      pretraining_steps: updates of full computation on the same streams, from random weights, that
        give the model from which all runs start, as the paper's start from a language model that
        computes every token. 0: all runs start from random weights.
      seeds: of the initial weights and of the order of the examples, which all variants share; the
        streams are drawn and the tower is pretrained once for all.
      rounds: timed calls of a training step, and of a frame of a stream, of every variant.
      warmup: calls before them that are not timed.
      stream_frames: what the timed streams have seen.
    """

    pretraining_steps: int
    seeds: tuple[int, ...]
    rounds: int
    warmup: int
    stream_frames: int

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"study.seeds is {self.seeds}; expected different seeds, at least one")
        if self.pretraining_steps < 0:
            raise UserError(
                f"study.pretraining_steps is {self.pretraining_steps}; expected 0 or more"
            )
        for field in ("rounds", "warmup", "stream_frames"):
            if getattr(self, field) < 1:
                raise UserError(f"study.{field} is {getattr(self, field)}; expected 1 or more")
