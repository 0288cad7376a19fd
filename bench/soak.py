#!/usr/bin/env python3
"""Does the router stand it? Random faults at four providers, for a while or for long. Needs Linux.

    python bench/soak.py                         1,000 requests, 30 % of what providers do is wrong
    python bench/soak.py --endurance 10          minutes of the same, looking at what is used up
    python bench/soak.py --requests 200 --seed 7 --faults 0.5

Four providers on loopback, of three dialects, fail at random in the ways of the crash test; the
router runs as a process of its own, with default settings. Clients of three dialects ask for
answers that no other request has, whole and streamed, and check every word.

Targets: 99.5 % answered correctly, no wrong or truncated answer with status 200, p99 below 9 s.
Endurance: memory, threads, sockets and file descriptors of the last quarter are those of the
second. Exit code: 0 every target met, 1 a target missed, 2 the soak could not run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import router  # noqa: E402
from router import Fault, Mock, Pace, Seen  # noqa: E402

ANSWERED, P99_S = 0.995, 9.0  # targets
PATIENCE_S = 60.0  # of a client
LEAVES = 0.05  # share of clients that go away in the middle, in an endurance run
GROWTH = {"memory MB": 6.0, "threads": 8.0, "files": 12.0, "sockets": 12.0}  # allowed
# What goes wrong, as often as it stands here. Times are in seconds.
FAULTS = (
    Fault(429, "Rate limit reached.", "rate_limit_exceeded", "1"),
    Fault(429, "Rate limit reached. Please try again in 2s.", "rate_limit_exceeded"),
    Fault(500, "The server had an error.", "server_error"),
    Fault(500, "Internal error.", "server_error"),
    Fault(503, "The engine is overloaded.", "overloaded"),
    Fault(529, "Overloaded.", "overloaded_error"),
    Fault(reset=True),
    Fault(reset=True),
    Fault(silent_s=3.0),
    Fault(first_s=2.0),
    Fault(stop_at=1),
    Fault(stop_at=25),
    Fault(stop_at=39),
    Fault(stop_at=10, stall_s=2.0),
    Fault(broken_at=5),
    Fault(unended=True),
)
# Provider -> (dialect, model). Two keys each, as people have.
PROVIDERS = {
    "groq": ("chat", "soak-a"),
    "mistral": ("chat", "soak-b"),
    "anthropic": ("messages", "claude-haiku-4-5"),
    "openai": ("responses", "gpt-5-codex"),  # a model that answers nothing but Responses
}
CLIENTS = ("chat", "messages", "responses")


class SoakError(Exception):
    """The soak cannot go on; the message says why."""


# ---------------------------------------------------------------- providers


def answer_to(question: str) -> str:
    """Forty words that no other question gets."""
    return " ".join(f"{question}-{number}" for number in range(40))


class Provider(Mock):
    """A mock provider whose faults are drawn by lot and whose answers depend on the question."""

    def __init__(self, dialect: str, share: float, dice: random.Random) -> None:
        super().__init__(dialect, 7, Fault(), Pace(1.0))
        self.share, self.dice, self.lock = share, dice, threading.Lock()
        self.drawn: Counter[Fault] = Counter()
        self.calls = 0

    def next_fault(self) -> Fault:
        with self.lock:
            self.calls += 1
            if self.dice.random() >= self.share:
                return Fault()
            fault = self.dice.choice(FAULTS)
            self.drawn[fault] += 1
            return fault

    def text(self, body: Any) -> str:
        turns = body.get("messages") or body.get("input")
        asked = (
            [turn for turn in turns if turn.get("role") == "user"] if turns != str(turns) else []
        )
        content = asked[-1]["content"] if asked else turns
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        return answer_to(content)


# ---------------------------------------------------------------- the router


@dataclass
class Process:
    """The router under test."""

    popen: subprocess.Popen[bytes]
    url: str
    log: Path

    def usage(self) -> dict[str, float]:
        """What it has of the system now."""
        place = Path(f"/proc/{self.popen.pid}")
        status = (place / "status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        files = [*(place / "fd").iterdir()]
        sockets = 0
        for file in files:
            with suppress(OSError):
                sockets += os.readlink(file).startswith("socket:")
        return {
            "memory MB": int(lines["VmRSS"].split()[0]) / 1024,
            "threads": float(lines["Threads"]),
            "files": float(len(files)),
            "sockets": float(sockets),
        }

    def tracebacks(self) -> int:
        return self.log.read_text(errors="replace").count("Traceback")


@contextmanager
def running(providers: dict[str, Provider], command: list[str], home: Path) -> Iterator[Process]:
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= {"HR_HOME": str(home), "PORT": "0", "PROXY_API_KEYS": router.CRASH_KEY}
    env |= {"ROUTER_PROBE": "0", "LOG_LEVEL": "INFO", "CACHE_TTL_SECONDS": "0"}
    for name, mock in providers.items():
        env[f"{name.upper()}_BASE_URL"] = mock.url
        env[f"{name.upper()}_API_KEYS"] = f"{name}-soak-key-1,{name}-soak-key-2"
        env[f"{name.upper()}_MODEL"] = PROVIDERS[name][1]
    log = home / "soak.log"
    with log.open("wb") as out:
        popen = subprocess.Popen([*command, "serve"], env=env, stderr=out, stdout=out)
    try:
        yield Process(popen, address_in(log, popen), log)
    finally:
        popen.send_signal(signal.SIGTERM)
        try:
            popen.wait(20)
        except subprocess.TimeoutExpired:
            popen.kill()


def address_in(log: Path, popen: subprocess.Popen[bytes]) -> str:
    """Where it listens, once it says so."""
    for _ in range(600):
        text = log.read_text(errors="replace")
        if "listening on " in text:
            return text.split("listening on ", 1)[1].split()[0]
        if popen.poll() is not None:
            raise SoakError(f"the router ended with {popen.returncode}: {text[-500:]}")
        time.sleep(0.05)
    raise SoakError("the router does not say where it listens")


# ---------------------------------------------------------------- clients


class Turn(NamedTuple):
    """One request of the run: who asks how."""

    number: int
    client: str
    stream: bool
    leaves: bool = False


@dataclass
class Tally:
    """What came of all requests."""

    right: int = 0
    honest: int = 0  # an error, told as one
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    left: int = 0  # clients that went away on purpose
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def asked(self) -> int:
        return self.right + self.honest + len(self.wrong)

    def add(self, turn: Turn, seen: Seen) -> None:
        text, finish = answer_to(question_of(turn)), router.CRASH_CLIENTS[turn.client].finish
        whole = seen.ended and seen.text == text and seen.finish == finish
        with self.lock:
            self.seconds.append(seen.seconds)
            if seen.error and not seen.wrong and text.startswith(seen.text):
                self.honest += 1
                self.errors[f"{'part, then ' if seen.text else ''}{seen.error[:90]}"] += 1
            elif whole and not seen.wrong:
                self.right += 1
            else:
                what = seen.wrong or f"{len(seen.text)} of {len(text)} characters, {seen.finish!r}"
                self.wrong.append(f"{turn}: {what}")

    def p(self, share: float) -> float:
        ordered = sorted(self.seconds) or [0.0]
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def question_of(turn: Turn) -> str:
    return f"q{turn.number}"


def turns(dice: random.Random, leaves: float = 0.0) -> Iterator[Turn]:
    for number in itertools.count():
        away = dice.random() < leaves
        yield Turn(number, dice.choice(CLIENTS), away or dice.random() < 0.6, away)


def ask(turn: Turn, url: str, tally: Tally) -> None:
    if turn.leaves:
        go_away(turn, url)
        with tally.lock:
            tally.left += 1
        return
    question = question_of(turn)
    tally.add(
        turn, router.ask_as(turn.client, url, "hermes-router", turn.stream, PATIENCE_S, question)
    )


def go_away(turn: Turn, url: str) -> None:
    """Ask for a stream and leave after its first bytes."""
    spoken = router.CRASH_CLIENTS[turn.client]
    body = {**spoken.asks(question_of(turn)), "model": "hermes-router", "stream": True}
    raw = json.dumps(body).encode()
    host, port = url.removeprefix("http://").split(":")
    head = (
        f"POST {spoken.path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {router.CRASH_KEY}\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(head.encode() + raw)
        sock.settimeout(1.0)
        sock.recv(1000)


# ---------------------------------------------------------------- the two runs


def soak(process: Process, count: int, workers: int, dice: random.Random) -> Tally:
    """So many requests, some at a time."""
    tally = Tally()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda t: ask(t, process.url, tally), itertools.islice(turns(dice), count)))
    return tally


def endure(
    process: Process, minutes: float, workers: int, dice: random.Random
) -> tuple[Tally, list[dict[str, float]]]:
    """The same for some minutes, with clients that leave; a look at the process every 2 s."""
    tally, looks = Tally(), []
    until = time.monotonic() + 60 * minutes
    source, lock = turns(dice, LEAVES), threading.Lock()

    def work() -> None:
        while time.monotonic() < until:
            with lock:
                turn = next(source)
            ask(turn, process.url, tally)

    jobs = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for job in jobs:
        job.start()
    while time.monotonic() < until:
        time.sleep(2.0)
        looks.append(process.usage())
    for job in jobs:
        job.join(PATIENCE_S + 10)
    return tally, looks


def told(tally: Tally, providers: dict[str, Provider], seconds: float) -> list[str]:
    calls = sum(mock.calls for mock in providers.values())
    faults = sum(sum(mock.drawn.values()) for mock in providers.values())
    lines = [
        f"| requests | {tally.asked:,} in {seconds:.0f} s |",
        f"| calls to providers, of which faulty | {calls:,}, {faults / max(calls, 1):.1%} |",
        f"| answered correctly | {tally.right:,} ({tally.right / max(tally.asked, 1):.2%}) |",
        f"| honest errors | {tally.honest} |",
        f"| wrong or truncated answers | {len(tally.wrong)} |",
        f"| p50, p99, slowest | {tally.p(0.5):.2f} s, {tally.p(0.99):.2f} s, {tally.p(1):.2f} s |",
    ]
    if tally.left:
        lines.append(f"| clients that left in the middle | {tally.left:,} |")
    lines += [f"|   error, {count} x | {text} |" for text, count in tally.errors.most_common(8)]
    return lines + [f"|   WRONG | {text} |" for text in tally.wrong[:8]]


def quarters(looks: list[dict[str, float]]) -> list[tuple[str, float, float, float]]:
    """(what, median of the second quarter, of the last one, highest)."""
    size = max(1, len(looks) // 4)
    rows = []
    for name in looks[0]:
        seen = [look[name] for look in looks]
        early, late = statistics.median(seen[size : 2 * size]), statistics.median(seen[-size:])
        rows.append((name, early, late, max(seen)))
    return rows


def verdict(tally: Tally, tracebacks: int, soaking: bool) -> list[str]:
    """What was missed."""
    missed = []
    if tally.wrong:
        missed.append(f"{len(tally.wrong)} wrong answers")
    if tally.right < ANSWERED * tally.asked:
        missed.append(f"{tally.right / tally.asked:.2%} answered, {ANSWERED:.1%} wanted")
    if soaking and tally.p(0.99) > P99_S:
        missed.append(f"p99 {tally.p(0.99):.1f} s, {P99_S:g} s wanted")
    if tracebacks:
        missed.append(f"{tracebacks} tracebacks in the log")
    return missed


def run(args: argparse.Namespace, home: Path) -> list[str]:
    dice = random.Random(args.seed)
    providers = {
        name: Provider(dialect, args.faults, random.Random(f"{args.seed} {name}"))
        for name, (dialect, _) in PROVIDERS.items()
    }
    try:
        with running(providers, [sys.executable, args.router], home) as process:
            began = time.monotonic()
            looks: list[dict[str, float]] = []
            if args.endurance:
                tally, looks = endure(process, args.endurance, args.workers, dice)
            else:
                tally = soak(process, args.requests, args.workers, dice)
            print(*told(tally, providers, time.monotonic() - began), sep="\n")
            missed = verdict(tally, process.tracebacks(), not args.endurance)
            for name, early, late, most in quarters(looks) if looks else ():
                print(
                    f"| {name}: second quarter, last, most | {early:.0f}, {late:.0f}, {most:.0f} |"
                )
                if late - early > GROWTH[name]:
                    missed.append(f"{name} grew from {early:.0f} to {late:.0f}")
            if process.popen.poll() is not None:
                missed.append(f"the router died with {process.popen.returncode}")
            if args.keep_log:
                Path(args.keep_log).write_bytes(process.log.read_bytes())
    finally:
        for mock in providers.values():
            mock.close()
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--endurance", type=float, metavar="MINUTES", default=0.0)
    parser.add_argument("--faults", type=float, default=0.3, help="share of faulty calls")
    parser.add_argument("--workers", type=int, default=16, help="requests at the same time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--router", default=str(ROOT / "router.py"), help="another router.py")
    parser.add_argument("--keep-log", metavar="FILE", help="where the router's log goes")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as home:
            missed = run(args, Path(home))
    except (SoakError, OSError) as error:
        print(f"the soak could not run: {error}", file=sys.stderr)
        return 2
    print("MISSED: " + "; ".join(missed) if missed else "every target met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
