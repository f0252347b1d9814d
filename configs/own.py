r"""Teach a model your own videos: what you wrote beside them, said at the right moment.

    python -m videollm_mod_jax.train --config configs/own.py:MODEL --workdir runs/own

MODEL is a directory that `convert from-hf` made, or that a run left, such as runs/digits. Before
it, with your videos in `videos/` and what is said when in `notes/annotations.csv` (docs/data.md):

    python -m videollm_mod_jax.encode --checkpoint MODEL --videos videos --out features/own
    python -m videollm_mod_jax.prepare --dataset own --source notes --features features/own \
        --out datasets --max-frames 120

Expect a handful of short videos to be known by heart: two clips with 14 narrations were, word for
word and to the frame, after four minutes on 2 CPU cores with runs/digits as MODEL.
"""

import ml_collections

from configs import finetune


def get_config(model: str) -> ml_collections.ConfigDict:
    config = finetune.get_config(model)
    config.data.sources = {
        "own": {"weight": 1.0, "records": "datasets/own", "features": "features/own"}
    }
    config.data.draw = None
    # A minute at 2 frames per second; longer videos were cut by `prepare`.
    config.data.frames = 120
    config.data.system = "Say what happens, as it happens."
    config.data.text_tokens = 640
    config.data.labels = 640
    config.data.batch_size = 2
    # Few videos are to be remembered, not generalised from.
    config.data.disturb_probability = 0.0
    config.training.steps = 200
    if config.model.decoder.hidden_size < 1024:
        # Small enough to be trained whole.
        config.model.lora = {"rank": 0, "alpha": 1.0, "dropout": 0.0, "targets": ()}
        config.training.trainable = "full"
        config.training.optimizer.learning_rate = 3e-3
    # Turn it on when some videos have the split `validation`.
    config.training.validate_every = 0
    config.training.keep_best = 0
    config.evaluation.benchmarks = {"own": "validation"}
    config.evaluation.around_training = ""
    # A small vocabulary spells words out.
    config.evaluation.answer_tokens = 128
    return config
