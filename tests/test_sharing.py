"""Answers given twice: to the same caller, in every dialect and form, from memory or one call."""

from __future__ import annotations

import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import requests
from conftest import config_for
from test_every_pair import CLIENTS, USED, WIRES, Pair, Said, settings_of, speak
from upstream import (
    AUTH,
    HELLO,
    Hang,
    Reply,
    Stream,
    chat,
    chat_stream,
    chunks,
    completion,
    data_of,
    delta,
    good,
    provider,
    text_of,
    until,
    usage,
)

import router

ON = {"CACHE_TTL_SECONDS": "300"}


def said(response):
    return response.headers["X-Hermes-Cache"]


@pytest.fixture
def ask(upstream, make_app):
    """ask(...) posts a chat to a router that caches, before one provider that always works."""

    class Asker:
        def __init__(self, *script, **settings):
            self.up = upstream(*script)
            self.app = make_app(**provider("groq", self.up, "m1"), **ON, **settings)
            self.http, self.router = self.app.test_client(), self.app.extensions["router"]

        def __call__(self, text="hello", path="/v1/chat/completions", headers=None, **body):
            body = {
                "model": "hermes-router",
                "messages": [{"role": "user", "content": text}],
            } | body
            got = self.http.post(path, json=body, headers={**AUTH, **(headers or {})})
            assert got.data is not None  # a stream is read to its end
            got.close()
            return got

        @property
        def calls(self):
            return len(self.up.requests)

    return Asker


# --- in every dialect and form ------------------------------------------------------------


def matrix():
    for client, wire, first, second in product(CLIENTS, WIRES, (False, True), (False, True)):
        names = [("whole", "stream")[form] for form in (first, second)]
        yield pytest.param(client, wire, first, second, id="-".join((client, wire, *names)))


@pytest.mark.parametrize(("client", "wire", "first", "second"), list(matrix()))
def test_the_second_client_hears_what_the_first_one_heard(
    upstream, make_app, tmp_path, client, wire, first, second
):
    speaks = CLIENTS[client]
    if client == "responses":
        kept = CLIENTS[client]
        speaks = replace_ask(kept, lambda turns: {**kept.ask(turns), "store": False})
    words = Said('Grüezi,\nwie "geht" es? ✓ 🙂', reasoning="" if client == "completions" else "Hm.")
    up = upstream(speak(words))
    app = make_app(**settings_of(WIRES[wire], f"{up.url}/v1", tmp_path), **ON)
    talk = Pair(speaks, app.test_client(), {wire: up})
    heard = [talk.ask(talk.hello(), stream=form) for form in (first, second)]
    apart = client == "completions" and first != second  # each form is kept for itself
    assert len(up.requests) == 1 + apart
    assert heard[0].said == heard[1].said == words
    assert heard[0].usage == heard[1].usage == USED
    counts = app.extensions["router"].cache.counts
    assert (counts["miss"], counts["hit"]) == (1 + apart, 1 - apart)


def replace_ask(client, ask):
    return client._replace(ask=ask)


