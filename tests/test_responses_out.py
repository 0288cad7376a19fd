"""Responses and Codex as providers: chat bodies out, their events and replies back."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import GOLDEN

import router

USER = {"role": "user", "content": "Hi"}
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
RECORDED = [r for r in GOLDEN.values() if r.api.startswith("responses") and r.status == 200]
STREAMS = [r for r in RECORDED if r.streams]
WHOLE = [r for r in RECORDED if not r.streams]


def events_to_reply(events, origin):
    """The whole reply of a stream; {"error": ...} if it broke off."""
    reader = router.ResponsesReader(origin)
    chunks = [chunk for event in events for chunk in reader.feed(event)]
    if not reader.finished:
        return {"error": {"code": "truncated"}}
    return router.gathered_reply(chunks)


def named(recordings) -> dict:
    return {"argvalues": recordings, "ids": [r.id for r in recordings]}


def sent(*messages, codex=False, origin="openai", **fields):
    chat = {"messages": list(messages) or [USER], **fields}
    before = copy.deepcopy(chat)
    body = router.chat_to_responses(chat, "m", origin, codex)
    assert chat == before, "the input was changed"
    return body


def events_of(raw: bytes) -> list:
    datas = map(router.event_data, router.split_events(raw))
    return [json.loads(data) for data in datas if data and data != b"[DONE]"]


def read(events, origin="openai"):
    reader = router.ResponsesReader(origin)
    chunks = [chunk for event in events for chunk in reader.feed(event)] + reader.finish()
    return chunks, reader


def deltas(chunks) -> list:
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]]


def joined(chunks, name) -> str:
    return "".join(delta.get(name, "") for delta in deltas(chunks))


def finishes(chunks) -> list:
    found = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    return [finish for finish in found if finish]


def call(id="call_1", name="f", arguments="{}"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(*calls, **members):
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **members}


def result(id="call_1", content="ok", **members):
    return {"role": "tool", "tool_call_id": id, "content": content, **members}


# --- requests ---


def test_codex_body_plain():
    body = sent(
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "Hello!"},
        codex=True,
        reasoning_effort="high",
        max_tokens=5,
        max_completion_tokens=5,
        metadata={"a": "b"},
        temperature=1,
        top_p=1,
        user="u",
    )
    user = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
    answer = [{"type": "output_text", "text": "Hello!"}]
    assert body == {
        "model": "m",
        "input": [user, {"type": "message", "role": "assistant", "content": answer}],
        "store": False,
        "stream": True,
        "instructions": "Be brief.",
        "reasoning": {"effort": "high", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
    }


def test_codex_defaults():
    tool = {"type": "function", "function": {"name": "f"}}
    body = sent(codex=True, tools=[tool])
    assert body["instructions"] == "You are a helpful assistant."
    assert body["reasoning"] == {"effort": "medium", "summary": "auto"}
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("auto", True)
    assert body["tools"] == [
        {
            "type": "function",
            "name": "f",
            "description": "",
            "strict": False,
            "parameters": {"type": "object", "properties": {}},
        }
    ]


def test_openai_keeps_what_both_dialects_have():
    body = sent(
        max_tokens=3,
        temperature=0.5,
        user="u",
        prompt_cache_key="k",
        service_tier="flex",
        stop=["x"],
        stream=True,
        stream_options={"include_usage": True},
        verbosity="low",
        reasoning_effort="max",
        response_format={"type": "json_schema", "json_schema": {"schema": {}, "strict": True}},
    )
    assert body["max_output_tokens"] == 16, "less is refused"
    assert (body["temperature"], body["user"], body["prompt_cache_key"]) == (0.5, "u", "k")
    assert body["stream"] is True and body["service_tier"] == "flex"
    assert body["reasoning"] == {"effort": "xhigh", "summary": "auto"}
    schema = {"type": "json_schema", "name": "answer", "schema": {}, "strict": True}
    assert body["text"] == {"format": schema, "verbosity": "low"}
    assert not {"stop", "stream_options", "instructions", "tools", "max_tokens"} & set(body)


def test_a_model_without_reasoning_hears_nothing_of_it():
    chat = {"messages": [USER], "reasoning_effort": "low"}
    body = router.chat_to_responses(chat, "gpt-4o", "openai", reasons=False)
    assert "reasoning" not in body and "include" not in body


def test_no_effort_asks_for_no_summary():
    assert sent(reasoning_effort="none")["reasoning"] == {"effort": "none"}
    assert "reasoning" not in sent()


def test_leading_system_texts_are_instructions_later_ones_developer_items():
    body = sent(
        {"role": "system", "content": "a"},
        {"role": "developer", "content": [{"type": "text", "text": "b"}]},
        USER,
        {"role": "system", "content": "c"},
    )
    assert body["instructions"] == "a\nb"
    assert [item["role"] for item in body["input"]] == ["user", "developer"]


def test_system_alone_still_gives_an_input():
    body = sent({"role": "system", "content": "a"}, codex=True)
    assert [item["role"] for item in body["input"]] == ["developer"]
    assert body["instructions"]


def test_parts_of_a_user_message():
    parts = [
        {"type": "text", "text": "look", "cache_control": {"type": "ephemeral"}},
        {"type": "image_url", "image_url": {"url": "https://x/a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "data:image/png;base64,AA=="},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA=="}},
        {"type": "file", "file": {"file_url": "https://x/a.pdf"}},
        {"type": "file", "file": {"file_id": "file-1", "filename": "a"}},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    ]
    [item] = sent({"role": "user", "content": parts})["input"]
    data = "data:application/pdf;base64,AA=="
    assert item["content"] == [
        {"type": "input_text", "text": "look"},
        {"type": "input_image", "image_url": "https://x/a.png", "detail": "low"},
        {"type": "input_image", "image_url": "data:image/png;base64,AA=="},
        {"type": "input_file", "filename": "file.pdf", "file_data": data},
        {"type": "input_file", "file_url": "https://x/a.pdf"},
        {"type": "input_file", "file_id": "file-1"},
        parts[-1],
    ]


def test_calls_and_results():
    custom = {"id": "c2", "type": "custom", "custom": {"name": "patch", "input": "*** x"}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    items = sent(
        USER,
        assistant(call("c1", arguments=""), custom, content="First I look."),
        result("c2", "done"),
        result("c1", [{"type": "text", "text": "see"}, image]),
    )["input"]
    assert [item["type"] for item in items[1:]] == [
        "message",
        "function_call",
        "custom_tool_call",
        "function_call_output",
        "custom_tool_call_output",
    ]
    called = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    assert items[2] == called
    patched = {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "*** x"}
    assert items[3] == patched
    seen = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
    assert items[4]["output"] == [{"type": "input_text", "text": "see"}, seen]
    assert items[5] == {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"}


def test_a_failed_tool_says_so():
    items = sent(USER, assistant(call()), result(content="no file", is_error=True))["input"]
    assert items[-1]["output"] == "[error] no file"


def test_missing_and_stray_results_are_mended():
    items = sent(
        result("lost", "early"),
        USER,
        assistant(call("a"), call("b")),
        result("b", "B"),
        {"role": "user", "content": "and"},
        result("x", "stray"),
    )["input"]
    outputs = {i["call_id"]: i["output"] for i in items if i["type"] == "function_call_output"}
    assert outputs == {"a": "[no result]", "b": "B"}
    order = [i.get("role") or i["type"] for i in items]
    assert order[:2] == ["user", "user"] and order[-2:] == ["user", "user"]
    assert items[0]["content"][1]["text"] == "early" and items[-1]["content"][1]["text"] == "stray"


def test_ids_are_told_apart_within_a_turn_and_may_come_again_in_a_later_one():
    items = sent(
        USER,
        assistant(call("call_0"), call("call_0")),
        result("call_0", "1"),
        result("call_0", "2"),
        assistant(call("call_0")),
        result("call_0", "3"),
    )["input"]
    outputs = [(i["call_id"], i["output"]) for i in items if i["type"] == "function_call_output"]
    assert outputs == [("call_0", "1"), ("call_0_2", "2"), ("call_0", "3")]


def test_long_and_missing_ids_stay_paired():
    long = "x" * 90
    items = sent(USER, assistant(call(long), call(None)), result(long, "1"), result("", "2"))[
        "input"
    ]
    calls = [i["call_id"] for i in items if i["type"] == "function_call"]
    outputs = [i["call_id"] for i in items if i["type"] == "function_call_output"]
    assert calls == outputs and all(0 < len(id) <= 64 for id in calls)


def test_the_old_function_call():
    items = sent(
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "ok"},
    )
    assert [i["type"] for i in items["input"][1:]] == ["function_call", "function_call_output"]
    assert items["input"][1]["call_id"] == items["input"][2]["call_id"]


def details(origin):
    return [
        {"type": "reasoning.summary", "summary": "one", "id": "rs_1", "origin": origin},
        {"type": "reasoning.summary", "summary": "two", "id": "rs_1", "origin": origin},
        {"type": "reasoning.encrypted", "data": "gAAA==", "id": "rs_1", "origin": origin},
        {"type": "reasoning.encrypted", "data": "hBBB", "origin": origin},
        {"type": "reasoning.summary", "summary": "no seal", "id": "rs_2", "origin": origin},
    ]


def test_own_reasoning_goes_back_exactly_foreign_is_dropped():
    said = {"role": "assistant", "content": "A", "reasoning_content": "one"}
    items = sent(USER, {**said, "reasoning_details": details("openai")})["input"]
    summary = [{"type": "summary_text", "text": text} for text in ("one", "two")]
    assert items[1:3] == [
        {"type": "reasoning", "id": "rs_1", "summary": summary, "encrypted_content": "gAAA=="},
        {"type": "reasoning", "summary": [], "encrypted_content": "hBBB"},
    ]
    assert items[3]["role"] == "assistant"
    for origin in ("codex", "anthropic", ""):
        items = sent(USER, {**said, "reasoning_details": details(origin)})["input"]
        assert [item["type"] for item in items] == ["message", "message"]


def test_reasoning_that_nothing_follows_is_left_out():
    alone = {"role": "assistant", "content": None, "reasoning_details": details("openai")}
    assert len(sent(USER, alone, USER)["input"]) == 2


def test_tools_of_every_kind():
    grammar = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /.+/"}}
    body = sent(
        tools=[
            {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"a": 1}}},
            {"type": "custom", "custom": {"name": "patch", "format": grammar}},
            {"type": "web_search", "cache_control": {}},
            {"type": "bash_20250124", "name": "bash"},
        ],
        tool_choice={
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
        },
        parallel_tool_calls=False,
    )
    shape = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    assert body["tools"][0]["strict"] is True and body["tools"][0]["parameters"] == {"a": 1}
    assert body["tools"][1:] == [
        {"type": "custom", "name": "patch", "format": shape},
        {"type": "web_search"},
    ]
    chosen = [{"type": "function", "name": "f"}]
    assert body["tool_choice"] == {"type": "allowed_tools", "mode": "required", "tools": chosen}
    assert body["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("chat", "param"),
    [
        ({}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "file"}]}]},
            "messages[0].content[0].file",
        ),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": [USER], "temperature": "x"}, "temperature"),
    ],
)
def test_bad_requests_name_the_field(chat, param):
    with pytest.raises(router.BadRequest) as error:
        router.chat_to_responses(chat, "m", "openai")
    assert error.value.param == param


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system", "function"])},
        optional={
            "content": st.text(max_size=3)
            | st.lists(
                st.fixed_dictionaries(
                    {"type": st.sampled_from(["text", "image_url", "file", "odd"])},
                    optional={"text": st.just("t"), "image_url": ANY_JSON, "file": ANY_JSON},
                ),
                max_size=2,
            ),
            "tool_call_id": st.sampled_from(["a", "b", ""]),
            "tool_calls": st.just(None)
            | st.lists(st.builds(call, st.sampled_from(["a", "b", None, "z" * 80])), max_size=3),
            "reasoning_details": ANY_JSON | st.just(details("openai")),
            "is_error": st.booleans(),
            "function_call": st.just({"name": "f", "arguments": ""}) | ANY_JSON,
        },
    ),
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {"messages": MESSAGES | ANY_JSON},
        optional={
            name: ANY_JSON
            for name in (
                "tools",
                "tool_choice",
                "functions",
                "function_call",
                "response_format",
                "reasoning_effort",
                "max_tokens",
                "verbosity",
                "stream",
                "metadata",
            )
        },
    ),
    st.booleans(),
)
def test_any_json_is_translated_or_refused(chat, codex):
    before = copy.deepcopy(chat)
    try:
        body = router.chat_to_responses(chat, "m", "openai", codex)
    except router.BadRequest as error:
        assert error.message
        return
    finally:
        assert chat == before
    router.dump_json(body)
    calls = [i["call_id"] for i in body["input"] if i["type"].endswith("_call")]
    outputs = [i["call_id"] for i in body["input"] if i["type"].endswith("_call_output")]
    assert calls == outputs
    assert body["input"]


# --- events ---


def created(id="resp_1"):
    head = {"id": id, "model": "gpt-x", "created_at": 5, "status": "in_progress", "output": []}
    return {"type": "response.created", "response": head}


def completed(*output, **members):
    usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 9}
    whole = {"id": "resp_1", "model": "gpt-x", "created_at": 5, "status": "completed"}
    return {
        "type": "response.completed",
        "response": {**whole, "output": list(output), "usage": usage, **members},
    }


def item_event(end, item, at=0):
    return {"type": f"response.output_item.{end}", "output_index": at, "item": item}


def text_delta(text, id="msg_1", at=0):
    place = {"item_id": id, "output_index": at, "content_index": 0}
    return {"type": "response.output_text.delta", "delta": text, **place}


def message(text, id="msg_1", **part):
    parts = [{"type": "output_text", "text": text, **part}]
    return {"type": "message", "id": id, "role": "assistant", "content": parts}


def function(arguments="{}", id="fc_1", call_id="call_1", name="f"):
    known = {"type": "function_call", "id": id, "call_id": call_id, "name": name}
    return {**known, "arguments": arguments}


def reasoning(*texts, id="rs_1", **members):
    summary = [{"type": "summary_text", "text": text} for text in texts]
    return {"type": "reasoning", "id": id, "summary": summary, **members}


def test_text_comes_once_however_often_it_is_said():
    done = {
        "type": "response.output_text.done",
        "item_id": "msg_1",
        "output_index": 0,
        "content_index": 0,
        "text": "Hello",
    }
    chunks, reader = read(
        [
            created(),
            item_event("added", message("")),
            text_delta("Hel"),
            text_delta("lo"),
            done,
            item_event("done", message("Hello")),
            completed(message("Hello")),
        ]
    )
    assert joined(chunks, "content") == "Hello"
    assert deltas(chunks)[0] == {"role": "assistant", "content": "Hel"}
    assert finishes(chunks) == ["stop"] and reader.finished
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert all((c["id"], c["model"], c["created"]) == ("resp_1", "gpt-x", 5) for c in chunks)


@pytest.mark.parametrize(
    "events",
    [
        [completed(message("Hello"))],
        [item_event("done", message("Hello")), completed()],
        [text_delta("Hello"), completed()],
        [text_delta("He"), completed(message("Hello"))],
        [text_delta("He", id="x1"), text_delta("llo", id="x2"), completed(message("Hello", "x3"))],
        [text_delta("He", "", None), text_delta("llo", "", None), completed(message("Hello", ""))],
    ],
)
def test_text_from_whichever_place_has_it(events):
    assert joined(read(events)[0], "content") == "Hello"


def test_a_stream_that_starts_in_the_middle_repeats_nothing():
    chunks, _ = read(
        [text_delta("lo"), item_event("done", message("Hello")), completed(message("Hello"))]
    )
    assert joined(chunks, "content") == "lo"


def test_two_messages_are_two_paragraphs():
    events = [
        text_delta("I look."),
        text_delta("Found.", "msg_2", 1),
        completed(message("I look."), message("Found.", "msg_2")),
    ]
    assert joined(read(events)[0], "content") == "I look.\n\nFound."


def arguments_delta(text, id="fc_1", at=0):
    kind = "response.function_call_arguments.delta"
    return {"type": kind, "delta": text, "item_id": id, "output_index": at}


@pytest.mark.parametrize(
    "events",
    [
        [item_event("added", function("")), arguments_delta('{"a"'), arguments_delta(":1}"),
         item_event("done", function('{"a":1}')), completed(function('{"a":1}'))],
        [item_event("added", function('{"a":1}')), arguments_delta('{"a":1}'), completed()],
        [item_event("done", function('{"a":1}')), completed()],
        [completed(function('{"a":1}'))],
        [arguments_delta('{"a"'), arguments_delta(":1}"), item_event("done", function('{"a":1}')),
         completed()],
        [completed(function({"a": 1}))],
    ],
)  # fmt: skip
def test_a_call_from_whichever_place_has_it(events):
    chunks, _ = read([created(), *events])
    calls = [c for delta in deltas(chunks) for c in delta.get("tool_calls", ())]
    assert [c.get("id") for c in calls][0] == "call_1" and calls[0]["function"]["name"] == "f"
    assert all("id" not in c and c["index"] == 0 for c in calls[1:])
    assert "".join(c["function"]["arguments"] for c in calls) == '{"a":1}'
    assert finishes(chunks) == ["tool_calls"]


def test_parallel_calls_with_ids_that_say_little():
    """One id or one index for all of them: a call begins with its `added`."""
    for ids, places in ((("f", "f"), (0, 1)), (("f1", "f2"), (0, 0))):
        events = []
        for n, (id, at) in enumerate(zip(ids, places, strict=True)):
            whole = function(f"[{n}]", id, f"call_{n}")
            events += [
                item_event("added", {**whole, "arguments": ""}, at),
                arguments_delta(f"[{n}]", id, at),
                item_event("done", whole, at),
            ]
        reply = events_to_reply([*events, completed()], "openai")
        got = reply["choices"][0]["message"]["tool_calls"]
        assert [(c["id"], c["function"]["arguments"]) for c in got] == [
            ("call_0", "[0]"), ("call_1", "[1]")]  # fmt: skip


def test_custom_calls():
    whole = {"type": "custom_tool_call", "id": "ct", "call_id": "c", "name": "patch", "input": "ab"}
    delta = {"type": "response.custom_tool_call_input.delta", "item_id": "ct", "output_index": 0}
    events = [
        item_event("added", {**whole, "input": ""}),
        {**delta, "delta": "a"},
        {**delta, "delta": "b"},
        item_event("done", whole),
        completed(whole),
    ]
    reply = events_to_reply(events, "openai")
    assert reply["choices"][0]["message"]["tool_calls"] == [
        {"id": "c", "type": "custom", "custom": {"name": "patch", "input": "ab"}}
    ]


def test_reasoning_is_read_live_and_kept_whole():
    place = {"item_id": "rs_1", "output_index": 0}
    delta = {"type": "response.reasoning_summary_text.delta", **place}
    whole = reasoning("One.", "Two.", encrypted_content="SEALED")
    events = [
        item_event("added", reasoning(encrypted_content="begun")),
        {**delta, "summary_index": 0, "delta": "One."},
        {**delta, "summary_index": 1, "delta": "Two."},
        item_event("done", whole),
        completed({**whole, "encrypted_content": "SEALED AGAIN"}, message("A")),
    ]
    chunks, _ = read(events)
    assert joined(chunks, "reasoning_content") == "One.\n\nTwo."
    pieces = [piece for d in deltas(chunks) for piece in d.get("reasoning_details", ())]
    own = {"id": "rs_1", "origin": "openai"}
    assert pieces == [
        {"type": "reasoning.summary", "summary": "One.", **own},
        {"type": "reasoning.summary", "summary": "Two.", "index": 1, **own},
        {"type": "reasoning.encrypted", "data": "SEALED", **own},
    ]
    reply = events_to_reply(events, "openai")
    back = sent(USER, reply["choices"][0]["message"])["input"][1]
    assert back == whole


def test_reasoning_said_twice_is_read_once():
    text = [{"type": "reasoning_text", "text": "Think."}]
    reply = router.responses_reply_to_chat(
        completed(reasoning("Think.", content=text))["response"], "deepseek"
    )
    assert reply["choices"][0]["message"]["reasoning_content"] == "Think."


@pytest.mark.parametrize(
    ("details", "finish"),
    [
        ({"reason": "max_output_tokens"}, "length"),
        ({"reason": "content_filter"}, "content_filter"),
        (None, "length"),
    ],
)
def test_incomplete(details, finish):
    event = completed(message("Hal"), status="incomplete", incomplete_details=details)
    chunks, reader = read([{**event, "type": "response.incomplete"}])
    assert finishes(chunks) == [finish] and reader.finished
    reply = router.responses_reply_to_chat(event["response"], "openai")
    assert reply["choices"][0]["finish_reason"] == finish


@pytest.mark.parametrize(
    ("event", "code", "status"),
    [
        ({"type": "response.failed", "response": {"error": {"code": "server_is_overloaded",
          "message": "busy"}}}, "server_is_overloaded", 503),
        ({"type": "error", "code": "context_length_exceeded", "message": "long"},
         "context_length_exceeded", 400),
        ({"type": "error", "error": {"type": "usage_limit_reached", "message": "wait",
          "resets_in_seconds": 7}}, "usage_limit_reached", 429),
        ({"error": {"message": "x", "code": "invalid_prompt"}}, "invalid_prompt", 400),
        ({"type": "response.cancelled", "response": {}}, "cancelled", None),
        ({"type": "response.failed"}, "failed", None),
        ({"detail": "Unsupported"}, None, None),
        ({"error": "text"}, None, None),
    ],
)  # fmt: skip
def test_errors_come_once_and_end_the_answer(event, code, status):
    chunks, reader = read([created(), event, {"type": "response.failed", "response": {}}])
    [chunk] = chunks
    assert list(chunk) == ["error"] and reader.finished
    error = chunk["error"]
    assert error["code"] == code and error.get("status") == status and error["message"]
    assert "resets_in_seconds" not in json.dumps(event) or error["resets_in_seconds"] == 7
    assert router.embedded_error(chunk).status == (status or 502)
    assert events_to_reply([created(), event], "codex") == chunk


def test_a_broken_stream_is_no_answer():
    reply = events_to_reply([created(), text_delta("Hel")], "codex")
    assert reply["error"]["code"] == "truncated"


def test_refusals_and_citations():
    note = {
        "type": "url_citation",
        "url": "https://x",
        "title": "X",
        "start_index": 0,
        "end_index": 1,
    }
    refusal = {"type": "message", "id": "m2", "content": [{"type": "refusal", "refusal": "No."}]}
    reply = router.responses_reply_to_chat(
        completed(message("A", annotations=[note]), refusal)["response"], "openai"
    )
    said = reply["choices"][0]["message"]
    assert (said["content"], said["refusal"]) == ("A", "No.")
    inner = {name: value for name, value in note.items() if name != "type"}
    assert said["annotations"] == [{"type": "url_citation", "url_citation": inner}]


def test_usage_details():
    usage = {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
    }
    assert router.responses_usage(usage) == {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4, "cache_creation_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    assert router.responses_usage({**usage, "total_tokens": 99})["total_tokens"] == 99


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        ANY_JSON
        | st.fixed_dictionaries(
            {"type": st.sampled_from([*(f"{stem}.{end}" for stem in router.ITEM_TEXTS
                                        for end in ("delta", "done")),
                                      *router.RESPONSE_ENDINGS, "error",
                                      "response.output_item.added", "response.output_item.done"])},
            optional={
                "delta": ANY_JSON, "text": ANY_JSON, "item_id": ANY_JSON, "output_index": ANY_JSON,
                "item": ANY_JSON | st.fixed_dictionaries(
                    {"type": st.sampled_from(sorted(router.READ_ITEMS))},
                    optional={n: ANY_JSON for n in ("id", "name", "content", "summary", "call_id",
                                                    "arguments", "input", "encrypted_content")}),
                "response": ANY_JSON
                | st.fixed_dictionaries({"output": ANY_JSON, "usage": ANY_JSON}),
                "error": ANY_JSON,
            },
        ),
        max_size=8,
    )
)  # fmt: skip
def test_any_event_is_survived(events):
    chunks, _ = read(events)
    router.dump_json(chunks)
    assert len(finishes([c for c in chunks if "error" not in c])) <= 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["message", "function_call", "reasoning"]),
                  st.text("ab\n", min_size=1, max_size=8)),
        min_size=1, max_size=5,
    ),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_a_stream_in_any_pieces_is_the_whole(parts, random):
    """Any item may come in deltas, in its `done`, or in the end only: in the order of output."""
    made = {"message": message, "function_call": function, "reasoning": reasoning}
    output, events = [], [created()]
    silent = False  # once an item is left to the end, so are all that follow
    for at, (kind, text) in enumerate(parts):
        item = {**made[kind](text), "id": f"i{at}"}
        item |= {"call_id": f"c{at}"} if kind == "function_call" else {}
        item |= {"encrypted_content": "E"} if kind == "reasoning" else {}
        output.append(item)
        silent = silent or random.random() < 0.2
        if not silent:
            events += item_events(item, at, text, random)
    whole = completed(*output)
    got = events_to_reply([*events, whole], "openai")
    assert got == router.responses_reply_to_chat(whole["response"], "openai")


def item_events(item, at, text, random) -> list:
    stems = {"message": "output_text", "function_call": "function_call_arguments",
             "reasoning": "reasoning_summary_text"}  # fmt: skip
    stem = f"response.{stems[item['type']]}"
    place = {"item_id": item["id"], "output_index": at, "content_index": 0, "summary_index": 0}
    cut = random.randint(0, len(text))
    empty = {"arguments": ""} if "arguments" in item else {"content": [], "summary": []}
    member = "arguments" if "arguments" in item else "text"
    made = [
        item_event("added", {**item, **empty}, at),
        {"type": f"{stem}.delta", "delta": text[:cut], **place},
        {"type": f"{stem}.delta", "delta": text[cut:], **place},
        {"type": f"{stem}.done", member: text, **place},
    ]
    if random.random() < 0.3:
        made = made[: random.randint(0, 4)]
    return [*made, item_event("done", item, at)]


# --- recordings ---


@pytest.mark.parametrize("recording", **named(STREAMS))
def test_recorded_streams_equal_their_final_response(recording):
    events = events_of(recording.body)
    chunks, reader = read(events)
    assert reader.finished and len(finishes(chunks)) == 1 and chunks[-1]["usage"]["total_tokens"]
    whole = events[-1]["response"]
    streamed = events_to_reply(events, "openai")
    final = router.responses_reply_to_chat(whole, "openai")
    for reply in (streamed, final):  # sealed anew each time that it is sent
        for piece in reply["choices"][0]["message"].get("reasoning_details", ()):
            piece.pop("data", None)
    assert streamed == final
    assert router.judge_reply(router.dump_json(streamed))[0] is None


@pytest.mark.parametrize("recording", **named(WHOLE))
def test_recorded_replies_are_answers(recording):
    body = json.loads(recording.body)
    if body.get("object") != "response" or body.get("status") == "queued":
        pytest.skip("not an answer")
    reply = router.responses_reply_to_chat(body, "openai")
    said = reply["choices"][0]["message"]
    texts = [p["text"] for i in body["output"] if i["type"] == "message"
             for p in i["content"] if p["type"] == "output_text"]  # fmt: skip
    assert (said["content"] or "") == "\n\n".join(texts)
    calls = [i["call_id"] for i in body["output"] if i["type"] == "function_call"]
    assert [c["id"] for c in said.get("tool_calls", ())] == calls
    assert reply["usage"]["total_tokens"] == body["usage"]["total_tokens"]
    back = sent(USER, said, *(result(id) for id in calls))["input"]
    theirs = [i for i in body["output"] if i["type"] == "reasoning" and i.get("encrypted_content")]
    ours = [i["encrypted_content"] for i in back if i["type"] == "reasoning"]
    assert ours == [i["encrypted_content"] for i in theirs]


# --- native pass-through ---


@pytest.mark.parametrize("recording", **named(STREAMS))
def test_blocks_of_content_are_told_from_the_end(recording):
    events = router.split_events(recording.body)
    assert not router.only_content_responses(recording.body)
    sure = [router.only_content_responses(event) for event in events]
    assert not sure[-1] and not router.only_content_responses(b"".join(events[-2:]))
    deltas = [s for s, e in zip(sure, events, strict=True) if b".delta" in e]
    assert all(deltas), "the fast way must be the usual one"


@pytest.mark.parametrize(
    "block",
    [
        b'event: response.completed\ndata: {"type":"response.completed"}\n\n',
        b'data: {"type": "response.failed"}\n\n',
        b'data: {"type":"response.output_text.delta","delta":"a"}\n\ndata: [DONE]\n\n',
        b'data: {"type":"error","message":"x"}\n\n',
        b'event: error\ndata: {"message":"x"}\n\n',
        b'data: {"detail":"x"}\n\n',
        b'data: {"type":"response.output_text.delta","error":{"code":1}}\n\n',
        b'data: {"type":"response.in_progress","response":{"usage":{"input_tokens":1}}}\n\n',
        b'data: {"type":"response.created","response":{}}\r\rdata: {"oops":1}\r\r',
    ],
)
def test_in_doubt_a_block_is_not_only_content(block):
    assert not router.only_content_responses(block)


def test_own_reasoning_is_unsealed_and_foreign_dropped():
    sealed = router.seal("codex", "gAAA.b==")
    items = [
        {"type": "message", "role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": sealed},
        {"type": "reasoning", "summary": [], "encrypted_content": "native"},
        {"type": "reasoning", "summary": [], "encrypted_content": None},
        {"type": "reasoning", "encrypted_content": router.seal("codex", "")},
    ]
    body = {"input": items}
    before = copy.deepcopy(body)
    mine = router.own_reasoning(body, "codex")
    assert mine is not None and mine["input"][1] == {**items[1], "encrypted_content": "gAAA.b=="}
    assert len(mine["input"]) == 4 and mine["input"][2:] == items[2:4]
    other = router.own_reasoning(body, "openai")
    assert other is not None and other["input"] == [items[0], *items[2:4]]
    assert body == before


def test_seals_that_hold_pieces_give_the_item_back():
    data = [
        {"type": "reasoning.summary", "summary": None, "id": "rs_9"},
        {"type": "reasoning.encrypted", "data": "gAAA", "id": "rs_9"},
    ]
    seal = router.seal("openai", "p.0a0b0c0d." + json.dumps(data))
    shown = [{"type": "summary_text", "text": "One."}]
    item = {"type": "reasoning", "id": "rs_ours", "summary": shown, "encrypted_content": seal}
    mine = router.own_reasoning({"input": [item]}, "openai")
    assert mine == {"input": [{**item, "id": "rs_9", "encrypted_content": "gAAA"}]}
    assert router.own_reasoning({"input": [item]}, "codex") == {"input": []}
    for broken in ("p.0.[5,{}]", "p.0.[]"):
        item["encrypted_content"] = router.seal("openai", broken)
        assert router.own_reasoning({"input": [item]}, "openai") == {"input": []}


@pytest.mark.parametrize("given", ["text", None, [], [{"encrypted_content": "gAAA"}, 5, "x"]])
def test_a_body_without_seals_is_sent_as_it_is(given):
    assert router.own_reasoning({"input": given}, "openai") is None
