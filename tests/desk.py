"""Where an SDK is tested: its client, the router it talks to, and the provider behind that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from test_every_pair import WIRES, asked, settings_of
from upstream import KEY


@dataclass
class Desk:
    """A test's own kind adds how its SDK asks."""

    wire: str
    up: Any
    client: Any
    live: Any

    @property
    def sent(self) -> list[tuple[Any, ...]]:
        """The conversation in the last request that reached the provider."""
        return asked(self.up.requests[-1], WIRES[self.wire])

    @property
    def body(self) -> dict[str, Any]:
        return self.up.requests[-1].json


def desks(
    kind: type[Desk], connect: Callable[..., Any], upstream: Any, serve: Any, home: Path
) -> Iterator[Callable[..., Any]]:
    """The body of a fixture open_desk(wire, script, SETTING=...).

    `connect(url, api_key=, timeout=, max_retries=)` makes a client, closed at the end.
    """
    made: list[Any] = []

    def make(
        wire: str, *script: Any, key: str = KEY, timeout: float = 30.0, **settings: Any
    ) -> Any:
        up = upstream(*script)
        rows = settings_of(WIRES[wire], f"{up.url}/v1", home)
        live = serve(**{**rows, "TTFT_TIMEOUT": "5", **settings})
        made.append(connect(live.url, api_key=key, timeout=timeout, max_retries=0))
        return kind(wire, up, made[-1], live)

    yield make
    for client in made:
        client.close()
