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
# # What Mixture-of-Depths keeps
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/videollm-mod-jax/videollm_mod_jax/blob/main/colabs/what_mod_keeps.ipynb)
#
# In a video model with Mixture-of-Depths, some layers compute only a few tokens of each frame:
# those that a small router picks. Which are they? What does it save, and what does it cost in
# quality?
#
# This notebook trains four small models that differ in nothing but that, looks at what they keep,
# and plots quality against arithmetic, memory and time.
#
# **Runtime**: any, CPU, GPU or TPU; no account is needed. It takes about 12 minutes on 2 CPU
# cores.

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
import matplotlib.pyplot as plt
import ml_collections
import numpy as np
from IPython.display import Image, Video

import videollm_mod_jax as vm
from videollm_mod_jax import cli, stream
from videollm_mod_jax.benchmarking.filled import Context
from videollm_mod_jax.benchmarking.streaming import Streams
from videollm_mod_jax.benchmarking.timing import measure
from videollm_mod_jax.data import digits
from videollm_mod_jax.models import full_computation
from videollm_mod_jax.models.flops import kv_cache_bytes
from videollm_mod_jax.streaming import kept
from videollm_mod_jax.train import train

absl.logging.set_verbosity(absl.logging.ERROR)
print(f"This runs on {jax.devices()[0].device_kind}.")

# %% [markdown]
# If that says `cpu` and you wanted a GPU: choose one under *Runtime, Change runtime type*, and run
# from the top again. In a runtime that had one all along, `pip install "jax[cuda12]"` and restart.
# These models are small enough for a CPU.
#
# ## Sizes
#
# These numbers decide how long the notebook takes. More `STEPS` make better models.

# %%
SMALL = bool(os.environ.get("VIDEOLLM_COLAB_SMALL"))  # a quick pass that learns next to nothing

STEPS = 6 if SMALL else 500  # updates of each model
TOWER_STEPS = 20 if SMALL else 1000  # updates of the vision tower that they share
LAYERS = 2 if SMALL else 4  # of the decoder
TRAIN, TEST = (48, 8) if SMALL else (3000, 60)  # clips to learn from, clips to be judged on
CLIPS = 2 if SMALL else 20  # of the latter, how many we watch ourselves
LONG = 24 if SMALL else 1200  # frames of the stream that is timed
RUNS = Path("runs/what_mod_keeps_small" if SMALL else "runs/what_mod_keeps")

# %% [markdown]
# ## What it watches
#
# Handwritten digits appear on a cluttered canvas, move, and leave. The model sees two frames per
# second, and says what happens. A digit stands at one of 3 x 3 places, which are exactly the
# patches of a frame: so we know which patches *should* matter.

# %%
clip = digits.make_stream("test", 3, seed=0, num_frames=16)
figure, axes = plt.subplots(2, 8, figsize=(12, 3.4))
for time, axis, image in zip(np.arange(16) / 2, axes.flat, clip["frames"], strict=True):
    axis.imshow(image, cmap="gray")
    axis.set_title(f"{time:.1f} s", fontsize=8)
    axis.axis("off")
plt.show()
for turn in clip["turns"]:
    print(f"{turn['time']:5.1f} s  {turn['role']}: {turn['text']}")

# %% [markdown]
# ## Four models
#
# A frame is 10 tokens here: one summary (CLS) and 9 patches. The decoder has four layers, 0 to 3.
#
# - `insertion` says which layers route: `interleaved` is every second one, `()` none, `all` all.
# - `keep_ratio` says which share of a frame's tokens they compute. 0.2 of 10 are 2.
# - `weighting` says how the router's score enters: `paper` multiplies the update by it.
#
# Change them, or add a line. `{"weighting": "tanh1"}` is worth a try, and so is
# `{"insertion": (3,)}`: layer 3 alone.

# %%
ALL_SETTINGS = {
    "keep 0.2": {},
    "full": dataclasses.asdict(full_computation()),
    "keep 0.5": {"keep_ratio": 0.5},
    "keep 0.2, all layers": {"insertion": "all"},
}
SETTINGS = dict(list(ALL_SETTINGS.items())[: 2 if SMALL else None])


