"""The parts of a layer, and of what stands behind the layers, as functions to time.

Letters: B batch, S tokens of the sequence, M rows that a routed layer computes, T new tokens of a
stream, F frames, N tokens per frame, K kept tokens per frame, J labelled positions, D width,
H query heads, G key/value heads, E head width, C cache capacity.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from videollm_mod_jax.benchmarking import floors
from videollm_mod_jax.benchmarking.filled import Context, append_random
from videollm_mod_jax.benchmarking.floors import Work
from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.data.example import LANGUAGE
from videollm_mod_jax.models import VideoLLMConfig, config_plan, init_caches, row_wise
from videollm_mod_jax.models.attention import causal_attention
from videollm_mod_jax.models.cached_attention import cached_attention
from videollm_mod_jax.models.decoder import Layer, Linears
from videollm_mod_jax.models.execution import choose_kernels, current_platform
from videollm_mod_jax.models.layers import Linear
from videollm_mod_jax.models.plan import LayerSpec
from videollm_mod_jax.training.losses import judge_in_chunks, streaming_loss
from videollm_mod_jax.training.optimizer import merge_variables, split_variables
from videollm_mod_jax.training.run import TrainingConfig

FORWARD, BOTH = "forward", "forward and backward"
DENSE, ROUTED, BLOCK = "full, dense layer", "mod, routed layer", "mod, its block alone"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time.

    Attributes:
      name: what it is; begins with `full` or `mod`.
      direction: `FORWARD` or `BOTH`.
      rows: that it computes, per sequence.
      step: runs it once, compiled; returns its results.
      work: what it cannot do without.
    """

    name: str
    direction: str
    rows: int
    step: Callable[[], Any]
    work: Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a training step works on, one microbatch of it.

    Attributes:
      batch_size: B.
      frames: F.
      text_tokens: of a sequence.
      tokens_per_frame: N.
      keep: K, of the first routed layer.
      labels: J.
    """

    batch_size: int
    frames: int
    text_tokens: int
    tokens_per_frame: int
    keep: int
    labels: int

    @classmethod
    def of(cls, model: VideoLLMConfig, data: DataConfig, training: TrainingConfig) -> "Shapes":
        """The shapes of a config that routes somewhere, on one device."""
        return cls(
            batch_size=data.batch_size // training.microbatches,
            frames=data.frames,
            text_tokens=data.text_tokens,
            tokens_per_frame=model.tokens_per_frame,
            keep=next(spec.keep for spec in config_plan(model) if spec.keep is not None),
            labels=data.labels,
        )

    @property
    def sides(self) -> dict[str, int]:
        """Rows that a layer computes: S of a dense one, M of a routed one."""
        return {
            "full": self.text_tokens + self.frames * self.tokens_per_frame,
            "mod": self.text_tokens + self.frames * self.keep,
        }


def attention_cases(model: VideoLLMConfig, shapes: Shapes) -> Iterator[Case]:
    """Attention of the rows of a dense and of a routed layer, by all kernels that run here."""
    decoder = model.decoder
    H, G, E = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
    for side, rows in shapes.sides.items():
        q_BTHE, k_BTGE, v_BTGE = (
            _random(i, (shapes.batch_size, rows, heads, E), model.dtype)
            for i, heads in enumerate((H, G, G))
        )
        works = floors.attention_work(model, shapes.batch_size, rows)
        for kernels in _kernel_sets(model):
            yield from _both_ways(
                f"{side}, {kernels}",
                rows,
                lambda qkv, _, kernels=kernels: causal_attention(*qkv, kernels),
                (q_BTHE, k_BTGE, v_BTGE),
                None,
                works,
            )


def layer_cases(model: VideoLLMConfig, shapes: Shapes, training: TrainingConfig) -> Iterator[Case]:
    """A dense layer, a routed layer, and a dense layer on as many rows as the routed one computes.

    The last is the routed layer without router, gate, gather and scatter. Gradients are those of
    training, without dropout.
    """
    full, mod = shapes.sides["full"], shapes.sides["mod"]
    starts_F = Context(shapes.frames, shapes.text_tokens).frame_starts(shapes.tokens_per_frame)
    frame_starts_BF = jnp.broadcast_to(starts_F, (shapes.batch_size, shapes.frames))
    for name, keep, length, rows in (
        (DENSE, None, full, full),
        (ROUTED, shapes.keep, full, mod),
        (BLOCK, None, mod, mod),
    ):
        layer = Layer(model, LayerSpec(keep), training.execution())

        def run(inputs: dict, constants: dict, layer: Layer = layer) -> jax.Array:
            variables = merge_variables(inputs["trained"], constants["frozen"])
            return layer.apply(variables, inputs["x_BSD"], *constants["places"], 0, None)[0]

        # One frame behind one token is enough to make them.
        T = 1 + shapes.tokens_per_frame
        places_1T = jnp.arange(T, dtype=jnp.int32)[None], jnp.ones((1, 1), jnp.int32)
        x_1TD = jnp.zeros((1, T, model.decoder.hidden_size), model.dtype)
        trained, frozen = _split(_init(layer, x_1TD, *places_1T, 0, None), training.trainable)
        shape = (shapes.batch_size, length, model.decoder.hidden_size)
        position_BS = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape[:2])
        yield from _both_ways(
            name,
            rows,
            run,
            {"trained": trained, "x_BSD": _random(0, shape, model.dtype)},
            {"frozen": frozen, "places": (position_BS, frame_starts_BF)},
            floors.layer_work(
                model,
                shapes.batch_size,
                rows,
                trainable=training.trainable,
                remat=training.remat,
            ),
        )


def mlp_cases(
    model: VideoLLMConfig, shapes: Shapes, training: TrainingConfig, chunks: Sequence[int]
) -> Iterator[Case]:
    """The MLP on the rows of a dense and of a routed layer, all at once and so many at a time."""
    hidden_size = model.decoder.hidden_size
    linears = Linears.of_mlp(model)
    trained, frozen = _split(_init(linears), training.trainable)
    for side, rows in shapes.sides.items():
        for chunk in (0, *(chunk for chunk in chunks if chunk < rows)):

            def run(inputs: dict, frozen: dict, chunk: int = chunk) -> jax.Array:
                weights, keys = linears.apply(merge_variables(inputs["trained"], frozen))
                return row_wise.in_row_chunks(_mlp, inputs["x_BTD"], weights, keys, chunk)

            x_BTD = _random(0, (shapes.batch_size, rows, hidden_size), model.dtype)
            yield from _both_ways(
                f"{side}, {chunk or 'all'} rows at a time",
                rows,
                run,
                {"trained": trained, "x_BTD": x_BTD},
                frozen,
                floors.mlp_work(model, shapes.batch_size, rows, training.trainable),
            )


def _mlp(x_BTD: jax.Array, weights: row_wise.Linears, keys: row_wise.Keys) -> jax.Array:
    return row_wise.swiglu(x_BTD, None, weights, keys)


def head_cases(
    model: VideoLLMConfig, shapes: Shapes, training: TrainingConfig, chunks: Sequence[int]
) -> Iterator[Case]:
    """The output head and the loss at all labelled positions, all words at once and so many.

    They are the same with routing and without.
    """
    decoder, B, J = model.decoder, shapes.batch_size, shapes.labels
    V, D = decoder.vocab_size, decoder.hidden_size
    head = Linear(
        features=V,
        axes=("embed", "vocab"),
        use_bias=False,
        lora=model.lora if model.lora.adapts("lm_head") else None,
        dtype=model.dtype,
        param_dtype=model.param_dtype,
        out_dtype=jnp.float32,
    )
    variables = _init(head, jnp.zeros((1, 1, D), model.dtype))
    trained, frozen = _split(variables, training.trainable)
    labels_BJ = jax.random.randint(jax.random.key(1), (B, J), 0, V)
    constants = {"frozen": frozen, "labels": (labels_BJ, jnp.full((B, J), LANGUAGE, jnp.int8))}
    hidden_BJD = _random(0, (B, J, D), model.dtype)
    for chunk in (0, *(chunk for chunk in chunks if chunk < V)):

        def run(inputs: dict, constants: dict, chunk: int = chunk) -> jax.Array:
            variables = merge_variables(inputs["trained"], constants["frozen"])
            weights = head.apply(variables, D, method="weights")
            hidden_BJD = inputs["hidden_BJD"]
            labels_BJ, kinds_BJ = constants["labels"]
            judged = judge_in_chunks(
                hidden_BJD, weights.to_rank(hidden_BJD, None), weights, labels_BJ, chunk
            )
            return streaming_loss(judged, labels_BJ, kinds_BJ, training.stream_weight)["loss"][0]

        yield from _both_ways(
            f"{J} positions, {chunk or 'all'} words at a time",
            J,
            run,
            {"trained": trained, "hidden_BJD": hidden_BJD},
            constants,
            floors.head_work(model, B, J, training.trainable),
        )


def cached_attention_cases(
    model: VideoLLMConfig, shapes: Shapes, lengths: Sequence[int]
) -> Iterator[Case]:
    """Attention of a frame and its interval token to caches of one capacity, filled to lengths.

    Args:
      model: the model.
      shapes: of which the tokens of a frame count.
      lengths: filled entries, the new ones among them; the largest is the capacity.
    """
    decoder, one_layer = model.decoder, floors.one_layer(model)
    for side, new in (("full", shapes.tokens_per_frame), ("mod", shapes.keep)):
        T = 1 + new
        q_BTHE = _random(0, (1, T, decoder.num_heads, decoder.head_dim), model.dtype)
        for length in lengths:
            (cache,) = init_caches(one_layer, 1, max(lengths), 0, jnp.dtype(model.dtype))
            cache = append_random(cache, jnp.arange(length, dtype=jnp.int32), jax.random.key(1))
            start_B = jnp.array([length - T], jnp.int32)
            for kernels in _kernel_sets(model):
                attend = jax.jit(cached_attention, static_argnums=3)
                yield Case(
                    name=f"{side}, {kernels}, {length} filled",
                    direction=FORWARD,
                    rows=T,
                    step=lambda a=(q_BTHE, cache, start_B, kernels), f=attend: f(*a),
                    work=floors.cached_attention_work(model, length, T),
                )


def _kernel_sets(model: VideoLLMConfig) -> tuple[str, ...]:
    """The portable one, and the one of the platform if it has another that serves the model."""
    platform, head_dim = current_platform(), model.decoder.head_dim
    best = choose_kernels("auto", platform, model.dtype, head_dim)
    return tuple(dict.fromkeys(("xla", best)))


def _both_ways(
    name: str,
    rows: int,
    function: Callable[[Any, Any], jax.Array],
    inputs: Any,
    constants: Any,
    works: tuple[Work, Work],
) -> Iterator[Case]:
    """A function forward, and forward and backward to all its inputs."""

    def both(inputs: Any, constants: Any, cotangent: jax.Array) -> tuple[jax.Array, Any]:
        out, pull_back = jax.vjp(lambda inputs: function(inputs, constants), inputs)
        return out, pull_back(cotangent)

    out = jax.eval_shape(function, inputs, constants)
    cotangent = _random(3, out.shape, out.dtype)
    forward_step, both_step = jax.jit(function), jax.jit(both)
    for direction, step, work in (
        (FORWARD, lambda: forward_step(inputs, constants), works[0]),
        (BOTH, lambda: both_step(inputs, constants, cotangent), works[1]),
    ):
        yield Case(name=name, direction=direction, rows=rows, step=step, work=work)


def _init(module: nn.Module, *arguments: Any) -> dict[str, Any]:
    """Random variables of a module that is called with these arguments."""
    init = jax.jit(lambda key: module.init(key, *arguments))
    return nn.meta.unbox(init(jax.random.key(0)))


def _split(variables: dict[str, Any], trainable: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trained and the frozen ones; adapters need not sit in every part of a model."""
    return split_variables({"lora": {}} | variables, trainable)


def _random(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)
