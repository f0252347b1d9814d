"""Fine-tune a converted model, LLaVA say, as a streaming model with Mixture-of-Depths and LoRA.

    python -m videollm_mod_jax.train --config configs/finetune.py:MODEL --workdir runs/finetuned

MODEL is a directory that `convert from-hf ... --mod interleaved:0.2` made: decoder, tower and
routing are as it says there. Adapters, routers and the connector are trained, everything else is
frozen, as in the paper (arXiv 2408.16730, section 4.1). The data are `digits_stream`, drawn here.

Not run with the weights of a published model: a tiny random LLaVA goes through it, which shows that
it works and no more. Expect the cost of a frame to be that of its tokens: 576 of LLaVA-1.5, unless
the conversion was told `--pool 3x3`.
"""

import ml_collections

from videollm_mod_jax import experiment


def get_config(model: str) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.init = model
    config.model = experiment.model_of(model)
    config.model.lora = {
        "rank": 128,
        "alpha": 256.0,
        "dropout": 0.05,
        "targets": ("q", "k", "v", "o", "gate", "up", "down", "lm_head"),
    }

    config.data = {
        # Drawn here; other datasets name what `prepare` and `encode` wrote.
        "sources": {"digits_stream": {"weight": 1.0, "records": "", "features": ""}},
        "seed": 0,
        # Passes over the training streams; 0: training.steps counts.
        "epochs": 0.0,
        # Streams drawn per split.
        "draw": {"train": 2000, "validation": 64, "test": 100},
        "frames": 16,
        "system": "Watch the digits and say what happens.",
        # Empty: the model's own.
        "tokenizer": "",
        "vocab_size": 512,
        "text_tokens": 512,
        "labels": 384,
        "disturb_probability": 0.3,
        "disturb_window": 2,
        "batch_size": 8,
        "num_workers": 0,
    }

    # The converted model brings its tower.
    config.tower = None

    config.training = {
        "steps": 500,
        "seed": 0,
        "trainable": "lora",
        "stream_weight": 1.0,
        "microbatches": 1,
        "scan": True,
        "remat": True,
        # Attention by the best kernels of the platform; MLP and loss not in parts (0), since they
        # are small.
        "kernels": "auto",
        "row_chunk": 0,
        "vocab_chunk": 0,
        "sharding": "fsdp",
        "mesh": (1, -1, 1),
        "log_every": 10,
        "checkpoint_every": 100,
        "validate_every": 100,
        "keep_checkpoints": 2,
        "keep_best": 1,
        "optimizer": {
            # Of the paper's Ego4D narration.
            "learning_rate": 2e-4,
            "warmup_fraction": 0.05,
            "beta1": 0.9,
            "beta2": 0.98,
            "epsilon": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "moment_dtype": "float32",
        },
    }

    config.evaluation = {
        "benchmarks": {"digits_stream": "test"},
        "around_training": "digits_stream",
        "batch_size": 4,
        "answer_tokens": 64,
    }
    return config
