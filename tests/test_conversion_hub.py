import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from videollm_mod_jax.conversion.hub import resolve
from videollm_mod_jax.errors import UserError


def serve(monkeypatch, directory, files):
    """A Hub with one repository; what is asked for appears in `directory`."""

    def snapshot_download(name, allow_patterns):
        assert name == "org/model"
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).touch()
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def fail(monkeypatch, error):
    def snapshot_download(name, allow_patterns):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def message(name="org/model"):
    with pytest.raises(UserError) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_is_itself_even_when_its_name_could_be_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    fail(monkeypatch, AssertionError("asked the Hub"))
    assert resolve("org/model") == Path("org/model")
    assert resolve(str(tmp_path)) == tmp_path


DESCRIPTION = {"config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"}
NOT_READ = {"README.md", "tf_model.h5", "original/consolidated.00.pth", "model.fp16.safetensors"}


@pytest.mark.parametrize(
    "weights",
    [
        {"model.safetensors"},
        {"model-00001-of-00002.safetensors", "model.safetensors.index.json"},
        {"adapter_model.safetensors", "adapter_config.json"},
        {"pytorch_model.bin"},
        {"pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"},
        {"adapter_model.bin", "adapter_config.json"},
    ],
)
def test_what_is_read_is_downloaded_and_nothing_else(tmp_path, monkeypatch, weights):
    serve(monkeypatch, tmp_path, [*DESCRIPTION, *weights, *NOT_READ])
    found = resolve("org/model")
    files = {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()}
    assert files == DESCRIPTION | weights


def test_bin_files_are_left_when_there_are_safetensors(tmp_path, monkeypatch):
    serve(monkeypatch, tmp_path, ["config.json", "model.safetensors", "pytorch_model.bin"])
    resolve("org/model")
    assert not (tmp_path / "pytorch_model.bin").exists()


def test_an_unusable_model_is_refused_before_its_weights_are_downloaded(tmp_path, monkeypatch):
    serve(monkeypatch, tmp_path, ["config.json", "model.safetensors"])

    def refuse(directory):
        assert (directory / "config.json").exists()
        raise UserError("of no use")

    with pytest.raises(UserError, match="of no use"):
        resolve("org/model", refuse)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["model", "../model", "./org/model", "/org/model", "a b/c", "~/model"]
)
def test_a_name_that_is_none_of_the_hub(monkeypatch, name):
    fail(monkeypatch, AssertionError("asked the Hub"))
    assert f"{name} does not exist; expected a directory, or a model on the Hub" in message(name)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (errors.GatedRepoError, "is gated: accept its licence on https://huggingface.co/org/model"),
        (errors.RepositoryNotFoundError, "is neither a directory here nor a model on the Hub"),
        (errors.LocalEntryNotFoundError, "is not a directory here, and the Hub does not answer"),
        (errors.OfflineModeIsEnabled, "is not a directory here, and the Hub does not answer"),
        (errors.HfHubHTTPError, "cannot be downloaded (HfHubHTTPError: 500 server error); the"),
        (OSError, "cannot be downloaded (OSError: 500 server error); the same command"),
    ],
)
def test_each_failure_says_what_to_do(monkeypatch, kind, found):
    # Their constructors ask for a response, whose class differs from version to version.
    error = kind.__new__(kind, "500 server error\nmore")
    error.args = ("500 server error\nmore",)
    fail(monkeypatch, error)
    assert message().startswith(f"org/model {found}")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert message().endswith("to download it from the Hub, pip install huggingface_hub")
