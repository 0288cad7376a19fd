"""Server-sent events: where they end, what they say, and what of a stream reaches the client."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upstream import chunks, completion, delta, sse, usage, usage_chunk

import router

DONE = b"data: [DONE]\n\n"


class Pieces:
    """Stands for a provider's answer whose body arrives in the pieces given."""

    def __init__(self, pieces: Iterable[bytes], ending: Exception | None = None) -> None:
        self.pieces, self.ending, self.closed = iter([p for p in pieces if p]), ending, False

    def read1(self) -> bytes:
        piece = next(self.pieces, b"")
        if not piece and self.ending:
            raise self.ending
        return piece

    def read(self, limit: int = 1 << 30) -> bytes:
        return b"".join(iter(self.read1, b""))

    def close(self) -> None:
        self.closed = True


def chat_passage(wants_usage: bool = False) -> router.Passage:
    ask = router.Ask(router.CHAT, b"{}", {}, {}, router.Guard(), True, wants_usage)
    return router.Passage(router.DIALECTS["chat"], ask, "groq")


def chat_relay(response: Any, wants_usage: bool = False) -> router.Relay:
    """A committed stream whose first useful event has been passed on already."""
    flow = chat_passage(wants_usage).flow()
    flow.useful = True
    return router.Relay(response, flow, router.EventCutter())


