"""One provider failing never shows: every way to fail, before and after the first words.

Two scripted providers share one script: whichever is asked first fails, the other one works. So no
test depends on which of two equal providers the router happens to prefer.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import Any

import pytest
import requests
from upstream import (
    AUTH,
    HELLO,
    Answer,
    Hang,
    Reply,
    Request,
    Reset,
    Stream,
    chat,
    chat_stream,
    chunks,
    completion,
    delta,
    drip,
    events_of,
    failing_first,
    free_port,
    good,
    html,
    provider,
    sse,
    text_of,
    until,
    usage_chunk,
)

BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
ERROR = {"error": {"message": "upstream says no", "type": "some_error", "code": None}}
LIMITED = {"error": {"message": "Rate limit reached", "type": "tokens", "code": "rate_limit"}}
QUICK = {"TTFT_TIMEOUT": "10", "STREAM_IDLE_TIMEOUT": "10", "CONNECT_TIMEOUT": "2"}


def patience(fault: str, seconds: float = 0.7) -> dict[str, str]:
    """Settings for a fault: only who keeps silent is waited for, and not for long."""
    return {"TTFT_TIMEOUT": str(seconds)} if fault.startswith("silence") else {}


@dataclass
class Pair:
    """A router before two providers, groq (model m1) and cerebras (model m1)."""

    groq: Any
    cerebras: Any
    client: Any
    app: Any

    @property
    def asked(self) -> list[Request]:
        """Every request that reached a provider, in order."""
        return sorted(self.groq.requests + self.cerebras.requests, key=lambda r: r.at)

    def ask(self, **changes):
        body = {"model": "hermes-router", "messages": HELLO, **changes}
        return self.client.post("/v1/chat/completions", json=body, headers=AUTH)


@pytest.fixture
def pair(upstream, make_app):
    """pair(script[, second script], SETTING=...): two providers with one script, or one each."""

    def make(script, second=None, **settings) -> Pair:
        groq, cerebras = upstream(script), upstream(second or script)
        rows = {**provider("groq", groq, "m1"), **provider("cerebras", cerebras, "m1")}
        app = make_app(**{**rows, **QUICK, **settings})
        return Pair(groq, cerebras, app.test_client(), app)

    return make


@pytest.fixture
def single(upstream, make_app):
    """single(script, models=..., keys=..., SETTING=...): one provider (groq) and a client."""

    def make(script, *, models=("m1",), keys="k1", **settings):
        up = upstream(script) if callable(script) else upstream(*script)
        app = make_app(**{**provider("groq", up, *models, keys=keys), **QUICK, **settings})
        return up, app.test_client()

    return make


def said(got) -> str:
    """The text of a chat answer, streamed or not."""
    if got.headers["Content-Type"].startswith("text/event-stream"):
        assert got.data.endswith(b"data: [DONE]\n\n")
        return text_of(got.data)
    return got.json["choices"][0]["message"]["content"]


def post(client, **changes):
    body = {"model": "hermes-router", "messages": HELLO, **changes}
    return client.post("/v1/chat/completions", json=body, headers=AUTH)


# --- before the first words: every failure moves on ---------------------------------

ERROR_EVENT = Stream(chunks=[ERROR], done=False)
NAMED_ERROR_EVENT = Stream(chunks=[b"event: error\n" + sse(ERROR)], done=False)
ROLE_ONLY = [delta(role="assistant", content="")]


def either(whole: Answer, streamed: Answer):
    """A fault that looks different in a stream."""
    return whole, streamed


FAULTS: dict[str, tuple[Answer, Answer]] = {
    **{
        str(status): either(Reply(status, ERROR), Reply(status, ERROR))
        for status in (401, 402, 403, 404, 408, 409, 410, 413, 425, 429, 500, 501, 502, 503, 504)
    },
    "529": either(
        Reply(529, {"type": "error", "error": {"type": "overloaded_error", "message": "Busy"}}),
        Reply(529, {"type": "error", "error": {"type": "overloaded_error", "message": "Busy"}}),
    ),
    "418": either(Reply(418, "short and stout"), Reply(418, "short and stout")),
    "302": either(
        Reply(302, b"", {"Location": "http://127.0.0.1:9/v1/chat/completions"}),
        Reply(302, b"", {"Location": "http://127.0.0.1:9/v1/chat/completions"}),
    ),
    "429-seconds": either(
        Reply(429, LIMITED, {"Retry-After": "30"}), Reply(429, LIMITED, {"Retry-After": "30"})
    ),
    "reset": either(Reset(), Reset()),
    "reset-in-headers": either(
        Reset(b"HTTP/1.1 200 OK\r\ncontent-type: app"), Reset(b"HTTP/1.1 200 OK\r\ncontent-ty")
    ),
    "not-http": either(Reset(b"SSH-2.0-OpenSSH_9.6\r\n"), Reset(b"SSH-2.0-OpenSSH_9.6\r\n")),
    "silence": either(Hang(30), Hang(30)),
    "silence-after-headers": either(
        Reply(200, completion("late"), cuts=[1], gap=30), Stream(chunks=ROLE_ONLY * 2, hold_after=1)
    ),
    "empty": either(Reply(200, b""), Reply(200, b"")),
    "empty-json": either(Reply(200, {}), Stream(chunks=[], done=False)),
    "only-done": either(Reply(200, "null"), Stream(chunks=[])),
    "html": either(html(), html()),
    "html-503": either(html(503), html(503)),
    "broken-json": either(Reply(200, b'{"choices": [{"mess'), Stream(chunks=[b"data: {oops\n\n"])),
    "error-in-200": either(Reply(200, ERROR), Reply(200, ERROR)),
    "error-string-in-200": either(
        Reply(200, {"error": "boom"}), Stream(chunks=[{"error": "boom"}])
    ),
    "error-beside-choices": either(
        Reply(200, {**completion(""), **ERROR}),
        Stream(chunks=[{**delta(role="assistant", content=""), **ERROR}], done=True),
    ),
    "no-choices": either(
        Reply(200, {**completion("x"), "choices": []}), Stream(chunks=[usage_chunk()])
    ),
    "null-choices": either(
        Reply(200, {**completion("x"), "choices": None}),
        Stream(chunks=[{**delta(content="x"), "choices": None}]),
    ),
    "empty-content": either(Reply(200, completion("")), Stream(chunks=[*ROLE_ONLY, delta("stop")])),
    "null-content": either(
        Reply(200, completion(None)), Stream(chunks=[delta("stop", content=None)])
    ),
    "error-event-first": either(Reply(200, ERROR), ERROR_EVENT),
    "named-error-event-first": either(Reply(200, ERROR), NAMED_ERROR_EVENT),
    "error-after-role": either(Reply(200, ERROR), Stream(chunks=[*ROLE_ONLY, ERROR])),
    "comments-then-end": either(
        Reply(200, b"   \n"), Stream(chunks=[b": wait\n\n"] * 3, done=False)
    ),
    "reset-in-body": either(
        Reply(200, completion("half"), stop_at=40),
        Stream(chunks=[*ROLE_ONLY, *ROLE_ONLY], stop_at=len(sse(ROLE_ONLY[0])) + 20),
    ),
    "body-too-short": either(
        Reply(200, completion("half"), stop_at=40, ending="fin"),
        Stream(chunks=ROLE_ONLY * 2, stop_at=len(sse(ROLE_ONLY[0])), ending="fin"),
    ),
}


@BOTH
@pytest.mark.parametrize("fault", FAULTS)
def test_the_second_provider_answers_and_the_client_sees_one_clean_200(pair, fault, stream):
    both = pair(failing_first(FAULTS[fault][stream], "rescued"), **patience(fault))
    got = both.ask(stream=stream)
    assert got.status_code == 200, got.data
    assert said(got) == "rescued"
    assert got.headers["X-Hermes-Attempts"] == "2"
    assert {len(both.groq.requests), len(both.cerebras.requests)} == {1}
    second = both.asked[1]
    served = "groq" if second in both.groq.requests else "cerebras"
    assert got.headers["X-Provider"] == served
    assert second.json["model"] == "m1"
    assert second.key == f"{served}-key-1"


@BOTH
def test_connection_refused_moves_on(upstream, make_app, stream):
    up = upstream(good())
    dead = f"http://127.0.0.1:{free_port()}/v1"
    app = make_app(**{**provider("groq", dead), **provider("cerebras", up), **QUICK})
    client = app.test_client()
    answers = [post(client, stream=stream) for _ in range(4)]
    assert [said(got) for got in answers] == ["hello"] * 4
    assert {got.headers["X-Provider"] for got in answers} == {"cerebras"}
    assert "2" in {got.headers["X-Hermes-Attempts"] for got in answers}


@BOTH
@pytest.mark.parametrize(
    "fault", ["401", "429", "500", "reset", "silence", "html", "empty", "error-in-200"]
)
def test_an_explicit_provider_model_is_tried_first_and_failure_still_does_not_show(
    pair, fault, stream
):
    both = pair(lambda _: FAULTS[fault][stream], good("rescued"), **patience(fault))
    got = both.ask(model="groq/m1", stream=stream)
    assert (got.status_code, said(got)) == (200, "rescued")
    assert got.headers["X-Provider"] == "cerebras"
    assert both.groq.requests
    assert got.headers["X-Hermes-Attempts"] == "2"


@BOTH
def test_a_provider_killed_between_two_requests_is_not_missed(pair, stream):
    both = pair(good())
    assert said(both.ask(model="groq/m1", stream=stream)) == "hello"
    assert len(both.groq.requests) == 1
    both.groq.close()
    for _ in range(5):
        got = both.ask(model="groq/m1", stream=stream)
        assert (said(got), got.headers["X-Provider"]) == ("hello", "cerebras")


@BOTH
def test_all_four_failing_providers_are_walked_until_the_fifth_answers(upstream, make_app, stream):
    names = ("groq", "cerebras", "mistral", "openrouter", "nvidia")
    lock, left = threading.Lock(), [Reply(429, LIMITED), Reply(500, ERROR), Reset(), html()]

    def script(request: Request):
        with lock:
            return left.pop() if left else good("at last")(request)

    settings = {}
    for name in names:
        settings |= provider(name, upstream(script))
    got = post(make_app(**settings, **QUICK).test_client(), stream=stream)
    assert (got.status_code, said(got)) == (200, "at last")
    assert got.headers["X-Hermes-Attempts"] == "5"


def test_a_slow_drip_is_no_failure(pair):
    both = pair(drip(chat("slow but sure"), 0.0002))
    assert said(both.ask()) == "slow but sure"
    assert len(both.asked) == 1


CALL = {"index": 0, "id": "c", "type": "function"}
CALL["function"] = {"name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("useful", "finish"),
    [
        ({"content": "x"}, "stop"),
        ({"reasoning_content": "hm"}, "length"),
        ({"reasoning": "hm"}, "length"),
        ({"tool_calls": [CALL]}, "tool_calls"),
    ],
)
def test_text_reasoning_and_tool_calls_are_each_a_useful_first_event(pair, useful, finish):
    events = [*ROLE_ONLY, delta(**useful), delta(finish)]
    both = pair(lambda _: Stream(chunks=events))
    got = both.ask(stream=True)
    assert [json.loads(data) for _, data in events_of(got.data)[:-1]] == events
    assert len(both.asked) == 1


@BOTH
def test_a_tool_call_without_content_is_an_answer(pair, stream):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    whole = Reply(200, completion(None, tool_calls=[call]))
    events = [delta(tool_calls=[{"index": 0, **call}]), delta("tool_calls")]
    both = pair(lambda _: Stream(chunks=events) if stream else whole)
    got = both.ask(stream=stream)
    assert got.status_code == 200
    assert len(both.asked) == 1


@BOTH
def test_a_refusal_by_content_filter_is_handed_to_the_client(pair, stream):
    body = completion("")
    body["choices"][0]["finish_reason"] = "content_filter"
    events = [*ROLE_ONLY, delta("content_filter")]
    both = pair(lambda _: Stream(chunks=events) if stream else Reply(200, body))
    got = both.ask(stream=stream)
    assert got.status_code == 200
    assert len(both.asked) == 1


def blocked(text: str, stream: bool, finish: str = "content_filter") -> Answer:
    """An answer that a provider's filter ended, after some words or none."""
    body = completion(text)
    body["choices"][0]["finish_reason"] = finish
    words = [delta(content=text)] if text else []
    raw = b"".join(sse(event) for event in [*ROLE_ONLY, *words, delta(finish)])
    return Stream(chunks=[raw]) if stream else Reply(200, body)


