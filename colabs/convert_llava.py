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
# # Convert LLaVA, and make it a Mixture-of-Depths model
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/videollm-mod-jax/videollm_mod_jax/blob/main/colabs/convert_llava.ipynb)
#
# PyTorch weights in, JAX weights out, and back again, with a proof on the way that both compute the
# same. Then the model watches a picture and a video, and learns to compute only a part of a frame.
#
# **Runtime**: any, CPU, GPU or TPU; no account is needed. 80 seconds on
# 2 CPU cores.
#
# **What you will not see here is a clever answer.** No weights are downloaded: the notebook makes
# a tiny LLaVA with random weights, by transformers' own classes. It speaks nonsense, and everything
# else about it is real. One variable below takes the real one instead.

# %% [markdown]
# ## Install
#
# Conversion itself needs no PyTorch. The comparison does, and so does making the tiny model: that
# is what the extra `parity` brings. Nothing happens here where all of it is installed.

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
    extra = ",cuda" if shutil.which("nvidia-smi") else ",tpu" if tpu else ""
    subprocess.run(["git", "clone", "--depth", "1", url, "repository"], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "-e", f"repository[parity{extra}]"]
    subprocess.run(pip, check=True)
    sys.path.insert(0, "repository")  # a notebook that runs already does not see the new package
elif missing := [n for n in ("torch", "transformers", "peft") if not importlib.util.find_spec(n)]:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)

# %%
if importlib.util.find_spec("ipywidgets") is None:
    warnings.filterwarnings("ignore", "IProgress not found|install .ipywidgets")

import dataclasses
import json
import tempfile
from pathlib import Path

import absl.logging
import jax
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
import transformers
from IPython.display import Video
from safetensors import safe_open
from sklearn.datasets import load_sample_image

import videollm_mod_jax as vm
from videollm_mod_jax import convert
from videollm_mod_jax.conversion import hub
from videollm_mod_jax.data.tokenizer import BOS, EOS, train_bpe
from videollm_mod_jax.models import NO_LORA, RoutingConfig, full_computation
from videollm_mod_jax.models.flops import kv_cache_bytes
from videollm_mod_jax.models.presets import decoder_preset, vision_preset
from videollm_mod_jax.streaming import kept

absl.logging.set_verbosity(absl.logging.ERROR)
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
print(f"This runs on {jax.devices()[0].device_kind}.")

# %% [markdown]
# If that says `cpu` and you wanted a GPU: choose one under *Runtime, Change runtime type*, and run
# from the top again. In a runtime that had one all along, `pip install "jax[cuda12]"` and restart.
#
# ## Which model
#
# Leave `MODEL` empty for the tiny one. The real one is downloaded from the Hub, without an account:
#
# `MODEL = "llava-hf/llava-1.5-7b-hf"`
#
# It needs 28 GB of disk for download and result, 14 GB of device memory for the weights alone, and
# some for the cache (an A100 or L4, not a free T4), and 28 GB of memory to be compared in float32.
# The code for it is the same; it was not run with it.

# %%
SMALL = bool(os.environ.get("VIDEOLLM_COLAB_SMALL"))  # a quick pass

MODEL = ""  # or "llava-hf/llava-1.5-7b-hf"
WIDTH, LAYERS, PICTURE = (64, 4, 56) if SMALL else (128, 8, 112)  # of the tiny one
FRAMES = 4 if SMALL else 8  # of the video
TOKENS = 8 if SMALL else 24  # longest answer
WORK = Path("runs/convert_llava")
WORK.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A tiny LLaVA
#
# A CLIP tower, a Llama, two linear layers between them, a tokenizer and an image processor: the
# same files as on the Hub, with smaller numbers in `config.json`.


# %%
def make_tiny(directory: Path) -> None:
    """Saves a LLaVA with random weights, and its processor."""
    torch.manual_seed(0)
    lines = ["User: What is in the picture?\nAssistant: A house by the water."] * 4
    with tempfile.TemporaryDirectory() as made:
        train_bpe(lines, 300).save(Path(made))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=f"{made}/tokenizer.json",
            bos_token=BOS,
            eos_token=EOS,
            pad_token=EOS,
            additional_special_tokens=["<image>"],
        )
    config = transformers.LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": PICTURE,
            "patch_size": 14,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh norms are all one: any mix-up should show
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(directory)
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": PICTURE}, crop_size={"height": PICTURE, "width": PICTURE}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)


if not MODEL:
    make_tiny(WORK / "tiny-llava")
source = hub.resolve(MODEL or str(WORK / "tiny-llava"))
print(*sorted(path.name for path in source.iterdir()), sep="\n")

# %% [markdown]
# ## Look before you convert
#
# `inspect` reads the headers only: what family it is, its sizes, and whether it can be converted.
# Every command here is also one of the shell: `python -m videollm_mod_jax.convert inspect DIR`.

