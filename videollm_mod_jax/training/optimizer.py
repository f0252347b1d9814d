"""AdamW with a warmed-up cosine, and which variables it trains."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import optax

from videollm_mod_jax.config_dict import Checked, Interval, require_choice
from videollm_mod_jax.errors import UserError

Variables = Mapping[str, Any]

TRAINABLE = ("lora", "full")
MOMENT_DTYPES = ("float32", "bfloat16")

# Adam divides by 1 - beta, which float32 rounds to 0 for what is closer to 1.
_BETA = Annotated[float, Interval("[0, 0.999999]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
    """The optimizer, every number stated.

    Attributes:
      learning_rate: its peak, reached after the warm-up; from there a cosine falls to 0.
      warmup_fraction: share of all steps over which the rate rises linearly from 0.
      beta1, beta2, epsilon: of Adam.
      weight_decay: decoupled; acts on matrices only, never on biases and norm scales.
      clip_norm: largest global norm of the gradient; larger ones are scaled down to it.
      moment_dtype: of the stored first moment, `float32` or `bfloat16`. The second stays float32:
        bfloat16 has 8 bits of precision, and a beta2 of 0.999 changes the second moment by less
        than that an update, so that it would never move towards a smaller gradient.
    """

    learning_rate: Annotated[float, Interval("(0, 100]")]
    warmup_fraction: Annotated[float, Interval("[0, 1)")]
    beta1: _BETA
    beta2: _BETA
    epsilon: Annotated[float, Interval("(0, 1]")]
    weight_decay: Annotated[float, Interval("[0, 100]")]
    clip_norm: Annotated[float, Interval("(0, 1e12]")]
    moment_dtype: str

    def __post_init__(self):
        super().__post_init__()
        require_choice("optimizer.moment_dtype", self.moment_dtype, MOMENT_DTYPES)


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_fraction * steps` updates, then a cosine to 0 at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=round(config.warmup_fraction * steps),
        decay_steps=steps,
    )


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW at `schedule`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decays,
            mu_dtype=config.moment_dtype,
        ),
    )


def decays(trained: Variables) -> Any:
    """True for the leaves that weight decay acts on.

    By name, not by rank: the norm scales of scanned layers are stacked into matrices.
    """
    return jax.tree.map_with_path(
        lambda path, _: _names(path)[-1] not in ("bias", "scale"), trained
    )


def split_variables(variables: Variables, trainable: str) -> tuple[Variables, Variables]:
    """Splits a model's variables into the trained and the frozen ones.

    ```
    {'params': {'connector': c,                        'lora'                      'full'
                'decoder': {'layer_0': {'attention': a},
                            'layer_1': {'attention': b,
                                        'router': r}},
                'vision': v},
     'lora': x}
    trained  {'params': {'connector': c,               {'params': {'connector': c,
                         'decoder': {'layer_1':                    'decoder': ...all},
                                     {'router': r}}},   'lora': x}
              'lora': x}
    frozen   {'params': {'decoder':                    {'params': {'vision': v}}
                 {'layer_0': {'attention': a},
                  'layer_1': {'attention': b}},
                 'vision': v}}
    ```

    Holds for stacked and unstacked layers, arrays and abstract leaves alike. `merge_variables` is
    the inverse.

    Args:
      variables: `{'params': ..., 'lora': ...}`.
      trainable: `lora` trains the adapters, the connector and the routers; `full` trains
        everything but the vision tower.

    Raises:
      UserError: an unknown `trainable`, or `lora` for a model without adapters.
    """
    if trainable not in TRAINABLE:
        raise UserError(f"trainable is {trainable!r}; choose one of {', '.join(TRAINABLE)}")
    if trainable == "lora" and "lora" not in variables:
        raise UserError(
            "trainable is 'lora' but the model has no adapters (lora.rank is 0 or lora.targets is "
            "empty); give the model a lora.rank, or set trainable to 'full'"
        )

    def is_trained(path: tuple[str, ...]) -> bool:
        if trainable == "full":
            return path[:2] != ("params", "vision")
        return path[0] == "lora" or path[:2] == ("params", "connector") or "router" in path

    return _select(variables, is_trained), _select(variables, lambda path: not is_trained(path))


def merge_variables(trained: Variables, frozen: Variables) -> Variables:
    """The union of two trees without a common leaf; the inverse of `split_variables`."""
    merged = dict(frozen)
    for key, value in trained.items():
        merged[key] = merge_variables(value, frozen[key]) if key in frozen else value
    return merged


def _select(tree: Variables, wanted: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """The part of a nested dict whose leaves' paths are `wanted`, without empty dicts."""
    out = {}
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, Mapping):
            if part := _select(value, wanted, here):
                out[key] = part
        elif wanted(here):
            out[key] = value
    return out


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]
