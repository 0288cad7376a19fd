"""An answer whose provider states no usage carries an estimate that says so, and is counted."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_every_pair import (
    BOTH,
    CASES,
    CLIENTS,
    USED,
    WIRES,
    Made,
    Pair,
    Said,
    matrix,
    named,
    pair,
    speak,
)
from upstream import AUTH, HELLO, Reply, Request, Stream, chat, chunks, data_of, provider

import router

__all__ = ["pair"]  # a fixture

MARK = {"hermes": {"estimated": True}}
LONG = Said("word " * 100)  # 125 tokens at four characters each


def unmetered(script: Callable[[Request], Reply]) -> Callable[[Request], Reply]:
    """The same provider, but it never says what it counted."""

    def answer(request: Request) -> Reply:
        reply = script(request)
        if not isinstance(reply, Stream):
            return replace(reply, body=without_usage(reply.body))
        return replace(reply, chunks=[bare for one in reply.chunks if (bare := bare_event(one))])

    return answer


def bare_event(event: Any) -> Any:
    if isinstance(event, bytes):
        bare = without_usage(json.loads(event.split(b"\ndata: ")[1]))
        if bare["type"] == "message_start":  # no SDK can do without
            bare["message"]["usage"] = {"input_tokens": 9, "output_tokens": 0}
        return named(bare)
    if event["choices"] == []:
        return None
    return without_usage(event)


def unmetered_stream(*texts: str) -> Stream:
    return Stream(chunks=chunks(*texts, with_usage=False))


def without_usage(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_usage(inner) for name, inner in value.items() if name != "usage"}
    return [without_usage(inner) for inner in value] if isinstance(value, list) else value


def answer_of(talk: Pair, stream: bool) -> Made:
    got = talk.post(talk.hello("hello there"), stream=stream)
    assert got.status_code == 200, got.data
    return talk.client.collect(got.data) if stream else got.json


def tallied(talk: Pair) -> router.Tally:
    app = talk.http.application.extensions["router"]
    (name,) = app.directory.services
    return app.usage.tally(name)


@BOTH
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("client", CLIENTS)
def test_an_estimate_stands_in_and_says_so(pair, client, wire, stream):
    talk = pair(client, {wire: unmetered(speak(LONG))})
    whole = answer_of(talk, stream)
    assert whole["usage"] | MARK == whole["usage"]
    usage = talk.client.hear(whole).usage
    assert usage.completion == 125
    assert 0 < usage.prompt < 1000
    assert usage.total == usage.prompt + usage.completion
    tally = tallied(talk)
    assert (tally.prompt_tokens, tally.completion_tokens) == (usage.prompt, 125)
    assert tally.estimated == 1


@BOTH
@pytest.mark.parametrize(("client", "wire", "case"), list(matrix()))
def test_nothing_else_is_lost(pair, client, wire, case, stream):
    talk = pair(client, {wire: unmetered(speak(CASES[case]))})
    heard = talk.client.hear(answer_of(talk, stream))
    said = replace(CASES[case], finish=heard.said.finish)
    assert heard.said == said and heard.usage.completion > 0


@BOTH
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("client", CLIENTS)
def test_what_is_stated_is_not_marked(pair, client, wire, stream):
    talk = pair(client, {wire: speak(LONG)})
    whole = answer_of(talk, stream)
    assert "hermes" not in whole["usage"]
    assert tallied(talk).estimated == 0
    assert tallied(talk).completion_tokens == USED.completion


def test_a_chat_client_that_asks_for_no_usage_gets_none_but_it_is_counted(pair):
    talk = pair("chat", {"chat": unmetered(speak(LONG))})
    got = talk.http.post(
        "/v1/chat/completions", json={"messages": HELLO, "stream": True}, headers=AUTH
    )
    assert b'"usage"' not in got.data
    assert (tallied(talk).completion_tokens, tallied(talk).estimated) == (125, 1)


def test_the_estimate_comes_before_the_end_in_the_stream_that_was_begun(upstream, make_app):
    up = upstream(unmetered_stream("hello"))
    http = make_app(**provider("groq", up)).test_client()
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    got = http.post("/v1/chat/completions", json=body, headers=AUTH)
    *said, counted = data_of(got.data)
    assert counted["choices"] == [] and counted["usage"]["completion_tokens"] == 2
    names = ("id", "object", "created", "model")
    assert [counted[name] for name in names] == [said[0][name] for name in names]
    assert re.search(rb'"usage":\{[^\n]+\n\ndata: \[DONE\]\n\n$', got.data)


def test_zeros_are_no_usage(upstream, make_app):
    reply = chat("hello")
    zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    up = upstream(replace(reply, body={**reply.body, "usage": zeros}))
    http = make_app(**provider("groq", up)).test_client()
    got = http.post("/v1/chat/completions", json={"messages": HELLO}, headers=AUTH)
    assert got.json["usage"] | MARK == got.json["usage"]
    assert got.json["choices"] == reply.body["choices"]


def test_usage_in_a_choice_is_a_usage(upstream, make_app):
    """Moonshot's place for it."""
    counted = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    ended = {"index": 0, "delta": {}, "finish_reason": "stop", "usage": counted}
    events = unmetered_stream("hello").chunks
    up = upstream(Stream(chunks=[*events[:-1], {**events[-1], "choices": [ended]}]))
    app = make_app(**provider("groq", up))
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    got = app.test_client().post("/v1/chat/completions", json=body, headers=AUTH)
    assert got.data.count(b'"usage"') == 1
    tally = app.extensions["router"].usage.tally("groq")
    assert (tally.prompt_tokens, tally.completion_tokens, tally.estimated) == (3, 4, 0)


