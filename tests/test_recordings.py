"""Real provider answers walk through the router unharmed, however the network cuts them."""

from __future__ import annotations

import json
import re
from decimal import Decimal

import pytest
from replay import GOLDEN, SMALL, SPLITS, Recording, cuts, select
from upstream import (
    AUTH,
    HELLO,
    Reply,
    chat,
    chat_stream,
    chunks,
    completion,
    data_of,
    delta,
    events_of,
    provider,
    sse,
    text_of,
)

import router

MODEL = "recorded-model"
# The provider row that stands for each recorded provider; the rest are OpenAI-compatible servers.
ROWS = {
    "cerebras": "cerebras",
    "deepseek": "deepseek",
    "google": "gemini",
    "groq": "groq",
    "huggingface": "huggingface",
    "mistral": "mistral",
    "openai": "openai",
    "openrouter": "openrouter",
}
WHOLE = [r for r in select(streams=False) if r.provider != "demo-endpoint"]
BROKEN = {"groq.chat.tool-use-failed-error-streaming.0", "openrouter.chat.stream-error.0"}
STREAMS = [r for r in select(streams=True) if r.id not in BROKEN]


def is_plain(recording: Recording) -> bool:
    """Whether a Chat client understands the answer as it came; other accents are put right."""
    return not router.needs_reading(json.loads(recording.body))


def asks_nothing_odd(recording: Recording) -> bool:
    """Whether the provider takes the request today without an edit."""
    row = ROWS.get(recording.provider, "local")
    return not router.fit_for(row, MODEL).edits(recording.request).keys() - {"stream_options"}


def named(recordings: list[Recording]) -> dict:
    return {"argvalues": recordings, "ids": [r.id for r in recordings]}


@pytest.fixture
def replayed(upstream, make_app):
    """replayed(recording, answers): a scripted provider, and a client of the router before it."""

    def make(recording: Recording, *answers, **settings):
        up = upstream(*answers)
        row = ROWS.get(recording.provider, "local")
        limits = {"REASONING_TOKEN_RESERVE": 0, f"{row.upper()}_SKIP_TOKENS_OVER": 0}
        app = make_app(**provider(row, up, MODEL), **limits, **settings)
        return up, app.test_client(), row

    return make


def ask(client, recording: Recording, **changes):
    """The recorded request, as a client of the router would send it."""
    body = {"messages": HELLO, **recording.request, "model": "hermes-router", **changes}
    return client.post("/v1/chat/completions", json=body, headers=AUTH)


@pytest.fixture
def alone(upstream, make_app):
    """A client of a router with this one provider."""

    def make(*answers, row="openai"):
        up = upstream(*answers)
        return up, make_app(**provider(row, up)).test_client()

    return make


def say_hello(client, **changes):
    body = {"model": "hermes-router", "messages": HELLO, **changes}
    return client.post("/v1/chat/completions", json=body, headers=AUTH)


# --- whole answers ------------------------------------------------------------


@pytest.mark.parametrize("recording", **named([r for r in WHOLE if is_plain(r)]))
def test_a_whole_answer_comes_back_byte_for_byte(replayed, recording):
    answers = [
        recording.answer("whole"),
        recording.answer("byte", framing="chunked"),
        recording.answer("seed:1", framing="close"),
        recording.answer("whole", gzipped=True),
    ]
    up, client, row = replayed(recording, *answers, CACHE_TTL_SECONDS=0)
    for answer in answers:
        got = ask(client, recording, stream=False)
        assert got.status_code == 200, got.data
        assert got.data == recording.body, answer.framing
        assert got.headers["Content-Type"].startswith("application/json")
        assert "Content-Encoding" not in got.headers
        assert got.headers["X-Provider"] == row
        assert got.headers["X-Hermes-Model"].endswith(MODEL)
        assert got.headers["X-Hermes-Attempts"] == "1"
    assert len(up.requests) == len(answers)


