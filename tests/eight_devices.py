"""What eight simulated devices compute, beside one: as a script, a report that tests judge.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.eight_devices REPORT

For every rule set and model, REPORT (JSON) says how far one update of the very step that `train`
runs is from the same update on one device, whether weights and moments lie where they should, and
which collectives over rows of the residual stream the compiled step holds; and, by rows at a time,
what a device draws of the dropout.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from tests import tiny_training
from videollm_mod_jax.models import (
    Execution,
    VideoLLM,
    VideoLLMConfig,
    config_plan,
    full_computation,
)
from videollm_mod_jax.models.row_loop import Keys
from videollm_mod_jax.models.row_wise import in_row_chunks
from videollm_mod_jax.training import sharding
from videollm_mod_jax.training.optimizer import split_variables
from videollm_mod_jax.training.run import Run
from videollm_mod_jax.training.state import TrainState, create_state
from videollm_mod_jax.training.step import BATCH_KEYS, make_train_step

LAYOUTS = {"replicate": (-1, 1, 1), "fsdp": (2, -1, 1), "fsdp_tensor": (2, 2, 2)}
"""By rule set: the mesh of eight devices."""

UNROLLED = ("full", "mod")
"""Models whose layers are written out, so that every collective stands in the program as often as
it runs."""

SCANNED = "mod scanned"
"""The routed model with loops over its layers, and on eight devices over rows and vocabulary."""

IN_CHUNKS = {"row_chunk": 20, "vocab_chunk": 128}
"""Of which neither divides the rows nor the vocabulary of the tiny model."""

OPTIMIZER = dataclasses.replace(
    tiny_training.OPTIMIZER,
    # The first update counts, and weights must be mostly update, so that errors of it show. A
    # gradient of rounding noise must not become an update of full size, as Adam's division makes
    # it with a small epsilon.
    warmup_fraction=0.0,
    learning_rate=1.0,
    epsilon=1e-2,
)


def model_config(model: str) -> VideoLLMConfig:
    """Two layers with adapters; the second is routed unless the model is `full`."""
    config = tiny_training.model_config(rank=2)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=2))
    if model == "full":
        config = dataclasses.replace(config, routing=full_computation())
    if model == SCANNED:
        # Rows in chunks draw another dropout.
        config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=0.0))
    return config


def row_axes() -> tuple[int, int]:
    """S, tokens of a sequence, and M, the rows that the routed layer computes."""
    config, budget = model_config("mod"), tiny_training.BUDGET
    S = budget.text_tokens + budget.frames * config.tokens_per_frame
    dropped = config.tokens_per_frame - config_plan(config)[1].keep
    return S, S - budget.frames * dropped


def collectives(hlo: str, rows: set[int]) -> list[str]:
    """The collectives of a compiled program whose result has a row axis, as `kind shape`.

    ```
    %all-reduce.7 = f32[2,46,32]{2,1,0} all-reduce(...)     rows {46}   ->   all-reduce f32[2,46,32]
    %all-gather.1 = f32[32,48]{1,0} all-gather(...)                          (a weight: not listed)
    ```

    Args:
      hlo: text of the program.
      rows: sizes that only a row axis has: of the sequence, and of a routed layer's rows.
    """
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = []
    for line in hlo.splitlines():
        match = re.search(rf" = (.*?) ({kinds})(-start)?\(", line)
        for element, sizes in re.findall(r"(\w+)\[([\d,]+)\]", match[1]) if match else ():
            if rows & {int(size) for size in sizes.split(",")}:
                found.append(f"{match[2]} {element}[{sizes}]")
    return sorted(found)


def distance(tree, expected) -> float:
    """Global norm of the difference over the one of `expected`."""
    difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), tree, expected)
    return float(optax.global_norm(difference) / optax.global_norm(expected))


def updates(after: TrainState, before: TrainState):
    """What the step added to the weights."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after.trained, before.trained)


def moment(state: TrainState):
    """Adam's first moment: after one update, the clipped gradient times 1 - beta1."""
    return optax.tree_utils.tree_get(state.opt_state, "mu")


def compare(name: str) -> dict[str, dict]:
    """One update on one device, and on eight as each rule set lays it out."""
    config, scan = model_config(name), name == SCANNED
    trained, frozen = split_variables(tiny_training.variables(config, scan=scan), "full")
    batch = tiny_training.batch(0, batch_size=16)
    batch = {key: batch[key] for key in BATCH_KEYS}
    training = tiny_training.training_config(optimizer=OPTIMIZER, scan=scan)
    optimizer = Run.build(training, config).optimizer
    model = VideoLLM(config, Execution(scan=scan))
    step = make_train_step(
        model,
        optimizer,
        lambda step: 0.0,
        stream_weight=training.stream_weight,
        microbatches=training.microbatches,
    )
    before = jax.tree.map(np.asarray, create_state(trained, optimizer, training.seed))
    one, sums_one = jax.jit(step)(before, frozen, batch)

    report = {}
    for rules, mesh in LAYOUTS.items():
        chunks = IN_CHUNKS if scan else {}
        run = Run.build(dataclasses.replace(training, sharding=rules, mesh=mesh, **chunks), config)
        lowered = run.lower(batch)
        compiled = lowered.compile()
        arguments = jax.device_put((before, frozen), sharding.shardings(run.target))
        eight, sums = compiled(*arguments, run.layout.put_batch(batch))
        fresh = sharding.init_sharded(model, jax.random.key(0), run.layout)
        expected = sharding.abstract_variables(model, run.layout)
        report[rules] = {
            "loss": abs(float(sums["loss"][0] / sums_one["loss"][0]) - 1),
            "moment": distance(moment(eight), moment(one)),
            "update": distance(updates(eight, before), updates(one, before)),
            "placed": sharding.shardings(eight) == sharding.shardings(run.target[0]),
            "made_in_parts": sharding.shardings(fresh) == sharding.shardings(expected),
            "constraints": lowered.as_text().count("sharding_constraint"),
            "collectives": collectives(compiled.as_text(), set(row_axes())),
        }
    return report


def dropout(rows_at_once: int) -> dict[str, Any]:
    """Of 16 sequences of 6 rows: the shape that is drawn at a time, and what became of ones."""
    drawn = []

    def drop(x_BTD: jax.Array, weights: tuple[()], keys: Keys) -> jax.Array:
        del weights
        drawn.append(x_BTD.shape)
        return x_BTD * jax.random.bernoulli(keys["q"], 0.5, x_BTD.shape)

    layout = sharding.make_layout("fsdp", LAYOUTS["fsdp"])
    with layout.active():
        ones = jax.device_put(np.ones((16, 6, 4), np.float32), layout.batch)
        keys = {"q": jax.random.key(0)}
        dropped = jax.jit(lambda x: in_row_chunks(drop, x, (), keys, rows_at_once))(ones)
    return {"drawn": drawn[-1], "dropped": np.asarray(dropped).tolist()}


if __name__ == "__main__":
    found = {name: compare(name) for name in (*UNROLLED, SCANNED)}
    found["dropout"] = {rows_at_once: dropout(rows_at_once) for rows_at_once in (0, 6, 3)}
    Path(sys.argv[1]).write_text(json.dumps(found))
