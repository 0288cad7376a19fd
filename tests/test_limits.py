"""Limits: what is reserved is settled, nobody gets more than allowed, and refusals are honest."""

from __future__ import annotations

import calendar
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream import AUTH, HELLO, KEY, Hang, Reply, Stream, chat, delta, good, provider, until

import router

NOON = calendar.timegm((2026, 11, 21, 12, 0, 0))
FULL = router.Price(1.0, 2.0)  # USD per 1M tokens


class Clock:
    """Monotonic and wall time, moved by hand."""

    def __init__(self, wall: float = NOON) -> None:
        self.now, self.wall = 1000.0, float(wall)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> router.Quotas:
    return router.Quotas(lambda: clock.now, lambda: clock.wall)


def caller(**limits: Any) -> router.Caller:
    return router.Caller("bob", "id-of-bob", quota=router.Quota(**limits))


def refused(admit: Callable[..., Any], *args: Any, **options: Any) -> router.OverQuota:
    with pytest.raises(router.OverQuota) as caught:
        admit(*args, **options)
    return caught.value


def use(quotas: router.Quotas, who: router.Caller, tokens: int = 0, cost: float = 0.0) -> None:
    """One whole request."""
    grant = quotas.admit(who)
    grant.use(router.Tokens(tokens), cost)
    quotas.settle(grant)


# --- which limit, in which words --------------------------------------------------------


def test_a_minute_is_a_rolling_one(quotas, clock):
    bob = caller(rpm=3)
    for _ in range(3):
        quotas.admit(bob)
        clock.pass_by(10)
    error = refused(quotas.admit, bob)
    assert error.message == "quota exceeded (3 requests/min)" and error.retry_after == 30
    clock.pass_by(29.9)
    assert refused(quotas.admit, bob).retry_after == 1  # never 0
    clock.pass_by(0.1)
    quotas.admit(bob)  # the first one has left
    assert refused(quotas.admit, bob).retry_after == pytest.approx(10)


def test_nobody_waits_longer_than_a_minute(quotas, clock):
    bob = caller(rpm=2)
    clock.now += 0.0301
    quotas.admit(bob)
    quotas.admit(bob)
    clock.pass_by(0.2)
    assert refused(quotas.admit, bob).retry_after == pytest.approx(59.8)
    assert quotas.rates(bob)["requests"].reset_s == pytest.approx(59.8)


def test_what_is_refused_does_not_count(quotas, clock):
    bob = caller(rpm=1)
    quotas.admit(bob)
    for _ in range(5):
        refused(quotas.admit, bob)
        clock.pass_by(10)
    clock.pass_by(10)
    quotas.admit(bob)


@pytest.mark.parametrize(
    ("limits", "used", "words"),
    [
        ({"cost_per_day": 5.0}, (0, 5.0), "$5 cost/day"),
        ({"cost_per_day": 0.25}, (0, 0.3), "$0.25 cost/day"),
        ({"tokens_per_day": 100_000}, (100_000, 0.0), "100000 tokens/day"),
        ({"tokens_per_day": 2_000_000}, (2_000_001, 0.0), "2000000 tokens/day"),
        ({"req_per_day": 1}, (0, 0.0), "1 requests/day"),
    ],
)
def test_a_day_ends_at_midnight_utc(quotas, clock, limits, used, words):
    bob = caller(**limits)
    use(quotas, bob, *used)
    error = refused(quotas.admit, bob)
    assert error.message == f"quota exceeded ({words})" and error.retry_after == 12 * 3600
    clock.pass_by(12 * 3600 - 0.5)
    assert refused(quotas.admit, bob).retry_after == 1
    clock.pass_by(0.5)
    use(quotas, bob)


def test_the_order_of_the_limits(quotas):
    bob = caller(cost_per_day=1.0, tokens_per_day=10, rpm=1, req_per_day=1)
    use(quotas, bob, 10, 1.0)
    words = {"cost_per_day": "$1 ", "tokens_per_day": "10 t", "rpm": "1 requests/m",
             "req_per_day": "1 requests/d"}  # fmt: skip
    for field, told in words.items():
        assert f"({told}" in refused(quotas.admit, bob).message
        bob = replace(bob, quota=replace(bob.quota, **{field: 0}))
    quotas.admit(bob)


