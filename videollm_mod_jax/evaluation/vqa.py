"""Visual question answering by exact match: GQA, and MSVD, MSRVTT and ActivityNet without a judge.

Source: LLaVA's GQA evaluation: answers are stripped when decoded, then `rstrip(".").lower()`
(`scripts/convert_gqa_for_eval.py` of haotian-liu/LLaVA), then GQA's own `eval.py` counts those
equal to the true answer. The exact-match accuracy of MSVD-QA, MSRVTT-QA and ActivityNet-QA is that
of their papers for models that choose among known answers; for models that answer freely it is a
lower bound of what the judge of `judge.py` finds.
"""


def normalized(text: str) -> str:
    """An answer without surrounding space, without full stops at its end, in lower case."""
    return text.strip().rstrip(".").lower()


def exact_match(prediction: str, answer: str) -> bool:
    """Whether an answer is the true one, both normalized.

    Upstream takes the true answer as it is. GQA's are in lower case and without full stops, so
    nothing changes there; elsewhere an answer with a capital could never be matched.
    """
    return normalized(prediction) == normalized(answer)
