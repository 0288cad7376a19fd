"""Conversations stay where they were answered; hints of the client about its work."""

from __future__ import annotations

import itertools
import json

import pytest
from upstream import AUTH, KEY, Reply, good, provider

import router

STRONG, WEAK = "gpt-5.5", "llama-3.1-8b-instant"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def turns(*texts):
    """A conversation: what the user said, with an answer between each two."""
    said = [{"role": "user", "content": text} for text in texts]
    answers = [{"role": "assistant", "content": "hello"} for _ in texts[1:]]
    return [m for pair in itertools.zip_longest(said, answers) for m in pair if m]


@pytest.fixture
def pair(upstream, make_app):
    """pair(SETTING=...): groq and cerebras with two keys each, before one app."""

    def make(script=None, **settings):
        ups = [upstream(script or good()) for _ in range(2)]
        rows = {}
        for name, up in zip(("groq", "gemini"), ups, strict=True):
            rows |= provider(name, up, "m1", keys=f"{name}-key-number-1,{name}-key-number-2")
        return Pair(make_app(**{**rows, **settings}), ups)

    return make


class Pair:
    def __init__(self, app, ups):
        self.app, self.ups = app, ups

    def ask(self, messages, path="/v1/chat/completions", key=KEY, headers=(), **body):
        """(provider's key, model) of whoever answered."""
        sent = {"model": "auto", "messages": messages, **body}
        headers = {**AUTH, "Authorization": f"Bearer {key}", **dict(headers)}
        answer = self.app.test_client().post(path, json=sent, headers=headers)
        assert answer.status_code == 200, answer.text
        last = max((up.requests[-1] for up in self.ups if up.requests), key=lambda r: r.at)
        return last.key, last.model


def test_a_conversation_stays_with_its_provider_and_key(pair):
    both = pair()
    for topic in "abcd":
        said = [f"hello {topic}", "go on", "and then?", "one more"]
        assert len({both.ask(turns(*said[:n])) for n in range(1, 5)}) == 1


def test_other_conversations_take_their_turn(pair):
    both = pair()
    assert len({both.ask(turns(f"hello {n}")) for n in range(8)}) == 4
    assert len({both.ask(turns("the same again")) for _ in range(8)}) == 4, "one turn is no talk"


def test_after_a_failure_it_goes_on_elsewhere_and_stays_there(pair):
    broken = set()

    def script(request):
        fails = request.key in broken
        return Reply(500, {"error": {"message": "no"}}) if fails else good()(request)

    both = pair(script)
    first = both.ask(turns("a"))
    broken.add(first[0])
    second = both.ask(turns("a", "b"))
    broken.clear()
    assert second != first
    assert both.ask(turns("a", "b", "c")) == second


def test_a_model_that_is_too_weak_for_the_next_turn_is_left(upstream, make_app):
    ups = [upstream(good()), upstream(good())]
    rows = {**provider("groq", ups[0], WEAK), **provider("openai", ups[1], STRONG)}
    both = Pair(make_app(**rows), ups)
    assert both.ask(turns("what is 2+2"))[1] == WEAK
    hard = "implement a distributed algorithm: def f(x): ``` and optimize it step by step"
    assert both.ask(turns("what is 2+2", hard))[1] == STRONG
    easy = turns("what is 2+2", hard, "what is 3+3")
    assert both.ask(easy)[1] == STRONG, "its cache is warm there"


def test_our_header_stays_even_then(upstream, make_app):
    ups = [upstream(good()), upstream(good())]
    rows = {**provider("groq", ups[0], WEAK), **provider("openai", ups[1], STRONG)}
    both, headers = Pair(make_app(**rows), ups), {"X-Hermes-Session-Affinity": "s1"}
    assert both.ask(turns("what is 2+2"), headers=headers)[1] == WEAK
    hard = "implement a distributed algorithm: def f(x): ``` and optimize it step by step"
    assert both.ask(turns(hard), headers=headers)[1] == WEAK


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"X-Hermes-Session-Affinity": "NAME"}, {}),
        ({"X-Claude-Code-Session-Id": "NAME"}, {}),
        ({"Session_id": "NAME"}, {}),
        ({"X-Session-Id": "NAME"}, {}),
        ({}, {"prompt_cache_key": "NAME"}),
        ({}, {"metadata": {"user_id": "user_1_account__session_0b5f8c1e-NAME"}}),
        ({}, {"metadata": {"user_id": json.dumps({"session_id": "0b5f8c1e-NAME"})}}),
    ],
    ids=str,
)
def test_what_names_a_conversation(pair, headers, body):
    both = pair()

    def ask(name, text):
        named = json.loads(json.dumps([headers, body]).replace("NAME", name))
        return both.ask(turns(text), headers=named[0], **named[1])

    places = {name: ask(name, f"begins {name}") for name in "abcd"}
    assert len(set(places.values())) == 4
    for name, text in itertools.product("dcba", ("x", "y")):
        assert ask(name, text) == places[name]


