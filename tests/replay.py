"""Recorded provider answers (golden/), and ways to cut them into network writes.

    recording = GOLDEN["openai.chat.dbos-agent-run-stream.0"]
    up = upstream(recording.answer(split="utf8"))

A split says where one write ends and the next begins:

    whole    one write                  utf8     inside every character of several bytes
    byte     after every byte           line     inside every line and between CR, LF and LF
    N        every N bytes              seed:N   at random, the same way for the same N
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from upstream import Reply

FOLDER = Path(__file__).with_name("golden")
SPLITS = ("whole", "line", "utf8", "seed:1", "seed:2")
SMALL = 8_000  # bytes: up to here "byte" is quick enough for a test


@dataclass(frozen=True)
class Recording:
    """One recorded interaction: what was asked, and the answer as bytes."""

    id: str
    data: dict[str, Any]

    @property
    def provider(self) -> str:
        return self.data["provider"]

    @property
    def api(self) -> str:
        return self.data["api"]

    @property
    def streams(self) -> bool:
        return "sse" in self.data["response"]

    @property
    def status(self) -> int:
        return self.data["response"]["status"]

    @property
    def request(self) -> dict[str, Any]:
        return self.data["request"]["body"]

    @property
    def features(self) -> set[str]:
        return set(self.data["features"])

    @cached_property
    def body(self) -> bytes:
        response = self.data["response"]
        if self.streams:
            return response["sse"].encode()
        # Indented on purpose: a router that parses and re-makes bodies cannot give this back.
        return json.dumps(response["body"], ensure_ascii=False, indent=1).encode()

    def answer(self, split: str = "whole", **options: Any) -> Reply:
        """The answer for a scripted upstream; options are fields of Reply."""
        headers = self.data["response"]["headers"]
        fields = {"framing": "chunked" if self.streams else "length", **options}
        return Reply(self.status, self.body, headers, cuts=cuts(self.body, split), **fields)


def load() -> dict[str, Recording]:
    files = (json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json")))
    return {data["id"]: Recording(data["id"], data) for data in files}


def cuts(body: bytes, split: str) -> list[int]:
    """The offsets at which `body` is cut."""
    if split == "whole":
        return []
    if split == "byte":
        return list(range(1, len(body)))
    if split == "utf8":
        return [at for at in range(1, len(body)) if body[at] & 0xC0 == 0x80]
    if split == "line":
        return sorted(set(inside_lines(body)))
    if split.startswith("seed:"):
        return list(random_cuts(len(body), int(split[5:])))
    return list(range(int(split), len(body), int(split)))


def inside_lines(body: bytes) -> Iterator[int]:
    """Somewhere in each line, just before its end, and just behind it."""
    rng, start = random.Random(len(body)), 0
    while start < len(body):
        end = body.find(b"\n", start)
        end = len(body) if end < 0 else end
        yield from (at for at in (rng.randint(start, end), end, end + 1) if 0 < at < len(body))
        start = end + 1


def random_cuts(size: int, seed: int) -> Iterator[int]:
    rng, at = random.Random(seed), 0
    while (at := at + rng.choice((1, 2, 7, 40, 300, 2_000))) < size:
        yield at


GOLDEN = load()


def select(*, api: str = "chat", streams: bool, status: int | None = 200) -> list[Recording]:
    """The recordings of one kind, in the order of their names."""
    return [
        found
        for found in GOLDEN.values()
        if found.api == api and found.streams == streams and status in (None, found.status)
    ]
