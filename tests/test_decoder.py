"""Properties of the decoder, each against an independent path."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference, tiny
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import (
    Execution,
    LoraConfig,
    VideoLLM,
    config_plan,
    full_computation,
    init_variables,
    merge_lora,
    stack_layers,
    unstack_layers,
)
from videollm_mod_jax.models.config import RopeScaling
from videollm_mod_jax.models.rope import rope_frequencies

INSERTIONS = ("interleaved", "all", "all-deep", "interleaved-deep", (0, 2))
SELECTIONS = ("learned", "uniform", "random")
WEIGHTINGS = ("paper", "official", "tanh1", "relative", "none")
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.0, targets=("q", "v", "gate", "down", "lm_head"))


def run(config, variables, batch, **execution):
    return jax.jit(VideoLLM(config, Execution(**execution)).apply)(variables, **batch)


@functools.lru_cache
def prepared(decoder=tiny.DECODER):
    """Variables that fit every plan and weighting: a router with a bias in each layer, adapters."""
    config = tiny.routed(insertion="all", weighting="official")
    config = dataclasses.replace(config, decoder=decoder, lora=LORA)
    return tiny.spread(init_variables(VideoLLM(config), jax.random.key(0)))


def example(batch, b):
    return batch["tokens_BS"][b], batch["features_BFNW"][b], batch["frame_starts_BF"][b]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("insertion", INSERTIONS, ids=str)
def test_compact_equals_masked_dense(insertion, selection, weighting):
    force = weighting == "tanh1"
    config = tiny.routed(
        insertion=insertion, selection=selection, weighting=weighting, force_keep_last=force
    )
    variables, batch, N = prepared(), tiny.batch(1, text=6, frames=3), config.tokens_per_frame
    out = run(config, variables, batch)
    plan = config_plan(config)
    for b in range(2):
        starts = np.asarray(batch["frame_starts_BF"][b])

        def choose(layer, x, router, b=b, starts=starts):
            keep = plan[layer].keep
            if keep is None:
                return None
            if selection == "random":  # the draw itself is tested in test_routing.py
                return set((starts[:, None] + np.asarray(out.kept[layer][b])).ravel())
            if selection == "uniform":
                scores = np.zeros(len(x))
                for start, j in itertools.product(starts, range(keep)):
                    scores[start + j * N // keep] = 1.0
            else:
                scores = reference.router_scores(config, x, router)
            return reference.selected(config, scores, starts, keep)

        expected = reference.forward(config, variables["params"], example(batch, b), choose)
        np.testing.assert_allclose(out.logits_BJV[b], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep_ratio", [0.0, (0.2, 0.4, 0.6, 1.0)], ids=str)
def test_no_tokens_and_a_schedule_of_ratios_equal_masked_dense(keep_ratio):
    config = tiny.routed(insertion="all", keep_ratio=keep_ratio)
    variables, batch = prepared(), tiny.batch(2, text=5, frames=2)
    out = run(config, variables, batch)
    starts = np.asarray(batch["frame_starts_BF"][0])

    def choose(layer, x, router):
        keep = config_plan(config)[layer].keep
        return reference.selected(config, x @ router["kernel"], starts, keep)

    expected = reference.forward(config, variables["params"], example(batch, 0), choose)
    np.testing.assert_allclose(out.logits_BJV[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("insertion", INSERTIONS, ids=str)
def test_keeping_all_without_weighting_equals_the_dense_model(insertion):
    config = tiny.routed(insertion=insertion, keep_ratio=1.0, weighting="none")
    dense = dataclasses.replace(tiny.CONFIG, routing=full_computation())
    variables, batch = prepared(), tiny.batch(3, text=6, frames=3)
    assert not any(
        "router" in layer
        for layer in init_variables(VideoLLM(dense), jax.random.key(0))["params"][
            "decoder"
        ].values()
    )
    np.testing.assert_allclose(
        run(config, variables, batch).logits_BJV,
        run(dense, variables, batch).logits_BJV,
        atol=1e-6,
        rtol=1e-6,
    )


def test_a_tanh1_router_starts_as_the_pretrained_block():
    config = tiny.routed(weighting="tanh1")
    variables, batch = init_variables(VideoLLM(config), jax.random.key(0)), tiny.batch(4, 6, 3)
    unweighted = tiny.routed(weighting="none")
    kept = [np.asarray(k) for k in run(config, variables, batch).kept if k is not None]
    assert all((k == [0, 1]).all() for k in kept)
    np.testing.assert_array_equal(
        run(config, variables, batch).logits_BJV, run(unweighted, variables, batch).logits_BJV
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_later_frame_changes_nothing_before_it(weighting):
    config = tiny.routed(insertion="all-deep", weighting=weighting)
    variables, batch = prepared(), tiny.batch(5, text=6, frames=4)
    start = batch["frame_starts_BF"][:, 2]
    before_BS = jnp.arange(batch["tokens_BS"].shape[1]) < start[:, None]

    @jax.jit
    def gradients(features):
        def total(mask_BS):
            def f(features):
                arguments = batch | {"features_BFNW": features}
                logits = VideoLLM(config).apply(variables, **arguments).logits_BJV
                return jnp.sum(mask_BS[..., None] * logits**2)

            return jax.grad(f)(features)

        return total(before_BS), total(~before_BS)

    earlier, later = gradients(batch["features_BFNW"])
    np.testing.assert_array_equal(earlier[:, 2:], 0.0)
    assert np.abs(earlier[:, :2]).max() > 0
    assert (np.abs(later[:, 2:]).max(axis=(2, 3)) > 0).all()


@pytest.mark.parametrize("insertion", ["interleaved", "interleaved-deep"])
@pytest.mark.parametrize("remat", [False, True])
def test_scan_equals_loop_forward_and_backward(insertion, remat):
    config = dataclasses.replace(tiny.routed(insertion=insertion, selection="random"), lora=LORA)
    variables, batch, plan = prepared(), tiny.batch(6, 5, 3), config_plan(config)

    def loss(variables, scan, remat):
        logits = (
            VideoLLM(config, Execution(scan=scan, remat=remat)).apply(variables, **batch).logits_BJV
        )
        return jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    loop, loop_gradient = gradient(variables, False, False)
    scan, scan_gradient = gradient(stack_layers(variables, plan), True, remat)
    np.testing.assert_allclose(loop, scan, rtol=1e-6)

    def close(a, b):
        # Both sum up in their own order, so the sums as a whole are near, not every small one.
        np.testing.assert_array_less(np.linalg.norm(a - b), 1e-5 * np.linalg.norm(b) + 1e-12)

    jax.tree.map(close, loop_gradient, unstack_layers(scan_gradient, plan))
    kept = [
        run(config, v, batch, scan=s).kept
        for v, s in ((variables, False), (stack_layers(variables, plan), True))
    ]
    jax.tree.map(np.testing.assert_array_equal, kept[0], kept[1])


def test_padding_neighbours_and_sequence_length_change_nothing():
    config = tiny.CONFIG
    variables, batch = prepared(), tiny.batch(7, text=6, frames=3)
    N, S = config.tokens_per_frame, batch["tokens_BS"].shape[1]
    short = run(config, variables, jax.tree.map(lambda x: x[:1], batch)).logits_BJV
    more_text, more_frames = 3, 2
    tail = S + N * np.arange(more_frames) + np.array([1, 3])  # text, frame, text text, frame
    padded = {
        "tokens_BS": jnp.pad(
            batch["tokens_BS"], ((0, 0), (0, more_text + more_frames * N)), constant_values=7
        ),
        "features_BFNW": jnp.pad(
            batch["features_BFNW"], ((0, 0), (0, more_frames), (0, 0), (0, 0)), constant_values=2
        ),
        "frame_starts_BF": jnp.concatenate(
            [batch["frame_starts_BF"], jnp.tile(jnp.asarray(tail), (2, 1))], axis=1
        ),
        "logit_positions_BJ": batch["logit_positions_BJ"],
    }
    long = run(config, variables, padded).logits_BJV
    # Other shapes sum in another order, so float32 agrees to 1e-5 and not bit by bit.
    np.testing.assert_allclose(long[:1], short, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_router_learns_exactly_where_it_weights(weighting):
    config = tiny.routed(insertion="all", weighting=weighting)
    variables, batch = prepared(), tiny.batch(8, text=6, frames=3)

    @jax.jit
    def gradient(variables):
        def loss(variables):
            return jnp.mean(VideoLLM(config).apply(variables, **batch).logits_BJV ** 2)

        return jax.grad(loss)(variables)

    layers = gradient(variables)["params"]["decoder"]
    sizes = [np.abs(layers[f"layer_{i}"]["router"]["kernel"]).max() for i in range(3)]
    assert all(size == 0 for size in sizes) if weighting == "none" else min(sizes) > 1e-6


@pytest.mark.parametrize(("weighting", "learns"), [("tanh1", False), ("relative", True)])
def test_a_relative_router_learns_from_who_reads_a_token(weighting, learns):
    """Behind the last layer only text is judged: a kept token's own update reaches nothing."""
    last = tiny.DECODER.num_layers - 1
    config = tiny.routed(insertion=(last,), weighting=weighting)
    batch = tiny.batch(8, text=6, frames=3, batch_size=1)
    S, (starts_F,) = batch["tokens_BS"].shape[1], np.asarray(batch["frame_starts_BF"])
    text = np.flatnonzero(~reference.vision_mask(config, S, starts_F))
    batch["logit_positions_BJ"] = jnp.asarray(text[None])

    @jax.jit
    def gradient(variables):
        def loss(variables):
            return jnp.mean(VideoLLM(config).apply(variables, **batch).logits_BJV ** 2)

        return jax.grad(loss)(variables)

    kernel = gradient(prepared())["params"]["decoder"][f"layer_{last}"]["router"]["kernel"]
    assert (np.abs(kernel).max() > 1e-6) == learns