def filtered_first(text: str, stream: bool, finish: str):
    """Whoever is asked first is filtered, the other answers."""
    asked = []

    def script(request: Request) -> Answer:
        asked.append(request)
        return blocked(text, stream, finish) if len(asked) == 1 else good()(request)

    return script


@BOTH
@pytest.mark.parametrize("text", ["", "Sure, "])
@pytest.mark.parametrize("finish", ["content_filter", "PROHIBITED_CONTENT"])
def test_an_answer_that_a_filter_ended_is_tried_elsewhere_where_allowed(pair, stream, text, finish):
    both = pair(filtered_first(text, stream, finish), CONTENT_FILTER_FAILOVER=1)
    got = both.ask(stream=stream)
    assert said(got) == "hello" and len(both.asked) == 2


@BOTH
def test_if_all_filter_the_last_ones_answer_is_handed_over(pair, stream):
    both = pair(lambda _: blocked("Sure, ", stream), CONTENT_FILTER_FAILOVER=1)
    got = both.ask(stream=stream)
    assert said(got) == "Sure, " and b"content_filter" in got.data
    assert len(both.asked) == 2


@BOTH
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": HELLO, "max_tokens": 9}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/completions", {"prompt": "hi"}),
    ],
)
def test_it_holds_on_every_surface(pair, stream, path, body):
    both = pair(filtered_first("", stream, "content_filter"), CONTENT_FILTER_FAILOVER=1)
    asked = {"model": "auto", "stream": stream, **body}
    got = both.client.post(path, json=asked, headers=AUTH)
    assert b"hello" in got.data and len(both.asked) == 2


