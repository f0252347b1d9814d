r"""What the camera wearer does next: long-term action anticipation of Ego4D.

    python -m videollm_mod_jax.train --config configs/ego4d_lta.py:v5p-16 \
        --workdir runs/lta
    python -m videollm_mod_jax.evaluate --config configs/ego4d_lta.py:v5p-16 \
        --checkpoint runs/lta

As `ego4d_narration.py`, whose argument it takes; six epochs at 3e-4. The model sees eight actions
and lists the next twenty; judged by the edit distance of the best of five lists (ED@20). The paper
(arXiv 2408.16730): VideoLLM-MoD 0.689 for verbs, 0.676 for nouns, 0.884 for actions.

Not run: the data need a licence, and no accelerator was at hand.
"""

import ml_collections

from configs import ego4d_narration


def get_config(argument: str = "v5e-16") -> ml_collections.ConfigDict:
    config = ego4d_narration.get_config(argument)
    config.data.sources = {
        "ego4d_lta": {
            "weight": 1.0,
            "records": "datasets/ego4d_lta",
            "features": "features/ego4d",
        }
    }
    config.data.epochs = 6.0
    config.data.text_tokens = 1024
    config.data.disturb_probability = 0.0
    config.training.optimizer.learning_rate = 3e-4
    config.evaluation.benchmarks = {"ego4d_lta": "validation"}
    config.evaluation.answer_tokens = 512
    return config
