"""When the model speaks: the threshold rule on a frame's last token."""

import functools

import jax
import jax.numpy as jnp

from videollm_mod_jax.errors import UserError


@functools.partial(jax.jit, static_argnames=("interval_id", "silence_threshold"))
def breaks_silence(
    logits: jax.Array, interval_id: int, silence_threshold: float | None
) -> jax.Array:
    """Whether the model answers after a frame, read off the frame's last token.

    The probability of the interval token ("stay silent") is set to zero where it is below the
    threshold, and the model answers where the most likely token is then another one. So a
    threshold makes the model more talkative, never less.

    ```
    p(interval)  p(other)  threshold   answer
    0.9          0.1       0.725       no
    0.6          0.4       0.725       yes: 0.6 < 0.725 counts as zero
    0.6          0.4       None        no
    0.3          0.7       None        yes
    ```

    Args:
      logits: [..., V] float, next-token logits at the frame's last token.
      interval_id: id of the token that separates frames.
      silence_threshold: in [0, 1], or None for the plain argmax. The upstream demo uses 0.725.

    Returns:
      [...] bool.

    Source: `demo/inference.py` of showlab/videollm-online.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    if silence_threshold is not None:
        interval = probabilities[..., interval_id]
        probabilities = probabilities.at[..., interval_id].set(
            jnp.where(interval < silence_threshold, 0.0, interval)
        )
    return jnp.argmax(probabilities, axis=-1) != interval_id


def check_threshold(silence_threshold: float | None) -> None:
    """Raises UserError unless the threshold is None or a probability."""
    if silence_threshold is not None and not 0 <= silence_threshold <= 1:
        raise UserError(
            f"silence_threshold is {silence_threshold}; expected a probability in [0, 1], or none"
        )
