"""The wizard and hidden questions, in real pseudo-terminals, on a scratch home."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
import requests
from conftest import program
from upstream import EMPTY_LIST, Reply, chat_stream, good, until

pexpect = pytest.importorskip("pexpect")
pytest.importorskip("pty", reason="pseudo-terminals are POSIX")

from terminals import Terminal, heeding_ctrl_c  # noqa: E402

KEY = "gsk_Zq0123456789abcdefXY"
WRONG = "gsk_Wrong0123456789abcd"

NEXT, HIDDEN, AGAIN = "Which provider", "Enter API key", "Add another key"
QUESTION, CLIENT = "Ask it one short question", "Set up a client"


def guard(request):
    """A provider's list of models: for holders of the right key."""
    if request.key == KEY:
        return Reply(200, EMPTY_LIST)
    return Reply(401, {"error": {"message": "Invalid API Key"}})


@pytest.fixture
def place(tmp_path, upstream):
    """A home in a path with spaces, and a scripted Groq."""
    up = upstream(good())
    up.on_get = guard
    home = tmp_path / "a home"
    home.mkdir()
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HR_HOME": str(home),
        "TERM": "xterm",
        "LANG": "C.UTF-8",
        "GROQ_BASE_URL": f"{up.url}/v1",
        "PORT": "0",
    }
    made = Place(home, env, up)
    with heeding_ctrl_c():
        yield made
    for terminal in made.terminals:
        terminal.close()


