"""What goes out is what came in, bit by bit; what has no place out there is said."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
import rich.console
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from tests import tiny_conversion
from tests.test_conversion_families import CONFIGS, write
from videollm_mod_jax.conversion import exporting
from videollm_mod_jax.conversion.exporting import export_model
from videollm_mod_jax.conversion.families import plan_conversion
from videollm_mod_jax.conversion.importing import import_model
from videollm_mod_jax.conversion.plan import Options
from videollm_mod_jax.conversion.safetensors_writer import create_file
from videollm_mod_jax.conversion.source import open_source
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import LoraConfig, merge_lora
from videollm_mod_jax.training import checkpoint
from videollm_mod_jax.training.checkpoint import Checkpointer, load_model, save_model
from videollm_mod_jax.training.initial import carry_manifest
from videollm_mod_jax.training.optimizer import split_variables
from videollm_mod_jax.training.state import create_state

CONSOLE = rich.console.Console(quiet=True)
TOKENIZER = tiny_conversion.small_tokenizer()
LORA = LoraConfig(rank=2, alpha=8.0, dropout=0.0, targets=("q", "up", "lm_head"))
LLAMA = CONFIGS["llama"]


def make_source(directory, family, dtype=np.float32, layout=None):
    write(directory, CONFIGS[family], family, layout, dtype)
    if CONFIGS[family].decoder is not None:
        TOKENIZER.save(directory)
    else:
        (directory / "tokenizer.json").unlink()
    return directory


def bring_in(source, destination, **options):
    conversion = plan_conversion(source, Options(**options))
    import_model(conversion, destination, overwrite=False, console=CONSOLE)
    return destination


def send_out(model, destination, **changes):
    options = {
        "part": None,
        "family": None,
        "dtype": "auto",
        "merge": False,
        "drop_routers": False,
        "shard_bytes": 10**9,
        "overwrite": False,
        "console": CONSOLE,
    }
    return export_model(model, destination, **options | changes)


def tensors_of(directory):
    return {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_bitwise(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


def assert_same_directory(found, expected):
    assert_bitwise(tensors_of(found), tensors_of(expected))
    assert json.loads((found / "config.json").read_text()) == json.loads(
        (expected / "config.json").read_text()
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_there_and_back_changes_no_bit(tmp_path, family, dtype):
    source = make_source(tmp_path / "source", family, dtype)
    model = bring_in(source, tmp_path / "model")
    assert send_out(model, tmp_path / "back") == (tmp_path / "back",)
    assert_same_directory(tmp_path / "back", source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (source / file).exists():
            assert (tmp_path / "back" / file).read_text() == (source / file).read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "model", "source"]


def test_small_files_beside_the_weights_come_back_from_a_model_and_from_a_run(tmp_path):
    source = make_source(tmp_path / "source", "llava")
    kept = {"preprocessor_config.json": "{}", "chat_template.jinja": "a", "tokenizer.model": "b"}
    dropped = {"README.md": "c", "modeling.py": "d", "model.safetensors.index.json": "{}"}
    for name, text in {**kept, **dropped}.items():
        (source / name).write_text(text)
    (source / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>", "chat": 1}')
    model = bring_in(source, tmp_path / "model")
    (tmp_path / "run").mkdir()
    carry_manifest(model, tmp_path / "run")
    for name in ("model.json", "dialogue.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, tmp_path / "run" / name)
    shutil.copytree(model / "weights", tmp_path / "run" / "weights")
    for directory in (model, tmp_path / "run"):
        send_out(directory, tmp_path / "back", overwrite=True)
        for name in (*kept, "tokenizer_config.json"):
            assert (tmp_path / "back" / name).read_text() == (source / name).read_text()
        assert not any((tmp_path / "back" / name).exists() for name in dropped)


def test_a_pool_that_transformers_does_not_have_is_said(tmp_path):
    source = make_source(tmp_path / "source", "llava")
    for pool, said in ((None, ""), ((1, 1), "a frame has 1 tokens here and 16 in transformers")):
        model = bring_in(source, tmp_path / f"model-{pool}", pool=pool)
        console = rich.console.Console(record=True, width=200)
        send_out(model, tmp_path / f"back-{pool}", console=console)
        shown = console.export_text()
        assert said in shown
        assert bool(said) == ("config.json cannot say otherwise" in shown)


def test_float16_comes_back_exactly_through_float32(tmp_path):
    source = make_source(tmp_path / "source", "llava", np.float16)
    model = bring_in(source, tmp_path / "model", dtype="float32")
    send_out(model, tmp_path / "back")
    assert_same_directory(tmp_path / "back", source)


def test_shards_have_an_index_and_at_most_the_size_asked_for(tmp_path):
    source = make_source(tmp_path / "source", "llama")
    send_out(bring_in(source, tmp_path / "model"), tmp_path / "back", shard_bytes=20_000)
    assert_bitwise(tensors_of(tmp_path / "back"), tensors_of(source))
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    # Checks that the index names every tensor where it is.
    assert set(open_source(tmp_path / "back").names) == set(tensors_of(source))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 20_000


def test_shards_are_as_drawn():
    tensors = {
        n: (np.dtype(np.uint8), (size,)) for n, size in zip("abcd", (3, 3, 9, 1), strict=True)
    }
    assert exporting._shards(tensors, 6) == [["a", "b"], ["c"], ["d"]]


def test_a_created_file_is_one_that_safetensors_reads(tmp_path):
    tensors = {
        "b": (np.dtype(ml_dtypes.bfloat16), (2, 3)),
        "empty": (np.dtype(np.float32), (0, 4)),
        "scalar": (np.dtype(np.int64), ()),
    }
    offsets = create_file(tmp_path / "x.safetensors", tensors)
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.seek(offsets["scalar"])
        file.write(np.int64(7).tobytes())
    found = load_file(tmp_path / "x.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == tensors
    assert found["scalar"] == 7
    assert offsets["b"] % 8 == 0


def test_repeated_tensors_and_buffers_come_back_too(tmp_path):
    source = make_source(tmp_path / "source", "qwen2", ml_dtypes.bfloat16)
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    config = CONFIGS["qwen2"].decoder
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    tensors["model.rotary_emb.inv_freq"] = (config.rope_theta**-exponents).astype(np.float32)
    save_file(tensors, file)
    send_out(bring_in(source, tmp_path / "model"), tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    np.testing.assert_allclose(
        back.pop("model.rotary_emb.inv_freq"), tensors.pop("model.rotary_emb.inv_freq"), rtol=1e-6
    )
    assert_bitwise(back, tensors)


@pytest.fixture
def whole(tmp_path):
    """A language model and a tower that met here."""
    language = make_source(tmp_path / "llama", "llama")
    tower = make_source(tmp_path / "siglip", "siglip")
    return bring_in(language, tmp_path / "model", vision_tower=tower, pool=(2, 2))


def test_parts_go_to_directories_of_their_own(tmp_path, whole):
    for role, source in (("model", "llama"), ("vision_tower", "siglip")):
        out = tmp_path / "out" / role
        assert send_out(whole, out, part=role) == (out,)
        assert_same_directory(out, tmp_path / source)
    with pytest.raises(UserError, match=r"params/connector/fc1/bias .*--part"):
        send_out(whole, tmp_path / "back")
    with pytest.raises(UserError, match=r"--part is decoder; .* has model, vision_tower"):
        send_out(whole, tmp_path / "back", part="decoder")
    assert not (tmp_path / "back").exists()


def test_routers_are_dropped_only_when_asked_to(tmp_path):
    source = make_source(tmp_path / "source", "llava")
    model = bring_in(source, tmp_path / "model", mod=("interleaved", 0.5))
    with pytest.raises(UserError, match=r"routers, for which .*--drop-routers.*every token"):
        send_out(model, tmp_path / "back")
    send_out(model, tmp_path / "back", drop_routers=True)
    assert_same_directory(tmp_path / "back", source)


def made_here(directory, config):
    variables = tiny_conversion.random_variables(config)
    save_model(directory, config, unflatten_dict(variables, sep="/"), TOKENIZER, "Watch.")
    return directory, variables


def test_a_model_made_here_becomes_the_family_that_is_named(tmp_path):
    model, variables = made_here(tmp_path / "model", LLAMA)
    with pytest.raises(UserError, match="was not converted from anything; say with --family"):
        send_out(model, tmp_path / "out")
    send_out(model, tmp_path / "out", family="llama")
    again = bring_in(tmp_path / "out", tmp_path / "again")
    found = flatten_dict(load_model(again).variables, sep="/")
    assert_bitwise({p: np.asarray(v) for p, v in found.items()}, variables)
    assert load_model(again).config == LLAMA


def test_adapters_are_merged_or_written_beside(tmp_path):
    config = dataclasses.replace(LLAMA, lora=LORA)
    model, variables = made_here(tmp_path / "model", config)
    send_out(model, tmp_path / "merged", family="llama", merge=True)
    back = load_model(bring_in(tmp_path / "merged", tmp_path / "again"))
    expected = merge_lora(unflatten_dict(variables, sep="/"), LORA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back.variables, expected)
    written = send_out(model, tmp_path / "beside", family="llama")
    assert [path.name for path in written] == ["model", "adapter"]
    adapter = tmp_path / "beside" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
    again = bring_in(adapter, tmp_path / "both", base=tmp_path / "beside" / "model")
    found = flatten_dict(load_model(again).variables, sep="/")
    assert_bitwise({p: np.asarray(v) for p, v in found.items()}, variables)


def test_an_adapter_on_a_tied_head_cannot_be_merged(tmp_path):
    decoder = dataclasses.replace(LLAMA.decoder, tie_embeddings=True)
    model, _ = made_here(tmp_path / "m", dataclasses.replace(LLAMA, decoder=decoder, lora=LORA))
    with pytest.raises(UserError, match="tied to the embeddings"):
        send_out(model, tmp_path / "out", family="llama", merge=True)


def test_a_run_sends_out_what_it_trained(tmp_path):
    config = dataclasses.replace(LLAMA, lora=LORA)
    trained, frozen = split_variables(
        load_model(made_here(tmp_path / "m", config)[0]).variables, "lora"
    )
    checkpoint.write_description(tmp_path / "run", config, TOKENIZER, "Watch.")
    checkpoint.write_weights(tmp_path / "run", frozen)
    with Checkpointer(tmp_path / "run", keep=2) as checkpointer:
        for step in (4, 8):
            changed = jax.tree.map(lambda x, step=step: step * x, trained)
            checkpointer.save(step, create_state(changed, optax.sgd(1.0), seed=0))
    assert [p.name for p in send_out(tmp_path / "run", tmp_path / "out", family="llama")] == [
        "model",
        "adapter",
    ]
    again = bring_in(tmp_path / "out" / "adapter", tmp_path / "again", base=tmp_path / "out/model")
    found = flatten_dict(load_model(again).variables, sep="/")
    expected = flatten_dict(frozen, sep="/") | flatten_dict(changed, sep="/")
    assert_bitwise(*({p: np.asarray(v) for p, v in x.items()} for x in (found, expected)))


def test_another_dtype_is_written_into_tensors_and_config(tmp_path):
    source = make_source(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text()) | {"torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(config))
    model = bring_in(source, tmp_path / "model")
    send_out(model, tmp_path / "back", dtype="float16")
    expected = {n: t.astype(np.float16) for n, t in tensors_of(source).items()}
    assert_bitwise(tensors_of(tmp_path / "back"), expected)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back == config | {"torch_dtype": "float16"}


def test_what_does_not_fit_a_dtype_is_refused_and_leaves_nothing(tmp_path):
    source = make_source(tmp_path / "source", "llama")
    tensors = tensors_of(source)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors")
    model = bring_in(source, tmp_path / "model")
    with pytest.raises(UserError, match=r"model\.norm\.weight holds .* not finite as float16"):
        send_out(model, tmp_path / "back", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "source"]


def test_an_existing_destination_stays_unless_it_may_be_overwritten(tmp_path):
    model = bring_in(make_source(tmp_path / "source", "siglip"), tmp_path / "model")
    send_out(model, tmp_path / "back")
    with pytest.raises(UserError, match=r"back exists; .*--overwrite"):
        send_out(model, tmp_path / "back")
    (tmp_path / "back" / "model.safetensors").write_bytes(b"old")
    send_out(model, tmp_path / "back", overwrite=True)
    assert_same_directory(tmp_path / "back", tmp_path / "source")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match="nothing that a conversion wrote"):
        send_out(model, tmp_path / "thesis", overwrite=True)


# The threads of a read that failed find their event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_weights_are_named(tmp_path):
    model = bring_in(make_source(tmp_path / "source", "siglip"), tmp_path / "model")
    for file in (model / "weights").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"weights/.* is damaged: it has 0 bytes"):
        send_out(model, tmp_path / "back")
    shutil.rmtree(model / "weights")
    with pytest.raises(UserError, match="weights is missing"):
        send_out(model, tmp_path / "back")
    assert not (tmp_path / "back").exists()
