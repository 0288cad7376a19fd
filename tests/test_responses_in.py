"""Clients that speak OpenAI Responses: their requests as chat, chat answers as their events."""

from __future__ import annotations

import http.server
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import select
from upstream import Clock, events_of

import router
from router import BadRequest, Opening, ResponsesWriter

Json = dict[str, Any]
ID = "abcdefghijklmnopqrstuvwx"
USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 5,
    "total_tokens": 16,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edit files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'},
}
CRM = {"type": "namespace", "name": "crm", "description": "d", "tools": [WEATHER, PATCH]}
SEARCH = {"type": "tool_search", "execution": "client", "parameters": {"type": "object"}}
EVERY_TOOL = [WEATHER, PATCH, CRM, SEARCH, {"type": "local_shell"}, {"type": "apply_patch"}]


def to_chat(earlier: list[Json] | None = None, **body: Any) -> Json:
    return router.responses_to_chat({"model": "m", "input": "hi", **body}, earlier or [])


def messages(*items: Json, **body: Any) -> list[Json]:
    return to_chat(input=list(items), **body)["messages"]


def call_item(call_id: str = "c1", name: str = "weather", **extra: Any) -> Json:
    head = {"type": "function_call", "call_id": call_id, "name": name}
    return {**head, "arguments": '{"city":"Oslo"}', **extra}


def output_item(call_id: str = "c1", output: Any = "rain") -> Json:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def opening(**request: Any) -> Opening:
    return Opening(ID, "asked", 1_700_000_000, 7, {"model": "asked", "input": "hi", **request})


def delta(finish: str | None = None, **members: Any) -> Json:
    return {"choices": [{"index": 0, "delta": members, "finish_reason": finish}]}


def call_delta(index: int, arguments: str = "", **head: Any) -> Json:
    name = head.pop("name", None)
    function = {**({"name": name} if name else {}), "arguments": arguments}
    return {"index": index, **head, "function": function}


def stream(chunks: list[Json], codex: bool = False, **request: Any) -> list[Json]:
    """The events of a whole answer; each is checked."""
    writer = ResponsesWriter(opening(**request), codex)
    sent = b"".join([writer.feed(chunk) for chunk in chunks] + [writer.finish()])
    events = read(sent)
    check(events)
    assert events[-1]["response"] == writer.response
    return events


def read(sent: bytes) -> list[Json]:
    events = []
    for name, data in events_of(sent):
        payload = json.loads(data)
        assert name == payload["type"]
        events.append(payload)
    return events


def last(chunks: list[Json], **options: Any) -> Json:
    return stream(chunks, **options)[-1]["response"]


