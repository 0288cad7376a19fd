"""Chat bodies fit the rules of every provider; what needs no change is not touched."""

from __future__ import annotations

import copy
import functools
import json
import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from provider_rules import GEMINI_DENIED, gemini_node, nodes_of, paired, refuse

import router

Body = dict[str, Any]
# Every provider with its models, and families at hosts that check what the families check.
TARGETS = [(row.name, model) for row in router.PROVIDERS for model in row.models] + [
    ("github_models", "openai/gpt-4.1"),
    ("gemini", "gemini-2.5-flash"),
    ("openrouter", "mistralai/devstral-medium"),
    ("openrouter", "anthropic/claude-sonnet-5"),
    ("nvidia", "mistralai/mistral-nemotron"),
    ("local", "mistral-small3.2:24b"),
    ("local", "llama3.1"),
    ("kimi", "kimi-k2.6"),
    ("zai", "glm-5.3"),
    ("openai", "gpt-4.1"),
    ("openai", "o4-mini"),
    ("xai", "grok-4-1-fast-non-reasoning"),
    ("groq", "llama-3.3-70b-versatile"),
    ("mistral", "magistral-medium"),
    ("somebody-elses", "some-model"),
]


fit_for = functools.cache(router.fit_for)


def fitted(provider: str, model: str, chat: Body) -> Body:
    """The body as it is sent."""
    edits = fit_for(provider, model).edits(chat)
    body = {**chat, **edits, "model": model}
    return {name: value for name, value in body.items() if value is not router.DROP}


def messages_for(provider: str, model: str, *messages: Body, **members: Any) -> list[Body]:
    return fitted(provider, model, {"messages": list(messages), **members})["messages"]


def call(id: str, name: str = "look", arguments: Any = "{}") -> Body:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def asks(*calls: Body, **members: Any) -> Body:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **members}


def result(id: str, content: Any = "found", **members: Any) -> Body:
    return {"role": "tool", "tool_call_id": id, "content": content, **members}


