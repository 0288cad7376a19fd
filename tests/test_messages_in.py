"""The client's side of Anthropic Messages: requests in, replies, streams, errors and counts out."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import anthropic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import select

import router

Json = dict[str, Any]
ID = "abcdefghijklmnopqrstuvwx"
USER = {"role": "user", "content": "hi"}


def opening(**fields: Any) -> router.Opening:
    return router.Opening(**{"id": ID, "model": "claude-x", "input_tokens": 7, **fields})


def chat_of(*messages: Json, **body: Any) -> Json:
    return router.messages_to_chat({"messages": list(messages) or [USER], **body})


def said(*blocks: Json, role: str = "user") -> list[Json]:
    """The chat messages that blocks of one message become, behind a first `hi`."""
    return chat_of(USER, {"role": role, "content": list(blocks)})["messages"][1:]


def parsed(stream: bytes) -> list[Json]:
    """Events of a Messages stream; each must be named after its type."""
    events = []
    for event in stream.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def delta(finish: str | None = None, **members: Any) -> Json:
    return {"choices": [{"index": 0, "delta": members, "finish_reason": finish}]}


def call(index: int | None = 0, *, id: str = "", name: str = "", args: Any = None) -> Json:
    function = {k: v for k, v in (("name", name), ("arguments", args)) if v not in ("", None)}
    found: Json = {"function": function, **({"id": id} if id else {})}
    return delta(tool_calls=[found if index is None else {"index": index, **found}])


def stream(*chunks: Json, **fields: Any) -> list[Json]:
    writer = router.MessagesWriter(opening(**fields))
    return parsed(b"".join([*map(writer.feed, chunks), writer.finish()]))


def collect(*chunks: Json, **fields: Any) -> Json:
    return router.assembled(in_order(stream(*chunks, **fields)))


def blocks(*chunks: Json, **fields: Any) -> list[Json]:
    return collect(*chunks, **fields)["content"]


def in_order(events: list[Json]) -> list[Json]:
    """The events, after a look at the order every client relies on."""
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"] and kinds[-2:] == [
        "message_delta",
        "message_stop",
    ]
    current, following = -1, 0
    for event in events[2:-2]:
        kind = event["type"]
        if kind == "content_block_start":
            assert current < 0 and event["index"] == following
            assert event["content_block"].get("name") != ""
            current, following = following, following + 1
        elif kind == "content_block_stop":
            assert event["index"] == current
            current = -1
        else:
            assert kind == "content_block_delta" and event["index"] == current
    assert current < 0
    return events


# --- requests ---


def test_a_request_as_agreed() -> None:
    chat = chat_of(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look"},
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"},
                },
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "t"},
                {"type": "tool_use", "id": "tu1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "tu1", "content": [text("res")]},
                {"type": "text", "text": "go on"},
            ],
        },
        model="claude-x",
        max_tokens=50,
        system=[text("S1"), text("S2")],
        stop_sequences=["X"],
        tools=[{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        tool_choice={"type": "any"},
    )
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    arguments = {"name": "f", "arguments": '{"a": 1}'}
    assert chat == {
        "model": "claude-x",
        "messages": [
            {"role": "system", "content": "S1\nS2"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
                ],
            },
            {
                "role": "assistant",
                "content": "t",
                "tool_calls": [{"id": "tu1", "type": "function", "function": arguments}],
            },
            {"role": "tool", "tool_call_id": "tu1", "content": "res"},
            {"role": "user", "content": "go on"},
        ],
        "max_tokens": 50,
        "stop": ["X"],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
    }


def text(text: str, **members: Any) -> Json:
    return {"type": "text", "text": text, **members}


CACHE = {"type": "ephemeral"}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}
PARTS = [
    (
        {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
        [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}],
    ),
    (
        {"type": "image", "source": {"type": "file", "file_id": "f1"}},
        [{"type": "file", "file": {"file_id": "f1"}}],
    ),
    (
        {"type": "document", "source": PDF, "title": "a.pdf", "context": "old"},
        [
            text("old"),
            {
                "type": "file",
                "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"},
            },
        ],
    ),
    (
        {"type": "document", "source": {"type": "url", "url": "https://x/y.pdf"}},
        [{"type": "file", "file": {"file_url": "https://x/y.pdf"}}],
    ),
    (
        {"type": "document", "source": {"type": "file", "file_id": "f1"}},
        [{"type": "file", "file": {"file_id": "f1"}}],
    ),
    (
        {"type": "document", "title": "T", "source": {"type": "text", "data": "body"}},
        "[T]\nbody",
    ),
    (
        {"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}},
        "a\nb",
    ),
    ({"type": "document", "source": {"type": "content", "content": "a"}}, "a"),
    (
        {"type": "search_result", "title": "T", "source": "S", "content": [text("a")]},
        "[T](S)\na",
    ),
    ({"type": "tool_reference", "tool_name": "f"}, "[tool_reference]\nf"),
    ({"type": "container_upload", "file_id": "f1"}, "[container_upload]\nf1"),
    (text("a", cache_control=CACHE), [text("a", cache_control=CACHE)]),
]


@pytest.mark.parametrize(("block", "content"), PARTS)
def test_blocks_a_user_may_send(block: Json, content: Any) -> None:
    assert said(block) == [{"role": "user", "content": content}]
    result = {"type": "tool_result", "tool_use_id": "t", "content": [block]}
    assert said(result) == [{"role": "tool", "tool_call_id": "t", "content": content}]


def test_results_come_before_what_the_user_says_and_keep_order_errors_and_cache_marks() -> None:
    image = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    assert said(
        text("first"),
        {"type": "tool_result", "tool_use_id": "a", "is_error": True},
        image,
        {"type": "tool_result", "tool_use_id": "b", "content": "no", "cache_control": CACHE},
    ) == [
        {"role": "tool", "tool_call_id": "a", "content": "", "is_error": True},
        {"role": "tool", "tool_call_id": "b", "content": [text("no", cache_control=CACHE)]},
        {
            "role": "user",
            "content": [
                text("first"),
                {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
            ],
        },
    ]


def test_what_ran_at_anthropic_stays_as_text_without_what_is_opaque() -> None:
    (message,) = said(
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
        {
            "type": "web_search_tool_result",
            "tool_use_id": "s",
            "content": [
                {
                    "type": "web_search_result",
                    "title": "T",
                    "url": "https://x",
                    "encrypted_content": "SECRET",
                }
            ],
        },
        text("It is ", citations=[{"type": "x"}]),
        text("so."),
        role="assistant",
    )
    assert message == {
        "role": "assistant",
        "content": '[server_tool_use web_search] {"query": "q"}\n[web_search_tool_result]\n'
        "T\nhttps://x\nIt is so.",
    }


def test_instructions_inside_the_conversation_stay_where_they_stand() -> None:
    system = {"role": "system", "content": [text("later")]}
    messages = chat_of({"role": "system", "content": "b"}, USER, system, system, system="a")
    assert [(m["role"], m["content"]) for m in messages["messages"]] == [
        ("system", "a\nb"),
        ("user", "hi"),
        ("system", "later\nlater"),
    ]


def test_a_billing_note_is_for_anthropic_only() -> None:
    note = text("x-anthropic-billing-header: cc_version=1")
    assert chat_of(system=[note, text("S", cache_control=CACHE)])["messages"][0] == {
        "role": "system",
        "content": [text("S", cache_control=CACHE)],
    }
    assert chat_of(system=[note])["messages"] == [USER]


WISHES = [
    ({"max_tokens": 5, "top_k": 3, "temperature": 0.5, "top_p": 1}, {}),
    ({"stop_sequences": []}, {"stop_sequences": None}),
    ({"metadata": {"user_id": "u"}}, {"metadata": None, "user": "u"}),
    ({"output_config": {"effort": "high"}}, {"output_config": None, "reasoning_effort": "high"}),
    ({"thinking": {"type": "adaptive"}}, {}),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 31_999}},
        {"reasoning_effort": "high"},
    ),
    ({"thinking": {"type": "enabled", "budget_tokens": 1_024}}, {"reasoning_effort": "low"}),
    ({"thinking": {"type": "disabled"}}, {}),
    ({"service_tier": "standard_only"}, {"service_tier": "default"}),
    ({"service_tier": "auto"}, {"service_tier": None}),
    ({"context_management": {"edits": []}}, {"context_management": None}),
    ({"stream": True, "max_tokens": None}, {"max_tokens": None}),
]


@pytest.mark.parametrize(("body", "changes"), WISHES)
def test_other_members(body: Json, changes: Json) -> None:
    wanted = {k: v for k, v in {**body, **changes}.items() if v is not None}
    assert chat_of(**body) == {"messages": [USER], **wanted}


def test_a_long_user_id_becomes_its_digest() -> None:
    user = chat_of(metadata={"user_id": "u" * 65})["user"]
    assert len(user) == 32 and user != chat_of(metadata={"user_id": "v" * 65})["user"]


def test_a_schema_for_the_answer() -> None:
    closed = {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    given = {"type": "json_schema", "schema": closed}
    wanted = {"name": "answer", "schema": closed, "strict": True}
    for body in ({"output_config": {"format": given}}, {"output_format": given}):
        assert chat_of(**body)["response_format"] == {"type": "json_schema", "json_schema": wanted}
    loose = {"type": "json_schema", "schema": {**closed, "required": []}}
    assert "strict" not in chat_of(output_format=loose)["response_format"]["json_schema"]


def test_tools_of_all_kinds() -> None:
    body = {
        "tools": [
            {"name": "a", "defer_loading": True, "input_examples": [{}], "cache_control": CACHE},
            {"name": "b", "type": "custom", "input_schema": {"type": "object", "x": 1}},
            {"name": "web_search", "type": "web_search_20250305", "max_uses": 5},
        ],
        "tool_choice": {"type": "tool", "name": "b", "disable_parallel_tool_use": True},
    }
    chat = chat_of(**body)
    empty = {"type": "object", "properties": {}}
    assert chat["tools"] == [
        {
            "type": "function",
            "function": {"name": "a", "parameters": empty},
            "cache_control": CACHE,
        },
        {
            "type": "function",
            "function": {"name": "b", "parameters": {"type": "object", "x": 1}},
        },
    ]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "b"}}
    assert chat["parallel_tool_calls"] is False
    assert router.server_tools(body) == ["web_search"]


def test_tools_that_anthropic_defines_and_the_client_runs() -> None:
    editor = {"name": "str_replace_based_edit_tool", "type": "text_editor_20250728"}
    bash = {"name": "bash", "type": "bash_20250124"}
    tools = [tool["function"] for tool in chat_of(tools=[editor, bash])["tools"]]
    assert [tool["name"] for tool in tools] == ["str_replace_based_edit_tool", "bash"]
    assert tools[0]["parameters"]["required"] == ["command", "path"]
    assert set(tools[1]["parameters"]["properties"]) == {"command", "restart"}
    assert router.server_tools({"tools": [editor, bash]}) == []


def test_a_choice_of_a_tool_that_is_left_out_goes_with_it() -> None:
    search = {"name": "web_search", "type": "web_search_20250305"}
    wanted = {"type": "tool", "name": "web_search"}
    assert chat_of(tools=[search], tool_choice=wanted) == {"messages": [USER]}
    assert "tool_choice" not in chat_of(tools=[search, {"name": "f"}], tool_choice=wanted)


@pytest.mark.parametrize("kind", ["auto", "any", "none"])
def test_tool_choices(kind: str) -> None:
    chat = chat_of(tools=[{"name": "f"}], tool_choice={"type": kind})
    assert chat["tool_choice"] == {"any": "required"}.get(kind, kind)


def in_user(block: Any) -> Json:
    return {"messages": [{"role": "user", "content": [text("a"), block]}]}


def in_assistant(block: Any) -> Json:
    return {"messages": [{"role": "assistant", "content": [text("a"), block]}]}


BAD = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
    (in_user(3), "messages[0].content[1]"),
    (in_user({"type": "text"}), "messages[0].content[1].text"),
    (in_user({"type": "image"}), "messages[0].content[1].source"),
    (in_user({"type": "image", "source": {"type": "x"}}), "messages[0].content[1].source.type"),
    (
        in_user({"type": "image", "source": {"type": "base64", "data": "x"}}),
        "messages[0].content[1].source.media_type",
    ),
    (in_user({"type": "tool_result"}), "messages[0].content[1].tool_use_id"),
    (
        in_user({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text"}]}),
        "messages[0].content[1].content[0].text",
    ),
    (in_user({"type": "tool_use"}), "messages[0].content[1].type"),
    (in_assistant({"type": "tool_use", "id": "x"}), "messages[0].content[1].name"),
    (
        in_assistant({"type": "tool_use", "id": "x", "name": "f", "input": "{}"}),
        "messages[0].content[1].input",
    ),
    (in_assistant({"type": "thinking"}), "messages[0].content[1].thinking"),
    (in_assistant({"type": "tool_result"}), "messages[0].content[1].type"),
    ({"messages": [USER], "system": 3}, "system"),
    ({"messages": [USER], "system": [{"type": "text"}]}, "system[0].text"),
    ({"messages": [USER], "max_tokens": 0}, "max_tokens"),
    ({"messages": [USER], "stop_sequences": "x"}, "stop_sequences"),
    ({"messages": [USER], "tools": [{}]}, "tools[0].name"),
    ({"messages": [USER], "tools": [{"name": "f", "input_schema": 1}]}, "tools[0].input_schema"),
    ({"messages": [USER], "tool_choice": {"type": "x"}}, "tool_choice.type"),
    ({"messages": [USER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"messages": [USER], "metadata": {"user_id": 1}}, "metadata.user_id"),
    ({"messages": [USER], "output_config": {"format": {"type": "x"}}}, "output_config.format.type"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_what_cannot_be_used_is_named(body: Json, param: str) -> None:
    with pytest.raises(router.BadRequest) as caught:
        router.messages_to_chat(body)
    assert caught.value.param == param and param in caught.value.message


NAMES = """type text role user assistant system content image source base64 url data media_type
    document tool_use tool_result tool_use_id id name input input_schema thinking signature any
    redacted_thinking search_result title cache_control tools tool_choice messages custom metadata
    user_id output_config format effort json_schema schema is_error citations"""
WORDS = st.sampled_from(re.findall(r"\w+", NAMES))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=25,
)  # fmt: skip
SOURCES = st.fixed_dictionaries(
    {"type": st.sampled_from(["base64", "url", "file", "text", "content"])},
    optional={n: st.text(max_size=4) for n in ("data", "url", "media_type", "file_id", "content")},
)
BLOCKS = st.fixed_dictionaries(
    {"type": WORDS},
    optional={
        **{n: st.text(max_size=4) for n in ("text", "id", "name", "tool_use_id", "thinking")},
        "signature": st.sampled_from(
            ["", "sig", "hr1..", "hr1.openai.", "hr1.x.{}", 'hr1.x.{"a":1}']
        ),
        "input": st.dictionaries(WORDS, VALUES, max_size=2),
        "content": st.text(max_size=4) | VALUES,
        "source": SOURCES,
        "cache_control": VALUES,
    },
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]),
        "content": st.text(max_size=4) | st.lists(BLOCKS | VALUES, max_size=4),
    }
)
BODIES = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES, max_size=4) | VALUES},
    optional={
        "system": VALUES | st.lists(BLOCKS, max_size=2),
        "tools": st.lists(BLOCKS | VALUES, max_size=3),
        **{n: VALUES for n in ("tool_choice", "thinking", "metadata", "output_config", "model")},
    },
)


@settings(max_examples=400, deadline=None)
@given(BODIES | st.dictionaries(WORDS, VALUES, max_size=5))
def test_any_json_becomes_a_sound_chat_or_a_bad_request(body: Json) -> None:
    before = json.dumps(body)
    try:
        chat = router.messages_to_chat(body)
    except router.BadRequest as error:
        assert error.param
    else:
        router.validate_chat(chat)
        assert router.count_messages_tokens(body) > 0
    assert json.dumps(body) == before


# --- reasoning there and back ---

PIECES = [
    {"type": "reasoning.text", "text": "hm", "signature": "c2ln", "origin": "anthropic"},
    {"type": "reasoning.text", "text": "", "signature": "c2ln", "origin": "anthropic"},
    {"type": "reasoning.text", "text": "hm", "origin": "deepseek"},
    {"type": "reasoning.summary", "summary": "hm", "id": "rs_1", "origin": "openai"},
    {"type": "reasoning.encrypted", "data": "gAAA", "id": "rs_1", "origin": "codex"},
    {"type": "reasoning.encrypted", "data": "EqkE", "origin": "anthropic"},
    {"type": "reasoning.text", "text": "a", "format": "x", "index": 0, "origin": "openrouter"},
]


def replayed(content: list[Json]) -> Json:
    """The assistant message that a client's replay of an answer's blocks becomes."""
    return said(*content, role="assistant")[0]


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_of_reasoning_comes_back_as_it_was(piece: Json) -> None:
    made = blocks(delta(reasoning_details=[piece]), delta("stop", content="so"))
    message = replayed(made)
    assert message["reasoning_details"] == [piece] and message["content"] == "so"
    readable = piece.get("text") or piece.get("summary")
    assert message.get("reasoning_content", "") == (readable or "")


@given(st.permutations(PIECES))
def test_all_pieces_of_a_whole_reply_come_back_in_order(pieces: list[Json]) -> None:
    message = {"role": "assistant", "content": "so", "reasoning_details": pieces}
    reply = {"choices": [{"message": message, "finish_reason": "stop"}]}
    made = router.chat_reply_to_messages(reply, opening())
    assert replayed(made["content"])["reasoning_details"] == pieces


def test_how_reasoning_looks_to_a_client() -> None:
    made = blocks(*(delta(reasoning_details=[piece]) for piece in PIECES), delta(content="so"))
    assert [block["type"] for block in made] == [
        *["thinking"] * 5,
        "redacted_thinking",
        "thinking",
        "text",
    ]
    assert made[0]["signature"] == "hr1.anthropic.c2ln"
    assert made[2] == {"type": "thinking", "thinking": "hm", "signature": "hr1.deepseek."}
    assert made[5]["data"] == "hr1.anthropic.EqkE"


def test_reasoning_whose_piece_comes_at_its_end() -> None:
    chunks = [
        delta(reasoning_content="let me "),
        delta(reasoning_content="see"),
        delta(reasoning_details=[{**PIECES[0], "text": "let me see"}]),
        delta(reasoning_content="\n\nmore"),
        delta(reasoning_details=[{**PIECES[0], "text": "more", "signature": "eA"}]),
        delta(content="so"),
    ]
    thinking = [
        {"type": "thinking", "thinking": "let me see", "signature": "hr1.anthropic.c2ln"},
        {"type": "thinking", "thinking": "more", "signature": "hr1.anthropic.eA"},
    ]
    assert blocks(*chunks) == [*thinking, text("so")]


def test_reasoning_whose_pieces_grow_beside_the_text() -> None:
    piece = {"type": "reasoning.text", "index": 0, "origin": "openrouter"}
    chunks = [
        delta(reasoning_content="a", reasoning_details=[{**piece, "text": "a"}]),
        delta(reasoning_content="b", reasoning_details=[{**piece, "text": "b"}]),
        delta(reasoning_details=[{**piece, "signature": "s"}]),
        delta(content="so"),
    ]
    made = blocks(*chunks)
    assert [block.get("thinking") for block in made] == ["ab", None]
    assert replayed(made)["reasoning_details"] == [{**piece, "text": "ab", "signature": "s"}]


def test_reasoning_without_a_piece() -> None:
    made = blocks(delta(reasoning_content="a"), delta(reasoning="b"), delta(content="so"))
    assert made[0] == {"type": "thinking", "thinking": "ab", "signature": "hr1.."}
    assert replayed(made)["reasoning_content"] == "ab"


def test_reasoning_goes_back_to_who_answered_if_that_is_known() -> None:
    message = {"content": "so", "reasoning_content": "hm"}
    reply = {"choices": [{"message": message, "finish_reason": "stop"}]}
    whole = router.chat_reply_to_messages(reply, opening(), "deepseek")
    assert replayed(whole["content"])["reasoning_details"] == [PIECES[2]]
    writer = router.MessagesWriter(opening(), "deepseek")
    chunks = [delta(reasoning_content="hm"), delta("stop", content="so")]
    events = parsed(b"".join([*map(writer.feed, chunks), writer.finish()]))
    assert router.assembled(events)["content"] == whole["content"]


def test_summaries_that_come_after_their_text() -> None:
    first = {"type": "reasoning.summary", "id": "rs_1", "origin": "openai"}
    chunks = [
        delta(reasoning_content="a"),
        delta(reasoning_content="\n\nb"),
        delta(
            reasoning_details=[
                {**first, "summary": "a"},
                {**first, "summary": "b", "index": 1},
                {**PIECES[4], "origin": "openai"},
            ]
        ),
        delta(content="so"),
    ]
    made = blocks(*chunks)
    assert [block.get("thinking") for block in made] == ["a\n\nb", "", None]
    assert replayed(made)["reasoning_details"] == [
        {**first, "summary": "a\n\nb"},
        {**PIECES[4], "origin": "openai"},
    ]


def test_native_signatures_belong_to_anthropic() -> None:
    message = replayed(
        [
            {"type": "thinking", "thinking": "a", "signature": "c2ln"},
            {"type": "redacted_thinking", "data": "EqkE"},
            {"type": "thinking", "thinking": "b"},
        ]
    )
    assert message["reasoning_content"] == "a\n\nb"
    assert message["reasoning_details"] == [
        {"type": "reasoning.text", "text": "a", "signature": "c2ln", "origin": "anthropic"},
        {"type": "reasoning.encrypted", "data": "EqkE", "origin": "anthropic"},
        {"type": "reasoning.text", "text": "b"},
    ]


def test_extra_content_of_a_call_comes_back() -> None:
    extra = {"google": {"thought_signature": "c2ln"}}
    chunk = call(id="c1", name="f", args="{}")
    chunk["choices"][0]["delta"]["tool_calls"][0]["extra_content"] = extra
    made = blocks(chunk)
    assert [block["type"] for block in made] == ["thinking", "tool_use"]
    message = replayed(made)
    assert message["tool_calls"][0]["extra_content"] == extra
    assert "reasoning_details" not in message


# --- streams ---


def test_the_order_of_events() -> None:
    events = stream(
        delta(role="assistant", content="He"),
        delta(content="y"),
        call(id="x", name="f", args=""),
        call(args="{}"),
        delta("tool_calls"),
    )
    assert [(e["type"], e.get("index")) for e in events] == [
        ("message_start", None),
        ("ping", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert events[0]["message"]["id"] == f"msg_{ID}"
    assert events[0]["message"]["model"] == "claude-x"
    assert events[6]["content_block"] == {"type": "tool_use", "id": "x", "name": "f", "input": {}}
    assert events[7]["delta"] == {"type": "input_json_delta", "partial_json": "{}"}
    assert events[9]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


def uses(*chunks: Json, **fields: Any) -> list[tuple[str, str, Json]]:
    made = blocks(*chunks, delta("tool_calls"), **fields)
    return [(b["id"], b["name"], b["input"]) for b in made if b["type"] == "tool_use"]


def test_interleaved_calls_are_untangled() -> None:
    assert uses(
        call(0, id="a", name="f", args='{"x"'),
        call(1, id="b", name="g", args='{"y":'),
        call(0, args=': "}'),
        call(1, args="2}"),
        call(0, args='"}'),
    ) == [("a", "f", {"x": "}"}), ("b", "g", {"y": 2})]


ODD_CALLS = [
    ("whole", [call(id="a", name="f", args='{"x":1}')]),
    ("object", [call(id="a", name="f", args={"x": 1})]),
    ("name late", [call(id="a", args='{"x"'), call(args=":1}", name="f")]),
    ("name again", [call(id="a", name="f", args='{"x"'), call(id="a", name="f", args=":1}")]),
    ("name at the end", [call(id="a", name="f", args='{"x":1}'), call(name="f")]),
    ("no index", [call(None, id="a", name="f"), call(None, args='{"x"'), call(None, args=":1}")]),
    ("new ids", [call(id="a", name="f", args='{"x"'), call(id="q", name="f", args=":1}")]),
    ("ids only first", [call(None, id="a", name="f", args='{"x"'), call(None, id="z", args=":1}")]),
    ("braces first", [call(id="a", name="f", args="{}"), call(args='{"x":1}')]),
    ("fenced", [call(id="a", name="f", args='```json\n{"x"'), call(args=":1}\n```")]),
    ("quoted", [call(id="a", name="f", args=json.dumps('{"x":1}'))]),
    ("junk", [call(id="a", name="f", args='{"x":1}'), call(args="</tool_call>")]),
    ("nameless", [call(id="a", name="f", args='{"x":1}'), call(1, id="b")]),
]


@pytest.mark.parametrize("chunks", [c for _, c in ODD_CALLS], ids=[n for n, _ in ODD_CALLS])
def test_one_call_however_it_comes(chunks: list[Json]) -> None:
    assert uses(*chunks) == [("a", "f", {"x": 1})]


@pytest.mark.parametrize("args", ["", None, "null", "{}", "[]", "none"])
def test_a_call_without_arguments_has_an_empty_object(args: str | None) -> None:
    events = stream(call(id="a", name="f", args=args))
    assert [e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta"] == [
        "{}"
    ]


def test_several_calls_that_share_an_index_an_id_or_nothing() -> None:
    two = [("a", "f", {"x": 1}), ("b", "f", {"x": 2})]
    assert (
        uses(call(id="a", name="f", args='{"x":1}'), call(id="b", name="f", args='{"x":2}')) == two
    )
    made = uses(
        call(0, id="a", name="f", args='{"x":1}'), call(1, id="a", name="f", args='{"x":2}')
    )
    assert made == [two[0], (f"toolu_{ID}1", "f", {"x": 2})]
    made = uses(call(None, name="f", args='{"x":1}'), call(None, name="f", args='{"x":2}'))
    assert made == [(f"toolu_{ID}0", "f", {"x": 1}), (f"toolu_{ID}1", "f", {"x": 2})]


def test_ids_of_earlier_turns_and_odd_letters_are_avoided() -> None:
    use = {"type": "tool_use", "id": "call_0", "name": "f", "input": {}}
    request = {"messages": [{"role": "assistant", "content": [use]}]}
    assert uses(call(id="call_0", name="f"), request=request)[0][0] == f"toolu_{ID}0"
    assert uses(call(id="functions.f:0", name="f"))[0][0] == "functions_f_0"


def test_text_after_and_amid_calls() -> None:
    assert blocks(
        delta(content="a"),
        call(id="c", name="f", args='{"x":'),
        delta(content="b"),
        call(args="1}"),
        delta(content="c"),
    ) == [text("a"), {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}}, text("bc")]


def test_everything_in_one_chunk() -> None:
    chunk = delta(
        "tool_calls",
        role="assistant",
        content="a",
        reasoning_content="r",
        refusal=None,
        tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}],
    )
    made = collect({**chunk, "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
    assert [block["type"] for block in made["content"]] == ["thinking", "text", "tool_use"]
    assert made["usage"]["output_tokens"] == 4 and made["stop_reason"] == "tool_use"


def test_custom_calls_have_one_argument() -> None:
    custom = {"index": 0, "id": "c", "type": "custom", "custom": {"name": "f", "input": "{ab"}}
    more = {"index": 0, "custom": {"input": "c"}}
    assert uses(delta(tool_calls=[custom]), delta(tool_calls=[more])) == [
        ("c", "f", {"input": "{abc"})
    ]


def test_white_space_alone_opens_no_block() -> None:
    assert [b["type"] for b in blocks(delta(content="\n\n"), call(id="c", name="f"))] == [
        "tool_use"
    ]
    assert blocks(delta(content="\n"), delta(content=" a"), delta(content="\n")) == [text("\n a\n")]
    assert blocks(delta(content="\n")) == [text("")]


STOPS = [
    (delta("stop"), "end_turn"),
    (delta("length"), "max_tokens"),
    (delta("content_filter"), "refusal"),
    (delta("tool_calls"), "end_turn"),
    (delta(""), "end_turn"),
    (delta(None), "end_turn"),
]


@pytest.mark.parametrize(("chunk", "reason"), STOPS)
def test_why_it_stopped(chunk: Json, reason: str) -> None:
    made = collect(delta(content="a"), chunk)
    assert (made["stop_reason"], made["stop_sequence"]) == (reason, None)
    forced = collect(call(id="c", name="f", args="{}"), chunk)
    assert forced["stop_reason"] == "tool_use"


def test_a_stop_sequence_is_told() -> None:
    chunk = delta("stop")
    chunk["choices"][0]["stop_sequence"] = "X"
    made = collect(delta(content="a"), chunk)
    assert (made["stop_reason"], made["stop_sequence"]) == ("stop_sequence", "X")


def test_a_call_that_was_cut_short_is_not_to_be_made() -> None:
    assert (
        collect(call(id="c", name="f", args='{"a":'), delta("length"))["stop_reason"]
        == "max_tokens"
    )


def test_empty_answers() -> None:
    assert blocks() == [text("")]
    assert blocks(delta("stop")) == [text("")]
    assert collect(delta("content_filter"))["content"] == []


def test_refusals_are_text() -> None:
    assert blocks(delta(refusal="I "), delta(refusal="won't")) == [text("I won't")]


USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 60, "cache_creation_tokens": 30},
    "completion_tokens_details": {"reasoning_tokens": 5},
}


def test_usage_is_seeded_and_then_told() -> None:
    events = stream(delta(content="a"), delta("stop"), {"choices": [], "usage": USAGE})
    assert events[0]["message"]["usage"] == {
        "input_tokens": 7,
        "output_tokens": 0,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }
    assert events[-2]["usage"] == {
        "input_tokens": 10,
        "output_tokens": 9,
        "cache_creation_input_tokens": 30,
        "cache_read_input_tokens": 60,
        "output_tokens_details": {"thinking_tokens": 5},
    }


def test_usage_is_guessed_if_nobody_tells_it() -> None:
    usage = stream(delta(content="a" * 9))[-2]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (7, 3)


def test_half_characters_are_sent_so_that_they_can_meet() -> None:
    writer = router.MessagesWriter(opening())
    made = writer.feed(delta(content="a")) + writer.feed(delta(content="\ud83d"))
    made += writer.feed(delta(content="\ude00")) + writer.finish()
    assert b"\\ud83d" in made and b"\\ude00" in made


def test_failures_and_beats() -> None:
    writer = router.MessagesWriter(opening())
    assert [e["type"] for e in parsed(writer.beat())] == ["message_start", "ping"]
    assert [e["type"] for e in parsed(writer.beat())] == ["ping"]
    writer.feed(delta(content="a"))
    (failure,) = parsed(writer.fail(router.Exhausted("no more")))
    assert failure == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "no more"},
    }
    assert writer.finish() == writer.beat() == writer.feed(delta(content="b")) == b""
    first = router.MessagesWriter(opening())
    assert [e["type"] for e in parsed(first.fail(router.BadRequest("no")))] == ["error"]


def test_an_error_in_a_chunk_ends_the_stream() -> None:
    writer = router.MessagesWriter(opening())
    error = {"message": "slow down", "type": "rate_limit_error", "code": 429}
    (event,) = parsed(writer.feed({"error": error}))
    assert event["error"] == {"type": "rate_limit_error", "message": "slow down"}
    assert writer.finish() == b""


# --- streams cut in any way ---

NASTY = st.text(alphabet='{}[]"\\,:ab \n', max_size=8)
ARGUMENTS = st.dictionaries(NASTY, NASTY | st.integers(), max_size=3)
REPLIES = st.fixed_dictionaries(
    {
        "reasoning": st.text(max_size=12),
        "text": st.text(max_size=12),
        "calls": st.lists(st.tuples(st.sampled_from("fg"), ARGUMENTS), max_size=3),
    }
)


def reply_of(plan: Json) -> Json:
    calls = [
        {
            "id": f"c{at}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for at, (name, arguments) in enumerate(plan["calls"])
    ]
    message: Json = {"role": "assistant", "content": plan["text"] or None, "tool_calls": calls}
    message["reasoning_content"] = plan["reasoning"]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
    return {"choices": [choice], "usage": USAGE}


def chunks_of(reply: Json, rng: random.Random) -> Iterator[Json]:
    """The reply as a stream cut at random, with the pieces of its calls interleaved."""
    message = reply["choices"][0]["message"]
    for name in ("reasoning_content", "content"):
        yield from (delta(**{name: piece}) for piece in pieces_of(message[name] or "", rng))
    waiting = []
    for at, made in enumerate(message["tool_calls"]):
        function = made["function"]
        pieces = list(pieces_of(function["arguments"], rng))
        head = call(at, id=made["id"], name=function["name"], args=pieces.pop(0))
        waiting.append([head, *(call(at, args=piece) for piece in pieces)])
    begun = 0
    while any(waiting):
        at = rng.randrange(min(begun + 1, len(waiting)))
        begun = max(begun, at + 1)
        if waiting[at]:
            yield waiting[at].pop(0)
    yield delta(reply["choices"][0]["finish_reason"])
    yield {"choices": [], "usage": reply["usage"]}


def pieces_of(value: str, rng: random.Random) -> Iterator[str]:
    start = 0
    while start < len(value):
        end = start + rng.choice((1, 1, 2, 5, 100))
        yield value[start:end]
        start = end


@settings(max_examples=300, deadline=None)
@given(REPLIES, st.integers(0, 2**32))
def test_a_stream_cut_in_any_way_amounts_to_the_whole(plan: Json, seed: int) -> None:
    reply = reply_of(plan)
    whole = router.chat_reply_to_messages(reply, opening())
    assert collect(*chunks_of(reply, random.Random(seed))) == whole
    assert [b["input"] for b in whole["content"] if b["type"] == "tool_use"] == [
        arguments for _, arguments in plan["calls"]
    ]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["choices", "usage", "id"]), VALUES), max_size=4))
def test_any_chunks_make_a_sound_stream(chunks: list[Json]) -> None:
    in_order(stream(*chunks))


CALLS = st.fixed_dictionaries(
    {},
    optional={
        "index": st.integers(0, 2) | VALUES,
        "id": st.sampled_from(["", "a", "b"]),
        "custom": VALUES,
        "function": st.fixed_dictionaries(
            {},
            optional={
                "name": st.sampled_from(["", "f", "g"]) | VALUES,
                "arguments": st.sampled_from(['{"a"', ":1}", "{}", "{", "x"]) | VALUES,
            },
        ),
        "extra_content": VALUES,
    },
)
DELTAS = st.fixed_dictionaries(
    {},
    optional={
        "content": st.text(max_size=3) | VALUES,
        "reasoning_content": st.text(max_size=3) | VALUES,
        "reasoning_details": st.lists(st.sampled_from(PIECES) | VALUES, max_size=2),
        "tool_calls": st.lists(CALLS, max_size=2) | VALUES,
        "refusal": VALUES,
    },
)


@settings(max_examples=400, deadline=None)
@given(st.lists(DELTAS, max_size=6), st.sampled_from(["stop", "length", "tool_calls", ""]))
def test_any_deltas_make_a_sound_stream(deltas: list[Json], finish: str) -> None:
    in_order(stream(*(delta(**members) for members in deltas), delta(finish)))
    for members in deltas:
        reply = {"choices": [{"message": members, "finish_reason": finish}]}
        assert router.chat_reply_to_messages(reply, opening())["type"] == "message"


# --- recordings ---


def recorded_chunks(body: bytes) -> list[Json]:
    datas = [router.event_data(event) for event in router.split_events(body)]
    return [json.loads(data) for data in datas if data.startswith(b"{")]


@pytest.mark.parametrize("recording", select(streams=True), ids=lambda r: r.id)
def test_recorded_streams(recording: Any) -> None:
    chunks = recorded_chunks(recording.body)
    failed = any(chunk.get("error") for chunk in chunks)
    writer = router.MessagesWriter(opening())
    events = parsed(b"".join([*map(writer.feed, chunks), writer.finish()]))
    if failed:
        assert events[-1]["type"] == "error"
        return
    made = router.assembled(in_order(events))
    deltas = [c["choices"][0].get("delta") or {} for c in chunks if c.get("choices")]
    told = "".join(d.get("content") or "" for d in deltas)
    shown = "".join(b["text"] for b in made["content"] if b["type"] == "text")
    assert shown == told or not told.strip()
    called = [c for d in deltas for c in d.get("tool_calls") or () if c["function"].get("name")]
    assert len(called) == sum(b["type"] == "tool_use" for b in made["content"])


@pytest.mark.parametrize("recording", select(streams=False), ids=lambda r: r.id)
def test_recorded_replies(recording: Any) -> None:
    reply = json.loads(recording.body)
    if not reply.get("choices"):
        pytest.skip("no answer in it")
    made = router.chat_reply_to_messages(reply, opening())
    message = reply["choices"][0]["message"]
    used = [b for b in made["content"] if b["type"] == "tool_use"]
    calls = message.get("tool_calls") or []
    assert [b["name"] for b in used] == [c["function"]["name"] for c in calls]
    inputs = [json.loads(c["function"].get("arguments") or "{}") for c in calls]
    assert [b["input"] for b in used] == inputs
    assert made["usage"]["output_tokens"] == reply["usage"]["completion_tokens"]


# --- the official SDK ---


class Canned(BaseHTTPRequestHandler):
    """Answers every POST with the server's `body`, an event stream."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(self.server.body)  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def sdk() -> Iterator[Any]:
    """sdk(stream bytes) -> the message that the Anthropic SDK collects from them."""
    server = HTTPServer(("127.0.0.1", 0), Canned)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    client = anthropic.Anthropic(api_key="k", base_url=url, max_retries=0)

    def collected(body: bytes) -> Json:
        server.body = body  # type: ignore[attr-defined]
        with client.messages.stream(model="m", max_tokens=9, messages=[USER]) as events:  # type: ignore[list-item]
            return events.get_final_message().to_dict()

    yield collected
    client.close()
    server.shutdown()
    server.server_close()
    thread.join(5)


