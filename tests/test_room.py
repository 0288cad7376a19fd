"""Memory for large requests and answers: one limit for all, given back, honest when used up."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from upstream import (
    AUTH,
    KEY,
    Reply,
    Request,
    Stream,
    Upstream,
    chunks,
    completion,
    delta,
    good,
    provider,
    until,
    usage_chunk,
)  # fmt: skip

import router

MB = 1 << 20
ASK = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages": {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
}
PATHS = sorted(ASK)


def large(size: int = 2 * MB, **options: Any) -> Reply:
    return Reply(200, completion("x" * size), **options)


def ask(live: Any, path: str, model: str = "groq/m1", **more: Any) -> requests.Response:
    return requests.post(
        live.url + path, json={**ASK[path], "model": model, **more}, headers=AUTH, timeout=30
    )


def room_of(live: Any) -> router.Room:
    found: router.Room = live.app.extensions["router"].room
    return found


def busy(got: requests.Response, path: str) -> None:
    """A 503 in the words of this endpoint's dialect."""
    assert got.status_code == 503, got.text[:300]
    assert int(got.headers["Retry-After"]) >= 1
    error = got.json()["error"]
    assert "LARGE_TOTAL_BYTES" in error["message"]
    if path == "/v1/messages":
        assert (got.json()["type"], error["type"]) == ("error", "overloaded_error")
    else:
        assert (error["type"], error["code"]) == ("router_error", "router_busy")


def unharmed(live: Any, name: str = "groq") -> None:
    """Nobody but the router itself is to blame: no rest, no breaker entry, no failed attempt."""
    own = live.app.extensions["router"]
    row = requests.get(f"{live.url}/v1/status", headers=AUTH, timeout=10).json()["providers"][name]
    assert [key["status"] for key in row["keys"]] == ["ready"]
    assert own.breakers.snapshot(name)["recent_health_fails"] == 0
    assert own.usage.tally(name).errors == 0


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Callable[[], None]]]:
    """full(live): somebody else holds all the room there is; what is returned gives it back."""
    monkeypatch.setattr(router.Room, "PATIENCE_S", 0.2)

    def fill(live: Any) -> Callable[[], None]:
        room, share = room_of(live), router.Share()
        assert room.grow(share, router.LEAST_ROOM)
        room.most = router.LEAST_ROOM
        return lambda: room.shrink(share, 0)

    yield fill


# --- the account -----------------------------------------------------------------------------


def made_room(most: int) -> router.Room:
    room = router.Room()
    room.most = most
    return room


def test_one_alone_may_have_what_is_usual_and_no_more():
    room, share = made_room(10), router.Share()
    assert room.grow(share, router.LEAST_ROOM)
    assert not room.grow(share, router.LEAST_ROOM + 1)
    assert not room.grow(router.Share(), 1)
    room.shrink(share, 0)
    assert room.used == 0
    assert room.grow(router.Share(), 1)


def test_whoever_waits_goes_on_when_another_ends():
    room, one, two = made_room(10), router.Share(), router.Share()
    assert room.grow(one, 8)
    got: list[bool] = []
    waiting = threading.Thread(target=lambda: got.append(room.wait(two, 5, 10, lambda: False)))
    waiting.start()
    until(lambda: waiting.is_alive() and not got)
    room.shrink(one, 5)
    waiting.join(10)
    assert got == [True]
    assert (room.used, room.refused) == (10, 0)


def test_waiting_ends_with_patience_and_with_the_client():
    room = made_room(10)
    assert room.grow(router.Share(), 8)
    assert not room.wait(router.Share(), 5, 0.01, lambda: False)
    assert not room.wait(router.Share(), 5, 60, lambda: True)
    assert (room.used, room.refused) == (8, 2)


