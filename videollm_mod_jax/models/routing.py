"""Static-shape routing of vision tokens: select per frame, gather, weight, scatter.

Everything is a pure function of arrays. Letters: B batch, S tokens of the flat sequence, F frames,
N tokens per frame, K kept tokens per frame, M = S - F * (N - K) rows that a routed layer computes,
D width.
"""

import jax
import jax.numpy as jnp

from videollm_mod_jax.models.layers import rms_norm

Rows = tuple[jax.Array, jax.Array]


def vision_rows(frame_starts_BF: jax.Array, tokens_per_frame: int) -> jax.Array:
    """Sequence indices of all vision tokens, int32 [B, F * N], increasing.

    ```
    frame_starts 1 5, N = 3  ->  1 2 3 5 6 7
    ```
    """
    rows_BFN = frame_starts_BF[:, :, None] + jnp.arange(tokens_per_frame)
    return rows_BFN.reshape(frame_starts_BF.shape[0], -1)


def select_tokens(scores_BFN: jax.Array, keep: int) -> jax.Array:
    """The `keep` best tokens of every frame, in their order inside the frame.

    Rank by comparison instead of a sort: N is small, and XLA fuses it. Ties go to the lower index,
    as in `lax.top_k`.

    ```
    scores  .1 .9 .3 .9, keep 2  ->  1 3
    scores  .5 .5 .5 .5, keep 2  ->  0 1
    ```

    Args:
      scores_BFN: float; a frame is compared only with itself, hence selection is causal.
      keep: K, between 0 and N.

    Returns:
      offsets_BFK int32, increasing in K, in [0, N).
    """
    N = scores_BFN.shape[-1]
    index_N = jnp.arange(N, dtype=jnp.int32)
    mine, other = scores_BFN[..., :, None], scores_BFN[..., None, :]
    earlier_NN = index_N[None, :] < index_N[:, None]
    rank_BFN = jnp.sum((other > mine) | ((other == mine) & earlier_NN), axis=-1)
    kept_BFN = rank_BFN < keep
    slot_BFN = jnp.cumsum(kept_BFN, axis=-1) - 1
    holds_BFNK = kept_BFN[..., None] & (slot_BFN[..., None] == jnp.arange(keep))
    return jnp.sum(holds_BFNK * index_N[:, None], axis=-2, dtype=jnp.int32)


def selection_scores(
    selection: str,
    router_scores_BFN: jax.Array,
    frame_position_BF: jax.Array,
    layer_index: jax.Array | int,
    keep: int,
    force_keep_last: bool,
) -> jax.Array:
    """What a frame's tokens are ranked by.

    Args:
      selection: `learned`: the router's scores, without their gradient (selection is not
        differentiable; the weighting carries it). `uniform`: evenly spaced tokens, floor(j N / K).
        `random`: drawn anew for every (layer, stream position of the frame), so that a stream and
        the whole clip agree.
      router_scores_BFN: float32.
      frame_position_BF: int32 stream position of every frame's first token.
      layer_index: index of the decoder layer.
      keep: K.
      force_keep_last: rank the last token of every frame first.

    Returns:
      float32 [B, F, N].
    """
    N = router_scores_BFN.shape[-1]
    if selection == "learned":
        scores_BFN = jax.lax.stop_gradient(router_scores_BFN)
    elif selection == "uniform":
        chosen = {j * N // keep for j in range(keep)}
        scores_N = jnp.array([float(n in chosen) for n in range(N)], jnp.float32)
        scores_BFN = jnp.broadcast_to(scores_N, router_scores_BFN.shape)
    else:
        layer_key = jax.random.fold_in(jax.random.key(0), layer_index)

        def draw(position: jax.Array) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(layer_key, position), (N,))

        scores_BFN = jax.vmap(jax.vmap(draw))(frame_position_BF)
    if force_keep_last:
        scores_BFN = scores_BFN.at[..., -1].set(jnp.inf)
    return scores_BFN


def explored_scores(router_scores_BFN: jax.Array, share: float, key: jax.Array) -> jax.Array:
    """Router scores of a training step, with random ones in place of those of a share of frames.

    ```
    scores      (.1 .9 .3) (.2 .8 .4)      share .5, where the second frame explores
    explored    (.1 .9 .3) ( ?  ?  ?)      ? random in [0, 1)
    ```

    A whole frame at a time, so that every token of a frame that explores is kept as often as any
    other. What the router thinks of them still weighs them, and so learns from them.

    Args:
      router_scores_BFN: float32.
      share: of the frames that explore, in [0, 1]; each is drawn by itself.
      key: of the step and the layer.

    Returns:
      float32 [B, F, N].
    """
    choice_key, score_key = jax.random.split(key)
    explores_BF = jax.random.bernoulli(choice_key, share, router_scores_BFN.shape[:2])
    random_BFN = jax.random.uniform(score_key, router_scores_BFN.shape)
    return jnp.where(explores_BF[..., None], random_BFN, router_scores_BFN)