USER = {"role": "user", "content": "hello"}
SYSTEM = {"role": "system", "content": "be kind"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "looks",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


# --- nothing to do ----------------------------------------------------------------


@pytest.mark.parametrize(("provider", "model"), TARGETS)
def test_a_plain_chat_is_left_alone(provider: str, model: str) -> None:
    chat = {"model": "x", "stream": True, "messages": [SYSTEM, USER]}
    edits = router.fit_for(provider, model).edits(chat)
    if provider == "nvidia":
        assert edits.pop("stream_options", None) is None
    if provider == "venice":
        assert edits.pop("venice_parameters") == {"include_venice_system_prompt": False}
    if provider == "cloudflare":
        assert edits.pop("max_tokens") == 8192
    assert edits == {}


@pytest.mark.parametrize("provider", ["openrouter", "xai", "groq", "local", "together", "openai"])
def test_a_sound_tool_conversation_is_left_alone(provider: str) -> None:
    history = [SYSTEM, USER]
    for turn in range(10):
        history += [asks(call(f"call_{turn}"), content=""), result(f"call_{turn}"), USER]
    if provider == "local":  # its templates want turns taken
        history = history[:-1]
    chat = {"messages": history, "tools": [TOOL], "tool_choice": "auto"}
    assert router.fit_for(provider, "openai/gpt-oss-20b").edits(chat) == {}


def test_costs() -> None:
    """Loose bounds, ten times what was measured: only a change of kind is caught here."""
    fit = router.fit_for("openrouter", "some/model")
    plain = {"model": "m", "stream": True, "temperature": 0.5, "messages": [SYSTEM, USER]}
    long = {**plain, "messages": [SYSTEM, *[USER, {"role": "assistant", "content": "a"}] * 50]}
    for chat, most_us in ((plain, 20), (long, 300)):
        best = 1.0
        for _ in range(50):
            started = time.perf_counter()
            fit.edits(chat)
            best = min(best, time.perf_counter() - started)
        assert best * 1e6 < most_us


# --- what was reported, one by one -------------------------------------------------


def test_mistral_ids_and_order() -> None:
    sent = messages_for(
        "mistral", "mistral-small-latest",
        USER, asks(call("call_12345678901"), call("abcDEF123")),
        result("abcDEF123", "two"), result("call_12345678901", "one"), USER,
    )  # fmt: skip
    ids = [made["id"] for made in sent[1]["tool_calls"]]
    assert re.fullmatch("[A-Za-z0-9]{9}", ids[0]) and ids[1] == "abcDEF123"
    assert [m["role"] for m in sent] == ["user", "assistant", "tool", "tool", "assistant", "user"]
    assert [(m["tool_call_id"], m["content"]) for m in sent[2:4]] == [
        (ids[0], "one"),
        (ids[1], "two"),
    ]


def test_mistral_ids_are_the_same_every_time_and_apart() -> None:
    history = [USER]
    for turn in range(40):
        history += [asks(call(f"call_{turn}")), result(f"call_{turn}")]
    first = messages_for("mistral", "m", *history[:41])
    whole = messages_for("mistral", "m", *history)
    assert whole[:41] == first  # a longer history keeps the cached prefix
    assert len({m["tool_call_id"] for m in whole if m["role"] == "tool"}) == 40


def test_nine_characters_never_collide() -> None:
    taken: set[str] = set()
    once = router.nine_characters("x", taken)
    assert router.nine_characters("x", taken) != once and len(taken) == 2


def test_mistral_last_assistant_is_a_prefix() -> None:
    sent = messages_for("mistral", "m", USER, {"role": "assistant", "content": "Once"})
    assert sent[-1] == {"role": "assistant", "content": "Once", "prefix": True}
    sent = messages_for("openrouter", "mistralai/x", USER, {"role": "assistant", "content": "A"})
    assert sent[-1] == {"role": "user", "content": "Continue."}


def test_mistral_seed_is_renamed_and_unknown_keys_go() -> None:
    body = fitted("mistral", "m", {"messages": [USER], "seed": 7, "top_k": 5, "store": True})
    assert body["random_seed"] == 7 and not {"seed", "top_k", "store"} & set(body)


def test_gemini_calls_are_signed() -> None:
    own = {"extra_content": {"google": {"thought_signature": "SIG"}}}
    sent = messages_for(
        "gemini", "gemini-3.5-flash-lite",
        USER, asks(call("a"), call("b")), result("a"), result("b"),
        asks({**call("c"), **own}), result("c"),
    )  # fmt: skip
    made = sent[1]["tool_calls"]
    stand_in = {"google": {"thought_signature": "skip_thought_signature_validator"}}
    assert made[0]["extra_content"] == stand_in
    assert "extra_content" not in made[1]
    assert sent[4]["tool_calls"][0]["extra_content"] == own["extra_content"]


def test_signatures_go_to_gemini_only() -> None:
    signed = {**call("a"), "extra_content": {"google": {"thought_signature": "SIG"}}}
    for provider in ("openai", "groq", "openrouter"):
        sent = messages_for(provider, "m", USER, asks(signed), result("a"))
        assert sent[1]["tool_calls"] == [call("a")]


def test_gemini_drops_unknown_members_and_formats_beside_tools() -> None:
    body = fitted(
        "gemini", "gemini-3.5-flash",
        {
            "messages": [USER], "store": True, "parallel_tool_calls": True, "tools": [TOOL],
            "response_format": {"type": "json_object"}, "logit_bias": {},
        },
    )  # fmt: skip
    assert set(body) == {"model", "messages", "tools"}
    assert "JSON" in body["messages"][0]["content"]


@pytest.mark.parametrize("provider", ["groq", "cerebras", "gemini", "mistral", "nvidia", "xai"])
def test_reasoning_is_not_sent_where_it_is_refused(provider: str) -> None:
    told = {"reasoning_content": "hm", "reasoning": "hm", "reasoning_details": [{"type": "x"}]}
    sent = messages_for(provider, "m", USER, {"role": "assistant", "content": "a", **told}, USER)
    assert sent[1] == {"role": "assistant", "content": "a"}


def pieces(origin: str | None) -> list[Body]:
    piece: Body = {"type": "reasoning.text", "text": "because", "signature": "sig"}
    return [piece if origin is None else {**piece, "origin": origin}]


def test_reasoning_returns_to_where_it_came_from() -> None:
    def sent(provider: str, origin: str | None) -> Body:
        told = {"reasoning_details": pieces(origin), "reasoning_content": "because"}
        answer = {"role": "assistant", "content": "a", **told}
        return messages_for(provider, "m", USER, answer, USER)[1]

    assert sent("openrouter", "openrouter")["reasoning_details"] == pieces(None)
    assert sent("openrouter", None)["reasoning_details"] == pieces(None)
    assert sent("openrouter", "anthropic") == {"role": "assistant", "content": "a"}
    assert sent("deepseek", "deepseek")["reasoning_content"] == "because"
    assert "reasoning_content" not in sent("deepseek", "anthropic")


def test_missing_reasoning_on_turns_with_calls() -> None:
    history = [USER, asks(call("a")), result("a")]
    body = fitted("deepseek", "deepseek-flash", {"messages": history, "reasoning_effort": "high"})
    assert body["thinking"] == {"type": "disabled"} and "reasoning_effort" not in body
    known = [USER, asks(call("a"), reasoning_content="because"), result("a")]
    assert router.fit_for("deepseek", "deepseek-flash").edits({"messages": known}) == {}
    assert messages_for("kimi", "k3", *history)[1]["reasoning_content"] == " "


@pytest.mark.parametrize(
    ("provider", "model", "said", "sent"),
    [
        ("mistral", "mistral-small", {"reasoning_effort": "low"}, {"reasoning_effort": "high"}),
        ("mistral", "mistral-small", {"reasoning_effort": "minimal"},
         {"reasoning_effort": "none"}),
        ("mistral", "codestral", {"reasoning_effort": "low"}, {}),
        ("groq", "openai/gpt-oss-20b", {"reasoning_effort": "xhigh"}, {"reasoning_effort": "high"}),
        ("groq", "qwen/qwen3.8-27b", {"reasoning_effort": "low"}, {"reasoning_effort": "default"}),
        ("groq", "qwen/qwen3.8-27b", {"thinking": {"type": "disabled"}},
         {"reasoning_effort": "none"}),
        ("zai", "glm-4.7", {"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}),
        ("zai", "glm-5.3", {"thinking": {"type": "disabled"}}, {"reasoning_effort": "low"}),
        ("zai", "glm-5.3", {"thinking": {"type": "enabled", "budget_tokens": 9000}},
         {"thinking": {"type": "enabled"}, "reasoning_effort": "high"}),
        ("kimi", "k3", {"thinking": {"type": "enabled", "budget_tokens": 9000}},
         {"thinking": {"type": "enabled"}}),
        ("kimi", "k3", {"thinking": {"type": "enabled"}, "reasoning_effort": "low"},
         {"thinking": {"type": "enabled"}}),
        ("deepseek", "deepseek-flash", {"reasoning_effort": "max"},
         {"reasoning_effort": "max", "thinking": {"type": "enabled"}}),
        ("openai", "gpt-6-luna", {"thinking": {"type": "enabled", "budget_tokens": 2000}},
         {"reasoning_effort": "low"}),
        ("openai", "gpt-4.1", {"reasoning_effort": "low"}, {}),
        ("openrouter", "a/b", {"reasoning": {"effort": "low"}}, {"reasoning": {"effort": "low"}}),
        ("xai", "grok-4-1-fast-non-reasoning", {"reasoning_effort": "low"}, {}),
        ("llm7", "gpt-oss:20b", {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ("llm7", "gpt-oss:20b", {"thinking": {"type": "adaptive"}}, {}),
        # Ollama answers 400 when a model cannot think: only who asks for it gets it
        ("local", "llama3.1", {"thinking": {"type": "enabled", "budget_tokens": 9000}}, {}),
        ("local", "gpt-oss:20b", {"reasoning_effort": "xhigh"}, {"reasoning_effort": "high"}),
        ("cohere", "command-a", {"reasoning_effort": "low"}, {}),
    ],
)  # fmt: skip
def test_how_hard_to_think(provider: str, model: str, said: Body, sent: Body) -> None:
    body = fitted(provider, model, {"messages": [USER], **said})
    assert {k: v for k, v in body.items() if k not in ("model", "messages")} == sent


@pytest.mark.parametrize(
    ("provider", "model", "said", "sent"),
    [
        ("openai", "gpt-6-luna", {"max_tokens": 9, "temperature": 0.3, "top_p": 1},
         {"max_completion_tokens": 9}),
        ("openai", "gpt-4.1", {"max_tokens": 9, "temperature": 0.3},
         {"max_tokens": 9, "temperature": 0.3}),
        ("openai", "gpt-4.1", {"metadata": {"a": "b"}}, {}),
        ("openai", "gpt-4.1", {"metadata": {"a": "b"}, "store": True},
         {"metadata": {"a": "b"}, "store": True}),
        ("deepseek", "deepseek-flash", {"max_completion_tokens": 9}, {"max_tokens": 9}),
        ("deepseek", "deepseek-flash", {"max_completion_tokens": 9, "max_tokens": 5},
         {"max_tokens": 5}),
        ("cerebras", "gpt-oss-120b", {"max_tokens": 9, "frequency_penalty": 0.5, "user": "u"},
         {"max_completion_tokens": 9, "user": "u"}),
        ("kimi", "kimi-k2.6", {"temperature": 0.3, "top_p": 0.9}, {}),
        ("cohere", "command-a", {"temperature": 1.7}, {"temperature": 1}),
        ("llm7", "m", {"presence_penalty": 0, "frequency_penalty": 0.0, "stop": None, "n": 1},
         {"n": 1}),
        ("llm7", "m", {"stop": [""]}, {}),
        ("openai", "gpt-4.1", {"stop": list("abcdef")}, {"stop": list("abcd")}),
        ("xai", "grok-4.3", {"stop": "x", "presence_penalty": 1}, {}),
        ("fireworks", "m", {"max_tokens": 9000}, {"max_tokens": 9000, "stream": True}),
        ("fireworks", "m", {"max_tokens": 9000, "stream": True},
         {"max_tokens": 9000, "stream": True}),
        ("llm7", "m", {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}),
        ("together", "m", {"top_k": 3, "store": True}, {"top_k": 3}),
        ("groq", "m", {"top_k": 3, "store": True, "logprobs": True}, {}),
    ],
)  # fmt: skip
def test_members(provider: str, model: str, said: Body, sent: Body) -> None:
    body = fitted(provider, model, {"messages": [USER], **said})
    assert {k: v for k, v in body.items() if k not in ("model", "messages")} == sent


@pytest.mark.parametrize(
    ("provider", "model", "members"),
    [
        ("openai", "gpt-4.1", "user service_tier verbosity prompt_cache_key logprobs seed n"),
        ("openrouter", "a/b", "top_k min_p provider models transforms service_tier user"),
        ("kilo", "a/b", "top_k reasoning"),
        ("gemini", "gemini-2.5-flash", "max_completion_tokens n extra_body"),
        ("groq", "openai/gpt-oss-20b", "reasoning_format seed user max_completion_tokens"),
        ("mistral", "m", "random_seed safe_prompt prompt_cache_key presence_penalty n"),
        ("cohere", "m", "seed presence_penalty"),
        ("zai", "glm-4.7", "tool_stream do_sample user"),
        ("kimi", "moonshot-v1-8k", "temperature top_p prompt_cache_key"),
        ("local", "m", "top_k min_p repetition_penalty options seed"),
        ("xai", "grok-3", "presence_penalty stop"),
        ("cloudflare", "m", "top_k repetition_penalty seed max_tokens"),
        ("fireworks", "m", "top_k min_p prompt_cache_key user"),
    ],
)
def test_members_that_stay(provider: str, model: str, members: str) -> None:
    """What a provider knows is not taken away from it."""
    chat: Body = {"messages": [USER], **dict.fromkeys(members.split(), 1)}
    chat |= {"stop": ["x"]} if "stop" in chat else {}
    assert router.fit_for(provider, model).edits(chat) == {}


@pytest.mark.parametrize("provider", ["openai", "openrouter", "mistral", "xai", "kimi", "zai"])
def test_system_messages_may_come_late(provider: str) -> None:
    sent = messages_for(provider, "m", USER, SYSTEM, USER)
    assert sent[1] == SYSTEM


def test_tool_choice_in_a_providers_words() -> None:
    named = {"type": "function", "function": {"name": "look"}}

    def sent(provider: str, choice: Any) -> Any:
        body = fitted(provider, "m", {"messages": [USER], "tools": [TOOL], "tool_choice": choice})
        return body.get("tool_choice", "absent") if "tools" in body else "no tools"

    assert sent("cerebras", named) == "auto"
    assert sent("cerebras", "none") == "none"
    assert sent("zai", "none") == "no tools"
    assert sent("zai", "required") == "auto"
    assert sent("cohere", "auto") == "absent"
    assert sent("cohere", named) == "required"
    assert sent("xai", named) == named
    assert sent("xai", "any") == "required"
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}
    assert sent("xai", allowed) == "required"


def test_custom_tools_become_functions_but_for_openai() -> None:
    tool = {"type": "custom", "custom": {"name": "patch", "description": "d", "format": {}}}
    made = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "*** x"}}
    chat = {
        "messages": [USER, asks(made), result("c1")], "tools": [tool],
        "tool_choice": {"type": "custom", "custom": {"name": "patch"}},
    }  # fmt: skip
    assert router.fit_for("openai", "gpt-4.1").edits(chat) == {}
    body = fitted("groq", "m", chat)
    assert body["tools"][0]["function"]["parameters"]["required"] == ["input"]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "patch"}}
    assert body["messages"][1]["tool_calls"] == [call("c1", "patch", '{"input":"*** x"}')]