def check(events: list[Json]) -> None:
    """What the official order promises, whatever the answer."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete", "response.failed")
    items: list[Json] = []
    at: Json | None = None
    grown = ""
    for event in events[2:-1]:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert at is None and event["output_index"] == len(items)
            at, grown = event["item"], ""
        elif kind == "response.output_item.done":
            assert at is not None and event["item"]["id"] == at["id"]
            assert event["item"]["type"] == at["type"]
            items.append(event["item"])
            at = None
        elif kind != "response.in_progress":
            assert at is not None and event["item_id"] == at["id"]
            assert event["output_index"] == len(items)
            if kind.endswith(".delta"):
                grown += event["delta"]
            elif kind.endswith(("part.added", "annotation.added")):
                grown = grown if kind.endswith("annotation.added") else ""
            elif kind.endswith(".done") and "part" not in kind:
                names = ("text", "refusal", "arguments", "input")
                assert grown == next(event[name] for name in names if name in event)
    assert len({item["id"] for item in items}) == len(items)
    calls = [item["call_id"] for item in items if "call_id" in item]
    assert len(set(calls)) == len(calls)
    assert events[-1]["response"]["output"] == items


# ----- requests -----


def test_a_string_is_one_user_message() -> None:
    assert to_chat() == {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_instructions_lead_and_sampling_follows() -> None:
    chat = to_chat(
        instructions="Be brief.",
        max_output_tokens=9,
        temperature=0,
        top_p=0.5,
        reasoning={"effort": "low", "summary": "auto"},
        text={"verbosity": "low", "format": {"type": "text"}},
        safety_identifier="s",
        prompt_cache_key="k",
        service_tier="flex",
        stream=True,
        store=False,
        include=["reasoning.encrypted_content"],
        client_metadata={"a": "b"},
        metadata={"a": "b"},
        truncation="auto",
        background=False,
        conversation=None,
        parallel_tool_calls=True,
        tool_choice="auto",
        tools=[],
    )
    assert chat == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
        "temperature": 0,
        "top_p": 0.5,
        "reasoning_effort": "low",
        "verbosity": "low",
        "user": "s",
        "prompt_cache_key": "k",
        "service_tier": "flex",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_model_may_be_missing() -> None:
    assert "model" not in router.responses_to_chat({"input": "hi"})


def test_a_flat_schema_is_nested() -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    chat = to_chat(text={"format": form})
    inner = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": inner}
    chat = to_chat(text={"format": {"type": "json_object"}})
    assert chat["response_format"] == {"type": "json_object"}


def test_messages_of_all_roles_with_and_without_a_type() -> None:
    assert messages(
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "s"}]},
        {"role": "user", "content": "u"},
        {"role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ) == [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a\n\nno"},
    ]


def test_images_files_and_sound() -> None:
    parts = [
        {"type": "input_text", "text": "look"},
        {"type": "input_image", "image_url": "https://x/y.png", "detail": "high"},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "input_file", "filename": "a.pdf", "file_data": "QUJD"},
        {"type": "input_file", "file_url": "https://x/y.pdf"},
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
    ]
    (message,) = messages({"role": "user", "content": parts})
    assert message["content"] == [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "high"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {
            "type": "file",
            "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,QUJD"},
        },
        {"type": "file", "file": {"file_url": "https://x/y.pdf"}},
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
    ]


def test_one_turn_of_the_assistant_is_one_message() -> None:
    found = messages(
        {"role": "user", "content": "u"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"role": "assistant", "content": "I look."},
        call_item("c1"),
        call_item("c2"),
        output_item("c1"),
        output_item("c2", [{"type": "input_image", "image_url": "data:image/png;base64,AA=="}]),
        call_item("c3"),
        output_item("c3", {"any": "json"}),
    )
    roles = [message["role"] for message in found]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "tool"]
    assert found[1]["content"] == "I look." and found[1]["reasoning_content"] == "hm"
    assert [call["id"] for call in found[1]["tool_calls"]] == ["c1", "c2"]
    assert found[1]["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": '{"city":"Oslo"}',
    }
    assert found[3]["content"][0]["type"] == "image_url"
    assert found[4]["content"] is None
    assert found[5] == {"role": "tool", "tool_call_id": "c3", "content": '{"any": "json"}'}


def test_the_chat_is_one_that_the_router_takes() -> None:
    chat = to_chat(
        input=[
            {"type": "reasoning", "summary": [], "encrypted_content": "x"},
            {"role": "user", "content": [{"type": "input_image", "image_url": "https://x"}]},
            call_item(),
            output_item(),
        ],
        tools=EVERY_TOOL,
        stream=True,
    )
    router.validate_chat(chat)


def test_calls_of_other_kinds_become_function_calls() -> None:
    action = {"type": "exec", "command": ["ls"], "env": {}, "timeout_ms": None}
    found = messages(
        {"type": "custom_tool_call", "call_id": "a", "name": "apply_patch", "input": "x\n"},
        {"type": "custom_tool_call_output", "call_id": "a", "output": "ok"},
        {"type": "local_shell_call", "call_id": "b", "action": action, "status": "completed"},
        {"type": "local_shell_call_output", "id": "b", "output": "{}"},
        {"type": "apply_patch_call", "call_id": "c", "operation": {"type": "delete_file"}},
        {"type": "apply_patch_call_output", "call_id": "c", "status": "failed", "output": "gone"},
        {"type": "function_call", "call_id": "d", "name": "n", "namespace": "crm", "arguments": ""},
    )
    made = [c["function"] for m in found for c in m.get("tool_calls", ())]
    assert made == [
        {"name": "apply_patch", "arguments": '{"input": "x\\n"}'},
        {"name": "local_shell", "arguments": '{"command": ["ls"]}'},
        {"name": "apply_patch", "arguments": '{"type": "delete_file"}'},
        {"name": "crm__n", "arguments": "{}"},
    ]
    assert found[5] == {"role": "tool", "tool_call_id": "c", "content": "gone", "is_error": True}


def test_results_of_openai_tools_become_text_and_the_rest_goes() -> None:
    found = messages(
        {"role": "user", "content": "u"},
        {"type": "web_search_call", "id": "ws", "action": {"type": "search", "query": "q"}},
        {"type": "code_interpreter_call", "code": "1+1", "outputs": [{"logs": "2"}]},
        {"type": "image_generation_call", "result": "A" * 99},
        {"type": "some_future_call", "id": "x", "what": "it did"},
        {"role": "assistant", "content": "a"},
        {"type": "compaction", "encrypted_content": "gAAA"},
    )
    assert found[1]["content"] == (
        '[code_interpreter_call: {"code": "1+1", "outputs": [{"logs": "2"}]}]\n\n'
        '[some_future_call: {"what": "it did"}]\n\na'
    )
    assert "compacted" in found[2]["content"]


def test_references_are_resolved_from_earlier_items() -> None:
    earlier = [{"role": "user", "content": "u"}, {**call_item(), "id": "fc_1"}]
    reference = {"type": "item_reference", "id": "fc_1"}
    chat = to_chat(earlier, input=[reference, {"id": "fc_1"}, output_item()])
    assert [m["role"] for m in chat["messages"]] == ["user", "assistant", "tool"]
    with pytest.raises(BadRequest) as failed:
        to_chat(earlier, input=[{"type": "item_reference", "id": "fc_2"}])
    assert failed.value.param == "input[0].id"


def test_settings_may_change_with_an_item() -> None:
    item = {"type": "configuration_update", "reasoning": {"effort": "high"}}
    chat = to_chat(input=[item, {"role": "user", "content": "u"}], reasoning={"effort": "low"})
    assert chat["reasoning_effort"] == "high"


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("background", {"background": True}),
        ("conversation", {"conversation": "conv_1"}),
        ("prompt", {"prompt": {"id": "pmpt_1"}}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("input", {"input": None}),
        ("input", {"input": []}),
        ("input", {"input": 5}),
        ("input[0]", {"input": ["hi"]}),
        ("input[0].type", {"input": [{"text": "hi"}]}),
        ("input[0].type", {"input": [{"type": "compaction_trigger"}]}),
        ("input[0].role", {"input": [{"role": "robot", "content": "x"}]}),
        ("input[0].content", {"input": [{"role": "user", "content": None}]}),
        ("input[0].content[0].type", {"input": [{"role": "user", "content": [{"type": "x"}]}]}),
        (
            "input[0].content[0].image_url",
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        ),
        (
            "input[0].content[0]",
            {"input": [{"role": "user", "content": [{"type": "input_file", "filename": "a"}]}]},
        ),
        ("input[0].name", {"input": [{"type": "function_call", "call_id": "c"}]}),
        ("input[0].call_id", {"input": [{"type": "function_call_output", "output": ""}]}),
        ("input[0].tools", {"input": [{"type": "additional_tools"}]}),
        ("tools", {"tools": {}}),
        ("tools[0]", {"tools": ["x"]}),
        ("tools[0].name", {"tools": [{"type": "function"}]}),
        ("tools[0].tools[0].name", {"tools": [{**CRM, "tools": [{"type": "custom"}]}]}),
        ("tools[0].parameters", {"tools": [{**WEATHER, "parameters": []}]}),
        ("tool_choice", {"tool_choice": "sometimes"}),
        ("tool_choice", {"tool_choice": {"type": "function", "name": "x"}, "tools": [WEATHER]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice.mode", {"tool_choice": {"type": "allowed_tools", "mode": "x"}}),
        ("text.format.type", {"text": {"format": {"type": "xml"}}}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema"}}}),
        ("max_output_tokens", {"max_output_tokens": 0}),
    ],
)
def test_what_is_wrong_is_named(param: str, body: Json) -> None:
    with pytest.raises(BadRequest) as failed:
        to_chat(**body)
    assert failed.value.param == param


# ----- tools -----


def names_of(chat: Json) -> list[str]:
    return [tool["function"]["name"] for tool in chat.get("tools", ())]


def test_tools_are_nested_and_flattened() -> None:
    chat = to_chat(tools=EVERY_TOOL, tool_choice="auto", parallel_tool_calls=False)
    assert names_of(chat) == [
        "weather",
        "apply_patch",
        "crm__weather",
        "crm__apply_patch",
        "tool_search",
        "local_shell",
        "apply_patch2",
    ]
    custom = chat["tools"][1]["function"]
    assert custom["parameters"]["required"] == ["input"]
    assert custom["description"] == (
        'Edit files.\n\nThe input must follow this lark grammar:\nstart: "x"'
    )
    assert chat["tool_choice"] == "auto" and chat["parallel_tool_calls"] is False


def test_strict_and_description_are_kept() -> None:
    (tool,) = to_chat(tools=[{**WEATHER, "strict": True, "description": "d"}])["tools"]
    assert tool["function"]["strict"] is True and tool["function"]["description"] == "d"


def test_names_fit_every_provider_and_stay_apart() -> None:
    long = "n" * 80
    tools = [{"type": "function", "name": name} for name in ("a.b", "a b", "a_b", long, long + "x")]
    plan = router.plan_tools({"tools": tools})
    assert list(plan.names)[:3] == ["a_b", "a_b2", "a_b3"]
    assert all(len(name) <= 64 for name in plan.names) and len(plan.names) == 5
    assert [plan.client_name(name).name for name in plan.names] == [t["name"] for t in tools]


def test_tools_nobody_can_run_are_listed() -> None:
    tools = [
        {"type": "web_search"},
        WEATHER,
        {"type": "mcp", "server_label": "x"},
        {"type": "tool_search"},
        {"type": "shell", "environment": {"type": "container_auto"}},
    ]
    plan = router.plan_tools({"tools": [*tools, {"type": "web_search"}]})
    assert plan.unserved == ("web_search", "mcp", "tool_search", "shell")
    assert list(plan.names) == ["weather"]
    assert "tools" not in to_chat(tools=[{"type": "web_search"}], tool_choice="auto")
    with pytest.raises(BadRequest, match="web_search"):
        to_chat(tools=tools, tool_choice={"type": "web_search"})


def test_items_bring_tools() -> None:
    lite = {"type": "additional_tools", "role": "developer", "tools": [CRM]}
    earlier = [
        {"type": "tool_search_call", "execution": "client", "call_id": "s", "arguments": {}},
        {"type": "tool_search_output", "execution": "client", "call_id": "s", "tools": [WEATHER]},
    ]
    chat = to_chat(earlier, input=[lite, {"role": "user", "content": "u"}])
    assert names_of(chat) == ["weather", "crm__weather", "crm__apply_patch"]
    assert chat["messages"][1]["content"] == "Available now: weather"


def test_a_repeated_tool_takes_its_newest_form() -> None:
    lite = {"type": "additional_tools", "tools": [{**WEATHER, "description": "new"}]}
    chat = to_chat(input=[lite, {"role": "user", "content": "u"}], tools=[WEATHER])
    assert [tool["function"].get("description") for tool in chat["tools"]] == ["new"]


def forced(name: str) -> Json:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("choice", "expected", "offered"),
    [
        ("none", "none", 7),
        ("required", "required", 7),
        ({"type": "function", "name": "weather"}, "required", 2),  # two namespaces have one
        ({"type": "function", "name": "weather", "namespace": "crm"}, forced("crm__weather"), 7),
        ({"type": "function", "name": "crm__weather"}, forced("crm__weather"), 7),
        ({"type": "local_shell"}, forced("local_shell"), 7),
        ({"type": "namespace", "name": "crm"}, "required", 2),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "tool_search"}]}, "auto", 1),
    ],
)
def test_every_kind_of_tool_choice(choice: Any, expected: Any, offered: int) -> None:
    chat = to_chat(tools=EVERY_TOOL, tool_choice=choice)
    assert chat["tool_choice"] == expected
    assert len(chat["tools"]) == offered


def test_allowed_tools_may_leave_nothing() -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}
    assert "tools" not in to_chat(tools=[WEATHER], tool_choice=choice)
    with pytest.raises(BadRequest, match="requires a call"):
        to_chat(tools=[WEATHER], tool_choice={**choice, "mode": "required"})


# ----- any JSON -----

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["", "a", "auto", "hr1.x.p."]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "text", "name", "id"]), inner, max_size=2)
    ),
    max_leaves=4,
)
TYPES = st.sampled_from(
    [*router.ITEM_READERS, *router.TOOL_NOTES, *router.TOOL_SILENT, *router.PART_READERS]
    + [*router.TYPED_TOOLS, "item_reference", "namespace", "function", "custom", "allowed_tools"]
)
# fmt: off
NAMES = [
    "call_id", "id", "name", "namespace", "arguments", "output", "summary", "encrypted_content",
    "action", "operation", "text", "format", "mode", "image_url", "file_data", "execution",
    "tools", "content", "parameters", "environment", "input",
]
# fmt: on


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with names that mean something, at times with values that fit."""
    values = inner | st.lists(inner, max_size=2)
    members = st.dictionaries(st.sampled_from(NAMES), values, max_size=5)
    roles = st.sampled_from([{}, {}, {"role": "user"}, {"role": "assistant"}, {"role": 1}])
    kinds = (TYPES | VALUES).map(lambda kind: {"type": kind})
    return st.builds(lambda a, b, c: {**a, **b, **c}, members, roles, kinds)


