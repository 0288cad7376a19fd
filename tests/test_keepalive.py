"""While a committed stream's provider is silent, the client hears a sign of life in its dialect."""

from __future__ import annotations

import json

import pytest
from upstream import HELLO, Stream, delta, events_of, provider

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


@pytest.mark.parametrize("surface", ASKED)
def test_a_silent_provider_does_not_look_dead(monkeypatch, upstream, serve, surface):
    monkeypatch.setattr(router.Watchdog, "BEAT_S", 0.2)
    up = upstream(Stream(chunks=SAID, gap=0.5))
    live = serve(**provider("groq", up))
    path, body = ASKED[surface]
    got = live.session.post(live.url + path, json={"model": "auto", "stream": True, **body})
    signs = got.content.count(SIGNS[surface])
    assert signs >= 2 and "one " in got.text and "two" in got.text
    if surface == "responses":
        numbers = [json.loads(data)["sequence_number"] for _, data in events_of(got.content)]
        assert numbers == list(range(len(numbers)))
    again = live.session.post(live.url + path, json={"model": "auto", "stream": True, **body})
    assert "two" in again.text, "the connection can be used again"


def test_no_sign_of_life_while_events_come(monkeypatch, upstream, serve):
    monkeypatch.setattr(router.Watchdog, "BEAT_S", 0.6)
    up = upstream(Stream(chunks=[delta(content="x")] * 9 + [delta("stop")], gap=0.1))
    live = serve(**provider("groq", up))
    body = {"model": "auto", "stream": True, "messages": HELLO}
    got = live.session.post(live.url + "/v1/chat/completions", json=body)
    assert b"keep-alive" not in got.content


def test_signs_of_life_do_not_hide_a_dead_provider(monkeypatch, upstream, serve):
    monkeypatch.setattr(router.Watchdog, "BEAT_S", 0.2)
    up = upstream(Stream(chunks=SAID, hold_after=1))
    live = serve(**provider("groq", up), STREAM_IDLE_TIMEOUT=1)
    body = {"model": "auto", "stream": True, "messages": HELLO}
    got = live.session.post(live.url + "/v1/chat/completions", json=body, timeout=10)
    assert b"keep-alive" in got.content and b'"error"' in got.content
    assert b"[DONE]" not in got.content
