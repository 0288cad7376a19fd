"""The server: threads that come and go, slots that always come back, connections that stay."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from upstream import (
    AUTH,
    HELLO,
    Hang,
    Reply,
    Reset,
    Stream,
    chat,
    chat_stream,
    chunks,
    delta,
    good,
    provider,
    sse,
    text_of,
    until,
)

import router

# --- workers ------------------------------------------------------------------------------


class Job:
    """A task that says when it runs and waits to be let go."""

    def __init__(self) -> None:
        self.running, self.go, self.cancelled = threading.Event(), threading.Event(), False

    def service(self) -> None:
        self.running.set()
        self.go.wait(20)

    def cancel(self) -> None:
        self.cancelled = True


class Crash(Job):
    def service(self) -> None:
        self.running.set()
        raise ValueError("a fault outside the app")


@pytest.fixture
def workers() -> Iterator[Callable[..., router.Workers]]:
    made: list[router.Workers] = []

    def make(keep: int, most: int) -> router.Workers:
        made.append(router.Workers(keep, most))
        return made[-1]

    yield make
    for pool in made:
        pool.shutdown()


def put(pool: router.Workers, count: int) -> list[Job]:
    jobs = [Job() for _ in range(count)]
    for job in jobs:
        pool.add_task(job)
    return jobs


def test_threads_start_when_needed_and_no_more_than_allowed(workers):
    pool = workers(2, 5)
    assert pool._count == 0
    jobs = put(pool, 8)
    until(lambda: sum(job.running.is_set() for job in jobs) == 5)
    time.sleep(0.05)
    assert pool._count == 5 and sum(job.running.is_set() for job in jobs) == 5
    for job in jobs:
        job.go.set()
    until(lambda: all(job.running.is_set() for job in jobs))


def test_an_idle_thread_is_used_before_a_new_one_starts(workers):
    pool = workers(2, 50)
    for _ in range(30):
        (job,) = put(pool, 1)
        job.go.set()
        assert job.running.wait(5)
        until(lambda: len(pool._idle) == pool._count)
    assert pool._count == 1


def test_threads_leave_after_a_rest_but_some_are_kept(workers, monkeypatch):
    monkeypatch.setattr(router, "THREAD_REST_S", 0.05)
    pool = workers(3, 50)
    jobs = put(pool, 20)
    until(lambda: all(job.running.is_set() for job in jobs))
    for job in jobs:
        job.go.set()
    until(lambda: pool._count == 3)
    time.sleep(0.2)
    assert pool._count == 3
    for job in put(pool, 5):  # and the pool still works
        assert job.running.wait(5)
        job.go.set()


def test_nothing_is_lost_while_threads_come_and_go(workers, monkeypatch):
    monkeypatch.setattr(router, "THREAD_REST_S", 0.001)
    pool, done, lock = workers(1, 8), [], threading.Lock()

    class Quick(Job):
        def service(self) -> None:
            with lock:
                done.append(self)

    for number in range(3000):
        pool.add_task(Quick())
        if number % 7 == 0:
            time.sleep(0.0012)
    until(lambda: len(done) == 3000)


def test_a_task_that_fails_takes_no_thread_with_it(workers, caplog):
    pool = workers(1, 2)
    for _ in range(5):
        job = Crash()
        pool.add_task(job)
        assert job.running.wait(5)
    (job,) = put(pool, 1)
    assert job.running.wait(5)
    job.go.set()
    assert pool._count <= 2
    assert "a request failed outside the app" in caplog.text


def test_a_thread_that_cannot_start_is_not_counted(workers, monkeypatch):
    pool = workers(1, 4)

    def no_more(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        for _ in range(4):
            job = Job()
            job.go.set()
            with contextlib.suppress(RuntimeError):
                pool.add_task(job)
    assert pool._count == 0
    (job,) = put(pool, 1)
    assert job.running.wait(5)
    job.go.set()


def test_shutdown_cancels_what_waits_and_wakes_the_idle(workers):
    pool = workers(2, 2)
    running = put(pool, 2)
    until(lambda: all(job.running.is_set() for job in running))
    waiting = put(pool, 3)
    assert pool.shutdown() is True
    assert all(job.cancelled for job in waiting)
    for job in running:
        job.go.set()
    until(lambda: pool._count == 0)


# --- slots --------------------------------------------------------------------------------


def request_bytes(path: str = "/v1/chat/completions", **body: Any) -> bytes:
    raw = json.dumps({"model": "hermes-router", "messages": HELLO, **body}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: router\r\nAuthorization: {AUTH['Authorization']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


@pytest.fixture
def knock() -> Iterator[Callable[..., socket.socket]]:
    """knock(live, raw=bytes or **body): a request on a bare socket, closed at the end."""
    made: list[socket.socket] = []

    def send(live: Any, raw: bytes | None = None, **body: Any) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", live.port), timeout=20)
        made.append(sock)
        sock.sendall(request_bytes(**body) if raw is None else raw)
        return sock

    yield send
    for sock in made:
        sock.close()


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    return data


def at_rest(live: Any, seconds: float = 8.0) -> None:
    """Every slot, every watched guard and every callback came back."""
    core = live.app.extensions["router"]
    until(lambda: core.gate.inside == 0, seconds)
    until(lambda: not core.watchdog._live, seconds)


ENDINGS = {
    "success": good(),
    "400": Reply(400, {"error": {"message": "no"}}),
    "429": Reply(429, {"error": {"message": "slow down"}}),
    "500": Reply(500, b"oops"),
    "empty": Reply(200, b""),
    "not-json": Reply(200, b"<html>"),
    "reset": Reset(),
    "half-head": Reset(b"HTTP/1.1 200 OK\r\nContent"),
    "silence": Hang(30),
    "short-length": Reply(200, b'{"choices": [{"message": {"content"', stop_at=20),
    "dies-in-stream": Stream(chunks=chunks("a", "b"), stop_at=400),
    "ends-in-stream": Stream(chunks=chunks("a", "b")[:2], done=False),
    "error-in-stream": Stream(chunks=[delta(content="a"), {"error": {"message": "x"}}]),
    "weird-finish": Reply(200, {"choices": [{"message": {}, "finish_reason": ["x"]}]}),
    "weird-chunk": Stream(chunks=[delta(content="a"), {"choices": 5, "usage": {"a": 1}}]),
    "newline-in-type": Reply(200, b'{"choices": [{"message": {"content": "x"}}]}',
                             {"content-type": "application/json;\r\n a=b"}),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_slot_comes_back_after(upstream, serve, ending, stream):
    up = upstream(ENDINGS[ending])
    live = serve(**provider("groq", up), TTFT_TIMEOUT="0.2", MAX_STREAMS="2")
    for _ in range(4):
        got = live.chat(stream=stream)
        try:
            body = got.content
        except requests.RequestException:
            body = b""
        assert got.status_code != 500, body
        if got.status_code == 200 and stream:
            assert body.endswith(b"data: [DONE]\n\n") or b'"error"' in body, body
    at_rest(live)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "answer",
    [Hang(30), Reply(200, chat().body, cuts=[20], hold_after=1)],
    ids=["before-the-head", "in-the-body"],
)
def test_the_slot_comes_back_when_the_client_leaves_before_the_first_byte(
    upstream, serve, answer, stream, knock
):
    up = upstream(answer)
    live = serve(**provider("groq", up), MAX_STREAMS="3")
    for round_ in range(3):
        socks = [knock(live, stream=stream) for _ in range(3)]
        up.wait_for(3 * (round_ + 1))
        for sock in socks:
            sock.close()
        at_rest(live)
    until(lambda: all(request.closed.is_set() for request in up.requests))


@pytest.mark.parametrize("how", ["fin", "reset"])
def test_the_slot_comes_back_when_the_client_leaves_in_the_stream(upstream, serve, how, knock):
    up = upstream(chat_stream(*"abcdef", hold_after=3))
    live = serve(**provider("groq", up), MAX_STREAMS="2")
    for round_ in range(3):
        socks = [knock(live, stream=True) for _ in range(2)]
        for sock in socks:
            read_until(sock, b'"a"')
            if how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        at_rest(live)
        assert len(up.requests) == 2 * (round_ + 1)
    until(lambda: all(request.closed.is_set() for request in up.requests))


def test_a_client_that_closes_its_sending_side_counts_as_gone(upstream, serve):
    """Until something is sent, it looks like one that closed all of it."""
    up = upstream(Hang(20, chat()))
    live = serve(**provider("groq", up))
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as sock:
        sock.sendall(request_bytes())
        up.wait_for(1)
        sock.shutdown(socket.SHUT_WR)
        assert up.requests[0].closed.wait(5)
        assert sock.recv(1000) == b""
    at_rest(live)


def test_a_client_that_leaves_is_logged_as_499_and_without_a_traceback(
    upstream, serve, caplog, knock
):
    caplog.set_level(logging.INFO)
    live = serve(**provider("groq", upstream(chat_stream(*"abc", hold_after=2))))
    sock = knock(live, stream=True)
    read_until(sock, b'"a"')
    sock.close()
    at_rest(live)
    time.sleep(0.1)
    assert "Traceback" not in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "499" in caplog.text or "client left" in caplog.text


def test_a_client_that_leaves_while_the_router_connects(upstream, tmp_path):
    from conftest import config_for

    class Slow(router.Transport):
        def _open(self, *arguments: Any) -> Any:
            time.sleep(0.5)
            return super()._open(*arguments)

    up = upstream(good())
    config = config_for(tmp_path, provider("groq", up))
    app = router.create_app(config, transport=Slow(5.0))
    server = router.make_server(app, config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    with socket.create_connection(("127.0.0.1", server.effective_port), timeout=5) as sock:
        sock.sendall(request_bytes())
        until(lambda: app.extensions["router"].gate.inside == 1)
    until(lambda: app.extensions["router"].gate.inside == 0)
    assert not up.requests
    router.close_server(server)
    thread.join(10)
    app.extensions["router"].close()


def test_a_provider_that_never_ends_after_done_holds_nobody_up(upstream, serve, knock):
    """[DONE] was said; the end of the body never comes."""
    last = len(chunks("a"))  # the pieces before [DONE]
    up = upstream(
        Stream(chunks=[*chunks("a"), b"data: [DONE]\n\n", b": x\n\n"], done=False,
               hold_after=last + 1)
    )  # fmt: skip
    live = serve(**provider("groq", up))
    started = time.monotonic()
    sock = knock(live, stream=True)
    read_until(sock, b"[DONE]")
    read_until(sock, b"0\r\n\r\n")
    assert time.monotonic() - started < 8
    at_rest(live)


def test_a_client_that_stops_reading_does_not_hold_its_slot_past_the_deadline(upstream, serve):
    words = ["x" * 60_000] * 400
    up = upstream(chat_stream(*words))
    live = serve(**provider("groq", up), REQUEST_DEADLINE="1.5", STREAM_IDLE_TIMEOUT="1")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", live.port))
        sock.sendall(request_bytes(stream=True))
        up.wait_for(1)
        at_rest(live, 8)


def test_a_slow_reader_gets_everything(upstream, serve):
    words = ["x" * 60_000] * 80
    live = serve(**provider("groq", upstream(chat_stream(*words))))
    got = live.chat(stream=True)
    body = b""
    for number, piece in enumerate(got.iter_content(65536)):
        body += piece
        if number < 10:
            time.sleep(0.05)
    assert text_of(body) == "".join(words)
    at_rest(live)


def test_many_endings_at_once_leave_nothing_behind(upstream, serve, knock, caplog):
    answers = [good(), Reply(500, b""), Reset(), Hang(0.1, chat()), chat_stream("a", gap=0.01)]
    numbers = iter(range(10_000))

    def mixed(request: Any) -> Any:
        answer = answers[next(numbers) % len(answers)]
        return answer(request) if callable(answer) else answer

    rows = {**provider("groq", upstream(mixed)), **provider("cerebras", upstream(mixed))}
    live = serve(**rows, MAX_STREAMS="40", BREAKER_MIN_SAMPLES="1000", BREAKER_WINDOW="1000")

    def one(number: int) -> None:
        sock = knock(live, stream=bool(number % 2))
        if number % 3:
            sock.recv(65536)
        sock.close()

    threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(120)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    at_rest(live, 15)
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


# --- nobody waits for a thread ---------------------------------------------------------------


def health_within(live: Any, seconds: float) -> None:
    started = time.monotonic()
    assert requests.get(f"{live.url}/health", timeout=20).status_code == 200
    assert time.monotonic() - started < seconds


def test_health_answers_while_every_slot_is_taken(upstream, serve, knock):
    up = upstream(Hang(30, chat()))
    live = serve(**provider("groq", up), MAX_STREAMS="10", WORKER_THREADS="2")
    for _ in range(60):
        knock(live)
    up.wait_for(10)
    for _ in range(5):
        health_within(live, 1.0)
    assert live.chat().status_code == 503
    up.open_gate()
    at_rest(live)


def test_health_answers_while_strangers_send_too_much(serve, knock):
    """A 413 needs no key: it must not cost threads."""
    live = serve(MAX_STREAMS="1", ECHO_FALLBACK="1", MAX_REQUEST_BYTES="1024")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\nx"
    for _ in range(120):
        knock(live, head)
    time.sleep(0.1)
    health_within(live, 1.0)


# --- HTTP towards clients --------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/", "/favicon.ico"])
def test_head_has_no_body_and_the_connection_stays(serve, path):
    live = serve(ECHO_FALLBACK="1")
    head = f"HEAD {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {AUTH['Authorization']}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as sock:
        sock.sendall(head.encode())
        first = read_until(sock, b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 20") and first.endswith(b"\r\n\r\n")
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_until(sock, b"}").startswith(b"HTTP/1.1 200 OK\r\n")


def test_requests_sent_ahead_are_answered_in_order(upstream, serve):
    live = serve(**provider("groq", upstream(good())))
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as sock:
        for number in range(4):
            sock.sendall(request_bytes(stream=bool(number % 2)))
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    assert data.count(b"HTTP/1.1 200 OK") == 5
    assert data.count(b"data: [DONE]") == 2
    assert data.rstrip().endswith(b"}") and b'"status"' in data[data.rfind(b"HTTP/1.1") :]
    at_rest(live)


# -- clients that ask without pause ---------------------------------------------------------

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def channels(monkeypatch) -> list[Any]:
    """Those of all connections from now on."""
    found: list[Any] = []

    class Seen(router.Channel):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            found.append(self)

    monkeypatch.setattr(router, "Channel", Seen)
    return found


@pytest.fixture
def hasty(serve, upstream, channels) -> Iterator[tuple[socket.socket, Any, Any]]:
    """A client whose connection stays with the thread that serves it, its channel, a provider."""
    up = upstream(lambda request: Hang(20, chat()) if b"slow" in request.body else chat())
    live = serve(**provider("groq", up))
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as sock:
        until(lambda: ask_often(sock) and channels[-1].stays)
        yield sock, channels[-1], up


def read_answer(sock: socket.socket) -> bytes:
    """One whole answer whose length is stated, and nothing of the next one."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(1)
    left = int(data.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while left:
        piece = sock.recv(left)
        data, left = data + piece, left - len(piece)
    return data


def ask_often(sock: socket.socket) -> bool:
    for _ in range(8):
        sock.sendall(HEALTH)
        read_answer(sock)
    return True


def test_a_hasty_client_may_pause_and_go_on(hasty):
    sock, channel, _ = hasty
    for pause in (0.0, 0.03, 0.0, 0.005, 0.01, 0.012, 0.0, 0.2):
        time.sleep(pause)
        sock.sendall(HEALTH)
        assert read_answer(sock).startswith(b"HTTP/1.1 200 OK")
    until(lambda: not channel.stays)


def test_a_hasty_client_may_send_in_pieces_and_ahead(hasty):
    sock, _, up = hasty
    whole = request_bytes()
    for cut in (1, 20, len(whole) - 5):
        ask_often(sock)
        sock.sendall(whole[:cut])
        time.sleep(0.005)
        sock.sendall(whole[cut:])
        assert b"hello" in read_answer(sock)
    ask_often(sock)
    sock.sendall(HEALTH + whole + HEALTH)
    for _ in range(3):
        assert read_answer(sock).startswith(b"HTTP/1.1 200 OK")
    assert len(up.requests) == 4


def test_a_hasty_client_that_leaves_is_noticed(hasty):
    sock, channel, up = hasty
    sock.sendall(request_bytes(user="slow"))
    up.wait_for(1)
    sock.close()
    assert up.requests[0].closed.wait(5)
    until(lambda: not channel.connected)


def test_a_hasty_client_that_sends_rubbish_is_told_and_closed(hasty):
    sock, channel, _ = hasty
    sock.sendall(b"rubbish\r\n\r\n")
    data = b"".join(iter(lambda: sock.recv(65536), b""))
    assert data.startswith(b"HTTP/1.0 400") or data.startswith(b"HTTP/1.1 400")
    until(lambda: not channel.connected)


def test_a_hasty_client_may_wait_for_100_continue(hasty):
    sock, _, up = hasty
    head, _, body = request_bytes().partition(b"\r\n\r\n")
    for _ in range(20):
        ask_often(sock)
        sock.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert read_until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert read_answer(sock).startswith(b"HTTP/1.1 200 OK")
    assert len(up.requests) == 20


def test_a_fault_while_reading_leaves_the_client_to_the_loop(hasty, monkeypatch):
    sock, channel, _ = hasty
    received, faults = channel.received, [ValueError("once")]

    def fails_once(data: bytes) -> None:
        if faults and threading.current_thread().name == "worker":
            received(data)
            raise faults.pop()
        received(data)

    monkeypatch.setattr(channel, "received", fails_once)
    for _ in range(30):
        sock.sendall(HEALTH)
        assert read_answer(sock).startswith(b"HTTP/1.1 200 OK")
    assert not faults


def test_a_hasty_client_gives_way_now_and_then(hasty, monkeypatch):
    sock, channel, _ = hasty
    monkeypatch.setattr(router.Channel, "MOST_IN_A_ROW", 5)
    seen = set()
    for _ in range(200):
        sock.sendall(HEALTH)
        assert read_answer(sock).startswith(b"HTTP/1.1 200 OK")
        seen.add(channel.stays)
    assert seen == {True, False}


def test_only_some_hasty_clients_stay_with_their_threads(serve, channels, monkeypatch):
    """Each of them is a thread that asks for the interpreter; the loop has to get it as well."""
    monkeypatch.setattr(router.Channel, "MOST_STAY", 3)
    live, most = serve(), 0
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", live.port), timeout=10))
            for _ in range(9)
        ]

        def ask_all() -> int:
            nonlocal most
            for sock in clients:
                sock.sendall(HEALTH)
            for sock in clients:
                assert read_answer(sock).startswith(b"HTTP/1.1 200 OK")
            most = max(most, len(channels[0]._map.staying))
            return most

        for _ in range(60):
            ask_all()
        until(ask_all)  # a slow machine pauses for them
    assert 1 <= most <= 3
    until(lambda: not channels[0]._map.staying)


