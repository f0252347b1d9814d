"""There and back: every tensor bit by bit, the same names and config, and it loads again."""

import json

import numpy as np
import pytest
import rich.console

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file

from tests import tiny_hf
from tests.test_conversion_peft import LIVE_REGEX, adapt, live_llama, untrained
from videollm_mod_jax.conversion.exporting import export_model
from videollm_mod_jax.conversion.families import plan_conversion
from videollm_mod_jax.conversion.importing import import_model
from videollm_mod_jax.conversion.plan import Options

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
QUIET = rich.console.Console(quiet=True)
# By layout: how names that transformers 5 writes were spelt.
SPELLINGS = {
    "hf-5": {},
    "hf-4.0": {"vision_tower.": "vision_tower.vision_model."},
    "hf-4.52": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
    "hf-5-modules": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
}
SOURCES = [
    *((name, "hf-5") for name in ("llama", "qwen2", "siglip", "clip")),
    *((name, spelling) for name in ("llava", "llava_onevision") for spelling in SPELLINGS),
    ("llava_next_video", "hf-5"),
]
DTYPES = {"float32": "auto", "bfloat16": "auto", "float16": "float32"}
"""Of the source, and what `--dtype` keeps every bit of it."""


def there_and_back(source, work, part=None, **options):
    conversion = plan_conversion(source, Options(**options))
    import_model(conversion, work / "ours", overwrite=False, console=QUIET)
    return conversion, export_model(
        work / "ours",
        work / "back",
        part=part,
        family=None,
        dtype="auto",
        merge=False,
        drop_routers=False,
        shard_bytes=50_000,
        overwrite=False,
        console=QUIET,
    )


def read(directory):
    """All tensors of a directory, and its config."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(directory.glob("*.bin")):
        tensors |= torch.load(file, weights_only=True)
    config = next(iter(directory.glob("adapter_config.json")), directory / "config.json")
    return tensors, json.loads(config.read_text())


def assert_same(source, back):
    (expected, config), (found, config_back) = read(source), read(back)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert config_back == config


def spelt(directory, spelling, dtype):
    """Rewrites a saved model with other names and another dtype."""
    file = directory / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        old = next((old for old in SPELLINGS[spelling] if name.startswith(old)), "")
        new = SPELLINGS[spelling].get(old, "") + name.removeprefix(old)
        tensors[new] = tensor.to(getattr(torch, dtype))
    save_file(tensors, file, metadata={"format": "pt"})


def with_buffers(directory, extra):
    """Adds tensors that old releases of transformers wrote too."""
    file = directory / "model.safetensors"
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "spelling"), SOURCES)
def test_models(family, spelling, dtype, tmp_path, caplog):
    model = getattr(tiny_hf, family)()
    source = tiny_hf.save(model, tmp_path / "source")
    spelt(source, spelling, dtype)
    _, (back,) = there_and_back(source, tmp_path, dtype=DTYPES[dtype])
    assert_same(source, back)
    one, two = (type(model).from_pretrained(d, dtype=torch.float32).eval() for d in (source, back))
    # transformers warns of names that are missing or unknown.
    assert "LOAD REPORT" not in caplog.text
    assert one.state_dict().keys() == two.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(run(one), run(two))
        if dtype == "float32":
            assert torch.equal(run(model), run(two))


def run(model):
    if model.config.model_type.endswith("vision_model"):
        size = model.config.image_size
        return model(torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size))[0]
    return model(torch.arange(5, 30)[None]).logits


def test_ties_and_buffers_come_back(tmp_path):
    model = tiny_hf.llama(tie_word_embeddings=True)
    source = tiny_hf.save(model, tmp_path / "source")
    rotary = model.model.rotary_emb.inv_freq
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": rotary.clone() for i in range(3)}
    extra["lm_head.weight"] = model.lm_head.weight.detach().clone()
    with_buffers(source, extra)
    _, (back,) = there_and_back(source, tmp_path)
    assert_same(source, back)
    tower = tiny_hf.save(tiny_hf.clip(), tmp_path / "tower")
    with_buffers(tower, {"embeddings.position_ids": torch.arange(17)[None]})
    (tmp_path / "again").mkdir()
    _, (back,) = there_and_back(tower, tmp_path / "again")
    assert_same(tower, back)


@pytest.mark.parametrize("with_tower", [False, True], ids=["alone", "with a tower"])
def test_the_original_layout(with_tower, tmp_path):
    directories = tiny_hf.save_original(tiny_hf.llava(), tmp_path, with_tower=with_tower)
    conversion, back = there_and_back(
        directories["model"], tmp_path, vision_tower=directories["vision_tower"]
    )
    assert len(back) == len(conversion.parts) == (1 if with_tower else 2)
    for part, directory in zip(conversion.parts, back, strict=True):
        assert_same(directories[part.role], directory)


def test_a_peft_adapter_and_its_base(tmp_path):
    adapted = adapt(tiny_hf.llama(), tmp_path, target_modules=LIVE_REGEX, r=4).eval()
    _, (base, adapter) = there_and_back(tmp_path / "adapter", tmp_path, base=tmp_path / "base")
    assert_same(tmp_path / "base", base)
    assert_same(tmp_path / "adapter", adapter)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(model, adapter).eval()
        assert torch.equal(run(loaded), run(adapted))


@pytest.mark.parametrize("routed", [[], [1]], ids=["without routers", "with routers"])
def test_videollm_online(routed, tmp_path):
    adapted = live_llama(tmp_path, routed).eval()
    options = {"base": tmp_path / "base", "vision_tower": tmp_path / "tower"}
    if routed:
        options["mod"] = (tuple(routed), 0.2)
    _, back = there_and_back(tmp_path / "adapter", tmp_path, **options)
    for name, directory in zip(("base", "tower", "adapter"), back, strict=True):
        assert_same(tmp_path / name, directory)
    model = untrained(back[0], routed)
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(model, back[2]).eval()
        assert torch.equal(run(loaded), run(adapted))
        features = torch.from_numpy(np.ones((1, 10, 16), np.float32))
        connectors = (m.base_model.model.connector(features) for m in (loaded, adapted))
        assert torch.equal(*connectors)
