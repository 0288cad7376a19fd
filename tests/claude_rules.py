"""What Anthropic answers 400 to, as far as it is known: a checker for Messages requests.

    check(body, router.claude_traits("claude-sonnet-4-5"))

raises AssertionError with a list of what is wrong. Sources: the API reference and migration
guides (2026-11) and the texts of errors that users reported; it is stricter than the API where
the API is not known for sure.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

ID = re.compile(r"^[a-zA-Z0-9_-]+$")
TOOL_NAME = re.compile(r"^[a-zA-Z0-9_-]{1,128}$")
THINKING = ("thinking", "redacted_thinking")
IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")
KNOWN = {
    "model", "max_tokens", "messages", "system", "stream", "stop_sequences", "temperature",
    "top_p", "top_k", "tools", "tool_choice", "thinking", "output_config", "metadata",
    "service_tier",
}  # fmt: skip
BLOCKS = {
    "user": {"text", "image", "document", "tool_result"},
    "assistant": {"text", "tool_use", *THINKING},
    "system": {"text"},
}


def check(body: dict[str, Any], traits: Any) -> None:
    """Raise AssertionError unless a model with these traits would take the request."""
    json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    wrong = list(problems(body, traits))
    assert not wrong, "\n".join(wrong)


def problems(body: dict[str, Any], traits: Any) -> Iterator[str]:
    yield from (f"{name}: Extra inputs are not permitted" for name in body if name not in KNOWN)
    yield from check_turns(body, traits)
    yield from check_pairs(body["messages"])
    yield from check_thinking(body, traits)
    yield from check_sampling(body, traits)
    yield from check_tools(body, traits)
    yield from check_marks(body)
    yield from check_rest(body)
    if "system" in body:
        yield from check_content("system", body["system"], {"text"})


def blocks(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def check_turns(body: dict[str, Any], traits: Any) -> Iterator[str]:
    turns = body["messages"]
    if not turns:
        yield "messages: at least one message is required"
        return
    if turns[0]["role"] != "user":
        yield "messages: first message must use the user role"
    for at, turn in enumerate(turns):
        if set(turn) != {"role", "content"} or turn["role"] not in BLOCKS:
            yield f"messages.{at}: unknown role or member"
            continue
        yield from check_content(f"messages.{at}", turn["content"], BLOCKS[turn["role"]])
        if turn["role"] == "system":
            yield from check_mid_system(turns, at, traits)
        elif turn["role"] == "assistant":
            yield from check_assistant(turns, at, traits)


def check_mid_system(turns: list[Any], at: int, traits: Any) -> Iterator[str]:
    if not traits.mid_system:
        yield f"messages.{at}: role 'system' is not supported on this model"
    if at == 0 or turns[at - 1]["role"] != "user":
        yield f"messages.{at}: a system message must follow a user turn"
    if at + 1 < len(turns) and turns[at + 1]["role"] != "assistant":
        yield f"messages.{at}: a system message must come before the assistant"


def check_assistant(turns: list[Any], at: int, traits: Any) -> Iterator[str]:
    content = blocks(turns[at]["content"])
    if content[-1]["type"] in THINKING:
        yield f"messages.{at}: the final block cannot be thinking"
    if at == len(turns) - 1:
        if not traits.prefill:
            yield "this model does not support assistant message prefill"
        if content[-1]["type"] == "text" and content[-1]["text"] != content[-1]["text"].rstrip():
            yield "messages: final assistant content cannot end with trailing whitespace"


def check_content(where: str, content: Any, kinds: set[str]) -> Iterator[str]:
    if not isinstance(content, (str, list)) or not content:
        yield f"{where}: content must not be empty"
        return
    for at, block in enumerate(blocks(content)):
        if block.get("type") not in kinds:
            yield f"{where}.content.{at}: type {block.get('type')!r} is not allowed here"
            continue
        yield from check_block(f"{where}.content.{at}", block)


MEMBERS = {
    "text": {"type", "text", "cache_control"},
    "image": {"type", "source", "cache_control"},
    "document": {"type", "source", "title", "cache_control"},
    "tool_use": {"type", "id", "name", "input", "cache_control"},
    "tool_result": {"type", "tool_use_id", "content", "is_error", "cache_control"},
    "thinking": {"type", "thinking", "signature"},
    "redacted_thinking": {"type", "data"},
}


def check_block(where: str, block: dict[str, Any]) -> Iterator[str]:
    kind = block["type"]
    if not set(block) <= MEMBERS[kind]:
        yield f"{where}: Extra inputs are not permitted: {set(block) - MEMBERS[kind]}"
    if kind == "text" and (not isinstance(block["text"], str) or not block["text"].strip()):
        yield f"{where}: text content blocks must contain non-whitespace text"
    elif kind in ("image", "document"):
        yield from check_source(where, kind, block["source"])
    elif kind == "tool_use":
        if not isinstance(block["input"], dict):
            yield f"{where}.input: should be a valid dictionary"
        if not TOOL_NAME.match(block["name"]):
            yield f"{where}.name: does not match {TOOL_NAME.pattern}"
    elif kind == "tool_result":
        yield from check_result(where, block)
    elif kind == "thinking":
        if not isinstance(block["thinking"], str) or not block["signature"]:
            yield f"{where}: Invalid signature in thinking block"
        if block["signature"].startswith("hr1."):
            yield f"{where}: Invalid signature in thinking block (sealed)"


def check_source(where: str, kind: str, source: dict[str, Any]) -> Iterator[str]:
    if source["type"] == "url":
        if not source["url"].lower().startswith(("http://", "https://")):
            yield f"{where}.source.url: no http address"
    elif source["type"] == "text":
        if kind != "document" or source["media_type"] != "text/plain" or not source["data"]:
            yield f"{where}.source: no text"
    else:
        if source["media_type"] not in (IMAGES if kind == "image" else ("application/pdf",)):
            yield f"{where}.source.media_type: {source['media_type']!r}"
        if not base64.b64decode(source["data"], validate=True):
            yield f"{where}.source.data: empty"


def check_result(where: str, block: dict[str, Any]) -> Iterator[str]:
    content = block.get("content", "absent")
    if content != "absent":
        yield from check_content(where, content, {"text", "image", "document"})
        if any("cache_control" in inner for inner in blocks(content)):
            yield f"{where}: cache_control inside a tool_result"
    if block.get("is_error"):
        if content == "absent":
            yield f"{where}: content cannot be empty if `is_error` is true"
        elif any(inner["type"] != "text" for inner in blocks(content)):
            yield f"{where}: all content must be type text if `is_error` is true"


def check_pairs(turns: list[dict[str, Any]]) -> Iterator[str]:
    """tool_use and tool_result: each in the very next turn, first there, ids unique."""
    seen: set[str] = set()
    asked: list[str] = []
    for at, turn in enumerate(turns):
        content = blocks(turn["content"])
        results = [b["tool_use_id"] for b in content if b["type"] == "tool_result"]
        if asked != results:
            yield f"messages.{at}: tool_use ids {asked} but tool_result ids {results}"
        if any(block["type"] != "tool_result" for block in content[: len(results)]):
            yield f"messages.{at}: tool_result blocks must come first"
        asked = [b["id"] for b in content if b["type"] == "tool_use"]
        for id in asked:
            if not ID.match(id):
                yield f"messages.{at}: tool_use.id {id!r} should match {ID.pattern}"
            if id in seen:
                yield f"messages.{at}: `tool_use` ids must be unique: {id!r}"
            seen.add(id)
    if asked:
        yield f"tool_use ids were found without tool_result blocks immediately after: {asked}"


def check_thinking(body: dict[str, Any], traits: Any) -> Iterator[str]:
    thinking = body.get("thinking")
    effort = body.get("output_config", {}).get("effort")
    if effort is not None and effort not in traits.efforts:
        yield f"output_config.effort: {effort!r} is not supported"
    is_off = traits.off in ("omit",)
    if thinking is not None:
        kind = thinking["type"]
        takes = {"budget": ["enabled", "disabled"], "adaptive": ["adaptive"], "none": []}
        if kind not in [*takes[traits.thinking], traits.off]:
            yield f"thinking.type.{kind} is not supported for this model"
        is_off = kind not in ("enabled", "adaptive")
        if is_off and effort in ("xhigh", "max"):
            yield "effort above high is not allowed with thinking off"
        if kind == "enabled" and not 1024 <= thinking["budget_tokens"] < body["max_tokens"]:
            yield "thinking.budget_tokens must be >= 1024 and < max_tokens"
        if kind == "enabled":
            yield from check_loop(body["messages"])
            if body["messages"][-1]["role"] == "assistant":
                yield "prefill is not compatible with thinking"
    forced = body.get("tool_choice", {}).get("type") in ("any", "tool")
    if forced and (not is_off or not traits.forced_tools):
        yield "Thinking may not be enabled when tool_choice forces tool use"


def check_loop(turns: list[dict[str, Any]]) -> Iterator[str]:
    """With thinking on, the tool loop that goes on must have begun with thinking."""
    said = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not said or blocks(turns[said[-1]]["content"])[-1]["type"] != "tool_use":
        return
    at = said[-1]
    while True:
        if blocks(turns[at]["content"])[0]["type"] in THINKING:
            return
        back = at - 2
        if back < 0 or any(b["type"] != "tool_result" for b in blocks(turns[at - 1]["content"])):
            yield "Expected `thinking` or `redacted_thinking`, but found `tool_use`"
            return
        at = back


def check_sampling(body: dict[str, Any], traits: Any) -> Iterator[str]:
    given = [name for name in ("temperature", "top_p", "top_k") if name in body]
    if traits.sampling == "none" and given:
        yield f"{given} not supported on this model"
    if traits.sampling == "one" and {"temperature", "top_p"} <= set(given):
        yield "temperature and top_p cannot both be specified for this model"
    if body.get("thinking", {}).get("type") in ("enabled", "adaptive"):
        if "temperature" in given or "top_k" in given:
            yield "temperature and top_k may not be set when thinking is enabled"
        if body.get("top_p", 1) < 0.95:
            yield "top_p must be >= 0.95 when thinking is enabled"
    for name in ("temperature", "top_p"):
        if name in body and (isinstance(body[name], bool) or not 0 <= body[name] <= 1):
            yield f"{name}: must be between 0 and 1"
    if "top_k" in body and (type(body["top_k"]) is not int or body["top_k"] < 0):
        yield "top_k: must be a whole number"


def check_tools(body: dict[str, Any], traits: Any) -> Iterator[str]:
    tools, choice = body.get("tools", []), body.get("tool_choice")
    names = [tool["name"] for tool in tools]
    if len(set(names)) != len(names):
        yield f"tools: Tool names must be unique: {names}"
    if "tools" in body and not tools:
        yield "tools: empty"
    for at, tool in enumerate(tools):
        yield from check_tool(f"tools.{at}", tool)
    content = [block for turn in body["messages"] for block in blocks(turn["content"])]
    if not tools and any(block["type"] in ("tool_use", "tool_result") for block in content):
        yield "Requests which include `tool_use` or `tool_result` blocks must define tools"
    if choice is None:
        return
    if not tools:
        yield "tool_choice: may only be specified while providing tools"
    if choice["type"] not in ("auto", "any", "tool", "none"):
        yield f"tool_choice.type: {choice['type']!r}"
    if (choice["type"] == "tool") != ("name" in choice) or choice.get("name", names[:1]) not in (
        *names,
        names[:1],
    ):
        yield "tool_choice.name: not found in provided tools"
    if choice["type"] == "none" and "disable_parallel_tool_use" in choice:
        yield "tool_choice.none.disable_parallel_tool_use: Extra inputs are not permitted"


def check_tool(where: str, tool: dict[str, Any]) -> Iterator[str]:
    if not TOOL_NAME.match(tool["name"]):
        yield f"{where}.name: does not match {TOOL_NAME.pattern}"
    if re.fullmatch(r"[a-z0-9_]+_20\d{6}", str(tool.get("type"))):
        return
    if not set(tool) <= {"name", "description", "input_schema", "cache_control"}:
        yield f"{where}: Extra inputs are not permitted"
    if not isinstance(tool.get("description", ""), str):
        yield f"{where}.description: should be a string"
    schema = tool["input_schema"]
    if schema.get("type") != "object":
        yield f"{where}.input_schema.type: should be 'object'"
    if {"anyOf", "oneOf", "allOf", "$ref"} & set(schema):
        yield f"{where}.input_schema: no oneOf, allOf or anyOf at the top level"
    if not isinstance(schema.get("properties", {}), dict):
        yield f"{where}.input_schema.properties: should be a dictionary"
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        yield f"{where}.input_schema.required: should be a list of strings"


def check_marks(body: dict[str, Any]) -> Iterator[str]:
    holders = [*body.get("tools", [])]
    holders += blocks(body["system"]) if "system" in body else []
    holders += [block for turn in body["messages"] for block in blocks(turn["content"])]
    marks = [holder["cache_control"] for holder in holders if "cache_control" in holder]
    if len(marks) > 4:
        yield f"A maximum of 4 blocks with cache_control may be provided. Found {len(marks)}."
    short = False
    for mark in marks:
        if mark.get("type") != "ephemeral" or mark.get("ttl", "5m") not in ("5m", "1h"):
            yield f"cache_control: {mark}"
        if mark.get("ttl") == "1h" and short:
            yield "a ttl='1h' cache_control block must not come after a ttl='5m' one"
        short = short or mark.get("ttl") != "1h"


def check_rest(body: dict[str, Any]) -> Iterator[str]:
    if type(body["max_tokens"]) is not int or body["max_tokens"] < 1:
        yield "max_tokens: must be at least 1"
    for stop in body.get("stop_sequences", ["x"]):
        if not isinstance(stop, str) or not stop.strip():
            yield "stop_sequences: each stop sequence must contain non-whitespace"
    if "stop_sequences" in body and not body["stop_sequences"]:
        yield "stop_sequences: empty"
    user = body.get("metadata", {}).get("user_id", "x")
    if not isinstance(user, str) or not 1 <= len(user) <= 256:
        yield "metadata.user_id: should be a string of at most 256 characters"
    form = body.get("output_config", {}).get("format")
    if form is not None:
        yield from check_closed("output_config.format.schema", form["schema"])
        if body["messages"][-1]["role"] == "assistant":
            yield "output format is not compatible with prefill"


def check_closed(where: str, schema: Any) -> Iterator[str]:
    """Structured output: objects are closed, and no limits on numbers, texts or lists."""
    if not isinstance(schema, dict):
        yield f"{where}: not a schema"
        return
    kinds = schema.get("type", [])
    if "object" in kinds and schema.get("additionalProperties") is not False:
        yield f"{where}: For 'object' type, 'additionalProperties' must be explicitly false"
    limits = {"minimum", "maximum", "multipleOf", "minLength", "maxLength", "pattern", "maxItems"}
    yield from (f"{where}: property {name!r} is not supported" for name in limits & set(schema))
    inner = [schema["items"]] if "items" in schema else []
    for name in ("properties", "$defs", "definitions"):
        inner += schema.get(name, {}).values()
    for value in [*inner, *schema.get("anyOf", []), *schema.get("allOf", [])]:
        yield from check_closed(where, value)
