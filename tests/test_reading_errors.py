"""Reading what goes wrong: every shape of an error, every spelling of a wait, every class of limit.

Bodies are synthetic, made after shapes that were recorded (golden/) or reported in public threads;
each table says whose it is. NOW is the wall clock of these tests.
"""

from __future__ import annotations

import json
import logging
import time
from datetime import datetime, timezone
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from replay import GOLDEN
from upstream import AUTH, HELLO, Reply, Stream, chat, completion, good, provider, sse

import router
from router import Outcome, Wait, error_code, error_text, judge, scrub, stated_wait

NOW = 1_790_000_000.0  # Monday, 2026-09-21 14:13:20 UTC
HOUR, DAY = 3600.0, 86_400.0
BIG = 1 << 20


def raw(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def outcome(status: int, body: Any, headers: dict[str, str] | None = None, clock: str = "utc"):
    """What Upstream makes of a refusal."""
    data, zone = raw(body), router.zone_seconds(clock, NOW)
    wait = stated_wait(headers or {}, data, NOW, zone)
    return Outcome(status, error_text(data), retry_after=wait, code=error_code(data))


def read(status: int, body: Any, headers: dict[str, str] | None = None, clock: str = "utc"):
    """(verdict, seconds it rests) of a refusal."""
    found = outcome(status, body, headers, clock)
    verdict = judge(found)
    return verdict, router.rest_seconds(verdict, found, clock, NOW)


# --- every shape ------------------------------------------------------------------------

MESSAGE = "the model wants a rest. Please try again in 7m12.5s"

SHAPES: dict[str, Any] = {
    "openai": lambda m: {"error": {"message": m, "type": "t", "param": None, "code": None}},
    "anthropic": lambda m: {"type": "error", "error": {"type": "t", "message": m}},
    "google": lambda m: [{"error": {"code": 418, "message": m, "status": "T", "details": []}}],
    "google-alone": lambda m: {"error": {"code": 418, "message": m, "status": "T"}},
    "vllm": lambda m: {"object": "error", "message": m, "type": "BadRequestError", "code": 418},
    "mistral": lambda m: {"object": "error", "message": m, "type": "t", "code": "1300"},
    "cerebras": lambda m: {"message": m, "type": "t", "param": "quota", "code": "c"},
    "cohere": lambda m: {"id": "8bd5b608", "message": m},
    "bedrock": lambda m: {"message": m},
    "azure": lambda m: {"statusCode": 418, "message": m},
    "aws": lambda m: {"__type": "ThrottlingException", "Message": m},
    "error-string": lambda m: {"error": m},
    "xai": lambda m: {"code": "a sentence as a code", "error": m},
    "spring": lambda m: {"status": 418, "error": "Teapot", "message": m, "path": "/v1"},
    "oauth": lambda m: {"error": "invalid_grant", "error_description": m},
    "detail-string": lambda m: {"detail": m},
    "detail-object": lambda m: {"detail": {"message": m}},
    "detail-list": lambda m: {"detail": [{"loc": ["body", "x", 0], "msg": m, "type": "v"}]},
    "detail-strings": lambda m: {"detail": [m, "more"]},
    "errors": lambda m: {"success": False, "errors": [{"code": 10000, "message": m}]},
    "errors-strings": lambda m: {"errors": [m]},
    "errors-fields": lambda m: {"errors": {"temperature": [m]}},
    "problem": lambda m: {"type": "about:blank", "title": "Teapot", "status": 418, "detail": m},
    "problem-title": lambda m: {"type": "about:blank", "title": m, "status": 418},
    "twice-wrapped": lambda m: {"error": {"error": {"message": m, "type": "t"}}},
    "fireworks": lambda m: {"error": {"object": "error", "type": "t", "message": m}},
    "minimax": lambda m: {"base_resp": {"status_code": 1002, "status_msg": m}},
    "apigee": lambda m: {"fault": {"faultstring": m, "detail": {"errorcode": "c"}}},
    "responses": lambda m: {"type": "response.failed", "response": {"error": {"message": m}}},
    "openrouter-raw": lambda m: {
        "error": {
            "message": "Provider returned error",
            "code": 418,
            "metadata": {"raw": json.dumps({"error": {"message": m}}), "provider_name": "P"},
        }
    },
    "openrouter-raw-text": lambda m: {
        "error": {"message": "Provider returned error", "metadata": {"raw": m}}
    },
    "openrouter-raw-object": lambda m: {
        "error": {"message": "Provider returned error", "metadata": {"raw": {"detail": m}}}
    },
    "packed": lambda m: {"error": {"message": json.dumps({"error": {"message": m}}, indent=1)}},
    "packed-list": lambda m: {"error": {"message": json.dumps([{"error": {"message": m}}])}},
    "venice": lambda m: {
        "error": "Invalid request parameters",
        "details": {"_errors": [], "x": {"_errors": [m]}},
    },
    "json-string": lambda m: json.dumps(json.dumps({"error": {"message": m}})).encode(),
    "json-text": lambda m: json.dumps(m).encode(),
    "event": lambda m: sse({"error": {"message": m}}),
    "named-event": lambda m: b"event: error\n" + sse({"type": "error", "error": {"message": m}}),
    "event-crlf": lambda m: b": hi\r\n\r\ndata:" + raw({"error": {"message": m}}) + b"\r\n\r\n",
    "lines": lambda m: raw({"error": m}) + b"\n" + raw({"done": True}) + b"\n",
    "plain": lambda m: m.encode(),
    "plain-bom": lambda m: b"\xef\xbb\xbf" + m.encode(),
    "padded": lambda m: b"\n \n" + raw({"error": {"message": m}}) + b"\n",
    "utf-16": lambda m: json.dumps({"error": {"message": m}}).encode("utf-16"),
    "html": lambda m: f"<!DOCTYPE html>\n<html><head><title>{m}</title></head></html>".encode(),
    "html-h1": lambda m: f"<html><head><title> </title></head><h1 a='b'>{m}</h1></html>".encode(),
    "xml": lambda m: f"<?xml version='1.0'?><Error><Message>{m}</Message></Error>".encode(),
}
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES)


@EACH_SHAPE
def test_the_reason_is_found_in_every_shape(shape):
    text = error_text(raw(SHAPES[shape](MESSAGE)))
    assert text.endswith(MESSAGE) and "{" not in text and "<" not in text


@EACH_SHAPE
def test_a_wait_in_the_reason_is_found_in_every_shape(shape):
    assert stated_wait({}, raw(SHAPES[shape](MESSAGE)), NOW) == 432


@EACH_SHAPE
def test_the_reason_of_an_error_inside_a_200_is_the_same(shape):
    """Where a 200 can be told from an answer at all: by `error`, by its type, by success."""
    value = router.read_json(raw(SHAPES[shape](MESSAGE)))
    found = router.embedded_error(value)
    if found:
        assert found.text.endswith(MESSAGE)
        assert found.retry_after in (432, None)
    first = value[0] if isinstance(value, list) else value
    assert found or not isinstance(first, dict) or not first.get("error")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", ""),
        (b"null", "null"),
        (b"503", "503"),
        (b"{}", "{}"),
        (b"[]", "[]"),
        ({"error": {}}, '{"error": {}}'),
        ({"error": True, "message": "m"}, "m"),
        ({"error": {"message": ""}, "detail": "d"}, "d"),
        ({"error": {"message": 5, "code": "c"}}, '{"error": {"message": 5, "code": "c"}}'),
        ({"message": "m", "detail": "d"}, "m"),
        ({"error": "Not Found", "message": "Not Found"}, "Not Found"),
        ({"detail": [{"loc": ["body", "n"], "msg": "required"}]}, "body.n: required"),
        ({"error": {"message": "{not json", "code": 1}}, "{not json"),
        ({"error": {"message": '{"a": 1}'}}, '{"a": 1}'),
        (b"<html>", "an HTML page"),
        (b"<title>", "an HTML page"),
        (b"<TITLE>502 Bad\nGateway</TITLE>", "an HTML page: 502 Bad Gateway"),
        (b"\xff\xfe\x00", "\ufffd\ufffd"),
        (b"data: [DONE]\n\n", "data: [DONE]"),
        ({"error": {"metadata": {"raw": "own words"}}}, "own words"),
    ],
)
def test_odd_bodies_give_what_they_have(body, text):
    assert error_text(raw(body)) == text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"code": "1302"}}, "#1302"),
        ({"error": {"code": 1302}}, "#1302"),
        ({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}, "RESOURCE_EXHAUSTED"),
        ({"error": {"code": "429"}}, ""),
        ({"error": {"code": None, "type": True}}, ""),
        ({"error": {"code": 1e300, "type": 10**30}}, ""),
        ({"message": "m", "type": "t", "code": "c"}, "c t"),
        ([{"error": {"errors": [{"reason": "rateLimitExceeded"}]}}], "rateLimitExceeded"),
        ({"error": {"innererror": {"code": "ResponsibleAIPolicyViolation"}}},
         "ResponsibleAIPolicyViolation"),
        ({"error": {"metadata": {"raw": '{"error": {"code": "deep"}}'}}}, "deep"),
        (b"<html>", ""),
        (b"plain", ""),
    ],
)  # fmt: skip
def test_codes_are_words_and_numbers_are_marked(body, words):
    assert error_code(raw(body)) == words