def pieces_of(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    start = 0
    for cut in sorted(cuts):
        yield data[start:cut]
        start = cut
    yield data[start:]


def relayed(
    pieces: Iterable[bytes], wants_usage: bool = False, ending: Exception | None = None
) -> tuple[bytes, router.Relay]:
    relay = chat_relay(Pieces(pieces, ending), wants_usage)
    return b"".join(relay), relay


def payloads(body: bytes) -> list[Any]:
    datas = [router.event_data(event) for event in router.split_events(body)]
    return [json.loads(data) for data in datas if data and data != b"[DONE]"]


def errors_in(body: bytes) -> list[Any]:
    return [chunk["error"] for chunk in payloads(body) if chunk.get("error")]


# --- events -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: x\n\n", b"x"),
        (b"data:x\n\n", b"x"),
        (b"data:  x\n\n", b" x"),
        (b"data: x\r\n\r\n", b"x"),
        (b"data: x\r\r", b"x"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\r\ndata:b\r\n\r\n", b"a\nb"),
        (b"event: message\nid: 7\ndata: x\n\n", b"x"),
        (b": note\ndata: x\n\n", b"x"),
        (b": only a comment\n\n", b""),
        (b"retry: 500\n\n", b""),
        (b"database: x\n\n", b""),
        (b"\n", b""),
    ],
)
def test_the_data_of_an_event(event: bytes, data: bytes) -> None:
    assert router.event_data(event) == data


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"], ids=["lf", "crlf", "cr"])
def test_an_event_ends_with_a_blank_line_of_any_kind(end: bytes) -> None:
    assert router.last_event_end(b"data: a" + end + b"data: b") == 7 + len(end)
    assert router.last_event_end(b"data: a" + end[: len(end) // 2]) == 0
    assert router.split_events(b"data: a" + end + b"data: b") == [b"data: a" + end, b"data: b"]


def test_a_byte_order_mark_does_not_hide_the_first_event() -> None:
    body = b"\xef\xbb\xbf" + sse(delta(content="hi")) + sse(delta("stop")) + DONE
    attempt = router.first_useful(Pieces([body]), chat_passage(), str)
    assert attempt.verdict is None, attempt.outcome
    assert payloads(b"".join(attempt.stream))[0]["choices"][0]["delta"] == {"content": "hi"}


LINE = st.sampled_from(
    [b": note", b"data: x", b"data:y", b"event: a", b"id: 1", "data: äö€".encode(), b"data"]
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    end = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    events = draw(st.lists(st.lists(LINE, min_size=1, max_size=3), min_size=1, max_size=6))
    return b"".join(b"".join(line + end for line in event) + end for event in events)


@given(streams())
def test_split_events_loses_nothing_and_each_has_one_end(body: bytes) -> None:
    events = router.split_events(body)
    assert b"".join(events) == body
    assert all(router.last_event_end(event) == len(event) for event in events)
    assert router.last_event_end(body) == len(body)


# --- the relay ----------------------------------------------------------------------------

WHOLE = b"".join(
    [
        b": OPENROUTER PROCESSING\n\n",
        *(sse(event) for event in chunks("hé", '"error" and [DONE] said', "lo€")),
        DONE,
    ]
)
SHORT = b"".join([sse(delta(content="a")), sse(delta("stop")), sse(usage_chunk()), DONE])


def styled(body: bytes, end: bytes) -> bytes:
    return body.replace(b"\n", end)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("wants_usage", [False, True], ids=["unasked", "asked"])
def test_a_stream_cut_anywhere_is_the_same_stream(end: bytes, wants_usage: bool) -> None:
    body = styled(SHORT, end)
    whole, _ = relayed([body], wants_usage)
    for at in range(1, len(body)):
        got, relay = relayed([body[:at], body[at:]], wants_usage)
        assert got == whole, at
        assert relay.failure is None
    drip, _ = relayed([body[at : at + 1] for at in range(len(body))], wants_usage)
    assert drip == whole


@given(st.sets(st.integers(1, len(WHOLE) - 1), max_size=12), st.booleans())
def test_a_stream_in_any_pieces_is_the_same_stream(cuts: set[int], wants_usage: bool) -> None:
    got, relay = relayed(pieces_of(WHOLE, cuts), wants_usage)
    assert (b'"usage"' in got) is wants_usage
    assert got == (WHOLE if wants_usage else WHOLE.replace(sse(usage_chunk()), b""))
    assert relay.flow.tokens == router.Tokens(7, 3)
    assert relay.flow.finished and relay.failure is None


def test_usage_next_to_a_finish_or_content_is_never_withheld() -> None:
    events = [{**delta(content="hi"), "usage": usage()}, {**delta("stop"), "usage": usage()}]
    body = b"".join(map(sse, events)) + DONE
    assert relayed([body])[0] == body


def test_usage_null_on_every_chunk_changes_nothing() -> None:
    body = b"".join(sse({**event, "usage": None}) for event in chunks("a", with_usage=False)) + DONE
    assert relayed([body])[0] == body


@pytest.mark.parametrize("last", [b"", b"\n", b"\r\n"], ids=["bare", "lf", "crlf"])
def test_done_without_its_blank_line_is_a_done(last: bytes) -> None:
    body = sse(delta(content="a")) + sse(delta("stop"))
    got, relay = relayed([body + b"data: [DONE]" + last])
    assert got == body + DONE and relay.failure is None


def test_a_finish_without_its_blank_line_is_a_finish() -> None:
    body = sse(delta(content="a")) + sse(delta("stop")).rstrip(b"\n")
    got, relay = relayed([body])
    assert relay.failure is None
    assert got == body + b"\n\n" + DONE


def test_a_missing_done_is_added_only_after_a_finish() -> None:
    got, relay = relayed([sse(delta(content="a")), sse(delta("stop"))])
    assert got.endswith(DONE) and relay.failure is None
    got, relay = relayed([sse(delta(content="a"))])
    assert relay.failure and DONE not in got and len(errors_in(got)) == 1


@pytest.mark.parametrize("broken", [b'data: {"choi', b"data: {", b"dat", b": no", b"event: x\nd"])
def test_half_an_event_at_the_end_is_not_passed_on(broken: bytes) -> None:
    got, relay = relayed([sse(delta(content="a")) + broken])
    assert relay.failure
    assert len(errors_in(got)) == 1, got  # and every payload was JSON


def test_half_an_event_before_a_reset_is_not_passed_on() -> None:
    ending = router.TransportError("reset", "gone")
    got, _ = relayed([sse(delta(content="a")) + b'data: {"choi'], ending=ending)
    assert len(errors_in(got)) == 1


def test_a_reset_after_the_finish_is_no_failure() -> None:
    """Everything the client was to get has come: an error event would spoil a whole answer."""
    ending = router.TransportError("reset", "gone")
    got, relay = relayed([sse(delta(content="a")), sse(delta("stop"))], ending=ending)
    assert relay.failure is None and got.endswith(DONE) and not errors_in(got)


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "overloaded", "code": 529}},
        {"error": {"message": "no"}, "choices": []},
        {"error": "text", "choices": [{"delta": {"content": ""}, "finish_reason": "error"}]},
        {"type": "error", "message": "no"},
        {"object": "error", "message": "no"},
        b'event: error\ndata: {"message": "no", "type": "error"}\n\n',
    ],
    ids=["plain", "with-choices", "text", "type", "object", "event"],
)
def test_an_error_event_ends_the_stream_in_our_words(error: Any) -> None:
    rest = sse(delta(content="late")) + DONE
    got, relay = relayed([sse(delta(content="a")) + sse(error) + rest])
    assert relay.failure and len(errors_in(got)) == 1
    assert b"late" not in got and DONE not in got
    assert got.startswith(sse(delta(content="a")))


