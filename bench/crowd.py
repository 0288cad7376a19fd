#!/usr/bin/env python3
"""What a crowd costs: many at once, hasty, slow, hung and huge ones. Needs Linux.

    python bench/crowd.py [--streams 1000] [--health 1.0] [--router FILE]
    python bench/crowd.py --answers 20 --set LARGE_TOTAL_BYTES=201326592    how many huge ones

The router runs as a process of its own, with default settings but MAX_STREAMS, before providers
on loopback: one says a word and keeps quiet, one never answers, one never ends, one answers with
49 MB, one is quick. While each crowd stands, /health and a short request to the quick provider
are timed.

Targets: /health below 1 s and every short request right, whoever stands around; 1,000 streams
held in one process; huge answers stay in the memory that the router allows them. Exit code: 0
every target met, 1 a target missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from soak import Process, SoakError, address_in  # noqa: E402

KEY = "crowd-key"
STREAM_MB = 300.0  # of memory, at most; beyond what the router allows large answers
ROLES = {"cerebras": "held", "groq": "hung", "mistral": "quick", "nvidia": "endless", "zai": "big"}
CHUNK = '{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[%s]}'
EVENT = "data: " + CHUNK % '{"index":0,"delta":{"content":"%s"},"finish_reason":null}' + "\n\n"
HELD = (EVENT % "word").encode()
ENDLESS = (EVENT % ("x" * 2000)).encode() * 32
ANSWER = (
    '{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,'
    '"message":{"role":"assistant","content":"%s"},"finish_reason":"stop"}]}'
)


# ---------------------------------------------------------------- providers


class Providers:
    """All of them in one thread: the first part of the path says how one behaves."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.asked: dict[str, int] = dict.fromkeys(ROLES.values(), 0)
        started = threading.Event()
        self.port = 0

        async def listen() -> None:
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0, backlog=2048)
            self.port = server.sockets[0].getsockname()[1]
            started.set()

        def run() -> None:
            self.loop.create_task(listen())
            self.loop.run_forever()

        threading.Thread(target=run, daemon=True).start()
        started.wait(10)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                role = head.split(b" ")[1].decode().split("/")[1]
                self.asked[role] += 1
                await getattr(self, role)(writer)
        writer.close()

    async def say(self, writer: asyncio.StreamWriter, kind: str, length: int | None) -> None:
        framing = f"Content-Length: {length}" if length else "Connection: close"
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{framing}\r\n\r\n".encode())

    async def quick(self, writer: asyncio.StreamWriter) -> None:
        body = (ANSWER % "quick").encode()
        await self.say(writer, "application/json", len(body))
        writer.write(body)
        await writer.drain()

    async def held(self, writer: asyncio.StreamWriter) -> None:
        await self.say(writer, "text/event-stream", None)
        writer.write(HELD)
        await asyncio.sleep(600)

    async def hung(self, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(600)

    async def endless(self, writer: asyncio.StreamWriter) -> None:
        await self.say(writer, "text/event-stream", None)
        while not writer.is_closing():
            writer.write(ENDLESS)
            await writer.drain()

    async def big(self, writer: asyncio.StreamWriter) -> None:
        """49 MB, just below what is read of one answer."""
        body = (ANSWER % ("x" * (49 << 20))).encode()
        await self.say(writer, "application/json", len(body))
        writer.write(body)
        await writer.drain()


# ---------------------------------------------------------------- clients


@dataclass
class Crowd:
    """Sockets of clients that stand before the router."""

    url: str
    socks: list[socket.socket]

    def open(self, data: bytes, buffer: int = 0) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        sock = socket.socket()
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.settimeout(20)
        sock.connect((host, int(port)))
        sock.sendall(data)
        self.socks.append(sock)
        return sock

    def hear(self, word: bytes, seconds: float) -> int:
        """How many got a word within so many seconds."""
        poller, waiting = select.poll(), {sock.fileno(): sock for sock in self.socks}
        tails, heard = dict.fromkeys(waiting, b""), 0
        for number in waiting:
            poller.register(number, select.POLLIN)
        end = time.monotonic() + seconds
        while waiting and time.monotonic() < end:
            for number, _ in poller.poll(100):
                piece = waiting[number].recv(1 << 20)
                tails[number] = tails[number][-len(word) :] + piece
                heard += word in tails[number]
                if word in tails[number] or not piece:
                    poller.unregister(number)
                    del waiting[number]
        return heard

    def ask_on(self, data: bytes, over: threading.Event) -> None:
        """Each asks again as soon as it is answered, until it is over."""
        poller, asking = select.poll(), {sock.fileno(): sock for sock in self.socks}
        for number in asking:
            poller.register(number, select.POLLIN)
        while not over.is_set():
            for number, _ in poller.poll(100):
                if asking[number].recv(1 << 20).endswith(b"}"):
                    asking[number].sendall(data)

    def leave(self) -> None:
        for sock in self.socks:
            sock.close()
        self.socks.clear()


def request(model: str, stream: bool) -> bytes:
    body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "hi"}]}
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


