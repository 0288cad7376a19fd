"""Commands that change keys, models and limits: what they write, and what they never say."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import sys
import threading

import pytest
from conftest import program
from upstream import EMPTY_LIST, Reply, good, provider

import router

GROQ = "gsk_Zq0123456789abcdefXY"
OTHER = "gsk_Qz9876543210fedcbaYX"


class Done:
    """How a command ended."""

    def __init__(self, status, said):
        self.status, self.out, self.err = status, said.out, said.err


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "the home"
    path.mkdir()
    return path


@pytest.fixture
def call(monkeypatch, capsys, home):
    """call("word", ..., stdin="", SETTING=value): one command in this process."""

    def run(*words, stdin="", **settings):
        env = {"HR_HOME": str(home), "HOME": str(home), "PORT": "0", **settings}
        monkeypatch.setattr(os, "environ", env)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = router.main(words)
        except SystemExit as stop:  # argparse
            status = stop.code
        return Done(status, capsys.readouterr())

    return run


def auth(home):
    return json.loads((home / "auth.json").read_text())


def dotenv(home):
    return router.read_dotenv(home / ".env")


# --- auth add -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["groq", "GROQ"])
def test_keys_from_a_pipe(call, home, name):
    done = call("auth", "add", name, stdin=f"# mine\n{GROQ}\n\n{OTHER}\n{GROQ}\n")
    assert done.status == 0, done.err
    assert auth(home) == {"providers": {"groq": [GROQ, OTHER]}}
    assert stat.S_IMODE((home / "auth.json").stat().st_mode) == 0o600
    assert "already stored" in done.err and "groq now has 2 keys" in done.err
    assert GROQ not in done.out + done.err


ALIASES = {
    "google": "gemini", "or": "openrouter", "samba": "sambanova", "github": "github_models",
    "glm": "zai", "z.ai": "zai", "nim": "nvidia", "hf": "huggingface",
    "hugging_face": "huggingface", "moonshot": "kimi", "zen": "opencode",
    "opencode_zen": "opencode", "opencodego": "opencode_go", "opencode-go": "opencode_go",
    "go": "opencode_go", "gpt": "openai", "claude": "anthropic",
}  # fmt: skip


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(call, home, alias):
    assert call("auth", "add", alias, stdin="a-key-0123456789").status == 0
    assert list(auth(home)["providers"]) == [ALIASES[alias]]


def test_keys_from_a_variable_and_a_file(call, home, tmp_path):
    path = tmp_path / "keys of mine.txt"
    path.write_text(f"{OTHER}\n")
    assert call("auth", "add", "groq", "--from-env", "MINE", MINE=GROQ).status == 0
    assert call("auth", "add", "groq", "--file", str(path)).status == 0
    assert call("auth", "add", "groq", "--file", "-", stdin="third-key-0123456789").status == 0
    assert auth(home)["providers"]["groq"] == [GROQ, OTHER, "third-key-0123456789"]


@pytest.mark.parametrize(
    ("words", "stdin", "told"),
    [
        (("nobody",), GROQ, "unknown provider"),
        (("grok-q",), GROQ, "unknown provider"),
        (("groqq",), GROQ, "did you mean groq"),
        (("groq",), "", "no key"),
        (("groq",), "two words", "printable"),
        (("groq", "--from-env", "NOTHING"), "", "NOTHING"),
        (("groq", "--file", "/nowhere/at/all"), "", "cannot be read"),
        (("codex",), GROQ, "import-codex"),
        (("cloudflare",), GROQ, "CLOUDFLARE_ACCOUNT_ID"),
    ],
)
def test_what_is_not_stored(call, home, words, stdin, told):
    done = call("auth", "add", *words, stdin=stdin)
    assert (done.status, done.out) == (1, "")
    assert told in done.err
    assert not (home / "auth.json").exists() or "providers" not in auth(home)


def test_a_key_as_an_argument_is_refused_and_not_repeated(call, home):
    done = call("auth", "add", "groq", "Zq9f8e7d6c5b4a39281706f5e4d3c2b1")
    assert done.status == 2 and "never an argument" in done.err
    assert "Zq9f8e7d" not in done.err and not (home / "auth.json").exists()


def test_a_key_is_shown_to_its_provider_first(call, home, upstream):
    def answer(request):
        if request.key == GROQ:
            return Reply(200, EMPTY_LIST)
        return Reply(401, {"error": {"message": f"Invalid API Key {request.key}"}})

    up = upstream(answer)
    up.on_get = answer
    settings = {"GROQ_BASE_URL": f"{up.url}/v1"}
    done = call("auth", "add", "groq", "--check", stdin=f"{GROQ}\n{OTHER}\n", **settings)
    assert done.status == 1, "one of them was refused"
    assert auth(home)["providers"]["groq"] == [GROQ]
    assert "accepts this key" in done.err
    assert "refuses this key (HTTP 401)" in done.err and "Invalid API Key" in done.err
    assert OTHER not in done.err


def test_a_provider_that_cannot_be_reached_does_not_hinder(call, home):
    settings = {"GROQ_BASE_URL": "http://127.0.0.1:9/v1"}
    done = call("auth", "add", "groq", "--check", stdin=GROQ, **settings)
    assert done.status == 0 and "no answer from 127.0.0.1:9" in done.err
    assert auth(home)["providers"]["groq"] == [GROQ]


def test_a_broken_file_is_never_written(call, home):
    (home / "auth.json").write_text('{"providers": {"groq": ["a"]},\n oops')
    done = call("auth", "add", "groq", stdin=GROQ)
    assert done.status == 1 and "line 2" in done.err
    assert (home / "auth.json").read_text().endswith("oops")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write")
def test_a_read_only_folder_is_told(call, home):
    home.chmod(0o500)
    try:
        done = call("auth", "add", "groq", stdin=GROQ)
        assert done.status == 1 and "cannot be written" in done.err
        assert call("mode", "seq").status == 1
    finally:
        home.chmod(0o700)


def test_many_writers_lose_nothing(home):
    """Ten processes at once, each with a key of its own and a line of .env."""
    env = {"PATH": os.environ["PATH"], "HR_HOME": str(home), "HOME": str(home)}
    failed = []

    def add(n):
        for words, text in (
            (("auth", "add", "groq"), f"gsk_key_number_{n:010}"),
            (("model", "set", router.PROVIDERS[n].name, f"model-{n}"), ""),
        ):
            done = subprocess.run(
                program(*words),
                input=text, env=env, capture_output=True, text=True, timeout=90,
            )  # fmt: skip
            if done.returncode:
                failed.append(done.stderr)

    threads = [threading.Thread(target=add, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(set(auth(home)["providers"]["groq"])) == 10
    assert len([name for name in dotenv(home) if name.endswith("_MODEL")]) == 10


# --- auth list, remove, check -------------------------------------------------


def test_list_says_where_each_key_stands(call, home):
    (home / ".env").write_text(f"GROQ_API_KEY={OTHER}\n")
    call("auth", "add", "groq", stdin=GROQ)
    settings = {"MISTRAL_API_KEYS": "mistral-0123456789,mistral-9876543210"}
    done = call("auth", "list", **settings)
    assert done.status == 0
    rows = [line.split() for line in done.out.splitlines()]
    assert ["groq", "…cdefXY", "auth.json"] in rows
    assert ["groq", "…cbaYX", "GROQ_API_KEY"] in rows or ["groq", "…dcbaYX", "GROQ_API_KEY"] in rows
    assert ["mistral", "…543210", "MISTRAL_API_KEYS"] in rows
    assert GROQ not in done.out and OTHER not in done.out
    listed = json.loads(call("auth", "list", "--json", **settings).out)
    assert [row["provider"] for row in listed] == ["groq", "groq", "mistral", "mistral"]


def test_list_of_nothing_is_a_hint(call):
    done = call("auth", "list")
    assert (done.status, done.out) == (0, "") and "auth add" in done.err


def test_remove_takes_a_key_out_of_where_it_stands(call, home):
    (home / ".env").write_text(f"# mine\nGROQ_API_KEYS={OTHER},gsk_third_0123456789\nHOST=::1\n")
    call("auth", "add", "groq", stdin=GROQ)
    assert call("auth", "remove", "groq").status == 2, "which one?"
    assert call("auth", "remove", "groq", "cdefXY").status == 0
    assert auth(home)["providers"]["groq"] == []
    assert call("auth", "remove", "groq", "-", stdin=OTHER).status == 0
    assert dotenv(home) == {"GROQ_API_KEYS": "gsk_third_0123456789", "HOST": "::1"}
    assert call("auth", "remove", "groq").status == 0, "the only one left"
    assert (home / ".env").read_text() == "# mine\nHOST=::1\n"
    assert call("auth", "remove", "groq", "cdefXY").status == 1


@pytest.mark.parametrize("words", [("auth", "remove", "groq", "-"), ("keys", "revoke", "-")])
def test_no_name_removes_nothing(call, home, words):
    """An empty line where a key should be named, even where there is only one or the first."""
    settings = f"GROQ_API_KEYS={OTHER},{GROQ}\nPROXY_API_KEYS=sk-one-0123456,sk-two-0123456\n"
    (home / ".env").write_text(settings)
    done = call(*words, stdin="\n")
    assert done.status == 1 and "no key was named" in done.err
    assert (home / ".env").read_text() == settings


def test_a_key_of_the_environment_cannot_be_removed(call):
    done = call("auth", "remove", "groq", "cdefXY", GROQ_API_KEY=GROQ)
    assert done.status == 1 and "GROQ_API_KEY is set in the environment" in done.err


def test_check_asks_every_provider(call, upstream):
    up, fine = upstream(good()), upstream(good())
    up.on_get = lambda request: Reply(401, {"error": {"message": "no such key"}})
    settings = {**provider("groq", up, keys=GROQ), **provider("mistral", fine, keys=OTHER)}
    done = call("auth", "check", "--json", **settings)
    rows = {row["provider"]: row for row in json.loads(done.out)}
    assert done.status == 1
    assert (rows["groq"]["standing"], rows["mistral"]["standing"]) == ("dead", "valid")
    assert "no such key" in rows["groq"]["text"]
    done = call("auth", "check", "mistral", **settings)
    assert done.status == 0 and "groq" not in done.out


# --- auth import-codex --------------------------------------------------------

TOKENS = {"account_id": "acc-1", "access_token": "at-1", "refresh_token": "rt-1"}


def test_import_of_a_sign_in(call, home):
    folder = home / ".codex"
    folder.mkdir()
    signed = {"tokens": TOKENS, "last_refresh": "2026-11-20T00:00:00Z"}
    (folder / "auth.json").write_text(json.dumps(signed))
    call("auth", "add", "groq", stdin=GROQ)
    done = call("auth", "import-codex")
    assert done.status == 0 and "added" in done.err
    stored = auth(home)
    assert stored["providers"] == {"groq": [GROQ]}
    assert [row["refresh_token"] for row in stored["codex_accounts"]] == ["rt-1"]
    signed["tokens"] = {**TOKENS, "refresh_token": "rt-2"}
    (folder / "auth.json").write_text(json.dumps(signed))
    done = call("auth", "import-codex")
    assert "up to date" in done.err
    assert [row["refresh_token"] for row in auth(home)["codex_accounts"]] == ["rt-2"]
    assert "rt-2" not in done.out + done.err
    assert "codex" in call("auth", "list").out
    assert call("auth", "remove", "codex").status == 0
    assert auth(home)["codex_accounts"] == []


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"tokens": {"account_id": "x"}}'])
def test_no_sign_in(call, home, text):
    folder = home / "codex home"
    folder.mkdir()
    if text is not None:
        (folder / "auth.json").write_text(text)
    done = call("auth", "import-codex", CODEX_HOME=str(folder))
    assert done.status == 1
    assert not (home / "auth.json").exists()


# --- models and mode ----------------------------------------------------------


def test_models_of_a_provider(call, home):
    settings = {"GROQ_API_KEY": GROQ}
    assert call("model", "set", "groq", "a-model", "b-model", **settings).status == 0
    assert dotenv(home) == {"GROQ_MODEL": "a-model,b-model"}
    again = call("model", "set", "groq", "a-model,b-model", **settings)
    assert again.status == 0 and "already" in again.err
    listed = json.loads(call("model", "list", "--json", **settings).out)
    assert listed == [{"provider": "groq", "models": ["a-model", "b-model"], "source": "override"}]
    assert call("model", "reset", "groq", **settings).status == 0
    assert dotenv(home) == {}
    assert "default" in call("model", "list", **settings).out


@pytest.mark.parametrize("name", ["huggingface", "hf", "ollama", "chatgpt"])
def test_every_provider_has_a_model(call, home, name):
    assert call("model", "set", name, "some/model:1b").status == 0, name
    assert list(dotenv(home).values()) == ["some/model:1b"]


@pytest.mark.parametrize("words", [("nobody", "m"), ("groq", "a model"), ("groq", "a;b")])
def test_models_that_are_none(call, home, words):
    done = call("model", "set", *words)
    assert done.status == 1 and not (home / ".env").exists()


def test_a_setting_of_the_environment_wins_and_that_is_said(call):
    done = call("model", "set", "groq", "m", GROQ_MODEL="other")
    assert "GROQ_MODEL is also set in the environment" in done.err


@pytest.mark.parametrize("word", ["sequential", "seq", "drain", "SEQ"])
def test_mode(call, home, word):
    assert call("mode").out == "round-robin\n"
    assert call("mode", word).status == 0
    assert dotenv(home) == {"ROTATION_MODE": "sequential"}
    for show in ("show", "list", "status"):
        assert call("mode", show).out == "sequential\n"
    for back in ("rr", "round_robin", "roundrobin", "round-robin"):
        call("mode", word)
        assert call("mode", back).status == 0
        assert dotenv(home) == {}, "the default needs no line"
    assert call("mode", "sideways").status == 1


def test_a_setting_that_cannot_be_is_not_written(call, home):
    (home / ".env").write_text("HOST=127.0.0.1\n")
    done = call("model", "set", "groq", ",")
    assert done.status == 2 and (home / ".env").read_text() == "HOST=127.0.0.1\n"


# --- features -----------------------------------------------------------------


def test_features(call, home):
    rows = {r["name"]: r for r in json.loads(call("features", "list", "--json").out)["addons"]}
    assert not rows["metrics_auth"]["enabled"] and rows["request_log"]["enabled"]
    assert call("features", "enable", "metrics_auth").status == 0
    assert call("features", "disable", "request_log").status == 0
    assert dotenv(home) == {"METRICS_REQUIRE_AUTH": "1", "REQUEST_LOG_SIZE": "0"}
    out = call("features", "list").out
    assert re.search(r"metrics_auth +on", out) and re.search(r"request_log +off", out)
    (home / ".env").write_text("FAST_ROUTE_THRESHOLD=77\n")
    assert call("features", "enable", "fast_routing").status == 0
    assert dotenv(home) == {"FAST_ROUTE_THRESHOLD": "77"}, "on already, at a value of its own"


@pytest.mark.parametrize(
    ("name", "told"),
    [("nothing", "metrics_auth"), ("dashboard", "browser"), ("local_model", "LOCAL")],
)
def test_what_is_not_turned_on(call, home, name, told):
    done = call("features", "enable", name)
    assert done.status == 1 and told in done.err and not (home / ".env").exists()


# --- keys and limits of callers -----------------------------------------------


def test_keys_of_callers(call, home):
    made = call(
        "keys",
        "new",
        "--name",
        "laptop",
        "--only",
        "groq,hf",
        "--rpm",
        "60",
        "--privacy",
        "no-train",
    )
    key = made.out.strip()
    assert made.status == 0 and key.startswith("sk-router-") and key not in made.err
    assert auth(home)["proxy_keys"][key] == {
        "name": "laptop",
        "allowed_providers": ["groq", "huggingface"],
        "rpm": 60,
        "privacy": "no-train",
    }
    rows = {row["name"]: row for row in json.loads(call("keys", "list", "--json").out)}
    assert rows["laptop"]["providers"] == ["groq", "huggingface"]
    assert not rows["laptop"]["admin"], "the first key stays the admin's"
    assert sum(row["admin"] for row in rows.values()) == 1
    assert key not in call("keys", "list").out
    assert call("keys", "revoke", "laptop").status == 0
    assert auth(home)["proxy_keys"] == {}


def test_the_older_word_for_import_codex(call, home):
    done = call("auth", "codex", "--file", str(home / "nowhere.json"))
    assert done.status == 1 and "codex login" in done.err


def test_an_admin(call, home):
    key = call("keys", "new", "--name", "boss", "--admin").out.strip()
    assert auth(home)["proxy_keys"][key]["admin"] is True
    rows = json.loads(call("keys", "list", "--json").out)
    assert [row["name"] for row in rows if row["admin"]] == ["boss"]
    other = call("keys", "list", "--json", ADMIN_KEYS=key, ROUTER_SHARED_SECRET="shared-0123456789")
    places = {row["name"]: row["from"] for row in json.loads(other.out)}
    assert places["boss"] == "ADMIN_KEYS, auth.json"
    assert "ROUTER_SHARED_SECRET" in places.values()


@pytest.mark.parametrize(
    "words",
    [("--only", "nobody"), ("--rpm", "many"), ("--rpm", "-1"), ("--name", "x" * 81)],
    ids=" ".join,
)
def test_keys_that_are_not_made(call, home, words):
    done = call("keys", "new", *words)
    assert done.status in (1, 2) and done.out == ""
    assert not (home / "auth.json").exists() or auth(home).get("proxy_keys") in (None, {})


def test_the_last_key_stays(call, home):
    (home / ".env").write_text("PROXY_API_KEYS=sk-router-only-0123456789\n")
    done = call("keys", "revoke", "456789")
    assert done.status == 1 and "last key" in done.err
    assert call("keys", "new").status == 0
    done = call("keys", "revoke", "456789")
    assert done.status == 1 and "admin" in done.err, "or the other one would become it"
    key = call("keys", "new", "--admin").out.strip()
    assert call("keys", "revoke", "456789").status == 0
    assert dotenv(home) == {} and key in auth(home)["proxy_keys"]


def test_a_key_with_limits_is_revoked_in_both_places(call, home):
    (home / ".env").write_text("PROXY_API_KEYS=sk-router-aaa-0123456789,sk-router-bbb-9876543210\n")
    call("limit", "set", "543210", "--rpm", "5")
    assert call("keys", "revoke", "543210").status == 0
    assert dotenv(home) == {"PROXY_API_KEYS": "sk-router-aaa-0123456789"}
    assert auth(home)["proxy_keys"] == {}


def test_limits(call, home):
    (home / ".env").write_text("PROXY_API_KEYS=sk-router-aaa-0123456789\n")
    listed = call("limit", "list")
    none = "rpm=∞ req/day=∞ tokens/day=∞ cost/day=∞ streams=∞"
    assert listed.out == f"…456789 (key1): {none}\nusual (PROXY_LIMIT_...): {none}\n"
    words = ("--rpm", "60", "--req-day", "1000", "--tokens-day", "2000000", "--cost-day", "1.5")
    done = call("limit", "set", "456789", *words)
    assert done.status == 0, done.err
    row = {"rpm": 60, "req_per_day": 1000, "tokens_per_day": 2_000_000, "cost_per_day": 1.5}
    assert auth(home)["proxy_keys"] == {"sk-router-aaa-0123456789": row}
    assert stat.S_IMODE((home / "auth.json").stat().st_mode) == 0o600
    assert "rpm=60 req/day=1000 tokens/day=2000000 cost/day=1.5" in call("limit", "list").out
    assert call("limit", "set", "key1", "--rpm", "none").status == 0, "by name, one of them"
    assert "rpm=∞ req/day=1000" in call("limit", "list").out
    assert "rpm=7 req/day=1000" in call("limit", "list", PROXY_LIMIT_RPM="7").out
    call("limit", "set", "key1", "--rpm", "0", "--streams", "2")
    shown = json.loads(call("limit", "list", "--json", PROXY_LIMIT_RPM="7").out)
    assert (shown["keys"][0]["rpm"], shown["keys"][0]["streams"], shown["usual"]["rpm"]) == (
        0,
        2,
        7,
    )
    by_pipe = call("limit", "clear", "-", stdin="sk-router-aaa-0123456789\n")
    assert by_pipe.status == 0
    assert call("limit", "list").out == listed.out


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("456789",), 2),
        (("456789", "--rpm"), 2),
        (("456789", "--rpm", "ten"), 1),
        (("456789", "--rpm", "1.5"), 1),
        (("456789", "--cost-day", "nan"), 1),
        (("456789", "--cost-day", "-1"), 1),
        (("nobody", "--rpm", "1"), 1),
        (("456789", "--rps", "1"), 2),
    ],
)
def test_limits_that_are_none(call, home, words, status):
    (home / ".env").write_text("PROXY_API_KEYS=sk-router-aaa-0123456789\n")
    done = call("limit", "set", *words)
    assert done.status == status, done.err
    assert "Traceback" not in done.err and not (home / "auth.json").exists()


# --- config show --------------------------------------------------------------


def test_settings_and_where_each_comes_from(call, home):
    (home / ".env").write_text("ROTATION_MODE=sequential\nGROQ_API_KEY=" + GROQ + "\n")
    done = call("config", "show", "--json", "--all", TTFT_TIMEOUT="9", PROXY_API_KEYS=OTHER)
    told = json.loads(done.out)
    rows = {row["name"]: (row["value"], row["source"]) for row in told["settings"]}
    assert rows["ROTATION_MODE"] == ("sequential", ".env")
    assert rows["TTFT_TIMEOUT"] == (9.0, "environment")
    assert rows["CONNECT_TIMEOUT"] == (10.0, "default")
    assert rows["PROXY_API_KEYS"] == ([OTHER[-6:]], "environment")
    assert told["providers"][0]["keys"] == "1 from GROQ_API_KEY"
    assert GROQ not in done.out and OTHER not in done.out
    short = call("config", "show")
    assert "ROTATION_MODE" in short.out and "CONNECT_TIMEOUT" not in short.out
