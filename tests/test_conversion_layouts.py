"""Names and configs against transformers: what it saves we read, and what we name it loads."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.tiny_conversion import small_tokenizer
from videollm_mod_jax.conversion import llama, llava, vision
from videollm_mod_jax.conversion.families import export_plan, plan_conversion
from videollm_mod_jax.conversion.plan import Options

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
LLAMA = {**TEXT, "model_type": "llama"}
QWEN2 = {**TEXT, "model_type": "qwen2"}
CLIP = {**TOWER, "model_type": "clip_vision_model"}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model"}
WORDS = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = {"image_token_index": 39, "video_token_index": 38}
MODELS = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama 3.1": (
        "LlamaForCausalLM",
        {
            **LLAMA,
            "rope_theta": 500000.0,
            "max_position_embeddings": 65536,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", QWEN2),
    "tied qwen2": ("Qwen2ForCausalLM", {**QWEN2, "tie_word_embeddings": True}),
    "siglip": ("SiglipVisionModel", SIGLIP),
    "siglip without head": ("SiglipVisionModel", {**SIGLIP, "vision_use_head": False}),
    "clip": ("CLIPVisionModel", CLIP),
    "clip with projection": ("CLIPVisionModelWithProjection", CLIP),
    "whole siglip": (
        "SiglipModel",
        {"model_type": "siglip", "vision_config": TOWER, "text_config": WORDS},
    ),
    "whole clip": (
        "CLIPModel",
        {"model_type": "clip", "vision_config": TOWER, "text_config": WORDS},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {"model_type": "llava", "text_config": LLAMA, "vision_config": CLIP, **TOKENS},
    ),
    "llava of siglip": (
        "LlavaForConditionalGeneration",
        {
            "model_type": "llava",
            "text_config": QWEN2,
            "vision_config": SIGLIP,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            **TOKENS,
        },
    ),
    "llava next video": (
        "LlavaNextVideoForConditionalGeneration",
        {"model_type": "llava_next_video", "text_config": LLAMA, "vision_config": CLIP, **TOKENS},
    ),
    "llava onevision": (
        "LlavaOnevisionForConditionalGeneration",
        {
            "model_type": "llava_onevision",
            "text_config": {**QWEN2, "tie_word_embeddings": True},
            "vision_config": {**SIGLIP, "vision_use_head": False},
            **TOKENS,
        },
    ),
}
LLAVAS = [name for name, (_, hf) in MODELS.items() if hf["model_type"] in llava.DEFAULTS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory for each of `MODELS`, as `save_pretrained` leaves it."""

    def save(name):
        class_name, hf = MODELS[name]
        directory = tmp_path_factory.mktemp(name.replace(" ", "_"))
        torch.manual_seed(0)
        model = getattr(transformers, class_name)(transformers.AutoConfig.for_model(**hf))
        model.save_pretrained(directory)
        small_tokenizer().save(directory)
        return directory

    return {name: save(name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_is_read(saved, name):
    conversion = plan_conversion(saved[name], Options())
    (part,) = conversion.parts
    assert conversion.fresh == ()
    assert conversion.config.param_dtype == "float32"
    assert part.config == json.loads((saved[name] / "config.json").read_text())
    # A whole SigLIP or CLIP keeps the prefix that a tower alone lost.
    whole = name.startswith("whole") or name == "clip with projection"
    tower = part.family in ("siglip", "clip")
    assert part.layout == ("hf-5" if name in LLAVAS or (tower and not whole) else "hf")


@pytest.mark.parametrize("model_type", [*llama.DEFAULTS, *vision.DEFAULTS, *llava.DEFAULTS])
def test_absent_keys_have_the_values_that_transformers_gives_them(model_type):
    theirs = transformers.AutoConfig.for_model(model_type)
    defaults = {**llama.DEFAULTS, **vision.DEFAULTS, **llava.DEFAULTS}[model_type]
    ours = {k: v for k, v in defaults.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if "use_sliding_window" in ours:
        # Read as null there because it is not in use.
        assert ours.pop("sliding_window") == 4096
    assert ours == {key: getattr(theirs, key) for key in ours}
    if model_type in llama.DEFAULTS:
        rope = {"rope_type": "default", "rope_theta": defaults["rope_theta"]}
        assert theirs.rope_parameters == rope
    if model_type in llava.DEFAULTS:
        types = (theirs.text_config.model_type, theirs.vision_config.model_type)
        assert types == (llava.TEXT_TYPE[model_type], llava.VISION_TYPE[model_type])


@pytest.mark.parametrize("layout", llava.HF_LAYOUTS)
@pytest.mark.parametrize("name", LLAVAS)
def test_transformers_loads_every_layout_that_we_name(saved, tmp_path, name, layout):
    conversion = plan_conversion(saved[name], Options())
    (part,) = conversion.parts
    theirs = load_file(saved[name] / "model.safetensors")
    places = {(e.target, e.row): e.source for e in part.table.entries()}
    table = export_plan(conversion.config, part.family, layout).table
    renamed = {e.source: theirs[places[e.target, e.row]] for e in table.entries()}
    assert len(renamed) == len(theirs)
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(part.config))
    small_tokenizer().save(tmp_path)
    assert plan_conversion(tmp_path, Options(tokenizer=tmp_path)).layout == layout
    model_class = getattr(transformers, MODELS[name][0])
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model_class.from_pretrained(saved[name]).state_dict()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("whole")])
def test_a_config_made_here_makes_the_same_model_in_transformers(saved, name):
    conversion = plan_conversion(saved[name], Options())
    (part,) = conversion.parts
    export = export_plan(conversion.config, part.family)
    config = transformers.AutoConfig.for_model(**export.config)
    theirs = transformers.AutoConfig.from_pretrained(saved[name])
    model_class = getattr(transformers, export.config["architectures"][0])
    assert model_class.__name__ == MODELS[name][0].removesuffix("WithProjection")
    made, original = model_class(config).state_dict(), model_class(theirs).state_dict()
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in original.items()}
    for ours, other in ((config, theirs), (config.get_text_config(), theirs.get_text_config())):
        for key in ("rms_norm_eps", "rope_parameters", "layer_norm_eps", "hidden_act"):
            assert getattr(ours, key, None) == getattr(other, key, None), key
        for key in ("vision_feature_layer", "vision_feature_select_strategy"):
            assert getattr(ours, key, None) == getattr(other, key, None), key


def test_what_a_whole_clip_leaves_out_is_only_its_text_side(saved):
    (part,) = plan_conversion(saved["whole clip"], Options()).parts
    names = {entry.source for entry in part.table.entries()}
    left = set(load_file(saved["whole clip"] / "model.safetensors")) - names
    assert {name.split(".")[0] for name in left} == {
        "text_model",
        "text_projection",
        "visual_projection",
        "logit_scale",
    }


def test_buffers_are_those_that_transformers_computes(saved):
    (part,) = plan_conversion(saved["llama 3.1"], Options()).parts
    model = transformers.AutoModelForCausalLM.from_pretrained(saved["llama 3.1"])
    ours = part.table.buffers["model.rotary_emb.inv_freq"]()
    np.testing.assert_allclose(ours, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    for name in ("clip", "siglip"):
        (part,) = plan_conversion(saved[name], Options()).parts
        model = transformers.AutoModel.from_pretrained(saved[name])
        ours = part.table.buffers["embeddings.position_ids"]()
        np.testing.assert_array_equal(ours, model.embeddings.position_ids.numpy())
