"""`benchmark kernels`: cases compute what they are named for, floors are what they say."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests import tiny, tiny_training
from videollm_mod_jax import cli
from videollm_mod_jax.benchmarking import device, floors, kernel_cases, kernels, report
from videollm_mod_jax.benchmarking.kernel_cases import (
    BLOCK,
    BOTH,
    DENSE,
    FORWARD,
    ROUTED,
    Case,
    Shapes,
)
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.experiment import plain, read_training
from videollm_mod_jax.models import full_computation

MODEL = tiny_training.model_config(rank=2)
TRAINING = tiny_training.training_config(trainable="lora")
SHAPES = Shapes(batch_size=2, frames=3, text_tokens=5, tokens_per_frame=5, keep=2, labels=4)
S, M, D = 5 + 3 * 5, 5 + 3 * 2, 32


def by_name(cases):
    return {(case.name, case.direction): case for case in cases}


def test_shapes_are_those_of_a_microbatch():
    _, data, _ = read_training(plain(cli.read_config("configs/digits.py", [])))
    data = dataclasses.replace(data, frames=3, text_tokens=5, labels=4, batch_size=4)
    training = dataclasses.replace(TRAINING, microbatches=2)
    assert Shapes.of(tiny.CONFIG, data, training) == SHAPES
    assert SHAPES.sides == {"full": S, "mod": M}


@pytest.fixture(scope="module")
def layers():
    return by_name(kernel_cases.layer_cases(MODEL, SHAPES, TRAINING))


def test_layers_compute_the_rows_that_they_are_named_for(layers):
    assert {name: case.rows for (name, _), case in layers.items()} == {
        DENSE: S,
        ROUTED: M,
        BLOCK: M,
    }
    out = {name: np.asarray(case.step()) for (name, way), case in layers.items() if way == FORWARD}
    assert out[DENSE].shape == out[ROUTED].shape == (2, S, D)
    assert out[BLOCK].shape == (2, M, D)
    # A routed layer leaves S - M rows of each sequence as they were.
    x_BSD = np.asarray(jax.random.normal(jax.random.key(0), (2, S, D)))
    unchanged_BS = (out[ROUTED] == x_BSD).all(-1)
    assert unchanged_BS.sum(axis=1).tolist() == [S - M, S - M]
    assert layers[ROUTED, FORWARD].work == layers[BLOCK, FORWARD].work
    assert layers[ROUTED, BOTH].work.flops < layers[DENSE, BOTH].work.flops


def test_backward_reaches_all_inputs_and_what_is_trained(layers):
    out, (gradients,) = layers[ROUTED, BOTH].step()
    np.testing.assert_array_equal(out, layers[ROUTED, FORWARD].step())
    assert gradients["x_BSD"].shape == (2, S, D)
    assert set(gradients["trained"]) == {"lora", "params"}
    assert set(gradients["trained"]["params"]) == {"router"}
    assert np.any(np.asarray(gradients["trained"]["params"]["router"]["kernel"]) != 0)


def test_an_mlp_in_chunks_computes_the_same():
    cases = by_name(kernel_cases.mlp_cases(MODEL, SHAPES, TRAINING, (4, 16)))
    assert {(name, case.rows) for (name, _), case in cases.items()} == {
        ("full, all rows at a time", S),
        ("full, 4 rows at a time", S),
        ("full, 16 rows at a time", S),
        ("mod, all rows at a time", M),
        ("mod, 4 rows at a time", M),
    }
    whole, chunked = (cases[f"mod, {rows} rows at a time", BOTH].step() for rows in ("all", 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), whole, chunked)
    assert set(whole[1][0]["trained"]) == {"lora"}


def test_a_head_in_chunks_computes_the_same_loss():
    cases = by_name(kernel_cases.head_cases(MODEL, SHAPES, TRAINING, (7, 10_000)))
    whole, chunked = (
        cases[f"4 positions, {words} words at a time", BOTH].step() for words in ("all", 7)
    )
    assert len(cases) == 4  # 10 000 words are more than there are
    V = MODEL.decoder.vocab_size
    assert 2 * 4 * 0.5 * np.log(V) < whole[0] < 2 * 4 * 2 * np.log(V)
    assert whole[1][0]["hidden_BJD"].shape == (2, 4, D)
    assert set(whole[1][0]["trained"]) == {"lora"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, chunked
    )


def test_attention_to_a_cache_sees_what_is_filled_and_no_more():
    cases = list(kernel_cases.cached_attention_cases(MODEL, SHAPES, (8, 16)))
    assert [(case.name, case.rows) for case in cases] == [
        ("full, xla, 8 filled", 6),
        ("full, xla, 16 filled", 6),
        ("mod, xla, 8 filled", 3),
        ("mod, xla, 16 filled", 3),
    ]
    assert all(np.isfinite(case.step()).all() for case in cases)


def test_floors_are_what_they_come_to_by_hand():
    forward, both = floors.attention_work(tiny.CONFIG, batch_size=2, rows=3)
    pairs = 2 * (1 + 2 + 3)
    assert forward.flops == 2 * 2 * 4 * 8 * pairs  # 4 heads of width 8
    assert both.flops == 7 * 2 * 4 * 8 * pairs
    # Of each row 4 heads of queries and results, 2 of keys and values, in float32.
    assert forward.activation_bytes == 2 * 3 * (4 + 4 + 2 + 2) * 8 * 4

    # 3 new entries, of which the first sees 6: 6 + 7 + 8 pairs.
    cached = floors.cached_attention_work(tiny.CONFIG, length=8, new=3)
    assert cached.flops == 2 * 2 * 4 * 8 * (6 + 7 + 8)
    assert cached.cache_bytes == 8 * 2 * 2 * 8 * 4

    # gate, up and down of 32 x 48; of them only down has an adapter, of rank 2.
    forward, both = floors.mlp_work(MODEL, batch_size=2, rows=3, trainable="lora")
    assert forward.flops == 2 * 6 * (3 * 32 * 48 + 2 * (32 + 48))
    assert both.flops == 2 * forward.flops + 2 * 6 * 2 * (32 + 48)
    _, both = floors.mlp_work(MODEL, batch_size=2, rows=3, trainable="full")
    assert both.flops == 3 * forward.flops

    V = MODEL.decoder.vocab_size
    forward, both = floors.head_work(MODEL, batch_size=2, labels=4, trainable="lora")
    assert forward.flops == 2 * 8 * (32 * V + 2 * (32 + V))
    assert both.flops == 2 * forward.flops + 2 * 8 * 2 * (32 + V)

    linear = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    forward, both = floors.layer_work(tiny.CONFIG, 2, 3, trainable="full", remat=False)
    assert forward.flops == 2 * (3 * 2 * linear) + 2 * 2 * 4 * 8 * pairs
    assert both.flops == 3 * 2 * (3 * 2 * linear) + 7 * 2 * 4 * 8 * pairs


def test_the_distance_of_a_kernel_from_plain_xla_is_told():
    def case(name, *arrays):
        results = [np.array(a, np.float32) for a in arrays]
        return Case(name=name, direction=FORWARD, rows=1, step=lambda: results, work=None)

    cases = [
        case("full, xla, 8 filled", [3.0, 0], [4.0]),
        case("full, xla, 9 filled", [7.0], [7.0]),
    ]
    cases += [case("full, gpu, 8 filled", [3.0, 0.3], [4.4]), case("full, 8 rows at a time", [1.0])]
    by_name = {(c.name, c.direction): c for c in cases}
    found = [kernels.from_xla(c, by_name) for c in cases]
    assert found[2] == pytest.approx(0.1)
    assert [found[i] for i in (0, 1, 3)] == [None] * 3


def test_overhead_is_what_a_routed_layer_takes_beyond_its_block():
    cases = [
        {"name": name, "direction": way, "median": median}
        for name, way, median in (
            (DENSE, FORWARD, 3.0), (ROUTED, FORWARD, 1.04), (BLOCK, FORWARD, 1.0),
            (DENSE, BOTH, 9.0), (ROUTED, BOTH, 3.6), (BLOCK, BOTH, 3.0),
        )
    ]  # fmt: skip
    overhead = kernels.routing_overhead(cases)
    assert overhead == {FORWARD: pytest.approx(0.04), BOTH: pytest.approx(0.2)}


def measure(model):
    _, data, _ = read_training(plain(cli.read_config("configs/digits.py", [])))
    data = dataclasses.replace(data, frames=3, text_tokens=5, labels=4, batch_size=4)
    return kernels.benchmark_kernels(
        model, data, TRAINING, lengths=(8, 16), rounds=2, warmup=1, announce=lambda text: None
    )


def test_the_result_is_written_with_what_it_depends_on(tmp_path, monkeypatch):
    peaks = device.Peaks(flops=1e9, bandwidth=1e9)
    monkeypatch.setattr(device, "measured_peaks", lambda dtype: peaks)
    report.write(tmp_path, "kernels", measure(MODEL))
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert written["device"]["platform"] == "cpu"
    assert written["shapes"]["text_tokens"] == 5
    for cases in written["parts"].values():
        assert all(len(case["seconds"]) == 2 and case["share_of_floor"] > 0 for case in cases)
    assert [table.title for table in kernels.tables(written)] == [
        *written["parts"],
        "routing, on top of the block",
    ]


def test_a_model_that_routes_nowhere_is_refused():
    with pytest.raises(UserError, match="routes nowhere"):
        measure(dataclasses.replace(MODEL, routing=full_computation()))
