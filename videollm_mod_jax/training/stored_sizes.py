"""Compares the sizes that a `model.json` says with the arrays that are stored.

Finding the names and shapes of all arrays of a model means tracing it, which takes a minute for a
thousand layers and a gigabyte for the pooling of a large grid. A stranger's `model.json` may say so
next to weights of a few bytes; what costs most is compared first, and costs nothing to compare.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLMConfig


def check_sizes(
    directory: Path, config: VideoLLMConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks that weights can be those of a model, before the model is traced.

    Args:
      directory: of the model, for the message.
      config: what its `model.json` says.
      shapes: of all stored variables, by their names, `params/decoder/layer_0/...`.

    Raises:
      UserError: another number of layers, vocabulary, width or number of patches is stored.
    """
    for field, said, there in _sizes(config, shapes):
        if said != there:
            raise UserError(
                f"{directory} holds the weights of another model than its model.json describes: "
                f"{field} should be {said} and is {there}; bring back the model.json that belongs "
                "to the weights"
            )


def most_arrays(config: VideoLLMConfig) -> int:
    """Return more than the number of arrays of a model, without tracing it."""
    parts = (config.decoder, config.vision)
    return 64 + 48 * sum(part.num_layers for part in parts if part is not None)


def _sizes(
    config: VideoLLMConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, object, object]]:
    """What is compared: field of the config, what it says, what is stored."""
    sizes = []
    if decoder := config.decoder:
        layers = {match[1] for name in shapes if (match := _LAYER.match(name))}
        sizes += [
            ("decoder.num_layers", decoder.num_layers, len(layers)),
            (
                "params/embedding",
                (decoder.vocab_size, decoder.hidden_size),
                shapes.get("params/embedding", "absent"),
            ),
        ]
    if vision := config.vision:
        positions = vision.patches_per_side**2 + (vision.architecture == "clip")
        sizes.append(
            (
                "params/vision/position_embedding",
                (positions, vision.width),
                shapes.get("params/vision/position_embedding", "absent"),
            )
        )
    return sizes


_LAYER = re.compile(r"params/decoder/layer_(\d+)/")