def test_an_event_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "MAX_EVENT_BYTES", 1000)
    got, relay = relayed([b"data: " + b"x" * 600, b"x" * 600, b"x" * 600])
    assert relay.failure and relay.failure.sort == "garbled" and len(got) < 1000


def test_a_relay_closes_its_answer_and_tells_once() -> None:
    response, told = Pieces([sse(delta(content="a"))]), []
    relay = chat_relay(response)
    relay.on_close = told.append
    relay.close()
    relay.close()
    assert response.closed and told == [relay] and list(relay) == []


# --- the first useful event ---------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_the_first_useful_event_is_found_in_any_pieces(end: bytes) -> None:
    body = styled(b": hold on\n\n" + sse(delta(role="assistant")) + SHORT, end)
    whole = b"".join(router.first_useful(Pieces([body]), chat_passage(), str).stream)
    for at in range(1, len(body)):
        attempt = router.first_useful(Pieces([body[:at], body[at:]]), chat_passage(), str)
        assert attempt.verdict is None, (at, attempt.outcome)
        assert b"".join(attempt.stream) == whole, at


def test_an_only_event_without_its_blank_line_is_an_answer() -> None:
    body = sse(delta("stop", content="hi")).rstrip(b"\n")
    attempt = router.first_useful(Pieces([body]), chat_passage(), str)
    assert attempt.verdict is None, attempt.outcome
    assert payloads(b"".join(attempt.stream))[0]["choices"][0]["delta"] == {"content": "hi"}


def test_a_first_event_may_be_large() -> None:
    """An image in a stream: two megabytes of base64 in one event."""
    body = sse(delta(images=[{"image_url": {"url": "x"}}], content="i" * (2 << 20)))
    body += sse(delta("stop")) + DONE
    pieces = [body[at : at + 65536] for at in range(0, len(body), 65536)]
    attempt = router.first_useful(Pieces(pieces), chat_passage(), str)
    assert attempt.verdict is None, attempt.outcome


@pytest.mark.parametrize(
    ("body", "sort"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b": a comment\n\n", "empty"),
        (DONE, "empty"),
        (sse(delta(role="assistant", content="")), "empty"),
        (sse(delta("stop")) + DONE, "empty"),
        (b"<html><title>nginx</title></html>", "garbled"),
        (b'{"choices": []}', "garbled"),
        (b"[1]", "garbled"),
    ],
)
def test_a_stream_with_nothing_in_it_is_a_failure(body: bytes, sort: str) -> None:
    attempt = router.first_useful(Pieces([body]), chat_passage(), str)
    assert attempt.verdict is not None and attempt.outcome.sort == sort


