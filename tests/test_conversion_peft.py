"""Adapters that PEFT itself makes and saves, against PEFT's own arithmetic."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests import tiny_hf
from tests.tiny_conversion import shapes
from videollm_mod_jax.conversion.adapter import export_adapter
from videollm_mod_jax.conversion.families import plan_conversion
from videollm_mod_jax.conversion.llama import decoder_to_hf
from videollm_mod_jax.conversion.loading import VariableReader, check_repeats
from videollm_mod_jax.conversion.peft_names import base_table
from videollm_mod_jax.conversion.plan import Options
from videollm_mod_jax.conversion.table import match
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import LoraConfig, RoutingConfig, VideoLLMConfig
from videollm_mod_jax.models.config import LINEAR_NAMES
from videollm_mod_jax.models.presets import decoder_preset, vision_preset

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIVE_REGEX = "model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)|lm_head$"
LANGUAGE = r".*language_model.*\.(q_proj|o_proj)|lm_head"

# By name: the settings, and whether it fits beside the kernels too.
ADAPTERS = {
    "names": ({"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}, True),
    "regex": ({"target_modules": LIVE_REGEX, "r": 4, "lora_alpha": 8}, True),
    "all-linear": ({"target_modules": "all-linear", "r": 4}, True),
    "head": ({"target_modules": [*SEVEN, "lm_head"], "r": 4, "lora_alpha": 3}, True),
    "rslora": ({"target_modules": ["q_proj", "o_proj"], "r": 4, "use_rslora": True}, True),
    "modules_to_save": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
        True,
    ),
    "patterns": (
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"down_proj": 5},
        },
        False,
    ),
    "layers": (
        {
            "target_modules": ["q_proj", "up_proj", "k_proj"],
            "layers_to_transform": [0, 2],
            "exclude_modules": ["k_proj"],
        },
        False,
    ),
    "rslora and patterns": (
        {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"1.*.q_proj": 2}},
        False,
    ),
}


def adapt(model, directory, **settings):
    """A PEFT model with trained-looking weights, saved with its base."""
    tiny_hf.save(model, directory / "base")
    config = peft.LoraConfig(**settings)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(directory / "adapter")
    return adapted


def kernels(model, base, layout):
    """What a model in memory is made of but for its tower, as our variables."""
    config = plan_conversion(base, Options()).config
    table = base_table(config.decoder, config.vision, config.newline, layout, (), False)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return {e.target: e.to_target(state[e.source]) for e in table.entries() if e.row is None}


def check_equal(conversion, expected):
    """Whether a conversion, adapters added, computes with the kernels of a merged model."""
    reader, lora = VariableReader(conversion), conversion.config.lora
    check_repeats(conversion)
    for part in conversion.parts:
        match(part.table, part.source.names, "")
    for path, value in expected.items():
        found = reader.read(path)
        adapter = path.replace("params/", "lora/", 1).removesuffix("kernel")
        if adapter + "a" in reader.shapes:
            update = reader.read(adapter + "a") @ reader.read(adapter + "b")
            found = found + np.float32(lora.alpha / lora.rank) * update
        np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_or_beside_the_kernels_are_those_of_peft(tmp_path, name):
    settings, fits_beside = ADAPTERS[name]
    adapted = adapt(tiny_hf.llama(), tmp_path, **settings)
    expected = kernels(adapted.merge_and_unload(), tmp_path / "base", "hf")
    options = Options(base=tmp_path / "base")
    merged = plan_conversion(tmp_path / "adapter", dataclasses.replace(options, merge=True))
    assert merged.config.lora.rank == 0
    assert merged.merges
    check_equal(merged, expected)
    if fits_beside:
        conversion = plan_conversion(tmp_path / "adapter", options)
        assert conversion.config.lora.rank == settings.get("r", 8)
        check_equal(conversion, expected)
    else:
        with pytest.raises(UserError, match="add --merge"):
            plan_conversion(tmp_path / "adapter", options)


@pytest.mark.parametrize("family", ["qwen2", "llava", "llava_next_video", "llava_onevision"])
def test_adapters_of_other_families(tmp_path, family):
    model = getattr(tiny_hf, family)()
    targets = "all-linear" if family == "qwen2" else LANGUAGE
    adapted = adapt(model, tmp_path, target_modules=targets, r=4)
    layout = "hf" if family == "qwen2" else "hf-5-modules"
    expected = kernels(adapted.merge_and_unload(), tmp_path / "base", layout)
    for merge in (False, True):
        options = Options(base=tmp_path / "base", merge=merge)
        check_equal(plan_conversion(tmp_path / "adapter", options), expected)


def test_an_adapter_on_a_projector_and_a_whole_projector(tmp_path):
    settings = {"target_modules": r".*language_model.*q_proj|.*projector.linear_1"}
    settings["modules_to_save"] = ["linear_2"]
    adapted = adapt(tiny_hf.llava(), tmp_path, **settings)
    expected = kernels(adapted.merge_and_unload(), tmp_path / "base", "hf-5-modules")
    options = Options(base=tmp_path / "base")
    check_equal(
        plan_conversion(tmp_path / "adapter", dataclasses.replace(options, merge=True)), expected
    )
    with pytest.raises(UserError, match=r"adapts model\.multi_modal_projector\.linear_1; .*merge"):
        plan_conversion(tmp_path / "adapter", options)


def test_an_adapter_on_the_vision_tower_is_refused_by_name(tmp_path):
    adapt(tiny_hf.llava(), tmp_path, target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"model\.vision_tower\..*changes the vision tower"):
        plan_conversion(tmp_path / "adapter", Options(base=tmp_path / "base", merge=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is"),
    ],
)
def test_variants_are_refused_by_key(tmp_path, settings, words):
    adapt(tiny_hf.llama(), tmp_path, target_modules=["q_proj"], **settings)
    with pytest.raises(UserError, match=rf"adapter_config\.json: {words}"):
        plan_conversion(tmp_path / "adapter", Options(base=tmp_path / "base", merge=True))


def test_another_kind_of_adapter_is_refused_by_name(tmp_path):
    model = tiny_hf.llama()
    tiny_hf.save(model, tmp_path / "base")
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="peft_type is 'IA3'"):
        plan_conversion(tmp_path / "adapter", Options(base=tmp_path / "base"))


def test_names_of_the_adapter_that_training_loops_leave_in(tmp_path):
    settings = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"], "r": 4}
    adapted = adapt(tiny_hf.llama(), tmp_path, **settings)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    state = {
        name: tensor
        for name, tensor in adapted.state_dict().items()
        if "lora_" in name or "modules_to_save" in name
    }
    assert any("lora_A.default.weight" in name for name in state)
    assert any("modules_to_save.default.weight" in name for name in state)
    torch.save(state, tmp_path / "adapter" / "adapter_model.bin")
    expected = kernels(adapted.merge_and_unload(), tmp_path / "base", "hf")
    conversion = plan_conversion(tmp_path / "adapter", Options(base=tmp_path / "base"))
    check_equal(conversion, expected)


class LiveLlama(transformers.LlamaForCausalLM):
    """Llama with a connector, and with routers in the layers of `config.routed`."""

    def __init__(self, config):
        super().__init__(config)
        width, hidden = config.vision_hidden_size, config.hidden_size
        self.connector = torch.nn.Sequential(
            torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden)
        )
        for i in config.routed:
            self.model.layers[i].router = torch.nn.Linear(hidden, 1)


def untrained(base, routed):
    """A `LiveLlama` with the weights of a Llama."""
    config = transformers.LlamaConfig.from_pretrained(base)
    config.vision_hidden_size, config.routed = 16, routed
    return LiveLlama.from_pretrained(base, config=config)


def live_llama(tmp_path, routed):
    """A trained VideoLLM-online or VideoLLM-MoD, its base and its tower."""
    tiny_hf.save(tiny_hf.llama(), tmp_path / "base")
    tiny_hf.save(tiny_hf.siglip(image_size=16), tmp_path / "tower")
    model = untrained(tmp_path / "base", routed)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=0.05,
            target_modules=LIVE_REGEX,
            modules_to_save=["connector", *(["router"] if routed else [])],
            task_type="CAUSAL_LM",
        ),
    )
    tiny_hf.perturbed(adapted)
    # Only what is trained is saved, so the base keeps its values.
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if plain in base:
                parameter.copy_(base[plain])
    adapted.save_pretrained(tmp_path / "adapter")
    return adapted


@pytest.mark.parametrize("routed", [[], [1]])
def test_a_live_llama_is_its_lora_its_connector_and_its_routers(tmp_path, routed):
    adapted = live_llama(tmp_path, routed)
    options = Options(
        base=tmp_path / "base",
        vision_tower=tmp_path / "tower",
        mod=((1,), 0.2) if routed else None,
    )
    conversion = plan_conversion(tmp_path / "adapter", options)
    assert conversion.fresh == ()
    config = conversion.config
    assert config.lora.targets == ("q", "k", "v", "o", "gate", "up", "down", "lm_head")
    assert config.routing.weighting == ("official" if routed else "none")
    table = base_table(config.decoder, config.vision, False, "live", tuple(routed), True)
    state = {n: t.numpy() for n, t in adapted.merge_and_unload().state_dict().items()}
    assert {e.source for e in table.entries()} == set(state)
    expected = {e.target: e.to_target(state[e.source]) for e in table.entries()}
    check_equal(conversion, expected)
    merged = plan_conversion(tmp_path / "adapter", dataclasses.replace(options, merge=True))
    check_equal(merged, expected)


@pytest.mark.parametrize("routed", [[], [1]])
@pytest.mark.parametrize("born_here", [False, True])
def test_what_is_written_back_peft_loads(tmp_path, routed, born_here):
    adapted = live_llama(tmp_path, routed)
    mod = ((1,), 0.2) if routed else None
    options = Options(base=tmp_path / "base", vision_tower=tmp_path / "tower", mod=mod)
    conversion = plan_conversion(tmp_path / "adapter", options)
    part, reader = conversion.parts[-1], VariableReader(conversion)
    covered = [e.target for p in conversion.parts[:-1] for e in p.table.entries()]
    known = {} if born_here else {"names": part.source.names, "original": part.config}
    table, hf = export_adapter(conversion.config, part.layout, covered, **known)
    (tmp_path / "back").mkdir()
    save_file(
        {
            e.source: np.ascontiguousarray(e.from_target(reader.read(e.target)))
            for e in table.entries()
        },
        tmp_path / "back" / "adapter_model.safetensors",
    )
    (tmp_path / "back" / "adapter_config.json").write_text(json.dumps(hf))
    if not born_here:
        assert hf == part.config
        one, two = (load_file(tmp_path / d / "adapter_model.safetensors")
                    for d in ("adapter", "back"))  # fmt: skip
        assert sorted(one) == sorted(two)
        assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    base = untrained(tmp_path / "base", routed)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "back").merge_and_unload()
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_the_full_size_adapter_of_videollm_online_has_exactly_our_names_and_shapes():
    decoder, vision = decoder_preset("llama3-8b"), vision_preset("siglip-l16-384")
    hf = transformers.LlamaConfig(**decoder_to_hf(decoder))
    hf.vision_hidden_size, hf.routed = vision.width, range(1, 32, 2)
    settings = peft.LoraConfig(
        r=128, lora_alpha=256, target_modules=LIVE_REGEX, modules_to_save=["connector", "router"]
    )
    with torch.device("meta"):
        model = peft.get_peft_model(LiveLlama(hf), settings, low_cpu_mem_usage=True)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    routing = RoutingConfig(
        insertion="interleaved",
        keep_ratio=0.2,
        selection="learned",
        weighting="official",
        force_keep_last=False,
        exploration=0.0,
    )
    config = VideoLLMConfig(
        decoder=decoder,
        routing=routing,
        lora=LoraConfig(rank=128, alpha=256.0, dropout=0.0, targets=(*LINEAR_NAMES, "lm_head")),
        vision=vision,
        newline=False,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
    table, _ = export_adapter(config, "live", ())
    leaves = shapes(config)
    ours = {e.source: e.source_shape(leaves[e.target].shape) for e in table.entries()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert len(ours) == 2 * (7 * 32 + 1) + 4 + 2 * 16