def test_older_calls_and_their_results_become_tool_calls() -> None:
    older = {"name": "look", "arguments": ""}
    chat = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "function_call": older},
            {"role": "function", "name": "look", "content": "x"},
        ],
    }  # fmt: skip
    for provider in ("venice", "openai"):
        body = fitted(provider, "gpt-4.1", chat)
        assert body["messages"][1:] == [asks(call("call_look")), result("call_look", "x")]


def test_nvidia_gets_one_call_at_a_time_as_text() -> None:
    tool = {"type": "function", "function": {"name": "look", "strict": True}}
    texts = [{"type": "text", "text": text} for text in "ab"]
    body = fitted(
        "nvidia", "m",
        {
            "messages": [
                {"role": "user", "content": texts},
                asks(call("x"), call("y")), result("x"), result("y"),
            ],
            "tools": [tool], "stream_options": {"include_usage": True},
        },
    )  # fmt: skip
    assert body["messages"] == [
        {"role": "user", "content": "a\nb"},
        asks(call("x"), content=""), result("x"), asks(call("y"), content=""), result("y"),
    ]  # fmt: skip
    assert body["parallel_tool_calls"] is False and "stream_options" not in body
    assert body["tools"][0]["function"] == {"name": "look", "description": "look"}


def test_images_in_results_move_behind_all_results() -> None:
    seen = result("a", [{"type": "text", "text": "shot"}, IMAGE])
    sent = messages_for("openrouter", "m", USER, asks(call("a"), call("b")), seen, result("b"))
    assert [m["role"] for m in sent] == ["user", "assistant", "tool", "tool", "user"]
    assert sent[2]["content"] == "shot" and sent[4]["content"][1] == IMAGE
    untouched = [USER, asks(call("a")), result("a", [IMAGE])]
    assert router.fit_for("anthropic", "claude").edits({"messages": untouched}) == {}


