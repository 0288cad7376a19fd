"""/v1/config: who may change what, that it is checked, stored and in use when the answer comes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from upstream import HELLO, KEY, Hang, Reply, chat, free_port, good, provider, until

import router

ADMIN, GUEST = "sk-admin-0123456789", "sk-guest-0123456789"
NEW_KEY = "gsk_new_0123456789"
SECRETS = re.compile(r"gsk_|sk-admin-|sk-guest-|sk-router-")


class Api:
    """A router whose settings stand in its files, reached as `who`."""

    def __init__(self, live, folder, process):
        self.url, self.folder, self.hub = live.url, folder, live.app.extensions["router"]
        self.process = process

    def ask(self, method, path, body=None, who=ADMIN, **headers):
        headers = {"Authorization": f"Bearer {who}", **headers}
        session = requests.Session()
        session.trust_env = False
        with session:
            return session.request(
                method, f"{self.url}/v1/config/{path}", json=body, headers=headers, timeout=60
            )

    def get(self, path, **more):
        answer = self.ask("GET", path, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path, body, **more):
        answer = self.ask("POST", path, body, **more)
        assert answer.status_code == 200, answer.text
        assert answer.headers["Cache-Control"] == "no-store"
        return answer.json()

    def delete(self, path, **more):
        answer = self.ask("DELETE", path, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def fails(self, status, method, path, body=None, **more):
        """The error's param and text."""
        before = self.files()
        answer = self.ask(method, path, body, **more)
        assert answer.status_code == status, answer.text
        assert self.files() == before, "what is refused changes nothing"
        error = answer.json()["error"]
        return error["param"], error["message"]

    def files(self):
        return {
            name: (self.folder / name).read_bytes()
            for name in (".env", "auth.json")
            if (self.folder / name).exists()
        }

    @property
    def env(self):
        return router.read_dotenv(self.folder / ".env")

    @property
    def auth(self):
        return json.loads((self.folder / "auth.json").read_text())

    def code(self, who):
        headers = {"x-api-key": who}
        return requests.get(f"{self.url}/v1/models", headers=headers, timeout=60).status_code


@pytest.fixture
def api(serve, tmp_path):
    """api(settings of .env, auth=..., SETTING of the process=...)."""

    def start(*settings, auth=None, **process):
        lines = {k: v for s in settings for k, v in s.items()}
        lines = {"PROXY_API_KEYS": GUEST, "ADMIN_KEYS": ADMIN, **lines}
        (tmp_path / ".env").write_text("".join(f"{k}={v}\n" for k, v in lines.items()))
        if auth is not None:
            (tmp_path / "auth.json").write_text(json.dumps(auth))
        env = {"HR_HOME": str(tmp_path), "PORT": "0", "ECHO_FALLBACK": "0", **process}
        return Api(serve(_env=env), tmp_path, process)

    return start


# --- who may ---------------------------------------------------------------------------

PATHS = [
    (method, "/v1/config/" + re.sub(r"<\w+>", "x", path)) for method, path, _ in router.ERRANDS
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_only_an_admin_may(api, method, path):
    here = api()
    for who, status in ((GUEST, 403), ("nobody", 401)):
        body = {} if method == "POST" else None
        answer = here.ask(method, path.removeprefix("/v1/config/"), body, who=who)
        assert answer.status_code == status, path
        assert answer.json()["error"]["message"]


def test_without_named_admins_the_first_key_is_one(api):
    here = api({"ADMIN_KEYS": "", "PROXY_API_KEYS": f"{GUEST},second-key-1"})
    assert here.ask("GET", "settings", who=GUEST).status_code == 200
    assert here.ask("GET", "settings", who="second-key-1").status_code == 403


def test_an_open_router_needs_an_admin_key_for_its_settings(api):
    here = api({"AUTH_MODE": "open", "ADMIN_KEYS": "", "PROXY_API_KEYS": GUEST})
    for who in (GUEST, "anything"):
        assert here.code(who) == 200
        assert here.ask("POST", "rotation", {"mode": "rr"}, who=who).status_code == 403
    (here.folder / ".env").write_text(f"AUTH_MODE=open\nADMIN_KEYS={ADMIN}\n")
    here.hub.adopt(router.Config.from_env(here.hub.config.given))
    assert here.post("rotation", {"mode": "seq"})["mode"] == "sequential"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.test"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1.evil.test"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.test"},
        {"Host": "localhost.evil.test:80"},
        {"Host": "[::1"},
        {"Host": ""},
    ],
)
def test_a_page_of_another_site_changes_nothing(api, headers):
    here = api()
    told = here.fails(403, "POST", "rotation", {"mode": "sequential"}, **headers)
    assert told[1]
    if "Host" in headers:
        assert here.ask("GET", "settings", **headers).status_code == 403