def test_a_whole_answer_where_a_stream_was_asked_becomes_one() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = json.dumps(completion(None, tool_calls=[call])).encode()
    attempt = router.first_useful(Pieces([body[:5], body[5:]]), chat_passage(wants_usage=True), str)
    first, *_, last = payloads(b"".join(attempt.stream))
    assert first["choices"][0]["delta"]["tool_calls"] == [{"index": 0, **call}]
    assert last["choices"] == [] and last["usage"] == usage()


# --- whatever a provider says, nothing crashes ----------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers(-3, 700) | st.sampled_from(["", "x", "²", "429"])
NAMES = st.sampled_from(
    ["choices", "delta", "message", "content", "tool_calls", "finish_reason", "usage", "error"]
    + ["code", "status", "type", "object", "metadata", "raw", "detail", "x_groq", "data", "text"]
    + ["prompt_tokens", "completion_tokens"]
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
CHOICE = st.fixed_dictionaries({}, optional={
    "delta": JSON, "message": JSON, "finish_reason": JSON, "text": JSON, "index": JSON,
})  # fmt: skip
REPLY = st.fixed_dictionaries({}, optional={
    "choices": st.lists(CHOICE | JSON, max_size=3) | JSON, "usage": JSON, "error": JSON,
    "data": JSON, "type": JSON, "metadata": JSON, "x_groq": JSON,
})  # fmt: skip


@given(REPLY | JSON)
def test_any_whole_answer_is_judged(value: Any) -> None:
    body = json.dumps(value).encode()
    problem, reply = router.judge_reply(body)
    if problem:
        assert router.failed(problem, in_ok=True).verdict
    router.tokens_of(reply)
    router.judge_embeddings(body)
    assert isinstance(router.error_text(body), str)


@given(REPLY | JSON)
def test_any_whole_answer_to_a_streamed_request_is_judged(value: Any) -> None:
    attempt = router.first_useful(Pieces([json.dumps(value).encode()]), chat_passage(), str)
    if attempt.stream:
        payloads(b"".join(attempt.stream))


@given(REPLY | JSON)
def test_any_chunk_is_weighed_and_relayed(value: Any) -> None:
    router.see_chat(json.dumps(value).encode())
    got, _ = relayed([sse(delta(content="a")), sse(json.dumps(value)), sse(delta("stop")) + DONE])
    payloads(got)


@pytest.mark.parametrize("depth", [900, 20_000])
@pytest.mark.parametrize("frame", [b"%b", b'{"error": %b}', b'{"choices": %b}', b'{"detail": %b}'])
def test_a_deeply_nested_answer_is_a_failure_like_any_other(depth: int, frame: bytes) -> None:
    body = frame % (b"[" * depth + b"]" * depth)
    assert router.judge_reply(body)[0]
    assert isinstance(router.error_text(body), str)


# --- content that is like content looked at before -------------------------------------------


def content_event(text: str, **more: object) -> bytes:
    delta = {"content": text, **more}
    return router.encode_event({"id": "c1", "choices": [{"index": 0, "delta": delta}], "a": '"'})


ODD = content_event("x", tool_calls=[{"index": 0}])
TEXTS = st.text(st.sampled_from('ab"\\\n,:{}é') | st.characters(codec="utf-8"), max_size=12)


@given(st.lists(TEXTS, max_size=6), st.booleans(), st.lists(TEXTS, max_size=2))
def test_events_like_one_that_was_looked_at_pass_up_to_the_first_other_one(
    before: list[str], odd: bool, after: list[str]
) -> None:
    mould = router.Mould.of(content_event("hello"))
    plain = b"".join(map(content_event, before))
    rest = b"".join([ODD, *map(content_event, after)]) if odd else b""
    assert mould and mould.fits(plain + rest) == len(plain)


@pytest.mark.parametrize("end", [b"", b"\\", b"\\\\", b'\\"', b"\\\\\\"])
def test_a_member_behind_an_escaped_backslash_is_no_text(end: bytes) -> None:
    mould = router.Mould.of(content_event("hello"))
    text = content_event("E").replace(b"E", b"a" + end)
    other = content_event("E").replace(b'"E"', b'"a%b","tool_calls":"b"' % end)
    assert mould
    assert mould.fits(other) == 0 or len(end) % 2, "a quote that is escaped ends no text"
    assert mould.fits(text) == (0 if end in (b"\\", b"\\\\\\") else len(text))


# --- events that are known at a glance -------------------------------------------------------

FINISHES = st.sampled_from([None, "stop", "length", "", "eos", "error", 0, [], {}])
SAID = st.sampled_from([None, "", "a", " a", "<think>", "<b>", "\n", 0, False, [], ["a"], {}])
CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "index": st.sampled_from([0, 1, None]),
        "delta": st.none()
        | st.fixed_dictionaries(
            {},
            optional={
                "role": st.sampled_from(["assistant", None]),
                "content": SAID,
                "tool_calls": st.sampled_from([None, [], [{"index": 0}]]),
            },
        ),
        "finish_reason": FINISHES,
        "logprobs": st.none(),
        "text": st.sampled_from(["", "a"]),
    },
)
USAGES = st.sampled_from([None, {}, {"prompt_tokens": 3, "completion_tokens": 2}])
SOME_CHUNKS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.just("c1"),
        "object": st.sampled_from(["chat.completion.chunk", "chat.completion", "error", None]),
        "choices": st.sampled_from([None, [None]]) | st.lists(CHOICES, max_size=2),
        "usage": USAGES,
        "error": st.sampled_from([None, "", {"message": "no"}]),
        "success": st.booleans(),
    },
)