def test_without_a_time_limit_for_reading_everybody_is_served_all_the_same(serve, monkeypatch):
    monkeypatch.setattr(router.socket, "SO_RCVTIMEO", 9999)  # no such option
    live = serve()
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as sock:
            assert ask_often(sock)


def test_a_connection_that_cannot_be_taken_leaves_the_door_open(serve, monkeypatch, caplog):
    live = serve()
    first, faults = router.Channel.__init__, [OSError("once")]

    def fails_once(self: Any, *arguments: Any, **options: Any) -> None:
        if faults:
            arguments[1].close()
            raise faults.pop()
        first(self, *arguments, **options)

    monkeypatch.setattr(router.Channel, "__init__", fails_once)
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as sock:
        sock.settimeout(5)
        assert sock.recv(1) == b"", "it is closed"
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as sock:
        assert ask_often(sock)
    assert "could not be taken" in caplog.text


def test_a_long_blank_in_a_head_holds_nobody_up(serve, knock):
    live = serve()
    for blank in (b"\t" * 100_000, b" " * 60_000):
        sock = knock(live, b"GET /health HTTP/1.1\r\nA:" + blank + b"\0\r\n\r\n")
        health_within(live, 2.0)
        assert b" 400 " in read_until(sock, b"\r\n")


def test_what_a_client_sent_ahead_is_dropped_with_it(upstream, serve, knock):
    """So that the memory of large requests is free again."""
    live = serve(**provider("groq", upstream(lambda request: chat("x" * 6_000_000))))
    large = request_bytes(user="y" * 3_000_000)
    room = live.app.extensions["router"].room
    for pause in (0.0, 0.1, 0.3, 0.6):
        sock = knock(live, request_bytes() + large)
        time.sleep(pause)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
    at_rest(live)
    until(lambda: room.used == 0)


