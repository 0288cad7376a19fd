"""The scripted server itself: a test tool that lies makes every other test worthless."""

from __future__ import annotations

import json
import socket

import pytest
import requests
import urllib3
from upstream import (
    Hang,
    Reply,
    Reset,
    Stream,
    Upstream,
    chat,
    chat_stream,
    completion,
    data_of,
    drip,
    events_of,
    html,
    text_of,
    until,
)


def ask(up: Upstream, **options):
    body = {"model": "m", "messages": []}
    return requests.post(f"{up.url}/v1/chat/completions", json=body, timeout=5, **options)


def test_answers_follow_the_script_and_the_last_one_repeats(upstream):
    up = upstream(Reply(429, {"error": {}}, {"Retry-After": "3"}), chat("a"))
    first, second, third = ask(up), ask(up), ask(up)
    assert (first.status_code, first.headers["retry-after"]) == (429, "3")
    assert second.json() == third.json() == completion("a")
    assert [r.json["model"] for r in up.requests] == ["m"] * 3
    assert up.requests[0].path == "/v1/chat/completions"


def test_a_connection_is_kept_alive(upstream):
    up = upstream(chat())
    with requests.Session() as session:
        for _ in range(3):
            assert session.post(up.url, json={}, timeout=5).status_code == 200
    assert [r.connection for r in up.requests] == [1, 1, 1]


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_every_framing_carries_the_same_bytes(upstream, framing):
    up = upstream(chat_stream("héllo", "wörld", framing=framing))
    answer = ask(up)
    assert answer.headers["content-type"] == "text/event-stream"
    assert text_of(answer.content) == "héllowörld"
    assert events_of(answer.content)[-1] == ("", "[DONE]")


def test_gzip_html_and_drip(upstream):
    up = upstream(Reply(200, {"a": "b"}, gzipped=True), html(), drip(Reply(200, {"a": "b"}), 0.001))
    assert ask(up).json() == {"a": "b"}
    assert "<html>" in ask(up).text
    assert ask(up).json() == {"a": "b"}


@pytest.mark.parametrize("ending", ["reset", "fin"])
def test_a_stream_can_be_cut_at_a_byte(upstream, ending):
    up = upstream(chat_stream("a", "b", stop_at=10, ending=ending))
    answer = ask(up, stream=True)
    got = b""
    with pytest.raises((urllib3.exceptions.ProtocolError, ConnectionError)):
        while piece := answer.raw.read1():
            got += piece
    assert len(got) <= 10 and b"data: {".startswith(got[:7])


@pytest.mark.parametrize("after", [b"", b"HTTP/1.1 200 OK\r\ncontent-ty"])
def test_a_reset_is_a_reset(upstream, after):
    up = upstream(Reset(after))
    with pytest.raises(requests.ConnectionError):
        ask(up)


def test_it_notices_that_the_peer_left(upstream):
    up = upstream(Hang(30), Stream(chunks=[{"n": 1}, {"n": 2}], hold_after=1))
    for number in range(2):
        sock = socket.create_connection(("127.0.0.1", up.port))
        sock.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        up.wait_for(number + 1)
        assert not up.requests[number].closed.wait(0.05)
        sock.close()
        assert up.requests[number].closed.wait(5)


def test_the_gate_lets_held_streams_go_on(upstream):
    up = upstream(Stream(chunks=[{"n": 1}, {"n": 2}], hold_after=1))
    answer = ask(up, stream=True)
    lines = answer.iter_lines()
    assert json.loads(next(lines)[6:]) == {"n": 1}
    up.open_gate()
    assert data_of(b"\n".join(lines)) == [{"n": 2}]


def test_a_closed_server_refuses(upstream):
    up = upstream(Hang(30))
    sock = socket.create_connection(("127.0.0.1", up.port))
    until(lambda: up.live)
    up.close()
    assert sock.recv(1) == b""
    sock.close()
    with pytest.raises(requests.ConnectionError):
        ask(up)