def test_where_all_wait_for_each_other_one_goes_first():
    room, shares = made_room(10), [router.Share() for _ in range(5)]
    for share in shares:
        assert room.grow(share, 2)
    peak, ended = [0], []

    def read(share: router.Share) -> None:
        if room.wait(share, 8, 20, lambda: False):
            peak[0] = max(peak[0], room.used)
            ended.append(share)
        room.shrink(share, 0)

    threads = [threading.Thread(target=read, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(ended) == 5
    assert peak[0] <= 10 + 6  # one of them only went beyond the limit
    assert room.used == 0


@pytest.mark.parametrize(
    "value",
    [
        completion("x" * 3 * MB),
        completion("äöü" * MB),
        completion("漢字" * MB),
        completion("x" * 3 * MB + "🙂"),
        completion(("x" * 40 + "\n") * 80_000),
        {"data": [{"embedding": [0.125 * n for n in range(1536)]} for _ in range(60)]},
        {"many": [[] for _ in range(500_000)]},
        {"many": [{"a": 1} for _ in range(200_000)]},
        {"many": list(range(500_000))},
    ],
    ids=["text", "latin", "cjk", "emoji", "lines", "vectors", "lists", "objects", "numbers"],
)
@pytest.mark.parametrize("plain", [True, False])
def test_what_json_takes_is_not_underestimated(value, plain):
    body = json.dumps(value, ensure_ascii=plain).encode()
    tracemalloc.start()
    made = json.loads(body)
    peak = tracemalloc.get_traced_memory()[1] + len(body)
    tracemalloc.stop()
    assert made
    assert peak <= 1.1 * router.json_weight(body)


# --- answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("path", PATHS)
def test_a_large_answer_without_room_is_a_503_and_nobodys_fault(
    upstream, serve, full, path, framing
):
    up = upstream(large(framing=framing))
    live = serve(**provider("groq", up), **provider("mistral", upstream(good("small"))))
    release = full(live)
    busy(ask(live, path), path)
    assert ask(live, path, "mistral/m1").status_code == 200  # meanwhile
    unharmed(live)
    assert len(up.requests) == 1  # nobody else is asked: they would not fit either
    release()
    got = ask(live, path)
    assert got.status_code == 200
    assert len(got.content) > 2 * MB
    assert room_of(live).used == 0


def test_a_large_answer_waits_for_room(upstream, serve):
    live = serve(**provider("groq", upstream(large())))
    room, share = room_of(live), router.Share()
    assert room.grow(share, room.most)
    got: list[int] = []
    caller = threading.Thread(target=lambda: got.append(ask(live, PATHS[0]).status_code))
    caller.start()
    until(lambda: room._some._waiters)  # somebody waits
    room.shrink(share, 0)
    caller.join(20)
    assert got == [200]
    assert (room.used, room.refused) == (0, 0)
    unharmed(live)


@pytest.mark.parametrize("ending", ["reset", "fin"])
def test_a_large_answer_that_breaks_off_gives_its_room_back(upstream, serve, ending):
    up = upstream(large(4 * MB, stop_at=3 * MB, ending=ending))
    live = serve(**provider("groq", up), **provider("mistral", upstream(large())))
    assert ask(live, PATHS[0]).headers["X-Provider"] == "mistral"
    assert up.requests
    until(lambda: room_of(live).used == 0)


def test_a_client_that_leaves_gives_its_room_back(upstream, serve):
    up = upstream(large(8 * MB, cuts=(3 * MB,), hold_after=1))
    live = serve(**provider("groq", up))
    sock = raw_ask(live, json.dumps({**ASK[PATHS[0]], "model": "groq/m1"}).encode())
    until(lambda: room_of(live).used > 0)
    sock.close()
    until(lambda: room_of(live).used == 0)
    assert up.requests[0].closed.wait(10)


def raw_ask(live: Any, body: bytes, length: int | None = None) -> socket.socket:
    """The request as sent by a client that does not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", live.port))
    head = f"POST {PATHS[0]} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    sock.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
    return sock


@pytest.mark.parametrize("leaves", [True, False])
def test_a_client_that_does_not_read_is_cut_off(upstream, serve, monkeypatch, leaves):
    monkeypatch.setattr(router.Pieces, "STALL_S", 600 if leaves else 0.5)
    live = serve(**provider("groq", upstream(large(24 * MB))))
    sock = raw_ask(live, json.dumps({**ASK[PATHS[0]], "model": "groq/m1"}).encode())
    assert sock.recv(12) == b"HTTP/1.1 200"
    until(lambda: 24 * MB < room_of(live).used < 25 * MB)  # what came of reading it is gone
    if leaves:
        sock.close()
    until(lambda: room_of(live).used == 0)
    until(lambda: live.app.extensions["router"].gate.inside == 0)
    sock.close()


def test_a_slow_client_gets_all_of_a_large_answer(upstream, serve):
    live = serve(**provider("groq", upstream(large(6 * MB))))
    sock = raw_ask(live, json.dumps({**ASK[PATHS[0]], "model": "groq/m1"}).encode())
    answer = http.client.HTTPResponse(sock)
    answer.begin()
    got = b""
    while piece := answer.read(400_000):
        got += piece
        time.sleep(0.01)
    assert json.loads(got)["choices"][0]["message"]["content"] == "x" * 6 * MB
    until(lambda: room_of(live).used == 0)
    sock.close()


def test_identical_requests_share_a_large_answer(upstream, serve):
    up = upstream(large(3 * MB, delay=0.3))
    live = serve(**provider("groq", up), CACHE_TTL_SECONDS="60")
    sizes: list[int] = []
    crowd = [
        threading.Thread(target=lambda: sizes.append(len(ask(live, PATHS[0]).content)))
        for _ in range(6)
    ]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join(20)
    assert len(sizes) == 6
    assert min(sizes) > 3 * MB
    assert len(up.requests) == 1
    until(lambda: room_of(live).used == 0)


# --- streams ---------------------------------------------------------------------------------


def call_stream(size: int, *before: Any, sound: bool = True) -> Stream:
    """A stream with a tool call of about so many bytes."""
    piece = "y" * 60_000
    first = {"index": 0, "id": "c1", "type": "function"}
    events = [
        *before,
        delta(tool_calls=[{**first, "function": {"name": "f", "arguments": '{"a":"'}}]),
    ]
    for _ in range(size // len(piece)):
        events.append(delta(tool_calls=[{"index": 0, "function": {"arguments": piece}}]))
    if sound:
        events.append(delta(tool_calls=[{"index": 0, "function": {"arguments": '"}'}}]))
        events += [delta("tool_calls"), usage_chunk()]
    return Stream(chunks=events, done=sound)


@pytest.mark.parametrize("path", PATHS)
def test_a_large_tool_call_that_is_held_back_needs_room(upstream, serve, full, path):
    live = serve(**provider("groq", upstream(call_stream(3 * MB))))
    release = full(live)
    busy(ask(live, path, stream=True), path)
    unharmed(live)
    release()
    got = ask(live, path, stream=True)
    assert got.status_code == 200
    assert got.text.count("y") > 2 * MB
    until(lambda: room_of(live).used == 0)


@pytest.mark.parametrize("path", PATHS)
def test_without_room_a_stream_under_way_ends_with_an_error(upstream, serve, full, path):
    text = delta(role="assistant", content="so far")
    live = serve(
        **provider("groq", upstream(call_stream(3 * MB, text))),
        **provider("mistral", upstream(good("not asked"))),
    )
    full(live)
    got = ask(live, path, stream=True)
    assert got.status_code == 200
    assert "so far" in got.text
    assert "LARGE_TOTAL_BYTES" in got.text
    assert "try again in 5s" in got.text
    assert "not asked" not in got.text
    finished = ('"finish_reason":"', "message_stop", "response.completed")
    assert not any(word in got.text.replace('": "', '":"') for word in finished)
    unharmed(live)


@pytest.mark.parametrize("path", PATHS)
def test_a_tool_call_without_an_end_is_given_up(upstream, serve, monkeypatch, path):
    monkeypatch.setattr(router, "MAX_EVENT_BYTES", 2 * MB)
    live = serve(
        **provider("groq", upstream(call_stream(4 * MB, sound=False))),
        **provider("mistral", upstream(good("well"))),
    )
    got = ask(live, path, "hermes-router", stream=True)
    assert got.status_code == 200
    assert "well" in got.text
    assert room_of(live).used == 0


def test_a_large_event_needs_room(upstream, serve, full):
    events = chunks("x" * 3 * MB)
    live = serve(**provider("groq", upstream(Stream(chunks=events))))
    release = full(live)
    busy(ask(live, PATHS[0], stream=True), PATHS[0])
    release()
    assert ask(live, PATHS[0], stream=True).text.count("x") >= 3 * MB
    until(lambda: room_of(live).used == 0)


def test_what_followers_may_still_hear_is_kept_as_far_as_there_is_room():
    room, guard = made_room(4 * MB), router.Guard()
    guard.room = room
    assert room.grow(router.Share(), 2 * MB)
    cast_ = router.Broadcast(iter([b"x" * MB] * 6), guard)  # type: ignore[arg-type]
    for number in range(6):
        assert cast_.block(number, guard)
    assert [cast_.has_lost(number) for number in range(6)] == [True] * 3 + [False] * 3
    assert room.used == 4 * MB


# --- requests --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["length", "chunked"])
@pytest.mark.parametrize("path", PATHS)
def test_a_large_request_without_room_is_a_503(upstream, serve, full, path, way):
    up = upstream(good())
    live = serve(**provider("mistral", up))
    release = full(live)
    raw = json.dumps({**ASK[path], "model": "mistral/m1", "padding": "z" * 3 * MB}).encode()
    data = raw if way == "length" else iter([raw[at : at + MB] for at in range(0, len(raw), MB)])
    got = requests.post(live.url + path, data=data, headers=AUTH, timeout=30)
    busy(got, path)
    assert not up.requests
    assert ask(live, path, "mistral/m1").status_code == 200  # a small one
    release()
    assert requests.post(live.url + path, data=raw, headers=AUTH, timeout=30).status_code == 200
    until(lambda: room_of(live).used == 0)


def test_a_large_request_holds_its_room_while_it_is_under_way(upstream, serve):
    up = upstream(Reply(200, completion("hello"), delay=600))
    live = serve(**provider("mistral", up))
    body = {**ASK[PATHS[0]], "model": "mistral/m1", "padding": "z" * 3 * MB}
    caller = threading.Thread(target=lambda: live.session.post(live.url + PATHS[0], json=body))
    caller.start()
    up.wait_for(1)
    assert 9 * MB < room_of(live).used < 15 * MB
    status = requests.get(f"{live.url}/v1/status", headers=AUTH, timeout=10).json()["large"]
    assert status["bytes"] == room_of(live).used
    assert (status["limit"], status["refused"]) == (room_of(live).most, 0)
    up.open_gate()
    caller.join(20)
    until(lambda: room_of(live).used == 0)


def test_an_upload_that_its_client_gives_up_leaves_nothing(upstream, serve):
    live = serve(**provider("mistral", upstream(good())))
    sock = raw_ask(live, b"z" * 3 * MB, length=5 * MB)
    until(lambda: room_of(live).used > 4 * MB)
    assert room_of(live).used < 9 * MB  # as much as has come, not as was stated
    sock.close()
    until(lambda: room_of(live).used == 0)


@pytest.mark.parametrize("padding", ['"', "\\"], ids=["no JSON", "broken"])
def test_a_large_request_that_is_refused_leaves_nothing(upstream, serve, padding):
    live = serve(**provider("mistral", upstream(good())))
    raw = b'{"messages": ' + padding.encode() + b"z" * 2 * MB
    got = requests.post(live.url + PATHS[0], data=raw, headers=AUTH, timeout=30)
    assert got.status_code == 400
    until(lambda: room_of(live).used == 0)


# --- the setting, and all of it together -----------------------------------------------------


def test_the_limit_fits_the_machine_unless_it_is_set(make_app, monkeypatch):
    def limit(memory: int, **settings: str) -> int:
        monkeypatch.setattr(router, "machine_memory", lambda: memory)
        return make_app(**settings).extensions["router"].room.most

    assert limit(0) == limit(512 * MB) == 192 * MB
    assert limit(4096 * MB) == 1024 * MB
    assert limit(65_536 * MB) == 2048 * MB
    assert limit(0, LARGE_TOTAL_BYTES="5000000") == 5_000_000


def test_the_memory_of_this_machine_is_known():
    if sys.platform == "linux":
        assert 64 * MB < router.machine_memory() < 1 << 50


class Peak:
    """The most memory that a process held while it was looked at, in MB."""

    def __init__(self, pid: int) -> None:
        self._path, self.most, self._over = f"/proc/{pid}/status", 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            with open(self._path, encoding="ascii") as file:
                line = next(line for line in file if line.startswith("VmRSS"))
            self.most = max(self.most, int(line.split()[1]) / 1024)

    def end(self) -> float:
        self._over.set()
        self._thread.join(5)
        return self.most


HUGE = json.dumps(completion("x" * (40 * MB))).encode()


def huge_or_small(request: Request) -> Reply:
    kind = {"content-type": "application/json"}
    small = request.model == "small" or len(request.body) > MB
    return Reply(200, json.dumps(completion("hello")).encode() if small else HUGE, kind)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_huge_answers_and_requests_at_once_stay_within_the_limit(upstream, launch):
    """Ten answers of 40 MB and ten requests of 9 MB: 1.5 GB without a limit."""
    up: Upstream = upstream(huge_or_small)
    limit = str(router.LEAST_ROOM)
    settings = {"ROUTER_PROBE": "0", "CACHE_TTL_SECONDS": "0", "LARGE_TOTAL_BYTES": limit}
    running = launch("serve", **settings, **provider("mistral", up, "m1", "small"))
    peak = Peak(running.process.pid)
    results: list[tuple[int, int]] = []

    def call(body: dict[str, Any]) -> None:
        url = running.url + PATHS[0]
        with requests.post(url, json=body, headers=AUTH, timeout=50, stream=True) as got:
            size = sum(len(piece) for piece in got.iter_content(MB))
            assert got.status_code == 200 or "Retry-After" in got.headers
            results.append((got.status_code, size))

    asked = {**ASK[PATHS[0]], "model": "mistral/m1"}
    padded = {**asked, "messages": [{"role": "user", "content": "z" * 9 * MB}]}
    crowd = [threading.Thread(target=call, args=(body,)) for body in [asked, padded] * 10]
    for one in crowd:
        one.start()
    while any(one.is_alive() for one in crowd):
        got = requests.post(
            running.url + PATHS[0],
            json={**asked, "model": "mistral/small"},
            headers=AUTH,
            timeout=30,
        )
        assert got.status_code == 200
        time.sleep(0.1)
    assert len(results) == 20
    assert {status for status, _ in results} <= {200, 503}
    assert (200, len(HUGE)) in results
    assert all(size in (len(HUGE),) or size < 1000 for _, size in results)  # none is cut short
    assert peak.end() < 192 * 2 + 150
    status = requests.get(f"{running.url}/v1/status", headers=AUTH, timeout=10).json()
    assert status["large"]["bytes"] == 0
    assert "Traceback" not in running.text
