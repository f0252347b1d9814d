"""Open-ended question answering, judged: does the answer mean what the true one means?

The published protocol, of Video-ChatGPT, asks GPT for yes or no and a score from 0 to 5. What it
says depends on the model asked and on chance, so a judge has a name, and every table that shows its
verdicts shows the name. Without access to one, `ExactMatch` compares letters; its numbers are not
comparable with published ones.

Source: `quantitative_evaluation/evaluate_activitynet_qa.py` of mbzuai-oryx/Video-ChatGPT, used for
MSVD-QA, MSRVTT-QA and ActivityNet-QA alike.
"""

import ast
import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any, Protocol

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation.accuracy import accuracy
from videollm_mod_jax.evaluation.vqa import exact_match

MAX_SCORE = 5
_MAX_REPLY = 1 << 20  # bytes
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
"""The statuses after which asking again may help."""

# Word for word; upstream's text runs together like this in several places.
_SYSTEM = (
    "You are an intelligent chatbot designed for evaluating the correctness of generative outputs "
    "for question-answer pairs. Your task is to compare the predicted answer with the correct "
    "answer and determine if they match meaningfully. Here's how you can accomplish the task:"
    "------##INSTRUCTIONS: - Focus on the meaningful match between the predicted answer and the "
    "correct answer.\n- Consider synonyms or paraphrases as valid matches.\n- Evaluate the "
    "correctness of the prediction compared to the answer."
)
_USER = (
    "Please evaluate the following video-based question-answer pair:\n\nQuestion: {question}\n"
    "Correct Answer: {answer}\nPredicted Answer: {prediction}\n\nProvide your evaluation only as a "
    "yes/no and score where the score is an integer value between 0 and 5, with 5 indicating the "
    "highest meaningful match. Please generate the response in the form of a Python dictionary "
    "string with keys 'pred' and 'score', where value of 'pred' is  a string of 'yes' or 'no' and "
    "value of 'score' is in INTEGER, not STRING.DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR "
    "EXPLANATION. Only provide the Python dictionary string. For example, your response should "
    "look like this: {{'pred': 'yes', 'score': 4.8}}."
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer.

    Attributes:
      correct: whether it means what the true answer means.
      score: how well it does, from 0 to 5; None from what gives no score.
    """

    correct: bool
    score: int | None


@dataclasses.dataclass(frozen=True)
class JudgedScores:
    """The verdicts of a benchmark.

    Attributes:
      judge: name of what gave them; belongs into every table that shows them.
      accuracy: share of correct answers, in [0, 1].
      score: mean score in [0, 5]; None from what gives no score.
    """

    judge: str
    accuracy: float
    score: float | None


class Judge(Protocol):
    """What decides whether an answer is correct."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def judge(self, question: str, answer: str, prediction: str) -> Verdict:
        """Compares a predicted answer with the true one."""


class ExactMatch:
    """No judge: an answer is correct if it is the true one letter by letter, see `vqa`."""

    name = "exact match, not judged"

    def judge(self, question: str, answer: str, prediction: str) -> Verdict:
        """Compares normalized texts; gives no score."""
        del question
        return Verdict(correct=exact_match(prediction, answer), score=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatJudge:
    """A language model behind an OpenAI-compatible HTTP interface, asked as Video-ChatGPT does.

    Attributes:
      url: of the chat completions, such as https://api.openai.com/v1/chat/completions.
      key_variable: the environment variable that holds the key; "" if none is needed.
      model: which model to ask; the protocol's is gpt-3.5-turbo.
      timeout: seconds to wait for a reply.
      attempts: how often to ask before giving up, when there is no reply or it cannot be read.
      backoff: seconds before the second attempt; doubled before each later one.
    """

    url: str
    key_variable: str
    model: str
    timeout: float
    attempts: int
    backoff: float

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            usable = False
        if not usable:
            raise UserError(f"url of the judge is {self.url!r}; expected http(s)://host/...")
        # Checked here, because http.client shows a header that it refuses.
        if self.key_variable and not _is_header_text(self._key()):
            raise UserError(
                f"environment variable {self.key_variable} holds no key; expected that of "
                f"{parts.hostname}, in printable ASCII"
            )
        if not (self.model and self.timeout > 0 and self.attempts >= 1 and self.backoff >= 0):
            raise UserError(
                f"judge has model {self.model!r}, timeout {self.timeout}, attempts "
                f"{self.attempts}, backoff {self.backoff}; expected a name, > 0, >= 1 and >= 0"
            )

    @property
    def name(self) -> str:
        """The model and the protocol."""
        return f"{self.model}, Video-ChatGPT protocol"

    def judge(self, question: str, answer: str, prediction: str) -> Verdict:
        """Asks the model; blocks until it has answered.

        Raises:
          UserError: the server refuses, or all attempts failed.
        """
        user = _USER.format(question=question, answer=answer, prediction=prediction)
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": user}]
        body = json.dumps({"model": self.model, "messages": messages}).encode()
        failure = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                return parse_verdict(_content(self._post(body)))
            except urllib.error.HTTPError as error:
                failure = f"HTTP status {error.code} {error.reason}"
                if error.code not in _PASSING:
                    raise UserError(f"judge at {self.url}: {failure}") from error
            except (OSError, http.client.HTTPException) as error:
                failure = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError as error:
                failure = str(error)
        raise UserError(f"judge at {self.url}: {failure}; gave up after {self.attempts} attempts")

    def _key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {self._key()}"
        request = urllib.request.Request(self.url, body, headers)
        with _OPENER.open(request, timeout=self.timeout) as reply:
            return reply.read(_MAX_REPLY)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host; without a new request it is an error."""

    def redirect_request(self, *args: Any) -> None:
        del args


_OPENER = urllib.request.build_opener(_NoRedirect)


def parse_verdict(reply: str) -> Verdict:
    """Reads a model's reply by the protocol: a Python dictionary, "yes" anywhere in 'pred'.

    ```
    {'pred': 'yes', 'score': 4.8}    -> correct, 4: the score is cut off
    {'pred': 'No', 'score': '2'}     -> not correct, 2
    Yes, they match.                 -> ValueError
    ```

    Upstream asks again, without end, where the reply is no dictionary; where 'pred' is neither, it
    counts the score but leaves the answer out of the accuracy. Here both are errors, and
    `ChatJudge` asks again a limited number of times.

    Raises:
      ValueError: it is no such dictionary, or the score is not from 0 to 5.
    """
    try:
        value = ast.literal_eval(reply.strip())
        says, score = str(value["pred"]).lower(), int(value["score"])
    # All that reading a literal and taking two numbers out of it can raise, for any text.
    except (
        ArithmeticError,
        LookupError,
        MemoryError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"expected {{'pred': 'yes' or 'no', 'score': 0 to 5}}, found {reply[:80]!r}"
        ) from error
    if not ("yes" in says or "no" in says) or not 0 <= score <= MAX_SCORE:
        raise ValueError(f"expected 'yes' or 'no' and 0 to 5, found {says[:40]!r} and {score}")
    return Verdict(correct="yes" in says, score=score)


def judged_scores(judge: Judge, verdicts: Sequence[Verdict]) -> JudgedScores:
    """Sums verdicts up.

    Raises:
      ValueError: no verdicts, or only some have a score.
    """
    share = accuracy(verdict.correct for verdict in verdicts)
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    if scores and len(scores) < len(verdicts):
        raise ValueError(f"{len(scores)} of {len(verdicts)} verdicts have a score")
    return JudgedScores(judge.name, share, sum(scores) / len(scores) if scores else None)


def _is_header_text(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable()


def _content(reply: bytes) -> str:
    """The text of a chat completion."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"expected a chat completion, found {reply[:80]!r}") from error
    if not isinstance(content, str):
        raise ValueError(f"expected a text in the chat completion, found {content!r:.80}")
    return content