@pytest.mark.parametrize("recording", **named([r for r in WHOLE if not is_plain(r)]))
def test_an_odd_accent_is_put_right_and_loses_nothing(replayed, recording):
    _, client, _ = replayed(recording, recording.answer())
    got = ask(client, recording, stream=False).json["choices"]
    for before, after in zip(json.loads(recording.body)["choices"], got, strict=True):
        said, told = before["message"], after["message"]
        calls = [call["function"]["name"] for call in said.get("tool_calls") or ()]
        assert [call["function"]["name"] for call in told.get("tool_calls", ())] == calls
        assert all(call["id"] and call["type"] == "function" for call in told.get("tool_calls", []))
        assert not calls or after["finish_reason"] == "tool_calls"
        if isinstance(said.get("content"), str):
            _, _, words = said["content"].rpartition("</think>")
            everything = f"{told.get('reasoning_content')} {told['content'] or ''}".split()
            assert set(words.replace("<think>", "").split()) <= set(everything)


# --- streams ------------------------------------------------------------------


@pytest.mark.parametrize("recording", **named(STREAMS))
def test_a_stream_is_the_same_however_it_is_cut(replayed, recording):
    splits = [*SPLITS, "byte"] if len(recording.body) < SMALL else [*SPLITS, "11"]
    _, client, row = replayed(recording, *(recording.answer(split) for split in splits))
    for split in splits:
        got = ask(client, recording, stream=True, stream_options={"include_usage": True})
        assert got.status_code == 200
        assert got.headers["Content-Type"].startswith("text/event-stream")
        assert got.headers["X-Provider"] == row
        body = got.data
        assert events_of(body) == events_of(recording.body), split
        if b"\n: " not in recording.body and not recording.body.startswith(b":"):
            assert body == recording.body, split


@pytest.mark.parametrize("recording", **named(STREAMS))
@pytest.mark.parametrize("framing", ["length", "close"])
def test_framing_of_a_stream_does_not_matter(replayed, recording, framing):
    _, client, _ = replayed(recording, recording.answer("seed:3", framing=framing))
    got = ask(client, recording, stream=True, stream_options={"include_usage": True})
    assert events_of(got.data) == events_of(recording.body)


@pytest.mark.parametrize("recording", **named(STREAMS))
def test_crlf_line_ends_and_no_space_after_the_colon(replayed, recording):
    crlf = recording.body.replace(b"data: ", b"data:").replace(b"\n", b"\r\n")
    pieces = [range(1, len(crlf)) if len(crlf) < SMALL else range(3, len(crlf), 5), ()]
    headers = {"Content-Type": "text/event-stream;charset=UTF-8"}
    answers = [Reply(200, crlf, headers, framing="chunked", cuts=at) for at in pieces]
    _, client, _ = replayed(recording, *answers)
    for _ in answers:
        got = ask(client, recording, stream=True, stream_options={"include_usage": True})
        assert events_of(got.data) == events_of(recording.body)


def unasked(recording: Recording) -> list[tuple[str, str]]:
    """What a client sees that did not ask for usage: everything but the chunk without choices."""
    return [
        (name, data)
        for name, data in events_of(recording.body)
        if data == "[DONE]" or json.loads(data).get("choices") != []
    ]


@pytest.mark.parametrize("recording", **named(STREAMS))
@pytest.mark.parametrize("options", [None, {"include_usage": False}], ids=["silent", "declined"])
def test_usage_is_asked_for_upstream_and_withheld_from_who_did_not(replayed, recording, options):
    up, client, _ = replayed(recording, recording.answer("whole"), recording.answer("seed:4"))
    body = {name: value for name, value in recording.request.items() if name != "stream_options"}
    body |= {"model": "hermes-router", "stream": True}
    if options is not None:
        body["stream_options"] = options
    for number in range(2):
        got = client.post("/v1/chat/completions", json=body, headers=AUTH)
        assert events_of(got.data) == unasked(recording)
        assert up.requests[number].json["stream_options"]["include_usage"] is True


# --- what the provider is asked -------------------------------------------------


