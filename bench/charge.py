"""What admitting and charging one request costs: CPU microseconds, without any network.

    python bench/charge.py [ROUNDS]

Prints the cost of a request of a caller without limits, and of one that has all of them. The work
is what a request does between its being read and its end: admit, note the attempt, charge, settle.
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


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
