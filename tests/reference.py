"""An independent decoder in NumPy, float64: one example at a time, tokens skipped by masking.

Nothing here is shared with the package but the parameter tree. A routed layer computes all S
tokens and then masks: skipped tokens are neither queries, nor keys, nor updated.
"""

import numpy as np
from scipy.special import erf, expit


def forward(config, params, example, choose):
    """Logits [S, V] of one example.

    Args:
      config: VideoLLMConfig.
      params: the `params` collection, one entry per layer.
      example: (tokens_S, features_FNW, frame_starts_F).
      choose: (layer, x_SD, router params) -> the set of kept sequence indices of vision tokens, or
        None where the layer is dense.
    """
    tokens, features, starts = (np.asarray(x) for x in example)
    params = _float64(params)
    x = params["embedding"][tokens]
    fc1, fc2 = params["connector"]["fc1"], params["connector"]["fc2"]
    for f, start in enumerate(starts):
        hidden = features[f] @ fc1["kernel"] + fc1["bias"]
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        x[start : start + features.shape[1]] = hidden @ fc2["kernel"] + fc2["bias"]
    is_vision = vision_mask(config, len(tokens), starts)
    for i in range(config.decoder.num_layers):
        layer = params["decoder"][f"layer_{i}"]
        x = _layer(config, layer, x, is_vision, choose(i, x, layer.get("router")))
    hidden = _norm(x, params["decoder"]["norm"]["scale"], config.decoder.norm_eps)
    head = params["lm_head"]["kernel"] if "lm_head" in params else params["embedding"].T
    return hidden @ head


def vision_mask(config, length, starts):
    mask = np.zeros(length, bool)
    for start in starts:
        mask[start : start + config.tokens_per_frame] = True
    return mask


def selected(config, scores_S, starts, keep):
    """Kept sequence indices by the definition: the `keep` highest scores of every frame."""
    kept = set()
    for start in starts:
        frame = list(range(start, start + config.tokens_per_frame))
        if config.routing.force_keep_last and keep > 0:
            best = [frame[-1], *sorted(frame[:-1], key=lambda s: -scores_S[s])[: keep - 1]]
        else:
            best = sorted(frame, key=lambda s: -scores_S[s])[:keep]
        kept.update(best)
    return kept


def router_scores(config, x, router):
    """What a layer's tokens are ranked by."""
    read = _norm(x, 1, 1e-6) if config.routing.weighting == "relative" else x
    return read @ router["kernel"]


def _layer(config, params, x, is_vision, kept):
    router = params.get("router")
    runs = np.ones(len(x), bool)
    if kept is not None:
        runs = ~is_vision | np.isin(np.arange(len(x)), list(kept))
    weighting, N = config.routing.weighting, config.tokens_per_frame
    if kept is None or weighting == "none":
        weighted = x + _block(config, params["block"], x, runs, np.ones(len(x)))
    else:
        score = router_scores(config, x, router)
        value_gate = np.ones(len(x))
        if weighting == "official":
            score = score + router["bias"]
        if weighting == "relative":
            frames = score[is_vision].reshape(-1, N)
            score[is_vision] = (frames - frames.mean(axis=1, keepdims=True)).reshape(-1)
            value_gate = np.where(is_vision, expit(score), 1)
        update = _block(config, params["block"], x, runs, value_gate)
        weighted = {
            "paper": x + score[:, None] * update,
            "official": expit(score)[:, None] * (x + update),
            "tanh1": x + (1 + 0.2 * np.tanh(score))[:, None] * update,
            "relative": x + expit(score)[:, None] * update,
        }[weighting]
        weighted = np.where(is_vision[:, None], weighted, x + update)
    return np.where(runs[:, None], weighted, x)


def _block(config, params, x, runs, value_gate):
    decoder, S = config.decoder, len(x)
    normed = _norm(x, params["attention_norm"]["scale"], decoder.norm_eps)
    projected = {}
    for name in "qkv":
        linear = params["attention"][name]
        y = normed @ linear["kernel"] + linear.get("bias", 0.0)
        projected[name] = y.reshape(S, -1, decoder.head_dim)
    projected["v"] = projected["v"] * value_gate[:, None, None]
    q, k = _rope(projected["q"], decoder.rope_theta), _rope(projected["k"], decoder.rope_theta)
    heads = []
    for h in range(decoder.num_heads):
        g = h // (decoder.num_heads // decoder.num_kv_heads)
        scores = q[:, h] @ k[:, g].T / np.sqrt(decoder.head_dim)
        visible = np.tril(np.ones((S, S), bool)) & runs[None, :]
        visible |= np.eye(S, dtype=bool)  # a skipped query's row is thrown away; keep it finite
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ projected["v"][:, g])
    a = np.concatenate(heads, axis=1) @ params["attention"]["o"]["kernel"]
    normed = _norm(x + a, params["mlp_norm"]["scale"], decoder.norm_eps)
    mlp = params["mlp"]
    gate = normed @ mlp["gate"]["kernel"]
    return a + (gate * expit(gate) * (normed @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]


def _rope(x, theta):
    S, _, E = x.shape
    out = np.empty_like(x)
    for i in range(E // 2):
        turn = np.exp(1j * np.arange(S) * theta ** (-2 * i / E))[:, None]
        rotated = (x[:, :, i] + 1j * x[:, :, i + E // 2]) * turn
        out[:, :, i], out[:, :, i + E // 2] = rotated.real, rotated.imag
    return out


def _norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def _float64(tree):
    if isinstance(tree, dict):
        return {k: _float64(v) for k, v in tree.items()}
    return np.asarray(tree, np.float64)
