"""The comparison passes what is right, names the first stage that is wrong, and says why."""

import sys

import jax
import numpy as np
import pytest
import rich.console
from PIL import Image

from videollm_mod_jax.conversion.families import plan_conversion
from videollm_mod_jax.conversion.importing import import_model
from videollm_mod_jax.conversion.plan import Options
from videollm_mod_jax.conversion.verify import difference, divergence, verify
from videollm_mod_jax.data.video import write_video
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training.checkpoint import load_model, save_model

QUIET = rich.console.Console(quiet=True)


@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests import tiny_hf

    return tiny_hf


@pytest.fixture(scope="module")
def llava(hf, tmp_path_factory):
    """A LLaVA with its processor, and the model that comes of it."""
    directory = tmp_path_factory.mktemp("llava")
    model = hf.llava()
    hf.processor(model, directory).save_pretrained(directory / "source")
    source = hf.save(model, directory / "source")
    converted(source, directory / "model")
    return source, directory / "model"


def converted(source, destination, **options):
    conversion = plan_conversion(source, Options(**options))
    import_model(conversion, destination, overwrite=False, console=QUIET)
    return destination


def run(source, model, *, max_kl=1e-6, tokens=4, image=None, video=None, prompt=None, **options):
    """The verdict, and what is printed."""
    console = rich.console.Console(width=120, record=True, quiet=False, file=sys.stderr)
    verdict = verify(
        source,
        model,
        options=Options(**options),
        prompt=prompt,
        image=image,
        video=video,
        max_kl=max_kl,
        tokens=tokens,
        console=console,
    )
    return verdict, console.export_text()


def test_divergence_is_the_drawn_one():
    expected, found = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]) + 7  # a shift is no difference
    assert divergence(expected, found) == pytest.approx(0.1438, abs=1e-4)
    both = [np.vstack([x, x[:, ::-1] * 0]) for x in (expected, found)]
    assert divergence(*both) == divergence(expected, found)  # of the worst position


def test_difference_is_the_drawn_one():
    assert difference(np.array([-8.0, 1.0]), np.array([-8.0, 3.0])) == (2.0, 0.25)


def test_passes_a_converted_model_and_shows_every_stage(llava):
    verdict, text = run(*llava)
    assert verdict
    assert "first that differs" not in text
    for name in ("text", "image", "video", "tower", "connector", "layer 2", "logits"):
        assert f"\n{name}" in text or f"\n {name}" in text
    assert text.count("the same 4 greedy tokens") == 3


def test_marks_the_first_stage_that_differs(hf, tmp_path):
    source = hf.save(hf.llama(), tmp_path / "llama")
    loaded = load_model(converted(source, tmp_path / "model"))
    path = "params/decoder/layer_1/block/mlp/up/kernel"

    def swap(where, leaf):
        name = jax.tree_util.keystr(where, simple=True, separator="/")
        return leaf[::-1] if name == path else leaf

    variables = jax.tree_util.tree_map_with_path(swap, loaded.variables)
    save_model(tmp_path, loaded.config, variables, loaded.tokenizer, loaded.system)
    verdict, text = run(source, tmp_path)
    assert not verdict
    marked = [line.split()[:2] for line in text.splitlines() if "first that differs" in line]
    assert marked == [["layer", "1"]]
    assert "MORE than 1e-06" in text
    assert "greedy tokens differ from number " in text
    assert run(source, tmp_path, max_kl=100.0)[0]


def test_turns_routing_and_pooling_off_and_says_so(llava, tmp_path):
    changes = {"mod": ("interleaved", 0.25), "pool": (2, 2)}
    verdict, text = run(llava[0], converted(llava[0], tmp_path / "model", **changes), **changes)
    assert verdict
    assert "without routing" in text
    assert "own pooling, (4, 4)" in text


def test_sees_a_picture_through_the_processor_of_the_source(llava, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 50, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    (tmp_path / "text.png").write_text("no picture")
    assert run(*llava, image=str(tmp_path / "picture.png"), prompt="A cat")[0]
    with pytest.raises(UserError, match=r"text\.png cannot be read as a picture"):
        run(*llava, image=str(tmp_path / "text.png"))


def test_sees_the_frames_of_a_video(llava, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (30, 24, 32, 3), np.uint8)
    write_video(tmp_path / "clip.mp4", frames, fps=10)
    verdict, text = run(*llava, video=str(tmp_path / "clip.mp4"))
    assert verdict
    assert "3 x 16 x 16" in text  # three seconds, one frame each


@pytest.mark.parametrize("layout", ["without a tower", "with a tower"])
def test_loads_the_original_layout(hf, layout, tmp_path):
    directories = hf.save_original(hf.llava(), tmp_path, with_tower=layout == "with a tower")
    options = {"vision_tower": directories["vision_tower"]}
    model = converted(directories["model"], tmp_path / "ours", **options)
    assert run(directories["model"], model, **options)[0]
    with pytest.raises(UserError, match=r"model holds no preprocessor_config|tower holds no pre"):
        run(directories["model"], model, image="picture.png", **options)


def test_compares_text_alone_where_the_connector_is_fresh(hf, tmp_path):
    source = hf.save(hf.llama(), tmp_path / "llama")
    tower = hf.save(hf.siglip(), tmp_path / "siglip")
    model = converted(source, tmp_path / "model", vision_tower=tower, dtype="bfloat16")
    verdict, text = run(source, model, vision_tower=tower)
    assert verdict
    assert "weights in bfloat16 on both sides, computed in float32" in text
    assert "the connector starts afresh" in text
    assert "image" not in text
    assert run(source, model, vision_tower=tower, dtype="bfloat16", max_kl=1e-3)[0]


def test_compares_a_tower(hf, tmp_path):
    source = hf.save(hf.siglip(), tmp_path / "siglip")
    model = converted(source, tmp_path / "model")
    verdict, text = run(source, model)
    assert verdict
    assert "pooled" in text
    loaded = load_model(model)
    halved = jax.tree.map(lambda leaf: leaf / 2, loaded.variables)
    save_model(tmp_path / "other", loaded.config, halved, None, "")
    assert not run(source, tmp_path / "other")[0]
    with pytest.raises(UserError, match="siglip is a vision tower without a language model"):
        run(source, model, prompt="A cat")


def test_compares_a_tower_on_a_picture(hf, tmp_path):
    import transformers

    source = hf.save(hf.siglip(), tmp_path / "siglip")
    side = hf.SIGLIP["image_size"]
    transformers.SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(source)
    model = converted(source, tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    verdict, text = run(source, model, image=tmp_path / "picture.png")
    assert verdict
    assert "image" in text


def test_refuses_a_model_of_another_source(hf, llava, tmp_path):
    other = hf.save(hf.llama(num_hidden_layers=1), tmp_path / "llama")
    with pytest.raises(UserError, match=r"was not made of .*: its decoder is another one"):
        run(other, llava[1])


def test_says_what_to_install(llava, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch is not installed: pip install 'videollm_mod_jax\["):
        run(*llava, image="picture.png")


def test_refuses_no_tokens(llava):
    with pytest.raises(UserError, match="--tokens is 0"):
        run(*llava, tokens=0)
