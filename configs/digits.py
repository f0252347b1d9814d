"""Learn to narrate streams of handwritten digits, from nothing, on an ordinary computer.

    python -m videollm_mod_jax.train --config configs/digits.py --workdir runs/digits

Draws the dataset, pretrains and freezes the vision tower, stores the frames' features, evaluates,
trains the decoder, evaluates again, and leaves `held_out.mp4` for `stream` to narrate.

Expect LM-Correctness 98%, Fluency 96%, TimeDiff 0.02 s and LM-PPL 1.01 on the 200 test streams,
after about six minutes on 2 CPU cores.
"""

import ml_collections

from videollm_mod_jax import experiment


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    # A model to start from; empty: random weights.
    config.init = ""
    # 1 + 3 x 3 tokens per frame, as in the paper; 16 frames at 2 FPS are eight seconds.
    config.model = experiment.model_table("tiny", "digits-vit")
    config.model.decoder.num_layers = 4
    config.model.decoder.mlp_size = 256
    # The paper's default: every second layer computes ceil(0.2 * 10) = 2 tokens of each frame.
    config.model.routing = {
        "insertion": "interleaved",
        "keep_ratio": 0.2,
        "selection": "learned",
        "weighting": "paper",
        "force_keep_last": False,
        "exploration": 0.0,
    }
    # Everything is trained from random weights, so there is nothing to adapt.
    config.model.lora = {"rank": 0, "alpha": 1.0, "dropout": 0.0, "targets": ()}
    config.model.newline = False
    config.model.dtype = "float32"
    config.model.param_dtype = "float32"

    config.data = {
        # Drawn here; other datasets name what `prepare` and `encode` wrote.
        "sources": {"digits_stream": {"weight": 1.0, "records": "", "features": ""}},
        "seed": 0,
        # Passes over the training streams; 0: training.steps counts.
        "epochs": 0.0,
        # Streams drawn per split.
        "draw": {"train": 6000, "validation": 64, "test": 200},
        "frames": 16,
        "system": "Watch the digits and say what happens.",
        # A tokenizer.json to use; empty trains a byte-level BPE on the narrations.
        "tokenizer": "",
        "vocab_size": 512,
        # Longest text and most labels of a stream; a longer one is an error that says so.
        "text_tokens": 208,
        "labels": 168,
        # How often an answer of a training stream is moved or replaced, and by how many frames.
        "disturb_probability": 0.3,
        "disturb_window": 2,
        "batch_size": 8,
        "num_workers": 0,
    }

    # The frozen vision tower, pretrained to tell what stands at each place of a frame.
    config.tower = {
        "steps": 1200,
        "batch_size": 128,
        "learning_rate": 3e-3,
        "summary_weight": 0.3,
        "seed": 0,
    }

    config.training = {
        "steps": 1400,
        "seed": 0,
        "trainable": "full",
        # sigma of the streaming loss.
        "stream_weight": 1.0,
        "microbatches": 1,
        "scan": False,
        "remat": False,
        # Attention by the best kernels of the platform; MLP and loss not in parts (0), since they
        # are small.
        "kernels": "auto",
        "row_chunk": 0,
        "vocab_chunk": 0,
        "sharding": "replicate",
        "mesh": (-1, 1, 1),
        "log_every": 10,
        "checkpoint_every": 400,
        # Updates between validations, 0: none; and checkpoints of the lowest loss to keep as well.
        "validate_every": 0,
        "keep_checkpoints": 2,
        "keep_best": 0,
        "optimizer": {
            "learning_rate": 2e-3,
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
        "benchmarks": {"digits_stream": "test"},
        "around_training": "digits_stream",
        "batch_size": 20,
        "answer_tokens": 32,
    }
    return config