def google(quota_id: str, *, message: str = "You exceeded your current quota", delay: str = "5s"):
    """A 429 of Gemini's (gemini-cli#8437, comic-translate#403)."""
    rpc = "type.googleapis.com/google.rpc."
    violation = {"quotaMetric": "requests", "quotaId": quota_id, "quotaValue": "20"}
    details = [
        {"@type": f"{rpc}Help", "links": [{"description": "d", "url": "https://x"}]},
        {"@type": f"{rpc}QuotaFailure", "violations": [violation]},
        {"@type": f"{rpc}RetryInfo", "retryDelay": delay},
    ]
    error = {"code": 429, "message": message, "status": "RESOURCE_EXHAUSTED", "details": details}
    return [{"error": error}]


PER_DAY = "GenerateRequestsPerDayPerProjectPerModel-FreeTier"
PER_MINUTE = "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"


@pytest.mark.parametrize(
    "pack",
    [
        lambda value: value,
        lambda value: value[0],
        lambda value: {"error": {"message": json.dumps(value[0]), "code": 429}},
        lambda value: {"error": {"message": "x", "metadata": {"raw": json.dumps(value)}}},
        lambda value: sse(value[0]),
    ],
    ids=["list", "object", "packed", "raw", "event"],
)
def test_the_quota_of_gemini_is_read_however_it_is_packed(pack):
    day = outcome(429, pack(google(PER_DAY)))
    assert PER_DAY in day.code and day.retry_after == 5
    assert judge(day).until == "day"
    assert judge(outcome(429, pack(google(PER_MINUTE)))) is router.RATE_LIMITED


# --- the status an error inside a 200 stands for ------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"error": {"code": 429}}, 429),
        ({"error": {"code": "529"}}, 529),
        ({"error": {"status_code": 400, "code": "tool_use_failed"}}, 400),
        ({"error": {"message": "x"}, "status": 403}, 403),
        ({"error": {"error": {"code": 404}}}, 404),
        ({"object": "error", "code": 40303, "status": 503}, 503),
        ({"error": {"type": "overloaded_error"}, "type": "error"}, 529),
        ({"error": {"type": "rate_limit_error"}}, 429),
        ({"error": {"status": "RESOURCE_EXHAUSTED"}}, 429),
        ({"error": {"status": "UNAVAILABLE"}}, 503),
        ({"error": {"code": "server_is_overloaded"}}, 503),
        ({"error": {"code": "context_length_exceeded"}}, 400),
        ({"error": {"type": "authentication_error"}}, 401),
        ({"error": {"code": 200}}, 502),
        ({"error": {"code": True}}, 502),
        ({"error": {"code": "\u0664\u0662\u0669"}}, 502),
        ({"error": {"code": ["429"]}}, 502),
        ({"error": {"type": "server_error"}}, 502),
        ({"error": "text"}, 502),
        ({"error": 5}, 502),
    ],
)
def test_the_status_of_an_embedded_error(error, status):
    found = router.embedded_error(error)
    assert found is not None and found.status == status


@pytest.mark.parametrize(
    "value",
    [
        {"choices": []},
        {"error": None, "choices": [{}]},
        {"error": "", "success": True},
        {"success": False, "choices": [{}]},
        {"base_resp": {"status_code": 0, "status_msg": "success"}},
        {"promptFeedback": {"safetyRatings": []}},
        {"promptFeedback": {"blockReason": "X"}, "choices": [{}]},
        None, 5, "error", [], [[]],
    ],
)  # fmt: skip
def test_what_is_no_error_is_none(value):
    assert router.embedded_error(value) is None


def test_a_blocked_prompt_is_a_content_filter():
    """Gemini's promptFeedback, as recorded from Vertex."""
    value = {
        "promptFeedback": {
            "blockReason": "MODEL_ARMOR",
            "blockReasonMessage": "The prompt violated the filters.",
        },
        "usageMetadata": {"trafficType": "ON_DEMAND"},
    }
    problem, _ = router.judge_reply(raw(value))
    assert problem and judge(problem, in_ok=True) is router.CONTENT_FILTER
    assert "MODEL_ARMOR The prompt violated" in problem.text


def test_an_embedded_error_keeps_the_wait_and_the_codes():
    error = {"message": "slow", "code": 429, "metadata": {"headers": {"X-RateLimit-Reset": "1"}}}
    found = router.embedded_error({"error": {**error, "type": "x"}, "choices": []})
    assert found and (found.retry_after, found.resets_at, found.code) == (1, None, "x")
    error["metadata"]["headers"]["X-RateLimit-Reset"] = f"{int(NOW) + 2 * DAY:.0f}000"
    found = router.embedded_error({"error": error})
    assert found and (found.retry_after, found.resets_at) == (None, NOW + 2 * DAY)
    assert router.rest_seconds(router.RATE_LIMITED, found, "utc", NOW) == 2 * DAY


# --- every spelling of a wait ---------------------------------------------------------------


def utc(seconds: float, form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    return datetime.fromtimestamp(NOW + seconds, timezone.utc).strftime(form)


LATER = NOW + 90
HEADERS: dict[str, tuple[dict[str, str], float | None]] = {
    "integer": ({"retry-after": "30"}, 30),
    "float": ({"retry-after": "1.9"}, 1),
    "zero": ({"retry-after": "0"}, 1),
    "negative": ({"retry-after": "-5"}, 1),
    "spaces": ({"retry-after": "  30 "}, 30),
    "quotes": ({"retry-after": '"30"'}, 30),
    "twice": ({"retry-after": "30, 60"}, 30),
    "unit": ({"retry-after": "30 seconds"}, 30),
    "duration": ({"retry-after": "2m59.5s"}, 179),
    "unix": ({"retry-after": f"{LATER:.0f}"}, 90),
    "unix-ms": ({"retry-after": f"{LATER:.0f}000"}, 90),
    "rfc1123": ({"retry-after": formatdate(LATER, usegmt=True)}, 90),
    "rfc850": ({"retry-after": utc(90, "%A, %d-%b-%y %H:%M:%S GMT")}, 90),
    "asctime": ({"retry-after": utc(90, "%a %b %d %H:%M:%S %Y")}, 90),
    "iso": ({"retry-after": utc(90)}, 90),
    "past": ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 1),
    "absurd": ({"retry-after": "999999999"}, DAY),
    "absurd-date": ({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}, DAY),
    "beyond-floats": ({"retry-after": "1e400"}, None),
    "inf": ({"retry-after": "inf"}, None),
    "-inf": ({"retry-after": "-inf"}, None),
    "nan": ({"retry-after": "nan"}, None),
    "word": ({"retry-after": "soon"}, None),
    "empty": ({"retry-after": ""}, None),
    "ms": ({"retry-after-ms": "12000"}, 12),
    "ms-first": ({"retry-after-ms": "12000", "retry-after": "99"}, 12),
    "ms-bad": ({"retry-after-ms": "x", "retry-after": "99"}, 99),
    "ms-inf": ({"retry-after-ms": "inf", "retry-after": "99"}, 99),
    "reset-seconds": ({"x-ratelimit-reset": "40"}, 40),
    "reset-unix": ({"x-ratelimit-reset": f"{LATER:.0f}"}, 90),
    "reset-unix-ms": ({"x-ratelimit-reset": f"{LATER:.0f}000", "x-ratelimit-remaining": "0"}, 90),
    "reset-6s": ({"x-ratelimit-reset-tokens": "6s"}, 6),
    "reset-ms": ({"x-ratelimit-reset-tokens": "120ms"}, 1),
    "reset-minutes": ({"x-ratelimit-reset-requests": "2m59.56s"}, 179),
    "reset-hours": ({"x-ratelimit-reset-requests": "1h2m3s"}, 3723),
    "reset-iso": ({"x-ratelimit-reset": utc(90)}, 90),
    "reset-not-used-up": (
        {"x-ratelimit-reset-tokens": "6s", "x-ratelimit-remaining-tokens": "12"}, None
    ),
    "reset-the-last": (
        {"x-ratelimit-reset-tokens": "6s", "x-ratelimit-remaining-tokens": "0",
         "x-ratelimit-reset-requests": "2m", "x-ratelimit-remaining-requests": "0"}, 120
    ),
    "reset-negative-left": (
        {"x-ratelimit-reset-tokens": "6s", "x-ratelimit-remaining-tokens": "-3"}, 6
    ),
    "cerebras": (
        {"x-ratelimit-reset-requests-day": "33011.38", "x-ratelimit-remaining-requests-day": "0",
         "x-ratelimit-reset-tokens-minute": "11.3", "x-ratelimit-remaining-tokens-minute": "9"},
        33_011,
    ),
    "anthropic": (
        {"anthropic-ratelimit-tokens-reset": utc(90), "anthropic-ratelimit-tokens-remaining": "0",
         "anthropic-ratelimit-requests-reset": utc(300),
         "anthropic-ratelimit-requests-remaining": "49"}, 90
    ),
    "anthropic-input": (
        {"anthropic-ratelimit-input-tokens-reset": utc(90, "%Y-%m-%dT%H:%M:%S+00:00"),
         "anthropic-ratelimit-input-tokens-remaining": "0"}, 90
    ),
    "ratelimit-reset": ({"ratelimit-reset": "50", "ratelimit-remaining": "0"}, 50),
    "ietf": ({"ratelimit": '"api";r=0;t=295'}, 295),
    "ietf-left": ({"ratelimit": '"api";r=999;t=295'}, None),
    "ietf-several": ({"ratelimit": '"burst";r=0;t=2, "day";r=0;t=700, "x";r=4;t=9999'}, 700),
    "ietf-older": ({"ratelimit": "limit=100, remaining=0, reset=50"}, 50),
    "ietf-odd": ({"ratelimit": "r=;t=,;;=\x00"}, None),
    "retry-after-first": ({"retry-after": "7", "x-ratelimit-reset": "40"}, 7),
}  # fmt: skip
EACH_HEADER = pytest.mark.parametrize("spelling", HEADERS)