@pytest.mark.parametrize("recording", **named(list(filter(asks_nothing_odd, WHOLE + STREAMS))))
def test_the_request_reaches_the_provider_as_it_was(replayed, recording):
    up, client, _ = replayed(recording, recording.answer())
    ask(client, recording)
    sent, seen = recording.request, up.requests[0].json
    assert seen.pop("model") == MODEL
    for name in sent.keys() - {"model", "stream_options", "messages"}:
        assert seen[name] == sent[name], name
    for before, after in zip(sent["messages"], seen["messages"], strict=True):
        for name in before.keys() - {"reasoning", "reasoning_content", "reasoning_details"}:
            assert after[name] == before[name], name


RAW = """{ "messages": [{"role": "user",
   "content": "caf\\u00e9 \\ud83d\\ude00 \\"model\\": \\"no\\"",
   "model": "inner", "stream_options": 1}],
 "seed": 12345678901234567890, "temperature": 1.0, "top_p": 1e-2, "logit_bias": {"model": -1.50},
 "metadata": {"model": "also inner", "stream": "x"}, "model" : "hermes-router", "store": true,
 "user": "é"%s}"""


@pytest.mark.parametrize("stream", ["", ', "stream": true', ', "stream":false'])
def test_only_the_model_is_rewritten_not_a_digit_else(alone, stream):
    """Not even a big integer is rounded, and other members of the same name stay as they are."""
    raw = RAW % stream
    up, client = alone(chat_stream("a") if "true" in stream else chat("a"))
    headers = {**AUTH, "Content-Type": "application/json"}
    got = client.post("/v1/chat/completions", data=raw.encode(), headers=headers)
    assert got.status_code == 200
    sent, seen = (json.loads(body, parse_float=Decimal) for body in (raw, up.requests[0].body))
    assert seen.pop("model") == "m1" and sent.pop("model") == "hermes-router"
    if "true" in stream:
        assert seen.pop("stream_options") == {"include_usage": True}
    assert seen == sent


def test_a_megabyte_each_way_is_not_touched(alone):
    words = "né 😀 " * 150_000
    body = json.dumps(completion(words), ensure_ascii=False).encode()
    up, client = alone(Reply(200, body, {"Content-Type": "application/json"}), row="local")
    got = say_hello(client, messages=[{"role": "user", "content": words}])
    assert got.data == body
    assert up.requests[0].json["messages"][0]["content"] == words


ODD_STREAMS = {
    "byte order mark": b"\xef\xbb\xbf" + sse(delta(content="a")) + sse(delta("stop")),
    "id and retry": b"id: 1\nretry: 10\n"
    + sse(delta(content="a"))
    + b"id: 2\n"
    + sse(delta("stop")),
    "data in two lines": b'data: {"choices":[{"index":0,\ndata: "delta":{"content":"a"}}]}\n\n'
    + sse(delta("stop")),
    "blank lines": b"\n\n\n" + sse(delta(content="a")) + b"\n\n\n" + sse(delta("stop")),
    "no blank line at the end": sse(delta(content="a")) + sse(delta("stop"))[:-2],
    "no line end at all": sse(delta(content="a")) + b"data: [DONE]",
    "comments": b": hi\n\n" + sse(delta(content="a")) + b": still here\n\n" + sse(delta("stop")),
    "something behind the end": sse(delta(content="a")) + sse("[DONE]") + b": bye\n\n\n",
}


@pytest.mark.parametrize("shape", ODD_STREAMS)
@pytest.mark.parametrize("split", ["whole", "byte"])
def test_odd_but_legal_streams(alone, shape, split):
    body = ODD_STREAMS[shape]
    headers = {"Content-Type": "text/event-stream"}
    _, client = alone(Reply(200, body, headers, framing="chunked", cuts=cuts(body, split)))
    got = say_hello(client, stream=True)
    assert got.status_code == 200
    assert b'"error"' not in got.data
    assert events_of(got.data)[-1] == ("", "[DONE]")
    assert text_of(got.data) == "a"


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_a_compressed_stream_arrives_as_plain_events(alone, framing):
    body = b"".join(map(sse, [*chunks("a", "b"), "[DONE]"]))
    headers = {"Content-Type": "text/event-stream"}
    _, client = alone(Reply(200, body, headers, framing=framing, gzipped=True, cuts=range(1, 150)))
    got = say_hello(client, stream=True)
    assert "Content-Encoding" not in got.headers
    assert text_of(got.data) == "ab"


