"""Configs of strangers: a value that no model has is one line that names its key, in no time."""

import json
import math
import re
import time

import pytest

from tests.hub_configs import LLAVA_NEXT_VIDEO_7B
from tests.test_conversion_exporting import make_source
from videollm_mod_jax import convert
from videollm_mod_jax.conversion import llava
from videollm_mod_jax.conversion.hf_config import read_table
from videollm_mod_jax.conversion.patterns import PatternError, ends, matches
from videollm_mod_jax.conversion.peft_config import read_lora
from videollm_mod_jax.errors import UserError

DECODER = {
    "rope_theta": [0, -1, math.inf, math.nan, "5", [1e4], True],
    "rms_norm_eps": [math.nan, -1, math.inf, 0],
    "num_attention_heads": [0, -4, 10**15, 4.0],
    "num_key_value_heads": [0, 3, -2],
    "head_dim": [-8, 0, 7, 10**9],
    "vocab_size": [10**15, 1e15, 0, "many", 49],
    "num_hidden_layers": [10**6, 1000, 0, -1],
    "hidden_size": [10**9, 0, 33, {}],
    "intermediate_size": [10**9, -1],
    "model_type": [[], {}, 3, None],
    "tie_word_embeddings": [1, "yes"],
    "hidden_act": [[]],
}
TOWER = {
    "layer_norm_eps": [math.nan, -1, math.inf],
    "num_attention_heads": [0, 7],
    "image_size": [10**9, 0, 1 << 14],
    "patch_size": [0, 10**6],
    "hidden_size": [10**9, "64"],
    "num_hidden_layers": [10**6, 900],
}


def refused(capsys, directory, *arguments):
    """The line on stderr of a command that is refused within seconds, with no traceback."""
    start = time.monotonic()
    status = convert.main(["from-hf", str(directory), str(directory) + "-made", *arguments])
    out, err = capsys.readouterr()
    assert status == 2
    assert time.monotonic() - start < 5
    assert (out, err.count("\n")) == ("", 1)
    assert len(err) < 800
    return err


def rewrite(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("key", DECODER)
def test_impossible_values_of_a_decoder_are_named(tmp_path, capsys, key):
    source = make_source(tmp_path / "source", "llama")
    for value in DECODER[key]:
        rewrite(source / "config.json", lambda hf, value=value: hf.update({key: value}))
        err = refused(capsys, source)
        # Sizes may be right for some model, and only not for these weights.
        pattern = rf"config\.json: (rope_parameters\.)?{key} is|has the shape .*config\.json calls"
        assert re.search(pattern, err), err


def test_keys_inside_others_are_named_as_the_file_spells_them(tmp_path, capsys):
    source = make_source(tmp_path / "source", "llava")
    whole = json.loads((source / "config.json").read_text())
    for part, keys in (("text_config", DECODER), ("vision_config", TOWER)):
        for key in keys:
            for value in keys[key][: None if part == "vision_config" else 2]:
                if (key, value) == ("tie_word_embeddings", "yes"):
                    continue
                changed = {**whole, part: {**whole[part], key: value}}
                (source / "config.json").write_text(json.dumps(changed))
                err = refused(capsys, source)
                pattern = rf"config\.json: {part}\.{key} is|has the shape .*config\.json calls"
                if key == "image_size":
                    pattern += rf"|{part}\.patch_size is"
                assert re.search(pattern, err), err


def test_a_number_that_is_none_is_named_wherever_it_is(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": {"b": [1, {"c": 1e999}]}}')
    with pytest.raises(UserError, match=r"config\.json: a\.b\[1\]\.c is inf; expected a finite"):
        read_table(path, "a model")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "image_grid_pinpoints is 3"),
        ([], "image_grid_pinpoints is"),
        ([[336]], r"image_grid_pinpoints\[0\] is \[336\]"),
        ([[336, -336]], r"image_grid_pinpoints\[0\]\[1\] is -336; expected a number in"),
        ([[336, 100]], r"image_grid_pinpoints\[0\]\[1\] is 100; expected a multiple of"),
    ],
)
def test_sizes_of_pictures_are_checked_and_have_the_default_of_transformers(value, words):
    tower = llava.llava_from_hf(LLAVA_NEXT_VIDEO_7B, None, "x")[1]
    bare = {k: v for k, v in LLAVA_NEXT_VIDEO_7B.items() if k != "image_grid_pinpoints"}
    assert llava.crops(bare, tower, "x").pinpoints[:2] == ((336, 672), (672, 336))
    with pytest.raises(UserError, match=f"^config.json: {words}"):
        llava.crops({**bare, "image_grid_pinpoints": value}, tower, "config.json")


LORA = {"peft_type": "LORA", "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_alpha": -1}, "lora_alpha is -1; expected a number in"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\.q_proj is 0"),
        ({"r": 10**12}, "r is 1000000000000"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all'"),
        ({"target_modules": "("}, r"target_modules is '\('; expected a regular expression"),
        ({"target_modules": r"(a)\1"}, "target_modules is .*groupref is not supported"),
    ],
)
def test_impossible_values_of_an_adapter_are_named(change, words):
    with pytest.raises(UserError, match=f"^adapter_config.json: {words}"):
        read_lora({**LORA, **change}, "adapter_config.json")


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|a)*b", "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)b"])
def test_expressions_that_would_never_end_do(pattern):
    start = time.monotonic()
    lora = read_lora({**LORA, "target_modules": pattern}, "x")
    assert not lora.targets("a" * 60)
    assert not any(matches(f"(.*\\.)?({pattern})", name) for name in ["a" * 60] * 20)
    assert time.monotonic() - start < 2


def test_expressions_mean_what_they_mean_to_python():
    expressions = [
        r".*\.(q|k)_proj",
        r"^(?!.*vision).*(?:q_proj|v_proj)$",
        r"model\.layers\.\d+\..*",
        r"[^.]*\.\w+(\.\d{1,2})?.*proj",
        r"(?=.*layers)[a-z.]+\d[^x]*",
        r"(a|ab)(c|bcd)(d*)",
        r"a{2,3}?b+|",
        r"(a{0,2}){3}\S",
        r"(x*)+\Z",
    ]
    texts = ["model.layers.3.self_attn.q_proj", "vision.layers.1.q_proj", "abcd", "aab", "lm_head"]
    texts += ["x.k_proj", "aaab", "", "aaaaaaa", "xx", "a.b.11.up_proj"]
    for pattern in expressions:
        for text in texts:
            assert matches(pattern, text) == bool(re.fullmatch(pattern, text)), (pattern, text)
            assert bool(ends(pattern, text)) == bool(re.match(pattern, text)), (pattern, text)


def test_an_expression_that_is_too_much_work_is_refused():
    # A UserError, since what it is matched with is known only when the config has been read.
    assert issubclass(PatternError, UserError)
    with pytest.raises(PatternError, match="more than 200000 steps to match a regular expression"):
        matches("(a?){200}" * 40 + "b", "a" * 500)
