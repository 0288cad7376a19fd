"""The provider side of Anthropic Messages: requests made from a chat, answers read back."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import pytest
from claude_rules import check
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import GOLDEN, Recording

import router

OLD = "claude-sonnet-4-5"  # a budget for thinking, prefill
NEW = "claude-opus-4-8"  # adaptive, no sampling, system messages in the middle
MODELS = (
    "claude-3-5-haiku-latest",
    "claude-sonnet-4-0",
    OLD,
    "claude-sonnet-4-6",
    NEW,
    "claude-sonnet-5",
    "claude-haiku-5-5",
    "claude-sonnet-5-5",
    "claude-opus-5-5",
    "claude-fable-5-2",
    "glm-5",
)
PNG = base64.b64encode(b"\x89PNG\r\n").decode()
PDF = base64.b64encode(b"%PDF-1.7").decode()
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
SIGNED = {"type": "reasoning.text", "text": "hm", "signature": "c2ln", "origin": "anthropic"}


def made(*messages: Any, model: str = OLD, **chat: Any) -> Any:
    """The request for these messages; it is checked, and the chat must stay as it was."""
    whole = {"messages": list(messages), **chat}
    before, traits = copy.deepcopy(whole), router.claude_traits(model)
    body = router.chat_to_messages(whole, model, traits)
    assert whole == before
    check(body, traits)
    return body


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def call(id: str, name: str = "look", arguments: str = "{}") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(made), **more}


def result(id: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content, **more}


def refused(*messages: Any, **chat: Any) -> Any:
    with pytest.raises(router.BadRequest) as caught:
        made(*messages, **chat)
    return caught.value


# -- traits ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("claude-3-5-haiku-latest", ("free", "none", True, False, 8192)),
        ("claude-3-opus-20240229", ("free", "none", True, False, 4096)),
        ("claude-opus-4-20250514", ("free", "budget", True, False, 32_000)),
        ("claude-sonnet-4@20250514", ("free", "budget", True, False, 64_000)),
        ("claude-opus-4-1-20250805", ("one", "budget", True, False, 32_000)),
        ("claude-haiku-4-5", ("one", "budget", True, False, 64_000)),
        ("anthropic/claude-opus-4.6", ("one", "adaptive", False, False, 128_000)),
        ("us.anthropic.claude-opus-4-7-v1", ("none", "adaptive", False, False, 128_000)),
        ("claude-opus-4-8", ("none", "adaptive", False, True, 128_000)),
        ("claude-sonnet-5", ("none", "adaptive", False, False, 128_000)),
        ("claude-sonnet-5-5", ("none", "adaptive", False, True, 128_000)),
        ("claude-fable-5-1", ("none", "adaptive", False, False, 128_000)),
        ("claude-something-9", ("none", "adaptive", False, False, 128_000)),
        ("kimi-k3", ("free", "budget", True, False, 8192)),
    ],
)
def test_traits_of_a_model(model: str, expected: tuple[Any, ...]) -> None:
    traits = router.claude_traits(model)
    found = (traits.sampling, traits.thinking, traits.prefill, traits.mid_system)
    assert (*found, traits.max_output) == expected
    assert router.claude_traits(model, 777).max_output == 777


# -- system, roles, text ---------------------------------------------------------


def test_the_plain_request() -> None:
    chat = {
        "messages": [
            {"role": "system", "content": "A"},
            {"role": "system", "content": "B"},
            user("1"),
            user("2"),
            {"role": "assistant", "content": "3"},
        ],
        "stop": "Z",
        "temperature": 0.2,
        "stream": True,
    }
    traits = router.ClaudeTraits(1024)
    assert router.chat_to_messages(chat, "claude-x", traits) == {
        "model": "claude-x",
        "messages": [user("1\n2"), {"role": "assistant", "content": "3"}],
        "max_tokens": 1024,
        "system": "A\nB",
        "stream": True,
        "temperature": 0.2,
        "stop_sequences": ["Z"],
    }


def test_a_system_message_in_the_middle() -> None:
    middle = [user("1"), {"role": "developer", "content": "M"}]
    folded = made({"role": "system", "content": "A"}, *middle, user("2"))
    assert folded["system"] == "A\nM" and folded["messages"] == [user("1\n2")]
    kept = made({"role": "system", "content": "A"}, *middle, model=NEW)
    assert kept["system"] == "A"
    assert kept["messages"] == [user("1"), {"role": "system", "content": "M"}]
    answer = {"role": "assistant", "content": "x"}
    after = made(user("1"), answer, {"role": "system", "content": "M"}, model=NEW)
    assert after["messages"][-1] == user("[System message]\nM")


def test_the_first_turn_is_the_users_and_something_is_asked() -> None:
    body = made({"role": "assistant", "content": "hello"}, user("hi"))
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    assert made({"role": "system", "content": "Say hi"})["messages"] == [user("Say hi")]
    assert made(user("  "))["messages"][0]["role"] == "user"


def test_prefill() -> None:
    prefill = {"role": "assistant", "content": "The answer is \n"}
    assert made(user("1"), prefill)["messages"][-1]["content"] == "The answer is"
    assert made(user("1"), prefill, model=NEW)["messages"][-1] == user(router.GO_ON)


def test_empty_text_is_left_out() -> None:
    parts = [{"type": "text", "text": " "}, {"type": "text", "text": "x"}]
    assert made(user(parts), user(""))["messages"] == [user("x")]


# -- parts -----------------------------------------------------------------------


def test_images_and_documents() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpg;base64,{PNG}"}},
        {"type": "image_url", "image_url": "https://example.com/a.png"},
        {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{PDF}"}},
        {"type": "file", "file": {"file_url": "https://example.com/a.pdf", "filename": "a.pdf"}},
        {"type": "file", "file": {"file_data": "data:text/csv;base64,YSxi", "filename": "t"}},
    ]
    sources = [block["source"] for block in made(user(parts))["messages"][0]["content"]]
    assert sources == [
        {"type": "base64", "media_type": "image/jpeg", "data": PNG},
        {"type": "url", "url": "https://example.com/a.png"},
        {"type": "base64", "media_type": "application/pdf", "data": PDF},
        {"type": "url", "url": "https://example.com/a.pdf"},
        {"type": "text", "media_type": "text/plain", "data": "a,b"},
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "image_url", "image_url": {"url": f"data:image/tiff;base64,{PNG}"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "file", "file": {"file_data": "data:application/zip;base64,AAAA"}},
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(part: Any) -> None:
    error = refused(user("x"), user([{"type": "text", "text": "y"}, part]))
    assert str(error.param).startswith("messages[1].content[1]")


def test_an_image_of_the_assistant_is_refused() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    assert refused({"role": "assistant", "content": [image]}).param == "messages[0].content"


# -- tool calls and results ------------------------------------------------------


def test_results_stand_first_in_one_turn_in_the_order_of_the_calls() -> None:
    asked = calls(call("a", arguments='{"x": 1}'), call("b"), content="Let me see")
    answers = [user("wait"), result("b", "B", is_error=True), result("a", "A")]
    body = made(user("go"), asked, *answers, tools=[TOOL])
    assert body["messages"][1]["content"] == [
        {"type": "text", "text": "Let me see"},
        {"type": "tool_use", "id": "a", "name": "look", "input": {"x": 1}},
        {"type": "tool_use", "id": "b", "name": "look", "input": {}},
    ]
    assert body["messages"][2]["content"] == [
        {"type": "tool_result", "tool_use_id": "a", "content": "A"},
        {"type": "tool_result", "tool_use_id": "b", "content": "B", "is_error": True},
        {"type": "text", "text": "wait"},
    ]


def test_missing_results_and_orphans() -> None:
    body = made(user("go"), calls(call("a")), result("gone", "late", name="look"), tools=[TOOL])
    missing, label, text = body["messages"][2]["content"]
    assert missing["content"] == "[no result]" and missing["is_error"] is True
    assert "gone" in label["text"] and text["text"] == "late"
    assert made(user("go"), calls(call("a")), tools=[TOOL])["messages"][-1]["role"] == "user"


def test_ids_are_made_valid_and_different() -> None:
    turns = [calls(call("call:0"), call("call:0")), result("call:0", "1"), result("call:0", "2")]
    body = made(user("go"), *turns, *turns, tools=[TOOL])
    ids = [b["id"] for turn in body["messages"][1::2] for b in turn["content"]]
    assert ids == ["call_0", "call_0_2", "call_0_3", "call_0_4"]
    results = [b["content"] for turn in body["messages"][2::2] for b in turn["content"]]
    assert results == ["1", "2", "1", "2"]
    longer = made(user("go"), *turns, *turns, user("and?"), tools=[TOOL])
    assert longer["messages"][:4] == body["messages"][:4]


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', '{"a": NaN}', '{"a": "\\ud800"}', "[" * 9000])
def test_arguments_that_are_no_object_are_kept(text: str) -> None:
    body = made(user("go"), calls(call("a", arguments=text)), tools=[TOOL])
    assert body["messages"][1]["content"][0]["input"] == {"_raw": text}


def test_custom_tools() -> None:
    tool = {
        "type": "custom",
        "custom": {
            "name": "patch",
            "description": "Edits",
            "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: X"}},
        },
    }
    asked = {"id": "p", "type": "custom", "custom": {"name": "patch", "input": "*** x"}}
    body = made(user("go"), calls(asked), result("p", "ok"), tools=[tool])
    assert body["messages"][1]["content"][0]["input"] == {"input": "*** x"}
    assert body["tools"][0]["input_schema"]["required"] == ["input"]
    assert "start: X" in body["tools"][0]["description"]


def test_calls_of_the_older_kind() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    answer = {"role": "function", "name": "f", "content": "42"}
    body = made(user("go"), old, answer)
    assert body["messages"][2]["content"][0]["content"] == "42"


def test_images_in_a_result_take_the_place_of_is_error() -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    body = made(user("go"), calls(call("a")), result("a", [image], is_error=True), tools=[TOOL])
    assert body["messages"][2]["content"][0]["content"][0]["type"] == "image"


def test_a_history_with_calls_needs_tools() -> None:
    body = made(user("go"), calls(call("a")), result("a", "x"))
    assert body["tools"][0]["name"] == "look" and body["tool_choice"] == {"type": "none"}


# -- tools and tool_choice -------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("auto", {"type": "auto"}),
        ("none", {"type": "none"}),
        ("required", {"type": "any"}),
        ({"type": "function", "function": {"name": "look"}}, {"type": "tool", "name": "look"}),
    ],
)
def test_tool_choice(choice: Any, expected: Any) -> None:
    assert made(user("go"), tools=[TOOL], tool_choice=choice).get("tool_choice") == expected
    assert "tool_choice" not in made(user("go"), tool_choice=choice)


def test_tool_choice_of_a_tool_that_is_not_there() -> None:
    choice = {"type": "function", "function": {"name": "other"}}
    assert refused(user("go"), tools=[TOOL], tool_choice=choice).param == "tool_choice"


def test_allowed_tools_and_one_call_at_a_time() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "look"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    body = made(user("go"), tools=[other, TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert [tool["name"] for tool in body["tools"]] == ["look"]
    assert body["tool_choice"] == {"type": "any", "disable_parallel_tool_use": True}


def test_a_model_that_cannot_be_forced_is_asked() -> None:
    body = made(user("go"), tools=[TOOL], tool_choice="required", model="claude-opus-5-5")
    assert body["tool_choice"] == {"type": "auto"} and "calling" in body["system"]


def test_forced_tools_turn_thinking_off() -> None:
    more = {"tools": [TOOL], "tool_choice": "required", "reasoning_effort": "high"}
    assert "thinking" not in made(user("go"), **more)
    assert made(user("go"), model="claude-sonnet-5", **more)["thinking"] == {"type": "disabled"}


def test_names_that_anthropic_refuses_are_mapped_and_back() -> None:
    tools = [{"type": "function", "function": {"name": n}} for n in ("a.b", "a_b", "a/b", "a.b")]
    body = made(user("go"), calls(call("1", "a/b")), tools=tools)
    names = [tool["name"] for tool in body["tools"]]
    assert names == ["a_b", "a_b_2", "a_b_3"]
    assert body["messages"][1]["content"][0]["name"] == "a_b_3"
    reply = {"content": [{"type": "tool_use", "id": "1", "name": "a_b_3", "input": {}}]}
    back = router.messages_reply_to_chat(reply, chat={"tools": tools})
    assert back["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "a/b"


def test_a_schema_with_alternatives_at_the_top() -> None:
    schema = {
        "$defs": {"P": {"properties": {"p": {"type": "integer"}}, "required": ["p"]}},
        "allOf": [{"$ref": "#/$defs/P"}],
        "anyOf": [
            {"properties": {"a": {}, "c": {}}, "required": ["a", "c"]},
            {"properties": {"b": {}, "c": {}}, "required": ["b", "c"]},
        ],
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    made_schema = made(user("go"), tools=[tool])["tools"][0]["input_schema"]
    assert set(made_schema["properties"]) == {"a", "b", "c", "p"}
    assert made_schema["required"] == ["p", "c"]


# -- limits, sampling, thinking, output ------------------------------------------


def test_max_tokens() -> None:
    assert made(user("x"))["max_tokens"] == 64_000
    assert made(user("x"), max_tokens=5)["max_tokens"] == 5
    assert made(user("x"), max_tokens=5, max_completion_tokens=6)["max_tokens"] == 6
    assert made(user("x"), max_tokens=10**6)["max_tokens"] == 64_000


def test_sampling() -> None:
    wishes = {"temperature": 1.7, "top_p": 0.5, "top_k": 3}
    taken = ("temperature", "top_p", "top_k")

    def kept(model: str, **more: Any) -> dict[str, Any]:
        return {
            k: v for k, v in made(user("x"), model=model, **wishes, **more).items() if k in taken
        }

    assert kept("claude-sonnet-4-0") == {"temperature": 1, "top_p": 0.5, "top_k": 3}
    assert kept(OLD) == {"temperature": 1, "top_k": 3}
    assert kept(NEW) == {}
    assert kept(OLD, reasoning_effort="low") == {}


@pytest.mark.parametrize(
    ("model", "chat", "thinking", "effort"),
    [
        (OLD, {"reasoning_effort": "high"}, ("enabled", 16_384), None),
        (OLD, {"reasoning_effort": "none"}, None, None),
        (OLD, {"reasoning_effort": "high", "max_tokens": 4000}, ("enabled", 3000), None),
        (OLD, {"reasoning_effort": "high", "max_tokens": 1024}, None, None),
        (OLD, {"thinking": {"type": "enabled", "budget_tokens": 2000}}, ("enabled", 2000), None),
        (OLD, {"thinking": {"type": "adaptive"}}, ("enabled", 8192), None),
        (NEW, {"thinking": {"type": "adaptive"}}, ("adaptive", None), None),
        (NEW, {"thinking": {"type": "enabled", "budget_tokens": 9000}}, ("adaptive", None), "high"),
        (NEW, {"reasoning_effort": "xhigh"}, ("adaptive", None), "xhigh"),
        (NEW, {"reasoning_effort": "none"}, None, None),
        ("claude-sonnet-4-6", {"reasoning_effort": "xhigh"}, ("adaptive", None), "high"),
        ("claude-sonnet-5", {"reasoning_effort": "none"}, ("disabled", None), None),
        ("claude-sonnet-5-5", {"thinking": {"type": "disabled"}}, ("between_tools", None), None),
        ("claude-opus-5-5", {"reasoning_effort": "none"}, None, "low"),
        ("claude-opus-5-5", {}, None, None),
        ("claude-3-5-haiku-latest", {"reasoning_effort": "high"}, None, None),
    ],
)
def test_thinking(model: str, chat: Any, thinking: Any, effort: Any) -> None:
    body = made(user("x"), model=model, **chat)
    given = body.get("thinking")
    assert (given and (given["type"], given.get("budget_tokens"))) == thinking
    assert body.get("output_config", {}).get("effort") == effort


def test_thinking_goes_back_as_it_came_and_only_home() -> None:
    redacted = {"type": "reasoning.encrypted", "data": "ZGF0YQ==", "origin": "anthropic"}
    foreign = [
        {**SIGNED, "origin": "deepseek"},
        {"type": "reasoning.text", "text": "unsigned", "origin": "anthropic"},
        {"type": "reasoning.summary", "summary": "s", "origin": "anthropic"},
    ]
    turn = calls(call("a"), reasoning_details=[redacted, *foreign, SIGNED], reasoning_content="hm")
    body = made(user("go"), turn, result("a", "x"), tools=[TOOL], reasoning_effort="low")
    assert body["messages"][1]["content"][:2] == [
        {"type": "redacted_thinking", "data": "ZGF0YQ=="},
        {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
    ]
    assert body["messages"][1]["content"][2]["type"] == "tool_use"
    assert body["thinking"]["type"] == "enabled"
    foreign_turn = calls(call("a"), reasoning_details=foreign)
    body = made(user("go"), foreign_turn, result("a", "x"), tools=[TOOL], reasoning_effort="low")
    assert len(body["messages"][1]["content"]) == 1 and "thinking" not in body


def test_a_tool_loop_that_began_with_thinking_keeps_it() -> None:
    first, then = calls(call("a"), reasoning_details=[SIGNED]), calls(call("b"))
    loop = [user("go"), first, result("a", "1"), then, result("b", "2")]
    assert "thinking" in made(*loop, tools=[TOOL], reasoning_effort="low")
    broken = [*loop[:3], user("stop"), *loop[3:]]
    assert "thinking" not in made(*broken, tools=[TOOL], reasoning_effort="low")


def test_json_by_schema_or_by_instruction() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    strict = made(user("x"), response_format=wanted)["output_config"]["format"]["schema"]
    assert strict["additionalProperties"] is False
    assert strict["properties"]["n"] == {"type": "integer", "description": '{"minimum": 1}'}
    told = made(user("x"), response_format=wanted, model="claude-sonnet-4-0")
    assert "output_config" not in told and '"minimum": 1' in told["system"]
    assert "JSON" in made(user("x"), response_format={"type": "json_object"})["system"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {"a": {}}},
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/T"}},
            "$defs": {"T": {"type": "array", "items": {"$ref": "#/$defs/T"}}},
        },
    ],
)
def test_a_schema_that_structured_output_cannot_say(schema: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = made(user("x"), response_format=wanted)
    assert "output_config" not in body and "JSON schema" in body["system"]


def test_small_members() -> None:
    body = made(user("x"), stop=[" ", "\n", "END"], user="u" * 300, service_tier="default")
    assert body["stop_sequences"] == ["END"] and body["service_tier"] == "standard_only"
    assert body["metadata"] == {"user_id": "u" * 256}
    assert "stop_sequences" not in made(user("x"), stop="\n\n")


# -- cache -----------------------------------------------------------------------

MARK = {"cache_control": {"type": "ephemeral"}}


def test_long_prefixes_are_marked() -> None:
    long = {"role": "system", "content": "s" * 4096}
    one = made(long, user("x"))
    assert one["system"] == [{"type": "text", "text": "s" * 4096, **MARK}]
    assert one["messages"] == [user("x")]
    more = made(long, user("x"), {"role": "assistant", "content": "y"}, user("z"))
    assert more["messages"][-1]["content"] == [{"type": "text", "text": "z", **MARK}]
    wide = {"type": "function", "function": {"name": "w", "description": "d" * 5000}}
    assert made(user("x"), tools=[TOOL, wide])["tools"][-1]["cache_control"] == {
        "type": "ephemeral"
    }
    assert "cache_control" not in json.dumps(made(user("x"), user("y")))


def test_the_clients_marks_are_kept_up_to_four() -> None:
    parts = [{"type": "text", "text": f"{n}", **MARK} for n in range(5)]
    system = {"role": "system", "content": "s" * 9999}
    content = made(system, user(parts))["messages"][0]["content"]
    assert ["cache_control" in block for block in content] == [False, True, True, True, True]
    hour = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    late = [{"type": "text", "text": "a", **MARK}, {"type": "text", "text": "b", **hour}]
    assert made(user(late))["messages"][0]["content"][1] == {**late[1], **MARK}
    tool = made(user("x"), calls(call("a")), result("a", parts[:1]), tools=[{**TOOL, **hour}])
    assert tool["tools"][0]["cache_control"] == hour["cache_control"]
    assert tool["messages"][2]["content"][0]["cache_control"] == MARK["cache_control"]


# -- native requests -------------------------------------------------------------


def thought(signature: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": "t", "signature": signature}


def test_sealed_thinking_is_opened_for_its_origin_and_dropped_for_others() -> None:
    said = {"type": "text", "text": "x"}
    hidden = {"type": "redacted_thinking", "data": router.seal("anthropic", "ZA==")}
    body = {
        "messages": [
            user("1"),
            {"role": "assistant", "content": [thought("hr1.anthropic.c2ln"), hidden, said]},
            user("2"),
            {"role": "assistant", "content": [thought("hr1.deepseek.")]},
            user("3"),
        ]
    }
    before = copy.deepcopy(body)
    edits = router.own_thinking(body, "anthropic")
    assert body == before and edits is not None
    assert edits["messages"] == [
        user("1"),
        {
            "role": "assistant",
            "content": [thought("c2ln"), {"type": "redacted_thinking", "data": "ZA=="}, said],
        },
        user("2"),
        user("3"),
    ]


def test_native_requests_without_seals_stay_as_they_are() -> None:
    turns = [user("1"), {"role": "assistant", "content": [thought("real"), {"type": "x"}, 5]}]
    assert router.own_thinking({"messages": turns}, "anthropic") is None
    assert router.own_thinking({"messages": "junk"}, "anthropic") is None


def test_native_thinking_is_left_out_when_a_loop_lost_its_own() -> None:
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    answer = user([{"type": "tool_result", "tool_use_id": "a"}])
    for origin, lost in (("anthropic", False), ("deepseek", True)):
        sealed = thought(router.seal(origin, "c2ln"))
        turns = [user("1"), {"role": "assistant", "content": [sealed, use]}, answer]
        body = {"messages": turns, "thinking": {"type": "enabled", "budget_tokens": 2000}}
        edits = router.own_thinking(body, "anthropic")
        assert edits is not None and (edits.get("thinking") is router.DROP) is lost


# -- answers ---------------------------------------------------------------------


def feed(events: list[Any], reader: Any = None) -> list[Any]:
    reader = reader or router.MessagesReader()
    return [chunk for event in events for chunk in reader.feed(event)] + reader.finish()


def folded(events: list[Any], reader: Any = None) -> Any:
    return router.gathered_reply(feed(events, reader))


def started(block: Any, *deltas: Any, index: int = 0) -> list[Any]:
    head = {"type": "content_block_start", "index": index, "content_block": block}
    middle = [{"type": "content_block_delta", "index": index, "delta": d} for d in deltas]
    return [head, *middle, {"type": "content_block_stop", "index": index}]


def ended(reason: str, **more: Any) -> Any:
    return {"type": "message_delta", "delta": {"stop_reason": reason, **more}}


def text(value: str) -> Any:
    return {"type": "text_delta", "text": value}


def test_a_whole_reply() -> None:
    reply = {
        "id": "msg_1",
        "type": "message",
        "model": "claude-x",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
            {"type": "redacted_thinking", "data": "ZGF0YQ=="},
            {"type": "text", "text": "Let me "},
            {"type": "text", "text": "see."},
            {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"x": "é"}},
        ],
        "stop_reason": "tool_use",
        "usage": {
            "input_tokens": 5,
            "cache_read_input_tokens": 100,
            "cache_creation_input_tokens": 20,
            "output_tokens": 9,
            "output_tokens_details": {"thinking_tokens": 4},
        },
    }
    assert router.messages_reply_to_chat(reply, created=7) == {
        "id": "msg_1",
        "created": 7,
        "model": "claude-x",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Let me see.",
                    "reasoning_content": "hm",
                    "reasoning_details": [
                        SIGNED,
                        {"type": "reasoning.encrypted", "data": "ZGF0YQ==", "origin": "anthropic"},
                    ],
                    "tool_calls": [call("toolu_1", arguments='{"x":"é"}')],
                },
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 125,
            "completion_tokens": 9,
            "total_tokens": 134,
            "prompt_tokens_details": {"cached_tokens": 100, "cache_creation_tokens": 20},
            "completion_tokens_details": {"reasoning_tokens": 4},
        },
    }


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("tool_use", "tool_calls"),
        ("something_new", "stop"),
    ],
)
def test_finish_reasons(reason: str, finish: str) -> None:
    choice = folded([ended(reason, stop_sequence="Z")])["choices"][0]
    assert (choice["finish_reason"], choice["stop_sequence"]) == (finish, "Z")


def test_a_refusal_is_told() -> None:
    details = {"type": "refusal", "category": "bio", "explanation": "No."}
    choice = folded([ended("refusal", stop_details=details)])["choices"][0]
    assert choice["message"]["refusal"] == "No."


def test_calls_without_input_and_with_extra_members() -> None:
    block = {"type": "tool_use", "id": "t", "name": "f", "input": {}, "caller": {"type": "direct"}}
    chunks = feed(started(block, {"type": "input_json_delta", "partial_json": ""}))
    calls_made = [chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks]
    assert calls_made[0] == {"index": 0, **call("t", "f", "")}
    assert calls_made[1] == {"index": 0, "function": {"arguments": "{}"}}


def test_a_custom_tool_answers_with_text() -> None:
    chat = {"tools": [{"type": "custom", "custom": {"name": "patch"}}]}
    block = {"type": "tool_use", "id": "t", "name": "patch", "input": {}}
    parts = [{"type": "input_json_delta", "partial_json": p} for p in ('{"inp', 'ut": "a\\n"}')]
    events = [*started(block, *parts), ended("tool_use")]
    message = folded(events, router.MessagesReader(chat=chat))["choices"][0]["message"]
    expected = {"id": "t", "type": "custom", "custom": {"name": "patch", "input": "a\n"}}
    assert message["tool_calls"] == [expected]


def test_blocks_without_an_equal_lose_no_text() -> None:
    events = [
        *started({"type": "text", "text": ""}, text("Let me ask.")),
        *started({"type": "server_tool_use", "id": "s", "name": "advisor", "input": {}}, index=1),
        *started(
            {"type": "advisor_tool_result", "content": {"type": "advisor_result", "text": "4."}},
            index=2,
        ),
        *started({"type": "text", "text": "It is 4."}, index=3),
        *started({"type": "compaction", "content": None}, index=4),
        ended("end_turn"),
    ]
    message = folded(events)["choices"][0]["message"]
    assert message["content"] == "Let me ask.\n\nIt is 4."
    assert message["reasoning_content"] == "4."


def test_web_citations_become_annotations() -> None:
    cited = {"type": "web_search_result_location", "url": "https://e.com", "title": "E"}
    events = [
        *started({"type": "text", "text": "So: "}),
        *started(
            {"type": "text", "text": "", "citations": []},
            {"type": "citations_delta", "citation": cited},
            {"type": "citations_delta", "citation": {"type": "char_location"}},
            text("rain"),
            index=1,
        ),
    ]
    span = {"start_index": 4, "end_index": 8, "url": "https://e.com", "title": "E"}
    annotations = folded(events)["choices"][0]["message"]["annotations"]
    assert annotations == [{"type": "url_citation", "url_citation": span}]


def test_usage_is_put_together_from_both_ends() -> None:
    usage = {"input_tokens": 9, "cache_read_input_tokens": 4, "output_tokens": 1}
    events = [
        {"type": "message_start", "message": {"id": "m", "usage": usage}},
        {**ended("end_turn"), "usage": {"input_tokens": 0, "output_tokens": 30}},
    ]
    found = folded(events)["usage"]
    assert (found["prompt_tokens"], found["completion_tokens"]) == (13, 30)
    assert router.messages_tokens(events[0]) == router.Tokens(13, 1, cached=4)
    assert router.messages_tokens(events[1]) == router.Tokens(0, 30)
    assert router.messages_tokens({"type": "ping"}) is None


def test_errors_in_a_stream() -> None:
    event = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    told = {"error": {"message": "Overloaded", "type": "overloaded_error", "code": 529}}
    assert feed([event]) == [told] == [router.messages_reply_to_chat(event)]
    outcome = router.embedded_error(told)
    assert outcome is not None and (outcome.status, outcome.text) == (529, "Overloaded")


def test_a_stream_without_a_stop_reason_is_not_finished() -> None:
    reader = router.MessagesReader()
    feed([*started({"type": "text", "text": "x"}), {"type": "message_stop"}], reader)
    assert not reader.finished
    feed([ended("end_turn")], reader)
    assert reader.finished


# -- recordings ------------------------------------------------------------------

ANSWERS = [r for r in GOLDEN.values() if r.api == "messages" and r.status == 200]
STREAMS = [r for r in ANSWERS if r.streams]


def events_in(recording: Recording) -> list[Any]:
    pieces = [router.event_data(event) for event in router.split_events(recording.body)]
    return [json.loads(piece) for piece in pieces if piece]


@pytest.mark.parametrize("recording", STREAMS, ids=lambda r: r.id)
def test_a_recorded_stream(recording: Recording) -> None:
    events, reader = events_in(recording), router.MessagesReader()
    reply = folded(events, reader)
    assert reader.finished
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    message = reply["choices"][0]["message"]
    written = "".join(d["text"] for d in deltas if d["type"] == "text_delta")
    assert (message["content"] or "").replace("\n\n", "") == written.replace("\n\n", "")
    signatures = [d["signature"] for d in deltas if d["type"] == "signature_delta"]
    pieces = message.get("reasoning_details", [])
    assert [p["signature"] for p in pieces if "signature" in p] == signatures
    assert reply["usage"]["completion_tokens"] == events[-2]["usage"]["output_tokens"]
    assert any(router.chunk_sign(chunk) in ("useful", "finish") for chunk in feed(events))
    for event in router.split_events(recording.body):
        kind = json.loads(router.event_data(event))["type"]
        plain = kind.startswith("content_block") or kind == "ping"
        assert plain or not router.only_content_messages(event)


@pytest.mark.parametrize("recording", [r for r in ANSWERS if not r.streams], ids=lambda r: r.id)
def test_a_recorded_whole_answer(recording: Recording) -> None:
    body = recording.data["response"]["body"]
    reply = router.messages_reply_to_chat(body)
    outcome, _ = router.judge_reply(router.dump_json(reply))
    assert outcome is None
    texts = "".join(b["text"] for b in body["content"] if b["type"] == "text")
    assert (reply["choices"][0]["message"]["content"] or "") == texts
    assert router.tokens_of(reply) == router.messages_tokens(body)


def as_events(reply: Any, cut: Any) -> list[Any]:
    """A whole answer as a stream that is cut where `cut` says."""

    def pieces(value: str) -> list[str]:
        found = []
        while value:
            size = cut(len(value))
            found.append(value[:size])
            value = value[size:]
        return found

    events: list[Any] = [{"type": "message_start", "message": {**reply, "content": []}}]
    for index, block in enumerate(reply["content"]):
        if block["type"] == "text":
            start, deltas = {**block, "text": ""}, [text(p) for p in pieces(block["text"])]
        elif block["type"] == "thinking":
            start = {**block, "thinking": "", "signature": ""}
            found = pieces(block["thinking"])
            deltas = [{"type": "thinking_delta", "thinking": p} for p in found]
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
        elif block["type"] == "tool_use":
            start, found = {**block, "input": {}}, pieces(router.dump_json(block["input"]).decode())
            deltas = [{"type": "input_json_delta", "partial_json": p} for p in ["", *found]]
        else:
            start, deltas = block, []
        events += started(start, *deltas, index=index)
    return [*events, {**ended(reply["stop_reason"]), "usage": reply["usage"]}]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**6) | st.floats(-5, 5) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ANSWER_BLOCK = st.one_of(
    st.builds(lambda t: {"type": "text", "text": t}, TEXT),
    st.builds(lambda t, s: {**thought(s or "s"), "thinking": t}, TEXT, TEXT),
    st.just({"type": "redacted_thinking", "data": "ZA=="}),
    st.builds(
        lambda n, i: {"type": "tool_use", "id": "t", "name": n, "input": i},
        st.sampled_from(["look", "patch", "other"]),
        st.dictionaries(TEXT, JSON_VALUE, max_size=2),
    ),
    st.just({"type": "mcp_tool_result", "content": [{"type": "text", "text": "result"}]}),
)


@given(blocks=st.lists(ANSWER_BLOCK, max_size=5), data=st.data())
@settings(deadline=None)
def test_a_stream_cut_anywhere_is_the_whole(blocks: Any, data: Any) -> None:
    usage = {"input_tokens": 3, "output_tokens": 5}
    reply = {"id": "m", "content": blocks, "stop_reason": "end_turn", "usage": usage}
    chat = {"tools": [TOOL, {"type": "custom", "custom": {"name": "patch"}}]}
    events = as_events(reply, lambda size: data.draw(st.integers(1, size)))
    streamed = folded(events, router.MessagesReader(chat=chat))
    assert streamed == router.messages_reply_to_chat(reply, chat=chat)


# -- any input -------------------------------------------------------------------

NAMES = st.sampled_from(["look", "a.b", "é", "x" * 200])
IDS = st.sampled_from(["a", "b", "call:1", "", "é", "hr1.x"])
PART = st.one_of(
    st.builds(lambda t: {"type": "text", "text": t}, TEXT),
    st.builds(lambda t: {"type": "text", "text": t, **MARK}, TEXT),
    st.just({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}),
    st.just({"type": "file", "file": {"file_data": f"data:application/pdf;base64,{PDF}", **MARK}}),
)
CONTENT = TEXT | st.lists(PART, min_size=1, max_size=3)
CALL = st.builds(call, IDS, NAMES, TEXT | st.sampled_from(['{"x": 1}', "{}", "[]"])) | st.builds(
    lambda i, t: {"id": i, "type": "custom", "custom": {"name": "patch", "input": t}}, IDS, TEXT
)
DETAILS = st.lists(
    st.sampled_from([SIGNED, {**SIGNED, "origin": "x"}, {"type": "reasoning.text"}, {}]), max_size=2
)
MESSAGE = st.one_of(
    st.builds(user, CONTENT),
    st.builds(lambda c: {"role": "system", "content": c}, TEXT),
    st.builds(lambda c: {"role": "developer", "content": [{"type": "text", "text": c}]}, TEXT),
    st.builds(
        lambda c, made, d: {
            "role": "assistant",
            "content": c,
            "tool_calls": made,
            "reasoning_details": d,
        },
        TEXT,
        st.lists(CALL, max_size=3),
        DETAILS,
    ),
    st.builds(lambda i, c, e: result(i, c, is_error=e), IDS, CONTENT, st.booleans()),
    st.builds(lambda n, c: {"role": "function", "name": n, "content": c}, NAMES, TEXT),
)
SCHEMA = st.none() | st.dictionaries(
    st.sampled_from(["type", "properties", "required", "anyOf", "allOf", "$ref", "$defs", "items"]),
    JSON_VALUE
    | st.sampled_from(["object", "#/$defs/a", ["a"]])
    | st.just([{"properties": {"a": {"type": "string"}}, "required": ["a"]}])
    | st.just({"a": {"type": "integer", "minimum": 3}}),
)
TOOLS = st.lists(
    st.builds(
        lambda n, s: {"type": "function", "function": {"name": n, "parameters": s}, **MARK},
        NAMES,
        SCHEMA,
    )
    | st.just({"type": "custom", "custom": {"name": "patch"}})
    | st.just({"type": "web_search"})
    | st.just({"type": "web_search_20250305", "name": "web_search"}),
    max_size=4,
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "tools": TOOLS,
        "tool_choice": st.sampled_from(["auto", "none", "required", "odd", None])
        | st.builds(lambda n: {"type": "function", "function": {"name": n}}, NAMES),
        "parallel_tool_calls": st.booleans(),
        "temperature": st.floats(-3, 3) | st.integers(-3, 3),
        "top_p": st.floats(-1, 2),
        "top_k": st.integers(-1, 9),
        "max_tokens": st.integers(1, 3000),
        "stop": TEXT | st.lists(TEXT, max_size=3) | st.none(),
        "reasoning_effort": st.sampled_from(
            ["none", "minimal", "low", "high", "xhigh", "max", "?"]
        ),
        "thinking": st.sampled_from(
            [
                {"type": "enabled", "budget_tokens": 2000},
                {"type": "enabled"},
                {"type": "adaptive"},
                {"type": "disabled"},
                {"type": []},
                None,
            ]
        ),
        "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}])
        | st.builds(lambda s: {"type": "json_schema", "json_schema": {"schema": s}}, SCHEMA),
        "user": TEXT,
        "stream": st.booleans(),
    },
)


@given(
    messages=st.lists(MESSAGE, min_size=1, max_size=7),
    options=OPTIONS,
    model=st.sampled_from(MODELS),
)
@settings(max_examples=400, deadline=None)
def test_every_request_made_is_one_that_anthropic_takes(
    messages: Any, options: Any, model: str
) -> None:
    try:
        router.validate_chat({"messages": messages, **options})
        made(*messages, model=model, **options)
    except router.BadRequest as error:
        assert error.param


@given(
    chat=st.dictionaries(st.sampled_from(["messages", "tools", "tool_choice", "stop"]), JSON_VALUE)
)
@settings(deadline=None)
def test_junk_gives_a_request_or_a_bad_request(chat: Any) -> None:
    try:
        router.chat_to_messages(chat, NEW, router.claude_traits(NEW))
    except router.BadRequest as error:
        assert error.param


@given(
    messages=st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "tool", "system", "x", None])},
            optional={
                name: JSON_VALUE
                | st.lists(st.dictionaries(st.sampled_from(["type", "text", "file"]), JSON_VALUE))
                for name in ("content", "tool_calls", "reasoning_details", "tool_call_id", "name")
            },
        ),
        max_size=4,
    )
)
@settings(deadline=None)
def test_junk_messages_give_a_request_or_a_bad_request(messages: Any) -> None:
    try:
        body = router.chat_to_messages({"messages": messages}, OLD, router.claude_traits(OLD))
    except router.BadRequest as error:
        assert error.param
    else:
        check(body, router.claude_traits(OLD))
    router.own_thinking({"messages": messages}, "anthropic")


@given(events=st.lists(st.dictionaries(
    st.sampled_from(["type", "index", "delta", "content_block", "message", "usage"]),
    JSON_VALUE
    | st.sampled_from(["message_start", "content_block_start", "content_block_delta"])
    | st.sampled_from(["content_block_stop", "message_delta"])
    | st.dictionaries(
        st.sampled_from(["type", "text", "thinking", "signature", "partial_json", "usage", "name"]),
        JSON_VALUE | st.sampled_from(["text", "tool_use", "thinking", "text_delta"]),
    ),
), max_size=8))  # fmt: skip
@settings(deadline=None)
def test_junk_events_do_not_break_the_reader(events: Any) -> None:
    router.dump_json(folded(events))
