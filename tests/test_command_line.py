"""Command line: the real program, its exit codes and words; no secret anywhere it speaks."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest
import requests
from conftest import program
from upstream import AUTH, HELLO, Reply, Stream, delta, good, provider

import router

COMMANDS = [command.name for command in router.COMMANDS if command.run]


@pytest.fixture
def env(tmp_path):
    """env(SETTING=value, ...): the whole environment of a router.py process."""

    def make(**settings):
        kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
        return {**kept, "HR_HOME": str(tmp_path), "PORT": "0", **settings}

    return make


@pytest.fixture
def run(env, tmp_path):
    """run("word", ..., SETTING=value): router.py as a process, run to its end."""

    def start(*words, **settings):
        return subprocess.run(
            program(*words),
            env=env(**settings),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return start


@pytest.fixture
def running(launch):
    """running(SETTING=value, ...): a router that serves, without a key for callers."""
    return functools.partial(launch, PROXY_API_KEYS=None)


@contextlib.contextmanager
def answering(raw: bytes):
    """A server on loopback that answers every connection with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    with sock:
                        sock.recv(65_536)
                        sock.sendall(raw)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def http(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
        status.encode(),
        len(body),
        body,
    )


def calm(done):
    """No traceback, whatever happened."""
    assert "Traceback" not in done.stderr, done.stderr
    return done


# --- words -----------------------------------------------------------------------------


