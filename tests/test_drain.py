"""Stopping: what is under way ends, what is new is refused, and it never takes for ever."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import requests
from upstream import HELLO, Hang, Stream, chat, delta, provider, text_of

ROUTER = Path(__file__).parent.parent / "router.py"
HEAD = {"Authorization": "Bearer sk-test"}


def ask(url: str, got: list[requests.Response], **body: object) -> threading.Thread:
    def post() -> None:
        sent = {"model": "auto", "messages": HELLO, **body}
        got.append(requests.post(f"{url}/v1/chat/completions", json=sent, headers=HEAD, timeout=30))

    thread = threading.Thread(target=post)
    thread.start()
    return thread


def refused(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return True
    return False


def test_an_idle_router_stops_at_once(launch):
    child = launch().process
    start = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 0 and time.monotonic() - start < 3


def test_what_is_under_way_ends_and_what_is_new_is_refused(launch, upstream):
    words = [delta(content=f"{n} ") for n in range(10)]
    up = upstream(Stream(chunks=[*words, delta("stop")], gap=0.2), Hang(1.0, chat("late")))
    running = launch(**provider("groq", up))
    child, url = running.process, running.url
    streams: list[requests.Response] = []
    wholes: list[requests.Response] = []
    first = ask(url, streams, stream=True)
    up.wait_for(1)
    second = ask(url, wholes)
    up.wait_for(2)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert refused(url)
    first.join()
    second.join()
    assert text_of(streams[0].content) == "0 1 2 3 4 5 6 7 8 9 "
    assert wholes[0].json()["choices"][0]["message"]["content"] == "late"
    assert child.wait(10) == 0


@pytest.mark.parametrize("again", [False, True], ids=["deadline", "second-signal"])
def test_it_does_not_wait_for_ever(launch, upstream, again):
    up = upstream(Hang(60))
    running = launch(**provider("groq", up), DRAIN_TIMEOUT="60" if again else "1")
    child, url = running.process, running.url
    got: list[requests.Response] = []
    thread = threading.Thread(target=lambda: quietly(ask_now, url, got))
    thread.start()
    up.wait_for(1)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    if again:
        child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 0
    thread.join(10)


def ask_now(url: str, got: list[requests.Response]) -> None:
    sent = {"model": "auto", "messages": HELLO}
    got.append(requests.post(f"{url}/v1/chat/completions", json=sent, headers=HEAD, timeout=30))


def quietly(function, *arguments) -> None:
    with contextlib.suppress(requests.RequestException):
        function(*arguments)