@EACH_HEADER
def test_a_wait_in_the_headers(spelling):
    headers, seconds = HEADERS[spelling]
    assert stated_wait(headers, b"", NOW) == seconds


@EACH_HEADER
@EACH_SHAPE
def test_headers_come_before_the_body_whatever_its_shape(spelling, shape):
    headers, seconds = HEADERS[spelling]
    assert stated_wait(headers, raw(SHAPES[shape](MESSAGE)), NOW) == (seconds or 432)


PROSE: dict[str, float | None] = {
    "Please try again in 7m12s.": 432,
    "Please try again in 50.597142857s. Visit https://x": 50,
    "Please try again in 350ms.": 1,
    "Please try again in 1h2m3.4s": 3723,
    "Try again in 35 seconds.": 35,
    "try again in 5 minutes": 300,
    "try again in 1 hour and 5 minutes": 3900,
    "try again in 2 days": DAY,
    "Please retry in 25.460157s.": 25,
    "Please retry after 20 seconds.": 20,
    "retry after: 20 s": 20,
    "please try again after 1 seconds": 1,
    "Trying too fast: wait 12s": 12,
    "Please wait for 3 minutes before": 180,
    "retrying in 8h 13m": 29_580,
    "Your quota will reset after 7h5m10s.": 25_510,
    "limit resets in 45 sec": 45,
    "available again in 3 hrs": 10_800,
    "try your request again in about 10 seconds": 10,
    f"Your limit will reset at {utc(3600, '%Y-%m-%d %H:%M:%S')}": 3600,
    f"It will reset at {utc(3600)}.": 3600,
    f"It will reset at {utc(3600, '%a, %d %b %Y %H:%M:%S GMT')}": 3600,
    f"You will regain access on {utc(46_600, '%Y-%m-%d at %H:%M UTC')}.": 46_600,
    f"\u60a8\u7684\u9650\u989d\u5c06\u5728 {utc(60, '%Y-%m-%d %H:%M:%S')} \u91cd\u7f6e\u3002": 60,
    f"resets at {utc(7 * DAY)}": 7 * DAY,
    f"resets at {utc(400 * DAY)}": DAY,
    "try again later": None,
    "Please retry shortly": None,
    "try again in a while": None,
    "try again in 1 month": None,
    "retry in 5 requests": None,
    "resets at 9999-99-99 99:99:99": None,
    "reset at 2026-02-30 10:00:00": None,
    "limit: 20, used 30s ago": None,
}


@pytest.mark.parametrize("text", PROSE)
def test_a_wait_in_a_sentence(text):
    for shape in ("plain", "openai", "google", "detail-list", "packed", "event"):
        assert stated_wait({}, raw(SHAPES[shape](text)), NOW) == PROSE[text], shape


@pytest.mark.parametrize(
    ("member", "seconds"),
    [
        ({"retryDelay": "17s"}, 17),
        ({"retryDelay": "17.8s"}, 17),
        ({"retryDelay": "0s"}, 1),
        ({"retry_after": 12}, 12),
        ({"retryAfter": "12"}, 12),
        ({"retry_after_seconds": 12.9}, 12),
        ({"retry_after_ms": 12_000}, 12),
        ({"resets_in_seconds": 123}, 123),
        ({"resets_in_seconds": 10**30}, DAY),
        ({"resets_at": NOW + 50}, 50),
        ({"resets_at": NOW + 6 * DAY, "resets_in_seconds": 6 * DAY}, 6 * DAY),
        ({"resets_at": "2026-09-21T14:14:20Z"}, 60),
        ({"quotaResetDelay": "1h0m10s", "quotaResetTimeStamp": utc(3610)}, 3610),
        ({"metadata": {"headers": {"X-RateLimit-Reset": f"{LATER:.0f}000"}}}, 90),
        ({"metadata": {"raw": json.dumps({"error": {"retry_after": 9}})}}, 9),
        ({"retryDelay": None, "resets_at": True}, None),
        ({"retryDelay": "soon"}, None),
        ({"retry_after": "nan"}, None),
    ],
)
def test_a_wait_in_a_member_of_the_body(member, seconds):
    for body in ({"error": member}, [{"error": {"details": [member]}}], {"detail": member}):
        assert stated_wait({}, raw(body), NOW) == seconds


def test_a_wait_in_json_that_was_cut():
    assert stated_wait({}, b'[{"error": {"details": [{"retryDelay": "17s"}', NOW) == 17


def test_dates_without_a_zone_are_in_the_providers_time():
    text = b"Your limit will reset at 2026-09-21 22:15:00"
    assert stated_wait({}, text, NOW, router.zone_seconds("beijing", NOW)) == 100
    assert stated_wait({}, text + b"+08:00", NOW) == 100
    assert stated_wait({}, b"reset at 2026-09-21 09:15:00-05:00", NOW, 28_800) == 100


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_a_date_does_not_depend_on_where_the_router_runs(zone, monkeypatch):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert stated_wait({"retry-after": utc(90, "%a %b %d %H:%M:%S %Y")}, b"", NOW) == 90
    finally:
        monkeypatch.undo()
        time.tzset()


# --- every class -----------------------------------------------------------------------------


def said(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, **more}}


def named(kind: str, message: str = "m", **more: Any) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message, **more}}


GROQ = "Rate limit reached for model `m` in organization `o` service tier `on_demand` on "
GEMINI_ZERO = (
    "* Quota exceeded for metric: free_tier_requests, limit: 0, model: g\nPlease retry in 45s"
)
MIDNIGHT_UTC, MIDNIGHT_PACIFIC = 35_200.0, 60_400.0  # after NOW: 00:00 UTC, 07:00 UTC
MONTH_END = 812_800.0  # 1 October

