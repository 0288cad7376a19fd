"""A scripted provider: a real HTTP/1.1 server on loopback that answers (or fails) exactly as told.

    up = Upstream([Reply(429, {"error": {"message": "slow down"}}), chat("hello")])
    up.url                      # http://127.0.0.1:NNNNN
    up.requests[0].json         # what it was asked; .headers, .path, .body, .connection
    up.requests[0].closed       # an Event: the peer left before the answer was over
    up.close()

A script is a function `Request -> answer`, or a list of answers and such functions: each POST takes
the next one, the last one repeats. GETs never use the script up; they are kept in `up.gets` and
answered by `up.on_get`, with an empty list unless told otherwise.

Answers: Reply (whole body), Stream (server-sent events), Hang (silence), Reset (connection reset).
Every one of them can be slowed down, framed three ways, cut at any byte. Times are seconds.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

LINGER_RESET = struct.pack("ii", 1, 0)  # close() then sends RST instead of FIN
REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many"}


KEY = "sk-test"  # the caller key of every router under test
AUTH = {"Authorization": f"Bearer {KEY}"}
HELLO = [{"role": "user", "content": "hello there"}]
EMPTY_LIST = {"object": "list", "data": []}

# --- what is asked ------------------------------------------------------------


@dataclass
class Request:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    connection: int  # number of the TCP connection it came on: equal numbers = keep-alive
    at: float = field(default_factory=time.monotonic)
    closed: threading.Event = field(default_factory=threading.Event)  # the peer went away early
    closed_at: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)  # answered, or given up

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def key(self) -> str:
        """The credential, without its scheme."""
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    @property
    def model(self) -> str:
        return self.json["model"]


# --- what is answered ---------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A whole answer. body: dict or list (sent as JSON), str or bytes."""

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0  # before the status line
    framing: str = "length"  # length | chunked | close
    cuts: Sequence[int] = ()  # byte offsets at which the body is cut into separate writes
    gap: float = 0.0  # between those writes
    hold_after: int | None = None  # after that many writes, wait until the gate opens
    stop_at: int | None = None  # body bytes after which the connection ends too early ...
    ending: str = "reset"  # ... with a reset | fin
    gzipped: bool = False

    def payload(self) -> bytes:
        if isinstance(self.body, bytes):
            raw = self.body
        elif isinstance(self.body, str):
            raw = self.body.encode()
        else:
            raw = json.dumps(self.body).encode()
        return gzip.compress(raw) if self.gzipped else raw

    def head_fields(self) -> dict[str, str]:
        plain = isinstance(self.body, (bytes, str))
        fields = {"content-type": "text/plain" if plain else "application/json"}
        if self.gzipped:
            fields["content-encoding"] = "gzip"
        return {**fields, **{name.lower(): value for name, value in self.headers.items()}}

    def pieces(self) -> Iterator[bytes]:
        data, start = self.payload(), 0
        for cut in (*self.cuts, len(data)):
            if cut > start:
                yield data[start:cut]
                start = cut


@dataclass(frozen=True)
class Stream(Reply):
    """Server-sent events: each chunk is one write. A dict chunk becomes a `data:` event."""

    chunks: Sequence[Any] = ()
    done: bool = True  # close with `data: [DONE]`
    framing: str = "chunked"

    def head_fields(self) -> dict[str, str]:
        given = {name.lower(): value for name, value in self.headers.items()}
        return {"content-type": "text/event-stream", **given}

    def pieces(self) -> Iterator[bytes]:
        yield from (sse(chunk) for chunk in self.chunks)
        if self.done:
            yield sse("[DONE]")

    def payload(self) -> bytes:
        return b"".join(self.pieces())


@dataclass(frozen=True)
class Hang:
    """Nothing at all for so many seconds (or until the gate opens), then the answer."""

    seconds: float = 60.0
    then: Reply | None = None


@dataclass(frozen=True)
class Reset:
    """A connection reset before the headers, or after some bytes of them."""

    after: bytes = b""


Answer = Reply | Hang | Reset
Step = Answer | Callable[[Request], Answer]
Script = Sequence[Step] | Callable[[Request], Answer]


def drip(answer: Reply, gap: float) -> Reply:
    """The same answer, one byte at a time."""
    return replace(answer, cuts=range(1, len(answer.payload())), gap=gap)


def html(status: int = 200) -> Reply:
    page = "<!doctype html><html><head><title>Welcome to nginx!</title></head><body></body></html>"
    return Reply(status, page, {"content-type": "text/html; charset=utf-8"})


# --- chat bodies --------------------------------------------------------------


def sse(event: Any) -> bytes:
    """One server-sent event; bytes go out as they are."""
    if isinstance(event, bytes):
        return event
    text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def usage(prompt: int = 7, completion: int = 3) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def completion(text: str | None = "hello", *, model: str = "mock", **message: Any) -> dict:
    """A chat completion body."""
    reason = "tool_calls" if message.get("tool_calls") else "stop"
    said = {"role": "assistant", "content": text, **message}
    return {
        "id": "chatcmpl-mock",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": model,
        "choices": [{"index": 0, "message": said, "logprobs": None, "finish_reason": reason}],
        "usage": usage(),
    }


