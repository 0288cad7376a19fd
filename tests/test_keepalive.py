"""While providers are silent, the client of a stream hears a sign of life in its dialect."""

from __future__ import annotations

import json
import socket

import anthropic
import openai
import pytest
from upstream import (
    AUTH,
    HELLO,
    Hang,
    Reply,
    Request,
    Stream,
    chat,
    chat_stream,
    data_of,
    delta,
    events_of,
    provider,
    sse,
    text_of,
    until,
    usage_chunk,
)

import router

SAID = [delta(content="one "), delta(content="two"), delta("stop")]
ASKED = {
    "chat": ("/v1/chat/completions", {"messages": HELLO}),
    "messages": ("/v1/messages", {"messages": HELLO, "max_tokens": 9}),
    "responses": ("/v1/responses", {"input": "hello"}),
    "completions": ("/v1/completions", {"prompt": "hello"}),
}
SIGNS = {
    "chat": b": keep-alive\n\n",
    "messages": b"event: ping\n",
    "responses": b"event: response.in_progress\n",
    "completions": b": keep-alive\n\n",
}
CODEX = {
    "input": "hello",
    "store": False,
    "prompt_cache_key": "k",
    "include": ["reasoning.encrypted_content"],
}


def ask(live, surface, **changes):
    path, body = ASKED[surface]
    sent = {"model": "auto", "stream": True, **body, **changes}
    return live.session.post(live.url + path, json=sent, timeout=20)


# --- after the first useful event -----------------------------------------------------------


@pytest.mark.parametrize("surface", ASKED)
def test_a_silent_provider_does_not_look_dead(monkeypatch, upstream, serve, surface):
    monkeypatch.setattr(router.Watchdog, "BEAT_S", 0.2)
    up = upstream(Stream(chunks=SAID, gap=0.5))
    live = serve(**provider("groq", up))
    got = ask(live, surface)
    signs = got.content.count(SIGNS[surface])
    assert signs >= 2 and "one " in got.text and "two" in got.text
    if surface == "responses":
        numbers = [json.loads(data)["sequence_number"] for _, data in events_of(got.content)]
        assert numbers == list(range(len(numbers)))
    again = ask(live, surface)
    assert "two" in again.text, "the connection can be used again"


def test_no_sign_of_life_while_events_come(monkeypatch, upstream, serve):
    monkeypatch.setattr(router.Watchdog, "BEAT_S", 0.6)
    up = upstream(Stream(chunks=[delta(content="x")] * 9 + [delta("stop")], gap=0.1))
    live = serve(**provider("groq", up))
    assert b"keep-alive" not in ask(live, "chat").content


def test_signs_of_life_do_not_hide_a_dead_provider(monkeypatch, upstream, serve):
    monkeypatch.setattr(router.Watchdog, "BEAT_S", 0.2)
    up = upstream(Stream(chunks=SAID, hold_after=1))
    live = serve(**provider("groq", up), STREAM_IDLE_TIMEOUT=1)
    got = ask(live, "chat")
    assert b"keep-alive" in got.content and b'"error"' in got.content
    assert b"[DONE]" not in got.content


def call_part(**function):
    call = {"index": 0, "function": function}
    if "name" in function:
        call |= {"id": "call_1", "type": "function"}
    return delta(tool_calls=[call])


@pytest.mark.parametrize("surface", ["chat", "messages", "responses"])
@pytest.mark.parametrize("first", [[delta(content="I write. ")], []], ids=["after-text", "alone"])
def test_a_tool_call_that_is_held_back_is_no_silence(monkeypatch, upstream, serve, surface, first):
    monkeypatch.setattr(router.Watchdog, "BEAT_S", 0.3)
    parts = ["{", '"text"', ": ", '"a', "b", "c", "d", '"', "}"]
    calls = [call_part(name="write", arguments=""), *(call_part(arguments=p) for p in parts)]
    up = upstream(Stream(chunks=[*first, *calls, delta("tool_calls"), usage_chunk()], gap=0.1))
    live = serve(**provider("groq", up), KEEPALIVE_AFTER=0.3)
    got = ask(live, surface)
    assert b'"write"' in got.content
    sign = b": keep-alive" if surface == "responses" and not first else SIGNS[surface]
    assert got.content.count(sign) >= 2, got.content


def test_who_waits_for_a_rescue_hears_of_it(monkeypatch, upstream, serve):
    monkeypatch.setattr(router.Watchdog, "BEAT_S", 0.2)
    cut = upstream(Stream(chunks=SAID[:1], done=False))
    slow = upstream(Stream(chunks=SAID[1:], delay=0.8))
    rows = {**provider("cerebras", cut, "m1"), **provider("groq", slow, "m2")}
    got = ask(serve(**rows), "chat", model="cerebras/m1")
    assert text_of(got.content) == "one two" and got.content.count(SIGNS["chat"]) >= 2


