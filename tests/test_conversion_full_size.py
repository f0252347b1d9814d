"""Every tensor of the real architectures has its place: from transformers, without any weights."""

import json
import math
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests import hub_configs
from tests.tiny_conversion import small_tokenizer
from videollm_mod_jax.conversion import drafting
from videollm_mod_jax.conversion.families import find_family
from videollm_mod_jax.conversion.plan import Options, complete
from videollm_mod_jax.conversion.source import Source
from videollm_mod_jax.conversion.table import match
from videollm_mod_jax.models import VideoLLM
from videollm_mod_jax.models.rope import rope_frequencies
from videollm_mod_jax.training.sharding import abstract_variables

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS = {
    "llama-2-7b": ("LlamaForCausalLM", hub_configs.LLAMA2_7B),
    "llama-3-8b": ("LlamaForCausalLM", hub_configs.LLAMA3_8B),
    "llama-3.1-8b": ("LlamaForCausalLM", hub_configs.LLAMA31_8B),
    "qwen2-7b": ("Qwen2ForCausalLM", hub_configs.QWEN2_7B),
    "siglip-l16-384": ("SiglipVisionModel", hub_configs.SIGLIP_L16_384),
    "siglip-so400m": ("SiglipVisionModel", hub_configs.SIGLIP_SO400M),
    "clip-l14-336": ("CLIPVisionModel", hub_configs.CLIP_L14_336),
    "llava-1.5-7b": ("LlavaForConditionalGeneration", hub_configs.LLAVA_15_7B),
    "llava-next-video-7b": (
        "LlavaNextVideoForConditionalGeneration",
        hub_configs.LLAVA_NEXT_VIDEO_7B,
    ),
    "llava-onevision-7b": (
        "LlavaOnevisionForConditionalGeneration",
        hub_configs.LLAVA_ONEVISION_7B,
    ),
    "llava-onevision-0.5b": (
        "LlavaOnevisionForConditionalGeneration",
        hub_configs.LLAVA_ONEVISION_05B,
    ),
}

# From the module names of transformers 5 to those that files have.
LAYOUTS = {
    "hf": [],
    "hf-5": [],
    "hf-5-modules": [],
    "hf-4.0": [
        (r"^lm_head", "language_model.lm_head"),
        (r"^model\.language_model", "language_model.model"),
        (r"^model\.vision_tower", "vision_tower.vision_model"),
        (r"^model\.", ""),
    ],
    "hf-4.52": [(r"^model\.vision_tower", "model.vision_tower.vision_model")],
    "original-with-tower": [
        (r"^model\.language_model", "model"),
        (r"^model\.vision_tower", "model.vision_tower.vision_tower.vision_model"),
        (r"^model\.multi_modal_projector\.linear_1", "model.mm_projector.0"),
        (r"^model\.multi_modal_projector\.linear_2", "model.mm_projector.2"),
    ],
}


class Info(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path


def without_weights(class_name, hf):
    config = transformers.AutoConfig.for_model(**hf)
    with torch.device("meta"):
        return getattr(transformers, class_name)(config)


def source_of(tensors, renames=(), directory="/models/a"):
    def rename(name):
        for pattern, replacement in renames:
            name, found = re.subn(pattern, replacement, name)
            if found:
                break
        return name

    infos = {
        rename(name): Info(tuple(tensor.shape), np.dtype(np.float16), Path(directory, "x.bin"))
        for name, tensor in tensors.items()
    }
    return Source(Path(directory), (), infos)


def convert(hf, source, **options):
    with tempfile.TemporaryDirectory() as directory:
        small_tokenizer().save(directory)
        options = Options(tokenizer=Path(directory), **options)
        draft = find_family(hf, "config.json").draft(hf, source, options)
        return complete(draft, options)


def sizes(config):
    leaves = flatten_dict(abstract_variables(VideoLLM(config), None), sep="/").values()
    return sum(math.prod(leaf.shape) for leaf in leaves)


def layouts(name):
    family = MODELS[name][1]["model_type"]
    if family.startswith("llava"):
        return ["hf-4.0", "hf-4.52", "hf-5-modules"]
    return ["hf-5"] if "vision" in family else ["hf"]


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name in MODELS for layout in layouts(name)]
)
def test_exactly_the_tensors_of_the_real_model_are_used(name, layout):
    class_name, hf = MODELS[name]
    model = without_weights(class_name, hf)
    source = source_of(model.state_dict(), LAYOUTS[layout])
    conversion = convert(hf, source)
    (part,) = conversion.parts
    assert part.layout == layout
    assert conversion.fresh == ()
    found = match(part.table, source.names, "x")
    assert {*found.used, *found.same} == set(source.names)
    assert found.left_out == ()
    # Tied weights count once in both.
    assert sizes(conversion.config) == sum(p.numel() for p in model.parameters())


def test_the_original_layout_is_whole_with_its_tower_inside_or_beside(tmp_path, monkeypatch):
    hf = hub_configs.LLAVA_15_7B_ORIGINAL
    like = {**hub_configs.LLAVA_15_7B, "text_config": hub_configs.LLAMA2_7B}
    model = without_weights("LlavaForConditionalGeneration", like)
    whole = source_of(model.state_dict(), LAYOUTS["original-with-tower"])
    inside = "model.vision_tower."
    beside = {name: whole.info(name) for name in whole.names if not name.startswith(inside)}
    clip = {"model_type": "clip", "vision_config": hub_configs.CLIP_L14_336}
    (tmp_path / "config.json").write_text(json.dumps(clip))
    tower = source_of(without_weights("CLIPVisionModel", hub_configs.CLIP_L14_336).state_dict())
    monkeypatch.setattr(drafting, "open_source", lambda directory: tower)
    for source, roles in (
        (whole, [("model", "original-with-tower")]),
        (Source(whole.directory, (), beside), [("model", "original"), ("vision_tower", "hf-5")]),
    ):
        conversion = convert(hf, source, vision_tower=tmp_path)
        assert [(part.role, part.layout) for part in conversion.parts] == roles
        assert conversion.fresh == ()
        assert sizes(conversion.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in MODELS if "vision" not in MODELS[n][1]["model_type"]])
def test_numbers_of_the_decoder_are_those_that_transformers_reads(name):
    class_name, hf = MODELS[name]
    theirs = transformers.AutoConfig.for_model(**hf).get_text_config()
    model = without_weights(class_name, hf)
    ours = convert(hf, source_of(model.state_dict(), LAYOUTS["hf-5-modules"])).config.decoder
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    frequencies = rope_frequencies(ours.head_dim, ours.rope_theta, ours.rope_scaling)
    np.testing.assert_allclose(frequencies, rotary.inv_freq.numpy(), rtol=1e-6)
