"""The share of right answers, for every metric that is one."""

from collections.abc import Iterable


def accuracy(correct: Iterable[bool]) -> float:
    """The share of right answers, in [0, 1].

    Raises:
      ValueError: there is no answer.
    """
    marks = [bool(mark) for mark in correct]
    if not marks:
        raise ValueError("accuracy of no answers")
    return sum(marks) / len(marks)