def test_rank_zero_equals_the_base_and_merging_changes_nothing():
    config = dataclasses.replace(tiny.CONFIG, lora=LORA)
    variables, batch = prepared(), tiny.batch(9, text=5, frames=2)
    base = {"params": variables["params"]}
    adapted = run(config, variables, batch).logits_BJV
    rank_zero = dataclasses.replace(config, lora=dataclasses.replace(LORA, rank=0))
    plain = run(tiny.CONFIG, base, batch).logits_BJV
    np.testing.assert_array_equal(run(rank_zero, base, batch).logits_BJV, plain)
    assert "lora" not in init_variables(VideoLLM(rank_zero), jax.random.key(0))
    assert np.abs(adapted - plain).max() > 0.1
    merged = run(tiny.CONFIG, merge_lora(variables, LORA), batch).logits_BJV
    np.testing.assert_allclose(merged, adapted, atol=2e-5)
    stacked = stack_layers(variables, config_plan(config))
    merged = unstack_layers(merge_lora(stacked, LORA), config_plan(config))
    np.testing.assert_allclose(run(tiny.CONFIG, merged, batch).logits_BJV, adapted, atol=2e-5)


def test_fresh_adapters_change_nothing():
    config = dataclasses.replace(tiny.CONFIG, lora=LORA)
    variables = init_variables(VideoLLM(config), jax.random.key(0))
    batch = tiny.batch(9, text=5, frames=2)
    np.testing.assert_array_equal(
        run(config, variables, batch).logits_BJV,
        run(tiny.CONFIG, {"params": variables["params"]}, batch).logits_BJV,
    )


