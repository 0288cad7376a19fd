"""The ledger: what is left by headers, by refusals and by our own count, and what follows."""

from __future__ import annotations

import copy
import json
import math
import threading

import pytest
from conftest import config_for
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream import AUTH, HELLO, Clock, Reply, completion, good, provider

import router
from router import Breakers, KeyPool, Lease, Ledger, StateFile

NOW = 1_795_132_800.0  # 2026-11-20 00:00:00 UTC
DAY = 86_400.0
GROQ = "gsk_AbCdEf0123456789"
OTHER = "gsk_ZyXwVu9876543210"


@pytest.fixture
def clock():
    return Clock(NOW)


def services(tmp_path, **env):
    return config_for(tmp_path, env).services


def made_of(tmp_path, clock, **env):
    return Ledger(services(tmp_path, **env), clock)


def row(name):
    return router.PROVIDERS_BY_NAME[name]


def windows(ledger, name):
    """{window: (left, limit)} of a provider whose keys and models do not matter."""
    return {
        told["window"]: (told["remaining"], told["limit"]) for _, _, _, told in ledger.rows(name)
    }


def resets(ledger, name, window):
    told = {t["window"]: t for _, _, _, t in ledger.rows(name)}[window]["resets_at"]
    return router.parse_date(told) - NOW


# --- headers ------------------------------------------------------------------------------

