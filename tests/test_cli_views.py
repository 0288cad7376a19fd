"""Commands that look: status, logs, why, doctor, bench; completion and the printed commands."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from upstream import EMPTY_LIST, KEY, Reply, good, provider

import router

GROQ = "gsk_Zq0123456789abcdefXY"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call("word", ..., SETTING=value): one command in this process: (status, out, err)."""

    def run(*words, **settings):
        env = {"HR_HOME": str(tmp_path), "HOME": str(tmp_path), "PROXY_API_KEYS": KEY, **settings}
        monkeypatch.setattr(os, "environ", env)
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        try:
            status = router.main(words)
        except SystemExit as stop:  # argparse
            status = stop.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def live(upstream, serve):
    """A router before two scripted providers, of which the first one is limited."""
    limited = upstream(lambda request: Reply(429, {"error": {"message": "slow down"}}))
    settings = {
        **provider("groq", limited, keys=GROQ),
        **provider("mistral", upstream(good()), keys="mistral-0123456789"),
    }
    return serve(**settings)


# --- status -------------------------------------------------------------------


def row(**changes):
    """A provider of /v1/status that fares well, but for the changes."""
    base = {
        "keys": [{"status": "ready", "ready_in": 0}],
        "stats": {"avg_latency_ms": 12.3, "error_rate": 0.0, "total_requests": 3, "errors": 0},
        "breaker": {"open": False, "opens_in_s": 0, "recent_health_fails": 0},
        "out_of_use": None, "available": True, "tokens": 10, "cost_usd": 0.5, "rating": 2,
        "model": "m1",
    }  # fmt: skip
    return base | changes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "✅ ok"),
        ({"breaker": {"open": True, "opens_in_s": 9}}, "⨂ open (probes in 9s)"),
        ({"available": False}, "⚠ unavailable"),
        ({"out_of_use": "retired"}, "⚠ not used"),
        ({"keys": [{"status": "cooling", "ready_in": 7.2}]}, "⚠ cooling (7s)"),
        ({"stats": {**row()["stats"], "error_rate": 0.1}}, "⚠ degraded"),
        ({"stats": {**row()["stats"], "error_rate": 0.09}}, "✅ ok"),
    ],
)
def test_health_in_words(changes, told):
    assert router.health_of(row(**changes)) == told


def test_better_providers_stand_first_and_columns_are_straight(live, call):
    status, out, _ = call("status", "--url", live.url)
    assert status == 0
    lines = out.splitlines()
    at = lines[1].index("MODEL")
    table = lines[2:4]
    assert sorted(line.split()[0] for line in table) == ["groq", "mistral"]
    for line in table:  # a sign that takes two columns of a terminal moves what follows
        assert line[at - line.count("✅") :].startswith("m1")
    assert "rotation round-robin" in lines[4] and "breaker opens at 50% of 8" in lines[4]


def test_status_for_scripts(live, call):
    status, out, _ = call("status", "--json", "--url", live.url)
    assert status == 0 and set(json.loads(out)["providers"]) == {"groq", "mistral"}


def test_the_status_of_no_router(call):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    status, out, err = call("status", PORT=port)
    assert (status, out) == (3, "") and "connection refused" in err


# --- logs and why -------------------------------------------------------------


def test_one_request_is_listed_and_explained(live, call):
    answer = live.chat(model="groq/m1")
    assert answer.status_code == 200
    id = answer.headers["X-Request-ID"]
    status, out, _ = call("logs", "--url", live.url)
    assert status == 0
    assert re.search(rf"200 success +chat +key1 +mistral/m1 +\d+ ms +7\+3 +{id}", out), out
    status, out, _ = call("logs", "--json", "--limit", "1", "--url", live.url)
    assert [entry["id"] for entry in json.loads(out)["entries"]] == [id]
    status, out, _ = call("why", id, "--url", live.url)
    assert status == 0
    assert out.startswith(f"{id}: 200 success after ") and "answered by mistral/m1, 7+3" in out
    assert "asked for groq/m1: named provider/model, difficulty" in out
    assert re.search(r"^CANDIDATES +OUTCOME +WHY\ngroq/m1 +rate_limited +named", out, re.M), out
    assert re.search(r"^groq/m1 +\S+ +rate_limited +429 +[\d.]+", out, re.M), out
    status, out, _ = call("why", id, "--json", "--url", live.url)
    assert json.loads(out)["id"] == id


def test_what_is_not_remembered(live, call):
    status, out, err = call("why", "req_nothing", "--url", live.url)
    assert (status, out) == (1, "") and err.startswith("nothing is remembered of req_nothing; `")
    status, _, err = call("logs", "--status", "strange", "--url", live.url)
    assert status == 1 and "400" in err
    status, out, err = call("logs", "--provider", "nobody", "--url", live.url)
    assert (status, out) == (0, "") and "no request" in err


