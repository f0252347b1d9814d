"""Presets are the published models: their parameter counts say so, at full size."""

import math

import jax
import pytest

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import (
    NO_LORA,
    Execution,
    VideoLLM,
    VideoLLMConfig,
    full_computation,
    init_variables,
)
from videollm_mod_jax.models.presets import DECODERS, VISION, decoder_preset, vision_preset


def shapes(decoder, vision):
    config = VideoLLMConfig(
        decoder=decoder_preset(decoder),
        routing=full_computation(),
        lora=NO_LORA,
        vision=vision_preset(vision),
        newline=False,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
    model = VideoLLM(config, Execution(scan=True))
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))["params"]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama2-7b", 6_738_415_616),
        ("qwen2-7b", 7_615_616_512),
    ],
)
def test_decoder_has_the_published_number_of_parameters(name, published):
    params = shapes(name, "digits-vit")
    assert count({k: params[k] for k in ("embedding", "decoder", "lm_head")}) == published


@pytest.mark.parametrize(
    ("name", "published", "tokens"),
    [
        ("siglip-l16-384", 316_283_904, 576),
        ("siglip-so400m-384", 428_225_600, 729),
        ("clip-l14-336", 303_507_456, 577),
    ],
)
def test_vision_tower_has_the_published_number_of_parameters(name, published, tokens):
    params = shapes("tiny", name)
    assert count(params["vision"]) == published
    assert params["vision"]["position_embedding"].shape[0] == tokens
    width, hidden = VISION[name].width, DECODERS["tiny"].hidden_size
    connector = width * hidden + hidden + hidden * hidden + hidden
    assert count(params["connector"]) == connector


def test_every_preset_is_a_frame_of_ten_tokens_but_the_one_of_the_study():
    others = {name: config for name, config in VISION.items() if name != "scenes-vit"}
    assert {config.tokens_per_frame for config in others.values()} == {10}
    assert VISION["scenes-vit"].tokens_per_frame == 26


@pytest.mark.parametrize(
    ("look_up", "name", "complaint"),
    [
        (decoder_preset, "lama3-8b", "did you mean 'llama3-8b'.*qwen2-7b"),
        (vision_preset, "siglip-l16-383", "did you mean 'siglip-l16-384'.*clip-l14-336"),
        (vision_preset, "xyz", "known: digits-vit"),
    ],
)
def test_unknown_name_lists_the_known_ones(look_up, name, complaint):
    with pytest.raises(UserError, match=complaint):
        look_up(name)