OPENAI_HEADS = {  # recorded
    "x-ratelimit-limit-requests": "15000",
    "x-ratelimit-limit-tokens": "40000000",
    "x-ratelimit-remaining-requests": "14999",
    "x-ratelimit-remaining-tokens": "39999826",
    "x-ratelimit-reset-requests": "4ms",
    "x-ratelimit-reset-tokens": "0s",
}
CLAUDE_HEADS = {  # recorded
    "anthropic-ratelimit-input-tokens-limit": "4000000",
    "anthropic-ratelimit-input-tokens-remaining": "4000000",
    "anthropic-ratelimit-input-tokens-reset": "2026-09-02T17:25:56Z",
    "anthropic-ratelimit-output-tokens-limit": "800000",
    "anthropic-ratelimit-output-tokens-remaining": "800000",
    "anthropic-ratelimit-output-tokens-reset": "2026-09-02T17:25:56Z",
    "anthropic-ratelimit-requests-limit": "20000",
    "anthropic-ratelimit-requests-remaining": "19999",
    "anthropic-ratelimit-requests-reset": "2026-09-02T17:25:56Z",
    "anthropic-ratelimit-tokens-limit": "4800000",
    "anthropic-ratelimit-tokens-remaining": "4800000",
    "anthropic-ratelimit-tokens-reset": "2026-09-02T17:25:56Z",
}
HEADS = {
    "openai": (OPENAI_HEADS, {"requests/minute": (14999, 15000), "tokens/minute": (39999826, 4e7)}),
    "anthropic": (
        CLAUDE_HEADS,
        {
            "requests/minute": (19999, 20000),
            "tokens/minute": (4_800_000, 4_800_000),
            "input tokens/minute": (4_000_000, 4_000_000),
            "output tokens/minute": (800_000, 800_000),
        },
    ),
    "groq": (  # requests of a day, tokens of a minute
        {
            "x-ratelimit-limit-requests": "1000",
            "x-ratelimit-limit-tokens": "8000",
            "x-ratelimit-remaining-requests": "970",
            "x-ratelimit-remaining-tokens": "7500",
            "x-ratelimit-reset-requests": "43m12s",
            "x-ratelimit-reset-tokens": "3.75s",
        },
        {"requests/day": (970, 1000), "tokens/minute": (7500, 8000)},
    ),
    "cerebras": (
        {
            "x-ratelimit-limit-requests-day": "14400",
            "x-ratelimit-limit-tokens-minute": "30000",
            "x-ratelimit-remaining-requests-day": "14399",
            "x-ratelimit-remaining-tokens-minute": "29000",
            "x-ratelimit-reset-requests-day": "40000.5",
            "x-ratelimit-reset-tokens-minute": "20.5",
        },
        {"requests/day": (14399, 14400), "tokens/minute": (29000, 30000)},
    ),
    "sambanova": (
        {
            "x-ratelimit-limit-requests": "20",
            "x-ratelimit-remaining-requests": "19",
            "x-ratelimit-reset-requests": "1795132840",
            "x-ratelimit-limit-requests-day": "20",
            "x-ratelimit-remaining-requests-day": "11",
            "x-ratelimit-reset-requests-day": "1795160000",
        },
        {"requests/minute": (19, 20), "requests/day": (11, 20)},
    ),
    "mistral": (
        {
            "x-ratelimit-limit-req-minute": "60",
            "x-ratelimit-remaining-req-minute": "59",
            "x-ratelimit-limit-tokens-minute": "500000",
            "x-ratelimit-remaining-tokens-minute": "499900",
            "x-ratelimit-tokens-query-cost": "100",
        },
        {"requests/minute": (59, 60), "tokens/minute": (499_900, 500_000)},
    ),
    "xai": (
        {"x-ratelimit-limit-requests": "480", "x-ratelimit-remaining-requests": "479"},
        {"requests/minute": (479, 480)},
    ),
    "together": (  # azure's way: no limit is told
        {"x-ratelimit-remaining-requests": "99", "x-ratelimit-remaining-tokens": "9000"},
        {"requests/minute": (99, 99), "tokens/minute": (9000, 9000)},
    ),
    "openrouter": (  # of the day, as its reset says; in milliseconds
        {
            "x-ratelimit-limit": "50",
            "x-ratelimit-remaining": "7",
            "x-ratelimit-reset": f"{int(NOW + DAY) * 1000}",
        },
        {"requests/day": (7, 50)},
    ),
    "huggingface": (  # recorded
        {
            "ratelimit": '"api";r=999;t=295',
            "ratelimit-policy": '"fixed window";"api";q=1000;w=300',
        },
        {"requests/300s": (999, 1000)},
    ),
    "fireworks": (  # the older drafts of the IETF
        {"ratelimit-limit": "10", "ratelimit-remaining": "3", "ratelimit-reset": "20"},
        {"requests/minute": (3, 10)},
    ),
    "venice": (  # their third
        {
            "ratelimit-limit": "50, 50;w=60, 1000;w=3600",
            "ratelimit-remaining": "0",
            "ratelimit-reset": "50",
        },
        {"requests/minute": (0, 50)},
    ),
    "codex": (
        {
            "x-codex-primary-used-percent": "41.5",
            "x-codex-primary-window-minutes": "300",
            "x-codex-primary-reset-after-seconds": "7200",
            "x-codex-secondary-used-percent": "12",
            "x-codex-secondary-window-minutes": "10080",
            "x-codex-secondary-reset-at": str(int(NOW + 3 * DAY)),
        },
        {"percent/5h": (58, 100), "percent/week": (88, 100)},
    ),
    "cohere": (
        {"x-trial-endpoint-call-limit": "20", "x-trial-endpoint-call-remaining": "4"},
        {"requests/minute": (4, 20)},
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_headers_of_every_spelling(clock, name):
    heads, expected = HEADS[name]
    ledger = Ledger((), clock)
    lease = Lease(name, "a-key-of-some-length", "m")
    ledger.hear(row(name), lease, {"date": "x", "content-type": "application/json", **heads})
    assert windows(ledger, name) == expected


def test_what_they_say_about_the_end_of_a_window(clock):
    ledger = Ledger((), clock)
    for name in HEADS:
        ledger.hear(row(name), Lease(name, "key", "m"), HEADS[name][0])
    assert resets(ledger, "groq", "requests/day") == 43 * 60 + 12
    assert resets(ledger, "cerebras", "tokens/minute") == 20
    assert resets(ledger, "sambanova", "requests/minute") == 40
    assert resets(ledger, "openrouter", "requests/day") == DAY
    assert resets(ledger, "huggingface", "requests/300s") == 295
    assert resets(ledger, "codex", "percent/5h") == 7200
    assert resets(ledger, "codex", "percent/week") == 3 * DAY


@pytest.mark.parametrize(
    "heads",
    [
        {},
        {"x-ratelimit-remaining-requests": "many"},
        {"x-ratelimit-remaining-requests": "nan", "x-ratelimit-limit-requests": "inf"},
        {"x-ratelimit-remaining-requests": "-1", "x-ratelimit-limit-requests": "-1"},
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "0"},
        {"x-ratelimit-limit-requests": "20"},
        {"ratelimit-remaining": "a, 5", "ratelimit-limit": ",,"},
        {"ratelimit": "x" * 5000, "ratelimit-policy": ";;;,,,"},
        {"x-codex-primary-used-percent": "", "x-codex-primary-window-minutes": "5"},
        {"x-codex-primary-used-percent": "100", "x-codex-primary-window-minutes": "-1065512161"},
        {"x-codex-primary-used-percent": "100", "x-codex-primary-window-minutes": "1e300"},
    ],
)
def test_headers_that_say_nothing(clock, heads):
    ledger = Ledger((), clock)
    ledger.hear(row("openai"), Lease("openai", "key", "m"), heads)
    assert windows(ledger, "openai") == {}


NAMES = [name for heads, _ in HEADS.values() for name in heads]


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=30) | st.integers().map(str)))
@settings(max_examples=150, deadline=None)
def test_no_header_breaks_it(heads):
    clock = Clock(NOW)
    ledger = Ledger((), clock)
    for name in ("openai", "codex", "groq"):
        lease = Lease(name, "key", "m")
        ledger.hear(row(name), lease, heads)
        claim = ledger.claim(name, "m", 100)
        if claim:
            claim.admit("key")
            claim.wait("key")
        clock.pass_by(7)
        assert json.dumps([told for _, _, _, told in ledger.rows(name)])
        assert ledger.kept(10) is not None


