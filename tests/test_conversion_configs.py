"""What a Hugging Face config means: absent keys, both spellings of RoPE, and what is refused."""

import dataclasses

import pytest

from tests.hub_configs import (
    CLIP_L14_336,
    LLAMA2_7B,
    LLAMA3_8B,
    LLAMA31_8B,
    LLAVA_15_7B,
    LLAVA_15_7B_ORIGINAL,
    LLAVA_NEXT_VIDEO_7B,
    LLAVA_ONEVISION_7B,
    QWEN2_7B,
    SIGLIP_L16_384,
)
from videollm_mod_jax.conversion.llama import decoder_from_hf, decoder_table, decoder_to_hf
from videollm_mod_jax.conversion.llava import llava_from_hf, llava_to_hf, original_from_hf
from videollm_mod_jax.conversion.vision import vision_from_hf, vision_table, vision_to_hf
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import NO_LORA, VideoLLMConfig, full_computation
from videollm_mod_jax.models.config import RopeScaling
from videollm_mod_jax.models.presets import decoder_preset, vision_preset

LLAMA31_SCALING = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
)
ROPE = LLAMA31_8B["rope_scaling"]


def whole(decoder, vision, newline):
    return VideoLLMConfig(
        decoder=decoder,
        routing=full_computation(),
        lora=NO_LORA,
        vision=vision,
        newline=newline,
        dtype="float32",
        param_dtype="float32",
    )


@pytest.mark.parametrize(
    ("hf", "preset"),
    [
        (LLAMA3_8B, "llama3-8b"),
        (LLAMA2_7B, "llama2-7b"),
        (QWEN2_7B, "qwen2-7b"),
    ],
)
def test_hub_configs_of_decoders_are_our_presets(hf, preset):
    decoder = decoder_preset(preset)
    assert decoder_from_hf(hf, "x") == decoder
    assert decoder_from_hf(decoder_to_hf(decoder), "x") == decoder


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": ROPE},
        {"rope_theta": 500000.0, "rope_scaling": {**ROPE, "type": "llama3", "rope_type": None}},
        {"rope_parameters": {**ROPE, "rope_theta": 500000.0}},
    ],
    ids=["4", "old 4", "5"],
)
def test_rope_is_read_in_every_spelling(rope):
    decoder = decoder_from_hf({**LLAMA3_8B, "rope_theta": None, **rope}, "x")
    assert decoder == dataclasses.replace(decoder_preset("llama3-8b"), rope_scaling=LLAMA31_SCALING)
    assert decoder_from_hf(decoder_to_hf(decoder), "x") == decoder


def test_linear_rope_is_read_as_llava_next_video_spells_it():
    decoder = llava_from_hf(LLAVA_NEXT_VIDEO_7B, None, "x")[0]
    assert decoder.rope_scaling == RopeScaling(kind="linear", factor=2.5)
    assert decoder_from_hf(decoder_to_hf(decoder), "x") == decoder


def test_rope_parameters_without_a_type_are_the_plain_ones():
    decoder = decoder_from_hf({"model_type": "llama", "rope_parameters": {"rope_theta": 5.0}}, "x")
    assert (decoder.rope_theta, decoder.rope_scaling) == (5.0, None)


def test_key_value_heads_and_head_width_default_to_the_heads():
    decoder = decoder_from_hf({"model_type": "llama", "num_attention_heads": 16}, "x")
    assert (decoder.num_kv_heads, decoder.head_dim) == (16, 256)
    assert decoder_from_hf({"model_type": "llama", "head_dim": 64}, "x").head_dim == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; expected a decoder: llama or qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; expected False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"num_experts": 8}, "num_experts is set"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; expected a whole number"),
        ({"rms_norm_eps": [1e-5]}, "rms_norm_eps is .*expected a number"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None; expected a number"),
        (
            {"rope_scaling": {"rope_type": "yarn", "beta_fast": 32}},
            "rope_scaling.rope_type is 'yarn'",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected a table"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"rope_scaling": {k: v for k, v in ROPE.items() if k != "factor"}},
            "rope_scaling.factor is None; expected a number",
        ),
        (
            {**QWEN2_7B, "use_sliding_window": True, "max_window_layers": 21},
            "use_sliding_window is",
        ),
        ({**QWEN2_7B, "layer_types": ["sliding_attention"] * 28}, "layer_types is"),
    ],
)
def test_decoders_that_compute_something_else_are_refused(change, words):
    with pytest.raises(UserError, match=f"^/models/config.json: {words}"):
        decoder_from_hf({**LLAMA3_8B, **change}, "/models/config.json")


def test_a_sliding_window_that_no_layer_uses_is_harmless():
    hf = {**QWEN2_7B, "use_sliding_window": True, "max_window_layers": 28}
    assert decoder_from_hf(hf, "x") == decoder_preset("qwen2-7b")


