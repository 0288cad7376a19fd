"""The real Claude Code, Codex and Node SDKs, from their npm packages, before a scripted provider.

They run when they are installed, and are skipped when not:

    cp tests/package.json tests/package-lock.json FOLDER && npm ci --prefix FOLDER
    HERMES_TEST_CLIS=FOLDER ./hr test tests/test_agent_clis.py

Without HERMES_TEST_CLIS the programs are looked for on PATH (the SDKs are not). Nothing leaves
this machine: every program gets an environment and a home of its own, and a router on loopback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import program
from test_every_pair import USED, WEATHER, WIRES, Said, asked, settings_of, speak, tools_of
from upstream import KEY, Reply, Request

FOLDER = os.environ.get("HERMES_TEST_CLIS", "")
LIMIT = 90  # seconds for one run of a program; it takes one to three
TASK = "create file hello.txt with hi"
WHY = "I shall write it."  # reasoning that a provider gives with its tool call


def find(name: str) -> str:
    """The program's path, or "" if it is not installed."""
    if FOLDER:
        path = Path(FOLDER).resolve() / "node_modules" / ".bin" / name
        return str(path) if path.exists() else ""
    return shutil.which(name) or ""


def needs(name: str) -> pytest.MarkDecorator:
    why = f"{name} is not installed (see the top of this file)"
    return pytest.mark.skipif(not find(name), reason=why)


@dataclass
class Run:
    """How a program ended: its exit status and all it printed."""

    status: int
    out: str