def test_failed_results_say_so() -> None:
    sent = messages_for(
        "groq", "m", USER, asks(call("a"), call("b")),
        result("a", "no such file", is_error=True), result("b", "Error: bad", is_error=True),
    )  # fmt: skip
    assert [m["content"] for m in sent[2:]] == ["Error: no such file", "Error: bad"]
    assert not any("is_error" in m for m in sent)


def test_roles() -> None:
    developer = {"role": "developer", "content": "d"}
    assert messages_for("groq", "m", developer, USER)[0]["role"] == "system"
    late = messages_for("local", "m", SYSTEM, developer, USER, SYSTEM, USER)
    assert [m["role"] for m in late] == ["system", "user"]
    assert late[0]["content"] == "be kind\n\nd"
    assert late[1]["content"] == "hello\n\n[System message]\n\nbe kind\n\nhello"
    both = messages_for("openai", "gpt-6-luna", SYSTEM, developer, USER)
    assert [m["role"] for m in both] == ["developer", "developer", "user"]
    assert messages_for("nvidia", "m", SYSTEM)[-1] == {"role": "user", "content": "Continue."}


def test_marks_for_caching() -> None:
    def marked(text: str) -> Body:
        return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}

    history = [{"role": "user", "content": [marked(str(n))]} for n in range(6)]
    assert messages_for("groq", "m", *history[:1]) == [{"role": "user", "content": "0"}]
    sent = messages_for("openrouter", "m", *history)
    assert [len(m["content"][0]) for m in sent] == [2, 2, 3, 3, 3, 3]
    tool = {**TOOL, "cache_control": {"type": "ephemeral"}}
    chat = {"messages": [USER], "tools": [tool]}
    assert fitted("fireworks", "m", chat)["tools"] == [TOOL]
    assert fitted("openrouter", "m", chat)["tools"] == [tool]
    body = fitted("openrouter", "m", {"messages": history, "tools": [tool]})
    assert json.dumps(body).count("cache_control") == 4


