"""Still images as tokens, against the drawn examples and against the code of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.double import double_precision
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import anyres

SMALL = anyres.AnyResolution(
    pinpoints=((20, 20), (10, 20), (20, 10), (10, 30)), image_size=10, side=2, max_crops=None
)
SIZES = [(10, 10), (7, 30), (30, 7), (98, 147), (147, 98), (13, 19), (200, 40), (3, 400), (21, 20)]


def test_best_pinpoint_is_the_drawn_one():
    pinpoints = ((336, 336), (336, 672), (672, 672))
    assert anyres.best_pinpoint((200, 400), pinpoints) == (336, 672)
    assert anyres.best_pinpoint((200, 400), pinpoints[::-1]) == (336, 672)


def test_canvas_is_the_drawn_one():
    square = anyres.AnyResolution(pinpoints=((20, 20),), image_size=10, side=2, max_crops=None)
    canvas = anyres.canvas_indices((100, 200), square)
    assert canvas.tolist() == [[6, 7, 10, 11], [12, 13, 16, 17]]
    patches_XPD = jnp.arange(20.0).reshape(5, 4, 1)
    tokens = anyres.pack_image(patches_XPD, jnp.array([-1.0]), (100, 200), square)
    expected = [0, 1, 2, 3, 6, 7, 10, 11, -1, 12, 13, 16, 17, -1]
    assert tokens[:, 0].tolist() == expected
    assert anyres.image_tokens((100, 200), square) == len(expected)


@pytest.mark.parametrize(
    ("grid", "scaled"), [((6, 2), (140, 46)), ((3, 4), (70, 93)), ((4, 4), (81, 81))]
)
def test_large_canvases_shrink_as_drawn(grid, scaled):
    size = (384 * grid[0], 384 * grid[1])
    settings = anyres.AnyResolution(pinpoints=(size,), image_size=384, side=27, max_crops=9)
    assert anyres.canvas_indices(size, settings).shape == (27 * grid[0], 27 * grid[1])
    assert anyres.canvas_shape(size, settings) == scaled


def test_refuses_views_of_another_image():
    with pytest.raises(UserError, match=r"100 x 200 pixels has 3 views of 4 patches; found 5 of 4"):
        anyres.pack_image(jnp.zeros((5, 4, 1)), jnp.zeros(1), (100, 200), SMALL)
    with pytest.raises(UserError, match="0 x 4 pixels"):
        anyres.best_pinpoint((0, 4), SMALL.pinpoints)


@pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision"])
def test_equals_transformers(family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pinpoints = [[10 * rows, 10 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    kind = {"llava_next_video": "LlavaNextVideo", "llava_onevision": "LlavaOnevision"}[family]
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    text |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    vision = {"image_size": 10, "patch_size": 3, "hidden_size": 8, "intermediate_size": 8}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 1}
    towers = {"llava_next_video": "clip_vision_model", "llava_onevision": "siglip_vision_model"}
    texts = {"llava_next_video": "llama", "llava_onevision": "qwen2"}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**text, "model_type": texts[family]},
        vision_config={**vision, "model_type": towers[family]},
        image_grid_pinpoints=pinpoints,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).model
    settings = anyres.AnyResolution(
        pinpoints=tuple(map(tuple, pinpoints)),
        image_size=10,
        side=3,
        max_crops=4 if family == "llava_onevision" else None,
    )
    extra = {"vision_aspect_ratio": "anyres_max_4"}
    if family == "llava_next_video":
        extra = {"vision_feature_select_strategy": "full"}
    newline = np.random.default_rng(0).normal(size=8)
    for size in SIZES:
        rows, columns = anyres.crop_grid(size, settings)
        views = np.random.default_rng(1).normal(size=(1 + rows * columns, 9, 8))
        packed, lengths = model.pack_image_features(
            [torch.from_numpy(views)],
            torch.tensor([size]),
            image_newline=torch.from_numpy(newline),
            **extra,
        )
        # In float64: processors round the sums of an interpolation otherwise.
        with double_precision():
            ours = anyres.pack_image(jnp.asarray(views), jnp.asarray(newline), size, settings)
        assert anyres.image_tokens(size, settings) == int(lengths[0])
        np.testing.assert_allclose(ours, packed[0].detach().numpy(), atol=1e-10, err_msg=str(size))
