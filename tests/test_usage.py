"""Usage and cost: counted by day, caller, provider, model and key, and kept over a restart."""

from __future__ import annotations

import calendar
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from upstream import (
    AUTH,
    HELLO,
    KEY,
    Clock,
    Reply,
    Request,
    Stream,
    chat,
    chunks,
    completion,
    good,
    provider,
    until,
)

import router

TODAY = calendar.timegm((2026, 11, 21, 12, 0, 0)) // 86_400
NOON = TODAY * 86_400 + 43_200


@pytest.fixture
def clock() -> Clock:
    return Clock(NOON)


@pytest.fixture
def begin(tmp_path, clock):
    """begin(): a Usage with a file; the one before it is closed, as at a restart."""
    made: list[router.Usage] = []

    def start(path: Any = tmp_path / "usage.db") -> router.Usage:
        if made:
            made[-1].close()
        made.append(router.Usage(wall=clock, path=path))
        made[-1].start()
        return made[-1]

    yield start
    made[-1].close()


def place(day: int = TODAY, caller: str = "bob", provider: str = "groq", model: str = "m1") -> Any:
    return router.Place(day, caller, provider, model, router.key_id("secret"))


def spend(usage: router.Usage, tokens: int = 10, cost: float | None = 0.5, **where: Any) -> None:
    at = place(**where)
    usage.admitted(at.day, at.caller)
    usage.attempt(at, True, 0.1)
    usage.spent(at, router.Tokens(tokens, 1), cost)


def sums(usage: router.Usage) -> tuple[int, int, float]:
    """(requests of callers, tokens, cost), ever."""
    rows = usage.places()
    asked = sum(t.requests for p, t in rows if not p.provider)
    return asked, sum(t.tokens for _, t in rows), sum(t.cost_usd for _, t in rows)


# --- memory and file --------------------------------------------------------------------


def test_a_restart_forgets_nothing(begin, clock):
    usage = begin()
    for day in (TODAY - 40, TODAY - 1, TODAY):
        spend(usage, day=day)
    for _ in range(3):
        usage = begin()
        assert sums(usage) == (3, 33, 1.5)
        assert {p.day for p, _ in usage.places()} == {0, TODAY - 1, TODAY}
    spend(usage)
    assert sums(begin()) == (4, 44, 2.0)
    days = [(p.day, t.tokens) for p, t in begin().days(TODAY - 50) if p.provider]
    assert days == [(TODAY - 40, 11), (TODAY - 1, 11), (TODAY, 22)]


def test_every_count_is_kept(begin):
    usage = begin()
    usage.attempt(place(), False, 0.1)
    usage.attempt(place(), True, 0.1)
    usage.spent(place(), router.Tokens(100, 20, 30), None)
    usage.spent(place(), router.Tokens(7, 1, estimated=True), 0.25)
    (row,) = [t for _, t in begin().places()]
    assert row == router.Tally(2, 1, 107, 21, 30, 8, 0.25, 1)


def test_what_was_written_is_not_written_again(begin, tmp_path):
    usage = begin()
    for _ in range(5):
        spend(usage)
        usage.database.flush()
        usage.database.flush()
    assert sums(usage) == (5, 55, 2.5)
    assert sums(begin()) == (5, 55, 2.5)


def test_a_disk_that_fails_for_a_while_loses_nothing(begin, monkeypatch):
    usage = begin()
    spend(usage)
    usage.database.flush()
    monkeypatch.setattr(router, "ADD_USAGE", "INSERT INTO nothing VALUES (?)")
    spend(usage)
    usage.database.flush()
    spend(usage)
    usage.database.flush()
    monkeypatch.undo()
    spend(usage)
    usage.database.flush()
    assert sums(usage) == (4, 44, 2.0)
    assert sums(begin()) == (4, 44, 2.0)


def test_two_routers_may_share_a_file(begin, clock, tmp_path):
    usage, other = begin(), router.Usage(wall=clock, path=tmp_path / "usage.db")
    other.start()
    for _ in range(3):
        spend(usage)
        spend(other)
        usage.database.flush()
        other.database.flush()
    other.close()
    assert sums(begin()) == (6, 66, 3.0)