def test_files_are_refused_where_nobody_reads_them() -> None:
    def why(provider: str, **file: str) -> str:
        part = {"type": "file", "file": file}
        chat = {"messages": [{"role": "user", "content": [part]}]}
        return router.fit_for(provider, "m").refuses(chat)

    pdf = "data:application/pdf;base64,AAAA"
    assert why("openai", file_data=pdf) == why("gemini", file_data=pdf) == ""
    assert why("anthropic", file_url="https://x/y.pdf") == ""
    assert "files" in why("groq", file_data=pdf)
    assert "url" in why("openai", file_url="https://x/y.pdf")
    assert why("openai", file_id="file-1") == "" and why("openrouter", file_id="file-1")
    part = {"type": "file", "file": {"filename": "y", "file_url": "https://x/y.pdf"}}
    sent = messages_for("openrouter", "m", {"role": "user", "content": [part]})
    assert sent[0]["content"][0]["file"] == {"filename": "y", "file_data": "https://x/y.pdf"}


def test_server_tools_go_only_where_they_are_known() -> None:
    search = {"type": "web_search", "web_search": {}}
    chat = {"messages": [USER], "tools": [search], "tool_choice": "auto"}
    assert router.fit_for("zai", "m").edits(chat) == {}
    assert set(fitted("nvidia", "m", chat)) == {"model", "messages"}


# --- the repair of histories --------------------------------------------------------


def test_results_are_paired() -> None:
    history = [
        result("gone"),
        asks(call("a"), call("a"), call("")),
        USER,
        result("a", "first"),
        result("a", "second"),
        result("a", "third"),
        {"role": "assistant", "content": "so", "tool_calls": []},
        asks(call("a", arguments={"x": 1}), call("b", arguments="")),
    ]
    sent = router.repaired(history)
    assert sent[0] == {"role": "user", "content": "[Result of tool call gone]\nfound"}
    assert [c["id"] for c in sent[1]["tool_calls"]] == ["a", "a_2", "call_2"]
    assert [m["content"] for m in sent[2:5]] == ["first", "second", "[no result]"]
    assert sent[5] == USER and sent[6]["content"].endswith("third")
    assert sent[7] == {"role": "assistant", "content": "so"}
    assert [c["function"]["arguments"] for c in sent[8]["tool_calls"]] == ['{"x":1}', "{}"]
    assert [m["tool_call_id"] for m in sent[9:]] == ["a_3", "b"]


@pytest.mark.parametrize(
    ("given_", "sent"),
    [
        ('{"a": 1}', '{"a": 1}'),
        (' {"a": 1}\n', ' {"a": 1}\n'),
        ("", "{}"),
        (None, "{}"),
        ("null", "{}"),
        ("[1]", '{"input":[1]}'),
        ("plain", '{"input":"plain"}'),
        ({"a": 1}, '{"a":1}'),
    ],
)
def test_arguments_are_objects(given_: Any, sent: str) -> None:
    assert router.json_arguments(given_) == sent


# --- schemas ------------------------------------------------------------------------

GEMINI = router.SCHEMAS["gemini"]


def properties(schema: Body, **root: Any) -> Body:
    whole = {"type": "object", "properties": {"p": schema}, **root}
    return router.fit_schema(whole, GEMINI)["properties"]["p"]


