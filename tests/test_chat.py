"""Sections Tokens and Chat: reading a body, refusing a bad one, sizing a good one."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import router

USER = {"role": "user", "content": "hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages) or [USER], **fields}


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


# --- parse_body ---------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '  {"a": 1}\n',
        '{"a": "\\ud83d\\ude00"}',
        '{"a": "\\uD83D\\uDE00\\uD83D\\uDE00 é 😀"}',
        '{"a": "\\\\ud83d is how a half looks in a listing"}',
        '{"a": "\\\\\\\\ud83d"}',
        '{"a": "\\u0000\\u00e9\\uffff"}',
        '{"a": 1e300, "b": -0.0, "c": 123456789012345678901234567890}',
        '{"a": ' + nested(99) + "}",
        '{"a": "' + "[" * 5_000 + '"}',
        '{"a": [' + "[]," * 5_000 + "{}]}",
        '{"a": "NaN"}',
    ],
)
def test_parse_body_reads_what_json_reads(text: str) -> None:
    body = router.parse_body(text.encode())
    assert body == json.loads(text)
    json.dumps(body, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "it is empty"),
        (b" \r\n", "it is empty"),
        (b"hello", "Expecting value"),
        (b"{", "line 1 column 2"),
        (b'{"a": 1,}', "line 1"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
        (b"{'a': 1}", "double quotes"),
        (b'{"a": "\n"}', "control character"),
        (b'{"a": "\\x"}', "escape"),
        (b"null", "not null"),
        (b"true", "not true"),
        (b"17", "not 17"),
        (b'"text"', 'not the string "text"'),
        (b"[]", "not an empty list"),
        (b'[{"messages": []}]', "not a list"),
        (b'\xff\xfe{"a": 1}', "UTF-8"),
        (b'{"a": "\xe9"}', "UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        (b"\x1f\x8b\x08\x00garbage", "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        ('{"a": 1}'.encode("utf-8-sig"), "Expecting value"),
        (b'{"a":' * 100_000, "nested"),
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
    ],
)
def test_parse_body_refuses(raw: bytes, said: str) -> None:
    with pytest.raises(router.BadRequest) as caught:
        router.parse_body(raw)
    assert str(caught.value).startswith("request body must be a JSON object")
    assert said in str(caught.value)
    assert caught.value.param is None


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('{"temperature": NaN}', "temperature"),
        ('{"temperature": -Infinity}', "temperature"),
        ('{"messages": [{"x": [0, 1e999]}]}', "messages[0].x[1]"),
        ('{"seed": ' + "9" * 5_000 + "}", "seed"),
        ('{"seed": -' + "9" * 5_000 + ".0}", "seed"),
        ('{"messages": [{"content": "\\ud83d"}]}', "messages[0].content"),
        ('{"messages": [{"content": "\\ud83dx\\ude00"}]}', "messages[0].content"),
        ('{"user": "\\ude00\\ud83d"}', "user"),
        ('{"user": "\\ud83d\\\\\\ude00"}', "user"),
        ('{"user": "\\uD83D\\uD83D\\uDE00"}', "user"),
        ('{"user": "\\ud83d\\ude00\\ude00"}', "user"),
        ('{"a": {"\\udc00": 1}}', "a.\\udc00"),
        ('{"b": 1, "a": ' + nested(100) + "}", "a"),
        ('{"tools": ' + '{"a":' * 300 + "1" + "}" * 301, "tools"),
    ],
)
def test_parse_body_names_the_field(text: str, param: str) -> None:
    with pytest.raises(router.BadRequest) as caught:
        router.parse_body(text.encode())
    assert caught.value.param == param
    assert param in str(caught.value)


def test_a_bad_number_in_what_is_no_json_anyway_names_no_field() -> None:
    for raw in (b'{"a": NaN', b'{"a": 1e999]', b'{"a": ' + b"9" * 5_000 + b"x}"):
        with pytest.raises(router.BadRequest) as caught:
            router.parse_body(raw)
        assert caught.value.param is None


def test_of_a_repeated_member_the_last_counts() -> None:
    assert router.parse_body(b'{"a": 1, "a": 2}') == {"a": 2}


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


def accepted(check: Callable[[Any], object], value: Any) -> bool:
    """Did the check pass? If not it must have raised BadRequest, with something to say."""
    try:
        check(value)
    except router.BadRequest as error:
        assert str(error)
        assert error.param is None or error.param
        return False
    return True


@given(st.binary(max_size=64) | ANY_JSON.map(json.dumps).map(str.encode))
def test_parse_body_answers_or_refuses_any_bytes(raw: bytes) -> None:
    if accepted(router.parse_body, raw):
        body = router.parse_body(raw)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()


@given(st.text(st.sampled_from('{}[]",:\\u d8cfDCF019'), max_size=40))
@example('{"\\ud8cf":1}')
def test_what_parse_body_accepts_can_be_encoded_again(text: str) -> None:
    raw = text.encode()
    try:
        plain = json.loads(raw)
        json.dumps(plain, ensure_ascii=False, allow_nan=False).encode()
        sound = isinstance(plain, dict)
    except ValueError:
        sound = False
    assert accepted(router.parse_body, raw) == sound


# --- validate_chat ------------------------------------------------------------

GOOD_MESSAGES = [
    USER,
    {"role": "system", "content": ""},
    {"role": "developer", "content": "d", "name": "n"},
    {"role": "user", "content": [{"type": "text", "text": "t"}, IMAGE]},
    {"role": "user", "content": [{"type": "image_url", "image_url": "https://x/y.png"}]},
    {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "QQ=="}}]},
    {"role": "assistant", "content": "a", "tool_calls": None, "refusal": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": None}]},
    {"role": "assistant", "content": [], "tool_calls": [CALL]},
    {"role": "assistant", "content": "a", "tool_calls": []},
    {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "n", "input": ""}}]},
    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "assistant", "content": None, "refusal": "no"},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    {"role": "assistant", "content": None, "reasoning_content": "hm"},
    {"role": "assistant", "content": None, "reasoning": "hm"},
    {"role": "assistant", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
    {"role": "tool", "tool_call_id": "c1", "content": "r"},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "r"}]},
    {"role": "function", "name": "f", "content": None},
    {"role": "user", "content": "x", "unknown": {"any": ["thing"]}},
]


@pytest.mark.parametrize("message", GOOD_MESSAGES)
def test_validate_chat_lets_messages_pass(message: dict[str, Any]) -> None:
    router.validate_chat(chat(USER, message))


GOOD_FIELDS = [
    {"model": "hermes-router", "stream": True, "stream_options": {"include_usage": True}},
    {"temperature": 0, "top_p": 0.5, "presence_penalty": -2.0, "frequency_penalty": 3},
    {"max_tokens": 1, "max_completion_tokens": 10**9, "n": 2, "seed": -1},
    {"stop": None, "logprobs": False, "top_logprobs": 0, "user": "u", "metadata": {}},
    {"stop": "x", "response_format": {"type": "json_object"}, "logit_bias": {}},
    {"stop": ["x", "y"], "tool_choice": "auto", "parallel_tool_calls": False},
    {"stop": [], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"tools": []},
    {"tools": [{"function": {"name": "f"}}, {"type": "custom", "custom": {"name": "c"}}]},
    {"tools": [{"type": "web_search_20250305"}, {"type": None, "function": {"name": "f"}}]},
    {"functions": [{"name": "f"}], "function_call": "auto", "modalities": ["text"]},
    {"think": True, "anything": {"else": [1, None]}, "reasoning_effort": "low"},
    dict.fromkeys(("model", "stream", "temperature", "max_tokens", "tools", "response_format")),
]


@pytest.mark.parametrize("fields", GOOD_FIELDS)
def test_validate_chat_lets_fields_pass(fields: dict[str, Any]) -> None:
    router.validate_chat(chat(**fields))


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": []}, "messages"),
    (chat("x"), "messages[0]"),
    (chat(USER, None), "messages[1]"),
    (chat(USER, ["role", "user"]), "messages[1]"),
    (chat({"content": "x"}), "messages[0].role"),
    (chat({"role": "wizard", "content": "x"}), "messages[0].role"),
    (chat({"role": ["user"], "content": "x"}), "messages[0].role"),
    (chat({"role": {}, "content": "x"}), "messages[0].role"),
    (chat({"role": "User", "content": "x"}), "messages[0].role"),
    (chat({"role": "user"}), "messages[0].content"),
    (chat(USER, USER, {"role": "user", "content": None}), "messages[2].content"),
    (chat({"role": "user", "content": 7}), "messages[0].content"),
    (chat({"role": "user", "content": []}), "messages[0].content"),
    (chat({"role": "user", "content": {"type": "text"}}), "messages[0].content"),
    (chat({"role": "system", "content": None}), "messages[0].content"),
    (chat({"role": "assistant", "content": None}), "messages[0].content"),
    (chat({"role": "assistant", "content": None, "tool_calls": []}), "messages[0].content"),
    (chat({"role": "assistant", "content": True, "tool_calls": [CALL]}), "messages[0].content"),
    (chat({"role": "user", "content": ["x"]}), "messages[0].content[0]"),
    (chat({"role": "user", "content": [None]}), "messages[0].content[0]"),
    (chat({"role": "user", "content": [{"text": "x"}]}), "messages[0].content[0]"),
    (chat({"role": "user", "content": [{"type": {}}]}), "messages[0].content[0]"),
    (chat({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0].text"),
    (
        chat({"role": "user", "content": [IMAGE, {"type": "text", "text": 1}]}),
        "messages[0].content[1].text",
    ),
    (
        chat({"role": "user", "content": [{"type": "image_url"}]}),
        "messages[0].content[0].image_url",
    ),
    (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
        "messages[0].content[0].image_url.url",
    ),
    (chat({"role": "user", "content": "x", "name": 1}), "messages[0].name"),
    (chat({"role": "tool", "content": "x"}), "messages[0].tool_call_id"),
    (chat({"role": "tool", "content": "x", "tool_call_id": 1}), "messages[0].tool_call_id"),
    (chat({"role": "tool", "content": None, "tool_call_id": "c"}), "messages[0].content"),
    (chat({"role": "assistant", "tool_calls": {}, "content": "x"}), "messages[0].tool_calls"),
    (chat({"role": "assistant", "tool_calls": [1]}), "messages[0].tool_calls[0]"),
    (chat({"role": "assistant", "tool_calls": [{}]}), "messages[0].tool_calls[0].function"),
    (
        chat({"role": "assistant", "tool_calls": [{"id": 7, "function": CALL["function"]}]}),
        "messages[0].tool_calls[0].id",
    ),
    (
        chat({"role": "assistant", "tool_calls": [CALL, {"function": {"arguments": "{}"}}]}),
        "messages[0].tool_calls[1].function.name",
    ),
    (
        chat({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}),
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        chat({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "f"}}]}),
        "messages[0].tool_calls[0].custom.input",
    ),
    (
        chat({"role": "assistant", "function_call": {"name": "f"}}),
        "messages[0].function_call.arguments",
    ),
    (chat(model=1), "model"),
    (chat(model=["m"]), "model"),
    (chat(stream="true"), "stream"),
    (chat(stream=1), "stream"),
    (chat(stream_options=True), "stream_options"),
    (chat(temperature="hot"), "temperature"),
    (chat(temperature=True), "temperature"),
    (chat(temperature=float("nan")), "temperature"),
    (chat(top_p=[1]), "top_p"),
    (chat(presence_penalty={}), "presence_penalty"),
    (chat(frequency_penalty="1"), "frequency_penalty"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_tokens=-1), "max_tokens"),
    (chat(max_tokens=1.5), "max_tokens"),
    (chat(max_tokens=True), "max_tokens"),
    (chat(max_completion_tokens="9"), "max_completion_tokens"),
    (chat(n=0), "n"),
    (chat(n=10**20 * -1), "n"),
    (chat(seed="x"), "seed"),
    (chat(logprobs=1), "logprobs"),
    (chat(top_logprobs="5"), "top_logprobs"),
    (chat(stop=5), "stop"),
    (chat(stop=["x", None]), "stop"),
    (chat(tools={}), "tools"),
    (chat(tools="none"), "tools"),
    (chat(tools=["f"]), "tools[0]"),
    (chat(tools=[TOOL, {}]), "tools[1].function"),
    (chat(tools=[{"type": 1}]), "tools[0].type"),
    (chat(tools=[{"type": "function", "function": {}}]), "tools[0].function.name"),
    (chat(tools=[{"type": "function", "function": {"name": ""}}]), "tools[0].function.name"),
    (chat(tools=[{"type": "custom"}]), "tools[0].custom"),
    (chat(tool_choice=1), "tool_choice"),
    (chat(functions="f"), "functions"),
    (chat(functions=[{}]), "functions[0].name"),
    (chat(response_format="json"), "response_format"),
    (chat(response_format={}), "response_format"),
    (chat(logit_bias=[]), "logit_bias"),
    (chat(metadata="m"), "metadata"),
    (chat(modalities=[1]), "modalities"),
    (chat(user=1), "user"),
    (chat(parallel_tool_calls="no"), "parallel_tool_calls"),
]


@pytest.mark.parametrize(("body", "param"), BAD_CHATS)
def test_validate_chat_names_what_is_wrong(body: dict[str, Any], param: str) -> None:
    with pytest.raises(router.BadRequest) as caught:
        router.validate_chat(body)
    assert caught.value.param == param
    assert str(caught.value).startswith(f"{param} must be ")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x" * 41, "a string"),
        ("line\nbreak", r'the string "line\nbreak"'),
        (None, "missing or null"),
        ({}, "an empty object"),
        ({"a": 1}, "an object"),
        (False, "not false"),
        (-(10**15), "so large a number"),
    ],
)
def test_an_error_says_what_was_found(value: object, words: str) -> None:
    assert words in str(router.invalid("n", "something else", value))


@given(ANY_JSON)
def test_validate_chat_answers_or_refuses_any_messages(value: Any) -> None:
    accepted(router.validate_chat, {"messages": value})
    accepted(router.validate_chat, {"messages": [value]})


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "function_call", "name", "refusal"]),
        st.sampled_from(["user", "assistant", "tool", "function"]) | ANY_JSON,
    ),
    st.dictionaries(st.sampled_from(["tools", "functions", "stop", "n", "model"]), ANY_JSON),
)
def test_validate_chat_and_helpers_survive_almost_right_chats(message: Any, fields: Any) -> None:
    body = {**fields, "messages": [{"role": "assistant", **message}, message]}
    accepted(router.validate_chat, body)
    assert isinstance(router.last_user_text(body), str)
    assert isinstance(router.chat_text(body), str)
    for look in (router.wants_tools, router.wants_vision, router.wants_json):
        assert look(body) in (True, False)
    bounds = router.token_bounds(500, body)
    assert 0 <= bounds.low <= bounds.likely <= bounds.high


@given(ANY_JSON)
def test_helpers_survive_any_messages(value: Any) -> None:
    for body in ({"messages": value, "response_format": value}, {"messages": [value]}):
        router.token_bounds(10, body)
        router.last_user_text(body)
        router.chat_text(body)
        router.wants_vision(body)
        router.wants_json(body)
    assert isinstance(router.message_text(value), str)


# --- validate_embeddings ------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"input": "text"},
        {"input": ["a", "b"], "model": "m", "encoding_format": "base64", "dimensions": 1},
        {"input": [1, 2, 3], "encoding_format": None, "user": "u"},
        {"input": [[1, 2], [3]], "unknown": 1},
    ],
)
def test_validate_embeddings_lets_pass(fields: dict[str, Any]) -> None:
    router.validate_embeddings(fields)


BAD_EMBEDDINGS: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": None}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": {}}, "input"),
    ({"input": 5}, "input"),
    ({"input": True}, "input"),
    ({"input": [None]}, "input[0]"),
    ({"input": [True, False]}, "input[0]"),
    ({"input": [1.5]}, "input[0]"),
    ({"input": ["a", 1]}, "input[1]"),
    ({"input": [1, "a"]}, "input[1]"),
    ({"input": [1, True]}, "input[1]"),
    ({"input": ["a", None]}, "input[1]"),
    ({"input": [[1], []]}, "input[1]"),
    ({"input": [[1], ["a"]]}, "input[1]"),
    ({"input": [[1], 1]}, "input[1]"),
    ({"input": "x", "model": 1}, "model"),
    ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "x", "encoding_format": ["float"]}, "encoding_format"),
    ({"input": "x", "dimensions": 0}, "dimensions"),
    ({"input": "x", "dimensions": "8"}, "dimensions"),
    ({"input": "x", "user": {}}, "user"),
]


@pytest.mark.parametrize(("body", "param"), BAD_EMBEDDINGS)
def test_validate_embeddings_names_what_is_wrong(body: dict[str, Any], param: str) -> None:
    with pytest.raises(router.BadRequest) as caught:
        router.validate_embeddings(body)
    assert caught.value.param == param


def test_an_embeddings_request_without_input_is_told_so() -> None:
    with pytest.raises(router.BadRequest, match="must be a JSON object with an 'input' field"):
        router.validate_embeddings({"model": "m"})


@given(ANY_JSON)
def test_validate_embeddings_answers_or_refuses_any_input(value: Any) -> None:
    accepted(router.validate_embeddings, {"input": value})
    accepted(router.validate_embeddings, {"input": [value, value], "encoding_format": value})


# --- looking at a chat --------------------------------------------------------


def test_message_text_joins_the_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, IMAGE, "b", None, {"type": "text", "text": 5}]
    assert router.message_text({"content": parts}) == "a\nb"
    assert router.message_text({"content": "plain"}) == "plain"
    assert router.message_text({"content": None}) == router.message_text({}) == ""


def test_last_user_text_is_the_latest_of_the_user() -> None:
    reply = {"role": "assistant", "content": "hm"}
    body = chat(USER, reply, {"role": "user", "content": "again"}, reply, None)
    assert router.last_user_text(body) == "again"
    assert router.last_user_text(chat(reply)) == router.last_user_text({}) == ""


def test_what_a_chat_wants() -> None:
    plain = chat(tools=[], response_format={"type": "text"})
    assert not router.wants_tools(plain)
    assert not router.wants_json(plain)
    assert not router.wants_vision(plain)
    assert router.wants_tools(chat(tools=[TOOL]))
    assert router.wants_tools(chat(functions=[{"name": "f"}]))
    assert router.wants_json(chat(response_format={"type": "json_schema"}))
    assert router.wants_json(chat(response_format={"type": "json_object"}))
    assert router.wants_vision(chat({"role": "user", "content": [IMAGE]}, USER))


# --- tokens -------------------------------------------------------------------


def test_estimates_are_bytes_by_four_within_bounds() -> None:
    bounds = router.token_bounds(6_500, chat())
    assert bounds == router.TokenEstimate(low=1_000, likely=1_625, high=4_453)


def test_a_decision_is_taken_only_outside_the_bounds() -> None:
    bounds = router.TokenEstimate(low=10, likely=20, high=30)
    assert [bounds.exceeds(limit) for limit in (9, 10, 29, 30)] == [True, None, None, False]


def test_an_image_costs_the_same_however_long_its_base64() -> None:
    for part in (
        IMAGE,
        {"type": "image_url", "image_url": IMAGE["image_url"]["url"]},  # type: ignore[index]
        {"type": "input_audio", "input_audio": {"data": "A" * 10_000}},
        {"type": "file", "file": {"file_data": "A" * 10_000}},
    ):
        body = chat({"role": "user", "content": [part]})
        bounds = router.token_bounds(len(json.dumps(body)), body)
        assert 85 <= bounds.low < 200
        assert 1_000 <= bounds.likely < 1_100
        assert 1_600 <= bounds.high < 1_900


def test_escapes_do_not_triple_a_text() -> None:
    text = "жизнь " * 100
    escaped, plain = json.dumps(text).encode(), json.dumps(text, ensure_ascii=False).encode()
    assert len(escaped) > 2.5 * len(plain)
    assert router.text_bytes(escaped) == router.text_bytes(plain) == len(plain)


def encoder_of(load: Callable[[], Callable[[str], int]], deadline_s: float = 20.0) -> Any:
    encoder = router.Encoder(deadline_s=deadline_s, load=load)
    encoder.start()
    return encoder


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_encoder_counts_once_it_has_loaded() -> None:
    gate, loads = threading.Event(), []

    def load() -> Callable[[str], int]:
        loads.append(threading.current_thread().daemon)
        gate.wait(10)
        return len

    encoder = encoder_of(load)
    encoder.start()
    assert encoder.count("four") is None
    assert router.count_tokens(chat(), encoder) is None
    gate.set()
    wait_until(lambda: encoder.ready)
    assert encoder.count("four") == 4
    assert router.count_tokens(chat(), encoder) == 3 + 4 + len("hello")
    assert loads == [True]


def test_an_encoder_never_started_answers_none_and_starts_nothing() -> None:
    before = threading.active_count()
    assert router.Encoder().count("x") is None
    assert threading.active_count() == before


def test_long_texts_are_counted_by_sample() -> None:
    seen: list[int] = []

    def count(text: str) -> int:
        seen.append(len(text))
        return len(text) // 4

    encoder = encoder_of(lambda: count)
    wait_until(lambda: encoder.ready)
    assert encoder.count("abcd" * 1_000_000) == 1_000_000
    assert sum(seen) <= router.MAX_COUNTED_CHARS


def test_an_encoder_that_fails_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> Callable[[str], int]:
        raise OSError("no such host")

    with caplog.at_level(logging.WARNING):
        encoder = encoder_of(load)
        wait_until(lambda: caplog.records)
        encoder.start()
        assert encoder.count("x") is None
    assert [record.getMessage() for record in caplog.records] == [
        "tiktoken: OSError: no such host; token counts are estimated from bytes"
    ]


def test_an_encoder_that_hangs_is_given_up_and_may_still_come(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()

    def load() -> Callable[[str], int]:
        gate.wait(10)
        return len

    with caplog.at_level(logging.WARNING):
        encoder = encoder_of(load, deadline_s=0.02)
        wait_until(lambda: caplog.records)
    assert "did not load within 0.02 s" in caplog.records[0].getMessage()
    assert encoder.count("x") is None
    gate.set()
    wait_until(lambda: encoder.ready)
    assert encoder.count("x") == 1
    assert len(caplog.records) == 1


def test_tools_calls_and_images_are_counted_too() -> None:
    encoder = encoder_of(lambda: len)
    wait_until(lambda: encoder.ready)
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    image = {"role": "user", "content": [IMAGE]}
    plain = router.count_tokens(chat(), encoder)
    assert router.count_tokens(chat(USER, call), encoder) > plain + len(json.dumps(CALL))
    assert router.count_tokens(chat(tools=[TOOL]), encoder) > plain + len(json.dumps(TOOL))
    assert 1_000 <= router.count_tokens(chat(image), encoder) < 1_100


def test_the_real_vocabulary_takes_special_tokens_as_text(monkeypatch: Any) -> None:
    """Needs no download: the loader is given a small vocabulary of the same library."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {"<|endoftext|>": 256}
    small = tiktoken.Encoding(
        "t", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"o200k_base": small}.__getitem__)
    count = router.load_o200k()
    assert count("<|endoftext|>") == len("<|endoftext|>")