# name -> (status, body, clock, verdict's name, who rests, for how long, what next)
CLASSES: dict[str, tuple[Any, ...]] = {
    # concurrency
    "zai-concurrency": (429, said("Rate limit reached for requests", code="1302"), "beijing",
                        "concurrency", "route", 3, "key"),
    "moonshot-concurrency": (429, said("request reached max concurrency: 3, please try again after"
                                       " 2 seconds"), "utc", "concurrency", "route", 2, "key"),
    "slots": (429, {"error": "timed out waiting for a concurrent request slot"}, "utc",
              "concurrency", "route", 3, "key"),
    # burst
    "groq-minute": (429, said(GROQ + "tokens per minute (TPM): Limit 6000, Used 5800, Requested"
                              " 900. Please try again in 7s", code="rate_limit_exceeded"), "utc",
                    "rate_limited", "route", 7, "key"),
    "cerebras-minute": (429, {"message": "Requests per minute limit exceeded",
                              "code": "request_quota_exceeded"}, "utc",
                        "rate_limited", "route", 60, "key"),
    "gemini-minute": (429, google(PER_MINUTE, delay="25.4s"), "pacific",
                      "rate_limited", "route", 25, "key"),
    "minute-and-day": (429, said("10 requests per minute and 100 per day"), "utc",
                       "rate_limited", "route", 60, "key"),
    "openrouter-minute": (429, said("Rate limit exceeded: free-models-per-min. Add 10 credits"),
                          "utc", "rate_limited", "route", 60, "key"),
    "cloudflare-wall": (429, b"error code: 1015", "utc", "rate_limited", "route", 60, "key"),
    # day
    "gemini-day": (429, google(PER_DAY), "pacific",
                   "day_quota", "route", MIDNIGHT_PACIFIC, "key"),
    "groq-day": (429, said(GROQ + "tokens per day (TPD): Limit 100000, Used 97050, Requested 3619."
                           " Please try again in 9m38.016s."), "utc", "day_quota", "route", 578,
                 "key"),
    "openrouter-day": (429, said("Rate limit exceeded: free-models-per-day", metadata={
        "headers": {"X-RateLimit-Reset": f"{NOW + 7200:.0f}000"}}), "utc",
        "day_quota", "route", 7200, "key"),
    "cerebras-day": (429, {"message": "Tokens per day limit exceeded"}, "utc",
                     "day_quota", "route", MIDNIGHT_UTC, "key"),
    "cloudflare-day": (429, {"success": False, "errors": [{"code": 4006, "message":
                       "you have used up your daily free allocation of 10,000 neurons"}]}, "utc",
                       "day_quota", "key", MIDNIGHT_UTC, "key"),
    # week, month, plan
    "codex-plan": (429, said("m", type="usage_limit_reached", resets_at=NOW + 5 * DAY), "utc",
                   "plan_quota", "route", 5 * DAY, "key"),
    "zai-plan": (429, said("Usage limit reached for 5 hour. Your limit will reset at 2026-09-21"
                           " 22:15:00", code="1308"), "beijing", "plan_quota", "key", 100, "key"),
    "zai-week": (429, said("Weekly/Monthly Limit Exhausted. Your limit will reset at 2026-09-25"
                           " 22:13:20", code="1310"), "beijing", "plan_quota", "key", 4 * DAY,
                 "key"),
    "cohere-month": (429, {"message": "a Trial key, limited to 1000 API calls / month"}, "utc",
                     "plan_quota", "route", HOUR, "key"),
    "ollama-session": (429, {"error": "you (x) have reached your session usage limit"}, "utc",
                       "plan_quota", "key", HOUR, "key"),
    "opencode": (429, named("FreeUsageLimitError", "retrying in 8h 13m"), "utc",
                 "plan_quota", "route", 29_580, "key"),
    "anthropic-plan": (400, named("invalid_request_error", "You have reached your specified API"
                       " usage limits. You will regain access on 2026-10-01 at 00:00 UTC."), "utc",
                       "plan_quota", "key", MONTH_END, "key"),
    # credit
    "402": (402, {"error": "x"}, "utc", "no_credit", "key", HOUR, "key"),
    "openai-quota": (429, said("You exceeded your current quota, please check your plan",
                               code="insufficient_quota"), "utc", "no_credit", "key", HOUR, "key"),
    "zai-balance": (429, said("no resource package. Please recharge.", code="1113"), "beijing",
                    "no_credit", "key", HOUR, "key"),
    "deepseek": (402, said("Insufficient Balance"), "utc", "no_credit", "key", HOUR, "key"),
    "xai-429": (429, {"code": "exhausted", "error": "Your team has either used all available"
                      " credits or reached its monthly spending limit"}, "utc",
                "no_credit", "key", HOUR, "key"),
    "xai-403": (403, {"error": "permission-denied: used all available credits"}, "utc",
                "no_credit", "key", HOUR, "key"),
    "anthropic-credit": (400, named("invalid_request_error", "Your credit balance is too low"),
                         "utc", "no_credit", "key", HOUR, "key"),
    "ollama-due": (403, said("your subscription payment is past due"), "utc",
                   "no_credit", "key", HOUR, "key"),
    "huggingface": (402, {"error": "You have exceeded your monthly included credits for Inference"
                          " Providers. Subscribe to PRO"}, "utc",
                    "no_credit", "key", MONTH_END, "key"),
    "openrouter-afford": (402, said("requires more credits, or fewer max_tokens. You requested up"
                          " to 65536 tokens, but can only afford 2000"), "utc",
                          "unaffordable", "", 0, "model"),
    "openrouter-none": (402, said("requires more credits, but can only afford 0"), "utc",
                        "no_credit", "key", HOUR, "key"),
    # tier
    "gemini-zero": (429, google(PER_DAY, message=GEMINI_ZERO, delay="45s"), "pacific",
                    "no_tier", "route", DAY, "key"),
    "zai-tier": (429, said("does not yet include access to GLM-5", code="1311"), "beijing",
                 "no_tier", "route", DAY, "key"),
    # dead key
    "401": (401, {"detail": "Unauthorized"}, "utc", "dead_key", "key", HOUR, "key"),
    "gemini-key": (400, [said("API key not valid. Please pass a valid API key.",
                              status="INVALID_ARGUMENT")], "pacific",
                   "dead_key", "key", HOUR, "key"),
    "xai-key": (400, {"error": "Incorrect API key provided: xa***. You can obtain"}, "utc",
                "dead_key", "key", HOUR, "key"),
    "anthropic-key": (401, named("authentication_error", "invalid x-api-key"), "utc",
                      "dead_key", "key", HOUR, "key"),
    "google-leaked": (403, said("Your API key was reported as leaked. Please use another one.",
                                status="PERMISSION_DENIED"), "pacific",
                      "dead_key", "key", HOUR, "key"),
    # place, policy, wall
    "gemini-place": (400, [said("User location is not supported for the API use.", code=400,
                                status="FAILED_PRECONDITION")], "pacific",
                     "region", "provider", 6 * HOUR, "provider"),
    "gemini-precondition": (400, [said("x", status="FAILED_PRECONDITION")], "pacific",
                            "region", "provider", 6 * HOUR, "provider"),
    "openai-place": (403, said("Country, region, or territory not supported",
                               code="unsupported_country_region_territory"), "utc",
                     "region", "provider", 6 * HOUR, "provider"),
    "groq-network": (403, said("Access denied. Please check your network settings."), "utc",
                     "region", "provider", 6 * HOUR, "provider"),
    "kimi": (403, said("only available for Coding Agents", type="access_terminated_error"), "utc",
             "policy", "provider", DAY, "provider"),
    "wall": (403, b"<html><head><title>Just a moment...</title></head></html>", "utc",
             "blocked", "provider", 600, "provider"),
    # model
    "404": (404, named("not_found_error", "model: x"), "utc", "model_gone", "model", HOUR, "model"),
    "410": (410, b"gone", "utc", "model_gone", "model", HOUR, "model"),
    "nvidia-gone": (404, {"status": 404, "title": "Not Found", "detail":
                    "Function 'x': Not found for account 'y'"}, "utc",
                    "model_gone", "model", HOUR, "model"),
    "not-allowed": (401, said("key not allowed to access model"), "utc",
                    "model_refused", "model", HOUR, "model"),
    "not-allowed-400": (400, said("key not allowed to access model"), "utc",
                        "model_refused", "model", HOUR, "model"),
    "opencode-model": (401, named("ModelError", "Model x not supported"), "utc",
                       "model_refused", "model", HOUR, "model"),
    "opencode-promotion": (401, named("ModelError", "the promotion has ended"), "utc",
                           "model_refused", "model", HOUR, "model"),
    "bedrock-model": (400, {"message": "The provided model identifier is invalid."}, "utc",
                      "model_refused", "model", HOUR, "model"),
    "no-endpoint": (404, said("No endpoints found that support tool use."), "utc",
                    "unfit", "", 0, "model"),
    # overload
    "529": (529, named("overloaded_error", "Overloaded"), "utc", "overloaded", "route", 10, "key"),
    "zai-overload": (429, said("try later", code=1305), "beijing", "overloaded", "route", 5, "key"),
    "cerebras-queue": (429, {"message": "We're experiencing high traffic right now!",
                             "code": "queue_exceeded"}, "utc", "overloaded", "route", 5, "key"),
    "gemini-503": (503, [said("The model is overloaded. Please try again later.",
                              status="UNAVAILABLE")], "pacific", "overloaded", "route", 10, "key"),
    "mistral-capacity": (429, {"object": "error", "message":
                         "Service tier capacity exceeded for this model."}, "utc",
                         "overloaded", "model", 15, "model"),
    "openrouter-upstream": (429, said("Provider returned error", metadata={
        "raw": "m is temporarily rate-limited upstream. Please retry shortly"}), "utc",
        "overloaded", "model", 15, "model"),
    # health
    "degraded": (400, {"title": "Bad Request", "status": 400,
                       "detail": "DEGRADED function cannot be invoked"}, "utc",
                 "provider_error", "route", 15, "key"),
    "500": (500, {"error": "x"}, "utc", "provider_error", "route", 15, "key"),
    # content filter
    "azure": (400, said("The response was filtered", code="content_filter", innererror={
        "code": "ResponsibleAIPolicyViolation"}), "utc", "content_filter", "", 0, "stop"),
    "openai-policy": (400, said("rejected", code="content_policy_violation"), "utc",
                      "content_filter", "", 0, "stop"),
    "openrouter-moderation": (403, said("x requires moderation and your input was flagged"), "utc",
                              "content_filter", "", 0, "stop"),
    "deepseek-risk": (400, said("Content Exists Risk"), "utc", "content_filter", "", 0, "stop"),
    "zai-filter": (400, said("unsafe", code="1301"), "beijing", "content_filter", "", 0, "stop"),
    # the client's fault
    "client": (400, named("invalid_request_error", "messages.0.role: must be user"), "utc",
               "client_fault", "", 0, "stop"),
    "file": (400, [said("The File x is not in an ACTIVE state", status="FAILED_PRECONDITION")],
             "pacific", "client_fault", "", 0, "stop"),
    "groq-call": (400, said("Failed to call a function", code="tool_use_failed",
                            failed_generation="{"), "utc", "bad_tool_call", "", 0, "model"),
    "413": (413, b"<html><title>413 Request Entity Too Large</title></html>", "utc",
            "too_large", "", 0, "provider"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_every_class(name):
    status, body, clock, verdict_name, rests, seconds, then = CLASSES[name]
    verdict, rest = read(status, body, clock=clock)
    assert (verdict.name, verdict.rests, rest, verdict.then) == (verdict_name, rests, seconds, then)
    if status == 429:
        assert not verdict.counts


# The same words mean the same in every shape.
WORDED: dict[str, tuple[int, str]] = {
    "concurrency": (429, "too many concurrent requests"),
    "rate_limited": (429, "limit of requests per minute"),
    "day_quota": (429, "limit of requests per day"),
    "plan_quota": (429, "weekly limit of the plan"),
    "no_credit": (429, "Insufficient balance"),
    "no_tier": (429, "Quota exceeded for metric: x, limit: 0. Please retry in 9s."),
    "overloaded": (503, "the model is overloaded"),
    "dead_key": (400, "API key not valid"),
    "region": (400, "User location is not supported"),
    "policy": (403, "only available for Coding Agents"),
    "model_refused": (400, "The model `m` does not exist"),
    "context_overflow": (400, "prompt is too long: 9 tokens > 8 maximum"),
    "content_filter": (400, "triggering the content management policy"),
    "bad_tool_call": (400, "tool_use_failed"),
    "client_fault": (400, "temperature is out of range"),
}


@EACH_SHAPE
@pytest.mark.parametrize("name", WORDED)
def test_every_class_in_every_shape(name, shape):
    status, message = WORDED[name]
    assert judge(outcome(status, SHAPES[shape](message))).name == name


@EACH_SHAPE
@pytest.mark.parametrize("name", sorted(set(WORDED) - {"client_fault", "region", "policy"}))
def test_every_class_inside_a_200_that_names_no_status(name, shape):
    """A wrong key or too long a prompt is one, whatever status the server gives it."""
    body = raw(SHAPES[shape](WORDED[name][1]))
    assert judge(Outcome(502, error_text(body), code=error_code(body)), in_ok=True).name == name


OVERFLOWS = [
    (400, "This model's maximum context length is 8192 tokens. However, you requested 9001"),
    (400, "context_length_exceeded"),
    (400, "Your input exceeds the context window of this model."),
    (400, "prompt is too long: 210000 tokens > 200000 maximum"),
    (400, "input length and `max_tokens` exceed context limit: 199000 + 8000 > 200000"),
    (400, "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)"),
    (400, "prompt token count of 130000 exceeds the limit of 128000"),
    (400, "the request exceeds the available context size, try increasing it"),
    (400, "exceed_context_size_error"),
    (400, "when context the overflows ... context length of only 4096"),
    (400, "The number of tokens is greater than the context length"),
    (400, "Prompt exceeds max length"),
    (400, "ContextWindowExceededError: too much"),
    (400, "Input is too long for requested model."),
    (400, "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768"),
    (422, "maximum context length is 4096 tokens"),
    (500, "context length exceeded"),
    (413, "Request too large for `m` on tokens per minute (TPM): Limit 30000, Requested 33000"),
    (429, "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 33476"),
    (429, GROQ + "tokens per minute (TPM): Limit 7000, Used 0, Requested ~12903. Please try again"
     " in 50.59s"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "text"), OVERFLOWS)
def test_too_long_a_prompt_is_known_by_every_name(status, text):
    for body in (said(text), {"message": text}, [said(text)], text.encode()):
        assert judge(outcome(status, body)) is router.OVERFLOW
    assert judge(Outcome(502, text), in_ok=True) is router.OVERFLOW


@pytest.mark.parametrize("code", ["1261", 1261, "context_length_exceeded",
                                  "model_max_prompt_tokens_exceeded"])  # fmt: skip
def test_too_long_a_prompt_is_known_by_its_code(code):
    assert judge(outcome(400, said("no", code=code))) is router.OVERFLOW


@pytest.mark.parametrize(
    "text",
    [
        "Rate limit reached: Limit 30000, Used 29000, Requested 3000. Please try again in 4s",
        "the limit: 20 of requests", "limit: 0.5 requests per second", "5 requests limit: 05",
    ],
)  # fmt: skip
def test_what_fits_later_is_a_rate_limit(text):
    assert judge(outcome(429, said(text))) is router.RATE_LIMITED


@pytest.mark.parametrize(
    "text",
    [
        "Invalid value: '%s'. Supported values are: 'none', 'auto'",
        'tools[0].function.name "%s" is not a valid name',
        "the tool `%s` is unknown: use another",
    ],
)
@pytest.mark.parametrize(
    "quoted",
    ["invalid api key", "insufficient_quota", "degraded function", "User location is not supported",
     "model not found", "failed_precondition"],
)  # fmt: skip
@pytest.mark.parametrize("status", [400, 422])
def test_what_a_client_wrote_puts_nothing_to_rest(text, quoted, status):
    """Providers quote what they refuse; whoever asks for a tool of that name harms nobody."""
    assert judge(outcome(status, said(text % quoted, code="invalid_value"))) is router.CLIENT_FAULT


def test_quotes_do_not_hide_what_a_provider_says_of_itself():
    assert judge(Outcome(400, "The model's key isn't it: API key not valid, don't")) is (
        router.DEAD_KEY
    )
    for name in ("'x y'", "`x`", '"x"', "x"):
        assert judge(Outcome(400, f"Model {name} is not supported")) is router.MODEL_REFUSED


# --- as reported: shapes whose fields and codes stand in public threads -------------------------

# (provider, status, body, verdict): openrouter and others are in CLASSES. The messages are ours.
REPORTED = [
    ("anthropic-sdk-typescript#616", 529, {**named("overloaded_error", "Overloaded"),
     "request_id": "req_1"}, "overloaded"),
    ("ai-gateway#2697", 200, named("overloaded_error", "Overloaded", details=None), "overloaded"),
    ("gemini-cli#2020", 429, said("Resource has been exhausted", code=429,
     status="RESOURCE_EXHAUSTED"), "rate_limited"),
    ("gemini-cli#14831", 429, [said("No capacity", code=429, status="RESOURCE_EXHAUSTED", errors=[
        {"message": "No capacity", "domain": "global", "reason": "rateLimitExceeded"}])],
     "rate_limited"),
    ("Fabric#364", 429, said("Rate limit reached. Please try again in 50.59s", type="tokens",
     code="rate_limit_exceeded"), "rate_limited"),
    ("gpt-researcher#985", 413, said("Request too large for model", type="tokens",
     code="rate_limit_exceeded"), "context_overflow"),
    ("continue#10602", 429, said("Request too large for gpt", type="tokens",
     code="rate_limit_exceeded", param=None), "context_overflow"),
    ("raycast#31107", 429, {"object": "error", "message": "Rate limit exceeded",
     "type": "rate_limited", "param": None, "code": "1300", "raw_status_code": 429},
     "rate_limited"),
    ("anon-kode#53", 429, {"message": "Requests rate limit exceeded"}, "rate_limited"),
    ("continue#6185", 503, {"object": "error", "message": "Service tier capacity exceeded for this"
     " model", "type": "invalid_request_error", "param": None, "code": None}, "overloaded"),
    ("OmniRoute#7638", 401, {"detail": "Unauthorized"}, "dead_key"),
    ("grammar-nazi-bot#954", 429, {"message": "Requests per minute limit exceeded",
     "type": "too_many_requests_error", "param": "quota", "code": "request_quota_exceeded"},
     "rate_limited"),
    ("continue#10373", 429, {"code": "The caller does not have permission", "error":
     "Your team has either used all available credits or more"}, "no_credit"),
]  # fmt: skip


@pytest.mark.parametrize("row", REPORTED, ids=lambda row: row[0])
def test_reported_shapes(row):
    _, status, body, name = row
    found = router.embedded_error(body) if status == 200 else outcome(status, body)
    assert found and judge(found, status == 200).name == name
    assert found.text and "{" not in found.text


RECORDED = {
    "anthropic.messages.name-suggestion-anthropic.0": ("model_gone", "model: claude-sonet-4-5"),
    "cohere.embeddings.embed-error.0": ("model_gone", "model 'nonexistent' not found"),
    "groq.chat.tool-regular-error.0": ("model_gone", "The model `non-existent` does not exist"),
    "openai.chat.name-suggestion-openai-chat.0": ("model_gone", "The model `gpt-5.2-proo` does"),
    "openai.chat.o1-mini-system-role-developer.0": ("client_fault", "Unsupported value: 'mess"),
    "openai.chat.web-search-tool-model-not-supported.0": ("client_fault", "Web search options"),
    "voyage.embeddings.embed-error.0": ("model_refused", "Model nonexistent is not supported."),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_errors(name):
    recording, (verdict, start) = GOLDEN[name], RECORDED[name]
    found = outcome(recording.status, recording.body)
    assert judge(found).name == verdict and found.text.startswith(start)


def test_every_recorded_refusal_is_in_the_table():
    assert {r.id for r in GOLDEN.values() if r.status != 200} == RECORDED.keys()


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("groq.chat.tool-use-failed-error-streaming.0", "bad_tool_call"),
     ("openrouter.chat.stream-error.0", "client_fault")],
)  # fmt: skip
def test_recorded_errors_inside_streams(name, verdict):
    events = (router.event_data(event) for event in router.split_events(GOLDEN[name].body))
    found = [error for data in events if (error := router.embedded_error(router.read_json(data)))]
    assert [judge(error, in_ok=True).name for error in found] == [verdict]


# --- until when -----------------------------------------------------------------------------


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp()


@pytest.mark.parametrize(
    ("clock", "now", "midnight"),
    [
        ("utc", "2026-09-21 14:13:20", "2026-09-22 00:00"),
        ("utc", "2026-09-21 23:59:59", "2026-09-22 00:00"),
        ("utc", "2026-12-31 00:00:00", "2027-01-01 00:00"),
        ("pacific", "2026-09-21 14:13:20", "2026-09-22 07:00"),
        ("pacific", "2026-09-22 06:59:00", "2026-09-22 07:00"),
        ("pacific", "2026-01-15 12:00:00", "2026-01-16 08:00"),
        ("pacific", "2026-03-07 12:00:00", "2026-03-08 08:00"),  # summer time begins on the 8th
        ("pacific", "2026-03-08 09:00:00", "2026-03-09 07:00"),
        ("pacific", "2026-11-01 06:00:00", "2026-11-01 07:00"),  # and ends on the 1st
        ("pacific", "2026-11-01 07:30:00", "2026-11-02 08:00"),
        ("beijing", "2026-09-21 14:13:20", "2026-09-21 16:00"),
    ],
)
def test_a_providers_day_ends_at_its_own_midnight(clock, now, midnight):
    assert router.until_midnight(clock, at(now)) == at(midnight) - at(now)


@pytest.mark.parametrize(
    ("now", "month"),
    [("2026-09-21 14:13:20", "2026-10-01 00:00"), ("2026-12-31 23:00:00", "2027-01-01 00:00"),
     ("2028-02-01 00:00:00", "2028-03-01 00:00")],
)  # fmt: skip
def test_monthly_credits_come_with_the_next_month(now, month):
    assert router.until_next_month(at(now)) == at(month) - at(now)


def test_the_providers_clocks():
    clocks = {row.name: row.clock for row in router.PROVIDERS if row.clock != "utc"}
    assert clocks == {"gemini": "pacific", "zai": "beijing"}


# --- what is told: the provider's words without secrets -----------------------------------------

KEYS = [
    "sk-proj-abcdEFGH1234ijklMNOP5678", "sk-ant-api03-abcdefghij1234567890-AA",
    "gsk_abcDEF1234567890ab",
    "csk-abcdef1234567890abcdef", "xai-abcdefgh1234567890abcd", "nvapi-abcdEFGH1234-ijkl_5678",
    "hf_abcdefghijklmnop1234567890", "ghp_abcdefghijklmnop1234567890abcdef",
    "AIzaSyA1234567890abcdefghijklmnop",
    "sk-or-v1-0123456789abcdef0123456789abcdef", "fw_abcdef1234567890", "r8_abcdef1234567890abcdef",
    "github_pat_11ABCDEFG0123456789_abcdefghijk", "AKIAIOSFODNN7EXAMPLE",
    "ya29.a0AfH6SMBx1234567890",
    "0123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdef.AbCdEfGh12345678",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dBjftJeZ4CVP-mB92K27uhbUJU1p1r",
    "A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "text", ["%s", "Incorrect API key provided: %s. Find yours", "(key %s)", 'x="%s"', "a,%s,b"]
)
def test_whole_keys_are_not_told(key, text):
    told = scrub(text % key)
    assert key not in told and key[8:20] not in told and "[redacted]" in told


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer aB3dEfGh", "bearer aB3dEfGh1", "api_key=aB3dEfGh",
        "api-key: aB3dEfGh",
        '"token": "aB3dEfGh"', "?key=aB3dEfGh&x=1", "password=aB3dEfGh", "secret: aB3dEfGh",
        "Bearer abcdefghijklmnopqrstuvwxyz", "Api key provided: aB3dEfGh",
    ],
)  # fmt: skip
def test_what_follows_the_name_of_a_secret_is_not_told(text):
    told = scrub(text)
    assert "aB3dEfGh" not in told and "abcdefghij" not in told and "[redacted]" in told