@pytest.mark.parametrize(
    ("given_", "sent"),
    [
        ({"const": "x"}, {"type": "string", "enum": ["x"]}),
        ({"type": "integer", "enum": [1, 2]}, {"type": "string", "enum": ["1", "2"]}),
        ({"type": ["string", "null"]}, {"type": "string", "nullable": True}),
        ({"enum": ["a", None, ""]}, {"type": "string", "enum": ["a"], "nullable": True}),
        (
            {"type": "integer", "exclusiveMinimum": 0, "description": "n"},
            {"type": "integer", "description": "n (exclusiveMinimum: 0)"},
        ),
        ({"type": "array"}, {"type": "array", "items": {"type": "string"}}),
        (
            {"type": "array", "prefixItems": [{"type": "number"}, {"type": "string"}]},
            {"type": "array", "items": {"type": "number"}},
        ),
        (
            {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            {"type": "integer", "nullable": True},
        ),
        (
            {"type": "string", "format": "uri"},
            {"type": "string", "description": '(format: "uri")'},
        ),
        ({"type": "string", "format": "date-time"}, {"type": "string", "format": "date-time"}),
        (
            {"oneOf": [{"type": "string"}, {"type": "integer"}]},
            {"type": "string", "description": "(or: integer)"},
        ),
        (
            {
                "anyOf": [
                    {"properties": {"a": {"type": "string"}}, "required": ["a"]},
                    {"properties": {"b": {"type": "string"}}, "required": ["b"]},
                ]
            },
            {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}},
        ),
        (
            {"type": "object", "properties": {"a": {}}, "required": ["a", "a", "b"]},
            {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
        ),
        (True, {"type": "string"}),
    ],
)
def test_gemini_schemas(given_: Any, sent: Body) -> None:
    assert properties(given_) == sent


def test_refs_are_written_out_and_cycles_end() -> None:
    node = {
        "type": "object",
        "properties": {"next": {"$ref": "#/$defs/node"}, "to": {"$ref": "#/definitions/a~1b"}},
    }
    schema = {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node", "description": "the list"}},
        "$defs": {"node": node},
        "definitions": {"a/b": {"type": "integer"}},
    }
    before = copy.deepcopy(schema)
    sent = router.fit_schema(schema, GEMINI)
    root = sent["properties"]["root"]
    assert root["description"] == "the list" and root["properties"]["to"] == {"type": "integer"}
    assert root["properties"]["next"] == {"type": "object", "description": "(like node above)"}
    assert schema == before


def test_properties_named_like_keywords_stay() -> None:
    names = ["format", "const", "$ref", "$schema", "properties", "required", "items", "anyOf"]
    schema = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "required": names,
    }
    for rules in router.SCHEMAS.values():
        sent = router.fit_schema(schema, rules)
        assert list(sent["properties"]) == names and sent["required"] == names


def test_schemas_that_explode_are_cut() -> None:
    defs = {
        f"d{n}": {"type": "object", "properties": {x: {"$ref": f"#/$defs/d{n + 1}"} for x in "abc"}}
        for n in range(40)
    }
    sent = router.fit_schema({"$ref": "#/$defs/d0", "$defs": defs}, GEMINI)
    assert len(json.dumps(sent)) < 2_000_000
    assert not any(map(gemini_node, nodes_of(sent)))


KEYWORDS = st.sampled_from(
    sorted(GEMINI_DENIED - {"then", "else"})
    + ["type", "properties", "items", "required", "enum", "format", "description", "default"]
    + ["minimum", "minItems", "pattern", "nullable", "title", "p", "q"]
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 3)
    | st.sampled_from(
        ["object", "array", "string", "integer", "null", "", "#", "#/$defs/p", "date-time", "p"]
    )
)  # fmt: skip
ANY_SCHEMA = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS, inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=400, deadline=None)
@given(ANY_SCHEMA)
def test_any_json_makes_a_schema_gemini_takes(schema: Any) -> None:
    before = copy.deepcopy(schema)
    for rules in router.SCHEMAS.values():
        for parameters in (False, True):
            sent = router.fit_schema(schema, rules, parameters)
            json.dumps(sent)
            assert not parameters or sent["type"] == "object"
            if rules is GEMINI:
                assert [c for c in map(gemini_node, nodes_of(sent)) if c] == []
    assert schema == before


# --- every provider takes every chat --------------------------------------------------