def run(command: list[str], cwd: Path, env: dict[str, str]) -> Run:
    """Run a program for LIMIT seconds at most; then its whole process group is ended."""
    started = subprocess.Popen(
        command,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    with started:
        try:
            out, _ = started.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            out, _ = started.communicate()
            pytest.fail(f"{command[0]} did not end in {LIMIT} s: {out[-2000:]}")
    return Run(started.returncode, out)


@dataclass
class Place:
    """A folder to work in, a home, and a router before one scripted provider."""

    work: Path
    home: Path
    up: Any
    live: Any
    wire: str

    def claude(self, *options: str) -> Run:
        env = {
            "HOME": str(self.home),
            "CLAUDE_CONFIG_DIR": str(self.home / ".claude"),
            "ANTHROPIC_BASE_URL": self.live.url,
            "ANTHROPIC_AUTH_TOKEN": KEY,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
        }
        return run([find("claude"), "-p", TASK, *options], self.work, env)

    def codex(self, model: str = "hermes-router") -> Run:
        folder = self.home / ".codex"
        folder.mkdir()
        (folder / "config.toml").write_text(CONFIG.format(model=model, url=self.live.url))
        env = {"HOME": str(self.home), "CODEX_HOME": str(folder), "ROUTER_KEY": KEY}
        flags = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
        return run([find("codex"), "exec", *flags, TASK], self.work, env)

    def connect(self, client: str) -> dict[str, str]:
        """`router.py connect` on this home; the environment that is left for the client to get."""
        env = {"HOME": str(self.home), "HR_HOME": str(self.home), "PROXY_API_KEYS": KEY}
        words = program("connect", client)
        done = run([*words, "--url", self.live.url], self.work, env)
        assert done.status == 0, done.out
        exports = dict(re.findall(r"^export (\w+)=(.*)$", done.out, re.MULTILINE))
        return {"HOME": str(self.home), **exports}

    @property
    def made(self) -> str:
        """What hello.txt says, or "" if there is none."""
        path = self.work / "hello.txt"
        return path.read_text() if path.exists() else ""


CONFIG = """\
model = "{model}"
model_provider = "router"

[model_providers.router]
name = "router"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "ROUTER_KEY"
"""


@pytest.fixture
def place(upstream, serve, tmp_path):
    """place(wire, script): where a program runs."""

    def make(wire: str, script: Callable[[Request], Any]) -> Place:
        up = upstream(script)
        live = serve(**settings_of(WIRES[wire], f"{up.url}/v1", tmp_path))
        work, home = tmp_path / "work", tmp_path / "home"
        work.mkdir()
        home.mkdir()
        return Place(work, home, up, live, wire)

    return make


def caller(wire: str, tool: str, given: dict[str, Any] | str) -> Callable[[Request], Any]:
    """A provider that calls the tool whose name ends in `tool` until it has a result.

    A string goes into the tool's only parameter: what a custom tool looks like here.
    """
    done = speak(Said("all done"))

    def answer(request: Request) -> Any:
        offered = [name for name in tools_of(request.json) if name.endswith(tool)]
        if not offered or any(turn[0] == "result" for turn in asked(request, WIRES[wire])):
            return done(request)
        parameters = tools_of(request.json)[offered[0]]
        arguments = given if isinstance(given, dict) else dict.fromkeys(only(parameters), given)
        return speak(Said("", ((offered[0], arguments),), WHY, "tool_calls"))(request)

    return answer


def only(parameters: dict[str, Any]) -> list[str]:
    names = list(parameters["properties"])
    assert len(names) == 1
    return names


def check_task(at: Place, ended: Run) -> None:
    """The file is there, and the provider was told so, with its own reasoning given back."""
    assert at.made.strip() == "hi", ended.out[-2000:]
    assert ended.status == 0, ended.out[-2000:]
    assert "all done" in ended.out
    last = at.up.requests[-1]
    assert [turn[0] for turn in asked(last, WIRES[at.wire])].count("result") == 1
    assert WHY.encode() in last.body
    assert b"hr1." not in last.body


# --- Claude Code ------------------------------------------------------------------------------


@needs("claude")
@pytest.mark.parametrize("wire", ["chat", "messages", "responses"])
def test_claude_code_writes_a_file(place, tmp_path, wire):
    target = {"file_path": str(tmp_path / "work" / "hello.txt"), "content": "hi\n"}
    at = place(wire, caller(wire, "Write", target))
    check_task(at, at.claude("--allowedTools", "Write"))
    assert "Bash" in tools_of(at.up.requests[0].json)


@needs("claude")
def test_claude_code_runs_a_command(place):
    at = place("chat", caller("chat", "Bash", {"command": "echo hi > hello.txt"}))
    check_task(at, at.claude("--allowedTools", "Bash"))


TOO_LONG = Reply(
    400,
    {
        "error": {
            "message": "This model's maximum context length is 200000 tokens. However, your "
            "messages resulted in 250000 tokens. Please reduce the length of the messages.",
            "type": "invalid_request_error",
            "code": "context_length_exceeded",
        }
    },
)


@needs("claude")
def test_claude_code_understands_an_overflow(place):
    at = place("chat", lambda request: TOO_LONG)
    ended = at.claude()
    assert ended.status == 1
    assert "250000 tokens (limit 200000)" in ended.out or "too long" in ended.out.lower()
    assert len(at.up.requests) == 1


def limited_once(script: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """The first request is turned away for a second."""
    seen: list[Request] = []

    def answer(request: Request) -> Any:
        seen.append(request)
        error = {"error": {"message": "Rate limit reached. Please try again in 1s."}}
        return Reply(429, error, {"Retry-After": "1"}) if len(seen) == 1 else script(request)

    return answer


@needs("claude")
def test_claude_code_waits_out_a_rate_limit(place):
    at = place("chat", limited_once(speak(Said("all done"))))
    ended = at.claude()
    assert (ended.status, ended.out.strip()) == (0, "all done")


@needs("claude")
def test_claude_code_reads_what_connect_writes(place, tmp_path):
    target = {"file_path": str(tmp_path / "work" / "hello.txt"), "content": "hi\n"}
    at = place("chat", caller("chat", "Write", target))
    settings = at.home / ".claude" / "settings.json"
    settings.parent.mkdir()
    settings.write_text('{"permissions": {"allow": ["Write"]}}')
    quiet = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
    check_task(at, run([find("claude"), "-p", TASK], at.work, at.connect("claude-code") | quiet))


# --- Codex ------------------------------------------------------------------------------------


@needs("codex")
def test_codex_reads_what_connect_writes(place):
    at = place("chat", caller("chat", "exec_command", {"cmd": "echo hi > hello.txt"}))
    config = at.home / ".codex" / "config.toml"
    config.parent.mkdir()
    config.write_text(
        f'# mine\nmodel = "gpt-5.5"\n\n[projects."{at.work}"]\ntrust_level = "trusted"\n'
    )
    flags = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
    check_task(at, run([find("codex"), "exec", *flags, TASK], at.work, at.connect("codex")))
    assert "# mine\n" in config.read_text()


@needs("codex")
@pytest.mark.parametrize("wire", ["chat", "messages", "responses"])
def test_codex_runs_a_command(place, wire):
    at = place(wire, caller(wire, "exec_command", {"cmd": "echo hi > hello.txt"}))
    check_task(at, at.codex())


PATCH = "*** Begin Patch\n*** Add File: hello.txt\n+hi\n*** End Patch\n"
SCRIPT = 'text(await tools.exec_command({cmd: "echo hi > hello.txt"}))'


@needs("codex")
@pytest.mark.parametrize("wire", ["chat", "messages"])
def test_codex_applies_a_patch(place, wire):
    """gpt-5.5 is offered apply_patch, a custom tool: here a function of one string."""
    at = place(wire, caller(wire, "apply_patch", PATCH))
    check_task(at, at.codex("gpt-5.5"))


@needs("codex")
def test_codex_with_its_tools_in_the_input(place):
    """gpt-5.6-sol gets its tools, namespaced, in an item of the input, and calls them by script."""
    at = place("chat", caller("chat", "exec", SCRIPT))
    check_task(at, at.codex("gpt-5.6-sol"))


@needs("codex")
def test_codex_finds_a_tool_of_a_namespace(place):
    at = place("chat", caller("chat", "list_agents", {}))
    ended = at.codex("gpt-5.6-sol")
    assert ended.status == 0, ended.out[-2000:]
    results = [turn for turn in asked(at.up.requests[-1], WIRES["chat"]) if turn[0] == "result"]
    assert '"agents"' in results[0][2]


@needs("codex")
def test_codex_understands_an_overflow(place):
    at = place("chat", lambda request: TOO_LONG)
    ended = at.codex()
    assert ended.status == 1
    assert "ran out of room" in ended.out
    assert len(at.up.requests) == 1


@needs("codex")
def test_codex_takes_a_cut_answer_for_an_answer(place):
    at = place("chat", speak(Said("This is cut", finish="length")))
    ended = at.codex()
    assert (ended.status, "This is cut" in ended.out) == (0, True), ended.out[-2000:]
    assert len(at.up.requests) == 1


@needs("codex")
def test_codex_waits_out_a_rate_limit(place):
    at = place("chat", limited_once(speak(Said("all done"))))
    ended = at.codex()
    assert ended.status == 0, ended.out[-2000:]
    assert "all done" in ended.out


# --- Node SDKs --------------------------------------------------------------------------------

CALLS = [list(WEATHER), ["get_weather", {"city": "Bern"}]]
CALLING = Said("", (WEATHER, ("get_weather", {"city": "Bern"})), "", "tool_calls")


def weatherman(wire: str) -> Callable[[Request], Any]:
    """Calls two tools when told to use tools, and says what he thinks of the results."""
    hello, calls, then = speak(Said("hello")), speak(CALLING), speak(Said("warm"))

    def answer(request: Request) -> Any:
        turns = asked(request, WIRES[wire])
        if any(turn[0] == "result" for turn in turns):
            return then(request)
        return (calls if turns[-1][1] == "use tools" else hello)(request)

    return answer


def has_node_sdks() -> bool:
    modules = Path(FOLDER, "node_modules")
    found = all((modules / name).is_dir() for name in ("openai", "@anthropic-ai/sdk"))
    return bool(FOLDER and found and shutil.which("node"))


@pytest.mark.skipif(not has_node_sdks(), reason="the Node SDKs are not installed (see the top)")
@pytest.mark.parametrize("wire", ["chat", "messages", "responses"])
def test_the_node_sdks(place, wire):
    at = place(wire, weatherman(wire))
    script = str(Path(__file__).with_name("node_clients.mjs"))
    env = {"ROUTER_URL": at.live.url, "ROUTER_KEY": KEY, "HERMES_TEST_CLIS": FOLDER}
    ended = run([shutil.which("node") or "node", script, "hermes-router"], at.work, env)
    assert ended.status == 0, ended.out
    heard = json.loads(re.findall(r"^\{.*\}$", ended.out, re.MULTILINE)[-1])
    whole = {"text": "hello", "calls": [], "output": USED.completion}
    tools = {"text": "", "calls": CALLS, "output": USED.completion, "then": "warm"}
    assert heard == {
        "messagesWhole": {**whole, "stop": "end_turn"},
        "messagesStream": {**whole, "stop": "end_turn", "heard": "hello"},
        "messagesTools": {**tools, "stop": "tool_use"},
        "messagesCount": True,
        "messagesError": ["BadRequestError", 400, "invalid_request_error"],
        "responsesWhole": {**whole, "status": "completed"},
        "responsesStream": {**whole, "status": "completed", "heard": "hello"},
        "responsesTools": {**tools, "status": "completed"},
        "responsesError": ["BadRequestError", 400, "invalid_request_error"],
        "chatStream": "hello",
        "chatTools": CALLS,
        "models": True,
    }