def config_of(name: str) -> ml_collections.ConfigDict:
    """The config of the digits task, with a setting of ours."""
    config = cli.read_config(
        str(Path(vm.__file__).parents[1] / "configs" / "digits.py"),
        [
            f"--config.training.steps={STEPS}",
            f"--config.training.log_every={max(1, STEPS // 4)}",
            f"--config.tower.steps={TOWER_STEPS}",
            f"--config.model.decoder.num_layers={LAYERS}",
            f"--config.data.draw.train={TRAIN}",
            f"--config.data.draw.test={TEST}",
            "--config.data.draw.validation=4",  # nothing is chosen by it
        ],
    )
    routing = config.model.routing.to_dict() | SETTINGS[name]
    config.model.routing = routing
    return config


# %% [markdown]
# ## What they cost
#
# That is known before anything is trained: `vm.flops` counts the operations of a pass, and
# `kv_cache_bytes` the memory that a stream of some length leaves behind. Here for five minutes, 600
# frames with one token of text between them.

# %%
FRAMES = 600


def costs(config: vm.VideoLLMConfig) -> tuple[float, float]:
    """GFLOPs and MB of a stream of FRAMES frames."""
    operations = vm.flops(config, FRAMES, text_tokens=FRAMES, labelled_tokens=FRAMES).total
    return operations / 1e9, kv_cache_bytes(config, FRAMES, FRAMES, config.dtype) / 1e6


print(f"{'':22}{'GFLOPs':>8}{'cache':>10}")
for name in SETTINGS:
    gflops, megabytes = costs(vm.VideoLLMConfig.from_dict(config_of(name).model.to_dict()))
    print(f"{name:22}{gflops:8.2f}{megabytes:7.1f} MB")

# %% [markdown]
# ## Train the first one
#
# The clips are drawn, the vision tower learns to see digits and is frozen, and the decoder learns
# to narrate. All of it lies in one directory afterwards. Run the cell again and nothing is done
# twice: an interrupted run goes on where it stopped.
#
# Training that runs out of memory says `RESOURCE_EXHAUSTED`: set `config.data.batch_size = 4` in
# `config_of`, delete the run's directory, and run again.

# %%
quality = {}


def train_setting(name: str) -> None:
    """Trains a model, with the clips and the tower of the first one."""
    workdir, first = RUNS / name, RUNS / next(iter(SETTINGS))
    if not workdir.exists() and first.exists():
        for shared in ("data", "tower", "features"):
            shutil.copytree(first / shared, workdir / shared)
    quality[name] = train(config_of(name), workdir)["after"]


train_setting("keep 0.2")

# %% [markdown]
# ## Watch it keep
#
# `stream` plays a clip to the model. What it says stands below the picture. Patches that a routed
# layer computes are outlined, brighter the more layers keep them; the small squares beside it are
# the choices of each layer, the CLS token on top.

# %%
RUNS.mkdir(parents=True, exist_ok=True)
digits.stream_to_video(clip, RUNS / "clip.mp4")
files = ["--video", str(RUNS / "clip.mp4"), "--show-routing", str(RUNS / "kept.mp4")]
room = ["--max-frames", "16", "--max-text-tokens", "1024"]
stream.main(["--checkpoint", str(RUNS / "keep 0.2"), *files, *room])
Video(str(RUNS / "kept.mp4"), embed=True, width=420)

# %% [markdown]
# ## The same as numbers
#
# `session.kept_tokens()` is a table of yes and no: layers x frames x tokens. Layers that do not
# route keep everything.

# %%
model = vm.load(RUNS / "keep 0.2")
session = vm.StreamingSession(model, max_frames=16, max_text_tokens=1024)
frames = list(vm.read_video(RUNS / "clip.mp4", fps=2))
for frame in frames:
    session.see(frame)
kept_LFN = session.kept_tokens()
print("layers, frames, tokens:", kept_LFN.shape)
print("tokens kept per layer in the first frame:", kept_LFN[:, 0].sum(-1))

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 3))
for axis, index in zip(axes, np.linspace(2, 15, 4).astype(int), strict=True):
    axis.imshow(kept.draw_kept(frames[index].image, kept_LFN[:, index], model.config))
    axis.set_title(f"{frames[index].time:.1f} s", fontsize=9)
    axis.axis("off")
