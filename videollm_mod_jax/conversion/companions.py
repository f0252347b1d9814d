"""The small files beside the weights of a checkpoint: processors, chat templates, vocabularies.

Nothing here reads them. They are kept beside the manifest, so that the way back gives a checkpoint
that transformers uses as it used the first one.

    DST/conversion/model/preprocessor_config.json, chat_template.jinja, generation_config.json, ...
"""

import shutil
from pathlib import Path

from videollm_mod_jax.conversion.links import check_inside
from videollm_mod_jax.training.checkpoint import COMPANIONS

_PATTERNS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
# Written anew on the way back.
_OURS = ("config.json", "adapter_config.json", "tokenizer.json")
_MOST_BYTES = 32 * 2**20


def keep_companions(source: Path, model: Path, role: str) -> None:
    """Copies the small files of a source directory into a converted model.

    Args:
      source: as downloaded from the Hub.
      model: directory of the model that is made of it.
      role: of the part, as in `Part`.

    Raises:
      UserError: one is a link out of the source directory.
    """
    kept = model / COMPANIONS / role
    for file in _companions(source, source):
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, kept / file.name)


def restore_companions(model: Path, role: str, destination: Path) -> None:
    """Copies them to a directory that is exported, where there are any.

    Raises:
      UserError: one is a link out of the model's directory.
    """
    for file in _companions(model / COMPANIONS / role, model):
        shutil.copyfile(file, destination / file.name)


def _companions(directory: Path, root: Path) -> list[Path]:
    found = {file for pattern in _PATTERNS for file in directory.glob(pattern) if file.is_file()}
    kept = sorted(
        file
        for file in found
        if file.name not in _OURS
        and not file.name.endswith(".index.json")
        and file.stat().st_size <= _MOST_BYTES
    )
    check_inside(root, kept)
    return kept
