"""What refusals teach: a member left out, renamed or lowered, and windows remembered.

Scripted providers enforce a rule in the words that real ones were seen to use; the router has to
answer the client all the same, with one more request on the same key, and know better next time.
"""

# ruff: noqa: E501 (what providers say is kept in one piece)

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream import AUTH, HELLO, Clock, Reply, Request, Stream, chat, good, provider, until

import router
from router import Lessons, Mend, Outcome, mended, remedy, stated_sizes

QUICK = {"TTFT_TIMEOUT": "10", "STREAM_IDLE_TIMEOUT": "10", "CONNECT_TIMEOUT": "2"}
BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def openai_error(message: str, param: str | None = None, code: Any = None) -> dict[str, Any]:
    kind = "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def holds(node: Any, path: str) -> bool:
    """Does a body hold a member? `*` = in any item of a list."""
    name, _, rest = path.partition(".")
    if name == "*":
        return any(holds(item, rest) for item in node or ())
    if not isinstance(node, dict) or name not in node:
        return False
    return holds(node[name], rest) if rest else True


def refusing(
    path: str, error: Any, status: int = 400, then: Callable[[Request], Any] | None = None
) -> Callable[[Request], Any]:
    """A provider that answers `error` while a body holds the member, and works without it."""
    works = then or good()

    def answer(request: Request) -> Any:
        return Reply(status, error) if holds(request.json, path) else works(request)

    return answer


@pytest.fixture
def only(upstream, make_app):
    """only(script, name="openrouter", keys="k1,k2", SETTING=...): one provider and a client."""

    def make(script, *, name="openrouter", model="m1", keys="k1,k2", **settings):
        up = upstream(script) if callable(script) else upstream(*script)
        app = make_app(**{**provider(name, up, model, keys=keys), **QUICK, **settings})
        return up, app.test_client(), app.extensions["router"]

    return make


def post(client, path: str = "/v1/chat/completions", **changes):
    body = {"model": "hermes-router", "messages": HELLO, **changes}
    return client.post(path, json=body, headers=AUTH)


def lessons_of(client, name: str = "openrouter") -> list[str]:
    status = client.get("/v1/status", headers=AUTH).json
    return [row["lesson"] for row in status["providers"][name]["lessons"]]