ITEMS = objects(VALUES | objects(VALUES))
BODIES = st.fixed_dictionaries(
    {"input": st.lists(ITEMS, max_size=2) | VALUES},
    optional={
        "tools": st.lists(ITEMS, max_size=2),
        "tool_choice": ITEMS | VALUES,
        "text": VALUES | ITEMS,
        "reasoning": VALUES,
        "instructions": VALUES,
    },
)


@settings(max_examples=200, deadline=None)
@given(BODIES)
def test_any_json_is_served_or_refused(body: Json) -> None:
    before = json.dumps(body)
    try:
        chat = router.responses_to_chat(body)
    except BadRequest:
        return
    finally:
        assert json.dumps(body) == before
    assert chat["messages"]
    json.dumps(chat)
    writer = ResponsesWriter(Opening(ID, "m", request=body))
    check(read(writer.feed(delta(content="x")) + writer.finish()))


# ----- answers -----


def test_text_has_the_official_events() -> None:
    events = stream([delta(content="po"), delta(content="ng"), delta("stop"), {"usage": USAGE}])
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    response = events[-1]["response"]
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": "pong"}
    assert response["output"] == [
        {
            "id": f"msg_{ID}0",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [part],
        }
    ]
    assert response["usage"] == {
        "input_tokens": 11,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 16,
    }
    assert response["id"] == f"resp_{ID}" and response["model"] == "asked"