def test_streams_at_once(quotas):
    bob = caller(streams=2)
    first, _ = quotas.admit(bob, stream=True), quotas.admit(bob, stream=True)
    error = refused(quotas.admit, bob, stream=True)
    assert error.message == "quota exceeded (2 streams at once)" and error.retry_after == 1
    quotas.admit(bob)  # a whole answer is no stream
    quotas.settle(first)
    quotas.admit(bob, stream=True)


# --- reservations -----------------------------------------------------------------------


def test_what_is_under_way_has_its_tokens_reserved(quotas):
    bob = caller(tokens_per_day=100)
    first = quotas.admit(bob, 60)
    error = refused(quotas.admit, bob, 60)
    assert error.retry_after == 1  # the one under way may give back
    first.use(router.Tokens(5, 5), None)
    quotas.settle(first)
    quotas.settle(first)  # once is enough
    assert quotas.snapshot(bob)["tokens_today"] == 10
    assert quotas.snapshot(bob)["tokens_reserved"] == 0
    quotas.admit(bob, 60)
    assert refused(quotas.admit, bob, 95).retry_after == 12 * 3600  # not today


def test_the_usual_answer_is_reserved_too(quotas):
    bob = caller(tokens_per_day=1000)
    grant = quotas.admit(bob, 10)
    grant.use(router.Tokens(10, 400), None)
    quotas.settle(grant)
    assert quotas.admit(bob, 10).tokens == 410
    assert quotas.admit(bob, 10, most=50).tokens == 60


def test_money_is_reserved_where_a_price_is_known(quotas):
    bob = caller(cost_per_day=1.0)
    first = quotas.admit(bob, 600_000, FULL)
    assert first.nano == 600_000_000
    refused(quotas.admit, bob, 600_000, FULL)
    quotas.settle(first)
    quotas.settle(quotas.admit(bob, 600_000, FULL))


def test_without_a_price_today_tells_what_a_token_costs(quotas):
    bob = caller(cost_per_day=1.0)
    use(quotas, bob, 1000, 0.4)
    assert quotas.admit(bob, 1000).nano == 400_000_000
    refused(quotas.admit, bob, 1000)


def test_a_days_first_request_passes_however_long_it_is(quotas):
    bob = caller(tokens_per_day=10)
    grant = quotas.admit(bob, 50)
    refused(quotas.admit, bob, 1)
    quotas.settle(grant)
    quotas.admit(bob, 50)  # nothing was used


def test_a_limit_changed_live_holds_from_the_next_request_on(quotas):
    for _ in range(5):
        quotas.admit(caller())
    assert "(3 requests/min)" in refused(quotas.admit, caller(rpm=3)).message
    quotas.admit(caller(rpm=6))


def test_a_lowered_minute_waits_for_more_than_the_oldest(quotas, clock):
    for _ in range(4):
        quotas.admit(caller(rpm=4))
        clock.pass_by(10)
    assert refused(quotas.admit, caller(rpm=2)).retry_after == 40


# --- clocks -----------------------------------------------------------------------------


def test_a_stream_over_midnight_counts_on_the_day_it_began(quotas, clock):
    bob = caller(tokens_per_day=100)
    clock.wall = NOON + 12 * 3600 - 5
    grant = quotas.admit(bob, 50)
    clock.pass_by(10)
    other = quotas.admit(bob, 90)
    grant.use(router.Tokens(95), None)
    quotas.settle(grant)
    assert quotas.snapshot(bob)["tokens_today"] == 0
    quotas.settle(other)
    clock.pass_by(-10)
    assert quotas.snapshot(bob)["tokens_today"] == 95  # a clock set back finds yesterday again


def test_a_clock_that_jumps_gives_no_second_budget(quotas, clock):
    bob = caller(req_per_day=2)
    use(quotas, bob)
    clock.wall += 86_400  # and back: it was wrong for a moment
    use(quotas, bob)
    clock.wall -= 86_400
    use(quotas, bob)
    refused(quotas.admit, bob)


def test_many_requests_take_little_memory():
    clock = Clock()
    window = router.Window()
    for _ in range(100_000):
        window.slide(clock.now)
        window.add(clock.now)
        clock.pass_by(0.001)
    assert window.slide(clock.now) >= 60_000 and len(window._marks) <= 2 * window.STEPS


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(0, 60), st.booleans()),
        st.tuples(st.just("settle"), st.integers(0, 5), st.floats(0, 1)),
        st.tuples(st.just("wait"), st.floats(0.0, 40_000.0), st.none()),
    ),
    max_size=60,
)