def test_the_routers_own_page_and_programs_may(api):
    here = api()
    port = here.url.rpartition(":")[2]
    for headers in (
        {"Origin": here.url, "Sec-Fetch-Site": "same-origin"},
        {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"},
        {"Sec-Fetch-Site": "none"},
        {"Host": f"LOCALHOST:{port}"},
    ):
        here.post("rotation", {"mode": "rr"}, **headers)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_read(api, kind):
    here = api()
    headers = {"Authorization": f"Bearer {ADMIN}", "Content-Type": kind}
    body = b'{"mode": "sequential"}'
    url = f"{here.url}/v1/config/rotation"
    assert requests.post(url, data=body, headers=headers, timeout=60).status_code == 415


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"null", b"\xff", b"[" * 5000])
def test_bodies_that_are_no_object(api, body):
    here = api()
    headers = {"Authorization": f"Bearer {ADMIN}", "Content-Type": "application/json"}
    for path in ("rotation", "settings", "proxy-keys/x", "keys/groq", "features/request_log"):
        url = f"{here.url}/v1/config/{path}"
        answer = requests.post(url, data=body, headers=headers, timeout=60)
        assert answer.status_code == 400, (path, answer.text)


def test_a_body_that_is_too_large(api):
    told = api().fails(413, "POST", "settings", {"MODEL_ALIASES": "x" * 70_000})
    assert "65536" in told[1]


# --- keys of providers -----------------------------------------------------------------


def test_a_provider_key_is_added_used_and_removed(api, upstream):
    up = upstream()
    settings = provider("groq", up)
    del settings["GROQ_API_KEYS"]
    here = api(settings)
    told = here.post("keys/GROQ", {"key": f" {NEW_KEY}\n"})
    assert told == {
        "provider": "groq",
        "added": True,
        "duplicate": False,
        "key_tail": "456789",
        "total_keys": 1,
        "restart_required": False,
    }
    assert here.auth == {"providers": {"groq": [NEW_KEY]}}
    body = {"model": "auto", "messages": HELLO}
    headers = {"x-api-key": GUEST}
    answer = requests.post(
        f"{here.url}/v1/chat/completions", json=body, headers=headers, timeout=60
    )
    assert answer.status_code == 200 and up.requests[0].key == NEW_KEY
    assert here.post("keys/groq", {"key": NEW_KEY})["duplicate"] is True
    shown = here.get("providers")
    assert shown["key_counts"]["groq"] == 1 and shown["keys"]["groq"][0]["key_tail"] == "456789"
    assert not SECRETS.search(json.dumps(shown))
    assert here.delete("keys/groq/456789")["total_keys"] == 0
    assert here.auth == {"providers": {"groq": []}}


def test_the_list_of_providers(api):
    shown = api().get("providers")
    assert {"groq", "gemini", "openrouter"} <= set(shown["key_settable"])
    assert "codex" not in shown["key_settable"] and "codex" in shown["model_settable"]
    assert shown["defaults"]["groq"] == ",".join(router.provider_named("groq").models)
    assert shown["key_counts"].keys() == set(shown["key_settable"])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("keys/nobody", {"key": NEW_KEY}, "provider"),
        ("keys/<script>", {"key": NEW_KEY}, "provider"),
        ("keys/codex", {"key": NEW_KEY}, "provider"),
        ("keys/groq", {}, "key"),
        ("keys/groq", {"key": ""}, "key"),
        ("keys/groq", {"key": "a\nb"}, "key"),
        ("keys/groq", {"key": ["a"]}, "key"),
        ("keys/groq", {"key": "schlüssel"}, "key"),
        ("keys/groq", {"key": "x" * 9000}, "key"),
        ("keys/groq", {"key": NEW_KEY, "kye": 1}, "kye"),
        ("model/nobody", {"model": "m"}, "provider"),
        ("model/groq", {}, "model"),
        ("model/groq", {"model": " , "}, "model"),
        ("model/groq", {"model": "a b"}, "model"),
        ("model/groq", {"model": "a\nb"}, "model"),
        ("model/groq", {"model": "modèle"}, "model"),
        ("model/groq", {"model": 7.5, "x": 1}, "x"),
        ("model/groq", {"model": "m" * 300}, "model"),
        ("rotation", {}, "mode"),
        ("rotation", {"mode": "random"}, "mode"),
        ("rotation", {"mode": ["rr"]}, "mode"),
        ("features/request_log", {}, "enabled"),
        ("features/request_log", {"enabled": "yes"}, "enabled"),
        ("features/local_model", {"enabled": True}, "name"),
        ("features/dashboard", {"enabled": False}, "name"),
        ("restart", {"now": True}, "now"),
    ],
)
def test_what_is_wrong_is_named(api, path, body, param):
    told = api().fails(400, "POST", path, body)
    assert told[0] == param and told[1]


