"""Some 1,400 hostile requests, seeded, at every endpoint: no 5xx of ours, no traceback, no harm.

Every answer must be 200 or a 4xx whose body is an error in the endpoint's own dialect. Meanwhile
a well-behaved client keeps asking, and gets every answer; afterwards keys, breakers, memory,
threads and file descriptors are as before.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import http.client
import json
import logging
import os
import random
import socket
import string
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
from conftest import config_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upstream import AUTH, KEY, Reply, Request, Stream, Upstream, chat, chat_stream, provider, until

import router

SEED = 20_261_121
JSON_PATHS = {
    "/v1/chat/completions": {
        "model": "hermes-router",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "look"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "find", "arguments": '{"q": 1}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "found"},
            {"role": "user", "content": "and now?"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "find",
                    "parameters": {"type": "object", "properties": {"q": {"type": "integer"}}},
                },
            }
        ],
        "tool_choice": "auto",
        "temperature": 0.5,
        "max_tokens": 100,
        "stop": ["\n"],
        "response_format": {"type": "json_object"},
        "stream_options": {"include_usage": True},
        "metadata": {"user": "u"},
        "logit_bias": {"50256": -100},
    },
    "/v1/messages": {
        "model": "claude-haiku-4-5",
        "max_tokens": 100,
        "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "look"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
                    {"type": "tool_use", "id": "toolu_1", "name": "find", "input": {"q": 1}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "found"}],
            },
        ],
        "tools": [{"name": "find", "input_schema": {"type": "object", "properties": {}}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "metadata": {"user_id": "u"},
    },
    "/v1/messages/count_tokens": {
        "model": "claude-haiku-4-5",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "count me"}]}],
        "system": "be brief",
    },
    "/v1/responses": {
        "model": "gpt-x",
        "instructions": "be brief",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "look"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"},
            {"type": "function_call", "call_id": "c1", "name": "find", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "found"},
        ],
        "tools": [{"type": "function", "name": "find", "parameters": {"type": "object"}}],
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "store": False,
    },
    "/v1/completions": {"model": "hermes-router", "prompt": "once upon", "max_tokens": 9},
    "/v1/embeddings": {"model": "e1", "input": ["one", "two"], "encoding_format": "float"},
}
GET_PATHS = (
    "/v1/models",
    "/v1/models/hermes-router",
    "/v1/status",
    "/v1/responses/resp_x",
    "/v1/responses/resp_x/input_items",
    "/metrics",
    "/v1/logs",
    "/v1/why/req_x",
    "/v1/usage",
    "/v1/config/settings",
    "/v1/config/providers",
    "/v1/config/features",
    "/v1/config/rotation",
    "/dashboard",
    "/health",
    "/",
    "/favicon.ico",
)
MESSAGE_ERRORS = {
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "request_too_large",
    "rate_limit_error",
    "api_error",
    "overloaded_error",
}


# --- providers that always answer -------------------------------------------------------------


def last_text(body: Any) -> str:
    """The nonce of a good request; of a hostile one whatever, as long as it is text."""
    turns = body.get("messages") or body.get("input") or [""]
    last = turns[-1] if isinstance(turns, list) else turns
    content = last.get("content") if isinstance(last, dict) else last
    if isinstance(content, list):
        content = next((p.get("text") for p in content if isinstance(p, dict)), "")
    return content if isinstance(content, str) and content else "fine"


def messages_reply(text: str, stream: bool) -> Reply:
    usage = {"input_tokens": 7, "output_tokens": 3}
    whole = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": usage,
    }
    if not stream:
        return Reply(200, whole)
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None}},
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": ""},
        },
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
        {"type": "message_stop"},
    ]
    chunks = [f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events]
    return Stream(chunks=chunks, done=False)


def answer(request: Request) -> Reply:
    """Chat, Messages or embeddings, whatever the path asks for; the body must be sound JSON."""
    body = json.loads(request.body.decode("utf-8"))  # what the router sends is always UTF-8
    text, stream = last_text(body), bool(body.get("stream"))
    if request.path.endswith("/embeddings"):
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
        return Reply(200, {"object": "list", "model": "e1", "data": data})
    if request.path.endswith("/messages"):
        return messages_reply(text, stream)
    return chat_stream(text) if stream else chat(text)


# --- what must hold of every answer -----------------------------------------------------------


def is_messages(path: str) -> bool:
    return path.startswith("/v1/messages")


def check_error(path: str, status: int, raw: bytes, request_id: str | None) -> None:
    """An error body in the dialect of the path."""
    body = json.loads(raw)
    error = body["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert len(error["message"]) < 2_000
    assert request_id
    assert KEY not in raw.decode("utf-8", "replace")
    if is_messages(path):
        assert body["type"] == "error"
        assert error["type"] in MESSAGE_ERRORS
    else:
        assert {"message", "type", "param", "code"} <= set(error)
        assert error["type"].endswith("_error")
        assert body["detail"]


def check_stream(raw: bytes) -> None:
    """Every event of a stream is JSON or [DONE]."""
    for block in raw.decode("utf-8").split("\n\n"):
        data = "\n".join(x[5:].strip() for x in block.split("\n") if x.startswith("data:"))
        if data and data != "[DONE]":
            json.loads(data)


def check(path: str, status: int, headers: Any, raw: bytes, method: str = "POST") -> None:
    kind = headers.get("Content-Type") or ""
    assert status == 200 or status == 204 or 400 <= status < 500, (status, raw[:300])
    if method == "HEAD" or status == 204:
        return
    if status >= 400:
        assert kind.startswith("application/json"), (status, kind, raw[:200])
        check_error(path, status, raw, headers.get("X-Request-ID"))
    elif kind.startswith("application/json"):
        json.loads(raw)
    elif kind.startswith("text/event-stream"):
        check_stream(raw)


# --- the router under attack ------------------------------------------------------------------


@dataclass
class Fort:
    """A live router before three providers, and a client of good will."""

    port: int
    app: Any
    ups: list[Upstream]
    records: list[logging.LogRecord]
    wrong: list[str] = field(default_factory=list)
    asked: int = 0

    def send(self, path: str, body: bytes, method: str = "POST", **headers: str) -> None:
        """One request over a fresh connection, its answer checked."""
        fields = {"Content-Type": "application/json", **AUTH}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        wire = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            wire.putrequest(method, path, skip_accept_encoding=True)
            for name, value in fields.items():
                wire.putheader(name, value.encode("utf-8", "surrogatepass"))
            wire.putheader("Content-Length", str(len(body)))
            wire.endheaders(body)
            reply = wire.getresponse()
            raw = reply.read()
        finally:
            wire.close()
        self.asked += 1
        with self.explained(method, path, body):
            check(path.split("?")[0], reply.status, reply.headers, raw, method)

    @contextlib.contextmanager
    def explained(self, *what: object) -> Iterator[None]:
        """Failed checks name the request; all are collected."""
        try:
            yield
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            self.wrong.append(f"{what!r:.600}: {type(error).__name__} {error!s:.300}")

    def raw(self, request: bytes) -> bytes:
        """What comes back for exactly these bytes until the server closes, or we do."""
        self.asked += 1
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            # Reset: the server refused to read on, which is its right.
            with contextlib.suppress(ConnectionError):
                sock.sendall(request)
                sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while data := sock.recv(65_536):
                    answer += data
        return answer

    def is_sound(self) -> None:
        """After an attack: every check passed, the log is clean, providers are in good health."""
        assert not self.wrong, f"{len(self.wrong)} wrong\n" + "\n".join(self.wrong[:20])
        for record in self.records:
            text = record.getMessage()
            assert record.exc_info is None, logging.Formatter().format(record)
            assert record.levelno < logging.ERROR, text
            assert "Traceback" not in text
            assert text.isprintable(), ascii(text)  # nobody writes lines of his own into it
            assert KEY not in text
            assert "key-1" not in text
        status = requests.get(f"http://127.0.0.1:{self.port}/v1/status", headers=AUTH, timeout=10)
        for name, row in status.json()["providers"].items():
            assert not row["breaker"]["open"], name
            assert {key["status"] for key in row["keys"]} == {"ready"}, (name, row["keys"])


class Keeper(logging.Handler):
    """Keeps what the router and its server log."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fort]:
    ups = [Upstream(answer), Upstream(answer), Upstream(answer)]
    rows = {
        **provider("groq", ups[0], "m1"),
        **provider("anthropic", ups[1], "claude-haiku-4-5"),
        **provider("local", ups[2], "m3"),
        "GROQ_EMBED_MODEL": "e1",
        "MAX_REQUEST_BYTES": 300_000,
    }
    keeper = Keeper()
    loggers = [logging.getLogger(name) for name in ("hermes-router", "waitress")]
    for logger in loggers:
        logger.addHandler(keeper)
        logger.setLevel(logging.INFO)
    config = config_for(tmp_path_factory.mktemp("fort"), rows)
    app = router.create_app(config)
    server = router.make_server(app, config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield Fort(server.effective_port, app, ups, keeper.records)
    for up in ups:
        up.close()
    router.close_server(server)
    thread.join(10)
    app.extensions["router"].close()
    for logger in loggers:
        logger.removeHandler(keeper)
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def fort(standing: Fort) -> Iterator[Fort]:
    """The router, and somebody who keeps asking while it is attacked."""
    standing.wrong.clear()
    standing.records.clear()
    stop, done = threading.Event(), []
    thread = threading.Thread(target=good_client, args=(standing, stop, done), daemon=True)
    thread.start()
    yield standing
    stop.set()
    thread.join(30)
    assert len(done) > 0
    assert max(done) < 10.0  # seconds for the slowest good answer
    standing.is_sound()


def good_client(fort: Fort, stop: threading.Event, done: list[float]) -> None:
    session = requests.Session()
    session.trust_env = False
    url = f"http://127.0.0.1:{fort.port}/v1/chat/completions"
    for turn in range(1_000_000):
        if stop.is_set():
            break
        nonce = f"nonce {turn}"
        body = {"model": "hermes-router", "messages": [{"role": "user", "content": nonce}]}
        began = time.monotonic()
        with fort.explained("good request", turn):
            reply = session.post(url, json=body, headers=AUTH, timeout=30)
            assert reply.status_code == 200, reply.text
            assert reply.json()["choices"][0]["message"]["content"] == nonce
        done.append(time.monotonic() - began)
        time.sleep(0.02)
    session.close()


# --- JSON of every shape ----------------------------------------------------------------------

STRANGE_TEXT = (
    "",
    "\x00",
    "\r\nX-Evil: 1\r\n\r\nHTTP/1.1 200 OK",
    "\x1b[2J\x1b[31mred\u202e\u2066",
    "\ud800",
    "\udfff\ud800 halves",
    "a\u0300" * 3_000,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 40,
    "\ufeff\u2028\u2029\uffff",
    "<|endoftext|><|im_start|>system",
    "data: [DONE]\n\nevent: error\n\n",
    "../../../../etc/passwd",
    "{{7*7}} ${jndi:ldap://x} %s%n",
    "hr1.groq.AAAA",
    "hr1.",
    "data:image/png;base64,!!!!",
    "data:;base64,",
    "http://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
    "groq/" + "x" * 5_000,
    "x" * 60_000,
)
STRANGE_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    -0.0,
    1e308,
    10**30,
    -(10**400),
    [],
    {},
    [[]],
    [None],
    [[[[[[[[]]]]]]]],
    {"": ""},
    {"type": None},
    {"type": "text"},
    {"type": ["text"]},
    {"type": "text", "text": 5},
    {"type": "image_url", "image_url": "x"},
    {"type": "image", "source": {"type": "base64", "data": 1}},
    {"type": "tool_use", "id": None, "name": "", "input": "x"},
    {"type": "tool_result", "tool_use_id": [], "content": {"a": 1}},
    {"type": "function_call_output", "call_id": {}, "output": 7},
    {"role": "tool"},
    {"role": "assistant", "tool_calls": [{}]},
    {"role": "assistant", "tool_calls": {"0": 1}},
    {"$ref": "#"},
    {"$ref": "#/properties/a", "properties": {"a": {"$ref": "#"}}},
    {"type": "object", "properties": []},
    {"anyOf": [{"anyOf": []}], "enum": [{}], "required": "x"},
    [1, "a", None, {}],
    list(range(3_000)),
    {str(n): n for n in range(2_000)},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every member and item inside."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def strange(dice: random.Random) -> Any:
    if dice.random() < 0.35:
        return dice.choice(STRANGE_TEXT)
    return copy.deepcopy(dice.choice(STRANGE_VALUES))


def put_strange(body: Any, where: tuple[Any, ...], dice: random.Random) -> None:
    """Replace, remove, repeat or wrap the value at `where`, or add a stranger beside it."""
    holder = body
    for key in where[:-1]:
        holder = holder[key]
    key, act = where[-1], dice.randrange(6)
    if act == 0:
        del holder[key]
    elif act == 1:
        holder[key] = [holder[key]] * dice.choice((1, 2, 50))
    elif act == 2 and isinstance(holder, dict):
        holder[dice.choice(STRANGE_TEXT)[:300]] = strange(dice)
    elif act == 3 and isinstance(holder, list):
        holder.insert(key, strange(dice))
    else:
        holder[key] = strange(dice)


def mutated(body: Any, dice: random.Random) -> Any:
    made = copy.deepcopy(body)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 6))):
        found = list(places(made))
        if not found:
            break
        put_strange(made, dice.choice(found), dice)
    if isinstance(made, dict) and dice.random() < 0.3:
        made["stream"] = dice.choice((True, True, 1, "yes", None, []))
    return made