def test_the_response_repeats_the_request() -> None:
    asked = {"instructions": "i", "tools": [WEATHER], "temperature": 0.5, "store": False}
    response = last([delta("stop", content="x")], **asked)
    assert {name: response[name] for name in asked} == asked
    assert last([delta("stop", content="x")], codex=True, **asked)["tools"] == []


def test_missing_usage_is_estimated() -> None:
    usage = last([delta("stop", content="x" * 40)])["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (7, 10, 17)
    assert usage["hermes"] == {"estimated": True}


def test_totals_are_not_recomputed() -> None:
    usage = {"prompt_tokens": 14, "completion_tokens": 14, "total_tokens": 320}
    assert last([delta("stop", content="x"), {"usage": usage}])["usage"]["total_tokens"] == 320


def test_parallel_calls_that_are_mixed_come_out_one_by_one() -> None:
    first = [
        call_delta(0, id="a", type="function", name="weather"),
        call_delta(1, id="b", type="function", name="weather"),
    ]
    chunks = [
        delta(tool_calls=first),
        delta(tool_calls=[call_delta(0, '{"x"'), call_delta(1, '{"y":')]),
        delta(tool_calls=[call_delta(1, "2}"), call_delta(0, ":1}")]),
        delta("tool_calls"),
    ]
    output = last(chunks)["output"]
    assert [(c["call_id"], c["arguments"]) for c in output] == [("a", '{"x":1}'), ("b", '{"y":2}')]


def test_a_whole_call_does_not_wait_for_the_end() -> None:
    writer = ResponsesWriter(opening())
    writer.feed(delta(tool_calls=[call_delta(0, '{"x":1}', id="a", name="f")]))
    sent = writer.feed(delta(tool_calls=[call_delta(1, "{", id="b", name="g")]))
    assert b'"response.output_item.done"' in sent and b'"call_id":"b"' in sent


def test_text_does_not_cut_a_call_in_two() -> None:
    chunks = [
        delta(tool_calls=[call_delta(0, '{"x"', id="a", name="f")]),
        delta(content="meanwhile"),
        delta(tool_calls=[call_delta(0, ":1}")]),
        delta(content=" and so on"),
        delta("stop"),
    ]
    call, message = last(chunks)["output"]
    assert call["arguments"] == '{"x":1}'
    assert message["content"][0]["text"] == "meanwhile and so on"


def test_calls_go_back_under_the_names_of_the_client() -> None:
    given_calls = [
        call_delta(0, '{"city":"Oslo"}', id="a", name="crm__weather"),
        call_delta(1, '{"input":"*** Begin\\n"}', id="b", name="apply_patch"),
        call_delta(2, '{"command":["ls"]}', id="c", name="local_shell"),
        call_delta(3, '{"query":"q"}', id="d", name="tool_search"),
        call_delta(4, '{"type":"delete_file","path":"p"}', id="e", name="apply_patch2"),
        call_delta(5, "", id="f", name="unknown"),
        call_delta(6, "bare text", id="g", name="crm__apply_patch"),
    ]
    output = last([delta("tool_calls", tool_calls=given_calls)], tools=EVERY_TOOL)["output"]
    rest = [{k: v for k, v in item.items() if k not in ("id", "status")} for item in output]
    assert rest == [
        {
            "type": "function_call",
            "call_id": "a",
            "name": "weather",
            "namespace": "crm",
            "arguments": '{"city":"Oslo"}',
        },
        {
            "type": "custom_tool_call",
            "call_id": "b",
            "name": "apply_patch",
            "input": "*** Begin\n",
        },
        {
            "type": "local_shell_call",
            "call_id": "c",
            "action": {"type": "exec", "env": {}, "command": ["ls"]},
        },
        {
            "type": "tool_search_call",
            "call_id": "d",
            "arguments": {"query": "q"},
            "execution": "client",
        },
        {
            "type": "apply_patch_call",
            "call_id": "e",
            "operation": {"type": "delete_file", "path": "p"},
        },
        {"type": "function_call", "call_id": "f", "name": "unknown", "arguments": "{}"},
        {
            "type": "custom_tool_call",
            "call_id": "g",
            "name": "apply_patch",
            "namespace": "crm",
            "input": "bare text",
        },
    ]
    prefixes = [item["id"].split("_")[0] for item in output]
    assert prefixes == ["fc", "ctc", "tc", "tc", "tc", "fc", "ctc"]


def test_a_name_without_its_namespace_is_understood() -> None:
    tools = [{"type": "namespace", "name": "ns", "tools": [WEATHER]}]
    chunk = delta("tool_calls", tool_calls=[call_delta(0, "{}", id="a", name="weather")])
    assert last([chunk], tools=tools)["output"][0]["namespace"] == "ns"


def test_a_custom_call_of_the_provider_keeps_its_text() -> None:
    begin = {"index": 0, "id": "a", "type": "custom", "custom": {"name": "p", "input": "{1"}}
    more = {"index": 0, "custom": {"input": " }"}}
    (item,) = last([delta(tool_calls=[begin]), delta("stop", tool_calls=[more])])["output"]
    assert item["type"] == "custom_tool_call" and item["input"] == "{1 }"


def test_call_ids_are_unique_in_the_chain() -> None:
    chunk = delta("tool_calls", tool_calls=[call_delta(0, "{}", id="call_0", name="f")])
    items = [call_item("call_0"), output_item("call_0")]
    assert last([chunk], input=items)["output"][0]["call_id"] == "call_0_abcdefgh"
    nameless = delta("tool_calls", tool_calls=[call_delta(0, "{}", name="f")])
    assert last([nameless])["output"][0]["call_id"] == f"call_{ID}0"


def test_refusals_and_annotations() -> None:
    note = {"type": "url_citation", "url_citation": {"url": "u", "title": "t"}}
    chunks = [delta(content="see"), delta(annotations=[note]), delta("stop", refusal="no")]
    (message,) = last(chunks)["output"]
    text, refusal = message["content"]
    assert text["annotations"] == [{"type": "url_citation", "url": "u", "title": "t"}]
    assert refusal == {"type": "refusal", "refusal": "no"}
    (message,) = last(chunks, codex=True)["output"]
    assert [part["text"] for part in message["content"]] == ["seeno"]


@pytest.mark.parametrize(
    ("finish", "codex", "status", "detail"),
    [
        ("stop", False, "completed", None),
        ("length", False, "incomplete", {"reason": "max_output_tokens"}),
        ("content_filter", False, "incomplete", {"reason": "content_filter"}),
        ("length", True, "completed", None),
    ],
)
def test_endings(finish: str, codex: bool, status: str, detail: Json | None) -> None:
    response = last([delta(finish, content="x")], codex=codex)
    assert (response["status"], response["incomplete_details"]) == (status, detail)
    assert response["output"][0]["status"] == status
    assert response["error"] is None


def test_a_filter_fails_for_codex() -> None:
    response = last([delta("content_filter")], codex=True)
    assert response["status"] == "failed" and response["error"]["code"] == "invalid_prompt"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (router.OverLimit("Slow down.", retry_after=1.2), "rate_limit_exceeded", "again in 2s."),
        (BadRequest("long", code="context_length_exceeded"), "context_length_exceeded", "long"),
        (BadRequest("bad"), "invalid_prompt", "bad"),
        (router.Exhausted("all down"), "server_error", "all down"),
        (router.Exhausted("Please try again in 9s", retry_after=4), "server_error", "in 9s"),
    ],
)
@pytest.mark.parametrize("before", [[], [delta(content="half")]])
def test_failures(error: router.RouterError, code: str, words: str, before: list[Json]) -> None:
    writer = ResponsesWriter(opening())
    sent = b"".join(map(writer.feed, before)) + writer.fail(error)
    events = read(sent)
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.failed"
    failure = events[-1]["response"]["error"]
    assert failure["code"] == code and failure["message"].endswith(words)
    assert not (writer.finish() or writer.fail(error) or writer.beat())
    assert not writer.feed(delta(content="late"))


