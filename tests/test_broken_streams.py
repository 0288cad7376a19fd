"""Streams that are damaged, odd or lie: what is shown is whole, or said to be broken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rescue import PATHS, told
from upstream import HELLO, Reply, Stream, data_of, delta, good, provider, sse

import router

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


# -- many events at once ------------------------------------------------------------------

EVENTS = {
    "chat": [
        *(b'{"id":"c","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}' % said
          for said in (b"hi", b"", rb"\n", rb"a \"no\"", rb"back\\", b"\xc3\xa9")),
        b'{"id":"c","choices":[{"index":0,"delta":{"reasoning":"hm"},"finish_reason":null}]}',
        b'{"id":"c","choices":[{"index":0,"delta":{"content":"x","refusal":"y"}}]}',
        b'{"id":"c","choices":[{"index":1,"delta":{"content":"other"},"finish_reason":null}]}',
        b'{"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}',
        b'{"id":"c","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}',
        b'{"id":"c","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"a","function":'
        b'{"name":"f","arguments":"{}"}}]},"finish_reason":null}]}',
        b'{"id":"c","choices":[{"index":0,"delta":{"content":"cut',
        b'{"error":{"message":"overloaded"}}',
        b"[DONE]",
    ],
    "messages": [
        *(b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"%b"}}' % t
          for t in (b"hi", b"", rb"a \"b\"", b"message_stop")),
        b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"cut',
        b'{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta"}}',
        b'{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":2}}',
        b'{"type":"error","error":{"type":"overloaded_error","message":"no"}}',
        b'{"type":"message_stop"}',
        b'{"type":"ping"}',
    ],
}  # fmt: skip
STREAMS = st.sampled_from(sorted(EVENTS)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.lists(st.sampled_from(EVENTS[name][:2] * 3 + EVENTS[name]), min_size=1, max_size=24),
    )
)


def taken(name: str, blocks: list[bytes]) -> tuple[bytes, object, object]:
    """What a client of the same dialect gets of these blocks, and how the answer ended."""
    surface = router.CHAT if name == "chat" else router.MESSAGES
    ask = router.Ask(surface, b"{}", {}, {"messages": HELLO}, router.Guard(), True)
    flow = router.Passage(router.DIALECTS[name], ask).flow()
    told = b"".join(map(flow.take, blocks))
    return told, (flow.failure, flow.finished, flow.done, flow.useful), flow.tokens


@given(STREAMS)
def test_a_block_is_told_as_its_events_one_by_one(stream):
    name, datas = stream
    kind = b"event: x\n" if name == "messages" else b""
    events = [kind + b"data: " + data + b"\n\n" for data in datas]
    assert taken(name, [b"".join(events)]) == taken(name, events)