def test_keys_that_are_not_in_the_file(api, upstream):
    here = api(provider("groq", upstream(), keys=f"{NEW_KEY},gsk_b_1456789"))
    told = here.fails(409, "DELETE", f"keys/groq/{router.caller_id(NEW_KEY)}")
    assert "GROQ_API_KEYS" in told[1]
    assert "ids" not in here.fails(404, "DELETE", "keys/groq/nothing")[1]
    assert "by id" in here.fails(404, "DELETE", "keys/groq/456789")[1]
    assert here.post("keys/groq", {"key": NEW_KEY})["added"] is False, "the environment has it"


def test_twenty_writers_lose_nothing(api):
    here = api()

    def write(n):
        here.post("keys/groq", {"key": f"gsk_{n}_0123456789"})
        made = here.post("proxy-keys", {"name": f"caller {n}"})
        return here.code(made["key"]), made["key"]

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(write, range(20)))
    assert {code for code, _ in found} == {200}, "a key works when it is told"
    assert len(here.auth["providers"]["groq"]) == 20
    assert here.auth["proxy_keys"].keys() == {key for _, key in found}
    assert len(here.hub.keys.held()["groq"]) == 20


def test_a_broken_auth_json_is_told_and_kept(api):
    here = api()
    (here.folder / "auth.json").write_text('{"providers": {')
    told = here.fails(500, "POST", "keys/groq", {"key": NEW_KEY})
    assert "auth.json" in told[1] and "line 1" in told[1] and NEW_KEY not in told[1]


# --- models, features, rotation --------------------------------------------------------


def test_models_are_set_and_reset(api, upstream):
    here = api(provider("groq", upstream()))
    told = here.post("model/Groq", {"model": "m7, openai/gpt-oss-20b"})
    want = {"provider": "groq", "model": "m7,openai/gpt-oss-20b", "restart_required": False}
    assert told == want and here.env["GROQ_MODEL"] == "m7,openai/gpt-oss-20b"
    assert here.hub.directory.services["groq"].models == ("m7", "openai/gpt-oss-20b")
    told = here.delete("model/groq")
    assert told == {"provider": "groq", "reset": True, "restart_required": False}
    assert "GROQ_MODEL" not in here.env
    assert here.hub.directory.services["groq"].models == router.provider_named("groq").models


def test_features(api):
    here = api()
    listed = here.get("features")
    assert "failover" in listed["core"]
    rows = {row["name"]: row for row in listed["addons"]}
    assert rows["request_log"]["enabled"] and rows["request_log"]["env"] == "REQUEST_LOG_SIZE"
    assert rows["dashboard"]["kind"] == "builtin" and rows["local_model"]["manage"]
    told = here.post("features/request_log", {"enabled": False})
    assert told == {"name": "request_log", "enabled": False, "restart_required": False}
    assert here.env["REQUEST_LOG_SIZE"] == "0" and here.hub.traces.size == 0
    here.post("features/fast_routing", {"enabled": True})
    assert here.hub.config.fast_route_threshold == 200
    here.post("settings", {"FAST_ROUTE_THRESHOLD": 5000})
    here.post("features/fast_routing", {"enabled": True})
    assert here.hub.config.fast_route_threshold == 5000, "on already: its number stays"
    status = requests.get(f"{here.url}/v1/status", headers={"x-api-key": GUEST}, timeout=60).json()
    assert status["features"] == here.get("features")
    assert here.fails(404, "POST", "features/nothing", {"enabled": True})[1]


def test_every_flag_is_a_setting_with_two_sides():
    for feature in router.known_features().values():
        assert feature.kind != "flag" or (feature.env and feature.on and feature.on != feature.off)


