"""How variants take turns, and what is made of their times."""

import jax
import pytest

from videollm_mod_jax.benchmarking import device
from videollm_mod_jax.benchmarking.timing import Timing, measure


def test_variants_take_turns_and_warm_up_calls_are_not_timed():
    now, calls = [0.0], []

    def step(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return run

    timings = measure(
        {"A": step("A", 2.0), "B": step("B", 0.5)}, rounds=3, warmup=2, clock=lambda: now[0]
    )
    assert calls == ["A", "B"] * 5
    assert list(timings) == ["A", "B"]
    assert timings["A"].seconds == (2.0, 2.0, 2.0)
    assert timings["B"].seconds == (0.5, 0.5, 0.5)


def test_a_call_ends_when_its_arrays_are_ready(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    measure({"A": lambda: "result"}, rounds=1, warmup=1)
    assert waited == ["result"] * 2


def test_median_and_quartiles_are_of_all_rounds():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 30.0))
    assert timing.to_dict() == {"median": 4.0, "spread": 3.0, "seconds": [5.0, 1.0, 2.0, 4.0, 30.0]}


def test_a_device_is_named_with_what_belongs_to_it():
    here = device.describe()
    assert here["platform"] == "cpu"
    assert here["versions"]["jax"] == jax.__version__
    assert device.name(here).endswith(" cores")
    gpu = {"platform": "gpu", "kind": "NVIDIA H200", "count": 1, "host_cores": 16}
    assert device.name(gpu) == "NVIDIA H200"
    assert device.name(gpu | {"count": 2}) == "2 x NVIDIA H200"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_a_clock_that_stands_at_one_second_is_the_work_itself(dtype, monkeypatch):
    calls = {}

    def one_second(variants, rounds, warmup):
        calls.update({name: step() for name, step in variants.items()})
        return {name: Timing((1.0, 2.0)) for name in variants}

    monkeypatch.setattr(device, "measure", one_second)
    peaks = device.measured_peaks(dtype)
    # Four products of square matrices of 1536, and four reads of a matrix of 6144 x 6144.
    assert peaks.flops == 4 * 2 * 1536**3
    assert peaks.bandwidth == 4 * 6144**2 * (2 if dtype == "bfloat16" else 4)
    assert all(bool(jax.numpy.isfinite(value).all()) for value in calls.values())