IDS = st.sampled_from(["a", "b", "call_1", "", "toolu_vrtx_01A", "abcDEF123"])
ARGUMENTS = st.sampled_from(["{}", '{"a": 1}', "", "nope", " {}"])
CALLS = st.one_of(
    st.builds(call, IDS, st.just("look"), ARGUMENTS),
    st.builds(
        lambda id: {"id": id, "type": "custom", "custom": {"name": "patch", "input": "x"}}, IDS
    ),
    st.builds(lambda id: {**call(id), "index": 0, "extra_content": {"google": {}}}, IDS),
    st.just({"function": {"name": "look", "arguments": "{}"}}),
)
PARTS = st.sampled_from(
    [
        {"type": "text", "text": "t"},
        {"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}},
        IMAGE,
        {"type": "image_url", "image_url": "https://x/y.png"},
    ]
)
CONTENTS = st.sampled_from(["", "hi", "Error: no"]) | st.lists(PARTS, min_size=1, max_size=3)
ORIGINS = st.sampled_from(["anthropic", "openrouter", "kilo", "deepseek", "codex"])
DETAILS = st.builds(
    lambda origin: [
        {"type": "reasoning.encrypted", "data": f"foreign-{origin}", "origin": origin},
        {"type": "reasoning.text", "text": "why", "origin": origin},
    ],
    ORIGINS.filter(lambda origin: origin not in ("openrouter", "kilo")),
)
EXTRAS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["bob", None]),
        "reasoning_content": st.sampled_from(["hm", "", " ", None]),
        "reasoning": st.just("hm"),
        "reasoning_details": DETAILS,
        "refusal": st.sampled_from([None, "no"]),
        "annotations": st.just([]),
    },
)
MESSAGES = st.one_of(
    st.builds(lambda c: {"role": "system", "content": c}, CONTENTS),
    st.builds(lambda c: {"role": "developer", "content": c}, CONTENTS),
    st.builds(lambda c: {"role": "user", "content": c}, CONTENTS),
    st.builds(lambda c, x: {"role": "assistant", "content": c, **x}, CONTENTS, EXTRAS),
    st.builds(
        lambda made, c, x: {"role": "assistant", "content": c, **x, "tool_calls": made},
        st.lists(CALLS, min_size=1, max_size=3),
        CONTENTS | st.none(),
        EXTRAS,
    ),
    st.builds(
        lambda id, c, x: {"role": "tool", "tool_call_id": id, "content": c, **x},
        IDS, CONTENTS,
        st.fixed_dictionaries({}, optional={"is_error": st.booleans(), "name": st.just("look")}),
    ),
    st.builds(lambda c: {"role": "function", "name": "look", "content": c}, CONTENTS),
    st.just(
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": "{}"}}
    ),
    st.just({"role": "assistant", "content": None, "reasoning_content": "only this"}),
)  # fmt: skip
TOOLS = st.one_of(
    st.just(TOOL),
    st.builds(
        lambda schema, more: {
            "type": "function", "function": {"name": "other", "parameters": schema, **more}
        },
        ANY_SCHEMA,
        st.fixed_dictionaries(
            {}, optional={"strict": st.booleans(), "description": st.sampled_from(["", None, "d"])}
        ),
    ),
    st.just({"type": "custom", "custom": {"name": "patch"}}),
    st.just({**TOOL, "cache_control": {"type": "ephemeral"}}),
)  # fmt: skip
CHATS = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES, min_size=1, max_size=8)},
    optional={
        "model": st.just("x"),
        "stream": st.booleans() | st.none(),
        "temperature": st.sampled_from([0, 0.7, 1, 2, None]),
        "top_p": st.sampled_from([0, 0.5, 1]),
        "max_tokens": st.sampled_from([1, 100_000, None]),
        "max_completion_tokens": st.sampled_from([1, 100_000]),
        "presence_penalty": st.sampled_from([0, 0.5, -2]),
        "frequency_penalty": st.sampled_from([0.0, 1]),
        "stop": st.sampled_from(["x", "", [], ["a"] * 6, ["a", ""]]),
        "top_k": st.just(3),
        "seed": st.just(3),
        "logprobs": st.just(True),
        "store": st.booleans(),
        "metadata": st.just({"user_id": "u"}),
        "user": st.just("u"),
        "service_tier": st.just("auto"),
        "verbosity": st.just("low"),
        "prompt_cache_key": st.just("k"),
        "parallel_tool_calls": st.booleans(),
        "reasoning_effort": st.sampled_from(
            ["none", "minimal", "low", "medium", "high", "xhigh", "max", "odd"]
        ),
        "thinking": st.sampled_from(
            [
                {"type": "disabled"},
                {"type": "adaptive"},
                {"type": "enabled", "budget_tokens": 5000},
                {},
            ]
        ),
        "tools": st.lists(TOOLS, max_size=3),
        "functions": st.just([{"name": "look", "parameters": {"type": "object"}}]),
        "function_call": st.sampled_from(["auto", {"name": "look"}]),
        "tool_choice": st.sampled_from(
            ["auto", "none", "required", {"type": "function", "function": {"name": "look"}}]
        ),
        "response_format": st.sampled_from(
            [
                {"type": "text"},
                {"type": "json_object"},
                {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "array", "minItems": 1}},
                },
            ]
        ),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CHATS)
def test_every_provider_takes_every_chat(chat: Body) -> None:
    try:
        router.validate_chat(chat)
    except router.BadRequest:
        return
    chat = router.modern_chat(chat)
    before = copy.deepcopy(chat)
    for provider, model in TARGETS:
        body = fitted(provider, model, chat)
        native = provider in ("anthropic", "codex")
        assert (paired(model, body) if native else refuse(provider, model, body)) is None
    assert chat == before


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(MESSAGES, min_size=1, max_size=6), st.sampled_from(TARGETS))
def test_the_quick_look_agrees_with_the_rewriting(
    messages: list[Body], target: tuple[str, str]
) -> None:
    """What the quick look calls sound, the rewriting leaves alone; done twice is done once."""
    fit = router.fit_for(*target)
    try:
        router.validate_chat({"messages": messages})
    except router.BadRequest:
        return
    once = fit._rewritten(messages)
    if fit._is_sound(messages):
        assert once == messages
    assert fit._rewritten(once) == once


