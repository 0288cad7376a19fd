"""hr on PATH, as a service, and bringing itself up to date: with stand-ins for systemd and launchd.

The stand-ins start and stop the real router, as the file they are given says.
"""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_hr import REPO, Place, get, keep_compiled, make_venv, shared_venv, started  # noqa: F401

FAKE = '''\
#!{python}
"""Stands in for systemctl, loginctl, launchctl and uname: {folder}"""
import os, plistlib, re, shlex, signal, subprocess, sys, time

folder = {folder!r}
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "uname":
    print({system!r})
    sys.exit()
if words == ["is-system-running"]:
    print("running")
    sys.exit()
with open(os.path.join(folder, "calls"), "a") as calls:
    print(name, *words, file=calls)
pid_file, words = os.path.join(folder, "pid"), [w for w in words if not w.startswith("--")]
verb = words[0] if words else ""


def pid():
    try:
        number = int(open(pid_file).read())
        os.kill(number, 0)
    except (OSError, ValueError):
        return 0
    return number


def stop():
    number = pid()
    if number:
        os.kill(number, signal.SIGTERM)
        for _ in range(400):
            if open(f"/proc/{{number}}/stat").read().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.05)
        os.remove(pid_file)


def start():
    path = os.environ["FAKE_FILE"]
    if os.path.exists(os.path.join(folder, "broken")):
        sys.exit("Job for hermes-router.service failed")
    if path.endswith(".plist"):
        told = plistlib.load(open(path, "rb"))
        command, env = told["ProgramArguments"], told["EnvironmentVariables"]
    else:
        text = open(path).read().replace("%%", "%").replace("$$", "$")
        command = shlex.split(re.search("^ExecStart=(.*)$", text, re.M)[1])
        env = dict([shlex.split(re.search("^Environment=(.*)$", text, re.M)[1])[0].split("=", 1)])
    base = {{n: os.environ[n] for n in ("PATH", "HOME", "PIP_NO_INDEX", "PIP_CONFIG_FILE")}}
    process = subprocess.Popen(command, env={{**base, **env}}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    open(pid_file, "w").write(str(process.pid))


if verb in ("stop", "bootout"):
    stop()
elif verb in ("restart", "kickstart"):
    stop()
    start()
elif verb == "start":
    pid() or start()
elif verb in ("is-active", "print"):
    if "--quiet" not in sys.argv:
        print("state = running" if pid() else "state = waiting")
    sys.exit(0 if pid() or verb == "print" else 3)
'''


class Machine(Place):
    """A place with stand-ins for what looks after services."""

    def __init__(self, root: Path, shared: Path, system: str = "Linux") -> None:
        super().__init__(root, shared)
        self.fakes = root / "fakes"
        self.fakes.mkdir()
        for name in ("systemctl", "loginctl", "launchctl", "uname"):
            script = self.fakes / name
            text = FAKE.format(python=sys.executable, folder=str(self.fakes), system=system)
            script.write_text(text)
            script.chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        (self.home / ".env").write_text(f"PORT={self.port}\nROUTER_PROBE=0\n")
        del self.env["PORT"]
        self.env |= {
            "PATH": f"{self.fakes}:{os.environ['PATH']}",
            "HR_SYSTEM_UNITS": str(root / "units"),
            "HR_BIN": str(root / "bin folder"),
        }

    def scope(self, name: str) -> Path:
        """The service's file of this scope, which the stand-ins are told of."""
        path = {
            "system": self.root / "units/hermes-router.service",
            "user": self.root / ".config/systemd/user/hermes-router.service",
            "launchd": self.root / "Library/LaunchAgents/com.hermes-router.hermes-router.plist",
        }[name]
        self.env["FAKE_FILE"] = str(path)
        return path

    @property
    def calls(self) -> str:
        path = self.fakes / "calls"
        return path.read_text() if path.exists() else ""

    @property
    def answers(self) -> bool:
        try:
            return bool(get(f"http://127.0.0.1:{self.port}/health"))
        except OSError:
            return False


@pytest.fixture
def machine(tmp_path: Path, shared_venv: Path) -> Iterator[Machine]:  # noqa: F811
    made = Machine(tmp_path, shared_venv)
    yield made
    made.hr("service", "uninstall")
    made.hr("stop")


@pytest.fixture
def mac(tmp_path: Path, shared_venv: Path) -> Iterator[Machine]:  # noqa: F811
    made = Machine(tmp_path, shared_venv, "Darwin")
    yield made
    made.hr("service", "uninstall")
    made.hr("stop")


# ---- PATH --------------------------------------------------------------------


