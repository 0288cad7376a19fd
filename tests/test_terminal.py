"""Every command in a real pseudo-terminal, on a scratch home in a path with spaces.

A row of SCENES is what a person types, sees and answers. All of them are played through the real
hr, some at a time; each test looks at one. The wizard has a file of its own: test_cli_setup.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from upstream import HELLO, Hang, Upstream, free_port, good, until

import router

pytest.importorskip("pexpect")
pytest.importorskip("pty", reason="pseudo-terminals are POSIX")

from terminals import CTRL_C, CTRL_D, FORKING, OBEYING, Terminal, heeding_ctrl_c  # noqa: E402
from test_cli_changes import TOKENS  # noqa: E402
from test_cli_hr import Machine, git  # noqa: E402
from test_cli_setup import AGAIN, CLIENT, HIDDEN, NEXT, QUESTION, WRONG, guard  # noqa: E402
from test_cli_setup import KEY as GROQ  # noqa: E402
from test_hr import make_venv  # noqa: E402

SECOND = "gsk_Second0123456789abQ2"
TYPED = "gsk_Typed0123456789abcT3"
CALLER, GUEST = "sk-mine-0123456789", "sk-guest-012345678"
SECRETS = (GROQ, SECOND, TYPED, WRONG, TOKENS["refresh_token"])
CLAUDE = ".claude/settings.json"
WHICH = "Which key"  # asked hidden, where a key is named by `-`


@dataclass(frozen=True)
class Scene:
    """A command line; `steps` are (what is shown, what is typed then), `sees` of the whole."""

    words: str
    sees: tuple[str, ...] = ()
    steps: tuple[tuple[str, str], ...] = ()
    status: int = 0
    home: str = "kept"  # empty, kept (two keys of Groq, two callers), ported (a port too), running
    before: str = ""  # a command that has to be done first
    wrote: tuple[str, str] = ("", "")  # a file, and a pattern of what it holds then
    left: tuple[str, str] = ("", "")  # a file, and a pattern of what it does not hold
    env: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        typed = "".join(f", {q!r} {a!r}" for q, a in self.steps)
        return f"{self.words}{typed} ({self.home})" if typed or self.home != "kept" else self.words


def scene(words: str, *sees: str, **more: Any) -> Scene:
    return Scene(words, sees, **more)


def ctrl_c(words: str, *steps: tuple[str, str], at: str, **more: Any) -> Scene:
    """Ctrl-C at a question or in a view."""
    return Scene(words, steps=(*steps, (at, CTRL_C)), **{"status": 1, **more})


ASKED = ("auth.json", f'"{GROQ}",\\s+"{SECOND}"\\s+\\]')  # nothing came to it, nothing went
SLOW = {"GROQ_BASE_URL": "{hang}/v1"}

SCENES: Mapping[str, tuple[Scene, ...]] = {
    "serve": (
        scene("serve", "ok: 1 provider", steps=(("listening on", CTRL_C),)),
        scene("start", r"cannot listen on 127.0.0.1:\d+", status=1, env={"PORT": "{busy}"}),
    ),
    "setup": (
        scene(
            "setup", "You have 2 keys: groq", r"Key +sk-mine-0123456789", "Done",
            steps=(
                ("Add keys for another provider", "\n"),
                ("whenever this machine boots", "n\n"),
                ("Start the router now", "y\n"),
                (QUESTION, "y\n"),
                ("groq answered in", ""),
                (CLIENT, "claude-code\n"),
                (CLIENT, "\n"),
            ),
            wrote=(CLAUDE, CALLER),
        ),
        ctrl_c("setup", at=NEXT, home="empty"),
        scene("setup --yes --stdin", "pipe or a file", status=2),
    ),
    "check": (
        scene("check", "ok: 1 provider"),
        scene("check", "PORT", status=1, env={"PORT": "many"}),
    ),
    "key": (
        scene("key", f"^{CALLER}$"),
        scene("key", "^sk-router-", home="empty", wrote=(".env", "PROXY_API_KEYS=sk-router-")),
    ),
    "start": (
        scene("start -d", r"answers on http://127.0.0.1:\d+ "),
        scene("start -d", "cannot be used", "PORT", status=1, env={"PORT": "many"}),
    ),
    "stop": (
        scene("stop", r"stopped \(pid \d+\)", before="start -d"),
        scene("stop", "not running", status=3),
    ),
    "restart": (scene("restart", r"answers on http://127.0.0.1:\d+ "),),
    "status": (
        scene("status", r"^groq +3 Good +✅ ok +2/2", home="running"),
        scene("status", "no router answers", "hr start -d", status=3),
        ctrl_c("status --watch 0.5", ("groq", ""), ("Ctrl-C ends it", ""), ("Ctrl-C ends it", ""),
               at="Ctrl-C ends it", status=0, home="running"),
        ctrl_c("status --watch 0.5", at="no router answers", status=0),
    ),
    "logs": (
        scene("logs", "listening on", home="running"),
        scene("logs --requests", r"200 success +chat +key1 +groq/m1 .+{id}", home="running"),
        scene("logs", "no log at", status=1),
        ctrl_c("logs -f", at="listening on", status=130, home="running"),
    ),
    "why": (
        scene("why {id}", "groq", home="running"),
        scene("why nothing", "nothing is remembered", status=1, home="running"),
    ),
    "auth": (scene("auth", "usage: .* add|list", status=2),),
    "auth add": (
        scene("auth add groq", "groq now has 3 keys",
              steps=((HIDDEN, GROQ[::-1] + "\n"), ("refuses", ""), ("Keep it", "y\n"),
                     (AGAIN, "n\n")),
              wrote=("auth.json", GROQ[::-1])),
        scene("auth add groq", "Invalid API Key", "not stored",
              steps=((HIDDEN, WRONG + "\n"), ("Keep it", "\n"), (AGAIN, "\n")),
              status=1, wrote=ASKED),
        scene("auth add groq", "skipped", steps=((HIDDEN, "\n"),), wrote=ASKED),
        scene("auth add groq --file - --no-check", "added: …" + TYPED[-6:],
              steps=((HIDDEN, TYPED + "\n"), (AGAIN, "\n")), wrote=("auth.json", TYPED)),
        scene("auth add groq", "the input ended", steps=((HIDDEN, CTRL_D),), status=1, wrote=ASKED),
        scene("auth add groq", "no answer from 127.0.0.1:9",
              steps=((HIDDEN, TYPED + "\n"), (AGAIN, "\n")),
              env={"GROQ_BASE_URL": "http://127.0.0.1:9/v1"}),
        scene("auth add groqq", "did you mean groq", status=1),
        ctrl_c("auth add groq", at=HIDDEN, wrote=ASKED),
        ctrl_c("auth add groq", (HIDDEN, TYPED + "\n"), at="asking Groq", env=SLOW, wrote=ASKED),
        ctrl_c("auth add groq", (HIDDEN, WRONG + "\n"), at="Keep it", wrote=ASKED),
        ctrl_c("auth add cloudflare", at="CLOUDFLARE_ACCOUNT_ID", wrote=ASKED),
    ),
    "auth list": (
        scene("auth list", f"^groq +…{GROQ[-6:]} +auth.json$", "2 keys of 1 provider"),
        scene("auth list", "hr auth add <provider>", home="empty"),
    ),
    "auth remove": (
        scene(f"auth remove groq {SECOND[-6:]}", "removed", left=("auth.json", SECOND)),
        scene("auth remove groq -", "removed", steps=((WHICH, SECOND + "\n"),),
              left=("auth.json", SECOND)),
        scene("auth remove groq -", "no key was named", steps=((WHICH, "\n"),), status=1,
              wrote=ASKED),
        scene("auth remove groq", "say which", status=2, wrote=ASKED),
        ctrl_c("auth remove groq -", at=WHICH, wrote=ASKED),
    ),
    "auth check": (
        scene("auth check", r"valid +Groq accepts", r"dead +.*Invalid API Key", status=1),
        ctrl_c("auth check", at="asking 1 provider", env=SLOW),
    ),
    "auth import-codex": (
        scene("auth import-codex --file {codex}", "added", wrote=("auth.json", '"rt-1"')),
        scene("auth import-codex", "codex login", status=1),
    ),
    "auth providers": (scene("auth providers", "^groq +free +2 +https://"),),
    "model": (scene("model", "usage", status=2),),
    "model list": (scene("model list", "^groq +m1 +override$"),),
    "model set": (
        scene("model set mistral m2 m3", "m2, m3", wrote=(".env", "MISTRAL_MODEL=m2,m3")),
    ),
    "model reset": (
        scene("model reset mistral", "default models", before="model set mistral m2",
              left=(".env", "MISTRAL_MODEL")),
    ),
    "mode": (
        scene("mode", "^round-robin$"),
        scene("mode seq", "first to last", wrote=(".env", "ROTATION_MODE=sequential")),
        scene("mode sideways", "round-robin or sequential", status=1),
    ),
    "features": (scene("features", "usage", status=2),),
    "features list": (scene("features list", "^fast_routing +off +", "always on: "),),
    "features enable": (
        scene("features enable fast_routing", "is on", wrote=(".env", "FAST_ROUTE")),
    ),
    "features disable": (scene("features disable fast_routing", "is off"),),
    "keys": (scene("keys", "usage", status=2),),
    "keys list": (scene("keys list", f"^\\S+ +…{GUEST[-6:]} +.* +PROXY_API_KEYS$"),),
    "keys new": (
        scene("keys new --name desk", "this once", "^sk-router-", wrote=("auth.json", "desk")),
        scene("keys new --rpm many", "a whole number", status=1, left=("auth.json", "proxy_keys")),
    ),
    "keys revoke": (
        scene(f"keys revoke {GUEST[-6:]}", "revoked", left=(".env", GUEST)),
        scene("keys revoke -", "revoked", steps=((WHICH, GUEST + "\n"),), left=(".env", GUEST)),
        ctrl_c("keys revoke -", at=WHICH, wrote=(".env", GUEST)),
    ),
    "limit": (scene("limit", "usage", status=2),),
    "limit list": (scene("limit list", f"…{GUEST[-6:]} ", r"usual \(PROXY_LIMIT_"),),
    "limit set": (
        scene(f"limit set {GUEST[-6:]} --rpm 5", "rpm=5", wrote=("auth.json", '"rpm": 5')),
        scene(f"limit set {GUEST[-6:]}", "say what is limited", status=2),
        scene("limit set - --rpm 5", "rpm=5", steps=((WHICH, GUEST + "\n"),)),
    ),
    "limit clear": (
        scene(f"limit clear {GUEST[-6:]}", "rpm=∞", before=f"limit set {GUEST[-6:]} --rpm 5"),
    ),
    "config": (scene("config", "usage", status=2),),
    "config show": (scene("config show", "^HR_HOME /.+ home$", f"…{CALLER[-6:]}", "--all shows"),),
    "connect": (
        scene("connect", "^codex +Codex CLI +/"),
        scene("connect claude-code", "wrote", wrote=(CLAUDE, CALLER)),
        scene("connect claude-code --dry-run", f"…{CALLER[-6:]}", left=(CLAUDE, "")),
        scene("connect claude-code --undo", "without", before="connect claude-code",
              left=(CLAUDE, "")),
        scene("connect openai-sdk", CALLER),
    ),
    "doctor": (
        scene("doctor", r"^\[✓\] providers: groq: 2 keys", "nothing is wrong", home="running"),
        scene("doctor", "no provider has a key", r"\d problems?$", status=1, home="empty"),
    ),
    "bench": (
        scene("bench --requests 3", "^answered_by: groq 3$", home="running"),
        scene("bench", "no router answers", status=3),
    ),
    "crashtest": (
        scene("crashtest --only 1", "^ 1 429 with Retry-After +pass +pass", "6 runs: 6 pass"),
    ),
    "install": (
        scene("install", "bin/hermes-router -> ", "is not on PATH", wrote=("bin/hr", "#!")),
    ),
    "uninstall": (scene("uninstall", "removed", before="install", left=("bin/hr", "")),),
    "service": (scene("service bake", "usage: hr service", status=2),),
    "service install": (
        scene("service install --user --dry-run", r'^ExecStart=".*/the router/hr" start$'),
    ),
    "service status": (scene("service status", "no service of this router", status=1),),
    "service uninstall": (
        scene("service uninstall", "removed", before="service install --user", home="ported"),
    ),
    "update": (scene("update --check", "already up to date"),),
    "test": (scene("test -q -p no:cacheprovider tests", "1 passed"),),
    "completion": (
        scene("completion bash", "complete -F _hermes_router hr"),
        scene("completion zsh", "bashcompinit"),
        scene("completion fish", "complete -c hr"),
        scene("completion tcsh", "usage", status=2),
    ),
    "docs": (scene("docs commands", "^# Commands$"),),
    "commands": (scene("commands --long", "^auth add +store keys"),),
    "version": (scene("version", r"^hermes-router \d+\.\d+\.\d+\+[0-9a-f]{7}$"),),
    "help": (
        scene("help", "^hr -- install", "^  auth import-codex +take over"),
        scene("sevre", "did you mean serve", status=2),
    ),
}  # fmt: skip


ALL = [row for rows in SCENES.values() for row in rows]
OWN = {command.name.split()[0] for command in router.COMMANDS if not command.hr}
COLOURS = re.compile(r"\x1b\[(?:[0-9;]*m|H|2J)")  # and what a live view begins with


def test_every_command_has_a_scene() -> None:
    assert set(SCENES) == {command.name for command in router.COMMANDS} | {"help"}
    for name, scenes in SCENES.items():
        first = " ".join(scenes[0].words.split()[: len(name.split())])
        assert first == name or name == "serve", first


@dataclass(frozen=True)
class Played:
    """What came of a scene."""

    status: int
    raw: str
    screen: str
    is_sane: bool
    home: Path

    @classmethod
    def of(cls, terminal: Terminal, home: Path) -> Played:
        status = terminal.ended(60)
        return cls(status, terminal.raw, terminal.screen, terminal.is_sane, home)


class Stage(Machine):
    """A copy of the program, stand-ins for systemd, and two providers: one never answers."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, make_venv(root / "venv"))
        self.up, self.slow = Upstream(self.answer), Upstream(lambda _: Hang(120))
        self.up.on_get, self.slow.on_get = guard, lambda _: Hang(120)
        self.busy = socket.create_server(("127.0.0.1", 0))
        (root / "codex.json").write_text(json.dumps({"tokens": TOKENS}))
        self.words = {
            "{hang}": self.slow.url,
            "{busy}": str(self.busy.getsockname()[1]),
            "{codex}": str(root / "codex.json"),
        }
        (self.home / ".env").unlink()
        (self.home / "tests").mkdir()
        (self.home / "tests/requirements.txt").touch()
        (self.home / "tests/test_one.py").write_text("def test_one(): pass\n")
        git(self.home, "init", "-q", "-b", "main")
        git(self.home, "add", "hr", "router.py")
        git(self.home, "commit", "-qm", "the only one")
        git(self.home, "remote", "add", "origin", ".")
        self.running = self.make_home("running")

    @staticmethod
    def answer(request: Any) -> Any:
        return Hang(120) if request.model == "slow" else good()(request)

    @property
    def unanswered(self) -> int:
        """How many requests have reached a provider that does not answer them."""
        return len(self.slow.gets) + sum(asked.model == "slow" for asked in self.up.requests)

    def make_home(self, kind: str) -> Path:
        if kind == "running" and hasattr(self, "running"):
            return self.running
        home = Path(tempfile.mkdtemp(prefix=kind, suffix=" home", dir=self.root))
        port = free_port() if kind == "ported" else 0
        (home / ".env").write_text(f"PORT={port}\nROUTER_PROBE=0\n")
        if kind != "empty":
            with (home / ".env").open("a") as file:
                file.write(f"PROXY_API_KEYS={CALLER},{GUEST}\n")
            keys = {"providers": {"groq": [GROQ, SECOND]}}
            (home / "auth.json").write_text(json.dumps(keys, indent=2))
        for path in home.iterdir():
            path.chmod(0o600)
        return home

    def env_of(self, home: Path, **more: str) -> dict[str, str]:
        """Of a terminal on that home."""
        env = self.env | {
            "HOME": str(home),
            "HR_HOME": str(home),
            "HR_BIN": str(home / "bin"),
            "FAKE_FILE": str(home / ".config/systemd/user/hermes-router.service"),
            "TERM": "xterm",
            "LANG": "C.UTF-8",
            "GROQ_BASE_URL": f"{self.up.url}/v1",
            "GROQ_MODEL": "m1",
        }
        return env | {name: self.told(text) for name, text in more.items()}

    def told(self, text: str) -> str:
        for name, value in self.words.items():
            text = text.replace(name, value)
        return text

    @contextmanager
    def terminal(self, words: str, home: Path, **env: str) -> Iterator[Terminal]:
        command = [str(self.command), *map(self.told, words.split())]
        terminal = Terminal(command, self.env_of(home, **env), home)
        try:
            yield terminal
        finally:
            terminal.close()

    def play(self, row: Scene) -> Played:
        home = self.make_home(row.home)
        try:
            if row.before:
                with self.terminal(row.before, home) as terminal:
                    assert terminal.ended(60) == 0, terminal.screen
            with self.terminal(row.words, home, **row.env) as terminal:
                for question, answer in row.steps:
                    terminal.expect(question)
                    terminal.send(answer)
                return Played.of(terminal, home)
        finally:
            if home != self.running and (home / "router.pid").exists():
                self.stop(home)

    def stop(self, home: Path) -> None:
        env = self.env_of(home)
        subprocess.run([self.command, "stop"], env=env, capture_output=True, timeout=60)

    def in_a_row(self, lines: Sequence[tuple[str, Path]], *before: str, **env: str) -> Terminal:
        """Commands of router.py one after the other, in a terminal of 40 columns."""
        told = [[[*map(self.told, words.split())], self.env_of(home)] for words, home in lines]
        for _, each in told:
            each |= env
        python = str(self.home / ".venv/bin/python")
        command = [*before, python, "-c", FORKING, json.dumps(told)]
        paths = {"PYTHONPATH": str(self.home), "PYTHONSAFEPATH": ""}
        return Terminal(command, self.env_of(self.root, **paths), self.root, (24, 40))

    def close(self) -> None:
        self.stop(self.running)
        for up in (self.up, self.slow):
            up.close()
        self.busy.close()


