"""Converted LLaVAs compute what transformers computes, on what its own processors make."""

import dataclasses
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests import parity, tiny_hf
from videollm_mod_jax.conversion import stages
from videollm_mod_jax.conversion.cases import Case, any_resolution
from videollm_mod_jax.conversion.families import plan_conversion
from videollm_mod_jax.conversion.plan import Options
from videollm_mod_jax.conversion.verify import divergence
from videollm_mod_jax.models import anyres

RNG = np.random.default_rng(0)
PICTURES = {
    "square": RNG.integers(0, 256, (30, 30, 3), np.uint8),
    "wide": RNG.integers(0, 256, (20, 70, 3), np.uint8),
    "high": RNG.integers(0, 256, (61, 40, 3), np.uint8),
}
CLIP = RNG.integers(0, 256, (3, 20, 28, 3), np.uint8)
CASES = [
    ("llava", "image", "wide"),
    ("llava_next_video", "image", "high"),
    ("llava_next_video", "video", None),
    ("llava_onevision", "image", "wide"),
    ("llava_onevision", "image", "square"),
    ("llava_onevision", "video", None),
]


@functools.cache
def made(family):
    return getattr(tiny_hf, family)()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @functools.cache
    def save(family):
        directory = tiny_hf.save(made(family), tmp_path_factory.mktemp(family))
        return directory, tiny_hf.processor(made(family), tmp_path_factory.mktemp("processor"))

    return save


def processed(directory, processor, kind, picture):
    """What the processor makes of a picture or a clip inside text, and the same as our case."""
    pixels = {"images": PICTURES[picture]} if kind == "image" else {"videos": CLIP}
    text = f"User: <{kind}> How many?\nAssistant:"
    inputs = dict(processor(text=text, return_tensors="pt", **pixels))
    ids = inputs["input_ids"][0].tolist()
    slot = {"image": tiny_hf.IMAGE_ID, "video": tiny_hf.VIDEO_ID}[kind]
    first, slots = ids.index(slot), ids.count(slot)
    values = inputs["pixel_values" if kind == "image" else "pixel_values_videos"].numpy()
    case = Case(
        name=kind,
        before=tuple(ids[:first]),
        after=tuple(ids[first + slots :]),
        pixels_XCCA=values.reshape(-1, *values.shape[-3:]).transpose(0, 2, 3, 1),
        slots=slots,
    )
    inputs.pop("batch_num_images", None)
    if "image_sizes" in inputs:
        crops = any_resolution(plan_conversion(directory, Options()))
        size = tuple(inputs["image_sizes"][0].tolist())
        case = dataclasses.replace(case, crops=crops, size=size)
    return inputs, case


@pytest.mark.parametrize(("family", "kind", "picture"), CASES)
def test_equals_transformers(saved, family, kind, picture):
    directory, processor = saved(family)
    inputs, case = processed(directory, processor, kind, picture)
    reference = parity.reference(made(family))
    for name, value in reference.inputs(case).items():
        assert torch.equal(inputs[name], value), name
    expected = reference.run_on(inputs, len(case.after), parity.TOKENS)
    parity.assert_same(expected, stages.run(tiny_hf.convert(directory), case, parity.TOKENS))


@pytest.mark.parametrize(("picture", "shrinks"), [("wide", False), ("square", True)])
def test_pictures_take_both_ways_through_onevision(saved, picture, shrinks):
    _, case = processed(*saved("llava_onevision"), "image", picture)
    whole = anyres.canvas_indices(case.size, case.crops).shape
    assert (anyres.canvas_shape(case.size, case.crops) != whole) == shrinks


def test_original_layout_equals_the_same_tensors_in_the_other(tmp_path):
    directories = tiny_hf.save_original(made("llava"), tmp_path)
    ours = tiny_hf.convert(directories["model"], vision_tower=directories["vision_tower"])
    pixels = np.random.default_rng(1).normal(size=(1, 16, 16, 3)).astype(np.float32)
    case = Case(name="image", before=(5, 6), after=(7, 8, 9), pixels_XCCA=pixels, slots=16)
    expected = parity.reference(made("llava")).run(case, parity.TOKENS)
    parity.assert_same(expected, stages.run(ours, case, parity.TOKENS))


@pytest.mark.parametrize("family", ["llava", "llava_next_video", "llava_onevision"])
def test_bfloat16_is_near(saved, family):
    directory, processor = saved(family)
    inputs, case = processed(directory, processor, "image", "wide")
    (expected, _), (found, _) = (
        parity.reference(made(family)).run_on(inputs, len(case.after), 1),
        stages.run(tiny_hf.convert(directory, dtype="bfloat16"), case, 1),
    )
    assert 0 < divergence(expected["logits"], found["logits"]) < 1e-3
