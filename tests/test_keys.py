"""Keys: who is handed out, who rests and for how long, on a clock that tests move."""

from __future__ import annotations

import threading

import pytest

import router
from router import ANY, KeyPool


@pytest.fixture
def pool(clock):
    return KeyPool({"p": ("k1", "k2", "k3"), "q": ("x",), "none": ()}, now=clock)


def handed(pool, count, model="m", provider="p", **options):
    leases = [pool.lease(provider, model, **options) for _ in range(count)]
    return [lease.key if lease else None for lease in leases]


# --- rotation --------------------------------------------------------------------------


def test_round_robin_moves_on_at_every_hand_out(pool):
    assert handed(pool, 4) == ["k1", "k2", "k3", "k1"]
    assert handed(pool, 2, model="other") == ["k2", "k3"]


def test_round_robin_steps_over_who_rests_and_loses_nobodys_turn(pool):
    pool.rest("p", "k2", "m", 60, "rate_limited")
    assert handed(pool, 4) == ["k1", "k3", "k1", "k3"]


def test_sequential_stays_on_the_first_and_goes_back_to_it(clock):
    pool = KeyPool({"p": ("k1", "k2", "k3")}, "sequential", clock)
    assert handed(pool, 2) == ["k1", "k1"]
    pool.rest("p", "k1", "m", 60, "rate_limited")
    pool.rest("p", "k2", "m", 90, "rate_limited")
    assert handed(pool, 2) == ["k3", "k3"]
    clock.pass_by(60)
    assert handed(pool, 2) == ["k1", "k1"]


def test_keys_that_were_tried_are_not_handed_out_again(pool):
    assert handed(pool, 3, tried=("k1", "k3")) == ["k2", "k2", "k2"]
    assert pool.lease("p", "m", tried=("k1", "k2", "k3")) is None


@pytest.mark.parametrize("provider", ["none", "unknown"])
def test_where_no_keys_are_there_is_no_lease(pool, provider):
    assert pool.lease(provider, "m") is None
    assert pool.soonest(provider, "m") is None
    assert pool.why(provider, "m") == ""
    assert pool.snapshot(provider, ("m",)) == []


def test_only_what_was_handed_out_is_counted(pool):
    pool.rest("q", "x", "m", 60, "rate_limited")
    assert handed(pool, 3, provider="q") == [None] * 3
    handed(pool, 4)
    assert [row["requests"] for row in pool.snapshot("p", ("m",))] == [2, 1, 1]
    assert [row["requests"] for row in pool.snapshot("q", ("m",))] == [0]