def test_only_training_explores_and_anew_in_every_layer_and_step():
    config = tiny.routed(insertion="all-deep", exploration=1.0)
    variables, batch = prepared(), tiny.batch(9, text=5, frames=40)
    stacked = stack_layers(variables, config_plan(config))

    def kept(config, **options):
        apply = jax.jit(VideoLLM(config, Execution(scan=True, remat=True)).apply)
        return [
            offsets for offsets in apply(stacked, **batch, **options).kept if offsets is not None
        ]

    learned = kept(tiny.routed(insertion="all-deep"))
    jax.tree.map(np.testing.assert_array_equal, kept(config), learned)
    steps = [kept(config, rngs={"dropout": jax.random.key(i)}) for i in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, steps[0], steps[1])
    for drawn, other in ((steps[0], learned), (steps[0], steps[2]), (steps[0], steps[0][::-1])):
        assert all(np.any(a != b) for a, b in zip(drawn, other, strict=True))


def test_dropout_acts_on_adapters_and_only_with_a_dropout_key():
    lora = dataclasses.replace(LORA, dropout=0.5)
    config = dataclasses.replace(tiny.CONFIG, lora=lora)
    variables, batch = prepared(), tiny.batch(9, text=5, frames=2)
    stacked = stack_layers(variables, config_plan(config))
    apply = jax.jit(VideoLLM(config, Execution(scan=True, remat=True)).apply)
    quiet = apply(stacked, **batch).logits_BJV
    np.testing.assert_allclose(quiet, run(config, variables, batch).logits_BJV, atol=1e-5)
    noisy = [
        apply(stacked, **batch, rngs={"dropout": jax.random.key(i)}).logits_BJV for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - noisy[2]).max() > 1e-3
    assert np.abs(noisy[0] - quiet).max() > 1e-3


