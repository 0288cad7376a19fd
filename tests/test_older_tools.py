"""Chat clients that offer custom tools or `functions` get calls back in the form they offered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from test_every_pair import BOTH, WIRES, Made, Pair, Said, asked, pair, speak
from upstream import AUTH, Reply, Stream, completion, data_of, delta, provider

import router

__all__ = ["pair"]  # a fixture

PATCH = "*** Begin Patch\n+ü 🙂\n*** End"
CUSTOM = {
    "type": "custom",
    "custom": {
        "name": "patch",
        "description": "Edit files.",
        "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "x"'}},
    },
}
LOOK: Made = {"name": "look", "parameters": {"type": "object", "properties": {}}}
CALLS_PATCH = Said("", (("patch", {"input": PATCH}),), finish="tool_calls")
CALLS_LOOK = Said("I look.", (("look", {"at": "it"}),), finish="tool_calls")
HELLO = [{"role": "user", "content": "hello"}]
ANY_WIRE = pytest.mark.parametrize("wire", WIRES)


def post(talk: Pair, messages: Sequence[Made], stream: bool, **more: Any) -> Made:
    """The choice that a Chat client is answered, put together if it was streamed."""
    body = {"model": "hermes-router", "messages": list(messages), "stream": stream, **more}
    got = talk.http.post("/v1/chat/completions", json=body, headers=AUTH)
    assert got.status_code == 200, got.data
    return joined(got.data) if stream else got.json["choices"][0]


def joined(data: bytes) -> Made:
    assert data.endswith(b"data: [DONE]\n\n")
    said: Made = {"role": "assistant", "content": "", "tool_calls": []}
    finishes = []
    for event in data_of(data):
        for choice in event["choices"]:
            add(said, choice["delta"])
            finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert len(finishes) == 1
    return {"message": said, "finish_reason": finishes[0]}


def add(said: Made, piece: Made) -> None:
    """One delta, the way clients put them together."""
    said["content"] += piece.get("content") or ""
    for call in piece.get("tool_calls") or ():
        if call["index"] == len(said["tool_calls"]):
            said["tool_calls"].append({"id": call["id"], "type": call["type"]})
        known = said["tool_calls"][call["index"]]
        for kind in {"custom", "function"} & call.keys():
            join(known.setdefault(kind, {}), call[kind])
    if function := piece.get("function_call"):
        join(said.setdefault("function_call", {}), function)


def join(known: Made, new: Made) -> None:
    for name, text in new.items():
        known[name] = known.get(name, "") + text


# --- custom tools -------------------------------------------------------------------------------


@BOTH
@ANY_WIRE
def test_a_custom_call_comes_back_as_one(pair, wire, stream):
    talk = pair("chat", {wire: speak(CALLS_PATCH)})
    choice = post(talk, HELLO, stream, tools=[CUSTOM])
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["custom"]) == ("custom", {"name": "patch", "input": PATCH})
    assert call["id"] and "function" not in call
    assert choice["finish_reason"] == "tool_calls"


@BOTH
def test_custom_and_plain_calls_of_one_answer_keep_their_places(pair, stream):
    calls = (("look", {"at": "a"}), ("patch", {"input": PATCH}), ("look", {"at": "b"}))
    talk = pair("chat", {"chat": speak(Said("", calls, finish="tool_calls"))})
    tools = [CUSTOM, {"type": "function", "function": LOOK}]
    if not stream:
        made = post(talk, HELLO, stream, tools=tools)["message"]["tool_calls"]
    else:
        body = {"messages": HELLO, "stream": True, "tools": tools}
        got = talk.http.post("/v1/chat/completions", json=body, headers=AUTH)
        by_index: dict[int, Made] = {}
        for event in data_of(got.data):
            for call in event["choices"][0]["delta"].get("tool_calls") or ():
                router.grow_call(by_index.setdefault(call["index"], {}), call)
        made = [by_index[at] for at in range(3)]
    assert [call["type"] for call in made] == ["function", "custom", "function"]
    assert made[1]["custom"]["input"] == PATCH
    assert json.loads(made[2]["function"]["arguments"]) == {"at": "b"}


@BOTH
@ANY_WIRE
def test_the_history_of_custom_calls_reaches_every_dialect(pair, wire, stream):
    talk = pair("chat", {wire: speak(CALLS_PATCH, Said("done"))})
    said = post(talk, HELLO, stream, tools=[CUSTOM])["message"]
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "ok"}
    again = post(talk, [*HELLO, said, result], stream, tools=[CUSTOM])
    assert again["message"]["content"] == "done"
    body = talk.ups[wire].requests[1].json
    if wire in ("responses", "codex"):  # these know custom tools
        kinds = [item.get("type", "message") for item in body["input"]]
        assert kinds == ["message", "custom_tool_call", "custom_tool_call_output"]
        assert body["input"][1]["input"] == PATCH
    else:
        turns = asked(talk.ups[wire].requests[1], WIRES[wire])
        assert turns[1:] == [("call", "patch", {"input": PATCH}), ("result", "patch", "ok")]


def test_a_provider_that_knows_custom_tools_answers_as_it_does(upstream, make_app):
    call = {"id": "c", "type": "custom", "custom": {"name": "patch", "input": PATCH}}
    whole = {**completion(None, tool_calls=[call]), "system_fingerprint": "fp"}
    up = upstream(Reply(200, whole))
    app = make_app(**provider("openai", up, "gpt-4.1")).test_client()
    body = {"messages": HELLO, "tools": [CUSTOM]}
    got = app.post("/v1/chat/completions", json=body, headers=AUTH)
    assert got.json == whole
    assert up.requests[0].json["tools"] == [CUSTOM]


def test_a_custom_tool_is_told_with_its_grammar(pair):
    talk = pair("chat", {"chat": speak(CALLS_PATCH)})
    post(
        talk,
        HELLO,
        False,
        tools=[CUSTOM],
        tool_choice={"type": "custom", "custom": {"name": "patch"}},
    )
    body = talk.ups["chat"].requests[0].json
    told = body["tools"][0]["function"]["description"]
    assert told == 'Edit files.\n\nThe input must follow this lark grammar:\nstart: "x"'
    assert body["tool_choice"] == {"type": "function", "function": {"name": "patch"}}


# --- functions ----------------------------------------------------------------------------------


@BOTH
@ANY_WIRE
def test_who_offers_functions_gets_a_function_call(pair, wire, stream):
    talk = pair("chat", {wire: speak(CALLS_LOOK)})
    choice = post(talk, HELLO, stream, functions=[LOOK], function_call="auto")
    assert choice["finish_reason"] == "function_call"
    said = choice["message"]
    assert said["content"] == "I look." and not said.get("tool_calls")
    assert said["function_call"]["name"] == "look"
    assert json.loads(said["function_call"]["arguments"]) == {"at": "it"}


@BOTH
def test_openai_and_odd_servers_answer_functions_too(upstream, make_app, stream):
    older = {"name": "look", "arguments": '{"at":"it"}'}
    if stream:
        reply: Reply = Stream(chunks=[delta(function_call=older), delta("function_call")])
    else:
        reply = Reply(200, completion(None, function_call=older))
    up = upstream(reply)
    http = make_app(**provider("openai", up, "gpt-4.1")).test_client()
    body = {"messages": HELLO, "functions": [LOOK], "function_call": {"name": "look"}}
    got = http.post("/v1/chat/completions", json={**body, "stream": stream}, headers=AUTH)
    choice = joined(got.data) if stream else got.json["choices"][0]
    assert choice["message"]["function_call"] == older
    assert choice["finish_reason"] == ("function_call" if stream else "function_call")
    sent = up.requests[0].json
    assert not {"functions", "function_call"} & set(sent)
    assert sent["tools"] == [{"type": "function", "function": LOOK}]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert sent["parallel_tool_calls"] is False


@BOTH
def test_only_the_first_of_several_calls_has_a_place(pair, stream):
    calls = (("look", {"at": "a"}), ("look", {"at": "b"}))
    talk = pair("chat", {"chat": speak(Said("", calls, finish="tool_calls"))})
    said = post(talk, HELLO, stream, functions=[LOOK])["message"]
    assert json.loads(said["function_call"]["arguments"]) == {"at": "a"}


@BOTH
@ANY_WIRE
def test_the_history_of_functions_reaches_every_dialect(pair, wire, stream):
    talk = pair("chat", {wire: speak(CALLS_LOOK, Said("It is."))})
    said = post(talk, HELLO, stream, functions=[LOOK])["message"]
    said = {name: value for name, value in said.items() if name != "tool_calls"}
    result = {"role": "function", "name": "look", "content": "seen"}
    again = post(talk, [*HELLO, said, result], stream, functions=[LOOK])
    assert again["message"]["content"] == "It is." and again["finish_reason"] == "stop"
    turns = [turn for turn in asked(talk.ups[wire].requests[1], WIRES[wire]) if turn[0] != "system"]
    assert turns == [
        ("user", "hello"),
        ("assistant", "I look."),
        ("call", "look", {"at": "it"}),
        ("result", "look", "seen"),
    ]


@pytest.mark.parametrize("more", [{}, {"function_call": "none"}, {"functions": None}])
def test_tools_win_over_functions(pair, more):
    talk = pair("chat", {"chat": speak(CALLS_LOOK)})
    tools = [{"type": "function", "function": LOOK}]
    said = post(talk, HELLO, False, tools=tools, **{"functions": [LOOK], **more})["message"]
    assert said["tool_calls"][0]["function"]["name"] == "look"
    assert not {"functions", "function_call"} & set(talk.ups["chat"].requests[0].json)
