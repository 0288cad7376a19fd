"""Odd but possible: what clients, gateways and providers put on the wire, beyond the usual."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import pytest
from upstream import (
    AUTH,
    HELLO,
    Reply,
    Request,
    Stream,
    chat_stream,
    chunks,
    completion,
    delta,
    good,
    html,
    provider,
    sse,
    text_of,
)

BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
PATHS = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/messages": {"messages": HELLO, "max_tokens": 99},
    "/v1/responses": {"input": "hello"},
}


@pytest.fixture
def live(upstream, serve):
    """live(script, SETTING=value): a router before an odd provider, and a sane one behind it."""

    def make(script, spare="spare", **settings):
        rows = provider("cerebras", upstream(script), "m1")
        rows |= provider("groq", upstream(good(spare)), "m2")
        return serve(**rows, **settings)

    return make


def ask(live, stream=False, path="/v1/chat/completions", **changes):
    body = {"model": "cerebras/m1", "stream": stream, **PATHS[path], **changes}
    return live.session.post(live.url + path, json=body, timeout=30)


def said(got) -> str:
    assert got.status_code == 200, got.text
    if got.headers["Content-Type"].startswith("text/event-stream"):
        return text_of(got.content)
    return got.json()["choices"][0]["message"]["content"]


# --- what a client sends --------------------------------------------------------------------


@pytest.fixture
def knock(live):
    """knock(): (socket to a router, its head lines so far)."""
    socks = []
    router = live(good("odd"))

    def make() -> socket.socket:
        socks.append(socket.create_connection(("127.0.0.1", router.port), timeout=10))
        return socks[-1]

    yield make
    for sock in socks:
        sock.close()


RAW = json.dumps({"model": "cerebras/m1", "messages": HELLO}).encode()
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: router\r\nContent-Type: application/json\r\n"
    b"Authorization: " + AUTH["Authorization"].encode() + b"\r\n"
)


def answer_of(sock: socket.socket) -> tuple[bytes, dict]:
    """(status line, body) of the next answer that is not an interim one."""
    file = sock.makefile("rb")
    while True:
        status = file.readline()
        headers = {}
        while (line := file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        if b" 100 " not in status:
            return status, json.loads(file.read(int(headers["content-length"])))


def test_a_client_that_waits_for_100_continue(knock):
    sock = knock()
    sock.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(RAW))
    assert sock.recv(100, socket.MSG_PEEK).startswith(b"HTTP/1.1 100 ")
    sock.sendall(RAW)
    status, body = answer_of(sock)
    assert b" 200 " in status and body["choices"][0]["message"]["content"] == "odd"


def test_a_chunked_request_with_extensions_and_trailers(knock):
    sock = knock()
    half = len(RAW) // 2
    body = b'%x;name="v;"\r\n%b\r\n%X\r\n%b\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n'
    body %= (half, RAW[:half], len(RAW) - half, RAW[half:])
    sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n" + body)
    assert b" 200 " in answer_of(sock)[0]
    sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(RAW) + RAW)
    assert b" 200 " in answer_of(sock)[0], "the connection is where it should be"


@pytest.mark.parametrize(
    "model", ["cerebras/m1\r\nX-Evil: 1", "cerebras/\x00", "groq/é", "cerebras/" + "m" * 5000]
)
@pytest.mark.parametrize("path", PATHS)
def test_a_models_name_gets_into_no_header(live, path, model):
    got = ask(live(good("odd")), path=path, model=model)
    assert got.status_code < 500 and "X-Evil" not in got.headers
    assert all(value.isascii() for value in got.headers.values())


# --- heads of providers ---------------------------------------------------------------------


@pytest.fixture
def wire() -> Iterator[Callable[[bytes], str]]:
    """wire(answer, hold=False): the address of a server that sends these bytes to every request.

    It answers as soon as the head has come; `hold` keeps the connection open after that.
    """
    listeners, hold_on = [], threading.Event()

    def make(answer: bytes, hold: bool = False) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def run() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    data = b""
                    while b"\r\n\r\n" not in data and (piece := sock.recv(65536)):
                        data += piece
                    sock.sendall(answer)
                    if hold:
                        hold_on.wait(20)

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield make
    hold_on.set()
    for listener in listeners:
        listener.close()


WHOLE = json.dumps(completion("odd")).encode()
LENGTH = b"Content-Length: %d\r\n" % len(WHOLE)
JSON = b"Content-Type: application/json\r\n"
SPARE = "spare"
HEADS = {
    "equal-lengths": (b"HTTP/1.1 200 OK\r\n" + JSON + LENGTH * 2, "odd"),
    "two-lengths": (b"HTTP/1.1 200 OK\r\n" + JSON + b"Content-Length: 9\r\n" + LENGTH, SPARE),
    "two-lengths-turned": (
        b"HTTP/1.1 200 OK\r\n" + JSON + LENGTH + b"Content-Length: 9\r\n",
        SPARE,
    ),
    "a-length-too-long": (b"HTTP/1.1 200 OK\r\n" + JSON + b"Content-Length: 99999\r\n", SPARE),
    "two-types": (b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n" + JSON + LENGTH, "odd"),
    "no-type": (b"HTTP/1.1 200\r\n" + LENGTH, "odd"),
    "early-hints": (
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n" + JSON + LENGTH,
        "odd",
    ),
    "created": (b"HTTP/1.1 201 Created\r\n" + JSON + LENGTH, "odd"),
    "no-content": (b"HTTP/1.1 204 No Content\r\n", SPARE),
    "partial": (b"HTTP/1.1 206 Partial Content\r\n" + JSON + LENGTH, SPARE),
    "moved": (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n" + LENGTH, SPARE),
    "switching": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", SPARE),
    "http-2": (b"HTTP/2 200 OK\r\n" + LENGTH, SPARE),
    "brotli": (b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\n" + JSON + LENGTH, SPARE),
    "zstd": (b"HTTP/1.1 200 OK\r\nContent-Encoding: zstd\r\n" + JSON + LENGTH, SPARE),
    "not-gzip": (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n" + JSON + LENGTH, SPARE),
    "folded": (b"HTTP/1.1 200 OK\r\nX-A: b\r\n  c: d\r\n" + JSON + LENGTH, "odd"),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_every_kind(upstream, serve, wire, name):
    head, expected = HEADS[name]
    body = WHOLE if b"Length" in head else b""
    odd = "\x00" * 40 if name in ("brotli", "zstd") else ""
    sent = head + b"\r\n" + (odd.encode() + body)[: len(body)]
    rows = provider("cerebras", wire(sent), "m1") | provider("groq", upstream(good(SPARE)), "m2")
    assert said(ask(serve(**rows))) == expected


def test_an_answer_before_the_question_was_read(upstream, serve, wire):
    """A gateway that answers from a cache, or refuses, after the head alone."""
    whole = b"HTTP/1.1 200 OK\r\n" + JSON + LENGTH + b"Connection: close\r\n\r\n" + WHOLE
    rows = provider("cerebras", wire(whole, hold=True), "m1")
    long = [{"role": "user", "content": "word " * 100_000}]
    got = ask(serve(**rows), messages=long)
    assert said(got) == "odd"


# --- codings --------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", ["gzip", "zlib", "raw-deflate"])
def test_compressed_although_nobody_asked(live, stream, name):
    def script(request: Request) -> Reply:
        reply = (
            chat_stream("odd")
            if stream
            else Reply(200, WHOLE, {"content-type": "application/json"})
        )
        squeeze = zlib.compressobj(wbits={"gzip": 31, "zlib": 15, "raw-deflate": -15}[name])
        raw = squeeze.compress(reply.payload()) + squeeze.flush()
        coding = "gzip" if name == "gzip" else "deflate"
        return Reply(200, raw, {**reply.head_fields(), "content-encoding": coding})

    assert said(ask(live(script), stream)) == "odd"


def test_a_compressed_stream_is_passed_on_as_it_comes(live):
    """Each event is squeezed and flushed by itself: none waits for the next."""
    squeeze = zlib.compressobj(wbits=31)
    events = [sse(event) for event in chunks("one ", "two ", "three")] + [sse("[DONE]")]
    pieces = [squeeze.compress(e) + squeeze.flush(zlib.Z_SYNC_FLUSH) for e in events]
    headers = {"content-encoding": "gzip"}
    stream = Stream(chunks=[*pieces, squeeze.flush()], done=False, headers=headers, gap=0.15)
    router = live(lambda _: stream)
    body = {"model": "cerebras/m1", "stream": True, "messages": HELLO}
    times, got = [], b""
    with router.session.post(
        f"{router.url}/v1/chat/completions", json=body, stream=True, timeout=20
    ) as answer:
        for piece in answer.iter_content(None):
            times.append(time.monotonic())
            got += piece
    assert text_of(got) == "one two three"
    assert times[-1] - times[0] > 0.4


@BOTH
def test_a_bomb_is_given_up(live, stream):
    bomb = gzip.compress(b'{"a": "' + b" " * (200 << 20))
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert said(ask(live(lambda _: Reply(200, bomb, headers)), stream)) == "spare"


# --- events ---------------------------------------------------------------------------------

TWO = [
    delta(role="assistant", content=""),
    delta(content="one "),
    delta(content="two"),
    delta("stop"),
]


def lines(end: bytes, before: bytes = b"", data: bytes = b"data: ") -> bytes:
    told = [json.dumps(event).encode() for event in TWO] + [b"[DONE]"]
    return b"".join(before + data + text + end + end for text in told)


STREAMS = {
    "bom": b"\xef\xbb\xbf" + lines(b"\n"),
    "cr": lines(b"\r"),
    "crlf": lines(b"\r\n"),
    "no-space": lines(b"\n", data=b"data:"),
    "ids": lines(b"\n", b"id: 7\n"),
    "retry": b"retry: 3000\n\n" + lines(b"\n", b"event: message\nid: 1\nretry: 1\n"),
    "comments": b": hello\n\n" + lines(b"\n", b": a comment\n"),
    "unknown-fields": lines(b"\n", b"x-field: 1\nlonely\n"),
    "padding": b"\n\n\n" + b" " * 2000 + b"\n\n" + lines(b"\n"),
    "many-blank-lines": lines(b"\n").replace(b"\n\n", b"\n\n\n\n"),
    "no-last-blank-line": lines(b"\n")[:-2],
    "two-lines": lines(b"\n").replace(b', "choices"', b',\ndata: "choices"'),
}


@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STREAMS)
def test_events_of_every_kind(live, name, path, size):
    raw = STREAMS[name]
    parts = [raw[at : at + size] for at in range(0, len(raw), size)] if size else [raw]
    got = ask(live(lambda _: Stream(chunks=parts, done=False)), True, path)
    assert got.status_code == 200 and "spare" not in got.text, got.text
    if path == "/v1/chat/completions":
        one_kind = got.content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        assert text_of(one_kind) == "one two"
    else:
        assert b'"one "' in got.content and b'"two"' in got.content
    assert b'"error":{' not in got.content


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f\x98"])
def test_bytes_that_are_no_utf_8_reach_no_client(live, path, bad):
    events = [sse(event) for event in TWO]
    events[2] = events[2].replace(b"two", b"two" + bad)
    got = ask(live(lambda _: Stream(chunks=events)), True, path)
    text = got.content.decode()  # strict
    assert "one " in text and "two\ufffd" in text and '"error":{' not in text


@pytest.mark.parametrize("path", PATHS)
def test_half_a_character_in_each_of_two_events(live, path):
    pair = [b'{"content":"\\ud83d"}', b'{"content":"\\ude00!"}']
    events = [b'data: {"choices":[{"index":0,"delta":' + half + b"}]}\n\n" for half in pair]
    got = ask(live(lambda _: Stream(chunks=[*events, delta("stop")])), True, path)
    assert got.status_code == 200 and "spare" not in got.text
    got.content.decode()
    assert "!" in got.text and b'"error":{' not in got.content


@pytest.mark.parametrize("path", PATHS)
def test_an_event_of_five_megabytes(live, path):
    big = "x" * (5 << 20)
    got = ask(live(lambda _: chat_stream("a", big, "b")), True, path)
    assert got.status_code == 200 and got.content.count(b"x") >= 5 << 20
    if path == "/v1/chat/completions":
        assert text_of(got.content) == f"a{big}b"


@BOTH
@pytest.mark.parametrize("pad", [" ", "\n", "\r\n", "\n\n", "\t"])
def test_blanks_before_an_answer_are_no_answer(live, stream, pad):
    """Some gateways keep a connection open with blanks; what follows is one JSON document."""
    body = (pad * 20).encode() + WHOLE
    reply = Reply(200, body, {"content-type": "application/json"}, cuts=range(1, 20), gap=0.01)
    assert said(ask(live(lambda _: reply), stream)) == "odd"


@BOTH
def test_blanks_without_end_are_given_up(live, stream):
    reply = Stream(chunks=[b" \n"] * 500, gap=0.05, done=False)
    limits = {"TTFT_TIMEOUT": "0.5", "TTFT_SWITCH": "0.5"}
    started = time.monotonic()
    assert said(ask(live(lambda _: reply, **limits), stream)) == "spare"
    assert time.monotonic() - started < 10


@BOTH
@pytest.mark.parametrize(
    "answer",
    [html(), Reply(200, "OK"), Reply(200, "null"), Reply(200, '"hello"'), Reply(200, b"\x00" * 99)],
    ids=["html", "text", "null", "string", "zeros"],
)
def test_what_is_no_answer_is_none(live, stream, answer):
    assert said(ask(live(lambda _: answer), stream)) == "spare"


@BOTH
@pytest.mark.parametrize("path", PATHS)
def test_a_byte_order_mark_before_json(live, stream, path):
    headers = {"content-type": "application/json; charset=utf-8"}
    got = ask(live(lambda _: Reply(200, b"\xef\xbb\xbf" + WHOLE, headers)), stream, path)
    assert got.status_code == 200 and "odd" in got.text
    assert not got.content.startswith(b"\xef\xbb\xbf")
    if not stream:
        json.loads(got.content.decode())


def test_two_finishes_and_words_after_the_end(live):
    events = [
        *TWO,
        delta("stop"),
        delta(content="after"),
        b"data: [DONE]\n\n",
        delta(content="late"),
    ]
    got = ask(live(lambda _: Stream(chunks=events)), True)
    assert text_of(got.content).startswith("one two") and "late" not in got.text
    assert got.content.endswith(b"data: [DONE]\n\n")
