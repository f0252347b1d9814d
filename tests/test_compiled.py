"""What a compiled program costs: loops multiplied out, against counts made another way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_training
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training import compiled, hlo
from videollm_mod_jax.training.chips import CHIPS
from videollm_mod_jax.training.run import Run

ROOT = Path(__file__).parents[1]

LOOP = """
HloModule m

%body (p: (s32[], f32[8,32], f32[32,16], f32[8,16])) -> (s32[], f32[8,32], f32[32,16], f32[8,16]) {
  %p = (s32[], f32[8,32]{1,0}, f32[32,16]{1,0}, f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant(2)
  %next = s32[] add(%i, %step)
  %x = f32[8,32]{1,0} get-tuple-element(%p), index=1
  %w = f32[32,16]{1,0} get-tuple-element(%p), index=2
  %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[8,16]{1,0} all-reduce(%y), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[8,32]{1,0}, f32[32,16]{1,0}, f32[8,16]{1,0}) tuple(%next, %x, %w, %z)
}

%condition (q: (s32[], f32[8,32], f32[32,16], f32[8,16])) -> pred[] {
  %q = (s32[], f32[8,32]{1,0}, f32[32,16]{1,0}, f32[8,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(6)
  ROOT %more = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[8,32], b: f32[32,16], c: f32[8,16]) -> f32[8,16] {
  %a = f32[8,32]{1,0} parameter(0)
  %b = f32[32,16]{1,0} parameter(1)
  %c = f32[8,16]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,32]{1,0}, f32[32,16]{1,0}, f32[8,16]{1,0}) tuple(%zero, %a, %b, %c)
  %loop = (s32[], f32[8,32]{1,0}, f32[32,16]{1,0}, f32[8,16]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8,16]{1,0} get-tuple-element(%loop), index=3
}
"""  # noqa: E501


def test_a_loop_counts_as_often_as_it_runs():
    cost = hlo.cost(LOOP)
    # 0, 2, 4: three runs of a product of 8 x 32 and 32 x 16.
    assert cost.flops == 3 * 8192
    # 512 bytes, reduced among 4 devices: each sends 3 quarters of it twice.
    assert cost.collectives == (hlo.Collective("all-reduce", 3, 3 * 512, 3 * 768),)
    # Three arguments are read; per run, counter, product and sum are written and read.
    assert cost.memory_bytes == (1024 + 2048 + 512) + 3 * 2 * (4 + 512 + 512)
    assert cost.unknown_loops == 0


def test_a_loop_of_unknown_length_is_said_to_be_one():
    cost = hlo.cost(LOOP.replace("direction=LT", "direction=EQ"))
    assert (cost.flops, cost.unknown_loops) == (8192, 1)


def test_a_known_number_of_runs_is_taken_from_the_compiler():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    assert hlo.cost(LOOP.replace("body=%body", known)).flops == 5 * 8192


CONVOLUTION = """
HloModule m

ENTRY %main (a: bf16[4,8,32], b: bf16[4,32,16]) -> bf16[8,16,4] {
  %a = bf16[4,8,32]{2,1,0} parameter(0)
  %b = bf16[4,32,16]{2,1,0} parameter(1)
  ROOT %c = bf16[8,16,4]{1,0,2} convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->bf0
}
"""  # noqa: E501


def test_a_batch_of_products_as_tpus_spell_it_counts_without_the_padding():
    # Four products of 8 x 32 and 32 x 16; the dilated window meets one of four inputs each time.
    assert hlo.cost(CONVOLUTION).flops == 4 * 8192


FUSIONS = """
HloModule m

