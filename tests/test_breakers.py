"""Breakers: a true sliding window, then exactly one probe, on a clock that tests move."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upstream import AUTH, HELLO, Clock, Hang, Reply, Stream, chunks, provider

from router import Breakers


@pytest.fixture
def breakers(clock):
    return Breakers(cooldown=15, now=clock)


def note(breakers, outcomes, provider="p"):
    """F = a failure, S = a success."""
    for outcome in outcomes:
        breakers.note(provider, outcome == "S")


@pytest.fixture
def due(breakers, clock):
    """A breaker that was open and may be probed now."""
    note(breakers, "FFFF")
    clock.pass_by(15)
    return breakers


# --- when it opens ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "is_open"),
    [
        ("", False),
        ("FFF", False),
        ("FFFF", True),
        ("FFFSFFF", True),
        ("SFSF", True),
        ("SSSF", False),
        ("SSSSSSSSFFF", False),
        ("SSSSSSSSFFFF", True),
        ("FSSSFSSSFSSSFSSS", False),
        ("FFFSSSSSSSSFFF", False),
    ],
)
def test_it_opens_by_the_share_of_failures_in_the_window(breakers, outcomes, is_open):
    note(breakers, outcomes)
    assert breakers.is_open("p") is is_open
    assert breakers.enter("p") is not is_open
    assert breakers.snapshot("p")["open"] is is_open


@pytest.mark.parametrize(
    ("outcomes", "is_open"), [("S", False), ("SSS", False), ("SSSS", True), ("SSSSS", False)]
)
def test_an_answer_that_breaks_off_was_no_success(clock, outcomes, is_open):
    breakers = Breakers(error_rate=0.9, now=clock)
    note(breakers, outcomes)
    for _ in range(min(len(outcomes), 4)):
        breakers.note("p", False, instead=True)
    assert breakers.snapshot("p")["recent_health_fails"] == min(len(outcomes), 4)
    assert breakers.is_open("p") is is_open


def test_a_provider_whose_streams_all_break_off_rests(upstream, make_app):
    up = upstream(Stream(chunks=chunks("a")[:2], done=False))
    keys = ",".join(f"groq-key-{number}" for number in range(6))
    app = make_app(BREAKER_ERROR_RATE="0.9", **provider("groq", up, keys=keys))
    asked = {"json": {"model": "m1", "messages": HELLO, "stream": True}, "headers": AUTH}
    for _ in range(4):
        app.test_client().post("/v1/chat/completions", **asked).get_data()
    assert app.extensions["router"].breakers.snapshot("groq")["open"]


def test_it_is_one_providers_affair(breakers):
    note(breakers, "FFFF")
    assert breakers.is_open("p") and not breakers.is_open("q") and breakers.enter("q")


def test_its_numbers_can_be_set(clock):
    breakers = Breakers(window=2, min_samples=2, error_rate=1.0, cooldown=5, now=clock)
    note(breakers, "FSFS")
    assert not breakers.is_open("p")
    note(breakers, "FF")
    assert breakers.is_open("p")
    clock.pass_by(5)
    assert breakers.enter("p")


def test_a_window_smaller_than_the_samples_it_needs_still_opens(clock):
    breakers = Breakers(window=2, min_samples=4, now=clock)
    note(breakers, "FF")
    assert breakers.is_open("p")


# --- open, half open, closed -----------------------------------------------------------


def test_it_stays_open_for_the_cooldown(breakers, clock):
    note(breakers, "FFFF")
    clock.pass_by(14.9)
    assert breakers.is_open("p") and not breakers.enter("p")
    clock.pass_by(0.1)
    assert not breakers.is_open("p") and breakers.enter("p")


def test_late_failures_do_not_prolong_the_cooldown(breakers, clock):
    note(breakers, "FFFF")
    clock.pass_by(10)
    note(breakers, "FFF")
    clock.pass_by(5)
    assert breakers.enter("p")


def test_a_late_success_does_not_end_the_cooldown(breakers, clock):
    """An answer that was under way when it opened is no probe."""
    note(breakers, "FFFFS")
    assert breakers.is_open("p")
    clock.pass_by(15)
    assert breakers.enter("p")


def test_only_one_may_probe(due):
    assert [due.enter("p") for _ in range(5)] == [True, False, False, False, False]
    assert due.is_open("p"), "for others it is as good as open while the probe is under way"


def test_of_fifty_at_once_exactly_one_probes(due):
    start, entered = threading.Barrier(50), []

    def enter():
        start.wait()
        if due.enter("p"):
            entered.append(threading.get_ident())

    threads = [threading.Thread(target=enter) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 1


def test_a_probe_that_succeeds_closes_it_and_clears_the_window(due):
    assert due.enter("p")
    note(due, "S")
    assert not due.is_open("p") and due.snapshot("p")["recent_health_fails"] == 0
    note(due, "FFF")
    assert not due.is_open("p")
    assert all(due.enter("p") for _ in range(5))


def test_a_probe_that_fails_opens_it_for_another_cooldown(due, clock):
    assert due.enter("p")
    note(due, "F")
    assert due.is_open("p")
    clock.pass_by(14)
    assert not due.enter("p")
    clock.pass_by(1)
    assert [due.enter("p"), due.enter("p")] == [True, False]


def test_failed_probes_make_the_pause_longer_up_to_the_cooldown(clock):
    breakers = Breakers(cooldown=60, now=clock)
    note(breakers, "FFFF")
    for pause in (15, 15, 30, 60, 60):
        assert breakers.snapshot("p")["opens_in_s"] == pause
        clock.pass_by(pause)
        assert breakers.enter("p")
        note(breakers, "F")
    clock.pass_by(60)
    assert breakers.enter("p")
    note(breakers, "S" + "FFFF")
    assert breakers.snapshot("p")["opens_in_s"] == 15, "well again: it starts anew"


def test_a_probe_that_says_nothing_is_given_back(due):
    assert due.enter("p")
    due.leave("p")
    assert [due.enter("p"), due.enter("p")] == [True, False]


def test_a_probe_that_never_comes_back_is_given_to_another(due, clock):
    assert due.enter("p")
    clock.pass_by(24 * 3600)
    assert [due.enter("p"), due.enter("p")] == [True, False]


def test_an_older_request_does_not_give_back_anothers_probe(upstream, make_app, monkeypatch):
    """It went out before the breaker opened, and its 429 comes while somebody else probes."""
    up = upstream(Hang(60, Reply(429, {})))
    app = make_app(**provider("groq", up))
    breakers = app.extensions["router"].breakers
    asked = {"json": {"model": "m1", "messages": HELLO}, "headers": AUTH}
    older = threading.Thread(target=lambda: app.test_client().post("/v1/chat/completions", **asked))
    older.start()
    up.wait_for(1)
    note(breakers, "FFFF", "groq")
    monkeypatch.setattr(breakers, "_now", lambda: time.monotonic() + 61)
    assert [breakers.enter("groq"), breakers.enter("groq")] == [True, False]
    up.open_gate()
    older.join(30)
    assert not older.is_alive() and not breakers.enter("groq")


def test_giving_back_what_nobody_took_changes_nothing(breakers):
    breakers.leave("p")
    assert breakers.enter("p") and not breakers.is_open("p")


# --- what order and status make of it --------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "bucket"),
    [("", 0), ("FFF", 0), ("SSSS", 0), ("SSSF", 1), ("SSSFSS", 1), ("SFSF", 2), ("FFFF", 2)],
)
def test_health(breakers, outcomes, bucket):
    note(breakers, outcomes)
    assert breakers.bucket("p") == bucket
    assert breakers.bucket("q") == 0


def test_below_a_tenth_is_well(clock):
    breakers = Breakers(window=20, now=clock)
    note(breakers, "S" * 19 + "F")
    assert breakers.bucket("p") == 0
    note(breakers, "F")
    assert breakers.bucket("p") == 1


def test_status(breakers, clock):
    assert breakers.snapshot("p") == {"open": False, "opens_in_s": 0, "recent_health_fails": 0}
    note(breakers, "SFFF")
    clock.pass_by(0.5)
    assert breakers.snapshot("p") == {"open": True, "opens_in_s": 15, "recent_health_fails": 3}
    clock.pass_by(100)
    assert breakers.snapshot("p")["opens_in_s"] == 0


STEPS = st.lists(st.sampled_from(["ok", "fail", "enter", "leave", "wait"]), max_size=60)


@given(STEPS)
def test_it_always_comes_back(steps):
    """Whatever happened, after a rest somebody may enter, and a success closes it."""
    clock = Clock()
    breakers = Breakers(now=clock)
    for step in steps:
        if step in ("ok", "fail"):
            breakers.note("p", step == "ok")
        elif step == "wait":
            clock.pass_by(30)
        else:
            getattr(breakers, step)("p")
        state = breakers.snapshot("p")
        assert 0 <= state["recent_health_fails"] <= 8 and 0 <= state["opens_in_s"] <= 60
    clock.pass_by(24 * 3600)
    assert breakers.enter("p")
    breakers.note("p", True)
    assert not breakers.is_open("p") and breakers.enter("p")
