"""Opaque reasoning that only one organisation or account can read, when another key is asked."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from test_every_pair import (
    BOTH,
    CASES,
    CLIENTS,
    OPAQUE,
    TALKERS,
    WIRES,
    Made,
    Pair,
    Said,
    named,
    pair,
    say,
    settings_of,
)  # fmt: skip
from upstream import Reply, Request, Stream

__all__ = ["pair"]  # a fixture

THINKING = CASES["reasoning-and-call"]
DONE = Said("It is 21 °C.")
CANNOT_READ = (
    "The encrypted content gAAA...wMD= could not be verified. Reason: Encrypted content could not"
    " be decrypted or parsed."
)
OTHER_ORG = "Encrypted content organization_id did not match the target organization."


def openai_says(message: str) -> Made:
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_encrypted_content",
        }
    }


def anthropic_says(message: str) -> Made:
    return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}


MODIFIED = (
    "messages.1.content.0: `thinking` or `redacted_thinking` blocks in the latest assistant message"
    " cannot be modified. These blocks must remain as they were in the original response."
)
REFUSALS = [
    ("responses", openai_says(CANNOT_READ)),
    ("responses", openai_says(OTHER_ORG)),
    ("codex", openai_says(CANNOT_READ)),
    ("codex", {"detail": CANNOT_READ}),
    ("messages", anthropic_says("messages.1.content.0: Invalid `signature` in `thinking` block")),
    (
        "messages",
        anthropic_says("messages.1.content.0: Invalid `data` in `redacted_thinking` block"),
    ),
    ("messages", anthropic_says(MODIFIED)),
]


def holds_opaque(request: Request, wire: str) -> bool:
    return json.dumps(OPAQUE[wire])[1:-1].encode() in request.body


@BOTH
@pytest.mark.parametrize(("wire", "refusal"), REFUSALS)
@pytest.mark.parametrize("client", TALKERS)
def test_what_a_sibling_key_cannot_read_is_left_out(
    upstream, make_app, tmp_path, client, wire, refusal, stream
):
    """The key of the first turn is limited, the next one is of another organisation."""

    def answer(request: Request) -> Any:
        if len(up.requests) == 1:
            return say(THINKING, request, 1)
        if wire != "codex" and credentials(request) == credentials(up.requests[0]):
            return Reply(429, {"error": {"message": "Rate limit reached"}})
        return Reply(400, refusal) if holds_opaque(request, wire) else say(DONE, request, 2)

    up = upstream(answer)
    settings = settings_of(WIRES[wire], f"{up.url}/v1", tmp_path)
    if wire != "codex":
        settings[f"{WIRES[wire].row.upper()}_API_KEYS"] = "key-one,key-two"
    talk = Pair(CLIENTS[client], make_app(**settings).test_client(), {wire: up})
    assert second_turn(talk, stream).said == DONE
    *_, refused, healed = up.requests
    assert holds_opaque(refused, wire) and not holds_opaque(healed, wire)
    assert b"get_weather" in healed.body and b"21" in healed.body
    assert credentials(refused) == credentials(healed)
    if wire != "codex":
        assert credentials(healed) != credentials(up.requests[0])


@pytest.mark.parametrize("client", TALKERS)
def test_a_refusal_inside_a_stream_heals_too(pair, client):
    """ChatGPT's backend answers 200 and fails in the stream."""

    def answer(request: Request) -> Any:
        if len(up.requests) == 1:
            return say(THINKING, request, 1)
        if holds_opaque(request, "codex"):
            error = {"code": "invalid_encrypted_content", "message": CANNOT_READ}
            failed = {"type": "response.failed", "response": {"status": "failed", "error": error}}
            return Stream(chunks=[named(failed)], done=False)
        return say(DONE, request, 2)

    talk = pair(client, {"codex": answer})
    up = talk.ups["codex"]
    assert second_turn(talk, stream=True).said == DONE
    assert len(up.requests) == 3


def second_turn(talk: Pair, stream: bool) -> Any:
    turns = talk.hello()
    heard = talk.ask(turns, stream=stream)
    turns += [*heard.back, *talk.client.results([(heard.call_ids[0], "21 °C")])]
    return talk.ask(turns, stream=stream)


def credentials(request: Request) -> tuple[str | None, ...]:
    names = ("authorization", "x-api-key", "chatgpt-account-id")
    return tuple(request.headers.get(name) for name in names)


# --- accounts -----------------------------------------------------------------------------------


def account(name: str) -> Made:
    claims = base64.urlsafe_b64encode(json.dumps({"exp": int(time.time()) + 86_400}).encode())
    token = ".".join(("e30", claims.decode().rstrip("="), name))
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"account_id": name, "access_token": token, "refresh_token": "r", "last_refresh": now}


@BOTH
@pytest.mark.parametrize("client", TALKERS)
def test_an_account_never_sees_the_reasoning_of_another(
    upstream, make_app, tmp_path: Path, client, stream
):
    limited = ""

    def answer(request: Request) -> Any:
        if request.headers["chatgpt-account-id"] == limited:
            return Reply(429, {"error": {"type": "usage_limit_reached", "resets_in_seconds": 60}})
        return say(THINKING if b"21" not in request.body else DONE, request, len(up.requests))

    up = upstream(answer)
    settings = settings_of(WIRES["codex"], f"{up.url}/v1", tmp_path)
    accounts = [account("acc-one"), account("acc-two")]
    (tmp_path / "auth.json").write_text(json.dumps({"codex_accounts": accounts}))
    talk = Pair(CLIENTS[client], make_app(**settings).test_client(), {"codex": up})
    turns = talk.hello()
    heard = talk.ask(turns, stream=stream)
    assert "acc-one" not in json.dumps(heard.back)
    turns += [*heard.back, *talk.client.results([(heard.call_ids[0], "21 °C")])]
    maker = up.requests[0].headers["chatgpt-account-id"]
    while len({r.headers["chatgpt-account-id"] for r in up.requests[1:]}) < 2:
        assert talk.ask(turns, stream=stream).said == DONE
        assert len(up.requests) < 12
        limited = maker if len(up.requests) > 2 else ""
    for request in up.requests[1:]:
        assert holds_opaque(request, "codex") is (request.headers["chatgpt-account-id"] == maker)
