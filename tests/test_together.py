"""Parts that were made side by side, together: limits, sharing, signs of life, traces, settings."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai
import pytest
import requests
from test_sharing import Caller, crowd_of, gated
from upstream import (
    AUTH,
    HELLO,
    KEY,
    Hang,
    Reply,
    Stream,
    chat,
    chunks,
    delta,
    good,
    provider,
    text_of,
    until,
)

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


# --- official clients before all of it at once ------------------------------------------

USED = (7, 3)  # what the scripted provider states


def openai_chat(clients, stream):
    options = {"model": "m", "messages": HELLO}
    if not stream:
        done = clients[0].chat.completions.create(**options)
        return done.choices[0].message.content, (
            done.usage.prompt_tokens,
            done.usage.completion_tokens,
        )
    with clients[0].chat.completions.stream(
        **options, stream_options={"include_usage": True}
    ) as events:
        done = events.get_final_completion()
    return done.choices[0].message.content, (
        done.usage.prompt_tokens,
        done.usage.completion_tokens,
    )


def openai_responses(clients, stream):
    options = {"model": "m", "input": "hello there", "store": False}
    if stream:
        with clients[0].responses.stream(**options) as events:
            done = events.get_final_response()
    else:
        done = clients[0].responses.create(**options)
    return done.output_text, (done.usage.input_tokens, done.usage.output_tokens)


def openai_completions(clients, stream):
    options = {"model": "m", "prompt": "hello there"}
    if not stream:
        done = clients[0].completions.create(**options)
        return done.choices[0].text, (done.usage.prompt_tokens, done.usage.completion_tokens)
    text = "".join(
        event.choices[0].text
        for event in clients[0].completions.create(**options, stream=True)
        if event.choices
    )
    return text, USED


def anthropic_messages(clients, stream):
    options = {"model": "m", "messages": HELLO, "max_tokens": 99}
    if stream:
        with clients[1].messages.stream(**options) as events:
            done = events.get_final_message()
    else:
        done = clients[1].messages.create(**options)
    return done.content[0].text, (done.usage.input_tokens, done.usage.output_tokens)


@pytest.mark.parametrize(
    "way", [openai_chat, openai_responses, openai_completions, anthropic_messages]
)
def test_official_clients_share_and_remember_behind_a_sign_of_life(serve, upstream, way):
    """Whole and streamed: two at once, of which one is asked for, then one from memory."""
    up = upstream(lambda request: Hang(60, good("one two")(request)))
    limits = {"PROXY_LIMIT_TOKENS_DAY": "100000", "PROXY_LIMIT_RPM": "100"}
    live = serve(**provider("groq", up), **ON, **limits, KEEPALIVE_AFTER="0.1")
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as one,
        anthropic.Anthropic(base_url=live.url, api_key=KEY, max_retries=0) as two,
        ThreadPoolExecutor(4) as pool,
    ):
        tasks = [pool.submit(way, (one, two), form) for form in (True, True, False, False)]
        until(lambda: crowd_of(live) == 4)
        router.time.sleep(0.4)
        up.open_gate()
        got = [task.result() for task in tasks]
        got += [way((one, two), form) for form in (True, False)]
    assert got == [("one two", USED)] * 6
    assert len(up.requests) == 2  # one for each form
    at_rest(live)
    assert used(live)["req_today"] == 6 and used(live)["tokens_today"] == 20


# --- limits hold whatever stands in front of providers ----------------------------------


def test_what_is_remembered_or_shared_counts_as_a_request(serve, upstream):
    up = upstream(gated(good()))
    live = serve(**provider("groq", up), **ON, PROXY_LIMIT_RPM="6")
    with ThreadPoolExecutor(8) as pool:
        tasks = [pool.submit(ask, live) for _ in range(8)]
        until(lambda: crowd_of(live) == 6)
        up.open_gate()
        found = sorted(task.result().status_code for task in tasks)
    assert found == [200] * 6 + [429] * 2 and len(up.requests) == 1
    assert ask(live).status_code == 429  # memory has it, but not for this request
    at_rest(live)


def test_who_waits_for_another_ones_stream_has_one_of_his_own(serve, upstream):
    up = upstream(gated(good()))
    live = serve(**provider("groq", up), **ON, PROXY_LIMIT_STREAMS="2")
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(ask, live, stream=True) for _ in range(2)]
        until(lambda: crowd_of(live) == 2)
        assert ask(live, stream=True).status_code == 429
        up.open_gate()
        assert [task.result().status_code for task in tasks] == [200, 200]
    at_rest(live)


def test_limits_change_for_what_is_remembered_as_well(house):
    here = house(CACHE_TTL_SECONDS="300")
    assert here.chat().status_code == 200
    here.write({**here.lines, "PROXY_LIMIT_RPM": "1"})
    assert here.reload() == ""
    assert here.chat().status_code == 429
    here.write(here.lines)
    assert here.reload() == ""
    assert here.chat().status_code == 200


def test_a_router_on_its_way_out_owes_nothing(serve, upstream):
    live = serve(**provider("groq", upstream(good())), **ON, PROXY_LIMIT_RPM="2")
    made = live.app.extensions["router"]
    made.gate.closed = True
    assert ask(live).status_code == 503 and ask(live, stream=True).status_code == 503
    made.gate.closed = False
    assert used(live)["req_today"] == 0
    at_rest(live)


def test_a_conversation_does_not_stay_with_a_model_that_was_taken_out(house):
    here = house(CACHE_TTL_SECONDS="0", GROQ_MODEL="m1,m2")
    said = {"role": "assistant", "content": "hello"}

    def turn(model):
        body = {"model": model, "messages": [*HELLO, said, *HELLO]}
        return here.ask("POST", "/v1/chat/completions", json=body).headers["X-Hermes-Model"]

    assert turn("groq/m2") == turn("auto") == "m2"
    here.write({**here.lines, "GROQ_MODEL": "m1"})
    assert here.reload() == ""
    assert turn("auto") == "m1"
    assert turn("groq/m2") == "m2", "who names it may have it"
    assert turn("auto") == "m1"


def test_a_secret_that_is_no_list_shows_nothing(house):
    here = house(REDIS_URL="redis://user:pass-word@127.0.0.1:1/0")
    rows = here.ask("GET", "/v1/config/settings", ADMIN).json()["settings"]
    assert [row["value"] for row in rows if row["name"] == "REDIS_URL"] == [["***"]]


def test_nothing_on_this_machine_is_named_from_afar(house):
    here = house()
    rows = here.ask("GET", "/v1/config/settings", ADMIN).json()["settings"]
    names = {
        row["name"] for row in rows if re.search(r"_(PATH|FILE)$|SEMANTIC_MODEL$", row["name"])
    }
    assert {"CACHE_DB_PATH", "LLMROUTER_SEMANTIC_MODEL", "MODELS_FILE"} <= names
    for name in names:
        got = here.ask("POST", "/v1/config/settings", ADMIN, json={name: "elsewhere"})
        assert got.status_code == 400 and got.json()["error"]["param"] == name
    assert not any(row["changeable"] for row in rows if row["name"] in names)


# --- nonsense for the settings ----------------------------------------------------------

NONSENSE = (
    None, True, -1, 1.5, float("inf"), float("nan"), 10**30, "", "a\nB=1", "a\r\nB=1", "a\0b",
    "a\u2028B=1", "a\x85B=1", "\ud800", "\u202e", "'\"", "\"'#", "${HOME}", "$(id)", "x" * 20_000,
    [], ["b\nC=1"], [1], {}, {"a": 1}, "http://2852039166/", "http://u:p@h/", "../../etc/passwd",
)  # fmt: skip
MEMBERS = ("key", "model", "enabled", "mode", "name", "admin", "allowed_providers", "rpm", "zzz")
NAMES = ("groq", "x", "%00", "%0a", "%ff", "a%2fb", "..", "%2e%2e", "'", "a" * 3000, "rotation")
RAW = (
    b"{", b"[]", b"null", b"\xff", b'{"a":' * 5000, b'{"rpm":1e400}', b'{"rpm":%b}' % (b"9" * 5000),
    b"{%b}" % (b" " * 66_000),
)  # fmt: skip


def errands(dice):
    for method, path, _ in router.ERRANDS:
        if path != "restart":
            for value in NONSENSE:
                names = re.sub(r"<\w+>", lambda _: dice.choice(NAMES), path)
                yield method, names, json.dumps({dice.choice(MEMBERS): value}).encode()
            for raw in RAW:
                yield method, re.sub(r"<\w+>", "groq", path), raw
    for name in (
        *router.setting_fields(),
        "GROQ_BASE_URL",
        "GROQ_MODEL",
        "A\nB",
        "PATH",
        "",
        "\ud800",
    ):
        for value in dice.sample(NONSENSE, 4):
            yield "POST", "settings", json.dumps({name: value}).encode()
        yield "POST", "settings", json.dumps({name: None}).encode()


def test_nonsense_for_the_settings_is_refused_in_words(house, caplog, tmp_path):
    here, known = (
        house(),
        {*router.setting_fields(), "GROQ_API_KEYS", "GROQ_BASE_URL", "GROQ_MODEL"},
    )
    headers = {"Content-Type": "application/json"}
    for method, path, raw in errands(random.Random(5)):
        got = here.ask(method, f"/v1/config/{path}", ADMIN, data=raw, headers={**headers})
        assert got.status_code < 500, (method, path, raw[:200], got.text)
        if got.status_code >= 400:
            assert got.json()["error"]["message"], (method, path, raw[:200])
            assert got.headers["X-Request-ID"]
        assert GUEST not in got.text and ADMIN not in got.text
        assert set(router.read_dotenv(tmp_path / ".env")) <= known, (method, path, raw[:200])
    assert here.ask("GET", "/v1/config/settings", ADMIN).status_code == 200
    assert not [record for record in caplog.records if record.exc_info]
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert GUEST not in caplog.text and ADMIN not in caplog.text


def test_a_shared_stream_is_rescued_after_its_first_client_left(serve, upstream):
    said = [delta(content="one "), delta(content="two ")]
    broken = Stream(chunks=said, done=False, framing="close", hold_after=2)
    begin = threading.Event()
    first = upstream(lambda request: begin.wait(30) and broken)
    rows = {**provider("groq", first), **provider("cerebras", upstream(good("one two three four")))}
    live = serve(**rows, **ON, PROXY_LIMIT_STREAMS="5", PROXY_LIMIT_TOKENS_DAY="100000")
    leader = Caller(live, True, model="groq/m1")
    first.wait_for(1)
    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(ask, live, stream=True, model="groq/m1") for _ in range(3)]
        until(lambda: crowd_of(live) == 4)
        begin.set()
        assert b"one" in leader.sock.recv(65536)
        leader.leave()
        router.time.sleep(0.3)
        first.open_gate()
        got = [task.result() for task in tasks]
    assert {text_of(answer.content) for answer in got} == {"one two three four"}
    assert all(answer.text.count("[DONE]") == 1 for answer in got)
    at_rest(live)
    assert used(live)["tokens_today"] == spent(live) > 10
    assert ask(live, stream=True, model="groq/m1").headers["X-Hermes-Cache"] == "miss"


# --- conversations that a provider confuses ---------------------------------------------


@pytest.mark.parametrize("ids", [["resp_a"], ["resp_a", "resp_b"]], ids=len)
def test_a_provider_that_repeats_its_ids_stops_nothing(serve, upstream, ids):
    turns = itertools.cycle(ids)
    text = {"type": "output_text", "text": "hello", "annotations": []}
    said = {"type": "message", "id": "m", "role": "assistant", "content": [text]}

    def script(_):
        made = {"id": next(turns), "object": "response", "status": "completed", "output": [said]}
        return Reply(200, made)

    live = serve(**provider("openai", upstream(script), "gpt-5"))
    previous, found = None, []
    for _ in range(4):
        body = {"model": "openai/gpt-5", "input": "hi", "previous_response_id": previous}
        got = requests.post(f"{live.url}/v1/responses", json=body, headers=AUTH, timeout=10)
        found.append(got.status_code)
        previous = got.json().get("id", previous)
    assert found == [200] * (1 + len(ids)) + [400] * (3 - len(ids))
    assert got.json()["error"]["code"] == "previous_response_not_found"
    at_rest(live)
