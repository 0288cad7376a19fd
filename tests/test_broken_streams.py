"""Streams that are damaged, odd or lie: what is shown is whole, or said to be broken."""

from __future__ import annotations

import pytest
from test_rescue import PATHS, told
from upstream import HELLO, Reply, Stream, completion, data_of, delta, good, provider, sse

CALL = {"index": 0, "id": "call_1", "type": "function"}


def call_delta(arguments: str, **first: str) -> dict:
    function = {"arguments": arguments, **first}
    return delta(tool_calls=[{**(CALL if first else {"index": 0}), "function": function}])


def calling(*pieces: str, finish: str = "tool_calls") -> list[dict]:
    first, *rest = pieces
    return [call_delta(first, name="rm"), *map(call_delta, rest), delta(finish)]


BROKEN = b'data: {"choices": [{"delta": {"content": \n\n'
BROKEN_CALL = b'data: {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"argu\n\n'


@pytest.fixture
def ask(upstream, serve):
    """ask(answer, path, SETTING=...): the answer of a provider as a client of that path gets it."""

    def make(
        answer, path="/v1/chat/completions", second=None, row="sambanova", model="m1", **settings
    ):
        rows = provider(row, upstream(answer), model)
        if second is not None:
            rows |= provider("cerebras", upstream(second), "m2")
        live = serve(**rows, **settings)
        body = {"model": f"{row}/{model}", "stream": True, "messages": HELLO, "max_tokens": 500}
        if path == "/v1/responses":
            body = {"model": f"{row}/{model}", "stream": True, "input": "hello"}
        return live.session.post(live.url + path, json=body, timeout=20)

    return make


@pytest.mark.parametrize("path", PATHS)
def test_a_broken_chunk_between_whole_ones_is_left_out(ask, path):
    words = [delta(content=f"{n} ") for n in range(6)]
    got = ask(Stream(chunks=[*words[:3], BROKEN, *words[3:], delta("stop")]), path)
    assert told(path, got.content) == "0 1 2 3 4 5 "
    assert BROKEN not in got.content


@pytest.mark.parametrize("path", PATHS)
def test_a_broken_chunk_inside_a_tool_call_is_a_failure(ask, path):
    pieces = calling('{"path": "/data/', 'old"}')
    got = ask(Stream(chunks=[pieces[0], BROKEN_CALL, *pieces[1:]]), path, second=good())
    assert told(path, got.content) == "hello"
    assert b"/data/" not in got.content


@pytest.mark.parametrize("path", PATHS)
def test_arguments_that_break_off_are_never_shown_as_a_call(ask, path):
    got = ask(Stream(chunks=calling('{"path": "/etc/pas')), path, second=good())
    assert told(path, got.content) == "hello" and b"/etc" not in got.content


@pytest.mark.parametrize("path", PATHS)
def test_trivial_slips_in_arguments_are_put_right(ask, path):
    got = ask(Stream(chunks=calling('```json\n{"path"', ': "x",}\n```')), path)
    assert r"{\"path\":\"x\"}" in got.text.replace(" ", "")


def test_arguments_cut_by_the_length_limit_are_told_as_such(ask):
    got = ask(Stream(chunks=calling('{"path": "/etc/pas', finish="length")))
    assert [c for c in data_of(got.content) if c.get("choices")][-1]["choices"][0][
        "finish_reason"
    ] == "length"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("odd", [{"type": {}, "choices": []}, {"type": [1]}])
def test_odd_types_in_events_do_no_harm(ask, path, odd):
    got = ask(Stream(chunks=[odd, delta(content="x"), odd, delta("stop")]), path)
    assert told(path, got.content) == "x"


def test_pings_do_not_hide_that_nothing_comes(ask):
    pings = [b": still here\n\n"] * 40
    answer = Stream(chunks=[delta(content="x "), *pings], gap=0.1, done=False)
    got = ask(answer, STREAM_IDLE_TIMEOUT="1", RESCUE="0")
    assert got.elapsed.total_seconds() < 3
    assert "error" in data_of(got.content)[-1]


def failed_response(code: str) -> Stream:
    response = {"id": "resp_1", "object": "response", "status": "in_progress", "output": []}
    failed = {**response, "status": "failed", "error": {"code": code, "message": "It says no."}}
    return Stream(
        chunks=[
            sse({"type": "response.created", "sequence_number": 0, "response": response}),
            sse({"type": "response.failed", "sequence_number": 1, "response": failed}),
        ],
        done=False,
    )


def test_a_failed_response_says_why(ask):
    options = {"row": "openai", "model": "gpt-5.1-codex"}
    got = ask(failed_response("rate_limit_exceeded"), "/v1/responses", **options)
    assert got.status_code == 429 and "It says no." in got.text


def test_a_whole_response_that_failed_says_why(upstream, serve):
    error = {"code": "rate_limit_exceeded", "message": "It says no."}
    body = {"id": "resp_1", "object": "response", "status": "failed", "error": error, "output": []}
    live = serve(
        **{**provider("openai", upstream(Reply(200, body))), "OPENAI_MODEL": "gpt-5.1-codex"}
    )
    got = live.session.post(live.url + "/v1/responses", json={"input": "x"})
    assert got.status_code == 429


@pytest.mark.parametrize("path", PATHS)
def test_what_was_only_thought_is_the_answer_where_nothing_else_is(ask, path):
    thought = [
        delta(role="assistant", content=""),
        delta(reasoning="It is "),
        delta(reasoning="4."),
    ]
    got = ask(Stream(chunks=[*thought, delta("stop")]), path)
    assert told(path, got.content) == "It is 4."
    got = ask(Stream(chunks=[*thought, delta("length")]), path)
    assert told(path, got.content) == ""
    got = ask(Stream(chunks=[*thought, delta(content="Four."), delta("stop")]), path)
    assert told(path, got.content) == "Four."
    if path == PATHS[0]:  # as it came
        assert got.content.count(b"data:") == 6


def test_a_whole_answer_that_was_only_thought_says_it(upstream, serve):
    live = serve(
        **provider("groq", upstream(Reply(200, completion("", reasoning="It is 4."))), "m1")
    )
    assert live.chat().json()["choices"][0]["message"]["content"] == "It is 4."
