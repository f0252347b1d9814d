"""Adapters written by hand, without PyTorch: their names, what becomes of them, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import tiny
from tests.tiny_conversion import shapes, small_tokenizer
from videollm_mod_jax.conversion import live
from videollm_mod_jax.conversion.adapter import export_adapter
from videollm_mod_jax.conversion.families import export_plan, plan_conversion
from videollm_mod_jax.conversion.llama import decoder_table
from videollm_mod_jax.conversion.loading import VariableReader
from videollm_mod_jax.conversion.peft_config import read_lora
from videollm_mod_jax.conversion.peft_names import linears, lora_rules, parse_names
from videollm_mod_jax.conversion.plan import Options
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import LoraConfig, RoutingConfig, full_computation

R, D, LAYERS = 4, tiny.DECODER.hidden_size, tiny.DECODER.num_layers
LLAMA = dataclasses.replace(tiny.CONFIG, vision=None, routing=full_computation())
TOWER = dataclasses.replace(tiny.CONFIG, decoder=None, routing=full_computation())
PREFIX = "base_model.model."
RNG = np.random.default_rng(0)


def write_base(directory, config, family):
    """A checkpoint with random tensors of the names and shapes that the way back asks for."""
    directory.mkdir()
    leaves, export = shapes(config), export_plan(config, family)
    entries = export.table.entries()
    save_file(
        {e.source: random(*e.source_shape(leaves[e.target].shape)) for e in entries},
        directory / "model.safetensors",
    )
    (directory / "config.json").write_text(json.dumps(export.config))
    small_tokenizer().save(directory)
    return directory


def random(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def pairs(modules, rank=R):
    """Random pairs for linears from D to D or, of the head, to V."""
    tensors = {}
    for module in modules:
        rows = tiny.DECODER.vocab_size if module == "lm_head" else D
        tensors[f"{PREFIX}{module}.lora_A.weight"] = random(rank, D)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = random(rows, rank)
    return tensors


def attention(name, layers=range(LAYERS)):
    return [f"model.layers.{i}.self_attn.{name}_proj" for i in layers]


def connector():
    width = tiny.VISION.width
    sizes = {"0.weight": (D, width), "0.bias": (D,), "2.weight": (D, D), "2.bias": (D,)}
    return {f"{PREFIX}connector.{name}": random(*size) for name, size in sizes.items()}


def routers(layers):
    name = PREFIX + "model.layers.{}.router."
    weights = {name.format(i) + "weight": random(1, D) for i in layers}
    return weights | {name.format(i) + "bias": random(1) for i in layers}


CONFIG = {"peft_type": "LORA", "r": R, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}
LIVE = {**CONFIG, "modules_to_save": ["connector"]}


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", LLAMA, "llama")


@pytest.fixture
def tower(tmp_path):
    return write_base(tmp_path / "tower", TOWER, "siglip")


@pytest.fixture
def adapter(tmp_path):
    """Writes an adapter: q and o in every layer unless other tensors are given."""

    def write(tensors=None, **changes):
        directory = tmp_path / "adapter"
        directory.mkdir(exist_ok=True)
        tensors = pairs([*attention("q"), *attention("o")]) if tensors is None else tensors
        save_file(tensors, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
        return directory

    return write


def test_names_are_sorted_as_drawn():
    names = [
        "base_model.model.lm_head.lora_A.default.weight",
        "base_model.model.lm_head.lora_B.default.weight",
        "base_model.model.lm_head.base_layer.weight",
        "base_model.model.connector.modules_to_save.default.0.bias",
        "base_model.model.model.layers.3.router.weight",
    ]
    found = parse_names(names, "a")
    assert found.lora == {"lm_head": (names[0], names[1])}
    assert found.saved == {
        "lm_head.weight": names[2],
        "connector.0.bias": names[3],
        "model.layers.3.router.weight": names[4],
    }
    assert found.routed == (3,)
    assert found.subjects == {*found.saved, "lm_head.weight"}


def test_targets_and_saved_modules_are_those_drawn():
    lora = read_lora(
        {
            "peft_type": "LORA",
            "target_modules": ["q_proj", "lm_head"],
            "layers_to_transform": [1],
            "modules_to_save": ["connector"],
        },
        "a",
    )
    assert lora.targets("model.layers.1.self_attn.q_proj")
    assert lora.targets("lm_head")
    assert not lora.targets("model.layers.0.self_attn.q_proj")
    assert [lora.saves(m) for m in ("connector", "connector.0", "lm_head")] == [True, True, False]


def test_linears_and_their_rules_are_those_drawn():
    module, path = "model.layers.1.mlp.up_proj", "params/decoder/layer_1/block/mlp/up/kernel"
    found = linears(decoder_table(tiny.DECODER))
    assert found[module] == path
    assert found["lm_head"] == "params/lm_head/kernel"
    assert len(found) == 7 * LAYERS + 1
    tied = dataclasses.replace(tiny.DECODER, tie_embeddings=True)
    assert linears(decoder_table(tied)) == found
    a, b = lora_rules({module: path}, {module: ("A", "B")})
    assert (a.source, a.target) == ("A", "lora/decoder/layer_1/block/mlp/up/a")
    assert (b.source, b.target) == ("B", "lora/decoder/layer_1/block/mlp/up/b")
    assert a.axes == b.axes == (1, 0)


def test_an_adapter_stays_beside_its_kernels_transposed_and_in_float32(base, adapter):
    tensors = pairs([*attention("q"), *attention("o")])
    directory = adapter({k: v.astype(np.float16) for k, v in tensors.items()}, lora_dropout=0.05)
    conversion = plan_conversion(directory, Options(base=base, dtype="bfloat16"))
    lora = LoraConfig(rank=R, alpha=8.0, dropout=0.05, targets=("q", "o"))
    assert conversion.config == dataclasses.replace(
        LLAMA, lora=lora, dtype="bfloat16", param_dtype="bfloat16"
    )
    assert (conversion.fresh, conversion.tokenizer) == ((), base)
    assert [(part.role, part.family) for part in conversion.parts] == [
        ("model", "llama"),
        ("adapter", "peft"),
    ]
    reader, stored = VariableReader(conversion), load_file(directory / "adapter_model.safetensors")
    for half, name in (("a", "A"), ("b", "B")):
        found = reader.read(f"lora/decoder/layer_2/block/attention/o/{half}")
        tensor = stored[f"{PREFIX}model.layers.2.self_attn.o_proj.lora_{name}.weight"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensor.T.astype(np.float32))


@pytest.mark.parametrize("rs", [False, True])
def test_a_merged_adapter_is_added_where_it_is(base, adapter, rs):
    modules = [*attention("q", [1]), "lm_head"]
    tensors = pairs(modules)
    directory = adapter(
        tensors,
        target_modules=["q_proj", "lm_head"],
        layers_to_transform=[1],
        layers_pattern="layers",
        use_rslora=rs,
    )
    conversion = plan_conversion(directory, Options(base=base, merge=True))
    assert conversion.config == LLAMA
    reader, stored = VariableReader(conversion), load_file(base / "model.safetensors")
    scale = 8 / (R**0.5 if rs else R)
    for module, path in linears(decoder_table(tiny.DECODER)).items():
        expected = stored[module + ".weight"].T
        if module in modules:
            a, b = (tensors[f"{PREFIX}{module}.lora_{half}.weight"] for half in "AB")
            expected = expected + scale * (b @ a).T
        np.testing.assert_allclose(reader.read(path), expected, rtol=0, atol=1e-5)


def test_patterns_give_modules_their_own_rank_and_alpha(base, adapter):
    own = attention("q", [0])
    tensors = pairs(own, rank=2) | pairs([*attention("q", range(1, LAYERS)), *attention("o")])
    directory = adapter(tensors, rank_pattern={"layers.0.*q_proj": 2}, alpha_pattern={"o_proj": 1})
    merges = plan_conversion(directory, Options(base=base, merge=True)).merges
    scales = {path.split("block/")[1]: merge.scale for path, merge in merges.items()}
    assert scales == {"attention/q/kernel": 8 / R, "attention/o/kernel": 1 / R}
    assert merges["params/decoder/layer_0/block/attention/q/kernel"].scale == 8 / 2
    with pytest.raises(UserError, match=r"adapter_config\.json gives .*q_proj.*add --merge"):
        plan_conversion(directory, Options(base=base))


def test_whole_modules_replace_those_of_the_base_and_may_enlarge_the_vocabulary(base, adapter):
    rows = tiny.DECODER.vocab_size + 3
    embedding, head = random(rows, D), random(rows, D)
    tensors = pairs([*attention("q"), *attention("o")])
    tensors[PREFIX + "model.embed_tokens.weight"] = embedding
    tensors[PREFIX + "lm_head.modules_to_save.default.weight"] = head
    directory = adapter(tensors, modules_to_save=["embed_tokens", "lm_head"])
    small_tokenizer().save(directory)
    conversion = plan_conversion(directory, Options(base=base))
    assert conversion.config.decoder == dataclasses.replace(tiny.DECODER, vocab_size=rows)
    reader = VariableReader(conversion)
    np.testing.assert_array_equal(reader.read("params/embedding"), embedding)
    np.testing.assert_array_equal(reader.read("params/lm_head/kernel"), head.T)
    # It comes with the tokenizer that knows the new words.
    assert conversion.tokenizer == directory
    reasons = conversion.parts[0].table.left_out
    assert set(reasons.values()) == {"is replaced by a tensor of the adapter"}
    assert len(reasons) == 2


def test_videollm_online_is_an_adapter_with_a_connector_over_a_tower(base, tower, adapter):
    tensors = pairs([*attention("q"), *attention("o")]) | connector()
    directory = adapter(tensors, modules_to_save=["connector"])
    conversion = plan_conversion(directory, Options(base=base, vision_tower=tower))
    assert conversion.family == live.FAMILY
    assert [part.role for part in conversion.parts] == ["model", "vision_tower", "adapter"]
    assert conversion.fresh == ()
    assert conversion.config.routing == full_computation()
    assert conversion.config.tokens_per_frame == 10
    found = VariableReader(conversion).read("params/connector/fc1/kernel")
    np.testing.assert_array_equal(found, tensors[PREFIX + "connector.0.weight"].T)


@pytest.mark.parametrize("weighted", [True, False])
def test_routers_of_the_authors_come_along(base, tower, adapter, weighted):
    tensors = pairs([*attention("q"), *attention("o")]) | connector() | routers([1, 3])
    directory = adapter(tensors, modules_to_save=["connector", "router"])
    changes = {"vision_drop_strategy": "mod_0.2", "is_mod_weighted": weighted}
    changes |= {"frame_token_cls": True, "frame_token_pooled": [2, 2], "frame_num_tokens": 5}
    (directory / "config.json").write_text(json.dumps(changes))
    conversion = plan_conversion(directory, Options(base=base, vision_tower=tower))
    assert conversion.config.routing == RoutingConfig(
        insertion="interleaved",
        keep_ratio=0.2,
        selection="learned",
        weighting="official" if weighted else "none",
        force_keep_last=False,
        exploration=0.0,
    )
    assert (conversion.config.tokens_per_frame, conversion.fresh) == (5, ())
    reader = VariableReader(conversion)
    kernel = tensors[PREFIX + "model.layers.3.router.weight"]
    found = reader.read("params/decoder/layer_3/router/kernel")
    np.testing.assert_array_equal(found, kernel[0])
    if weighted:
        bias = tensors[PREFIX + "model.layers.3.router.bias"]
        assert reader.read("params/decoder/layer_3/router/bias") == bias[0]
    else:
        assert len(conversion.parts[-1].table.left_out) == 2


def test_routers_without_a_config_need_their_ratio_and_none_are_fresh(base, tower, adapter):
    tensors = pairs([*attention("q"), *attention("o")]) | connector()
    directory = adapter(tensors | routers([1, 3]), modules_to_save=["connector"])
    options = Options(base=base, vision_tower=tower)
    with pytest.raises(UserError, match=r"routers of layers 1,3 keep.*--mod interleaved:RATIO"):
        plan_conversion(directory, options)
    with pytest.raises(UserError, match="layers 1,3, but not of 0,1,2,3; pass --mod inter"):
        plan_conversion(directory, dataclasses.replace(options, mod=("all", 0.2)))
    found = plan_conversion(directory, dataclasses.replace(options, mod=((3, 1), 0.4)))
    assert found.config.routing.weighting == "official"
    assert found.fresh == ()
    adapter(tensors, modules_to_save=["connector"])
    found = plan_conversion(directory, dataclasses.replace(options, mod=("interleaved", 0.4)))
    assert found.config.routing.weighting == "tanh1"
    kernels = [f"params/decoder/layer_{i}/router/kernel" for i in (1, 3)]
    assert sorted(found.fresh) == kernels
    (directory / "config.json").write_text('{"vision_drop_strategy": "moddeep_0.2"}')
    with pytest.raises(UserError, match=r"holds no routers.*pass --mod interleaved-deep:0\.2"):
        plan_conversion(directory, options)


@pytest.mark.parametrize(
    ("text", "insertion", "selection", "weighting", "layers"),
    [
        ("mod_0.2", "interleaved", "learned", "official", (1, 3, 5)),
        ("modall_0.2", "all", "learned", "official", (0, 1, 2, 3, 4, 5)),
        ("moddeep_0.2", "interleaved-deep", "learned", "official", (3, 5)),
        ("moddeepall_0.2", "all-deep", "learned", "official", (2, 3, 4, 5)),
        ("modrandom_0.2", "interleaved", "random", "none", ()),
        ("moduniform_0.2", "interleaved", "uniform", "none", ()),
    ],
)
def test_strategies_are_those_drawn(text, insertion, selection, weighting, layers):
    hf = {"vision_drop_strategy": text}
    found = live.find_routing(hf, layers, 6, Options(), "a")
    assert found == RoutingConfig(
        insertion=insertion,
        keep_ratio=0.2,
        selection=selection,
        weighting=weighting,
        force_keep_last=False,
        exploration=0.0,
    )


@pytest.mark.parametrize(
    ("hf", "summary", "pool", "count"),
    [
        ({}, "attention_pool", (3, 3), 10),
        ({"frame_token_cls": True, "frame_token_pooled": [3, 3]}, "attention_pool", (3, 3), 10),
        ({"frame_token_cls": True}, "attention_pool", (0, 0), 1),
        ({"frame_token_cls": False, "frame_token_pooled": [3, 3]}, "none", (3, 3), 9),
    ],
)
def test_frame_tokens_are_those_drawn(hf, summary, pool, count):
    found = live.frame_tokens(tiny.VISION, {**hf, "frame_num_tokens": count}, "a")
    assert (found.summary, found.pool, found.tokens_per_frame) == (summary, pool, count)
    with pytest.raises(UserError, match=f"a: frame_num_tokens is 7; expected {count}"):
        live.frame_tokens(tiny.VISION, {**hf, "frame_num_tokens": 7}, "a")


def test_the_names_of_videollm_online_are_those_drawn():
    table = live.live_table(tiny.DECODER, (1,), bias=True).by_source()
    assert {name: table[name][0].target for name in table if live.own_module(name)} == {
        "connector.0.weight": "params/connector/fc1/kernel",
        "connector.0.bias": "params/connector/fc1/bias",
        "connector.2.weight": "params/connector/fc2/kernel",
        "connector.2.bias": "params/connector/fc2/bias",
        "model.layers.1.router.weight": "params/decoder/layer_1/router/kernel",
        "model.layers.1.router.bias": "params/decoder/layer_1/router/bias",
    }
    (weight,), (bias,) = (table[f"model.layers.1.router.{n}"] for n in ("weight", "bias"))
    assert (weight.source_shape((D,)), bias.source_shape(())) == ((1, D), (1,))


@pytest.mark.parametrize("spelling", ["", ".default"])
def test_the_way_back_restores_every_name_and_tensor(base, tower, adapter, spelling):
    tensors = pairs([*attention("q"), *attention("o")]) | connector() | routers([1, 3])
    tensors = {name.replace(".weight", f"{spelling}.weight") if ".lora_" in name else name: t
               for name, t in tensors.items()}  # fmt: skip
    directory = adapter(tensors, modules_to_save=["connector", "router"])
    options = Options(base=base, vision_tower=tower, mod=("interleaved", 0.2))
    conversion = plan_conversion(directory, options)
    part, reader = conversion.parts[-1], VariableReader(conversion)
    table, hf = export_adapter(conversion.config, part.layout, (), part.source.names, part.config)
    assert hf == part.config
    written = {e.source: e.from_target(reader.read(e.target)) for e in table.entries()}
    # Without names to restore, all that no other directory covers is written as PEFT spells it.
    covered = [e.target for p in conversion.parts[:-1] for e in p.table.entries()]
    born, hf = export_adapter(conversion.config, live.LAYOUT, covered)
    assert {e.source for e in born.entries()} == {n.replace(".default", "") for n in tensors}
    assert hf["modules_to_save"] == ["connector", "router"]
    assert set(hf["target_modules"]) == {*attention("q"), *attention("o")}
    assert sorted(written) == sorted(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_a_config_that_training_outdated_is_written_anew(base, adapter):
    tensors = pairs([*attention("q"), "lm_head"])
    # A copy that PEFT saves by itself, which is no module to save.
    tensors[PREFIX + "lm_head.base_layer.weight"] = random(tiny.DECODER.vocab_size, D)
    directory = adapter(tensors, target_modules=["q_proj", "lm_head"])
    conversion = plan_conversion(directory, Options(base=base))
    lora = dataclasses.replace(conversion.config.lora, alpha=2.5)
    config = dataclasses.replace(conversion.config, lora=lora)
    part = conversion.parts[-1]
    table, hf = export_adapter(config, part.layout, (), part.source.names, part.config)
    assert {e.source for e in table.entries()} == set(tensors)
    assert (hf["r"], hf["lora_alpha"], hf["modules_to_save"]) == (R, 2.5, None)
    lora = read_lora(hf, "a")
    assert all(lora.targets(m) for m in attention("q"))
    assert not lora.targets("vision.q_proj")


def test_what_another_directory_holds_is_not_written_twice(base, tower, adapter):
    tensors = pairs([*attention("q"), *attention("o")]) | connector()
    options = Options(base=base, vision_tower=tower)
    config = plan_conversion(adapter(tensors), options).config
    fc1 = ("params/connector/fc1/kernel", "params/connector/fc1/bias")
    table, _ = export_adapter(config, live.LAYOUT, fc1)
    assert set(tensors) - {e.source for e in table.entries()} == {
        PREFIX + "connector.0.weight",
        PREFIX + "connector.0.bias",
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, ["peft_type is 'LOHA'", "'LORA'"]),
        ({"use_dora": True}, ["use_dora is True"]),
        ({"bias": "all"}, ["bias is 'all'"]),
        ({"lora_bias": True}, ["lora_bias is True"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights is 'pissa'"]),
        ({"r": 0}, ["r is 0"]),
        ({"rank_pattern": {"q_proj": "x"}}, ["rank_pattern.q_proj is 'x'"]),
        ({"target_modules": "q_proj("}, ["target_modules is 'q_proj('", "regular expression"]),
        ({"target_modules": None}, ["target_modules is None"]),
        ({"layers_to_transform": ["a"]}, ["layers_to_transform is ['a']"]),
        ({"a_new_variant": {"x": 1}}, ["a_new_variant is {'x': 1}"]),
        ({"target_modules": ["q_proj"]}, ["o_proj.lora_A", "does not name"]),
        ({"target_modules": ["q_proj", "o_proj", "up_proj"]}, ["up_proj.lora_A", "calls for"]),
        ({"r": 8}, ["q_proj.lora_A.weight has the shape [4, 32]", "[8, 32]"]),
        ({"modules_to_save": ["lm_head"]}, ["has no 'base_model.model.lm_head.weight'"]),
    ],
)
def test_what_the_configuration_may_not_say(base, adapter, changes, words):
    assert_refused(adapter(**changes), Options(base=base), ["adapter_config.json", *words])


def test_tensors_without_a_place_are_named(base, tower, adapter):
    good = pairs([*attention("q"), *attention("o")])
    name = next(iter(good))
    cases = [
        ({name: good[name]}, ["lora_A.weight' without its other half"]),
        ({"x.weight": random(2)}, ["'x.weight'", "begin with 'base_model.model.'"]),
        (good | {PREFIX + "model.embed_tokens.lora_embedding_A": random(R, 48)},
         ["lora_embedding_A", "neither"]),
        (good | pairs(["model.layers.9.self_attn.q_proj"]), ["model.layers.9.", "--base"]),
        (good | {PREFIX + "model.norm.weight": random(D),
                 PREFIX + "model.norm.modules_to_save.weight": random(D)}, ["both"]),
        (good | {PREFIX + "model.layers.1.router.weight": random(1, D)}, ["router.weight"]),
    ]  # fmt: skip
    for tensors, words in cases:
        words = ["adapter_model.safetensors", *words]
        assert_refused(adapter(tensors), Options(base=base), words)
    del (partial := good | connector() | routers([1, 3]))[PREFIX + "model.layers.1.router.bias"]
    options = Options(base=base, vision_tower=tower, mod=("interleaved", 0.2))
    assert_refused(adapter(partial), options, ["has no", "layers.1.router.bias"])


def test_some_layers_alone_are_merged_only(base, adapter):
    directory = adapter(pairs(attention("q", [1])), target_modules=attention("q", [1]))
    assert_refused(
        directory, Options(base=base), ["not model.layers.0.self_attn.q_proj", "--merge"]
    )


def test_an_adapter_on_the_connector_is_merged_only(base, tower, adapter):
    tensors = connector() | pairs(["connector.2"])
    tensors[PREFIX + "connector.2.base_layer.weight"] = tensors.pop(PREFIX + "connector.2.weight")
    directory = adapter(tensors, target_modules=["connector.2"])
    options = Options(base=base, vision_tower=tower)
    assert_refused(directory, options, ["adapts connector.2", "--merge"])
    conversion = plan_conversion(directory, dataclasses.replace(options, merge=True))
    a, b = (tensors[f"{PREFIX}connector.2.lora_{half}.weight"] for half in "AB")
    weight = tensors[PREFIX + "connector.2.base_layer.weight"]
    found = VariableReader(conversion).read("params/connector/fc2/kernel")
    np.testing.assert_allclose(found, (weight + 2 * b @ a).T, atol=1e-5)


def test_a_tied_head_keeps_its_adapter_and_cannot_take_it(tmp_path, adapter):
    tied = dataclasses.replace(tiny.DECODER, tie_embeddings=True)
    base = write_base(tmp_path / "tied", dataclasses.replace(LLAMA, decoder=tied), "llama")
    directory = adapter(pairs(["lm_head"]), target_modules=["lm_head"])
    assert plan_conversion(directory, Options(base=base)).config.lora.targets == ("lm_head",)
    assert_refused(directory, Options(base=base, merge=True), ["tied", "leave --merge out"])
    tensors = pairs(["lm_head"]) | {PREFIX + "lm_head.base_layer.weight": random(48, D)}
    directory = adapter(tensors, target_modules=["lm_head"])
    assert_refused(directory, Options(base=base), ["lm_head.base_layer.weight", "ties"])


def test_base_and_tower_are_asked_for(base, tower, adapter, tmp_path):
    directory = adapter(base_model_name_or_path="meta-llama/Meta-Llama-3-8B-Instruct")
    words = ["base_model_name_or_path is 'meta-llama/Meta-Llama-3-8B-Instruct'", "--base"]
    assert_refused(directory, Options(), words)
    adapter(base_model_name_or_path=str(base))
    assert plan_conversion(directory, Options()).tokenizer == base
    assert_refused(directory, Options(base=tower), ["is a vision tower", "--base"])
    adapter(pairs([*attention("q"), *attention("o")]) | connector())
    words = ["--vision-tower with google/siglip-large-patch16-384"]
    assert_refused(directory, Options(base=base), words)
    (directory / "config.json").write_text(json.dumps({"vision_pretrained": str(tower)}))
    assert plan_conversion(directory, Options(base=base)).config.vision is not None
    (directory / "config.json").write_text('{"frame_token_interval": "|"}')
    words = ["config.json: frame_token_interval is '|'", "','"]
    assert_refused(directory, Options(base=base, vision_tower=tower), words)
    (directory / "config.json").write_text('{"vision_drop_strategy": "earlyexit_2"}')
    words = ["config.json: vision_drop_strategy is 'earlyexit_2'", "mod_RATIO"]
    assert_refused(directory, Options(base=base, vision_tower=tower), words)
    (directory / "non_lora_trainables.bin").write_bytes(b"")
    assert_refused(directory, Options(base=base), ["non_lora_trainables.bin", "not read"])


def test_a_weighting_must_be_the_one_of_the_routers(base, tower, adapter):
    tensors = pairs([*attention("q"), *attention("o")]) | connector() | routers([1, 3])
    options = Options(base=base, vision_tower=tower, mod=("interleaved", 0.2), weighting="tanh1")
    assert_refused(adapter(tensors), options, ["--weighting is tanh1", "trained with official"])
    found = plan_conversion(adapter(tensors), dataclasses.replace(options, weighting="none"))
    assert found.config.routing.weighting == "none"


def assert_refused(directory, options, words):
    with pytest.raises(UserError) as error:
        plan_conversion(directory, options)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
