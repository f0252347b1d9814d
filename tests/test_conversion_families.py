"""Plans for directories: options, checks of every name and shape, and what each error says."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import tiny
from tests.tiny_conversion import shapes, small_tokenizer
from videollm_mod_jax.conversion.drafting import find_layout
from videollm_mod_jax.conversion.families import FAMILIES, export_plan, find_family, plan_conversion
from videollm_mod_jax.conversion.plan import Options
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import full_computation

SIGLIP = tiny.VISION
CLIP = dataclasses.replace(
    SIGLIP,
    architecture="clip",
    num_layers=3,
    norm_eps=1e-5,
    activation="quick_gelu",
    final_norm=False,
    pooling_head=False,
    summary="class_token",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
LLAMA_CONFIG = dataclasses.replace(
    tiny.CONFIG, vision=None, routing=full_computation(), decoder=tiny.DECODER
)
TOWER_CONFIG = dataclasses.replace(tiny.CONFIG, decoder=None, routing=full_computation())
LLAVA_CONFIG = dataclasses.replace(
    tiny.CONFIG,
    routing=full_computation(),
    vision=dataclasses.replace(CLIP, unused_blocks=1, summary="none", pool=(4, 4)),
)
NEWLINE_CONFIG = dataclasses.replace(
    LLAVA_CONFIG, newline=True, vision=dataclasses.replace(LLAVA_CONFIG.vision, pool=(2, 2))
)
CONFIGS = {
    "llama": LLAMA_CONFIG,
    "qwen2": dataclasses.replace(
        LLAMA_CONFIG,
        decoder=dataclasses.replace(tiny.DECODER, qkv_bias=True, tie_embeddings=True),
    ),
    "siglip": dataclasses.replace(TOWER_CONFIG, vision=dataclasses.replace(SIGLIP, pool=(3, 3))),
    "clip": dataclasses.replace(TOWER_CONFIG, vision=dataclasses.replace(CLIP, pool=(3, 3))),
    "llava": LLAVA_CONFIG,
    "llava_next_video": NEWLINE_CONFIG,
    "llava_onevision": dataclasses.replace(
        NEWLINE_CONFIG,
        vision=dataclasses.replace(
            SIGLIP, final_norm=False, summary="none", pooling="bilinear", pool=(2, 2)
        ),
    ),
}


def write(directory, config, family, layout=None, dtype=np.float32):
    """A checkpoint with random tensors of the names and shapes that the way back asks for."""
    directory.mkdir(exist_ok=True)
    rng, leaves, export = (
        np.random.default_rng(0),
        shapes(config),
        export_plan(config, family, layout),
    )
    save_file(
        {
            entry.source: rng.normal(size=entry.source_shape(leaves[entry.target].shape)).astype(
                dtype
            )
            for entry in export.table.entries()
        },
        directory / "model.safetensors",
    )
    (directory / "config.json").write_text(json.dumps(export.config))
    small_tokenizer().save(directory)
    return directory


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_made_here_comes_back_as_it_was(tmp_path, family):
    config = CONFIGS[family]
    conversion = plan_conversion(write(tmp_path, config, family), Options(system="Watch."))
    assert conversion.config == config
    assert (conversion.family, conversion.fresh, conversion.system) == (family, (), "Watch.")
    assert conversion.tokenizer == (None if config.decoder is None else tmp_path)
    (part,) = conversion.parts
    assert (part.role, part.family) == ("model", family)
    again = export_plan(conversion.config, part.family, part.layout, part.config)
    assert again.config == part.config
    assert {e.source for e in again.table.entries()} == set(part.source.names)


def test_every_family_can_be_recognised_by_each_of_its_model_types():
    assert [family.name for family in FAMILIES] == [*dict.fromkeys(f.name for f in FAMILIES)]
    assert {family.name for family in FAMILIES} == set(CONFIGS)
    for family in FAMILIES:
        assert family.examples
        for model_type in family.model_types:
            assert find_family({"model_type": model_type}, "x") is family


@pytest.fixture
def llama(tmp_path):
    return write(tmp_path / "llama", LLAMA_CONFIG, "llama")


@pytest.fixture
def siglip(tmp_path):
    return write(tmp_path / "siglip", CONFIGS["siglip"], "siglip")


CONNECTOR = tuple(
    f"params/connector/{name}/{kind}" for name in ("fc1", "fc2") for kind in ("bias", "kernel")
)


def test_a_language_model_and_a_tower_become_a_whole_with_a_fresh_connector(llama, siglip):
    conversion = plan_conversion(llama, Options(vision_tower=siglip))
    vision = dataclasses.replace(SIGLIP, pool=(3, 3))
    expected = dataclasses.replace(tiny.CONFIG, routing=full_computation(), vision=vision)
    assert conversion.config == expected
    assert conversion.config.tokens_per_frame == 10
    assert sorted(conversion.fresh) == sorted(CONNECTOR)
    roles = [(part.role, part.family, part.layout) for part in conversion.parts]
    assert roles == [("model", "llama", "hf"), ("vision_tower", "siglip", "hf-5")]
    assert conversion.layout == "hf"


def test_mod_adds_routers_that_start_as_the_pretrained_block(llama, siglip):
    options = Options(vision_tower=siglip, mod=("interleaved", 0.2))
    conversion = plan_conversion(llama, options)
    routers = {f"params/decoder/layer_{i}/router/kernel" for i in (1, 3)}
    assert set(conversion.fresh) == {*CONNECTOR, *routers}
    routing = conversion.config.routing
    assert (routing.insertion, routing.keep_ratio, routing.weighting, routing.selection) == (
        "interleaved",
        0.2,
        "tanh1",
        "learned",
    )
    options = dataclasses.replace(options, mod=((2,), 0.5), weighting="official")
    biased = plan_conversion(llama, options)
    assert set(biased.fresh) == {
        *CONNECTOR,
        "params/decoder/layer_2/router/kernel",
        "params/decoder/layer_2/router/bias",
    }


def test_pool_sets_the_tokens_of_a_frame(tmp_path, llama, siglip):
    conversion = plan_conversion(llama, Options(vision_tower=siglip, pool=(0, 0)))
    assert conversion.config.tokens_per_frame == 1
    llava = write(tmp_path / "llava", LLAVA_CONFIG, "llava")
    assert plan_conversion(llava, Options(pool=(2, 3))).config.tokens_per_frame == 6


@pytest.mark.parametrize(
    ("stored", "asked", "dtype"),
    [
        (np.float32, "auto", "float32"),
        (np.float16, "auto", "bfloat16"),
        (ml_dtypes.bfloat16, "auto", "bfloat16"),
        (ml_dtypes.bfloat16, "float32", "float32"),
        (np.float32, "bfloat16", "bfloat16"),
    ],
)
def test_the_language_model_decides_the_dtype_unless_it_is_given(
    tmp_path, siglip, stored, asked, dtype
):
    llama = write(tmp_path / "half", LLAMA_CONFIG, "llama", dtype=stored)
    config = plan_conversion(llama, Options(vision_tower=siglip, dtype=asked)).config
    assert (config.dtype, config.param_dtype) == (dtype, dtype)


def test_a_buffer_that_is_stored_in_halves_does_not_decide_the_dtype(tmp_path):
    llama = write(tmp_path / "whole", LLAMA_CONFIG, "llama")
    file = llama / "model.safetensors"
    frequencies = np.ones(4, np.float16)
    save_file({**load_file(file), "model.rotary_emb.inv_freq": frequencies}, file)
    assert plan_conversion(llama, Options()).config.param_dtype == "float32"


def test_pixel_statistics_are_read_beside_the_weights_in_either_file(siglip):
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}
    nested = siglip / "processor_config.json"
    nested.write_text(json.dumps({"image_processor": statistics}))
    assert plan_conversion(siglip, Options()).config.vision.std == (1.0, 2.0, 3.0)
    (siglip / "preprocessor_config.json").write_text(json.dumps({"image_std": [4.0, 5.0, 6.0]}))
    vision = plan_conversion(siglip, Options()).config.vision
    assert (vision.mean, vision.std) == ((0.5, 0.5, 0.5), (4.0, 5.0, 6.0))


def original(config):
    """The config.json that haotian-liu/LLaVA writes."""
    hf = export_plan(config, "llava").config
    return {
        **hf["text_config"],
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }


@pytest.mark.parametrize("layout", ["original", "original-with-tower"])
def test_the_original_llava_takes_its_tower_from_its_own_directory(tmp_path, layout):
    tower = write(tmp_path / "clip", CONFIGS["clip"], "clip", "hf")
    llava = write(tmp_path / "llava", LLAVA_CONFIG, "llava", layout)
    (llava / "config.json").write_text(json.dumps(original(LLAVA_CONFIG)))
    conversion = plan_conversion(llava, Options(vision_tower=tower))
    assert conversion.config == LLAVA_CONFIG
    assert conversion.fresh == ()
    roles = [(part.role, part.family, part.layout) for part in conversion.parts]
    beside = [("vision_tower", "clip", "hf")] if layout == "original" else []
    assert roles == [("model", "llava", layout), *beside]
    with pytest.raises(UserError, match=r"'openai/clip-vit-large-patch14-336'.*--vision-tower DIR"):
        plan_conversion(llava, Options())


def test_text_towers_are_left_out_and_nothing_else_is(siglip):
    (siglip / "config.json").write_text(
        json.dumps(
            {
                "model_type": "siglip",
                "vision_config": export_plan(CONFIGS["siglip"], "siglip").config,
            }
        )
    )

    def whole(tensors):
        extra = ("text_model.head.weight", "logit_scale", "logit_bias")
        renamed = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
        return {**renamed, **{name: np.ones(1, np.float32) for name in extra}}

    change_tensors(siglip, whole)
    conversion = plan_conversion(siglip, Options())
    assert conversion.config == CONFIGS["siglip"]
    assert conversion.layout == "hf"
    (part,) = conversion.parts
    # The text side is gone, so the way back is a tower.
    back = export_plan(conversion.config, part.family, part.layout, part.config)
    assert back.config == export_plan(CONFIGS["siglip"], "siglip").config
    assert all(e.source.startswith("vision_model.") for e in back.table.entries())
    change_tensors(siglip, lambda tensors: {**tensors, "adapter.x": np.ones(1, np.float32)})
    with pytest.raises(UserError, match=r"'adapter.x', which no rule"):
        plan_conversion(siglip, Options())


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def replaced(name, tensor):
    return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("model.norm.weight"), r"no tensor 'model\.norm\.weight'"),
        (replaced("model.layers.4.x", np.ones(2)), r"'model\.layers\.4\.x', which no rule"),
        (
            replaced("lm_head.weight", np.ones((48, 16), np.float32)),
            r"model\.safetensors: lm_head\.weight has the shape \[48, 16\].*\[48, 32\]",
        ),
        (
            replaced("lm_head.weight", np.ones((48, 32), np.int8)),
            r"model\.safetensors: lm_head\.weight is int8; expected floating point",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(llama, change, words):
    change_tensors(llama, change)
    with pytest.raises(UserError, match=words):
        plan_conversion(llama, Options())


def test_repeated_tensors_and_buffers_may_be_there(tmp_path):
    qwen2 = write(tmp_path / "qwen2", CONFIGS["qwen2"], "qwen2")
    frequencies = "model.layers.1.self_attn.rotary_emb.inv_freq"
    extra = {"lm_head.weight": np.ones((48, 32)), frequencies: np.ones(4)}
    change_tensors(qwen2, lambda tensors: {**tensors, **extra})
    assert plan_conversion(qwen2, Options()).config == CONFIGS["qwen2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base": Path("x")}, "--base is for adapters; .*llama holds no adapter_config.json"),
        ({"merge": True}, "--merge is for adapters"),
        ({"weighting": "paper"}, "--weighting is paper, of no routers; pass --mod"),
        ({"mod": ("interleaved", 0.2)}, "--mod routes vision tokens.*--vision-tower DIR"),
        ({"pool": (3, 3)}, "--pool pools the patches of a frame; pass --vision-tower"),
        ({"dtype": "float16"}, "--dtype is 'float16'; choose one of auto, bfloat16, float32"),
    ],
)
def test_options_that_do_not_fit_are_named(llama, options, words):
    with pytest.raises(UserError, match=words):
        plan_conversion(llama, Options(**options))


@pytest.mark.parametrize("family", ["llava", "siglip"])
def test_a_second_tower_is_refused(tmp_path, siglip, family):
    whole = write(tmp_path / "whole", CONFIGS[family], family)
    with pytest.raises(
        UserError, match=r"--vision-tower is for language models.*whole has its own"
    ):
        plan_conversion(whole, Options(vision_tower=siglip))


def test_a_directory_that_is_not_understood_is_named(tmp_path, llama, siglip):
    with pytest.raises(UserError, match=r"nowhere/config.json cannot be read"):
        plan_conversion(tmp_path / "nowhere", Options())
    with pytest.raises(UserError, match=r"llama/config.json: model_type is 'llama'.*vision tower"):
        plan_conversion(llama, Options(vision_tower=llama))
    change_json(llama / "config.json", model_type="gpt2")
    with pytest.raises(UserError, match=r"config.json: model_type is 'gpt2'; supported are llava,"):
        plan_conversion(llama, Options())
    (llama / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json is not a table of keys"):
        plan_conversion(llama, Options())


def test_a_language_model_needs_a_tokenizer(llama, tmp_path):
    (llama / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"llama holds no tokenizer.json; pass --tokenizer DIR"):
        plan_conversion(llama, Options())
    small_tokenizer().save(tmp_path)
    assert plan_conversion(llama, Options(tokenizer=tmp_path)).tokenizer == tmp_path


def test_find_layout_takes_the_drawn_one():
    probes = {"hf-4.0": ("a.norm", "b.weight"), "hf-5": ("a.norm", "c.weight")}
    assert find_layout(probes, ["a.norm", "c.weight", "d"]) == "hf-5"
    assert find_layout(probes, ["x"]) == "hf-4.0"


def test_an_unknown_family_is_named():
    with pytest.raises(UserError, match="unknown family 'gpt2'; there are llava, "):
        export_plan(LLAMA_CONFIG, "gpt2")


def test_a_config_without_vision_or_decoder_cannot_be_exported_as_one():
    for config, family, part in (
        (LLAMA_CONFIG, "siglip", "vision"),
        (LLAMA_CONFIG, "llava", "vision"),
        (TOWER_CONFIG, "llama", "decoder"),
    ):
        with pytest.raises(UserError, match=f"has no {part}"):
            export_plan(config, family)
