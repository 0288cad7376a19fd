"""Streams that are damaged, odd or lie: what is shown is whole, or said to be broken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rescue import PATHS, told
from upstream import (
    HELLO,
    Reply,
    Stream,
    completion,
    data_of,
    delta,
    good,
    provider,
    sse,
    text_of,
)

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


def call_part(**members) -> dict:
    """A delta of one tool call, just as a provider sends it."""
    return delta(tool_calls=[members])


WHOLE = {"name": "f", "arguments": '{"x":1}'}
OTHER = {"name": "g", "arguments": '{"y":2}'}
END = delta("tool_calls")
CONFUSING = {
    "no id": [call_part(index=0, type="function", function=WHOLE), END],
    "empty id": [call_part(index=0, id="", type="function", function=WHOLE), END],
    "no index": [call_part(id="a", type="function", function=WHOLE), END],
    "no type": [call_part(index=0, id="a", function=WHOLE), END],
    "an object": [
        call_part(index=0, id="a", type="function", function={"name": "f", "arguments": {"x": 1}}),
        END,
    ],
    "told to stop": [call_part(index=0, id="a", type="function", function=WHOLE), delta("stop")],
    "no finish": [call_part(index=0, id="a", type="function", function=WHOLE)],
    "name and id again": [
        call_part(index=0, id="a", type="function", function={"name": "f", "arguments": ""}),
        call_part(index=0, id="a", type="function", function=WHOLE),
        END,
    ],
    "name late": [
        call_part(index=0, id="a", type="function", function={"name": "", "arguments": ""}),
        call_part(index=0, function=WHOLE),
        END,
    ],
    "one index for two": [
        call_part(index=0, id="a", type="function", function=WHOLE),
        call_part(index=0, id="b", type="function", function=OTHER),
        END,
    ],
}


def joined(body: bytes) -> tuple[list[tuple[str, str]], str, int]:
    """(name and arguments of each call, the finish, ids) as SDKs put deltas together."""
    calls, finish = {}, ""
    for choice in (c for chunk in data_of(body) for c in chunk["choices"]):
        finish += choice["finish_reason"] or ""
        for part in choice["delta"].get("tool_calls") or []:
            call = calls.setdefault(part["index"], ["", "", ""])
            for at, text in enumerate((part.get("id"), *map(part["function"].get, WHOLE))):
                call[at] += text or ""
    return (
        [(call[1], call[2]) for call in calls.values()],
        finish,
        len({c[0] for c in calls.values()}),
    )


@pytest.mark.parametrize("begin", ["", "sure"])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", CONFUSING)
def test_calls_in_an_accent_are_told_as_openai_would(ask, name, at_once, begin):
    said = [delta(role="assistant", content=""), *([delta(content=begin)] if begin else [])]
    answer = Stream(chunks=[*said, *CONFUSING[name]])
    if at_once:
        answer = Reply(200, answer.payload(), {"content-type": "text/event-stream"})
    got = ask(answer)
    expected = [(WHOLE["name"], WHOLE["arguments"])]
    expected += [(OTHER["name"], OTHER["arguments"])] if "two" in name else []
    assert joined(got.content) == (expected, "tool_calls", len(expected))
    assert text_of(got.content) == begin
    assert got.content.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("word", ["error", "network_error", "abort"])
def test_a_finish_that_stands_for_an_error_is_one(ask, word, path):
    chunks = [delta(content="a few words"), delta(word)]
    got = ask(Stream(chunks=chunks), path, RESCUE="0")
    assert b"error" in got.content and b"[DONE]" not in got.content
    assert b'"finish_reason"' not in got.content.partition(b"a few words")[2].replace(
        b'"finish_reason": null', b""
    )


@pytest.mark.parametrize(("word", "meaning"), [("eos", "stop"), ("max_tokens", "length")])
def test_a_finish_in_other_words_is_told_in_openais(ask, word, meaning):
    got = ask(Stream(chunks=[delta(content="a few words"), delta(word)]))
    assert joined(got.content)[1] == meaning


# --- whole answers: as such, and where a stream was asked for -----------------------------


def calling_reply(*calls: dict, finish: str = "tool_calls") -> Reply:
    body = completion(None, tool_calls=list(calls))
    body["choices"][0]["finish_reason"] = finish
    return Reply(200, body)


def same(**changes) -> dict:
    call = {"id": "a", "type": "function", "function": WHOLE, **changes}
    return {name: value for name, value in call.items() if value is not None}


FENCED = {"name": "f", "arguments": '```json\n{"x":1}\n```'}
WHOLE_ANSWERS = {
    "plain": (calling_reply(same()), 1),
    "no id": (calling_reply(same(id=None)), 1),
    "no type": (calling_reply(same(type=None)), 1),
    "told to stop": (calling_reply(same(), finish="stop"), 1),
    "an object": (calling_reply(same(function={"name": "f", "arguments": {"x": 1}})), 1),
    "fenced": (calling_reply(same(function=FENCED)), 1),
    "one id for two": (calling_reply(same(), same()), 2),
    "the older way": (Reply(200, completion(None, function_call=WHOLE)), 1),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", WHOLE_ANSWERS)
def test_calls_of_a_whole_answer_are_told_as_openai_would(upstream, serve, name, stream):
    answer, count = WHOLE_ANSWERS[name]
    live = serve(**provider("groq", upstream(answer), "m1"))
    got = live.chat(stream=stream)
    if stream:
        assert joined(got.content) == ([tuple(WHOLE.values())] * count, "tool_calls", count)
        return
    (choice,) = got.json()["choices"]
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [WHOLE] * count
    assert len({call["id"] for call in calls}) == count
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("path", PATHS)
def test_two_calls_of_one_id_are_both_told(upstream, serve, path):
    other = {"name": "f", "arguments": '{"x":2}'}
    up = upstream(calling_reply(same(), same(function=other)))
    live = serve(**provider("groq", up, "m1"))
    body = {"model": "groq/m1", "messages": HELLO, "max_tokens": 50}
    if path == "/v1/responses":
        body = {"model": "groq/m1", "input": "hello"}
    got = live.session.post(live.url + path, json=body, timeout=20).text.replace("\\", "")
    assert got.replace(" ", "").count('{"x":1}') == got.replace(" ", "").count('{"x":2}') == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_answer_that_ends_in_an_error_is_one(upstream, serve, path, stream):
    bad = completion("half a")
    bad["choices"][0]["finish_reason"] = "error"
    live = serve(
        **provider("groq", upstream(Reply(200, bad)), "m1"),
        **provider("mistral", upstream(good("all of it")), "m2"),
    )
    body = {"model": "groq/m1", "stream": stream, "messages": HELLO, "max_tokens": 50}
    if path == "/v1/responses":
        body = {"model": "groq/m1", "stream": stream, "input": "hello"}
    got = live.session.post(live.url + path, json=body, timeout=20)
    assert got.status_code == 200 and "all of it" in got.text and "half a" not in got.text


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


@pytest.mark.parametrize("between", [b": ping\n\n", b'data: {"choices":[],"usage":null}\n\n'])
def test_a_block_of_many_odd_events_is_read_to_its_end(between):
    content = b"data: " + EVENTS["chat"][0] + b"\n\n"
    told, (failure, *_), _ = taken("chat", [content, (content + between) * 5000])
    assert failure is None and told.count(b'"content":"hi"') == 5001
