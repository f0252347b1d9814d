"""The training objective of VideoLLM-MoD (arXiv 2408.16730, section 3.4).

A frame's last token learns to predict the interval token where the model should stay silent, the
assistant's tokens learn ordinary next-token prediction:

    L = (1/N) sum_j ( -l_{j+1} log P_j[Txt_{j+1}]  -  sigma s_j log P_j[EOS] )

where l marks assistant tokens, s marks silent frames, and N counts the labelled positions. As in
the code of VideoLLM-online (github.com/showlab/videollm-online), the silence label is whatever
token the dialogue template puts after a silent frame (its interval token, or EOS without one), so
both terms are a cross-entropy against `labels` and differ by weight only.

Shapes: B batch, J labelled positions, D decoder width, R LoRA rank, V vocabulary, C columns of it.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from videollm_mod_jax.data.example import LANGUAGE, STREAM
from videollm_mod_jax.models.layers import LinearWeights

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Quantities as (sum, weight), float32 []: add them up over microbatches, then divide once."""


@flax.struct.dataclass
class Judged:
    """What the objective needs of the logits.

    Attributes:
      cross_entropy_BJ: float32, of every label.
      greedy_BJ: int32, the most likely token; of equal ones the lowest.
    """

    cross_entropy_BJ: jax.Array
    greedy_BJ: jax.Array


def judge_logits(logits_BJV: jax.Array, labels_BJ: jax.Array) -> Judged:
    """Judges logits, taken to float32, by int32 labels."""
    logits_BJV = logits_BJV.astype(jnp.float32)
    return Judged(
        cross_entropy_BJ=optax.softmax_cross_entropy_with_integer_labels(logits_BJV, labels_BJ),
        greedy_BJ=logits_BJV.argmax(-1),
    )


def judge_in_chunks(
    hidden_BJD: jax.Array,
    low_rank_BJR: jax.Array | None,
    head: LinearWeights,
    labels_BJ: jax.Array,
    vocab_chunk: int,
) -> Judged:
    """`judge_logits` of a head's logits, a few columns at a time, recomputed in the backward pass.

    Each chunk leaves its log-sum-exp, its part of the label's logit, and its largest logit.

    ```
    V = 7, vocab_chunk = 3        0 1 2 | 3 4 5 | (4 5) 6        the last one skips what was there
    ```

    Args:
      hidden_BJD, low_rank_BJR, head: from `VideoLLM.before_logits`.
      labels_BJ: int32.
      vocab_chunk: C; 0, or V and more, is all of them.
    """
    V = head.kernel.shape[-1]
    if vocab_chunk == 0 or vocab_chunk >= V:
        return judge_logits(head.from_rank(hidden_BJD, low_rank_BJR), labels_BJ)
    # The chunks' gradients add up in float32.
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), (hidden_BJD, low_rank_BJR))

    @jax.checkpoint
    def chunk(first: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        start = jnp.minimum(first, V - vocab_chunk)
        logits_BJC = head.columns(start, vocab_chunk).from_rank(*inputs).astype(jnp.float32)
        column_C = start + jnp.arange(vocab_chunk)
        is_label_BJC = (column_C == labels_BJ[..., None]) & (column_C >= first)
        # A product and a sum instead of `where`, whose constants JAX would take out of the loop, as
        # large as a chunk of logits and in memory through the whole step.
        label_BJ = (is_label_BJC * logits_BJC).sum(-1)
        logits_BJC += jnp.where(column_C >= first, 0.0, -jnp.inf)
        frozen_BJC = jax.lax.stop_gradient(logits_BJC)
        return (
            jax.nn.logsumexp(logits_BJC, axis=-1),
            label_BJ,
            frozen_BJC.max(-1),
            start + frozen_BJC.argmax(-1),
        )

    log_sum_NBJ, label_NBJ, top_NBJ, greedy_NBJ = jax.lax.map(
        chunk, vocab_chunk * jnp.arange(-(-V // vocab_chunk))
    )
    best_1BJ = top_NBJ.argmax(0)[None]
    return Judged(
        cross_entropy_BJ=jax.nn.logsumexp(log_sum_NBJ, axis=0) - label_NBJ.sum(0),
        greedy_BJ=jnp.take_along_axis(greedy_NBJ, best_1BJ, axis=0)[0],
    )


def streaming_loss(
    judged: Judged, labels_BJ: jax.Array, label_kinds_BJ: jax.Array, stream_weight: float
) -> Sums:
    """Language loss plus `stream_weight` times streaming loss, and what each is made of.

    Args:
      judged: at the labelled positions.
      labels_BJ: int32, the token that should come next.
      label_kinds_BJ: 0 padding (counts nowhere), 1 language, 2 stream.
      stream_weight: sigma.

    Returns:
      `loss` (the objective), `language_loss` and `stream_loss` (mean cross-entropy of each kind,
      unweighted), `language_accuracy` and `stream_accuracy` (greedy), each as (sum, weight) with
      the weight counting labelled positions.
    """
    cross_entropy_BJ = judged.cross_entropy_BJ
    correct_BJ = (judged.greedy_BJ == labels_BJ).astype(jnp.float32)
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