# --- errors in a 200 stream -----------------------------------------------------


def after_first_words(recording: Recording, split: str) -> Reply:
    """The answer, held behind its first useful event until the gate opens."""
    body = recording.body
    words = re.compile(rb'"(?:content|reasoning)":"[^"]')
    commit = body.index(b"\n\n", words.search(body).start()) + 2
    behind = (commit + at for at in cuts(body[commit:], split))
    headers = {"Content-Type": "text/event-stream"}
    offsets = [commit, *behind]
    return Reply(200, body, headers, framing="chunked", cuts=offsets, hold_after=1)


@pytest.mark.parametrize("name", sorted(BROKEN))
@pytest.mark.parametrize("split", SPLITS)
def test_an_error_after_the_first_words_reaches_the_client(replayed, name, split):
    recording = GOLDEN[name]
    up, client, _ = replayed(recording, after_first_words(recording, split))
    got = ask(client, recording, stream=True)
    assert got.status_code == 200
    up.open_gate()
    before, after = data_of(recording.body), data_of(got.data)
    failed = [chunk for chunk in after if "error" in chunk]
    assert len(failed) == 1
    assert failed[0]["error"]["message"].strip()
    good = [chunk for chunk in before if "error" not in chunk]
    assert after[: len(good)] == good
    assert "error" in after[-1]
    assert b"[DONE]" not in got.data
    rescues = "tool-use-failed" in name  # the model misspoke: somebody may go on, not the client
    assert len(up.requests) == 1 + rescues


# --- errors ---------------------------------------------------------------------

ERRORS_400 = [r for r in select(streams=False, status=400)]
ERRORS_404 = [r for r in select(streams=False, status=404)]
FOREIGN = [
    GOLDEN["demo-endpoint.chat.invalid-response.0"],
    *select(api="cohere.chat", streams=False),
]


@pytest.mark.parametrize("recording", **named(ERRORS_400))
@pytest.mark.parametrize("stream", [False, True])
def test_a_recorded_400_is_the_clients_and_keeps_its_reason(replayed, recording, stream):
    up, client, _ = replayed(recording, recording.answer("byte"))
    got = ask(client, recording, stream=stream)
    assert got.status_code == 400
    reason = json.loads(recording.body)["error"]["message"]
    assert reason in got.json["error"]["message"]
    assert got.json["error"]["type"] == "invalid_request_error"
    assert len(up.requests) == 1


@pytest.mark.parametrize("recording", **named(ERRORS_404))
def test_a_recorded_404_from_the_only_provider_is_told_as_exhaustion(replayed, recording):
    _, client, _ = replayed(recording, recording.answer())
    got = ask(client, recording)
    assert got.status_code == 503
    assert got.json["error"]["type"] == "router_error"


@pytest.mark.parametrize("recording", **named(FOREIGN))
def test_a_200_that_is_no_completion_is_a_failure(replayed, recording):
    _, client, _ = replayed(recording, recording.answer())
    got = ask(client, recording, stream=False)
    assert got.status_code == 503
    assert got.json["error"]["type"] == "router_error"


