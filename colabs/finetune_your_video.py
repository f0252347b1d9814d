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
# # Teach a model your own video
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/videollm-mod-jax/videollm_mod_jax/blob/main/colabs/finetune_your_video.ipynb)
#
# A few videos and a table of what to say when: that is all it takes. Here a small model learns two
# clips by heart, through low-rank adapters (LoRA), and narrates one of them back. Then the same
# job is planned for a TPU slice and a real model, without a TPU.
#
# **Runtime**: any, CPU, GPU or TPU; no account is needed. It takes about 9
# minutes on 2 CPU cores.

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

import csv
from pathlib import Path

import absl.logging
import jax
from IPython.display import Image, Video

import videollm_mod_jax as vm
from videollm_mod_jax import cli, encode, prepare, stream
from videollm_mod_jax.data import digits
from videollm_mod_jax.train import train

absl.logging.set_verbosity(absl.logging.ERROR)
print(f"This runs on {jax.devices()[0].device_kind}.")

# %% [markdown]
# If that says `cpu` and you wanted a GPU: choose one under *Runtime, Change runtime type*, and run
# from the top again. In a runtime that had one all along, `pip install "jax[cuda12]"` and restart.
# This model is small enough for a CPU.
#
# ## Sizes

# %%
SMALL = bool(os.environ.get("VIDEOLLM_COLAB_SMALL"))  # a quick pass that learns next to nothing

BASE_STEPS, TOWER_STEPS = (20, 20) if SMALL else (500, 1000)  # of the model to start from
STEPS = 20 if SMALL else 300  # of fine-tuning
WORK = Path("runs/finetune_small" if SMALL else "runs/finetune")
CONFIGS = Path(vm.__file__).parents[1] / "configs"
WORK.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A model to start from
#
# Fine-tuning starts from a model that can see and speak. A real one is LLaVA: `convert_llava.ipynb`
# makes it a directory that `BASE` can name. So that this notebook runs anywhere in minutes, `BASE`
# is empty, and a tiny model is trained to narrate digits first. It has seen nothing but digits.

# %%
BASE = ""  # or a directory that `convert from-hf` or `train` wrote

if not BASE:
    BASE = str(WORK / "base")
    overrides = [
        f"--config.training.steps={BASE_STEPS}",
        f"--config.tower.steps={TOWER_STEPS}",
        f"--config.data.draw.train={48 if SMALL else 3000}",
        f"--config.data.draw.test={4 if SMALL else 40}",
        "--config.data.draw.validation=4",
        "--config.evaluation.around_training=",  # what it knows of digits does not matter here
        *(["--config.model.decoder.num_layers=2"] if SMALL else []),
    ]
    train(cli.read_config(str(CONFIGS / "digits.py"), overrides), BASE)

# %% [markdown]
# ## Your videos
#
# Put them into the folder `VIDEOS`: in Colab, open the folder symbol on the left and drop them
# there, or mount your Drive. Anything that FFmpeg reads will do. If the folder is empty, two clips
# are drawn, so that there is something to learn.

# %%
VIDEOS = WORK / "videos"
VIDEOS.mkdir(exist_ok=True)

if not any(VIDEOS.iterdir()):
    for index, name in enumerate(("kitchen", "garden")):
        clip = digits.make_stream("test", 40 + index, seed=0, num_frames=16)
        digits.stream_to_video(clip, VIDEOS / f"{name}.mp4")
for path in sorted(VIDEOS.iterdir()):
    frames = list(vm.read_video(path, fps=2))
    print(f"{path.name}: {len(frames)} frames at 2 per second, {frames[0].image.shape}")

# %%
Video(str(sorted(VIDEOS.iterdir())[-1]), embed=True, width=280)

# %% [markdown]
# ## What to say when
#
# A table with a row for every sentence: the video, the seconds, the words. Look at your video, and
# write what should be said at which moment. These sentences are not about digits, on purpose: the
# model must learn them. A time behind the end of a video, or a video that is not there, is an error
# that names the row.

# %%
NARRATIONS = [
    ("garden", 1.0, "Something comes in."),
    ("garden", 3.0, "It moves on."),
    ("garden", 5.5, "Now there is more to see."),
    ("kitchen", 0.5, "Here we begin."),
    ("kitchen", 4.0, "That was quick!"),
    ("kitchen", 6.5, "And now it ends."),
]

notes = WORK / "notes"
notes.mkdir(exist_ok=True)
with open(notes / "annotations.csv", "w", newline="") as file:
    csv.writer(file).writerows([("video", "time", "text"), *NARRATIONS])

# %% [markdown]
# ## Encode and prepare
#
# `encode` runs the vision tower over every video once and stores what it sees. `prepare` turns the
# table into examples, and counts what it had to drop, and why.
#
# Changed a video, or a sentence? Run from here on again: what was made of the old ones is deleted.