# %%
convert.main(["inspect", str(source)])

# %% [markdown]
# ## From PyTorch to ours
#
# Tensors go through one by one, so a 7B model needs less than 1.5 GB of memory beside the largest.
# Interrupted, the same command continues; the directory appears when it is complete.
#
# `main` gives the exit status: 0 is well.

# %%
convert.main(["from-hf", str(source), str(WORK / "llava"), "--overwrite"])

# %% [markdown]
# ## The proof
#
# `verify` runs both models on the same text, picture and frames. It compares every stage, from the
# tower to the logits, and the tokens that follow, and would name the first stage that differs. The
# photo is one of scikit-learn's.

# %%
photo = load_sample_image("china.jpg")
PIL.Image.fromarray(photo).save(WORK / "photo.png")
picture = ["--image", str(WORK / "photo.png"), "--tokens", str(TOKENS)]
convert.main(["verify", str(source), str(WORK / "llava"), *picture])

# %% [markdown]
# ## And back
#
# `to-hf` writes what transformers loads. Float32 comes back bit by bit. The real model is stored
# as float16, which becomes bfloat16 on the way in: `--dtype float32` keeps it exact, at twice the
# size.

# %%
convert.main(["to-hf", str(WORK / "llava"), str(WORK / "back"), "--overwrite"])


