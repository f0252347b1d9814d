"""The two sides of a comparison in training: equal weights, and a state that each goes on with."""

from collections.abc import Mapping
from typing import Any

import jax

from videollm_mod_jax.benchmarking import device
from videollm_mod_jax.models import (
    Execution,
    VideoLLM,
    VideoLLMConfig,
    stack_layers,
    unstack_layers,
)
from videollm_mod_jax.training import sharding
from videollm_mod_jax.training.optimizer import Variables, split_variables
from videollm_mod_jax.training.run import Run
from videollm_mod_jax.training.state import TrainState, create_state


class Side:
    """One variant, whose state goes on by an update at every call.

    Attributes:
      fits: False once it ran out of memory.
    """

    def __init__(
        self, run: Run, trained: Variables, frozen: Variables, batch: Mapping[str, jax.Array]
    ):
        self._run, self._frozen, self._batch = run, frozen, batch
        self._state = _first_state(run, trained)
        self.fits = True

    def step(self) -> Any:
        """Updates once; the arrays to wait for."""
        with self._run.layout.active():
            self._state, sums = self._run.train_step(self._state, self._frozen, self._batch)
        return self._state, sums

    def try_out(self) -> int | None:
        """Updates once, and says how much memory that took on the fullest device.

        Returns:
          Bytes at the peak, without what else lies there; None where the device does not count, the
          update did not raise what was once in use, or it did not fit.
        """
        mine = (self._state, self._frozen, self._batch)
        before, others = device.memory_in_use(), bytes_per_device(mine)
        try:
            jax.block_until_ready(self.step())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self.fits = False
            return None
        after = device.memory_in_use()
        if not before or after[1] == before[1]:
            return None
        return after[1] - (before[0] - others)


def draw_weights(run: Run, model: VideoLLMConfig) -> tuple[Variables, Variables]:
    """Random variables made on the devices, as (trained, frozen) of the run."""
    video_llm = VideoLLM(model, Execution(scan=run.config.scan))
    variables = sharding.init_sharded(video_llm, jax.random.key(0), run.layout)
    return split_variables(variables, run.config.trainable)


def weights_for(
    run: Run, other: Run, weights: tuple[Variables, Variables]
) -> tuple[Variables, Variables]:
    """The weights of a run with routing for the run without: the same but for the routers.

    Scanned layers are stacked by the plan's period, `(D m) x 16` or `D x 32`, and are copied.
    Everything beside the layers, or all of it where nothing is stacked, is the same memory.

    Args:
      run: without routing.
      other: with routing.
      weights: trained and frozen variables of `other`.
    """

    def restack(tree: Variables, stored: Variables, target: Variables) -> Variables:
        if not run.config.scan:
            return _part(tree, stored)
        kinds = [kind for kind in stored if "decoder" in stored[kind]]
        layers = {kind: {"decoder": tree[kind]["decoder"]} for kind in kinds}
        wanted = {kind: {"decoder": target[kind]["decoder"]} for kind in kinds}

        def change(layers: Variables) -> Variables:
            return stack_layers(_part(unstack_layers(layers, other.plan), stored), run.plan)

        changed = jax.jit(change, out_shardings=sharding.shardings(wanted))(layers)
        return {kind: _part(tree[kind], stored[kind]) | changed.get(kind, {}) for kind in stored}

    (trained, frozen), (state, frozen_target) = weights, run.target
    return (
        restack(trained, run.stored[0].trained, state.trained),
        restack(frozen, run.stored[1], frozen_target),
    )


def _first_state(run: Run, trained: Variables) -> TrainState:
    create = jax.jit(
        lambda tree: create_state(tree, run.optimizer, run.config.seed),
        out_shardings=sharding.shardings(run.target[0]),
    )
    return create(trained)


def _part(tree: Variables, like: Variables) -> Variables:
    """What `tree` has of the keys of `like`."""
    if not isinstance(tree, Mapping):
        return tree
    return {key: _part(value, like[key]) for key, value in tree.items() if key in like}


def bytes_per_device(tree: Any) -> int:
    """Of arrays, on one device; an array that comes twice counts once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves.values())
