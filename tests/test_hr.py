"""The real hr, in a copy whose path has spaces, called through symbolic links from elsewhere.

No network: its .venv borrows the packages of the Python that runs the tests.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import compiled

REPO = Path(__file__).resolve().parent.parent
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def make_venv(path: Path) -> Path:
    """A venv without packages of its own: a .pth file shows it the running Python's."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(path)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)}))
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return path


def keep_compiled(home: Path) -> None:
    """As after a first command: nothing has to be compiled again."""
    (home / "__pycache__").mkdir()
    shutil.copy(compiled(), home / "__pycache__")


def get(url: str) -> bytes:
    with OPENER.open(url, timeout=5) as reply:
        return reply.read()


def wait_for(what, seconds: float = 30.0):
    """The first true value of what(), or a failure after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := what():
            return value
        time.sleep(0.05)
    raise AssertionError(f"still waiting for {what} after {seconds} s")


class Place:
    """A copy of what hr needs, and the way to call it."""

    def __init__(self, root: Path, shared_venv: Path) -> None:
        self.root = root
        self.home = root / "the router"
        self.home.mkdir()
        for name in ("hr", "router.py", "requirements.txt"):
            shutil.copy2(REPO / name, self.home)
        keep_compiled(self.home)
        (self.home / ".venv").symlink_to(shared_venv)
        links = root / "my bin"
        links.mkdir()
        (links / "first link").symlink_to(Path("..") / "the router" / "hr")
        self.command = links / "hr"
        self.command.symlink_to("first link")
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(root),
            "PORT": "0",
            "ROUTER_PROBE": "0",
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
        }

    def hr(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run hr to its end, with these settings on top."""
        return subprocess.run(
            [str(self.command), *args],
            cwd=self.root,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
        )

    @property
    def pid_file(self) -> Path:
        return self.home / "router.pid"

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text().split("\n")[0])


@pytest.fixture(scope="module")
def shared_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_venv(tmp_path_factory.mktemp("shared") / "venv")


@pytest.fixture
def place(tmp_path: Path, shared_venv: Path) -> Iterator[Place]:
    place = Place(tmp_path, shared_venv)
    yield place
    place.hr("stop")


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of hr's business."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]) as process:
        yield process
        process.kill()


def started(place: Place, **env: str) -> str:
    """Start in the background; the address it reports."""
    done = place.hr("start", "-d", **env)
    assert done.returncode == 0, done.stderr
    found = re.search(r"answers on (http://127\.0\.0\.1:\d+) ", done.stderr)
    assert found, done.stderr
    return found[1]


# ---- asking ------------------------------------------------------------------


@pytest.mark.parametrize("args", [(), ("help",), ("-h",), ("--help",)])
def test_help_is_the_header_of_the_script(place: Place, args: tuple[str, ...]) -> None:
    done = place.hr(*args)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("hr -- ")
    for command in ("start", "stop", "restart", "status", "logs", "test", "version", "help"):
        assert re.search(rf"^  {command}\b", done.stdout, re.M), command
    assert "#" not in done.stdout and "set -euo" not in done.stdout


def test_version_needs_no_venv(place: Place) -> None:
    (place.home / ".venv").unlink()
    done = place.hr("version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"hermes-router \d+\.\d+\.\d+\S*\n", done.stdout)
    assert not (place.home / ".venv").exists()


@pytest.mark.parametrize("args", ["start -x", "start -d x", "stop x", "restart x", "logs -x"])
def test_wrong_usage_is_2(place: Place, args: str) -> None:
    done = place.hr(*args.split())
    assert done.returncode == 2
    assert done.stderr.startswith("hr: usage: hr ")


def test_unknown_command_is_refused_by_the_router(place: Place) -> None:
    done = place.hr("frobnicate")
    assert done.returncode == 2
    assert "frobnicate" in done.stderr


def test_other_commands_reach_the_router(place: Place) -> None:
    done = place.hr("docs", "env")
    assert done.returncode == 0, done.stderr
    assert "PROXY_API_KEYS" in done.stdout


def test_colour_only_for_people(place: Place) -> None:
    assert "\033" not in place.hr("stop", TERM="xterm").stderr
    assert b"\033[31m" in stop_on_a_terminal(place, TERM="xterm")
    assert b"\033" not in stop_on_a_terminal(place, TERM="xterm", NO_COLOR="1")
    assert b"\033" not in stop_on_a_terminal(place, TERM="dumb")


def stop_on_a_terminal(place: Place, **env: str) -> bytes:
    ours, theirs = pty.openpty()
    try:
        subprocess.run([place.command, "stop"], env=place.env | env, stderr=theirs, timeout=30)
        return os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)


# ---- running -----------------------------------------------------------------


