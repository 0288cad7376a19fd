"""/v1/responses/compact and compaction_trigger: a summary that every provider can go on with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_every_pair import (
    BOTH,
    CASES,
    WEATHER,
    WIRES,
    Made,
    Pair,
    Said,
    asked,
    pair,
    responses_collect,
    speak,
)  # fmt: skip
from upstream import (
    AUTH,
    Reply,
    Stream,
    completion,
    delta,
    events_of,
    provider,
    usage_chunk,
)  # fmt: skip

import router

__all__ = ["pair"]  # a fixture

SUMMARY = "The user wants the weather. It is 21.5 °C in Zürich.\nNext: Bern."
SAYS_SUMMARY = Said(SUMMARY)
TRIGGER = {"type": "compaction_trigger"}
ANY_WIRE = pytest.mark.parametrize("wire", WIRES)
TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}}
HISTORY: list[Made] = [
    {"type": "message", "role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "input_text", "text": "How warm is it?"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"},
    {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "21.5 °C"},
    {"type": "message", "role": "assistant", "content": "It is warm."},
    {"type": "message", "role": "user", "content": "And in Bern?"},
]


ASKED = {"model": "hermes-router", "tools": [TOOL]}


def post(talk: Pair, path: str, **body: Any) -> Any:
    got = talk.http.post(path, json={**ASKED, **body}, headers=AUTH)
    assert got.status_code == 200, got.data
    return got


def check_asked(talk: Pair, wire: str) -> None:
    """The provider was asked for a summary of everything, without tools to call."""
    request = talk.ups[wire].requests[0]
    turns = asked(request, WIRES[wire])
    assert turns[-1] == ("user", router.COMPACT_PROMPT) or turns[-1][1].endswith(
        router.COMPACT_PROMPT
    )
    assert ("call", "get_weather", {}) in turns and ("result", "get_weather", "21.5 °C") in turns
    body = request.json
    assert not body.get("tools") or body["tool_choice"] == {"type": "none"}
    assert b"compaction_trigger" not in request.body


@ANY_WIRE
def test_compact_gives_the_users_words_and_a_summary(pair, wire):
    talk = pair("responses", {wire: speak(SAYS_SUMMARY)})
    got = post(talk, "/v1/responses/compact", input=HISTORY, instructions="Help.").json
    assert got["object"] == "response.compaction"
    assert got["id"].startswith("resp_") and got["created_at"] > 0
    assert got["usage"]["total_tokens"] > 0
    *said, summary = got["output"]
    assert [(one["type"], one["role"], one["content"]) for one in said] == [
        ("message", "user", HISTORY[1]["content"]),
        ("message", "user", [{"type": "input_text", "text": "And in Bern?"}]),
    ]
    assert len({item["id"] for item in got["output"]}) == 3
    assert summary.keys() == {"id", "type", "encrypted_content"}
    assert summary["type"] == "compaction" and SUMMARY in summary["encrypted_content"]
    check_asked(talk, wire)


@BOTH
@ANY_WIRE
def test_a_trigger_is_answered_by_one_compaction_item(pair, wire, stream):
    talk = pair("responses", {wire: speak(SAYS_SUMMARY)})
    got = post(talk, "/v1/responses", input=[*HISTORY, TRIGGER], stream=stream, store=False)
    if stream:
        kinds = [name.removeprefix("response.") for name, _ in events_of(got.data)]
        assert kinds == [
            "created", "in_progress", "output_item.added", "output_item.done", "completed",
        ]  # fmt: skip
        done = [json.loads(text) for name, text in events_of(got.data) if name.endswith(".done")]
        response = responses_collect(got.data)
        assert [event["item"] for event in done] == response["output"]
    else:
        response = got.json
    (item,) = response["output"]
    assert (item["type"], response["status"]) == ("compaction", "completed")
    assert SUMMARY in item["encrypted_content"]
    assert response["usage"]["output_tokens"] > 0
    check_asked(talk, wire)


@BOTH
@ANY_WIRE
def test_every_provider_reads_the_summary(pair, wire, stream):
    talk = pair("responses", {wire: speak(SAYS_SUMMARY, Said("19 °C"))})
    context = post(talk, "/v1/responses/compact", input=HISTORY).json["output"]
    more = {"role": "user", "content": "So?"}
    # Clients may leave in the history what the summary stands for.
    items = [*HISTORY, *context, more]
    post(talk, "/v1/responses", input=items, stream=stream, store=False)
    request = talk.ups[wire].requests[1]
    turns = asked(request, WIRES[wire])
    told = "\n".join(str(turn[1]) for turn in turns if turn[0] == "user")
    for words in ("And in Bern?", SUMMARY, "So?"):
        assert words in told
    assert not [turn for turn in turns if turn[0] in ("call", "result", "assistant")]
    assert b"hr1." not in request.body and b"compaction" not in request.body
    assert b"gAAAA" not in request.body


@ANY_WIRE
def test_a_chain_of_stored_answers_goes_on_from_the_summary(pair, wire):
    talk = pair("responses", {wire: speak(CASES["call"], SAYS_SUMMARY, Said("19 °C"))})
    first = post(talk, "/v1/responses", input="How warm is it?").json
    (call,) = [item for item in first["output"] if item["type"] == "function_call"]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "21.5 °C"}
    second = post(
        talk, "/v1/responses", input=[output, TRIGGER], previous_response_id=first["id"]
    ).json
    assert [item["type"] for item in second["output"]] == ["compaction"]
    post(talk, "/v1/responses", input="And in Bern?", previous_response_id=second["id"])
    turns = asked(talk.ups[wire].requests[2], WIRES[wire])
    told = [turn for turn in turns if turn[0] != "system"]
    assert {turn[0] for turn in told} == {"user"}
    words = "\n".join(turn[1] for turn in told)
    assert words.index("How warm is it?") < words.index(SUMMARY) < words.index("And in Bern?")
    assert ("call", *WEATHER) in asked(talk.ups[wire].requests[1], WIRES[wire])


def test_a_compaction_of_openai_is_passed_to_openai_and_told_to_others(pair):
    sealed = {"type": "compaction", "id": "cmp_1", "encrypted_content": "gAAAA"}
    items = [*HISTORY[:2], sealed, HISTORY[6]]
    talk = pair("responses", {"responses": speak(Said("x")), "chat": speak(Said("x"))})
    post(talk, "/v1/responses", model="openai/gpt-5-codex", input=items)
    assert sealed in talk.ups["responses"].requests[0].json["input"]
    post(talk, "/v1/responses", model="fireworks/chat-mock", input=items)
    turns = asked(talk.ups["chat"].requests[0], WIRES["chat"])
    assert ("user", router.COMPACTED) in turns


def test_a_second_compaction_holds_the_first(pair):
    talk = pair("responses", {"chat": speak(SAYS_SUMMARY, Said("All of it."))})
    context = post(talk, "/v1/responses/compact", input=HISTORY).json["output"]
    again = post(talk, "/v1/responses/compact", input=[*context, HISTORY[6]]).json["output"]
    turns = asked(talk.ups["chat"].requests[1], WIRES["chat"])
    assert ("user", router.SUMMARY_HEAD + SUMMARY) in turns
    assert [item["type"] for item in again] == ["message", "message", "message", "compaction"]
    assert "All of it." in again[-1]["encrypted_content"]


def test_old_words_of_the_user_go_when_there_are_too_many(pair):
    talk = pair("responses", {"chat": speak(SAYS_SUMMARY)})
    long = [{"role": "user", "content": f"{n} " + "x" * 30_000} for n in range(5)]
    got = post(talk, "/v1/responses/compact", input=long).json["output"]
    assert [item["content"][0]["text"][0] for item in got[:-1]] == ["3", "4"]


def test_what_cannot_be_compacted_is_refused_by_name(pair):
    talk = pair("responses", {"chat": speak(SAYS_SUMMARY)})
    for path, body, field in (
        ("/v1/responses/compact", {"input": []}, "input"),
        ("/v1/responses/compact", {"input": [{"type": "nonsense"}]}, "input[0].type"),
        ("/v1/responses", {"input": [TRIGGER, *HISTORY]}, "input[0].type"),
        ("/v1/responses", {"input": [TRIGGER]}, "input"),
    ):
        got = talk.http.post(path, json={"model": "m", **body}, headers=AUTH)
        assert (got.status_code, got.json["error"]["param"]) == (400, field)


def test_a_provider_that_fails_is_left_for_another(pair):
    talk = pair("responses", {"chat": lambda _: Reply(500, {}), "messages": speak(SAYS_SUMMARY)})
    got = post(talk, "/v1/responses", input=[*HISTORY, TRIGGER], stream=True)
    (item,) = responses_collect(got.data)["output"]
    assert SUMMARY in item["encrypted_content"]


def unfit(kind: str) -> Any:
    """A provider that answers, but with no summary."""

    def answer(request: Any) -> Reply:
        said = {"refusal": "I cannot."} if kind == "refusal" else {}
        said |= {"reasoning_content": "Hm."} if kind == "thought" else {}
        said |= {"content": "The us"} if kind == "filter" else {}
        finish = "content_filter" if kind == "filter" else "stop"
        if request.json.get("stream"):
            return Stream(chunks=[delta(**said), delta(finish), usage_chunk()])
        whole = completion(None, **said)
        whole["choices"][0]["finish_reason"] = finish
        return Reply(200, whole)

    return answer


@BOTH
@pytest.mark.parametrize("kind", ["refusal", "filter", "thought"])
def test_what_is_no_summary_never_takes_the_place_of_a_history(pair, kind, stream):
    talk = pair("responses", {"chat": unfit(kind), "messages": speak(SAYS_SUMMARY)})
    for path in ("/v1/responses", "/v1/responses/compact"):
        body = {"model": "fireworks/chat-mock", "input": [*HISTORY, TRIGGER], "stream": stream}
        got = post(talk, path, **body)
        response = got.json if got.is_json else responses_collect(got.data)
        assert SUMMARY in response["output"][-1]["encrypted_content"]
    alone = pair("responses", {"chat": unfit(kind)})
    got = alone.http.post("/v1/responses", json={**ASKED, **body}, headers=AUTH)
    assert got.status_code in (400, 502, 503)
    assert "compaction" not in got.text


def test_the_sdk_reads_it(upstream, serve, tmp_path):
    openai = pytest.importorskip("openai")
    up = upstream(speak(SAYS_SUMMARY))
    live = serve(**provider("fireworks", f"{up.url}/v1", "chat-mock"))
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=AUTH["Authorization"].split()[-1])
    with client:
        made = client.responses.compact(model="hermes-router", input=HISTORY)
        assert made.object == "response.compaction"
        assert [item.type for item in made.output] == ["message", "message", "compaction"]
        items = [item.model_dump(exclude_none=True, warnings=False) for item in made.output]
        client.responses.create(model="hermes-router", input=[*items, HISTORY[6]])
    assert SUMMARY.splitlines()[1].encode() in up.requests[1].body
