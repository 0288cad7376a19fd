"""State: what rests goes on resting after a restart; dead keys are asked again until they work."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import requests
from conftest import ROOT
from upstream import (
    AUTH,
    HELLO,
    KEY,
    Clock,
    Hang,
    Reply,
    Upstream,
    completion,
    good,
    provider,
    until,
)

import router
from router import ANY, Breakers, KeyChecks, KeyPool, StateFile

LONG = "sk-proj-AbCdEf0123456789-the-end-of-a-key"
OTHER = "gsk_ZyXwVu9876543210-another-key-0815"
DAY = 86_400.0


class Life:
    """One life of a router: its pool, its breakers and its file, each on clocks that tests move."""

    def __init__(self, path, wall, start=1000.0, keys=None, cooldown=60.0):
        self.now, self.wall = Clock(start), wall
        held = {"p": (LONG, OTHER), "q": ("",)} if keys is None else keys
        self.pool = KeyPool(held, "sequential", now=self.now)
        self.breakers = Breakers(cooldown=cooldown, now=self.now)
        self.file = StateFile(path, self.pool, self.breakers, self.now, wall)
        self.file.load()

    def fail(self, name, times=4):
        for _ in range(times):
            self.breakers.note(name, False)


@pytest.fixture
def wall():
    return Clock(1_790_000_000.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "router_state.json"


def written(path):
    return json.loads(path.read_text())


# --- over a restart ----------------------------------------------------------------------


def test_rests_go_on_for_what_is_left_of_them(path, wall):
    old = Life(path, wall)
    old.pool.rest("p", LONG, "m", 600, "rate_limited")
    old.pool.rest("p", OTHER, ANY, 3600, "dead_key")
    old.pool.rest("q", ANY, "m", 30, "timeout")
    old.now.pass_by(100)
    old.file.save()
    wall.pass_by(50)
    new = Life(path, wall, start=7.0)
    assert new.pool.soonest("p", "m") == pytest.approx(450, abs=0.2)
    assert new.pool.lease("p", "another").key == LONG
    assert new.pool.dead() == [("p", OTHER)]
    assert new.pool.lease("q", "m") is not None  # that one had ended


def test_a_dead_key_stays_in_quarantine_for_every_model(path, wall):
    old = Life(path, wall)
    old.pool.rest("p", LONG, ANY, 3600, "dead_key")
    old.file.save()
    new = Life(path, wall, start=0.0)
    assert [new.pool.lease("p", m).key for m in ("a", "b")] == [OTHER, OTHER]
    assert new.pool.lease("p", "a", tried={OTHER}, ignoring=router.GUESSES) is None


@pytest.mark.parametrize("start", [0.0, 5.0, 1e6])
def test_an_open_breaker_stays_open_and_then_lets_one_probe_in(path, wall, start):
    old = Life(path, wall, cooldown=10.0)
    old.fail("p")
    assert old.breakers.is_open("p")
    old.now.pass_by(2)
    old.file.save()
    wall.pass_by(3)
    new = Life(path, wall, start=start, cooldown=10.0)
    assert new.breakers.snapshot("p") == {
        "open": True,
        "opens_in_s": 5,
        "recent_health_fails": 4,
    }
    new.now.pass_by(4.5)
    assert not new.breakers.enter("p")
    new.now.pass_by(1)
    assert [new.breakers.enter("p") for _ in range(50)].count(True) == 1


@pytest.mark.parametrize("start", [0.0, 1000.0])
def test_a_breaker_whose_time_has_passed_is_half_open(path, wall, start):
    old = Life(path, wall)
    old.fail("p")
    old.file.save()
    wall.pass_by(DAY)
    new = Life(path, wall, start=start)
    assert [new.breakers.enter("p") for _ in range(5)] == [True, False, False, False, False]
    new.breakers.note("p", True)
    assert not new.breakers.snapshot("p")["open"]


def test_the_window_of_a_closed_breaker_goes_on_for_an_hour(path, wall):
    old = Life(path, wall)
    old.fail("p", 3)
    old.file.save()
    wall.pass_by(3500)
    near = Life(path, wall)
    near.fail("p", 1)
    assert near.breakers.is_open("p")
    wall.pass_by(200)
    far = Life(path, wall)
    far.fail("p", 1)
    assert not far.breakers.is_open("p")


def test_health_without_a_failure_is_not_worth_a_file(path, wall):
    life = Life(path, wall)
    for _ in range(20):
        life.breakers.note("p", True)
    life.file.save()
    assert not path.exists()


def test_keys_and_providers_that_left_are_passed_over(path, wall):
    old = Life(path, wall)
    old.pool.rest("p", LONG, ANY, 3600, "dead_key")
    old.pool.rest("q", ANY, "m", 3600, "model_gone")
    old.fail("q")
    old.file.save()
    new = Life(path, wall, keys={"p": ("sk-a-new-key-of-somebody",)})
    assert (new.pool.rests(), new.breakers.circuits()) == ({}, {})


def test_a_key_moved_to_another_provider_is_another_key(path, wall):
    old = Life(path, wall, keys={"p": (LONG,), "r": (LONG,)})
    old.pool.rest("p", LONG, ANY, 3600, "dead_key")
    old.pool.rest("r", LONG, "m", 3600, "rate_limited")
    old.file.save()
    assert len({row["key"] for row in written(path)["rests"]}) == 2
    new = Life(path, wall, keys={"r": (LONG,)})
    assert new.pool.dead() == []


def test_three_lives(path, wall):
    first = Life(path, wall)
    first.pool.rest("p", LONG, "m", 3600, "rate_limited")
    first.file.save()
    second = Life(path, wall)
    second.pool.rest("p", OTHER, "m", 3600, "rate_limited")
    second.file.save()
    third = Life(path, wall)
    assert third.pool.lease("p", "m") is None


# --- clocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-400 * DAY, -3600.0, -1.0])
def test_a_clock_that_was_set_back_lengthens_nothing(path, wall, jump):
    old = Life(path, wall)
    old.pool.rest("p", LONG, "m", 600, "rate_limited")
    old.fail("p")
    old.file.save()
    wall.pass_by(jump)
    new = Life(path, wall)
    waits = [rest.until - new.now() for rest in new.pool.rests().values()]
    assert waits == [pytest.approx(600, abs=0.2)]
    assert new.breakers.snapshot("p")["opens_in_s"] <= 61


def test_a_clock_that_was_set_forward_ends_what_rests(path, wall):
    old = Life(path, wall)
    old.pool.rest("p", LONG, "m", 600, "rate_limited")
    old.file.save()
    wall.pass_by(400 * DAY)
    assert Life(path, wall).pool.rests() == {}


@pytest.mark.parametrize(
    ("why", "most"),
    [("timeout", DAY), ("dead_key", 8 * 3600), ("rate_limited", 31 * DAY), ("odd", 31 * DAY)],
)
def test_no_rest_is_longer_than_the_longest_of_its_kind(path, wall, why, most):
    old = Life(path, wall)
    old.pool.rest("p", LONG, ANY, 1e9, why)
    old.file.save()
    new = Life(path, wall)
    assert [r.until - new.now() for r in new.pool.rests().values()] == [most]


def test_a_breaker_is_open_for_no_longer_than_its_cooldown(path, wall):
    old = Life(path, wall, cooldown=1e6)
    old.fail("p")
    old.file.save()
    new = Life(path, wall, cooldown=5.0)
    assert new.breakers.snapshot("p")["opens_in_s"] == 5


# --- what stands in the file -------------------------------------------------------------


def traces(key):
    """What must not be found: the key, its pieces, and hashes without a salt, in any spelling."""
    pieces = [key, key[:8], *(key[-size:] for size in range(4, 13))]
    for name in ("md5", "sha1", "sha224", "sha256", "sha512", "blake2b", "sha3_256"):
        digest = hashlib.new(name, key.encode()).hexdigest()
        pieces += [digest, digest[:16], digest[-16:]]
    return pieces


def test_nothing_of_a_key_is_in_the_file(path, wall):
    life = Life(path, wall)
    for key in (LONG, OTHER):
        life.pool.rest("p", key, "m", 600, "rate_limited")
        life.pool.rest("p", key, ANY, 600, "dead_key")
    life.file.save()
    text = path.read_text()
    assert [t for key in (LONG, OTHER) for t in traces(key) if t in text] == []
    rows = written(path)["rests"]
    assert {len(row["key"]) for row in rows} == {32}
    assert len({row["key"] for row in rows}) == 2


def test_two_files_share_no_fingerprint_and_one_keeps_its_own(tmp_path, wall):
    marks = []
    for name in ("a", "b"):
        life = Life(tmp_path / name, wall)
        life.pool.rest("p", LONG, "m", 600, "rate_limited")
        life.file.save()
        marks.append(written(tmp_path / name)["rests"][0]["key"])
    assert marks[0] != marks[1]
    again = Life(tmp_path / "a", wall)
    again.pool.rest("p", LONG, "n", 600, "rate_limited")
    again.file.save()
    assert {row["key"] for row in written(tmp_path / "a")["rests"]} == {marks[0]}


def test_the_file_is_the_owners_only(path, wall):
    path.parent.chmod(0o755)
    life = Life(path, wall)
    life.pool.rest("p", LONG, "m", 600, "rate_limited")
    life.file.save()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_ended_is_dropped_and_what_did_not_change_is_not_written(path, wall):
    life = Life(path, wall)
    life.pool.rest("p", LONG, "m", 10, "rate_limited")
    life.pool.rest("p", LONG, "n", 600, "rate_limited")
    life.file.save()
    before = path.stat().st_mtime_ns
    life.now.pass_by(5)
    wall.pass_by(5)
    life.file.save()
    assert path.stat().st_mtime_ns == before
    life.now.pass_by(6)
    life.file.save()
    assert [row["model"] for row in written(path)["rests"]] == ["n"]


def test_the_file_is_bounded_and_keeps_what_ends_last(path, wall, monkeypatch):
    monkeypatch.setattr(StateFile, "MAX_RESTS", 5)
    life = Life(path, wall)
    for number in range(50):
        life.pool.rest("p", LONG, f"m{number}", 100 + number, "rate_limited")
    life.pool.rest("p", LONG, "x" * 100_000, 5000, "rate_limited")
    life.file.save()
    assert [row["model"] for row in written(path)["rests"]] == [f"m{n}" for n in range(49, 44, -1)]
    assert path.stat().st_size < 2000


def test_a_model_of_any_name_is_kept(path, wall):
    old = Life(path, wall)
    for model in ("é\u2028\x00", "\ud800", 'a"b\\', "*x"):
        old.pool.rest("p", LONG, model, 600, "rate_limited")
    old.file.save()
    assert Life(path, wall).pool.rests().keys() == old.pool.rests().keys()


# --- files that are not as they should be ------------------------------------------------


GOOD_FILE = {
    "hermes_router_state": 1,
    "saved_at": 1_790_000_000.0,
    "salt": "00" * 16,
    "rests": [],
    "breakers": {},
}
SPOILT = {
    "empty": "",
    "not json": "{oops",
    "cut off": json.dumps(GOOD_FILE)[:-9],
    "binary": b"\xff\xfe\x00\x01",
    "a list": "[]",
    "of another program": json.dumps({"last_updated": "x", "providers": {}, "model_state": {}}),
    "of a later version": json.dumps({**GOOD_FILE, "hermes_router_state": 2}),
    "no salt": json.dumps({**GOOD_FILE, "salt": None}),
    "a short salt": json.dumps({**GOOD_FILE, "salt": "00"}),
    "no time": json.dumps({**GOOD_FILE, "saved_at": "x"}),
    "time is nan": json.dumps({**GOOD_FILE, "saved_at": float("nan")}),
    "time is huge": json.dumps(GOOD_FILE).replace("1790000000.0", "9" * 400),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_file_that_cannot_be_used_is_set_aside_once(path, wall, caplog, name):
    spoilt = SPOILT[name] if isinstance(SPOILT[name], bytes) else SPOILT[name].encode()
    path.write_bytes(spoilt)
    path.chmod(0o644)
    bad = path.with_name("router_state.json.bad")
    bad.write_text("an older one")
    life = Life(path, wall)
    assert len(caplog.records) == 1
    assert "router_state.json.bad" in caplog.text
    assert bad.read_bytes() == spoilt
    assert stat.S_IMODE(bad.stat().st_mode) == 0o600
    assert not path.exists()
    life.pool.rest("p", LONG, "m", 600, "rate_limited")
    life.file.save()
    assert len(Life(path, wall).pool.rests()) == 1
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, bad.name]


def test_a_huge_file_is_not_read(path, wall, caplog):
    with path.open("wb") as file:
        file.truncate(1 << 34)
    Life(path, wall)
    assert "bytes" in caplog.text
    assert not path.exists()


def row(**change):
    mark = StateFile(None, KeyPool({}), Breakers())
    mark._salt = bytes(16)
    plain = {
        "provider": "p",
        "key": mark._fingerprint("p", LONG),
        "model": "m",
        "until": 1_790_000_600.0,
        "why": "rate_limited",
    }
    return {**plain, **change}


@pytest.mark.parametrize(
    "rests",
    [
        None,
        {},
        "x",
        [None, 1, "x", [], {}],
        [row(provider=None)],
        [row(provider="nobody", key=ANY)],
        [row(key=LONG)],
        [row(key=["x"])],
        [row(model={})],
        [row(model="")],
        [row(model="x" * 300)],
        [row(until=None)],
        [row(until="x")],
        [row(until=True)],
        [row(until=float("nan"))],
        [row(until=float("-inf"))],
        [row(until=-1e308)],
        [row(why="x" * 100)],
    ],
)
@pytest.mark.parametrize(
    "breakers",
    [None, [], {"p": None}, {"p": {}}, {"p": {"outcomes": "012"}}, {"p": {"outcomes": 1}}],
)
def test_rows_without_sense_are_passed_over(path, wall, caplog, rests, breakers):
    path.write_text(json.dumps({**GOOD_FILE, "rests": rests, "breakers": breakers}))
    life = Life(path, wall)
    assert (life.pool.rests(), life.breakers.circuits()) == ({}, {})
    assert caplog.records == []
    assert path.exists()


def test_a_row_that_makes_sense_is_taken_among_those_that_do_not(path, wall):
    document = {**GOOD_FILE, "rests": [None, row(until=1e308), {}], "unknown": 1}
    path.write_text(json.dumps({**document, "breakers": {"p": {"outcomes": "0", "open_until": 9}}}))
    life = Life(path, wall)
    assert [rest.why for rest in life.pool.rests().values()] == ["rate_limited"]
    assert life.breakers.snapshot("p")["open"]


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_file_is_left_alone(path, wall, caplog, kind):
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    life = Life(path, wall)
    life.pool.rest("p", LONG, "m", 600, "rate_limited")
    life.file.save()
    assert len(caplog.records) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_that_cannot_be_set_aside_is_not_written_over(path, wall, caplog):
    path.write_text("{oops")
    path.with_name("router_state.json.bad").mkdir()
    life = Life(path, wall)
    life.pool.rest("p", LONG, "m", 600, "rate_limited")
    life.file.save()
    assert path.read_text() == "{oops"
    assert len(caplog.records) == 1


def test_a_link_stays_a_link(tmp_path, wall):
    real, link = tmp_path / "real.json", tmp_path / "router_state.json"
    link.symlink_to(real)
    life = Life(link, wall)
    life.pool.rest("p", LONG, "m", 600, "rate_limited")
    life.file.save()
    assert link.is_symlink()
    assert len(written(real)["rests"]) == 1


def test_what_a_killed_writer_left_is_swept_away_when_it_is_old(path, wall):
    old, young = path.with_name(".router_state.json.abcd1234"), path.with_name("x.abcd1234")
    for file in (old, young, path.with_name(".router_state.json.abcd5678")):
        file.write_text("half")
    os.utime(old, (wall() - 7200, wall() - 7200))
    os.utime(path.with_name(".router_state.json.abcd5678"), (wall(), wall()))
    Life(path, wall)
    left = sorted(p.name for p in path.parent.iterdir())
    assert left == [".router_state.json.abcd5678", "x.abcd1234"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("os.fsync", OSError(28, "No space left on device")),
        ("os.replace", OSError(16, "Device or resource busy")),
        ("tempfile.mkstemp", OSError(30, "Read-only file system")),
    ],
)
def test_a_disk_that_fails_is_one_warning_and_the_old_file_stays(
    path, wall, caplog, monkeypatch, call, error
):
    def fails(*_arguments, **_options):
        raise error

    life = Life(path, wall)
    life.pool.rest("p", LONG, "m", 600, "rate_limited")
    life.file.save()
    before = path.read_text()
    with monkeypatch.context() as full:
        full.setattr(f"router.{call}", fails)
        for number in range(5):
            life.pool.rest("p", LONG, f"m{number}", 600, "rate_limited")
            life.file.save()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert error.strerror in caplog.text
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    caplog.set_level(logging.INFO)
    life.file.save()
    assert len(written(path)["rests"]) == 6
    assert "again" in caplog.text


def test_a_folder_that_is_missing_is_made(tmp_path, wall):
    path = tmp_path / "new" / "state.json"
    life = Life(path, wall)
    life.pool.rest("p", LONG, "m", 600, "rate_limited")
    life.file.save()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(written(path)["rests"]) == 1


def test_many_writers_of_one_file_never_break_it(path, wall):
    lives = [Life(path, wall) for _ in range(8)]
    broken, stop = [], threading.Event()

    def write(life):
        for number in range(20):
            life.pool.rest("p", LONG, f"m{number}", 600, "rate_limited")
            life.file.save()

    def read():
        while not stop.is_set():
            with contextlib.suppress(FileNotFoundError):
                try:
                    written(path)
                except ValueError as error:
                    broken.append(error)

    threads = [threading.Thread(target=write, args=(life,)) for life in lives]
    reader = threading.Thread(target=read)
    reader.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    reader.join(10)
    assert broken == []
    assert len(Life(path, wall).pool.rests()) == 20
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_one_thread_writes_soon_and_at_the_end(path, wall, monkeypatch):
    monkeypatch.setattr(StateFile, "EVERY_S", 0.02)
    life = Life(path, wall)
    life.file.start()
    life.pool.rest("p", LONG, "m", 600, "rate_limited")
    until(path.exists)
    monkeypatch.setattr(StateFile, "EVERY_S", 60)
    time.sleep(0.05)
    life.pool.rest("p", LONG, "n", 600, "rate_limited")
    life.file.close()
    life.file.close()
    assert len(written(path)["rests"]) == 2


def test_it_may_be_turned_off(tmp_path):
    for name in ("ROUTER_STATE_FILE", "STATE_FILE"):
        config = router.Config.from_env({"HR_HOME": str(tmp_path), name: ""})
        assert config.state_file == ""
    config = router.Config.from_env({"HR_HOME": str(tmp_path)})
    assert config.state_file == "router_state.json"
    config = router.Config.from_env({"HR_HOME": str(tmp_path), "STATE_FILE": "a/b.json"})
    assert config.state_file == "a/b.json"
    life = StateFile(None, KeyPool({"p": ("k",)}), Breakers())
    life.start()
    life.save()
    life.close()


# --- a real process ----------------------------------------------------------------------


def ask(running):
    url = f"{running.url}/v1/chat/completions"
    body = {"model": "hermes-router", "messages": HELLO}
    with requests.Session() as session:
        session.trust_env = False
        return session.post(url, json=body, headers=AUTH, timeout=60)


def status_of(running, name="groq"):
    with requests.Session() as session:
        session.trust_env = False
        answer = session.get(f"{running.url}/v1/status", headers=AUTH, timeout=60)
        return answer.json()["providers"][name]


LIMITED = Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "3600"})
REVOKED = Reply(401, {"error": {"message": "Invalid API Key", "code": "invalid_api_key"}})
BROKEN = Reply(503, {"error": {"message": "down"}})


def by_key(answers):
    """A provider that answers by the key it is asked with."""

    def answer(request):
        return answers[request.key]

    return answer


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_forgets_nothing(upstream, launch, tmp_path, how):
    third = "gsk_third_key_that_works_xyzw"
    keys = {LONG: REVOKED, OTHER: LIMITED, third: Reply(200, completion())}
    groq = upstream(by_key(keys))
    bad = upstream(BROKEN)
    settings = {
        **provider("groq", groq, "m1", keys=",".join(keys)),
        **provider("mistral", bad, "m2,m3,m4,m5", keys="mistral-key-000001"),
        "BREAKER_COOLDOWN": "600",
    }
    settings["HR_HOME"] = str(tmp_path)
    first = launch(**settings)
    for model in ("mistral/m2", "mistral/m3", "mistral/m4", "mistral/m5"):
        url = f"{first.url}/v1/chat/completions"
        requests.post(url, json={"model": model, "messages": HELLO}, headers=AUTH, timeout=60)
    for _ in range(3):
        assert ask(first).status_code == 200
    assert status_of(first, "mistral")["breaker"]["open"]
    path = tmp_path / "router_state.json"
    if how == signal.SIGKILL:
        until(lambda: path.exists() and len(written(path)["breakers"]) == 1, 20)
        until(lambda: sum(r["provider"] == "groq" for r in written(path)["rests"]) == 2, 20)
        first.process.kill()
        first.process.wait(30)
    else:
        assert first.stop() == 0
    text = path.read_text()
    assert [t for key in keys for t in traces(key) if t in text] == []
    assert KEY not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    asked = len(groq.requests), len(bad.requests)
    second = launch(**settings)
    until(lambda: "go on" in second.text)
    for _ in range(4):
        assert ask(second).status_code == 200
    later = groq.requests[asked[0] :]
    assert {request.key for request in later} == {third}
    assert len(bad.requests) <= asked[1] + 1  # the one probe, if the restart took long
    assert status_of(second, "mistral")["breaker"]["open"]
    rests = [r["models"]["m1"]["why"] for r in status_of(second)["keys"] if r["models"]]
    assert rests == ["dead_key", "rate_limited"]
    assert second.stop() == 0
    assert not [t for key in keys for t in traces(key)[:1] if t in first.text + second.text]


def test_a_process_starts_with_a_spoilt_file(upstream, launch, tmp_path):
    (tmp_path / "router_state.json").write_text('{"hermes_router_state": 1, "rests"')
    running = launch(**provider("groq", upstream(good()), "m1"))
    assert ask(running).status_code == 200
    assert "router_state.json cannot be used" in running.text
    assert "Traceback" not in running.text
    assert (tmp_path / "router_state.json.bad").exists()
    assert running.stop() == 0


def test_a_process_lives_where_nothing_can_be_written(upstream, launch, tmp_path):
    """A folder that is a file cannot be written to, not even by root."""
    (tmp_path / "a").write_text("a file, no folder")
    one = upstream(by_key({LONG: REVOKED, OTHER: Reply(200, completion())}))
    settings = provider("groq", one, "m1", keys=f"{LONG},{OTHER}")
    running = launch(**settings, ROUTER_STATE_FILE="a/b/state.json")
    for _ in range(3):
        assert ask(running).status_code == 200
    until(lambda: "cannot be written" in running.text, 20)
    assert ask(running).status_code == 200
    assert running.stop() == 0
    assert running.text.count("cannot be written") == 1
    assert "Traceback" not in running.text


def full_disk():
    """In a child: no file may grow by a byte, as where no block is left."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_a_process_lives_on_a_full_disk(upstream, launch, tmp_path):
    env = tmp_path / ".env"
    env.write_text("LOG_LEVEL=INFO\n")
    up = upstream(by_key({LONG: REVOKED, OTHER: Reply(200, completion())}))
    rows = provider("groq", up, "m1", keys=f"{LONG},{OTHER}")
    running = launch(preexec=full_disk, **rows, PROXY_API_KEYS="", AUTH_MODE="keys")
    until(lambda: "listening on" in running.text, 20)
    assert ".env cannot be written" in running.text, "the new key lives in memory"
    until(lambda: requests.get(f"{running.url}/health", timeout=10).status_code == 200, 20)
    assert running.stop() == 0
    running = launch(preexec=full_disk, **rows)
    assert [ask(running).status_code for _ in range(3)] == [200, 200, 200]
    until(lambda: "router_state.json cannot be written" in running.text, 20)
    assert running.stop() == 0
    assert "Traceback" not in running.text
    assert env.read_text() == "LOG_LEVEL=INFO\n"
    left = {file.name for file in tmp_path.iterdir()} - {".env", ".env.lock"}
    assert {name.partition("-")[0] for name in left} <= {"usage.db"}, "nothing half-written is left"