def test_install_links_and_uninstall_removes(machine: Machine) -> None:
    done = machine.hr("install")
    assert done.returncode == 0, done.stderr
    assert "is not on PATH" in done.stderr
    for name in ("hr", "hermes-router"):
        link = machine.root / "bin folder" / name
        assert link.resolve() == machine.home / "hr"
        heard = subprocess.run([link, "version"], env=machine.env, capture_output=True, text=True)
        assert heard.stdout.startswith("hermes-router ")
    assert machine.hr("install").returncode == 0, "again"
    assert machine.hr("uninstall").returncode == 0
    assert list((machine.root / "bin folder").iterdir()) == []
    assert machine.hr("uninstall").returncode == 0


def test_install_replaces_nothing_of_others(machine: Machine) -> None:
    folder = machine.root / "bin folder"
    folder.mkdir()
    (folder / "hermes-router").write_text("mine")
    done = machine.hr("install")
    assert done.returncode == 1 and "something else" in done.stderr
    assert not (folder / "hr").exists()
    assert machine.hr("uninstall").returncode == 0
    assert (folder / "hermes-router").read_text() == "mine"


# ---- service -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["systemd", "launchd"])
def test_a_dry_run_only_prints(machine: Machine, kind: str) -> None:
    done = machine.hr("service", "install", "--dry-run", "--user", kind)
    assert done.returncode == 0, done.stderr
    if kind == "launchd":
        told = plistlib.loads(done.stdout.encode())
        assert told["ProgramArguments"] == [str(machine.home / "hr"), "start"]
        assert told["EnvironmentVariables"] == {"HR_HOME": str(machine.home)}
    else:
        assert f'ExecStart="{machine.home}/hr" start\n' in done.stdout
        assert "WantedBy=default.target" in done.stdout
        assert "PORT" not in done.stdout, "a later change in .env counts"
    assert machine.calls == "" and not (machine.root / ".config").exists()


def test_a_service_of_another_name(machine: Machine) -> None:
    words = ("service", "install", "--dry-run", "--user", "launchd")
    done = machine.hr(*words, HERMES_ROUTER_SERVICE="second")
    assert "<string>com.hermes-router.second</string>" in done.stdout
    assert machine.hr(*words, HERMES_ROUTER_SERVICE="../x").returncode == 2


@pytest.mark.parametrize("scope", ["user", "system"])
def test_a_service_from_its_installation_to_its_end(machine: Machine, scope: str) -> None:
    file = machine.scope(scope)
    assert machine.hr("service", "status").returncode == 1
    done = machine.hr("service", "install", f"--{scope}")
    assert done.returncode == 0, done.stderr
    assert machine.answers and file.exists()
    assert ("loginctl enable-linger" in machine.calls) == (scope == "user")
    assert machine.hr("service", "status").returncode == 0
    first = machine.pid
    assert machine.hr("service", "install", f"--{scope}").returncode == 1, "it is there"
    assert machine.hr("service", "install", f"--{scope}", "--force").returncode == 0

    assert machine.hr("restart").returncode == 0
    assert machine.pid != first and machine.answers
    assert machine.hr("status").returncode == 0
    assert machine.hr("stop").returncode == 0
    assert not machine.answers
    assert machine.hr("service", "status").returncode == 3
    started_again = machine.hr("start", "-d")
    assert started_again.returncode == 0 and machine.answers
    assert not (machine.home / "router.log").exists(), "the service, not one beside it"

    assert machine.hr("service", "uninstall").returncode == 0
    assert not file.exists() and not machine.answers
    assert machine.hr("service", "uninstall").returncode == 1


def test_launchd(mac: Machine) -> None:
    file = mac.scope("launchd")
    done = mac.hr("service", "install")
    assert done.returncode == 0, done.stderr
    assert mac.answers
    assert plistlib.loads(file.read_bytes())["KeepAlive"] is True
    assert re.search(r"launchctl bootstrap gui/\d+ ", mac.calls)
    assert mac.hr("service", "status").returncode == 0
    assert mac.hr("restart").returncode == 0
    assert mac.hr("service", "uninstall").returncode == 0
    assert not file.exists() and not mac.answers


def test_a_service_that_fails_is_told_and_nothing_else_is_started(machine: Machine) -> None:
    machine.scope("user")
    (machine.fakes / "broken").touch()
    done = machine.hr("service", "install", "--user")
    assert done.returncode == 1 and "could not be started" in done.stderr
    assert machine.hr("start", "-d").returncode == 1
    assert not machine.answers