@given(STEPS)
@settings(deadline=None)
def test_no_interleaving_exceeds_a_limit_or_leaks(steps):
    """Requests that use what was reserved or less: whatever their order, limits hold."""
    clock = Clock()
    quotas = router.Quotas(lambda: clock.now, lambda: clock.wall)
    bob = caller(rpm=5, req_per_day=12, tokens_per_day=100, cost_per_day=0.0001, streams=2)
    grants: list[router.Grant] = []
    admitted: list[float] = []
    days: dict[int, router.Day] = {}
    for kind, first, second in steps:
        if kind == "wait":
            clock.pass_by(first)
        elif kind == "settle" and grants:
            grant = grants.pop(first % len(grants))
            spent = int(grant.tokens * second)
            grant.use(router.Tokens(spent), FULL.of(spent, 0))
            quotas.settle(grant)
        elif kind == "admit":
            before = quotas.snapshot(bob)
            try:
                grant = quotas.admit(bob, first, FULL, stream=second)
            except router.OverQuota as error:
                assert error.retry_after >= 1
                continue
            grants.append(grant)
            admitted.append(clock.now)
            days[grant.day] = grant.today
            day = grant.today
            alone = not (before["tokens_today"] or before["tokens_reserved"])
            assert alone or day.tokens + day.held_tokens <= 100
            assert alone or day.nano + day.held_nano <= 100_000
            assert day.requests <= 12
            assert sum(at > clock.now - 60 for at in admitted) <= 5
            assert sum(g.stream for g in grants) <= 2
    for grant in grants:
        quotas.settle(grant)
    assert all(d.held_tokens == d.held_nano == 0 for d in days.values())
    left = quotas.snapshot(bob)
    assert (left["in_flight"], left["streams"]) == (0, 0)


def test_threads_share_a_limit_exactly(quotas):
    bob = caller(rpm=10, tokens_per_day=1000)

    def one(_: int) -> bool:
        try:
            quotas.settle(quotas.admit(bob, 1))
        except router.OverQuota:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(one, range(200))) == 10


# --- over the wire ----------------------------------------------------------------------


def write_auth(tmp_path, **row: Any) -> None:
    document = {"proxy_keys": {KEY: {"name": "bob", **row}}}
    (tmp_path / "auth.json").write_text(json.dumps(document))


def test_of_a_hundred_at_once_exactly_ten_pass(upstream, serve):
    up = upstream(good())
    live = serve(**provider("groq", up), PROXY_LIMIT_RPM=10)

    def one(_: int) -> int:
        body = {"model": "auto", "messages": HELLO}
        url = f"{live.url}/v1/chat/completions"
        return requests.post(url, json=body, headers=AUTH, timeout=60).status_code

    with ThreadPoolExecutor(100) as pool:
        found = list(pool.map(one, range(100)))
    assert sorted(set(found)) == [200, 429] and found.count(200) == 10
    assert len(up.requests) == 10


