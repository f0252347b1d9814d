"""The streaming engine: a documented state, and pure functions from state to state.

Every function is compiled once per static shape (a frame behind one comma, a frame behind the
opening of a stream, text in padded buckets, one token of generation), so nothing is compiled again
during a stream. The state is donated: caches are updated in place, and the state that was passed
in must not be used again.

Letters: B streams that advance together, T text tokens, N vision tokens per frame, W vision
feature width, V vocabulary, C cache capacity.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from videollm_mod_jax.models import EMPTY, Caches, VideoLLM, init_caches
from videollm_mod_jax.models.vision import preprocess

MIN_BUCKET = 16
"""Shortest padded length of a text chunk."""


@flax.struct.dataclass
class StreamState:
    """Everything that a stream remembers between two calls.

    Attributes:
      caches: one `LayerCache` per decoder layer. A dense layer stores text and all N tokens of a
        frame, a routed one text and its K kept tokens.
      position_B: int32, stream position of the next token; it counts every token seen, kept by a
        layer or not.
      logits_BV: float32, next-token logits behind the last token.
      key_data: uint32, data of the random key that sampling splits.
    """

    caches: Caches
    position_B: jax.Array
    logits_BV: jax.Array
    key_data: jax.Array

    @property
    def entries_LB(self) -> jax.Array:
        """int32, filled cache entries of every layer."""
        return jnp.stack([cache.length_B for cache in self.caches])


def start(
    model: VideoLLM, batch_size: int, max_text: int, max_frames: int, seed: int
) -> StreamState:
    """A state that has seen nothing, with room for `max_text` text tokens and `max_frames` frames.

    The padding of text chunks counts as text while it is written; see `bucket`.
    """
    config = model.config
    return StreamState(
        caches=init_caches(config, batch_size, max_text, max_frames, jnp.dtype(config.dtype)),
        position_B=jnp.zeros((batch_size,), jnp.int32),
        logits_BV=jnp.zeros((batch_size, config.decoder.vocab_size), jnp.float32),
        key_data=jax.random.key_data(jax.random.key(seed)),
    )


def bucket(length: int) -> int:
    """The padded length of a text chunk: the next power of two, at least `MIN_BUCKET`.

    ```
    length  1 .. 16   17 .. 32   33 .. 64
    padded     16        32         64
    ```
    """
    return max(MIN_BUCKET, 1 << (length - 1).bit_length())


def pad_text(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """One stream's chunk, padded to its bucket: tokens int32 [1, bucket], lengths int32 [1]."""
    tokens_1T = np.zeros((1, bucket(len(ids))), np.int32)
    tokens_1T[0, : len(ids)] = ids
    return tokens_1T, np.array([len(ids)], np.int32)


@functools.partial(jax.jit, static_argnames="model")
def encode(model: VideoLLM, variables: dict, images_BHWC: jax.Array) -> jax.Array:
    """Frames to vision features: uint8 square RGB [B, height, width, 3] to [B, N, W]."""
    images_BHWC = preprocess(images_BHWC, model.config.vision)
    return model.apply(variables, images_BHWC, method="encode")


def append(
    model: VideoLLM,
    variables: dict,
    state: StreamState,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    features_BFNW: jax.Array | None,
    frame_starts_BF: jax.Array,
) -> StreamState:
    """Appends a chunk of text and frames; the one step that all others are made of. Not jitted.

    Args:
      model: per-layer model (`scan=False`).
      variables: its variables.
      state: before the chunk.
      tokens_BS: int32 ids; anything in vision slots and padding.
      length_B: int32 real tokens, vision included; what lies behind them is padding, which no
        cache stores. A stream with 0 is left as it was.
      features_BFNW: frame tokens of the tower; None for text alone.
      frame_starts_BF: int32, relative to the chunk.
    """
    index_S = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)
    is_real_BS = index_S < length_B[:, None]
    out = model.apply(
        variables,
        tokens_BS,
        features_BFNW,
        frame_starts_BF,
        jnp.maximum(length_B - 1, 0)[:, None],
        position_BS=jnp.where(is_real_BS, state.position_B[:, None] + index_S, EMPTY),
        caches=state.caches,
    )
    return state.replace(
        caches=out.caches,
        position_B=state.position_B + length_B,
        logits_BV=jnp.where((length_B > 0)[:, None], out.logits_BJV[:, 0], state.logits_BV),
    )