def statuses(screen: str) -> list[tuple[str, int]]:
    """What each command of `in_a_row` showed, and its exit status."""
    parts = re.split(r"^== (\d+) ==\n", screen, flags=re.M)
    return list(zip(parts[::2], map(int, parts[1::2]), strict=False))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """With a running router, which has answered once."""
    made = Stage(tmp_path_factory.mktemp("a stage"))
    with heeding_ctrl_c():
        with made.terminal("start -d", made.running) as terminal:
            assert terminal.ended(60) == 0, terminal.screen
        url = (made.running / "router.pid").read_text().split("\n")[2]
        with requests.Session() as session:
            session.trust_env = False
            body = {"model": "groq/m1", "messages": HELLO}
            headers = {"Authorization": f"Bearer {CALLER}"}
            answer = session.post(
                f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30
            )
        made.words["{id}"] = answer.headers["X-Request-ID"]
        yield made
        made.close()


@pytest.fixture(scope="module")
def played(stage: Stage, request: pytest.FixtureRequest) -> Iterator[Mapping[int, Future[Played]]]:
    """The scenes that are asked for, some at a time."""
    wanted = [item.callspec.params["number"] for item in request.session.items
              if getattr(item, "function", None) is test_a_scene]  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        yield {number: pool.submit(stage.play, ALL[number]) for number in wanted}