TURNS = st.sampled_from(["said", "called", "called twice", "read", "noted"])
FLAWS = st.sampled_from(
    [
        {"name": None}, {"name": "bob"}, {"content": None}, {"content": ""}, {"tool_calls": None},
        {"tool_calls": []}, {"tool_call_id": "zzzzzzzzz"}, {"reasoning_content": ""},
        {"reasoning_content": "hm"}, {"content": [{"type": "text", "text": "t"}]},
        {"content": [IMAGE]}, {"content": [{"type": "image_url", "image_url": "https://x"}]},
        {"content": [{"type": "text", "text": "t", "cache_control": {}}]}, {"role": "user"},
        {"role": "assistant"}, {"role": "system"}, {"role": "developer"}, {"is_error": True},
    ]
)  # fmt: skip


def conversation(turns: list[str], reasoning: Body) -> list[Body]:
    history: list[Body] = [SYSTEM, USER]
    for at, turn in enumerate(turns):
        ids = [f"abcdef{at}{n:02}" for n in range({"called": 1, "called twice": 2}.get(turn, 0))]
        if ids:
            history.append(asks(*map(call, ids), **reasoning, content="I look."))
            history += map(result, ids)
        elif turn == "read":
            history.append({"role": "user", "content": [{"type": "text", "text": "t"}, IMAGE]})
        else:
            history.append({"role": "assistant" if turn == "said" else "user", "content": "so"})
    return history


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(TURNS, max_size=5),
    st.sampled_from([{}, {"reasoning_content": "hm"}]),
    st.lists(st.tuples(st.integers(0, 12), FLAWS), max_size=2),
    st.sampled_from(TARGETS),
)
def test_the_quick_look_sees_single_flaws(
    turns: list[str], reasoning: Body, flaws: list[tuple[int, Body]], target: tuple[str, str]
) -> None:
    messages = conversation(turns, reasoning)
    for at, flaw in flaws:
        messages[at % len(messages)] = {**messages[at % len(messages)], **flaw}
    try:
        router.validate_chat({"messages": messages})
    except router.BadRequest:
        return
    fit = router.fit_for(*target)
    if fit._is_sound(messages):
        assert fit._rewritten(messages) == messages


def agent_conversation(turns: int) -> list[Body]:
    """What a coding agent's history looks like after it was translated: text, calls, images."""
    history: list[Body] = [SYSTEM, USER]
    for turn in range(turns):
        ids = [f"toolu_vrtx_{turn:08}{n}" for n in range(turn % 3 + 1)]
        reasoning = {"type": "reasoning.text", "text": "hm", "signature": "foreign-s"}
        details = [{**reasoning, "origin": "anthropic"}]
        history.append(
            asks(
                *map(call, ids), content="I see.", reasoning_content="hm", reasoning_details=details
            )
        )
        history += [result(id, "ok", is_error=turn % 5 == 0) for id in ids]
        if turn % 7 == 0:
            history[-1]["content"] = [{"type": "text", "text": "shot"}, IMAGE]
        if turn % 4 == 0:
            history += [{"role": "system", "content": "reminder"}, USER]
    return history


@pytest.mark.parametrize(("provider", "model"), TARGETS)
def test_a_long_tool_conversation_fits_everywhere(provider: str, model: str) -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"path": {"type": "string", "format": "uri", "minLength": 1}},
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "look", "parameters": schema, "strict": True}}
    chat = {
        "model": "hermes", "messages": agent_conversation(30), "max_tokens": 32_000, "stream": True,
        "temperature": 1, "top_k": 40, "tools": [tool, {**TOOL, "type": "function"}],
        "tool_choice": "auto", "metadata": {"user_id": "u"},
        "thinking": {"type": "enabled", "budget_tokens": 10_000},
    }  # fmt: skip
    body = fitted(provider, model, chat)
    if provider not in ("anthropic", "codex"):
        assert refuse(provider, model, body) is None
    texts = json.dumps(body["messages"])
    assert texts.count('"look"') == texts.count('"tool_call_id"') == 60


def test_the_rules_refuse_what_they_should() -> None:
    """The other side of the tests above: a body that nobody fitted is refused."""
    chat = {
        "model": "m", "messages": agent_conversation(3), "thinking": {"type": "disabled"},
        "store": True, "tools": [{**TOOL, "cache_control": {}}],
    }  # fmt: skip
    for provider, model in TARGETS:
        if provider not in ("anthropic", "codex"):
            assert refuse(provider, model, chat), provider


def test_rows_say_when_they_were_seen_and_of_whom() -> None:
    names = {row.name for row in router.PROVIDERS} | {"*"}
    for row in router.QUIRKS:
        assert row.provider in names and re.fullmatch(r"20\d\d-\d\d", row.seen)
        assert not row.schema or row.schema in router.SCHEMAS
        re.compile(row.family)
    told = {row.provider for row in router.QUIRKS}
    plain = {"naga", "huggingface", "llm7", "ovhcloud"}  # nothing beyond the common rows is known
    assert names - told <= plain