@pytest.mark.parametrize("word", ["sequential", "seq", " SEQ "])
def test_rotation(api, word):
    here = api()
    assert here.get("rotation")["mode"] == "round-robin"
    assert here.post("rotation", {"mode": word}) == {
        "mode": "sequential",
        "restart_required": False,
    }
    for other in ("roundrobin", "round_robin", "rr", "round-robin"):
        assert here.post("rotation", {"mode": other})["mode"] == "round-robin"
    assert here.env["ROTATION_MODE"] == "round-robin"


# --- settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "rows", "source"),
    [
        ({"PROXY_API_KEYS": "k-in-env"}, {}, ".env"),
        ({"PROXY_API_KEYS": "k-in-env"}, {"k-in-auth": {}}, ".env, auth.json"),
        ({}, {"k-in-auth": {}}, "auth.json"),
    ],
)
def test_keys_of_callers_say_where_they_stand(tmp_path, env, rows, source):
    (tmp_path / ".env").write_text("".join(f"{k}={v}\n" for k, v in env.items()))
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": rows}))
    config = router.Config.from_env({"HR_HOME": str(tmp_path)})
    (row,) = [r for r in router.setting_states(config) if r["name"] == "PROXY_API_KEYS"]
    assert row["source"] == source


def test_every_setting_is_shown_with_its_source(api):
    here = api({"MAX_STREAMS": "77"}, auth={"providers": {"groq": [NEW_KEY]}}, BREAKER_WINDOW="9")
    told = here.get("settings")
    rows = {row["name"]: row for row in told["settings"]}
    assert rows.keys() >= router.setting_fields().keys()
    assert (rows["MAX_STREAMS"]["value"], rows["MAX_STREAMS"]["source"]) == (77, ".env")
    assert rows["BREAKER_WINDOW"]["source"] == "environment"
    assert not rows["BREAKER_WINDOW"]["changeable"] and rows["MAX_STREAMS"]["changeable"]
    assert rows["RESCUE"]["source"] == "default" and rows["RESCUE"]["value"] is True
    assert rows["ADMIN_KEYS"]["value"] == [ADMIN[-6:]] and rows["ADMIN_KEYS"]["secret"]
    assert rows["PORT"]["restart_required"] and not rows["MAX_STREAMS"]["restart_required"]
    assert not SECRETS.search(json.dumps(told))


def test_settings_are_set_and_unset(api):
    here = api()
    values = {"MAX_STREAMS": 33, "RESCUE": False, "MODEL_ALIASES": ["a=groq/b", "c=groq/d"]}
    told = here.post("settings", {**values, "BREAKER_ERROR_RATE": 0.25, "TTFT_TIMEOUT": "7"})
    assert told["restart_required"] is False and "error" not in told
    config = here.hub.config
    assert (config.max_streams, config.rescue, config.breaker_error_rate) == (33, False, 0.25)
    assert config.model_aliases == ("a=groq/b", "c=groq/d") and config.ttft_timeout == 7
    here.post("settings", dict.fromkeys(values))
    assert here.hub.config.max_streams == 1000 and not set(values) & here.env.keys()
    assert here.post("settings", {"HOST": "0.0.0.0"})["restart_required"] is True
    assert here.get("settings")["restart_required"] == ["HOST"]
    assert here.hub.config.host == "127.0.0.1", "what it listens on"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NO_SUCH", "1"),
        ("PATH", "/evil"),
        ("LD_PRELOAD", "x.so"),
        ("HR_HOME", "/tmp"),
        ("<img src=x onerror=alert(1)>", "1"),
        ("MAX_STREAMS", "many"),
        ("MAX_STREAMS", -1),
        ("MAX_STREAMS", 1e9),
        ("MAX_STREAMS", {"a": 1}),
        ("MAX_STREAMS", [1]),
        ("LOG_LEVEL", "LOUD"),
        ("ROTATION_MODE", "random"),
        ("MODEL_ALIASES", "nothing"),
        ("ROUTER_MODEL_ID", "a\nPROXY_API_KEYS=evil"),
        ("ROUTER_MODEL_ID", "a\u2028b"),
        ("ROUTER_MODEL_ID", "a" * 20_000),
        ("PROXY_API_KEYS", "mine"),
        ("ADMIN_KEYS", "mine"),
        ("ROUTER_AUTH_FILE", "/etc/passwd"),
        ("LOG_PATH", "/root/.bashrc"),
        ("GROQ_API_KEYS", "x"),
        ("GROQ_SKIP_TOKENS_OVER", "many"),
        ("GROQ_BASE_URL", "file:///etc/passwd"),
        ("GROQ_BASE_URL", "http://me:secret@x.test"),
        ("GROQ_BASE_URL", "http://169.254.169.254/latest"),
        ("CODEX_TOKEN_URL", "http://169.254.169.254/latest"),
    ],
)
def test_settings_that_cannot_be_used(api, name, value):
    here = api(auth={"providers": {"groq": [NEW_KEY]}})
    param, text = here.fails(400, "POST", "settings", {"RESCUE": False, name: value})
    assert param == "".join(filter(str.isprintable, name))[:80] and text
    assert "secret" not in text
    assert here.hub.config.rescue is True, "all or nothing"