def test_a_long_stream_of_which_only_the_beginning_is_kept(upstream, make_app):
    up = upstream(unmetered_stream(*["word " * 40] * 4000))
    app = make_app(**provider("groq", up))
    body = {"messages": HELLO, "stream": True}
    assert app.test_client().post("/v1/chat/completions", json=body, headers=AUTH).data
    tally = app.extensions["router"].usage.tally("groq")
    assert tally.completion_tokens == pytest.approx(200_000, rel=0.05)


def test_a_stream_that_breaks_off_is_counted(upstream, make_app):
    whole = unmetered_stream(*["word " * 40] * 9)
    cut = replace(whole, done=False, chunks=whole.chunks[:3], framing="close")
    up = upstream(cut)
    app = make_app(**provider("groq", up), RESCUE=0)
    body = {"messages": HELLO, "stream": True}
    got = app.test_client().post("/v1/chat/completions", json=body, headers=AUTH)
    assert b'"error"' in got.data
    tally = app.extensions["router"].usage.tally("groq")
    assert (tally.completion_tokens, tally.estimated) == (100, 1)


def test_estimates_teach_nothing(upstream, make_app):
    """No window is disproved and no cut prompt suspected by a guess."""
    reply = chat("hello")
    up = upstream(replace(reply, body=without_usage(reply.body)))
    app = make_app(**provider("groq", up, "m"))
    rt = app.extensions["router"]
    rt.lessons.learn_window("groq", "m", 1000)
    told = {"messages": [{"role": "user", "content": "word " * 700}]}
    got = app.test_client().post("/v1/chat/completions", json=told, headers=AUTH)
    assert got.status_code == 200 and got.json["usage"]["prompt_tokens"] > 500
    assert rt.lessons.window("groq", "m") == 1000


def test_an_estimate_is_the_same_however_the_stream_is_cut():
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    calls = [{"index": n, "id": f"call_{n}", "type": "function",
              "function": {"name": "get_time", "arguments": '{"zone": "Europe/Berlin"}'}}
             for n in (0, 1)]  # fmt: skip
    deltas = [{"content": "Let me look."}, *({"tool_calls": [call]} for call in calls)]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls"})
    events = [router.encode_event({**head, "choices": [choice]}) for choice in choices]
    events.append(router.DONE)
    found = set()
    for cuts in itertools.product((False, True), repeat=len(events) - 1):
        ask = router.Ask(router.CHAT, b"{}", {}, {}, router.Guard(), True, True)
        flow = router.Passage(router.DIALECTS["chat"], ask, "groq").flow()
        told, block = b"", b""
        for event, cut in zip(events, (*cuts, True), strict=True):
            block += event
            if cut:
                told, block = told + flow.take(block), b""
        (usage,) = re.findall(rb'"completion_tokens":\s*(\d+)', told)
        found.add((int(usage), flow.spent().completion))
    assert len(found) == 1 and min(found)[0] > 10


def claude_begins(*texts: str) -> Stream:
    """The beginning of a Messages stream: what it counts is the prompt, and one token."""
    usage = {"input_tokens": 1000, "output_tokens": 1, "cache_read_input_tokens": 4000}
    message = {"id": "m", "type": "message", "role": "assistant", "model": "m1", "content": []}
    events = [
        {"type": "message_start", "message": {**message, "usage": usage}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": text},
            }
            for text in texts
        ),
    ]
    return Stream(chunks=[named(event) for event in events], done=False, hold_after=len(events))


def chat_begins(*texts: str) -> Stream:
    """The beginning of a chat stream that counts as it goes on (NVIDIA's NIM)."""
    counts = {"prompt_tokens": 5000, "completion_tokens": 1, "total_tokens": 5001}
    counts["prompt_tokens_details"] = {"cached_tokens": 4000}
    events = [{**event, "usage": counts} for event in chunks(*texts, with_usage=False)[:-1]]
    return Stream(chunks=events, done=False, hold_after=len(events))


ENDPOINTS = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/messages": {"messages": HELLO, "max_tokens": 500},
    "/v1/responses": {"input": "hello", "store": False},
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(("name", "begin"), [("anthropic", claude_begins), ("nvidia", chat_begins)])
def test_a_client_that_leaves_pays_for_what_was_made(upstream, make_app, path, name, begin):
    up = upstream(begin(*["word " * 40] * 5))
    http = make_app(**provider(name, up, "claude-haiku-4-5")).test_client()
    body = {**ENDPOINTS[path], "stream": True}
    answer = http.post(path, json=body, headers=AUTH, buffered=False)
    text, blocks = b"", iter(answer.iter_encoded())
    while text.count(b"word") < 200:
        text += next(blocks)
    answer.close()  # as the server does when the connection is gone
    row = http.get("/v1/usage", headers=AUTH).json["providers"][name]
    assert (row["prompt_tokens"], row["cached_tokens"]) == (5000, 4000)
    assert 200 <= row["completion_tokens"] <= 300
    (entry,) = http.get("/v1/logs", headers=AUTH).json["entries"]
    assert entry["status"] == "cancelled" and entry["prompt_tokens"] == 5000
