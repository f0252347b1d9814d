"""What `benchmark` measures: the setting of VideoLLM-MoD at full size, and one for a laptop.

    python -m videollm_mod_jax.benchmark train --config configs/benchmark.py:tiny --out results
    python -m videollm_mod_jax.benchmark train --config configs/benchmark.py:llama3-8b --out results

The argument is MODEL[,TOKENS]. MODEL is `llama3-8b`, for one GPU of 141 GB, or `tiny`, whose two
layers of ordinary size let an ordinary computer take a step in seconds. TOKENS per frame are 10,
beside 601 text tokens, or 50, beside 1744, in 600 frames either way. Everything else is as in
ego4d_narration.py: adapters on all linears, every second layer computing a fifth of each frame.

Expect, of the step with routing over that without, 0.63 of the arithmetic with 10 tokens and 0.58
with 50 (`llama3-8b`), and about as much of the time: `docs/benchmarks` has what was measured.
"""

import ml_collections

from configs import ego4d_narration
from videollm_mod_jax import experiment
from videollm_mod_jax.errors import UserError

# TOKENS: side of the pooled grid beside the CLS token, text tokens, labels.
TEXT = {"10": (3, 601, 601), "50": (7, 1744, 1024)}
# By MODEL and TOKENS: sequences at once.
BATCH_SIZE = {("llama3-8b", "10"): 8, ("llama3-8b", "50"): 2, ("tiny", "10"): 1, ("tiny", "50"): 1}


def get_config(argument: str = "llama3-8b") -> ml_collections.ConfigDict:
    model, _, tokens = argument.partition(",")
    tokens = tokens or "10"
    if (model, tokens) not in BATCH_SIZE:
        raise UserError(
            f"configs/benchmark.py:{argument}: expected MODEL or MODEL,TOKENS with MODEL one of "
            "llama3-8b and tiny, and TOKENS one of 10 and 50"
        )
    config = ego4d_narration.get_config("gpu-8,mod")
    # Random weights, made on the device.
    config.init = ""
    side, config.data.text_tokens, config.data.labels = TEXT[tokens]
    config.data.batch_size = BATCH_SIZE[model, tokens]
    config.training.microbatches = 1
    if model == "tiny":
        table = experiment.model_table("tiny", "digits-vit")
        config.model.decoder, config.model.vision = table.decoder, table.vision
        # As wide beside the sequence's length as two cores can be.
        config.model.decoder.hidden_size = 256
        config.model.decoder.mlp_size = 896
        config.model.decoder.num_layers = 2
        config.model.lora.rank = 8
        config.model.dtype = "float32"
        config.model.param_dtype = "float32"
    config.model.vision.pool = (side, side)
    return config