def test_over_the_limit_no_provider_is_asked(upstream, serve, tmp_path):
    write_auth(tmp_path, rpm=1)
    up = upstream(good())
    live = serve(**provider("groq", up))
    first = live.chat()
    assert first.headers["x-ratelimit-limit-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert first.headers["x-ratelimit-reset-requests"] in ("59s", "1m", "1m1s")
    second = live.chat()
    assert second.status_code == 429 and len(up.requests) == 1
    assert second.json()["error"]["message"] == "quota exceeded (1 requests/min)"
    assert second.json()["error"]["type"] == "rate_limit_error"
    assert second.json()["detail"] == "Rate limit exceeded"
    assert 59 <= int(second.headers["Retry-After"]) <= 61
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    assert live.session.get(f"{live.url}/v1/models").status_code == 200


def test_without_limits_nothing_is_told_of_them(upstream, serve):
    live = serve(**provider("groq", upstream(good())))
    assert not [name for name in live.chat().headers if "ratelimit" in name.lower()]


@pytest.fixture
def limited(upstream, serve, tmp_path):
    """An address of a router whose caller used up his only request of the minute."""
    write_auth(tmp_path, rpm=1, tokens_per_day=5000)
    live = serve(**provider("groq", upstream(good())))
    assert live.chat().status_code == 200
    return live.url


def test_the_openai_sdk_reads_the_refusal(limited):
    with openai.OpenAI(base_url=f"{limited}/v1", api_key=KEY, max_retries=0) as client:
        for ask in (
            lambda: client.chat.completions.create(model="auto", messages=HELLO),
            lambda: client.chat.completions.create(model="auto", messages=HELLO, stream=True),
            lambda: client.responses.create(model="auto", input="hi"),
            lambda: client.responses.create(model="auto", input="hi", stream=True),
            lambda: client.completions.create(model="auto", prompt="hi"),
            lambda: client.embeddings.create(model="auto", input="hi"),
        ):
            with pytest.raises(openai.RateLimitError) as caught:
                ask()
            assert "quota exceeded (1 requests/min)" in str(caught.value)
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 61
            assert caught.value.response.headers["x-ratelimit-limit-tokens"] == "5000"


def test_the_anthropic_sdk_reads_the_refusal(limited):
    with anthropic.Anthropic(base_url=limited, api_key=KEY, max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(anthropic.RateLimitError) as caught:
                client.messages.create(
                    model="claude-x", max_tokens=9, messages=HELLO, stream=stream
                )
            assert caught.value.body["error"] == {
                "type": "rate_limit_error",
                "message": "quota exceeded (1 requests/min)",
            }
            headers = caught.value.response.headers
            assert 1 <= int(headers["retry-after"]) <= 61
            assert headers["anthropic-ratelimit-requests-limit"] == "1"
            assert headers["anthropic-ratelimit-requests-remaining"] == "0"
            assert headers["anthropic-ratelimit-tokens-reset"].endswith("T00:00:00Z")
            assert "x-ratelimit-limit-requests" not in headers


def test_codex_hears_it_inside_the_stream(limited):
    body = {"model": "auto", "input": "hi", "stream": True}
    headers = {**AUTH, "originator": "codex_cli_rs"}
    answer = requests.post(f"{limited}/v1/responses", json=body, headers=headers, timeout=30)
    assert answer.status_code == 200
    assert "response.failed" in answer.text and "quota exceeded (1 requests/min)" in answer.text


def test_a_stream_is_settled_with_what_it_used(upstream, serve):
    live = serve(**provider("groq", upstream(good())), PROXY_LIMIT_TOKENS_DAY=1000)
    quotas, bob = live.app.extensions["router"].quotas, live.app.extensions["router"].config.callers
    assert live.chat().headers["x-ratelimit-remaining-tokens"] == "990"  # what was really used
    streamed = live.chat(stream=True)
    assert int(streamed.headers["x-ratelimit-remaining-tokens"]) < 980  # reserved
    assert streamed.content
    until(lambda: quotas.snapshot(bob[0])["in_flight"] == 0)
    found = quotas.snapshot(bob[0])
    assert (found["tokens_today"], found["tokens_reserved"], found["streams"]) == (20, 0, 0)


def test_a_request_that_fails_costs_no_tokens_but_counts(upstream, serve):
    up = upstream(Reply(500, {"error": {"message": "broken"}}))
    live = serve(**provider("groq", up), PROXY_LIMIT_TOKENS_DAY=1000)
    made = live.app.extensions["router"]
    assert live.chat().status_code == 503
    found = made.quotas.snapshot(made.config.callers[0])
    assert (found["req_today"], found["tokens_today"], found["tokens_reserved"]) == (1, 0, 0)


def test_a_bad_request_does_not_count(upstream, serve):
    live = serve(**provider("groq", upstream(good())), PROXY_LIMIT_RPM=1)
    assert live.chat(messages="nonsense").status_code == 400
    assert live.chat().status_code == 200


def test_a_client_that_leaves_pays_for_what_came(upstream, serve):
    words = [delta(content="word " * 20) for _ in range(4)]
    up = upstream(Stream(chunks=words, hold_after=4))
    live = serve(**provider("groq", up), PROXY_LIMIT_STREAMS=1, PROXY_LIMIT_TOKENS_DAY=10_000)
    made = live.app.extensions["router"]
    answer = live.chat(stream=True)
    blocks, got = answer.iter_content(None), b""
    while got.count(b"word") < 80:
        got += next(blocks)
    assert live.chat(stream=True).status_code == 429
    answer.close()
    until(lambda: made.quotas.snapshot(made.config.callers[0])["in_flight"] == 0)
    found = made.quotas.snapshot(made.config.callers[0])
    assert 20 + 4 * 100 / 4 <= found["tokens_today"] <= 200 and found["streams"] == 0
    rows = [t for p, t in made.usage.places() if p.provider]
    assert rows[0].estimated_tokens == rows[0].tokens > 0


def test_a_client_that_leaves_before_the_answer_pays_for_its_prompt(upstream, serve):
    up = upstream(Hang(30.0, chat()))
    live = serve(**provider("groq", up))
    made = live.app.extensions["router"]
    with pytest.raises(requests.ReadTimeout):
        body = {"model": "auto", "messages": [{"role": "user", "content": "x" * 4000}]}
        url = f"{live.url}/v1/chat/completions"
        requests.post(url, json=body, headers=AUTH, timeout=0.5)
    until(lambda: made.quotas.snapshot(made.config.callers[0])["in_flight"] == 0)
    assert 1000 <= made.quotas.snapshot(made.config.callers[0])["tokens_today"] <= 1100


def test_both_parts_of_a_rescued_stream_are_paid(upstream, serve):
    whole = [delta(content=word) for word in ("one ", "two ", "three ", "four ")]
    broken = Stream(chunks=whole[:2], done=False, framing="close")
    first, second = upstream(broken), upstream(good("one two three four "))
    rows = {**provider("groq", first), **provider("cerebras", second)}
    live = serve(**rows)
    made = live.app.extensions["router"]
    assert live.chat(stream=True, model="groq/m1").text.count("[DONE]") == 1
    until(lambda: made.quotas.snapshot(made.config.callers[0])["in_flight"] == 0)
    spent = {p.provider: t.tokens for p, t in made.usage.places() if p.provider}
    assert spent["groq"] > 0 and spent["cerebras"] == 10
    assert made.quotas.snapshot(made.config.callers[0])["tokens_today"] == sum(spent.values())


def test_answers_without_counts_are_guessed(upstream, serve):
    body = {**chat("word " * 40).body}
    del body["usage"]
    live = serve(**provider("groq", upstream(Reply(200, body))))
    made = live.app.extensions["router"]
    assert live.chat().status_code == 200
    (row,) = [t for p, t in made.usage.places() if p.provider]
    assert row.completion_tokens == 50 and row.prompt_tokens >= 10
    assert row.estimated_tokens == row.tokens


def test_embeddings_are_limited_and_paid(upstream, serve):
    vectors = {"data": [{"embedding": [0.1], "index": 0, "object": "embedding"}],
               "usage": {"prompt_tokens": 4, "total_tokens": 4}}  # fmt: skip
    up = upstream(Reply(200, vectors))
    live = serve(**provider("mistral", up), MISTRAL_EMBED_MODEL="mistral-embed", PROXY_LIMIT_RPM=1)
    url = f"{live.url}/v1/embeddings"
    assert live.session.post(url, json={"input": "hi"}).status_code == 200
    assert live.session.post(url, json={"input": "hi"}).status_code == 429
    made = live.app.extensions["router"]
    assert made.quotas.snapshot(made.config.callers[0])["tokens_today"] == 4


def test_the_echo_is_limited_too(serve):
    live = serve(ECHO_FALLBACK=1, PROXY_LIMIT_RPM=1)
    assert [live.chat().status_code for _ in range(2)] == [200, 429]


def test_status_tells_limits_and_use(upstream, serve, tmp_path):
    rows = {KEY: {"name": "bob", "rpm": 9, "admin": True}, "sk-second-caller": {"name": "eve"}}
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": rows}))
    live = serve(**provider("groq", upstream(good())))
    live.chat()
    told = live.session.get(f"{live.url}/v1/status").json()["limits"]
    assert told["enabled"] is True and len(told["keys"]) == 1
    assert told["keys"][0]["limits"] == {
        "rpm": 9, "req_per_day": 0, "tokens_per_day": 0, "cost_per_day": 0.0, "streams": 0,
    }  # fmt: skip
    assert told["keys"][0]["usage"]["rpm_window"] == 1
    assert told["keys"][0]["usage"]["tokens_today"] == 10
    assert told["keys"][0]["key_tail"] == "***" and told["keys"][0]["name"] == "bob"
    other = {"Authorization": "Bearer sk-second-caller"}
    seen = requests.get(f"{live.url}/v1/status", headers=other, timeout=9).json()["limits"]
    assert seen == {"enabled": False, "keys": []}


def test_metrics_count_callers_and_refusals(upstream, serve, tmp_path):
    write_auth(tmp_path, rpm=1)
    live = serve(**provider("groq", upstream(good())))
    live.chat()
    live.chat()
    text = requests.get(f"{live.url}/metrics", timeout=9).text
    assert 'hermes_router_key_requests_total{key="bob"} 1\n' in text
    assert 'hermes_router_rejected_requests_total{limit="quota"} 1\n' in text


def test_a_metric_of_a_caller_without_a_name_stays_its_own(make_app):
    app = make_app(PROXY_API_KEYS="sk-first-0123456789,sk-second-0123456789", ECHO_FALLBACK=1)
    client, headers = app.test_client(), {"Authorization": "Bearer sk-second-0123456789"}
    client.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers)
    id = router.caller_id("sk-second-0123456789")
    text = client.get("/metrics").text
    assert f'hermes_router_key_requests_total{{key="{id}"}} 1\n' in text


# --- settings ---------------------------------------------------------------------------


def read(tmp_path, row: dict[str, Any], **env: str) -> router.Config:
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": {"sk-a-secret-key-0001": row}}))
    return router.Config.from_env({"HR_HOME": str(tmp_path), **env})


def test_a_row_wins_over_the_environment(tmp_path):
    row = {"rpm": 5, "cost_per_day": 2, "streams": None}
    config = read(tmp_path, row, PROXY_LIMIT_RPM="60", PROXY_LIMIT_STREAMS="3")
    assert config.callers[0].quota == router.Quota(rpm=5, cost_per_day=2, streams=3)
    assert read(tmp_path, {"rpm": 0}, PROXY_LIMIT_RPM="60").callers[0].quota.rpm == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("rpm", "60"), ("rpm", -1), ("rpm", 1.5), ("req_per_day", True), ("tokens_per_day", []),
     ("cost_per_day", "five"), ("cost_per_day", -0.1), ("streams", {}), ("privacy", "none")],
)  # fmt: skip
def test_a_limit_that_cannot_be_read_stops_the_start(tmp_path, name, value):
    with pytest.raises(router.ConfigError) as caught:
        read(tmp_path, {"name": "bob", name: value})
    assert f"bob: {name} cannot be" in str(caught.value) and "secret" not in str(caught.value)