@pytest.mark.parametrize("number", range(len(ALL)), ids=map(str, ALL))
def test_a_scene(stage: Stage, played: Mapping[int, Future[Played]], number: int) -> None:
    row, seen = ALL[number], played[number].result(110)
    assert seen.status == row.status, seen.screen
    assert "Traceback" not in seen.screen
    for pattern in map(stage.told, row.sees):
        assert re.search(pattern, seen.screen, re.M), seen.screen
    assert seen.is_sane
    # A prompt that follows has a line of its own, as far as it is the command that ends.
    assert seen.screen.endswith("\n") or row.status == 130 or row.words == "serve"
    assert "\x1b" not in COLOURS.sub("", seen.raw)
    assert not [key for key in SECRETS if key in seen.raw]
    check_files(row, seen.home)


def check_files(row: Scene, home: Path) -> None:
    """What was written is whole and private, and holds what it should."""
    for path in home.iterdir():
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
            assert path.name in (
                ".env", "auth.json", ".env.lock", ".auth.json.lock", "router.log", "router.pid",
                "router_state.json", "usage.db", "usage.db-wal", "usage.db-shm",
            ), path  # fmt: skip
    if (home / "auth.json").exists():
        json.loads((home / "auth.json").read_text())
    name, pattern = row.wrote
    assert not name or re.search(pattern, (home / name).read_text()), (home / name).read_text()
    name, pattern = row.left
    there = name and (home / name).exists()
    assert not there or (pattern and not re.search(pattern, (home / name).read_text())), name