@pytest.mark.parametrize(
    "text",
    [
        "API key not valid. Please pass a valid API key.",
        "key_not_found_in_the_request: use a Bearer authentication",
        "The model accounts/fireworks/models/llama-v3p1-405b-instruct does not exist",
        "max_tokens: 65536 is too large: the token limit is 4096",
        "request req_011CdufXo8Y2LVfY2veyuQWG failed, see https://x.ai/settings/billing",
        "keyboardnavigation, skeletonconfiguration and hfinference are words",
        "property 'sk' is unsupported; tool_choice must be 'auto'",
        "\u60a8\u7684\u9650\u989d\u5c06\u5728 2026-08-25 07:41:44 \u91cd\u7f6e",
    ],
)
def test_ordinary_words_are_told(text):
    assert scrub(text) == text


def test_one_line_without_control_characters():
    odd = "a\r\nHTTP/1.1 200 OK\x00\x1b[31mb\x7f\x85c\u2028d\u2029\u202ee\u2066f\ufeff\ud800g\ttab"
    told = scrub(odd)
    assert told == "a HTTP/1.1 200 OK [31mb c d e f g tab"
    told.encode("utf-8")


@given(st.text(alphabet=st.characters(), max_size=400))
@example("\ud800" * 10)
def test_whatever_is_scrubbed_can_be_logged(text):
    told = scrub(text)
    told.encode("utf-8")
    assert len(told) <= 600 and told == " ".join(told.split())
    assert all(char.isprintable() or ord(char) > 159 for char in told)
    assert not any(char in "\u2028\u2029\u202a\u202b\u202c\u202d\u202e" for char in told)