def _append_text(model, variables, state, tokens_BT, length_B):
    no_starts = jnp.zeros((tokens_BT.shape[0], 0), jnp.int32)
    return append(model, variables, state, tokens_BT, length_B, None, no_starts)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def append_text(
    model: VideoLLM, variables: dict, state: StreamState, tokens_BT: jax.Array, length_B: jax.Array
) -> StreamState:
    """Appends text. One compilation per T, hence the buckets.

    ```
    tokens    a b c 0 0 0 0 0      length 3
    position  7 8 9 EMPTY ...      padding is never attended and its cache slots stay free
    ```

    Args:
      model: per-layer model (`scan=False`).
      variables: its variables.
      state: donated.
      tokens_BT: int32 ids, padded at the tail.
      length_B: int32 real tokens, 0 to T; a stream with 0 is left as it was.
    """
    return _append_text(model, variables, state, tokens_BT, length_B)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def append_frame(
    model: VideoLLM,
    variables: dict,
    state: StreamState,
    prefix_BT: jax.Array,
    features_BNW: jax.Array,
) -> StreamState:
    """Appends a frame and the text before it, in one call. One compilation per T.

    ```
    prefix ","  N = 3:    , v v v      the logits kept are those at the last v,
    prefix "\\n["        \\n [ v v v     where silence is decided
    ```

    Args:
      model: per-layer model (`scan=False`).
      variables: its variables.
      state: donated.
      prefix_BT: int32 ids of the interval token, or of the opening of a stream.
      features_BNW: from `encode`, or stored features of the same tower.
    """
    B, T = prefix_BT.shape
    N = model.config.tokens_per_frame
    return append(
        model,
        variables,
        state,
        jnp.pad(prefix_BT, ((0, 0), (0, N))),
        jnp.full((B,), T + N, jnp.int32),
        features_BNW[:, None],
        jnp.full((B, 1), T, jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="tokens_per_frame")
def kept_tokens(caches: Caches, frame_positions_F: jax.Array, tokens_per_frame: int) -> jax.Array:
    """Which tokens of a stream's frames every layer computed, as its cache remembers.

    ```
    position of a cache   0 1 2 3 7 9 EMPTY      a routed layer: text at 0 and 7
    frames at 1 and 8, N = 4                     x x x .   . x . .
    ```

    Args:
      caches: of one stream.
      frame_positions_F: int32 stream position of every frame's first token.
      tokens_per_frame: N.

    Returns:
      bool [L, F, N].
    """
    position_FN = frame_positions_F[:, None] + jnp.arange(tokens_per_frame)

    def holds(position_C: jax.Array) -> jax.Array:
        # A layer that computes no vision tokens may have no slots at all.
        slot_FN = jnp.searchsorted(position_C, position_FN)
        return jnp.append(position_C, EMPTY)[slot_FN] == position_FN

    return jnp.stack([holds(cache.position_BC[0]) for cache in caches])


def _generate(
    model, variables, state, answers_B, key_data_BK, *, eos_id, max_new_tokens, temperature
):
    def choose(logits_BV, index):
        if temperature == 0:
            return jnp.argmax(logits_BV, axis=-1)
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(
            jax.random.wrap_key_data(key_data_BK), index
        )
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV / temperature)

    def unfinished(carry):
        _, _, _, index, answers_B = carry
        return (index < max_new_tokens) & jnp.any(answers_B)

    def step(carry):
        state, tokens_BT, length_B, index, answers_B = carry
        grows_B = answers_B.astype(jnp.int32)
        token_B = jnp.where(index == max_new_tokens - 1, eos_id, choose(state.logits_BV, index))
        token_B = token_B.astype(jnp.int32) * grows_B
        tokens_BT = tokens_BT.at[:, index].set(token_B)
        state = _append_text(model, variables, state, token_B[:, None], grows_B)
        return state, tokens_BT, length_B + grows_B, index + 1, answers_B & (token_B != eos_id)

    B = answers_B.shape[0]
    tokens_BT, length_B = jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros((B,), jnp.int32)
    state, tokens_BT, length_B, _, _ = jax.lax.while_loop(
        unfinished, step, (state, tokens_BT, length_B, jnp.int32(0), answers_B)
    )
    return state, tokens_BT, length_B


_GENERATION = {
    "static_argnames": ("model", "eos_id", "max_new_tokens", "temperature"),
    "donate_argnames": "state",
}


@functools.partial(jax.jit, **_GENERATION)
def generate(
    model: VideoLLM,
    variables: dict,
    state: StreamState,
    *,
    eos_id: int,
    max_new_tokens: int,
    temperature: float,
) -> tuple[StreamState, jax.Array, jax.Array]:
    """Answers in all streams, with random numbers from the key of the state.

    Arguments and results are those of `generate_rows`.
    """
    B = state.position_B.shape[0]
    keys = jax.random.split(jax.random.wrap_key_data(state.key_data), B + 1)
    return _generate(
        model,
        variables,
        state.replace(key_data=jax.random.key_data(keys[0])),
        jnp.ones((B,), bool),
        jax.random.key_data(keys[1:]),
        eos_id=eos_id,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


@functools.partial(jax.jit, **_GENERATION)
def generate_rows(
    model: VideoLLM,
    variables: dict,
    state: StreamState,
    answers_B: jax.Array,
    key_data_BK: jax.Array | None,
    *,
    eos_id: int,
    max_new_tokens: int,
    temperature: float,
) -> tuple[StreamState, jax.Array, jax.Array]:
    """Answers: one compiled loop that chooses from the last logits and appends, until eos.

    The tokens of an answer and its eos end up in the caches, so that the history reads as a
    training example does. An answer of `max_new_tokens - 1` tokens is closed with eos for the same
    reason.

    ```
    answers_B   True    A x y e 0 0 0 0    length 4      e: eos
                False   0 0 0 0 0 0 0 0    length 0      the stream is left as it was
                True    B e 0 0 0 0 0 0    length 2
    ```

    Args:
      model: per-layer model (`scan=False`).
      variables: its variables.
      state: donated; the streams that answer have seen their prompts up to "Assistant:".
      answers_B: bool, which streams answer.
      key_data_BK: uint32, data of a random key per stream, so that what is drawn in one does not
        depend on the others; None if temperature is 0.
      eos_id: id of the token that ends an answer.
      max_new_tokens: T, longest answer with its eos.
      temperature: 0 takes the most likely token; otherwise logits are divided by it.

    Returns:
      The new state; tokens_BT int32, eos included and 0 behind it; length_B int32, eos included.
    """
    return _generate(
        model,
        variables,
        state,
        answers_B,
        key_data_BK,
        eos_id=eos_id,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
