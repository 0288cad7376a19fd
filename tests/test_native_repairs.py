"""Requests that pass in their own dialect: the sound ones byte for byte, broken pairs mended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_every_pair import Said, pair, speak
from upstream import AUTH

import router

__all__ = ["pair"]  # a fixture

Block = dict[str, Any]


def use(id: str) -> Block:
    return {"type": "tool_use", "id": id, "name": "look", "input": {}}


def result(id: str, content: Any = "seen", **more: Any) -> Block:
    return {"type": "tool_result", "tool_use_id": id, "content": content, **more}


def text(words: str) -> Block:
    return {"type": "text", "text": words}


def user(*blocks: Block) -> Block:
    return {"role": "user", "content": list(blocks)}


def says(*blocks: Block) -> Block:
    return {"role": "assistant", "content": list(blocks)}


GO = {"role": "user", "content": "go"}
MADE_UP = {"type": "tool_result", "tool_use_id": "a", "content": "[no result]", "is_error": True}


def sent(talk: Any, wire: str, path: str, raw: bytes) -> bytes:
    """The body that the provider gets for a client's."""
    headers = {**AUTH, "anthropic-version": "2023-06-01", "content-type": "application/json"}
    got = talk.http.post(path, data=raw, headers=headers)
    assert got.status_code == 200, got.data
    return talk.ups[wire].requests[-1].body


def sent_turns(talk: Any, turns: Sequence[Block]) -> Any:
    body = {"model": "claude-mock", "max_tokens": 9, "messages": list(turns)}
    return json.loads(sent(talk, "messages", "/v1/messages", json.dumps(body).encode()))["messages"]


SOUND = [
    [GO],
    [GO, says(text("a"), use("a"), use("b")), user(result("b"), result("a"), text("and?"))],
    [GO, says(use("a")), user(result("a")), {"role": "user", "content": "and?"}],
    [GO, says(use("a")), says(use("b")), user(result("a")), user(result("b"))],
    [user(text("x")), says(text("y")), GO, says(use("a")), user(result("a", [text("z")]))],
    [GO, {"role": "assistant", "content": "Sure, "}],
    [GO, says({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}), GO],
]


@pytest.mark.parametrize("turns", SOUND)
def test_sound_turns_pass_byte_for_byte(pair, turns):
    talk = pair("messages", {"messages": speak(Said("hello"))})
    spaced = json.dumps(turns, indent=1).replace("look", "l\\u006fok")
    raw = f'{{"model": "claude-mock",\n "max_tokens": 9, "messages": {spaced}}}'.encode()
    assert sent(talk, "messages", "/v1/messages", raw) == raw


BROKEN = {
    "no result at the end": ([GO, says(use("a"))], [GO, says(use("a")), user(MADE_UP)]),
    "no result, other words": (
        [GO, says(use("a")), GO],
        [GO, says(use("a")), user(MADE_UP, text("go"))],
    ),
    "one of two results": (
        [GO, says(use("b"), use("a")), user(result("b"))],
        [GO, says(use("b"), use("a")), user(result("b"), MADE_UP)],
    ),
    "words before the result": (
        [GO, says(use("a")), user(text("here"), result("a"))],
        [GO, says(use("a")), user(result("a"), text("here"))],
    ),
    "the result comes later": (
        [GO, says(use("a")), GO, user(result("a"))],
        [GO, says(use("a")), user(result("a"), text("go"))],
    ),
    "a result of no call": (
        [user(result("a", [text("seen")], cache_control={"type": "ephemeral"}))],
        [user(text("[Result of an earlier tool call a]"), text("seen"))],
    ),
    "a second result": (
        [GO, says(use("a")), user(result("a"), result("a", "again"))],
        [
            GO,
            says(use("a")),
            user(result("a"), text("[Result of an earlier tool call a]"), text("again")),
        ],
    ),
    "an id used twice": (
        [GO, says(use("a")), user(result("a")), says(use("a")), user(result("a", "new"))],
        [GO, says(use("a")), user(result("a")), says(use("a_2")), user(result("a_2", "new"))],
    ),
    "blank texts": (
        [GO, says(text(" \n"), use("a")), user(result("a"), text(""))],
        [GO, says(use("a")), user(result("a"))],
    ),
    "the assistant begins": (
        [says(text("Hi.")), GO],
        [{"role": "user", "content": router.NO_OPENING}, says(text("Hi.")), GO],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_turns_are_mended(pair, case):
    given_turns, mended = BROKEN[case]
    talk = pair("messages", {"messages": speak(Said("hello"))})
    listed = [{**turn, "content": router.turn_blocks(turn)} for turn in mended]
    made = sent_turns(talk, given_turns)
    assert [{**turn, "content": router.turn_blocks(turn)} for turn in made] == listed


BLOCKS = st.one_of(
    st.sampled_from(["", " ", "x"]).map(text),
    st.sampled_from("abc").map(use),
    st.sampled_from("abc").map(result),
)


def turn_of(role: str, content: Any) -> Block:
    """A turn whose blocks its role may hold."""
    if isinstance(content, list):
        barred = "tool_result" if role == "assistant" else "tool_use"
        content = [block for block in content if block["type"] != barred] or [text("x")]
    return {"role": role, "content": content}


TURNS = st.lists(
    st.builds(
        turn_of,
        st.sampled_from(["user", "assistant", "user", "assistant", "system"]),
        st.one_of(st.lists(BLOCKS, min_size=1, max_size=4), st.sampled_from(["", "x"])),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TURNS)
def test_mending_ends_in_turns_that_need_none(turns: list[Block]) -> None:
    before = json.dumps(turns)
    mended = router.own_turns(turns)
    assert json.dumps(turns) == before
    if mended is not None:
        assert router.own_turns(mended) is None
        said = {b["text"] for turn in turns for b in router.own_blocks(turn) if b["type"] == "text"}
        assert said <= {b.get("text") for turn in mended for b in router.turn_blocks(turn)}


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "a", "x y"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("type"), inner),
    max_leaves=4,
)
KINDS = ["text", "tool_use", "tool_result", "thinking", "image", "server_tool_use"]
ODD_BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS) | ANY},
    optional={name: ANY for name in ("id", "name", "input", "text", "tool_use_id", "content")},
)
ODD_TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]) | ANY,
        "content": ANY | st.lists(ODD_BLOCK | ANY, max_size=3),
    }
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ODD_TURN | ANY, max_size=4))
def test_whatever_is_let_in_can_be_mended(turns: list[Any]) -> None:
    try:
        router.messages_to_chat({"messages": turns})
    except router.BadRequest:
        return
    router.own_turns(turns)