def test_days_before_yesterday_leave_memory_but_not_the_totals(begin, clock):
    usage = begin()
    for n in range(5):
        spend(usage, day=TODAY + n)
        clock.time += 86_400
        usage.database.flush()
        usage.database.flush()
    assert {p.day for p, _ in usage.places()} == {0, TODAY + 3, TODAY + 4}
    assert sums(usage) == (5, 55, 2.5)
    spend(usage, day=TODAY)  # a clock was set back
    assert sums(usage) == (6, 66, 3.0)
    assert sums(begin()) == (6, 66, 3.0)
    found = {p.day: t.tokens for p, t in begin().days(TODAY) if p.provider}
    assert found == {TODAY: 22, TODAY + 1: 11, TODAY + 2: 11, TODAY + 3: 11, TODAY + 4: 11}


def test_without_a_file_memory_is_all_there_is(begin):
    usage = begin(None)
    for n in range(4):
        spend(usage, day=TODAY + n)
    assert sums(usage) == (4, 44, 2.0) and len({p.day for p, _ in usage.places()}) == 3
    assert sums(begin(None)) == (0, 0, 0.0)


def test_long_past_days_become_months(begin, tmp_path):
    usage = begin()
    for day in (TODAY - 500, TODAY - 501, TODAY - 399):
        spend(usage, day=day)
    usage = begin()
    usage.database.flush()
    with sqlite3.connect(tmp_path / "usage.db") as file:
        days = [day for (day,) in file.execute("SELECT DISTINCT day FROM usage ORDER BY day")]
    assert days == ["2025-07", "2025-10-18"]
    assert sums(begin()) == (3, 33, 1.5)


def test_model_ids_of_clients_do_not_fill_memory(begin):
    usage = begin()
    for n in range(usage.MAX_PLACES + 50):
        usage.attempt(place(model=f"m{n}"), False, 0.0)
    found = {p.model: t for p, t in usage.places()}
    assert len(found) == usage.MAX_PLACES + 1 and found[usage.OTHERS].errors == 50


def test_many_threads_lose_no_count(begin):
    usage = begin()

    def work(_: int) -> None:
        for _ in range(200):
            spend(usage)

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, n) for n in range(8)]
        while not all(f.done() for f in futures):
            usage.database.flush()
    assert sums(usage)[:2] == (1600, 17_600)
    assert sums(begin())[:2] == (1600, 17_600)


def test_no_key_stands_in_the_file(begin, tmp_path):
    spend(begin())
    begin()
    assert b"secret" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


# --- prices -----------------------------------------------------------------------------


def priced(name: str, id: str, own: dict[str, Any] | None = None, **overrides: Any) -> Any:
    row = router.provider_named(name)
    service = router.Service(row, row.url, ("k",), ("t",), (id,))
    own = {key: router.Price(*row) for key, row in (own or {}).items()}
    facts = router.ModelFacts(overrides).facts(name, id)
    return router.Prices(own, overrides).of(service, facts)


def test_the_list_price_of_this_provider():
    assert priced("openai", "gpt-4o") == (2.5, 10.0, 1.25)
    assert priced("openai", "gpt-unheard-of") is None  # unknown is not free


@pytest.mark.parametrize("name", ["groq", "codex", "local"])
def test_what_is_free_by_its_provider_costs_nothing(name):
    assert priced(name, "openai/gpt-oss-120b") == router.NOTHING
    own = {"gpt-oss": [1, 2]}
    assert priced(name, "openai/gpt-oss-120b", own)[:2] == (1, 2)  # somebody pays for it


def test_a_provider_that_marks_what_is_free_is_paid_for_the_rest():
    assert priced("openrouter", "google/gemma-4-31b-it:free")[:2] == (0, 0)
    assert priced("openrouter", "openai/gpt-oss-120b")[:2] == (0.15, 0.6)


def test_the_file_of_prices_wins_and_the_longest_key_of_it():
    own = {"gpt": [1, 1], "gpt-4o": [2, 2], "openai/gpt-4o-mini": [3, 3], "4o-mini": [4, 4],
           "openai/gpt-4o-mini-2024-07-18": [5, 5]}  # fmt: skip
    assert priced("openai", "gpt-4o", own).input == 2
    assert priced("openai", "gpt-4o-mini", own).input == 3
    assert priced("openai", "gpt-4-turbo", own).input == 1
    assert priced("openai", "GPT-4o-mini-2024-07-18", own).input == 5