# %%
features, datasets = WORK / "features", WORK / "datasets"
shutil.rmtree(features, ignore_errors=True)
shutil.rmtree(datasets, ignore_errors=True)

command = ["--checkpoint", BASE, "--videos", str(VIDEOS), "--out", str(features)]
assert encode.main([*command, "--workers", "1"]) == 0, "the lines above say what is wrong"

# %%
command = ["--dataset", "own", "--source", str(notes), "--features", str(features)]
status = prepare.main([*command, "--out", str(datasets), "--max-frames", "120"])
assert status == 0, "the lines above say what is wrong"

# %% [markdown]
# ## Fine-tune
#
# `configs/own.py` says how. With `trainable = "lora"` the model's own weights stay as they are;
# small adapters beside its linears are trained, with the connector and the routers. On a large
# model that is what fits into memory; here it is what you would do there.
#
# `RESOURCE_EXHAUSTED` means that memory is too small: halve `data.batch_size`, or `data.frames` for
# long videos.

# %%
TUNED = WORK / "tuned"
shutil.rmtree(TUNED, ignore_errors=True)  # or it would go on with what it learnt before

config = cli.read_config(
    f"{CONFIGS / 'own.py'}:{BASE}",
    [
        f"--config.data.sources.own.records={datasets / 'own'}",
        f"--config.data.sources.own.features={features}",
        f"--config.training.steps={STEPS}",
        "--config.training.log_every=10",
        "--config.training.trainable=lora",
        "--config.training.optimizer.learning_rate=5e-3",
        "--config.model.lora.rank=16",
        "--config.model.lora.alpha=32.0",
    ],
)
config.model.lora.targets = ("q", "k", "v", "o", "gate", "up", "down", "lm_head")
train(config, TUNED)
Image(str(TUNED / "loss.png"), width=640)

# %% [markdown]
# ## Stream it back
#
# The model watches the clip frame by frame, and says your sentences where it thinks they belong.

# %%
NAME = NARRATIONS[0][0]
video = next(path for path in VIDEOS.iterdir() if path.stem == NAME)

files = ["--video", str(video), "--out", str(WORK / "narrated.mp4")]
status = stream.main(["--checkpoint", str(TUNED), *files, "--max-text-tokens", "2048"])
assert status == 0, "the line above says what is wrong"

# %%
Video(str(WORK / "narrated.mp4"), embed=True, width=480)

# %% [markdown]
# What was to be said, and what was:

# %%
session = vm.StreamingSession(vm.load(TUNED), max_text_tokens=2048)
said = [session.see(frame) for frame in session.encode_ahead(vm.read_video(video, fps=2))]
said = {answer.time: answer.text for answer in said if answer}
wanted = {time: text for name, time, text in NARRATIONS if name == NAME}
for time in sorted(said | wanted):
    print(f"{time:5.1f} s   to say: {wanted.get(time, '-'):30} said: {said.get(time, '-')}")
right = sum(said.get(time) == text for time, text in wanted.items())
print(f"{right} of {len(wanted)} right, word for word and to the frame")

# %% [markdown]
# ## The same job on a TPU slice
#
# `plan` compiles the very step that training would run for hardware that is not here, and says what
# it needs of each chip. For eight chips of a v5p, a real model, and long videos that is a minute
# or more of compiling, and needs the TPU's compiler (`pip install "jax[tpu]"`, no TPU). Without it,
# the same small job is planned for eight simulated devices.

# %%
has_tpu_compiler = importlib.util.find_spec("libtpu") is not None and not SMALL
if has_tpu_compiler:
    job = [f"{CONFIGS / 'ego4d_narration.py'}:v5p-16", "--topology", "v5p:2x2x2"]
    job += ["--config.model.decoder.num_layers=2"]  # of 32, so that it compiles in time
else:
    print('No TPU compiler here. pip install "jax[tpu]", and run this cell again, to plan for one.')
    job = [f"{CONFIGS / 'digits.py'}", "--topology", "cpu:8"]
    job += ["--config.model.decoder.num_layers=2"]  # of 4
command = [sys.executable, "-m", "videollm_mod_jax.plan", "--config", *job, "--compare", "full"]
done = subprocess.run(command, check=False, capture_output=True, text=True)
print(done.stdout or done.stderr)

# %% [markdown]
# ## Where to go from here
#
# - More videos, and a column `split` with `validation` for some of them: then the model can be told
#   from one that only remembers. `docs/data.md` has the whole format.
# - `BASE` from `convert_llava.ipynb`: a model that has seen the world.
# - `launch/README.md` walks through the same job on a TPU pod.