# --- members: what is said, of which place, in which body -------------------------

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
STRICT = {**TOOL, "function": {**TOOL["function"], "strict": True}}
SEEN_BEFORE = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "c"},
    {"role": "user", "content": "d"},
]
CACHED = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
    }
]
GOOGLE = "Invalid JSON payload received. Unknown name"
GROQ = "for 'role:assistant' the following must be satisfied"
LOC = {"type": "extra_forbidden", "msg": "Extra inputs are not permitted", "input": 1}
# (status, error body, what the request holds, which of it must go)
NAMED: list[tuple[int, Any, dict[str, Any], str]] = [
    (400, openai_error(f'{GOOGLE} "store": Cannot find field.'), {"store": True}, "store"),
    (400, [openai_error(f'{GOOGLE} "seed": Cannot find field.')], {"seed": 1}, "seed"),
    (
        400,
        openai_error(f"{GOOGLE} \"strict\" at 'tools[0].function_declarations[0]': Cannot find"),
        {"tools": [STRICT]},
        "tools.*.function.strict",
    ),
    (400, {"detail": "Unsupported parameter: verbosity"}, {"verbosity": "low"}, "verbosity"),
    (
        400,
        {"status": 400, "title": "Bad", "detail": "Validation: Unsupported parameter(s): `top_k`"},
        {"top_k": 4},
        "top_k",
    ),
    (
        400,
        openai_error(f"'messages.1' : {GROQ}[('messages.1' : property 'reasoning_content' is "
                     "unsupported)]"),
        {"messages": SEEN_BEFORE},
        "messages.*.reasoning_content",
    ),
    (400, openai_error("property 'user' is unsupported"), {"user": "u"}, "user"),
    (
        400,
        {"code": "Client specified an invalid argument",
         "error": "Argument not supported on this model: presencePenalty"},
        {"presence_penalty": 0.5},
        "presence_penalty",
    ),
    (
        400,
        {"code": "x", "error": "Argument not supported on this model: stop"},
        {"stop": ["x"]},
        "stop",
    ),
    (
        400,
        {"type": "error", "error": {
            "type": "invalid_request_error",
            "message": "tools.0.custom.input_examples: Extra inputs are not permitted"}},
        {"tools": [{**TOOL, "input_examples": [{}]}]},
        "tools.*.input_examples",
    ),
    (
        400,
        openai_error("Extra inputs are not permitted, field: 'messages[0].content[0].cache_control'"
                     ", value: {'type': 'ephemeral'}"),
        {"messages": CACHED},
        "messages.*.content.*.cache_control",
    ),
    (400, openai_error("Unrecognized request argument supplied: top_k"), {"top_k": 1}, "top_k"),
    (
        400,
        {"error": "Invalid request parameters",
         "details": {"_errors": ["Unrecognized key(s) in object: 'metadata', 'user'"]}},
        {"user": "u", "_said": "Unrecognized key(s) in object: 'metadata', 'user'"},
        "user",
    ),
    (
        422,
        {"object": "error", "message": {"detail": [{**LOC, "loc": ["body", "seed"]}]}},
        {"seed": 3},
        "seed",
    ),
    (422, {"detail": [{**LOC, "loc": ["body", "min_p"]}]}, {"min_p": 0.1}, "min_p"),
    (
        422,
        {"detail": [{**LOC, "loc": ["body", "messages", 1, "assistant", "reasoning_content"]}]},
        {"messages": SEEN_BEFORE},
        "messages.*.reasoning_content",
    ),
    (
        400,
        {"object": "error", "type": "BadRequestError", "code": 400,
         "message": "[{'type': 'extra_forbidden', 'loc': ('body', 'logit_bias'), 'msg': 'Extra'}]"},
        {"logit_bias": {"1": 1}},
        "logit_bias",
    ),
    (
        400,
        openai_error("Unknown parameter: 'tools[0].function.strict'.",
                     "tools[0].function.strict", "unknown_parameter"),
        {"tools": [STRICT]},
        "tools.*.function.strict",
    ),
    (
        400,
        openai_error("Unsupported parameter: 'top_p' is not supported with this model.", "top_p",
                     "unsupported_parameter"),
        {"top_p": 0.5},
        "top_p",
    ),
    (
        400,
        openai_error("Unsupported value: 'temperature' does not support 0.2 with this model. Only "
                     "the default (1) value is supported.", "temperature", "unsupported_value"),
        {"temperature": 0.2},
        "temperature",
    ),
    (400, openai_error("invalid temperature: only 1 is allowed for this model"),
     {"temperature": 0.3}, "temperature"),
    (400, openai_error("`temperature` is deprecated for this model."),
     {"temperature": 0.3}, "temperature"),
    (400, openai_error("This model does not support the `reasoning_effort` parameter"),
     {"reasoning_effort": "low"}, "reasoning_effort"),
    (400, openai_error("model m1 does not support parameters: ['parallel_tool_calls']"),
     {"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
    (
        400,
        {"error": {"message": "Provider returned error", "code": 400, "metadata": {"raw": json.dumps(
            {"error": {"message": "no", "code": "unknown_parameter", "param": "seed"}})}}},
        {"seed": 5},
        "seed",
    ),
    (
        400,
        {"issues": [{"code": "unrecognized_keys", "keys": ["seed"], "path": []}], "error": "zod"},
        {"seed": 5},
        "seed",
    ),
    (400, openai_error("got an unexpected keyword argument 'typical_p'"), {"typical_p": 0.5},
     "typical_p"),
    (400, openai_error("Additional properties are not allowed ('seed' was unexpected)"),
     {"seed": 7}, "seed"),
    (400, openai_error("1 validation error for Body\nuser\n  Extra inputs are not permitted"),
     {"user": "u"}, "user"),
]  # fmt: skip
IDS = [f"{n}-{row[3]}" for n, row in enumerate(NAMED)]


@pytest.mark.parametrize(("status", "error", "held", "path"), NAMED, ids=IDS)
def test_a_member_that_is_named_is_left_out(status, error, held, path) -> None:
    body = {"model": "m", "messages": HELLO, **held}
    said = body.pop("_said", "")
    sent = json.dumps(body).encode()
    refusal = json.dumps(error).encode()
    outcome = Outcome(status, said or router.error_text(refusal), code=router.error_code(refusal))
    mends = remedy(outcome, refusal, sent, "chat")
    assert [(m.kind, ".".join(m.path)) for m in mends] == [("drop", path)]
    made = json.loads(mended(sent, mends))
    assert not holds(made, path)
    assert holds(body, path)
    # Nothing else has changed: put back, the body is what it was.
    assert json.dumps(made).count(":") < json.dumps(body).count(":")
    assert made["model"] == "m" and len(made["messages"]) == len(body["messages"])


@BOTH
def test_it_is_left_out_at_once_on_the_same_key_and_from_then_on(only, stream) -> None:
    error = openai_error("Unrecognized request argument supplied: top_k")
    up, client, _ = only(refusing("top_k", error))
    got = post(client, top_k=3, stream=stream, temperature=0.5)
    assert got.status_code == 200, got.data
    assert len(up.requests) == 2
    assert up.requests[0].key == up.requests[1].key
    assert "top_k" not in up.requests[1].json
    assert up.requests[1].json["temperature"] == 0.5
    assert up.requests[1].json["messages"] == HELLO
    assert got.headers["X-Hermes-Attempts"] == "1"
    assert lessons_of(client) == ["top_k left out"]
    assert post(client, top_k=3, stream=stream).status_code == 200
    assert len(up.requests) == 3
    assert "top_k" not in up.requests[2].json


def test_what_holds_nothing_of_it_goes_out_as_it_came(only) -> None:
    up, client, _ = only(refusing("top_k", openai_error("Unknown parameter: 'top_k'")))
    post(client, top_k=3)
    raw = json.dumps({"model": "m1", "messages": HELLO}, indent=3).encode()
    client.post(
        "/v1/chat/completions", data=raw, headers={**AUTH, "content-type": "application/json"}
    )
    assert up.requests[-1].body == raw


def test_a_lesson_is_of_one_model_and_dialect(only) -> None:
    up, client, hermes = only(refusing("top_k", openai_error("Unknown parameter: 'top_k'")))
    post(client, top_k=3)
    assert hermes.lessons.mends("openrouter", "m1", "chat")
    assert not hermes.lessons.mends("openrouter", "m2", "chat")
    assert not hermes.lessons.mends("openrouter", "m1", "responses")
    post(client, model="openrouter/m2", top_k=3)
    assert "top_k" in up.requests[-2].json  # m2 had to be asked


def test_several_at_once_cost_one_more_request(only) -> None:
    def strict(request: Request) -> Any:
        extra = sorted({"top_k", "min_p", "seed"} & set(request.json))
        rows = [{**LOC, "loc": ["body", name]} for name in extra]
        return Reply(422, {"detail": rows}) if rows else chat()

    up, client, _ = only(strict)
    assert post(client, top_k=1, min_p=0.1, seed=4).status_code == 200
    assert len(up.requests) == 2
    assert len(lessons_of(client)) == 3


def test_who_names_one_thing_at_a_time_is_followed_a_few_steps(only) -> None:
    names = ["top_k", "min_p", "seed", "user", "logit_bias"]

    def strict(request: Request) -> Any:
        extra = [name for name in names if name in request.json]
        return Reply(400, openai_error(f"Unknown parameter: '{extra[0]}'")) if extra else chat()

    held = {"top_k": 1, "min_p": 0.1, "seed": 4}
    up, client, _ = only(strict)
    assert post(client, **held).status_code == 200
    assert len(up.requests) == 4
    got = post(client, **held, user="u", logit_bias={"1": 1})
    assert got.status_code == 200  # three of them are known by now


def test_nothing_is_remembered_after_a_failed_retry(only) -> None:
    said = openai_error("Unknown parameter: 'top_k'")
    up, client, hermes = only([Reply(400, said), Reply(400, openai_error("something else"))])
    got = post(client, top_k=3)
    assert got.status_code == 400
    assert "something else" in got.json["error"]["message"]
    assert len(up.requests) == 2
    assert up.requests[0].key == up.requests[1].key
    assert lessons_of(client) == []
    assert not hermes.lessons.mends("openrouter", "m1", "chat")


def test_a_provider_that_repeats_itself_is_asked_twice(only) -> None:
    up, client, _ = only([Reply(400, openai_error("Unknown parameter: 'top_k'"))])
    got = post(client, top_k=3)
    assert got.status_code == 400
    assert "top_k" in got.json["error"]["message"]
    assert len(up.requests) == 2


def test_the_next_key_gets_the_body_that_was_mended(only) -> None:
    limited = Reply(429, openai_error("slow down"))
    up, client, _ = only([Reply(400, openai_error("Unknown parameter: 'top_k'")), limited, chat()])
    assert post(client, top_k=3).status_code == 200
    keys = [request.key for request in up.requests]
    assert keys[0] == keys[1] != keys[2]
    assert "top_k" not in up.requests[2].json
    assert lessons_of(client) == ["top_k left out"]


def test_an_error_inside_a_stream_is_mended_as_well(only) -> None:
    error = {"error": {"message": "Unknown parameter: 'top_k'", "code": 400}, "choices": []}

    def answer(request: Request) -> Any:
        if "top_k" in request.json:
            return Stream(chunks=[error], done=False)
        return good()(request)

    up, client, _ = only(answer)
    got = post(client, top_k=3, stream=True)
    assert got.status_code == 200
    assert b"hello" in got.data
    assert len(up.requests) == 2


def test_a_messages_provider_is_mended_in_its_own_body(upstream, make_app) -> None:
    def answer(request: Request) -> Any:
        if "context_management" in request.json:
            text = "context_management: Extra inputs are not permitted"
            error = {"type": "invalid_request_error", "message": text}
            return Reply(400, {"type": "error", "error": error})
        said = [{"type": "text", "text": "hello"}]
        return Reply(200, {
            "id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": said,
            "stop_reason": "end_turn", "stop_sequence": None,
            "usage": {"input_tokens": 3, "output_tokens": 2},
        })  # fmt: skip

    up = upstream(answer)
    app = make_app(**provider("anthropic", up, "claude-sonnet-4-5", keys="k1"), **QUICK)
    body = {"model": "claude-sonnet-4-5", "max_tokens": 10, "messages": HELLO}
    got = app.test_client().post(
        "/v1/messages", json={**body, "context_management": {"edits": []}}, headers=AUTH
    )
    assert got.status_code == 200, got.data
    assert len(up.requests) == 2
    assert up.requests[1].json == body


# --- what must stay ---------------------------------------------------------------

MATTERS = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ],
    "tools": [TOOL],
    "tool_choice": "required",
    "stream": True,
    "n": 2,
    "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
    "web_search_options": {},
    "provider": {"data_collection": "deny"},
    "safe_prompt": True,
    "dimensions": 8,
    "input": "text",
    "prompt": "text",
}  # fmt: skip
LEAVES = sorted({part for path in ["model", "messages", "tools", "tool_choice", "stream", "n", "modalities", "audio", "web_search_options", "provider", "role", "content", "tool_calls", "tool_call_id", "id", "type", "function", "arguments", "parameters", "text", "safe_prompt", "dimensions", "input", "prompt", "messages[0].content", "messages.1.content.0.text", "tools[0].function.name", "messages[2].tool_calls", "tools.0.function.parameters", "system", "tools[0].function.description"] for part in [path]})  # fmt: skip


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("dialect", ["chat", "messages", "responses", "codex", "embeddings"])
def test_what_matters_stays(name, dialect) -> None:
    sent = json.dumps(MATTERS).encode()
    for text in (
        f"Unsupported parameter: '{name}'",
        f"property '{name}' is unsupported",
        f"{name}: Extra inputs are not permitted",
        f"does not support {name}",
        f"Argument not supported on this model: {name}",
    ):
        error = openai_error(text, name, "unsupported_parameter")
        assert remedy(Outcome(400, text), json.dumps(error).encode(), sent, dialect) == []


