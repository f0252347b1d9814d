"""Eight devices compute what one computes, and routing moves no rows between them."""

import collections
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh

from tests import eight_devices
from videollm_mod_jax.models import Execution, LoraConfig, RoutingConfig, VideoLLM, VideoLLMConfig
from videollm_mod_jax.models.config import LINEAR_NAMES
from videollm_mod_jax.models.presets import decoder_preset, vision_preset
from videollm_mod_jax.training import sharding

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "llama3_8b_shardings.txt"
RULES = tuple(eight_devices.LAYOUTS)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What `tests.eight_devices` found out."""
    path = tmp_path_factory.mktemp("eight") / "report.json"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "tests.eight_devices", str(path)]
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("model", [*eight_devices.UNROLLED, eight_devices.SCANNED])
def test_one_update_on_eight_devices_is_the_one_on_a_single_device(report, model, rules):
    found = report[model][rules]
    assert max(found["loss"], found["moment"], found["update"]) < 1e-5, found
    assert found["placed"]
    assert found["made_in_parts"]


@pytest.mark.parametrize("rules", RULES)
def test_constraints_of_the_model_are_really_in_the_step(report, rules):
    assert report["mod"][rules]["constraints"] > 0


@pytest.mark.parametrize("rules", RULES)
def test_routing_moves_no_rows_that_the_dense_model_does_not_move(report, rules):
    S, M = eight_devices.row_axes()
    dense, routed = (
        collections.Counter(report[model][rules]["collectives"]) for model in eight_devices.UNROLLED
    )
    # A routed layer may move its M rows where the dense one moves S.
    as_dense = collections.Counter()
    for name, count in routed.items():
        as_dense[name.replace(f",{M},", f",{S},")] += count
    # The gate's gradient is one number per row, added up where the width is split.
    as_dense -= collections.Counter({f"all-reduce f32[2,{M}]": rules == "fsdp_tensor"})
    assert not as_dense - dense
    unrouted = {name: count for name, count in routed.items() if f",{M}" not in name}
    assert not collections.Counter(unrouted) - dense
    if rules == "fsdp_tensor":
        assert any(f",{M}," in name for name in routed)


@pytest.mark.parametrize("rows_at_once", [6, 3])
def test_a_device_draws_the_dropout_of_its_own_sequences_alone(report, rows_at_once):
    found = report["dropout"][str(rows_at_once)]
    assert found["drawn"] == [2, rows_at_once, 4]
    # 48 numbers of each device; without folding its index in, all would draw the same.
    by_device = np.reshape(found["dropped"], (8, -1))
    assert len(np.unique(by_device, axis=0)) == 8
    assert report["dropout"]["0"]["drawn"] == [16, 6, 4]


def test_a_collective_is_found_by_its_rows():
    # The example of the docstring.
    hlo = """
      %all-reduce.7 = f32[2,46,32]{2,1,0} all-reduce(f32[2,46,32]{2,1,0} %x), channel_id=1
      %all-gather.1 = f32[32,48]{1,0} all-gather(f32[4,48]{1,0} %y), channel_id=2
      %fusion.2 = f32[2,46,32]{2,1,0} fusion(f32[2,46,32]{2,1,0} %all-reduce.7), kind=kLoop
    """
    assert eight_devices.collectives(hlo, {46}) == ["all-reduce f32[2,46,32]"]


def llama3_8b() -> VideoLLMConfig:
    return VideoLLMConfig(
        decoder=decoder_preset("llama3-8b"),
        vision=vision_preset("siglip-l16-384"),
        routing=RoutingConfig(
            insertion="interleaved",
            keep_ratio=0.2,
            selection="learned",
            weighting="paper",
            force_keep_last=False,
            exploration=0.0,
        ),
        lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05, targets=(*LINEAR_NAMES, "lm_head")),
        newline=False,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )


def described(variables) -> dict[str, str]:
    """`path` -> `shape spec` of every variable."""
    out = {}
    for path, leaf in flatten_dict(variables, sep="/").items():
        axes = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
        split = ("-" if axis is None else axis for axis in axes)
        out[path] = f"{list(leaf.shape)} {','.join(split)}"
    return out


MESHES = {"fsdp": (1, 8, 1), "fsdp_tensor": (1, 4, 2)}


@pytest.fixture(scope="module")
def laid_out():
    """The variables of llama3-8b, layers stacked, by rule set."""
    model = VideoLLM(llama3_8b(), Execution(scan=True))
    return {
        rules: sharding.abstract_variables(
            model, sharding.Layout(AbstractMesh(mesh, sharding.MESH_AXES), sharding.RULES[rules])
        )
        for rules, mesh in MESHES.items()
    }


def test_every_parameter_of_llama3_8b_lies_as_the_golden_file_says(laid_out):
    """`UPDATE_GOLDEN=1 pytest ...` writes the file anew, for a change to be read in its diff."""
    fsdp, fsdp_tensor = (described(laid_out[rules]) for rules in MESHES)
    lines = [
        f"{path} {shape} | {fsdp_tensor[path].split(']')[1].strip()}\n"
        for path, shape in sorted(fsdp.items())
    ]
    text = "".join(lines)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("rules", MESHES)
def test_a_device_holds_an_eighth_of_the_language_model(laid_out, rules):
    params, lora = (laid_out[rules][collection] for collection in ("params", "lora"))
    leaves = jax.tree.leaves((params["embedding"], params["decoder"], params["lm_head"], lora))
    whole = sum(leaf.size for leaf in leaves)
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert whole > 8e9
    # Tensor halves only one side of an adapter.
    assert held < 1.02 * whole / 8