@BOTH
def test_a_refusal_of_claude_is_tried_elsewhere_where_allowed(upstream, make_app, stream):
    end = {"stop_reason": "refusal"}
    message = {"type": "message", "role": "assistant", "content": [], "usage": {}, "model": "c"}
    events = [
        {"type": "message_start", "message": message},
        {"type": "message_delta", "delta": end, "usage": {}},
        {"type": "message_stop"},
    ]
    refused = Stream(chunks=events, done=False) if stream else Reply(200, {**message, **end})
    one, two = upstream(refused), upstream(good())
    rows = {**provider("anthropic", one, "claude-x"), **provider("groq", two, "m1")}
    body = {"model": "anthropic/claude-x", "messages": HELLO, "max_tokens": 9, "stream": stream}
    for setting, mark in ((0, b"refusal"), (1, b"hello")):
        client = make_app(**rows, CONTENT_FILTER_FAILOVER=setting).test_client()
        assert mark in client.post("/v1/messages", json=body, headers=AUTH).data
    assert len(two.requests) == 1


# --- the client's own fault ----------------------------------------------------------


@BOTH
@pytest.mark.parametrize("status", [400, 422])
def test_the_clients_own_400_is_told_once_and_not_replayed(pair, status, stream):
    reason = {"error": {"message": "messages.0.role: must be user", "type": "invalid_request"}}
    both = pair(lambda _: Reply(status, reason))
    got = both.ask(stream=stream)
    assert got.status_code == 400
    assert got.json["error"]["type"] == "invalid_request_error"
    assert "messages.0.role: must be user" in got.json["error"]["message"]
    assert len(both.asked) == 1
    assert got.headers["X-Hermes-Attempts"] == "1"