def test_a_variable_of_the_process_cannot_be_changed_here(api):
    here = api(MAX_STREAMS="50")
    told = here.fails(409, "POST", "settings", {"RESCUE": False, "MAX_STREAMS": 60})
    assert told[0] == "MAX_STREAMS" and "environment" in told[1]


def test_open_mode_is_not_for_a_router_that_everybody_reaches(api):
    here = api()
    here.hub.config = router.replace(here.hub.config, host="0.0.0.0")
    told = here.fails(400, "POST", "settings", {"AUTH_MODE": "open", "HOST": "127.0.0.1"})
    assert "loopback" in told[1]


def test_a_file_that_cannot_be_written_is_told(api, monkeypatch):
    here = api()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(router, "write_private", full)
    told = here.fails(500, "POST", "settings", {"RESCUE": False})
    assert "No space left" in told[1] and here.hub.config.rescue is True


# --- addresses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/v1", "http://169.254.1.1", "https://2852039166/", "http://0/v1",
        "http://0xA9.0xFE.0xA9.0xFE/", "http://0251.0376.0251.0376", "http://169.254.43518",
        "http://[::ffff:169.254.169.254]/v1", "http://[::ffff:a9fe:a9fe]", "http://[fe80::1]/",
        "http://[fd00:ec2::254]/", "http://0.0.0.0:80/v1", "http://[::]/", "http://[fe80::1%25eth0]/",
        "http://169.254.169.254./v1", "http://metadata.google.internal/v1", "http://METADATA/",
        "http://[64:ff9b::a9fe:a9fe]/", "http://[64:ff9b:1::a9fe:a9fe]/v1", "http://[::a9fe:a9fe]/v1",
        "http://[2002:a9fe:a9fe::]/", "http://192.0.0.192/v1", "http://100.100.100.200", "http://224.0.0.1",
        "ftp://x.test", "file:///x", "//x.test", "x.test", "", "http://", "http://u:p@x.test/v1",
        "http://x.test\n/", "http://x.test/?q=1", "http://x.test/#a", "http://ⅰ.test",
        "http://１６９.254.169.254/", "http://%31%36%39.254.169.254/",
    ],
)  # fmt: skip
def test_addresses_where_no_provider_is(url):
    with pytest.raises(ValueError) as told:
        router.safe_url(url)
    assert "169" not in str(told.value) and "u:p" not in str(told.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://api.groq.com/openai/v1", "http://localhost:11434/v1", "http://127.0.0.1:8000",
        "http://192.168.1.5/v1", "http://10.0.0.1", "http://[::1]:8080/v1", "http://gpu-box:8000/v1",
        "http://host.docker.internal:11434/v1", "https://x.test/a%20b/v1",
    ],
)  # fmt: skip
def test_addresses_where_one_may_be(url):
    assert router.safe_url(url) == url


@given(st.integers(0, 2**16 - 1), st.sampled_from(["{0}", "0x{0:x}", "0{0:o}", "::ffff:{1}"]))
def test_link_local_in_every_spelling(low, form):
    number = 169 << 24 | 254 << 16 | low
    quad = ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))
    host = form.format(number, quad)
    with pytest.raises(ValueError):
        router.safe_url(f"http://[{host}]/v1" if ":" in host else f"http://{host}/v1")


# --- keys of callers -------------------------------------------------------------------