def test_beats_are_events_in_order() -> None:
    writer = ResponsesWriter(opening())
    sent = writer.beat() + writer.beat() + writer.feed(delta(content="x")) + writer.beat()
    events = read(sent + writer.finish())
    check(events)
    kinds = [event["type"] for event in events]
    assert kinds.count("response.in_progress") == 3 and kinds.count("response.created") == 1


def test_half_a_surrogate_pair_does_no_harm() -> None:
    broken = {"id": "\ud800", **call_delta(0, '{"a":"\udc00"}', name="\ud800")}
    writer = ResponsesWriter(opening())
    sent = writer.feed(delta(content="a\ud800b", reasoning_content="\ud800"))
    sent += writer.feed(delta("stop", tool_calls=[broken, call_delta(1, "{", name="g")]))
    check(read(sent + writer.finish()))


# ----- reasoning that comes back -----


def round_trip(chunks: list[Json], change: Callable[[Json], None] | None = None) -> Json:
    """The assistant message of the next request, when the client sends all items back."""
    output = json.loads(json.dumps(last(chunks)["output"]))
    for item in output:
        if change and item["type"] == "reasoning":
            change(item)
    return messages({"role": "user", "content": "u"}, *output)[1]


SIGNED = {"type": "reasoning.text", "text": "hm", "signature": "c2ln", "origin": "anthropic"}


