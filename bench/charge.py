"""What admitting and charging one request costs: CPU microseconds, without any network.

    python bench/charge.py [ROUNDS]

Prints the cost of a request of a caller without limits, and of one that has all of them. The work
is what a request does between its being read and its end: admit, note the attempt, charge, settle.

Then what the ledger of quotas adds: room is looked for, the headers of the answer are read, the
tokens are corrected; at 100 and at 5 requests a second, with one key and with two. Last the same
with four limits set by hand that are nearly used up: each window is looked at every time.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import router

BATCH = 20_000


def batch(
    made: router.Router, ask: router.Ask, target: router.Target, lease: router.Lease
) -> float:
    """CPU microseconds of one request, over a batch of them."""
    tokens, began = router.Tokens(900, 120), time.thread_time()
    for _ in range(BATCH):
        made.admit(ask, (target,))
        made.usage.attempt(made.place(target, lease, ask), True, 0.1)
        made.charge(target, lease, tokens, ask)
        made.finish(ask)
        if ask.caller.quota.limited:
            made.quotas.rates(ask.caller)
    return (time.thread_time() - began) * 1e6 / BATCH


HEADERS = {  # as OpenAI and Groq send them
    "x-ratelimit-limit-requests": "500000",
    "x-ratelimit-limit-tokens": "300000",
    "x-ratelimit-remaining-requests": "499930",
    "x-ratelimit-remaining-tokens": "297900",
    "x-ratelimit-reset-requests": "12ms",
    "x-ratelimit-reset-tokens": "76ms",
}


CAPS = {"RPM": "30", "RPD": "1000000", "TPM": "40000", "TPD": "1000000000"}


def ledger_batch(keys: int, step_s: float, caps: dict[str, str]) -> float:
    """CPU microseconds that the ledger adds to a request, over a batch of them `step_s` apart."""
    held = tuple(f"sk-{n}" for n in range(keys))
    wall, env = [1.8e9], {f"OPENAI_{name}": value for name, value in caps.items()}
    env |= {"OPENAI_API_KEYS": ",".join(held), "OPENAI_MODEL": "gpt-4o", "HR_HOME": "."}
    services = router.Config.from_env(env).services if caps else ()
    ledger, pool = router.Ledger(services, lambda: wall[0]), router.KeyPool({"openai": held})
    row, body = router.PROVIDERS_BY_NAME["openai"], {}
    began = time.thread_time()
    for _ in range(BATCH):
        wall[0] += step_s
        claim = ledger.claim("openai", "gpt-4o", 900, body)
        lease = pool.lease("openai", "gpt-4o", claim=claim)
        ledger.hear(row, lease, HEADERS)
        ledger.passed(lease)
        ledger.settle(lease.draft, 1020.0)
    middle = time.thread_time()
    for _ in range(BATCH):
        pool.lease("openai", "gpt-4o")
    return (2 * middle - began - time.thread_time()) * 1e6 / BATCH


def main(rounds: int = 7) -> None:
    most = router.Quota(10**9, 10**9, 10**15, 1e9, 1000)
    callers = {
        "no limits": router.Caller("a", "a"),
        "all limits": router.Caller("b", "b", quota=most),
    }
    with tempfile.TemporaryDirectory() as home:
        env = {"HR_HOME": home, "OPENAI_API_KEY": "sk-x", "OPENAI_MODEL": "gpt-4o"}
        made = router.Router(router.Config.from_env(env))
        made.usage.start()
        (target,) = made.directory.targets
        lease = router.Lease("openai", "sk-x", "gpt-4o")
        for name, caller in callers.items():
            ask = router.Ask(router.CHAT, b"", {}, {}, router.Guard(), caller=caller, tokens=900)
            took = [batch(made, ask, target, lease) for _ in range(rounds)]
            print(f"{name:<12}{min(took):6.2f} us best, {statistics.median(took):6.2f} us median")
        made.usage.close()
    usual = [(keys, step_s, {}) for step_s in (0.01, 0.2) for keys in (1, 2)]
    for keys, step_s, caps in (*usual, (1, 2.5, CAPS), (2, 1.25, CAPS)):
        took = [ledger_batch(keys, step_s, caps) for _ in range(rounds)]
        name = f"ledger, {keys} key{'s' * (keys > 1)}, {1 / step_s:g}/s" + ", caps" * bool(caps)
        print(f"{name:<24}{min(took):6.2f} us best, {statistics.median(took):6.2f} us median")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