# --- before it ------------------------------------------------------------------------------

FIRST = {**SIGNS, "responses": b": keep-alive\n\n"}


@pytest.mark.parametrize("surface", ASKED)
def test_a_stream_that_nobody_answers_yet_begins_with_a_sign_of_life(upstream, serve, surface):
    up = upstream(Stream(chunks=SAID, delay=0.7))
    live = serve(**provider("groq", up), KEEPALIVE_AFTER=0.2)
    got = ask(live, surface)
    assert got.status_code == 200 and got.headers["Content-Type"] == "text/event-stream"
    assert got.headers["X-Request-ID"] and got.headers["X-Accel-Buffering"] == "no"
    assert got.content.startswith(FIRST[surface]), got.content[:80]
    kinds = [name or "data" for name, _ in events_of(got.content) if name != "ping"]
    assert kinds[0] in ("data", "message_start", "response.created")
    assert "one " in got.text and "two" in got.text
    assert "two" in ask(live, surface).text, "the connection can be used again"


@pytest.mark.parametrize("surface", ASKED)
def test_failing_over_goes_on_unseen_behind_it(upstream, serve, surface):
    bad = upstream(Reply(503, {"error": {"message": "overloaded"}}, delay=0.6))
    rows = {
        **provider("cerebras", bad, "m1"),
        **provider("groq", upstream(chat_stream("hi")), "m2"),
    }
    got = ask(serve(**rows, KEEPALIVE_AFTER=0.2), surface, model="cerebras/m1")
    assert got.content.startswith(FIRST[surface])
    assert b"hi" in got.content and b"overloaded" not in got.content


@pytest.mark.parametrize("surface", ASKED)
def test_a_failure_after_it_is_the_dialects_error_event(upstream, serve, surface):
    limited = Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "40"}, delay=0.6)
    live = serve(**provider("groq", upstream(limited)), KEEPALIVE_AFTER=0.2)
    got = ask(live, surface)
    assert got.status_code == 200 and got.content.startswith(FIRST[surface])
    name, last = events_of(got.content)[-1]
    problem = json.loads(last)
    if surface == "responses":
        assert name == problem["type"] == "response.failed"
        problem = problem["response"]
        assert problem["error"]["code"] == "rate_limit_exceeded"
    elif surface == "messages":
        assert name == problem["type"] == "error"
        assert problem["error"]["type"] == "rate_limit_error"
    else:
        assert problem["error"]["type"] == "rate_limit_error"
    assert "try again in 40s" in problem["error"]["message"]
    for end in (b"[DONE]", b"message_stop", b"response.completed"):
        assert end not in got.content
    (entry,) = live.session.get(live.url + "/v1/logs").json()["entries"]
    assert (entry["http_status"], entry["status"]) == (429, "error"), "what it would have been"


def test_an_error_that_is_told_in_a_stream_is_in_the_log(upstream, serve):
    too_long = {"error": {"message": "too long", "code": "context_length_exceeded"}}
    live = serve(**provider("groq", upstream(Reply(400, too_long))))
    assert events_of(ask(live, "responses").content)[-1][0] == "response.failed"
    (entry,) = live.session.get(live.url + "/v1/logs").json()["entries"]
    assert (entry["http_status"], entry["status"]) == (400, "error")


def test_a_fault_of_ours_after_it_is_told_in_the_stream(upstream, serve, monkeypatch):
    live = serve(**provider("groq", upstream(Reply(503, {}, delay=0.6))), KEEPALIVE_AFTER=0.2)
    monkeypatch.setattr(router.Router, "learn", lambda *_: 1 / 0)
    got = ask(live, "chat")
    assert got.content.startswith(FIRST["chat"])
    assert "internal error" in data_of(got.content)[-1]["error"]["message"]


def test_failures_before_it_keep_their_status(upstream, serve):
    limited = Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "40"})
    live = serve(**provider("groq", upstream(limited)), KEEPALIVE_AFTER=5)
    got = ask(live, "chat")
    assert (got.status_code, got.headers["Retry-After"]) == (429, "40")


@pytest.mark.parametrize(
    ("after", "stream"), [(0, True), (0.1, False)], ids=["turned-off", "a-whole-answer"]
)
def test_nothing_is_sent_before_an_answer(upstream, serve, after, stream):
    up = upstream(Reply(503, {"error": {"message": "no"}}, delay=0.6))
    live = serve(**provider("groq", up), KEEPALIVE_AFTER=after)
    assert ask(live, "chat", stream=stream).status_code == 503