def test_some_may_go_only_when_they_ask_for_nothing() -> None:
    error = json.dumps(openai_error("Unsupported parameter(s): `n`, `tool_choice`")).encode()
    plain = json.dumps({"n": 1, "tool_choice": "auto", "messages": []}).encode()
    assert len(remedy(Outcome(400, ""), error, plain, "chat")) == 2
    asking = json.dumps({"n": True, "tool_choice": "none", "messages": []}).encode()
    assert remedy(Outcome(400, ""), error, asking, "chat") == []


def test_a_lesson_never_drops_what_a_later_request_needs() -> None:
    mend = Mend("drop", ("tool_choice",))
    assert mended(b'{"tool_choice":"auto"}', [mend]) == b"{}"
    needed = b'{"tool_choice":"required"}'
    assert mended(needed, [mend]) is needed


@pytest.mark.parametrize("status", [200, 401, 403, 404, 408, 429, 503, 529, 0])
def test_only_refusals_of_the_request_are_read(status) -> None:
    error = json.dumps(openai_error("Unknown parameter: 'top_k'")).encode()
    assert remedy(Outcome(status, ""), error, b'{"top_k":1}', "chat") == []


# --- values -----------------------------------------------------------------------


def test_a_value_that_is_refused_goes_and_others_stay(only) -> None:
    def answer(request: Request) -> Any:
        if request.json.get("reasoning_effort") != "xhigh":
            return chat()
        text = "Unsupported value: 'reasoning_effort' does not support 'xhigh' with this model."
        return Reply(400, openai_error(text, "reasoning_effort", "unsupported_value"))

    up, client, _ = only(answer)
    assert post(client, reasoning_effort="xhigh").status_code == 200
    assert lessons_of(client) == ['reasoning_effort left out where it is "xhigh"']
    post(client, reasoning_effort="xhigh")
    post(client, reasoning_effort="low")
    efforts = [request.json.get("reasoning_effort") for request in up.requests]
    assert efforts == ["xhigh", None, None, "low"]


