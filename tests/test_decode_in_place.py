"""The compiled decode step updates every cache in place, and is compiled once for a whole stream.

An alias of argument and result does not prove that: a program may copy a cache to a temporary and
back. So these tests also read the compiled text, in which nothing of a cache's size may be made.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from videollm_mod_jax.models import VideoLLM, VideoLLMConfig, init_variables
from videollm_mod_jax.models.presets import decoder_preset
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.training import compiled, hlo_text

TEXT, FRAMES = 131072, 32768  # caches larger than any weight
INTERVAL, EOS = 9, 3

# What names an array, and what writes a part of one.
IN_PLACE = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "call",
    "optimization-barrier",
    "dynamic-update-slice",
}


def long_cache_config(decoder, dtype: str) -> VideoLLMConfig:
    """Four layers, two of them routed; dense caches hold 294912 entries."""
    decoder = dataclasses.replace(decoder, num_layers=4)
    return dataclasses.replace(tiny.CONFIG, decoder=decoder, dtype=dtype, param_dtype=dtype)


SMALL = long_cache_config(dataclasses.replace(tiny.DECODER, head_dim=64), "float32")
LLAMA = long_cache_config(
    dataclasses.replace(decoder_preset("llama3-8b"), vocab_size=1024), "bfloat16"
)


def abstract(config: VideoLLMConfig, batch_size: int, device):
    """Model, variables and state of a stream on a device that need not be here."""
    model, place = VideoLLM(config), jax.sharding.SingleDeviceSharding(device)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    state = jax.eval_shape(lambda: engine.start(model, batch_size, TEXT, FRAMES, seed=0))

    def put(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return model, *jax.tree.map(put, (variables, state))


def lower(step: str, model: VideoLLM, variables, state) -> jax.stages.Lowered:
    B, vision = state.position_B.shape[0], model.config.vision
    if step == "append_frame":
        features_BNW = jnp.zeros((B, vision.features_per_frame, vision.width))
        prefix_BT = np.zeros((B, 1), np.int32)
        return engine.append_frame.lower(model, variables, state, prefix_BT, features_BNW)
    if step == "append_text":
        tokens_BT, length_B = np.zeros((B, 16), np.int32), np.ones(B, np.int32)
        return engine.append_text.lower(model, variables, state, tokens_BT, length_B)
    settings = {"eos_id": EOS, "max_new_tokens": 8, "temperature": 0.0}
    return engine.generate.lower(model, variables, state, **settings)


def updates_in_place(instruction, computations) -> bool:
    """Whether all that is as large as a cache is a name of it, or a part written into it."""
    if instruction.opcode == "fusion":
        inner = computations[instruction.computation("calls")]
        root = inner.instructions[inner.root]
        return updates_in_place(root, computations)
    return instruction.opcode in IN_PLACE


def assert_in_place(program: jax.stages.Compiled, caches) -> None:
    text, memory = program.as_text(), program.memory_analysis()
    buffers = [x for cache in caches for x in (cache.k_BGCE, cache.v_BGCE, cache.position_BC)]
    smallest = min(math.prod(cache.k_BGCE.shape) for cache in caches)

    header = re.search(r"input_output_alias=\{(.*?)\}, \w+=", text)[1]
    aliased = {int(number) for number in re.findall(r"\((\d+), ", header)}
    entry, computations = hlo_text.parse(text)
    parameters = [
        (int(i.arguments), next(hlo_text.arrays(i.shape))[1])
        for i in computations[entry].instructions.values()
        if i.opcode == "parameter"
    ]
    shapes = {buffer.shape for buffer in buffers}
    of_caches = {number for number, shape in parameters if shape in shapes}
    assert len(of_caches) == len(buffers)
    assert of_caches <= aliased

    made = [
        f"{i.name}: {i.opcode} {i.shape}"
        for computation in computations.values()
        for i in computation.instructions.values()
        if any(math.prod(shape) >= smallest for _, shape, _ in hlo_text.arrays(i.shape))
        and not updates_in_place(i, computations)
    ]
    assert not made, f"made: {made}"
    largest = max(math.prod(x.shape) * x.dtype.itemsize for x in buffers)
    assert memory.alias_size_in_bytes >= sum(math.prod(x.shape) * x.dtype.itemsize for x in buffers)
    assert memory.temp_size_in_bytes < largest / 4


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("step", ["append_frame", "append_text", "generate"])
def test_caches_are_updated_in_place(step, batch_size):
    model, variables, state = abstract(SMALL, batch_size, jax.devices()[0])
    assert_in_place(lower(step, model, variables, state).compile(), state.caches)


@pytest.mark.parametrize("step", ["append_frame", "generate"])
def test_caches_of_llama_are_updated_in_place_on_tpus(step):
    pytest.importorskip("libtpu")
    device = compiled.find_target("v5e:2x4").devices[0]
    model, variables, state = abstract(LLAMA, 1, device)
    assert_in_place(lower(step, model, variables, state).compile(), state.caches)


def test_a_cache_that_is_made_anew_is_seen():
    _, variables, state = abstract(SMALL, 1, jax.devices()[0])

    @functools.partial(jax.jit, donate_argnames="state")
    def masked_write(variables, state):
        def write(cache):
            is_next_BC = jnp.arange(cache.k_BGCE.shape[2]) == cache.length_B[:, None]
            return cache.replace(k_BGCE=jnp.where(is_next_BC[:, None, :, None], 1, cache.k_BGCE))

        return state.replace(caches=tuple(write(cache) for cache in state.caches))

    program = masked_write.lower(variables, state).compile()
    with pytest.raises(AssertionError, match="made"):
        assert_in_place(program, state.caches)


def test_nothing_is_traced_or_compiled_during_a_stream():
    model = VideoLLM(tiny.CONFIG)
    init = jax.jit(init_variables, static_argnums=0)
    variables = init(model, jax.random.key(0))
    vision = tiny.CONFIG.vision
    features_BNW = np.zeros((1, vision.features_per_frame, vision.width), np.float32)
    interval_BT = np.array([[INTERVAL]], np.int32)
    question = engine.pad_text(list(range(10, 21)))
    events = []

    def stream(state, frames):
        for frame in range(frames):
            state = engine.append_frame(model, variables, state, interval_BT, features_BNW)
            if frame % 10 == 9:
                state = engine.append_text(model, variables, state, *question)
                state, *_ = engine.generate(
                    model, variables, state, eos_id=EOS, max_new_tokens=4, temperature=0.0
                )
        return state

    def listen(event: str, seconds: float, **values):
        if event.startswith("/jax/core/compile"):
            events.append(event)

    state = stream(engine.start(model, 1, 400, 200, seed=0), 10)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        state = stream(state, 100)
        during = len(events)
        jax.jit(lambda x: x + 1)(jnp.ones(()))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert during == 0
    assert len(events) > 0
    assert int(state.entries_LB.max()) > 110 * (1 + tiny.CONFIG.tokens_per_frame)