@pytest.mark.parametrize(
    ("hf", "preset"),
    [
        (SIGLIP_L16_384, "siglip-l16-384"),
        ({"model_type": "siglip", "vision_config": SIGLIP_L16_384}, "siglip-l16-384"),
        (CLIP_L14_336, "clip-l14-336"),
        # The Hub's config of this one holds both, as transformers wrote them in 2022.
        (
            {
                "model_type": "clip",
                "vision_config": {**CLIP_L14_336, "hidden_size": 1},
                "vision_config_dict": CLIP_L14_336,
            },
            "clip-l14-336",
        ),
    ],
)
def test_hub_configs_of_towers_are_our_presets(hf, preset):
    tower = vision_preset(preset)
    assert vision_from_hf(hf, None, "x") == tower
    assert vision_from_hf(vision_to_hf(tower), None, "x") == tower


def test_a_tower_without_a_head_has_no_summary():
    tower = vision_from_hf(LLAVA_ONEVISION_7B["vision_config"], None, "x")
    assert (tower.summary, tower.pooling_head, tower.num_layers) == ("none", False, 26)


def test_pixel_statistics_come_from_the_processor():
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    tower = vision_from_hf(CLIP_L14_336, processor, "x")
    assert (tower.mean, tower.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    with pytest.raises(UserError, match=r"image_mean is 0\.5; expected a list of three numbers"):
        vision_from_hf(CLIP_L14_336, {"image_mean": 0.5}, "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "dinov2"}, "model_type is 'dinov2'; expected a vision tower: siglip_vis"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected 'gelu_pytorch_tanh' or"),
        ({"num_channels": 1}, "num_channels is 1; expected 3"),
        ({"image_size": [336, 336]}, "image_size is .*; expected a whole number"),
        ({"model_type": "siglip"}, "vision_config is None; expected a table"),
    ],
)
def test_towers_that_compute_something_else_are_refused(change, words):
    with pytest.raises(UserError, match=f"^/models/config.json: {words}"):
        vision_from_hf({**CLIP_L14_336, **change}, None, "/models/config.json")


@pytest.mark.parametrize(
    ("hf", "changes", "tokens"),
    [
        (LLAVA_15_7B, {"unused_blocks": 1, "pool": (24, 24)}, 576),
        ({**LLAVA_15_7B, "vision_feature_layer": 23}, {"unused_blocks": 1, "pool": (24, 24)}, 576),
        ({**LLAVA_15_7B, "vision_feature_layer": -1}, {"pool": (24, 24)}, 576),
        ({**LLAVA_15_7B, "vision_feature_layer": 24}, {"pool": (24, 24)}, 576),
        (
            {**LLAVA_15_7B, "vision_feature_select_strategy": "full"},
            {"unused_blocks": 1, "pool": (24, 24), "summary": "class_token"},
            577,
        ),
        (LLAVA_NEXT_VIDEO_7B, {"unused_blocks": 1, "pool": (12, 12)}, 144),
        (
            {**LLAVA_NEXT_VIDEO_7B, "spatial_pool_stride": 4},
            {"unused_blocks": 1, "pool": (6, 6)},
            36,
        ),
        (LLAVA_ONEVISION_7B, {"pool": (14, 14), "pooling": "bilinear"}, 196),
    ],
)
def test_a_llava_reads_the_hidden_state_that_its_config_counts(hf, changes, tokens):
    text, vision = hf["text_config"], hf["vision_config"]
    decoder, tower = llava_from_hf(hf, None, "x")
    assert decoder == decoder_from_hf(text, "x")
    expected = {"summary": "none", "final_norm": False, **changes}
    assert tower == dataclasses.replace(vision_from_hf(vision, None, "x"), **expected)
    assert tower.tokens_per_frame == tokens
    family = hf["model_type"]
    made = llava_to_hf(whole(decoder, tower, family != "llava"), family)
    assert llava_from_hf(made, None, "x") == (decoder, tower)


def test_parts_of_a_llava_default_to_the_types_of_its_family():
    for hf in (LLAVA_15_7B, LLAVA_NEXT_VIDEO_7B, LLAVA_ONEVISION_7B):
        bare = {
            key: {k: v for k, v in hf[key].items() if k != "model_type"}
            for key in ("text_config", "vision_config")
        }
        assert llava_from_hf({**hf, **bare}, None, "x") == llava_from_hf(hf, None, "x")