def test_a_callers_key_from_its_making_to_its_end(api):
    here = api(auth={"proxy_keys": {"old-key-123456": {"future": 1}}})
    name = "<b>Ümit</b> 🙂"
    limits = {"rpm": 5, "req_per_day": 6, "tokens_per_day": 7, "cost_per_day": 0.5}
    made = here.post("proxy-keys", {"name": name, **limits, "allowed_providers": ["Google"]})
    key = made.pop("key")
    assert key.startswith("sk-router-") and here.code(key) == 200
    assert made == {
        "key_tail": key[-6:],
        "id": router.caller_id(key),
        "name": name,
        "admin": False,
        "limits": {**limits, **dict.fromkeys(router.CALLER_LIMITS.keys() - limits.keys())},
        "allowed_providers": ["gemini"],
        "restart_required": False,
    }
    listed = here.get("proxy-keys")["keys"]
    row = next(row for row in listed if row["key_tail"] == key[-6:])
    assert row["name"] == name and row["pending_restart"] is False
    assert row["usage"]["req_today"] == 0
    assert not SECRETS.search(json.dumps(listed))
    told = here.post(f"proxy-keys/{key[-6:]}", {"rpm": 50, "name": None})
    assert told["limits"]["rpm"] == 50 and told["limits"]["tokens_per_day"] == 7
    assert told["restart_required"] is False
    assert here.ask("GET", "settings", who=key).status_code == 403
    here.post(f"proxy-keys/{made['id']}", {"admin": True})
    assert here.ask("GET", "settings", who=key).status_code == 200
    told = here.delete(f"proxy-keys/{key[-6:]}")
    assert told == {"key_tail": key[-6:], "revoked": True, "restart_required": False}
    assert here.code(key) == 401
    assert here.auth["proxy_keys"] == {"old-key-123456": {"future": 1}}


def test_a_key_of_env_is_limited_and_revoked(api):
    here = api({"PROXY_API_KEYS": f"{GUEST},third-key-123", "ROUTER_SHARED_SECRET": GUEST})
    here.post(f"proxy-keys/{router.caller_id(GUEST)}", {"name": "guest", "rpm": 3})
    assert here.auth["proxy_keys"] == {GUEST: {"name": "guest", "rpm": 3}}
    here.delete(f"proxy-keys/{router.caller_id(GUEST)}")
    assert here.auth["proxy_keys"] == {} and here.code(GUEST) == 401
    assert here.env["PROXY_API_KEYS"] == "third-key-123" and "ROUTER_SHARED_SECRET" not in here.env
    assert here.code("third-key-123") == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rpm": "5"}, "rpm"),
        ({"rpm": -1}, "rpm"),
        ({"cost_per_day": "free"}, "cost_per_day"),
        ({"allowed_providers": ["nobody"]}, "allowed_providers"),
        ({"name": "x" * 81}, "name"),
        ({"name": "a\x00b"}, "name"),
        ({"admin": 1}, "admin"),
        ({"key": "my-own"}, "key"),
        ({"rate": 1}, "rate"),
    ],
)
def test_what_may_not_be_said_of_a_caller(api, body, param):
    here = api(auth={"proxy_keys": {"old-key-123456": {}}})
    for path in ("proxy-keys", "proxy-keys/123456"):
        assert here.fails(400, "POST", path, body)[0] == param
    assert here.fails(400, "POST", "proxy-keys/123456", {})[1]


def test_tails_that_mean_nobody_or_two(api):
    here = api(auth={"proxy_keys": {"key-a-same99": {}, "key-b-same99": {}}})
    for which in ("same99", "nobody", "9", "%20"):
        for method in ("POST", "DELETE"):
            here.fails(404, method, f"proxy-keys/{which}", {"rpm": 1} if method == "POST" else None)
    told = here.fails(404, "DELETE", "proxy-keys/same99")[1]
    assert router.caller_id("key-a-same99") in told
    here.delete(f"proxy-keys/{router.caller_id('key-a-same99')}")
    assert here.auth["proxy_keys"] == {"key-b-same99": {}}


def test_the_last_key_and_the_last_admin_stay(api):
    here = api({"ADMIN_KEYS": "", "PROXY_API_KEYS": ADMIN})
    told = here.fails(400, "DELETE", f"proxy-keys/{ADMIN[-6:]}")
    assert "last key" in told[1]
    key = here.post("proxy-keys", {"name": "second"})["key"]
    for method, body in (("DELETE", None), ("POST", {"admin": False})):
        told = here.fails(400, method, f"proxy-keys/{ADMIN[-6:]}", body)
        assert told[0] == "admin", "or the next key would become an admin"
    here.post(f"proxy-keys/{key[-6:]}", {"admin": True})
    assert here.ask("GET", "settings").status_code == 200, "who names an admin stays one"
    here.delete(f"proxy-keys/{ADMIN[-6:]}", who=key)
    assert (here.code(ADMIN), here.code(key)) == (401, 200)
    assert "PROXY_API_KEYS" not in here.env