def test_a_price_of_the_models_file_counts_at_a_free_provider():
    said = {"price_in": 1.0, "price_out": 2.0}
    assert priced("groq", "m9", **{"groq/m9": said}) == (1.0, 2.0, None)
    assert priced("groq", "m9", **{"groq/m9": {**said, "price_cached": 0.5}}) == (1.0, 2.0, 0.5)
    cached = priced("groq", "openai/gpt-oss-120b", **{"openai/gpt-oss-120b": {"price_cached": 0.1}})
    assert cached == (0.15, 0.6, 0.1)


def test_cached_input_has_its_own_price_where_one_is_known():
    assert router.Price(10, 20).of(1_000_000, 500_000, 400_000) == 20.0
    assert router.Price(10, 20, 1).of(1_000_000, 500_000, 400_000) == pytest.approx(16.4)
    assert router.Price(10, 20, 0).of(1_000_000, 500_000, 400_000) == 16
    assert router.Price(10, 20, 1).of(1_000_000, 0, 9_000_000) == 1  # never less than nothing


READ = {"input_tokens": 1000, "cache_read_input_tokens": 900_000, "output_tokens": 2000}
# What the end of a stream repeats of it.
ENDS = [READ, {"output_tokens": 2000}, {"input_tokens": 1000, "output_tokens": 2000}]


def claude(request: Request, end: dict[str, int]) -> Reply:
    """Claude's answer to a long conversation, nearly all of which it had in its cache."""
    whole = {"id": "msg_1", "type": "message", "role": "assistant", "model": request.model,
             "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn",
             "stop_sequence": None, "usage": READ}  # fmt: skip
    if not request.json.get("stream"):
        return Reply(200, whole)
    begun = {**whole, "content": [], "stop_reason": None, "usage": {**READ, "output_tokens": 1}}
    events = [
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": end},
        {"type": "message_stop"},
    ]
    told = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]
    return Stream(chunks=told, done=False)


@pytest.mark.parametrize("end", [None, *ENDS])
@pytest.mark.parametrize("path", ["messages", "chat/completions", "responses"])
def test_what_claude_had_in_its_cache_costs_what_it_costs_there(upstream, make_app, path, end):
    stream = end is not None
    up = upstream(lambda request: claude(request, end))
    settings = provider("anthropic", up, "claude-haiku-4-5")
    http = make_app(**settings, PROXY_LIMIT_COST_DAY="1").test_client()
    asked = {"input": "hi"} if path == "responses" else {"messages": HELLO, "max_tokens": 5000}
    body = {"model": "anthropic/claude-haiku-4-5", "stream": stream, **asked}
    answer = http.post(f"/v1/{path}", json=body, headers=AUTH, buffered=True)
    assert answer.status_code == 200 and b"hi" in answer.data
    told = http.get("/v1/usage", headers=AUTH).json
    (row,) = told["models"]
    assert (row["price"], row["cached_tokens"]) == ([1, 5, 0.1], 900_000)
    usd = (1000 * 1 + 900_000 * 0.1 + 2000 * 5) / 1e6
    assert row["cost"]["usd"] == told["totals"]["cost"]["usd"] == pytest.approx(usd)
    assert told["keys"][0]["cost_today"] == pytest.approx(usd)  # what the limit of a day counts