def test_a_key_cut_by_the_limit_does_not_show():
    for lead in range(2370, 2405):
        told = scrub(
            " " * 100 + "x " * ((lead - 100) // 2) + " " + "sk-abcdef0123456789abcdef", 600
        )
        assert "sk-abc" not in told
        assert "sk-abc" not in scrub(" " * lead + "sk-abcdef0123456789abcdef tail", 600)


def test_the_length_is_bounded():
    assert len(error_text(raw(said("word " * 50_000)))) <= 600
    assert len(error_code(raw({"errors": [{"code": "c" * 500}] * 500}))) <= 600


# --- nothing crashes, nothing hangs -------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["429", "limit: 0", "try again in 7m", '{"error": {"code": "x"}}', "[", "17s",
                       "inf", "-1", "9" * 400, "2026-09-21T14:14:20Z", "per day", "1302"])
)  # fmt: skip
NAMES = st.sampled_from([
    *router.MESSAGE_NAMES, *router.CODE_NAMES, *router.CODE_HOLDERS, "loc", "retryDelay",
    "resets_at", "retry_after_ms", "X-RateLimit-Reset", "success", "promptFeedback", "blockReason",
    "object", "choices", "_errors",
])  # fmt: skip
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=16,
)
HEADER_NAMES = st.sampled_from([
    "retry-after", "retry-after-ms", "ratelimit", "ratelimit-reset", "x-ratelimit-reset",
    "x-ratelimit-remaining", "x-ratelimit-reset-tokens", "anthropic-ratelimit-tokens-reset",
    "x-ratelimit-reset-\u00e9",
])  # fmt: skip
ANY_HEADERS = st.dictionaries(
    HEADER_NAMES | st.text(max_size=10), st.text(max_size=40) | SCALARS.map(str), max_size=6
)
CLOCKS = st.sampled_from(["utc", "pacific", "beijing"])


