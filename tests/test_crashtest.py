"""The 16 scenarios of the crash test, for three client dialects before every provider dialect.

They run in the fast profile: the clock of the faults and of the router goes twelve times as fast.
"""

from __future__ import annotations

import http.client
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import config_for, program
from upstream import events_of

import router
from router import Fault, Mock, Pace, Run, Scenario, Seen

DIALECTS = ("chat", "messages", "responses")


def rotation(shift: int) -> dict[str, tuple[str, str]]:
    """Each client dialect before another pair of provider dialects."""
    pairs = list(itertools.product(DIALECTS, DIALECTS))
    return {client: pairs[(4 * at + shift) % 9] for at, client in enumerate(DIALECTS)}


def failures(runs: list[Run]) -> list[str]:
    return [
        f"{run.scenario.number} {run.way} before {run.primary.dialect}, {run.fallback.dialect}:"
        f" {run.result}, {run.why}"
        for run in runs
        if run.result != "pass"
    ]


@pytest.mark.parametrize("pairs", [router.CRASH_PAIRS, rotation(3), rotation(5)])
def test_every_scenario_is_survived(tmp_path: Path, pairs: dict[str, tuple[str, str]]) -> None:
    runs = router.crash_test(config_for(tmp_path, {}), pairs=pairs)
    assert len(runs) == 3 * (16 + 14)
    if missed := {run.scenario.number for run in runs if run.result != "pass"}:
        # At twelve times the speed a pause of a busy machine counts for much: once more, alone.
        runs = router.crash_test(config_for(tmp_path, {}), only=sorted(missed), pairs=pairs)
    assert not failures(runs), "\n" + "\n".join(failures(runs))
    assert list(tmp_path.iterdir()) == []  # the user's files are left alone


def test_every_pair_of_dialects_is_tried() -> None:
    first = [rotation(shift) for shift in range(9)]
    for client in DIALECTS:
        assert {pairs[client] for pairs in first} == set(itertools.product(DIALECTS, DIALECTS))


def test_the_scenarios_are_the_sixteen() -> None:
    assert [row.number for row in router.SCENARIOS] == list(range(1, 17))
    assert len({row.title for row in router.SCENARIOS}) == 16
    config = router.Config()
    for row in router.SCENARIOS:
        advice = Run(row, "chat", True, None, None, why="x").advice(config)  # type: ignore[arg-type]
        assert advice.startswith("try: ")
        assert "{" not in advice


# --- the user's settings decide --------------------------------------------------------------


def crash(tmp_path: Path, only: int, **settings: Any) -> list[Run]:
    config = config_for(tmp_path, settings)
    return router.crash_test(config, only=[only], pairs={"chat": ("chat", "chat")})


def test_settings_that_forbid_failover_are_named(tmp_path: Path) -> None:
    runs = crash(tmp_path, 4, STRICT_MODEL="1")
    assert {run.result for run in runs} == {"safe"}
    advice = runs[0].advice(config_for(tmp_path, {"STRICT_MODEL": "1"}))
    assert advice.startswith("STRICT_MODEL=1")


def test_a_patient_router_hangs(tmp_path: Path) -> None:
    patient = {"TTFT_TIMEOUT": "500", "TTFT_SWITCH": "0", "REQUEST_DEADLINE": "900"}
    streamed, _whole = crash(tmp_path, 6, **patient)
    assert (streamed.result, streamed.why) == ("fail", "no end in sight")
    advice = streamed.advice(config_for(tmp_path, patient))
    assert advice.startswith("try: TTFT_TIMEOUT=500")


def test_a_slow_first_token_is_only_remarked_upon(tmp_path: Path) -> None:
    streamed, whole = crash(tmp_path, 7, TTFT_SWITCH="0")
    assert (streamed.result, streamed.why) == (
        "partial",
        "the client waited 20 s for the first word",
    )
    assert whole.result == "pass"


def test_without_rescue_a_cut_answer_ends_in_an_error(tmp_path: Path) -> None:
    streamed, whole = crash(tmp_path, 8, RESCUE="0")
    assert (streamed.result, whole.result) == ("partial", "pass")
    assert streamed.why.startswith("an honest error")
    assert "RESCUE" in streamed.advice(config_for(tmp_path, {}))


# --- the rule --------------------------------------------------------------------------------


def graded(seen: Seen, asked: int = 1, **changes: Any) -> tuple[str, str]:
    row = Scenario(**{"number": 0, "title": "t", "fault": Fault(), "advice": "a", **changes})
    run = Run(row, "chat", True, None, None, [seen])  # type: ignore[arg-type]
    run.asked = tuple(9.0 * n for n in range(asked)), 1
    run.grade()
    return run.result, run.why