# ---------------------------------------------------------------- the scenes


@dataclass
class Scene:
    """The router, its providers, and what was measured."""

    process: Process
    providers: Providers
    health_s: float
    missed: list[str]

    def look(self, name: str, memory_mb: float) -> None:
        """Time others while the crowd stands; `memory_mb` is how much may be in use."""
        slowest = {"/health": 0.0, "short": 0.0}
        for _ in range(10):
            for what in slowest:
                began = time.monotonic()
                right = self.knock(what)
                slowest[what] = max(slowest[what], time.monotonic() - began)
                if not right:
                    self.missed.append(f"{name}: {what} was not answered")
        used = self.process.usage()
        if slowest["/health"] > self.health_s:
            self.missed.append(f"{name}: /health took {slowest['/health']:.1f} s")
        if used["memory MB"] > memory_mb:
            self.missed.append(f"{name}: {used['memory MB']:.0f} MB")
        times = " | ".join(f"{1000 * seconds:.0f} ms" for seconds in slowest.values())
        print(
            f"| {name} | {times} | {used['memory MB']:.0f} MB | {used['threads']:.0f} |", flush=True
        )

    def knock(self, what: str) -> bool:
        data = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        data = data if what == "/health" else request("mistral/m", False)
        crowd = Crowd(self.process.url, [])
        crowd.open(data)
        word = b'"status":"ok"' if what == "/health" else b"quick"
        right = crowd.hear(word, 20) == 1
        crowd.leave()
        return right

    def crowd(self) -> Crowd:
        return Crowd(self.process.url, [])

    def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise SoakError("a crowd does not come together")
            time.sleep(0.02)


def held_streams(scene: Scene, count: int) -> None:
    crowd = scene.crowd()
    for _ in range(count):
        crowd.open(request("cerebras/m", True))
    heard = crowd.hear(b"word", 60)
    if heard < count:
        scene.missed.append(f"{heard} of {count} streams began")
    scene.look(f"{heard:,} streams held", STREAM_MB)
    crowd.leave()


def hung_calls(scene: Scene) -> None:
    crowd = scene.crowd()
    for _ in range(200):
        crowd.open(request("groq/m", False))
    scene.until(lambda: scene.providers.asked["hung"] >= 200)
    scene.look("200 calls that never answer", STREAM_MB)
    crowd.leave()


def hasty_clients(scene: Scene) -> None:
    """More of them than threads can have a turn; the loop must have one all the same."""
    crowd, whole, over = scene.crowd(), request("mistral/m", False), threading.Event()
    for _ in range(250):
        crowd.open(whole)
    thread = threading.Thread(target=crowd.ask_on, args=(whole, over), daemon=True)
    thread.start()
    time.sleep(2)
    scene.look("250 clients that ask without pause", STREAM_MB)
    over.set()
    thread.join()
    crowd.leave()


