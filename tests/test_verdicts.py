"""Verdicts: what an outcome means, who rests for how long, and what a provider says about it."""

from __future__ import annotations

import json
from email.utils import formatdate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import router
from router import Outcome, judge, read_wait, stated_wait

NOW = 1_790_000_000.0  # the wall clock of these tests


def verdict(status, text="", sort=""):
    return judge(Outcome(status, text, sort))


def traits(found):
    return found.rests, found.counts, found.then


# --- one table: outcome -> who rests, does the breaker hear of it, what next -------------


@pytest.mark.parametrize(
    ("status", "text", "rests", "counts", "then"),
    [
        (429, "slow down", "route", False, "key"),
        (401, "unauthorized", "key", False, "key"),
        (402, "payment required", "key", False, "key"),
        (403, "forbidden", "route", False, "key"),
        (403, "this model is not supported in your region", "model", False, "model"),
        (401, "ModelError: the promotion has ended", "model", False, "model"),
        (403, "subscribe to use this model", "model", False, "model"),
        (400, "messages: field required", "", False, "stop"),
        (422, "temperature out of range", "", False, "stop"),
        (400, "This model's maximum context length is 8192 tokens", "", False, "model"),
        (400, "prompt is too long: 9000 tokens > 8192", "", False, "model"),
        (400, "API key not valid. Please pass a valid API key.", "key", False, "key"),
        (400, "The model `x` does not exist", "model", False, "model"),
        (400, "tool_choice is not supported with this model", "", False, "stop"),
        (404, "not found", "model", False, "model"),
        (410, "gone", "model", False, "model"),
        (413, "too large", "", False, "provider"),
        (408, "", "route", True, "key"),
        (409, "", "route", True, "key"),
        (425, "", "route", True, "key"),
        (500, "", "route", True, "key"),
        (502, "", "route", True, "key"),
        (503, "", "route", True, "key"),
        (529, "overloaded", "route", True, "key"),
        (418, "", "route", True, "provider"),
        (302, "", "route", True, "provider"),
        (451, "", "route", True, "provider"),
    ],
)
def test_by_status(status, text, rests, counts, then):
    assert traits(verdict(status, text)) == (rests, counts, then)


@pytest.mark.parametrize("sort", ["network", "timeout", "reset", "empty", "garbled"])
def test_without_a_usable_answer_it_is_the_providers_health(sort):
    found = verdict(0, "", sort)
    assert found.counts and found.rests and found.name in router.GUESSES


@pytest.mark.parametrize("sort", ["network", "timeout"])
def test_a_silent_provider_is_not_asked_again_with_its_other_keys(sort):
    assert verdict(0, "", sort).then == "model"


@pytest.mark.parametrize(
    "text",
    [
        # Both are about one model for a while; their advice to pay more is no lack of credit.
        "Rate limit reached for model `m` in organization `o` service tier `on_demand` on tokens"
        " per minute (TPM): Limit 6000, Used 5800, Requested 900. Please try again in 7s. Need"
        " more tokens? Upgrade to Dev Tier today at https://console.groq.com/settings/billing",
        "You exceeded your current quota, please check your plan and billing details. For more"
        " information on this error, head to: https://ai.google.dev/gemini-api/docs/rate-limits."
        " * Quota exceeded for metric: generate_content_free_tier_requests, limit: 20, model: x"
        " Please retry in 17.5s.",
        "Rate limit exceeded: free-models-per-min. Add 10 credits to raise your limit",
    ],
)
def test_a_rate_limit_that_mentions_billing_rests_one_route_only(text):
    assert verdict(429, text) is router.RATE_LIMITED


@pytest.mark.parametrize(
    "text", ["insufficient_quota", "Insufficient Balance", "insufficient_quota: no credit left"]
)
def test_a_429_about_money_rests_the_whole_key(text):
    assert verdict(429, text) is router.NO_CREDIT


