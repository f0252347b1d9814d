r"""Narrate egocentric video as it streams: the setting of VideoLLM-MoD (arXiv 2408.16730).

    python -m videollm_mod_jax.train --config configs/ego4d_narration.py:v5p-16 \
        --workdir runs/ego4d
    python -m videollm_mod_jax.train --config configs/ego4d_narration.py:v5p-16,full \
        --workdir runs/full

Llama-3-8B with SigLIP-L/16-384 (1 + 3 x 3 tokens per frame), every second layer computing a fifth
of each frame's tokens, LoRA on all linears, 600 frames, batch 64. The argument is the hardware, as
Cloud TPU names it (v5e-16 and v6e-16 have 16 chips, v5p-8 four, v5p-16 eight), or gpu-8; it decides
how many examples a chip takes at once. Behind a comma, the row of the paper's tables: mod, full,
early_exit, layer_skip, or online: VideoLLM-online, the CLS token alone.

Needs the prepared dataset and the features of its videos (docs/data.md); `plan` needs neither. Not
run: the data need a licence, and no accelerator was at hand.
"""

import dataclasses

import ml_collections

from videollm_mod_jax import experiment
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.config import early_exit, full_computation, layer_skip

MICROBATCHES = {"v5e-16": 4, "v6e-16": 2, "v5p-8": 2, "v5p-16": 1, "gpu-8": 2}
BATCH_SIZE = 64


# tanh1, not the paper's gate: a pretrained block starts unchanged.
MOD = {
    "insertion": "interleaved",
    "keep_ratio": 0.2,
    "selection": "learned",
    "weighting": "tanh1",
    "force_keep_last": False,
    "exploration": 0.0,
}
ROUTING = {
    "mod": MOD,
    "full": dataclasses.asdict(full_computation()),
    "early_exit": dataclasses.asdict(early_exit(2, 32)),
    "layer_skip": dataclasses.asdict(layer_skip()),
    "online": dataclasses.asdict(full_computation()),
}


def get_config(argument: str = "v5e-16") -> ml_collections.ConfigDict:
    hardware, _, row = argument.partition(",")
    row = row or "mod"
    if hardware not in MICROBATCHES or row not in ROUTING:
        raise UserError(
            f"the config's argument is {argument!r}; expected HARDWARE or HARDWARE,ROW with "
            f"HARDWARE one of {', '.join(MICROBATCHES)} and ROW one of {', '.join(ROUTING)}"
        )
    config = ml_collections.ConfigDict()

    # Directory of a converted Llama-3-8B with the tower: `convert from-hf --vision-tower`.
    config.init = "models/llama3-8b-siglip"
    config.model = experiment.model_table("llama3-8b", "siglip-l16-384")
    config.model.routing = ROUTING[row]
    if row == "online":
        # Converted and encoded by itself, with `convert --pool 0x0`.
        config.init = "models/llama3-8b-siglip-cls"
        config.model.vision.pool = (0, 0)
    config.model.lora = {
        "rank": 128,
        "alpha": 256.0,
        "dropout": 0.05,
        "targets": ("q", "k", "v", "o", "gate", "up", "down", "lm_head"),
    }
    config.model.newline = False
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "bfloat16"

    config.data = {
        "sources": {
            "ego4d_narration": {
                "weight": 1.0,
                "records": "datasets/ego4d_narration",
                "features": "features/ego4d" if row != "online" else "features/ego4d-cls",
            }
        },
        "draw": None,
        "seed": 0,
        "epochs": 2.0,
        "frames": 600,
        "system": (
            "A multimodal AI assistant is helping users with some activities. Below is their "
            "conversation, interleaved with the list of video frames received by the assistant."
        ),
        # Empty: the model's own.
        "tokenizer": "",
        "vocab_size": 128_256,
        # 2.8 text tokens per frame, the comma between frames included.
        "text_tokens": 1680,
        "labels": 1024,
        "disturb_probability": 0.5,
        "disturb_window": 2,
        "batch_size": BATCH_SIZE,
        "num_workers": 8,
    }

    # The converted model brings its tower.
    config.tower = None

    config.training = {
        # Decided by data.epochs.
        "steps": 1,
        "seed": 0,
        "trainable": "lora",
        "stream_weight": 1.0,
        "microbatches": MICROBATCHES[hardware],
        "scan": True,
        "remat": True,
        # Attention by the best kernels of the platform; MLP and loss in parts, so that the largest
        # arrays of a step are never whole in memory.
        "kernels": "auto",
        "row_chunk": 2048,
        "vocab_chunk": 16_384,
        "sharding": "fsdp",
        "mesh": (1, -1, 1),
        "log_every": 10,
        "checkpoint_every": 200,
        # All of the validation split, which takes as long as some dozens of updates.
        "validate_every": 1000,
        "keep_checkpoints": 2,
        "keep_best": 1,
        "optimizer": {
            "learning_rate": 2e-4,
            "warmup_fraction": 0.05,
            "beta1": 0.9,
            "beta2": 0.999,
            "epsilon": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "moment_dtype": "float32",
        },
    }

    config.evaluation = {
        "benchmarks": {"ego4d_narration": "validation"},
        "around_training": "",
        "batch_size": 16,
        "answer_tokens": 64,
    }
    return config