def test_a_tied_head_is_the_transposed_embedding_and_refuses_to_be_merged():
    decoder = dataclasses.replace(tiny.DECODER, tie_embeddings=True, qkv_bias=True)
    config = dataclasses.replace(tiny.CONFIG, decoder=decoder, routing=full_computation())
    variables, batch = prepared(decoder), tiny.batch(10, text=5, frames=2)
    assert "lm_head" not in variables["params"]
    for i in range(4):
        attention = variables["params"]["decoder"][f"layer_{i}"]["block"]["attention"]
        attention["q"]["bias"] = jnp.linspace(-1, 1, 32)
    expected = reference.forward(config, variables["params"], example(batch, 0), lambda *_: None)
    out = run(config, variables, batch).logits_BJV
    np.testing.assert_allclose(out[0], expected, atol=1e-5, rtol=1e-5)
    adapted = init_variables(VideoLLM(dataclasses.replace(config, lora=LORA)), jax.random.key(0))
    with pytest.raises(UserError, match="tied output head"):
        merge_lora(adapted, LORA)


def test_bfloat16_compute_stays_near_float32():
    # Uniform selection: a learned one may keep other tokens where rounding reorders scores.
    config = tiny.routed(selection="uniform")
    variables, batch = prepared(), tiny.batch(11, text=5, frames=2)
    low = run(dataclasses.replace(config, dtype="bfloat16"), variables, batch).logits_BJV
    assert low.dtype == jnp.float32
    high = run(config, variables, batch).logits_BJV
    log_p, log_q = jax.nn.log_softmax(high), jax.nn.log_softmax(low)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    assert 0 < float(jnp.mean(divergence)) < 1e-3


def test_linear_rope_scaling_divides_every_frequency():
    scaled = rope_frequencies(16, 10_000.0, RopeScaling(kind="linear", factor=2.5))
    np.testing.assert_allclose(scaled, rope_frequencies(16, 10_000.0, None) / 2.5, rtol=1e-6)


@pytest.mark.parametrize("fields", [{"kind": "linear", "low_freq_factor": 1.0}, {"kind": "llama3"}])
def test_rope_scaling_with_the_fields_of_another_kind_is_refused(fields):
    with pytest.raises(UserError, match=r"rope_scaling\.low_freq_factor is"):
        RopeScaling(factor=2.0, **fields)


def test_llama31_rope_scaling_matches_its_piecewise_definition():
    scaling = RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    plain, scaled = (
        rope_frequencies(128, 500_000.0, None),
        rope_frequencies(128, 500_000.0, scaling),
    )
    for before, after in zip(plain.astype(np.float64), scaled, strict=True):
        wavelength = 2 * np.pi / before
        if wavelength < 8192 / 4:
            expected = before
        elif wavelength > 8192 / 1:
            expected = before / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * before / 8 + smooth * before
        np.testing.assert_allclose(after, expected, rtol=1e-6)
    assert (plain != scaled).any()
