"""`benchmark stream`: filled caches are those of a real stream, floors are what they say."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests import tiny, tiny_training
from videollm_mod_jax import cli
from videollm_mod_jax.benchmarking import device, floors, report, stream_tables, streaming
from videollm_mod_jax.benchmarking.device import Peaks
from videollm_mod_jax.benchmarking.filled import Context, fill, random_variables
from videollm_mod_jax.benchmarking.floors import Work
from videollm_mod_jax.benchmarking.streaming import StreamSettings
from videollm_mod_jax.benchmarking.timing import Timing
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.experiment import plain, read_training
from videollm_mod_jax.models import LoraConfig, VideoLLM, full_computation, init_variables
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.training import hlo

N = tiny.CONFIG.tokens_per_frame
CONTEXT, ROOM = Context(frames=5, text=13), Context(frames=6, text=20)
SETTINGS = StreamSettings(
    minutes=(0.05, 0.1), fps=2.0, streams=(1, 2), new_tokens=3, rounds=2, warmup=1
)
FULL = dataclasses.replace(tiny.CONFIG, routing=full_computation())


def test_random_weights_are_those_of_a_per_layer_model_and_no_two_layers_have_the_same():
    variables = random_variables(tiny.CONFIG)
    wanted = jax.eval_shape(lambda: init_variables(VideoLLM(tiny.CONFIG), jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    )
    layers = [v for k, v in variables["params"]["decoder"].items() if k.startswith("layer_")]
    kernels = [np.asarray(layer["block"]["mlp"]["up"]["kernel"]) for layer in layers]
    assert len(kernels) == tiny.CONFIG.decoder.num_layers
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)


def test_positions_are_those_of_the_drawing():
    context = Context(frames=2, text=3)
    assert context.frame_starts(3).tolist() == [1, 6]
    assert context.positions(3, None).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert context.positions(3, 2).tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert context.positions(3, 0).tolist() == [0, 4, 5]


def really_streamed(model, streams):
    """The state behind the same context, by running it."""
    rng = np.random.default_rng(0)
    variables = tiny_training.variables(model.config)
    state = engine.start(model, streams, ROOM.text, ROOM.frames, seed=0)
    for text in np.diff([0, *CONTEXT.frame_starts(0)]):
        prefix_BT = rng.integers(1, 40, (streams, text)).astype(np.int32)
        features_BNW = rng.normal(size=(streams, N, tiny.VISION.width)).astype(np.float32)
        state = engine.append_frame(model, variables, state, prefix_BT, features_BNW)
    return state


@pytest.mark.parametrize("selection", ["uniform", "learned"])
def test_a_filled_state_is_that_of_a_stream_which_really_ran(selection):
    model = VideoLLM(tiny.routed(selection=selection))
    ran, filled = really_streamed(model, 2), fill(model, CONTEXT, ROOM, batch_size=2, seed=0)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (ran, filled)]
    assert shapes[0] == shapes[1]
    np.testing.assert_array_equal(ran.entries_LB, filled.entries_LB)
    np.testing.assert_array_equal(ran.position_B, filled.position_B)
    for there, here in zip(ran.caches, filled.caches, strict=True):
        if selection == "uniform":
            np.testing.assert_array_equal(there.position_BC, here.position_BC)
        # Contents as well: free slots are empty, filled ones are not.
        for name in ("k_BGCE", "v_BGCE"):
            used = [np.any(np.asarray(getattr(x, name)) != 0, axis=-1) for x in (there, here)]
            np.testing.assert_array_equal(*used)


def test_a_filled_stream_goes_on_like_any_other():
    model = VideoLLM(tiny.CONFIG)
    variables = tiny_training.variables(model.config)
    state = fill(model, CONTEXT, ROOM, batch_size=1, seed=0)
    before = np.asarray(state.entries_LB)
    features_BNW = np.ones((1, N, tiny.VISION.width), np.float32)
    state = engine.append_frame(model, variables, state, np.ones((1, 1), np.int32), features_BNW)
    kept = 2  # ceil(0.4 * 5)
    assert (np.asarray(state.entries_LB) - before)[:, 0].tolist() == [6, 1 + kept, 6, 1 + kept]
    assert np.isfinite(state.logits_BV).all()


def test_the_floor_of_a_step_is_what_it_comes_to_by_hand():
    # 4 layers of width 32: q 32x32, k and v 32x16, o 32x32, three of 32x48; 48 words, features 12.
    linear = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    norms, head, connector = 2 * 32, 32 * 48, 12 * 32 + 32 * 32
    frame = floors.append_work(FULL, Context(10, 30), streams=3, frames=1, text=1)
    pairs = 6 * (30 + 10 * 5) + 6 * 7 // 2
    macs = 4 * (6 * linear + 2 * 32 * pairs) + head + 5 * connector
    assert frame.flops == 3 * 2 * macs
    weights = 4 * (linear + norms) + 32 + head + connector + 2 * 32
    assert frame.weight_bytes == 4 * weights
    entry = 2 * 2 * 8 * 4  # k and v, 2 heads, width 8, float32
    assert frame.cache_bytes == 3 * entry * 4 * (30 + 10 * 5 + 6)

    token = floors.append_work(FULL, Context(10, 30), streams=3, frames=0, text=1)
    assert token.flops == 3 * 2 * (4 * (linear + 2 * 32 * 81) + head)
    assert token.weight_bytes == 4 * (weights - connector - 2 * 32)
    assert token.cache_bytes == 3 * entry * 4 * (30 + 10 * 5 + 1)

    routed = floors.append_work(tiny.CONFIG, Context(10, 30), streams=3, frames=1, text=1)
    assert routed.weight_bytes == frame.weight_bytes + 4 * 2 * 32  # two routers
    assert routed.cache_bytes == 3 * entry * (2 * (30 + 50 + 6) + 2 * (30 + 20 + 3))


def test_a_tied_head_reads_the_embedding_and_adapters_are_read():
    tied = dataclasses.replace(FULL, decoder=dataclasses.replace(FULL.decoder, tie_embeddings=True))
    adapted = dataclasses.replace(
        FULL, lora=LoraConfig(rank=2, alpha=2.0, dropout=0.0, targets=("q",))
    )
    weights = [
        floors.append_work(config, CONTEXT, streams=1, frames=1, text=1).weight_bytes
        for config in (FULL, tied, adapted)
    ]
    assert weights[1] == weights[0]  # 48 x 32 either way
    assert weights[2] == weights[0] + 4 * 4 * 2 * (32 + 32)


def test_kernels_of_8_bits_are_read_as_such():
    adapted = dataclasses.replace(
        FULL, lora=LoraConfig(rank=2, alpha=2.0, dropout=0.0, targets=("q",))
    )
    plain, rounded = (
        floors.append_work(config, CONTEXT, streams=1, frames=1, text=1, int8=int8).weight_bytes
        for config, int8 in ((FULL, False), (adapted, True))
    )
    # Of float32, three bytes of four are gone; every output has a scale, and adapters are merged.
    kernels = 4 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) + 32 * 48
    scales = 4 * (32 + 2 * 16 + 32 + 2 * 48 + 32) + 48
    assert plain - rounded == 3 * kernels - 4 * scales


def test_the_share_is_that_of_the_higher_floor():
    work = Work(flops=40, weight_bytes=6, cache_bytes=2)
    row = floors.measured(Timing((9.0, 10.0, 30.0)), work, Peaks(flops=10.0, bandwidth=4.0))
    assert (row["flops_floor"], row["bytes_floor"]) == (4.0, 2.0)
    assert (row["median"], row["share_of_floor"]) == (10.0, 0.4)


CLIP = {"architecture": "clip", "summary": "class_token", "pooling_head": False}


@pytest.mark.parametrize("changes", [{}, {**CLIP, "num_layers": 3, "unused_blocks": 1}])
def test_the_towers_operations_are_those_of_the_compiled_program(changes):
    vision = dataclasses.replace(tiny.VISION, **changes)
    config = dataclasses.replace(tiny.CONFIG, vision=vision)
    model = VideoLLM(config)
    variables = tiny_training.variables(model.config)
    images_BHWC = np.zeros((2, 16, 16, 3), np.uint8)
    program = engine.encode.lower(model, variables, images_BHWC).compile()
    pooling = 2 * 4 * 16 * vision.width
    assert hlo.cost(program.as_text()).flops == 2 * (floors.tower_flops(vision) + pooling)


def test_growth_is_what_longer_streams_add():
    steps = [
        {"minutes": 1, "frame": {side: {"median": 0.010, "cache_bytes": 100} for side in
                                 ("full", "mod")}},
        {"minutes": 10, "frame": {side: {"median": 0.014, "cache_bytes": 900} for side in
                                  ("full", "mod")}},
    ]  # fmt: skip
    (row,) = streaming.growth(steps)
    assert row["minutes"] == [1, 10]
    assert row["mod"] == {"seconds": pytest.approx(0.004), "cache_bytes": 800}


def test_a_token_is_a_share_of_an_answer_and_floors_are_those_of_the_middle_call(monkeypatch):
    monkeypatch.setattr(
        streaming,
        "measure",
        lambda steps, rounds, warmup: {name: Timing((6.0,) * rounds) for name in steps},
    )
    configs = {"full": FULL, "mod": tiny.CONFIG}
    sides = {name: SimpleNamespace(see=None, answer=None) for name in configs}
    settings = dataclasses.replace(SETTINGS, rounds=4)
    row = streaming.measure_steps(
        configs, sides, CONTEXT, 2, settings, Peaks(flops=1.0, bandwidth=1.0)
    )
    assert (row["frame"]["full"]["median"], row["token"]["full"]["median"]) == (6.0, 2.0)
    assert (row["frame"]["ratio"], row["token"]["ratio"]) == (1.0, 1.0)
    frame = floors.append_work(tiny.CONFIG, Context(8, 16), streams=2, frames=1, text=1)
    assert row["frame"]["mod"]["cache_bytes"] == frame.cache_bytes
    # Five frames later, three answers of 3 tokens later, and behind one token of the next.
    token = floors.append_work(tiny.CONFIG, Context(10, 18 + 9 + 1), streams=2, frames=0, text=1)
    assert row["token"]["mod"]["cache_bytes"] == token.cache_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": (10, 1)}, r"minutes are \(10, 1\); expected rising numbers"),
        ({"streams": ()}, r"streams are \(\); expected rising numbers"),
        ({"rounds": 0}, "rounds is 0; expected a number in "),
    ],
)
def test_settings_that_measure_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SETTINGS, **changes)


@pytest.fixture(scope="module", params=[False, True], ids=["", "int8"])
def measured(request):
    settings = dataclasses.replace(SETTINGS, int8=request.param)
    _, data, _ = read_training(plain(cli.read_config("configs/digits.py", [])))
    data = dataclasses.replace(data, frames=4, text_tokens=9)
    announced = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "measured_peaks", lambda dtype: Peaks(flops=1e9, bandwidth=1e9))
        result = streaming.benchmark_stream(tiny.CONFIG, data, "auto", settings, announced.append)
    assert "1 x 0.05 min: 6 frames, 14 text" in announced
    return result


def test_every_length_and_number_of_streams_is_measured(measured):
    steps = [(row["streams"], row["minutes"], row["frames"]) for row in measured["steps"]]
    assert steps == [(1, 0.05, 6), (1, 0.1, 12), (2, 0.1, 12)]
    for row in measured["steps"]:
        for step in ("frame", "token"):
            assert len(row[step]["full"]["seconds"]) == len(row[step]["mod"]["seconds"]) == 2
            assert row[step]["mod"]["cache_bytes"] < row[step]["full"]["cache_bytes"]


def test_memory_is_exactly_as_predicted(measured):
    # The longest stream, three calls of a frame and three of an answer later.
    rooms = [(row["streams"], row["frames"], row["text"]) for row in measured["memory"]]
    assert rooms == [(1, 12 + 3, 27 + 3 * 4), (2, 12 + 3, 27 + 3 * 4)]
    for row in measured["memory"]:
        for side in (row["full"], row["mod"]):
            assert side["counted_cache_bytes"] == side["cache_bytes"]
            parts = side["weight_bytes"] + side["state_bytes"] + side["input_bytes"]
            assert side["argument_bytes"] == parts
            assert side["aliased_bytes"] == side["state_bytes"]


def test_the_result_is_written_with_what_it_depends_on(measured, tmp_path):
    report.write(tmp_path, "stream", measured)
    written = json.loads((tmp_path / "stream.json").read_text())
    assert written["device"]["platform"] == "cpu"
    assert written["shapes"]["text_tokens_per_frame"] == 9 / 4
    assert written["shapes"]["kept_by_layer"] == [None, 2, None, 2]
    titles = [table.title for table in stream_tables.tables(written)]
    of_8_bits = ", weights of 8 bits" if written["shapes"]["int8"] else ""
    assert titles[0] == "1 x 0.05 min: 6 frames, 14 text tokens" + of_8_bits