def test_fifty_threads_share_the_keys_evenly(pool):
    start, taken = threading.Barrier(50), []

    def take():
        start.wait()
        taken.extend(handed(pool, 6))

    threads = [threading.Thread(target=take) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == ["k1"] * 100 + ["k2"] * 100 + ["k3"] * 100


# --- rests -----------------------------------------------------------------------------


def test_a_rest_is_for_one_key_and_one_model(pool, clock):
    pool.rest("q", "x", "m", 60, "rate_limited")
    assert handed(pool, 1, provider="q") == [None]
    assert handed(pool, 1, model="other", provider="q") == ["x"]
    assert handed(pool, 3) == ["k1", "k2", "k3"]
    clock.pass_by(59.9)
    assert handed(pool, 1, provider="q") == [None]
    clock.pass_by(0.1)
    assert handed(pool, 1, provider="q") == ["x"]


def test_a_key_may_rest_for_all_models_and_a_model_for_all_keys(pool):
    pool.rest("p", "k1", ANY, 60, "dead_key")
    assert set(handed(pool, 4)) == set(handed(pool, 4, model="other")) == {"k2", "k3"}
    pool.rest("p", ANY, "m", 60, "model_gone")
    assert handed(pool, 1) == [None]
    assert set(handed(pool, 4, model="other")) == {"k2", "k3"}


def test_a_longer_rest_is_never_shortened(pool, clock):
    pool.rest("q", "x", "m", 3600, "dead_key")
    pool.rest("q", "x", "m", 1, "rate_limited")
    clock.pass_by(10)
    assert pool.lease("q", "m") is None
    assert (pool.soonest("q", "m"), pool.why("q", "m")) == (3590, "dead_key")
    pool.rest("q", "x", "m", 9000, "rate_limited")
    assert (pool.soonest("q", "m"), pool.why("q", "m")) == (9000, "rate_limited")


def test_guesses_can_be_overlooked_but_stated_limits_cannot(pool):
    guesses = frozenset({"provider_error"})
    pool.rest("q", "x", "m", 60, "provider_error")
    assert handed(pool, 1, provider="q", ignoring=guesses) == ["x"]
    pool.rest("q", "x", ANY, 60, "rate_limited")
    assert handed(pool, 1, provider="q", ignoring=guesses) == [None]


def test_the_soonest_recovery_is_over_all_keys_and_all_their_rests(pool, clock):
    assert pool.soonest("p", "m") == 0
    for key, seconds in (("k1", 90), ("k2", 40), ("k3", 70)):
        pool.rest("p", key, "m", seconds, "rate_limited")
    assert pool.soonest("p", "m") == 40
    pool.rest("p", "k2", ANY, 80, "dead_key")
    assert pool.soonest("p", "m") == 70
    clock.pass_by(1000)
    assert pool.soonest("p", "m") == 0


def test_a_success_ends_a_guess(pool):
    pool.rest("q", "x", "m", 60, "provider_error")
    lease = pool.lease("q", "m", ignoring=frozenset({"provider_error"}))
    pool.forgive(lease)
    assert pool.lease("q", "m") and pool.soonest("q", "m") == 0


def test_a_success_that_began_before_does_not_end_a_stated_limit(pool):
    """Of many requests in flight one is told 429: the others' answers do not undo it."""
    early = pool.lease("q", "m")
    pool.rest("q", "x", "m", 60, "rate_limited")
    pool.forgive(early)
    assert pool.lease("q", "m") is None
    assert pool.soonest("q", "m") == 60


def test_the_reason_is_that_of_the_rest_that_decides(pool):
    """The key is free only after its longest rest: that one is the reason."""
    pool.rest("q", "x", "m", 60, "rate_limited")
    pool.rest("q", "x", ANY, 3600, "dead_key")
    assert (pool.soonest("q", "m"), pool.why("q", "m")) == (3600, "dead_key")


def test_a_rest_that_is_over_is_no_reason(pool, clock):
    pool.rest("q", ANY, "m", 15, "unreachable")
    clock.pass_by(100)
    assert pool.why("q", "m") == ""
    pool.rest("q", "x", "m", 60, "rate_limited")
    assert pool.why("q", "m") == "rate_limited"


def test_memory_is_bounded_and_what_ends_first_goes(clock, monkeypatch):
    monkeypatch.setattr(KeyPool, "MAX_RESTS", 10)
    pool = KeyPool({"p": ("k",)}, now=clock)
    for number in range(50):
        pool.rest("p", "k", f"m{number}", 100 + number, "rate_limited")
    assert pool.lease("p", "m49") is None
    resting = [n for n in range(50) if pool.lease("p", f"m{n}") is None]
    assert resting == list(range(40, 50))


# --- what the owner sees ---------------------------------------------------------------


def test_the_state_of_a_key_is_its_worst_and_tells_each_model(clock):
    pool = KeyPool({"p": ("sk-0123456789abcdef",)}, now=clock)
    (row,) = pool.snapshot("p", ("a", "b"))
    assert row == {
        "key_tail": "abcdef",
        "status": "ready",
        "ready_in": 0,
        "requests": 0,
        "models": {},
    }
    pool.rest("p", "sk-0123456789abcdef", "b", 30.2, "rate_limited")
    (row,) = pool.snapshot("p", ("a", "b"))
    assert (row["status"], row["ready_in"]) == ("cooling", 31)
    assert row["models"] == {"b": {"ready_in": 31, "why": "rate_limited"}}
    clock.pass_by(31)
    assert pool.snapshot("p", ("a", "b"))[0]["status"] == "ready"


@pytest.mark.parametrize("key", ["", "a", "abc", "abcdef", "abcdefghijkl", "abcdefghijklm"])
def test_people_see_the_end_of_a_long_key_and_nothing_of_a_short_one(key):
    tail = router.key_tail(key)
    assert len(tail) <= 6
    assert tail == key[-6:] if len(key) > 12 else set(tail) <= {"*"}
    assert router.Lease("p", key).tail == tail