def test_a_value_that_is_simply_wrong_is_the_clients_fault(only) -> None:
    text = "Invalid 'seed': integer above maximum value."
    up, client, _ = only([Reply(400, openai_error(text, "seed", "invalid_value"))])
    assert post(client, seed=10**18).status_code == 400
    assert len(up.requests) == 1


def test_what_does_not_go_together_is_not_remembered(only) -> None:
    def answer(request: Request) -> Any:
        text = "`temperature` and `top_p` cannot both be specified for this model."
        both = {"temperature", "top_p"} <= set(request.json)
        return Reply(400, openai_error(text)) if both else chat()

    up, client, _ = only(answer)
    assert post(client, temperature=0.5, top_p=0.5).status_code == 200
    assert "temperature" in up.requests[1].json and "top_p" not in up.requests[1].json
    assert lessons_of(client) == []


# --- max_tokens -------------------------------------------------------------------

OLD_NAME = openai_error(
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead.",
    "max_tokens",
    "unsupported_parameter",
)


def test_max_tokens_goes_by_its_other_name(only) -> None:
    up, client, _ = only(refusing("max_tokens", OLD_NAME))
    assert post(client, max_tokens=50).status_code == 200
    assert up.requests[1].json["max_completion_tokens"] == 50
    assert lessons_of(client) == ["max_tokens sent as max_completion_tokens"]
    post(client, max_tokens=60)
    assert len(up.requests) == 3
    assert up.requests[2].json["max_completion_tokens"] == 60


def test_a_limit_that_has_no_name_is_left_out(only) -> None:
    def answer(request: Request) -> Any:
        for name in ("max_tokens", "max_completion_tokens"):
            if name in request.json:
                return Reply(400, openai_error(f"Unsupported parameter: '{name}'"))
        return chat()

    up, client, _ = only(answer)
    assert post(client, max_tokens=50).status_code == 200
    assert len(up.requests) == 3
    assert post(client, max_tokens=50).status_code == 200
    assert len(up.requests) == 4


CAPPED = [
    "max_tokens: 64000 > 8192, which is the maximum allowed number of output tokens for claude",
    "max_tokens is too large: 64000. This model supports at most 8192 completion tokens, whereas "
    "you provided 64000.",
    "`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is less "
    "than the `context_window` for this model",
    "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]",
    "max_tokens must be <= 8192",
    "max tokens must be less than or equal to 8192, the maximum output for this model",
    "Unable to submit request because it has a maxOutputTokens value of 64000 but the supported "
    "range is from 1 (inclusive) to 8193 (exclusive).",
]


@pytest.mark.parametrize("text", CAPPED)
def test_a_limit_that_is_too_high_is_lowered(only, text) -> None:
    def answer(request: Request) -> Any:
        too_high = request.json.get("max_tokens", 0) > 8192
        return Reply(400, openai_error(text)) if too_high else chat()

    up, client, _ = only(answer)
    assert post(client, max_tokens=64_000).status_code == 200
    assert lessons_of(client) == ["at most 8192 tokens of output"]
    post(client, max_tokens=64_000)
    post(client, max_tokens=100)
    post(client)
    sent = [request.json.get("max_tokens") for request in up.requests]
    assert sent == [64_000, 8192, 8192, 100, None]


def test_pydantic_states_the_ceiling_in_its_context() -> None:
    row = {
        "type": "less_than_equal",
        "loc": ["body", "max_tokens"],
        "msg": "Input",
        "ctx": {"le": 99},
    }
    refusal = json.dumps({"detail": [row]}).encode()
    assert remedy(Outcome(422, ""), refusal, b'{"max_tokens":100}', "chat") == [
        Mend("most", (), 99)
    ]
    assert remedy(Outcome(422, ""), refusal, b'{"max_tokens":99}', "chat") == []


def test_thinking_gets_its_share_of_a_lowered_limit() -> None:
    body = {"max_tokens": 64_000, "thinking": {"type": "enabled", "budget_tokens": 32_000}}
    made = json.loads(mended(json.dumps(body).encode(), [Mend("most", (), 8192)]))
    assert made["max_tokens"] == 8192
    assert 1024 <= made["thinking"]["budget_tokens"] < 8192
    made = json.loads(mended(json.dumps(body).encode(), [Mend("room", ("max_tokens",), 1500)]))
    assert made == {"max_tokens": 1500}


def test_less_is_asked_for_where_the_credit_is_low(only) -> None:
    def answer(request: Request) -> Any:
        if request.json.get("max_tokens", 64_000) <= 3000:
            return chat()
        text = (
            "This request requires more credits, or fewer max_tokens. You requested up to 64000 "
            "tokens, but can only afford 3000."
        )
        return Reply(402, {"error": {"message": text, "code": 402}})

    up, client, _ = only(answer)
    for changes in ({"max_tokens": 64_000}, {}):
        up.requests.clear()
        assert post(client, **changes).status_code == 200
        assert up.requests[0].key == up.requests[1].key
        assert up.requests[1].json["max_tokens"] == 3000
    assert lessons_of(client) == []


def test_next_to_no_credit_is_no_credit(only) -> None:
    error = {"error": {"message": "You can only afford 12.", "code": 402}}
    up, client, _ = only([Reply(402, error)], keys="k1")
    assert post(client, max_tokens=64_000).status_code == 503
    assert len(up.requests) == 1


TOGETHER = [
    ("input length and `max_tokens` exceed context limit: 190000 + 32000 > 200000, decrease input "
     "length or `max_tokens` and try again", 200_000 - 190_000),
    ("This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (5000 "
     "in the messages, 4000 in the completion). Please reduce the length.", 3192),
    ("This model's maximum context length is 2048 tokens. However, your request has 800 input tokens "
     "plus 2045 'max_tokens'. Please reduce one or the other.", 1248),
    ("'max_tokens' or 'max_completion_tokens' is too large: 8192. This model's maximum context "
     "length is 8192 tokens and your request has 500 input tokens (8192 > 8192 - 500).", 7692),
]  # fmt: skip