def test_a_400_rests_no_key_and_opens_no_breaker(pair):
    answers = iter([Reply(400, ERROR)] * 12)
    both = pair(lambda request: next(answers, None) or good()(request))
    for _ in range(12):
        assert both.ask().status_code == 400
    assert said(both.ask()) == "hello"


@pytest.mark.parametrize(
    "reason",
    [
        {"error": {"message": "This model's maximum context length is 8192 tokens. However ...",
                   "code": "context_length_exceeded", "type": "invalid_request_error"}},
        {"error": {"message": "prompt is too long: 9001 tokens > 8192 maximum"}},
    ],
)  # fmt: skip
def test_a_context_overflow_looks_for_a_bigger_window(pair, reason):
    both = pair(failing_first(Reply(400, reason)))
    assert said(both.ask()) == "hello"


def test_a_context_overflow_everywhere_is_told_as_one(pair):
    reason = {"message": "maximum context length is 8192 tokens", "code": "context_length_exceeded"}
    both = pair(lambda _: Reply(400, {"error": reason}))
    got = both.ask()
    assert got.status_code == 400
    assert got.json["error"]["code"] == "context_length_exceeded"


def test_a_bad_key_told_as_a_400_is_not_the_clients_fault(pair):
    reason = {"error": {"code": 400, "message": "API key not valid. Please pass a valid API key."}}
    both = pair(failing_first(Reply(400, [reason])))
    assert said(both.ask()) == "hello"


# --- exhaustion -----------------------------------------------------------------------


@BOTH
def test_all_limited_is_a_429_with_the_soonest_recovery(pair, stream):
    both = pair(
        lambda _: Reply(429, LIMITED, {"Retry-After": "90"}),
        lambda _: Reply(429, LIMITED, {"Retry-After": "40"}),
    )
    for _ in range(2):  # at first by the providers, then by their cooldowns alone
        got = both.ask(stream=stream)
        assert got.status_code == 429
        assert got.json["error"]["type"] == "rate_limit_error"
        assert 37 <= int(got.headers["Retry-After"]) <= 41
    assert len(both.asked) == 2


SPENT = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2m59s"}


@pytest.mark.parametrize(
    ("headers", "body", "low", "high"),
    [
        ({"Retry-After": "17"}, LIMITED, 16, 18),
        ({"Retry-After": "1.9"}, LIMITED, 1, 2),
        ({"Retry-After": "0"}, LIMITED, 1, 2),
        ({"Retry-After": "date"}, LIMITED, 80, 91),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, LIMITED, 1, 60),
        ({"Retry-After": "inf"}, LIMITED, 1, 61),
        ({"Retry-After": "nan"}, LIMITED, 1, 61),
        ({"Retry-After": "-5"}, LIMITED, 1, 61),
        ({"Retry-After": "1e400"}, LIMITED, 1, 10**9),
        ({"Retry-After": "99999999999999999999"}, LIMITED, 1, 10**9),
        ({"Retry-After": "soon"}, LIMITED, 1, 61),
        ({"Retry-After": ""}, LIMITED, 1, 61),
        ({}, LIMITED, 1, 61),
        ({"retry-after-ms": "12000"}, LIMITED, 11, 13),
        (SPENT, LIMITED, 170, 180),
        ({}, {"error": {"message": "Please try again in 50.59s."}}, 49, 52),
        ({}, {"error": {"message": "Please try again in 7m12.3s."}}, 430, 434),
        ({}, [{"error": {"code": 429, "details": [{"retryDelay": "17s"}]}}], 16, 19),
        ({}, {"error": {"type": "usage_limit_reached", "resets_in_seconds": 123}}, 121, 125),
    ],
)  # fmt: skip
def test_the_stated_pause_is_understood(single, headers, body, low, high):
    if headers.get("Retry-After") == "date":
        headers = {"Retry-After": formatdate(time.time() + 90, usegmt=True)}
    up, client = single([Reply(429, body, headers)])
    got = post(client)
    assert got.status_code == 429
    assert low <= int(got.headers["Retry-After"]) <= high
    again = post(client)  # a pause of a few seconds is waited for
    assert again.status_code == 429 and (low < 5 or len(up.requests) == 1)


def test_a_rested_key_comes_back(single):
    up, client = single([Reply(429, LIMITED, {"Retry-After": "1"}), chat("back")])
    assert post(client).status_code == 429
    time.sleep(1.2)
    assert said(post(client)) == "back"


