"""The training state: everything that an update changes, and nothing else."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from videollm_mod_jax.training.optimizer import Variables


@flax.struct.dataclass
class TrainState:
    """What a train step takes and returns; donated, so that it is updated in place.

    Frozen variables are not part of it: they are a separate argument of the step, are never
    donated and have no optimizer state.

    Attributes:
      step: int32 [], updates done.
      trained: the trained part of the variables, float32.
      opt_state: optax state of `trained`.
      rng: uint32 [2], key data from which every step derives its dropout keys.
    """

    step: jax.Array
    trained: Variables
    opt_state: optax.OptState
    rng: jax.Array


def create_state(
    trained: Variables, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first update.

    Trained variables are kept in float32 whatever the model's `param_dtype` says: a bfloat16
    weight loses every update smaller than 1/256 of itself.
    """
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        opt_state=optimizer.init(trained),
        rng=jax.random.key_data(jax.random.key(seed)),
    )
