"""The paper's study in miniature: which vision tokens, which layers, how many.

    python -m videollm_mod_jax.study --config configs/study_digits.py --workdir runs/study

Twenty-one variants with three seeds on `digits_scenes`, all from one model that was trained with
full computation, and the paper's tables beside theirs in `report.md`. Expect 35 minutes on 2 CPU
cores, and LM-Correctness of 84% with full computation, 80% with Mixture-of-Depths, 73% with random
selection and 64% with LayerSkip: `docs/study` has what came out, and what it proves.
"""

import ml_collections

from videollm_mod_jax import experiment


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.init = ""
    # 1 + 5 x 5 tokens per frame, so that keep ratios of 0.1, 0.2, 0.3 and 0.5 are 3, 6, 8 and 13.
    config.model = experiment.model_table("tiny", "scenes-vit")
    config.model.decoder.num_layers = 4
    config.model.decoder.hidden_size = 96
    config.model.decoder.mlp_size = 192
    # One head copies one neighbour's patch at a time, so that to put four together takes more than
    # one layer; with four heads the first layer does it, and routing the others costs nothing.
    config.model.decoder.num_heads = 1
    config.model.decoder.num_kv_heads = 1
    config.model.decoder.head_dim = 48
    # `mod` of the study; every other variant changes one thing of it. Not the paper's weighting,
    # and with exploration: otherwise routers find fewer of the digits (docs/study).
    config.model.routing = {
        "insertion": "interleaved",
        "keep_ratio": 0.2,
        "selection": "learned",
        "weighting": "relative",
        "force_keep_last": False,
        "exploration": 0.3,
    }
    config.model.lora = {"rank": 0, "alpha": 1.0, "dropout": 0.0, "targets": ()}
    config.model.newline = False
    config.model.dtype = "float32"
    config.model.param_dtype = "float32"

    config.data = {
        "sources": {"digits_scenes": {"weight": 1.0, "records": "", "features": ""}},
        # Of drawing; the order of the examples goes by the seed of a run.
        "seed": 0,
        "epochs": 0.0,
        "draw": {"train": 12000, "validation": 16, "test": 240},
        "frames": 6,
        "system": "Watch.",
        "tokenizer": "",
        "vocab_size": 512,
        "text_tokens": 96,
        "labels": 72,
        # Nothing is disturbed, so that an example is built once for all runs.
        "disturb_probability": 0.0,
        "disturb_window": 0,
        "batch_size": 8,
        "num_workers": 0,
    }

    config.tower = {
        "steps": 800,
        "batch_size": 64,
        "learning_rate": 3e-3,
        # The CLS token tells nothing, so that all has to be read from the tokens that are routed.
        # Trained as SigLIP's (0.3), it says most of what there is to say: see docs/study/task.md.
        "summary_weight": 0.0,
        "seed": 0,
    }

    config.training = {
        "steps": 300,
        "seed": 0,
        "trainable": "full",
        "stream_weight": 1.0,
        "microbatches": 1,
        "scan": False,
        "remat": False,
        "kernels": "auto",
        "row_chunk": 0,
        "vocab_chunk": 0,
        "sharding": "replicate",
        "mesh": (-1, 1, 1),
        "log_every": 10,
        # Once, at the end: a run of the study is repeated, not resumed.
        "checkpoint_every": 1_000_000,
        "validate_every": 0,
        "keep_checkpoints": 1,
        "keep_best": 0,
        "optimizer": {
            "learning_rate": 4e-3,
            "warmup_fraction": 0.1,
            "beta1": 0.9,
            "beta2": 0.98,
            "epsilon": 1e-8,
            "weight_decay": 0.05,
            "clip_norm": 1.0,
            "moment_dtype": "float32",
        },
    }

    config.evaluation = {
        "benchmarks": {"digits_scenes": "test"},
        "around_training": "",
        "batch_size": 60,
        "answer_tokens": 16,
    }

    config.study = {
        # As the paper's models start from a language model that computes every token. From random
        # weights, luck of the optimiser is greater than what routing costs.
        "pretraining_steps": 6000,
        "seeds": (0, 1, 2),
        "rounds": 12,
        "warmup": 2,
        "stream_frames": 600,
    }
    return config
