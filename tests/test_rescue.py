"""A stream that breaks off after its first words: somebody goes on, or the client is told."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from upstream import (
    HELLO,
    Reply,
    Request,
    Stream,
    data_of,
    delta,
    events_of,
    provider,
    text_of,
    usage_chunk,
)

WORDS = [f"word{n} " for n in range(60)]
TEXT = "".join(WORDS)


def telling(words: list[str], *, whole: bool = True, **options: object) -> Stream:
    chunks = [delta(role="assistant", content=""), *(delta(content=word) for word in words)]
    end = [delta("stop"), usage_chunk()] if whole else []
    return Stream(chunks=[*chunks, *end], done=whole, **options)


CUT = telling(WORDS[:40], whole=False)
WAYS = {
    "cut": CUT,
    "reset": telling(
        WORDS[:40], whole=False, hold_after=None, stop_at=len(CUT.payload()), ending="reset"
    ),
    "error-event": Stream(chunks=[*CUT.chunks, {"error": {"message": "boom"}}], done=False),
}


def prefilled(request: Request) -> str:
    """What the request puts into the assistant's mouth."""
    last = request.json["messages"][-1]
    return last["content"] if last["role"] == "assistant" else ""


def going_on(request: Request) -> Stream:
    """A provider that goes on with the assistant's last words."""
    said = prefilled(request)
    assert TEXT.startswith(said)
    return telling([TEXT[len(said) :]])


def refusing(request: Request) -> Reply | Stream:
    """One that answers 400 to such a request, and the whole answer to a plain one."""
    if prefilled(request):
        message = "This model does not support assistant message prefill."
        return Reply(400, {"error": {"message": message, "code": "invalid_prefill"}})
    return telling(WORDS)


@pytest.fixture
def rescued(upstream, serve):
    """rescued(first, second, row=..., SETTING=...): the second provider and the client's stream."""

    def make(first, second, path="/v1/chat/completions", row="groq", **settings):
        one, two = upstream(first), upstream(second)
        rows = {**provider("cerebras", one, "m1"), **provider(row, two, "m2")}
        live = serve(**{**rows, "STREAM_IDLE_TIMEOUT": "2", **settings})
        body = {"model": "cerebras/m1", "stream": True, "messages": HELLO, "max_tokens": 500}
        if path == "/v1/responses":
            body = {"model": "cerebras/m1", "stream": True, "input": "hello"}
        return two, live.session.post(live.url + path, json=body, timeout=20)

    return make


def told(path: str, data: bytes) -> str:
    """The text a client of this endpoint puts together."""
    if path == "/v1/chat/completions":
        return text_of(data)
    events = [json.loads(text) for _, text in events_of(data)]
    if path == "/v1/messages":
        deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
        return "".join(d.get("text", "") for d in deltas)
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


PATHS = ["/v1/chat/completions", "/v1/messages", "/v1/responses"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("second", "asked"), [(going_on, 1), (lambda _: telling(WORDS), 1), (refusing, 2)],
    ids=["goes-on", "repeats", "refuses-prefill"],
)  # fmt: skip
def test_the_client_gets_the_whole_text_once(rescued, path, way, second, asked):
    two, got = rescued(WAYS[way], second, path)
    assert got.status_code == 200
    assert told(path, got.content) == TEXT
    assert b'"error"' not in got.content or b'"error":null' in got.content
    assert prefilled(two.requests[0]) == "".join(WORDS[:40])
    assert len(two.requests) == asked


def test_a_provider_that_takes_no_prefill_must_repeat(rescued):
    two, got = rescued(CUT, lambda _: telling(WORDS), row="sambanova")
    assert text_of(got.content) == TEXT
    assert not prefilled(two.requests[0])
    ids = {chunk["id"] for chunk in data_of(got.content)}
    assert len(ids) == 1, "one answer for the client"