PLANS = [
    {"reasoning": "", "text": "", "calls": []},
    {"reasoning": "hm", "text": "so", "calls": [("f", {"a": [1, "}"]}), ("g", {})]},
    {"reasoning": "", "text": "só 😀", "calls": [("f", {"\\": '"'})]},
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("seed", range(3))
def test_the_sdk_collects_what_the_whole_answer_says(sdk: Any, plan: Json, seed: int) -> None:
    reply = reply_of(plan)
    writer = router.MessagesWriter(opening())
    chunks = chunks_of(reply, random.Random(seed))
    body = b"".join([*map(writer.feed, chunks), writer.beat(), writer.finish()])
    whole = router.chat_reply_to_messages(reply, opening())
    got = sdk(body)
    assert {name: got[name] for name in whole} == whole


def test_the_sdk_raises_what_failed(sdk: Any) -> None:
    writer = router.MessagesWriter(opening())
    body = writer.feed(delta(content="a")) + writer.fail(router.OverLimit("too fast"))
    with pytest.raises(anthropic.APIStatusError, match="too fast"):
        sdk(body)


# --- errors and counts ---

ERRORS = [
    (router.BadRequest, "invalid_request_error"),
    (router.Unauthorized, "authentication_error"),
    (router.Forbidden, "permission_error"),
    (router.NotFound, "not_found_error"),
    (router.TooLarge, "request_too_large"),
    (router.OverLimit, "rate_limit_error"),
    (router.Exhausted, "overloaded_error"),
    (router.RouterError, "api_error"),
]


@pytest.mark.parametrize(("kind", "word"), ERRORS)
def test_errors_as_anthropic_says_them(kind: type[router.RouterError], word: str) -> None:
    made = router.messages_error(kind("why"), "req_1")
    assert made == {
        "type": "error",
        "error": {"type": word, "message": "why"},
        "request_id": "req_1",
    }
    assert "request_id" not in router.messages_error(kind("why"))


OVERFLOWS = [
    ("prompt is too long: 205000 tokens > 200000 maximum", 205_000, 200_000),
    (
        "This model's maximum context length is 8192 tokens. However, your messages resulted in "
        "10,240 tokens.",
        10_240,
        8_192,
    ),
    (
        "maximum context length is 128000 tokens, however you requested 130000 tokens (125000 in "
        "the messages, 5000 in the completion)",
        130_000,
        128_000,
    ),
    ("gpt-4-0613: the request has 9000 tokens, limit 8192 (seen 2026-01-02)", 9_000, 8_192),
]


@pytest.mark.parametrize(("said", "size", "limit"), OVERFLOWS)
def test_overflow_is_said_so_that_agents_compact(said: str, size: int, limit: int) -> None:
    error = router.Exhausted(said, code="context_length_exceeded")
    made = router.messages_error(error)["error"]
    assert made["type"] == "invalid_request_error"
    assert f"prompt is too long: {size} tokens > {limit}" in made["message"]


def test_overflow_without_numbers_and_of_the_wish() -> None:
    def message(text: str) -> str:
        error = router.BadRequest(text, code="context_length_exceeded")
        return router.messages_error(error)["error"]["message"]

    assert message("no room") == "prompt is too long: no room"
    kept = "input length and `max_tokens` exceed context limit: 190000 + 64000 > 200000"
    assert message(kept) == kept


class Letters:
    """An encoder that counts letters."""

    def count(self, text: str) -> int:
        return len(text)


def test_counts_grow_with_everything_a_request_may_hold() -> None:
    long = "x" * 500
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": long}}
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": long}}

    def result(content: Any) -> Json:
        return {"type": "tool_result", "tool_use_id": "t", "content": content}

    def body(block: Json, role: str = "user") -> Json:
        return {"messages": [USER, {"role": role, "content": [block]}]}

    bodies = [
        {"messages": [USER], "system": long},
        {"messages": [USER], "tools": [{"name": "f", "description": long}]},
        body(text(long)),
        body(result(long)),
        body({"type": "search_result", "title": "t", "source": "s", "content": [text(long)]}),
        body(use, "assistant"),
        body({"type": "thinking", "thinking": long, "signature": "s"}, "assistant"),
    ]
    for encoder in (None, Letters()):
        least = router.count_messages_tokens({"messages": [USER]}, encoder)
        assert least >= 4
        for each in bodies:
            assert router.count_messages_tokens(each, encoder) >= least + 100
        seen = router.count_messages_tokens(body(image), encoder)
        assert (
            500 < router.count_messages_tokens(body(result([image])), encoder) < 2_000 > seen > 500
        )


# --- speed ---


def test_text_is_cheap() -> None:
    """A loose bound, for a busy machine: it is about 2 us on a quiet one."""
    import time

    writer = router.MessagesWriter(opening())
    chunk = delta(content=" word")
    writer.feed(chunk)
    begun = time.perf_counter()
    for _ in range(5_000):
        writer.feed(chunk)
    assert (time.perf_counter() - begun) / 5_000 < 100e-6
