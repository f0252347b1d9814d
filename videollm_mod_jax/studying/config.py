"""What a study is, as its config file says it."""

import dataclasses

from videollm_mod_jax.config_dict import COUNT, COUNT_OR_NONE, SEED, Checked
from videollm_mod_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(Checked):
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

    pretraining_steps: COUNT_OR_NONE
    seeds: tuple[SEED, ...]
    rounds: COUNT
    warmup: COUNT
    stream_frames: COUNT

    def __post_init__(self):
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"study.seeds is {self.seeds}; expected different seeds, at least one")