# --- narrow terminals, simple ones, and people who want no colour -------------------------


def show_plainly(stage: Stage, rows: Sequence[Scene], **env: str) -> None:
    """The commands end as in a wide terminal, and nothing is coloured."""
    lines = [(row.words.replace("logs --requests", "logs"), row.home) for row in rows]
    terminal = stage.in_a_row([(words, stage.make_home(kind)) for words, kind in lines], **env)
    terminal.ended(100)
    assert "\x1b" not in terminal.raw and "Traceback" not in terminal.raw
    assert [status for _, status in statuses(terminal.screen)] == [row.status for row in rows]
    terminal.close()


def test_forty_columns_of_a_dumb_terminal(stage: Stage) -> None:
    rows = [row for row in ALL if not row.steps and not row.before and not row.env]
    rows = [row for row in rows if row.words.split()[0] in OWN and row.words != "logs"]
    assert len(rows) > 40
    show_plainly(stage, rows, TERM="dumb")


COLOURED = ("status", "logs --requests", "doctor", "auth check", "features list", "commands --long")


def test_no_colour_for_who_wants_none(stage: Stage) -> None:
    """Where there is colour at all, NO_COLOR takes it away."""
    rows = [next(row for row in ALL if row.words == words) for words in COLOURED]
    lines = [(row.words.replace("logs --requests", "logs"), row.home) for row in rows]
    painted = stage.in_a_row([(words, stage.make_home(kind)) for words, kind in lines])
    painted.ended()
    assert painted.raw.count("\x1b[1m") + painted.raw.count("\x1b[32m") > len(rows)
    painted.close()
    show_plainly(stage, rows, NO_COLOR="1")