def test_two_admins_who_revoke_each_other_leave_one(api):
    rows = {f"admin-{n}-123{n}": {"admin": True} for n in range(2)}
    for _ in range(5):
        here = api({"ADMIN_KEYS": "", "PROXY_API_KEYS": ""}, auth={"proxy_keys": rows})
        first, second = rows
        gate = threading.Barrier(2)

        def revoke(who, whom, here=here, gate=gate):
            gate.wait(10)
            path = f"proxy-keys/{router.caller_id(whom)}"
            return here.ask("DELETE", path, who=who).status_code

        with ThreadPoolExecutor(2) as pool:
            codes = [pool.submit(revoke, *pair) for pair in ((first, second), (second, first))]
            assert sorted(code.result(30) for code in codes)[0] == 200
        assert len(here.auth["proxy_keys"]) == 1


def test_a_key_of_the_process_cannot_be_revoked_here(api):
    here = api(PROXY_API_KEYS=f"{KEY},process-key-1")
    told = here.fails(409, "DELETE", "proxy-keys/ocess-key-1")
    assert "PROXY_API_KEYS" in told[1]


# --- restart ---------------------------------------------------------------------------


def test_a_router_that_cannot_restart_itself_says_so(api):
    here = api()
    (here.folder / ".env").write_text(f"ADMIN_KEYS={ADMIN}\nMAX_STREAMS=9\nWORKER_THREADS=3\n")
    told = here.post("restart", None)
    assert told["status"] == "reloaded" and "WORKER_THREADS" in told["message"]
    assert here.hub.config.max_streams == 9


def test_a_bad_configuration_is_not_restarted_into(api):
    here = api()
    with (here.folder / ".env").open("a") as file:
        file.write("MAX_STREAMS=many\n")
    assert "MAX_STREAMS" in here.fails(409, "POST", "restart")[1]


IMPORTED = "import router; raise SystemExit(router.main())"
POSIX = pytest.mark.skipif(os.name != "posix", reason="a process that takes its own place")