def tensors(directory: Path) -> dict[str, Path]:
    """The file of every tensor."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: file for file in files for name in safe_open(file, "pt").keys()}  # noqa: SIM118


before, after = tensors(source), tensors(WORK / "back")
equal = sum(
    torch.equal(safe_open(before[name], "pt").get_tensor(name),
                safe_open(after[name], "pt").get_tensor(name))
    for name in before.keys() & after.keys()
)  # fmt: skip
print(f"{equal} of {len(before)} tensors are equal bit by bit; {len(after)} came back.")

# %% [markdown]
# ## Ask about a picture
#
# A session is shown frames and asked questions. LLaVA has never learnt when to speak by itself, so
# `silence_threshold=0` keeps it silent until it is asked.
#
# Random weights answer with random syllables. With the real model, this is where it describes the
# photo.

# %%
llava = vm.load(WORK / "llava")
session = vm.StreamingSession(
    llava, silence_threshold=0.0, max_frames=1, max_text_tokens=512, max_new_tokens=TOKENS
)
session.see(vm.Frame(0.0, photo))
print("tokens of the picture:", llava.config.tokens_per_frame)
print("answer:", repr(session.ask("What is in the picture?").text))

# %% [markdown]
# ## Ask about a video
#
# Ours is a camera that pans over the photo. Put the path of your own in place of it: anything that
# FFmpeg reads will do, an H.264 file as well as a URL.

# %%
video = WORK / "pan.mp4"
offsets = np.linspace(0, photo.shape[1] - 426, FRAMES).astype(int)
vm.write_video(video, [photo[:, offset : offset + 426] for offset in offsets], fps=2, crf=28)
Video(str(video), embed=True, width=320)

# %%
frames = list(vm.read_video(video, fps=2))


def watch(model: vm.LoadedModel) -> vm.StreamingSession:
    """A session that has seen the video."""
    session = vm.StreamingSession(
        model, silence_threshold=0.0, max_frames=FRAMES, max_text_tokens=512, max_new_tokens=TOKENS
    )
    for frame in session.encode_ahead(frames):
        session.see(frame)
    return session


dense = watch(llava)
print(f"{dense.cache_bytes_per_frame:,} bytes of cache for every frame")
print("answer:", repr(dense.ask("What happens in the video?").text))

# %% [markdown]
# ## Make it a Mixture-of-Depths model
#
# The same conversion with `--mod interleaved:0.2`: every second layer gets a router, and computes a
# fifth of each frame's tokens. The other tokens pass it by.
#
# `--weighting` is `tanh1` unless you say otherwise: with it, what *is* computed is computed exactly
# as the pretrained layer would.

# %%
convert.main(["from-hf", str(source), str(WORK / "mod"), "--mod", "interleaved:0.2", "--overwrite"])

# %%
mod = vm.load(WORK / "mod")
routed = watch(mod)
share = routed.cache_bytes_per_frame / dense.cache_bytes_per_frame
print(f"{routed.cache_bytes_per_frame:,} bytes of cache for every frame, {share:.2f} of before")
print("answer:", repr(routed.ask("What happens in the video?").text))

# %% [markdown]
# The answer is another one: half of the layers no longer see most of the picture. That is the
# price, and training has to win it back.
#
# ## What it keeps
#
# A new router knows nothing. All of its scores are 0, so the first tokens win, which are the top
# rows of the picture. Training teaches it better; the notebook `what_mod_keeps` shows how.
#
# Until then, evenly spaced tokens are the fairer choice, without a router at all.

# %%
routing = dataclasses.replace(mod.config.routing, selection="uniform")
even = dataclasses.replace(mod, config=dataclasses.replace(mod.config, routing=routing))
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
for axis, title, model in zip(axes, ("new router", "evenly spaced"), (mod, even), strict=True):
    kept_LN = watch(model).kept_tokens()[:, 0]
    axis.imshow(kept.draw_kept(frames[0].image, kept_LN, model.config))
    axis.set_title(title)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## What that is worth at 7B
#
# Costs follow from sizes alone, so we can count those of the real LLaVA-1.5-7B without its weights.
# Its frame has 576 tokens; `--pool 3x3` makes it 9. Multiply-adds count as two operations.

# %%
sevenb = vm.VideoLLMConfig(
    decoder=decoder_preset("llama2-7b"),
    vision=dataclasses.replace(
        vision_preset("clip-l14-336"), unused_blocks=1, summary="none", pool=(24, 24)
    ),
    routing=full_computation(),
    lora=NO_LORA,
    newline=False,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
ROUTING = RoutingConfig(
    insertion="interleaved",
    keep_ratio=0.2,
    selection="learned",
    weighting="tanh1",
    force_keep_last=False,
    exploration=0.0,
)
pooled = dataclasses.replace(sevenb, vision=dataclasses.replace(sevenb.vision, pool=(3, 3)))
MODELS = {
    "576 tokens": sevenb,
    "576 tokens, MoD": dataclasses.replace(sevenb, routing=ROUTING),
    "9 tokens": pooled,
    "9 tokens, MoD": dataclasses.replace(pooled, routing=ROUTING),
}
print(f"{'per frame':18}{'GFLOPs':>10}{'cache':>12}")
for name, config in MODELS.items():
    gflops = vm.flops(config, frames=1, text_tokens=1, labelled_tokens=1).total / 1e9
    megabytes = kv_cache_bytes(config, 1, 1, config.dtype) / 1e6
    print(f"{name:18}{gflops:10,.0f}{megabytes:9.1f} MB")

# %%
counts = np.array([10, 30, 100, 300, 600, 1200])
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
for name, config in MODELS.items():
    style = "o--" if "MoD" in name else "o-"
    cache = [kv_cache_bytes(config, int(n), int(n), config.dtype) / 1e9 for n in counts]
    total = [vm.flops(config, int(n), int(n), int(n)).total / 1e12 for n in counts]
    axes[0].loglog(counts, cache, style, label=name)
    axes[1].loglog(counts, total, style, label=name)
axes[0].axhline(16, color="grey", linewidth=0.8)
axes[0].text(10, 18, "16 GB: a free GPU, weights and all", fontsize=8, color="grey")
axes[0].set_ylabel("GB of cache")
axes[1].set_ylabel("TFLOPs in all")
for axis in axes:
    axis.set_xlabel("frames, two per second")
    axis.grid(alpha=0.3, which="both")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# Two things show. MoD saves the same share everywhere, and pooling saves more than that, at the
# price of detail. And 576 tokens per frame are too many for a long stream on any one GPU.
#
# ## When something is wrong
#
# What you can mend is one line, and nothing is written. Three that everybody meets, and a video
# without frames:

# %%
convert.main(["from-hf", "models/lava", str(WORK / "other")])
convert.main(["from-hf", str(source), str(WORK / "other"), "--mod", "often:0.2"])
convert.main(["from-hf", str(source), str(WORK / "llava")])
(WORK / "empty.mp4").write_bytes(b"")
try:
    list(vm.read_video(WORK / "empty.mp4", fps=2))
except vm.UserError as error:
    print(error)

# %% [markdown]
# Out of memory is not among them, since only the device knows: JAX says `RESOURCE_EXHAUSTED`. Then
# convert with `--pool 3x3`, which makes the cache 64 times smaller, or lower `max_frames` of the
# session, or take `vm.quantize(model)`, which halves the weights once they are loaded.
#
# ## Nothing was left out silently
#
# `conversion.json` lists where every tensor came from, for the way back.

# %%
manifest = json.loads((WORK / "mod" / "conversion.json").read_text())
print(*list(manifest), sep="\n")
print("fresh:", *manifest["fresh"], sep="\n    ")

# %% [markdown]
# ## Try next
#
# - `--mod 2,6:0.5` routes layers 2 and 6 and keeps half; `--mod all:0.2` routes all.
# - Fine-tune it, adapters, connector and routers alone, in a shell, where the repository lies. DIR
#   is `runs/convert_llava/mod`, as seen from there:
#   `python -m videollm_mod_jax.train --config configs/finetune.py:DIR --workdir runs/tuned`
# - Then `convert to-hf runs/tuned exported --merge --drop-routers` gives it back to PyTorch, where
#   every layer computes every token again.
# - The notebook `finetune_your_video` does it with your own clip.
