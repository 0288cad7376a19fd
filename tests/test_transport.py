"""HTTP towards providers: chunked coding, kept connections, deadlines, and whoever gets cut."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upstream import Hang, Reply, Request, Reset, Stream, chat, chat_stream, completion, until

import router

HEADERS = b"Content-Type: application/json\r\n"
BODY = json.dumps(completion()).encode()
CHUNKED = "Transfer-Encoding: chunked\r\n"


# --- chunked coding -----------------------------------------------------------------------


def fed(pieces: list[bytes]) -> tuple[bytes, router.Dechunker]:
    chunks = router.Dechunker()
    return b"".join(chunks.feed(piece) for piece in pieces), chunks


def coded(parts: list[bytes], extension: bytes = b"", trailer: bytes = b"") -> bytes:
    lines = [b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts if part]
    return b"".join(lines) + b"0" + extension + b"\r\n" + trailer + b"\r\n"


PARTS = st.lists(st.binary(min_size=1, max_size=40) | st.just(b"\r\n0\r\n\r\n"), max_size=5)


@pytest.fixture(params=[0, 4096], ids=["together", "one by one"])
def _chunks_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks in any number take both ways."""
    monkeypatch.setattr(router.Dechunker, "MANY_BYTES", request.param)


@pytest.mark.usefixtures("_chunks_looked_at")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    PARTS,
    st.sampled_from([b"", b";a=b", b' ; name="v"']),
    st.sampled_from([b"", b"X-A: b\r\n", b"X-A: b\r\nX-C: d\r\n"]),
    st.data(),
)
def test_chunked_coding_in_any_pieces(
    parts: list[bytes], extension: bytes, trailer: bytes, data: st.DataObject
) -> None:
    whole = coded(parts, extension, trailer)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    content, chunks = fed(pieces)
    assert content == b"".join(parts)
    assert chunks.finished and not chunks.surplus


@pytest.mark.usefixtures("_chunks_looked_at")
def test_chunked_coding_byte_by_byte() -> None:
    whole = coded([b"hello", b"\r\n", b"x" * 300], b";q", b"X-A: b\r\n")
    content, chunks = fed([whole[at : at + 1] for at in range(len(whole))])
    assert content == b"hello\r\n" + b"x" * 300 and chunks.finished


def test_bytes_behind_the_end_are_noticed() -> None:
    _, chunks = fed([coded([b"a"]) + b"HTTP/1.1 200 OK\r\n"])
    assert chunks.finished and chunks.surplus
    _, chunks = fed([coded([b"a"]), b"H"])
    assert chunks.finished and chunks.surplus


def test_chunked_coding_that_breaks_off_is_not_finished() -> None:
    whole = coded([b"hello"])
    for at in range(len(whole)):
        assert not fed([whole[:at]])[1].finished, at


@pytest.mark.parametrize(
    "bad",
    [b"\r\n", b"x\r\n", b"-5\r\n", b"3\r\nabcd\r\n", b"data: x\r\n\r\n", b"1" * 9000]
    + [b"0x5\r\nhello\r\n", b"+5\r\nhello\r\n", b"1_0\r\n" + b"x" * 16 + b"\r\n"],
)
def test_what_is_not_chunked_coding_is_refused(bad: bytes) -> None:
    with pytest.raises(ValueError):
        fed([bad])


# --- one exchange -------------------------------------------------------------------------


