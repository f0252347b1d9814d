"""A stream equals the one-shot forward, stores what it should, and compiles once."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from videollm_mod_jax.models import (
    EMPTY,
    VideoLLM,
    VideoLLMConfig,
    config_plan,
    early_exit,
    full_computation,
    init_variables,
    layer_skip,
    trim_caches,
)
from videollm_mod_jax.models.flops import kv_cache_bytes
from videollm_mod_jax.streaming import engine

N, W, V = tiny.CONFIG.tokens_per_frame, tiny.CONFIG.vision.width, tiny.CONFIG.decoder.vocab_size
OPEN, INTERVAL, EOS = (7, 8), 9, 3
MAX_TEXT, MAX_FRAMES = 64, 6


def build(config: VideoLLMConfig):
    """A model with random weights of useful size everywhere, routers and biases included."""
    model = VideoLLM(config)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return jnp.asarray(1 + 0.1 * noise)
        return jnp.asarray(noise * (leaf.shape[0] ** -0.5 if leaf.shape else 1.0))

    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    return model, jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def interleaved_model():
    return build(tiny.CONFIG)


RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(1, MAX_FRAMES, N, W)).astype(np.float32)
SYSTEM = RNG.integers(10, V, 5).tolist()
ANSWERS = [RNG.integers(10, V, 3).tolist(), RNG.integers(10, V, 4).tolist()]
# Two frames and an answer, twice: a list of (text ids before a frame) and text chunks.
SCRIPT = [
    ("text", SYSTEM),
    ("frame", list(OPEN)),
    ("frame", [INTERVAL]),
    ("text", ANSWERS[0]),
    ("frame", list(OPEN)),
    ("frame", [INTERVAL]),
    ("text", ANSWERS[1]),
]


def forward(model, variables, tokens_BS, features_BFNW, starts_BF):
    positions_BJ = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None]
    return model.apply(variables, tokens_BS, features_BFNW, starts_BF, positions_BJ).logits_BJV


jitted_forward = jax.jit(forward, static_argnums=0)


def one_shot(model, variables, script=SCRIPT, forward=jitted_forward):
    """One forward without caches, as in training: logits at every real token, [length, V]."""
    tokens, starts = [], []
    for kind, ids in script:
        tokens += ids
        if kind == "frame":
            starts.append(len(tokens))
            tokens += [0] * N
    length, used = len(tokens), len(starts)
    S = MAX_TEXT + MAX_FRAMES * N
    starts += [S - N * (MAX_FRAMES - f) for f in range(used, MAX_FRAMES)]
    tokens += [0] * (S - length)
    features = FEATURES.copy()
    features[:, used:] = 0
    arrays = np.array([tokens], np.int32), features, np.array([starts], np.int32)
    return np.asarray(forward(model, variables, *arrays)[0, :length])


def stream(
    model,
    variables,
    script=SCRIPT,
    pad=engine.bucket,
    append_text=engine.append_text,
    append_frame=engine.append_frame,
):
    """The same through the engine: the state, and the logits behind every chunk with its index."""
    state = engine.start(model, 1, MAX_TEXT, MAX_FRAMES, seed=0)
    frame, logits = 0, []
    for kind, ids in script:
        if kind == "text":
            tokens = np.zeros((1, pad(len(ids))), np.int32)
            tokens[0, : len(ids)] = ids
            length = np.array([len(ids)], np.int32)
            state = append_text(model, variables, state, tokens, length)
        else:
            prefix = np.array([ids], np.int32)
            state = append_frame(model, variables, state, prefix, FEATURES[:, frame])
            frame += 1
        logits.append((int(state.position_B[0]) - 1, np.asarray(state.logits_BV[0])))
    return state, logits


CONFIGS = {
    "-".join(map(str, names)): tiny.routed(
        insertion=names[0], selection=names[1], weighting=names[2]
    )
    for names in itertools.product(
        ("interleaved", "all", "all-deep", "interleaved-deep", (2,)),
        ("learned", "uniform", "random"),
        ("paper", "official", "tanh1", "relative", "none"),
    )
}
BASELINES = {
    "full": dataclasses.replace(tiny.CONFIG, routing=full_computation()),
    "early_exit": dataclasses.replace(tiny.CONFIG, routing=early_exit(2, 4)),
    "layer_skip": dataclasses.replace(tiny.CONFIG, routing=layer_skip()),
    "schedule": tiny.routed(insertion="all", keep_ratio=(1.0, 0.6, 0.4, 0.2)),
    "force_keep_last": tiny.routed(force_keep_last=True),
}


def assert_stream_equals_one_shot(config, forward, **appends):
    model, variables = build(config)
    script = SCRIPT[:5]
    expected = one_shot(model, variables, script, forward=forward)
    state, logits = stream(model, variables, script, **appends)
    for index, row in logits:
        np.testing.assert_allclose(row, expected[index], rtol=0, atol=1e-5)
    text = sum(len(ids) for _, ids in script)
    kept = [N if spec.keep is None else spec.keep for spec in config_plan(config)]
    np.testing.assert_array_equal(state.entries_LB[:, 0], [text + 3 * k for k in kept])


@pytest.mark.parametrize("name", CONFIGS)
def test_streaming_frame_by_frame_equals_the_one_shot_forward(name):
    # Not jitted: compiling four calls for each of sixty models would take minutes.
    assert_stream_equals_one_shot(
        CONFIGS[name],
        forward,
        pad=lambda length: len(OPEN) + N,  # few shapes: each operation is compiled once per shape
        append_text=engine.append_text.__wrapped__,
        append_frame=engine.append_frame.__wrapped__,
    )


@pytest.mark.parametrize("name", BASELINES)
def test_streaming_a_baseline_equals_the_one_shot_forward(name):
    assert_stream_equals_one_shot(BASELINES[name], jitted_forward)


def test_trimming_leaves_no_later_position_in_any_layer(interleaved_model):
    model, variables = interleaved_model
    state, _ = stream(model, variables)
    limit = len(SYSTEM) + len(OPEN) + N + 1 + 2  # two tokens into the second frame
    before = [np.asarray(cache.position_BC) for cache in state.caches]
    after = [np.asarray(c.position_BC) for c in trim_caches(state.caches, jnp.array([limit]))]
    for old, new in zip(before, after, strict=True):
        assert (old[old != EMPTY] >= limit).any()
        np.testing.assert_array_equal(new[new != EMPTY], old[old < limit])


def test_trimmed_caches_go_on_as_if_nothing_had_followed(interleaved_model):
    model, variables = interleaved_model
    whole, _ = stream(model, variables)
    short, _ = stream(model, variables, SCRIPT[:3])
    limit = short.position_B.copy()
    rewound = whole.replace(caches=trim_caches(whole.caches, limit), position_B=limit)
    prefix = np.array([[INTERVAL]], np.int32)
    a = engine.append_frame(model, variables, rewound, prefix, FEATURES[:, 2])
    b = engine.append_frame(model, variables, short, prefix, FEATURES[:, 2])
    np.testing.assert_allclose(a.logits_BV, b.logits_BV, rtol=0, atol=1e-6)


def test_padding_of_text_changes_nothing(interleaved_model):
    model, variables = interleaved_model
    exact, exact_logits = stream(model, variables, pad=lambda length: length)
    padded, padded_logits = stream(model, variables, pad=lambda length: 24)
    for (index, row), (padded_index, padded_row) in zip(exact_logits, padded_logits, strict=True):
        assert index == padded_index
        # Other shapes sum in another order: float32 agrees to 1e-5, not bit by bit.
        np.testing.assert_allclose(row, padded_row, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(exact.entries_LB, padded.entries_LB)


def greedy_by_one_shot(model, variables, script, max_new_tokens):
    """Greedy decoding that runs the whole sequence anew for every token."""
    answer = []
    while not answer or answer[-1] != EOS:
        logits = one_shot(model, variables, [*script, ("text", answer)])[-1]
        is_last = len(answer) == max_new_tokens - 1
        answer.append(EOS if is_last else int(np.argmax(logits)))
    return answer


def prefer_eos(variables, bias):
    """Raises the eos logit of every token by `bias`, as far as the constant part of norms goes."""
    kernel = variables["params"]["lm_head"]["kernel"]
    hidden = np.random.default_rng(5).normal(size=kernel.shape[0]).astype(np.float32)
    kernel = kernel.at[:, EOS].add(bias * hidden)
    return {**variables, "params": {**variables["params"], "lm_head": {"kernel": kernel}}}


def test_generation_equals_greedy_decoding_by_the_one_shot_forward(interleaved_model):
    model, plain = interleaved_model
    prompts = [SCRIPT[:3], SCRIPT[:4], SCRIPT]
    lengths = set()
    for variables, script in itertools.product([plain, prefer_eos(plain, 1.0)], prompts):
        expected = greedy_by_one_shot(model, variables, script, 6)
        state, _ = stream(model, variables, script)
        position = int(state.position_B[0])
        state, tokens, length = engine.generate(
            model, variables, state, eos_id=EOS, max_new_tokens=6, temperature=0.0
        )
        lengths.add(int(length[0]))
        assert tokens[0, : length[0]].tolist() == expected
        assert not tokens[0, length[0] :].any()
        # The answer and its eos are history now: the next frame sees them.
        assert int(state.position_B[0]) == position + len(expected)
        frames = sum(kind == "frame" for kind, _ in script)
        prefix = np.array([OPEN], np.int32)
        state = engine.append_frame(model, variables, state, prefix, FEATURES[:, frames])
        history = [*script, ("text", expected), ("frame", list(OPEN))]
        expected_logits = one_shot(model, variables, history)[-1]
        np.testing.assert_allclose(state.logits_BV[0], expected_logits, rtol=0, atol=1e-5)
    assert len(lengths) > 1  # both an answer that ended by itself and one that was cut


def test_streams_of_a_batch_do_not_disturb_each_other(interleaved_model):
    model, plain = interleaved_model
    variables = prefer_eos(plain, 1.0)
    rng = np.random.default_rng(0)
    texts = [rng.integers(10, V, n).tolist() for n in (5, 2, 4, 8)]

    def answer(rows):
        state = engine.start(model, len(rows), MAX_TEXT, MAX_FRAMES, seed=0)
        tokens = np.zeros((len(rows), 8), np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        lengths = np.array([len(ids) for ids in rows], np.int32)
        state = engine.append_text(model, variables, state, tokens, lengths)
        _, tokens, lengths = engine.generate(
            model, variables, state, eos_id=EOS, max_new_tokens=6, temperature=0.0
        )
        return [row[:n].tolist() for row, n in zip(np.asarray(tokens), lengths, strict=True)]

    together = answer(texts)
    assert together == [answer([ids])[0] for ids in texts]
    assert len({len(ids) for ids in together}) > 1


def test_temperature_samples_by_the_seed(interleaved_model):
    model, variables = interleaved_model

    def sample(seed, temperature):
        state = engine.start(model, 1, MAX_TEXT, MAX_FRAMES, seed=seed)
        state = engine.append_text(model, variables, state, *engine.pad_text(SYSTEM))
        _, tokens, _ = engine.generate(
            model, variables, state, eos_id=EOS, max_new_tokens=8, temperature=temperature
        )
        return tuple(tokens[0].tolist())

    assert sample(0, 1.0) == sample(0, 1.0)
    assert len({sample(seed, 1.0) for seed in range(4)}) > 1
    assert sample(0, 1e-6) == sample(1, 0.0)


def test_state_is_donated_and_nothing_is_compiled_again(interleaved_model):
    model, variables = interleaved_model
    stream(model, variables)
    functions = (engine.append_text, engine.append_frame)
    compiled = [function._cache_size() for function in functions]
    state, _ = stream(model, variables)
    state, _ = stream(
        model, variables, [("text", SYSTEM[:1]), ("frame", [INTERVAL]), ("text", SYSTEM)]
    )
    assert [function._cache_size() for function in functions] == compiled
    old = state.caches[0].k_BGCE
    pointer = old.unsafe_buffer_pointer()
    state = engine.append_text(model, variables, state, *engine.pad_text([4]))
    assert old.is_deleted()
    assert state.caches[0].k_BGCE.unsafe_buffer_pointer() == pointer


def test_the_caches_hold_the_bytes_that_are_counted():
    config = tiny.CONFIG
    caches = engine.start(VideoLLM(config), 1, 7, 3, seed=0).caches
    kept = 2 * N + 2 * 2  # two dense layers, two that keep ceil(0.4 * 5)
    counted = kv_cache_bytes(config, 3, 7, config.dtype)
    assert counted == (4 * 7 + 3 * kept) * 2 * 2 * 8 * 4  # k and v, 2 heads, width 8, float32
    assert sum(cache.k_BGCE.nbytes + cache.v_BGCE.nbytes for cache in caches) == counted


def test_buckets_are_powers_of_two():
    assert [engine.bucket(n) for n in (1, 16, 17, 32, 33, 64, 65)] == [16, 16, 32, 32, 64, 64, 128]
    tokens, length = engine.pad_text([5, 6])
    assert tokens.shape == (1, 16)
    assert tokens[0, :3].tolist() == [5, 6, 0]
    assert length.tolist() == [2]