def test_a_retry_after_on_a_200_rests_nothing(single):
    up, client = single([Reply(200, completion("a"), {"Retry-After": "39"}), chat("b")])
    assert [said(post(client)), said(post(client))] == ["a", "b"]


@BOTH
@pytest.mark.parametrize("fault", ["401", "402", "403", "404", "500", "reset", "html", "silence"])
def test_when_all_fail_otherwise_it_is_an_honest_503(pair, fault, stream):
    both = pair(lambda _: FAULTS[fault][stream], **patience(fault, 0.3))
    got = both.ask(stream=stream)
    assert got.status_code == 503
    assert got.json["error"]["type"] == "router_error"
    assert got.headers["X-Request-ID"]
    assert got.headers["X-Hermes-Attempts"] == "2"
    assert "key-1" not in got.text


# --- keys and models --------------------------------------------------------------------


def by_key(faults: dict[tuple[str, str], Answer]):
    """A provider on which some (key, model) pairs fail."""

    def answer(request: Request) -> Answer:
        fault = faults.get((request.key, request.model))
        return fault or good(f"{request.key}/{request.model}")(request)

    return answer


@BOTH
def test_a_cooldown_is_per_key_and_model(single, stream):
    script = by_key({("k1", "m1"): Reply(429, LIMITED, {"Retry-After": "60"})})
    up, client = single(script, models=("m1", "m2"), keys="k1,k2", ROTATION_MODE="sequential")
    first = [said(post(client, model="groq/m1", stream=stream)) for _ in range(3)]
    assert first == ["k2/m1"] * 3
    assert said(post(client, model="groq/m2", stream=stream)) == "k1/m2"
    asked = [(r.key, r.model) for r in up.requests]
    assert asked.count(("k1", "m1")) == 1


@BOTH
def test_one_bad_key_of_two_fails_no_request(single, stream):
    up, client = single(by_key({("bad", "m1"): Reply(401, ERROR)}), keys="bad,fine")
    answers = [said(post(client, stream=stream)) for _ in range(6)]
    assert answers == ["fine/m1"] * 6
    assert [r.key for r in up.requests].count("bad") == 1  # quarantined, not asked every time


@pytest.mark.parametrize("status", [401, 402, 429])
def test_every_sibling_key_is_tried(single, status):
    bad = {(f"k{n}", "m1"): Reply(status, ERROR) for n in range(5)}
    up, client = single(by_key(bad), keys="k0,k1,k2,k3,k4,fine")
    assert said(post(client)) == "fine/m1"
    keys = [r.key for r in up.requests]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("status", [401, 429, 500])
def test_the_last_of_many_keys_is_tried_where_nobody_else_is(single, status):
    bad = {(f"k{n}", "m1"): Reply(status, ERROR) for n in range(30)}
    up, client = single(by_key(bad), keys=",".join([*(f"k{n}" for n in range(30)), "fine"]))
    assert said(post(client)) == "fine/m1"
    assert len(up.requests) == 31


@pytest.mark.parametrize(("status", "most"), [(401, 16), (429, 16), (500, 3), (529, 3)])
def test_many_keys_of_one_provider_keep_nobody_from_being_asked(upstream, serve, status, most):
    names = ("groq", "gemini")
    ups = [upstream(Reply(status, ERROR)) for _ in names]
    keys = ",".join(f"key-{n}" for n in range(60))
    rows = [provider(name, up, "m1", keys=keys) for name, up in zip(names, ups, strict=True)]
    fine = provider("mistral", upstream(good("fine")), "gpt-5")  # too strong: it comes last
    live = serve(**rows[0], **rows[1], **fine)
    assert live.chat().json()["choices"][0]["message"]["content"] == "fine"
    assert [len(up.requests) for up in ups] == [most, most]


def test_a_403_on_one_model_leaves_the_other_model_usable(single):
    up, client = single(by_key({("k1", "m1"): Reply(403, ERROR)}), models=("m1", "m2"))
    assert {said(post(client)) for _ in range(4)} == {"k1/m2"}


@pytest.mark.parametrize("status", [404, 410])
def test_a_model_that_is_gone_is_not_asked_for_again(single, status):
    up, client = single(by_key({("k1", "m1"): Reply(status, ERROR)}), models=("m1", "m2"))
    assert {said(post(client)) for _ in range(6)} == {"k1/m2"}
    assert [r.model for r in up.requests].count("m1") == 1


def test_a_500_on_one_model_leaves_the_other_model_usable(single):
    up, client = single(by_key({("k1", "m1"): Reply(500, ERROR)}), models=("m1", "m2"))
    assert {said(post(client)) for _ in range(4)} == {"k1/m2"}


def test_round_robin_uses_every_key(single):
    up, client = single(by_key({}), keys="k1,k2,k3")
    assert {said(post(client)) for _ in range(6)} == {"k1/m1", "k2/m1", "k3/m1"}


def test_sequential_stays_on_the_first_key(single):
    up, client = single(by_key({}), keys="k1,k2,k3", ROTATION_MODE="sequential")
    assert {said(post(client)) for _ in range(6)} == {"k1/m1"}


# --- health --------------------------------------------------------------------------------