@pytest.mark.parametrize(("text", "room"), TOGETHER)
def test_an_answer_that_leaves_no_room_is_shortened(text, room) -> None:
    sent = b'{"max_tokens":32000}'
    (mend,) = remedy(Outcome(400, text), b"", sent, "messages")
    assert mend.kind == "room" and mend.path == ("max_tokens",)
    assert room * 0.9 < int(mend.value) < room
    assert not mend.lasting


@pytest.mark.parametrize(
    "text",
    [
        "input length and `max_tokens` exceed context limit: 199990 + 32000 > 200000",
        "input length and `max_tokens` exceed context limit: 210000 + 32000 > 200000",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "This model's maximum context length is 32768 tokens. However, you requested 8192 output "
        "tokens and your prompt contains at least 24577 input tokens",
    ],
)
def test_a_prompt_that_is_too_long_itself_is_not_helped_by_that(text) -> None:
    assert remedy(Outcome(400, text), b"", b'{"max_tokens":32000}', "messages") == []


# --- response_format ----------------------------------------------------------------


def test_a_format_that_is_refused_is_told_in_words(only) -> None:
    error = openai_error("This model does not support response format `json_schema`.")
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"title": "Wanted"}}}
    up, client, _ = only(refusing("response_format", error))
    assert post(client, response_format=wanted).status_code == 200
    told = up.requests[1].json["messages"]
    assert told[0]["role"] == "system" and "Wanted" in told[0]["content"]
    assert told[1:] == HELLO
    assert lessons_of(client) == ["response_format told in words"]
    post(client, response_format={"type": "text"})
    assert up.requests[-1].json["messages"] == HELLO


def test_a_part_of_the_format_may_go_alone() -> None:
    held = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True}}
    }
    sent = json.dumps({"messages": HELLO, **held}).encode()
    name = "response_format.json_schema.strict"
    (mend,) = remedy(Outcome(400, f"Unknown parameter: '{name}'."), b"", sent, "chat")
    assert mend.path == tuple(name.split("."))


# --- reasoning that cannot be verified ------------------------------------------------

SIGNED = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"},
            {"type": "redacted_thinking", "data": "d"},
            {"type": "tool_use", "id": "c", "name": "f", "input": {}},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "r"}]},
]


def mend_thoughts(text: str, body: dict[str, Any], dialect: str) -> dict[str, Any]:
    sent = json.dumps(body).encode()
    mends = remedy(Outcome(400, text), b"", sent, dialect)
    assert len(mends) == 1
    assert not mends[0].lasting
    assert remedy(Outcome(400, text), b"", mended(sent, mends), dialect, mends) == []
    return json.loads(mended(sent, mends))


def test_bad_signatures_take_all_thinking_along() -> None:
    text = "messages.1.content.0: Invalid `signature` in `thinking` block"
    thinking = {"type": "enabled", "budget_tokens": 2000}
    body = {"max_tokens": 4000, "thinking": thinking, "messages": SIGNED}
    made = mend_thoughts(text, body, "messages")
    assert [b["type"] for b in made["messages"][1]["content"]] == ["tool_use"]
    assert "thinking" not in made  # the tool loop has lost its own
    assert made["messages"][0] == SIGNED[0] and made["messages"][2] == SIGNED[2]


@BOTH
def test_the_retry_without_thinking_is_on_the_same_key(upstream, make_app, stream) -> None:
    refused = {
        "type": "invalid_request_error",
        "message": "Invalid `signature` in `thinking` block",
    }

    def answer(request: Request) -> Any:
        if b'"signature"' in request.body:
            return Reply(400, {"type": "error", "error": refused})
        return Reply(200, {
            "id": "msg_1", "type": "message", "role": "assistant", "model": "claude",
            "content": [{"type": "text", "text": "fine"}], "stop_reason": "end_turn",
            "stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 2},
        })  # fmt: skip

    up = upstream(answer)
    app = make_app(**provider("anthropic", up, "claude-sonnet-4-5", keys="k1,k2"), **QUICK)
    body = {"model": "claude-sonnet-4-5", "max_tokens": 10, "messages": SIGNED, "stream": stream}
    got = app.test_client().post("/v1/messages", json=body, headers=AUTH)
    assert got.status_code == 200, got.data
    assert b"fine" in got.data
    assert len(up.requests) == 2
    assert up.requests[0].headers["x-api-key"] == up.requests[1].headers["x-api-key"]
    assert app.extensions["router"].lessons.snapshot("anthropic") == []


def test_encrypted_content_takes_the_reasoning_items_along() -> None:
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"},
        {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "r"},
    ]
    text = (
        "The encrypted content gAAA could not be verified. Reason: Encrypted content could not be"
    )
    made = mend_thoughts(text, {"model": "m", "input": items}, "responses")
    assert [item.get("type") for item in made["input"]] == [
        None, "function_call", "function_call_output",
    ]  # fmt: skip
    assert "id" not in made["input"][1] and made["input"][1]["call_id"] == "c"


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_geminis_signatures_are_replaced_by_its_stand_in() -> None:
    signed = {**CALL, "extra_content": {"google": {"thought_signature": "bad"}}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [signed, signed]}]
    made = mend_thoughts("Invalid thought_signature.", {"messages": messages}, "chat")
    first, second = made["messages"][1]["tool_calls"]
    assert first["extra_content"]["google"]["thought_signature"] == router.NO_SIGNATURE
    assert "extra_content" not in second
    bare = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    text = "Function call is missing a thought_signature in functionCall parts."
    made = mend_thoughts(text, {"messages": bare}, "chat")
    assert "extra_content" in made["messages"][1]["tool_calls"][0]


@pytest.mark.parametrize(
    "text",
    [
        "The `reasoning_content` in the thinking mode must be passed back to the API.",
        "thinking is enabled but reasoning_content is missing in assistant tool call message at 2",
    ],
)
def test_missing_reasoning_turns_thinking_off(text) -> None:
    body = {"messages": HELLO, "reasoning_effort": "high"}
    made = mend_thoughts(text, body, "chat")
    assert made == {"messages": HELLO, "thinking": {"type": "disabled"}}