plt.show()

# %% [markdown]
# And over the whole clip: a row per routed layer, a column per token.

# %%
kept.draw_heat_map(kept_LFN, model.config, RUNS / "heat.png")
Image(str(RUNS / "heat.png"))

# %% [markdown]
# ## Does it keep what matters?
#
# The clips know where a digit stands. If the router chose patches by lot, it would hit one as often
# as digits cover patches: that is chance. A bar above the line has learnt to look at digits.
#
# A bar far below it has learnt to look away, and that happens. Nothing tells a router what matters:
# it learns only through the weight that its score puts on what it keeps. Every second layer
# computes all tokens anyway, and the digits may well be read there.


# %%
def watch(model: vm.LoadedModel, index: int) -> tuple[vm.StreamingSession, dict, list[vm.Answer]]:
    """Shows a test clip to a model: the session after it, the clip, and what was said."""
    shown = digits.make_stream("test", index, seed=0, num_frames=16)
    images = [np.repeat(image[..., None], 3, axis=-1) for image in shown["frames"]]
    session = vm.StreamingSession(model, max_frames=16, max_text_tokens=1024)
    said = [session.see(vm.Frame(i / 2, image)) for i, image in enumerate(images)]
    return session, shown, [answer for answer in said if answer]


def compare_with_objects(model: vm.LoadedModel) -> kept.OnObjects:
    """Kept patches of the routed layers against digits, over several clips."""
    patches, objects = [], []
    for index in range(CLIPS):
        session, shown, _ = watch(model, index)
        # Without the CLS token, which stands for no place.
        patches.append(session.kept_tokens()[kept.routed_layers(model.config), :, 1:])
        objects.append(shown["places"] != digits.EMPTY)
    return kept.on_objects(np.concatenate(patches, 1), np.concatenate(objects))


found = compare_with_objects(model)
names = [f"layer {layer}" for layer in kept.routed_layers(model.config)]
figure, axis = plt.subplots(figsize=(5, 2.8))
axis.bar(names, found.share_L, width=0.5)
axis.axhline(found.chance, color="black", linestyle="--", label="chance")
axis.set_ylabel("kept patches with a digit")
axis.legend()
plt.show()
print("times chance:", found.ratio_L.round(2))

# %% [markdown]
# ## Train the others
#
# They share the clips and the vision tower, so that only routing differs.

# %%
for name in SETTINGS:
    if name not in quality:
        train_setting(name)

# %% [markdown]
# ## Do they look at the same?
#
# Times chance, for every routed layer. Where all layers route, none is left to read what the others
# pass by.

# %%
models = {name: vm.load(RUNS / name) for name in SETTINGS}
for name, trained in models.items():
    if trained.config.routing.insertion:
        ratios = dict(
            zip(
                kept.routed_layers(trained.config),
                compare_with_objects(trained).ratio_L.round(2).tolist(),
                strict=True,
            )
        )
        print(f"{name:22}{ratios}")

# %% [markdown]
# ## How good are they?
#
# Judged on clips with digits that nobody trained on. *Fluency* is the share of a turn, silence and
# words, that is predicted right from its start; *LM-Correctness* the same for the words alone;
# *TimeDiff* how many seconds early or late the model speaks.

# %%
print(f"{'':22}{'Fluency':>10}{'LM-Correctness':>16}{'TimeDiff':>10}")
for name, scores in quality.items():
    print(
        f"{name:22}{scores['fluency']:10.1%}{scores['lm_correctness']:16.1%}"
        f"{scores['time_diff']:8.2f} s"
    )

# %% [markdown]
# ## How fast are they?
#
# We measure the time from a frame's features to the decision to speak or stay silent, behind a
# silent stream of `LONG` frames. The models take turns, and the median of each counts, as in
# `python -m videollm_mod_jax.benchmark stream`.

