"""A tokenizer with more tokens than a model has embeddings is refused, or gets rows for them."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from tests.test_conversion_exporting import make_source
from videollm_mod_jax import convert
from videollm_mod_jax.conversion.families import plan_conversion
from videollm_mod_jax.conversion.loading import VariableReader, load_hf
from videollm_mod_jax.conversion.manifest import read_manifest
from videollm_mod_jax.conversion.plan import Options
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training.checkpoint import load_model

FAMILIES = ["llama", "llava"]


def add_tokens(directory, rows):
    """Adds three tokens to a tokenizer: the last row's, and two beyond it."""
    path = directory / "tokenizer.json"
    definition = tokenizers.Tokenizer.from_file(str(path))
    size = definition.get_vocab_size()
    filler = [f"<{i}>" for i in range(size, rows - 1)]
    definition.add_tokens([*filler, "<last>", "<beyond>"])
    definition.add_special_tokens(["<pad>"])
    definition.save(str(path))
    assert definition.token_to_id("<pad>") == rows + 1


@pytest.fixture(params=FAMILIES)
def source(request, tmp_path):
    directory = make_source(tmp_path / "source", request.param)
    rows = plan_conversion(directory, Options()).config.decoder.vocab_size
    add_tokens(directory, rows)
    return directory, rows


def run(capsys, *arguments):
    status = convert.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_a_tokenizer_that_fits_to_the_last_row_is_taken_as_it_is(tmp_path):
    directory = make_source(tmp_path, "llama")
    plain = plan_conversion(directory, Options())
    add_tokens(directory, plain.config.decoder.vocab_size - 2)
    for resize in (False, True):
        conversion = plan_conversion(directory, Options(resize_embeddings=resize))
        assert (conversion.config, conversion.added_rows) == (plain.config, 0)


def test_tokens_without_embeddings_are_refused_by_name(source, tmp_path, capsys):
    directory, rows = source
    status, _, err = run(capsys, "from-hf", directory, tmp_path / "model")
    assert status == 2
    assert err.count("\n") == 1
    assert f"'<beyond>' with the id {rows} (and 1 more)" in err
    assert f"{rows} rows" in err
    assert "--resize-embeddings" in err
    assert not (tmp_path / "model").exists()


def test_added_rows_are_the_mean_of_the_others(source, tmp_path, capsys):
    directory, rows = source
    model = tmp_path / "model"
    status, out, _ = run(capsys, "from-hf", directory, model, "--resize-embeddings")
    assert status == 0
    assert "2 rows are added to embeddings and head" in out
    assert read_manifest(model).added_rows == 2
    loaded = load_model(model)
    assert loaded.config.decoder.vocab_size == rows + 2
    found = flatten_dict(loaded.variables, sep="/")
    names = {path.name for path in directory.glob("*.safetensors")}
    tensors = {n: t for file in names for n, t in load_file(directory / file).items()}
    for ours, theirs in (("embedding", "embed_tokens"), ("lm_head/kernel", "lm_head")):
        (tensor,) = [t for n, t in tensors.items() if n.endswith(f"{theirs}.weight")]
        value = np.asarray(found[f"params/{ours}"])
        value = value if ours == "embedding" else value.T
        np.testing.assert_array_equal(value[:rows], tensor)
        mean = tensor.astype(np.float64).mean(0)
        np.testing.assert_allclose(value[rows:], [mean, mean], rtol=1e-6, atol=1e-8)


def test_a_conversion_of_before_rows_could_be_added_is_read(tmp_path, capsys):
    directory, model = make_source(tmp_path / "source", "llama"), tmp_path / "model"
    assert run(capsys, "from-hf", directory, model)[0] == 0
    whole, path = read_manifest(model), model / "conversion.json"
    values = json.loads(path.read_text())
    del values["added_rows"]
    path.write_text(json.dumps(values | {"format": 1}))
    assert read_manifest(model) == whole


def test_slices_of_added_rows_are_those_of_the_whole(source, monkeypatch):
    directory, _ = source
    conversion = plan_conversion(directory, Options(resize_embeddings=True))
    reader = VariableReader(conversion)
    rng = np.random.default_rng(0)
    whole = flatten_dict(load_hf(conversion).variables, sep="/")
    for path in ("params/embedding", "params/lm_head/kernel"):
        shape = reader.shapes[path].shape
        for _ in range(20):
            ends = [np.sort(rng.integers(0, size + 1, 2)) for size in shape]
            ends[shape.index(max(shape))][1] = max(shape)
            index = tuple(slice(int(start), int(stop)) for start, stop in ends)
            np.testing.assert_array_equal(reader.read(path, index), whole[path][index])


def test_what_was_resized_goes_back_with_its_rows_and_their_number(source, tmp_path, capsys):
    directory, rows = source
    model, back = tmp_path / "model", tmp_path / "back"
    run(capsys, "from-hf", directory, model, "--resize-embeddings")
    assert run(capsys, "to-hf", model, back)[0] == 0
    hf = json.loads((back / "config.json").read_text())
    assert hf.get("text_config", hf)["vocab_size"] == rows + 2
    again = plan_conversion(back, Options())
    assert again.added_rows == 0
    expected = flatten_dict(load_model(model).variables, sep="/")
    found = flatten_dict(load_hf(again).variables, sep="/")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_model_whose_tokenizer_was_exchanged_is_not_loaded(tmp_path, capsys):
    directory, model = make_source(tmp_path / "source", "llama"), tmp_path / "model"
    assert run(capsys, "from-hf", directory, model)[0] == 0
    rows = load_model(model).config.decoder.vocab_size
    add_tokens(model, rows)
    with pytest.raises(UserError, match=rf"'<beyond>' with the id {rows} .*--resize-embeddings"):
        load_model(model)


@pytest.mark.parametrize("picture", [7, 32000])
def test_what_was_resized_equals_its_source(source, picture, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    directory, rows = source
    hf = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(hf | {"image_token_index": picture}))
    model = tmp_path / "model"
    assert run(capsys, "from-hf", directory, model, "--resize-embeddings")[0] == 0
    status, out, err = run(capsys, "verify", directory, model, "--tokens", "4")
    if "text_config" in hf and picture >= rows:
        assert status == 2
        assert f"of the source is {picture}, and its embeddings have {rows} rows, so that" in err
        return
    assert status == 0, out + err
    status, out, err = run(capsys, "verify", directory, model, "--prompt", "a <beyond> b")
    assert status == 2
    assert "--prompt has a token of which the source has no embedding" in err
