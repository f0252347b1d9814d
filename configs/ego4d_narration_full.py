"""As `ego4d_narration.py`, with all weights trained but the vision tower's.

    python -m videollm_mod_jax.plan --config configs/ego4d_narration_full.py:v5p-16 \
        --topology v5p:2x2x2

The published model trains adapters; this is for those who want to know what training everything
costs. The learning rate is a guess: ten times lower than that of the adapters.
"""

import ml_collections

from configs import ego4d_narration


def get_config(argument: str = "v5e-16") -> ml_collections.ConfigDict:
    config = ego4d_narration.get_config(argument)
    config.model.lora = {"rank": 0, "alpha": 1.0, "dropout": 0.0, "targets": ()}
    config.training.trainable = "full"
    config.training.optimizer.learning_rate = 2e-5
    # Two bytes less for each of eight billion weights.
    config.training.optimizer.moment_dtype = "bfloat16"
    return config
