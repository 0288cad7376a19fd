"""`program`: router.py as a command. Fixtures: `upstream` (scripted providers), `make_app` (in
process), `serve` (over the wire), `launch` (a process of its own), `clock` (time that goes on when
told to)."""

from __future__ import annotations

import atexit
import functools
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(Path(__file__).parent)) if path not in sys.path]

from upstream import AUTH, HELLO, KEY, Clock, Upstream, until  # noqa: E402


@functools.cache
def compiled() -> Path:
    """router.py compiled, for every copy of the same text; a changed one is compiled anew."""
    folder = Path(tempfile.mkdtemp(prefix="hermes-router-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = folder / f"router.{sys.implementation.cache_tag}.pyc"
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    py_compile.compile(str(ROOT / "router.py"), str(made), doraise=True, invalidation_mode=mode)
    return made


BOOT = """\
import marshal, sys, types
made, *sys.argv = sys.argv[1:]
router = sys.modules["router"] = types.ModuleType("router")
router.__file__ = sys.argv[0]
with open(made, "rb") as file:
    exec(marshal.loads(file.read()[16:]), router.__dict__)
sys.exit(router.main())
"""


def program(*words: str) -> list[str]:
    """The command `router.py word ...`, without the time that it takes to compile a script."""
    made = ["-c", BOOT, str(compiled()), str(ROOT / "router.py")]
    return [sys.executable, "-B", *made, *words]


@pytest.fixture
def upstreams() -> Iterator[list[Upstream]]:
    """Every scripted provider of this test; closed at the end."""
    made: list[Upstream] = []
    yield made
    for server in made:
        server.close()


@pytest.fixture
def upstream(upstreams: list[Upstream]) -> Callable[..., Upstream]:
    """upstream(step, ...): a scripted provider; a step is an answer, or makes one of a request."""

    def make(*script: Any) -> Upstream:
        only = script[0] if len(script) == 1 else None
        upstreams.append(Upstream(only if callable(only) else script))
        return upstreams[-1]

    return make


@pytest.fixture
def make_app(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """make_app(SETTING=value, ...): a fresh Flask app; the mapping is its whole environment."""
    import router

    made: list[Any] = []

    def make(**settings: Any) -> Any:
        made.append(router.create_app(config_for(tmp_path, settings)))
        return made[-1]

    yield make
    for app in made:
        app.extensions["router"].close()


def config_for(home: Path, settings: dict[str, Any]) -> Any:
    import router

    env = {
        "PORT": "0",
        "HOST": "127.0.0.1",
        "HR_HOME": str(home),
        "PROXY_API_KEYS": KEY,
        "ROUTER_PROBE": "0",
        "ECHO_FALLBACK": "0",
        "CACHE_TTL_SECONDS": "0",  # most tests count calls; those of the cache turn it on
        **{name: str(value) for name, value in settings.items()},
    }
    return router.Config.from_env(env)


@dataclass
class Live:
    """A router that listens on loopback."""

    url: str
    app: Any
    session: requests.Session

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def chat(self, **body: Any) -> requests.Response:
        payload = {"model": "hermes-router", "messages": HELLO, **body}
        stream = bool(body.get("stream"))
        url = f"{self.url}/v1/chat/completions"
        return self.session.post(url, json=payload, stream=stream, timeout=60)


@pytest.fixture
def serve(upstreams: list[Upstream], tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """serve(SETTING=value, ...): the real Waitress server in a thread, stopped at the end.

    `_env` is the whole environment instead.
    """
    import router

    running: list[tuple[Any, threading.Thread, Live]] = []

    def start(*, _env: dict[str, str] | None = None, **settings: Any) -> Live:
        config = router.Config.from_env(_env) if _env else config_for(tmp_path, settings)
        app = router.create_app(config)
        server = router.make_server(app, config)
        thread = threading.Thread(target=server.run, name="router", daemon=True)
        thread.start()
        session = requests.Session()
        session.trust_env = False
        session.headers.update(AUTH)
        live = Live(f"http://127.0.0.1:{server.effective_port}", app, session)
        running.append((server, thread, live))
        return live

    yield start
    for up in upstreams:  # first, so that nothing is in flight when the router stops
        up.close()
    for server, thread, live in running:
        live.session.close()
        router.close_server(server)
        thread.join(10)
        live.app.extensions["router"].close()


class Running:
    """router.py serve as a process: its address, and what it writes to stderr."""

    LISTENING = re.compile(r"listening on (http://\S+)")

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.url = process, ""
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        until(lambda: self.url or process.poll() is not None, 60)
        assert self.url, self.text

    def read(self) -> None:
        for line in self.process.stderr or ():
            self.lines.append(line)
            if found := self.LISTENING.search(line):
                self.url = found[1]

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def stop(self) -> int:
        """Its exit status, once everything it wrote has been read."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self.reader.join(10)
        return self.process.returncode


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """launch(word, ..., SETTING=value): router.py as a process of its own, which serves.

    The settings are its whole environment beside HR_HOME, PORT and a caller's key; one that
    is None is left out.
    """
    made: list[subprocess.Popen[str]] = []

    def start(*words: str, preexec: Any = None, **settings: str | None) -> Running:
        kept = {name: os.environ.get(name) for name in ("PATH", "SYSTEMROOT")}
        usual = {"HR_HOME": str(tmp_path), "PORT": "0", "PROXY_API_KEYS": KEY}
        env = {**kept, **usual, **settings}
        process = subprocess.Popen(
            [sys.executable, "-B", str(ROOT / "router.py"), *words],
            env={name: text for name, text in env.items() if text is not None},
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec,
        )
        made.append(process)
        return Running(process)

    yield start
    for process in made:
        with process:  # waited for, and its pipe closed
            process.kill()


@pytest.fixture
def clock() -> Clock:
    return Clock()
