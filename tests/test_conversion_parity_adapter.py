"""Converted adapters compute what PEFT computes, and routers what their authors' layer does."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests import parity, tiny_hf
from tests.test_conversion_peft import LANGUAGE, LIVE_REGEX, adapt, live_llama
from videollm_mod_jax.conversion import stages
from videollm_mod_jax.conversion.cases import Case
from videollm_mod_jax.conversion.families import plan_conversion
from videollm_mod_jax.conversion.importing import import_model
from videollm_mod_jax.conversion.loading import load_hf
from videollm_mod_jax.conversion.plan import Options
from videollm_mod_jax.conversion.verify import verify
from videollm_mod_jax.models import VideoLLM

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
RNG = np.random.default_rng(0)
QUIET = rich.console.Console(quiet=True)


def pixels(count):
    return RNG.normal(size=(count, 16, 16, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)  # for what PEFT initialises


CASES = {
    "llama": Case(name="text", after=tuple(range(20, 50))),
    "llava": Case(
        name="image", before=(5, 6, 7), after=(8, 9, 10), pixels_XCCA=pixels(1), slots=16
    ),
    # CLS and 3 x 3 patches: ten tokens per frame.
    "live": Case(name="video", before=(5, 6, 7), after=(8, 9), pixels_XCCA=pixels(3), slots=30),
}
TARGETS = {"llama": LIVE_REGEX, "llava": LANGUAGE}


@pytest.mark.parametrize("merge", [False, True], ids=["beside", "merged"])
@pytest.mark.parametrize("family", TARGETS)
def test_adapter_equals_peft(family, merge, tmp_path):
    model = getattr(tiny_hf, family)()
    adapted = adapt(model, tmp_path, target_modules=TARGETS[family], r=4, lora_alpha=1)
    ours = tiny_hf.convert(tmp_path / "adapter", base=tmp_path / "base", merge=merge)
    assert ("lora" in ours.variables) != merge
    expected = parity.reference(adapted.eval()).run(CASES[family], parity.TOKENS)
    parity.assert_same(expected, stages.run(ours, CASES[family], parity.TOKENS))
    with adapted.disable_adapter():
        alone, _ = parity.reference(adapted).run(CASES[family], 1)
    assert np.abs(alone["logits"] - expected[0]["logits"]).max() > 0.1


@pytest.mark.parametrize("merge", [False, True], ids=["beside", "merged"])
def test_videollm_online_equals_its_parts_in_torch(merge, tmp_path):
    adapted = live_llama(tmp_path, [])
    tower = transformers.SiglipVisionModel.from_pretrained(tmp_path / "tower").eval()
    options = {"base": tmp_path / "base", "vision_tower": tmp_path / "tower", "merge": merge}
    ours = tiny_hf.convert(tmp_path / "adapter", **options)
    reference = parity.reference(adapted.eval(), tower, ours.config.vision)
    expected = reference.run(CASES["live"], parity.TOKENS)
    assert expected[0]["connector"].shape == (3, 10, 32)
    parity.assert_same(expected, stages.run(ours, CASES["live"], parity.TOKENS))


@pytest.mark.parametrize("keep_ratio", [0.2, 0.5])
def test_routed_layers_equal_the_authors_layer(keep_ratio, tmp_path):
    adapted = live_llama(tmp_path, [1]).eval()
    tower = transformers.SiglipVisionModel.from_pretrained(tmp_path / "tower").eval()
    options = Options(
        base=tmp_path / "base", vision_tower=tmp_path / "tower", mod=((1,), keep_ratio)
    )
    ours = load_hf(plan_conversion(tmp_path / "adapter", options))
    case, config = CASES["live"], ours.config
    assert config.routing.weighting == "official"
    with torch.no_grad():
        inputs = parity.reference(adapted, tower, config.vision).inputs(case)
        full = adapted(**inputs).logits[0].numpy()
        keep = round(10 * keep_ratio)
        frames = [range(3 + 10 * f, 13 + 10 * f) for f in range(3)]
        for layer in adapted.base_model.model.model.layers:
            if hasattr(layer, "router"):
                layer.forward = functools.partial(routed, layer, layer.forward, frames, keep)
        expected = adapted(**inputs).logits[0].numpy()
    x_BSD = jnp.asarray(inputs["inputs_embeds"].numpy())
    starts_BF = jnp.array([[frame[0] for frame in frames]])
    everywhere = jnp.arange(x_BSD.shape[1])[None]
    found = (
        VideoLLM(config)
        .apply(ours.variables, x_BSD, starts_BF, everywhere, method="decode")
        .logits_BJV[0]
    )
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert np.abs(full - expected).max() > 0.1


def routed(layer, block, frames, keep, hidden, position_embeddings, **_):
    """The layer of the authors' commit 5bb806e: a block on text and the best of each frame.

    Their `v_mask` is `is_vision` here; they multiply what the block gives, residual included.
    """
    scores = layer.router(hidden)[0, :, 0]
    best = [frame[i] for frame in frames for i in scores[list(frame)].topk(keep).indices]
    is_vision = torch.zeros(hidden.shape[1], dtype=torch.bool)
    is_vision[[i for frame in frames for i in frame]] = True
    rows = torch.tensor(sorted({*best, *(~is_vision).nonzero()[:, 0].tolist()}))
    cos_sin = tuple(table[:, rows] for table in position_embeddings)
    out = block(hidden[:, rows], attention_mask=None, position_embeddings=cos_sin)
    gate = torch.where(is_vision[rows], torch.sigmoid(scores[rows]), torch.ones(len(rows)))
    result = hidden.clone()
    result[:, rows] = gate[:, None] * out
    return result


@pytest.mark.parametrize("family", ["llama", "live"])
def test_verify_loads_adapters(family, tmp_path):
    options = Options(base=tmp_path / "base")
    if family == "live":
        live_llama(tmp_path, [1])
        options = Options(base=tmp_path / "base", vision_tower=tmp_path / "tower", mod=((1,), 0.2))
    else:
        adapt(tiny_hf.llama(), tmp_path, target_modules=LIVE_REGEX, r=4)
    conversion = plan_conversion(tmp_path / "adapter", options)
    import_model(conversion, tmp_path / "model", overwrite=False, console=QUIET)
    assert verify(
        tmp_path / "adapter",
        tmp_path / "model",
        options=options,
        prompt=None,
        image=None,
        video=None,
        max_kl=1e-6,
        tokens=2,
        console=QUIET,
    )