def test_a_failing_provider_is_left_alone_after_a_while(pair):
    both = pair(lambda _: Reply(500, ERROR), good(), BREAKER_MIN_SAMPLES="2", BREAKER_WINDOW="4")
    for _ in range(20):
        assert said(both.ask()) == "hello"
    assert len(both.groq.requests) <= 6


def test_embeddings_keep_the_order_of_the_settings_but_who_fails_comes_last(upstream, make_app):
    vectors = {"data": [{"embedding": [0.5], "index": 0, "object": "embedding"}], "model": "e1"}
    ups = {name: upstream(Reply(200, vectors)) for name in ("groq", "mistral")}
    rows = {k: v for name, up in ups.items() for k, v in provider(name, up).items()}
    app = make_app(**rows, GROQ_EMBED_MODEL="e1", MISTRAL_EMBED_MODEL="e1")

    def asked() -> str:
        got = app.test_client().post("/v1/embeddings", json={"input": "a"}, headers=AUTH)
        return got.headers["X-Provider"]

    assert [asked() for _ in range(4)] == ["groq"] * 4
    app.extensions["router"].breakers.note("groq", False)  # one of five: degraded, not open
    assert [asked() for _ in range(4)] == ["mistral"] * 4


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [("chat/completions", {"messages": HELLO}, "All providers exhausted"),
     ("embeddings", {"input": "a"}, "All embedding providers exhausted")],
)  # fmt: skip
def test_that_nobody_answered_is_told(upstream, make_app, path, body, said):
    up = upstream(lambda _: Reply(500, ERROR))
    client = make_app(**provider("groq", up), GROQ_EMBED_MODEL="e1").test_client()
    got = client.post(f"/v1/{path}", json=body, headers=AUTH)
    assert (got.status_code, got.json["error"]["type"]) == (503, "router_error")
    assert got.json["error"]["message"].startswith(f"{said}: groq/")


def test_when_every_breaker_is_open_all_are_tried_again(single):
    broken = [True]
    up, client = single(
        lambda request: Reply(500, ERROR) if broken else good()(request),
        BREAKER_MIN_SAMPLES="1",
        BREAKER_WINDOW="2",
    )
    statuses = {post(client).status_code for _ in range(3)}
    assert statuses == {503}
    broken.clear()
    until(lambda: post(client).status_code == 200, 20)


def test_429s_do_not_open_the_breaker(single):
    limited = [Reply(429, LIMITED, {"Retry-After": "1"})] * 4
    settings = {"BREAKER_MIN_SAMPLES": "1", "BREAKER_WINDOW": "2"}
    up, client = single([*limited, chat("fine")], keys="k1,k2,k3,k4,k5", **settings)
    assert said(post(client)) == "fine"
    assert not status(client)["providers"]["groq"]["breaker"]["open"]


def status(client):
    return client.get("/v1/status", headers=AUTH).json


# --- after the first words: told, never faked -----------------------------------------------

HALF = chunks("one ", "two ", "three ")
AFTER_TWO = len(b"".join(sse(chunk) for chunk in HALF[:3]))  # role, "one ", "two "
HELD = {"chunks": HALF, "hold_after": 3}  # the rest is sent when the client has the first words
SAYING = [*HALF[:3], ERROR]
NAMING = [*HALF[:3], b"event: error\n" + sse(ERROR)]
BESIDE = [*HALF[:3], {**delta(content=""), **ERROR}]
DEATHS = {
    "reset": Stream(**HELD, stop_at=AFTER_TWO),
    "reset-inside-an-event": Stream(**HELD, stop_at=AFTER_TWO + 25),
    "fin": Stream(**HELD, stop_at=AFTER_TWO, ending="fin"),
    "fin-inside-an-event": Stream(**HELD, stop_at=AFTER_TWO + 25, ending="fin"),
    "short-of-its-length": Stream(**HELD, stop_at=AFTER_TWO, ending="fin", framing="length"),
    "fin-without-framing": Stream(chunks=HALF[:3], done=False, framing="close"),
    "clean-end-without-finish": Stream(chunks=HALF[:3], done=False),
    "error-event": Stream(chunks=SAYING, hold_after=3, done=False),
    "error-event-and-done": Stream(chunks=SAYING, hold_after=3),
    "named-error-event": Stream(chunks=NAMING, hold_after=3, done=False),
    "error-beside-choices": Stream(chunks=BESIDE, hold_after=3, done=False),
    "error-beside-choices-and-done": Stream(chunks=BESIDE, hold_after=3),
    "silence": Stream(**HELD),
}


@pytest.mark.parametrize("death", DEATHS)
def test_death_after_the_first_words_is_told_and_nothing_is_faked(pair, death):
    both = pair(lambda _: DEATHS[death], STREAM_IDLE_TIMEOUT="1", RESCUE="0")
    got = both.ask(stream=True)
    assert got.status_code == 200
    if death != "silence":
        both.groq.open_gate()
        both.cerebras.open_gate()
    events = [data for _, data in events_of(got.data)]
    assert "[DONE]" not in events
    *before, last = [json.loads(data) for data in events]
    assert last["error"]["message"]
    assert [chunk for chunk in before if "error" in chunk] == []
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in before) == "one two "
    assert all(c["choices"][0]["finish_reason"] is None for c in before)
    assert len(both.asked) == 1