class Process:
    """A router as a process of its own, on a port that stays."""

    def __init__(self, folder, way=("router.py",), **settings):
        lines = {"ADMIN_KEYS": ADMIN, "PORT": str(free_port()), **settings}
        (folder / ".env").write_text("".join(f"{k}={v}\n" for k, v in lines.items()))
        env = {"PATH": os.environ["PATH"], "HR_HOME": str(folder)}
        command = [sys.executable, "-B", *way]
        self.child = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self.read)
        self.thread.start()
        self.url = f"http://127.0.0.1:{lines['PORT']}"
        self.session = requests.Session()  # whose connection stays open
        self.session.headers["Authorization"] = f"Bearer {ADMIN}"

    def read(self):
        self.lines.extend(iter(self.child.stderr.readline, ""))

    @property
    def text(self):
        return "".join(self.lines)

    def listens(self, times):
        until(lambda: self.text.count("listening on") == times, 60)

    def post(self, path, body=None):
        answer = self.session.post(f"{self.url}/v1/{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def close(self):
        self.session.close()
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait(30)
        self.thread.join(10)
        self.child.stderr.close()


@pytest.fixture
def process(tmp_path):
    made = []

    def start(**settings):
        made.append(Process(tmp_path, **settings))
        made[-1].listens(1)
        return made[-1]

    yield start
    for one in made:
        one.close()


@POSIX
@pytest.mark.parametrize("way", [("router.py",), ("-m", "router"), ("-c", IMPORTED, "serve")])
def test_a_real_process_begins_anew(process, way):
    here = process(way=way)
    assert here.post("config/settings", {"WORKER_THREADS": 5})["restart_required"] is True
    assert here.post("config/restart")["status"] == "restarting"
    here.listens(2)
    rows = here.session.get(f"{here.url}/v1/config/settings", timeout=60).json()
    assert rows["restart_required"] == []
    assert next(r["value"] for r in rows["settings"] if r["name"] == "WORKER_THREADS") == 5
    assert here.child.poll() is None, "the same process"
    here.child.send_signal(signal.SIGTERM)
    assert here.child.wait(30) == 0
    assert not SECRETS.search(here.text)


@POSIX
def test_a_port_that_somebody_else_has_is_not_restarted_into(process):
    here = process()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert here.post("config/settings", {"PORT": port})["restart_required"] is True
        refused = here.session.post(f"{here.url}/v1/config/restart", timeout=60)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "PORT"
        assert str(port) in refused.json()["error"]["message"]
    assert here.session.get(f"{here.url}/health", timeout=60).status_code == 200
    assert here.post("config/restart")["status"] == "restarting"  # it is free now
    here.listens(2)


@POSIX
def test_requests_under_way_end_before_it_begins_anew(process, upstream):
    up = upstream(Hang(60, chat("hello")))
    here = process(**provider("groq", up))
    body = {"model": "auto", "messages": HELLO}
    headers = {"Authorization": f"Bearer {ADMIN}"}
    url = f"{here.url}/v1/chat/completions"
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(requests.post, url, json=body, headers=headers, timeout=60)
        up.wait_for(1)
        here.post("config/restart")
        until(lambda: "stopping: 1 request" in here.text, 30)
        up.open_gate()
        assert under_way.result(30).status_code == 200
    here.listens(2)


@POSIX
def test_who_stops_it_while_it_begins_anew_is_obeyed(process, upstream):
    up = upstream(Hang(60, chat("hello")))
    here = process(**provider("groq", up))
    body = {"model": "auto", "messages": HELLO}
    headers = {"Authorization": f"Bearer {ADMIN}"}
    url = f"{here.url}/v1/chat/completions"
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(requests.post, url, json=body, headers=headers, timeout=60)
        up.wait_for(1)
        here.post("config/restart")
        until(lambda: "stopping: 1 request" in here.text, 30)
        here.child.send_signal(signal.SIGTERM)
        assert here.child.wait(30) == 0
        assert under_way.exception(30), "cut off"
    assert "restarting" not in here.text


# --- asking a provider again -----------------------------------------------------------

LONG = {"Retry-After": "86400"}
NOTHING_LEFT = {
    "x-ratelimit-limit-requests": "1000",
    "x-ratelimit-remaining-requests": "0",
    "x-ratelimit-reset-requests": "20h",
}


@pytest.mark.parametrize(
    "fault",
    [
        Reply(429, {"error": {"message": "limit of requests per day"}}, LONG),
        Reply(401, {"error": {"message": "invalid api key"}}),
        Reply(429, {"error": {"message": "slow down"}}, NOTHING_LEFT),
    ],
    ids=["day", "dead", "dry"],
)
def test_a_provider_is_asked_again_at_once(api, upstream, fault):
    up = upstream(fault, chat())
    here = api(provider("groq", up, "m1"), CACHE_TTL_SECONDS="0", KEY_RECHECK="0")
    for _ in range(2):
        assert asked(here) in (429, 503)
    assert len(up.requests) == 1
    told = here.delete("rests/groq")
    assert told == {"provider": "groq", "ended": 1, "restart_required": False}
    assert asked(here) == 200 and len(up.requests) == 2


def asked(here):
    headers = {"Authorization": f"Bearer {GUEST}"}
    url, body = f"{here.url}/v1/chat/completions", {"messages": HELLO}
    return requests.post(url, json=body, headers=headers, timeout=60).status_code


def test_its_breaker_is_closed(api, upstream):
    here = api(provider("groq", upstream(), "m1"))
    for _ in range(8):
        here.hub.breakers.note("groq", False)
    assert here.hub.breakers.is_open("groq")
    assert here.delete("rests/groq")["ended"] == 0
    assert here.hub.breakers.bucket("groq") == 0 and not here.hub.breakers.is_open("groq")


def test_what_the_settings_allow_holds_on_when_a_provider_is_asked_again(api, upstream):
    up = upstream(good())
    here = api(provider("groq", up, "m1"), GROQ_RPD="2", CACHE_TTL_SECONDS="0")
    assert [asked(here) for _ in range(3)] == [200, 200, 429]
    here.delete("rests/groq")
    assert asked(here) == 429 and len(up.requests) == 2


def test_who_is_no_provider_does_not_rest(api):
    assert "nobody" in api().fails(400, "DELETE", "rests/nobody")[1]