def test_thinking_comes_back_as_it_was() -> None:
    hidden = {"type": "reasoning.encrypted", "data": "x.y=", "origin": "anthropic"}
    pieces = [SIGNED, hidden, {**SIGNED, "text": "so", "signature": "c2ln2"}]
    call = call_delta(0, "{}", id="a", name="f")
    message = round_trip(
        [
            delta(reasoning_content="h"),
            delta(reasoning_content="m"),
            *(delta(reasoning_details=[piece]) for piece in pieces[:2]),
            delta(reasoning_content="so", reasoning_details=[pieces[2]]),
            delta(content="text", tool_calls=[call]),
            delta("tool_calls"),
        ]
    )
    assert message["reasoning_details"] == pieces
    assert message["reasoning_content"] == "hm\n\nso"
    assert message["content"] == "text" and message["tool_calls"][0]["id"] == "a"


def test_pieces_in_deltas_are_joined() -> None:
    message = round_trip(
        [
            delta(reasoning_details=[{"type": "reasoning.text", "text": "h", "index": 0, "o": 1}]),
            delta(
                reasoning_details=[
                    {"type": "reasoning.text", "text": "m", "index": 0, "origin": "openrouter"}
                ]
            ),
            delta(reasoning_details=[{"type": "reasoning.text", "signature": "s", "index": 0}]),
            delta(reasoning_details=[{"type": "reasoning.text", "text": "2", "index": 1}]),
        ]
    )
    assert message["reasoning_details"] == [
        {
            "type": "reasoning.text",
            "text": "hm",
            "index": 0,
            "o": 1,
            "signature": "s",
            "origin": "openrouter",
        }
    ]  # the second has no origin, so it is there to be read only
    assert message["reasoning_content"] == "hm\n\n2"