@pytest.mark.parametrize("error", [SAYING, NAMING, BESIDE], ids=["data", "named", "beside"])
def test_an_error_right_behind_the_first_words_is_rescued_or_told(pair, error):
    """Whether the client has the words by then is a matter of luck; a fake end is not allowed."""
    one_write = [b"".join(map(sse, error))]
    both = pair(failing_first(Stream(chunks=one_write), "rescued"))
    got = both.ask(stream=True)
    assert got.status_code == 200
    last = events_of(got.data)[-1][1]
    words = text_of(got.data)
    assert words.endswith("rescued") if last == "[DONE]" else "error" in json.loads(last)


@pytest.mark.parametrize("done", [True, False])
def test_a_finish_without_done_is_a_whole_answer(pair, done):
    both = pair(lambda _: Stream(chunks=chunks("all", with_usage=False), done=done))
    assert text_of(both.ask(stream=True).data) == "all"
    assert b'"error"' not in both.ask(stream=True).data


def test_a_dead_stream_counts_against_the_provider(pair):
    both = pair(lambda _: DEATHS["reset"], good(), BREAKER_MIN_SAMPLES="2", BREAKER_WINDOW="4")
    bodies = [both.ask(stream=True).data for _ in range(20)]
    assert len(both.groq.requests) <= 6
    assert text_of(bodies[-1]) == "hello"


# --- the client leaves ------------------------------------------------------------------------


def open_request(live, **changes) -> socket.socket:
    """Send a chat request over a bare socket, and do not read the answer."""
    body = json.dumps({"model": "hermes-router", "messages": HELLO, **changes})
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: router",
        f"Authorization: {AUTH['Authorization']}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    sock = socket.create_connection(("127.0.0.1", live.port), timeout=10)
    sock.sendall("\r\n".join([*head, "", body]).encode())
    return sock


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    got = b""
    while mark not in got:
        piece = sock.recv(65536)
        assert piece, got
        got += piece
    return got


LONG = {"TTFT_TIMEOUT": "30", "STREAM_IDLE_TIMEOUT": "30"}


def assert_let_go(request: Request, left_at: float) -> None:
    """The provider's connection was closed within a second of the client's going away."""
    assert request.closed.wait(5), "the upstream connection stayed open"
    assert request.closed_at - left_at < 1.0


@pytest.mark.parametrize("answer", ["whole", "stream", "stream-headers", "stream-role"])
def test_a_client_that_leaves_while_waiting_frees_the_provider(upstream, serve, answer):
    waiting = {
        "whole": Hang(30),
        "stream": Hang(30),
        "stream-headers": Stream(chunks=ROLE_ONLY, hold_after=0),
        "stream-role": Stream(chunks=ROLE_ONLY * 2, hold_after=1),
    }[answer]
    up, spare = upstream(waiting), upstream(good())
    live = serve(**{**provider("groq", up), **provider("cerebras", spare), **LONG})
    sock = open_request(live, model="groq/m1", stream=answer != "whole")
    request = up.wait_for(1)[0]
    time.sleep(0.2)
    left_at = time.monotonic()
    sock.close()
    assert_let_go(request, left_at)
    time.sleep(0.2)
    assert not spare.requests  # nobody is left to answer
    assert live.chat(model="cerebras/m1").status_code == 200


def test_a_client_that_leaves_in_the_middle_frees_the_provider(upstream, serve):
    up = upstream(Stream(chunks=HALF, hold_after=3))
    live = serve(**provider("groq", up), **LONG)
    sock = open_request(live, stream=True)
    read_until(sock, b"two ")
    left_at = time.monotonic()
    sock.close()
    assert_let_go(up.requests[0], left_at)


def test_a_client_that_leaves_during_a_flood_frees_the_provider(upstream, serve):
    flood = Stream(chunks=[delta(content="x" * 500)] * 20_000, gap=0.001)
    up = upstream(flood)
    live = serve(**provider("groq", up), **LONG)
    sock = open_request(live, stream=True)
    read_until(sock, b"xxx")
    left_at = time.monotonic()
    sock.close()
    assert_let_go(up.requests[0], left_at)


def test_a_client_that_leaves_does_not_count_against_the_provider(upstream, serve):
    script = iter([Hang(30)] * 3)
    up = upstream(lambda request: next(script, None) or good()(request))
    live = serve(**provider("groq", up), **LONG, BREAKER_MIN_SAMPLES="1", BREAKER_WINDOW="4")
    for number in range(3):
        sock = open_request(live)
        up.wait_for(number + 1)
        sock.close()
        assert up.requests[number].closed.wait(5)
    got = live.chat()
    assert (got.status_code, got.headers["X-Hermes-Attempts"]) == (200, "1")


# --- over the wire ------------------------------------------------------------------------------


def test_words_arrive_as_they_are_said(upstream, serve):
    up = upstream(Stream(chunks=HALF, hold_after=2))
    live = serve(**provider("groq", up), **LONG)
    got = live.chat(stream=True)
    lines = got.iter_lines()
    seen = next(line for line in lines if b"one " in line)
    assert seen and not up.requests[0].done.is_set()
    up.open_gate()
    rest = b"\n".join(lines)
    assert b"three " in rest and rest.rstrip().endswith(b"data: [DONE]")