def check_reading(status: int, headers: dict[str, str], body: bytes, clock: Any) -> None:
    wait = stated_wait(headers, body, NOW, router.zone_seconds(clock, NOW))
    assert wait is None or (1 <= wait <= router.MAX_DATED_S and wait == int(wait))
    found = Outcome(status, error_text(body), retry_after=wait, code=error_code(body))
    found.text.encode("utf-8")
    value = router.read_json(body)
    for one, in_ok in ((found, False), (found, True), (router.embedded_error(value), True)):
        if one is None:
            continue
        verdict = judge(one, in_ok)
        rest = router.rest_seconds(verdict, one, clock, NOW)
        assert 0 <= rest <= router.MAX_DATED_S and rest == rest
        assert bool(verdict.rests) <= (rest >= 1)


@given(st.integers(0, 999), ANY_HEADERS, st.binary(max_size=200), CLOCKS)
@example(429, {"retry-after": "\u0661\u0662"}, b"\xff", "utc")
@example(429, {"retry-after": "1_0"}, b'{"retry_after": 1e999}', "utc")
@example(429, {"retry-after": "Wed, 99 Oct 99999 99:99:99 +9999"}, b'"', "utc")
@example(429, {"ratelimit": "r=0;t=999999999"}, b"resets at 0000-00-00 00:00:00", "utc")
def test_any_bytes_and_headers_are_read(status, headers, body, clock):
    check_reading(status, headers, body, clock)


@settings(max_examples=400, deadline=None)
@given(st.integers(300, 599), ANY_HEADERS, ANY_JSON, CLOCKS)
@example(429, {}, {"error": {"resets_at": float("nan")}}, "utc")
@example(429, {}, {"error": {"resets_at": 10**400, "retry_after": -(10**400)}}, "utc")
@example(200, {}, {"error": {"code": 10**5000}}, "utc")
def test_any_json_and_headers_are_read(status, headers, value, clock):
    try:
        body = json.dumps(value).encode()
    except ValueError:  # an integer too long to be written
        return
    check_reading(status, headers, body, clock)


@given(st.text(max_size=60), st.floats(0, 4e9), CLOCKS)
@example("2026-02-29T00:00:00Z", 0.0, "utc")
@example("9999-12-31T23:59:59-99:99", 0.0, "utc")
@example("0001-01-01T00:00:00+23:59", 0.0, "utc")
def test_any_text_is_a_wait_or_none(text, wall, clock):
    wait = router.read_wait(text, router.zone_seconds(clock, wall))
    seconds = wait.seconds(wall)
    assert seconds is None or 1 <= seconds <= router.MAX_DATED_S
    router.prose_wait(f"try again in {text}").seconds(wall)
    assert 1 <= router.until_midnight(clock, wall) <= DAY + HOUR
    assert 1 <= router.until_next_month(wall) <= 31 * DAY


def test_a_wait_that_is_not_stated_is_none():
    assert Wait().seconds(NOW) is None
    assert router.read_wait("").seconds(NOW) is None


