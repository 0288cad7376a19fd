"""One long conversation with tools that moves to another provider at every turn."""

from __future__ import annotations

import itertools
import json
from typing import Any

import claude_rules
import pytest
from provider_rules import refuse
from test_every_pair import Said, speak
from upstream import Reply, Request, provider

import router

# Each of them refuses something that another one gives or asks for.
ROWS = {
    "groq": "openai/gpt-oss-120b",
    "anthropic": "claude-sonnet-4-5",
    "mistral": "mistral-large-latest",
    "gemini": "gemini-3.5-flash-lite",
    "cerebras": "gpt-oss-120b",
    "openai": "gpt-5.1-codex",
    "cohere": "command-a-03-2025",
    "deepseek": "deepseek-flash",
    "nvidia": "openai/gpt-oss-120b",
    "kimi": "kimi-k2.6",
    "cloudflare": "@cf/openai/gpt-oss-120b",
    "openrouter": "z-ai/glm-5.3-flash",
    "venice": "llama-3.3-70b",
}
TURNS = 30
MARK = {"type": "ephemeral"}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
DONE_SAYING = Said("It is sunny.", (), "I looked.", "stop")


def asking(turn: int) -> Said:
    calls = (("get_weather", {"city": f"Bern {turn}"}), ("get_weather", {"city": f"Basel {turn}"}))
    return Said("Let me look.", calls[: 1 + turn % 2], "I must look.", "tool_calls")


@pytest.fixture
def rotating(upstream, serve):
    """A router before providers that enforce their rules, and what they complained about."""
    complaints: list[str] = []
    turns = itertools.count()

    def enforcing(row: str):
        def answer(request: Request) -> Reply:
            body = request.json
            try:
                if row == "anthropic":
                    claude_rules.check(body, router.claude_traits(body["model"]))
                said = refuse(row, body["model"], body) if "messages" in body else None
            except AssertionError as error:
                said = str(error)
            if said:
                complaints.append(f"{row}: {said}")
                return Reply(400, {"error": {"message": said}})
            turn = next(turns)
            return speak(DONE_SAYING if turn % 3 == 2 else asking(turn))(request)

        return answer

    rows: dict[str, str] = {}
    for row, model in ROWS.items():
        rows |= provider(row, upstream(enforcing(row)), model)
    return serve(**rows, STRICT_MODEL="1"), complaints


def test_chat_clients(rotating):
    live, complaints = rotating
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}
    talk: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "How is the weather?"},
    ]
    for _turn, (row, model) in zip(range(TURNS), itertools.cycle(ROWS.items()), strict=False):
        body = {"model": f"{row}/{model}", "messages": talk, "tools": [tool], "max_tokens": 500}
        got = live.session.post(live.url + "/v1/chat/completions", json=body)
        assert got.status_code == 200, (row, got.text, complaints)
        assert got.headers["X-Provider"] == row
        said = got.json()["choices"][0]["message"]
        talk.append(said)
        for call in said.get("tool_calls") or ():
            talk.append({"role": "tool", "tool_call_id": call["id"], "content": "sunny"})
        if not said.get("tool_calls"):
            talk.append({"role": "user", "content": "And elsewhere?"})
    assert complaints == []


def test_messages_clients(rotating):
    live, complaints = rotating
    tool = {"name": "get_weather", "input_schema": WEATHER}
    talk: list[dict[str, Any]] = [{"role": "user", "content": "How is the weather?"}]
    for _turn, (row, model) in zip(range(TURNS), itertools.cycle(ROWS.items()), strict=False):
        body = {
            "model": f"{row}/{model}", "messages": talk, "tools": [tool], "max_tokens": 2000,
            "system": [{"type": "text", "text": "Be kind.", "cache_control": MARK}],
        }  # fmt: skip
        got = live.session.post(live.url + "/v1/messages", json=body)
        assert got.status_code == 200, (row, got.text, complaints)
        said = got.json()
        talk.append({"role": "assistant", "content": said["content"]})
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": "sunny"}
            for block in said["content"]
            if block["type"] == "tool_use"
        ]
        talk.append({"role": "user", "content": results or "And elsewhere?"})
    assert complaints == []


def test_responses_clients(rotating):
    live, complaints = rotating
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER}
    talk: list[dict[str, Any]] = [{"role": "user", "content": "How is the weather?"}]
    for _turn, (row, model) in zip(range(TURNS), itertools.cycle(ROWS.items()), strict=False):
        body = {
            "model": f"{row}/{model}", "input": talk, "tools": [tool], "store": False,
            "instructions": "Be kind.", "include": ["reasoning.encrypted_content"],
        }  # fmt: skip
        got = live.session.post(live.url + "/v1/responses", json=body)
        assert got.status_code == 200, (row, got.text, complaints)
        output = got.json()["output"]
        talk += output
        calls = [item for item in output if item["type"] == "function_call"]
        for call in calls:
            result = {"type": "function_call_output", "call_id": call["call_id"]}
            talk.append({**result, "output": json.dumps({"weather": "sunny"})})
        if not calls:
            talk.append({"role": "user", "content": "And elsewhere?"})
    assert complaints == []