@given(SOME_CHUNKS | st.sampled_from([None, [], [{"error": "x"}], 0, "a"]))
def test_a_glance_tells_nothing_else_than_a_close_look(chunk: object) -> None:
    data = json.dumps(chunk).encode()
    seen = router.see_chat(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "plain_sight", lambda _chunk: None)
        assert router.see_chat(data) == seen


@given(st.text(st.sampled_from("\r\na"), max_size=30))
def test_events_end_at_the_same_places_with_and_without_carriage_returns(text: str) -> None:
    data = text.encode()
    ends = [match.end() for match in router.EVENT_END.finditer(data)]
    assert list(router.event_ends(data)) == ends
    data = data.replace(b"\r", b"")
    assert list(router.event_ends(data)) == [m.end() for m in router.EVENT_END.finditer(data)]


@pytest.mark.parametrize("text", [b"a\nb", b"a\rb", b"\r\rdata: [DONE]\r\r", b"\n\ndata: {}"])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_a_text_that_holds_line_ends_is_like_no_other(text: bytes, end: bytes) -> None:
    mould = router.Mould.of(b'data: {"content":"hello"}' + end)
    plain = b'data: {"content":"a"}' + end
    assert mould
    assert mould.fits(2 * plain) == 2 * len(plain)
    assert mould.fits(b'data: {"content":"' + text + b'"}' + end) == 0


def test_a_text_full_of_quotes_is_read_once() -> None:
    """Several megabytes; what looked back from each quote took hours."""
    mould = router.Mould.of(content_event("hello"))
    event = content_event('"' * 3_000_000)
    assert mould and mould.fits(event) == len(event)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_many_changes_between_text_and_pings_in_one_block(end: bytes) -> None:
    flow = chat_passage().flow()
    start = b"data: " + json.dumps(delta(content="a")).encode() + end
    block = start + (start + b": ping" + end) * 2000
    assert flow.take(start) == start
    assert flow.take(block) == block
    assert not flow.failure