def test_another_clones_service_is_left_alone(machine: Machine) -> None:
    file = machine.scope("user")
    file.parent.mkdir(parents=True)
    file.write_text('[Service]\nExecStart="/elsewhere/hr" start\n')
    assert machine.hr("service", "status").returncode == 1
    assert machine.hr("service", "install", "--user").returncode == 1
    assert machine.hr("restart").returncode == 0 and machine.answers
    assert "restart" not in machine.calls
    assert machine.hr("service", "uninstall").returncode == 1
    assert "/elsewhere/hr" in file.read_text()


def test_a_router_in_the_background_gives_way_to_the_service(machine: Machine) -> None:
    assert machine.hr("start", "-d").returncode == 0
    first = machine.pid
    machine.scope("user")
    done = machine.hr("service", "install", "--user")
    assert done.returncode == 0, done.stderr
    assert "takes over" in done.stderr and machine.pid != first and machine.answers


def test_there_is_only_one_service(machine: Machine) -> None:
    machine.scope("user")
    assert machine.hr("service", "install", "--user").returncode == 0
    done = machine.hr("service", "install", "--system")
    assert done.returncode == 1 and "has a service already" in done.stderr
    assert machine.answers


def test_no_supervisor(machine: Machine) -> None:
    (machine.fakes / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    done = machine.hr("service", "install")
    assert done.returncode == 1 and "stays in the foreground" in done.stderr
    assert machine.hr("service", "available").returncode == 1


def test_a_bad_configuration_installs_nothing(machine: Machine) -> None:
    file = machine.scope("user")
    (machine.home / ".env").write_text("PORT=many\n")
    assert machine.hr("service", "install", "--user").returncode == 1
    assert not file.exists()


@pytest.mark.parametrize("args", ["service -x", "service install x", "install x", "update now"])
def test_wrong_usage_is_2(machine: Machine, args: str) -> None:
    assert machine.hr(*args.split()).returncode == 2


# ---- update ------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Clone(Machine):
    """A machine whose router is a clone of a repository that gets commits."""

    def __init__(self, root: Path, shared: Path) -> None:
        super().__init__(root, shared)
        self.origin, self.work = root / "origin.git", root / "work"
        self.work.mkdir()
        git(self.work, "init", "-q", "-b", "main")
        for name in ("hr", "router.py", "requirements.txt", ".gitignore"):
            shutil.copy2(REPO / name, self.work)
        git(self.work, "add", ".")
        git(self.work, "commit", "-qm", "the first")
        git(root, "clone", "-q", "--bare", str(self.work), str(self.origin))
        git(self.work, "remote", "add", "origin", str(self.origin))
        settings = (self.home / ".env").read_text()
        shutil.rmtree(self.home)
        git(root, "clone", "-q", str(self.origin), str(self.home))
        make_venv(self.home / ".venv")
        keep_compiled(self.home)
        (self.home / ".env").write_text(settings)

    def publish(self, name: str, change) -> str:
        path = self.work / name
        path.write_text(change(path.read_text() if path.exists() else ""))
        git(self.work, "add", ".")
        git(self.work, "commit", "-qm", f"change {name}")
        git(self.work, "push", "-q", "origin", "main")
        return git(self.work, "rev-parse", "HEAD")

    @property
    def head(self) -> str:
        return git(self.home, "rev-parse", "HEAD")


@pytest.fixture
def clone(tmp_path: Path, shared_venv: Path) -> Iterator[Clone]:  # noqa: F811
    made = Clone(tmp_path, shared_venv)
    yield made
    made.hr("service", "uninstall")
    made.hr("stop")


def release(text: str) -> str:
    return re.sub(r'__version__ = ".*"', '__version__ = "9.9.9"', text)


def test_an_update_of_a_running_router(clone: Clone) -> None:
    assert clone.hr("start", "-d").returncode == 0
    first, before = clone.pid, clone.head
    assert "up to date" in clone.hr("update").stderr
    new = clone.publish("router.py", release)
    looked = clone.hr("update", "--check")
    assert looked.returncode == 0 and "change router.py" in looked.stdout
    assert clone.head == before and clone.pid == first
    done = clone.hr("update")
    assert done.returncode == 0, done.stderr
    assert clone.head == new and clone.answers and clone.pid != first
    assert clone.hr("version").stdout.startswith("hermes-router 9.9.9+")
    assert "PORT=" in (clone.home / ".env").read_text()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("router.py", lambda text: text + "\ndef broken(:\n"),
        ("router.py", lambda text: text.replace('f"ok: {counted(', 'f"{1 / 0} {counted(')),
        ("router.py", lambda text: text.replace("server.run()\n", "raise SystemExit(1)\n")),
        ("hr", lambda text: text + "\nif then\n"),
        ("requirements.txt", lambda text: text + "no-such-package-of-hermes-router\n"),
    ],
    ids=["syntax", "check fails", "does not serve", "bash", "requirements"],
)
def test_an_update_that_fails_is_undone(clone: Clone, name: str, change) -> None:
    assert clone.hr("start", "-d").returncode == 0
    before = clone.head
    marker = clone.home / ".venv" / "as it was"
    marker.touch()
    clone.publish(name, change)
    done = clone.hr("update")
    assert done.returncode == 1 and "going back" in done.stderr, done.stderr
    assert clone.head == before and clone.answers
    assert marker.exists() and not (clone.home / ".venv.old").exists()
    assert git(clone.home, "status", "--porcelain") == ""