def test_nothing_runs(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert place.hr("status", PORT=port).returncode == 3
    assert place.hr("stop").returncode == 3
    assert place.hr("logs").returncode == 1


def test_a_life_in_the_background(place: Place) -> None:
    url = started(place)
    first = place.pid
    assert get(f"{url}/health")
    assert place.pid_file.stat().st_mode & 0o077 == 0

    assert place.hr("start", "-d").returncode == 0  # already running is no failure
    assert place.pid == first
    assert place.hr("start").returncode == 1  # but there is nothing to watch here

    assert place.hr("status").returncode == 0  # although PORT=0 says nothing
    assert json.loads(place.hr("status", "--json").stdout)

    again = place.hr("restart")
    assert again.returncode == 0, again.stderr
    assert place.pid != first
    assert place.hr("logs").stdout.count("listening on http://") == 2

    assert place.hr("stop").returncode == 0
    assert not place.pid_file.exists()
    assert place.hr("stop").returncode == 3
    with pytest.raises(urllib.error.URLError):
        get(f"{url}/health")


def test_the_first_answer_of_the_readme(place: Place) -> None:
    url = started(place)
    key = place.hr("key")
    assert key.returncode == 0, key.stderr
    body = {"model": "auto", "messages": [{"role": "user", "content": "Hello!"}]}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {key.stdout.strip()}",
            "Content-Type": "application/json",
        },
    )
    with OPENER.open(request, timeout=10) as reply:
        assert json.load(reply)["choices"][0]["message"]["content"]


def test_the_first_key_is_not_logged(place: Place) -> None:
    started(place)
    key = place.hr("key").stdout.strip()
    assert key and key in (place.home / ".env").read_text()
    assert key not in (place.home / "router.log").read_text()