def half_open(scene: Scene) -> None:
    """A byte at a time: 200 never end their head, 200 never end their body."""
    crowd, whole = scene.crowd(), request("mistral/m", False)
    cut = whole.index(b"\r\n\r\n")
    for number in range(400):
        crowd.open(whole[: cut - 30] if number % 2 else whole[: cut + 10])
    for _ in range(5):
        for sock in crowd.socks:
            sock.sendall(b"x")
        time.sleep(0.1)
    scene.look("400 half-open requests", STREAM_MB)
    crowd.leave()


def slow_readers(scene: Scene) -> None:
    """Endless streams that nobody reads: what is not read is not fetched either."""
    crowd = scene.crowd()
    for _ in range(50):
        crowd.open(request("nvidia/m", True), buffer=4096)
    time.sleep(3)
    scene.look("50 endless streams, not read", STREAM_MB)
    crowd.leave()


def allowed_mb(process: Process) -> float:
    """What all large requests and answers together may take, as the router itself says."""
    wanted = urllib.request.Request(
        f"{process.url}/v1/status", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(wanted, timeout=10) as answer:
        return float(json.load(answer)["large"]["limit"]) / (1 << 20)


def huge_answers(scene: Scene, count: int) -> None:
    """So many answers of 49 MB at once, read to their end."""
    crowd, peak, over = scene.crowd(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], scene.process.usage()["memory MB"])

    threading.Thread(target=watch, daemon=True).start()
    for _ in range(count):
        crowd.open(request("zai/m", False))
    heard = crowd.hear(b'"finish_reason":"stop"', 60)
    over.set()
    crowd.leave()
    if heard < count:
        scene.missed.append(f"{heard} of {count} huge answers came")
    if peak[0] > STREAM_MB + allowed_mb(scene.process):
        scene.missed.append(f"huge answers: {peak[0]:.0f} MB")
    print(f"| {count} answers of 49 MB at once | | | {peak[0]:.0f} MB at most | |", flush=True)
    scene.look("after them", STREAM_MB)


def run(args: argparse.Namespace, home: Path) -> list[str]:
    providers = Providers()
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= {"HR_HOME": str(home), "PORT": "0", "PROXY_API_KEYS": KEY, "ROUTER_PROBE": "0"}
    env["CACHE_TTL_SECONDS"] = "0"  # the crowd asks the same, and each wants a provider
    env["MAX_STREAMS"] = str(max(args.streams, 200) + 100)
    env |= dict(item.split("=", 1) for item in args.set)
    for name, role in ROLES.items():
        env[f"{name.upper()}_BASE_URL"] = f"http://127.0.0.1:{providers.port}/{role}/v1"
        env[f"{name.upper()}_API_KEYS"], env[f"{name.upper()}_MODEL"] = f"{name}-key-1", "m"
    log = home / "crowd.log"
    with ExitStack() as stack:
        out = stack.enter_context(log.open("wb"))
        popen = subprocess.Popen([sys.executable, args.router, "serve"], env=env, stderr=out)
        stack.callback(popen.wait, 60)
        stack.callback(popen.send_signal, signal.SIGKILL)
        process = Process(popen, address_in(log, popen), log)
        scene = Scene(process, providers, args.health, [])
        print("| while | slowest /health | slowest short request | memory | threads |")
        print("|---|---|---|---|---|")
        scene.look("nobody else", STREAM_MB)
        hasty_clients(scene)
        hung_calls(scene)
        half_open(scene)
        slow_readers(scene)
        held_streams(scene, args.streams)
        huge_answers(scene, args.answers)
        if found := scene.process.tracebacks():
            scene.missed.append(f"{found} tracebacks in the log")
    return scene.missed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--health", type=float, default=1.0, help="seconds it may take")
    parser.add_argument("--answers", type=int, default=4, help="huge ones at once")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--router", default=str(ROOT / "router.py"), help="another router.py")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with tempfile.TemporaryDirectory() as home:
            missed = run(args, Path(home))
    except (SoakError, OSError) as error:
        print(f"the crowd could not stand: {error}", file=sys.stderr)
        return 2
    print("MISSED: " + "; ".join(missed) if missed else "every target met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