def test_a_tree_of_anything():
    value = {
        "id": "r1", "cost": 0.25, "none": None, "flag": True, "names": ["a", "b"], "empty": [],
        "steps": [{"provider": "y", "inner": {"a": [1, {"b": 2}]}}, {"provider": "x", "ok": False}],
    }  # fmt: skip
    assert list(router.tree(value)) == [
        "id: r1",
        "cost: 0.25",
        "none: -",
        "flag: yes",
        "names: a, b",
        "empty: none",
        "steps:",
        "  -",
        "    provider: y",
        "    inner:",
        "      a:",
        "        - 1",
        "        - b 2",
        "  - provider x, ok no",
    ]


def test_control_characters_of_others_do_not_reach_the_terminal():
    assert "\033" not in "".join(router.tree({"model": "evil\033[2J"}))
    assert "\033" not in "".join(router.log_cells({"model": "evil\033[2J", "ts": "\033c"}))


# --- doctor -------------------------------------------------------------------


def findings(out):
    found: dict[str, list[dict]] = {}
    for finding in json.loads(out)["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return found


def test_a_healthy_house(live, call, tmp_path):
    (tmp_path / ".env").write_text("# fine\nHOST=127.0.0.1\n")
    (tmp_path / ".env").chmod(0o600)
    status, out, _ = call("doctor", GROQ_API_KEY=GROQ, PORT=str(live.port))
    assert status == 0, out
    assert "nothing is wrong" in out and f"the router answers at {live.url}" in out
    assert GROQ not in out


def test_everything_wrong_is_named_with_its_remedy(call, tmp_path):
    (tmp_path / ".env").write_text("TTFT_TIMEOUT=soon\nnot a setting\n")
    (tmp_path / ".env").chmod(0o644)
    (tmp_path / "auth.json").write_text('{"providers":\n oops')
    (tmp_path / "auth.json").chmod(0o600)
    status, out, _ = call("doctor", "--json")
    assert status == 1
    found = findings(out)
    wrong = {name for name, rows in found.items() if any(r["health"] == "bad" for r in rows)}
    assert wrong == {".env", "auth.json", "settings", "file modes"}
    assert "line 2" in found[".env"][0]["text"] and "line 2" in found["auth.json"][0]["text"]
    assert "not a setting" not in out, "a line may hold a secret"
    assert all(r["remedy"] for rows in found.values() for r in rows if r["health"] == "bad")
    status, out, _ = call("doctor")
    assert status == 1 and "[✗] file modes: .env may be read by others (644)" in out
    assert "problem" in out


def test_no_provider_is_a_problem(call):
    status, out, _ = call("doctor", "--json", PORT="0")
    bad = [r for rows in findings(out).values() for r in rows if r["health"] == "bad"]
    assert status == 1 and [r["check"] for r in bad] == ["providers"]


def test_keys_of_the_environment_count(call):
    status, out, _ = call("doctor", "--json", PORT="0", MISTRAL_API_KEYS="a-key-1,a-key-2")
    assert status == 0
    assert findings(out)["providers"][0]["text"] == "mistral: 2 keys from MISTRAL_API_KEYS"


def test_another_program_on_the_port(call):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        status, out, _ = call("doctor", "--json", PORT=str(port), GROQ_API_KEY=GROQ)
    assert status == 1
    assert findings(out)["port"][0]["text"] == f"port {port} is taken by another program"


def test_keys_are_shown_to_their_providers_on_demand(call, upstream):
    up = upstream(good())
    up.on_get = lambda request: Reply(401, {"error": {"message": "who are you"}})
    settings = {**provider("groq", up, keys=GROQ), "PORT": "0"}
    assert call("doctor", **settings)[0] == 0 and not up.gets
    status, out, _ = call("doctor", "--live", **settings)
    assert status == 1 and "who are you" in out and GROQ not in out
    up.on_get = lambda request: Reply(200, EMPTY_LIST)
    assert call("doctor", "--live", **settings)[0] == 0


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write")
def test_a_read_only_home_is_a_problem(call, tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    status, out, _ = call("doctor", "--json", HR_HOME=str(home), GROQ_API_KEY=GROQ, PORT="0")
    assert status == 1 and findings(out)["folder"][0]["health"] == "bad"


def test_two_services_are_a_problem(call, tmp_path):
    for folder in (tmp_path / "units", tmp_path / ".config/systemd/user"):
        folder.mkdir(parents=True)
        (folder / "hermes-router.service").touch()
    settings = {"HR_SYSTEM_UNITS": str(tmp_path / "units"), "GROQ_API_KEY": GROQ, "PORT": "0"}
    status, out, _ = call("doctor", "--json", **settings)
    assert status == 1 and "two services" in findings(out)["boot"][0]["text"]


# --- bench --------------------------------------------------------------------


def test_bench(live, call):
    words = ("bench", "--requests", "6", "--parallel", "3", "--url", live.url)
    status, out, err = call(*words, "--json")
    assert status == 0, err
    told = json.loads(out)
    assert (told["requests"], told["failed"], told["answered_by"]) == (6, 0, {"mistral": 6})
    assert 0 < told["first_event_ms"]["p50"] <= told["whole_answer_ms"]["p95"]
    assert "count against your quotas" in err
    assert "p95" in call(*words)[1]
    entries = json.loads(call("logs", "--url", live.url, "--json")[1])["entries"]
    assert {entry["status"] for entry in entries} == {"success"}, "the cache is not timed"


def test_bench_of_failures(serve, call):
    live = serve()
    status, out, _ = call("bench", "--requests", "2", "--url", live.url, "--json")
    told = json.loads(out)
    assert status == 1 and told["failed"] == 2
    assert list(told["problems"])[0].startswith("503")


@pytest.mark.parametrize(
    "words", [("--requests", "0"), ("--requests", "1e9"), ("--parallel", "65")]
)
def test_bench_is_bounded(call, words):
    assert call("bench", *words)[0] == 2


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, 0), ([3], 0.95, 3), ([4, 1, 3, 2], 0.5, 2), (list(range(1, 101)), 0.95, 95)],
)
def test_percentiles(values, share, expected):
    assert router.percentile(values, share) == expected