def test_it_does_not_hide_that_nobody_answers(upstream, serve):
    live = serve(**provider("groq", upstream(Hang())), KEEPALIVE_AFTER=0.2, TTFT_TIMEOUT=0.8)
    got = ask(live, "chat")
    assert got.content.startswith(FIRST["chat"])
    assert data_of(got.content)[-1]["error"]["code"] == "all_providers_exhausted"


def test_codex_gets_an_event_because_it_drops_comments(upstream, serve):
    up = upstream(Stream(chunks=SAID, delay=0.6))
    got = ask(serve(**provider("groq", up), KEEPALIVE_AFTER=0.2), "responses", **CODEX)
    kinds = [name for name, _ in events_of(got.content)]
    assert kinds[:2] == ["response.in_progress", "response.created"]
    assert kinds[-1] == "response.completed" and b": keep-alive" not in got.content


def test_bytes_of_a_provider_of_the_same_dialect_stay_as_they_are(upstream, serve):
    events = [
        {"type": "message_start", "message": {"id": "msg_theirs", "role": "assistant"}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn"},
            "usage": {"input_tokens": 3, "output_tokens": 1},
        },
        {"type": "message_stop"},
    ]
    chunks = [f"event: {e['type']}\n".encode() + sse(e) for e in events]
    up = upstream(Stream(chunks=chunks, done=False, delay=0.6))
    got = ask(serve(**provider("anthropic", up), KEEPALIVE_AFTER=0.2), "messages")
    signs, theirs = got.content.split(b"event: message_start", 1)
    assert b"event: message_start" + theirs == b"".join(chunks)
    assert set(events_of(signs)) == {("ping", '{"type": "ping"}')}


def test_a_client_that_leaves_after_it_is_noticed(upstream, serve):
    up = upstream(Hang(30, chat()))
    live = serve(**provider("groq", up), KEEPALIVE_AFTER=0.2)
    path, body = ASKED["chat"]
    with live.session.post(
        live.url + path, json={"model": "auto", "stream": True, **body}, stream=True
    ) as got:
        assert next(got.iter_content(8)).startswith(b": keep-")
    live.session.close()
    assert up.requests[0].closed.wait(20)
    until(lambda: live.app.extensions["router"].gate.inside == 0)


def test_http_1_0_ends_with_the_connection(upstream, serve):
    live = serve(**provider("groq", upstream(Stream(chunks=SAID, delay=0.5))), KEEPALIVE_AFTER=0.2)
    raw = json.dumps({"model": "auto", "stream": True, "messages": HELLO}).encode()
    head = f"POST /v1/chat/completions HTTP/1.0\r\nAuthorization: {AUTH['Authorization']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as sock:
        sock.sendall(head.encode() + raw)
        got = b"".join(iter(lambda: sock.recv(65536), b""))
    body = got.partition(b"\r\n\r\n")[2]
    assert body.startswith(FIRST["chat"]) and text_of(body) == "one two"


# --- official clients -----------------------------------------------------------------------


@pytest.fixture
def slow(upstream, serve):
    """A router whose provider answers long after the stream has begun."""
    made = []

    def answer(request: Request):
        late = Stream(chunks=[*SAID, usage_chunk()], delay=0.5)
        return late if request.key != "dead" else Reply(503, {"error": "no"}, delay=0.5)

    def make(key="live"):
        live = serve(**provider("groq", upstream(answer), keys=key), KEEPALIVE_AFTER=0.1)
        key = AUTH["Authorization"].removeprefix("Bearer ")
        made.append(openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0))
        made.append(anthropic.Anthropic(base_url=live.url, api_key=key, max_retries=0))
        return made[-2:]

    yield make
    for client in made:
        client.close()


def by_chat(clients):
    stream = clients[0].chat.completions.create(model="m", messages=HELLO, stream=True)
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


def by_responses(clients):
    with clients[0].responses.stream(model="m", input="hello") as stream:
        return stream.get_final_response().output_text


def by_messages(clients):
    with clients[1].messages.stream(model="m", messages=HELLO, max_tokens=9) as stream:
        return stream.get_final_text()


@pytest.mark.parametrize("way", [by_chat, by_responses, by_messages])
def test_official_clients_pass_over_it(slow, way):
    assert way(slow()) == "one two"


@pytest.mark.parametrize("way", [by_chat, by_messages])
def test_official_clients_raise_a_failure_behind_it(slow, way):
    with pytest.raises((openai.APIError, anthropic.APIError)):
        way(slow("dead"))
