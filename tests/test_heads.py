"""Heads of requests: the short way reads what Waitress would have read, and nothing else."""

from __future__ import annotations

import pytest
import waitress.adjustments
import waitress.parser
from hypothesis import given
from hypothesis import strategies as st

import router

ADJUSTMENTS = waitress.adjustments.Adjustments()
ADJUSTMENTS.room = router.Room()
TOLD = (
    "command", "version", "request_uri", "path", "query", "fragment", "url_scheme", "headers",
    "proxy_scheme", "proxy_netloc", "content_length", "connection_close", "expect_continue",
    "chunked", "completed",
)  # fmt: skip


def read(kind: type[waitress.parser.HTTPRequestParser], head: bytes) -> object:
    """What a parser makes of a head: its attributes, or that it refuses."""
    parser = kind(ADJUSTMENTS)
    parser.received(head)
    if parser.error:
        return "refused"
    return {name: getattr(parser, name) for name in TOLD} | {"body": parser.body_rcv is not None}


NAMES = st.sampled_from(
    ["Host", "host", "Accept", "X-Thing", "x-thing", "Connection", "CONTENT-LENGTH", "X_Under",
     "Transfer-Encoding", "Expect", "Cookie", "B%d", "Bad Name", "", "Content-Type"]
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        ["", "close", "Keep-Alive", "0", "5", "+5", "5,5", "٣", "9" * 5000, "chunked",
         "100-continue", " padded\t", "a: b", "\x85", "\xa0x", "tab\there", "nul\x00", "\x7f",
         "ends\r", "folded\r\n more", "a\nb"]
    ),
    st.text(st.characters(max_codepoint=255), max_size=12),
)  # fmt: skip
TARGETS = st.one_of(
    st.sampled_from(
        ["/", "/v1/models", "/v1/models?a=b&c", "/a%20b", "/a%2", "//x/y", "/x#y", "/x?y?z#q", "*",
         "http://h/p?q", "/v1/[x]", "/;p=1", "/é", "/a b", "", "x", "/?", "/\x7f", "/a//b", "/a:b"]
    ),
    st.text(st.characters(max_codepoint=255), max_size=8).map(lambda text: f"/{text}"),
)  # fmt: skip


@given(
    method=st.sampled_from(["GET", "POST", "HEAD", "post", "PoST", "P OST", "", "M-SEARCH"]),
    target=TARGETS,
    version=st.sampled_from(["HTTP/1.1"] * 4 + ["HTTP/1.0", "HTTP/2.0", "http/1.1", "HTTP/1.1 "]),
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=6),
    gap=st.sampled_from([":", ": ", ":\t ", " :", ""]),
)
def test_a_head_is_read_as_waitress_reads_it(
    method: str,
    target: str,
    version: str,
    headers: list[tuple[str, str]],
    gap: str,
) -> None:
    lines = [f"{method} {target} {version}", *(name + gap + value for name, value in headers)]
    head = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
    plain = router.PLAIN_HEAD.fullmatch(head)
    if not plain or not router.Parser(ADJUSTMENTS)._parse_plain(plain):
        return  # Waitress itself reads it
    assert read(router.Parser, head) == read(waitress.parser.HTTPRequestParser, head)


SDK_HEAD = (
    b"POST /v1/chat/completions?x=1 HTTP/1.1\r\nHost: 127.0.0.1:8319\r\nAccept-Encoding: gzip\r\n"
    b"Connection: keep-alive\r\nAccept: application/json\r\nX-Stainless-Lang: python\r\n"
    b"Accept: text/event-stream\r\nContent-Length: 2\r\n\r\n"
)


def test_the_head_of_an_sdk_takes_the_short_way() -> None:
    plain = router.PLAIN_HEAD.fullmatch(SDK_HEAD)
    assert plain and router.Parser(ADJUSTMENTS)._parse_plain(plain)
    told = read(router.Parser, SDK_HEAD)
    assert told == read(waitress.parser.HTTPRequestParser, SDK_HEAD)
    assert isinstance(told, dict) and told["headers"]["ACCEPT"] == (
        "application/json, text/event-stream"
    )


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "1e3", "٣", "5, 5", "0x5"])
def test_a_length_that_is_none_is_refused(length: str) -> None:
    head = f"POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode()
    assert read(router.Parser, head) == "refused"