def delta(finish: str | None = None, *, model: str = "mock", **content: Any) -> dict[str, Any]:
    """One chunk of a streamed chat completion."""
    return {
        "id": "chatcmpl-mock",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": model,
        "choices": [{"index": 0, "delta": content, "logprobs": None, "finish_reason": finish}],
    }


def usage_chunk() -> dict[str, Any]:
    return {**delta(), "choices": [], "usage": usage()}


def chunks(*texts: str, with_usage: bool = True) -> list[dict[str, Any]]:
    """Role, texts, finish and (as when asked for) usage."""
    events = [delta(role="assistant", content="")]
    events += [delta(content=text) for text in texts]
    events.append(delta("stop"))
    return [*events, usage_chunk()] if with_usage else events


def chat(text: str = "hello") -> Reply:
    return Reply(200, completion(text))


def chat_stream(*texts: str, **options: Any) -> Stream:
    return Stream(chunks=chunks(*(texts or ("hel", "lo"))), **options)


def good(text: str = "hello") -> Callable[[Request], Reply]:
    """A provider that works: streams when asked to."""

    def answer(request: Request) -> Reply:
        return chat_stream(text) if request.json.get("stream") else chat(text)

    return answer


def failing_first(fault: Answer, text: str = "hello") -> Callable[[Request], Answer]:
    """The first request (of whichever server asks this script first) fails, all others work."""
    lock, healthy, failed = threading.Lock(), good(text), []

    def answer(request: Request) -> Answer:
        with lock:
            first = not failed
            failed.append(request)
        return fault if first else healthy(request)

    return answer


# --- the server ---------------------------------------------------------------


class PeerClosed(Exception):
    """The client closed its side before the answer was over."""