# --- addresses --------------------------------------------------------------------------


def test_addresses_are_limited_with_and_without_a_key(upstream, serve):
    live = serve(**provider("groq", upstream(good())), RATE_LIMIT_REQUESTS=3)
    found = [requests.get(f"{live.url}/v1/models", timeout=9).status_code for _ in range(3)]
    assert found == [401] * 3
    last = live.session.get(f"{live.url}/v1/models")
    assert last.status_code == 429 and 1 <= int(last.headers["Retry-After"]) <= 60
    assert last.headers["x-ratelimit-limit-requests"] == "3"
    assert last.headers["x-ratelimit-remaining-requests"] == "0"
    claude = live.session.post(f"{live.url}/v1/messages").headers
    assert claude["anthropic-ratelimit-requests-remaining"] == "0"
    assert last.json()["detail"] == "Rate limit exceeded"
    assert last.json()["error"]["message"].startswith("quota exceeded (3 requests per 60 s")
    for path in ("/health", "/metrics"):
        assert requests.get(live.url + path, timeout=9).status_code == 200
    text = requests.get(f"{live.url}/metrics", timeout=9).text
    assert 'hermes_router_rejected_requests_total{limit="address"} 2\n' in text


def environ(peer: str, forwarded: str = "") -> dict[str, str]:
    return {"REMOTE_ADDR": peer, "HTTP_X_FORWARDED_FOR": forwarded}


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("9.9.9.9", "1.1.1.1", "9.9.9.9"),  # anybody may write that header
        ("10.0.0.2", "1.1.1.1", "1.1.1.1"),
        ("10.0.0.2", "6.6.6.6, 1.1.1.1, 10.0.0.7", "1.1.1.1"),  # the client wrote the first one
        ("10.0.0.2", "10.0.0.3", "10.0.0.2"),
        ("10.0.0.2", "", "10.0.0.2"),
        ("2001:db8:1:2:aaaa::1", "", "2001:db8:1:2::/64"),
        ("::ffff:1.2.3.4", "", "1.2.3.4"),
        ("::ffff:10.0.0.2", "1.1.1.1:5678", "1.1.1.1"),
        ("10.0.0.2", "[2001:db8::9]:443", "2001:db8::/64"),
        ("10.0.0.2", "unknown", "unknown"),
        ("", "", ""),
    ],
)
def test_whose_address_counts(peer, forwarded, client):
    addresses = router.Addresses(1, trusted=["10.0.0.0/8"])
    assert addresses.client(environ(peer, forwarded)) == client