def test_an_update_of_a_service(clone: Clone) -> None:
    clone.scope("user")
    assert clone.hr("service", "install", "--user").returncode == 0
    first, new = clone.pid, clone.publish("router.py", release)
    done = clone.hr("update")
    assert done.returncode == 0, done.stderr
    assert clone.head == new and clone.pid != first and clone.answers
    assert not (clone.home / "router.log").exists()


def test_changes_made_here_stop_an_update(clone: Clone) -> None:
    clone.publish("router.py", release)
    before = clone.head
    (clone.home / "requirements.txt").write_text("mine\n")
    done = clone.hr("update")
    assert done.returncode == 1 and "requirements.txt" in done.stderr
    assert clone.head == before
    assert (clone.home / "requirements.txt").read_text() == "mine\n"


def test_untracked_files_in_the_way_stop_an_update(clone: Clone) -> None:
    clone.publish("notes.txt", lambda _: "theirs")
    before = clone.head
    (clone.home / "notes.txt").write_text("mine")
    done = clone.hr("update")
    assert done.returncode == 1 and "notes.txt" in done.stderr
    assert clone.head == before and (clone.home / "notes.txt").read_text() == "mine"


def test_own_commits_stop_an_update(clone: Clone) -> None:
    clone.publish("router.py", release)
    (clone.home / "mine.txt").write_text("mine")
    git(clone.home, "add", ".")
    git(clone.home, "commit", "-qm", "mine")
    done = clone.hr("update")
    assert done.returncode == 1 and "commits of its own" in done.stderr


def test_no_network_and_no_clone(clone: Clone) -> None:
    shutil.rmtree(clone.origin)
    done = clone.hr("update")
    assert done.returncode == 1 and "could not be fetched" in done.stderr
    shutil.rmtree(clone.home / ".git")
    assert "is not a clone" in clone.hr("update").stderr


# ---- setup -------------------------------------------------------------------

KEYS = {"GROQ_API_KEY": "gsk_Zq0123456789abcdefXY", "GROQ_BASE_URL": "http://127.0.0.1:9/v1"}


def test_setup_starts_the_router_in_the_background(machine: Machine) -> None:
    done = machine.hr("setup", "--yes", **KEYS)
    assert done.returncode == 0, done.stderr
    assert machine.answers and "router.pid" in {path.name for path in machine.home.iterdir()}
    assert "enable" not in machine.calls
    assert f"http://127.0.0.1:{machine.port}/v1" in done.stdout
    assert machine.hr("key").stdout.strip() in done.stdout, "the real key"
    assert KEYS["GROQ_API_KEY"] in (machine.home / "auth.json").read_text()
    assert machine.hr("setup", "--yes").returncode == 0, "again"


def test_setup_installs_a_service_and_starts_one_that_is_there(machine: Machine) -> None:
    root = "system" if os.geteuid() == 0 else "user"
    file = machine.scope(root)
    done = machine.hr("setup", "--yes", "--service", **KEYS)
    assert done.returncode == 0, done.stderr
    assert file.exists() and machine.answers
    assert machine.hr("stop").returncode == 0
    again = machine.hr("setup", "--yes")
    assert again.returncode == 0 and "A service is installed" in again.stderr
    assert machine.answers and not (machine.home / "router.log").exists()


def test_setup_ends_when_the_service_fails(machine: Machine) -> None:
    machine.scope("system" if os.geteuid() == 0 else "user")
    (machine.fakes / "broken").touch()
    done = machine.hr("setup", "--yes", "--service", **KEYS)
    assert done.returncode == 1 and "could not be installed" in done.stderr
    assert not machine.answers and not (machine.home / "router.log").exists()


# ---- logs --------------------------------------------------------------------


def test_requests_through_hr(machine: Machine) -> None:
    started(machine)
    done = machine.hr("logs", "--requests", "--json")
    assert done.returncode == 0, done.stderr
    assert '"entries"' in done.stdout