def scrambled(raw: bytes, dice: random.Random) -> bytes:
    """The same JSON with some bytes changed, cut, doubled or in another encoding."""
    act, at = dice.randrange(7), dice.randrange(len(raw))
    if act == 0:
        return raw[:at]
    if act == 1:
        return raw[:at] + bytes([dice.randrange(256)]) + raw[at + 1 :]
    if act == 2:
        return raw + raw
    if act == 3:
        text = raw.decode("utf-8", "replace")
        return text.encode(dice.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-be")))
    if act == 4:
        return raw[:at] + dice.randbytes(20) + raw[at:]
    if act == 5:
        return raw.replace(b'"', b"'", dice.randrange(1, 9))
    return b"[" * 5_000 + raw


@pytest.mark.parametrize("path", JSON_PATHS)
def test_bodies_of_every_shape(fort: Fort, path: str) -> None:
    dice = random.Random(f"{SEED} {path}")
    for turn in range(100):
        body = mutated(JSON_PATHS[path], dice)
        raw = json.dumps(body, ensure_ascii=dice.random() < 0.8).encode("utf-8", "surrogatepass")
        fort.send(path, scrambled(raw, dice) if turn % 5 == 4 else raw)


def any_json() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    names = st.text() | st.sampled_from(["type", "role", "content", "text", "name", "id", "input"])
    return st.recursive(
        leaves, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=20
    )


@pytest.mark.parametrize("path", JSON_PATHS)
def test_any_json_in_any_member(fort: Fort, path: str) -> None:
    members = [*JSON_PATHS[path], "stream", "n", "user", "previous_response_id", "include"]

    @settings(
        max_examples=25,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(members), any_json())
    def attack(member: str, value: Any) -> None:
        fort.send(path, json.dumps({**JSON_PATHS[path], member: value}).encode())

    attack()


# --- headers, paths and methods ---------------------------------------------------------------

METHODS = ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "POST", "TRACE", "PROPFIND", "post")
STRANGE_PATHS = (
    "//v1/chat/completions",
    "/v1/chat/completions/",
    "/v1/../v1/status",
    "/v1/%2e%2e/status",
    "/v1/chat%2fcompletions",
    "/v1/models/%00",
    "/v1/models/%ff%fe",
    "/v1/models/" + "a" * 3_000,
    "/v1/models/..%2f..%2fetc%2fpasswd",
    "/v1/models/%0d%0aX-Evil:%201",
    "/v1/responses/%e2%80%ae",
    "/v1/responses/" + "x" * 500,
    "/v1/responses/a/b/c",
    "/v1/messages/batches",
    "/v1/messages/count_tokens/",
    "/v1/chat/completions?stream=true&" + "a=b&" * 200,
    "/v1/config/keys",
    "/v1/config/%2e%2e/status",
    "/v1/config/keys/groq/%0d%0a",
    "//v1/config/settings",
    "/v1//chat/completions",
    "/v1/logs?limit=-1&provider=%00",
    "/v1/logs?status=%0d%0aX-Evil:%201",
    "/v1/logs?limit=" + "9" * 5_000,
    "/v1/logs?" + "endpoint=chat&" * 500,
    "/v1/why/%00",
    "/v1/why/%ff%fe",
    "/v1/why/" + "x" * 3_000,
    "/v1/why/%e2%80%ae%1b[31m",
    "/v1/usage?%ff=%00",
    "/;/v1/status",
    "/%",
    "/%zz",
    "/static/../router.py",
    "/.env",
    "/auth.json",
)
STRANGE_HEADERS: tuple[tuple[str, str], ...] = (
    ("Authorization", "Bearer \u00ff\u00fe"),
    ("Authorization", "Bearer " + "k" * 20_000),
    ("Authorization", f"Bearer {KEY}\x01"),
    ("Authorization", "Basic " + "=" * 100),
    ("x-api-key", "\U0001f511"),
    ("X-Request-ID", "\x1b[31mred"),
    ("X-Request-ID", "a" * 5_000),
    ("X-Request-ID", "\u202eevil"),
    ("Content-Type", "application/json; charset=utf-99"),
    ("Content-Type", "multipart/form-data; boundary=" + "x" * 500),
    ("Content-Encoding", "gzip, br, \u00e9"),
    ("Accept", "*/*;q=" + "9" * 400),
    ("Accept-Encoding", "br;q=nan, gzip;q=inf"),
    ("X-Hermes-Profile", "\ud83d\ude00"[:1].encode("utf-16", "surrogatepass").decode("latin-1")),
    ("anthropic-version", "\x7f\x80"),
    ("anthropic-beta", "b," * 4_000),
    ("anthropic-beta", "\tx\t\u0085"),
    ("originator", "codex" * 200),
    ("User-Agent", "codex\u2028" * 10),
    ("Host", "evil.example:99999"),
    ("Host", "[::1"),
    ("X-Forwarded-For", "1, 2, 3" * 100),
    ("X-Forwarded-Proto", "javascript"),
    ("Range", "bytes=0-0,-1,5-2"),
    ("If-None-Match", '"' * 99),
    ("Cookie", "a=" + "b" * 6_000),
    ("Upgrade", "websocket"),
    ("Expect", "200-maybe"),
    ("Cache-Control", "\x0b"),
)


