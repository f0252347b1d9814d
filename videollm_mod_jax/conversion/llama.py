"""Decoders of the Llama family (Llama 2, 3 and 3.1, Qwen2): configs and names, in and out.

Follows `LlamaConfig`, `Qwen2Config`, `LlamaForCausalLM` and `Qwen2ForCausalLM` of
huggingface/transformers. The q and k kernels are not permuted: transformers rotates the pairs
(i, i + E / 2) of a head, as `models/rope.apply_rope` does, and its checkpoints were permuted
for that when they were made. The `consolidated.*.pth` files of Meta's own releases were not, have
other names, and are not supported; the Hub has the same models in this layout.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from videollm_mod_jax.conversion.hf_config import (
    inside,
    integer,
    number,
    refusal,
    refuse_keys,
    require_one_of,
    require_type,
    table,
    with_defaults,
)
from videollm_mod_jax.conversion.table import Rule, Table
from videollm_mod_jax.models import DecoderConfig
from videollm_mod_jax.models.config import RopeScaling
from videollm_mod_jax.models.rope import rope_frequencies

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 1.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 1.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
"""By model type: what transformers takes for keys that a config.json does not state."""

LAYOUT = "hf"
"""The one layout: `model.layers.*`, `lm_head.weight`."""

_UNSUPPORTED = {
    "quantization_config": "quantised weights are not supported: take the unquantised model",
    "num_experts": "mixtures of experts are not supported",
    "num_local_experts": "mixtures of experts are not supported",
}
_ROPE_KEYS = (
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def decoder_from_hf(hf: Mapping[str, Any], where: str) -> DecoderConfig:
    """The decoder that a `config.json`, or a `text_config` inside one, describes.

    Args:
      hf: of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`); it may state
        only what differs from transformers' defaults.
      where: the file, and the key inside it, for messages.

    Raises:
      UserError: another model type, or a variant that our decoder does not compute; the key is
        named.
    """
    model_type = require_type(hf, tuple(DEFAULTS), "a decoder", where)
    values = with_defaults(DEFAULTS[model_type], hf)
    refuse_keys(values, _UNSUPPORTED, where)
    require_one_of(values, "hidden_act", ("silu",), where)
    require_one_of(values, "partial_rotary_factor", (1.0,), where)
    if model_type == "llama":
        require_one_of(values, "attention_bias", (False,), where)
        require_one_of(values, "mlp_bias", (False,), where)
    else:
        _refuse_sliding_window(values, where)
    hidden_size = integer(values, "hidden_size", where, (DecoderConfig, "hidden_size"))
    num_heads = integer(values, "num_attention_heads", where, (DecoderConfig, "num_heads"))
    head_dim, rest = divmod(hidden_size, num_heads)
    if values.get("head_dim") is None and (rest or head_dim % 2):
        expected = f"a divisor of hidden_size = {hidden_size} that gives heads of an even width"
        raise refusal(where, "num_attention_heads", num_heads, expected)
    values = with_defaults({"num_key_value_heads": num_heads, "head_dim": head_dim}, values)
    head_dim = integer(values, "head_dim", where, (DecoderConfig, "head_dim"))
    if head_dim % 2:
        raise refusal(where, "head_dim", head_dim, "an even number, as rotary embedding needs")
    becomes = (DecoderConfig, "num_kv_heads")
    num_kv_heads = integer(values, "num_key_value_heads", where, becomes)
    if num_heads % num_kv_heads:
        expected = f"a divisor of num_attention_heads = {num_heads}"
        raise refusal(where, "num_key_value_heads", num_kv_heads, expected)
    theta, scaling = _rope(values, where)
    return DecoderConfig(
        vocab_size=integer(values, "vocab_size", where, (DecoderConfig, "vocab_size")),
        hidden_size=hidden_size,
        mlp_size=integer(values, "intermediate_size", where, (DecoderConfig, "mlp_size")),
        num_layers=integer(values, "num_hidden_layers", where, (DecoderConfig, "num_layers")),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=number(values, "rms_norm_eps", where, (DecoderConfig, "norm_eps")),
        qkv_bias=model_type == "qwen2",
        tie_embeddings=require_one_of(values, "tie_word_embeddings", (True, False), where),
    )


def decoder_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a decoder, which transformers 4 and 5 read; the inverse."""
    hf = {
        "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if config.qkv_bias else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        hf["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        hf["max_position_embeddings"] = int(scaling.factor * scaling.original_max_positions)
        hf["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return hf


def with_vocabulary(hf: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that a model came with, with the vocabulary that it has now.

    Rows were added to it where its tokenizer had more tokens than embeddings.
    """
    text = hf.get("text_config")
    if isinstance(text, Mapping):
        changed = with_vocabulary(text, config)
        if changed == text:
            return dict(hf)
        # Old ones repeat it.
        repeated = {"vocab_size": config.vocab_size} if "vocab_size" in hf else {}
        return {**hf, "text_config": changed, **repeated}
    stated = with_defaults(DEFAULTS["qwen2" if config.qkv_bias else "llama"], hf)["vocab_size"]
    return dict(hf) if stated == config.vocab_size else {**hf, "vocab_size": config.vocab_size}


def decoder_table(config: DecoderConfig, prefix: str = "model.", head: str = "lm_head.") -> Table:
    """Where a decoder's tensors go.

    ```
    model.layers.1.self_attn.q_proj.weight   [H E, D]
    params/decoder/layer_1/block/attention/q/kernel   [D, H E]   axes (1, 0)
    ```

    Args:
      config: of the decoder.
      prefix: of the names inside the model, such as `language_model.model.`.
      head: of the output head's.
    """
    layers = tuple(range(config.num_layers))
    block, target = prefix + "layers.{i}.", "params/decoder/layer_{i}/block/"
    rules = [
        Rule(source=prefix + "embed_tokens.weight", target="params/embedding"),
        Rule(source=prefix + "norm.weight", target="params/decoder/norm/scale"),
    ]
    for source, norm in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "mlp_norm"),
    ):
        rules.append(
            Rule(source=f"{block}{source}.weight", target=f"{target}{norm}/scale", layers=layers)
        )
    for module, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        ours = target + ("attention" if module == "self_attn" else "mlp")
        for name in names:
            theirs = f"{block}{module}.{name}_proj"
            rules.append(linear(theirs, f"{ours}/{name}", layers))
            if name in "qkv" and config.qkv_bias:
                bias = f"{ours}/{name}/bias"
                rules.append(Rule(source=f"{theirs}.bias", target=bias, layers=layers))
    same = {}
    if config.tie_embeddings:
        same[head + "weight"] = prefix + "embed_tokens.weight"
    else:
        rules.append(linear(head.removesuffix("."), "params/lm_head"))

    def frequencies() -> np.ndarray:
        return rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)

    buffers: dict[str, Callable[[], np.ndarray]] = {prefix + "rotary_emb.inv_freq": frequencies}
    for i in layers:
        buffers[f"{prefix}layers.{i}.self_attn.rotary_emb.inv_freq"] = frequencies
    return Table(rules=tuple(rules), same=same, buffers=buffers)


def linear(source: str, target: str, layers: tuple[int, ...] = ()) -> Rule:
    """The weight [out, in] of a PyTorch linear as a kernel [in, out]."""
    return Rule(source=f"{source}.weight", target=f"{target}/kernel", axes=(1, 0), layers=layers)


def _refuse_sliding_window(values: Mapping[str, Any], where: str) -> None:
    """As `Qwen2Config` decides which layers slide; the weights are the same, the result is not."""
    kinds = values.get("layer_types")
    if kinds is None:
        layers = integer(values, "num_hidden_layers", where, (DecoderConfig, "num_layers"))
        slides = require_one_of(values, "use_sliding_window", (True, False), where)
        if slides:
            slides = integer(values, "max_window_layers", where) < layers
    else:
        slides = not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    if slides:
        key = "use_sliding_window" if kinds is None else "layer_types"
        raise refusal(where, key, values[key], "full attention in every layer")


def _rope(values: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and rescaling of the rotary frequencies, in the spelling of transformers 4 or 5."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    stated = table({key: {}, **values}, key, where)
    # Until transformers 5 the base stands beside the rescaling.
    theta_where = inside(where, key) if "rope_theta" in stated else where
    where = inside(where, key)
    rope = with_defaults(
        {
            "rope_theta": values["rope_theta"],
            "rope_type": stated.get("type") or "default",
            "partial_rotary_factor": 1.0,
        },
        stated,
    )
    kind = require_one_of(rope, "rope_type", ("default", "linear", "llama3"), where)
    require_one_of(rope, "partial_rotary_factor", (1.0,), where)
    for name in rope:
        if name not in _ROPE_KEYS:
            raise refusal(where, name, rope[name], f"one of the keys {', '.join(_ROPE_KEYS)}")
    theta = number(rope, "rope_theta", theta_where, (DecoderConfig, "rope_theta"))
    if kind == "default":
        return theta, None
    factor = number(rope, "factor", where, (RopeScaling, "factor"))
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=factor)
    return theta, RopeScaling(
        kind=kind,
        factor=factor,
        low_freq_factor=number(rope, "low_freq_factor", where, (RopeScaling, "low_freq_factor")),
        high_freq_factor=number(rope, "high_freq_factor", where, (RopeScaling, "high_freq_factor")),
        original_max_positions=integer(
            rope, "original_max_position_embeddings", where, (RopeScaling, "original_max_positions")
        ),
    )