def test_a_responses_item_comes_back_whole() -> None:
    rest = {"id": "rs_1", "origin": "openai"}
    pieces = [
        {"type": "reasoning.summary", "summary": "one", **rest},
        {"type": "reasoning.summary", "summary": "two", **rest},
        {"type": "reasoning.encrypted", "data": "gAAA", **rest},
    ]
    message = round_trip([delta(reasoning_content="one\n\ntwo"), delta(reasoning_details=pieces)])
    assert message["reasoning_details"] == pieces
    (item,) = last([delta(reasoning_details=pieces)])["output"]
    assert item["summary"] == [{"type": "summary_text", "text": "onetwo"}]


def test_edited_thinking_is_not_signed() -> None:
    def edit(item: Json) -> None:
        item["summary"][0]["text"] = "hm!"

    message = round_trip([delta(reasoning_details=[SIGNED])], edit)
    assert "reasoning_details" not in message and message["reasoning_content"] == "hm!"


def test_damaged_carriers_leave_readable_text() -> None:
    for sealed in ("hr1.", "hr1.anthropic", "hr1.a.p.x.{", "hr1.a.p.x.[1]", "hr1.a.x..[1,2]"):

        def damage(item: Json, sealed: str = sealed) -> None:
            item["encrypted_content"] = sealed

        message = round_trip([delta(reasoning_details=[SIGNED])], damage)
        assert "reasoning_details" not in message and message["reasoning_content"] == "hm"


def test_what_openai_encrypted_goes_back_to_openai() -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
    (message,) = messages(item)
    piece = {"type": "reasoning.encrypted", "data": "gAAA", "id": "rs_1", "origin": "openai"}
    assert message["reasoning_details"] == [piece]


def test_what_a_call_carries_comes_back() -> None:
    extra = {"google": {"thought_signature": "s"}}
    call = {**call_delta(0, "{}", id="a.1", name="f"), "extra_content": extra}
    message = round_trip([delta("tool_calls", tool_calls=[call])])
    assert message["tool_calls"][0]["extra_content"] == extra


# ----- streams and wholes -----

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
MESSAGES = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none() | TEXT},
    optional={
        "reasoning_content": TEXT,
        "refusal": TEXT,
        "tool_calls": st.lists(
            st.builds(
                lambda id, name, value: {
                    "id": id,
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps({"input": value})},
                },
                st.sampled_from(["a", "b", "call_0", ""]),
                st.sampled_from(["weather", "apply_patch", "crm__weather", "local_shell"]),
                TEXT,
            ),
            min_size=1,
            max_size=3,
        ),
    },
)
FINISHES = st.sampled_from(["stop", "length", "tool_calls", "content_filter"])


def pieces(text: str, rng: random.Random) -> Iterator[str]:
    while text:
        size = rng.randint(1, len(text))
        yield text[:size]
        text = text[size:]


def split(message: Json, finish: str, rng: random.Random) -> list[Json]:
    """A whole message as chunks, cut at random; calls may be mixed."""
    chunks = [delta(role="assistant")]
    for name in ("reasoning_content", "content", "refusal"):
        chunks += [delta(**{name: text}) for text in pieces(message.get(name) or "", rng)]
    queues = []
    for at, call in enumerate(message.get("tool_calls") or ()):
        function = call["function"]
        head = call_delta(at, id=call["id"], type="function", name=function["name"])
        rest = [call_delta(at, text) for text in pieces(function["arguments"], rng)]
        chunks.append(delta(tool_calls=[head]))
        queues.append(rest)
    while any(queues):
        queue = rng.choice([queue for queue in queues if queue])
        chunks.append(delta(tool_calls=[queue.pop(0)]))
    return [*chunks, delta(finish), {"choices": [], "usage": USAGE}]


