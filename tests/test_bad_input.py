"""Hostile and broken requests: refused by name, no provider bothered, nobody else hurt."""

from __future__ import annotations

import gzip
import io
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from test_chat import BAD_CHATS, BAD_EMBEDDINGS
from upstream import AUTH, HELLO, KEY, Request, Upstream, chat, provider

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
GOOD = json.dumps({"model": "hermes-router", "messages": HELLO}).encode()


def echo(request: Request) -> Any:
    """A provider that repeats what the last message said."""
    return chat(request.json["messages"][-1]["content"])


@dataclass
class Door:
    """A router in process, and the provider behind it."""

    app: Any
    up: Upstream

    def post(self, path: str, raw: bytes, **headers: str) -> Any:
        fields = {"Content-Type": "application/json", **AUTH}
        fields.update({name.replace("_", "-"): value for name, value in headers.items()})
        return self.app.test_client().post(path, data=raw, headers=fields)

    def answers(self) -> bool:
        """Does a good request still get its answer?"""
        reply = self.post(CHAT, GOOD)
        return bool(
            reply.status_code == 200
            and reply.json["choices"][0]["message"]["content"] == HELLO[0]["content"]
        )


@pytest.fixture
def door(make_app: Callable[..., Any], upstream: Callable[..., Upstream]) -> Door:
    up = upstream(echo)
    return Door(make_app(**provider("groq", up), GROQ_EMBED_MODEL="e1"), up)