class Connection:
    """One accepted socket: reads requests, writes answers, notices when the peer leaves."""

    def __init__(self, server: Upstream, sock: socket.socket, number: int) -> None:
        self.server, self.sock, self.number, self.buffer = server, sock, number, b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serve(self) -> None:
        try:
            while (request := self.read()) is not None:
                if not self.answer(request):
                    break
        except OSError:  # the peer reset the connection while idle, or close() cut us off
            pass
        finally:
            self.sock.close()

    def read(self) -> Request | None:
        while b"\r\n\r\n" not in self.buffer:
            if not self.fill():
                return None
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        pairs = (line.split(":", 1) for line in lines)
        headers = {name.strip().lower(): value.strip() for name, value in pairs}
        return Request(method, path, headers, self.read_body(headers), self.number)

    def read_body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return b"".join(iter(self.read_chunk, b""))
        return self.take(int(headers.get("content-length", "0")))

    def read_chunk(self) -> bytes:
        while b"\r\n" not in self.buffer:
            self.fill()
        size, self.buffer = self.buffer.split(b"\r\n", 1)
        return self.take(int(size, 16) + 2)[:-2]

    def take(self, size: int) -> bytes:
        while len(self.buffer) < size:
            if not self.fill():
                raise ConnectionResetError("the body ended early")
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def fill(self) -> bool:
        data = self.sock.recv(262_144)
        self.buffer += data
        return bool(data)

    def answer(self, request: Request) -> bool:
        """Answer one request. -> may the connection be used again?"""
        answer = self.server.next_answer(request)
        try:
            return self.perform(answer)
        except (PeerClosed, ConnectionError, TimeoutError):
            request.closed_at = time.monotonic()
            request.closed.set()
            return False
        finally:
            request.done.set()

    def perform(self, answer: Answer) -> bool:
        if isinstance(answer, Hang):
            self.pause(answer.seconds)
            return self.perform(answer.then) if answer.then else False
        if isinstance(answer, Reset):
            self.sock.sendall(answer.after)
            return self.end("reset")
        return self.deliver(answer)

    def deliver(self, reply: Reply) -> bool:
        self.pause(reply.delay)
        self.sock.sendall(self.head(reply))
        left = reply.stop_at
        for count, piece in enumerate(reply.pieces()):
            if count:
                self.pause(reply.gap)
            if count == reply.hold_after:
                self.pause(600.0)
            if left is not None and len(piece) > left:
                self.send_piece(reply, piece[:left])
                return self.end(reply.ending)
            self.send_piece(reply, piece)
            left = None if left is None else left - len(piece)
        if left is not None:
            return self.end(reply.ending)
        if reply.framing == "chunked":
            self.sock.sendall(b"0\r\n\r\n")
        return reply.framing != "close"

    def head(self, reply: Reply) -> bytes:
        fields = reply.head_fields()
        if reply.framing == "length":
            fields["content-length"] = str(len(reply.payload()))
        elif reply.framing == "chunked":
            fields["transfer-encoding"] = "chunked"
        else:
            fields["connection"] = "close"
        lines = [f"HTTP/1.1 {reply.status} {REASONS.get(reply.status, 'Status')}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def send_piece(self, reply: Reply, piece: bytes) -> None:
        if reply.framing == "chunked" and piece:
            piece = b"%x\r\n%s\r\n" % (len(piece), piece)
        self.sock.sendall(piece)

    def end(self, how: str) -> bool:
        if how == "reset":
            # Without the pause the RST may overtake the bytes before it in the peer's buffer.
            self.pause(0.02)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        return False

    def pause(self, seconds: float) -> None:
        """Wait, unless the gate opens first. Raises PeerClosed when the client goes away."""
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        poller.register(self.server.gate, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poller.poll(left * 1000):
                if descriptor == self.server.gate:
                    return
                if not self.sock.recv(1, socket.MSG_PEEK):
                    raise PeerClosed
                poller.unregister(self.sock)  # pipelined bytes: they can wait


class Upstream:
    """The scripted server. Use `.url`, `.requests`, `.gets`, `.open_gate()`, `.close()`."""

    def __init__(self, script: Script = ()) -> None:
        self.script = script or good()
        self.requests: list[Request] = []
        self.gets: list[Request] = []
        self.on_get: Callable[[Request], Answer] = lambda _: Reply(200, EMPTY_LIST)
        self.lock, self.connections = threading.Lock(), 0
        self.live: set[socket.socket] = set()
        self.gate, self.gate_key = os.pipe()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.closed = False
        self.thread = threading.Thread(target=self.accept, name="upstream", daemon=True)
        self.thread.start()

    def accept(self) -> None:
        while not self.closed:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            with self.lock:
                self.live.add(sock)
            args = (Connection(self, sock, self.connections),)
            threading.Thread(target=self.run, args=args, daemon=True).start()

    def run(self, connection: Connection) -> None:
        try:
            connection.serve()
        finally:
            with self.lock:
                self.live.discard(connection.sock)

    def next_answer(self, request: Request) -> Answer:
        if request.method != "POST":
            self.gets.append(request)
            return self.on_get(request)
        with self.lock:
            number = len(self.requests)
            self.requests.append(request)
        if callable(self.script):
            return self.script(request)
        step = self.script[min(number, len(self.script) - 1)]
        return step(request) if callable(step) else step

    def open_gate(self) -> None:
        """Let everything that hangs or is held go on at once, now and later."""
        os.write(self.gate_key, b"!")

    def wait_for(self, count: int, seconds: float = 10.0) -> list[Request]:
        """Wait until so many requests have arrived."""
        until(lambda: len(self.requests) >= count, seconds)
        return self.requests

    def close(self) -> None:
        """Stop listening and cut every connection: what a killed provider looks like."""
        if self.closed:
            return
        self.closed = True
        close_hard(self.listener)
        with self.lock:
            live = list(self.live)
        for sock in live:
            close_hard(sock, keep_open=True)
        self.thread.join(5)
        until(lambda: not self.live, 5)
        os.close(self.gate)
        os.close(self.gate_key)


def close_hard(sock: socket.socket, *, keep_open: bool = False) -> None:
    """Wake whoever blocks on this socket; its own thread closes it when keep_open."""
    # Already closed by its thread, or a listener on a system that cannot shut one down.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    if not keep_open:
        sock.close()


def provider(name: str, up: Upstream | str, *models: str, keys: str = "") -> dict[str, str]:
    """The settings that point one provider row at a scripted server (or any base URL)."""
    prefix = name.upper()
    url = up if isinstance(up, str) else f"{up.url}/v1"
    settings = {f"{prefix}_BASE_URL": url, f"{prefix}_MODEL": ",".join(models) or "m1"}
    if name != "local":
        settings[f"{prefix}_API_KEYS"] = keys or f"{name}-key-1"
    return settings


class Clock:
    """A clock, in seconds, that goes on when told to."""

    def __init__(self, time: float = 1000.0) -> None:
        self.time = time

    def __call__(self) -> float:
        return self.time

    def pass_by(self, seconds: float) -> None:
        self.time += seconds


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for a condition; AssertionError when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.005)


def free_port() -> int:
    """A port on which nothing listens (for the moment)."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def events_of(body: bytes) -> list[tuple[str, str]]:
    """The (event name, data) pairs of a stream; comments and line-end styles do not matter."""
    text = body.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    return [event for block in text.split("\n\n") if (event := parse_event(block.split("\n")))]


def parse_event(lines: Iterable[str]) -> tuple[str, str] | None:
    fields: dict[str, list[str]] = {"event": [], "data": []}
    for line in lines:
        name, _, value = line.partition(":")
        if name in fields:
            fields[name].append(value.removeprefix(" "))
    if not fields["data"]:
        return None
    return "".join(fields["event"]), "\n".join(fields["data"])


def data_of(body: bytes) -> list[Any]:
    """The JSON payloads of a stream, without [DONE]."""
    return [json.loads(data) for _, data in events_of(body) if data != "[DONE]"]


def text_of(body: bytes) -> str:
    """The text a chat stream delivers (first choice)."""
    choices = (chunk["choices"][0] for chunk in data_of(body) if chunk.get("choices"))
    return "".join(choice["delta"].get("content") or "" for choice in choices)