class Place:
    def __init__(self, home: Path, env: dict[str, str], up) -> None:
        self.home, self.env, self.up = home, env, up
        self.terminals: list[Terminal] = []

    def open(self, *words, **env):
        """A terminal in which the command runs."""
        self.terminals.append(Terminal(program(*words), self.env | env, self.home))
        return self.terminals[-1]

    def ended(self, terminal) -> int:
        status = terminal.ended()
        assert terminal.is_sane
        return status

    @property
    def keys(self):
        path = self.home / "auth.json"
        return json.loads(path.read_text())["providers"] if path.exists() else {}

    def check_whole(self):
        """Nothing half-written lies about, and what there is can be read and is private."""
        for path in self.home.iterdir():
            assert path.name in (
                ".env", "auth.json", ".env.lock", ".auth.json.lock", ".claude", "router.log",
            ), path  # fmt: skip
            if path.is_file():
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        done = subprocess.run(
            program("check"),
            env=self.env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.fixture
def running(place):
    """A router that serves this home; its settings name the port."""
    yield from serving(place, GROQ_API_KEY=KEY)


@pytest.fixture
def echoing(place):
    """The same before any key of a provider is there."""
    yield from serving(place)


def serving(place, **env):
    process = subprocess.Popen(
        program("serve"),
        env=place.env
        | {
            "GROQ_MODEL": "m1",
            **env,
            "PROXY_API_KEYS": "sk-mine-12345",
            "USAGE_DB_PATH": "",
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = next(line for line in process.stderr if "listening on" in line)
    place.env |= {
        "PORT": re.search(r":(\d+)$", line.strip())[1],
        "PROXY_API_KEYS": "sk-mine-12345",
    }
    yield place
    process.terminate()
    process.stderr.read()
    process.wait(30)
    process.stderr.close()


# --- the wizard ---------------------------------------------------------------


def test_from_nothing_to_settings_with_the_real_key(running):
    running.up.script = lambda request: chat_stream("ok")
    at = running.open("setup")
    at.expect(NEXT)
    at.sendline("list")
    at.expect("gemini")
    at.expect(NEXT)
    at.sendline("groq")
    at.expect("console.groq.com")
    at.expect(HIDDEN)
    at.sendline(KEY)
    at.expect("accepts this key")
    at.expect("groq now has 1 key")
    at.expect(AGAIN)
    at.sendline("")
    at.expect(NEXT)
    at.sendline("")
    at.expect("The router is running already")
    at.expect("The router answers at http://127.0.0.1:")
    at.expect(QUESTION)
    at.sendline("y")
    at.expect("groq answered in")
    at.expect(r"OpenAI base URL +http://127\.0\.0\.1:\d+/v1")
    at.expect("Key +sk-mine-12345")
    at.expect(CLIENT)
    at.sendline("claude-code")
    at.expect("wrote")
    at.expect(CLIENT)
    at.sendline("")
    at.expect("Done")
    assert running.ended(at) == 0
    assert running.keys == {"groq": [KEY]}
    settings = json.loads((running.home / ".claude/settings.json").read_text())
    assert settings["env"]["ANTHROPIC_AUTH_TOKEN"] == "sk-mine-12345"
    running.check_whole()


def test_the_question_waits_until_a_running_router_knows_the_new_key(echoing):
    at = echoing.open("setup")
    at.expect(NEXT)
    at.sendline("groq")
    at.expect(HIDDEN)
    at.sendline(KEY)
    at.expect("groq now has 1 key\r")
    at.expect(AGAIN)
    at.sendline("")
    at.expect(NEXT)
    at.sendline("")
    at.expect(QUESTION)
    at.sendline("y")
    at.expect("groq answered in")
    at.expect(CLIENT)
    at.sendline("clod")
    at.expect("unknown client: clod")
    at.expect(CLIENT)
    at.sendline("")
    assert echoing.ended(at) == 0


def test_an_answer_of_the_echo_is_not_taken_for_a_providers(echoing):
    at = echoing.open("setup")
    at.expect(NEXT)
    at.sendline("")
    at.expect(QUESTION)
    at.sendline("y")
    at.expect("no provider is configured")
    at.expect(CLIENT)
    at.sendline("")
    assert echoing.ended(at) == 0


def test_what_is_typed_is_hidden(place):
    at = place.open("auth", "add", "groq")
    at.expect(HIDDEN)
    at.sendline(KEY)
    at.expect("accepts this key")
    assert KEY not in at.before
    at.expect(AGAIN)
    at.sendline("n")
    assert place.ended(at) == 0
    assert place.keys == {"groq": [KEY]}


def test_a_wrong_key_is_told_in_the_providers_words_and_not_kept(place):
    at = place.open("setup", "--no-start")
    at.expect(NEXT)
    at.sendline("groq")
    at.expect(HIDDEN)
    at.sendline(WRONG)
    at.expect(r"refuses this key \(HTTP 401\): Invalid API Key")
    at.expect("Keep it anyway")
    at.sendline("")
    at.expect("not stored")
    at.expect(AGAIN)
    at.sendline("y")
    at.expect(HIDDEN)
    at.sendline(KEY)
    at.expect("accepts")
    at.expect(AGAIN)
    at.sendline("n")
    at.expect(NEXT)
    at.sendline("")
    at.expect("not running yet")
    at.expect(CLIENT)
    at.sendline("")
    assert place.ended(at) == 0
    assert place.keys == {"groq": [KEY]}
    assert WRONG not in (place.home / "auth.json").read_text()


def test_without_a_network(place):
    at = place.open("setup", "--no-start", GROQ_BASE_URL="http://127.0.0.1:9/v1")
    at.expect(NEXT)
    at.sendline("groq")
    at.expect(HIDDEN)
    at.sendline(KEY)
    at.expect("no answer from 127.0.0.1:9")
    at.expect("groq now has 1 key")
    at.expect(AGAIN)
    at.sendline("")
    at.expect(NEXT)
    at.sendline("")
    at.expect(CLIENT)
    at.sendline("")
    assert place.ended(at) == 0


def test_it_may_be_run_again_and_every_step_skipped(place):
    (place.home / "auth.json").write_text(json.dumps({"providers": {"groq": [KEY]}, "mine": 1}))
    (place.home / "auth.json").chmod(0o600)
    before = (place.home / "auth.json").read_text()
    for _ in range(2):
        at = place.open("setup", "--no-start")
        at.expect("You have 1 key")
        at.expect("Add keys for another provider")
        at.sendline("")
        at.expect(CLIENT)
        at.sendline("")
        assert place.ended(at) == 0
    assert (place.home / "auth.json").read_text() == before
    assert (place.home / ".env").read_text().count("PROXY_API_KEYS") == 1
    place.check_whole()


def test_a_name_that_is_no_provider_is_asked_again(place):
    at = place.open("setup", "--no-start")
    at.expect(NEXT)
    at.sendline("grok-something")
    at.expect("unknown provider")
    at.expect(NEXT)
    at.sendline("cloudflare")
    at.expect("CLOUDFLARE_ACCOUNT_ID")
    at.sendline("not an id")
    at.expect("nothing was stored")
    at.expect(NEXT)
    at.sendline("codex")
    at.expect("codex login")
    at.expect(NEXT)
    at.sendline("local")
    at.expect("Address of the server")
    at.sendline("")
    at.expect("Name of its model")
    at.sendline("qwen3:8b")
    at.expect(NEXT)
    at.sendline("")
    at.expect(CLIENT)
    at.sendline("")
    assert place.ended(at) == 0
    assert "LOCAL_MODEL=qwen3:8b" in (place.home / ".env").read_text()


# Each row: what is asked and answered, until the question at which Ctrl-C is pressed.
WALK = (
    (NEXT, "groq"),
    (HIDDEN, WRONG),
    ("Keep it anyway", "n"),
    (AGAIN, "y"),
    (HIDDEN, KEY),
    (AGAIN, ""),
    (NEXT, ""),
    (QUESTION, "n"),
    (CLIENT, "claude-code"),
    (CLIENT, ""),
)


@pytest.mark.parametrize("stop", range(len(WALK)))
def test_ctrl_c_at_every_question(running, stop):
    at = running.open("setup")
    for question, answer in WALK[:stop]:
        at.expect(question)
        at.sendline(answer)
    at.expect(WALK[stop][0])
    at.sendintr()
    at.expect("what was stored stays")
    assert running.ended(at) == 1
    assert running.keys == ({"groq": [KEY]} if stop > 4 else {})
    running.check_whole()


def test_the_end_of_the_input(place):
    at = place.open("setup", "--no-start")
    at.expect(NEXT)
    at.sendeof()
    at.expect("the input ended")
    assert place.ended(at) == 1
    place.check_whole()


# --- without a person ---------------------------------------------------------


def run(place, *words, stdin="", **env):
    return subprocess.run(
        program(*words),
        input=stdin, env=place.env | env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_setup_without_a_terminal_asks_for_yes(place):
    done = run(place, "setup")
    assert done.returncode == 2 and "--yes" in done.stderr


def test_setup_without_questions(place):
    lines = "mistral mistral-0123456789\nGROQ_API_KEY=gsk_from_a_line_01234\n"
    words = ("setup", "--yes", "--stdin", "--no-start")
    done = run(place, *words, stdin=lines, GROQ_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert place.keys == {
        "groq": [KEY, "gsk_from_a_line_01234"],
        "mistral": ["mistral-0123456789"],
    }
    key = re.search(r"Key +(\S+)", done.stdout)[1]
    assert f"PROXY_API_KEYS={key}" in (place.home / ".env").read_text()
    again = run(place, *words)
    assert again.returncode == 0 and f"Key                 {key}" in again.stdout


@pytest.mark.parametrize("line", ["nobody k-0123456789", "groq", "groq two words"])
def test_lines_that_are_no_keys(place, line):
    done = run(place, "setup", "--yes", "--stdin", "--no-start", stdin=line)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert place.keys == {}


def test_a_bad_configuration_is_told_first(place):
    done = run(place, "setup", "--yes", TTFT_TIMEOUT="soon")
    assert done.returncode == 1 and "TTFT_TIMEOUT" in done.stderr


def test_a_running_router_takes_what_commands_write(running):
    """No restart: a key that is added is used, a caller's key that is made is let in."""
    url = f"http://127.0.0.1:{running.env['PORT']}"
    session = requests.Session()
    session.trust_env = False
    done = run(running, "auth", "add", "mistral", stdin="mistral-0123456789")
    assert done.returncode == 0, done.stderr
    until(lambda: "mistral" in session.get(f"{url}/health", timeout=10).json()["providers"], 20)
    made = run(running, "keys", "new", "--name", "guest").stdout.strip()
    headers = {"Authorization": f"Bearer {made}"}
    until(lambda: session.get(f"{url}/v1/models", headers=headers, timeout=10).ok, 20)
    assert run(running, "keys", "revoke", "guest").returncode == 0
    until(lambda: not session.get(f"{url}/v1/models", headers=headers, timeout=10).ok, 20)
    session.close()


# --- other commands in a terminal ---------------------------------------------


def test_the_live_view_refreshes_until_ctrl_c(running):
    at = running.open("status", "--watch", "0.5")
    for _ in range(2):
        at.expect("hermes-router")
        at.expect("groq")
        at.expect("Ctrl-C ends it")
    at.sendintr()
    assert running.ended(at) == 0


def test_colour_only_for_people(running):
    at = running.open("status")
    at.expect(pexpect.EOF)
    assert "\033[32m" in at.before
    at = running.open("status", NO_COLOR="1")
    at.expect(pexpect.EOF)
    assert "\033[" not in at.before
    at = running.open("status", TERM="dumb")
    at.expect(pexpect.EOF)
    assert "\033[" not in at.before
    assert "\033[" not in run(running, "status").stdout