@pytest.mark.parametrize("text", ["No payment method", "CreditsError: insufficient credits"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_model_that_needs_credit_is_skipped_alone(status, text):
    """The key still serves the free models of the same provider."""
    found = verdict(status, text)
    assert (found.rests in ("model", "route"), found.counts) == (True, False)


def test_an_error_inside_a_200_is_a_rate_limit_when_it_says_so():
    for text in ("rate limit", "Too Many Requests", "quota"):
        assert judge(Outcome(502, text), in_ok=True) is router.RATE_LIMITED, text
    # Of a full worker (nvidia) or a busy model another second may know better.
    for text in ("ResourceExhausted", "resource exhausted", "Request limit reached",
                 "model is overloaded"):  # fmt: skip
        assert judge(Outcome(502, text), in_ok=True) is router.BUSY, text
    found = judge(Outcome(502, "oops"), in_ok=True)
    assert (found.rest_s, found.counts) == (30.0, True)


def test_a_status_inside_a_200_counts_as_that_status():
    assert judge(Outcome(429, "x"), in_ok=True) is router.RATE_LIMITED
    assert judge(Outcome(401, "x"), in_ok=True) is router.DEAD_KEY


def test_a_429_never_counts_as_ill_health():
    for text in ("", "overloaded", "quota", "insufficient_quota", "internal error", "model"):
        assert not verdict(429, text).counts


@given(st.integers(-1, 999), st.text(max_size=40), st.booleans())
def test_every_outcome_has_a_verdict(status, text, in_ok):
    found = judge(Outcome(status, text), in_ok)
    assert found.name and 0 <= found.rest_s <= router.MAX_REST_S
    assert bool(found.rests) == (found.rest_s > 0)


def test_who_cannot_be_reached_rests_as_long_as_who_keeps_silent():
    found = [judge(Outcome(0, "", sort)) for sort in ("network", "timeout")]
    assert {(v.rests, v.rest_s, v.counts) for v in found} == {("model", 30.0, True)}


def test_what_may_be_overlooked_is_about_health_only():
    rules = [rule.verdict for rule in router.RULES] + list(router.SORTS.values())
    assert {v.name for v in rules if v.counts} | {"bad_answer"} == router.GUESSES


# --- how long: Retry-After -------------------------------------------------------------


def wait(value=None, body=b"", **headers):
    given_headers = {name.replace("_", "-"): text for name, text in headers.items()}
    if value is not None:
        given_headers["retry-after"] = value
    return stated_wait(given_headers, body, NOW)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, 60), ("", 60), ("0", 1), ("1", 1), ("1.9", 1), ("30", 30), ("abc", 60), ("-5", 1),
     ("inf", 60), ("-inf", 60), ("nan", 60), ("1e400", 60)],
)  # fmt: skip
def test_recorded_waits(value, seconds):
    assert (wait(value) or router.RATE_LIMITED.rest_s) == seconds


def test_a_date_is_so_many_seconds_from_now_and_a_day_at_most():
    assert wait(formatdate(NOW + 90, usegmt=True)) == 90
    assert wait("Wed, 21 Oct 2099 07:28:00 GMT") == 86_400
    assert wait("Wed, 21 Oct 2015 07:28:00 GMT") == 1


@pytest.mark.parametrize("value", ["86401", "9" * 30, "9" * 5000])
def test_nothing_rests_longer_than_a_day(value):
    assert wait(value) in (86_400, None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("1.5", 1.5), (" 30 ", 30), ("6s", 6), ("0s", 0), ("2m59.5s", 179.5),
     ("1h2m3s", 3723), ("350ms", 0.35), ("1m", 60), ("1h", 3600), ("2m 5s", 125),
     (str(int(NOW) + 10), 10), (f"{int(NOW) + 10}000", 10), ("", None), ("soon", None),
     ("s", None), ("m", None), ("nan", None), ("inf", None), ("12x", None)],
)  # fmt: skip
def test_spellings_of_a_wait(text, seconds):
    wait = read_wait(text)
    assert (wait.after if wait.at is None else wait.at - NOW) == seconds


def test_milliseconds_come_first():
    assert wait("99", retry_after_ms="12000") == 12
    assert wait("99", retry_after_ms="10") == 1
    assert wait("99", retry_after_ms="x") == 99


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ([{"error": {"code": 429, "details": [{"retryDelay": "17s"}]}}], 17),
        ([{"error": {"code": 429, "details": [{"retryDelay": "17.8s"}]}}], 17),
        ({"error": {"details": [{"retryDelay": "0s"}]}}, 1),
        ({"error": {"message": "Please try again in 7m12.3s."}}, 432),
        ({"error": {"message": "Please try again in 350ms."}}, 1),
        ({"error": {"message": "Please retry in 17.5s."}}, 17),
        ({"error": {"message": "retrying in 8h 13m"}}, 29_580),
        ({"error": {"type": "usage_limit_reached", "resets_in_seconds": 123}}, 123),
        ({"error": {"message": "try again later"}}, None),
        ({"error": {"message": "try again in a while"}}, None),
    ],
)
def test_waits_in_the_body(body, seconds):
    assert wait(body=json.dumps(body).encode()) == seconds


def test_the_header_beats_the_body():
    assert wait("5", body=b'{"retryDelay": "17s"}') == 5
    assert wait("soon", body=b'{"retryDelay": "17s"}') == 17


def test_of_what_is_used_up_the_last_to_come_back_counts():
    spent = {
        "x_ratelimit_remaining_requests": "5",
        "x_ratelimit_reset_requests": "2h",
        "x_ratelimit_remaining_tokens": "0",
        "x_ratelimit_reset_tokens": "2m59s",
    }
    assert wait(**spent) == 179
    assert wait(**{**spent, "x_ratelimit_remaining_requests": "0"}) == 7200
    assert wait(x_ratelimit_reset=f"{int(NOW) + 40}000", x_ratelimit_remaining="0") == 40
    assert wait(x_ratelimit_reset_tokens="0s", x_ratelimit_remaining_tokens="0") == 1


@given(st.text(max_size=30), st.binary(max_size=60))
@example("1" * 400, b"")
@example("-1e308", b'{"retryDelay": "....s"}')
@example("Wed, 21 Oct 99999 07:28:00 GMT", b"try again in 1.2.3s")
@example("", b"try again in .s")
def test_any_header_and_body_is_a_wait_or_none(text, body):
    for headers in ({"retry-after": text}, {"retry-after-ms": text}, {"x-ratelimit-reset": text}):
        found = stated_wait(headers, body, NOW)
        assert found is None or (1 <= found <= 86_400 and found == int(found))
