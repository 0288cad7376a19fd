"""<PROVIDER>_MAX_OUTPUT_TOKENS holds in every dialect; the reserve is for models that reason."""

from __future__ import annotations

import pytest
from test_every_pair import WIRES, Said, path_of, settings_of, speak

HELLO = {"messages": [{"role": "user", "content": "x"}]}
ASKED = {
    "chat": ("/v1/chat/completions", "max_tokens", HELLO),
    "messages": ("/v1/messages", "max_tokens", HELLO),
    "responses": ("/v1/responses", "max_output_tokens", {"input": "x"}),
}
SENT = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.mark.parametrize("wire", ["chat", "messages", "responses"])
@pytest.mark.parametrize("surface", ASKED)
@pytest.mark.parametrize(("asked", "sent"), [(5000, 300), (200, 200)], ids=["above", "below"])
def test_the_ceiling(upstream, serve, tmp_path, wire, surface, asked, sent):
    row = WIRES[wire]
    up = upstream(speak(Said("hello")))
    rows = settings_of(row, f"{up.url}/v1", tmp_path)
    rows[f"{row.row.upper()}_MAX_OUTPUT_TOKENS"] = "300"
    live = serve(**rows, REASONING_TOKEN_RESERVE="0")
    path, member, body = ASKED[surface]
    got = live.session.post(live.url + path, json={"model": "auto", member: asked, **body})
    assert got.status_code == 200, got.text
    (request,) = up.requests
    assert path_of(request).endswith(row.path)
    assert [request.json[name] for name in SENT if name in request.json] == [sent]


@pytest.mark.parametrize("surface", ASKED)
def test_an_answer_that_the_reserve_made_long_is_streamed_where_it_must_be(
    upstream, serve, tmp_path, surface
):
    """Fireworks refuses more than 4096 tokens in a whole answer."""
    up = upstream(speak(Said("hello")))
    row = WIRES["chat"]._replace(model="accounts/fireworks/models/glm-5p3-flash")
    live = serve(**settings_of(row, f"{up.url}/v1", tmp_path), REASONING_TOKEN_RESERVE="4096")
    path, member, body = ASKED[surface]
    got = live.session.post(live.url + path, json={"model": "auto", member: 4000, **body})
    assert got.status_code == 200 and b"hello" in got.content
    (request,) = up.requests
    assert [request.json[name] for name in SENT if name in request.json] == [8096]
    assert request.json["stream"] is True