def refused(reply: Any, status: int = 400, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The error object of a reply in the one envelope that all errors have."""
    assert reply.status_code == status, reply.data[:300]
    assert reply.mimetype == "application/json"
    assert reply.headers["X-Request-ID"]
    body = json.loads(reply.data)
    error: dict[str, Any] = body["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["type"] == kind
    assert isinstance(error["message"], str)
    assert error["message"]
    assert body["detail"]
    return error


# --- bodies that are not a request --------------------------------------------


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def with_user(text: bytes) -> bytes:
    return b'{"messages": [{"role": "user", "content": ' + text + b"}]}"


NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \t\r\n",
    "text": b"hello",
    "form": b"model=x&messages=y",
    "xml": b"<?xml version='1.0'?><a/>",
    "nul": b"\x00",
    "null": b"null",
    "true": b"true",
    "number": b"1",
    "string": b'"messages"',
    "list": b"[]",
    "list of messages": json.dumps(HELLO).encode(),
    "cut short": GOOD[:-2],
    "trailing comma": b'{"messages": [],}',
    "two objects": GOOD + GOOD,
    "single quotes": b"{'messages': []}",
    "comment": b"{} // messages",
    "bare key": b"{messages: []}",
    "raw line break": with_user(b'"a\nb"'),
    "bad escape": with_user(b'"\\q"'),
    "short escape": with_user(b'"\\u12"'),
    "hex": b'{"max_tokens": 0x10}',
    "leading zero": b'{"max_tokens": 01}',
    "plus": b'{"max_tokens": +1}',
    "latin-1": with_user(b'"caf\xe9"'),
    "overlong": with_user(b'"\xc0\xaf"'),
    "raw surrogate": with_user(b'"\xed\xa0\x80"'),
    "cut character": with_user(b'"\xf0\x9f\x98"'),
    "utf-16": GOOD.decode().encode("utf-16"),
    "utf-32": GOOD.decode().encode("utf-32"),
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "gzip without saying so": gzip.compress(GOOD),
    "gzip garbage": b"\x1f\x8b\x08\x00" + b"\xff" * 40,
    "deep lists": nested(100_000),
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep and open": b"[" * 1_000_000,
    "deep in the wrong place": with_user(nested(50_000)),
}

# What a body holds -> the field the answer names.
UNSENDABLE: dict[str, tuple[bytes, str]] = {
    "NaN": (b'{"messages": [], "temperature": NaN}', "temperature"),
    "Infinity": (b'{"temperature": Infinity}', "temperature"),
    "-Infinity": (b'{"logit_bias": {"50256": -Infinity}}', "logit_bias.50256"),
    "NaN in an unknown field": (b'{"x": [{"y": NaN}]}', "x[0].y"),
    "endless float": (b'{"top_p": 1e999}', "top_p"),
    "endless integer": (b'{"seed": ' + b"9" * 10_000 + b"}", "seed"),
    "high half": (with_user(b'"\\ud83d"'), "messages[0].content"),
    "low half": (with_user(b'"\\ude00"'), "messages[0].content"),
    "halves the wrong way round": (with_user(b'"\\ude00\\ud83d"'), "messages[0].content"),
    "halves apart": (with_user(b'"\\ud83d \\ude00"'), "messages[0].content"),
    "half in a key": (b'{"metadata": {"\\udfff": "x"}}', "metadata.\\udfff"),
    "half in a tool": (b'{"tools": [{"function": {"name": "\\uD800"}}]}', "tools[0].function.name"),
    "101 levels": (b'{"metadata": ' + nested(100) + b"}", "metadata"),
    "300 levels": (b'{"messages": ' + nested(300) + b"}", "messages"),
}


@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
@pytest.mark.parametrize("name", NOT_JSON)
def test_what_is_no_json_object_is_refused(door: Door, path: str, name: str) -> None:
    error = refused(door.post(path, NOT_JSON[name]))
    said = error["message"]
    assert said.startswith("request body must be a JSON object") or error["param"] in said
    assert door.up.requests == []
    assert door.answers()


@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
@pytest.mark.parametrize("name", UNSENDABLE)
def test_what_cannot_be_sent_on_is_refused_by_name(door: Door, path: str, name: str) -> None:
    raw, param = UNSENDABLE[name]
    assert refused(door.post(path, raw))["param"] == param
    assert door.up.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_every_bad_chat_is_refused_with_the_field_named(door: Door, stream: bool) -> None:
    for body, param in BAD_CHATS:
        sent = body if "stream" in body else {**body, "stream": stream}
        if sent.get("temperature") != sent.get("temperature"):
            continue  # NaN, which is among UNSENDABLE
        error = refused(door.post(CHAT, json.dumps(sent).encode()))
        assert error["param"] == param
        assert param in error["message"]
    assert door.up.requests == []
    assert door.answers()


def test_every_bad_embeddings_request_is_refused_with_the_field_named(door: Door) -> None:
    for body, param in BAD_EMBEDDINGS:
        assert refused(door.post(EMBEDDINGS, json.dumps(body).encode()))["param"] == param
    for raw in (b"", b"[]", b"nonsense"):
        error = refused(door.post(EMBEDDINGS, raw))
        assert "must be a JSON object with an 'input' field" in error["message"]
    assert door.up.requests == []


def test_an_error_never_repeats_a_long_or_many_line_value(door: Door) -> None:
    for role in ("x" * 100_000, "user\r\nX-Evil: 1", "<script>"):
        body = json.dumps({"messages": [{"role": role, "content": "x"}]}).encode()
        error = refused(door.post(CHAT, body))
        assert len(error["message"]) < 300
        assert "\n" not in error["message"]


# --- around the body ----------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "x; y=\u00ff"],
)
def test_the_content_type_of_a_good_request_does_not_matter(door: Door, kind: str) -> None:
    assert door.post(CHAT, GOOD, Content_Type=kind).status_code == 200


def test_a_form_upload_is_no_request(door: Door) -> None:
    form = {"messages": "x", "file": (io.BytesIO(b"y"), "y.txt")}
    refused(door.app.test_client().post(CHAT, data=form, headers=AUTH))
    assert door.up.requests == []
    assert door.answers()


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "nonsense"])
def test_a_body_in_a_content_coding_is_refused(door: Door, coding: str) -> None:
    reply = door.post(CHAT, b"\x1f\x8b garbage", Content_Encoding=coding)
    refused(reply, reply.status_code)
    assert reply.status_code in (400, 415)
    assert door.up.requests == []


@pytest.mark.parametrize("value", ["x" * 60_000, "a b", "<b>", "\u00e9", ""])
def test_a_strange_request_id_is_not_repeated(door: Door, value: str) -> None:
    reply = door.post(CHAT, GOOD, X_Request_ID=value)
    assert reply.status_code == 200
    assert reply.headers["X-Request-ID"] not in (value, "")
    assert len(reply.headers["X-Request-ID"]) <= 128


def test_a_huge_header_hurts_nobody(door: Door) -> None:
    assert door.post(CHAT, GOOD, X_Whatever="x" * 200_000).status_code == 200
    assert door.post(CHAT, GOOD, X_Hermes_Profile="\u00ff" * 5_000).status_code == 200


def test_a_body_over_the_limit_gets_413(
    make_app: Callable[..., Any], upstream: Callable[..., Upstream]
) -> None:
    up = upstream(echo)
    door = Door(make_app(**provider("groq", up), MAX_REQUEST_BYTES=2_000), up)
    for raw in (with_user(b'"' + b"x" * 3_000 + b'"'), b"x" * 5_000):
        refused(door.post(CHAT, raw), 413)
    assert up.requests == []
    assert door.answers()


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/nothing", CHAT + "/", "/%ff%fe"])
def test_an_unknown_path_is_404(door: Door, path: str) -> None:
    for method in ("get", "post", "delete"):
        refused(getattr(door.app.test_client(), method)(path, headers=AUTH), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("get", CHAT, "POST"),
        ("put", CHAT, "POST"),
        ("delete", EMBEDDINGS, "POST"),
        ("post", "/v1/models", "GET"),
        ("post", "/health", "GET"),
        ("patch", "/v1/status", "GET"),
    ],
)
def test_a_wrong_method_is_405(door: Door, method: str, path: str, allowed: str) -> None:
    reply = getattr(door.app.test_client(), method)(path, headers=AUTH)
    refused(reply, 405)
    assert allowed in reply.headers["Allow"]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/chat/completions", "base URL must end in /v1"),
        ("/responses", "base URL must end in /v1"),
        ("/v1/v1/messages", "leave it out of its base URL"),
        ("/chat", "there is no POST /chat here"),
    ],
)
def test_a_wrong_base_url_is_told(door: Door, path: str, told: str) -> None:
    message = door.app.test_client().post(path, json={}, headers=AUTH).json["error"]["message"]
    assert message.endswith(told)


# --- keys ---------------------------------------------------------------------

BAD_KEYS: dict[str, dict[str, str]] = {
    "none": {},
    "empty": {"Authorization": ""},
    "empty bearer": {"Authorization": "Bearer "},
    "bearer alone": {"Authorization": "Bearer"},
    "wrong": {"Authorization": "Bearer sk-wrong"},
    "wrong bare": {"Authorization": "sk-wrong"},
    "wrong x-api-key": {"x-api-key": "sk-wrong"},
    "longer": {"Authorization": f"Bearer {KEY}x"},
    "shorter": {"Authorization": f"Bearer {KEY[:-1]}"},
    "upper case": {"Authorization": f"Bearer {KEY.upper()}"},
    "two keys": {"Authorization": f"Bearer {KEY} {KEY}"},
    "basic": {"Authorization": "Basic c2stdGVzdDo="},
    "non-ASCII": {"Authorization": "Bearer schl\u00fcssel"},
    "non-ASCII x-api-key": {"x-api-key": "\u00ff\u00fe"},
    "endless": {"Authorization": "Bearer " + "k" * 100_000},
    "wrong, though x-api-key is right": {"Authorization": "Bearer no", "x-api-key": KEY},
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_bad_key_is_401_before_the_body_is_read(door: Door, name: str) -> None:
    client = door.app.test_client()
    for path, raw in ((CHAT, GOOD), (CHAT, b"\xff not json"), (EMBEDDINGS, b"{}")):
        reply = client.post(path, data=raw, headers=BAD_KEYS[name])
        error = refused(reply, 401, "authentication_error")
        assert error["code"] == "invalid_api_key"
        assert error["message"].startswith("unauthorized")
        assert reply.json["detail"] == "Unauthorized"
        assert KEY not in reply.text
    for path in ("/v1/models", "/v1/models/hermes-router", "/v1/status"):
        refused(client.get(path, headers=BAD_KEYS[name]), 401, "authentication_error")
    assert door.up.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer {KEY}"},
        {"Authorization": f"BEARER   {KEY} "},
        {"Authorization": KEY},
        {"x-api-key": KEY},
        {"X-API-Key": KEY, "Authorization": ""},
        {"X-API-Key": KEY, "Authorization": "Bearer "},
    ],
)
def test_a_good_key_is_taken_wherever_it_stands(door: Door, headers: dict[str, str]) -> None:
    assert door.app.test_client().post(CHAT, data=GOOD, headers=headers).status_code == 200


def test_health_needs_no_key_and_minds_none(door: Door) -> None:
    for headers in BAD_KEYS.values():
        assert door.app.test_client().get("/health", headers=headers).status_code == 200


# --- over the wire ------------------------------------------------------------


def raw_answer(port: int, request: bytes) -> bytes:
    """What comes back on a fresh connection for exactly these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(request)
        answer = b""
        try:
            while data := sock.recv(65_536):
                answer += data
        except ConnectionResetError:  # the server refused to read on, which is its right
            pass
    return answer


def head(*fields: str) -> bytes:
    lines = (f"POST {CHAT} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *fields, "", "")
    return "\r\n".join(lines).encode("latin-1")


@pytest.mark.parametrize(
    ("request_bytes", "statuses"),
    [
        (b"GARBAGE\r\n\r\n", (400, 404, 405)),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (400, 404, 405)),
        (head("Content-Length: abc"), (400,)),
        (head("Content-Length: -5"), (400,)),
        (head("Content-Length: 5", "Content-Length: 6") + b"hello", (400,)),
        (head("Transfer-Encoding: chunked") + b"zz\r\nhello\r\n0\r\n\r\n", (400,)),
        (head("Transfer-Encoding: nonsense") + b"hello", (400, 501)),
        (head("X-Huge: " + "h" * 400_000), (400, 431)),
        (head("Content-Length: 99999999999"), (413,)),
        (head("Content-Length: 5000") + b"x" * 5_000, (413,)),
        (head("Transfer-Encoding: chunked") + b"ffff\r\n" + b"x" * 65_535 + b"\r\n", (413,)),
    ],
)
def test_broken_http_is_refused_and_the_server_lives(
    serve: Callable[..., Any],
    upstream: Callable[..., Upstream],
    request_bytes: bytes,
    statuses: tuple[int, ...],
) -> None:
    up = upstream(echo)
    live = serve(**provider("groq", up), MAX_REQUEST_BYTES=4_000)
    answer = raw_answer(live.port, request_bytes)
    status_line, _, rest = answer.partition(b"\r\n")
    assert int(status_line.split()[1]) in statuses, answer[:300]
    if statuses == (413,):
        head_fields, _, body = rest.partition(b"\r\n\r\n")
        assert b"application/json" in head_fields
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert up.requests == []
    assert live.chat().status_code == 200


def test_a_413_comes_before_the_body_is_sent(
    serve: Callable[..., Any], upstream: Callable[..., Upstream]
) -> None:
    live = serve(**provider("groq", upstream(echo)), MAX_REQUEST_BYTES=4_000)
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as sock:
        sock.sendall(head("Content-Length: 5000000"))  # and not one byte of the five million
        assert sock.recv(4_096).startswith(b"HTTP/1.1 413")


def test_a_body_of_exactly_the_limit_is_taken(
    serve: Callable[..., Any], upstream: Callable[..., Upstream]
) -> None:
    live = serve(**provider("groq", upstream(echo)), MAX_REQUEST_BYTES=2_000)
    body = with_user(b'"hello"').ljust(2_000)
    got = [live.session.post(f"{live.url}{CHAT}", raw, timeout=30) for raw in (body, body + b" ")]
    assert [answer.status_code for answer in got] == [200, 413]
    assert "2000 bytes" in got[1].json()["error"]["message"]


def test_bad_requests_among_good_ones_hurt_nobody(
    serve: Callable[..., Any], upstream: Callable[..., Upstream]
) -> None:
    up = upstream(echo)
    live = serve(**provider("groq", up))
    bad = [*NOT_JSON.values(), *(raw for raw, _ in UNSENDABLE.values())]
    wrong: list[object] = []

    def send_bad(at: int) -> None:
        for raw in bad[at::4]:
            request = head(f"Content-Length: {len(raw)}", "Connection: close") + raw
            status = raw_answer(live.port, request).split(b" ", 2)[1]
            wrong.extend([] if status == b"400" else [(status, raw[:60])])

    def send_good(at: int) -> None:
        for turn in range(12):
            nonce = f"nonce-{at}-{turn}"
            reply = live.chat(messages=[{"role": "user", "content": nonce}])
            got = reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"]
            wrong.extend([] if got == nonce else [(nonce, reply.status_code, got)])

    both = (send_bad, send_good)
    jobs = [threading.Thread(target=job, args=(at,)) for job in both for at in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert wrong == []
    assert len(up.requests) == 4 * 12