HOSTILE: dict[str, bytes] = {
    "nothing": b"x" * BIG,
    "spaces": b" " * BIG,
    "newlines": b"\n" * BIG,
    "data-lines": b"data: {\n" * (BIG // 8),
    "brackets": b"[" * BIG,
    "braces": b'{"error":' * (BIG // 9),
    "quotes": b"'" * BIG,
    "half-quotes": b"'a " * (BIG // 3),
    "quote-ends": b"'a'b" * (BIG // 4),
    "try-again": b"try again in " * (BIG // 13),
    "retry-dates": b"reset at 2026-01-01T00:00:0" * (BIG // 27),
    "digits": b"9" * BIG,
    "durations": b"try again in " + b"1h" * (BIG // 2),
    "durations-json": b'{"error":{"message":"try again in ' + b"1h 1m " * (BIG // 6) + b'"}}',
    "waits": b'{"retry_after":{' + b'"retry_after":"x",' * (BIG // 20) + b'"a":1}}',
    "many-members": json.dumps({f"retry_after{n}": n for n in range(60_000)}).encode(),
    "many-errors": b'{"error":{"message":"x"},"errors":[' + b'{"code":"c"},' * (BIG // 13) + b"1]}",
    "keys": b"key=" * (BIG // 4),
    "bearers": b"bearer " * (BIG // 7),
    "sk": b"sk-" * (BIG // 3),
    "sk-stars": b"sk-" + b"a" * BIG,
    "titles": b"<title" * (BIG // 6),
    "open-titles": b"<title>" * (BIG // 7),
    "model": b'{"error":{"message":"' + b"model " * (BIG // 6) + b'"}}',
    "exceeds": b'{"error":{"message":"' + b"exceeds context " * (BIG // 16) + b'"}}',
    "packed": json.dumps({"error": {"message": json.dumps({"error": "x" * BIG})}}).encode(),
    "nested-strings": b'"' + b'\\"' * (BIG // 2) + b'"',
    "nul": b"\x00" * BIG,
    "surrogates": b'{"error":{"message":"' + b"\\ud800" * (BIG // 6) + b'"}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_megabyte_is_read_in_no_time(name):
    """About 10 ms each on a slow machine; a pattern that is not linear would take minutes."""
    body, text = HOSTILE[name], HOSTILE[name].decode("latin-1")
    started = time.monotonic()
    for status in (400, 403, 429, 500):
        check_reading(status, {}, body, "utc")
    headers = {"retry-after": text, "ratelimit": text, "x-ratelimit-reset": text}
    check_reading(429, headers, b"", "utc")
    scrub(text)
    router.prose_wait(text)
    assert time.monotonic() - started < 5


WORDS = [rule.words for rule in router.RULES if rule.words]


@pytest.mark.parametrize("pattern", [*WORDS, router.QUOTED, router.SECRET, router.SIZES],
                         ids=lambda pattern: pattern.pattern[:24])  # fmt: skip
def test_every_pattern_is_quick_on_the_most_it_ever_sees(pattern):
    started = time.monotonic()
    for body in HOSTILE.values():
        text = body[:2400].decode("latin-1")
        list(pattern.finditer(text))
        pattern.search(text * 2)
    assert time.monotonic() - started < 5


def test_the_table_is_sound():
    for rule in router.RULES:
        verdict = rule.verdict
        assert bool(verdict.rests) == (verdict.rest_s > 0)
        assert not verdict.until or verdict.rests
        assert verdict.then != "stop" or not verdict.rests
        assert verdict.rests != "provider" or verdict.then == "provider"
        assert verdict.rests != "model" or verdict.then == "model"
    names = {rule.verdict.name for rule in router.RULES} | {v.name for v in router.SORTS.values()}
    assert names >= router.LIMITS and names | {router.UNFIT.name} >= set(router.CLIENT_SIDE)
    assert not router.LIMITS & router.GUESSES


# --- through the router ------------------------------------------------------------------------


@pytest.fixture
def one(upstream, make_app):
    """one(answer or script, ...): (the scripted groq, a client); keys and settings may be given."""

    def make(*script, models=("m1",), keys="k1", **settings_):
        up = upstream(*script)
        app = make_app(**provider("groq", up, *models, keys=keys), **settings_)
        return up, app.test_client()

    return make


@pytest.fixture
def two(upstream, make_app):
    """two(a, b): groq (tried first) and cerebras, and a client that asks for groq/m1."""

    def make(first, second, **settings_):
        a, b = upstream(first), upstream(second)
        rows = {**provider("groq", a, "m1"), **provider("cerebras", b, "m1")}
        return a, b, make_app(**rows, **settings_).test_client()

    return make


def ask(client, path="/v1/chat/completions", **changes):
    body = {"model": "groq/m1", "messages": HELLO, "max_tokens": 9, **changes}
    return client.post(path, json=body, headers=AUTH)


def responses(client, **changes):
    body = {"model": "groq/m1", "input": "hello", **changes}
    return client.post("/v1/responses", json=body, headers=AUTH)


def why_resting(client, name="groq"):
    [key] = client.get("/v1/status", headers=AUTH).json["providers"][name]["keys"]
    return {model: row["why"] for model, row in key["models"].items()}


FILTERED = {"error": {"message": "The response was filtered", "code": "content_filter"}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_content_filter_is_handed_to_the_client(two, stream):
    a, b, client = two(lambda _: Reply(400, FILTERED), good())
    got = ask(client, stream=stream)
    assert (got.status_code, got.json["error"]["code"]) == (400, "content_filter")
    assert "The response was filtered" in got.json["error"]["message"]
    assert (len(a.requests), len(b.requests)) == (1, 0)
    assert why_resting(client) == {}


def test_a_content_filter_in_the_other_dialects(one):
    _, client = one(Reply(400, FILTERED))
    got = ask(client, "/v1/messages")
    assert (got.status_code, got.json["error"]["type"]) == (400, "invalid_request_error")
    assert responses(client).status_code == 400


def test_a_content_filter_is_routed_around_where_that_is_set(two):
    a, b, client = two(lambda _: Reply(400, FILTERED), good(), CONTENT_FILTER_FAILOVER="1")
    assert ask(client).status_code == 200 and len(b.requests) == 1
    a, b, client = two(
        lambda _: Reply(400, FILTERED), lambda _: Reply(400, FILTERED), CONTENT_FILTER_FAILOVER="1"
    )
    got = ask(client)
    assert (got.status_code, got.json["error"]["code"]) == (400, "content_filter")


def test_a_finished_content_filter_in_a_200_is_an_answer(one):
    body = completion("")
    body["choices"][0]["finish_reason"] = "content_filter"
    _, client = one(Reply(200, body))
    assert ask(client).status_code == 200


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (400, [said("User location is not supported for the API use.")], "region"),
        (403, said("x", type="access_terminated_error"), "policy"),
    ],
)
def test_a_place_or_policy_rests_the_whole_provider_and_says_why(one, caplog, status, body, why):
    up, client = one(Reply(status, body), models=("m1", "m2"))
    with caplog.at_level(logging.WARNING):
        got = ask(client)
    assert got.status_code == 503 and why in got.json["error"]["message"]
    assert "[the provider serves" in caplog.text or "[the provider does not serve" in caplog.text
    assert why_resting(client) == {"m1": why, "m2": why}
    assert ask(client, model="groq/m2").status_code == 503
    assert len(up.requests) == 1


def test_a_model_outside_the_tier_rests_for_this_key_and_the_others_go_on(one):
    zero = Reply(429, google(PER_DAY, message=GEMINI_ZERO))
    up, client = one(
        lambda request: zero if request.key == "k1" else good()(request),
        keys="k1,k2", ROTATION_MODE="sequential",
    )  # fmt: skip
    assert [ask(client).status_code for _ in range(3)] == [200] * 3
    assert [request.key for request in up.requests].count("k1") == 1


def test_a_days_quota_of_gemini_is_not_asked_again_after_its_retry_delay(upstream, make_app):
    up = upstream(Reply(429, google(PER_DAY, delay="1s")))
    client = make_app(**provider("gemini", up, "m1")).test_client()
    got = ask(client, model="gemini/m1")
    assert got.status_code == 429
    left = router.until_midnight("pacific", time.time())
    assert abs(int(got.headers["Retry-After"]) - left) < 5
    assert got.headers["X-Should-Retry"] == ("true" if left <= 60 else "false")


def test_a_full_worker_of_nvidia_in_a_200_rests_for_seconds(upstream, make_app):
    up = upstream(
        Reply(200, {"error": "ResourceExhausted: Worker local total request limit reached (33/32)"})
    )
    client = make_app(**provider("nvidia", up, "m1")).test_client()
    assert ask(client, model="nvidia/m1").status_code == 503
    [key] = client.get("/v1/status", headers=AUTH).json["providers"]["nvidia"]["keys"]
    assert key["models"]["m1"]["why"] == "overloaded" and key["ready_in"] <= 5


def test_a_retry_after_on_a_200_means_nothing_even_with_an_error_inside(one):
    body = said("Rate limit reached", code=429)
    _, client = one(Reply(200, body, {"Retry-After": "3000"}), chat("b"))
    got = ask(client)
    assert got.status_code == 429 and int(got.headers["Retry-After"]) <= 60


def test_a_wait_inside_a_stream_is_kept(one):
    event = said("slow down. Please try again in 7m12s", code=429)
    _, client = one(Stream(chunks=[event], done=False))
    got = ask(client, stream=True)
    assert got.status_code == 429 and 430 <= int(got.headers["Retry-After"]) <= 432


@pytest.mark.parametrize(
    "content_type", ["application/octet-stream", "text/html", "text/event-stream", "", "x"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_content_type_of_an_error_is_not_believed(one, content_type, stream):
    body = json.dumps(said("Please try again in 50s")).encode()
    _, client = one(Reply(429, body, {"content-type": content_type}))
    got = ask(client, stream=stream)
    assert got.status_code == 429 and 48 <= int(got.headers["Retry-After"]) <= 50


# --- what the client is told when all have failed --------------------------------------------


def bad(status: int, message: str, **more: Any):
    return lambda _: Reply(status, said(message, **more))


def test_all_400_is_a_400_with_the_reason_that_tells_most(two):
    a, b, client = two(
        bad(400, "The model `m1` does not exist"),
        bad(400, "messages[3].content[1].image_url.url: must be an https address"),
    )
    got = ask(client)
    assert got.status_code == 400
    assert got.json["error"]["message"].startswith("messages[3]")
    assert len(got.json["error"]["attempts"]) == 2


def test_all_overflow_is_an_overflow_in_every_dialect(two):
    a, b, client = two(
        lambda _: Reply(413, said("Request too large for model `m1` on tokens per minute (TPM):"
                                  " Limit 6000, Requested 9000", code="rate_limit_exceeded")),
        bad(400, "prompt is too long: 9000 tokens > 8192 maximum"),
    )  # fmt: skip
    got = ask(client)
    assert (got.status_code, got.json["error"]["code"]) == (400, "context_length_exceeded")
    got = ask(client, "/v1/messages")
    assert got.json["error"]["message"].startswith("prompt is too long: 9000 tokens >")
    assert responses(client).json["error"]["code"] == "context_length_exceeded"
    assert why_resting(client) == {}


def test_a_413_everywhere_is_an_overflow(two):
    *_, client = two(lambda _: Reply(413, b"too large"), lambda _: Reply(413, b"too large"))
    got = ask(client)
    assert (got.status_code, got.json["error"]["code"]) == (400, "context_length_exceeded")


def test_all_429_is_a_429_with_the_soonest(two):
    *_, client = two(
        lambda _: Reply(429, said("per day limit"), {"Retry-After": "9000"}),
        lambda _: Reply(200, said("rate limited. Try again in 40s", type="rate_limit_error")),
    )
    for _ in range(2):
        got = ask(client)
        assert got.status_code == 429 and 38 <= int(got.headers["Retry-After"]) <= 40
        assert got.headers["X-Should-Retry"] == "true"


def test_a_limit_that_never_ends_is_no_429(one):
    _, client = one(Reply(429, google(PER_DAY, message=GEMINI_ZERO)))
    for _ in range(2):
        got = ask(client)
        assert got.status_code == 503 and "no_tier" in got.json["error"]["message"]


@pytest.mark.parametrize(
    ("status", "body"),
    [(401, said("Invalid API key")), (400, [said("API key not valid. Please pass a valid one")])],
)
def test_refused_keys_are_told_with_the_variable_to_check(one, status, body):
    up, client = one(Reply(status, body), keys="groq-secret-key-1,groq-secret-key-2")
    for _ in range(2):
        got = ask(client)
        error = got.json["error"]
        assert (got.status_code, error["code"]) == (503, "provider_keys_rejected")
        assert "groq refuses its keys, check GROQ_API_KEYS" in error["message"]
        assert "secret" not in got.text
    assert len(up.requests) == 2


def test_a_refused_key_beside_another_failure_is_told_too(two):
    *_, client = two(bad(401, "no"), bad(500, "oops"))
    error = ask(client).json["error"]
    assert error["code"] == "all_providers_exhausted"
    assert "groq refuses its keys" in error["message"] and "oops" in error["message"]


def test_a_bad_key_in_a_400_is_not_the_clients_fault(two):
    *_, client = two(bad(400, "API key not valid"), bad(400, "API key expired. Renew it"))
    assert ask(client).status_code == 503


def test_a_provider_cannot_write_into_the_log_or_show_a_key(one, caplog):
    key = "gsk_abcdEFGH1234567890ijkl"
    evil = f"no\r\nINFO forged line \x1b[2J\u202e with {key} and Bearer tok1234567890"
    up, client = one(Reply(403, {"error": {"message": evil}}), keys=key)
    with caplog.at_level(logging.DEBUG):
        got = ask(client)
    for text in (got.text, caplog.text):
        assert key not in text and "tok123" not in text and "\x1b" not in text
        assert "\\u202e" not in text and "\u202e" not in text
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert "forged line" in got.json["error"]["message"]
    assert len(got.json["error"]["message"]) < 2000


def test_a_client_cannot_put_keys_to_rest_through_a_providers_echo(one):
    echo = bad(400, "Invalid value: 'invalid api key, insufficient_quota'", code="invalid_value")
    _, client = one(lambda request: echo(request) if request.json.get("user") else chat("fine"))
    assert ask(client, user="invalid api key, insufficient_quota").status_code == 400
    assert why_resting(client) == {}
    assert ask(client).status_code == 200