%start (p: bf16[2,16]) -> bf16[8,16] {
  %p = bf16[2,16]{1,0} parameter(0)
  ROOT %g = bf16[8,16]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%beside (q: bf16[2,16]) -> bf16[8,16] {
  %q = bf16[2,16]{1,0} parameter(0)
  ROOT %g = bf16[8,16]{1,0} all-gather(%q), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: bf16[2,16]) -> bf16[8,16] {
  %a = bf16[2,16]{1,0} parameter(0)
  %one = bf16[8,16]{1,0} fusion(%a), kind=kCustom, calls=%start
  ROOT %two = bf16[8,16]{1,0:S(1)} fusion(%a), kind=kCustom, calls=%beside
}
"""


def test_a_collective_that_runs_beside_other_work_counts_once():
    cost = hlo.cost(FUSIONS)
    assert cost.collectives == (hlo.Collective("all-gather", 1, 256, 192),)
    # The argument is read; the second result lies in on-chip memory.
    assert cost.memory_bytes == 64 + 2 * 256


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=mesh['data'=4,'fsdp'=2] {'fsdp'}", 2),
        ("replica_groups=mesh['data'=4,'fsdp'=2] {'data','fsdp'}", 8),
    ],
)
def test_groups_of_devices(groups, size):
    text = FUSIONS.replace("replica_groups={{0,1,2,3}}", groups)
    assert hlo.cost(text).collectives[0].sent_bytes == 256 * (size - 1) // size


def products(jaxpr) -> int:
    """Operations of all matrix products of a traced program: another path to the same count."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([lhs[i] for i in contracted]))
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        # A parameter may be a program, closed or not, or a tuple of them.
        values = jax.tree.leaves(tuple(equation.params.values()))
        inner = (getattr(value, "jaxpr", value) for value in values)
        total += times * sum(products(program) for program in inner if hasattr(program, "eqns"))
    return total


def compile_tiny(**changes):
    config = tiny_training.training_config(**changes)
    run = Run.build(config, tiny_training.model_config())
    batch = compiled.abstract_batch(tiny_training.model_config(), 4, 6, 64, 24)
    return run, run.lower(batch), batch


def test_a_scanned_step_costs_what_the_unrolled_one_costs():
    target = compiled.find_target("cpu:1")
    counts = {}
    for scan, microbatches in ((True, 2), (False, 1)):
        # Without remat an unrolled backward pass shares the scores of its forward pass.
        _, lowered, _ = compile_tiny(scan=scan, microbatches=microbatches, remat=True)
        counts[scan] = compiled.compile_program(lowered, target)
    scanned, unrolled = counts[True].cost, counts[False].cost
    assert unrolled.unknown_loops == scanned.unknown_loops == 0
    assert scanned.flops == pytest.approx(unrolled.flops, rel=0.01)
    # Two layers of four are in a loop body, in a loop over two halves of the batch.
    assert counts[True].flops_loops_once < 0.5 * scanned.flops
    # XLA's own count of a program without loops; it adds what is not a matrix product.
    assert 0.7 < unrolled.flops / counts[False].flops_loops_once <= 1


def test_a_program_that_jaxlib_cannot_read_says_which_compiler_fits():
    """As libtpu 0.0.52 makes them for v5p, beside jaxlib 0.10.2."""

    class Unreadable:
        def compile(self):
            return self

        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure async-update")

    with pytest.raises(UserError, match=rf'pip install "jax\[tpu\]=={jax.__version__}"'):
        compiled.compile_program(Unreadable(), compiled.find_target("cpu:1"))


def test_operations_are_those_of_the_traced_program():
    run, lowered, batch = compile_tiny(scan=True, microbatches=2, remat=False)
    traced = jax.make_jaxpr(run.train_step)(*run.target, batch)
    counted = compiled.compile_program(lowered, compiled.find_target("cpu:1")).cost.flops
    assert counted == pytest.approx(products(traced.jaxpr), rel=0.01)


def test_the_abstract_batch_is_a_batch_of_the_pipeline():
    budget = tiny_training.BUDGET
    abstract = compiled.abstract_batch(
        tiny_training.model_config(), 4, budget.frames, budget.text_tokens, budget.labels
    )
    batch = tiny_training.batch(0)
    assert {k: (leaf.shape, leaf.dtype) for k, leaf in abstract.items()} == {
        k: (batch[k].shape, batch[k].dtype) for k in abstract
    }


EIGHT_DEVICES = """
import functools, json, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests import tiny_training
from videollm_mod_jax.models import unstack_layers
from videollm_mod_jax.training import compiled, hlo, sharding
from videollm_mod_jax.training.run import Run

config = tiny_training.training_config(sharding="fsdp", mesh=(1, -1, 1))
model = tiny_training.model_config()
target = compiled.find_target("cpu:8")

# What plan compiles, for named devices and without data, and what train runs.
layout = sharding.make_layout(config.sharding, config.mesh, target.devices)
abstract = compiled.abstract_batch(model, 16, 6, 64, 24)
planned = Run.build(config, model, layout)
lowered = planned.lower(abstract)
import tempfile, pathlib
run = Run.build(config, model)
state, frozen = run.start(pathlib.Path(tempfile.mkdtemp()), tiny_training.variables(model))
batch = run.layout.put_batch({k: tiny_training.batch(0, 16)[k] for k in abstract})
with run.layout.active():
    trained = run.train_step.lower(state, frozen, batch)
same = lowered.as_text() == trained.as_text()

mesh = layout.mesh
@functools.partial(jax.shard_map, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
def gather_often(x):
    def step(carry, _):
        return carry + jax.lax.all_gather(carry, "fsdp").sum() * 0.5, None
    return jax.lax.scan(step, x, length=5)[0]
shape = jax.ShapeDtypeStruct((8 * 16,), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
gathers = hlo.cost(jax.jit(gather_often).lower(shape).compile().as_text()).collectives

program = compiled.compile_program(lowered, target)
sharded = [
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(planned.target[0].trained["params"]["decoder"])
    if not leaf.sharding.is_fully_replicated
]
print(json.dumps({
    "same": same,
    "collectives": [[c.kind, c.count, c.result_bytes, c.sent_bytes] for c in gathers],
    "gathered": {c.kind: c.result_bytes for c in program.cost.collectives}["all-gather"],
    "decoder": sum(sharded),
    "arguments": [program.argument_bytes, sum(
        compiled.bytes_per_device(part) for part in (*planned.target, {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=layout.batch)
            for k, v in abstract.items()})
    ) - compiled.bytes_per_device(planned.target[1]["params"]["vision"])],
}))
"""


@pytest.fixture(scope="module")
def eight():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_planned_program_is_the_trained_one(eight):
    assert eight["same"]


def test_collectives_in_a_loop_are_those_that_were_written(eight):
    # Five gathers of 16 numbers from each of 8 devices.
    size = 8 * 16 * 4
    assert eight["collectives"] == [["all-gather", 5, 5 * size, 5 * size * 7 // 8]]


def test_a_sharded_step_gathers_every_weight_in_every_microbatch(eight):
    assert eight["gathered"] >= 2 * eight["decoder"]


def test_counted_parts_but_the_tower_add_up_to_the_arguments_of_the_program(eight):
    measured, counted = eight["arguments"]
    assert measured == counted


def test_a_refusal_is_an_answer():
    program = compiled.refused(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.51G of 15.75G hbm."
        "\nmore"
    )
    assert not program.fits
    assert program.needed_bytes == int(17.51 * 2**30)
    assert program.refusal.endswith("15.75G hbm.")
    other = "RESOURCE_EXHAUSTED: ... for HLO temporaries (20.00G) exceeds available HBM (15.75G)."
    assert compiled.refused(other).needed_bytes == 20 * 2**30


def test_an_out_of_memory_compile_does_not_raise():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 2.00G of 1.00G hbm")

    program = compiled.compile_program(Lowered(), compiled.find_target("cpu:1"))
    assert (program.fits, program.needed_bytes) == (False, 2 * 2**30)


def test_the_slowest_resource_bounds_a_step():
    chip = CHIPS["v5e"]
    sent = hlo.Collective("all-gather", 1, 0, int(chip.network_bandwidth))
    cost = hlo.Cost(int(2 * chip.peak_flops), int(3 * chip.memory_bandwidth), (sent,), 0, ())
    seconds = compiled.roofline_seconds(cost, chip)
    assert seconds == pytest.approx({"compute": 2, "memory": 3, "network": 1})


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:16", "cpu:0", "cpu:x", ""])
def test_an_unknown_topology_is_an_error_with_examples(topology):
    with pytest.raises(UserError, match="v5p:2x2x2"):
        compiled.find_target(topology)


def test_without_the_compiler_there_is_a_plain_line(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[tpu\]"'):
        compiled.find_target("v5e:4x4")


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(UserError, match="has 1 CPU devices"):
        compiled.find_target("cpu:3")


def test_bytes_per_device_go_by_the_sharding():
    leaf = jnp.zeros((4, 3), jnp.bfloat16)
    assert compiled.bytes_per_device({"a": leaf}) == 24
