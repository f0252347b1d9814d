"""A judge is asked as Video-ChatGPT asks, over real HTTP on loopback, and failures are named."""

import hashlib
import http.server
import json
import threading
import time

import pytest

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.evaluation.judge import (
    ChatJudge,
    ExactMatch,
    JudgedScores,
    Verdict,
    judged_scores,
    parse_verdict,
)

QUESTION = ("what is cut?", "a potato", "the {potato}")
YES = "{'pred': 'yes', 'score': 4}"

# Of the two messages that evaluate_activitynet_qa.py sends for this question.
SYSTEM_SHA256 = "12b9e42d120081bf1e7f1999bb09db2db250add544abd3c183d61a2f938c6510"
USER_SHA256 = "2ec8cf45b63586d9264b658ebf2d7da7a466c64020e8d513db3ee74057c54677"


class Server:
    """Answers requests in turn: a string is the model's text, a number is a status, bytes a body.

    Attributes:
      url: of the chat completions.
      requests: (path, headers, body) as they came.
    """

    def __init__(self, *replies):
        self.requests, waiting, server = [], list(replies), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.requests.append((self.path, dict(self.headers), json.loads(body)))
                reply = waiting.pop(0)
                if reply is None:
                    server.released.wait(10)
                    return
                status = reply if isinstance(reply, int) else 200
                if isinstance(reply, str):
                    choice = {"message": {"role": "assistant", "content": reply}}
                    reply = json.dumps({"choices": [choice]}).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(reply if isinstance(reply, bytes) else b"no")

            def log_message(self, *args):
                pass

        self.released = threading.Event()
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1/chat/completions"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret")
    servers = []

    def start(*replies):
        servers.append(Server(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def asking(url, **changes):
    settings = {
        "url": url,
        "key_variable": "TEST_JUDGE_KEY",
        "model": "gpt-3.5-turbo",
        "timeout": 5.0,
        "attempts": 3,
        "backoff": 0.0,
    }
    return ChatJudge(**settings | changes)


def test_the_question_is_put_as_published(serve):
    server = serve(YES)
    assert asking(server.url).judge(*QUESTION) == Verdict(correct=True, score=4)
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    assert set(body) == {"model", "messages"}
    assert body["model"] == "gpt-3.5-turbo"
    system, user = body["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert hashlib.sha256(system["content"].encode()).hexdigest() == SYSTEM_SHA256
    assert hashlib.sha256(user["content"].encode()).hexdigest() == USER_SHA256
    assert "Question: what is cut?\nCorrect Answer: a potato\n" in user["content"]
    assert "Predicted Answer: the {potato}\n\nProvide" in user["content"]


def test_no_key_is_sent_where_none_is_needed(serve):
    server = serve(YES)
    asking(server.url, key_variable="").judge(*QUESTION)
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize("failure", [429, 500, 503, b"<html>", b'{"choices": []}', "I think so."])
def test_what_may_pass_is_asked_again(serve, failure):
    server = serve(failure, failure, YES)
    assert asking(server.url).judge(*QUESTION).correct
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (503, "HTTP status 503 Service Unavailable; gave up after 3 attempts"),
        ("I think so.", "found 'I think so.'; gave up after 3 attempts"),
        (b"<html>", "expected a chat completion, found b'<html>'; gave up after 3 attempts"),
        (b'{"choices": [{"message": {"content": null}}]}', "expected a text .* found None; gave"),
    ],
)
def test_it_gives_up_with_one_line(serve, failure, message):
    server = serve(*[failure] * 3)
    with pytest.raises(UserError, match=message) as caught:
        asking(server.url).judge(*QUESTION)
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(server.requests) == 3


@pytest.mark.parametrize(("status", "reason"), [(401, "Unauthorized"), (404, "Not Found")])
def test_a_refusal_is_not_asked_again(serve, status, reason):
    server = serve(status, YES)
    with pytest.raises(UserError, match=f"HTTP status {status} {reason}$"):
        asking(server.url).judge(*QUESTION)
    assert len(server.requests) == 1


def test_the_key_does_not_follow_a_redirect(serve):
    server = serve(302, YES)
    with pytest.raises(UserError, match="HTTP status 302"):
        asking(server.url).judge(*QUESTION)
    assert len(server.requests) == 1


def test_silence_ends_at_the_timeout(serve):
    server = serve(None, YES)
    began = time.monotonic()
    assert asking(server.url, timeout=0.2).judge(*QUESTION).correct
    assert time.monotonic() - began < 5


def test_nobody_there(serve):
    server = serve()
    server.stop()
    with pytest.raises(UserError, match="refused; gave up after 2 attempts"):
        asking(server.url, attempts=2).judge(*QUESTION)


def test_waits_double(serve, monkeypatch):
    waits = []
    monkeypatch.setattr("videollm_mod_jax.evaluation.judge.time.sleep", waits.append)
    asking(serve(500, 500, 500, YES).url, attempts=4, backoff=0.5).judge(*QUESTION)
    assert waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "file:///etc/passwd"}, "url of the judge is 'file:///etc/passwd'"),
        ({"url": "api.openai.com"}, "expected http"),
        ({"url": "http://[::1"}, "expected http"),
        ({"key_variable": "NOT_SET_HERE"}, "environment variable NOT_SET_HERE holds no key"),
        ({"attempts": 0}, "attempts 0"),
        ({"timeout": 0}, "timeout 0"),
        ({"model": ""}, "model ''"),
    ],
)
def test_bad_settings_are_refused(serve, changes, message):
    with pytest.raises(UserError, match=message):
        asking(**{"url": "http://127.0.0.1:1/v1"} | changes)