ODD_ITEM = st.fixed_dictionaries(
    {"type": st.sampled_from([*router.CALL_OUTPUTS, *router.CALL_OUTPUTS.values()]) | ANY},
    optional={
        name: ANY
        for name in ("id", "call_id", "name", "arguments", "input", "output", "encrypted_content")
    },
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ODD_ITEM | ANY, max_size=4))
def test_whatever_items_are_let_in_can_be_mended(items: list[Any]) -> None:
    try:
        router.responses_to_chat({"input": items})
    except router.BadRequest:
        return
    made = router.own_items(items)
    assert made is None or router.own_items(made) is None


# --- Responses ----------------------------------------------------------------------------------


def call(id: str, kind: str = "function_call") -> Block:
    member = "arguments" if kind == "function_call" else "input"
    return {"type": kind, "call_id": id, "name": "look", member: "{}"}


def output(id: str, words: Any = "seen", kind: str = "function_call_output") -> Block:
    return {"type": kind, "call_id": id, "output": words}


ASK = {"role": "user", "content": "go"}
STRAY = {"type": "input_text", "text": router.ORPHAN}


def sent_items(talk: Any, raw: bytes) -> bytes:
    return sent(talk, "responses", "/v1/responses", raw)


@pytest.mark.parametrize(
    "items",
    [
        [ASK],
        [ASK, call("a"), call("b"), output("b"), output("a")],
        [ASK, call("a"), output("a"), call("a"), output("a")],
        [ASK, call("a", "custom_tool_call"), output("a", "x", "custom_tool_call_output")],
    ],
)
def test_sound_items_pass_byte_for_byte(pair, items):
    talk = pair("responses", {"responses": speak(Said("hello"))})
    raw = json.dumps({"model": "gpt-5-codex", "input": items, "store": False}, indent=1).encode()
    assert sent_items(talk, raw) == raw


@pytest.mark.parametrize(
    ("items", "mended"),
    [
        ([ASK, call("a")], [ASK, call("a"), output("a", "[no result]")]),
        (
            [ASK, call("a", "custom_tool_call"), ASK],
            [ASK, call("a", "custom_tool_call"),
             output("a", "[no result]", "custom_tool_call_output"), ASK],
        ),
        (
            [ASK, output("a")],
            [ASK, {"type": "message", "role": "user",
                   "content": [STRAY, {"type": "input_text", "text": "seen"}]}],
        ),
        (
            [ASK, call("a"), output("a"), output("a", [{"type": "input_text", "text": "x"}])],
            [ASK, call("a"), output("a"),
             {"type": "message", "role": "user",
              "content": [STRAY, {"type": "input_text", "text": "x"}]}],
        ),
    ],
)  # fmt: skip
def test_broken_items_are_mended(pair, items, mended):
    talk = pair("responses", {"responses": speak(Said("hello"))})
    raw = json.dumps({"model": "gpt-5-codex", "input": items, "store": False}).encode()
    assert json.loads(sent_items(talk, raw))["input"] == mended


def test_the_turns_before_count_too(pair):
    """The call stands in the stored answer, its output in the new input."""
    looks = Said("", (("look", {}),), finish="tool_calls")
    talk = pair("responses", {"responses": speak(looks, Said("done"))})
    first = talk.http.post(
        "/v1/responses", json={"model": "gpt-5-codex", "input": "go"}, headers=AUTH
    )
    (made,) = [item for item in first.json["output"] if item["type"] == "function_call"]
    more = {"previous_response_id": first.json["id"], "input": [output(made["call_id"])]}
    body = json.loads(sent_items(talk, json.dumps({"model": "gpt-5-codex", **more}).encode()))
    kinds = [item.get("type", "message") for item in body["input"]]
    assert kinds[-2:] == ["function_call", "function_call_output"]
