"""The command line: a refusal is one line and leaves nothing; a result says what is next."""

import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.test_conversion_exporting import assert_same_directory, make_source
from videollm_mod_jax import convert
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training.checkpoint import load_model, read_model_config

NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source", "llama")


def refused(capsys, *arguments):
    """The one line on stderr of a command that exits with status 2."""
    assert convert.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def change_tensors(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def change_config(**values):
    def change(source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | values))

    return change


def tensors(change):
    return lambda source: change_tensors(source, change)


def duplicate_key(source):
    data = (source / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + size])[NORM]
    header = data[8 : 8 + size].rstrip()[:-1] + f', "{NORM}": {json.dumps(entry)}}}'.encode()
    header += b" " * (-len(header) % 8)
    new = len(header).to_bytes(8, "little") + header + data[8 + size :]
    (source / "model.safetensors").write_bytes(new)


def truncated(source):
    os.truncate(source / "model.safetensors", 5000)


def absent_shard(source):
    places = dict.fromkeys(
        load_file(source / "model.safetensors"), "model-00001-of-00002.safetensors"
    )
    places[NORM] = "model-00002-of-00002.safetensors"
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    index = json.dumps({"weight_map": places})
    (source / "model.safetensors.index.json").write_text(index)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def evil_pickle(source):
    (source / "model.safetensors").unlink()
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({NORM: Evil()}))
        file.writestr("archive/version", "3")


def tied_but_different(source):
    change_config(tie_word_embeddings=True)(source)


def nan(tensors):
    tensors[NORM] = np.full_like(tensors[NORM], np.nan)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (tensors(lambda t: t.update(extra=np.zeros(3, np.float32))), "the tensor 'extra'"),
        (tensors(lambda t: t.pop(NORM)), f"no tensor '{NORM}'"),
        (duplicate_key, f"'{NORM}'"),
        (tensors(lambda t: t.update({NORM: np.ones(5, np.float32)})), f"{NORM} has the shape [5]"),
        (tensors(nan), f"{NORM} holds a value that is not finite"),
        (change_config(model_type="mamba"), "model_type is 'mamba'; supported are"),
        (change_config(hidden_act="relu"), "hidden_act is 'relu'"),
        (tied_but_different, f"{HEAD} differs from {EMBEDDING}"),
        (truncated, "model.safetensors"),
        (absent_shard, "lacks the shard model-00002-of-00002.safetensors"),
        (evil_pickle, "pytorch_model.bin"),
    ],
)
def test_a_checkpoint_that_is_wrong_is_one_line(
    tmp_path, monkeypatch, capsys, source, change, words
):
    monkeypatch.chdir(tmp_path)
    change(source)
    assert words in refused(capsys, "from-hf", source, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys, source):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    line = refused(capsys, "from-hf", source, tmp_path / "model")
    assert "bytes are needed and 1,000 are free" in line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_destination_is_one_line(tmp_path, capsys, source):
    assert convert.main(["from-hf", str(source), str(tmp_path / "model")]) == 0
    capsys.readouterr()
    assert "--overwrite" in refused(capsys, "from-hf", source, tmp_path / "model")
    assert convert.main(["from-hf", str(source), str(tmp_path / "model"), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mod", "interleaved"], "--mod is 'interleaved'; expected INSERTION:RATIO"),
        (["--mod", "often:0.2"], "--mod is 'often:0.2'"),
        (["--mod", "interleaved:2"], "keep_ratio is 2.0"),
        (["--pool", "3"], "--pool is '3'; expected HxW"),
        (["--merge"], "--merge is for adapters"),
        (["--base", "{tmp_path}"], "--base is for adapters"),
        (["--vision-tower", "nowhere/there/is"], "nowhere/there/is does not exist"),
    ],
)
def test_options_that_do_not_fit_are_one_line(tmp_path, capsys, options, words):
    source = make_source(tmp_path / "source", "llava")
    options = [option.format(tmp_path=tmp_path) for option in options]
    assert words in refused(capsys, "from-hf", source, tmp_path / "model", *options)
    assert not (tmp_path / "model").exists()


