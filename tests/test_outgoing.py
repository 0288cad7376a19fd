"""Bodies on their way out: edits in the client's own bytes say the same as edits in the JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import router

TEXT = st.sampled_from(
    ["model", '"model"', 'my "model', '"model": "x"', "\\", '\\"', "\\u0065", "{", "}", "é€😀"]
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.sampled_from(["model", "max_tokens", "stream_options", "messages", 'a"model', "x"])
SCALARS = st.none() | st.booleans() | st.integers() | TEXT
SCALARS |= st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | TEXT, inner, max_size=3),
    max_leaves=10,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=6)
EDITS = st.dictionaries(
    st.sampled_from(["model", "max_tokens", "stream_options", "messages"]),
    VALUES | st.just(router.DROP),
    max_size=4,
)


@st.composite
def spelled(draw: st.DrawFn, value: Any) -> str:
    """`value` as JSON in one of the many ways to write it."""
    if isinstance(value, dict):
        members = [
            draw(gaps) + draw(spelled(k)) + draw(gaps) + ":" + draw(gaps) + draw(spelled(v))
            for k, v in value.items()
        ]
        return "{" + ",".join(members) + draw(gaps) + "}"
    if isinstance(value, list):
        items = [draw(gaps) + draw(spelled(item)) for item in value]
        return "[" + ",".join(items) + draw(gaps) + "]"
    if isinstance(value, str) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        parts = [json.dumps(p, ensure_ascii=draw(st.booleans()))[1:-1] for p in (
            value[:at], value[at + 1 :]
        )]  # fmt: skip
        units = value[at].encode("utf-16-be").hex()
        escaped = "".join("\\u" + units[n : n + 4] for n in range(0, len(units), 4))
        return f'"{parts[0]}{escaped}{parts[1]}"'
    return json.dumps(value, ensure_ascii=draw(st.booleans()))


gaps = st.sampled_from(["", " ", "\n", "\t ", "\r\n  "])


def expected(body: dict[str, Any], edits: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in {**body, **edits}.items() if v is not router.DROP}


def edited(raw: bytes, edits: dict[str, Any]) -> Any:
    return json.loads(router.edit_body(raw, json.loads(raw), edits))


@settings(max_examples=400)
@given(st.data(), OBJECTS, EDITS)
def test_an_edited_body_says_what_the_edited_object_says(
    data: st.DataObject, body: dict[str, Any], edits: dict[str, Any]
) -> None:
    raw = (data.draw(gaps) + data.draw(spelled(body)) + data.draw(gaps)).encode()
    assert json.loads(raw) == body
    assert edited(raw, edits) == expected(body, edits)


@pytest.mark.parametrize(
    "raw",
    [
        '{"model":"a","model":"b","x":1}',
        '{"model":"a","x":{"model":"b"}}',
        '{"x":{"model":"b"}}',
        '{"x":{"model":"b"},"model":"a"}',
        '{"mod\\u0065l":"a"}',
        '{"mod\\u0065l":"a","x":{"model":"b"}}',
        '{"model":"a","mod\\u0065l":"b"}',
        '{"\\u006dodel":"b","model":"a"}',
        '{"a\\"model":1,"mod\\u0065l":2}',
        '{"model" \n:\t"a"}',
        '{"model":null}',
        '{"model":["a"]}',
        '{"model":{"model":"a"}}',
        '{"model":-1.5e+3}',
        '{"model":true,"text":"the \\"model\\": \\"b\\" said"}',
        '{"text":"\\\\","model":"q\\"uo\\\\te"}',
        '{"text":"model","tools":[{"properties":{"model":{"type":"string"}}}]}',
        "{}",
        " \n{ } ",
    ],
)
@pytest.mark.parametrize("value", ["new", 'q"\\é\n', None, 7, {"a": 1}, [1], router.DROP])
def test_the_model_is_set_however_it_is_written(raw: str, value: Any) -> None:
    body = json.loads(raw)
    assert edited(raw.encode(), {"model": value}) == expected(body, {"model": value})


def test_untouched_bytes_stay_as_they_are() -> None:
    raw = b'{ "messages": [ {"role":"user", "content":"h\\u00e9 1.0"} ],\n "model" : "a" }'
    got = router.edit_body(raw, json.loads(raw), {"model": "b", "max_tokens": 5})
    assert got == b'{"max_tokens":5,' + raw[1:].replace(b'"model" : "a"', b'"model" : "b"')


def test_no_edit_is_no_change() -> None:
    raw = b'{"model":"a", "x": [1.0, 1e5]}'
    assert router.edit_body(raw, json.loads(raw), {}) == raw


@pytest.mark.parametrize(
    ("chat", "reserve", "ceiling", "edits"),
    [
        ({}, 4096, 8192, {}),
        ({"max_tokens": 100}, 0, 0, {}),
        ({"max_tokens": 100}, 4096, 0, {"max_tokens": 4196}),
        ({"max_tokens": 100}, 4096, 1000, {"max_tokens": 1000}),
        ({"max_tokens": 9000}, 0, 8192, {"max_tokens": 8192}),
        ({"max_completion_tokens": 9000}, 0, 8192, {"max_completion_tokens": 8192}),
        ({"max_tokens": None}, 4096, 8192, {}),
        ({"max_tokens": True}, 4096, 8192, {}),
    ],
)
def test_max_tokens_gets_its_reserve_below_the_ceiling(
    chat: dict[str, Any], reserve: int, ceiling: int, edits: dict[str, Any]
) -> None:
    assert router.output_edits(chat, reserve, ceiling) == edits