def test_version(run):
    done = run("version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"hermes-router {router.__version__}\n"


def test_commands_are_listed_and_each_is_in_the_help(run):
    done = run("commands")
    assert (done.returncode, done.stdout.splitlines()) == (0, COMMANDS)
    for words in (("help",), ("--help",)):
        told = run(*words)
        assert told.returncode == 0 and all(name.split()[0] in told.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", ["env", "configuration", "providers"])
def test_docs(run, name):
    done = run("docs", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == router.DOCUMENTS[name]()


@pytest.mark.parametrize(
    "words",
    [
        ("serve", "now"),
        ("check", "--fast"),
        ("docs",),
        ("docs", "poetry"),
        ("status", "--url"),
        ("key", "1"),
        ("version", "-x"),
    ],
    ids=" ".join,
)
def test_wrong_words(run, words):
    done = calm(run(*words))
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("sevre", "unknown command sevre; did you mean serve?"),
        ("xyzzy", "help` lists them"),
        ("--port 1", "unknown command 1"),
        ("auth", "auth add|list|remove|check|import-codex|providers"),
        ("limit xyzzy", "unknown command xyzzy; list, set, clear"),
        ("sk-proj-0123456789abcdefghijklmnop", "[redacted]"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(run, words, told):
    done = calm(run(*words.split()))
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr and "klmnop" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_words_that_print_need_no_good_configuration(run):
    for words in (("version",), ("commands",), ("docs", "env"), ("help",)):
        assert run(*words, PORT="x").returncode == 0


# --- check -----------------------------------------------------------------------------


def test_check_says_what_is_used(run, tmp_path):
    done = run("check", GROQ_API_KEY="gsk_0123456789abcdef", PROXY_API_KEYS="sk-caller-0123456789")
    assert done.returncode == 0 and "groq" in done.stdout
    assert "gsk_0123456789abcdef" not in done.stdout + done.stderr
    assert "sk-caller-0123456789" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == [], "checking changes nothing"


def test_check_says_that_nothing_is_configured(run):
    done = run("check")
    assert done.returncode == 0 and "echo" in done.stdout


def test_check_tells_warnings(run):
    done = run("check", ROTATION_MODE="sideways")
    assert done.returncode == 0 and "ROTATION_MODE" in done.stderr


@pytest.mark.parametrize("word", ["check", "serve", "key", "status"])
def test_every_bad_setting_is_named_at_once(run, tmp_path, word):
    (tmp_path / ".env").write_text("BREAKER_WINDOW=wide # a comment\n")
    bad = {"PORT": "http", "TTFT_TIMEOUT": "soon", "AUTH_MODE": "shut", "WORKER_THREADS": "0"}
    done = calm(run(word, **bad))
    assert (done.returncode, done.stdout) == (1, "")
    for name in (*bad, "BREAKER_WINDOW"):
        assert f"{name}=" in done.stderr
    assert len(done.stderr.splitlines()) == 1 + len(bad) + 1


def test_a_url_with_a_password_is_refused_without_repeating_it(run):
    settings = {"GROQ_API_KEY": "k" * 20, "GROQ_BASE_URL": "http://me:hunter2@127.0.0.1/v1"}
    done = calm(run("check", **settings))
    assert done.returncode == 1 and "GROQ_BASE_URL" in done.stderr
    assert "hunter2" not in done.stderr


def test_a_url_that_is_none_is_named(run):
    done = calm(run("check", GROQ_API_KEY="k" * 20, GROQ_BASE_URL="http://[::1"))
    assert done.returncode == 1 and "GROQ_BASE_URL" in done.stderr


# --- key -------------------------------------------------------------------------------


def test_key_prints_the_first_one(run, tmp_path):
    done = run("key", PROXY_API_KEYS=" one , two")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\n", "")
    assert not (tmp_path / ".env").exists()


def test_key_makes_one_when_there_is_none_and_keeps_it(run, tmp_path):
    first, second = run("key"), run("key")
    assert first.returncode == 0 and first.stdout.startswith("sk-router-")
    assert second.stdout == first.stdout
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert first.stdout.strip() in (tmp_path / ".env").read_text()


def test_key_of_an_open_router(run):
    done = run("key", AUTH_MODE="open")
    assert (done.returncode, done.stdout) == (1, "") and "open" in done.stderr


def test_key_prints_none_that_no_router_knows(monkeypatch, capsys, tmp_path):
    """The .env file is there but cannot be replaced: a key made now would be no router's."""
    (tmp_path / ".env").write_text("HOST=127.0.0.1\n")
    monkeypatch.setattr(os, "environ", {"HR_HOME": str(tmp_path)})
    monkeypatch.setattr(router, "write_private", read_only)
    assert router.main(["key"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and ".env" in said.err


def read_only(*_):
    raise OSError(30, "Read-only file system")


def test_a_new_key_that_could_not_be_kept_is_shown(monkeypatch, capsys, tmp_path):
    (tmp_path / ".env").write_text("HOST=127.0.0.1\n")
    monkeypatch.setattr(router, "write_private", read_only)
    config, made = router.with_proxy_key(router.Config.from_env({"HR_HOME": str(tmp_path)}))
    router.show_new_key(config, made)
    assert made in capsys.readouterr().err, "or nobody can ever use this router"


# --- serve -----------------------------------------------------------------------------


def test_serve_is_what_no_word_means_and_the_first_start_makes_a_key(running, run, tmp_path):
    served = running()
    key = run("key").stdout.strip()
    assert key.startswith("sk-router-") and key in (tmp_path / ".env").read_text()
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert key not in served.text
    done = run("status", "--url", served.url)
    assert done.returncode == 0 and "echo" in done.stdout
    assert served.stop() == 0
    assert "Traceback" not in served.text and key not in served.text


def test_a_home_that_cannot_be_written_is_a_warning(running, tmp_path):
    (tmp_path / "file").write_text("")
    served = running("serve", HR_HOME=str(tmp_path / "file" / "home"))
    key = re.search(r"sk-router-\S+", served.text)
    assert key and served.text.count(key[0]) == 1, "shown once: nothing else can tell it"
    assert "could not be written" in served.text
    assert served.stop() == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_read_only_home_is_a_warning(running, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o500)
    served = running("serve", HR_HOME=str(home))
    assert "could not be written" in served.text


def test_a_busy_port_is_told(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = calm(run("serve", PORT=port, PROXY_API_KEYS="k"))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in done.stderr
    assert "set PORT" in done.stderr


@pytest.mark.parametrize("host", ["no-such-host.invalid", "999.1.1.1", "203.0.113.7"])
def test_an_address_that_is_not_ours_is_told(run, host):
    done = calm(run("serve", HOST=host, PROXY_API_KEYS="k"))
    assert done.returncode == 1
    assert f"cannot listen on {host}" in done.stderr


def test_a_router_that_can_only_refuse_warns(running):
    served = running(PROXY_API_KEYS="k", ECHO_FALLBACK="0")
    assert "[WARNING] no provider can be asked" in served.lines[0]


@pytest.mark.parametrize("level", ["ERROR", "critical"])
def test_a_log_level_hides_all_but_the_address(running, level):
    served = running(LOG_LEVEL=level, PROXY_API_KEYS="k")
    assert len(served.lines) == 1
    assert served.stop() == 0


def test_the_first_lines_tell_the_settings(running):
    keys = {"GROQ_API_KEYS": "gsk_0123456789abcdef", "GEMINI_API_KEYS": "AIza0123456789abcdef"}
    settings = {"CACHE_PERSIST": "1", "FAST_ROUTE_THRESHOLD": "500", "ROTATION_MODE": "sequential"}
    served = running(PROXY_API_KEYS="k", HOST="0.0.0.0", **keys, **settings)
    told = [line.partition("[INFO] ")[2].rstrip() for line in served.lines]
    assert told == [
        "providers: gemini, groq",
        "embeddings: gemini (gemini-embedding-001)",
        "cache: 300 s, 100 answers (persistent)",
        "fast routing: below 500 tokens",
        "rotation: sequential",
        "largest requests, in tokens: groq 5500",
        f"dashboard: http://localhost:{served.url.rpartition(':')[2]}/dashboard",
        "serving with waitress",
        f"listening on {served.url}",
    ]


# --- status ----------------------------------------------------------------------------


def test_status_of_a_running_router(running, run):
    keys = "gsk_0123456789abcdef,gsk_fedcba9876543210"
    settings = {"PROXY_API_KEYS": "k", "GROQ_API_KEYS": keys, "GROQ_MODEL": "m1,m2"}
    served = running(**settings)
    done = run("status", "--url", served.url + "/", PROXY_API_KEYS="k")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"groq +3 Good +✅ ok +2/2 +- +0 +0 +0 +m1", done.stdout)
    done = run("status", "--json", "--url", served.url, PROXY_API_KEYS="k")
    assert [row["key_tail"] for row in json.loads(done.stdout)["providers"]["groq"]["keys"]] == [
        "abcdef",
        "543210",
    ]
    done = run("status", "--url", served.url, PROXY_API_KEYS="wrong")
    assert (done.returncode, done.stdout) == (1, "") and "401" in done.stderr
    served.stop()
    done = calm(run("status", "--url", served.url, PROXY_API_KEYS="k"))
    assert (done.returncode, done.stdout) == (3, "")


@pytest.mark.parametrize("url", ["foo", "localhost:1", "http://", "http://a b", "http://[::1"])
def test_status_of_no_address(run, url):
    done = calm(run("status", "--url", url))
    assert (done.returncode, done.stdout) == (3, "") and done.stderr


@pytest.mark.parametrize(
    "raw",
    [b"SSH-2.0-x\r\n", b"", http(b"<html>"), http(b"[]"), http(b"{}"), http(b'{"providers": 3}')],
    ids=["no http", "nothing", "html", "list", "empty object", "another's status"],
)
def test_status_of_something_else(run, raw):
    with answering(raw) as url:
        done = calm(run("status", "--url", url))
    assert (done.returncode, done.stdout) == (3, "") and done.stderr


def test_status_does_not_carry_the_key_to_another_host(run, upstream):
    other = upstream(good())
    moved = http(b"", f"302 Found\r\nLocation: {other.url}/v1/status")
    with answering(moved) as url:
        run("status", "--url", url, PROXY_API_KEYS="sk-caller-0123456789")
    assert not any("authorization" in request.headers for request in other.gets)


# --- GET /v1/status and /metrics -------------------------------------------------------


def test_status_has_the_members_people_read(upstream, make_app):
    app = make_app(**provider("groq", upstream(good()), "m1", "m2", keys="gsk_0123456789abcdef"))
    client = app.test_client()
    asked = {"model": "hermes-router", "messages": HELLO}
    assert client.post("/v1/chat/completions", headers=AUTH, json=asked).status_code == 200
    status = client.get("/v1/status", headers=AUTH).json
    row = status["providers"]["groq"]
    assert {
        "keys", "stats", "breaker", "tokens", "cost_usd", "rating", "model", "models",
        "model_caps", "available", "supports_tools", "reasoning", "skip_if_tokens_over",
        "max_output_tokens",
    } <= set(row)  # fmt: skip
    assert {"key_tail", "status", "ready_in", "requests"} <= set(row["keys"][0])
    assert set(row["stats"]) >= {"avg_latency_ms", "error_rate", "total_requests", "errors"}
    assert row["latency_ms"] == row["stats"]["avg_latency_ms"] > 0
    assert set(row["breaker"]) == {"open", "opens_in_s", "recent_health_fails"}
    assert {"model", "rating", "supports_tools", "reasoning"} <= set(row["model_caps"][0])
    assert (row["tokens"], row["stats"]["total_requests"], row["keys"][0]["requests"]) == (10, 1, 1)
    assert set(status["fast_routing"]) == {"enabled", "threshold_tokens", "fast_providers"}
    fast = status["fast_routing"]["fast_providers"]
    assert fast == ["cerebras", "groq", "mistral", "sambanova"]
    assert status["rotation"] == {"mode": "round-robin"}
    assert status["circuit_breaker"] == {
        "window": 8, "min_samples": 4, "error_rate": 0.5, "cooldown_s": 60.0
    }  # fmt: skip


def test_no_error_rate_or_latency_before_the_first_request(upstream, make_app):
    app = make_app(**provider("groq", upstream(good())))
    row = app.test_client().get("/v1/status", headers=AUTH).json["providers"]["groq"]
    assert row["stats"] == {
        "avg_latency_ms": None, "error_rate": 0.0, "total_requests": 0, "errors": 0
    }  # fmt: skip


def test_large_counters_keep_every_digit(make_app, upstream):
    app = make_app(**provider("groq", upstream(good())))
    place = router.Place(0, "", "groq")
    app.extensions["router"].usage.spent(place, router.Tokens(12_345_678, 1), 0.0)
    text = app.test_client().get("/metrics").text
    assert 'hermes_router_tokens_total{provider="groq"} 12345679\n' in text


def test_metrics_are_well_formed(make_app, upstream):
    app = make_app(**provider("groq", upstream(good())))
    for line in app.test_client().get("/metrics").text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? \S+', line)


def test_a_failing_model_with_many_keys_does_not_take_its_siblings_along(upstream, make_app):
    """Four keys, four 500s of one model: the provider's other model still answers."""

    def answer(request):
        return Reply(500, {}) if request.model == "bad" else good()(request)

    up = upstream(answer)
    app = make_app(**provider("groq", up, "bad", "fine", keys="k1,k2,k3,k4"))
    asked = {"model": "bad", "messages": HELLO}
    got = app.test_client().post("/v1/chat/completions", headers=AUTH, json=asked)
    assert (got.status_code, got.headers.get("X-Hermes-Model")) == (200, "fine")


def test_keys_not_used_because_a_breaker_is_open_are_not_counted(upstream, make_app):
    both = {**provider("groq", upstream(Reply(500, {}))), **provider("mistral", upstream(good()))}
    app = make_app(**both)
    state = app.extensions["router"]
    for _ in range(4):
        state.breakers.note("groq", False)
    asked = {"model": "groq/m1", "messages": HELLO}
    app.test_client().post("/v1/chat/completions", headers=AUTH, json=asked)
    assert state.keys.snapshot("groq", ("m1",))[0]["requests"] == 0


# --- secrets ---------------------------------------------------------------------------

CALLER = "sk-caller-Zq0123456789"
# One key per shape: with a well-known prefix, without any, short.
SECRETS = ["gsk_Zq0123456789abcdefXY", "Zq9f8e7d6c5b4a39281706f5e4d3c2b1", "Zq-short"]


def tells(key: str):
    """A provider that repeats the key in every way it can find."""
    words = f"Incorrect API key provided: {key}. Bearer {key} https://x.test/?key={key}"
    # Where a long text is cut short, most of the key stands just before the cut.
    long = {"error": {"message": "x" * (602 - len(key)) + f" {key}"}}
    return {
        "401": Reply(401, {"error": {"message": words}}),
        "429": Reply(429, {"error": {"message": words}}),
        "500 html": Reply(500, f"<html><title>{words}</title></html>"),
        "500 text": Reply(500, words),
        "400": Reply(400, {"error": {"message": words}}),
        "400 long": Reply(400, long),
        "404": Reply(404, {"detail": words}),
        "200 error": Reply(200, {"error": {"message": words, "code": 500}}),
        "200 no choices": Reply(200, {"message": words}),
        "200 text": Reply(200, words),
        "stream error": Stream(chunks=[{"error": {"message": words}}]),
        "late error": Stream(chunks=[delta(content="hi"), {"error": {"message": words}}]),
    }


@pytest.mark.parametrize("case", tells(""))
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_a_provider_repeats_of_a_key_is_told_nobody(upstream, make_app, caplog, case, stream):
    caplog.set_level(logging.DEBUG)

    def answer(request):
        return tells(request.key)[case]

    up = upstream(answer)
    app = make_app(**provider("groq", up, keys=",".join(SECRETS)), PROXY_API_KEYS=CALLER)
    client = app.test_client()
    headers = {"Authorization": f"Bearer {CALLER}"}
    asked = {"model": "hermes-router", "messages": HELLO, "stream": stream}
    said = []
    for _ in SECRETS:
        got = client.post("/v1/chat/completions", headers=headers, json=asked)
        said.append(got.text + str(got.headers))
    said += [client.get(path, headers=headers).text for path in ("/v1/status", "/metrics")]
    said += [client.get(path, headers=headers).text for path in ("/health", "/v1/models", "/")]
    assert up.requests
    for name, text in (("answers", "\n".join(said)), ("log", caplog.text)):
        for secret in (*SECRETS, CALLER):
            assert secret not in text, (name, secret)
            assert secret[:-6] not in text, (name, secret, "but for its end")


@pytest.mark.parametrize("path", ["/v1/status", "/v1/models", "/nowhere", "/v1/chat/completions"])
def test_a_wrong_credential_is_repeated_nowhere(make_app, upstream, caplog, path):
    caplog.set_level(logging.DEBUG)
    client = make_app(**provider("groq", upstream(good()))).test_client()
    for headers in ({"Authorization": f"Bearer {CALLER}"}, {"x-api-key": CALLER}):
        got = client.get(path, headers=headers)
        assert got.status_code == 401
        assert CALLER not in got.text + str(got.headers) + caplog.text


def test_a_crash_tells_the_client_nothing_and_the_log_no_key(
    make_app, upstream, caplog, monkeypatch
):
    app = make_app(**provider("groq", upstream(good()), keys=SECRETS[1]), PROXY_API_KEYS=CALLER)

    def fail(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(app.extensions["router"].upstream, "_try", fail)
    client, headers = app.test_client(), {"Authorization": f"Bearer {CALLER}"}
    asked = {"model": "hermes-router", "messages": HELLO}
    got = client.post("/v1/chat/completions", headers=headers, json=asked)
    assert got.status_code == 500 and "a fault of ours" not in got.text
    assert "a fault of ours" in caplog.text
    assert SECRETS[1] not in caplog.text and CALLER not in caplog.text


def test_a_whole_run_says_no_key(running, run, upstream, tmp_path):
    up = upstream(lambda request: tells(request.key)["401"])
    stored = {"providers": {"groq": SECRETS}}
    Path(tmp_path / "auth.json").write_text(json.dumps(stored))
    settings = {"GROQ_BASE_URL": f"{up.url}/v1", "GROQ_MODEL": "m", "PROXY_API_KEYS": CALLER}
    served = running(LOG_LEVEL="DEBUG", **settings)
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {CALLER}"
        asked = {"model": "hermes-router", "messages": HELLO}
        got = session.post(f"{served.url}/v1/chat/completions", json=asked, timeout=60)
    table = run("status", "--url", served.url, **settings)
    assert table.returncode == 0 and "groq" in table.stdout
    served.stop()
    for text in (served.text, got.text, table.stdout + table.stderr):
        assert not any(secret in text for secret in (*SECRETS, CALLER))