# --- refusals -----------------------------------------------------------------------------

GEMINI_DAY = [
    {
        "error": {
            "code": 429,
            "message": "You exceeded your current quota",
            "details": [
                {
                    "violations": [
                        {
                            "quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier",
                            "quotaDimensions": {"location": "global", "model": "m"},
                            "quotaValue": "20",
                        }
                    ]
                },
                {"retryDelay": "17s"},
            ],
        }
    }
]
GROQ_TOKENS = {
    "error": {
        "message": "Rate limit reached for model `m` in organization `org_1` on tokens per day"
        " (TPD): Limit 200000, Used 199000, Requested 2400. Please try again in 10m4.8s."
    }
}
GROQ_REQUESTS = {
    "error": {"message": "Rate limit reached on requests per minute (RPM): Limit 30, Used 30."}
}
ROUTER_DAY = {
    "error": {
        "message": "Rate limit exceeded: free-models-per-day",
        "metadata": {
            "headers": {
                "X-RateLimit-Limit": "50",
                "X-RateLimit-Remaining": "0",
                "X-RateLimit-Reset": f"{int(NOW + DAY) * 1000}",
            }
        },
    }
}


@pytest.mark.parametrize(
    ("name", "body", "why", "expected"),
    [
        ("gemini", GEMINI_DAY, "day_quota", {"requests/day": (0, 20)}),
        ("groq", GROQ_TOKENS, "day_quota", {"tokens/day": (1000, 200_000)}),
        ("groq", GROQ_REQUESTS, "rate_limited", {"requests/minute": (0, 30)}),
        ("openrouter", ROUTER_DAY, "day_quota", {"requests/day": (0, 50)}),
        ("openai", {"error": {"message": "slow down"}}, "rate_limited", {}),
        ("gemini", "not JSON", "rate_limited", {}),
    ],
)
def test_what_refusals_say(clock, name, body, why, expected):
    ledger = Ledger((), clock)
    text = body if isinstance(body, str) else json.dumps(body)
    ledger.refused(row(name), Lease(name, "key", "m"), why, text.encode(), 30.0)
    assert windows(ledger, name) == expected


def test_google_days_end_at_midnight_pacific(clock):
    ledger = Ledger((), clock)
    lease = Lease("gemini", "key", "m")
    ledger.refused(row("gemini"), lease, "day_quota", json.dumps(GEMINI_DAY).encode(), 17.0)
    assert resets(ledger, "gemini", "requests/day") == 8 * 3600
    claim = ledger.claim("gemini", "m", 10)
    assert claim.wait("key") == (8 * 3600, "day_quota")
    clock.pass_by(8 * 3600)
    assert claim.admit("key")


# --- our own count ------------------------------------------------------------------------


def drawn(ledger, name, key, tokens=10, model="m", force=False):
    claim = ledger.claim(name, model, tokens)
    claim.force = force
    claim.admit(key)
    return claim.draft


def test_limits_of_a_free_tier_are_known(tmp_path, clock):
    ledger = made_of(tmp_path, clock, GROQ_API_KEY=GROQ, GEMINI_API_KEY="AIza-key-1")
    known = {(q.unit, q.period): q.limit for q in ledger.known("groq", "m").quotas}
    assert known == {
        ("requests", 60): 30,
        ("requests", DAY): 1000,
        ("tokens", 60): 8000,
        ("tokens", DAY): 200_000,
    }
    assert [q.limit for q in ledger.known("gemini", "gemini-3.8-flash").quotas] == [5, 20]
    assert [q.limit for q in ledger.known("gemini", "gemini-3.5-flash-lite").quotas] == [
        15,
        500,
        250_000,
    ]
    assert ledger.known("gemini", "gemini-4-pro").quotas == ()


def test_free_models_share_what_is_theirs_and_leave_the_others_alone(tmp_path, clock):
    ledger = made_of(tmp_path, clock, OPENROUTER_API_KEY="sk-or-1")
    for n in range(20):
        assert drawn(ledger, "openrouter", "sk-or-1", model=f"m{n % 3}:free")
    assert not drawn(ledger, "openrouter", "sk-or-1", model="m9:free")
    assert ledger.claim("openrouter", "m9", 10).admit("sk-or-1")


