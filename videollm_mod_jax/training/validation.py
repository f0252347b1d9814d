"""The loss on data that is not trained on, between two updates."""

import math
from collections.abc import Callable, Iterator

import jax

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.training import metrics
from videollm_mod_jax.training.losses import Sums
from videollm_mod_jax.training.optimizer import Variables
from videollm_mod_jax.training.sharding import Layout
from videollm_mod_jax.training.step import BATCH_KEYS, HostBatch, ValidationStep

ValidationBatches = Callable[[], Iterator[HostBatch]]
"""Gives the same finite list of batches, all of one shape, at every call.

Each process gives its rows of every batch, so all give as many batches. A row whose `label_kinds`
are 0 counts nowhere: such rows fill up the last batch.
"""


def validate(
    validation_step: ValidationStep,
    layout: Layout,
    trained: Variables,
    frozen: Variables,
    batches: Iterator[HostBatch],
) -> dict[str, float]:
    """The objective of training over all `batches`, without dropout, and what it is made of.

    Args:
      validation_step: jitted.
      layout: of the batches on the mesh.
      trained: as the step takes them.
      frozen: as the step takes them.
      batches: as `ValidationBatches` gives them.

    Returns:
      Means over the labels of all batches and processes, by the names of `streaming_loss`. `loss`
      is always among them.

    Raises:
      UserError: there is no label, or a batch does not divide over the devices.
    """
    parts: list[Sums] = []
    for batch in batches:
        size = len(batch["tokens"]) * jax.process_count()
        if size % layout.batch_shards:
            raise UserError(
                f"a validation batch of {size} examples does not divide over "
                f"{layout.batch_shards} devices along data and fsdp; make it a multiple of them"
            )
        rows = layout.put_batch({name: batch[name] for name in BATCH_KEYS})
        with layout.active(), jax.transfer_guard("disallow"):
            parts.append(validation_step(trained, frozen, rows))
        # Two batches on the devices at most: while they work on one, the host reads the next.
        jax.block_until_ready(parts[-2:-1])
    sums = add(jax.device_get(parts))
    if not sums.get("loss", (0.0, 0.0))[1]:
        raise UserError(
            f"the validation data hold no label ({len(parts)} batches); validate on other data, or "
            "set training.validate_every to 0"
        )
    return metrics.means(sums)


def add(parts: list[Sums]) -> dict[str, tuple[float, float]]:
    """The sums of (sum, weight) pairs by name, in float64.

    ```
    {'loss': (6.0, 3.0)}, {'loss': (2.0, 1.0)}   ->   {'loss': (8.0, 4.0)}
    ```
    """
    names = parts[0] if parts else ()
    return {
        name: tuple(math.fsum(part[name][i] for part in parts) for i in (0, 1)) for name in names
    }