@pytest.mark.parametrize("key", ["sec\nret", "secr€t", " "])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(serve, monkeypatch, key):
    monkeypatch.setenv("TEST_JUDGE_KEY", key)
    with pytest.raises(UserError, match="TEST_JUDGE_KEY") as caught:
        asking("http://127.0.0.1:1/v1")
    assert "sec" not in str(caught.value)


def test_space_around_the_key_goes(serve, monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", " secret\n")
    server = serve(YES)
    asking(server.url).judge(*QUESTION)
    assert server.requests[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4.8}", Verdict(True, 4)),
        ("{'pred': 'No', 'score': '2'}", Verdict(False, 2)),
        (' {"pred": "YES.", "score": 5}\n', Verdict(True, 5)),
        ("{'pred': 'no, not yes', 'score': 0}", Verdict(True, 0)),  # upstream looks for yes first
    ],
)
def test_replies_are_read(reply, verdict):
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize(
    "reply",
    [
        "Yes, they match.",
        "",
        "{'pred': 'yes'}",
        "{'pred': 'maybe', 'score': 3}",
        "{'pred': 'yes', 'score': 6}",
        "{'pred': 'yes', 'score': -1}",
        "{'pred': 'yes', 'score': 'four'}",
        "{'pred': 'yes', 'score': 1e999}",
        "['yes', 4]",
        "[1, 2]",
        "__import__('os').getcwd()",
        "(" * 10_000,
        "\0",
    ],
)
def test_other_replies_are_named_errors(reply):
    with pytest.raises(ValueError, match="found"):
        parse_verdict(reply)


def test_exact_match_says_what_it_is_and_gives_no_score():
    judge = ExactMatch()
    assert judge.judge("what?", "a potato", "A potato.") == Verdict(True, None)
    assert judge.judge("what?", "a potato", "a spud") == Verdict(False, None)
    scores = judged_scores(judge, [Verdict(True, None), Verdict(False, None)])
    assert scores == JudgedScores("exact match, not judged", 0.5, None)


def test_scores_carry_the_name_of_the_judge(serve):
    judge = asking("http://127.0.0.1:1/v1")
    scores = judged_scores(judge, [Verdict(True, 5), Verdict(False, 2), Verdict(True, 4)])
    assert scores == JudgedScores("gpt-3.5-turbo, Video-ChatGPT protocol", 2 / 3, 11 / 3)
    with pytest.raises(ValueError, match="1 of 2 verdicts have a score"):
        judged_scores(judge, [Verdict(True, 5), Verdict(False, None)])
    with pytest.raises(ValueError, match="no answers"):
        judged_scores(judge, [])