def test_tables_fit_a_narrow_terminal(stage: Stage) -> None:
    """Status, at 40 columns: no line is longer, and the columns of all rows stand alike."""
    terminal = stage.in_a_row([("status", stage.running), ("model list --all", stage.running)])
    assert terminal.ended() == 0
    (status, _), (models, _) = statuses(terminal.screen)
    head = status.index("PROVIDER")
    table = status[head : status.index("rotation")].splitlines()
    assert max(map(router.cells, table)) <= 40 and table[0].split()[:2] == ["PROVIDER", "RATING"]
    half = len(table) // 2
    assert [line[:4] == "    " for line in table[:half]] == [False] + [True] * (half - 1)
    assert "m1" in table[-1] and "MODEL" in table[half - 1]
    assert table[-1].index("m1") == table[half - 1].index("MODEL")
    assert not [
        line for line in models.splitlines() if router.cells(line) > 40 and " " in line.strip()
    ]
    terminal.close()


WORD = st.text("abcdefghij✅", min_size=1, max_size=12)
CELL = st.lists(WORD, min_size=0, max_size=9).map(" ".join)
TABLE = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.tuples(*[CELL] * n), min_size=1, max_size=5)
)


@given(TABLE, st.integers(20, 120))
def test_a_table_loses_nothing_on_a_narrow_terminal(rows: Any, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "screen_width", lambda _: width)
        lines = router.columns(rows)
    assert " ".join(lines).split() == " ".join(cell for row in rows for cell in row).split()
    long = [line for line in lines if router.cells(line) > width + line.count("✅")]
    assert all(len(line.split()) == 1 for line in long) or width < 40