def test_rows_that_are_no_prices_are_told(tmp_path):
    rows = {"GPT-X": [1, 2.5], "p/m": [1, 2, 0.5], "a": 3, "b": [1], "c": [-1, 2], "d": ["1", 2],
            "e": [1, None], "": [1, 2]}  # fmt: skip
    (tmp_path / "prices.json").write_text(json.dumps(rows))
    env = {"HR_HOME": str(tmp_path), "MODEL_PRICES_FILE": "prices.json"}
    config = router.Config.from_env(env)
    assert dict(config.prices) == {"gpt-x": (1, 2.5, None), "p/m": (1, 2, 0.5)}
    assert sum("MODEL_PRICES_FILE" in warning for warning in config.warnings) == 6
    (tmp_path / "prices.json").write_text("{")
    config = router.Config.from_env(env)
    assert not config.prices and "prices.json is ignored" in config.warnings[0]
    (tmp_path / "prices.json").unlink()
    config = router.Config.from_env(env)
    assert config.warnings == ("MODEL_PRICES_FILE: there is no prices.json",)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 2}, (9, 2, 0)),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}, (9, 0, 4)),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 40}}, (9, 0, 9)),
        ({"prompt_tokens": 9, "prompt_tokens_details": None}, (9, 0, 0)),
    ],
)
def test_cached_tokens_are_read(usage, tokens):
    assert router.tokens_of({"usage": usage}) == (*tokens, False)


# --- GET /v1/usage ----------------------------------------------------------------------

EVE = {"Authorization": "Bearer sk-key-of-eve-0001"}


@pytest.fixture
def busy(upstream, serve, tmp_path):
    """A router that bob (an admin) asked twice, one of it at a paid provider, and eve once."""
    rows = {KEY: {"name": "bob", "admin": True}, "sk-key-of-eve-0001": {"name": "eve"}}
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": rows}))
    (tmp_path / "prices.json").write_text(json.dumps({"deepseek/m2": [100_000, 200_000, 50_000]}))
    told = completion("hi")
    told["usage"]["prompt_tokens_details"] = {"cached_tokens": 4}
    settings = {
        **provider("groq", upstream(good()), "m1"),
        **provider("deepseek", upstream(Reply(200, told)), "m2", keys="deepseek-key-0001"),
        **provider("openai", upstream(Reply(500, "no"), chat()), "m3"),
        "MODEL_PRICES_FILE": "prices.json",
        "COST_CURRENCY": "EUR",
        "COST_FX_RATE": "0.9",
    }
    live = serve(**settings)
    assert live.chat(model="groq/m1").status_code == 200
    assert live.chat(model="deepseek/m2").status_code == 200
    body = {"model": "openai/m3", "messages": HELLO}
    url = f"{live.url}/v1/chat/completions"
    assert requests.post(url, json=body, headers=EVE, timeout=30).status_code == 200
    return live


@pytest.mark.parametrize(
    ("status", "message", "errors"),
    [
        (500, "boom", 1),
        (401, "who are you?", 1),
        (404, "no such model", 1),
        (429, "slow down", 0),
        (400, "messages: nope", 0),
        (413, "too large", 0),
        (400, "maximum context length is 9 tokens", 0),
        (400, "content_filter", 0),
    ],
)
def test_limits_and_faults_of_requests_are_no_errors(upstream, serve, status, message, errors):
    first = upstream(Reply(status, {"error": {"message": message}}))
    live = serve(**provider("groq", first, "m1"))
    assert not live.chat().ok
    told = live.session.get(f"{live.url}/v1/status").json()["providers"]["groq"]["stats"]
    assert told["total_requests"] > 0
    assert (told["errors"] > 0) == bool(errors)
    assert told["error_rate"] == errors


def test_a_stream_that_breaks_off_is_one_request_and_one_error(upstream, serve):
    first = upstream(Stream(chunks=chunks("a", "b", "c"), stop_at=700))
    live = serve(**provider("groq", first, "m1"), RESCUE="0")
    assert "stream_interrupted" in live.chat(stream=True).text
    tally = live.app.extensions["router"].usage.tally
    until(lambda: tally("groq").errors)
    told = live.session.get(f"{live.url}/v1/status").json()["providers"]["groq"]["stats"]
    assert (told["total_requests"], told["errors"], told["error_rate"]) == (1, 1, 1.0)