@pytest.mark.parametrize("client", ["chat", "messages"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_in_the_same_form_it_is_the_same_to_the_byte(upstream, make_app, tmp_path, client, stream):
    up = upstream(speak(Said("one two three", reasoning="Hm.")))
    app = make_app(**settings_of(WIRES[client], f"{up.url}/v1", tmp_path), **ON)
    talk = Pair(CLIENTS[client], app.test_client(), {})
    got, bodies = [], set()
    for _ in range(3):
        got.append(talk.post(talk.hello(), stream=stream))
        bodies.add(got[-1].data)  # reads a stream to its end
    assert len(bodies) == 1
    assert [said(response) for response in got] == ["miss", "hit", "hit"]
    assert {r.headers["X-Provider"] for r in got} == {WIRES[client].row}
    assert {r.headers["Content-Type"] for r in got} == {got[0].headers["Content-Type"]}
    assert len(up.requests) == 1


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("wanted", [(False, True), (True, False)], ids=str)
def test_usage_is_told_to_those_who_ask_for_it(upstream, make_app, tmp_path, wire, wanted):
    up = upstream(speak(Said("one two three")))
    http = make_app(**settings_of(WIRES[wire], f"{up.url}/v1", tmp_path), **ON).test_client()
    for wants in wanted:
        options = {"stream_options": {"include_usage": True}} if wants else {}
        body = {"model": "hermes-router", "messages": HELLO, "stream": True, **options}
        got = http.post("/v1/chat/completions", json=body, headers=AUTH)
        told = [event["usage"]["total_tokens"] for event in data_of(got.data) if event.get("usage")]
        assert told == ([USED.total] if wants else [])
        assert text_of(got.data) == "one two three" and got.data.endswith(b"data: [DONE]\n\n")
    assert len(up.requests) == 1


def test_a_stream_without_usage_is_not_made_a_whole_answer(ask):
    talk = ask(
        lambda r: Stream(chunks=chunks("x", with_usage=False)) if r.json.get("stream") else chat()
    )
    assert said(talk(stream=True)) == "miss"
    assert said(talk()) == "miss"
    assert talk.calls == 2


def test_embeddings_are_given_again(ask):
    row = {"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}
    reply = Reply(200, {"object": "list", "model": "e1", "data": [row], "usage": usage(2, 0)})
    talk = ask(lambda request: reply, GROQ_EMBED_MODEL="e1")
    got = [
        talk(path="/v1/embeddings", model="e1", messages=None, input=text)
        for text in ("a", "a", "b", ["a"])
    ]
    assert [said(response) for response in got] == ["miss", "hit", "miss", "miss"]
    assert got[0].data == got[1].data


def test_a_hit_costs_nothing(ask):
    talk = ask()
    for form in (False, True, False):
        talk(stream=form)
    tally = talk.router.usage.tally("groq")
    assert (tally.requests, tally.prompt_tokens, tally.completion_tokens) == (1, 7, 3)


# --- for whom -------------------------------------------------------------------------------


def test_callers_never_share(ask):
    talk = ask(PROXY_API_KEYS="sk-one,sk-two")
    for key, expected in (("one", "miss"), ("two", "miss"), ("one", "hit"), ("two", "hit")):
        got = talk(headers={"Authorization": f"Bearer sk-{key}"})
        assert said(got) == expected
    assert talk.calls == 2


def test_nine_thousand_characters_and_two_questions_are_two_calls(ask):
    for settings in ({}, {"SEMANTIC_CACHE": "1", "GROQ_EMBED_MODEL": "e1"}):
        talk = ask(embedding_or(good()), **settings)
        for question in ("Who?", "Where?"):
            assert said(talk("x" * 9000 + question)) == "miss"
        assert len(chats(talk)) == 2
        earlier = {"role": "user", "content": "x" * 9000}
        for question in ("Who?", "Where is it?"):
            turns = [earlier, {"role": "assistant", "content": "ok"}]
            got = talk(messages=[*turns, {"role": "user", "content": question}])
            assert said(got) == "miss"
        assert len(chats(talk)) == 4


def test_with_and_without_tools_are_two_calls(ask):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for settings in ({}, {"SEMANTIC_CACHE": "1", "GROQ_EMBED_MODEL": "e1"}):
        talk = ask(embedding_or(good()), **settings)
        assert [said(talk()), said(talk(tools=[tool]))] == ["miss", "miss"]
        assert len(chats(talk)) == 2
        assert [said(talk()), said(talk(tools=[tool]))] == ["hit", "hit"]


@pytest.mark.parametrize(
    "headers", [{"X-Hermes-Profile": "fast"}, {"X-Route-Fallback": "allow"}], ids=str
)
def test_headers_that_choose_are_part_of_the_request(ask, headers):
    talk = ask()
    assert [said(talk()), said(talk(headers=headers))] == ["miss", "miss"]
    assert said(talk(headers=headers)) == "hit"


# --- how to say no ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Cache-Control": "no-store"},
        {"Cache-Control": "max-age=0, No-Store"},
        {"X-Hermes-Cache": "skip"},
        {"X-Hermes-Cache": "OFF"},
    ],
    ids=str,
)
def test_who_wants_nothing_of_it_is_left_alone(ask, headers):
    talk = ask()
    talk()
    assert said(talk(headers=headers)) == "off"
    assert said(talk("other", headers=headers)) == "off"
    assert said(talk("other")) == "miss"  # nothing was kept either
    assert talk.calls == 4


def test_a_tool_loop_is_left_alone(ask):
    talk, headers = ask(GROQ_SUPPORTS_TOOLS="1"), {"X-Hermes-Tool-Loop": "true"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert [said(talk(headers=headers, tools=tools)) for _ in range(2)] == ["off", "off"]
    assert talk.calls == 2


@pytest.mark.parametrize("headers", [{"Cache-Control": "no-cache"}, {"X-Hermes-Cache": "refresh"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_new_answer_takes_the_place_of_the_old_one(ask, headers, stream):
    talk = ask(lambda r: chat_stream(f"{talk.calls}") if stream else chat(f"{talk.calls}"))
    talk(stream=stream)
    assert said(talk(headers=headers, stream=stream)) == "miss"
    got = talk(stream=stream)
    assert said(got) == "hit"
    assert (text_of(got.data) if stream else got.json["choices"][0]["message"]["content"]) == "2"


def test_nothing_is_kept_without_a_ttl(upstream, make_app):
    up = upstream(good())
    app = make_app(**provider("groq", up), SEMANTIC_CACHE="1", CACHE_PERSIST="1")
    http = app.test_client()
    body = {"model": "hermes-router", "messages": HELLO}
    for _ in range(2):
        assert said(http.post("/v1/chat/completions", json=body, headers=AUTH)) == "off"
    assert len(up.requests) == 2
    status = http.get("/v1/status", headers=AUTH).json["cache"]
    assert (status["enabled"], status["semantic"]["enabled"]) == (False, False)


def test_the_echo_is_not_kept(make_app):
    http = make_app(ECHO_FALLBACK="1", **ON).test_client()
    body = {"model": "hermes-router", "messages": HELLO}
    for _ in range(2):
        assert said(http.post("/v1/chat/completions", json=body, headers=AUTH)) == "off"


# --- what is not kept -------------------------------------------------------------------------


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def choice_with(finish):
    whole = completion()
    whole["choices"][0]["finish_reason"] = finish
    return Reply(200, whole)


BAD = {
    "tool call": Reply(200, completion(None, tool_calls=[CALL])),
    "cut": choice_with("length"),
    "filtered": choice_with("content_filter"),
    "refused": Reply(200, completion(None, refusal="I will not")),
    "cut stream": Stream(chunks=[delta(content="x"), delta("length")]),
    "calling stream": Stream(chunks=[delta(tool_calls=[{"index": 0, **CALL}]), delta("stop")]),
    "refusing stream": Stream(chunks=[delta(refusal="no"), delta("stop")]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_such_answers_are_not_kept(ask, name):
    talk = ask(BAD[name])
    stream = isinstance(BAD[name], Stream)
    assert [said(talk(stream=stream)) for _ in range(2)] == ["miss", "miss"]
    assert talk.calls == 2 and len(talk.router.cache) == 0


def test_errors_are_not_kept(ask):
    talk = ask(Reply(400, {"error": {"message": "no"}}), chat())
    assert talk().status_code == 400
    assert [said(talk()), said(talk())] == ["miss", "hit"]


def test_a_stream_that_broke_off_is_not_kept_even_if_rescued(ask):
    words = [f"word{at} " for at in range(20)]
    broken = Stream(chunks=chunks(*words), stop_at=2000)
    for again, told in ((good("".join(words)), "".join(words)), (broken, "word")):
        talk = ask(broken, again)
        got = talk(stream=True)
        assert talk.calls > 1 and told in text_of(got.data)
        assert (b"stream_interrupted" in got.data) is (again is broken)
        assert len(talk.router.cache) == 0


def test_a_stream_whose_client_left_is_not_kept(serve, upstream):
    up = upstream(Stream(chunks=chunks(*["word "] * 50), hold_after=10))
    live = serve(**provider("groq", up), **ON)
    with live.chat(stream=True) as response:
        next(response.iter_content(10))
    until(lambda: up.requests[0].closed.is_set())
    assert len(live.app.extensions["router"].cache) == 0


# --- what is told -------------------------------------------------------------------------------


def test_status_and_metrics_tell(ask):
    talk = ask()
    for text in ("a", "a", "b", "a"):
        talk(text)
    cache = talk.http.get("/v1/status", headers=AUTH).json["cache"]
    assert talk.router.cache.counts == {"hit": 2, "miss": 2}
    expected = {"enabled": True, "ttl_s": 300, "size": 2, "max_size": 100, "persistent": False,
                "hits": 2, "misses": 2, "hit_rate": 0.5}  # fmt: skip
    assert {name: cache[name] for name in expected} == expected
    assert cache["semantic"] == {"enabled": False, "threshold": 0.95, "entries": 0, "hits": 0}
    metrics = talk.http.get("/metrics", headers=AUTH).text
    for line in ("cache_size 2", "cache_hits_total 2", "cache_misses_total 2"):
        assert f"hermes_router_{line}" in metrics
    assert "hermes_router_semantic_cache_hits_total 0" in metrics


def test_a_file_holds_neither_prompts_nor_keys(upstream, tmp_path):
    settings = {**provider("groq", upstream(good("the answer"))), **ON, "CACHE_PERSIST": "1"}
    for expected in ("miss", "hit"):
        app = router.create_app(config_for(tmp_path, settings))
        app.extensions["router"].start()
        body = {"model": "hermes-router", "messages": [{"role": "user", "content": "a secret"}]}
        got = app.test_client().post("/v1/chat/completions", json=body, headers=AUTH)
        assert said(got) == expected
        app.extensions["router"].close()
    data = b"".join(path.read_bytes() for path in tmp_path.glob("cache.db*"))
    assert b"the answer" in data
    for secret in (b"a secret", b"sk-test", b"groq-key-1"):
        assert secret not in data


# --- at the same time ---------------------------------------------------------------------------


@pytest.fixture
def post(serve):
    """post(live, ...) -> the answer, read to its end, over a connection of its own."""

    def send(live, stream=False, key="sk-test", **body):
        payload = {"model": "hermes-router", "messages": HELLO, "stream": stream, **body}
        with requests.Session() as session:
            session.trust_env = False
            return session.post(
                f"{live.url}/v1/chat/completions",
                json=payload,
                headers={"Authorization": f"Bearer {key}"},
                timeout=60,
            )

    return send


def waiting(live):
    """How many requests wait inside the router."""
    return live.app.extensions["router"].gate.inside


def crowd_of(live):
    crowds = live.app.extensions["router"].sharing._crowds._open.values()
    return sum(len(crowd.waiting) for crowd in crowds)


def gated(answer):
    """An answer that comes when the gate opens."""
    return lambda request: Hang(60, answer(request))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_identical_requests_share_one_call(serve, upstream, post, stream):
    up = upstream(gated(good("all the same")))
    live = serve(**provider("groq", up), **ON)
    with ThreadPoolExecutor(12) as pool:
        tasks = [pool.submit(post, live, stream) for _ in range(12)]
        until(lambda: crowd_of(live) == 12)
        up.open_gate()
        got = [task.result() for task in tasks]
    assert len(up.requests) == 1
    assert len({response.content for response in got}) == 1 and b"all the same" in got[0].content
    assert sorted(said(response) for response in got) == ["hit"] * 11 + ["miss"]
    assert live.app.extensions["router"].usage.tally("groq").requests == 1
    assert live.app.extensions["router"].cache.counts["shared"] == 11
    assert said(post(live, stream)) == "hit"
    until(lambda: waiting(live) == 0)


def test_different_requests_callers_and_forms_do_not_share(serve, upstream, post):
    up = upstream(gated(good()))
    live = serve(**provider("groq", up), **ON, PROXY_API_KEYS="sk-test,sk-two")
    with ThreadPoolExecutor(5) as pool:
        for options in ({}, {"key": "sk-two"}, {"stream": True}, {"temperature": 0.5}, {"n": 2}):
            pool.submit(post, live, **options)
        up.wait_for(5)
        up.open_gate()


@pytest.mark.parametrize("settings", [{"SINGLE_FLIGHT": "0"}, {"CACHE_TTL_SECONDS": "0"}], ids=str)
def test_sharing_can_be_turned_off(serve, upstream, post, settings):
    up = upstream(gated(good()))
    live = serve(**provider("groq", up), **{**ON, **settings})
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(post, live)
        up.wait_for(3)
        up.open_gate()


def test_a_failure_is_told_to_each(serve, upstream, post):
    up = upstream(lambda r: Hang(60, Reply(400, {"error": {"message": "not like this"}})))
    live = serve(**provider("groq", up), **ON)
    with ThreadPoolExecutor(5) as pool:
        tasks = [pool.submit(post, live) for _ in range(5)]
        until(lambda: crowd_of(live) == 5)
        up.open_gate()
        got = [task.result() for task in tasks]
    assert {response.status_code for response in got} == {400}
    assert all("not like this" in response.text for response in got)
    assert len({response.headers["X-Request-ID"] for response in got}) == 5
    assert len(up.requests) == 1


def test_when_the_first_one_gave_up_another_asks(make_app):
    sharing = make_app(**ON).extensions["router"].sharing
    begun, answers = threading.Event(), []

    def request():
        body = {"model": "m", "messages": HELLO}
        ask = router.Ask(router.CHAT, b"", body, body, router.Guard())
        ask.started = router.time.monotonic()
        return ask

    def give_up():
        begun.set()
        until(lambda: sum(len(c.waiting) for c in sharing._crowds._open.values()) == 4)
        raise router.ClientGone

    def first():
        with pytest.raises(router.ClientGone):
            sharing.answer(request(), give_up)

    def answer():
        answers.append(router.Answer(b"{}", "application/json", "groq", "m1", 1))
        return answers[-1]

    with ThreadPoolExecutor(4) as pool:
        task = pool.submit(first)
        begun.wait(10)
        others = [pool.submit(sharing.answer, request(), answer) for _ in range(3)]
        assert {other.result().body for other in others} == {b"{}"}
        task.result()
    assert 1 <= len(answers) < 4


class Caller:
    """A client in a thread that can leave before its answer has come."""

    def __init__(self, live, stream, model="hermes-router"):
        body = {"model": model, "messages": HELLO, "stream": stream}
        self.raw = router.dump_json(body)
        self.sock = router.socket.create_connection(("127.0.0.1", live.port))
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in AUTH.items()]
        lines += [f"Content-Length: {len(self.raw)}", "", ""]
        self.sock.sendall("\r\n".join(lines).encode() + self.raw)

    def leave(self):
        self.sock.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_first_one_leaving_harms_nobody(serve, upstream, post, stream):
    up = upstream(gated(good("still here")))
    live = serve(**provider("groq", up), **ON)
    leader = Caller(live, stream)
    up.wait_for(1)
    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(post, live, stream) for _ in range(3)]
        until(lambda: crowd_of(live) == 4)
        leader.leave()
        until(lambda: crowd_of(live) == 3)
        up.open_gate()
        got = [task.result() for task in tasks]
    assert len(up.requests) == 1
    assert all(b"still here" in response.content for response in got)
    until(lambda: waiting(live) == 0)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_call_ends_when_the_last_one_has_left(serve, upstream, stream):
    up = upstream(gated(good()))
    live = serve(**provider("groq", up), **ON)
    callers = [Caller(live, stream)]
    up.wait_for(1)
    callers += [Caller(live, stream) for _ in range(2)]
    until(lambda: crowd_of(live) == 3)
    for caller in callers[:2]:
        caller.leave()
    until(lambda: crowd_of(live) == 1)
    assert not up.requests[0].closed.is_set()
    callers[2].leave()
    until(lambda: up.requests[0].closed.is_set())
    until(lambda: waiting(live) == 0)


@pytest.mark.parametrize("gone", ["leader", "follower"])
def test_leaving_in_the_middle_of_a_shared_stream_harms_nobody(serve, upstream, post, gone):
    words = [f"word{at} " for at in range(40)]
    stream = Stream(chunks=chunks(*words), hold_after=20)
    begin = threading.Event()
    up = upstream(lambda request: begin.wait(30) and stream)
    live = serve(**provider("groq", up), **ON)
    leader = Caller(live, True)
    up.wait_for(1)
    follower = Caller(live, True)
    until(lambda: crowd_of(live) == 2)
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(post, live, True)
        until(lambda: crowd_of(live) == 3)
        begin.set()
        for caller in (leader, follower):
            heard = b""
            while b"word10" not in heard:
                heard += caller.sock.recv(65536)
        (leader if gone == "leader" else follower).leave()
        router.time.sleep(0.3)
        up.open_gate()
        assert text_of(task.result().content) == "".join(words)
    (follower if gone == "leader" else leader).leave()
    assert len(up.requests) == 1
    until(lambda: waiting(live) == 0)


def test_all_who_share_a_silent_stream_hear_that_it_is_alive(serve, upstream, monkeypatch):
    monkeypatch.setattr(router.Watchdog, "BEAT_S", 0.2)
    begin = threading.Event()
    stream = Stream(chunks=chunks("one", "two"), hold_after=2)
    up = upstream(lambda request: begin.wait(30) and stream)
    live = serve(**provider("groq", up), **ON)
    callers = [Caller(live, True)]
    up.wait_for(1)
    callers.append(Caller(live, True))
    until(lambda: crowd_of(live) == 2)
    begin.set()
    for caller in callers:
        heard = b""
        while heard.count(b": keep-alive") < 2:
            heard += caller.sock.recv(65536)
        assert b"one" in heard
    up.open_gate()
    for caller in callers:
        heard = b""
        while b"[DONE]" not in heard:
            heard += caller.sock.recv(65536)
        caller.leave()
    until(lambda: waiting(live) == 0)


def test_one_that_reads_slowly_holds_nobody_up(serve, upstream, post):
    text = "x" * 20_000
    stream = Stream(chunks=chunks(*[text] * 300))
    up = upstream(lambda request: Hang(60, stream))
    live = serve(**provider("groq", up), **ON)
    slow = Caller(live, True)  # reads nothing
    up.wait_for(1)
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(post, live, True)
        until(lambda: crowd_of(live) == 2)
        up.open_gate()
        assert text_of(task.result(30).content) == text * 300
    slow.leave()
    until(lambda: waiting(live) == 0)


def test_who_waits_gives_up_at_its_deadline(serve, upstream, post):
    up = upstream(Hang(60))
    live = serve(**provider("groq", up), **ON, REQUEST_DEADLINE="0.7")
    with ThreadPoolExecutor(3) as pool:
        got = [task.result() for task in [pool.submit(post, live) for _ in range(3)]]
    assert {response.status_code for response in got} == {503}
    until(lambda: waiting(live) == 0)


def test_who_came_later_has_its_own_time(serve, upstream, post):
    up = upstream(Hang(60), good("in time"))
    live = serve(**provider("groq", up), **ON, REQUEST_DEADLINE="1.5")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, live)
        up.wait_for(1)
        time.sleep(0.7)
        second = pool.submit(post, live)
        assert first.result().status_code == 503
        assert second.result().status_code == 200
    until(lambda: waiting(live) == 0)


def test_who_reads_a_broadcast_too_slowly_loses_it():
    relay = router.Relay(None, router.Flow(router.Passage(router.DIALECTS["chat"], None)), None)
    relay._next = iter([b"x" * (6 << 20)] * 5 + [b""]).__next__
    guard = router.Guard()
    broadcast = router.Broadcast(relay, guard)
    number = 0
    while broadcast.block(number, guard):
        number += 1
    assert number == 5
    assert broadcast._bytes <= broadcast.MOST
    assert broadcast.block(4, guard)
    ask = router.Ask(router.CHAT, b"", {}, {}, router.Guard())
    crowds, sharing = router.Crowds(), types.SimpleNamespace(watchdog=router.Watchdog(), now=int)
    crowds.join("here", guard)
    late = router.Listener(broadcast, crowds.join("here", ask.guard), ask, sharing)
    (told,) = data_of(b"".join(late))
    assert told["error"]["code"] == "stream_interrupted" and late.broken


# --- nearly the same --------------------------------------------------------------------------

VECTORS = {
    "How tall is the Eiffel tower?": [1.0, 0.0, 0.0],
    "What is the height of the Eiffel tower?": [0.99, 0.1, 0.0],
    "Where is it?": [0.0, 1.0, 0.0],
    "Nearly north": [0.3, 1.0, 0.0],
}
TALL, HEIGHT, WHERE, NEARLY = VECTORS


def embedding_or(answer):
    """A provider that embeds the texts above, and answers chats."""

    def script(request):
        if not request.path.endswith("/embeddings"):
            return answer(request)
        vector = VECTORS.get(request.json["input"], [0.0, 0.0, 1.0])
        data = [{"object": "embedding", "index": 0, "embedding": vector}]
        return Reply(200, {"object": "list", "model": request.model, "data": data})

    return script


def chats(talk):
    return [r for r in talk.up.requests if not r.path.endswith("/embeddings")]


SEMANTIC = {"SEMANTIC_CACHE": "1", "GROQ_EMBED_MODEL": "e1"}


@pytest.fixture
def near(ask):
    return lambda **settings: ask(embedding_or(good()), **{**SEMANTIC, **settings})


def test_a_question_of_the_same_meaning_gets_the_same_answer(near):
    talk = near()
    assert [said(talk(text)) for text in (TALL, HEIGHT, WHERE, HEIGHT)] == [
        "miss", "semantic", "miss", "semantic",
    ]  # fmt: skip
    assert len(chats(talk)) == 2
    got = talk(HEIGHT, stream=True)
    assert said(got) == "semantic" and text_of(got.data) == "hello"
    status = talk.http.get("/v1/status", headers=AUTH).json["cache"]
    assert status["semantic"] == {"enabled": True, "threshold": 0.95, "entries": 2, "hits": 3}
    assert (
        "hermes_router_semantic_cache_hits_total 3" in talk.http.get("/metrics", headers=AUTH).text
    )


def test_a_semantic_hit_costs_what_comparing_costs(near, tmp_path):
    (tmp_path / "prices.json").write_text('{"groq/e1": [1000, 0], "groq/m1": [1, 1]}')
    talk = near(MODEL_PRICES_FILE="prices.json")
    assert [said(talk(text)) for text in (TALL, HEIGHT, TALL)] == ["miss", "semantic", "hit"]
    entries = talk.http.get("/v1/logs", headers=AUTH).json["entries"]
    exact, alike, asked = (entry["cost_usd"] for entry in entries)
    assert exact == 0 and 0.001 < alike < 0.1 and 0.001 < asked < 0.1


def test_questions_survive_a_restart_with_their_answers(near, make_app):
    talk = near(CACHE_BACKEND="sqlite")
    talk.router.start()
    assert [said(talk(text)) for text in (TALL, WHERE)] == ["miss", "miss"]
    talk.router.close()
    rows = provider("groq", talk.up, "m1")
    app = make_app(**rows, **ON, **SEMANTIC, CACHE_BACKEND="sqlite")
    talk.http, again = app.test_client(), app.extensions["router"]
    again.start()
    assert [said(talk(text)) for text in (HEIGHT, TALL, NEARLY)] == ["semantic", "hit", "semantic"]
    assert len(chats(talk)) == 2
    assert said(talk(HEIGHT, temperature=0.5)) == "miss"


def test_streams_are_compared_too(near):
    talk = near()
    assert [said(talk(text, stream=True)) for text in (TALL, HEIGHT)] == ["miss", "semantic"]


def test_never_for_another_caller(near):
    talk = near(PROXY_API_KEYS="sk-one,sk-two")
    for key, text, expected in (
        ("one", TALL, "miss"),
        ("two", HEIGHT, "miss"),
        ("one", HEIGHT, "semantic"),
    ):
        assert said(talk(text, headers={"Authorization": f"Bearer sk-{key}"})) == expected


def test_a_header_may_raise_the_bar_and_never_lower_it(near):
    header = "X-LLMRouter-Semantic-Threshold"
    for low in ("0.01", "-1", "nan", "", "x", "0.95"):
        talk = near(SEMANTIC_CACHE_THRESHOLD="0.96")
        talk(WHERE)
        assert said(talk(NEARLY, headers={header: low})) == "miss"  # its cosine is 0.958
    talk = near()
    talk(TALL)
    assert said(talk(HEIGHT, headers={header: "0.999"})) == "miss"
    assert said(talk(HEIGHT, headers={header: "5"})) == "hit"  # the very same is no matter of bars


def test_headers_turn_it_on_and_off(near):
    off, on = ({"X-LLMRouter-Semantic-Cache": word} for word in ("off", "on"))
    talk = near()
    talk(TALL)
    assert said(talk(HEIGHT, headers=off)) == "miss"
    talk = near(SEMANTIC_CACHE="0")
    talk(TALL, headers=on)
    assert said(talk(HEIGHT)) == "miss"
    talk = near(SEMANTIC_CACHE="0")
    talk(TALL, headers=on)
    assert said(talk(HEIGHT, headers=on)) == "semantic"


def test_without_an_embedder_only_the_same_is_the_same(ask, caplog):
    talk = ask(SEMANTIC_CACHE="1", GROQ_EMBED_MODEL="")
    assert [said(talk(text)) for text in (TALL, HEIGHT, TALL)] == ["miss", "miss", "hit"]
    assert caplog.text.count("questions are not compared") == 1


def test_an_embedder_that_fails_is_left_alone(ask):
    failing = Reply(500, {"error": {"message": "broken"}})

    def script(request):
        return failing if request.path.endswith("/embeddings") else good()(request)

    talk = ask(script, **SEMANTIC)
    for text in (TALL, HEIGHT, WHERE):
        assert talk(text).status_code == 200
    before = len(talk.up.requests)
    assert said(talk(NEARLY)) == "miss"
    assert len(talk.up.requests) == before + 1


def test_an_embedder_that_hangs_is_not_waited_for_long(ask, monkeypatch):
    monkeypatch.setattr(router.Embedder, "WAIT_S", 0.3)

    def script(request):
        return Hang(60) if request.path.endswith("/embeddings") else good()(request)

    talk = ask(script, **SEMANTIC)
    assert said(talk(TALL)) == "miss"


def test_vectors_of_another_family_are_not_compared(near):
    talk = near()
    talk(TALL)
    sharing = talk.router.sharing
    sharing._embedder._embed = lambda ask: router.Answer(
        router.dump_json({"data": [{"embedding": VECTORS[HEIGHT]}]}), "", "other", "e2", 1
    )
    assert said(talk(HEIGHT)) == "miss"


def test_an_answer_that_is_gone_is_no_answer(near):
    talk = near()
    talk(TALL)
    talk.router.cache.clear()
    assert said(talk(HEIGHT)) == "miss"
    assert len(talk.router.sharing.questions) == 1
    talk.router.sharing.clear()
    assert len(talk.router.sharing.questions) == 0


def test_a_model_on_this_machine_compares_questions(ask, monkeypatch):
    class SentenceTransformer:
        def __init__(self, name):
            assert name == "mini"

        def encode(self, text):
            return VECTORS[text]

    library = types.ModuleType("sentence_transformers")
    library.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    talk = ask(SEMANTIC_CACHE="1", LLMROUTER_SEMANTIC_MODEL="mini")
    talk(WHERE)  # it is being loaded
    until(lambda: talk.router.sharing._embedder._local)
    assert [said(talk(text)) for text in (TALL, HEIGHT)] == ["miss", "semantic"]
    assert all(not r.path.endswith("/embeddings") for r in talk.up.requests)


def test_where_the_library_is_missing_a_provider_embeds(near, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    talk = near(LLMROUTER_SEMANTIC_MODEL="mini")
    talk(WHERE)
    until(lambda: not talk.router.sharing._embedder._name)
    assert [said(talk(text)) for text in (TALL, HEIGHT)] == ["miss", "semantic"]
    assert "pip install sentence-transformers" in caplog.text


def test_the_log_tells_where_an_answer_came_from(ask):
    talk = ask()
    for text in ("a", "a"):
        talk(text)
    talk("a", stream=True)
    entries = talk.http.get("/v1/logs", headers=AUTH).json["entries"]
    told = [(e["status"], e["provider"], e["model"], e["prompt_tokens"]) for e in entries]
    assert sorted(told, key=str) == [
        ("cache_hit", "cache", "m1", None),
        ("cache_hit", "cache", "m1", None),
        ("success", "groq", "m1", 7),
    ]
    why = talk.http.get(f"/v1/why/{entries[0]['id']}", headers=AUTH).json
    assert why["cache"] in ("hit", "miss")