@pytest.fixture
def alone(tmp_path):
    """router.py without the script hr beside it, as in a container: alone("word", ...)."""
    shutil.copy2(ROOT / "router.py", tmp_path / "router.py")

    def run(*words):
        return subprocess.run(
            [sys.executable, "-B", str(tmp_path / "router.py"), *words],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PORT": "1"},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return run


def test_without_hr_beside_it_nobody_is_sent_to_hr(alone):
    for words in (("doctor",), ("auth", "list"), ("bench",), ("nonsense",), ("status",)):
        done = alone(*words)
        assert not re.search(r"\bhr\b", done.stdout + done.stderr), done
    assert "python router.py auth add <provider>" in alone("doctor").stdout


def test_side_by_side_is_in_order_and_a_failure_is_the_callers():
    assert router.side_by_side(lambda n: n * n, range(50), 4) == [n * n for n in range(50)]
    assert router.side_by_side(str, [], 4) == []
    with pytest.raises(IndexError):
        router.side_by_side([1, 2].__getitem__, [0, 5, 1], 2)


# --- the table of commands ----------------------------------------------------


def test_every_row_has_its_words_and_its_group_before_it():
    seen: set[str] = set()
    for command in router.COMMANDS:
        *group, _ = command.name.split()
        assert command.name not in seen and (not group or group[0] in seen), command.name
        assert len(group) <= 1 and command.help
        seen.add(command.name)


def test_what_deals_with_processes_is_told_to_be_hrs(call):
    for command in router.COMMANDS:
        if command.hr and command.run:
            status, out, err = call(*command.name.split(), "--what", "-d", "ever")
            assert (status, out) == (2, "") and "hr" in err, command.name


def test_every_command_of_hr_is_a_row():
    script = (ROOT / "hr").read_text(encoding="utf-8")
    own = set(re.findall(r"^cmd_(\w+)\(\)", script, re.M))
    rows = {command.name.split()[0] for command in router.COMMANDS}
    assert own <= rows


def complete_bash(*words):
    script = router.completion_bash() + (
        f"\nCOMP_WORDS=({' '.join(words)})\nCOMP_CWORD={len(words) - 1}\n_hermes_router\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("hr", "do"), ["doctor", "docs"]),
        (("hr", "auth", "re"), ["remove"]),
        (("hr", "auth", "add", "gr"), ["groq"]),
        (("hr", "auth", "add", "groq", "--fr"), ["--from-env"]),
        (("hr", "connect", "--dry-run", "cl"), ["claude-code"]),
        (("hr", "service", "in"), ["install"]),
        (("hr", "nothing", "x"), []),
    ],
)
def test_completion_in_bash(words, expected):
    assert complete_bash(*words) == expected


def test_completion_in_other_shells(call):
    for shell, mark in (("zsh", "bashcompinit"), ("fish", "complete -c hr"), ("bash", "compgen")):
        status, out, _ = call("completion", shell)
        assert status == 0 and mark in out and "import-codex" in out
        if shutil.which(shell):
            done = subprocess.run([shell, "-n"], input=out, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert call("completion", "tcsh")[0] == 2


def test_a_pipe_that_closes_early_is_no_crash(tmp_path):
    command = f'"{sys.executable}" -B "{ROOT / "router.py"}" docs configuration | head -n 1'
    env = {"PATH": os.environ["PATH"], "HR_HOME": str(tmp_path)}
    done = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True)
    assert done.stdout.startswith("# Configuration") and "Traceback" not in done.stderr


def test_a_terminal_that_cannot_show_signs(tmp_path):
    env = {"PATH": os.environ["PATH"], "HR_HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-B", str(ROOT / "router.py"), "doctor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and "[?] python" in done.stdout