# %%
seen, capacity = Context(frames=LONG, text=LONG), Context(frames=2 * LONG, text=2 * LONG)
streams = {
    name: Streams(vm.VideoLLM(trained.config), trained.variables, seen, capacity, batch_size=1)
    for name, trained in models.items()
}
timings = measure({name: stream.see for name, stream in streams.items()}, rounds=20, warmup=2)
milliseconds = {name: 1e3 * timing.median for name, timing in timings.items()}
for name, time in milliseconds.items():
    print(f"{name:22}{time:8.2f} ms per frame")

# %% [markdown]
# ## Quality against cost
#
# Up and to the left is better. Arithmetic and memory follow from the setting. Time does so only as
# far as arithmetic is what takes time: these models are so small that starting each operation costs
# much of it, and a GPU will hardly show a difference. In a large model it does.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), sharey=True)
labels = (f"GFLOPs for {FRAMES} frames", f"MB of cache after {FRAMES} frames", "ms per frame, here")
for axis, label, column in zip(axes, labels, range(3), strict=True):
    for name, trained in models.items():
        cost = (*costs(trained.config), milliseconds[name])[column]
        (points,) = axis.plot(cost, 100 * quality[name]["fluency"], "o", label=name)
        axis.plot(cost, 100 * quality[name]["lm_correctness"], "^", color=points.get_color())
    axis.set_xlabel(label)
    axis.set_xlim(0, 1.1 * axis.get_xlim()[1])
    axis.grid(alpha=0.3)
axes[0].set_ylabel("%, circles Fluency, triangles LM-Correctness")
axes[0].legend(fontsize=8, loc="lower left")
plt.show()

# %% [markdown]
# ## Change a trained model
#
# Routing is configuration, and the weights fit whatever it says. So a trained model can be made to
# keep more, to choose by lot, or to weigh otherwise, without training. It was not trained for it:
# see what becomes of its sentences.
#
# Counted are the narrations that come word by word at the right frame.


# %%
def said_right(model: vm.LoadedModel) -> str:
    """How many narrations of the test clips come word by word at their time."""
    right = total = 0
    for index in range(CLIPS):
        _, shown, said = watch(model, index)
        # What answers a question is left out, since nobody asks here.
        turns = zip([{"role": ""}, *shown["turns"]], shown["turns"], strict=False)
        true = {(b["time"], b["text"]) for a, b in turns if "user" not in (a["role"], b["role"])}
        total += len(true)
        right += len(true & {(answer.time, answer.text) for answer in said})
    return f"{right} of {total}"


def changed(model: vm.LoadedModel, **routing: object) -> vm.LoadedModel:
    """The model with another routing."""
    config = model.config
    config = dataclasses.replace(config, routing=dataclasses.replace(config.routing, **routing))
    return dataclasses.replace(model, config=config)


CHANGES = {
    "as trained": {},
    "keeps 0.5": {"keep_ratio": 0.5},
    "chooses by lot": {"selection": "random"},
    "does not weigh": {"weighting": "none"},
}
for change, routing in list(CHANGES.items())[: 2 if SMALL else None]:
    print(f"{change:18}{said_right(changed(model, **routing)):>12} narrations right")

# %% [markdown]
# ## When something is wrong
#
# What you can mend is one line that says what was found and what to do: a `vm.UserError`. Four that
# everybody meets:

# %%
(RUNS / "empty.mp4").write_bytes(b"")
attempts = {
    "a wrong path": lambda: vm.load(RUNS / "keep 0.3"),
    "a video that is none": lambda: list(vm.read_video(RUNS / "empty.mp4", fps=2)),
    "a model that keeps everything": lambda: kept.routed_layers(
        changed(model, insertion=()).config
    ),
    "a full context": lambda: [session.see(vm.Frame(9 + i, frames[0].image)) for i in range(20)],
}
for what, attempt in attempts.items():
    try:
        attempt()
    except vm.UserError as error:
        print(f"{what}:\n    {error}\n")

# %% [markdown]
# ## Try next
#
# - Add to `ALL_SETTINGS`, under a new name, and run from there on. `{"keep_ratio": 0.1}` keeps one
#   token of ten; `{"keep_ratio": 0.0}` none, as the paper's LayerSkip.
# - Which layers can do without? `{"insertion": (0,)}` against `{"insertion": (3,)}`.
# - Raise `STEPS` to 1400: the README's numbers, a Fluency of 96%, come from that.
