"""Parts that were made side by side, together: limits, sharing, signs of life, traces, settings."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from test_sharing import Caller, crowd_of, gated
from upstream import AUTH, HELLO, Hang, Reply, Stream, chat, chunks, good, provider, text_of, until

import router

ON = {"CACHE_TTL_SECONDS": "300"}
KEEPALIVE = b": keep-alive"


def used(live):
    made = live.app.extensions["router"]
    return made.quotas.snapshot(made.config.callers[0])


def spent(live):
    """Tokens that providers were asked for, as Usage has them."""
    places = live.app.extensions["router"].usage.places()
    return sum(tally.tokens for place, tally in places if place.provider)


def at_rest(live):
    """Nothing is under way and nothing is reserved."""
    until(lambda: live.app.extensions["router"].gate.inside == 0)
    left = used(live)
    assert (left["in_flight"], left["streams"], left["tokens_reserved"]) == (0, 0, 0)


def ask(live, **body):
    """One chat over a connection of its own, read to its end."""
    with requests.Session() as session:
        session.trust_env = False
        payload = {"model": "hermes-router", "messages": HELLO, **body}
        url = f"{live.url}/v1/chat/completions"
        return session.post(url, json=payload, headers=AUTH, timeout=60)


# --- limits and sharing -----------------------------------------------------------------


def test_who_leaves_a_shared_stream_does_not_make_it_free(serve, upstream):
    stream = Stream(chunks=chunks(*["word "] * 40), hold_after=20)
    begin = threading.Event()
    up = upstream(lambda request: begin.wait(30) and stream)
    live = serve(**provider("groq", up), **ON)
    leader = Caller(live, True)
    up.wait_for(1)
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(ask, live, stream=True)
        until(lambda: crowd_of(live) == 2)
        begin.set()
        assert b"word" in leader.sock.recv(65536)
        leader.leave()
        router.time.sleep(0.3)
        up.open_gate()
        assert text_of(task.result().content) == "word " * 40
    at_rest(live)
    until(lambda: spent(live) > 0)
    assert used(live)["tokens_today"] == spent(live)


def test_questions_that_are_compared_are_paid_for(serve, upstream):
    def script(request):
        if not request.path.endswith("/embeddings"):
            return chat("hello")
        data = [{"object": "embedding", "index": 0, "embedding": [1.0, 0.0]}]
        return Reply(200, {"data": data, "usage": {"prompt_tokens": 50, "total_tokens": 50}})

    more = {"SEMANTIC_CACHE": "1", "GROQ_EMBED_MODEL": "e1"}
    live = serve(**provider("groq", upstream(script)), **ON, **more)
    assert ask(live).status_code == 200
    assert used(live)["tokens_today"] == spent(live) == 60


@pytest.mark.parametrize(
    "answer",
    [
        {"data": [{"embedding": None}]},
        {"data": [{"embedding": "AAAA"}]},
        {"data": [{"embedding": ["x", {}]}]},
        {"data": [{"embedding": [1e308, 1e308]}]},
        {"data": [{"embedding": [10**400]}]},
        {"data": [{"embedding": [True, False]}]},
        {"data": [[]]},
        {"data": []},
        {"data": {"0": 1}},
        {"embedding": [1]},
        [],
    ],
    ids=str,
)
def test_an_embedder_that_answers_nonsense_harms_nobody(serve, upstream, answer):
    def script(request):
        return Reply(200, answer) if request.path.endswith("/embeddings") else chat("hello")

    more = {"SEMANTIC_CACHE": "1", "GROQ_EMBED_MODEL": "e1"}
    live = serve(**provider("groq", upstream(script)), **ON, **more)
    assert [ask(live).status_code for _ in range(2)] == [200, 200]
    at_rest(live)


# --- signs of life and sharing ----------------------------------------------------------


def test_who_waits_for_another_ones_call_hears_that_it_goes_on(serve, upstream):
    up = upstream(gated(good("at last")))
    live = serve(**provider("groq", up), **ON, KEEPALIVE_AFTER="0.3")
    first = Caller(live, True)
    up.wait_for(1)
    second = Caller(live, True)
    until(lambda: crowd_of(live) == 2)
    for caller in (first, second):
        caller.sock.settimeout(5)
        heard = b""
        while KEEPALIVE not in heard:
            heard += caller.sock.recv(65536)
    up.open_gate()
    for caller in (first, second):
        heard = b""
        while b"[DONE]" not in heard:
            heard += caller.sock.recv(65536)
        assert b"at last" in heard and b"HTTP/1.1" not in heard
        caller.leave()
    at_rest(live)


def test_a_shared_failure_behind_a_sign_of_life_is_told_once_to_each(serve, upstream):
    limited = Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "40"})
    up = upstream(lambda request: Hang(60, limited))
    live = serve(**provider("groq", up), **ON, KEEPALIVE_AFTER="0.2")
    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(ask, live, stream=True) for _ in range(4)]
        until(lambda: crowd_of(live) == 4)
        router.time.sleep(0.6)
        up.open_gate()
        got = [task.result() for task in tasks]
    for answer in got:
        assert answer.status_code == 200 and answer.content.startswith(KEEPALIVE)
        assert answer.text.count('"error"') == 1 and answer.text.count("try again in 40s") == 2
    assert len({answer.text for answer in got}) == 1
    at_rest(live)


# --- every end of a request -------------------------------------------------------------

PATHS = {
    "chat": ("/v1/chat/completions", {"messages": HELLO}),
    "messages": ("/v1/messages", {"messages": HELLO, "max_tokens": 9}),
    "responses": ("/v1/responses", {"input": "hello", "store": False}),
    "completions": ("/v1/completions", {"prompt": "hello"}),
}


def broken(*_, **__):
    raise RuntimeError("a fault of ours")


FAULTS = {
    "routing": ("Router", "route"),
    "delivery": ("Router", "deliver"),
    "keeping it": ("Sharing", "_save"),
    "an event": ("Flow", "take"),
    "a whole answer": ("Passage", "whole"),
    "what is left": ("Quotas", "rates"),
    "what was spent": ("Router", "charge"),
    "the size": ("Router", "size"),
    "the cache": ("Cache", "get"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("surface", ["chat", "responses"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_leaves_nothing_behind(
    serve, upstream, monkeypatch, fault, surface, stream
):
    limits = {"PROXY_LIMIT_STREAMS": "1", "PROXY_LIMIT_TOKENS_DAY": "100000"}
    live = serve(**provider("groq", upstream(good())), **ON, **limits)
    path, body = PATHS[surface]
    kind, name = FAULTS[fault]
    with monkeypatch.context() as patch:
        patch.setattr(getattr(router, kind), name, broken)
        sent = {"model": "groq/m1", "stream": stream, **body}
        try:
            got = requests.post(live.url + path, json=sent, headers=AUTH, timeout=20)
        except requests.exceptions.ChunkedEncodingError:
            got = None  # a stream that had begun
        if got is not None and got.status_code != 200:
            assert got.status_code == 500 and got.json()["error"]["message"]
            assert "fault of ours" not in got.text and got.headers["X-Request-ID"]
        at_rest(live)
    made = live.app.extensions["router"]
    until(lambda: not made.watchdog._live)
    assert not made.sharing._crowds._open
    for _ in range(2):
        got = requests.post(live.url + path, json={**sent, "seed": 1}, headers=AUTH, timeout=20)
        assert got.status_code == 200, got.text
        at_rest(live)