def test_mod_is_read_as_drawn():
    assert convert.parse_mod("interleaved:0.2") == ("interleaved", 0.2)
    assert convert.parse_mod("2,6:0.5") == ((2, 6), 0.5)


def test_pool_is_read_as_drawn():
    assert convert.parse_pool("3x3") == (3, 3)
    with pytest.raises(UserError, match="--pool is '3x3x3'"):
        convert.parse_pool("3x3x3")


def test_from_hf_says_what_it_made_and_what_is_next(tmp_path, capsys):
    source = make_source(tmp_path / "source", "llava", np.float16)
    model = tmp_path / "model"
    arguments = ["--mod", "interleaved:0.5", "--weighting", "official", "--system", "Watch."]
    assert convert.main(["from-hf", str(source), str(model), *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{model}: llava, bfloat16, made of " in out
    assert "were float16 and are rounded; --dtype float32 is exact" in out
    assert "4 variables start afresh: router" in out
    assert "with weighting official a kept token does not start as the pretrained block" in out
    assert f"convert verify {source} {model} --mod interleaved:0.5 --weighting official" in out
    assert f"train --config configs/finetune.py:{model} --workdir runs/finetuned" in out
    loaded = load_model(model)
    assert loaded.system == "Watch."
    assert loaded.config.routing.keep_ratio == 0.5


def test_with_tanh1_nothing_is_said_about_the_kept_path(tmp_path, capsys):
    source = make_source(tmp_path / "source", "llava")
    command = ["from-hf", str(source), str(tmp_path / "model"), "--mod", "interleaved:0.5"]
    assert convert.main(command) == 0
    assert "kept token" not in capsys.readouterr().out
    assert read_model_config(tmp_path / "model").routing.weighting == "tanh1"


def test_there_and_back_on_the_command_line(tmp_path, capsys, source):
    assert convert.main(["from-hf", str(source), str(tmp_path / "model")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "model"), str(tmp_path / "back")]) == 0
    assert f"wrote {tmp_path / 'back'}\n" in capsys.readouterr().out
    assert_same_directory(tmp_path / "back", source)


def test_to_hf_says_what_was_rounded(tmp_path, capsys):
    source = make_source(tmp_path / "source", "siglip", np.float16)
    assert convert.main(["from-hf", str(source), str(tmp_path / "model")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "model"), str(tmp_path / "back")]) == 0
    assert "were float16 and were rounded to bfloat16 on the way" in capsys.readouterr().out


def test_inspect_shows_a_checkpoint_and_what_it_needs(capsys, monkeypatch, source):
    monkeypatch.setenv("COLUMNS", "300")
    assert convert.main(["inspect", str(source)]) == 0
    out = capsys.readouterr().out
    assert "llama, names of layout hf" in out
    assert "4 layers of width 32, 4 heads (2 key/value)" in " ".join(out.split())
    change_tensors(source, lambda t: t.pop(NORM))
    assert convert.main(["inspect", str(source)]) == 0
    assert f"is refused: {source} has no tensor" in " ".join(capsys.readouterr().out.split())


def test_inspect_shows_a_model_of_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    source = make_source(tmp_path / "source", "llava", np.float16)
    command = ["from-hf", str(source), str(tmp_path / "model"), "--mod", "interleaved:0.5"]
    assert convert.main(command) == 0
    capsys.readouterr()
    assert convert.main(["inspect", str(tmp_path / "model")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "routed layers 1, 3" in out
    assert "router/kernel and 1 more" in out
    assert "stored as bfloat16" in out
    assert "tensors from float16" in out


def test_inspect_refuses_what_is_neither(tmp_path, capsys):
    assert "holds no model weights" in refused(capsys, "inspect", tmp_path)


@pytest.mark.parametrize("command", [[], ["from-hf"], ["to-hf"], ["verify"], ["inspect"]])
def test_every_command_has_help_with_examples(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        convert.main([*command, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "python -m videollm_mod_jax.convert" in out
    assert max(map(len, out.splitlines())) <= 110
