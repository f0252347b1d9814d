r"""Which keystep the camera wearer does: fine-grained recognition of Ego-Exo4D.

    python -m videollm_mod_jax.train --config configs/egoexo4d_keystep.py:v5p-16 \
        --workdir runs/keystep
    python -m videollm_mod_jax.evaluate --config configs/egoexo4d_keystep.py:v5p-16 \
        --checkpoint runs/keystep

As `ego4d_narration.py`, whose argument it takes; ten epochs at 2e-4, judged by top-1 accuracy. The
paper (arXiv 2408.16730): VideoLLM-MoD 44.85 on the first version of the annotations, 42.62 on the
second.

Not run: the data need a licence, and no accelerator was at hand.
"""

import ml_collections

from configs import ego4d_narration


def get_config(argument: str = "v5e-16") -> ml_collections.ConfigDict:
    config = ego4d_narration.get_config(argument)
    config.data.sources = {
        "egoexo4d_keystep": {
            "weight": 1.0,
            "records": "datasets/egoexo4d_keystep",
            "features": "features/egoexo4d",
        }
    }
    config.data.epochs = 10.0
    config.data.text_tokens = 768
    config.data.disturb_probability = 0.0
    config.evaluation.benchmarks = {"egoexo4d_keystep": "validation"}
    return config