# Shapes that public reports describe (made up here, not recorded): one per way to say it.
ERROR_BODIES = {
    "openai": {"error": {"message": "THE-REASON", "type": "x", "param": None, "code": None}},
    "google-list": [{"error": {"code": 429, "message": "THE-REASON", "status": "EXHAUSTED"}}],
    "google": {"error": {"code": 429, "message": "THE-REASON", "status": "RESOURCE_EXHAUSTED"}},
    "flat": {"object": "error", "message": "THE-REASON", "type": "x", "param": None, "code": "1"},
    "string": {"code": "Client specified an invalid argument", "error": "THE-REASON"},
    "detail": {"detail": "THE-REASON"},
    "detail-list": {"detail": [{"loc": ["body", "seed"], "msg": "THE-REASON", "type": "extra"}]},
    "problem": {"status": 400, "title": "Bad Request", "detail": "THE-REASON"},
    "errors": {"success": False, "errors": [{"code": 7, "message": "THE-REASON"}]},
    "nested": {
        "error": {
            "message": "Provider returned error",
            "code": 400,
            "metadata": {"raw": '{"error": {"message": "THE-REASON"}}', "provider_name": "X"},
        }
    },
    "text": "THE-REASON",
}


@pytest.mark.parametrize("shape", ERROR_BODIES)
@pytest.mark.parametrize("status", [400, 422])
def test_every_error_shape_keeps_its_reason_in_a_400(alone, shape, status):
    _, client = alone(Reply(status, ERROR_BODIES[shape]))
    got = say_hello(client)
    assert got.status_code == 400
    assert "THE-REASON" in got.json["error"]["message"]
    assert got.json["detail"] == got.json["error"]["message"]


@pytest.mark.parametrize("shape", ERROR_BODIES)
def test_every_error_shape_may_come_with_a_429(alone, shape):
    _, client = alone(Reply(429, ERROR_BODIES[shape], {"Retry-After": "21"}))
    got = say_hello(client)
    assert got.status_code == 429
    assert got.json["error"]["type"] == "rate_limit_error"
    assert 20 <= int(got.headers["Retry-After"]) <= 22


@pytest.mark.parametrize("shape", ERROR_BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_every_error_shape_is_noticed_in_a_200(alone, shape, stream):
    _, client = alone(Reply(200, ERROR_BODIES[shape]))
    got = say_hello(client, stream=stream)
    assert got.status_code in (400, 429, 503)  # some of these shapes name a status inside
    assert got.json["error"]["message"]


@pytest.mark.parametrize("status", [401, 402, 403, 404, 408, 409, 410, 425, 500, 502, 503])
@pytest.mark.parametrize("shape", ["openai", "text"])
def test_anything_else_from_the_only_provider_is_a_503(alone, status, shape):
    _, client = alone(Reply(status, ERROR_BODIES[shape]))
    got = say_hello(client)
    assert got.status_code == 503
    assert got.json["error"]["type"] == "router_error"
    assert "openai-key-1" not in got.text


# --- embeddings -----------------------------------------------------------------


def embed(client, **body):
    return client.post("/v1/embeddings", json={"input": "hi", **body}, headers=AUTH)


@pytest.mark.parametrize("split", ["whole", "byte", "seed:1"])
def test_embeddings_come_back_byte_for_byte(upstream, make_app, split):
    recording = GOLDEN["openai.embeddings.instrumentation.0"]
    up = upstream(recording.answer(split))
    client = make_app(**provider("openai", up), OPENAI_EMBED_MODEL="embed-1").test_client()
    got = embed(client, **{**recording.request, "model": "hermes-router"})
    assert (got.status_code, got.data) == (200, recording.body)
    assert up.requests[0].path == "/v1/embeddings"
    assert up.requests[0].json == {**recording.request, "model": "embed-1"}
    assert got.headers["X-Provider"] == "openai"


@pytest.mark.parametrize(
    ("name", "status", "member"),
    [
        ("voyage.embeddings.embed-error.0", 400, "detail"),
        ("cohere.embeddings.embed-error.0", 503, ""),
    ],
)
def test_embedding_errors(upstream, make_app, name, status, member):
    recording = GOLDEN[name]
    up = upstream(recording.answer())
    client = make_app(**provider("openai", up), OPENAI_EMBED_MODEL="embed-1").test_client()
    got = embed(client)
    assert got.status_code == status
    if member:
        assert json.loads(recording.body)[member] in got.json["error"]["message"]