def test_another_server_under_a_providers_name_has_no_known_limits(tmp_path, clock):
    ledger = made_of(
        tmp_path, clock, GROQ_API_KEY=GROQ, GROQ_BASE_URL="http://127.0.0.1:9/openai/v1"
    )
    assert ledger.claim("groq", "m", 10) is None


def test_settings_beat_the_table(tmp_path, clock):
    ledger = made_of(
        tmp_path, clock, GROQ_API_KEY=GROQ, GROQ_RPM="2", GROQ_RPD="0", GROQ_TPM="0", GROQ_TPD="0"
    )
    assert [q.limit for q in ledger.known("groq", "m").quotas] == [2]
    assert [bool(drawn(ledger, "groq", GROQ, force=True)) for _ in range(3)] == [True, True, False]


def test_limits_may_change_while_it_runs(tmp_path, clock):
    env = {"GROQ_API_KEY": GROQ, "GROQ_TPM": "0"}
    ledger = made_of(tmp_path, clock, GROQ_RPM="2", **env)
    assert [bool(drawn(ledger, "groq", GROQ)) for _ in range(3)] == [True, True, False]
    stay = frozenset({"groq"})
    ledger.adopt(config_for(tmp_path, {"GROQ_RPM": "5", **env}), stay)
    assert [bool(drawn(ledger, "groq", GROQ)) for _ in range(4)] == [True, True, True, False]
    ledger.adopt(config_for(tmp_path, env), stay)
    assert drawn(ledger, "groq", GROQ)
    assert windows(ledger, "groq")["requests/minute"] == (24, 30)
    ledger.adopt(config_for(tmp_path, {**env, "GROQ_API_KEY": OTHER}), stay)
    assert windows(ledger, "groq") == {}


def test_a_setting_that_is_no_number_is_told(tmp_path):
    config = config_for(tmp_path, {"GROQ_API_KEY": GROQ, "GROQ_RPM": "many"})
    assert any("GROQ_RPM" in warning for warning in config.warnings)


@given(
    st.lists(st.floats(0, 40), min_size=1, max_size=120),
    st.integers(1, 12),
    st.sampled_from([60.0, 3600.0]),
)
@settings(max_examples=100, deadline=None)
def test_no_window_ever_holds_more_than_its_limit(gaps, limit, period):
    balance = router.Balance(NOW)
    gauge = balance.gauge(("requests", period), row("nvidia"))
    gauge.bound(float(limit))
    now, uses = NOW, []
    for gap in gaps:
        now += gap
        if gauge.left(now) >= 1:
            balance.use(now, 0)
            uses.append(now)
        else:
            wait = gauge.wait(now, 1)
            assert 0 < wait <= period * 1.05
            assert copy.deepcopy(gauge).left(now + wait + 0.01) >= 1
    assert all(sum(at <= use < at + period for use in uses) <= limit for at in uses)


