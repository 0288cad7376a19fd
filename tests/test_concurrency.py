"""Many callers at once: nobody gets another's answer, and slow streams do not hold up the rest."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from conftest import ROOT
from upstream import (
    AUTH,
    HELLO,
    Hang,
    Reply,
    Request,
    Stream,
    chat,
    chunks,
    completion,
    delta,
    good,
    provider,
    text_of,
    until,
)

HELD = 300


def parrot(request: Request) -> Reply:
    """Says back what the last message said, in small pieces when streaming."""
    nonce = request.json["messages"][-1]["content"]
    if not request.json.get("stream"):
        return Reply(200, completion(nonce, model=request.model), delay=0.01)
    return Stream(chunks=chunks(*(nonce[at : at + 3] for at in range(0, len(nonce), 3))), gap=0.002)


def in_parallel(task: Callable[[int], Any], count: int) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(task, range(count)))


def ask(url: str, content: str, **options: Any) -> requests.Response:
    body = {"model": "hermes-router", "messages": [{"role": "user", "content": content}], **options}
    with requests.Session() as session:
        session.trust_env = False
        return session.post(f"{url}/v1/chat/completions", json=body, headers=AUTH, timeout=60)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_fifty_at_once_and_nobody_gets_anothers_answer(upstream, serve, stream):
    first, second = upstream(parrot), upstream(parrot)
    rows = {**provider("groq", first, "m1", "m2"), **provider("cerebras", second, "m1")}
    live = serve(**rows)

    def one(number: int) -> bool:
        nonce = f"nonce-{number:05d}-{number * 7919:x}-" + "äé"[number % 2] * (number % 40)
        got = ask(live.url, nonce, stream=stream)
        text = text_of(got.content) if stream else got.json()["choices"][0]["message"]["content"]
        return (got.status_code, text) == (200, nonce)

    assert all(in_parallel(one, 50)) and all(in_parallel(one, 50))
    assert len(first.requests) + len(second.requests) == 100


def test_fifty_at_once_while_every_third_answer_fails(upstream, serve):
    def flaky(request: Request):
        number = int(request.json["messages"][-1]["content"].split("-")[1])
        return Reply(200, b"") if number % 3 == 0 else parrot(request)

    rows = {**provider("groq", upstream(flaky)), **provider("cerebras", upstream(parrot))}
    # Every failure would rest the only key of groq: what counts here is that no answer is lost.
    live = serve(**rows)

    def one(number: int) -> bool:
        got = ask(live.url, f"nonce-{number}", stream=bool(number % 2))
        body = got.content
        text = text_of(body) if number % 2 else got.json()["choices"][0]["message"]["content"]
        return (got.status_code, text) == (200, f"nonce-{number}")

    assert all(in_parallel(one, 50))


# --- held streams --------------------------------------------------------------------------


class Holder:
    """Streams opened on bare sockets, without a thread each."""

    def __init__(self, port: int) -> None:
        self.port, self.socks = port, []

    def open(self, **changes: Any) -> socket.socket:
        body = {"model": "hermes-router", "messages": HELLO, "stream": True, **changes}
        raw = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: router\r\n"
            f"Authorization: {AUTH['Authorization']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        self.socks.append(sock)
        sock.sendall(head.encode() + raw)
        return sock

    def first_words(self, seconds: float) -> dict[socket.socket, bytes]:
        """What each stream has said by the time all have said something."""
        poller, got = select.poll(), {sock: b"" for sock in self.socks}
        by_number = {sock.fileno(): sock for sock in self.socks}
        for sock in self.socks:
            poller.register(sock, select.POLLIN)
        deadline = time.monotonic() + seconds
        while by_number and time.monotonic() < deadline:
            for number, _ in poller.poll(200):
                sock = by_number[number]
                got[sock] += sock.recv(65536)
                if b"nonce" in got[sock] or b"503" in got[sock][:20]:
                    poller.unregister(number)
                    del by_number[number]
        return got

    def close(self) -> None:
        for sock in self.socks:
            sock.close()


@pytest.fixture
def holder() -> Iterator[Callable[[int], Holder]]:
    made: list[Holder] = []

    def make(port: int) -> Holder:
        made.append(Holder(port))
        return made[-1]

    yield make
    for one in made:
        one.close()


def held(request: Request) -> Stream:
    """Says who asked, then keeps quiet until the gate opens."""
    nonce = request.json["messages"][-1]["content"]
    events = [delta(role="assistant", content=""), delta(content=nonce), *chunks(" end")[1:]]
    return Stream(chunks=events, hold_after=2)


def test_held_streams_do_not_hold_up_the_rest(upstream, serve, holder):
    slow, quick = upstream(held), upstream(good())
    rows = {**provider("groq", slow), **provider("cerebras", quick, "m2")}
    live = serve(**rows, STREAM_IDLE_TIMEOUT="120", TTFT_TIMEOUT="60", REQUEST_DEADLINE="300")
    crowd = holder(live.port)
    for number in range(HELD):
        said = [{"role": "user", "content": f"nonce {number:04d}"}]
        crowd.open(model="groq/m1", messages=said)
    seen = crowd.first_words(60)
    for number, sock in enumerate(crowd.socks):
        assert f"nonce {number:04d}".encode() in seen[sock], number
    assert len(slow.requests) == HELD

    for _ in range(3):
        started = time.monotonic()
        assert requests.get(f"{live.url}/health", timeout=10).status_code == 200
        assert time.monotonic() - started < 1.0
    got = live.chat(model="cerebras/m2")
    assert (got.status_code, got.headers["X-Provider"]) == (200, "cerebras")

    slow.open_gate()
    for sock in crowd.socks:
        rest = b""
        while b"[DONE]" not in rest:
            piece = sock.recv(65536)
            assert piece
            rest += piece
        assert b" end" in rest


def test_health_answers_while_everything_waits_for_the_first_byte(upstream, serve, holder):
    up = upstream(Hang(60, chat()))
    live = serve(**provider("groq", up), WORKER_THREADS="8", TTFT_TIMEOUT="60")
    crowd = holder(live.port)
    for _ in range(40):
        crowd.open(stream=False)
    until(lambda: len(up.requests) >= 8)
    for _ in range(3):
        started = time.monotonic()
        assert requests.get(f"{live.url}/health", timeout=10).status_code == 200
        assert time.monotonic() - started < 1.0
    up.open_gate()


def test_a_crowd_of_every_kind_harms_nobody():
    """The benchmark, smaller: hung calls, half-open requests, slow readers, huge answers."""
    crowd = str(ROOT / "bench" / "crowd.py")
    command = [sys.executable, crowd, "--streams", "150", "--health", "5"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    assert "every target met" in ran.stdout, ran.stdout + ran.stderr


def test_more_streams_than_allowed_are_refused_at_once(upstream, serve, holder):
    up = upstream(held)
    live = serve(**provider("groq", up), MAX_STREAMS="5", TTFT_TIMEOUT="60")
    crowd = holder(live.port)
    said = [{"role": "user", "content": "nonce"}]
    for _ in range(5):
        crowd.open(messages=said)
    assert all(b" 200 " in got for got in crowd.first_words(20).values())

    started = time.monotonic()
    got = live.chat(messages=said, stream=True)
    assert time.monotonic() - started < 2
    assert got.status_code == 503
    assert int(got.headers["Retry-After"]) >= 1
    assert got.json()["error"]["message"]
    assert len(up.requests) == 5

    up.open_gate()  # the five end, and there is room again
    until(lambda: live.chat(messages=said, stream=True).status_code == 200, 10)


def test_a_stream_that_a_client_left_gives_its_place_back(upstream, serve, holder):
    up = upstream(held)
    live = serve(**provider("groq", up), MAX_STREAMS="2", TTFT_TIMEOUT="60")
    said = [{"role": "user", "content": "nonce"}]
    for _ in range(3):
        crowd = holder(live.port)
        for _ in range(2):
            crowd.open(messages=said)
        assert all(b" 200 " in got for got in crowd.first_words(20).values())
        crowd.close()
        until(lambda: all(request.closed.is_set() for request in up.requests), 10)
        time.sleep(0.1)
    assert len(up.requests) == 6