def test_a_log_that_tells_no_address(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    done = place.hr("start", "-d", PORT=port, LOG_LEVEL="ERROR")
    assert done.returncode == 0, done.stderr
    assert get(f"http://127.0.0.1:{port}/health")
    assert place.hr("status", PORT=port).returncode == 0


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def is_imported(place: Place) -> bool:
    """Whether the running router was imported, and not run as a script."""
    return b"router.py" not in Path(f"/proc/{place.pid}/cmdline").read_bytes()


@LINUX
def test_the_program_is_kept_compiled(place: Place) -> None:
    shutil.rmtree(place.home / "__pycache__")
    started(place)
    assert is_imported(place)
    (kept,) = (place.home / "__pycache__").iterdir()
    made = kept.stat().st_mtime_ns
    assert place.hr("restart").returncode == 0
    assert is_imported(place) and kept.stat().st_mtime_ns == made

    program = place.home / "router.py"
    program.write_text(program.read_text().replace("print a generated", "print a newer"))
    assert "print a newer" in place.hr("commands", "--long").stdout


@LINUX
def test_where_nothing_can_be_kept_it_runs_as_a_script(place: Place) -> None:
    shutil.rmtree(place.home / "__pycache__")
    (place.home / "__pycache__").touch()  # in the way of a folder, for root too
    url = started(place)
    assert get(f"{url}/health") and not is_imported(place)


@pytest.mark.parametrize("env", [{}, {"PYTHONSAFEPATH": "1"}], ids=["usual", "safe path"])
def test_modules_of_the_current_folder_are_not_the_routers(place: Place, env) -> None:
    for name in ("flask.py", "router.py"):
        (place.root / name).write_text("raise SystemExit('a stranger')\n")
    wanted = place.root / "wanted"
    wanted.mkdir()
    (wanted / "werkzeug.py").write_text("raise SystemExit('a friend')\n")
    assert place.hr("docs", "env", **env).returncode == 0
    assert "a friend" in place.hr("docs", "env", PYTHONPATH=str(wanted), **env).stderr


def test_restart_starts_what_does_not_run(place: Place) -> None:
    done = place.hr("restart")
    assert done.returncode == 0, done.stderr
    assert place.hr("stop").returncode == 0


def test_foreground_is_the_router_itself(place: Place) -> None:
    """exec: signals of a supervisor reach the router, and its status is hr's status."""
    with subprocess.Popen(
        [place.command, "start"], env=place.env, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "listening on" in line)
        assert get(re.search(r"http://\S+", line)[0] + "/health")
        assert place.pid == process.pid
        assert place.hr("start").returncode == 1
        assert place.hr("stop").returncode == 0
        process.stderr.read()
        assert process.wait(timeout=30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


def test_home_elsewhere(place: Place) -> None:
    state = place.root / "some state"
    url = started(place, HR_HOME="some state")  # relative to where hr is called
    assert get(f"{url}/health")
    assert (state / "router.pid").exists() and (state / "router.log").exists()
    assert (state / ".env").exists()
    assert not (place.home / ".env").exists() and not place.pid_file.exists()
    assert place.hr("stop").returncode == 3
    assert place.hr("stop", HR_HOME=str(state)).returncode == 0


def test_a_large_log_is_put_aside(place: Place) -> None:
    log = place.home / "router.log"
    with log.open("wb") as file:
        file.truncate(11_000_000)
    started(place)
    assert (place.home / "router.log.1").stat().st_size == 11_000_000
    assert log.stat().st_size < 100_000


# ---- what must not happen ----------------------------------------------------


@pytest.mark.parametrize("rest", ["\nan earlier start\n\n", "\n", "\n\n\n", ""])
def test_a_stale_pid_file_hurts_nobody(
    place: Place, stranger: subprocess.Popen[bytes], rest: str
) -> None:
    place.pid_file.write_text(f"{stranger.pid}{rest}")
    assert place.hr("stop").returncode == 3
    place.pid_file.write_text(f"{stranger.pid}{rest}")
    assert place.hr("restart").returncode == 0
    assert place.pid != stranger.pid
    assert stranger.poll() is None


@pytest.mark.parametrize("text", ["", "-1\nx\n\n", "0\n\n\n", "$(touch ouch)\nx\n\n", "\0\n"])
def test_a_broken_pid_file_is_no_pid_file(place: Place, text: str) -> None:
    place.pid_file.write_text(text)
    assert place.hr("stop").returncode == 3
    assert not (place.root / "ouch").exists()


def test_a_busy_port_is_told(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        done = place.hr("start", "-d", PORT=port)
    assert done.returncode == 1
    assert port in done.stderr and "did not come up" in done.stderr
    assert not place.pid_file.exists()


def test_a_bad_configuration_starts_nothing(place: Place) -> None:
    done = place.hr("start", "-d", PORT="many", CONNECT_TIMEOUT="soon")
    assert done.returncode == 1
    assert "PORT" in done.stderr and "CONNECT_TIMEOUT" in done.stderr
    assert not (place.home / "router.log").exists() and not place.pid_file.exists()
    assert place.hr("start", PORT="many").returncode == 1


def test_a_bad_configuration_stops_nothing(place: Place) -> None:
    url = started(place)
    assert place.hr("restart", PORT="many").returncode == 1
    assert get(f"{url}/health")


def test_dotenv_is_never_run(place: Place) -> None:
    (place.home / ".env").write_text("NOTE=$(touch ouch)\nOTHER=`touch ouch`\ntouch ouch\n")
    place.hr("check")
    place.hr("start", "-d")
    assert not list(place.root.rglob("ouch"))


# ---- making the venv ---------------------------------------------------------


@pytest.fixture
def own_venv(place: Place) -> Path:
    path = place.home / ".venv"
    path.unlink()
    return make_venv(path)


def test_packages_are_installed_once_and_when_they_change(place: Place, own_venv: Path) -> None:
    first, second = place.hr("docs", "env"), place.hr("docs", "env")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "installing" in first.stderr
    assert "installing" not in second.stderr

    wanted = place.home / "requirements.txt"
    wanted.write_text(wanted.read_text() + "no-such-package-of-hermes-router\n")
    for _ in range(2):  # a failure is not remembered as done
        failed = place.hr("docs", "env")
        assert failed.returncode == 1
        assert "no-such-package-of-hermes-router" in failed.stderr
        assert "could not install" in failed.stderr


def test_a_venv_whose_python_is_gone_is_made_again(place: Place, own_venv: Path) -> None:
    python = own_venv / "bin" / "python"
    for link in (own_venv / "bin").glob("python*"):
        link.unlink()
    python.symlink_to("/nonexistent/python")
    done = place.hr("docs", "env", HR_PYTHON=sys.executable)
    assert "making .venv" in done.stderr
    assert done.returncode == 1 and "could not install" in done.stderr  # there is no network
    assert subprocess.run([python, "-c", "import pip"]).returncode == 0


def test_no_python(place: Place) -> None:
    (place.home / ".venv").unlink()
    done = place.hr("start", HR_PYTHON="/nonexistent/python")
    assert done.returncode == 1
    assert "HR_PYTHON=/nonexistent/python" in done.stderr
    assert place.hr("status").returncode == 3
    assert not (place.home / ".venv").exists()


def test_a_python_that_has_everything_is_used(place: Place) -> None:
    (place.home / ".venv").unlink()
    done = place.hr("check", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert not (place.home / ".venv").exists() and "installing" not in done.stderr
    bare = place.root / "bare"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    done = place.hr("check", PYTHON=str(bare), HR_PYTHON="/nonexistent/python")
    assert "HR_PYTHON=/nonexistent/python" in done.stderr, "then a .venv is made as ever"


def test_no_venv_module(place: Place) -> None:
    """Debian's python3 without python3-venv."""
    (place.home / ".venv").unlink()
    debian = place.root / "python3"
    debian.write_text(
        f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"\n'
    )
    debian.chmod(0o755)
    done = place.hr("start", "-d", HR_PYTHON=str(debian))
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
    assert not (place.home / ".venv").exists()
