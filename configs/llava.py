"""Questions about images and videos: LLaVA instructions, eight benchmarks.

    python -m videollm_mod_jax.train --config configs/llava.py:v5p-16 --workdir runs/llava
    python -m videollm_mod_jax.evaluate --config configs/llava.py:v5p-16 --checkpoint runs/llava

As `ego4d_narration.py`, whose argument it takes, trained for one epoch on the instructions of
LLaVA; judged on Video-MME, on open questions about the videos of MSVD, MSRVTT and ActivityNet, and
on GQA, MME, POPE and ScienceQA. An image is a video of one frame. `prepare --max-frames 128` shows
longer videos with a stride. The paper (arXiv 2408.16730) for VideoLLM-MoD: Video-MME 49.2; MSVD
78.5, MSRVTT 65.3, ActivityNet 53.4; GQA 62.8, MME 1505.5, POPE 85.5, ScienceQA 70.2. What it
trained on for them it does not say.

Not run: the data need a licence, and no accelerator was at hand.
"""

import ml_collections

from configs import ego4d_narration

# Where the frames of each benchmark were encoded.
BENCHMARKS = {
    "videomme": "videomme",
    "video_qa_msvd": "msvd",
    "video_qa_msrvtt": "msrvtt",
    "video_qa_activitynet": "activitynet",
    "image_qa_gqa": "gqa",
    "image_qa_mme": "mme",
    "image_qa_pope": "coco",
    "image_qa_scienceqa": "scienceqa",
}


def get_config(argument: str = "v5e-16") -> ml_collections.ConfigDict:
    config = ego4d_narration.get_config(argument)
    config.data.sources = {
        "llava_instruct": {
            "weight": 1.0,
            "records": "datasets/llava_instruct",
            "features": "features/llava",
        }
    } | {
        name: {"weight": 0.0, "records": f"datasets/{name}", "features": f"features/{store}"}
        for name, store in BENCHMARKS.items()
    }
    config.data.epochs = 1.0
    config.data.frames = 128
    config.data.text_tokens = 1024
    config.data.labels = 768
    config.data.disturb_probability = 0.0
    # The instructions have no split for it.
    config.training.validate_every = 0
    config.training.keep_best = 0
    config.evaluation.benchmarks = dict.fromkeys(BENCHMARKS, "test")
    config.evaluation.answer_tokens = 64
    return config