# --- Ctrl-C where no question tells the moment ---------------------------------------------


def test_ctrl_c_while_the_program_is_loaded(stage: Stage) -> None:
    """No traceback: imports end as other programs do."""
    home = stage.make_home("kept")
    (home / "flask.py").write_text("import time; print('loading', flush=True); time.sleep(60)")
    with stage.terminal("auth list", home, PYTHONPATH=str(home)) as terminal:
        terminal.expect("loading")
        terminal.sendintr()
        assert terminal.ended() == 130
        assert "Traceback" not in terminal.screen and terminal.is_sane


def test_ctrl_c_while_it_starts(stage: Stage) -> None:
    home = stage.make_home("kept")
    with stage.terminal("start -d", home) as terminal:
        until(lambda: (home / "router.pid").exists(), 30)
        pid = int((home / "router.pid").read_text().split("\n")[0])
        terminal.sendintr()
        assert terminal.ended() == 1
        assert "stopped before the router answered" in terminal.screen and terminal.is_sane
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not (home / "router.pid").exists()


WAITING = (
    ("auth check", "kept"),
    ("auth add groq --check", "kept"),
    ("doctor --live", "kept"),
    ("bench --model groq/slow", "running"),
)


@pytest.mark.parametrize(("words", "kind"), WAITING)
def test_ctrl_c_does_not_wait_for_a_provider(stage: Stage, words: str, kind: str) -> None:
    home, asked = stage.make_home(kind), stage.unanswered
    with stage.terminal(words, home, **SLOW) as terminal:
        if "add" in words:
            terminal.expect(HIDDEN)
            terminal.sendline(TYPED)
        until(lambda: stage.unanswered > asked, 30)
        terminal.sendintr()
        assert terminal.ended(8) == 1, "it waited for the provider"
        assert terminal.screen.endswith("^C\nstopped\n") and terminal.is_sane
        assert TYPED not in terminal.raw