def test_an_admin_sees_it_all(busy):
    told = busy.session.get(f"{busy.url}/v1/usage").json()
    assert told["totals"]["tokens"] == 30 and told["uptime_s"] >= 0
    usd = (3 * 100_000 + 4 * 50_000 + 3 * 200_000) / 1e6
    assert told["totals"]["cost"] == {"usd": usd, "eur": round(usd * 0.9, 4)}
    providers = told["providers"]
    assert providers["groq"]["requests"] == 1 and providers["groq"]["cost"]["usd"] == 0
    assert (providers["openai"]["requests"], providers["openai"]["errors"]) == (2, 1)
    assert providers["openai"]["unpriced_answers"] == 1  # nobody knows what m3 costs
    assert providers["deepseek"]["cached_tokens"] == 4
    (paid,) = [row for row in told["models"] if row["provider"] == "deepseek"]
    assert (paid["model"], paid["key_tail"], paid["tokens"]) == ("m2", "y-0001", 10)
    assert paid["price"] == [100_000, 200_000, 50_000]
    assert [r["price"] for r in told["models"] if r["model"] == "m3"] == [None]
    bob, eve = told["keys"]
    assert (bob["name"], bob["req_today"], bob["tokens_today"]) == ("bob", 2, 20)
    assert bob["cost_today"] == bob["cost_total"] == usd
    assert (eve["key_tail"], eve["req_total"], eve["tokens_total"]) == ("e-0001", 1, 10)
    assert (bob["rpm_window"], eve["rpm_window"], eve["unpriced_answers"]) == (2, 1, 1)
    (day,) = told["days"]
    assert (day["requests"], day["tokens"], day["cost"]["usd"]) == (3, 30, usd)
    assert set(told["cache"]) == {"hits", "misses", "hit_rate", "semantic_hits"}


def test_others_see_their_own(busy):
    told = requests.get(f"{busy.url}/v1/usage", headers=EVE, timeout=9).json()
    assert set(told["providers"]) == {"openai"} and told["totals"]["tokens"] == 10
    assert [row["name"] for row in told["keys"]] == ["eve"]
    assert [row["model"] for row in told["models"]] == ["m3"]
    assert [day["requests"] for day in told["days"]] == [1]
    assert "bob" not in json.dumps(told) and KEY not in json.dumps(told)


def test_streams_are_counted_in_every_dialect(upstream, serve):
    live = serve(**provider("groq", upstream(good())))
    for path, body in (
        ("chat/completions", {"messages": HELLO}),
        ("messages", {"messages": HELLO, "max_tokens": 9}),
        ("responses", {"input": "hi"}),
        ("completions", {"prompt": "hi"}),
    ):
        body |= {"model": "auto", "stream": True}
        assert live.session.post(f"{live.url}/v1/{path}", json=body, timeout=30).text
    made = live.app.extensions["router"]
    until(lambda: made.gate.inside == 0)
    told = live.session.get(f"{live.url}/v1/usage").json()
    assert told["totals"]["tokens"] == 40 and told["totals"]["estimated_tokens"] == 0


# --- restarts ---------------------------------------------------------------------------


def ask(url: str) -> int:
    body = {"model": "auto", "messages": HELLO}
    return requests.post(
        f"{url}/v1/chat/completions", json=body, headers=AUTH, timeout=30
    ).status_code


@pytest.mark.parametrize("killed", [True, False], ids=["kill -9", "stopped"])
def test_a_days_limit_survives_a_restart(launch, upstream, killed):
    settings = {**provider("groq", upstream(good())), "PROXY_LIMIT_REQ_DAY": "3"}
    settings["CACHE_TTL_SECONDS"] = "0"  # each answer is paid for
    running = launch(**settings)
    child, url = running.process, running.url
    assert [ask(url), ask(url)] == [200, 200]
    if killed:
        last = uptime(url)
        until(lambda: uptime(url) >= last + 1, 20)  # what is older than a second is in the file
        child.kill()
    else:
        child.terminate()
    child.wait(30)
    url = launch(**settings).url
    told = requests.get(f"{url}/v1/usage", headers=AUTH, timeout=9).json()
    assert told["keys"][0]["req_today"] == 2 and told["keys"][0]["tokens_today"] == 20
    assert told["totals"]["tokens"] == 20 and told["providers"]["groq"]["requests"] == 2
    assert [ask(url), ask(url)] == [200, 429]


def uptime(url: str) -> float:
    """How long the router has been up: its own clock, not that of a busy machine."""
    return float(requests.get(f"{url}/v1/usage", headers=AUTH, timeout=9).json()["uptime_s"])
