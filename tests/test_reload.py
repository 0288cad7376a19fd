"""Settings that change while the router runs: taken over within 2 s, and no request notices."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from upstream import AUTH, HELLO, KEY, Hang, Reply, Stream, chat, chunks, provider, text_of, until

import router

SOON_S = 8.0  # the promise is 2 s; a busy machine gets more


def lines(settings: dict[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in settings.items())


class Home:
    """A running router whose files the test edits."""

    def __init__(self, live, folder):
        self.live, self.folder = live, folder
        self.hub = live.app.extensions["router"]
        self.reloader = live.app.extensions["reloader"]

    def env(self, *settings, **more):
        (self.folder / ".env").write_text(
            lines({k: v for s in (*settings, more) for k, v in s.items()})
        )

    def auth(self, document):
        text = document if isinstance(document, str) else json.dumps(document)
        (self.folder / "auth.json").write_text(text)

    def status(self, key=KEY):
        headers = {"Authorization": f"Bearer {key}"}
        return requests.get(f"{self.live.url}/v1/status", headers=headers, timeout=30)

    def metrics(self):
        return requests.get(f"{self.live.url}/metrics", timeout=30)

    @property
    def told(self):
        return self.status().json()["config"]

    def becomes(self, condition):
        until(condition, SOON_S)


@pytest.fixture
def home(serve, tmp_path):
    """home(settings of .env, auth=..., SETTING of the process=...): a router that looks out."""
    made = []

    def start(*settings, auth=None, **process):
        (tmp_path / ".env").write_text(lines({k: v for s in settings for k, v in s.items()}))
        if auth is not None:
            (tmp_path / "auth.json").write_text(json.dumps(auth))
        live = serve(**process)
        made.append(Home(live, tmp_path))
        made[-1].reloader.start()
        return made[-1]

    yield start
    for one in made:
        one.reloader.close()


# --- what is under way -----------------------------------------------------------------


def patient(request) -> object:
    """Answers, or the second half of a stream, when the gate opens."""
    if request.json.get("stream"):
        return Stream(chunks=chunks("hel", "lo"), hold_after=2)
    return Hang(60, chat("hello"))


def test_two_hundred_requests_in_flight_notice_nothing(home, upstream):
    first, second = upstream(patient), upstream(lambda r: chat("second"))
    old = provider("groq", first, keys="g1,g2")
    here = home(old, MAX_STREAMS="400")

    def ask(number):
        answer = here.live.chat(stream=number % 2 == 0)
        body = answer.content
        whole = (
            text_of(body) if number % 2 == 0 else answer.json()["choices"][0]["message"]["content"]
        )
        return answer.status_code, whole

    with ThreadPoolExecutor(200) as pool:
        under_way = [pool.submit(ask, n) for n in range(200)]
        first.wait_for(200, 60)
        here.env(old, {"GROQ_API_KEYS": "g2,g3"})
        here.becomes(lambda: here.hub.keys.held()["groq"] == ("g2", "g3"))
        here.auth({"providers": {"mistral": ["m1"]}})
        here.env(provider("mistral", second), {"MISTRAL_API_KEYS": ""})
        here.becomes(lambda: list(here.hub.keys.held()) == ["mistral"])
        assert here.live.chat().json()["choices"][0]["message"]["content"] == "second"
        assert here.hub.gate.inside == 200
        first.open_gate()
        answers = [one.result(60) for one in under_way]
    assert answers == [(200, "hello")] * 200
    assert here.hub.gate.inside == 0
    assert here.status().json()["providers"].keys() == {"mistral"}


def test_a_request_goes_on_with_the_keys_it_began_with(home, upstream):
    """Its provider is taken out while the first key hangs: its second key still serves it."""

    def answer(request):
        if request.key == "g1":
            return Hang(60, Reply(429, {"error": {"message": "slow down"}}))
        return chat(f"by {request.key}")

    up = upstream(answer)
    here = home(provider("groq", up, keys="g1,g2"))
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(here.live.chat)
        up.wait_for(1)
        here.env(provider("mistral", up, keys="m1"))
        here.becomes(lambda: "groq" not in here.hub.keys.held())
        up.open_gate()
        assert under_way.result(30).json()["choices"][0]["message"]["content"] == "by g2"


def test_writers_and_requests_together(home, upstream):
    """Keys come and go all the time; each request is answered."""
    up = upstream(lambda r: chat(r.key))
    here = home(provider("groq", up, keys="g0"))
    stop = threading.Event()

    def change():
        n = 0
        while not stop.is_set():
            n += 1
            router.edit_env(here.folder / ".env", {"GROQ_API_KEYS": f"g{n},g{n + 1}"})
            assert here.reloader.reload() == ""

    with ThreadPoolExecutor(9) as pool:
        writer = pool.submit(change)
        asked = [pool.submit(here.live.chat) for _ in range(200)]
        codes = {one.result(60).status_code for one in asked}
        stop.set()
        writer.result(30)
    assert codes == {200}
    assert len({request.key for request in up.requests}) > 2


# --- what changes ----------------------------------------------------------------------


def test_a_provider_that_is_added_is_used(home, upstream):
    one, two = upstream(), upstream(lambda r: chat("from two"))
    here = home(provider("groq", one))
    assert here.live.chat(model="mistral/m2", stream=False).headers["X-Provider"] == "groq"
    here.env(provider("groq", one), provider("mistral", two, "m2"))
    here.becomes(lambda: "mistral" in here.status().json()["providers"])
    answer = here.live.chat(model="mistral/m2")
    assert answer.headers["X-Provider"] == "mistral" and two.requests[0].key == "mistral-key-1"


def test_the_first_key_ends_the_echo(home, upstream):
    up = upstream()
    here = home(ECHO_FALLBACK="1")
    assert here.live.chat().headers["X-Provider"] == "echo"
    assert requests.get(f"{here.live.url}/health", timeout=30).json()["mode"] == "echo"
    settings = provider("groq", up)
    del settings["GROQ_API_KEYS"]
    here.env(settings)
    here.auth({"providers": {"groq": ["g1"]}})
    here.becomes(lambda: here.status().json()["mode"] == "router")
    assert here.live.chat().headers["X-Provider"] == "groq"


def test_a_proxy_key_that_is_taken_out_gets_401(home):
    here = home(auth={"proxy_keys": {"guest-key-1": {"name": "guest"}}})
    assert here.status("guest-key-1").status_code == 200
    here.auth({"proxy_keys": {"guest-key-2": {}}})
    here.becomes(lambda: here.status("guest-key-1").status_code == 401)
    assert here.status("guest-key-2").status_code == 200 and here.status().status_code == 200


def test_what_was_learnt_stays_with_what_stays(home, upstream):
    up = upstream()
    here = home(provider("groq", up, keys="g1,g2"), provider("mistral", up))
    here.live.chat(model="groq/m1")
    hub = here.hub
    for provider_name, key in (("groq", "g1"), ("groq", "g2"), ("mistral", "mistral-key-1")):
        hub.keys.rest(provider_name, key, "m1", 600, "rate_limited")
    for name in ("groq", "mistral"):
        hub.keys.rest(name, router.ANY, "m9", 600, "gone")
        hub.lessons.learn_window(name, "m1", 4096)
        for _ in range(8):
            hub.breakers.note(name, False)
    before = hub.loaded
    here.env(provider("groq", up, keys="g2,g3"), BREAKER_WINDOW="3", ROTATION_MODE="sequential")
    here.becomes(lambda: hub.loaded is not before)  # every part has taken over
    assert "mistral" not in hub.keys.held()
    places = {("groq", "g2", "m1"), ("groq", router.ANY, "m9")}
    assert hub.keys.rests().keys() == places
    assert hub.breakers.circuits().keys() == {"groq"} and hub.breakers.is_open("groq")
    assert len(hub.breakers.circuits()["groq"][0]) <= 3
    assert (hub.lessons.window("groq", "m1"), hub.lessons.window("mistral", "m1")) == (4096, 0)
    assert hub.usage.tally("groq").requests == 1
    here.env(provider("groq", up, keys="g1,g2"), provider("mistral", up))
    here.becomes(lambda: "mistral" in hub.keys.held())
    assert hub.keys.rests().keys() == places, "who left comes back without a past"


def test_a_provider_that_moved_begins_anew(home, upstream):
    """A wrong address had its key called dead: the right one is not made to wait for that."""
    wrong, right = upstream(Reply(401, {"error": {"message": "invalid key"}})), upstream()
    here = home(provider("groq", wrong))
    assert here.live.chat().status_code == 503 and here.hub.keys.dead()
    here.env(provider("groq", right))
    here.becomes(lambda: not here.hub.keys.dead())
    assert here.live.chat().status_code == 200


@pytest.mark.parametrize(
    ("settings", "look", "value"),
    [
        ({"MAX_STREAMS": "7"}, lambda h: h.hub.gate._most, 7),
        ({"CONNECT_TIMEOUT": "3"}, lambda h: h.hub.transport._connect_timeout, 3.0),
        ({"TTFT_TIMEOUT": "9"}, lambda h: h.hub.upstream._config.ttft_timeout, 9.0),
        ({"BREAKER_COOLDOWN": "5"}, lambda h: h.hub.breakers._cooldown, 5.0),
        ({"KEY_RECHECK": "0"}, lambda h: h.hub.checks._wanted, False),
        ({"REQUEST_LOG_SIZE": "3"}, lambda h: h.hub.traces.size, 3),
        ({"ROTATION_MODE": "sequential"}, lambda h: h.hub.keys._rotate, False),
        ({"STRICT_MODEL": "1"}, lambda h: h.live.chat(model="nobody").status_code, 404),
        ({"MODEL_ALIASES": "x=groq/m1"}, lambda h: len(h.hub.directory._aliases), 1),
        ({"MAX_REQUEST_BYTES": "1024"}, lambda h: h.live.chat(user="x" * 2000).status_code, 413),
        ({"METRICS_REQUIRE_AUTH": "1"}, lambda h: h.metrics().status_code, 401),
        ({"ADMIN_KEYS": "boss"}, lambda h: h.status("boss").status_code, 200),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_every_part_follows(home, upstream, settings, look, value):
    base = provider("groq", upstream())
    here = home(base)
    before = look(here)
    assert before != value
    here.env(base, settings)
    assert here.reloader.reload() == "" and look(here) == value
    assert here.told["restart_required"] == []
    here.env(base)
    assert here.reloader.reload() == "" and look(here) == before


def test_models_json_is_followed(home, upstream):
    here = home(provider("groq", upstream()))
    row = {"rating": 2, "window": 12345}
    (here.folder / "models.json").write_text(json.dumps({"m1": row}))
    here.becomes(
        lambda: (
            here.status().json()["providers"]["groq"]["model_caps"][0]["context_window"] == 12345
        )
    )


def test_the_prices_are_followed(home, upstream):
    here = home(provider("groq", upstream()), MODEL_PRICES_FILE="prices.json")
    (here.folder / "prices.json").write_text('{"groq/m1": [1, 2]}')
    here.becomes(lambda: here.hub.config.prices)
    (here.folder / "prices.json").write_text('{"groq/m1": [1, 2')
    here.becomes(lambda: "prices.json" in (here.told["error"] or ""))
    assert here.hub.config.prices["groq/m1"][:2] == (1, 2)


def test_the_log_level_is_followed(home):
    here, root = home(), logging.getLogger()
    old = root.level
    try:
        here.hub.follow(router.LogLevel())
        here.env(LOG_LEVEL="ERROR")
        here.becomes(lambda: root.level == logging.ERROR)
    finally:
        root.setLevel(old)


def test_parts_that_hold_the_settings_are_all_told():
    """Whatever the Router makes that has an `adopt` is in its list."""
    hub = router.Router(router.Config(proxy_keys=("k",)))
    able = {part for part in vars(hub).values() if hasattr(part, "adopt")}
    assert able == set(hub.parts)
    hub.close()


# --- what cannot be used ---------------------------------------------------------------


def test_a_broken_env_changes_nothing_until_it_is_mended(home, upstream, caplog):
    up = upstream()
    here = home(provider("groq", up))
    loaded_at = here.told["loaded_at"]
    here.env(provider("groq", up, keys="g9"), MAX_STREAMS="many")
    here.becomes(lambda: here.told["error"])
    told = here.told
    assert "MAX_STREAMS" in told["error"] and told["loaded_at"] == loaded_at
    assert here.live.chat().status_code == 200 and up.requests[-1].key == "groq-key-1"
    for _ in range(3):
        here.reloader.reload()
    assert caplog.text.count("the old ones stay") == 1, "told once"
    here.env(provider("groq", up, keys="g9"), MAX_STREAMS="10")
    here.becomes(lambda: here.told["error"] is None)
    assert here.live.chat().status_code == 200 and up.requests[-1].key == "g9"
    assert here.told["loaded_at"] > loaded_at


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
@pytest.mark.parametrize("name", [".env", "auth.json"])
def test_a_pipe_in_place_of_a_file_holds_nothing_up(home, upstream, tmp_path, name):
    up = upstream()
    here = home(provider("groq", up))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    here.becomes(lambda: "pipe" in (here.told["error"] or ""))
    with pytest.raises(router.FileProblem, match="no regular file"):
        router.edit_file(tmp_path / name, lambda old: b"new")
    (tmp_path / name).unlink()
    here.env(provider("groq", up, keys="g9"))
    here.becomes(lambda: here.told["error"] is None)
    assert here.live.chat().status_code == 200 and up.requests[-1].key == "g9"


@pytest.mark.parametrize("broken", ['{"proxy_keys": {"guest', "[]", '{"a": 1,}'])
def test_a_broken_auth_json_locks_nobody_out(home, broken):
    here = home(auth={"proxy_keys": {"guest-key-1": {}}})
    here.auth(broken)
    here.becomes(lambda: here.told["error"])
    assert "auth.json" in here.told["error"]
    assert here.status("guest-key-1").status_code == 200
    assert (here.folder / "auth.json").read_text() == broken
    here.auth({})
    here.becomes(lambda: here.status("guest-key-1").status_code == 401)
    assert here.told["error"] is None


def test_the_last_key_for_callers_stays(tmp_path):
    """An editor that empties .env before it writes it must not lock everybody out."""
    (tmp_path / ".env").write_text("PROXY_API_KEYS=only-key-1\n")
    app = router.create_app(router.Config.from_env({"HR_HOME": str(tmp_path)}))
    client, reloader = app.test_client(), app.extensions["reloader"]

    def status(key):
        return client.get("/v1/status", headers={"x-api-key": key}).status_code

    assert status("only-key-1") == 200
    (tmp_path / ".env").write_text("")
    assert reloader.reload() == "" and status("only-key-1") == 200
    assert (tmp_path / ".env").read_text() == ""
    (tmp_path / ".env").write_text("PROXY_API_KEYS=other-key-2\n")
    assert reloader.reload() == ""
    assert (status("only-key-1"), status("other-key-2")) == (401, 200)
    app.extensions["router"].close()


def test_what_needs_a_restart_is_named_and_waits(home, upstream):
    here = home(provider("groq", upstream()), HOST="127.0.0.1")
    port = here.hub.config.worker_threads
    here.env(provider("groq", upstream()), WORKER_THREADS="3", ROUTER_STATE_FILE="s.json")
    here.becomes(lambda: here.told["restart_required"] == ["ROUTER_STATE_FILE", "WORKER_THREADS"])
    assert here.hub.config.worker_threads == port
    here.env()
    here.becomes(lambda: here.told["restart_required"] == [])


def test_a_router_that_everybody_reaches_is_not_opened(home, monkeypatch):
    """HOST would be loopback after a restart; until then it is not."""
    here = home()
    here.hub.config = router.replace(here.hub.config, host="0.0.0.0")
    here.env(AUTH_MODE="open")
    assert "AUTH_MODE=open" in here.reloader.reload()
    assert requests.get(f"{here.live.url}/v1/models", timeout=30).status_code == 401
    here.hub.config = router.replace(here.hub.config, host="127.0.0.1")
    assert here.reloader.reload() == ""
    assert requests.get(f"{here.live.url}/v1/models", timeout=30).status_code == 200


def test_the_environment_of_the_process_wins_for_ever(home, upstream):
    up = upstream()
    here = home(**provider("groq", up))
    here.env(provider("groq", up, keys="from-the-file"), GROQ_MODEL="m2")
    assert here.reloader.reload() == ""
    assert here.hub.directory.services["groq"].models == ("m1",)
    assert here.hub.keys.held()["groq"] == ("groq-key-1",)


def test_a_reading_that_was_overtaken_changes_nothing(home, upstream, monkeypatch):
    here = home(provider("groq", upstream(), keys="g1"))
    here.reloader.close()
    read, slow, go = here.reloader._read, threading.Event(), threading.Event()

    def waiting():
        found = read()
        if not slow.is_set():
            slow.set()
            assert go.wait(30)
        return found

    monkeypatch.setattr(here.reloader, "_read", waiting)
    thread = threading.Thread(target=here.reloader.reload)
    thread.start()
    assert slow.wait(30)
    router.edit_env(here.folder / ".env", {"GROQ_API_KEYS": "g2"})
    assert here.reloader.reload() == ""
    go.set()
    thread.join(30)
    assert here.hub.keys.held()["groq"] == ("g2",)


# --- accounts --------------------------------------------------------------------------


def test_accounts_come_and_go_and_renewed_tokens_stay(tmp_path):
    def row(id, refresh):
        return {"account_id": id, "access_token": f"{id}-{refresh}", "refresh_token": refresh}

    def config(*rows):
        (tmp_path / "auth.json").write_text(json.dumps({"codex_accounts": rows}))
        return router.Config.from_env({"HR_HOME": str(tmp_path)})

    def post(*_):
        return 200, {"access_token": "renewed", "refresh_token": "r2", "expires_in": 3600}

    none = frozenset()
    pool = router.Accounts((), tmp_path / "auth.json", post, time.time)
    stale = config(row("a", "r1"), row("b", "r1"))
    pool.adopt(stale, none)
    assert pool.access_token("a") == "renewed"
    pool.adopt(router.Config.from_env({"HR_HOME": str(tmp_path)}), none)
    assert pool.access_token("a") == "renewed", "its own writing is no news"
    pool.adopt(config(row("b", "r1"), row("c", "r1")), none)
    assert pool.access_token("a") == "renewed", "a request may be using it"
    pool.adopt(config(row("c", "r1")), none)
    with pytest.raises(router.AccountError):
        pool.access_token("a")
    assert set(pool.ids) == {"b", "c"}


# --- a real process --------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_sighup_and_polling_of_a_real_process(launch, tmp_path, upstream):
    up = upstream()
    (tmp_path / ".env").write_text(lines(provider("groq", up, keys="g1")))
    running = launch(CACHE_TTL_SECONDS="0")  # the same question again and again
    assert "taken over" not in running.text, "nothing changed yet"

    def asked_with():
        body = {"model": "auto", "messages": HELLO}
        url = f"{running.url}/v1/chat/completions"
        sent = requests.post(url, json=body, headers=AUTH, timeout=30)
        assert sent.status_code == 200
        return up.requests[-1].key

    assert asked_with() == "g1"
    (tmp_path / ".env").write_text(lines(provider("groq", up, keys="g2")))
    running.process.send_signal(signal.SIGHUP)
    until(lambda: asked_with() == "g2", SOON_S)
    (tmp_path / ".env").write_text(lines(provider("groq", up, keys="g3")))
    until(lambda: asked_with() == "g3", SOON_S)
    assert running.stop() == 0
    assert running.text.count("settings taken over") == 2