def test_a_missing_thinking_block_turns_thinking_off() -> None:
    text = (
        "messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but found `tool_use`."
        " When `thinking` is enabled, a final `assistant` message must start with a thinking block"
    )
    thinking = {"type": "enabled", "budget_tokens": 2000}
    made = mend_thoughts(
        text, {"max_tokens": 9, "thinking": thinking, "messages": HELLO}, "messages"
    )
    assert made == {"max_tokens": 9, "messages": HELLO}


# --- windows ------------------------------------------------------------------------

SIZES = [
    ("prompt is too long: 205000 tokens > 200000 maximum", (205_000, 200_000, 0)),
    ("input length and `max_tokens` exceed context limit: 190,000 + 20,000 > 200,000", (190_000, 200_000, 20_000)),
    ("The input token count (1200293) exceeds the maximum number of tokens allowed (1048576).", (1_200_293, 1_048_576, 0)),
    ("The input token count exceeds the maximum number of tokens allowed 1048576.", (0, 1_048_576, 0)),
    ("This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens.", (9001, 8192, 0)),
    ("This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (5000 in the messages, 4000 in the completion).", (5000, 8192, 4000)),
    ("This model's maximum context length is 32768 tokens. However, you requested 8192 output tokens and your prompt contains at least 24577 input tokens", (24_577, 32_768, 8192)),
    ("the request exceeds the available context size (4096 tokens), try increasing it", (0, 4096, 0)),
    ("prompt token count of 140000 exceeds the limit of 128000", (140_000, 128_000, 0)),
    ("Trying to keep the first 6000 tokens when context the overflows. However, the model is loaded with context length of only 4096 tokens", (0, 4096, 0)),
    ("Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context length", (40_000, 32_768, 0)),
    ("This model's maximum prompt length is 131072 but the request contains 537812 tokens.", (537_812, 131_072, 0)),
    ("Request too large for model m in organization o on tokens per minute (TPM): Limit 30000, Requested 33476", (33_476, 30_000, 0)),
    ("exceed_context_size_error n_ctx: 4096 n_prompt_tokens: 5000", (5000, 4096, 0)),
    ("Input prompt (35247 tokens) is too long and exceeds limit of 1000", (35_247, 1000, 0)),
    ("body exceeds the limit of 1000 bytes", (0, 0, 0)),
    ("This model's maximum context length is 3 tokens. However, your request has 8 input tokens.", (8, 0, 0)),
    ("too long", (0, 0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sizes"), SIZES)
def test_the_sizes_are_read_from_an_overflow(text, sizes) -> None:
    assert tuple(stated_sizes(text)) == sizes


def long(tokens: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "word" * tokens}]


def overflowing(most: int) -> Callable[[Request], Any]:
    """A provider with a small window, four bytes to a token."""

    def answer(request: Request) -> Any:
        size = len(request.body) // 4
        if size <= most:
            return good(f"fits {most}")(request)
        text = f"This model's maximum context length is {most} tokens. However, your messages resulted in {size} tokens."
        return Reply(400, openai_error(text, "messages", "context_length_exceeded"))

    return answer


@pytest.fixture
def sized(upstream, make_app):
    """sized(groq=1000, ...): providers with windows, and a client."""

    def make(**windows):
        ups = {name: upstream(overflowing(most)) for name, most in windows.items()}
        rows: dict[str, str] = {}
        for name, up in ups.items():
            rows |= provider(name, up, "m1", keys="k1")
        app = make_app(**rows, **QUICK)
        return ups, app.test_client(), app.extensions["router"]

    return make


def order(client, ups) -> list[str]:
    asked = sorted((r.at, name) for name, up in ups.items() for r in up.requests)
    return [name for _, name in asked]


def test_a_stated_window_is_remembered_and_heeded(sized) -> None:
    ups, client, hermes = sized(groq=1000, cerebras=100_000)
    for _ in range(2):  # whoever is first
        assert post(client, messages=long(5000)).status_code == 200
    assert len(ups["groq"].requests) <= 1
    ups["groq"].requests.clear()
    hermes.lessons.learn_window("groq", "m1", 1000)
    for _ in range(4):
        got = post(client, messages=long(5000))
        assert got.headers["X-Provider"] == "cerebras"
    assert ups["groq"].requests == []
    assert lessons_of(client, "groq") == ["takes 1000 tokens in all"]
    asked = {post(client).headers["X-Provider"] for _ in range(4)}
    assert "groq" in asked  # what is small goes there still


def test_after_an_overflow_only_larger_windows_are_asked(sized) -> None:
    ups, client, hermes = sized(groq=1000, cerebras=2000, sambanova=50_000)
    hermes.lessons.learn_window("cerebras", "m1", 2000)
    hermes.lessons.learn_window("sambanova", "m1", 50_000)
    got = post(client, model="groq/m1", messages=long(5000))
    assert got.status_code == 200
    assert order(client, ups) == ["groq", "sambanova"]


def test_those_of_unknown_size_come_after_those_that_are_large_enough(sized) -> None:
    ups, client, hermes = sized(groq=1000, cerebras=2000, sambanova=50_000)
    hermes.lessons.learn_window("sambanova", "m1", 50_000)
    assert post(client, model="groq/m1", messages=long(5000)).status_code == 200
    assert order(client, ups) == ["groq", "sambanova"]


def test_the_error_tells_the_largest_window_there_is(sized) -> None:
    ups, client, _ = sized(groq=1000, cerebras=3000)
    got = post(client, messages=long(5000))
    error = got.json["error"]
    assert (got.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "3000" in error["message"]
    body = {"model": "m", "max_tokens": 9, "messages": long(5000)}
    got = client.post("/v1/messages", json=body, headers=AUTH)
    assert got.status_code == 400
    found = re.match(
        r"prompt is too long: (\d+) tokens > (\d+) maximum", got.json["error"]["message"]
    )
    assert found, got.json
    assert int(found[1]) >= 5000 and found[2] == "3000"


@pytest.mark.parametrize(
    "refusal",
    [
        Reply(413, b""),
        Reply(413, openai_error("Request too large for model")),
        Reply(429, openai_error("Request too large", "rate_limit_exceeded")),
    ],
    ids=["413", "413 words", "429 words"],
)
def test_what_is_too_large_for_one_provider_is_not_for_all(upstream, make_app, refusal) -> None:
    strict, other = upstream(refusal), upstream(good("fits"))
    model = "gpt-oss-120b"  # has the same window everywhere
    rows = provider("groq", strict, model, keys="k1,k2") | provider("cerebras", other, model)
    client = make_app(**rows, **QUICK).test_client()
    got = post(client, model=f"groq/{model}")
    assert (got.status_code, got.headers["X-Provider"]) == (200, "cerebras")
    assert len(strict.requests) == 1


def test_without_numbers_the_listed_window_is_told(upstream, make_app) -> None:
    error = openai_error("Your input exceeds the context window of this model.", "input",
                         "context_length_exceeded")  # fmt: skip
    up = upstream(Reply(400, error))
    model = "llama-3.3-70b-versatile"
    app = make_app(**provider("groq", up, model, keys="k1"), **QUICK)
    target = app.extensions["router"].directory.explicit(f"groq/{model}")[0]
    body = {"model": "m", "max_tokens": 9, "messages": HELLO}
    got = app.test_client().post("/v1/messages", json=body, headers=AUTH)
    assert f"tokens > {target.facts.window} maximum" in got.json["error"]["message"]


def test_llama_cpp_states_its_window_beside_the_message(only) -> None:
    error = {
        "error": {
            "code": 400,
            "message": "the request exceeds the available context size. try increasing it",
            "type": "exceed_context_size_error",
            "n_prompt_tokens": 5000,
            "n_ctx": 4096,
        }
    }
    up, client, hermes = only([Reply(400, error)])
    post(client)
    assert hermes.lessons.window("openrouter", "m1") == 4096


def test_an_answer_disproves_a_window(only) -> None:
    _, client, hermes = only(good())
    hermes.lessons.learn_window("openrouter", "m1", 500)
    hermes.lessons.disprove("openrouter", "m1", 400)
    assert hermes.lessons.window("openrouter", "m1") == 500
    hermes.lessons.disprove("openrouter", "m1", 600)
    assert hermes.lessons.window("openrouter", "m1") == 0


def test_a_cut_prompt_is_told_of_once_a_model(only, caplog) -> None:
    _, client, _ = only(good(), name="local", keys="")
    for _ in range(3):
        assert post(client, messages=long(9000)).status_code == 200
    warned = [r for r in caplog.records if "may have cut the prompt" in r.getMessage()]
    assert len(warned) == 1
    assert "local/m1" in warned[0].getMessage()


def test_nobody_else_is_suspected_of_cutting(only, caplog) -> None:
    _, client, _ = only(good())
    post(client, messages=long(9000))
    assert "may have cut" not in caplog.text


# --- the memory itself ----------------------------------------------------------------


TOP_K, SEED = Mend("drop", ("top_k",)), Mend("drop", ("seed",))
PLACE = ("groq", "m1", "chat")


def test_a_lesson_lasts_a_day() -> None:
    clock = Clock()
    lessons = Lessons(clock)
    assert lessons.mends(*PLACE) == ()
    lessons.learn(*PLACE, [TOP_K])
    lessons.learn_window("groq", "m1", 8192)
    clock.time += 86_399
    assert lessons.mends(*PLACE) == (TOP_K,)
    assert lessons.window("groq", "m1") == 8192
    assert [row["for_s"] for row in lessons.snapshot("groq")] == [1, 1]
    clock.time += 2
    assert lessons.mends(*PLACE) == ()
    assert lessons.window("groq", "m1") == 0
    assert lessons.snapshot("groq") == []
    lessons.learn(*PLACE, [SEED])
    assert lessons.mends(*PLACE) == (SEED,)


def test_learning_again_lengthens_only_that_lesson() -> None:
    clock = Clock()
    lessons = Lessons(clock)
    lessons.learn(*PLACE, [TOP_K, SEED])
    clock.time += 50_000
    lessons.learn(*PLACE, [SEED])
    clock.time += 50_000
    assert lessons.mends(*PLACE) == (SEED,)


def test_only_what_is_true_of_the_model_is_kept() -> None:
    lessons = Lessons(Clock())
    once = [Mend("room", ("max_tokens",), 300), Mend("no thoughts"), Mend("think not", (), "chat")]
    lessons.learn(*PLACE, [*once, Mend("drop once", ("top_p",))])
    assert lessons.mends(*PLACE) == ()
    assert lessons.snapshot("groq") == []


def test_of_two_that_contradict_each_other_the_newer_holds() -> None:
    lessons = Lessons(Clock())
    to = Mend("rename", ("max_tokens",), "max_completion_tokens")
    fro = Mend("rename", ("max_completion_tokens",), "max_tokens")
    lessons.learn(*PLACE, [to, Mend("most", (), 100)])
    lessons.learn(*PLACE, [fro, Mend("most", (), 200)])
    assert lessons.mends(*PLACE) == (fro, Mend("most", (), 200))


def test_the_memory_is_bounded() -> None:
    lessons = Lessons(Clock())
    for n in range(Lessons.MAX_MODELS + 50):
        lessons.learn("p", f"m{n}", "chat", [TOP_K])
        lessons.learn_window("p", f"m{n}", 8192)
        lessons.first_cut("p", f"m{n}")
    assert len(lessons.snapshot("p")) == 2 * Lessons.MAX_MODELS
    assert lessons.mends("p", "m0", "chat") == ()
    assert lessons.mends("p", f"m{Lessons.MAX_MODELS}", "chat") == (TOP_K,)
    for n in range(200):
        lessons.learn(*PLACE, [Mend("drop", ("user",), str(n))])
    assert len(lessons.mends(*PLACE)) == Lessons.MAX_MENDS


def test_unlikely_windows_are_not_believed() -> None:
    lessons = Lessons(Clock())
    for tokens in (-1, 0, 3, 255, 10**12):
        lessons.learn_window("p", "m", tokens)
    assert lessons.window("p", "m") == 0


def test_many_threads_may_learn_at_once() -> None:
    lessons = Lessons(Clock())

    def work(n: int) -> None:
        for m in range(200):
            lessons.learn("p", f"m{m}", "chat", [Mend("drop", ("user",), str(n))])
            lessons.mends("p", f"m{m}", "chat")
            lessons.learn_window("p", f"m{m}", 1000 + n)
            lessons.snapshot("p")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: not any(thread.is_alive() for thread in threads), 60)
    assert len(lessons.mends("p", "m0", "chat")) == 4


def test_many_requests_at_once_learn_the_same(serve, upstream) -> None:
    up = upstream(refusing("top_k", openai_error("Unknown parameter: 'top_k'")))
    live = serve(**provider("openrouter", up, "m1", keys="k1"), **QUICK)
    got: list[int] = []
    ask = lambda: got.append(live.chat(top_k=3).status_code)  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == [200] * 12
    assert len(live.app.extensions["router"].lessons.mends("openrouter", "m1", "chat")) == 1


def test_the_tables_agree_with_one_another() -> None:
    spare = {".".join(place) for place in router.SPARE}
    assert len(spare) == len(router.SPARE)
    assert set(router.SPARE_ONLY) <= spare
    assert spare >= router.WORDED
    assert set(router.MENDERS) >= router.LASTING
    for kind in router.MENDERS:
        assert str(Mend(kind, ("max_tokens",), 5))
    protected = set(
        ["model", "messages", "system", "stream", "tools", "prompt", "input", "content", "role"]
    )
    assert not {place[-1] for place in router.SPARE} & protected


# --- properties -----------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = sorted({part for path in router.SPARE for part in path if part != "*"} | set(MATTERS))
WORDS = [
    "Unsupported parameter:", "Unknown name", "property", "is unsupported", "does not support",
    "Extra inputs are not permitted", "Argument not supported on this model:", "'", '"', "`", ": ",
    "[", "]", "(", ")", ".", ", ", "max_tokens", "must be <= 5", "response_format", "can only afford",
    "99999999999999999999", "4096", "maximum context length is", "invalid signature in thinking",
    "thought_signature", "reasoning_content must be passed back", "Unsupported value:", "only the",
    "default", "exceed context limit: 300 + 9000 > 9000", "cannot both be specified", "n_ctx", "\n",
]  # fmt: skip
PROTECTED = ("model", "stream", "prompt", "tool_choice", "n", "modalities", "audio", "provider")
TEXTS = st.lists(
    st.sampled_from(WORDS) | st.sampled_from(NAMES) | st.text(max_size=10), max_size=14
).map(" ".join)
SPARE_VALUES = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6)
ERRORS = (
    TEXTS.map(lambda text: openai_error(text, text[:30], "unsupported_parameter"))
    | TEXTS.map(lambda text: {"detail": [{**LOC, "loc": ["body", *text.split()[:4]]}]})
    | st.tuples(TEXTS, JSON).map(lambda both: {"error": both[0], "param": both[1], "code": both[1]})
    | JSON
)


@settings(max_examples=400, deadline=None)
@given(ERRORS, TEXTS, SPARE_VALUES, st.sampled_from([400, 402, 413, 422, 500, 502]),
       st.sampled_from(["chat", "messages", "responses", "codex", "embeddings"]))  # fmt: skip
def test_no_error_raises_or_drops_what_is_protected(error, text, extra, status, dialect) -> None:
    body = {**extra, **MATTERS}
    sent = json.dumps(body).encode()
    done: list[Mend] = []
    for _ in range(4):
        made = mended(sent, done)
        found = remedy(Outcome(status, text), json.dumps(error).encode(), made, dialect, done)
        if not found:
            break
        assert not set(found) & set(done)
        assert mended(made, found) != made
        assert all(map(str, found))
        done += found
    after = json.loads(mended(sent, done))
    for name in PROTECTED:
        assert after[name] == body[name]
    kinds = {mend.kind for mend in done}
    if "tell format" not in kinds:
        assert after["response_format"] == body["response_format"]
        assert len(after["messages"]) == 4
    plain = [m for m in after["messages"] if m["role"] != "system"]
    assert [m["role"] for m in plain] == ["user", "assistant", "tool"]
    assert plain[0] == MATTERS["messages"][1]
    assert plain[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert after["tools"] == [TOOL]
    for name, value in extra.items():
        if name in router.OUTPUT_LIMITS or name in MATTERS or name in after:
            continue
        assert (name,) in router.SPARE or name in ("thinking", "reasoning"), (name, value)


@settings(max_examples=200, deadline=None)
@given(JSON, st.lists(st.sampled_from(router.SPARE), max_size=4), st.binary(max_size=60))
def test_mending_takes_any_body(body, places, raw) -> None:
    mends = [Mend("drop", place) for place in places]
    mends += [Mend("rename", ("a",), "b"), Mend("most", (), 5), Mend("room", ("max_tokens",), 9)]
    mends += [Mend("tell format", ("response_format",)), Mend("no thoughts", (), "sign")]
    mends += [Mend("think not", (), "chat"), Mend("think not", (), "messages")]
    for source in (json.dumps(body).encode(), raw):
        once = mended(source, mends)
        assert mended(once, mends) == once


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80) | TEXTS, st.binary(max_size=80))
def test_any_text_is_read(text, raw) -> None:
    stated_sizes(text)
    for status in (400, 402, 422, 500):
        remedy(Outcome(status, text), raw, b'{"max_tokens":5,"top_k":1}', "chat")


@pytest.mark.parametrize(
    "piece", ["a.", "'a', ", "a and ", "[", "`" * 5, "9,", "max_tokens ", "loc "]
)
def test_long_texts_are_read_in_no_time(piece) -> None:
    text = "Unsupported parameter: " + piece * 20_000
    sent = json.dumps({"top_k": 1, "max_tokens": 9}).encode()
    started = router.time.perf_counter()
    remedy(Outcome(400, text[:600]), json.dumps(openai_error(text)).encode(), sent, "chat")
    assert router.time.perf_counter() - started < 1.0
