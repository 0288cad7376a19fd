"""The official Anthropic SDK, unchanged, pointed at the router.

Most tests run twice: before a provider that speaks Chat (translated) and before one that speaks
Messages (passed through).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from desk import Desk as BareDesk
from desk import desks
from pydantic import BaseModel
from test_every_pair import (
    PIXEL,
    SCHEMA,
    SIGNATURE,
    USED,
    WEATHER,
    WIRES,
    Said,
    blocks,
    named,
    path_of,
    settings_of,
    speak,
)
from upstream import KEY, Hang, Reply, Request, Stream, chunks, sse

MODEL = "claude-mock"  # what the Messages provider serves; to the Chat provider it is unknown
HELLO = [{"role": "user", "content": "hello there"}]
TOOLS = [
    {"name": "get_weather", "description": "The weather in a city", "input_schema": SCHEMA},
    {"name": "get_time", "input_schema": {"type": "object", "properties": {}}},
]
THINKING = {"type": "enabled", "budget_tokens": 1024}
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Desk(BareDesk):
    def ask(self, stream: bool = False, **options: Any) -> Any:
        """The final message, whichever way it came."""
        options = {"model": MODEL, "max_tokens": 2048, "messages": HELLO, **options}
        if not stream:
            return self.client.messages.create(**options)
        with self.client.messages.stream(**options) as events:
            return events.get_final_message()


@pytest.fixture
def open_desk(upstream, serve, tmp_path) -> Iterator[Any]:
    """open_desk(wire, script, SETTING=...): a desk."""

    def connect(url, **options):
        return anthropic.Anthropic(base_url=url, **options)

    yield from desks(Desk, connect, upstream, serve, tmp_path)


@pytest.fixture(params=["chat", "messages"])
def desk(request, open_desk):
    """desk(script, SETTING=...): a desk before each kind of provider."""
    return lambda *script, **options: open_desk(request.param, *script, **options)


@pytest.fixture
def native(open_desk):
    """native(script): a desk before a provider that speaks Messages."""
    return lambda *script, **options: open_desk("messages", *script, **options)


@pytest.fixture
def translated(open_desk):
    """translated(script): a desk before a provider that speaks Chat."""
    return lambda *script, **options: open_desk("chat", *script, **options)


# --- messages ---------------------------------------------------------------------------------


@STREAMED
def test_a_message(desk, stream):
    at = desk(speak(Said("Grüezi ✓")))
    got = at.ask(stream, system="Be brief.", extra_body={"temperature": 0.5})
    assert (got.type, got.role, got.model) == ("message", "assistant", MODEL)
    assert [(block.type, block.text) for block in got.content] == [("text", "Grüezi ✓")]
    assert (got.stop_reason, got.stop_sequence) == ("end_turn", None)
    assert got.usage.input_tokens == USED.prompt - USED.cached
    assert got.usage.cache_read_input_tokens == USED.cached
    assert got.usage.output_tokens == USED.completion
    assert at.sent == [("system", "Be brief."), ("user", "hello there")]
    assert at.body["temperature"] == 0.5


def test_text_stream(desk):
    at = desk(speak(Said("one two three")))
    options = {"model": MODEL, "max_tokens": 100, "messages": HELLO}
    with at.client.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == "one two three"
        assert stream.get_final_text() == "one two three"
        assert stream.get_final_message().usage.output_tokens == USED.completion


def test_raw_events(desk):
    at = desk(speak(Said("hello")))
    options = {"model": MODEL, "max_tokens": 100, "messages": HELLO, "stream": True}
    events = list(at.client.messages.create(**options))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    start = events[0].message
    assert (start.model, start.content, start.stop_reason) == (MODEL, [], None)
    assert start.usage.input_tokens > 0


def test_the_length_is_told(desk):
    got = desk(speak(Said("This is cut", finish="length"))).ask(max_tokens=3)
    assert got.stop_reason == "max_tokens"


def test_stop_sequences(translated):
    at = translated(speak(Said("before")))
    got = at.ask(stop_sequences=["END", "FIN"], extra_body={"top_p": 0.9, "top_k": 40})
    assert at.body["stop"] == ["END", "FIN"]
    assert at.body["top_p"] == 0.9
    assert got.stop_reason in ("end_turn", "stop_sequence")


@STREAMED
def test_the_stop_sequence_that_was_met_is_named(native, stream):
    def answer(request: Request) -> Reply:
        reply = speak(Said("before"))(request)
        text = reply.payload().replace(b'"end_turn"', b'"stop_sequence"')
        text = text.replace(b'"stop_sequence": null', b'"stop_sequence": "END"')
        return Reply(200, text, reply.head_fields())

    got = native(answer).ask(stream, stop_sequences=["END"])
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", "END")


def test_a_refusal_without_content(native):
    def answer(request: Request) -> Reply:
        got = json.loads(speak(Said("x"))(request).payload())
        return Reply(200, {**got, "content": [], "stop_reason": "refusal"})

    got = native(answer).ask()
    assert (got.content, got.stop_reason) == ([], "refusal")


def test_a_content_filter_is_a_refusal(translated):
    def answer(request: Request) -> Reply:
        got = json.loads(speak(Said("I will not."))(request).payload())
        got["choices"][0]["finish_reason"] = "content_filter"
        return Reply(200, got)

    assert translated(answer).ask().stop_reason == "refusal"


def test_system_in_every_spelling(translated):
    at = translated(speak(Said("hello")))
    cached = {"type": "ephemeral"}
    system = [
        {"type": "text", "text": "Be brief."},
        {"type": "text", "text": "Be kind.", "cache_control": cached},
    ]
    talk = [*HELLO, {"role": "system", "content": "It is Monday."}]
    at.ask(system=system, messages=talk)
    said = "\n".join(turn[1] for turn in at.sent)
    for text in ("Be brief.", "Be kind.", "hello there", "It is Monday."):
        assert said.count(text) == 1
    assert b"cache_control" not in at.up.requests[0].body


# --- tools ------------------------------------------------------------------------------------

CALLS = Said("Let me see.", (WEATHER, ("get_weather", {"city": "Bern"})), "", "tool_calls")


@STREAMED
def test_parallel_tools_and_their_results(desk, stream):
    at = desk(speak(CALLS, Said("It is warm.")))
    first = at.ask(stream, tools=TOOLS)
    assert first.stop_reason == "tool_use"
    words, *uses = first.content
    assert (words.type, words.text) == ("text", "Let me see.")
    assert [(use.name, use.input) for use in uses] == list(CALLS.calls)
    assert len({use.id for use in uses}) == 2

    results = [
        {"type": "tool_result", "tool_use_id": use.id, "content": text}
        for use, text in zip(uses, ("21 °C", "19 °C"), strict=True)
    ]
    talk = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "and?"}]},
    ]
    second = at.ask(stream, tools=TOOLS, messages=talk)
    assert second.content[0].text == "It is warm."
    assert at.sent == [
        ("user", "hello there"),
        ("assistant", "Let me see."),
        *(("call", name, given) for name, given in CALLS.calls),
        ("result", "get_weather", "21 °C"),
        ("result", "get_weather", "19 °C"),
        ("user", "and?"),
    ]


def test_tool_input_arrives_in_pieces(desk):
    at = desk(speak(CALLS))
    seen: dict[int, str] = {}
    options = {"model": MODEL, "max_tokens": 100, "messages": HELLO, "tools": TOOLS}
    with at.client.messages.stream(**options) as stream:
        for event in stream:
            if event.type == "content_block_delta" and event.delta.type == "input_json_delta":
                seen[event.index] = seen.get(event.index, "") + event.delta.partial_json
        final = stream.get_final_message()
    assert [json.loads(text) for text in seen.values()] == [given for _, given in CALLS.calls]
    assert [block.type for block in final.content] == ["text", "tool_use", "tool_use"]


def test_tools_are_offered_as_functions(translated):
    at = translated(speak(Said("no")))
    at.ask(tools=TOOLS)
    first, second = (tool["function"] for tool in at.body["tools"])
    assert (first["name"], first["parameters"]) == ("get_weather", SCHEMA)
    assert first["description"] == "The weather in a city"
    assert second["name"] == "get_time"
    assert "input_schema" not in json.dumps(at.body)


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any"}, "required", None),
        ({"type": "none"}, "none", None),
        (
            {"type": "tool", "name": "get_time"},
            {"type": "function", "function": {"name": "get_time"}},
            None,
        ),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else None,
)
def test_tool_choice(translated, choice, expected, parallel):
    at = translated(speak(Said("no")))
    at.ask(tools=TOOLS, tool_choice=choice)
    assert at.body.get("tool_choice", "auto") == expected
    assert at.body.get("parallel_tool_calls") is parallel


def result_with_image(id: str) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    parts = [{"type": "text", "text": "The screen:"}, {"type": "image", "source": source}]
    return {"type": "tool_result", "tool_use_id": id, "content": parts}


def test_an_image_in_a_tool_result_is_not_lost(translated):
    at = translated(speak(Said("", (("get_time", {}),), "", "tool_calls"), Said("A pixel.")))
    first = at.ask(tools=TOOLS)
    talk = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result_with_image(first.content[0].id)]},
    ]
    assert at.ask(tools=TOOLS, messages=talk).content[0].text == "A pixel."
    result = next(turn for turn in at.body["messages"] if turn["role"] == "tool")
    assert "The screen:" in json.dumps(result["content"])
    assert at.up.requests[1].body.count(PIXEL.encode()) == 1
    assert f"data:image/png;base64,{PIXEL}" in at.up.requests[1].body.decode()


def test_a_failed_tool_is_told(translated):
    at = translated(speak(Said("", (("get_time", {}),), "", "tool_calls"), Said("Sorry.")))
    first = at.ask(tools=TOOLS)
    result = {"type": "tool_result", "tool_use_id": first.content[0].id, "is_error": True}
    talk = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [{**result, "content": "no such clock"}]},
    ]
    at.ask(tools=TOOLS, messages=talk)
    sent = next(turn for turn in at.body["messages"] if turn["role"] == "tool")
    assert "no such clock" in sent["content"]
    assert "is_error" not in sent  # Chat has no such member, and some providers refuse it


def test_images_and_documents(translated):
    at = translated(speak(Said("I see.")))
    url = "https://example.com/cat.png"
    data = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    plain = {"type": "text", "media_type": "text/plain", "data": "It was a dark night."}
    content = [
        {"type": "image", "source": data},
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "document", "title": "Novel", "source": plain},
        {"type": "text", "text": "What is this?"},
    ]
    at.ask(messages=[{"role": "user", "content": content}])
    parts = at.body["messages"][-1]["content"]
    pictures = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert pictures == [f"data:image/png;base64,{PIXEL}", url]
    assert "It was a dark night." in json.dumps(parts)
    assert parts[-1] == {"type": "text", "text": "What is this?"}


# --- thinking ---------------------------------------------------------------------------------

THOUGHTS = Said("", (WEATHER,), "I need the weather.", "tool_calls")


def next_turn(first: Any) -> list[dict[str, Any]]:
    """The conversation after a tool call, with everything the first answer held."""
    use = first.content[-1]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "21 °C"}
    answer = [block.model_dump(exclude_none=True) for block in first.content]
    return [
        *HELLO,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": [result]},
    ]


@STREAMED
def test_thinking_comes_out_and_goes_back(desk, stream):
    at = desk(speak(THOUGHTS, Said("21 °C")))
    first = at.ask(stream, tools=TOOLS, thinking=THINKING)
    thought, use = first.content
    assert (thought.type, thought.thinking) == ("thinking", THOUGHTS.reasoning)
    assert thought.signature
    assert use.type == "tool_use"
    at.ask(stream, tools=TOOLS, thinking=THINKING, messages=next_turn(first))
    if at.wire == "messages":
        back = at.body["messages"][1]["content"][0]
        expected = blocks(THOUGHTS, 0)[0]
        assert {name: back[name] for name in expected} == expected
    else:
        assert at.body["messages"][1]["reasoning_content"] == THOUGHTS.reasoning
        assert b"signature" not in at.up.requests[1].body


@STREAMED
def test_redacted_thinking_goes_back_as_it_came(native, stream):
    secret = {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3pzix/LafPsn4a"}

    def answer(request: Request) -> Reply:
        if not request.json.get("stream"):
            got = json.loads(speak(THOUGHTS)(request).payload())
            return Reply(200, {**got, "content": [secret, *got["content"]]})
        start = {"type": "content_block_start", "index": 0, "content_block": secret}
        stop = {"type": "content_block_stop", "index": 0}
        events = list(speak(THOUGHTS)(request).pieces())
        shifted = [event.replace(b'"index": 1', b'"index": 2') for event in events[1:]]
        shifted = [event.replace(b'"index": 0', b'"index": 1') for event in shifted]
        return Stream(chunks=[events[0], named(start), named(stop), *shifted], done=False)

    at = native(answer)
    first = at.ask(stream, tools=TOOLS, thinking=THINKING)
    assert [block.type for block in first.content] == ["redacted_thinking", "thinking", "tool_use"]
    at.ask(stream, tools=TOOLS, thinking=THINKING, messages=next_turn(first))
    assert at.body["messages"][1]["content"][0] == secret


def test_a_foreign_signature_never_reaches_a_provider(upstream, serve, tmp_path):
    chat = upstream(speak(THOUGHTS, Said("done")))
    claude = upstream(speak(Said("done"), THOUGHTS))
    rows = settings_of(WIRES["chat"], f"{chat.url}/v1", tmp_path)
    rows.update(settings_of(WIRES["messages"], f"{claude.url}/v1", tmp_path))
    ids = {"chat": "fireworks/chat-mock", "messages": f"anthropic/{MODEL}"}
    options = {"tools": TOOLS, "thinking": THINKING, "max_tokens": 2048}
    with anthropic.Anthropic(base_url=serve(**rows).url, api_key=KEY, max_retries=0) as client:
        for first, second in (("chat", "messages"), ("messages", "chat")):
            said = client.messages.create(model=ids[first], messages=HELLO, **options)
            client.messages.create(model=ids[second], messages=next_turn(said), **options)
    assert b"signature" not in chat.requests[-1].body
    assert SIGNATURE.encode() not in chat.requests[-1].body
    assert b"hr1." not in claude.requests[0].body
    assert b'"thinking":"I need' not in claude.requests[0].body.replace(b": ", b":")


def test_an_invalid_signature_is_healed_or_told(native):
    words = "messages.1.content.0: Invalid `signature` in `thinking` block"
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": words}}
    script = speak(THOUGHTS, Said("healed"))

    def answer(request: Request) -> Reply:
        return Reply(400, error) if b"signature" in request.body else script(request)

    at = native(answer)
    first = at.ask(tools=TOOLS, thinking=THINKING)
    try:  # Claude Code drops old thinking by itself when it reads these words
        got = at.ask(tools=TOOLS, thinking=THINKING, messages=next_turn(first))
    except anthropic.BadRequestError as caught:
        assert words in caught.message
    else:
        assert got.content[-1].text == "healed"


# --- structured output ------------------------------------------------------------------------


class City(BaseModel):
    name: str
    people: int


def test_structured_output(translated):
    at = translated(speak(Said('{"name": "Zürich", "people": 434000}')))
    options = {"model": MODEL, "max_tokens": 100, "messages": HELLO}
    got = at.client.messages.parse(output_format=City, **options)
    assert got.parsed_output == City(name="Zürich", people=434_000)
    wanted = at.body["response_format"]
    assert wanted["type"] == "json_schema"
    assert set(wanted["json_schema"]["schema"]["properties"]) == {"name", "people"}


# --- passed through ---------------------------------------------------------------------------

ODD = (
    '{ "model" :"MODEL","max_tokens":100,  "temperature":1.0, "messages":[{"role":"user",'
    '"content":[{"type":"text","text":"Gr\\u00fcezi \\/ \\ud83d\\ude42","cache_control":'
    '{"type":"ephemeral","ttl":"1h"}}]}],"thinking":{"type":"disabled"},"made_up":[null,{ }],'
    '"context_management":{"edits":[]},"stream":STREAM\n}\r\n'
)


@STREAMED
@pytest.mark.parametrize("model", [MODEL, "hermes-router", f"anthropic/{MODEL}"])
def test_a_native_request_keeps_its_bytes(native, model, stream):
    at = native(speak(Said("hello")))
    raw = ODD.replace("STREAM", "true" if stream else "false")
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "context-1m-2025-08-07,effort-2025-11-24",
        "content-type": "application/json",
    }
    url = f"{at.live.url}/v1/messages?beta=true"
    got = at.live.session.post(url, raw.replace("MODEL", model).encode(), headers=headers)
    assert got.status_code == 200, got.text
    seen = at.up.requests[0]
    assert seen.body == raw.replace("MODEL", MODEL).encode()
    assert seen.headers["anthropic-beta"] == headers["anthropic-beta"]
    assert seen.headers["anthropic-version"] == "2023-06-01"
    assert seen.headers["x-api-key"] == "anthropic-key-1"
    assert KEY not in json.dumps(seen.headers)


@STREAMED
def test_a_native_answer_keeps_its_bytes(native, stream):
    sent: list[bytes] = []

    def answer(request: Request) -> Reply:
        reply = speak(CALLS)(request)
        sent.append(reply.payload().replace(b"}\n\n", b"     }\n\n"))  # as Anthropic pads them
        return Reply(200, sent[-1], reply.head_fields())

    at = native(answer)
    body = {"model": MODEL, "max_tokens": 99, "messages": HELLO, "stream": stream}
    got = at.live.session.post(f"{at.live.url}/v1/messages", json=body)
    assert got.content == sent[0]


def test_beta_messages(desk):
    at = desk(speak(Said("hello")))
    options = {"model": MODEL, "max_tokens": 100, "messages": HELLO}
    got = at.client.beta.messages.create(betas=["first-2026-01-01", "other-2026-02-02"], **options)
    assert got.content[0].text == "hello"
    header = at.up.requests[0].headers.get("anthropic-beta", "")
    if at.wire == "messages":
        assert {"first-2026-01-01", "other-2026-02-02"} <= set(header.split(","))
    else:
        assert header == ""


@STREAMED
def test_what_agents_send_is_tolerated(desk, stream):
    at = desk(speak(Said("hello")))
    user = json.dumps({"device_id": "d", "account_uuid": "", "session_id": "s"})
    more = {
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "thinking": {"type": "adaptive"},
        "made_up": {"a": [1]},
    }
    tools = [{**TOOLS[0], "made_up": 1, "defer_loading": False, "input_examples": []}]
    got = at.ask(stream, extra_body=more, metadata={"user_id": user}, tools=tools)
    assert got.content[-1].text == "hello"
    if at.wire == "chat":
        for name in (b"context_management", b"output_config", b"made_up", b"defer_loading"):
            assert name not in at.up.requests[0].body
        assert at.body["reasoning_effort"] == "high"


# --- tokens and models ------------------------------------------------------------------------


def test_count_tokens(translated):
    at = translated(speak(Said("hello")))

    def count(**options: Any) -> int:
        options = {"model": MODEL, "messages": HELLO, **options}
        return at.client.messages.count_tokens(**options).input_tokens

    plain = count()
    assert 0 < plain < 50
    assert count(system="word " * 200) >= plain + 150
    assert count(tools=TOOLS) >= plain + 20
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "word " * 200}}
    asked_back = [*HELLO, {"role": "assistant", "content": [use]}]
    assert count(messages=asked_back) >= plain + 150
    result = {"role": "user", "content": [result_with_image("t1")]}
    assert count(messages=[*asked_back, result]) > count(messages=asked_back)
    thought = {"type": "thinking", "thinking": "hm " * 200, "signature": "x"}
    seen = [*HELLO, {"role": "assistant", "content": [thought]}]
    assert count(messages=seen) >= plain  # old thinking may count or not, but never fails
    assert not at.up.requests


def test_count_tokens_of_a_native_model(native):
    def answer(request: Request) -> Reply:
        assert path_of(request).endswith("/count_tokens")
        return Reply(200, {"input_tokens": 1234})

    at = native(answer)
    got = at.client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
    assert got == 1234 if at.up.requests else 0 < got < 50


def test_count_tokens_survives_a_provider_that_cannot(native):
    error = {"type": "error", "error": {"type": "not_found_error", "message": "Not found"}}
    at = native(Reply(404, error))
    assert at.client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens > 0


def test_models_look_as_anthropic_lists_them(desk):
    at = desk(speak(Said("hello")))
    page = at.client.models.list(limit=1000)
    ids = [model.id for model in page.data]
    assert "hermes-router" in ids
    assert len(set(ids)) == len(ids)
    assert {model.type for model in page.data} == {"model"}
    assert all(model.display_name and model.created_at for model in page.data)
    assert page.has_more is False
    assert (page.first_id, page.last_id) == (ids[0], ids[-1])
    assert at.client.models.retrieve("hermes-router").id == "hermes-router"


# --- errors -----------------------------------------------------------------------------------


def check_shape(caught: Any, kind: str) -> None:
    """The error as Anthropic writes it."""
    error = caught.value
    assert error.body["type"] == "error"
    assert (error.body["error"]["type"], error.type) == (kind, kind)
    assert error.body["error"]["message"]
    assert error.body["request_id"]


@pytest.mark.parametrize("how", ["x-api-key", "bearer"])
def test_both_ways_to_send_the_key(translated, how):
    at = translated(speak(Said("hello")))
    options = {"api_key": KEY} if how == "x-api-key" else {"auth_token": KEY}
    with anthropic.Anthropic(base_url=at.live.url, max_retries=0, **options) as client:
        got = client.messages.create(model=MODEL, max_tokens=9, messages=HELLO)
    assert got.content[0].text == "hello"


@STREAMED
def test_authentication_error(desk, stream):
    at = desk(speak(Said("hello")), key="sk-wrong")
    with pytest.raises(anthropic.AuthenticationError) as caught:
        at.ask(stream)
    check_shape(caught, "authentication_error")
    with pytest.raises(anthropic.AuthenticationError):
        at.client.messages.count_tokens(model=MODEL, messages=HELLO)
    assert not at.up.requests


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": 3}]}]},
        {"tools": [{"input_schema": {}}]},
        {"tool_choice": {"type": "sometimes"}},
    ],
    ids=json.dumps,
)
def test_bad_request_error(translated, wrong):
    at = translated(speak(Said("hello")))
    with pytest.raises(anthropic.BadRequestError) as caught:
        at.ask(extra_body=wrong)
    check_shape(caught, "invalid_request_error")
    assert next(iter(wrong)) in caught.value.message
    assert not at.up.requests


@STREAMED
def test_bad_request_of_the_provider(desk, stream):
    reason = {"message": "top_k: must be positive", "type": "invalid_request_error"}
    at = desk(Reply(400, {"type": "error", "error": reason}))
    with pytest.raises(anthropic.BadRequestError) as caught:
        at.ask(stream)
    check_shape(caught, "invalid_request_error")
    assert "top_k: must be positive" in caught.value.message


OVERFLOWS = {
    "chat": "This model's maximum context length is 200000 tokens. However, your messages "
    "resulted in 250000 tokens. Please reduce the length of the messages.",
    "messages": "prompt is too long: 250000 tokens > 200000 maximum",
}


@STREAMED
def test_an_overflow_makes_the_client_compact(desk, stream):
    def answer(request: Request) -> Reply:
        kind = "messages" if path_of(request).endswith("/messages") else "chat"
        error = {"message": OVERFLOWS[kind], "type": "invalid_request_error"}
        if kind == "chat":
            return Reply(400, {"error": {**error, "code": "context_length_exceeded"}})
        return Reply(400, {"type": "error", "error": error})

    with pytest.raises(anthropic.BadRequestError) as caught:
        desk(answer).ask(stream)
    check_shape(caught, "invalid_request_error")
    assert OVERFLOWS["messages"] in caught.value.message


def test_too_large_an_output_makes_the_client_ask_for_less(native):
    words = "input length and `max_tokens` exceed context limit: 190000 + 64000 > 200000"
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": words}}
    script = speak(Said("hello"))

    def answer(request: Request) -> Reply:
        return script(request) if request.json["max_tokens"] <= 10_000 else Reply(400, error)

    at = native(answer)
    try:  # the router may lower max_tokens itself
        assert at.ask(True, max_tokens=64_000).content[0].text == "hello"
    except anthropic.BadRequestError as caught:
        assert words in caught.message


@STREAMED
def test_rate_limit_error(desk, stream):
    error = {"message": "Rate limit reached", "type": "rate_limit_error"}
    at = desk(Reply(429, {"type": "error", "error": error}, {"Retry-After": "33"}))
    with pytest.raises(anthropic.RateLimitError) as caught:
        at.ask(stream)
    check_shape(caught, "rate_limit_error")
    assert 31 <= int(caught.value.response.headers["retry-after"]) <= 34


@STREAMED
@pytest.mark.parametrize("status", [500, 503, 529])
def test_a_provider_that_is_overloaded(desk, status, stream):
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    with pytest.raises(anthropic.InternalServerError) as caught:
        desk(Reply(status, error)).ask(stream)
    assert caught.value.status_code in (503, 529)
    assert caught.value.type in ("api_error", "overloaded_error")
    check_shape(caught, caught.value.type)


def test_not_found_error(translated):
    at = translated(speak(Said("hello")))
    with pytest.raises(anthropic.NotFoundError) as caught:
        at.client.models.retrieve("no-such-model")
    check_shape(caught, "not_found_error")


OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}


def breaks_off(request: Request) -> Stream:
    """A stream that says a word and then an error."""
    if path_of(request).endswith("/messages"):
        events = list(speak(Said("half an answer"))(request).pieces())
        return Stream(chunks=[*events[:5], named(OVERLOADED)], done=False)
    failing = [*chunks("half ", "an ")[:3], {"error": {"message": "Overloaded", "code": 503}}]
    return Stream(chunks=failing, done=False)


def ends_early(request: Request) -> Stream:
    """A stream that just stops."""
    if path_of(request).endswith("/messages"):
        events = list(speak(Said("half an answer"))(request).pieces())
        return Stream(chunks=events[:5], done=False)
    return Stream(chunks=[sse(event) for event in chunks("half ", "an ")[:3]], done=False)


@pytest.mark.parametrize("fault", [breaks_off, ends_early])
def test_an_error_in_the_middle_of_a_stream_is_raised(desk, fault):
    at = desk(fault)
    seen = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        options = {"model": MODEL, "max_tokens": 99, "messages": HELLO, "stream": True}
        seen.extend(event.type for event in at.client.messages.create(**options))
    assert caught.value.type in ("api_error", "overloaded_error")
    assert "content_block_delta" in seen
    assert not {"message_delta", "message_stop"} & set(seen)


def test_events_without_a_name_get_one(desk):
    """The SDK goes by names; a provider that leaves them out would be heard by nobody."""

    def answer(request: Request) -> Stream:
        pieces = speak(Said("one two three"))(request).pieces()
        return Stream(
            chunks=[b"data:" + piece.partition(b"data:")[2] for piece in pieces], done=False
        )

    told = desk(answer).ask(True)
    assert [block.text for block in told.content] == ["one two three"]


def test_a_silent_provider_times_out(desk):
    at = desk(Hang(30), TTFT_TIMEOUT="0.5")
    with pytest.raises(anthropic.InternalServerError):
        at.ask(True)


def test_a_stream_may_be_left_early(desk):
    def answer(request: Request) -> Stream:
        pieces = list(speak(Said("one two three"))(request).pieces())
        return Stream(chunks=pieces, done=False, hold_after=6)

    at = desk(answer)
    options = {"model": MODEL, "max_tokens": 99, "messages": HELLO}
    with at.client.messages.stream(**options) as stream:
        for text in stream.text_stream:
            assert text
            break
    assert at.up.requests[0].closed.wait(5)


# --- asynchronous -----------------------------------------------------------------------------


def test_async_message_and_stream(desk):
    at = desk(speak(Said("hello")))
    options = {"model": MODEL, "max_tokens": 99, "messages": HELLO}

    async def talk() -> tuple[str, str]:
        base = {"base_url": at.live.url, "api_key": KEY, "max_retries": 0}
        async with anthropic.AsyncAnthropic(**base) as client:
            whole = await client.messages.create(**options)
            async with client.messages.stream(**options) as stream:
                return whole.content[0].text, await stream.get_final_text()

    assert asyncio.run(talk()) == ("hello", "hello")
