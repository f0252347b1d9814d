"""The training objective of VideoLLM-MoD (arXiv 2408.16730, section 3.4).

A frame's last token learns to predict the interval token where the model should stay silent, the
assistant's tokens learn ordinary next-token prediction:

    L = (1/N) sum_j ( -l_{j+1} log P_j[Txt_{j+1}]  -  sigma s_j log P_j[EOS] )

where l marks assistant tokens, s marks silent frames, and N counts the labelled positions. As in
the code of VideoLLM-online (github.com/showlab/videollm-online), the silence label is whatever
token the dialogue template puts after a silent frame (its interval token, or EOS without one), so
both terms are a cross-entropy against `labels` and differ by weight only.

Shapes: B batch, J labelled positions, V vocabulary.
"""

import jax
import jax.numpy as jnp
import optax

from videollm_mod_jax.data.example import LANGUAGE, STREAM

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Quantities as (sum, weight), float32 []: add them up over microbatches, then divide once."""


def streaming_loss(
    logits_BJV: jax.Array, labels_BJ: jax.Array, label_kinds_BJ: jax.Array, stream_weight: float
) -> Sums:
    """Language loss plus `stream_weight` times streaming loss, and what each is made of.

    Args:
      logits_BJV: at the labelled positions; taken to float32.
      labels_BJ: int32, the token that should come next.
      label_kinds_BJ: 0 padding (counts nowhere), 1 language, 2 stream.
      stream_weight: sigma.

    Returns:
      `loss` (the objective), `language_loss` and `stream_loss` (mean cross-entropy of each kind,
      unweighted), `language_accuracy` and `stream_accuracy` (greedy), each as (sum, weight) with
      the weight counting labelled positions.
    """
    logits_BJV = logits_BJV.astype(jnp.float32)
    cross_entropy_BJ = optax.softmax_cross_entropy_with_integer_labels(logits_BJV, labels_BJ)
    correct_BJ = (logits_BJV.argmax(-1) == labels_BJ).astype(jnp.float32)
    language_BJ, stream_BJ = label_kinds_BJ == LANGUAGE, label_kinds_BJ == STREAM

    def over(mask_BJ: jax.Array, value_BJ: jax.Array) -> tuple[jax.Array, jax.Array]:
        # `where`, not a product: a padding position may hold an infinite cross-entropy.
        return jnp.where(mask_BJ, value_BJ, 0.0).sum(), mask_BJ.sum(dtype=jnp.float32)

    language, stream = over(language_BJ, cross_entropy_BJ), over(stream_BJ, cross_entropy_BJ)
    return {
        "loss": (language[0] + stream_weight * stream[0], language[1] + stream[1]),
        "language_loss": language,
        "stream_loss": stream,
        "language_accuracy": over(language_BJ, correct_BJ),
        "stream_accuracy": over(stream_BJ, correct_BJ),
    }
