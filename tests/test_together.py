"""Parts that were made side by side, together: limits, sharing, signs of life, traces, settings."""

from __future__ import annotations

import json
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


# --- settings, keys and who may see what ------------------------------------------------

ADMIN, GUEST = "sk-admin-0123456789", "sk-guest-0123456789"


@pytest.fixture
def house(serve, tmp_path, upstream):
    """house(SETTING=...): a live router with its files, asked as `who`."""

    class House:
        def __init__(self, **lines):
            self.up = upstream(good())
            self.lines = {
                "PROXY_API_KEYS": GUEST,
                "ADMIN_KEYS": ADMIN,
                **provider("groq", self.up, "m1"),
                **lines,
            }
            self.write(self.lines)
            self.live = serve(_env={"HR_HOME": str(tmp_path), "PORT": "0"})
            self.hub = self.live.app.extensions["router"]
            self.reload = self.live.app.extensions["reloader"].reload

        def write(self, lines):
            (tmp_path / ".env").write_text("".join(f"{k}={v}\n" for k, v in lines.items()))

        def ask(self, method, path, who=GUEST, **more):
            more.setdefault("headers", {})["Authorization"] = f"Bearer {who}"
            with requests.Session() as session:
                session.trust_env = False
                return session.request(method, self.live.url + path, timeout=60, **more)

        def chat(self, who=GUEST, **more):
            body = {"model": "groq/m1", "messages": HELLO}
            return self.ask("POST", "/v1/chat/completions", who, json=body, **more)

    return House


def test_a_lost_env_makes_nobody_an_admin(house):
    here = house()
    for path in ("/v1/config/settings", "/v1/config/proxy-keys"):
        assert here.ask("GET", path).status_code == 403
    here.write({})
    assert here.reload() == ""
    assert here.ask("GET", "/v1/models").status_code == 200
    assert here.ask("GET", "/v1/config/settings").status_code == 403
    assert here.ask("GET", "/v1/config/settings", ADMIN).status_code == 200


def test_a_problem_of_another_file_is_not_blamed_on_the_setting(house, tmp_path):
    here = house()
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": {GUEST: {"rpm": "x"}}}))
    got = here.ask("POST", "/v1/config/settings", ADMIN, json={"RESCUE": False})
    assert got.status_code == 409 and "rpm cannot be 'x'" in got.text
    (tmp_path / "auth.json").unlink()
    got = here.ask("POST", "/v1/config/settings", ADMIN, json={"MAX_STREAMS": "many"})
    assert got.status_code == 400 and got.json()["error"]["param"] == "MAX_STREAMS"


def test_where_files_lie_is_told_to_nobody(house, tmp_path):
    here = house()
    (tmp_path / "auth.json").mkdir()
    assert "Is a directory" in here.reload()
    for who, path in ((GUEST, "/v1/status"), (ADMIN, "/v1/config/settings")):
        got = here.ask("GET", path, who)
        assert "Is a directory" in got.text and str(tmp_path) not in got.text


def test_an_id_that_somebody_else_uses_too_hides_nothing(house):
    here = house()
    for who in (GUEST, ADMIN):
        assert here.chat(who, headers={"X-Request-ID": "mine"}).status_code == 200
    told = {who: here.ask("GET", "/v1/why/mine", who).json() for who in (GUEST, ADMIN)}
    assert told[GUEST]["caller"] == GUEST[-6:] and told[ADMIN]["caller"] == ADMIN[-6:]


def test_old_settings_do_not_pile_up_in_the_log(house):
    here = house(CACHE_TTL_SECONDS="0")

    def told(answer):
        return here.ask("GET", f"/v1/why/{answer.headers['X-Request-ID']}").json()

    first = here.chat()
    for number in range(router.Traces.ERAS):
        assert told(first)["candidates"]
        here.write({**here.lines, "FAST_ROUTE_THRESHOLD": number + 1})
        assert here.reload() == ""
    assert told(first)["candidates"] == [] and told(first)["attempts"][0]["verdict"] == "ok"
    assert told(here.chat())["candidates"]


def test_slashes_too_many_are_no_page_of_html(house):
    here = house()
    for path in ("/v1//models", "/v1/config//settings", "/v1//chat/completions"):
        got = here.ask("GET", path, ADMIN)
        assert got.status_code == 404 and got.json()["error"]["code"] == "not_found"
        assert "Location" not in got.headers


@pytest.mark.parametrize(
    "change",
    [
        {"env": {"MODEL_ALIASES": "x=groq/m2"}},
        {"row": {"privacy": "no-train"}},
        {"row": {"allowed_providers": ["groq"]}},
        {"env": {"GROQ_MODEL": "m3"}},
    ],
    ids=str,
)
def test_what_changes_live_changes_what_is_remembered(house, tmp_path, change):
    here = house(CACHE_TTL_SECONDS="300", MODEL_ALIASES="x=groq/m1")
    assert [here.chat().headers["X-Hermes-Cache"] for _ in range(2)] == ["miss", "hit"]
    here.write({**here.lines, **change.get("env", {})})
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": {GUEST: change.get("row", {})}}))
    assert here.reload() == ""
    assert [here.chat().headers["X-Hermes-Cache"] for _ in range(2)] == ["miss", "hit"]


def test_a_revoked_key_gets_nothing_that_is_remembered(house):
    here = house(CACHE_TTL_SECONDS="300", PROXY_API_KEYS=f"{GUEST},sk-second-0123456789")
    second = "sk-second-0123456789"
    assert [here.chat(second).headers["X-Hermes-Cache"] for _ in range(2)] == ["miss", "hit"]
    own = here.chat(second).headers["X-Request-ID"]
    key = here.hub.config.callers[1]
    assert key.key == second
    assert here.ask("DELETE", f"/v1/config/proxy-keys/{key.id}", ADMIN).status_code == 200
    assert here.chat(second).status_code == 401
    assert here.ask("GET", f"/v1/why/{own}", second).status_code == 401
    assert here.ask("GET", f"/v1/why/{own}").status_code == 404
    assert here.chat().headers["X-Hermes-Cache"] == "miss"


def test_a_compaction_is_no_answer_to_the_same_body(house):
    here = house(CACHE_TTL_SECONDS="300")
    body = {"model": "groq/m1", "input": "hi", "store": False}
    found = [
        here.ask("POST", path, json=body) for path in ("/v1/responses", "/v1/responses/compact") * 2
    ]
    assert [got.status_code for got in found] == [200] * 4
    assert found[0].json()["object"] == "response" != found[1].json().get("object")
    assert found[2].headers["X-Hermes-Cache"] == "hit"
    assert found[3].json().get("object") == found[1].json().get("object")