def test_another_text_is_not_glued_on(rescued):
    two, got = rescued(CUT, lambda _: telling(["Something ", "else."]), row="sambanova")
    last = data_of(got.content)[-1]
    assert last["error"]["message"] and b"[DONE]" not in got.content
    assert "else" not in got.text
    assert "word39 " in got.text


def test_what_is_repeated_at_the_seam_is_left_out(rescued):
    tail = "".join(WORDS[36:40])
    _, got = rescued(CUT, lambda _: telling([tail + "".join(WORDS[40:])]))
    assert text_of(got.content) == TEXT


def test_a_silent_stream_is_gone_on_with(rescued):
    silent = telling(WORDS[:20], whole=False, hold_after=21)
    _, got = rescued(silent, going_on, STREAM_IDLE_TIMEOUT="0.5")
    assert text_of(got.content) == TEXT


def test_usage_is_that_of_who_finished(rescued):
    _, got = rescued(CUT, going_on)
    assert got.headers["X-Provider"] == "cerebras"
    finishes = [c["choices"][0]["finish_reason"] for c in data_of(got.content) if c.get("choices")]
    assert [f for f in finishes if f] == ["stop"]


def test_it_can_be_turned_off(rescued):
    two, got = rescued(CUT, going_on, RESCUE="0")
    assert not two.requests and "error" in data_of(got.content)[-1]


CALL = {"index": 0, "id": "call_1", "type": "function"}
CALLING = [
    delta(tool_calls=[{**CALL, "function": {"name": "write", "arguments": '{"te'}}]),
    delta(tool_calls=[{"index": 0, "function": {"arguments": 'xt": "hello'}}]),
]
CALL_END = [
    delta(tool_calls=[{"index": 0, "function": {"arguments": ' there"}'}}]),
    delta("tool_calls"),
]


def made_calls(data: bytes) -> dict[str, str]:
    calls: dict[str, str] = {}
    name = ""
    for chunk in data_of(data):
        for choice in chunk.get("choices") or ():
            for call in choice["delta"].get("tool_calls") or ():
                name = call["function"].get("name") or name
                calls[name] = calls.get(name, "") + call["function"].get("arguments", "")
    return calls


@pytest.mark.parametrize("before", [[], ["Let me ", "write. "]], ids=["call-only", "text-first"])
def test_half_a_tool_call_is_never_seen(rescued, before):
    said = [delta(content=word) for word in before]
    cut = Stream(chunks=[*said, *CALLING], done=False)
    whole = Stream(chunks=[*said, *CALLING, *CALL_END])
    _, got = rescued(cut, lambda _: whole, row="sambanova")
    assert made_calls(got.content) == {"write": '{"text": "hello there"}'}
    assert text_of(got.content) == "".join(before)
    assert b'"error"' not in got.content


def test_a_client_fault_in_the_middle_is_not_gone_on_with(rescued):
    fault = {"error": {"message": "bad tool", "code": 400}}
    two, got = rescued(Stream(chunks=[*CUT.chunks, fault], done=False), going_on)
    assert not two.requests and "bad tool" in data_of(got.content)[-1]["error"]["message"]


FILTER_ERROR = {"error": {"message": "flagged", "code": "content_filter"}}
FILTERED = [
    lambda _: Reply(400, FILTER_ERROR),
    lambda _: Stream(chunks=[delta("content_filter")]),
]


@pytest.fixture
def three(upstream, serve):
    """three(second, SETTING=...): one breaks off, the second may go on, and so may a third."""

    def make(first, second, **settings):
        ups = [upstream(script) for script in (first, second, going_on)]
        names = ("cerebras", "groq", "mistral")
        rows: dict[str, str] = {}
        for at, up in enumerate(ups):
            rows |= provider(names[at], up, f"m{at + 1}")
        live = serve(**rows, **settings)
        body = {"model": "cerebras/m1", "stream": True, "messages": HELLO}
        return ups, live.session.post(f"{live.url}/v1/chat/completions", json=body, timeout=20)

    return make


