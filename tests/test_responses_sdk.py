"""The official OpenAI SDK's `responses` (and legacy `completions`), pointed at the router.

`desk` tests run before a provider that speaks Chat, one that speaks Messages, and OpenAI itself,
one of whose models (RESPONSES_MODEL) is served on /responses only.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from desk import Desk as BareDesk
from desk import desks
from pydantic import BaseModel
from test_every_pair import (
    PIXEL,
    SCHEMA,
    USED,
    WEATHER,
    Said,
    named,
    path_of,
    responses_collect,
    speak,
)
from upstream import AUTH, KEY, Reply, Request, Stream, chunks

MODEL = "hermes-router"
WEATHER_TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": SCHEMA,
    "strict": False,
}
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Desk(BareDesk):
    def ask(self, input: Any = "hello there", *, stream: bool = False, **options: Any) -> Any:
        """The final response, whichever way it came."""
        options = {"model": MODEL, "input": input, **options}
        if not stream:
            return self.client.responses.create(**options)
        with self.client.responses.stream(**options) as events:
            return events.get_final_response()

    def last_event(self, **options: Any) -> Any:
        """How a stream ended: its terminal event, or the error it was refused with."""
        options = {"model": MODEL, "input": "hello there", "stream": True, **options}
        try:
            return list(self.client.responses.create(**options))[-1]
        except openai.APIError as error:
            return error


@pytest.fixture
def open_desk(upstream, serve, tmp_path) -> Iterator[Any]:
    """open_desk(wire, script, SETTING=...): a desk."""

    def connect(url, **options):
        return openai.OpenAI(base_url=f"{url}/v1", **options)

    yield from desks(Desk, connect, upstream, serve, tmp_path)


@pytest.fixture(params=["chat", "messages", "responses"])
def desk(request, open_desk):
    """desk(script, SETTING=...): a desk before each kind of provider."""
    return lambda *script, **options: open_desk(request.param, *script, **options)


@pytest.fixture
def translated(open_desk):
    """translated(script): a desk before a provider that speaks Chat."""
    return lambda *script, **options: open_desk("chat", *script, **options)


# --- responses --------------------------------------------------------------------------------


@STREAMED
def test_a_response(desk, stream):
    at = desk(speak(Said("Grüezi ✓")))
    got = at.ask(stream=stream, instructions="Be brief.", temperature=0.5, max_output_tokens=99)
    assert (got.object, got.status, got.error) == ("response", "completed", None)
    assert got.output_text == "Grüezi ✓"
    assert [item.type for item in got.output] == ["message"]
    assert got.instructions == "Be brief."
    assert got.id.startswith("resp_")
    assert got.usage.input_tokens == USED.prompt
    assert got.usage.input_tokens_details.cached_tokens == USED.cached
    assert got.usage.output_tokens == USED.completion
    assert got.usage.total_tokens == USED.total
    assert at.sent == [("system", "Be brief."), ("user", "hello there")]
    if at.wire == "chat":  # reasoning models of OpenAI and new ones of Anthropic take none
        assert at.body["temperature"] == 0.5


def test_events_in_order(desk):
    at = desk(speak(Said("one two three")))
    events = list(at.client.responses.create(model=MODEL, input="hello", stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type.endswith("text.delta"))
    assert text == "one two three"
    assert {events[0].response.id, events[1].response.id} == {events[-1].response.id}


def test_every_spelling_of_input(desk):
    at = desk(speak(Said("hello")))
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "two", "annotations": []}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "three"}]},
    ]
    assert at.ask(talk).output_text == "hello"
    assert at.sent == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
    ]


def test_a_request_without_a_model(translated):
    at = translated(speak(Said("hello")))
    got = at.client.responses.create(input="hello there")
    assert got.output_text == "hello"


def test_what_clients_add_is_tolerated(translated):
    at = translated(speak(Said("hello")))
    got = at.ask(
        metadata={"run": "7"},
        truncation="auto",
        include=["reasoning.encrypted_content"],
        prompt_cache_key="session-1",
        service_tier="auto",
        extra_body={"client_metadata": {"thread_id": "t"}, "made_up": [1], "user": "me"},
    )
    assert got.metadata == {"run": "7"}
    for name in (b"client_metadata", b"made_up", b"truncation", b"include"):
        assert name not in at.up.requests[0].body.replace(b"include_usage", b"")


def test_the_length_is_told(desk):
    got = desk(speak(Said("This is cut", finish="length"))).ask(max_output_tokens=16)
    assert got.status == "incomplete"
    assert got.incomplete_details.reason == "max_output_tokens"
    assert got.output_text == "This is cut"


# --- tools ------------------------------------------------------------------------------------

CALLS = Said("Let me see.", (WEATHER, ("get_weather", {"city": "Bern"})), "", "tool_calls")


@STREAMED
def test_parallel_tools_and_their_results(desk, stream):
    at = desk(speak(CALLS, Said("It is warm.")))
    first = at.ask(stream=stream, tools=[WEATHER_TOOL], tool_choice="auto")
    words, *calls = first.output
    assert words.content[0].text == "Let me see."
    assert [(call.name, json.loads(call.arguments)) for call in calls] == list(CALLS.calls)
    assert len({call.call_id for call in calls}) == len({call.id for call in calls}) == 2
    outputs = [
        {"type": "function_call_output", "call_id": call.call_id, "output": text}
        for call, text in zip(calls, ("21 °C", "19 °C"), strict=True)
    ]
    talk = [{"role": "user", "content": "hello there"}, *first.output, *outputs]
    second = at.ask(talk, stream=stream, tools=[WEATHER_TOOL])
    assert second.output_text == "It is warm."
    assert at.sent == [
        ("user", "hello there"),
        ("assistant", "Let me see."),
        *(("call", name, given) for name, given in CALLS.calls),
        ("result", "get_weather", "21 °C"),
        ("result", "get_weather", "19 °C"),
    ]


def test_argument_deltas(desk):
    at = desk(speak(CALLS))
    options = {"model": MODEL, "input": "hello", "tools": [WEATHER_TOOL], "stream": True}
    events = list(at.client.responses.create(**options))
    seen: dict[str, str] = {}
    for event in events:
        if event.type == "response.function_call_arguments.delta":
            seen[event.item_id] = seen.get(event.item_id, "") + event.delta
    ended = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert seen == {event.item_id: event.arguments for event in ended}
    assert [json.loads(text) for text in seen.values()] == [given for _, given in CALLS.calls]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", "none"),
        ("required", "required"),
        (
            {"type": "function", "name": "get_weather"},
            {"type": "function", "function": {"name": "get_weather"}},
        ),
    ],
    ids=["none", "required", "function"],
)
def test_tool_choice(translated, choice, expected):
    at = translated(speak(Said("no")))
    at.ask(tools=[WEATHER_TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert at.body["tool_choice"] == expected
    assert at.body["parallel_tool_calls"] is False
    assert at.body["tools"][0]["function"]["parameters"] == SCHEMA


PATCH = '*** Begin Patch\n*** Add File: "hello".txt\n+hi ✓\n*** End Patch\n'
PATCH_TOOL = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}


def call_offered(name: str, given: Any = None) -> Callable[[Request], Reply]:
    """A Chat provider that calls the offered tool whose name holds `name`.

    given None: its only parameter, a string, gets PATCH.
    """

    def answer(request: Request) -> Reply:
        offered = [tool["function"] for tool in request.json["tools"]]
        tool = next(one for one in offered if name in one["name"])
        arguments = given
        if arguments is None:
            (only,) = tool["parameters"]["properties"]
            assert tool["parameters"]["properties"][only]["type"] == "string"
            arguments = {only: PATCH}
        return speak(Said("", ((tool["name"], arguments),), "", "tool_calls"))(request)

    return answer


@STREAMED
def test_a_custom_tool(translated, stream):
    at = translated(call_offered("apply_patch"), speak(Said("patched")))
    first = at.ask(stream=stream, tools=[PATCH_TOOL])
    (call,) = first.output
    assert (call.type, call.name, call.input) == ("custom_tool_call", "apply_patch", PATCH)
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "Done"}
    talk = [{"role": "user", "content": "hello"}, call, result]
    assert at.ask(talk, stream=stream, tools=[PATCH_TOOL]).output_text == "patched"
    user, called, told = at.sent
    assert (user, told) == (("user", "hello"), ("result", "apply_patch", "Done"))
    assert called[:2] == ("call", "apply_patch")
    assert list(called[2].values()) == [PATCH]


def test_the_input_of_a_custom_tool_is_streamed(translated):
    at = translated(call_offered("apply_patch"))
    options = {"model": MODEL, "input": "hello", "tools": [PATCH_TOOL], "stream": True}
    events = list(at.client.responses.create(**options))
    name = "response.custom_tool_call_input"
    pieces = [event.delta for event in events if event.type == f"{name}.delta"]
    assert "".join(pieces) == PATCH
    assert [event.input for event in events if event.type == f"{name}.done"] == [PATCH]


@STREAMED
def test_a_tool_of_a_namespace(translated, stream):
    inner = {**WEATHER_TOOL, "name": "list_agents"}
    space = {"type": "namespace", "name": "collaboration", "description": "x", "tools": [inner]}
    at = translated(call_offered("list_agents", {"city": "Bern"}), speak(Said("two agents")))
    first = at.ask(stream=stream, tools=[space, WEATHER_TOOL])
    offered = [tool["function"]["name"] for tool in at.body["tools"]]
    assert len(offered) == 2
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,64}", name) for name in offered)
    call = first.output[0].model_dump(exclude_none=True)
    # Codex 0.169 knows a tool only by both: the bare name beside its namespace.
    assert (call["name"], call["namespace"]) == ("list_agents", "collaboration")
    assert json.loads(call["arguments"]) == {"city": "Bern"}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "two"}
    talk = [{"role": "user", "content": "hello"}, call, result]
    at.ask(talk, stream=stream, tools=[space, WEATHER_TOOL])
    name = next(one for one in offered if "list_agents" in one)
    assert at.sent[1:] == [("call", name, {"city": "Bern"}), ("result", name, "two")]


def test_a_long_name_in_a_namespace_stays_short_enough(translated):
    inner = [{**WEATHER_TOOL, "name": "x" * 50 + end} for end in ("_one", "_two")]
    space = {"type": "namespace", "name": "n" * 40, "description": "x", "tools": inner}
    at = translated(speak(Said("no")))
    at.ask(tools=[space])
    offered = [tool["function"]["name"] for tool in at.body["tools"]]
    assert len(set(offered)) == 2
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,64}", name) for name in offered)


def test_tools_that_only_openai_has_are_left_out(translated):
    """Codex offers web_search and tool_search with every request."""
    at = translated(speak(Said("hello")))
    search = {"type": "tool_search", "execution": "client", "parameters": {"type": "object"}}
    web = {"type": "web_search", "external_web_access": True}
    assert at.ask(tools=[WEATHER_TOOL, search, web]).output_text == "hello"
    offered = [tool["function"]["name"] for tool in at.body["tools"]]
    assert offered[0] == "get_weather"
    assert "web_search" not in offered


def test_tools_in_an_input_item(translated):
    """How Codex offers its tools to newer models: no `tools` at all."""
    inner = {"type": "namespace", "name": "functions", "description": "", "tools": [PATCH_TOOL]}
    item = {"type": "additional_tools", "id": "at_1", "role": "developer", "tools": [inner]}
    at = translated(call_offered("apply_patch"))
    got = at.ask([item, {"role": "user", "content": "hello"}])
    assert (got.output[0].type, got.output[0].name) == ("custom_tool_call", "apply_patch")
    assert got.output[0].input == PATCH


# --- images, files, structured output ---------------------------------------------------------


def test_images(desk):
    at = desk(speak(Said("A pixel.")))
    parts = [
        {"type": "input_text", "text": "What is this?"},
        {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "detail": "low"},
    ]
    assert at.ask([{"role": "user", "content": parts}]).output_text == "A pixel."
    assert at.sent == [("user", "What is this?"), ("image", "image/png", PIXEL)]


def test_an_image_in_a_tool_result_is_not_lost(desk):
    at = desk(speak(CALLS, Said("A pixel.")))
    first = at.ask(tools=[WEATHER_TOOL])
    picture = {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}"}
    calls = [item for item in first.output if item.type == "function_call"]
    outputs = [
        {"type": "function_call_output", "call_id": call.call_id, "output": [picture]}
        for call in calls[:1]
    ]
    rest = {"type": "function_call_output", "call_id": calls[1].call_id, "output": "no picture"}
    talk = [{"role": "user", "content": "hello"}, *first.output, *outputs, rest]
    assert at.ask(talk, tools=[WEATHER_TOOL]).output_text == "A pixel."
    assert at.up.requests[1].body.count(PIXEL.encode()) == 1


class City(BaseModel):
    name: str
    people: int


CITY = '{"name": "Zürich", "people": 434000}'


def test_structured_output(desk):
    at = desk(speak(Said(CITY)))
    got = at.client.responses.parse(model=MODEL, input="hello", text_format=City)
    assert got.output_parsed == City(name="Zürich", people=434_000)
    if at.wire == "chat":
        wanted = at.body["response_format"]
        assert (wanted["type"], wanted["json_schema"]["name"]) == ("json_schema", "City")
        assert set(wanted["json_schema"]["schema"]["required"]) == {"name", "people"}


def test_structured_output_streamed(desk):
    at = desk(speak(Said(CITY)))
    options = {"model": MODEL, "input": "hello", "text_format": City}
    with at.client.responses.stream(**options) as stream:
        final = stream.get_final_response()
    assert final.output_parsed == City(name="Zürich", people=434_000)


def test_json_mode(translated):
    at = translated(speak(Said("{}")))
    at.ask(text={"format": {"type": "json_object"}, "verbosity": "low"})
    assert at.body["response_format"] == {"type": "json_object"}


# --- reasoning --------------------------------------------------------------------------------

THOUGHTS = Said("", (WEATHER,), "I need the weather.", "tool_calls")


@STREAMED
def test_reasoning_comes_out_and_goes_back(desk, stream):
    at = desk(speak(THOUGHTS, Said("21 °C")))
    options = {
        "tools": [WEATHER_TOOL],
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "store": False,
    }
    first = at.ask(stream=stream, **options)
    thought, call = first.output
    assert thought.type == "reasoning"
    assert "".join(part.text for part in thought.summary) == THOUGHTS.reasoning
    assert thought.encrypted_content
    if at.wire == "chat":
        assert at.body["reasoning_effort"] == "low"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21 °C"}
    talk = [{"role": "user", "content": "hello"}, *first.output, result]
    assert at.ask(talk, stream=stream, **options).output_text == "21 °C"
    assert THOUGHTS.reasoning.encode() in at.up.requests[1].body
    assert b"hr1." not in at.up.requests[1].body


def test_reasoning_deltas(desk):
    at = desk(speak(Said("42", reasoning="Six times seven.")))
    reasoning = {"effort": "low", "summary": "auto"}
    options = {"model": MODEL, "input": "hello", "stream": True, "reasoning": reasoning}
    events = list(at.client.responses.create(**options))
    name = "response.reasoning_summary_text.delta"
    assert "".join(e.delta for e in events if e.type == name) == "Six times seven."
    assert events[-1].response.output_text == "42"


# --- kept responses ---------------------------------------------------------------------------


@STREAMED
def test_a_response_is_kept(translated, stream):
    at = translated(speak(Said("hello")))
    made = at.ask(stream=stream)
    got = at.client.responses.retrieve(made.id)
    assert (got.id, got.output_text, got.status) == (made.id, "hello", "completed")
    assert got.usage == made.usage
    at.client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        at.client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        at.client.responses.delete(made.id)


def test_a_response_is_not_kept_against_the_clients_will(translated):
    at = translated(speak(Said("hello")))
    made = at.ask(store=False)
    with pytest.raises(openai.NotFoundError):
        at.client.responses.retrieve(made.id)


def test_nobody_else_reads_a_kept_response(translated):
    at = translated(speak(Said("hello")), PROXY_API_KEYS=f"{KEY},sk-other")
    made = at.ask()
    base = f"{at.live.url}/v1"
    with openai.OpenAI(base_url=base, api_key="sk-other", max_retries=0) as other:
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.delete(made.id)
        with pytest.raises(openai.APIStatusError):
            other.responses.create(model=MODEL, input="and?", previous_response_id=made.id)
    assert at.client.responses.retrieve(made.id).id == made.id


@STREAMED
@pytest.mark.parametrize("wire", ["chat", "messages"])
def test_a_conversation_goes_on_from_a_kept_response(open_desk, wire, stream):
    at = open_desk(wire, speak(Said("one"), CALLS, Said("three")))
    options = {"tools": [WEATHER_TOOL], "stream": stream}
    first = at.ask("first?", instructions="Forgotten.", **options)
    second = at.ask("second?", previous_response_id=first.id, **options)
    assert second.previous_response_id == first.id
    outputs = [
        {"type": "function_call_output", "call_id": call.call_id, "output": text}
        for call, text in zip(second.output[1:], ("21 °C", "19 °C"), strict=True)
    ]
    third = at.ask(outputs, previous_response_id=second.id, instructions="Be brief.", **options)
    assert third.output_text == "three"
    assert at.sent == [
        ("system", "Be brief."),  # instructions are not carried over
        ("user", "first?"),
        ("assistant", "one"),
        ("user", "second?"),
        ("assistant", "Let me see."),
        *(("call", name, given) for name, given in CALLS.calls),
        ("result", "get_weather", "21 °C"),
        ("result", "get_weather", "19 °C"),
    ]


def test_openai_itself_goes_on_from_a_kept_response(open_desk):
    at = open_desk("responses", speak(Said("one"), Said("two")))
    first = at.ask("first?")
    assert at.ask("second?", previous_response_id=first.id).output_text == "two"
    if not at.body.get("previous_response_id"):
        assert at.sent == [("user", "first?"), ("assistant", "one"), ("user", "second?")]


def test_a_previous_response_that_is_not_kept(translated):
    at = translated(speak(Said("hello")))
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        at.ask(previous_response_id="resp_0123456789")
    assert caught.value.code == "previous_response_not_found"
    assert not at.up.requests


# --- errors -----------------------------------------------------------------------------------


@STREAMED
def test_authentication_error(desk, stream):
    at = desk(speak(Said("hello")), key="sk-wrong")
    with pytest.raises(openai.AuthenticationError) as caught:
        at.ask(stream=stream)
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        at.client.responses.retrieve("resp_1")
    assert not at.up.requests


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": 3},
        {"input": [{"type": "no_such_item"}]},
        {"input": [{"role": "user", "content": [{"type": "no_such_part"}]}]},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "sometimes"},
    ],
    ids=json.dumps,
)
def test_bad_request_error(translated, wrong):
    at = translated(speak(Said("hello")))
    with pytest.raises(openai.BadRequestError) as caught:
        at.ask(extra_body=wrong)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param.startswith(next(iter(wrong)))
    assert not at.up.requests


def test_bad_request_of_the_provider(desk):
    reason = {"message": "input: must be nicer", "type": "invalid_request_error"}
    at = desk(Reply(400, {"type": "error", "error": reason}))
    with pytest.raises(openai.BadRequestError) as caught:
        at.ask()
    assert "input: must be nicer" in caught.value.message


LIMITED = Reply(429, {"error": {"message": "Rate limit reached"}}, {"Retry-After": "33"})


def test_rate_limit_error(desk):
    with pytest.raises(openai.RateLimitError) as caught:
        desk(LIMITED).ask()
    assert 31 <= int(caught.value.response.headers["retry-after"]) <= 34


def test_a_stream_is_told_of_a_rate_limit(desk):
    end = desk(LIMITED).last_event()
    if isinstance(end, openai.APIError):
        assert isinstance(end, openai.RateLimitError)
        assert 31 <= int(end.response.headers["retry-after"]) <= 34
    else:  # Codex waits as long as the words say
        assert (end.type, end.response.error.code) == ("response.failed", "rate_limit_exceeded")
        assert re.search(r"try again in \d+(\.\d+)? ?s", end.response.error.message)


TOO_LONG = {
    "message": "This model's maximum context length is 200000 tokens. However, your messages "
    "resulted in 250000 tokens. Please reduce the length of the messages.",
    "type": "invalid_request_error",
    "code": "context_length_exceeded",
}


def test_overflow(desk):
    with pytest.raises(openai.BadRequestError) as caught:
        desk(Reply(400, {"error": TOO_LONG})).ask()
    assert caught.value.code == "context_length_exceeded"


def test_codex_is_told_of_an_overflow_in_its_stream(desk):
    at = desk(Reply(400, {"error": TOO_LONG}))
    headers = {"originator": "codex_exec", "user-agent": "codex_exec/0.159.0 (Linux)"}
    end = at.last_event(extra_headers=headers, store=False)
    assert not isinstance(end, Exception), end
    assert end.type == "response.failed"
    assert end.response.error.code == "context_length_exceeded"
    assert end.response.status == "failed"


@STREAMED
def test_everything_fails(desk, stream):
    at = desk(Reply(500, {"error": {"message": "boom"}}))
    end = at.last_event(stream=stream) if stream else None
    if not stream:
        with pytest.raises(openai.InternalServerError):
            at.ask()
    elif isinstance(end, openai.APIError):
        assert isinstance(end, openai.InternalServerError)
    else:
        assert (end.type, end.response.status) == ("response.failed", "failed")


def breaks_off(request: Request) -> Stream:
    """A stream that says a word and then just stops."""
    if path_of(request).endswith("/chat/completions"):
        return Stream(chunks=chunks("half ", "an ")[:3], done=False)
    events = list(speak(Said("half an answer"))(request).pieces())
    return Stream(chunks=events[:6], done=False)


def reports_failure(request: Request) -> Stream:
    """A stream that says a word and then an error."""
    told = {"type": "server_error", "message": "boom", "code": "server_error"}
    if path_of(request).endswith("/chat/completions"):
        return Stream(chunks=[*chunks("half ", "an ")[:3], {"error": told}], done=False)
    events = list(speak(Said("half an answer"))(request).pieces())[:6]
    error = {"type": "error", "error": {"type": "api_error", "message": "boom"}}
    if path_of(request).endswith("/responses"):
        error = {"type": "error", "code": "server_error", "message": "boom", "sequence_number": 6}
    return Stream(chunks=[*events, named(error)], done=False)


@pytest.mark.parametrize("fault", [breaks_off, reports_failure])
def test_a_broken_stream_ends_with_response_failed(desk, fault):
    at = desk(fault)
    seen = []
    for event in at.client.responses.create(model=MODEL, input="hello", stream=True):
        seen.append(event)
    assert "response.output_text.delta" in {event.type for event in seen}
    last = seen[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code
    assert last.response.error.message
    assert [event.sequence_number for event in seen] == list(range(len(seen)))


def test_a_stream_may_be_left_early(desk):
    def answer(request: Request) -> Stream:
        pieces = list(speak(Said("one two three"))(request).pieces())
        return Stream(chunks=pieces, done=False, hold_after=6)

    at = desk(answer)
    with at.client.responses.create(model=MODEL, input="hello", stream=True) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                break
    assert at.up.requests[0].closed.wait(5)


# --- what Codex sends -------------------------------------------------------------------------


def codex_body(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The shape of a request of Codex 0.169 for a model it does not know."""
    agents = [{**WEATHER_TOOL, "name": name} for name in ("close_agent", "spawn_agent")]
    space = {"type": "namespace", "name": "multi_agent_v1", "description": "x", "tools": agents}
    return {
        "model": MODEL,
        "stream": True,
        "input": items,
        "tools": [WEATHER_TOOL, PATCH_TOOL, space, {"type": "web_search"}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a1fee2-6005-7372-aa76-e74655d4d70e",
        "client_metadata": {"thread_id": "01a1fee2-6005-7372-aa76-e74655d4d70e"},
        "text": {"verbosity": "low"},
    }


def codex_message(role: str, *texts: str) -> dict[str, Any]:
    parts = [{"type": "input_text", "text": text} for text in texts]
    return {"type": "message", "id": f"msg_{texts[0]}", "role": role, "content": parts}


def test_a_codex_conversation(desk):
    """Instructions are developer messages, ids everywhere, reasoning comes back with nulls."""
    at = desk(speak(THOUGHTS, Said("done")))
    items = [
        codex_message("developer", "You are a coding agent."),
        codex_message("developer", "Skills.", "Permissions."),
        codex_message("user", "Environment."),
        codex_message("user", "What is the weather?"),
    ]
    url = f"{at.live.url}/v1/responses"
    headers = {**AUTH, "originator": "codex_exec", "accept": "text/event-stream"}
    got = at.live.session.post(url, json=codex_body(items), headers=headers)
    thought, call = responses_collect(got.content)["output"]
    back = {**thought, "content": thought.get("content")}
    result = {"type": "function_call_output", "id": "fco_1", "call_id": call["call_id"]}
    items += [back, call, {**result, "output": [{"type": "input_text", "text": "21 °C"}]}]
    got = at.live.session.post(url, json=codex_body(items), headers=headers)
    whole = responses_collect(got.content)
    assert (whole["status"], whole["output"][0]["content"][0]["text"]) == ("completed", "done")
    texts = [turn[1] for turn in at.sent if turn[0] == "system"]
    assert " ".join("\n".join(texts).split()) == "You are a coding agent. Skills. Permissions."
    assert at.sent[-2:] == [
        ("call", "get_weather", WEATHER[1]),
        ("result", "get_weather", "21 °C"),
    ]


# --- asynchronous -----------------------------------------------------------------------------


def test_async_response_and_stream(desk):
    at = desk(speak(Said("hello")))
    options = {"model": MODEL, "input": "hello"}

    async def talk() -> tuple[str, str]:
        base = {"base_url": f"{at.live.url}/v1", "api_key": KEY, "max_retries": 0}
        async with openai.AsyncOpenAI(**base) as client:
            whole = await client.responses.create(**options)
            async with client.responses.stream(**options) as stream:
                final = await stream.get_final_response()
            return whole.output_text, final.output_text

    assert asyncio.run(talk()) == ("hello", "hello")


# --- completions ------------------------------------------------------------------------------


def complete(at: Desk, **options: Any) -> Any:
    options = {"model": MODEL, "prompt": "Once upon", "max_tokens": 16, **options}
    return at.client.completions.create(**options)


def test_a_completion(desk):
    at = desk(speak(Said(" a time")))
    got = complete(at, stop=["END"])
    assert (got.object, got.choices[0].text) == ("text_completion", " a time")
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.total_tokens == USED.total
    assert ("user", "Once upon") in at.sent


def test_a_completion_streamed(desk):
    at = desk(speak(Said(" a time", finish="length")))
    got = list(complete(at, stream=True, stream_options={"include_usage": True}))
    choices = [choice for chunk in got for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == " a time"
    assert [c.finish_reason for c in choices if c.finish_reason] == ["length"]
    assert got[-1].usage.total_tokens == USED.total
    assert {chunk.object for chunk in got} == {"text_completion"}


def test_several_prompts(translated):
    def answer(request: Request) -> Reply:
        asked_for = request.json["messages"][-1]["content"]
        return speak(Said(f"after {asked_for}"))(request)

    at = translated(answer)
    try:
        got = complete(at, prompt=["one", "two"])
    except openai.BadRequestError as error:
        assert error.param == "prompt"
    else:
        texts = {choice.index: choice.text for choice in got.choices}
        assert texts == {0: "after one", 1: "after two"}


def test_a_prompt_in_a_list(translated):
    at = translated(speak(Said(" a time")))
    assert complete(at, prompt=["Once upon"]).choices[0].text == " a time"


def test_echo_is_refused(translated):
    at = translated(speak(Said(" a time")))
    with pytest.raises(openai.BadRequestError) as caught:
        complete(at, echo=True)
    assert caught.value.param == "echo"
    assert not at.up.requests
