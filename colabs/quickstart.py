# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a streaming video model, and talk to it
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/videollm-mod-jax/videollm_mod_jax/blob/main/colabs/quickstart.ipynb)
#
# A model that watches a stream at two frames per second, decides after each frame whether to speak,
# and says what happened. It is trained here, from nothing, on real handwritten digits; then it
# narrates a video that it has never seen, and answers your question about it.
#
# **Runtime**: any, CPU, GPU or TPU; no account is needed. 15 minutes on
# 2 CPU cores that had other work, too; 6 on idle ones. Most of it is training.

# %% [markdown]
# ## Install
#
# Nothing happens here where the package is installed already.

# %%
import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import warnings

if importlib.util.find_spec("videollm_mod_jax") is None:
    url = "https://github.com/videollm-mod-jax/videollm_mod_jax"
    tpu = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*")
    extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if tpu else ""
    pip = [sys.executable, "-m", "pip", "install", "-q", "-e", f"repository{extra}"]
    subprocess.run(["git", "clone", "--depth", "1", url, "repository"], check=True)
    subprocess.run(pip, check=True)
    sys.path.insert(0, "repository")  # a notebook that runs already does not see the new package

# %%
if importlib.util.find_spec("ipywidgets") is None:
    warnings.filterwarnings("ignore", "IProgress not found|install .ipywidgets")

import dataclasses
from pathlib import Path

import absl.logging
import jax
from IPython.display import Image, Video

import videollm_mod_jax as vm
from videollm_mod_jax import cli, stream
from videollm_mod_jax.models import full_computation
from videollm_mod_jax.models.flops import kv_cache_bytes
from videollm_mod_jax.train import train

absl.logging.set_verbosity(absl.logging.ERROR)
print(f"This runs on {jax.devices()[0].device_kind}.")

# %% [markdown]
# If that says `cpu` and you wanted a GPU: choose one under *Runtime, Change runtime type*, and run
# from the top again. In a runtime that had one all along, `pip install "jax[cuda12]"` and restart.
# This model is small enough for a CPU.
#
# ## Sizes
#
# These numbers decide how long the notebook takes. More `STEPS` make a better model.

# %%
SMALL = bool(os.environ.get("VIDEOLLM_COLAB_SMALL"))  # a quick pass that learns next to nothing

STEPS = 20 if SMALL else 1400  # updates of the model
TOWER_STEPS = 20 if SMALL else 1200  # updates of its vision tower
TRAIN, TEST = (48, 8) if SMALL else (6000, 200)  # clips to learn from, clips to be judged on
RUN = Path("runs/quickstart_small" if SMALL else "runs/quickstart")

# %% [markdown]
# ## Train
#
# One call does everything: it draws the clips, trains the vision tower to see digits and freezes
# it, judges the untrained model, trains it, and judges it again. Everything about the run is in
# `configs/digits.py`; here we only set the sizes. Any of its keys can be changed like that.
#
# Run the cell again and nothing is done twice: an interrupted run goes on where it stopped. If it
# runs out of memory, which reads `RESOURCE_EXHAUSTED`, add `"--config.data.batch_size=4"`, delete
# the run's directory, and run again.

# %%
config = cli.read_config(
    str(Path(vm.__file__).parents[1] / "configs" / "digits.py"),
    [
        f"--config.training.steps={STEPS}",
        f"--config.tower.steps={TOWER_STEPS}",
        f"--config.data.draw.train={TRAIN}",
        f"--config.data.draw.test={TEST}",
        "--config.data.draw.validation=4",  # nothing is chosen by it
        *(["--config.model.decoder.num_layers=2"] if SMALL else []),
    ],
)
scores = train(config, RUN)

# %% [markdown]
# ## Did it learn?
#
# The loss, update by update. It has two parts: the words (`language`), and the decision to stay
# silent or to speak (`stream`).

# %%
Image(str(RUN / "loss.png"), width=640)

# %% [markdown]
# And the scores, on clips whose digits nobody trained on. *Fluency* is the share of a turn, silence
# and words, that is predicted right from its start; *LM-Correctness* the same for the words alone;
# *TimeDiff* how many seconds early or late the model speaks; *LM-PPL* its perplexity, 1 at best.

# %%
print(f"{'':16}{'LM-PPL':>10}{'TimeDiff':>10}{'Fluency':>10}{'LM-Correctness':>16}")
for when, score in scores.items():
    print(
        f"{when + ' training':16}{score['lm_ppl']:10.2f}{score['time_diff']:8.2f} s"
        f"{score['fluency']:10.1%}{score['lm_correctness']:16.1%}"
    )

# %% [markdown]
# ## Stream a video
#
# Training left a clip that the model has never seen, `held_out.mp4`. `stream` plays it frame by
# frame; the model speaks when it chooses to. We also ask it something in mid-stream. The last lines
# say how fast it was.
#
# For a video of your own, change `VIDEO` to its path. A wrong path, or a file without frames, is
# told in one line. (This model knows digits and nothing else: `finetune_your_video.ipynb` is the
# notebook that teaches it your videos.)

# %%
VIDEO = RUN / "held_out.mp4"

status = stream.main(
    [
        *("--checkpoint", str(RUN)),
        *("--video", str(VIDEO)),
        *("--ask", "4.2: How many digits so far?"),
        *("--out", str(RUN / "narrated.mp4")),
    ]
)
assert status == 0, "the line above says what is wrong, and what to do"

# %% [markdown]
# What it said stands below the picture, at the moment it said it.

# %%
Video(str(RUN / "narrated.mp4"), embed=True, width=480)

# %% [markdown]
# ## The same from Python
#
# A session is a conversation about a video: frames go in, answers come out, whenever the model has
# one. `encode_ahead` decodes the video and runs the vision tower while the language model works.

# %%
model = vm.load(RUN)
session = vm.StreamingSession(model)
for frame in session.encode_ahead(vm.read_video(VIDEO, fps=2)):
    if answer := session.see(frame):
        print(f"{answer.time:6.1f} s  {answer.text}")

# %% [markdown]
# ## Ask it something
#
# Change the question. It was taught two: *How many digits so far?* and *Which digits are there?*
# Anything else it will answer as best it can, which is not well.

# %%
print(session.ask("Which digits are there?").text)

# %% [markdown]
# ## What it skips
#
# In every second layer a router picks 2 of the 10 tokens of each frame, and only those are computed
# and remembered. That is what this model saves against one that computes everything:

# %%
dense = dataclasses.replace(model.config, routing=full_computation())
FRAMES = 600  # five minutes, with one token of text between frames
for name, config in {"computing everything": dense, "this model": model.config}.items():
    operations = vm.flops(config, FRAMES, text_tokens=FRAMES, labelled_tokens=FRAMES).total
    cache = kv_cache_bytes(config, FRAMES, FRAMES, config.dtype)
    print(f"{name:22}{operations / 1e9:7.2f} GFLOPs{cache / 1e6:7.1f} MB of cache")

# %% [markdown]
# ## Where to go from here
#
# - Change `--config.model.routing.keep_ratio`, or any other key, and train again in another `RUN`.
# - `what_mod_keeps.ipynb` shows which tokens are picked, and what that costs in quality.
# - `finetune_your_video.ipynb` teaches a model videos of your own.
# - `convert_llava.ipynb` starts from PyTorch weights instead of from nothing.