def test_ctrl_c_in_a_crash_test(stage: Stage) -> None:
    home = stage.make_home("kept")
    scratch = home / "scratch"
    scratch.mkdir()
    with stage.terminal("crashtest", home, TMPDIR=str(scratch)) as terminal:
        until(lambda: list(scratch.glob("*/*")), 30)
        terminal.sendintr()
        assert terminal.ended(8) == 1
        assert terminal.screen == "^C\nstopped\n" and terminal.is_sane
    assert not list(scratch.iterdir())


# --- a folder that cannot be written -------------------------------------------------------

FIRST = ("key", "setup --yes --no-start")  # they make the key of a caller where there is none
REFUSED = (
    *FIRST, "auth import-codex --file {codex}", "model set groq m9", "model reset groq", "mode seq",
    "features disable response_cache", "keys new", f"keys revoke {GUEST[-6:]}",
    f"limit set {GUEST[-6:]} --rpm 5", f"auth remove groq {GROQ[-6:]}", "connect claude-code",
)  # fmt: skip


def test_a_read_only_folder_is_told(stage: Stage) -> None:
    home, bare = stage.make_home("kept"), stage.make_home("empty")
    homes = [bare if words in FIRST else home for words in REFUSED]
    before = {path: path.read_bytes() for path in (*home.iterdir(), *bare.iterdir())}
    for path in (home, bare):
        path.chmod(0o500)
    obeying = (sys.executable, "-c", OBEYING)
    try:
        touch = [*obeying, "/bin/sh", "-c", f"! touch '{home}/x'"]
        if subprocess.run(touch, capture_output=True).returncode:
            pytest.skip("nothing keeps this user from writing")
        terminal = stage.in_a_row(list(zip(REFUSED, homes, strict=True)), *obeying)
        terminal.ended(60)
    finally:
        for path in (home, bare):
            path.chmod(0o700)
    for words, (shown, status) in zip(REFUSED, statuses(terminal.screen), strict=True):
        assert status == 1 and re.search("cannot be|permission denied", shown, re.I), (words, shown)
    assert "Traceback" not in terminal.screen and terminal.is_sane
    assert before == {path: path.read_bytes() for path in (*home.iterdir(), *bare.iterdir())}
    terminal.close()