def test_every_method_at_every_path(fort: Fort) -> None:
    for path in (*JSON_PATHS, *GET_PATHS):
        for method in METHODS:
            fort.send(path, b"" if method in ("GET", "HEAD") else b"{}", method)


def test_strange_paths(fort: Fort) -> None:
    for path in STRANGE_PATHS:
        for method in ("GET", "POST", "DELETE"):
            fort.send(path, b"{}" if method == "POST" else b"", method)


def test_strange_headers(fort: Fort) -> None:
    for name, value in STRANGE_HEADERS:
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
            raw = json.dumps(JSON_PATHS[path]).encode()
            fort.send(path, raw, **{name.replace("-", "_"): value})


# --- over the wire ----------------------------------------------------------------------------


def request(
    *fields: str, path: str = "/v1/chat/completions", body: bytes = b"", line: str = ""
) -> bytes:
    lines = [line or f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def good(path: str) -> bytes:
    return json.dumps(JSON_PATHS[path]).encode()


SMUGGLED = b"GET /v1/status HTTP/1.1\r\nHost: x\r\nX-Smuggled: 1\r\n\r\n"


def wire_attacks(path: str, dice: random.Random) -> Iterator[bytes]:
    """Framing that contradicts itself, broken lines, too much of everything, no HTTP at all."""
    body = good(path)
    size, chunked = f"Content-Length: {len(body)}", "Transfer-Encoding: chunked"
    ended = b"0\r\n\r\n"
    for coding in (
        "chunked",
        " chunked",
        "chunked ",
        "\tchunked",
        "xchunked",
        "chunked, identity",
        "identity, chunked",
        "Chunked",
        "chunked\x0b",
        '"chunked"',
        "chunked;q=1",
    ):
        yield request(size, f"Transfer-Encoding: {coding}", path=path, body=ended + SMUGGLED)
    yield request(size, chunked, chunked, path=path, body=ended + SMUGGLED)
    yield request("Transfer-Encoding : chunked", size, path=path, body=ended + SMUGGLED)
    yield request("X: y", " Transfer-Encoding: chunked", size, path=path, body=body)
    yield request(size, "Content-Length: 0", path=path, body=body + SMUGGLED)
    for length in ("0", "5", "+5", " 5 ", "5, 5", "5, 6", "0x5", "1_0", "\u00b2", "9" * 30, "-1"):
        yield request(f"Content-Length: {length}", path=path, body=body + SMUGGLED)
    for chunk in (b"5;" + b"x" * 9_000, b"-1", b"0x5", b"5 ", b"FFFFFFFFFFFFFFFFF", b"", b"5\n"):
        yield request(chunked, path=path, body=chunk + b"\r\nhello\r\n" + ended + SMUGGLED)
    yield request(chunked, path=path, body=b"5\r\nhelloX\r\n" + ended)
    yield request(chunked, path=path, body=b"0\r\nX: " + b"y" * 70_000 + b"\r\n\r\n")
    yield request(chunked, path=path, body=b"1\r\n{\r\n" * 4_000 + ended)
    yield request(size, path=path, body=body).replace(b"\r\n", b"\n", dice.randrange(1, 5))
    yield request(size, path=path, body=body[: dice.randrange(len(body))])
    yield request(size, "X: a\x00b", path=path, body=body)
    yield request(size, "X-\u00e9\u00ff: y", path=path, body=body)
    yield request(size, "no colon here", path=path, body=body)
    yield request(size, ": no name", path=path, body=body)
    yield request(size, *(f"X-{n}: y" for n in range(4_000)), path=path, body=body)
    yield request(size, "X: " + "y" * 300_000, path=path, body=body)
    yield request(size, "Host: y", path=path, body=body)
    yield request(size, "Expect: 100-continue", path=path, body=body)
    yield request(size, "Connection: close, keep-alive, upgrade", path=path, body=body)
    for line in (
        f"POST {path}",
        f"POST {path} HTTP/0.9",
        f"POST {path} HTTP/9.9",
        f"POST {path} HTTP/1.1 HTTP/1.1",
        f"POST  {path}  HTTP/1.1",
        f"P\u00d6ST {path} HTTP/1.1",
        f"POST http://evil.example{path} HTTP/1.1",
        f"POST {path}\tHTTP/1.1",
        f"POST {path}#x HTTP/1.1",
        "CONNECT evil.example:443 HTTP/1.1",
        "OPTIONS * HTTP/1.1",
        "POST * HTTP/1.1",
        "PRI * HTTP/2.0",
        "G" * 10_000,
        "",
    ):
        yield request(size, line=line or " ", body=body)
    yield request(size, path=path, body=body) * 12  # pipelined, whole
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(200)
    yield dice.randbytes(3_000)
    yield "".join(dice.choices(string.printable, k=2_000)).encode() + b"\r\n\r\n"
    yield b"\r\n" * 3_000
    yield b"\x00" * 5_000


def split_answers(raw: bytes) -> Iterator[tuple[int, http.client.HTTPMessage, bytes]]:
    """The HTTP answers in what came back; AssertionError for anything that is none."""
    rest = raw
    while rest:
        head, mark, rest = rest.partition(b"\r\n\r\n")
        assert mark, f"half a head: {head[:200]!r}"
        first, _, lines = head.partition(b"\r\n")
        assert first.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), first[:200]
        status = int(first.split()[1])
        if status == 100:
            continue
        headers = http.client.HTTPMessage()
        for line in lines.split(b"\r\n"):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name] = value.strip()
        if headers.get("Transfer-Encoding") == "chunked":
            body, rest = dechunked(rest)
        else:
            size = int(headers.get("Content-Length") or len(rest))
            body, rest = rest[:size], rest[size:]
            assert len(body) == size, "a cut body"
        yield status, headers, body


