"""What real providers answer 400 (or 422) to, as reported in public; written apart from QUIRKS.

`refuse(provider, model, body)` returns the complaint a provider would make, or None. Only chat
bodies; the rules that matter to translation, not all of anybody's API.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

Body = dict[str, Any]
Rule = Callable[[str, Body], "str | None"]

STANDARD_MEMBERS = {
    "system": {"role", "content", "name"},
    "developer": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls"},
    "tool": {"role", "content", "tool_call_id", "name"},
}
HUB_BODY = {"thinking", "think", "top_k", "store", "metadata", "verbosity"}


def words(text: str) -> set[str]:
    return set(text.split())


def refuse(provider: str, model: str, body: Body) -> str | None:
    """The first complaint of a provider about a body; None = it would be answered."""
    for rule in (*EVERYBODY, *RULES.get(provider, LENIENT)):
        if complaint := rule(model.lower(), body):
            return f"{provider}: {complaint}"
    if re.search("mistral|mixtral|codestral|devstral|pixtral", model.lower()):
        for rule in (mistral_ids, mistral_order):
            if complaint := rule(model, body):
                return f"{provider}: {complaint}"
    return None


def calls_of(message: Body) -> list[Body]:
    return message.get("tool_calls") or []


def parts_of(message: Body) -> list[Body]:
    content = message.get("content")
    return content if isinstance(content, list) else []


# --- everybody ------------------------------------------------------------------


def json_all_through(model: str, body: Body) -> str | None:
    json.dumps(body, allow_nan=False)
    nulls = [name for name, value in body.items() if value is None]
    return f"null is not allowed: {nulls}" if nulls else None


def some_messages(model: str, body: Body) -> str | None:
    return None if body["messages"] else "messages: at least one is required"


def paired(model: str, body: Body) -> str | None:
    """Each call one result, directly behind, in order; ids once."""
    waiting: list[str] = []
    seen: set[str] = set()
    for at, message in enumerate(body["messages"]):
        if message["role"] == "tool":
            if not waiting or message["tool_call_id"] != waiting.pop(0):
                return f"messages[{at}]: a tool message must answer the preceding tool_calls"
            continue
        if waiting:
            return f"messages[{at}]: tool_call_ids without an answer: {waiting}"
        if message.get("tool_calls") == []:
            return f"messages[{at}].tool_calls: [] is too short"
        for call in calls_of(message):
            if message["role"] != "assistant" or not call.get("id") or call["id"] in seen:
                return f"messages[{at}]: bad call {call}"
            seen.add(call["id"])
            waiting.append(call["id"])
    return f"tool_call_ids without an answer: {waiting}" if waiting else None


def readable_calls(model: str, body: Body) -> str | None:
    for message in body["messages"]:
        for call in calls_of(message):
            if call["type"] == "custom":
                continue
            arguments = call["function"]["arguments"]
            if not isinstance(arguments, str) or not arguments or not call["function"]["name"]:
                return "a call needs a name and arguments as text"
    return None


def no_hub_words(model: str, body: Body) -> str | None:
    for at, message in enumerate(body["messages"]):
        if "is_error" in message:
            return f"messages[{at}].is_error: unknown"
        if any("origin" in piece for piece in message.get("reasoning_details") or ()):
            return f"messages[{at}].reasoning_details: origin is unknown"
    return None


def text_results(model: str, body: Body) -> str | None:
    for message in body["messages"]:
        if message["role"] == "tool" and any(p["type"] != "text" for p in parts_of(message)):
            return "a tool message may hold text only"
    return None


def sensible_tools(model: str, body: Body) -> str | None:
    if "tools" in body and not body["tools"]:
        return "tools: [] is too short"
    if "tools" not in body and ("tool_choice" in body or "parallel_tool_calls" in body):
        return "tool_choice is only allowed when tools are specified"
    names = [tool["function"]["name"] for tool in body.get("tools", ()) if "function" in tool]
    return "duplicate function names" if len(set(names)) < len(names) else None


EVERYBODY: tuple[Rule, ...] = (
    json_all_through, some_messages, paired, readable_calls, no_hub_words, text_results,
    sensible_tools,
)  # fmt: skip


# --- makers of rules ---------------------------------------------------------------


def refuses_members(*names: str, models: str = "") -> Rule:
    def rule(model: str, body: Body) -> str | None:
        found = sorted(set(names) & set(body)) if re.search(models, model) else []
        return f"Unsupported parameter: {found[0]}" if found else None

    return rule


def refuses_in_messages(*names: str) -> Rule:
    def rule(model: str, body: Body) -> str | None:
        for at, message in enumerate(body["messages"]):
            for name in names:
                if name in message:
                    return f"messages.{at}: property '{name}' is unsupported"
        return None

    return rule


def efforts(*words: str, models: str = "") -> Rule:
    def rule(model: str, body: Body) -> str | None:
        effort = body.get("reasoning_effort")
        wrong = effort is not None and effort not in words and re.search(models, model)
        return f"reasoning_effort must be one of {words}" if wrong else None

    return rule


def only_standard_members(model: str, body: Body) -> str | None:
    for at, message in enumerate(body["messages"]):
        if odd := message.keys() - STANDARD_MEMBERS[message["role"]] - {"extra_content", "prefix"}:
            return f"messages.{at}: unknown {sorted(odd)}"
    return None


def no_marks(model: str, body: Body) -> str | None:
    found = '"cache_control"' in json.dumps([body["messages"], body.get("tools")])
    return "cache_control: Extra inputs are not permitted" if found else None


def only_functions(model: str, body: Body) -> str | None:
    odd = [tool for tool in body.get("tools", ()) if tool.get("type") != "function"]
    odd += [c for m in body["messages"] for c in calls_of(m) if c["type"] != "function"]
    return "tools must be functions" if odd else None


def no_developer(model: str, body: Body) -> str | None:
    roles = {message["role"] for message in body["messages"]}
    return "unknown role developer" if "developer" in roles else None


def no_older_functions(model: str, body: Body) -> str | None:
    found = {"functions", "function_call"} & set(body)
    found |= {"function" for m in body["messages"] if m["role"] == "function"}
    found |= {"function_call" for m in body["messages"] if "function_call" in m}
    return f"Unrecognized key(s) in object: {sorted(found)}" if found else None


def choices(*known: str) -> Rule:
    def rule(model: str, body: Body) -> str | None:
        choice = body.get("tool_choice", known[0])
        word = "named" if isinstance(choice, dict) else choice
        return f"tool_choice {word} is not supported" if word not in known else None

    return rule


def flat_text(model: str, body: Body) -> str | None:
    for message in body["messages"]:
        parts = parts_of(message)
        if parts and all(part["type"] == "text" for part in parts):
            return "content must be a string"
    return None


def no_null_content(model: str, body: Body) -> str | None:
    wrong = any(message.get("content") is None for message in body["messages"])
    return "content must not be null" if wrong else None


def no_strict_tools(model: str, body: Body) -> str | None:
    wrong = any("strict" in tool.get("function", {}) for tool in body.get("tools", ()))
    return "strict is not supported" if wrong else None


def no_format_with_tools(model: str, body: Body) -> str | None:
    wrong = "tools" in body and body.get("response_format", {}).get("type") not in (None, "text")
    return "Function calling with a response mime type is unsupported" if wrong else None


def no_json_schema(model: str, body: Body) -> str | None:
    wrong = body.get("response_format", {}).get("type") == "json_schema"
    return "This response_format type is unavailable" if wrong else None


def at_most(name: str, highest: float) -> Rule:
    def rule(model: str, body: Body) -> str | None:
        return f"{name} is above {highest}" if body.get(name, 0) > highest else None

    return rule


def system_in_front(model: str, body: Body) -> str | None:
    roles = [message["role"] for message in body["messages"]]
    if "system" in roles[1:]:
        return "System message must be at the beginning"
    return "no user query found" if set(roles) == {"system"} else None


def no_foreign_reasoning(model: str, body: Body) -> str | None:
    """Opaque pieces that the tests made elsewhere: 'Invalid signature in thinking block'."""
    wrong = "foreign-" in json.dumps([m.get("reasoning_details") for m in body["messages"]])
    return "Invalid signature in thinking block" if wrong else None


# --- Mistral ------------------------------------------------------------------------


def mistral_ids(model: str, body: Body) -> str | None:
    for message in body["messages"]:
        for id in [*(c["id"] for c in calls_of(message)), message.get("tool_call_id", "a" * 9)]:
            if not re.fullmatch("[a-zA-Z0-9]{9}", id):
                return f"Tool call id was {id} but must be a-z, A-Z, 0-9, length 9 (3280)"
    return None


def mistral_order(model: str, body: Body) -> str | None:
    last = ""
    for message in body["messages"]:
        role = message["role"]
        if last == "tool" and role in ("user", "system"):
            return f"Unexpected role '{role}' after role 'tool' (3230)"
        if role == "assistant" and not message.get("content") and not calls_of(message):
            return "Assistant message must have either content or tool_calls, but not none."
        last = role
    if last == "assistant" and body["messages"][-1].get("prefix") is True:
        return None
    return None if last in ("user", "tool") else f"Expected last role User or Tool, got {last}"


MISTRAL_MEMBERS = words(
    "model messages stream stream_options temperature top_p max_tokens stop tools tool_choice "
    "response_format random_seed n presence_penalty frequency_penalty parallel_tool_calls "
    "prediction prompt_mode safe_prompt prompt_cache_key reasoning_effort guardrails"
)


def mistral_members(model: str, body: Body) -> str | None:
    odd = sorted(set(body) - MISTRAL_MEMBERS)
    return f"422 Extra inputs are not permitted: {odd}" if odd else None


# --- Gemini -------------------------------------------------------------------------

GEMINI_MEMBERS = words(
    "model messages stream stream_options temperature top_p max_tokens max_completion_tokens n "
    "stop tools tool_choice response_format reasoning_effort extra_body user"
)
GEMINI_DENIED = words(
    "$schema $id $ref $defs $comment definitions exclusiveMinimum exclusiveMaximum "
    "patternProperties unevaluatedProperties unevaluatedItems if then else contentEncoding "
    "contentMediaType dependentRequired dependentSchemas additionalProperties examples const "
    "readOnly writeOnly uniqueItems not allOf anyOf oneOf prefixItems contains propertyNames "
    "multipleOf deprecated enumDescriptions"
)
GEMINI_FORMATS = {
    "string": {"enum", "date-time"},
    "integer": {"int32", "int64"},
    "number": {"float", "double"},
}


def schemas_of(body: Body) -> Iterator[Any]:
    for tool in body.get("tools", ()):
        if "parameters" in tool.get("function", {}):
            yield tool["function"]["parameters"]
    wanted = body.get("response_format", {}).get("json_schema")
    if wanted and "schema" in wanted:
        yield wanted["schema"]


def nodes_of(schema: Any) -> Iterator[Any]:
    """A schema and all below it; names of properties are not taken for keywords."""
    yield schema
    if not isinstance(schema, dict):
        return
    for below in (schema.get("properties") or {}).values():
        yield from nodes_of(below)
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), dict):
            yield from nodes_of(schema[word])
    for word in ("anyOf", "oneOf", "allOf"):
        for below in schema.get(word) or ():
            yield from nodes_of(below)


def gemini_node(node: Any) -> str | None:
    if not isinstance(node, dict):
        return f"a schema must be an object, not {node!r}"
    if bad := sorted(name for name in node if name in GEMINI_DENIED or name.startswith("x-")):
        return f'Unknown name "{bad[0]}" at schema: Cannot find field.'
    kind = node.get("type")
    if kind not in ("object", "array", "string", "number", "integer", "boolean"):
        return f"Proto field is not repeating or type is missing: {kind!r}"
    values = node.get("enum", ["fine"])
    named = all(value and isinstance(value, str) for value in values)
    if not values or not named or ("enum" in node and kind != "string"):
        return f"enum: only strings that are not empty: {values!r}"
    if kind == "array" and not isinstance(node.get("items"), dict):
        return "items: missing field"
    if "properties" in node and kind != "object":
        return "properties: only allowed for OBJECT"
    required, properties = node.get("required", []), node.get("properties", {})
    if len(set(required)) < len(required) or set(required) - set(properties):
        return f"required[0]: property is not defined: {required}"
    if "format" in node and node["format"] not in GEMINI_FORMATS.get(kind, ()):
        return f"format {node['format']!r} is not supported for {kind}"
    return None


def gemini_schemas(model: str, body: Body) -> str | None:
    for schema in schemas_of(body):
        for node in nodes_of(schema):
            if complaint := gemini_node(node):
                return complaint
    return None


def gemini_members(model: str, body: Body) -> str | None:
    odd = sorted(set(body) - GEMINI_MEMBERS)
    return f'Unknown name "{odd[0]}": Cannot find field.' if odd else None


def gemini_signatures(model: str, body: Body) -> str | None:
    if not re.search(r"gemini-(?:[3-9]|flash|pro)", model):
        return None
    for message in body["messages"]:
        for call in calls_of(message)[:1]:
            google = call.get("extra_content", {}).get("google", {})
            if not google.get("thought_signature"):
                return "Function call is missing a thought_signature in functionCall parts."
    return None


# --- the rest -----------------------------------------------------------------------


def cerebras_schemas(model: str, body: Body) -> str | None:
    denied = {"minItems", "maxItems", "pattern", "format", "prefixItems", "$ref", "$schema"}
    for schema in schemas_of(body):
        for node in nodes_of(schema):
            if isinstance(node, dict) and (denied & set(node) or node.get("items") is True):
                return f"wrong_api_format: {sorted(denied & set(node))}"
    return None


def cohere_schemas(model: str, body: Body) -> str | None:
    for schema in schemas_of(body):
        for node in nodes_of(schema):
            if isinstance(node, dict) and {"additionalProperties", "$schema"} & set(node):
                return "invalid tool schema"
    return None


def one_call(model: str, body: Body) -> str | None:
    if any(len(calls_of(message)) > 1 for message in body["messages"]):
        return "This model only supports single tool-calls at once!"
    if "tools" in body and body.get("parallel_tool_calls") is not False:
        return "This model only supports single tool-calls at once!"
    return None


def described_tools(model: str, body: Body) -> str | None:
    for tool in body.get("tools", ()):
        description = tool["function"].get("description")
        if not isinstance(description, str) or not description:
            return "tools.function.description: Input should be a valid string"
    return None


NVIDIA_MEMBERS = words(
    "model messages stream temperature top_p max_tokens stop tools tool_choice response_format "
    "seed presence_penalty frequency_penalty parallel_tool_calls chat_template_kwargs nvext "
    "reasoning_effort"
)


def nvidia_members(model: str, body: Body) -> str | None:
    odd = sorted(set(body) - NVIDIA_MEMBERS)
    return f"Validation: Unsupported parameter(s): `{odd[0]}`" if odd else None


VENICE_MEMBERS = words(
    "model messages stream stream_options temperature top_p max_tokens max_completion_tokens stop "
    "tools tool_choice response_format n seed presence_penalty frequency_penalty logprobs "
    "top_logprobs top_k min_p repetition_penalty parallel_tool_calls venice_parameters "
    "reasoning_effort"
)


def venice_members(model: str, body: Body) -> str | None:
    odd = sorted(set(body) - VENICE_MEMBERS)
    return f"Unrecognized key(s) in object: {odd}" if odd else None


def own_prompt_off(model: str, body: Body) -> str | None:
    said = body.get("venice_parameters", {})
    return None if "include_venice_system_prompt" in said else "Venice would add its own prompt"


def kimi_thinking(model: str, body: Body) -> str | None:
    if "thinking" in body and "reasoning_effort" in body:
        return "thinking and reasoning_effort cannot be used together"
    if body.get("thinking", {}).get("type") == "disabled":
        return None
    for at, message in enumerate(body["messages"]):
        if calls_of(message) and not message.get("reasoning_content"):
            return f"reasoning_content is missing in assistant tool call message at index {at}"
    return None


def deepseek_thinking(model: str, body: Body) -> str | None:
    if body.get("thinking", {}).get("type") == "disabled":
        return None
    for message in body["messages"]:
        if calls_of(message) and not (message.get("reasoning_content") or "").strip():
            return "The `reasoning_content` in the thinking mode must be passed back to the API."
    return None


def zai_thinking(model: str, body: Body) -> str | None:
    off = body.get("thinking", {}).get("type") == "disabled"
    if off and re.search(r"glm-5\.[23]", model):
        return "1210"
    return None


def openai_reasoning(model: str, body: Body) -> str | None:
    if not re.match(r"o\d|gpt-[5-9]", model) or "chat" in model:
        return None
    for name in words("max_tokens temperature top_p presence_penalty logprobs logit_bias"):
        if name in body:
            return f"Unsupported parameter: '{name}' is not supported with this model."
    roles = {message["role"] for message in body["messages"]}
    return "system and developer" if {"system", "developer"} <= roles else None


def openai_rules(model: str, body: Body) -> str | None:
    if "metadata" in body and body.get("store") is not True:
        return "The 'metadata' parameter is only allowed when 'store' is enabled."
    if len(body.get("stop", "")) > 4 and isinstance(body["stop"], list):
        return "stop: array too long"
    return None


def cloudflare_default(model: str, body: Body) -> str | None:
    return None if body.get("max_tokens") else "the answer would end after 256 tokens"


def thinks_or_is_forced(model: str, body: Body) -> str | None:
    forced = body.get("tool_choice", "auto") not in ("auto", "none")
    thinks = body.get("thinking", {}).get("type") != "disabled"
    return "tool_choice is incompatible with thinking" if forced and thinks else None


def fireworks_stream(model: str, body: Body) -> str | None:
    most = max(body.get("max_tokens", 0), body.get("max_completion_tokens", 0))
    wrong = most > 4096 and not body.get("stream")
    return "Requests with max_tokens > 4096 must have stream=true" if wrong else None


def turns(model: str, body: Body) -> str | None:
    last = "assistant"
    for message in body["messages"]:
        role = message["role"]
        if role == "system":
            continue
        if role == last and role in ("user", "assistant") or (last == "tool" and role == "system"):
            return "Conversation roles must alternate user/assistant/user/assistant/..."
        last = role
    return None


REASONING = (
    refuses_in_messages("reasoning", "reasoning_content", "reasoning_details", "thinking"),
)
CHAT: tuple[Rule, ...] = (
    refuses_members(*HUB_BODY), no_developer, no_older_functions, no_marks,
)  # fmt: skip
LENIENT: tuple[Rule, ...] = (*CHAT, only_functions, *REASONING, system_in_front)
STRICT: tuple[Rule, ...] = (*CHAT, *REASONING, only_standard_members, system_in_front)
# Providers of another dialect: the translators make their bodies.
NOT_CHAT: tuple[Rule, ...] = ()
GATEWAY: tuple[Rule, ...] = (no_developer, no_older_functions, *REASONING)

RULES: dict[str, tuple[Rule, ...]] = {
    "gemini": (
        *STRICT, only_functions, gemini_members, gemini_schemas, gemini_signatures,
        no_format_with_tools, refuses_in_messages("name"),
        efforts("none", "minimal", "low", "medium", "high"),
    ),
    "openrouter": (no_older_functions, no_foreign_reasoning),
    "kilo": (no_developer, no_older_functions, no_foreign_reasoning),
    "requesty": GATEWAY,
    "vercel_ai_gateway": GATEWAY,
    "github_models": (*CHAT, *REASONING),
    "cerebras": (
        *STRICT, only_functions,
        refuses_members(
            "frequency_penalty", "presence_penalty", "logit_bias", "parallel_tool_calls",
            "service_tier", "prompt_cache_key",
        ),
        choices("auto", "none"), cerebras_schemas,
        lambda model, body: None if "qwen" in model else no_strict_tools(model, body),
        efforts("low", "medium", "high", models="gpt-oss"),
    ),
    "groq": (
        *STRICT, refuses_members("logprobs", "top_logprobs", "logit_bias", "store"),
        refuses_in_messages("name"), no_format_with_tools,
        efforts("low", "medium", "high", models="gpt-oss"),
        efforts("none", "default", models="qwen"), efforts(models="llama"),
    ),
    "mistral": (
        *CHAT, *REASONING, only_standard_members, only_functions, mistral_members, mistral_ids,
        mistral_order, efforts("none", "high"), at_most("temperature", 1.5),
    ),
    "cohere": (
        *STRICT, only_functions, cohere_schemas, at_most("max_tokens", 10**9),
        refuses_members("top_k", "min_p", "repetition_penalty", "logit_bias", "logprobs",
                        "reasoning_effort", "parallel_tool_calls"),
        at_most("temperature", 1),
    ),
    "zai": (
        *CHAT[1:], choices("auto"), no_json_schema, zai_thinking, at_most("temperature", 1),
        refuses_members("metadata", "store", "presence_penalty"),
        efforts("low", "high", "max", models=r"glm-5\.[23]"),
        lambda model, body: "stop: one at most" if len(body.get("stop") or [0]) > 1
        and isinstance(body["stop"], list) else None,
    ),
    "nvidia": (
        *STRICT, only_functions, nvidia_members, described_tools, one_call, flat_text,
        no_null_content,
    ),
    "kimi": (
        *CHAT[1:], refuses_members("temperature", "top_p", models=r"k2\.[56]|k3|coding"),
        kimi_thinking, thinks_or_is_forced, refuses_in_messages("reasoning_details"),
    ),
    "openai": (openai_rules, openai_reasoning, no_marks, *REASONING),
    "anthropic": NOT_CHAT,
    "codex": NOT_CHAT,
    "local": (
        refuses_members("thinking", "store"), no_developer, no_marks, only_functions, *REASONING,
        turns, system_in_front,
    ),
    "xai": (
        *CHAT, *REASONING,
        refuses_members("presence_penalty", "frequency_penalty", "stop",
                        models=r"^(?!.*non-reasoning)grok-(?:4|3-mini)"),
        efforts(models="non-reasoning"),
    ),
    "deepseek": (
        *CHAT[1:], deepseek_thinking, no_json_schema, thinks_or_is_forced,
        refuses_in_messages("reasoning_details"), only_functions,
    ),
    "together": (
        refuses_members("store", "thinking"), no_developer, no_older_functions, no_marks,
        *REASONING, efforts("low", "medium", "high"),
    ),
    "fireworks": (
        refuses_members("thinking", "store", "metadata"), *CHAT[1:], fireworks_stream,
        refuses_in_messages("reasoning_details", "reasoning"), only_functions,
    ),
    "venice": (
        *CHAT[1:], *REASONING, venice_members, own_prompt_off, only_functions,
    ),
    "cloudflare": (
        refuses_members("thinking", "min_p", "logit_bias", "logprobs", "reasoning_effort"),
        *CHAT[1:], *REASONING, flat_text, no_null_content, cloudflare_default, only_functions,
    ),
    "opencode": (*CHAT, only_functions, refuses_in_messages("reasoning_details")),
    "opencode_go": (*CHAT, only_functions, refuses_in_messages("reasoning_details")),
}  # fmt: skip