def test_callers_share_no_conversation(pair):
    both = pair(PROXY_API_KEYS=f"{KEY},other-key-of-this-router")
    headers = {"X-Hermes-Session-Affinity": "s1"}
    mine = both.ask(turns("a"), headers=headers)
    theirs = {
        both.ask(
            turns("a"),
            key="other-key-of-this-router",
            headers={"X-Hermes-Session-Affinity": f"s{n}"},
        )
        for n in (1, 2, 3)
    }
    assert len(theirs) == 3, "each takes its turn"
    assert both.ask(turns("b"), headers=headers) == mine


def test_it_can_be_off(pair):
    both = pair(SESSION_AFFINITY="0")
    assert len({both.ask(turns("a", "b")) for _ in range(8)}) == 4


def test_a_model_that_the_client_names_is_obeyed(pair):
    both = pair()
    first = both.ask(turns("a"))
    other = {"groq": "gemini", "gemini": "groq"}[first[0].split("-")[0]]
    assert both.ask(turns("a", "b"), model=f"{other}/m1")[0].startswith(other)


def test_why_tells(pair):
    both = pair()
    both.ask(turns("a"))
    client = both.app.test_client()
    body = {"messages": turns("a", "b")}
    id = client.post("/v1/chat/completions", json=body, headers=AUTH).headers["X-Request-ID"]
    why = client.get(f"/v1/why/{id}", headers=AUTH).get_json()
    assert why["candidates"][0]["outcome"] == "ok"
    assert "conversation" in why["candidates"][0]["why"]


def test_sessions_are_bounded_and_end():
    clock = [0.0]
    sessions = router.Sessions(lambda: clock[0])

    def ask(n):
        body = {"messages": turns(f"{n}", "b")}
        return router.Ask(router.CHAT, b"", body, body, router.Guard(), caller=router.ITSELF)

    for n in range(sessions.MOST + 10):
        made = ask(n)
        assert sessions.last(made) is None
        sessions.answered(made, "groq", "m1", "k")
    assert len(sessions._kept) == sessions.MOST
    assert sessions.last(ask(0)) is None and sessions.last(ask(sessions.MOST))
    clock[0] = sessions.KEPT_S + 1
    assert sessions.last(ask(sessions.MOST)) is None


# --- hints --------------------------------------------------------------------


def test_a_tool_loop_needs_tools(pair):
    headers = {**AUTH, "X-Hermes-Tool-Loop": "true"}
    body = {"messages": turns("a")}
    answer = pair().app.test_client().post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 400 and answer.get_json()["error"]["param"] == "tools"


def test_a_tool_loop_goes_only_where_tools_are_known_to_work(pair):
    both, headers = pair(GEMINI_SUPPORTS_TOOLS="1"), {"X-Hermes-Tool-Loop": "true"}
    for n in range(4):
        assert both.ask(turns(f"a{n}"), headers=headers, tools=TOOLS)[0].startswith("gemini")
    assert len({both.ask(turns(f"b{n}"), tools=TOOLS)[0][:4] for n in range(4)}) == 2


def test_a_hint_moves_but_never_removes(upstream, make_app):
    ups = [upstream(good()), upstream(good())]
    rows = {
        **provider("groq", ups[0], "plain-70b"),
        **provider("gemini", ups[1], "some-coder-70b"),
    }
    both = Pair(make_app(**rows), ups)
    for n in range(4):
        got = both.ask(turns(f"a{n}"), headers={"X-Hermes-Workload-Hint": " Coding "})
        assert got[1] == "some-coder-70b"
    for hint in ("general", "nonsense", "vision", ""):
        asked = {
            both.ask(turns(f"{hint}{n}"), headers={"X-Hermes-Workload-Hint": hint})[1]
            for n in range(4)
        }
        assert asked == {"plain-70b", "some-coder-70b"}