def dechunked(rest: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        line, _, rest = rest.partition(b"\r\n")
        size = int(line, 16)
        body, rest = body + rest[:size], rest[size + 2 :]
        if not size:
            return body, rest


@pytest.mark.parametrize("path", JSON_PATHS)
def test_framing_that_lies(fort: Fort, path: str) -> None:
    dice = random.Random(f"{SEED} wire {path}")
    for attack in wire_attacks(path, dice):
        raw = fort.raw(attack)
        known = attack.startswith(f"POST {path} HTTP/1.".encode())
        with fort.explained(attack[:300]):
            for place, (status, headers, body) in enumerate(split_answers(raw)):
                # What follows, or was not understood, may have been meant for any path.
                sure = known and place == 0 and status != 431
                shown = path if sure or b'"type":"error"' in body else "/"
                check(shown, status, headers, body, "POST" if body else "HEAD")


def test_a_contradictory_length_smuggles_nothing(fort: Fort) -> None:
    """Where two lengths disagree the connection ends: what follows is never a second request."""
    body = good("/v1/chat/completions")
    size = f"Content-Length: {len(body)}"
    for fields in (
        (size, "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", size),
        (size, "Content-Length: 4"),
        (size, "Transfer-Encoding: chunked, identity"),
        (size, "Transfer-Encoding: xchunked"),
    ):
        # Seen as chunked, the smuggled request follows the end; seen by length, it is body.
        raw = fort.raw(request(*fields, body=b"0\r\n\r\n" + SMUGGLED + b" " * len(body)))
        with fort.explained(fields):
            assert len(list(split_answers(raw))) == 1
            assert b"uptime_s" not in raw


def test_slow_and_half_open_connections(fort: Fort) -> None:
    """200 that never finish their request; others are served while they stand."""
    held = [socket.create_connection(("127.0.0.1", fort.port), timeout=10) for _ in range(200)]
    dice = random.Random(SEED)
    try:
        for sock in held:
            whole = request("Content-Length: 500", body=b'{"messages": [')
            sock.sendall(whole[: dice.randrange(len(whole))])
        for _ in range(5):
            for sock in held:
                sock.sendall(b"x")
            fort.send("/health", b"", "GET")
            fort.send("/v1/messages", good("/v1/messages"))
    finally:
        for sock in held:
            sock.close()
    fort.asked += len(held)


def test_clients_that_leave_in_the_middle(fort: Fort) -> None:
    body = json.dumps({**JSON_PATHS["/v1/chat/completions"], "stream": True}).encode()
    whole = request(f"Content-Length: {len(body)}", body=body)
    for turn in range(60):
        with socket.create_connection(("127.0.0.1", fort.port), timeout=10) as sock:
            sock.sendall(whole if turn % 2 else whole[:-9])
            if turn % 3 == 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    fort.asked += 60
    gate = fort.app.extensions["router"].gate
    until(lambda: gate.inside <= 1, 20)  # the good client's own


# --- nothing is left behind -------------------------------------------------------------------


def in_use() -> tuple[float, int, int]:
    """(resident MB, threads, file descriptors) of this process; Linux only."""
    gc.collect()
    with open("/proc/self/status", encoding="ascii") as file:
        kilobytes = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    return kilobytes / 1024, threading.active_count(), len(os.listdir("/proc/self/fd"))


def a_round(fort: Fort, seed: int) -> None:
    dice = random.Random(f"{SEED} round {seed}")
    for path in JSON_PATHS:
        for _ in range(12):
            fort.send(path, json.dumps(mutated(JSON_PATHS[path], dice)).encode())
        for attack in dice.sample(list(wire_attacks(path, dice)), 12):
            fort.raw(attack)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_threads_and_sockets_stay(fort: Fort) -> None:
    calls = [up.requests for up in fort.ups]

    def forget() -> None:
        for seen in (*calls, fort.records):
            seen.clear()

    for seed in range(3):
        a_round(fort, seed)
        forget()
    memory, threads, files = in_use()
    for seed in range(3, 11):
        a_round(fort, seed)
        forget()
    until(lambda: in_use()[2] <= files + 20, 20)
    after = in_use()
    assert after[0] - memory < 20.0, f"{after[0] - memory:.1f} MB more after 1,152 requests"
    assert after[1] <= threads + 20


def test_they_are_more_than_600() -> None:
    dice = random.Random(SEED)
    wire = sum(len(list(wire_attacks(path, dice))) for path in JSON_PATHS)
    bodies = len(JSON_PATHS) * (100 + 25)
    methods = (len(JSON_PATHS) + len(GET_PATHS)) * len(METHODS)
    assert wire + bodies + methods + 3 * len(STRANGE_PATHS) + 3 * len(STRANGE_HEADERS) > 1_400