SPOILT_AUTH = {
    "cut": b'{"providers": {"groq": ["gsk_',
    "binary": bytes(range(256)),
    "utf-16": '{"providers": {}}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "list": b"[]",
}


@pytest.mark.parametrize("content", SPOILT_AUTH.values(), ids=SPOILT_AUTH)
def test_a_process_starts_beside_a_spoilt_auth_json(upstream, launch, tmp_path, content):
    (tmp_path / "auth.json").write_bytes(content)
    running = launch(**provider("groq", upstream(good()), "m1"))
    assert ask(running).status_code == 200
    assert running.stop() == 0
    assert "auth.json is ignored" in running.text and "Traceback" not in running.text
    assert (tmp_path / "auth.json").read_bytes() == content


WRITERS = """
import json, os, pathlib, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import router

home = pathlib.Path(sys.argv[2])
state, auth, env = home / "router_state.json", home / "auth.json", home / ".env"


def write_state():
    pool = router.KeyPool({"p": ("key",)})
    file = router.StateFile(state, pool, router.Breakers())
    file.load()
    for number in range(10**6):
        for at in range(50):
            pool.rest("p", "key", f"model-{at}-{number}", 600, "rate_limited")
        file.save()


def write_auth():
    accounts = router.Accounts(
        router.read_accounts(json.loads(auth.read_text())), auth, renew, time.time, "http://token"
    )
    token = accounts.access_token("acc")
    while True:
        accounts.reject("acc", token)
        token = accounts.access_token("acc")


def renew(url, body, timeout):
    number = int(body["refresh_token"])
    return 200, {"access_token": f"a{number}", "refresh_token": str(number + 1), "expires_in": 9}


def write_env():
    while True:
        router.with_proxy_key(router.Config.from_env({"HR_HOME": str(home)}))
        lines = [x for x in env.read_text().splitlines() if not x.startswith("PROXY")]
        router.write_private(env, "\\n".join(lines) + "\\n")


def whole():
    if state.exists():
        assert json.loads(state.read_text())["hermes_router_state"] == 1
    (row,) = json.loads(auth.read_text())["codex_accounts"]
    number = int(row["refresh_token"])
    assert row["access_token"] in ("", f"a{number - 1}"), row
    assert env.read_text().startswith("LOG_LEVEL=INFO\\nGROQ_MODEL=" + "m" * 5000 + "\\n")
    return number


random.seed(int(sys.argv[3]))
seen = 0
for _ in range(60):
    children = []
    for job in (write_state, write_auth, write_env):
        if not (child := os.fork()):
            job()
        children.append(child)
    time.sleep(random.uniform(0.001, 0.04))
    for child in children:
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert whole() >= seen
    seen = whole()
print("whole", seen, state.exists())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_files_stay_whole_when_their_writers_are_killed_at_any_moment(tmp_path):
    row = {"account_id": "acc", "access_token": "", "refresh_token": "1", "more": "x" * 20_000}
    (tmp_path / "auth.json").write_text(json.dumps({"codex_accounts": [row]}))
    (tmp_path / ".env").write_text("LOG_LEVEL=INFO\nGROQ_MODEL=" + "m" * 5000 + "\n")
    command = [sys.executable, "-B", "-c", WRITERS, str(ROOT), str(tmp_path), "7"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    word, count, state = (ran.stdout.split() or ["", "0", ""])[:3]
    assert (word, state) == ("whole", "True") and int(count) > 60, ran.stderr[-2000:]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_warning(path, wall, caplog):
    life = Life(path, wall)
    path.parent.chmod(0o500)
    try:
        for number in range(3):
            life.pool.rest("p", LONG, f"m{number}", 600, "rate_limited")
            life.file.save()
    finally:
        path.parent.chmod(0o700)
    assert len(caplog.records) == 1


# --- dead keys are asked again -----------------------------------------------------------


class Asked:
    """Stands in for providers: what a question is answered with, and who was asked when."""

    def __init__(self, clock):
        self.clock, self.answer, self.calls = clock, "dead", []

    def __call__(self, name, key, by_chat):
        self.calls.append((self.clock(), name, key, by_chat))
        return self.answer(name, key) if callable(self.answer) else self.answer


@pytest.fixture
def checks(monkeypatch):
    """A pool with two providers, and its checks on a clock that tests move, without jitter."""
    monkeypatch.setattr(router, "jitter", lambda: 1.0)
    clock = Clock()
    pool = KeyPool({"p": (LONG, OTHER), "q": ("k",)}, now=clock)
    asked = Asked(clock)
    made = KeyChecks(pool, asked, clock)
    made.pool, made.clock, made.asked = pool, clock, asked
    return made


def live(checks, hours):
    """Let time pass as the thread would: from one question to the next."""
    end = checks.clock() + hours * 3600
    while (wait := checks.run_due()) is not None and checks.clock() + wait <= end:
        checks.clock.pass_by(max(wait, 0.001))
    checks.clock.time = end


def test_the_questions_become_rarer_and_the_key_never_gets_out_between(checks):
    checks.pool.rest("p", LONG, ANY, 3600, "dead_key")
    start = checks.clock()
    for _ in range(60 * 24):
        checks.run_due()
        assert checks.pool.lease("p", "m").key == OTHER
        checks.clock.pass_by(60)
    minutes = [(when - start) / 60 for when, *_ in checks.asked.calls]
    assert minutes == [15, 45, 105, 225, 465, 825, 1185]


def test_a_key_that_is_valid_again_is_free_at_once(checks):
    checks.pool.rest("p", LONG, ANY, 3600, "dead_key")
    checks.pool.rest("p", LONG, "limited", 36_000, "rate_limited")
    live(checks, 0.3)
    assert len(checks.asked.calls) == 1
    checks.asked.answer = "valid"
    live(checks, 0.5)
    assert checks.pool.dead() == []
    assert checks.pool.lease("p", "m", tried={OTHER}).key == LONG
    assert checks.pool.lease("p", "limited", tried={OTHER}) is None
    assert checks.run_due() is None
    live(checks, 48)
    assert len(checks.asked.calls) == 2


def test_nobody_is_asked_while_no_key_is_dead(checks):
    checks.pool.rest("p", LONG, "m", 3600, "rate_limited")
    checks.pool.rest("p", LONG, ANY, 3600, "no_credit")
    checks.pool.rest("p", ANY, "m", 3600, "model_gone")
    assert checks.run_due() is None
    live(checks, 24)
    assert checks.asked.calls == []


def test_an_answer_that_tells_nothing_changes_nothing(checks):
    checks.asked.answer = "unclear"
    checks.pool.rest("p", LONG, ANY, 3600, "dead_key")
    live(checks, 24)
    assert len(checks.asked.calls) == 3  # then its quarantine ended and a request may find out
    assert checks.pool.dead() == []


def test_a_key_freed_by_mistake_goes_on_where_it_had_stopped(checks):
    checks.asked.answer = "valid"
    checks.pool.rest("p", LONG, ANY, 3600, "dead_key")
    live(checks, 0.26)
    checks.pool.rest("p", LONG, ANY, 3600, "dead_key")  # a request says otherwise
    live(checks, 0.4)
    assert len(checks.asked.calls) == 1
    live(checks, 0.2)
    assert [by_chat for *_, by_chat in checks.asked.calls] == [False, True]


def test_after_a_long_time_a_key_is_a_new_case(checks):
    checks.asked.answer = "valid"
    checks.pool.rest("p", LONG, ANY, 3600, "dead_key")
    live(checks, 0.3)
    live(checks, 24)
    checks.run_due()
    checks.pool.rest("p", LONG, ANY, 3600, "dead_key")
    live(checks, 0.3)
    assert [by_chat for *_, by_chat in checks.asked.calls] == [False, False]


def test_a_question_that_fails_does_not_end_the_others(monkeypatch, caplog):
    monkeypatch.setattr(KeyChecks, "FIRST_S", 0.01)
    pool = KeyPool({"p": (LONG, OTHER)})
    calls = []

    def answer(name, key, by_chat):
        calls.append(key)
        if len(calls) == 1:
            raise RuntimeError("odd")
        return "valid"

    made = KeyChecks(pool, answer)
    for key in (LONG, OTHER):
        pool.rest("p", key, ANY, 3600, "dead_key")
    made.start()
    until(lambda: not pool.dead())
    made.close()
    assert "could not be checked" in caplog.text


def test_one_question_at_a_time_however_often_it_is_woken(monkeypatch):
    monkeypatch.setattr(KeyChecks, "FIRST_S", 0.01)
    keys = tuple(f"key-{n}" for n in range(20))
    pool = KeyPool({"p": keys, "q": keys})
    lock, most = threading.Lock(), []

    def answer(name, key, by_chat):
        assert lock.acquire(blocking=False)
        most.append(key)
        time.sleep(0.002)
        lock.release()
        return "valid"

    made = KeyChecks(pool, answer)
    made.start()

    def kill(name):
        for key in keys:
            pool.rest(name, key, ANY, 3600, "dead_key")
            made.wake()

    threads = [threading.Thread(target=kill, args=(name,)) for name in ("p", "q")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    until(lambda: not pool.dead())
    made.close()
    assert len(most) == 40


def test_jitter_stays_near_one():
    seen = {router.jitter() for _ in range(200)}
    assert 0.9 <= min(seen) < max(seen) <= 1.1


# --- how providers are asked -------------------------------------------------------------


class Checked(Upstream):
    """A scripted provider whose GETs are scripted too: `get` is a function Request -> Reply."""

    def __init__(self, script, get):
        super().__init__(script)
        self.get = get

    def next_answer(self, request):
        if request.method == "POST":
            return super().next_answer(request)
        self.gets.append(request)
        return self.get(request)


@pytest.fixture
def checked(upstreams):
    def make(script, get):
        upstreams.append(Checked(script, get))
        return upstreams[-1]

    return make


def probe(make_app, up, name="groq", **settings):
    app = make_app(**provider(name, up, "m1", keys=LONG), **settings)
    made = app.extensions["router"]
    return made, lambda by_chat=False: made.probe.ask(name, LONG, by_chat)


NOTHING = Reply(404, {"error": {"message": "no such page"}})


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (Reply(200, {"data": []}), "valid"),
        (Reply(200, "x" * 3_000_000), "valid"),
        (REVOKED, "dead"),
        (
            Reply(400, [{"error": {"message": "API key not valid. Please pass a valid one."}}]),
            "dead",
        ),
        (Reply(401, {"detail": "Unauthorized"}), "dead"),
        (Reply(402, {"error": {"message": "Payment required"}}), "valid"),
        (Reply(429, {"error": {"message": "too many"}}), "unclear"),
        (Reply(500, {"error": {"message": "oops"}}), "unclear"),
        (Reply(302, "", {"Location": "http://127.0.0.1:1/elsewhere"}), "unclear"),
        (Reply(200, {"data": []}, stop_at=3), "valid"),
    ],
)
def test_the_list_of_models_tells(make_app, checked, reply, found):
    up = checked(good(), lambda request: reply)
    _, ask_it = probe(make_app, up)
    assert ask_it() == found
    assert up.requests == []
    (get,) = up.gets
    assert (get.path, get.key) == ("/v1/models", LONG)
    assert "content-length" not in get.headers


@pytest.mark.parametrize("reply", [Hang(60), Reply(200, "", delay=60)])
def test_a_provider_that_is_silent_tells_nothing(make_app, checked, monkeypatch, reply):
    monkeypatch.setattr(router.KeyProbe, "LIMIT_S", 0.2)
    _, ask_it = probe(make_app, checked(good(), lambda request: reply))
    started = time.monotonic()
    assert ask_it() == "unclear"
    assert time.monotonic() - started < 20
    up = checked(good(), lambda request: REVOKED)
    assert probe(make_app, up)[1]() == "dead"


def test_a_provider_that_is_gone_tells_nothing(make_app, checked):
    up = checked(good(), lambda request: REVOKED)
    _, ask_it = probe(make_app, up)
    up.close()
    assert ask_it() == "unclear"


SCOPES = Reply(401, {"error": {"message": "insufficient permissions. Missing scopes: model.read"}})


@pytest.mark.parametrize("get", [NOTHING, Reply(405, ""), Reply(403, "forbidden"), SCOPES])
@pytest.mark.parametrize(
    ("post", "found"),
    [
        (Reply(200, completion()), "valid"),
        (Reply(200, completion("")), "valid"),
        (REVOKED, "dead"),
        (Reply(402, {"error": {"message": "Payment required"}}), "valid"),
        (Reply(404, {"error": {"message": "model not found"}}), "unclear"),
        (LIMITED, "unclear"),
    ],
)
def test_where_the_list_tells_nothing_a_token_is_asked_for(make_app, checked, get, post, found):
    up = checked([post], lambda request: get)
    made, ask_it = probe(make_app, up, GROQ_REASONING="1")
    assert ask_it() == found
    (request,) = up.requests
    assert request.json.get("max_tokens", request.json.get("max_completion_tokens")) == 1
    assert (request.key, request.model) == (LONG, "m1")
    # It was no request: nobody rests for it, nothing is counted.
    assert made.keys.rests() == {}
    assert made.usage.tally("groq").requests == 0
    assert made.breakers.circuits() == {}


@pytest.mark.parametrize("name", ["venice", "nvidia", "local"])
def test_a_list_that_anybody_may_read_is_not_asked(make_app, checked, name):
    up = checked([REVOKED], lambda request: Reply(200, {"data": []}))
    settings = {**provider(name, up, "m1"), f"{name.upper()}_API_KEY": LONG}
    made = make_app(**settings).extensions["router"]
    assert made.probe.ask(name, LONG) == "dead"
    assert (len(up.gets), len(up.requests)) == (0, 1)


def test_openrouter_has_a_page_about_the_key(make_app, checked):
    up = checked(good(), lambda request: REVOKED if request.path == "/v1/key" else NOTHING)
    _, ask_it = probe(make_app, up, "openrouter")
    assert ask_it() == "dead"
    assert up.requests == []


def test_anthropic_is_asked_in_its_own_way(make_app, checked):
    seen = []

    def get(request):
        seen.append(request.headers)
        return Reply(401, {"type": "error", "error": {"message": "invalid x-api-key"}})

    _, ask_it = probe(make_app, checked(good(), get), "anthropic")
    assert ask_it() == "dead"
    assert (seen[0]["x-api-key"], seen[0]["anthropic-version"]) == (LONG, "2023-06-01")
    assert "authorization" not in seen[0]


def token(name):
    claims = base64.urlsafe_b64encode(json.dumps({"exp": time.time() + 9e5, "n": name}).encode())
    return f"x.{claims.decode().rstrip('=')}.y"


def test_an_account_is_asked_with_its_token_and_a_refused_one_is_renewed(
    make_app, checked, upstream, tmp_path
):
    old, new = token("old"), token("new")
    row_ = {"account_id": "acc-0123456789abc", "refresh_token": "r1", "access_token": old}
    (tmp_path / "auth.json").write_text(json.dumps({"codex_accounts": [row_]}))
    up = checked(good(), lambda request: Reply(200 if request.key == new else 401, {}))
    sign_in = upstream(Reply(200, {"access_token": new, "refresh_token": "r2"}))
    app = make_app(CODEX_BASE_URL=up.url, CODEX_TOKEN_URL=sign_in.url + "/token")
    asked = app.extensions["router"].probe.ask
    assert [asked("codex", "acc-0123456789abc") for _ in range(2)] == ["dead", "valid"]
    assert up.gets[0].path.endswith("/models?client_version=0.0.0")
    assert up.gets[0].headers["chatgpt-account-id"] == "acc-0123456789abc"
    assert (len(up.requests), len(sign_in.requests)) == (0, 1)


def test_every_provider_row_says_how_its_keys_are_checked():
    for row_ in router.PROVIDERS:
        assert row_.key_check == "" or row_.key_check.startswith("/"), row_.name


# --- all of it together ------------------------------------------------------------------


def test_a_revoked_key_is_quarantined_asked_again_and_freed(serve, checked, monkeypatch):
    monkeypatch.setattr(KeyChecks, "FIRST_S", 0.1)
    works = threading.Event()

    def get(request):
        return Reply(200, {"data": []}) if works.is_set() else REVOKED

    def post(request):
        fine = request.key == OTHER or works.is_set()
        return Reply(200, completion()) if fine else REVOKED

    up = checked(post, get)
    groq = provider("groq", up, "m1,m2", keys=f"{LONG},{OTHER}")
    made = serve(**groq)
    hub = made.app.extensions["router"]
    hub.start()
    for model in ("groq/m1", "groq/m2") * 3:
        assert made.chat(model=model).status_code == 200
    assert [r.key for r in up.requests].count(LONG) == 1
    until(lambda: len(up.gets) >= 2)
    assert {r.key for r in up.gets} == {LONG}
    assert hub.keys.dead() == [("groq", LONG)]
    works.set()
    until(lambda: not hub.keys.dead())
    asked = len(up.gets)
    for _ in range(2):
        assert made.chat(model="groq/m1").status_code == 200
    assert {r.key for r in up.requests[-2:]} == {LONG, OTHER}
    time.sleep(0.3)
    assert len(up.gets) == asked


def test_the_checks_can_be_turned_off(serve, checked, monkeypatch):
    monkeypatch.setattr(KeyChecks, "FIRST_S", 0.02)
    up = checked([REVOKED], lambda request: Reply(200, {"data": []}))
    made = serve(**provider("groq", up, "m1", keys=LONG), KEY_RECHECK="0")
    hub = made.app.extensions["router"]
    hub.start()
    assert made.chat().status_code >= 500
    time.sleep(0.3)
    assert (up.gets, hub.keys.dead()) == ([], [("groq", LONG)])


def test_closing_does_not_wait_for_a_question_under_way(serve, checked, monkeypatch):
    monkeypatch.setattr(KeyChecks, "FIRST_S", 0.02)
    up = checked([REVOKED], lambda request: Hang(60))
    made = serve(**provider("groq", up, "m1", keys=LONG))
    hub = made.app.extensions["router"]
    hub.start()
    made.chat()
    until(lambda: up.gets)
    started = time.monotonic()
    hub.close()
    assert time.monotonic() - started < 20
    assert not [t for t in threading.enumerate() if t.name in ("key-checks", "state")]


def test_an_app_that_was_not_started_writes_nothing_and_asks_nobody(make_app, checked, tmp_path):
    up = checked([REVOKED], lambda request: REVOKED)
    app = make_app(**provider("groq", up, "m1", keys=LONG))
    app.test_client().post(
        "/v1/chat/completions", json={"model": "m1", "messages": HELLO}, headers=AUTH
    )
    app.extensions["router"].close()
    assert list(tmp_path.iterdir()) == []
    assert up.gets == []