def test_many_hasty_clients_get_their_own_answers(upstream, serve):
    """More than there are threads at rest, some with pauses, each with a body of its own."""
    live = serve(**provider("groq", upstream(good())))
    wrong: list[bytes] = []

    def client(number: int) -> None:
        with socket.create_connection(("127.0.0.1", live.port), timeout=20) as sock:
            for turn in range(60):
                if turn % 20 == number:
                    time.sleep(0.015)
                own = f"{number}-{turn}"
                sock.sendall(
                    b"GET /%b HTTP/1.1\r\nHost: x\r\nX-Request-ID: %b\r\n\r\n"
                    % (b"health", own.encode())
                )
                told = read_answer(sock)
                if f"X-Request-ID: {own}\r\n".encode() not in told:
                    wrong.append(told)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not wrong


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("connection", ["", "close", "keep-alive"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_http_version_gets_a_body_it_can_delimit(
    upstream, serve, version, connection, stream
):
    live = serve(**provider("groq", upstream(good())))
    raw = request_bytes(stream=stream).replace(b"HTTP/1.1", f"HTTP/{version}".encode())
    if connection:
        raw = raw.replace(b"Host:", f"Connection: {connection}\r\nHost:".encode(), 1)
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as sock:
        sock.sendall(raw)
        head, _, body = read_until(sock, b"\r\n\r\n").partition(b"\r\n\r\n")
        lowered = head.lower()
        chunked, sized = b"transfer-encoding: chunked" in lowered, b"content-length:" in lowered
        assert not (chunked and sized) and (version == "1.1" or not chunked)
        if not chunked and not sized or b"connection: close" in lowered:
            sock.settimeout(5)
            body += b"".join(iter(lambda: sock.recv(65536), b""))
        assert lowered.count(b"\r\nconnection:") <= 1
        assert body or chunked or sized


def test_an_error_in_the_app_is_a_500_and_frees_the_slot(upstream, serve, monkeypatch):
    live = serve(**provider("groq", upstream(good())), MAX_STREAMS="2")
    core = live.app.extensions["router"]

    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(core, "deliver", broken)
    for stream in (False, True) * 2:
        assert live.chat(stream=stream).status_code == 500
    at_rest(live)
    monkeypatch.undo()
    assert live.chat().status_code == 200


def test_an_event_that_fills_many_reads_arrives_whole(upstream, serve):
    big = "é" * 700_000
    up = upstream(Stream(chunks=[sse(delta(content="a")), delta(content=big), delta("stop")]))
    live = serve(**provider("groq", up))
    assert text_of(live.chat(stream=True).content) == "a" + big
