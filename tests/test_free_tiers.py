"""A day in simulated time before free tiers that enforce their published limits."""

from __future__ import annotations

import json
import math
import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from upstream import completion

import router
from router import CHAT, Ask, Guard, Router, RouterError, dump_json

MORNING = 1_795_132_800.0  # 2026-11-20 00:00:00 UTC
DAY = 86_400.0
KEYS = {
    "GROQ_API_KEYS": "gsk_first_key_0001,gsk_second_key_0002",
    "GEMINI_API_KEYS": "AIza-first-key-0001,AIza-second-key-0002",
    "CEREBRAS_API_KEY": "csk-only-key-0001",
    "OPENROUTER_API_KEY": "sk-or-only-key-0001",
}
FEWER_KEYS = {name: value.partition(",")[0] for name, value in KEYS.items()}


@dataclass
class Clock:
    time: float = MORNING

    def __call__(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


# --- how providers count ------------------------------------------------------------------


class Bucket:
    """Fills up little by little: groq, cerebras."""

    def __init__(self, limit, period):
        self.limit, self.rate, self.level, self.at = limit, limit / period, float(limit), MORNING

    def look(self, now):
        self.level = min(self.limit, self.level + (now - self.at) * self.rate)
        self.at = now
        return self.level

    def wait(self, now, need):
        return max(0.0, need - self.look(now)) / self.rate

    def full_in(self, now):
        return (self.limit - self.look(now)) / self.rate

    def take(self, now, need):
        self.look(now)
        self.level -= need


class Sliding:
    """The last so many seconds: gemini's minute."""

    def __init__(self, limit, period):
        self.limit, self.period, self.uses = limit, period, deque()

    def look(self, now):
        while self.uses and self.uses[0][0] <= now - self.period:
            self.uses.popleft()
        return self.limit - sum(used for _, used in self.uses)

    def wait(self, now, need):
        missing = need - self.look(now)
        for at, used in self.uses:
            if missing <= 0:
                break
            missing -= used
            if missing <= 0:
                return at + self.period - now
        return 0.0 if missing <= 0 else math.inf

    def take(self, now, need):
        self.uses.append((now, need))


class Fixed:
    """Whole windows from a moment on: openrouter's minute, everybody's day."""

    def __init__(self, limit, period, offset=0.0):
        self.limit, self.period, self.offset = limit, period, offset
        self.window, self.used = -1, 0.0

    def look(self, now):
        window = int((now + self.offset) // self.period)
        if window != self.window:
            self.window, self.used = window, 0.0
        return self.limit - self.used

    def wait(self, now, need):
        left = self.period - (now + self.offset) % self.period
        return 0.0 if self.look(now) >= need else left

    def take(self, now, need):
        self.look(now)
        self.used += need


@dataclass
class Tier:
    """One free tier: its windows per key (and model), and how it speaks of them."""

    windows: dict
    per_model: bool
    heads: object
    refusal: object
    places: dict = field(default_factory=dict)
    asked: int = 0
    refused: int = 0

    def place(self, key, model):
        name = (key, model if self.per_model else "")
        if name not in self.places:
            self.places[name] = {unit: make() for unit, make in self.windows.items()}
        return self.places[name]

    def need(self, unit, tokens):
        return 1 if unit.startswith("requests") else tokens

    def waits(self, key, model, tokens, now):
        return {
            unit: wait
            for unit, window in self.place(key, model).items()
            if (wait := window.wait(now, self.need(unit, tokens))) > 0
        }

    def answer(self, key, model, tokens, now):
        self.asked += 1
        place = self.place(key, model)
        if waits := self.waits(key, model, tokens, now):
            self.refused += 1
            unit = max(waits, key=waits.get)
            return self.refusal(unit, place, waits[unit], now)
        for unit, window in place.items():
            window.take(now, self.need(unit, tokens))
        said = completion("hello", model=model)
        usage = {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens}
        said["usage"] = usage
        return 200, self.heads(place, now), said


def duration(seconds):
    return f"{int(seconds // 60)}m{seconds % 60:.2f}s" if seconds >= 60 else f"{seconds:.3f}s"


def groq_heads(place, now):
    heads = {}
    for unit, word in (("requests/day", "requests"), ("tokens/minute", "tokens")):
        heads[f"x-ratelimit-limit-{word}"] = str(place[unit].limit)
        heads[f"x-ratelimit-remaining-{word}"] = str(int(place[unit].look(now)))
        heads[f"x-ratelimit-reset-{word}"] = duration(place[unit].full_in(now))
    return heads


def groq_refusal(unit, place, wait, now):
    what = unit.replace("/", " per ")
    limit = place[unit].limit
    used = int(limit - place[unit].look(now))
    text = f"Rate limit reached on {what} (X): Limit {limit}, Used {used}, Requested 1."
    heads = {**groq_heads(place, now), "retry-after": str(math.ceil(wait))}
    return 429, heads, {"error": {"message": text, "code": "rate_limit_exceeded"}}


def gemini_refusal(unit, place, wait, now):
    what, window = unit.split("/")
    name = "Requests" if what == "requests" else "ContentInputTokens"
    quota = f"Generate{name}Per{window.title()}PerProjectPerModel-FreeTier"
    violation = {"quotaId": quota, "quotaValue": str(place[unit].limit)}
    details = [{"violations": [violation]}, {"retryDelay": f"{math.ceil(min(wait, 60))}s"}]
    error = {"code": 429, "message": "You exceeded your current quota", "details": details}
    return 429, {}, [{"error": {**error, "status": "RESOURCE_EXHAUSTED"}}]


def cerebras_heads(place, now):
    window = place["tokens/minute"]
    return {
        "x-ratelimit-limit-tokens-minute": str(window.limit),
        "x-ratelimit-remaining-tokens-minute": str(int(window.look(now))),
        "x-ratelimit-reset-tokens-minute": f"{window.full_in(now):.2f}",
    }


def cerebras_refusal(unit, place, wait, now):
    what, window = unit.split("/")
    text = f"{what.title()} per {window} limit exceeded - too many {what} sent."
    return 429, cerebras_heads(place, now), {"message": text, "code": "request_quota_exceeded"}


def openrouter_refusal(unit, place, wait, now):
    window = unit.split("/")[1]
    packed = {
        "X-RateLimit-Limit": str(place[unit].limit),
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": str(int((now + wait) * 1000)),
    }
    text = f"Rate limit exceeded: free-models-per-{window[:3]}"
    return 429, {}, {"error": {"message": text, "code": 429, "metadata": {"headers": packed}}}


def no_heads(place, now):
    return {}


def free_tiers():
    pacific = -8 * 3600.0
    lite = {
        "requests/minute": lambda: Sliding(15, 60),
        "requests/day": lambda: Fixed(500, DAY, pacific),
        "tokens/minute": lambda: Sliding(250_000, 60),
    }
    return {
        "api.groq.com": Tier(
            {
                "requests/minute": lambda: Bucket(30, 60),
                "requests/day": lambda: Bucket(1000, DAY),
                "tokens/minute": lambda: Bucket(8000, 60),
                "tokens/day": lambda: Bucket(200_000, DAY),
            },
            True,
            groq_heads,
            groq_refusal,
        ),
        "generativelanguage.googleapis.com": Tier(lite, True, no_heads, gemini_refusal),
        "api.cerebras.ai": Tier(
            {
                "requests/minute": lambda: Bucket(5, 60),
                "tokens/minute": lambda: Bucket(30_000, 60),
                "tokens/day": lambda: Bucket(1_000_000, DAY),
            },
            True,
            cerebras_heads,
            cerebras_refusal,
        ),
        "openrouter.ai": Tier(
            {
                "requests/minute": lambda: Fixed(20, 60),
                "requests/day": lambda: Fixed(50, DAY),
            },
            False,
            no_heads,
            openrouter_refusal,
        ),
    }


# --- the router before them ---------------------------------------------------------------


@dataclass
class Origin:
    url: str
    host: str


class Answered:
    """What the router sees of an answer."""

    def __init__(self, status, headers, body):
        self.status, self._body = status, json.dumps(body).encode()
        self.headers = {"content-type": "application/json", **headers}

    def read(self, limit=0):
        return self._body

    def close(self):
        pass


class Network:
    """A transport that reaches the four tiers."""

    def __init__(self, tiers, clock):
        self.tiers, self.clock = tiers, clock

    def origin(self, url):
        return Origin(url, url.split("/")[2])

    def post(self, origin, path, headers, body, guard):
        asked = json.loads(body)
        tokens = len(asked["messages"][0]["content"]) // 4 + asked.get("max_tokens", 0)
        key = headers.decode().partition("Bearer ")[2].split("\r\n")[0]
        tier = self.tiers[origin.host]
        return Answered(*tier.answer(key, asked["model"], tokens, self.clock()))

    def adopt(self, config, stay):
        pass

    def post_json(self, url, body, timeout):
        raise AssertionError("no account is configured")

    def close(self):
        pass


class Quiet:
    """A watchdog for a time in which nothing hangs."""

    def watch(self, guard):
        pass

    def unwatch(self, guard):
        pass


def build(home, tiers, clock, keys):
    env = {**keys, "HR_HOME": str(home), "PROXY_API_KEYS": "sk-test", "ROUTE_PREFER": "price"}
    env |= {
        "GEMINI_MODEL": "gemini-3.5-flash-lite,gemini-3.1-flash-lite",
        "GROQ_MODEL": "openai/gpt-oss-120b,openai/gpt-oss-20b",
        "CEREBRAS_MODEL": "gpt-oss-120b",
        "OPENROUTER_MODEL": "google/gemma-4-31b-it:free",
    }
    config = router.Config.from_env(env)
    made = Router(config, transport=Network(tiers, clock), now=clock, sleep=clock.sleep, wall=clock)
    made.watchdog = Quiet()
    made.encoder.start = lambda: None  # estimates do
    made.state.load()
    return made


def ask(made, clock, tokens):
    text = "How are you? " * (tokens * 4 // 13)
    body = {"model": "hermes-router", "messages": [{"role": "user", "content": text}]}
    request = Ask(CHAT, dump_json(body), body, body, Guard(), started=clock())
    return made.complete(request)


def traffic(rng):
    """(second of the day, tokens) in bursts: work hours are busy, nights are not."""
    at = 0.0
    while at < DAY:
        busy = 8 <= at / 3600 % 24 < 20
        at += rng.expovariate(1 / 90 if busy else 1 / 600)
        for _ in range(rng.choice((1, 1, 2, 4, 8, 30))):
            yield at, int(min(5000, rng.lognormvariate(6.3, 0.8)))
            at += rng.expovariate(1 / 1.5)


@dataclass
class Tally:
    asked: int = 0
    answered: int = 0
    refused: int = 0
    needless: int = 0  # refused although somebody would have answered
    slow: int = 0  # waited although somebody would have answered
    longest: float = 0.0


def willing(made, tiers, tokens, now):
    """Whether any tier would answer a request of that size now."""
    return any(
        not tiers[target.service.url.split("/")[2]].waits(key, target.model, tokens, now)
        for target in made.directory.targets
        for key in target.service.keys
    )


def live_a_day(home, seed, restarts=0, keys=KEYS):
    clock, tiers, tally = Clock(), free_tiers(), Tally()
    made = build(home, tiers, clock, keys)
    stops = [MORNING + DAY * (n + 1) / (restarts + 1) for n in range(restarts)]
    for second, tokens in traffic(random.Random(seed)):
        clock.time = max(clock.time, MORNING + second)
        if stops and clock.time >= stops[0]:
            stops.pop(0)
            made.state.save()
            made = build(home, tiers, clock, keys)
        began, could = clock.time, willing(made, tiers, tokens, clock.time)
        tally.asked += 1
        try:
            ask(made, clock, tokens)
            tally.answered += 1
        except RouterError as error:
            assert error.status == 429, error
            assert error.retry_after and error.retry_after > 0
            tally.refused += 1
            tally.needless += could
        waited = clock.time - began
        tally.longest = max(tally.longest, waited)
        tally.slow += could and waited > 0
    return tally, tiers


def refused_share(tiers):
    asked = sum(tier.asked for tier in tiers.values())
    return sum(tier.refused for tier in tiers.values()) / asked


@pytest.mark.parametrize(("seed", "restarts"), [(1, 0), (2, 1), (3, 5)])
def test_a_day_of_bursts_meets_hardly_a_429(tmp_path, seed, restarts):
    tally, tiers = live_a_day(tmp_path, seed, restarts)
    assert tally.asked > 3000
    assert refused_share(tiers) < 0.01
    assert tally.answered == tally.asked
    assert tally.slow == 0


@pytest.mark.parametrize(("seed", "restarts"), [(1, 0), (3, 2)])
def test_more_than_the_tiers_hold_is_refused_here_and_not_there(tmp_path, seed, restarts):
    tally, tiers = live_a_day(tmp_path, seed, restarts, FEWER_KEYS)
    assert tally.refused > 100
    assert refused_share(tiers) < 0.01
    assert tally.needless < tally.asked / 50
    assert tally.slow < tally.asked / 50
    assert tally.longest <= router.MAX_PAUSE_S + 0.3


def test_a_router_without_a_memory_would_do_worse(tmp_path, monkeypatch):
    monkeypatch.setattr(router.Ledger, "claim", lambda *_: None)
    _, tiers = live_a_day(tmp_path, 1, 0, FEWER_KEYS)
    assert refused_share(tiers) > 0.05