@given(st.lists(st.tuples(st.floats(-500, 500), st.floats(0, 300)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_a_clock_that_jumps_never_locks_a_window(steps):
    for name, period in (("nvidia", 60.0), ("groq", 60.0), ("nvidia", DAY)):
        balance = router.Balance(NOW)
        gauge = balance.gauge(("tokens", period), row(name))
        gauge.bound(1000.0)
        now = NOW
        for jump, used in steps:
            now += jump
            balance.use(now, used)
            assert 0 <= gauge.counted(now) <= sum(u for _, u in steps) + 1e-6
        assert gauge.wait(now, 500) <= max(period, 60.0) * 100
        assert gauge.left(now + 2 * period) == pytest.approx(1000)
        assert len(gauge.slots) <= 64


def test_days_are_the_providers_days(tmp_path):
    clock = Clock(NOW + 7 * 3600)  # 23:00 of the day before at Google's
    key = "AIza-key-1"
    ledger = made_of(tmp_path, clock, GEMINI_API_KEY=key, GEMINI_RPM="0")
    for _ in range(20):
        assert drawn(ledger, "gemini", key, model="gemini-3.8-flash")
    claim = ledger.claim("gemini", "gemini-3.8-flash", 10)
    assert claim.wait(key) == (3600, "day_quota")
    clock.pass_by(3601)
    assert claim.admit(key)


def test_tokens_are_corrected_when_the_answer_says_what_it_took(tmp_path, clock):
    ledger = made_of(tmp_path, clock, NVIDIA_API_KEY="nvapi-1", NVIDIA_TPM="1000")
    draft = drawn(ledger, "nvidia", "nvapi-1", 900)
    assert not drawn(ledger, "nvidia", "nvapi-1", 900)
    ledger.settle(draft, 50.0)
    assert drawn(ledger, "nvidia", "nvapi-1", 900)
    assert windows(ledger, "nvidia")["tokens/minute"] == (50, 1000)


def test_the_output_that_is_reserved_counts(tmp_path, clock):
    ledger = made_of(tmp_path, clock, GROQ_API_KEY=GROQ, NVIDIA_API_KEY="nvapi-1")
    assert ledger.claim("groq", "m", 100, {"max_tokens": 500}).tokens == 600
    assert ledger.claim("nvidia", "m", 100, {"max_tokens": 500}).tokens == 100


# --- the provider's word ------------------------------------------------------------------


def heads(left, limit=8000, reset="60s", unit="tokens"):
    return {
        f"x-ratelimit-limit-{unit}": str(limit),
        f"x-ratelimit-remaining-{unit}": str(left),
        f"x-ratelimit-reset-{unit}": reset,
    }


def test_what_was_sent_since_is_taken_off(clock):
    ledger = Ledger((), clock)
    lease = Lease("xai", "key", "m")
    ledger.hear(row("xai"), lease, heads(3, 100, unit="requests"))
    assert [bool(drawn(ledger, "xai", "key")) for _ in range(4)] == [True, True, True, False]
    assert ledger.claim("xai", "m", 1).wait("key") == (60, "rate_limited")
    clock.pass_by(61)
    assert drawn(ledger, "xai", "key")


def test_an_answer_that_was_overtaken_says_nothing(clock):
    ledger = Ledger((), clock)
    ledger.hear(row("xai"), Lease("xai", "key", "m"), heads(50, 100, unit="requests"))
    first, second = (Lease("xai", "key", "m", drawn(ledger, "xai", "key")) for _ in range(2))
    ledger.hear(row("xai"), second, heads(1, 100, unit="requests"))
    ledger.hear(row("xai"), first, heads(49, 100, unit="requests"))
    assert windows(ledger, "xai")["requests/minute"] == (1, 100)


def test_plenty_is_not_read_anew_for_every_answer(clock):
    ledger, lease = Ledger((), clock), Lease("xai", "key", "m")
    ledger.hear(row("xai"), lease, heads(90, 100, unit="requests"))
    ledger.hear(row("xai"), lease, heads(80, 100, unit="requests"))
    assert windows(ledger, "xai")["requests/minute"] == (90, 100)
    ledger.hear(row("xai"), lease, heads(80, 100, unit="requests"), refused=True)
    assert windows(ledger, "xai")["requests/minute"] == (80, 100)
    clock.pass_by(1.1)
    ledger.hear(row("xai"), lease, heads(40, 100, unit="requests"))
    ledger.hear(row("xai"), lease, heads(39, 100, unit="requests"))
    assert windows(ledger, "xai")["requests/minute"] == (39, 100)


def test_our_own_count_goes_on_while_plenty_is_stated(clock):
    """Or all of it would seem to have been used just now, once the stated window has ended."""
    ledger, stated = Ledger((), clock), heads(25, 30, reset="5s", unit="requests")
    ledger.hear(row("xai"), Lease("xai", "key", "m"), stated)
    for _ in range(100):  # 20 a minute of 30
        clock.pass_by(3)
        lease = Lease("xai", "key", "m", drawn(ledger, "xai", "key"))
        assert lease.draft
        ledger.hear(row("xai"), lease, stated)
    clock.pass_by(6)
    assert drawn(ledger, "xai", "key")
    assert 9 <= windows(ledger, "xai")["requests/minute"][0] <= 11


def test_plenty_that_is_suddenly_gone_is_noticed_at_once(clock):
    ledger, lease = Ledger((), clock), Lease("xai", "key", "m")
    ledger.hear(row("xai"), lease, heads(90, 100, unit="requests"))
    ledger.hear(row("xai"), lease, heads(0, 100, unit="requests"))
    assert windows(ledger, "xai")["requests/minute"] == (0, 100)
    assert not drawn(ledger, "xai", "key")


def test_where_windows_refill_part_of_it_is_back_early(clock):
    ledger = Ledger((), clock)
    ledger.hear(row("openai"), Lease("openai", "key", "m"), heads(0, 6000, "60s"))
    claim = ledger.claim("openai", "m", 1000)
    wait, why = claim.wait("key")
    assert (round(wait), why) == (10, "rate_limited")
    clock.pass_by(10.1)
    assert claim.admit("key")


def test_a_request_larger_than_the_window_is_a_guess_to_the_end(clock):
    ledger = Ledger((), clock)
    ledger.hear(row("groq"), Lease("groq", "key", "m"), heads(8000))
    claim = ledger.claim("groq", "m", 9000)
    assert claim.wait("key") == (math.inf, "too_large")
    assert not claim.admit("key")
    claim.force = True
    assert claim.admit("key")


def test_our_count_is_a_guess_until_a_refusal_confirms_it(tmp_path, clock):
    ledger = made_of(tmp_path, clock, NVIDIA_API_KEY="nvapi-1")
    for _ in range(40):
        assert drawn(ledger, "nvidia", "nvapi-1")
    assert not drawn(ledger, "nvidia", "nvapi-1")
    probe = drawn(ledger, "nvidia", "nvapi-1", force=True)
    assert probe.guesses
    assert not drawn(ledger, "nvidia", "nvapi-1", force=True)  # one at a time
    lease = Lease("nvidia", "nvapi-1", "m", probe)
    ledger.refused(row("nvidia"), lease, "rate_limited", b"", 60.0)
    assert not drawn(ledger, "nvidia", "nvapi-1", force=True)


def beyond(ledger, clock, times):
    """So many answers of a key whose minute looks dry."""
    for _ in range(times):
        draft = drawn(ledger, "nvidia", "nvapi-1", force=True)
        assert draft.guesses
        ledger.passed(Lease("nvidia", "nvapi-1", "m", draft))


def test_answers_beyond_it_disprove_the_table(tmp_path, clock):
    ledger = made_of(tmp_path, clock, NVIDIA_API_KEY="nvapi-1")
    for _ in range(40):
        drawn(ledger, "nvidia", "nvapi-1")
    beyond(ledger, clock, 2)
    assert not drawn(ledger, "nvidia", "nvapi-1")
    beyond(ledger, clock, 1)
    assert windows(ledger, "nvidia")["requests/minute"] == (37, 80)
    assert drawn(ledger, "nvidia", "nvapi-1")


def test_a_limit_that_was_raised_too_far_comes_back(tmp_path, clock):
    ledger = made_of(tmp_path, clock, NVIDIA_API_KEY="nvapi-1")
    for _ in range(40):
        drawn(ledger, "nvidia", "nvapi-1")
    beyond(ledger, clock, 3)
    for _ in range(31):
        draft = drawn(ledger, "nvidia", "nvapi-1")
    ledger.refused(row("nvidia"), Lease("nvidia", "nvapi-1", "m", draft), "rate_limited", b"", 60.0)
    assert windows(ledger, "nvidia")["requests/minute"] == (0, 74)
    assert not drawn(ledger, "nvidia", "nvapi-1", force=True)


def test_places_are_bounded(clock, monkeypatch):
    monkeypatch.setattr(Ledger, "MAX_BALANCES", 100)
    ledger = Ledger((), clock)
    for n in range(1000):
        clock.pass_by(1)
        ledger.hear(row("xai"), Lease("xai", "key", f"m{n}"), heads(1, 100, unit="requests"))
    assert len(ledger.rows("xai")) <= 100
    assert ("key", "m999") in {(key, model) for key, model, _, _ in ledger.rows("xai")}


# --- keys ---------------------------------------------------------------------------------


def test_keys_with_more_headroom_come_first(clock):
    pool, ledger = KeyPool({"xai": ("key-a", "key-b")}), Ledger((), clock)
    ledger.hear(row("xai"), Lease("xai", "key-a", "m"), heads(5, 100, unit="requests"))
    ledger.hear(row("xai"), Lease("xai", "key-b", "m"), heads(90, 100, unit="requests"))
    took = [pool.lease("xai", "m", claim=ledger.claim("xai", "m", 1)).key for _ in range(4)]
    assert took == ["key-b"] * 4
    assert ledger.headroom("xai", ("key-a",), "m") == 1
    assert ledger.headroom("xai", ("key-a", "key-b"), "m") == 0


def test_a_burst_takes_exactly_what_is_left(tmp_path, clock):
    pool = KeyPool({"nvidia": ("nvapi-1",)})
    ledger = made_of(tmp_path, clock, NVIDIA_API_KEY="nvapi-1", NVIDIA_RPM="7")
    got, start = [], threading.Barrier(20)

    def one():
        start.wait()
        got.append(pool.lease("nvidia", "m", claim=ledger.claim("nvidia", "m", 5)))

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lease is not None for lease in got) == 7


def use_in_turn(ledger, clock, pots, turns=40):
    """Two keys in turn, each telling what is left of its pot."""
    for n in range(turns):
        key = ("key-aaaaaaaaaaaa", "key-bbbbbbbbbbbb")[(n // 4) % 2]
        claim = ledger.claim("together", "m", 1)
        draft = claim.draft if claim and claim.admit(key) else None
        pots[key][0] -= 1
        said = heads(pots[key][0], 1000, "1h", unit="requests-hour")
        ledger.hear(row("together"), Lease("together", key, "m", draft), said)
        clock.pass_by(1)


def test_keys_that_share_a_quota_are_noticed(tmp_path, clock):
    env = {"TOGETHER_API_KEYS": "key-aaaaaaaaaaaa,key-bbbbbbbbbbbb"}
    pot = [900]
    ledger = made_of(tmp_path, clock, **env)
    use_in_turn(ledger, clock, {"key-aaaaaaaaaaaa": pot, "key-bbbbbbbbbbbb": pot})
    assert ledger.shared("together") == [("key-aaaaaaaaaaaa", "key-bbbbbbbbbbbb")]


def test_keys_with_quotas_of_their_own_are_not(tmp_path, clock):
    env = {"TOGETHER_API_KEYS": "key-aaaaaaaaaaaa,key-bbbbbbbbbbbb"}
    ledger = made_of(tmp_path, clock, **env)
    use_in_turn(ledger, clock, {"key-aaaaaaaaaaaa": [900], "key-bbbbbbbbbbbb": [900]})
    assert ledger.shared("together") == []


# --- before real servers ------------------------------------------------------------------


@pytest.fixture
def before(make_app):
    """before(**settings): (POST a chat, the router)."""

    def make(**settings):
        app = make_app(**settings)
        client = app.test_client()

        def post(**body):
            body = {"model": "hermes-router", "messages": HELLO, **body}
            return client.post("/v1/chat/completions", json=body, headers=AUTH)

        return post, app.extensions["router"]

    return make


def telling(left, limit=100, reset="50s"):
    """A provider that answers and says what is left of its requests."""
    headers = {
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(left),
        "x-ratelimit-reset-requests": reset,
    }
    return lambda _: Reply(200, completion("hello"), headers)


def test_a_key_that_is_dry_is_not_asked(before, upstream):
    dry, full = upstream(telling(0)), upstream(good())
    post, _ = before(**provider("xai", dry, "m"), **provider("together", full, "m"))
    assert [post().status_code for _ in range(6)] == [200] * 6
    assert len(dry.requests) == 1
    assert len(full.requests) == 5


def test_all_dry_is_a_429_that_says_when(before, upstream):
    up = upstream(telling(0))
    post, made = before(**provider("xai", up, "m"))
    assert post().status_code == 200
    got = post()
    assert got.status_code == 429
    assert 45 <= int(got.headers["Retry-After"]) <= 50
    assert "requests of a minute are used up" in got.get_data(as_text=True)
    assert len(up.requests) == 1


def test_a_window_that_is_back_within_seconds_is_waited_for(before, upstream):
    up = upstream(telling(0, reset="600ms"))
    post, _ = before(**provider("xai", up, "m"))
    assert post().status_code == 200
    assert post().status_code == 200
    first, second = up.requests
    assert second.at - first.at > 0.4


def test_a_cap_of_ones_own_holds_even_where_nobody_else_is_left(before, upstream):
    up = upstream(good())
    post, _ = before(**provider("xai", up, "m"), XAI_RPM=3)
    assert [post().status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    assert len(up.requests) == 3


def test_streams_are_heard_too(before, upstream):
    def answer(request):
        reply = good()(request)
        return router.replace(reply, headers=telling(0)(request).headers)

    up = upstream(answer)
    post, _ = before(**provider("xai", up, "m"))
    assert b"[DONE]" in post(stream=True).data
    assert post().status_code == 429


def test_low_quota_comes_after_plenty_among_equals(before, upstream):
    low, plenty = upstream(telling(5)), upstream(telling(90))
    post, _ = before(**provider("xai", low, "m"), **provider("together", plenty, "m"))
    for _ in range(2):
        post()
    for _ in range(6):
        post()
    assert len(low.requests) == 1


def test_a_429_confirms_and_names_the_rest(before, upstream):
    limited = Reply(429, GROQ_TOKENS, {"retry-after": "605"})
    post, made = before(**provider("groq", upstream(limited), "m"))
    assert post().status_code == 429
    assert windows(made.ledger, "groq")["tokens/day"] == (1000, 200_000)


def test_status_metrics_and_the_table_tell_of_it(before, upstream):
    key = "xai-abcdefghijklmnop-000042"
    up = upstream(telling(4, 1000, "30m"))
    post, made = before(**provider("xai", up, "m", keys=key))
    post()
    status = router.snapshot(made)
    told = status["providers"]["xai"]["quota"]
    assert [(r["key_tail"], r["model"], r["window"], r["limit"], r["remaining"]) for r in told] == [
        ("000042", "m", "requests/minute", 1000, 4)
    ]
    assert told[0]["source"] == "stated"
    text = router.prometheus(made)
    assert (
        'hermes_router_quota_remaining{provider="xai",key="1",model="m",window="requests/minute"} 4'
        in text
    )
    assert "abcdefgh" not in text + json.dumps(status)


def test_the_forecast_says_when_it_runs_dry(tmp_path):
    clock = Clock(NOW + 12 * 3600)
    ledger = made_of(tmp_path, clock, REQUESTY_API_KEY="rqsty-1234567890abc")
    for _ in range(60):
        assert drawn(ledger, "requesty", "rqsty-1234567890abc")
        clock.pass_by(60)
    [told] = ledger.snapshot("requesty")
    assert told["remaining"] == 140
    dry = router.parse_date(told["dry_at"]) - clock()
    assert 130 * 60 < dry < 150 * 60
    assert told["resets_at"] == "2026-11-21T00:00:00Z"
    forecast = ledger.forecast("requesty", ["rqsty-1234567890abc"], ["m", "n"])
    assert forecast == {"dry_at": told["dry_at"], "back_at": told["resets_at"]}
    assert ledger.forecast("requesty", ["rqsty-1234567890abc", "another"], ["m"]) is None
    status = {"providers": {"requesty": {"quota": [told]}}}
    [line] = router.quota_lines(status)
    assert line.startswith("~ requesty …890abc: 140 of 200 requests a day left, runs dry at")
    assert line.endswith("00:00 UTC")  # the day is told where it is not today


# --- over a restart -----------------------------------------------------------------------


def kept_over(path, clock, ledger, keys):
    pool = KeyPool(keys)
    return StateFile(path, pool, Breakers(), now=clock, wall=clock, ledger=ledger)


def test_quotas_survive_a_restart(tmp_path, clock):
    env = {"REQUESTY_API_KEY": "rqsty-1234567890abc", "GROQ_API_KEY": GROQ}
    held = {"requesty": ("rqsty-1234567890abc",), "groq": (GROQ,)}
    path = tmp_path / "state.json"
    old = made_of(tmp_path, clock, **env)
    file = kept_over(path, clock, old, held)
    for _ in range(150):
        drawn(old, "requesty", "rqsty-1234567890abc")
    old.hear(row("groq"), Lease("groq", GROQ, "m"), heads(40, 1000, "20h", unit="requests"))
    clock.pass_by(16)
    file.save()
    assert GROQ not in path.read_text()
    clock.pass_by(600)
    new = made_of(tmp_path, clock, **env)
    kept_over(path, clock, new, held).load()
    assert windows(new, "requesty")["requests/day"] == (50, 200)
    assert 40 <= windows(new, "groq")["requests/day"][0] <= 50
    clock.pass_by(DAY)
    assert windows(new, "requesty")["requests/day"] == (200, 200)


@pytest.mark.parametrize(
    "quotas",
    [
        None,
        "x",
        [1, {}, {"provider": "groq"}],
        [{"provider": "groq", "key": "KEY", "model": "m", "windows": [{"unit": "bread"}]}],
        [{"provider": "groq", "key": "KEY", "model": "m", "windows": "x"}],
        [
            {
                "provider": "groq",
                "key": "KEY",
                "model": "m",
                "windows": [
                    {"unit": "requests", "period": 60, "limit": -1, "used": 1e400},
                    {"unit": "requests", "period": 1e9, "limit": 5, "used": 1},
                    {"unit": "tokens", "period": 60, "limit": 99, "used": 1, "resets": "never"},
                ],
            }
        ],
    ],
)
def test_rows_that_make_no_sense_are_passed_over(tmp_path, clock, quotas):
    path = tmp_path / "state.json"
    ledger = made_of(tmp_path, clock, GROQ_API_KEY=GROQ)
    file = kept_over(path, clock, ledger, {"groq": (GROQ,)})
    ledger.hear(row("groq"), Lease("groq", GROQ, "m"), heads(40, 1000, "20h", unit="requests"))
    clock.pass_by(16)
    file.save()
    document = json.loads(path.read_text())
    mark = document["quotas"][0]["key"]
    document["quotas"] = json.loads(json.dumps(quotas).replace('"KEY"', json.dumps(mark)))
    path.write_text(json.dumps(document))
    new = made_of(tmp_path, clock, GROQ_API_KEY=GROQ)
    kept_over(path, clock, new, {"groq": (GROQ,)}).load()
    assert drawn(new, "groq", GROQ)