WHOLE = Seen(router.CRASH_TEXT, "stop", True)
PART = router.CRASH_TEXT[:100]
RULES: dict[str, tuple[Seen, dict[str, Any], str]] = {
    "the whole answer": (WHOLE, {}, "pass"),
    "an error at once": (Seen(error="e"), {}, "safe"),
    "an error after a part": (Seen(PART, error="e"), {}, "partial"),
    "an error after foreign words": (Seen("hello", error="e"), {}, "fail"),
    "the prefill's refusal": (Seen(PART, error=router.PREFILL_REFUSED), {}, "fail"),
    "a part called whole": (Seen(PART, "stop", True), {}, "fail"),
    "more than the whole": (Seen(router.CRASH_TEXT + " word60", "stop", True), {}, "fail"),
    "cut for length": (Seen(router.CRASH_TEXT, "length", True), {}, "fail"),
    "no end": (Seen(router.CRASH_TEXT, "stop"), {}, "fail"),
    "no finish": (Seen(router.CRASH_TEXT, "", True), {}, "fail"),
    "nothing": (Seen(), {}, "fail"),
    "a broken connection": (Seen(PART, wrong="the connection broke"), {}, "fail"),
    "pestered": (WHOLE, {"asked": 7}, "fail"),
    "one try where two are liked": (WHOLE, {"tries": (2, 6)}, "partial"),
    "two tries": (WHOLE, {"tries": (2, 6), "asked": 2, "gap_s": 1.8}, "pass"),
    "the provider's refusal": (Seen(error="our safety system"), {"refusal": True}, "pass"),
    "some other refusal": (Seen(error="no"), {"refusal": True}, "partial"),
    "a refusal routed around": (WHOLE, {"refusal": True}, "partial"),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule(name: str) -> None:
    seen, changes, result = RULES[name]
    assert graded(seen, **changes)[0] == result
    assert graded(seen, **changes)[1] or result == "pass"


def test_the_worst_answer_of_many_counts() -> None:
    run = Run(router.SCENARIOS[14], "chat", True, None, None)  # type: ignore[arg-type]
    run.seen = [WHOLE, Seen(PART, error="e"), Seen(error="e"), WHOLE]
    run.grade()
    assert run.result == "safe"


# --- the mock provider -----------------------------------------------------------------------


@pytest.fixture
def mock():
    """mock(fault, dialect): a mock provider, and a function that asks it."""
    made: list[Mock] = []

    def make(fault: Fault, dialect: str = "chat") -> Mock:
        made.append(Mock(dialect, 7, fault, Pace(20.0)))
        return made[-1]

    yield make
    for provider in made:
        provider.close()


def asked(provider: Mock, **changes: Any) -> tuple[int, bytes]:
    """(status, body) of one request; status 0 = the connection ended before a whole answer."""
    wire = http.client.HTTPConnection("127.0.0.1", provider.server_address[1], timeout=10)
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **changes}
    try:
        wire.request("POST", "/v1/x", json.dumps(body))
        answer = wire.getresponse()
        return answer.status, answer.read()
    except (http.client.HTTPException, OSError):
        return 0, b""
    finally:
        wire.close()


def test_a_fault_may_pass(mock: Any) -> None:
    provider = mock(Fault(429, "slow down", "c", "2", times=1))
    status, body = asked(provider)
    assert (status, json.loads(body)["error"]["message"]) == (429, "slow down")
    assert asked(provider)[0] == 200
    assert len(provider.asked) == 2


@pytest.mark.parametrize("fault", [Fault(reset=True), Fault(silent_s=1.0), Fault(stop_at=4)])
def test_a_connection_may_end(mock: Any, fault: Fault) -> None:
    assert asked(mock(fault))[0] == 0
    assert asked(mock(fault), stream=True)[0] == 0


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_well_provider_says_sixty_words(mock: Any, dialect: str) -> None:
    for stream in (False, True):
        seen = Seen()
        status, body = asked(mock(Fault(), dialect), stream=stream)
        assert status == 200
        pieces = [data.encode() for _, data in events_of(body)] if stream else [body]
        for piece in pieces:
            router.hear(piece, dialect, seen)
        assert (seen.text, seen.ended, seen.wrong) == (router.CRASH_TEXT, True, "")


def test_a_prefill_is_continued_or_refused(mock: Any) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PART}]
    provider = mock(Fault())
    _, body = asked(provider, messages=turns)
    assert PART + json.loads(body)["choices"][0]["message"]["content"] == router.CRASH_TEXT
    provider.refuses_prefill = True
    status, body = asked(provider, messages=turns)
    assert (status, b"prefill" in body) == (400, True)


# --- the command -----------------------------------------------------------------------------


def command(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        program("crashtest", *words),
        env={"HR_HOME": str(tmp_path), "PATH": "/usr/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    done = command(tmp_path, "--only", "4", "--only", "16")
    assert (done.returncode, done.stderr) == (0, "")
    head, four, sixteen, total = done.stdout.splitlines()
    assert "RESPONSES WHOLE" in head
    assert four.startswith(" 4 503 at every request")
    assert sixteen.split()[-6:] == ["pass"] * 6
    assert total.startswith("12 runs: 12 pass, 0 partial, 0 safe, 0 fail")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_json(tmp_path: Path) -> None:
    told = json.loads(command(tmp_path, "--only", "2", "--json").stdout)
    assert (told["profile"], told["counts"]) == ("fast", {"pass": 6})
    first = told["runs"][0]
    assert (first["number"], first["client"], first["stream"]) == (2, "chat", True)
    assert (first["asked"], first["advice"]) == ([1, 1], "")


def test_an_unknown_scenario_is_wrong_usage(tmp_path: Path) -> None:
    done = command(tmp_path, "--only", "17")
    assert (done.returncode, done.stdout) == (2, "")
    assert "17" in done.stderr


def test_a_failure_is_exit_1(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TTFT_TIMEOUT=500\nTTFT_SWITCH=0\nREQUEST_DEADLINE=900\n")
    done = command(tmp_path, "--only", "6")
    assert done.returncode == 1
    assert "! 6 chat stream" in done.stdout
    assert "TTFT_TIMEOUT=500" in done.stdout