def test_upstream_connections_are_kept_alive(upstream, serve):
    up = upstream(good())
    live = serve(**provider("groq", up))
    for number in range(6):
        got = live.chat(stream=bool(number % 2))
        assert got.status_code == 200 and got.content
    assert up.connections <= 2


@BOTH
def test_a_provider_that_hangs_up_after_each_answer_is_no_failure(upstream, make_app, stream):
    """Keep-alive was promised, and the connection is closed all the same."""
    answer = chat_stream("hi") if stream else chat("hi")
    length = len(answer.payload())
    up = upstream(replace(answer, framing="length", stop_at=length, ending="fin"))
    client = make_app(**provider("groq", up)).test_client()
    for number in range(5):
        got = post(client, stream=stream)
        assert (said(got), got.headers["X-Hermes-Attempts"]) == ("hi", "1")
        until(lambda: not up.live)
        assert len(up.requests) == number + 1


@BOTH
def test_a_kept_connection_that_dies_under_the_request_is_replaced(upstream, make_app, stream):
    script = iter([None, Reset(), None, Reset(), None])
    up = upstream(lambda request: next(script) or good()(request))
    client = make_app(**provider("groq", up)).test_client()
    for _ in range(3):
        got = post(client, stream=stream)
        assert (said(got), got.headers["X-Hermes-Attempts"]) == ("hello", "1")


def test_a_connection_to_the_router_outlives_a_stream(upstream, serve):
    live = serve(**provider("groq", upstream(good())))
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=10)
    sockets = set()
    for number in range(6):
        body = {"model": "hermes-router", "messages": HELLO, "stream": bool(number % 2)}
        headers = {**AUTH, "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        sockets.add(connection.sock)
        answer = connection.getresponse()
        assert answer.status == 200 and b"hello" in answer.read()
    connection.close()
    assert len(sockets) == 1


@BOTH
def test_a_long_wait_for_the_first_word_may_exceed_the_idle_limit(single, stream):
    answer = chat_stream("late", delay=1.0) if stream else Reply(200, completion("late"), delay=1.0)
    _, client = single([answer], TTFT_TIMEOUT="10", STREAM_IDLE_TIMEOUT="0.3")
    got = post(client, stream=stream)
    assert (got.status_code, said(got)) == (200, "late")


@BOTH
def test_killing_the_provider_under_load_shows_nowhere(upstream, serve, stream):
    first, second = upstream(good("a")), upstream(good("b"))
    live = serve(**{**provider("groq", first), **provider("cerebras", second), **QUICK})
    results: list[tuple[int, str]] = []

    def run() -> None:
        with requests.Session() as session:
            session.trust_env = False
            for _ in range(15):
                body = {"model": "hermes-router", "messages": HELLO, "stream": stream}
                url = f"{live.url}/v1/chat/completions"
                got = session.post(url, json=body, headers=AUTH, timeout=30)
                text = text_of(got.content) if stream else got.text
                results.append((got.status_code, text))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(results) > 8, 30)
    # A stream that was already committed may be cut by the kill itself: let those finish first.
    first.script = lambda _: Reset()
    first.close()
    for thread in threads:
        thread.join(60)
    assert len(results) == 60
    assert {code for code, _ in results} == {200}
    assert all(text for _, text in results)


@BOTH
def test_a_redirect_does_not_carry_the_key_elsewhere(upstream, make_app, stream):
    thief = upstream(good("stolen"))
    to = {"Location": f"{thief.url}/v1/chat/completions"}
    first = upstream(*[Reply(code, b"", to) for code in (302, 307, 308, 301)])
    app = make_app(**provider("groq", first), **QUICK)
    got = post(app.test_client(), stream=stream)
    assert got.status_code == 503
    assert not thief.requests


def test_the_whole_request_has_a_deadline(pair):
    both = pair(lambda _: Hang(30), TTFT_TIMEOUT="20", REQUEST_DEADLINE="0.7")
    started = time.monotonic()
    got = both.ask()
    assert got.status_code in (503, 504)
    assert time.monotonic() - started < 5
    assert len(both.asked) == 1


def test_a_stream_with_only_a_role_and_then_words_is_one_answer(pair):
    both = pair(lambda _: chat_stream("a", "b", "c"))
    got = both.ask(stream=True)
    assert (said(got), len(both.asked)) == ("abc", 1)
    assert got.headers["Cache-Control"].startswith("no-")
    assert got.headers["X-Accel-Buffering"] == "no"


def test_a_client_may_allow_other_models_than_the_one_it_named(pair):
    both = pair(lambda _: Reply(503, "down"), good(), STRICT_MODEL="1")
    body = {"model": "groq/m1", "messages": HELLO}
    refused = both.client.post("/v1/chat/completions", json=body, headers=AUTH)
    assert refused.status_code == 503 and not both.cerebras.requests
    allowed = {**AUTH, "X-Route-Fallback": "allow"}
    assert said(both.client.post("/v1/chat/completions", json=body, headers=allowed)) == "hello"