@pytest.mark.parametrize("allowed", [0, 1])
@pytest.mark.parametrize("filtered", FILTERED, ids=["error", "finish"])
def test_a_filter_in_a_rescue_is_passed_by_only_where_allowed(three, filtered, allowed):
    ups, got = three(CUT, filtered, CONTENT_FILTER_FAILOVER=allowed)
    assert ups[1].requests
    assert (text_of(got.content) == TEXT) is bool(allowed)
    assert bool(ups[2].requests) is bool(allowed)
    if not allowed:
        assert b"content_filter" in got.content or b'"error"' in got.content


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_filter_in_the_middle_is_gone_on_with_only_where_allowed(rescued, allowed):
    flagged = Stream(chunks=[*CUT.chunks, FILTER_ERROR], done=False)
    _, got = rescued(flagged, going_on, CONTENT_FILTER_FAILOVER=allowed)
    assert (text_of(got.content) == TEXT) is bool(allowed)
    assert (b"flagged" in got.content) is not bool(allowed)


@pytest.fixture
def trimmed() -> Callable[..., str]:
    import router

    def run(said: str, pieces: list[str], must_repeat: bool) -> str | None:
        trimmer = router.Trimmer(said, must_repeat)
        out = "".join(trimmer.feed(piece, False) for piece in pieces) + trimmer.feed("", True)
        return None if trimmer.strange else out

    return run


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_the_trimmer_in_any_pieces(trimmed, size):
    def cut(text: str) -> list[str]:
        return [text[at : at + size] for at in range(0, len(text), size)]

    assert trimmed("abc", cut("abcdef"), True) == "def"
    assert trimmed("abc", cut("abc"), True) == ""
    assert trimmed("abc", cut("abX"), True) is None
    assert trimmed("abc", cut("ab"), True) is None
    assert trimmed("abc", cut("def"), False) == "def"
    assert trimmed("", cut("def"), True) == "def"
    assert trimmed("The end. ", cut(" And more"), False) == "And more"


def native_response(words: list[str], whole: bool) -> Stream:
    """A stream as OpenAI itself writes it."""
    message = {"id": "msg_native", "type": "message", "role": "assistant", "content": []}
    head = {"id": "resp_native", "object": "response", "status": "in_progress", "output": []}
    place = {"item_id": "msg_native", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": []}
    events = [
        {"type": "response.created", "response": head},
        {"type": "response.output_item.added", "output_index": 0, "item": message},
        {"type": "response.content_part.added", **place, "part": part},
        *({"type": "response.output_text.delta", **place, "delta": word} for word in words),
    ]
    if whole:
        done = {**message, "content": [{**part, "text": "".join(words)}]}
        final = {**head, "status": "completed", "output": [done]}
        events.append({"type": "response.completed", "response": final})
    numbered = [{**event, "sequence_number": n} for n, event in enumerate(events)]
    return Stream(chunks=numbered, done=False)


def test_a_native_response_is_gone_on_with_under_its_own_ids(upstream, serve):
    one = upstream(native_response(WORDS[:40], whole=False))
    two = upstream(telling(WORDS))
    rows = {**provider("openai", one, "gpt-5.1-codex"), **provider("groq", two, "m2")}
    live = serve(**rows)
    body = {"model": "openai/gpt-5.1-codex", "stream": True, "input": "hello"}
    got = live.session.post(live.url + "/v1/responses", json=body, timeout=20)
    assert told("/v1/responses", got.content) == TEXT
    events = [json.loads(data) for _, data in events_of(got.content)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert {e["item_id"] for e in events if "item_id" in e} == {"msg_native"}
    assert events[-1]["type"] == "response.completed"
    final = events[-1]["response"]
    assert final["id"] == "resp_native" and final["output"][0]["content"][0]["text"] == TEXT
