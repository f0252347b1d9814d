"""What our model computes on its way, stage by stage."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from videollm_mod_jax.conversion.cases import Case
from videollm_mod_jax.models import Execution, VideoLLM, anyres, init_caches
from videollm_mod_jax.models.decoder import Layer
from videollm_mod_jax.models.plan import LayerSpec
from videollm_mod_jax.models.vision import VisionOutput
from videollm_mod_jax.training.checkpoint import LoadedModel

Stages = dict[str, np.ndarray]
"""By name and in order, float32 arrays of one example:

    tower       [X, P, W]   what enters the connector
    connector   [X, P, D]   what leaves it
    layer 0     [S, D]      the residual stream behind the first decoder layer, and so on
    logits      [J, V]      at the tokens of `Case.after`

A tower alone has `tower`, all its tokens, and `pooled` [X, W].
"""

_NO_STARTS = np.zeros((1, 0), np.int32)


def run(model: LoadedModel, case: Case, tokens: int) -> tuple[Stages, list[int]]:
    """Runs our model on a case.

    Layers run one by one, without caches; logits and answer come from the whole decoder with them.

    Args:
      model: that routes nowhere.
      case: its input.
      tokens: how many of the most likely tokens to append, one after the other.

    Returns:
      its stages, and the ids of the tokens.
    """
    found, x_BSD, starts_BF = _embedded(model, case)
    position_BS = np.arange(x_BSD.shape[1], dtype=np.int32)[None]
    layer, y_BSD = Layer(model.config, LayerSpec(keep=None), Execution()), x_BSD
    for i in range(model.config.decoder.num_layers):
        variables = _layer_variables(model, i)
        y_BSD, _, _ = _apply(layer, None, variables, y_BSD, position_BS, starts_BF, 0, None)
        found[f"layer {i}"] = _float32(y_BSD[0])
    logits_JV, ids = _answer(model, x_BSD, starts_BF, len(case.after), tokens)
    return {**found, "logits": logits_JV}, ids


def run_tower(model: LoadedModel, case: Case) -> Stages:
    """Runs our vision tower on the pixels of a case."""
    output = _apply(VideoLLM(model.config), _tower_output, model.variables, case.pixels_XCCA)
    found = {"tower": _float32(output.hidden_BPW)}
    return found if output.pooled_BW is None else {**found, "pooled": _float32(output.pooled_BW)}


def _embedded(model: LoadedModel, case: Case) -> tuple[Stages, jax.Array, jax.Array]:
    """Tower and connector; what enters the decoder, x_BSD; and frame_starts_BF."""
    video_llm, variables, first = VideoLLM(model.config), model.variables, len(case.before)
    tokens_BS = np.array([[*case.before, *[0] * case.slots, *case.after]], np.int32)
    if case.pixels_XCCA is None:
        return {}, _apply(video_llm, "embed", variables, tokens_BS, None, _NO_STARTS), _NO_STARTS
    see = _seen_frames if case.crops is None else _seen_crops
    features, embeddings = _apply(video_llm, see, variables, case.pixels_XCCA)
    found = {"tower": _float32(features), "connector": _float32(embeddings)}
    if case.crops is not None:
        newline_D = variables["params"]["newline"]
        image_TD = anyres.pack_image(embeddings, newline_D, case.size, case.crops)
        x_BSD = _apply(video_llm, "embed", variables, tokens_BS, None, _NO_STARTS)
        return found, x_BSD.at[0, first : first + case.slots].set(image_TD), _NO_STARTS
    F, N = len(case.pixels_XCCA), model.config.tokens_per_frame
    starts_BF = first + N * np.arange(F, dtype=np.int32)[None]
    newline_id = model.config.decoder.vocab_size
    tokens_BS[:, first + F * N : first + case.slots] = newline_id
    x_BSD = _apply(video_llm, "embed", variables, tokens_BS, features[None], starts_BF)
    return found, x_BSD, starts_BF


def _answer(
    model: LoadedModel, x_BSD: jax.Array, starts_BF: jax.Array, judged: int, tokens: int
) -> tuple[np.ndarray, list[int]]:
    """Logits at the last `judged` tokens, and the most likely tokens behind them."""
    config, video_llm, length = model.config, VideoLLM(model.config), x_BSD.shape[1]
    caches = init_caches(config, 1, length + tokens, 0, jnp.dtype(config.dtype))
    judged_BJ = np.arange(length - judged, length)[None]
    position_BS = np.arange(length, dtype=np.int32)[None]
    output = _apply(
        video_llm, "decode", model.variables, x_BSD, starts_BF, judged_BJ, position_BS, caches
    )
    logits_JV, ids = _float32(output.logits_BJV[0]), []
    for position in range(length, length + tokens):
        ids.append(int(jnp.argmax(output.logits_BJV[0, -1])))
        token_BS, position_BS = np.array([ids[-1:]], np.int32), np.array([[position]], np.int32)
        step = (token_BS, None, _NO_STARTS, np.zeros((1, 1), np.int32), position_BS, output.caches)
        output = _apply(video_llm, None, model.variables, *step)
    return logits_JV, ids


def _tower_output(module: VideoLLM, pixels_XCCA: jax.Array) -> VisionOutput:
    return module.vision.outputs(pixels_XCCA)


def _seen_frames(module: VideoLLM, pixels_XCCA: jax.Array) -> tuple[jax.Array, jax.Array]:
    features = module.encode(pixels_XCCA)
    return features, module.connector(features)


def _seen_crops(module: VideoLLM, pixels_XCCA: jax.Array) -> tuple[jax.Array, jax.Array]:
    patches = module.vision.patches(pixels_XCCA)
    return patches, module.connector(patches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(
    module: nn.Module, method: Callable | str | None, variables: Any, *arguments: Any
) -> Any:
    # Compiled once per module and shapes: all layers are one.
    return module.apply(variables, *arguments, method=method)


def _layer_variables(model: LoadedModel, layer: int) -> dict[str, Any]:
    name = f"layer_{layer}"
    trees = {kind: tree.get("decoder", {}) for kind, tree in model.variables.items()}
    return {kind: tree[name] for kind, tree in trees.items() if name in tree}


def _float32(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float32)