@settings(max_examples=200, deadline=None)
@given(MESSAGES, FINISHES, st.booleans(), st.randoms(use_true_random=False))
def test_a_stream_cut_anyhow_is_the_whole(
    message: Json, finish: str, codex: bool, rng: random.Random
) -> None:
    request = {"tools": EVERY_TOOL, "input": [call_item("call_0"), output_item("call_0")]}
    reply = {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": USAGE}
    whole = router.chat_reply_to_responses(reply, opening(**request), codex)
    assert last(split(message, finish, rng), codex=codex, **request) == whole


RECORDED = select(streams=True)


@pytest.mark.parametrize("recording", RECORDED, ids=[r.id for r in RECORDED])
def test_recorded_streams(recording: Any) -> None:
    reader = router.ChatReader(recording.provider)
    chunks: list[Json] = []
    for _, data in events_of(recording.body):
        if data and data != "[DONE]":
            chunks += reader.feed(json.loads(data))
    chunks += reader.finish()
    good = [chunk for chunk in chunks if "error" not in chunk]
    if len(good) < len(chunks):
        return  # the caller ends these with fail()
    whole = router.chat_reply_to_responses(router.gathered_reply(good), opening())
    assert last(good) == whole
    assert whole["output"]


# ----- the official SDK -----


@contextmanager
def serving(sent: bytes) -> Iterator[openai.OpenAI]:
    """An OpenAI client of a server that answers everything with one event stream."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        with openai.OpenAI(api_key="k", base_url=url, max_retries=0) as client:
            yield client
    finally:
        server.shutdown()
        server.server_close()


def answered(chunks: list[Json], **request: Any) -> bytes:
    writer = ResponsesWriter(opening(**request))
    return b"".join([*map(writer.feed, chunks), writer.finish()])


def test_the_sdk_reads_a_stream() -> None:
    calls = [
        call_delta(0, '{"city":"Oslo"}', id="a", name="weather"),
        call_delta(1, '{"input":"x"}', id="b", name="apply_patch"),
        call_delta(2, '{"type":"delete_file","path":"p"}', id="c", name="apply_patch2"),
    ]
    sent = answered(
        [
            delta(reasoning_content="hm", reasoning_details=[SIGNED]),
            delta(content="po"),
            delta(content="ng"),
            delta(refusal="but"),
            delta("tool_calls", tool_calls=calls),
            {"choices": [], "usage": USAGE},
        ],
        tools=EVERY_TOOL,
    )
    with serving(sent) as client, client.responses.stream(model="m", input="hi") as found:
        kinds = [event.type for event in found]
        response = found.get_final_response()
    assert response.output_text == "pong"
    types = [item.type for item in response.output]
    assert types == [
        "reasoning",
        "message",
        "function_call",
        "custom_tool_call",
        "apply_patch_call",
    ]
    assert response.usage and response.usage.total_tokens == 16
    assert kinds[-1] == "response.completed"
    openai.types.responses.Response.model_validate(response.model_dump(), strict=False)


def test_the_sdk_reads_endings_that_are_not_good() -> None:
    failed = ResponsesWriter(opening()).fail(router.OverLimit("slow", retry_after=3))
    for sent, status in ((failed, "failed"), (answered([delta("length")]), "incomplete")):
        with (
            serving(sent) as client,
            client.responses.create(model="m", input="hi", stream=True) as events,
        ):
            final = [event for event in events][-1]
        assert final.type == f"response.{status}" and final.response.status == status


def test_the_whole_is_what_the_sdk_models() -> None:
    reply = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": USAGE}
    whole = router.chat_reply_to_responses(reply, opening(tools=[WEATHER], text={}))
    whole["tools"][0].setdefault("strict", None)
    openai.types.responses.Response.model_validate(whole)


# ----- the store -----


def kept(
    store: router.ResponseStore, own: str, previous: str | None = None, text: str = ""
) -> None:
    item = {"role": "user", "content": f"{own}{text}"}
    response = {"id": own, "previous_response_id": previous, "output": [{"id": f"msg_{own}"}]}
    store.put("ann", own, [item], response)


def test_a_chain_is_read_back_in_order() -> None:
    store = router.ResponseStore(now=Clock())
    kept(store, "r1")
    kept(store, "r2", "r1")
    assert [item.get("content") or item["id"] for item in store.chain("ann", "r2")] == [
        "r1",
        "msg_r1",
        "r2",
        "msg_r2",
    ]
    assert store.items("ann", "r1") == [{"role": "user", "content": "r1"}]
    assert store.get("ann", "r1")["id"] == "r1"
    for caller, own in (("bob", "r2"), ("ann", "r3")):
        with pytest.raises(BadRequest) as failed:
            store.chain(caller, own)
        assert failed.value.code == "previous_response_not_found"
    assert store.get("bob", "r1") is None and not store.delete("bob", "r1")
    assert store.delete("ann", "r1") and not store.delete("ann", "r1")
    with pytest.raises(BadRequest):
        store.chain("ann", "r2")


def test_what_is_not_to_be_stored_is_not() -> None:
    store = router.ResponseStore(now=Clock())
    store.put("ann", "r1", [], {"store": False, "output": []})
    assert store.get("ann", "r1") is None


def test_the_store_is_bounded() -> None:
    store = router.ResponseStore(max_entries=3, max_bytes=1_000, now=Clock())
    for n in range(3):
        kept(store, f"r{n}")
    store.get("ann", "r0")
    kept(store, "r3")
    assert store.get("ann", "r1") is None and store.get("ann", "r0")
    kept(store, "big", text="x" * 850)
    assert [store.get("ann", f"r{n}") for n in range(4)] == [None] * 4
    kept(store, "huge", text="x" * 5_000)
    assert store.get("ann", "huge") is None and store.get("ann", "big")


def test_the_store_forgets() -> None:
    clock = Clock(0)
    store = router.ResponseStore(ttl_s=10, now=clock)
    kept(store, "r1")
    kept(store, "r2")
    clock.time = 9
    assert store.get("ann", "r1")
    clock.time = 18
    assert store.get("ann", "r1") and store.get("ann", "r2") is None
    clock.time = 40
    assert store.get("ann", "r1") is None


def test_the_store_is_safe_among_threads() -> None:
    store = router.ResponseStore(max_entries=20)

    def work(name: str) -> None:
        for n in range(200):
            kept(store, f"{name}{n}")
            store.get("ann", f"{name}{n // 2}")
            store.delete("ann", f"{name}{n // 3}")

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store._kept) <= 20
    assert store._bytes == sum(entry.size for entry in store._kept.values())