class Wire:
    """A server that answers every request with the bytes it is told to send."""

    def __init__(self, script: Callable[[socket.socket, int], Any]) -> None:
        self.script, self.count, self.connections = script, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.live: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            self.live.append(sock)
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        try:
            while take_request(sock):
                self.count += 1
                if self.script(sock, self.count) == "close":
                    break
        except OSError:
            pass
        finally:
            sock.close()

    def close(self) -> None:
        for sock in (self.listener, *self.live):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def take_request(sock: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    size = next(
        int(line.split(b":")[1])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    )
    while len(body) < size:
        body += sock.recv(65536)
    return head


@pytest.fixture
def wire() -> Iterator[Callable[..., Wire]]:
    """wire(bytes, ...) answers in turn, the last one again and again; or wire(function)."""
    made: list[Wire] = []

    def make(*answers: Any) -> Wire:
        def play(sock: socket.socket, number: int) -> None:
            sock.sendall(answers[min(number, len(answers)) - 1])

        made.append(Wire(answers[0] if callable(answers[0]) else play))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def transport() -> Iterator[router.Transport]:
    made = router.Transport(5.0)
    yield made
    made.close()


@pytest.fixture
def watched() -> Callable[[float], router.Guard]:
    """watched(seconds): a guard with a deadline, in the care of a watchdog."""
    dog = router.Watchdog()

    def make(seconds: float = 20.0) -> router.Guard:
        guard = router.Guard()
        guard.deadline = time.monotonic() + seconds
        dog.watch(guard)
        return guard

    return make


@pytest.fixture
def post(transport: router.Transport, watched: Any) -> Callable[..., router.Response]:
    def send(url: str, body: bytes = b"{}", guard: Any = None) -> router.Response:
        base = url if url.endswith("/v1") else f"{url}/v1"
        origin = transport.origin(base)
        return transport.post(origin, "/chat/completions", HEADERS, body, guard or watched())

    return send


def plain(body: bytes, *lines: str, status: str = "200 OK") -> bytes:
    head = [f"HTTP/1.1 {status}", *lines, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(head).encode() + body


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("dripped", [False, True], ids=["at-once", "drip"])
def test_a_body_in_every_framing(upstream, post, framing, gzipped, dripped):
    cuts = range(1, 400) if dripped else ()
    up = upstream(Reply(200, completion(), framing=framing, gzipped=gzipped, cuts=cuts))
    for _ in range(2):
        assert json.loads(post(up.url).read()) == completion()
    assert up.connections == (2 if framing == "close" else 1)


def test_the_request_is_as_it_should_be(upstream, post):
    up = upstream(chat())
    post(up.url, b'{"a": 1}').read()
    asked = up.requests[0]
    assert (asked.method, asked.path, asked.body) == ("POST", "/v1/chat/completions", b'{"a": 1}')
    assert asked.headers["host"] == f"127.0.0.1:{up.port}"


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("ending", ["fin", "reset"])
@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzip"])
def test_a_body_cut_short_is_a_reset_never_an_answer(upstream, post, framing, ending, gzipped):
    reply = Reply(200, completion("x" * 500), framing=framing, stop_at=100, ending=ending)
    up = upstream(Reply(**{**vars(reply), "gzipped": gzipped}))
    with pytest.raises(router.TransportError) as caught:
        post(up.url).read()
    assert caught.value.sort == "reset"


def test_gzip_in_several_members_is_one_body(post, wire):
    body = gzip.compress(BODY[:50]) + gzip.compress(BODY[50:])
    assert post(wire(plain(body, "Content-Encoding: gzip")).url).read() == BODY


def test_an_answer_larger_than_the_limit_is_given_up(upstream, post):
    up = upstream(Reply(200, b"x" * 300_000))
    with pytest.raises(router.TransportError) as caught:
        post(up.url).read(limit=100_000)
    assert caught.value.sort == "garbled"


@pytest.mark.parametrize("early", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_interim_answers_are_no_answers(post, wire, early):
    hint = f"HTTP/1.1 {early}\r\nLink: </x>\r\n\r\n".encode()

    def slowly(sock: socket.socket, number: int) -> None:
        sock.sendall(hint)
        time.sleep(0.05)
        sock.sendall(hint + plain(b"answer %d" % number))

    server = wire(slowly)
    for number in (1, 2, 3):
        response = post(server.url)
        assert (response.status, response.read()) == (200, b"answer %d" % number)


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified", "200 OK"])
def test_an_answer_without_a_body_ends_at_once(post, wire, status):
    length = "Content-Length: 0\r\n" if status.startswith("200") else ""
    server = wire(f"HTTP/1.1 {status}\r\n{length}\r\n".encode())
    for _ in range(2):
        assert post(server.url).read() == b""
    assert server.connections == 1


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_is_an_answer_and_not_followed(post, wire, code):
    elsewhere = wire(plain(BODY))
    server = wire(plain(b"", f"Location: {elsewhere.url}", status=f"{code} Moved"))
    assert post(server.url).status == code
    assert elsewhere.count == 0


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200\r\nCONTENT-LENGTH:5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
    ],
    ids=["twice", "no-reason", "case", "both", "bare-lf"],
)
def test_odd_heads_are_read(post, wire, watched, head):
    assert post(wire(head).url, guard=watched(2)).read() == b"hello"


@pytest.mark.parametrize(
    "head",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 999 No\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhello there\r\n",
    ],
    ids=["ssh", "status", "tls", "endless", "length", "not-chunked"],
)
def test_what_is_not_http_is_a_failure_and_no_crash(post, wire, head):
    with pytest.raises(router.TransportError) as caught:
        post(wire(head).url).read()
    assert caught.value.sort in router.SORTS


