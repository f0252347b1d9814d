"""A name on the Hugging Face Hub as a local directory."""

import re
from collections.abc import Callable
from pathlib import Path

from videollm_mod_jax.errors import UserError

# Configs, the index of the shards, the tokenizer and its chat template.
_DESCRIPTION = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors")
_TORCH = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "adapter_model.bin")

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolve(name: str, check: Callable[[Path], None] | None = None) -> Path:
    """The directory of a checkpoint, downloaded into the cache of the Hub where it is not local.

    What is there already is not downloaded again, and an interrupted download goes on where it
    stopped. `.bin` files are downloaded only when there are no safetensors.

    Args:
      name: a directory, or `organisation/model` on the Hub.
      check: called with the directory when its configs are there, and before gigabytes of weights
        are downloaded; raises a UserError if these are of no use.

    Raises:
      UserError: it is neither, the model is gated, the Hub cannot be reached, or `huggingface_hub`
        is not installed.
    """
    if Path(name).exists():
        return Path(name)
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name} does not exist; expected a directory, or a model on the Hub such as "
            "llava-hf/llava-1.5-7b-hf"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{name} is not a directory here; to download it from the Hub, pip install "
            "huggingface_hub"
        ) from error
    directory = _download(huggingface_hub.snapshot_download, name, _DESCRIPTION)
    if check is not None:
        check(directory)
    _download(huggingface_hub.snapshot_download, name, _SAFETENSORS)
    if not any(directory.glob("*.safetensors")):
        _download(huggingface_hub.snapshot_download, name, _TORCH)
    return directory


def _download(snapshot: Callable[..., str], name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    try:
        return Path(snapshot(name, allow_patterns=list(patterns)))
    # A gated model is a kind of missing model, hence the order.
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its licence on {page} and run 'hf auth login', then try again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name} is neither a directory here nor a model on the Hub; check the name, or run "
            "'hf auth login' if it is private"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"{name} is not a directory here, and the Hub does not answer; check the network, and "
            f"that HF_HUB_OFFLINE is not set, or download {page} elsewhere and give its directory"
        ) from error
    # Errors of the transport differ with the HTTP library beneath, and a disk may be full.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} cannot be downloaded ({type(error).__name__}: {first_line}); the same command "
            "continues where it stopped"
        ) from error