def test_a_trusted_proxy_passes_addresses_on(upstream, serve):
    live = serve(RATE_LIMIT_REQUESTS=1, TRUSTED_PROXIES="127.0.0.1", ECHO_FALLBACK=1)

    def status(client: str) -> int:
        headers = {**AUTH, "X-Forwarded-For": client}
        return requests.get(f"{live.url}/v1/models", headers=headers, timeout=9).status_code

    assert [status("1.1.1.1"), status("2.2.2.2"), status("1.1.1.1")] == [200, 200, 429]


def test_the_table_of_addresses_is_bounded(clock):
    addresses = router.Addresses(5, now=lambda: clock.now)
    for n in range(addresses.MAX_KNOWN + 100):
        addresses.check(environ(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"))
    assert len(addresses._windows) == addresses.MAX_KNOWN


def test_a_bad_proxy_stops_the_start(tmp_path):
    with pytest.raises(router.ConfigError, match="TRUSTED_PROXIES: 'nginx'"):
        router.Config.from_env({"HR_HOME": str(tmp_path), "TRUSTED_PROXIES": "nginx"})


# --- privacy ----------------------------------------------------------------------------


@pytest.fixture
def three(upstream, serve, tmp_path):
    """three(privacy of the row): a provider that trains, one that does not, a local one."""

    def make(privacy: str = "", **more: str) -> tuple[Any, dict[str, Any]]:
        write_auth(tmp_path, privacy=privacy)
        ups = {name: upstream(good(name)) for name in ("gemini", "groq", "local")}
        rows = [provider(name, up, "m1") for name, up in ups.items()]
        return serve(**rows[0], **rows[1], **rows[2], **more), ups

    return make


def said(live, header: str = "", **body: Any) -> set[str]:
    """Who answers eight requests."""
    live.session.headers["X-Privacy"] = header
    return {live.chat(**body).headers["X-Provider"] for _ in range(8)}


def test_who_may_see_a_prompt(three):
    live, _ = three()
    assert said(live, "no-train") <= {"groq", "local"}
    assert said(live, "local-only") == {"local"}
    assert said(live, "Local-Only", model="gemini/m1") == {"local"}
    id = live.chat().headers["X-Request-ID"]
    told = live.session.get(f"{live.url}/v1/why/{id}").json()
    reasons = {row["candidate"]: row["why"] for row in told["left_out"]}
    assert reasons == dict.fromkeys(("gemini/m1", "groq/m1"), "not local-only (X-Privacy)")
    assert said(live, "", model="gemini/m1") == {"gemini"}


def test_a_row_asks_for_privacy_and_a_header_only_for_more(three):
    live, _ = three("no-train")
    assert "gemini" not in said(live, "", model="gemini/m1")
    assert said(live, "local-only") == {"local"}
    live, ups = three("local-only")
    assert said(live, "no-train") == {"local"} and not ups["groq"].requests


def test_privacy_has_no_safety_net(upstream, serve):
    up = upstream(good())
    live = serve(**provider("gemini", up))
    for header in ("no-train", "local-only"):
        live.session.headers["X-Privacy"] = header
        for answer in (live.chat(), live.chat(model="gemini/m1"), live.chat(stream=True)):
            assert answer.status_code == 400 and f"X-Privacy: {header}" in answer.text
    url = f"{live.url}/v1/embeddings"
    refusal = live.session.post(url, json={"input": "hi"})
    assert refusal.status_code == 400 and "X-Privacy" in refusal.text
    assert not up.requests


def test_unknown_training_counts_as_training():
    rows = {
        row.name: router.Service(row, row.url, ("k",), ("t",), ("m",)) for row in router.PROVIDERS
    }
    for name, service in rows.items():
        trains, local = service.provider.trains_on_prompts, service.provider.tier == "local"
        assert router.keeps(service, "no-train") is (local or trains == "no"), name
        assert router.keeps(service, "local-only") is local
        assert router.keeps(service, "")


def test_an_unknown_word_is_refused(upstream, serve):
    live = serve(**provider("groq", upstream(good())))
    live.session.headers["X-Privacy"] = "secret"
    answer = live.chat()
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "X-Privacy"