def compact_rows(
    frame_starts_BF: jax.Array, offsets_BFK: jax.Array, sequence_length: int, tokens_per_frame: int
) -> Rows:
    """Sequence indices of the rows that a routed layer computes: all text, K tokens per frame.

    ```
    index          0 1 2 3 4 5 6 7      S = 8, N = 3, K = 1
    token          a v v v b w w w      frame_starts 1 5, offsets (2) (0)
    rows           0 3 4 5              is_vision . x . x
    ```

    The i-th row is found without scatter or sort. Text before frame f numbers
    frame_starts[f] - f * N, so the frame's kept tokens stand at compact indices
    f * K + frame_starts[f] - f * N onward, and a text row behind g frames has skipped g * (N - K)
    tokens.

    Args:
      frame_starts_BF: int32, increasing by at least N; exactly F frames, padding frames at the
        tail.
      offsets_BFK: int32, increasing in K, in [0, N).
      sequence_length: S.
      tokens_per_frame: N.

    Returns:
      rows_BM int32, strictly increasing, and is_vision_BM bool.
    """
    B, F, K = offsets_BFK.shape
    N, M = tokens_per_frame, sequence_length - F * (tokens_per_frame - K)
    index_M = jnp.arange(M, dtype=jnp.int32)
    first_BF = frame_starts_BF - jnp.arange(F, dtype=jnp.int32) * (N - K)
    frames_begun_BM = jnp.sum(
        first_BF[:, None, :] <= index_M[None, :, None], axis=-1, dtype=jnp.int32
    )
    frame_BM = jnp.maximum(frames_begun_BM - 1, 0)
    within_BM = index_M - jnp.take_along_axis(first_BF, frame_BM, axis=1)
    is_vision_BM = (frames_begun_BM > 0) & (within_BM < K)
    rows_BM = index_M + frames_begun_BM * (N - K)
    if K > 0:
        slot_BM = jnp.where(is_vision_BM, frame_BM * K + within_BM, 0)
        offset_BM = jnp.take_along_axis(offsets_BFK.reshape(B, F * K), slot_BM, axis=1)
        start_BM = jnp.take_along_axis(frame_starts_BF, frame_BM, axis=1)
        rows_BM = jnp.where(is_vision_BM, start_BM + offset_BM, rows_BM)
    return rows_BM, is_vision_BM


_SORTED = {"indices_are_sorted": True, "unique_indices": True, "mode": "promise_in_bounds"}


def gather_rows(x_BSD: jax.Array, rows_BM: jax.Array) -> jax.Array:
    """x[b, rows[b]]: [B, M, ...]. Rows are strictly increasing, which XLA is told."""
    return jax.vmap(lambda x, rows: x.at[rows].get(**_SORTED))(x_BSD, rows_BM)


def scatter_add_rows(x_BSD: jax.Array, rows_BM: jax.Array, update_BMD: jax.Array) -> jax.Array:
    """x with update added at `rows`; the other rows pass unchanged, on the residual path."""
    return jax.vmap(lambda x, rows, u: x.at[rows].add(u, **_SORTED))(x_BSD, rows_BM, update_BMD)


def set_rows(x_BSD: jax.Array, rows_BM: jax.Array, values_BMD: jax.Array) -> jax.Array:
    """x with its rows replaced by values."""
    return jax.vmap(lambda x, rows, v: x.at[rows].set(v, **_SORTED))(x_BSD, rows_BM, values_BMD)


def router_scores(weighting: str, x: jax.Array, kernel_D: jax.Array) -> jax.Array:
    """mu = w . x in float32: [..., D] -> [...] (paper, equation 1).

    Under `relative`, of x / rms(x): some tokens of a language model are hundreds of times longer
    than others (arXiv 2402.17762), and their gates would be shut or open for good.
    """
    x, kernel_D = x.astype(jnp.float32), kernel_D.astype(jnp.float32)
    if weighting == "relative":
        x = rms_norm(x, jnp.ones_like(kernel_D), eps=1e-6)
    return jnp.einsum("...D,D->...", x, kernel_D)


def frame_means(score_BFN: jax.Array, vision_BR: jax.Array, sequence_length: int) -> jax.Array:
    """The mean score of the frame that a token belongs to, and 0 for text: [B, S].

    ```
    scores (1 3) (4 6), vision_rows 1 2 4 5, S = 7  ->  0 2 2 0 5 5 0
    ```

    Args:
      score_BFN: float32.
      vision_BR: of `vision_rows`; R = F * N.
      sequence_length: S.
    """
    B, _, N = score_BFN.shape
    mean_BR = jnp.repeat(jnp.mean(score_BFN, axis=2), N, axis=1)
    return set_rows(jnp.zeros((B, sequence_length), mean_BR.dtype), vision_BR, mean_BR)


def token_gates(weighting: str, score_BM: jax.Array, is_vision_BM: jax.Array) -> jax.Array:
    """g of every computed row: what its update is multiplied by, 1 for text.

    A row leaves the layer as `x + g f(x)`; under `official` as `g (x + f(x))`.

    ```
    score .5 .5, is_vision x .      paper .5 1      official, relative .62 1
                                    tanh1 1.09 1    none 1 1
    ```

    Args:
      weighting: as `RoutingConfig.weighting` says.
      score_BM: float32 router scores; with the bias for `official`, and less their frame's mean
        for `relative`.
      is_vision_BM: bool.

    Returns:
      float32 [B, M].
    """
    gate_BM = {
        "paper": lambda s: s,
        "official": jax.nn.sigmoid,
        "tanh1": lambda s: 1 + 0.2 * jnp.tanh(s),
        "relative": jax.nn.sigmoid,
        "none": jnp.ones_like,
    }[weighting](score_BM)
    return jnp.where(is_vision_BM, gate_BM, 1)