@pytest.mark.parametrize("length", ["5, 12", "-1", "x"])
def test_a_length_that_is_none_does_not_hang_on_a_kept_connection(post, wire, watched, length):
    server = wire(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nhello".encode())
    started = time.monotonic()
    with pytest.raises(router.TransportError):
        post(server.url, guard=watched(3)).read()
    assert time.monotonic() - started < 2


# --- kept connections ---------------------------------------------------------------------


def test_a_connection_with_bytes_behind_the_answer_is_not_used_again(post, wire):
    server = wire(plain(b"one") + plain(b"forged"), plain(b"two"))
    assert post(server.url).read() == b"one"
    assert post(server.url).read() == b"two"
    assert server.connections == 2


def test_a_late_second_answer_is_never_taken_for_the_next_one(post, wire):
    def twice(sock: socket.socket, number: int) -> None:
        sock.sendall(plain(b"answer %d" % number))
        if number == 1:
            sock.sendall(plain(b"forged"))

    server = wire(twice)
    assert post(server.url).read() == b"answer 1"
    time.sleep(0.05)
    assert post(server.url).read() == b"answer 2"


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_connection_that_closed_while_idle_is_replaced(post, wire, how):
    def then_leave(sock: socket.socket, number: int) -> str:
        sock.sendall(plain(b"ok"))
        if how == "reset":
            time.sleep(0.02)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return "close"

    server = wire(then_leave)
    for _ in range(3):
        assert post(server.url).read() == b"ok"
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_the_same_where_only_the_calls_of_sockets_can_be_used(post, wire, how, monkeypatch):
    monkeypatch.setattr(router, "brief_calls", lambda: None)
    test_a_connection_that_closed_while_idle_is_replaced(post, wire, how)
    test_a_late_second_answer_is_never_taken_for_the_next_one(post, wire)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_a_little_is_sent_at_once_and_never_waits(pair):
    one, other = pair
    assert router.send_briefly(one, b"hello") == 5
    assert other.recv(10) == b"hello"
    assert router.send_briefly(one, b"x" * (router.BRIEF_BYTES + 1)) == 0, "for its own send"
    sent = 0
    other.settimeout(5)
    while some := router.send_briefly(one, b"y" * 60_000):  # a blocking socket that fills up
        sent += some
    while sent > 0:
        sent -= len(other.recv(60_000))
    assert sent == 0
    other.close()
    assert router.send_briefly(one, b"z") == 0
    one.close()
    assert router.send_briefly(one, b"z") == 0


def test_a_connection_is_silent_until_something_or_its_end_comes(pair):
    calls, (one, other) = router.brief_calls(), pair
    if calls is None:
        pytest.skip("no such calls here")
    assert calls.silent(one.fileno())
    other.send(b"ab")
    assert not calls.silent(one.fileno())
    assert one.recv(2) == b"ab", "it was only looked at"
    assert calls.silent(one.fileno())
    other.close()
    assert not calls.silent(one.fileno())


def test_a_kept_connection_that_fails_is_tried_anew_once_and_only_once(post, wire):
    def once(sock: socket.socket, number: int) -> str | None:
        if number > 1:
            return "close"
        sock.sendall(plain(b"ok"))
        return None

    server = wire(once)
    assert post(server.url).read() == b"ok"
    with pytest.raises(router.TransportError) as caught:
        post(server.url)
    assert caught.value.sort == "reset"
    assert server.count == 3  # the first; the stale try; the one on a new connection


def test_a_fresh_connection_that_fails_is_not_tried_again(upstream, post):
    up = upstream(Reset())
    with pytest.raises(router.TransportError):
        post(up.url)
    assert len(up.requests) == 1


def test_a_half_answer_on_a_kept_connection_is_not_asked_for_again(post, wire):
    def half(sock: socket.socket, number: int) -> str | None:
        sock.sendall(plain(b"ok") if number == 1 else b"HTTP/1.1 200 OK\r\nConte")
        return None if number == 1 else "close"

    server = wire(half)
    post(server.url).read()
    with pytest.raises(router.TransportError):
        post(server.url)
    assert server.count == 2


def test_connections_idle_for_too_long_do_not_pile_up(upstream, post, transport):
    up = upstream(chat())
    for response in [post(up.url) for _ in range(20)]:
        response.read()
    origin = transport.origin(f"{up.url}/v1")
    assert len(origin.idle) == 20
    for link in list(origin.idle)[:-1]:  # one at a time is enough from here on
        link.idle_since -= 1000
    origin.tidied -= 1000
    for _ in range(3):
        post(up.url).read()
    assert len(origin.idle) <= 2
    until(lambda: len(up.live) <= 2)


def test_a_closed_response_closes_its_connection(upstream, post):
    up = upstream(chat_stream(*"abc", gap=0.05))
    response = post(up.url)
    response.read1()
    response.close()
    response.close()
    until(up.requests[0].closed.is_set)
    post(up.url).close()
    assert up.connections == 2


def test_a_refusal_before_the_body_was_read_is_still_told(post):
    """413 from a server that does not read on (nginx)."""
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        sock, _ = listener.accept()
        while b"\r\n\r\n" not in sock.recv(65536, socket.MSG_PEEK):
            pass
        sock.sendall(plain(b"too large", "Connection: close", status="413 Too Large"))
        sock.shutdown(socket.SHUT_WR)
        time.sleep(0.5)
        sock.close()

    threading.Thread(target=refuse, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    response = post(url, b"x" * (16 << 20))
    assert (response.status, response.read()) == (413, b"too large")
    listener.close()


# --- guard and watchdog -------------------------------------------------------------------


def finishes(task: Callable[[], Any], seconds: float = 5.0) -> Any:
    """What a call in another thread comes to; AssertionError when it hangs."""
    got: list[Any] = []

    def run() -> None:
        try:
            got.append(task())
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert got, f"still waiting after {seconds} s"
    return got[0]


@pytest.mark.parametrize(
    "answer",
    [
        Hang(30),
        chat_stream(*"abc", hold_after=1),
        chat_stream(*"abc", hold_after=1, framing="close"),
        Reply(200, completion(), cuts=[20], hold_after=1),
        Reply(200, completion(), cuts=[20], hold_after=1, gzipped=True, framing="chunked"),
    ],
    ids=["head", "chunked", "until-close", "length", "gzip"],
)
def test_the_deadline_cuts_every_wait(upstream, post, watched, answer):
    up = upstream(answer)
    error = finishes(lambda: post(up.url, guard=watched(0.3)).read())
    assert isinstance(error, router.TransportError) and error.sort == "timeout"
    until(up.requests[0].closed.is_set)


def test_the_deadline_cuts_a_server_that_does_not_read(post, watched):
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    error = finishes(lambda: post(url, b"x" * (32 << 20), watched(0.3)))
    assert isinstance(error, router.TransportError) and error.sort == "timeout"
    listener.close()


class SlowToConnect(router.Transport):
    """Takes its time to connect, as a far or overloaded host does."""

    def _open(self, *arguments: Any) -> Any:
        time.sleep(0.6)
        return super()._open(*arguments)


def test_a_deadline_that_passes_while_connecting_is_not_forgotten(upstream, watched):
    up, slow = upstream(Hang(30)), SlowToConnect(5.0)
    origin = slow.origin(f"{up.url}/v1")
    error = finishes(lambda: slow.post(origin, "/x", HEADERS, b"{}", watched(0.2)))
    assert isinstance(error, router.TransportError) and error.sort == "timeout"


def test_a_host_that_never_answers_the_knock_is_left_at_the_deadline(post, watched):
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    address = listener.getsockname()
    fill = [socket.socket() for _ in range(3)]
    for sock in fill:
        sock.setblocking(False)
        sock.connect_ex(address)
    time.sleep(0.1)
    started = time.monotonic()
    error = finishes(lambda: post(f"http://127.0.0.1:{address[1]}", guard=watched(0.5)), 15)
    for sock in (*fill, listener):
        sock.close()
    assert isinstance(error, router.TransportError)
    assert time.monotonic() - started < 3, "CONNECT_TIMEOUT outlived the deadline"


@pytest.mark.parametrize("answer", [Hang(30), chat_stream(*"abc", hold_after=1)])
def test_a_client_that_leaves_cuts_the_wait(upstream, post, watched, answer):
    up, guard = upstream(answer), watched(30)
    threading.Timer(0.2, guard.client_gone).start()
    assert isinstance(finishes(lambda: post(up.url, guard=guard).read()), router.ClientGone)
    until(up.requests[0].closed.is_set)


def test_a_client_that_left_before_costs_no_request(upstream, post, watched):
    up, guard = upstream(chat()), watched()
    guard.client_gone()
    with pytest.raises(router.ClientGone):
        post(up.url, guard=guard)
    assert not up.requests


def test_a_client_that_left_before_leaves_the_kept_connection_unused(upstream, post, watched):
    up, guard = upstream(chat()), watched()
    post(up.url).read()
    guard.client_gone()
    with pytest.raises(router.ClientGone):
        post(up.url, guard=guard)
    assert len(up.requests) == 1


def test_a_late_cut_does_not_hit_the_next_user_of_the_connection(upstream, post, watched):
    def second_is_slow(request: Request) -> Any:
        return Reply(200, completion(), delay=0.3 * (len(up.requests) > 1))

    up, first = upstream(second_is_slow), watched()
    post(up.url, guard=first).read()
    threading.Timer(0.1, first.client_gone).start()
    assert json.loads(post(up.url).read()) == completion()
    assert up.connections == 1


def test_a_watchdog_serves_many_and_rests_between(upstream, post, watched):
    up = upstream(Hang(30))
    for _ in range(2):
        errors: list[Any] = []

        def wait(errors: list[Any] = errors) -> None:
            try:
                post(up.url, guard=watched(0.3))
            except router.TransportError as error:
                errors.append(error.sort)

        threads = [threading.Thread(target=wait, daemon=True) for _ in range(20)]
        for thread in threads:
            thread.start()
        until(lambda errors=errors: len(errors) == 20)
        assert set(errors) == {"timeout"}


def test_a_guard_out_of_the_watchdogs_care_is_left_alone():
    dog, guard = router.Watchdog(), router.Guard()
    left, right = socket.socketpair()
    guard.hold(left)
    guard.deadline = time.monotonic() + 0.2
    dog.watch(guard)
    dog.unwatch(guard)
    time.sleep(0.5)
    right.sendall(b"x")
    assert left.recv(1) == b"x" and not guard.cut
    left.close()
    right.close()


# --- a proxy in between -------------------------------------------------------------------


def test_a_plain_proxy_gets_the_whole_address_and_its_password(wire, post, monkeypatch):
    heads: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def proxy() -> None:
        sock, _ = listener.accept()
        heads.append(take_request(sock))
        sock.sendall(plain(b"by proxy"))
        sock.close()

    threading.Thread(target=proxy, daemon=True).start()
    port = listener.getsockname()[1]
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    assert post("http://provider.test:81").read() == b"by proxy"
    first, *lines = heads[0].decode().split("\r\n")
    assert first == "POST http://provider.test:81/v1/chat/completions HTTP/1.1"
    assert "Host: provider.test:81" in lines
    assert any(line.lower().startswith("proxy-authorization: basic ") for line in lines)
    listener.close()


def test_the_standard_library_would_read_the_same(upstream):
    """The scripted provider is real HTTP: the tests above prove something."""
    up = upstream(Stream(chunks=[{"a": 1}]))
    connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=5)
    connection.request("POST", "/v1/x", b"{}")
    assert connection.getresponse().read() == b'data: {"a": 1}\n\ndata: [DONE]\n\n'
    connection.close()
