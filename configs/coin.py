"""Steps, next steps, tasks and procedures of instructional videos: COIN.

    python -m videollm_mod_jax.train --config configs/coin.py:v5p-16 --workdir runs/coin
    python -m videollm_mod_jax.evaluate --config configs/coin.py:v5p-16 --checkpoint runs/coin

Starts from the model of `ego4d_narration.py`, whose argument and setting it has, learns the five
questions of VideoLLM-online together, five epochs at 1e-4, and is judged by the nearest label. The
paper's top-1 accuracies (arXiv 2408.16730) for step, task, next step, procedure and
procedure with goal: Full 63.1, 92.7, 49.1, 49.8, 54.1; VideoLLM-MoD 63.4, 92.8, 49.7, 49.8, 53.3.

Not run: the data need a licence, and no accelerator was at hand.
"""

import ml_collections

from configs import ego4d_narration

QUESTIONS = ("coin_step", "coin_next", "coin_task", "coin_procedure", "coin_procedure_goal")


def get_config(argument: str = "v5e-16") -> ml_collections.ConfigDict:
    config = ego4d_narration.get_config(argument)
    config.data.sources = {
        name: {"weight": 1.0, "records": f"datasets/{name}", "features": "features/coin"}
        for name in QUESTIONS
    }
    config.data.epochs = 5.0
    config.data.text_tokens = 768
    config.data.disturb_probability = 0.0
    config.training.optimizer.learning_rate = 1e-4
    # COIN has no split for it.
    config.training.validate_every = 0
    config.training.keep_best = 0
    config.evaluation.benchmarks = dict.fromkeys(QUESTIONS, "test")
    config.evaluation.answer_tokens = 512
    return config