@pytest.mark.parametrize("tied", [{"tie_word_embeddings": True}, {}])
def test_embeddings_are_tied_if_either_config_says_so(tied):
    text = {**LLAVA_ONEVISION_7B["text_config"], "tie_word_embeddings": not tied}
    decoder, _ = llava_from_hf({**LLAVA_ONEVISION_7B, "text_config": text, **tied}, None, "x")
    assert decoder.tie_embeddings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llava_next"}, "model_type is 'llava_next'; expected 'llava' or"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; expected 'gelu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]; expected one"),
        (
            {"vision_feature_layer": 0},
            "vision_feature_layer is 0; expected the output of one of 24",
        ),
        ({"vision_feature_layer": -25}, "vision_feature_layer is -25; expected the output of one"),
        ({"vision_feature_layer": -26}, "vision_feature_layer is -26"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'"),
        ({"quantization_config": {}}, "quantization_config is set"),
        ({"text_config": None}, "text_config is None; expected a table"),
        ({"text_config": {"model_type": "mpt"}}, "text_config.model_type is 'mpt'"),
        ({"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type is 'pixtral'"),
        (
            {"vision_config": SIGLIP_L16_384},
            "vision_feature_select_strategy is 'default'; expected",
        ),
        ({**LLAVA_NEXT_VIDEO_7B, "spatial_pool_mode": "max"}, "spatial_pool_mode is 'max'"),
        (
            {**LLAVA_NEXT_VIDEO_7B, "spatial_pool_stride": 5},
            "spatial_pool_stride is 5; expected a divisor",
        ),
        (
            {**LLAVA_NEXT_VIDEO_7B, "vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy is 'full'; expected 'default'",
        ),
    ],
)
def test_llavas_that_compute_something_else_are_refused(change, words):
    with pytest.raises(UserError, match=f"^/models/config.json: {words}"):
        llava_from_hf({**LLAVA_15_7B, **change}, None, "/models/config.json")


def test_the_original_layout_says_the_same_in_its_own_keys():
    tower = vision_preset("clip-l14-336")
    hf = {**LLAVA_15_7B, "text_config": LLAMA2_7B}
    assert original_from_hf(LLAVA_15_7B_ORIGINAL, tower, "x", "y") == llava_from_hf(hf, None, "x")
    for change, strategy in (("cls_patch", "full"), (None, "default")):
        found = original_from_hf(
            {**LLAVA_15_7B_ORIGINAL, "mm_vision_select_feature": change}, tower, "x", "y"
        )
        hf["vision_feature_select_strategy"] = strategy
        assert found == llava_from_hf(hf, None, "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llava_mpt"}, "model_type is 'llava_mpt'"),
        ({"mm_projector_type": None}, "mm_projector_type is 'linear'; expected 'mlp2x_gelu'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer is None; expected one whole"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is 'cls'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
    ],
)
def test_original_llavas_that_compute_something_else_are_refused(change, words):
    tower = vision_preset("clip-l14-336")
    with pytest.raises(UserError, match=f"^/models/config.json: {words}"):
        original_from_hf(
            {**LLAVA_15_7B_ORIGINAL, **change}, tower, "/models/config.json", "/models/clip"
        )


def test_the_original_layout_takes_clip_towers_only():
    siglip = vision_preset("siglip-l16-384")
    with pytest.raises(UserError, match=r"^/models/siglip holds a SigLIP tower"):
        original_from_hf(LLAVA_15_7B_ORIGINAL, siglip, "/models/config.json", "/models/siglip")


@pytest.mark.parametrize(
    ("family", "hf", "newline", "change", "words"),
    [
        ("llava", LLAVA_15_7B, False, {"pool": (3, 3)}, r"vision.pool is \(3, 3\) \(average\)"),
        ("llava", LLAVA_15_7B, False, {"final_norm": True}, "vision.final_norm is True"),
        ("llava", LLAVA_15_7B, True, {}, "newline is True"),
        ("llava_next_video", LLAVA_NEXT_VIDEO_7B, True, {"pool": (7, 7)}, "vision.pool is"),
        ("llava_next_video", LLAVA_NEXT_VIDEO_7B, True, {"pool": (12, 6)}, "vision.pool is"),
        ("llava_next_video", LLAVA_NEXT_VIDEO_7B, True, {"pooling": "bilinear"}, "vision.pool is"),
        (
            "llava_next_video",
            LLAVA_NEXT_VIDEO_7B,
            True,
            {"summary": "class_token"},
            "vision.summary is",
        ),
        ("llava_onevision", LLAVA_ONEVISION_7B, True, {"pooling": "average"}, "vision.pool is"),
        ("llava_onevision", LLAVA_ONEVISION_7B, False, {}, "newline is False"),
    ],
)
def test_what_a_family_cannot_say_is_not_exported_as_it(family, hf, newline, change, words):
    decoder, tower = llava_from_hf(hf, None, "x")
    config = whole(decoder, dataclasses.replace(tower, **change), newline)
    with pytest.raises(UserError, match=f"^{words}.*which the config.json of a {family} cannot"):
        llava_to_hf(config, family)


def test_decoder_tensors_go_where_they_are_drawn():
    table = decoder_table(decoder_preset("llama3-8b"))
    (entry,) = table.by_source()["model.layers.1.self_attn.q_proj.weight"]
    assert (entry.target, entry.axes) == (
        "params/decoder/layer_1/block/attention/q/kernel",
        (1, 0),
    )


def test_blocks_that_never_run_lie_where_they_are_drawn():
    tower = dataclasses.replace(vision_preset("clip-l14-336"), unused_blocks=1)
    entries = vision_table(tower, "").entries()
    places = {e.source: (e.target, e.row) for e in entries if e.source.endswith("mlp.fc1.bias")}
    assert places == {
        **{
            f"encoder.layers.{i}.mlp.fc1.bias": ("params/vision/blocks/mlp/fc1/bias", i)
            for i in range(23)
        },
        "encoder.layers.23.mlp.fc1.bias": ("params/vision/unused_blocks/mlp/fc1/bias", 0),
    }
