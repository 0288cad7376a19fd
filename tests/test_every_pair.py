"""Every client dialect before every provider dialect: what is said comes out, whole and streamed.

`Said` is an assistant's answer free of any dialect. `speak(said)` makes a provider that says it in
whichever dialect its path asks for; a `Client` asks in its own dialect and reads the answer back
into a `Said`. The other way, `read_*` turns what a provider was asked into plain tuples.
"""

from __future__ import annotations

import base64
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from upstream import AUTH, Reply, Request, Stream, delta, events_of, provider

BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
Made = dict[str, Any]  # a JSON object

SIGNATURE = "EqQBCgIYAhIkMDFhYmNkZWY/+signature/of+the+mock=="  # opaque: Anthropic thinking
SEALED = "gAAAAABencrypted_content-of-the-mock_0123456789=="  # opaque: Responses reasoning


@dataclass(frozen=True)
class Said:
    """An assistant's answer. finish: stop, length or tool_calls."""

    text: str = ""
    calls: tuple[tuple[str, Made], ...] = ()
    reasoning: str = ""
    finish: str = "stop"


class Usage(NamedTuple):
    """Tokens: prompt includes cached ones, completion includes reasoning."""

    prompt: int
    cached: int
    completion: int
    total: int


USED = Usage(prompt=20, cached=8, completion=9, total=29)
THOUGHT = 4  # reasoning tokens of every answer that thinks


def thirds(text: str) -> list[str]:
    """The text in up to three pieces, for deltas."""
    size = max(1, -(-len(text) // 3))
    return [text[at : at + size] for at in range(0, len(text), size)]


def named(event: Made) -> bytes:
    """A server-sent event with its type as its name."""
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


# --- a provider that speaks Chat --------------------------------------------------------------


def chat_usage() -> Made:
    return {
        "prompt_tokens": USED.prompt,
        "completion_tokens": USED.completion,
        "total_tokens": USED.total,
        "prompt_tokens_details": {"cached_tokens": USED.cached},
        "completion_tokens_details": {"reasoning_tokens": THOUGHT},
    }


def chat_calls(said: Said, number: int) -> list[Made]:
    return [
        {
            "id": f"call_{number}x{place}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(given, ensure_ascii=False)},
        }
        for place, (name, given) in enumerate(said.calls)
    ]


def chat_whole(said: Said, body: Made, number: int) -> Reply:
    message: Made = {"role": "assistant", "content": said.text or None}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.calls:
        message["tool_calls"] = chat_calls(said, number)
    choice = {"index": 0, "message": message, "finish_reason": said.finish}
    return Reply(
        200,
        {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": body["model"],
            "choices": [choice],
            "usage": chat_usage(),
        },
    )


def chat_streamed(said: Said, body: Made, number: int) -> Stream:
    events = [delta(role="assistant", content="")]
    events += [delta(reasoning_content=piece) for piece in thirds(said.reasoning)]
    events += [delta(content=piece) for piece in thirds(said.text)]
    events += [delta(tool_calls=[piece]) for piece in interleaved(chat_calls(said, number))]
    events.append(delta(said.finish))
    events.append({**delta(), "choices": [], "usage": chat_usage()})
    return Stream(chunks=[{**event, "id": f"chatcmpl-{number}"} for event in events])


def interleaved(calls: list[Made]) -> Iterator[Made]:
    """Tool call deltas, all calls opened first and then a piece of each in turn."""
    for index, call in enumerate(calls):
        yield {"index": index, **call, "function": {**call["function"], "arguments": ""}}
    pieces = [thirds(call["function"]["arguments"]) for call in calls]
    for row in itertools.zip_longest(*pieces, fillvalue=""):
        for index, piece in enumerate(row):
            if piece:
                yield {"index": index, "function": {"arguments": piece}}


# --- a provider that speaks Messages ----------------------------------------------------------

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def messages_usage(output: int = USED.completion) -> Made:
    return {
        "input_tokens": USED.prompt - USED.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": USED.cached,
        "output_tokens": output,
    }


def blocks(said: Said, number: int) -> list[Made]:
    made: list[Made] = []
    if said.reasoning:
        made.append({"type": "thinking", "thinking": said.reasoning, "signature": SIGNATURE})
    if said.text:
        made.append({"type": "text", "text": said.text})
    for place, (name, given) in enumerate(said.calls):
        made.append(
            {"type": "tool_use", "id": f"toolu_{number}x{place}", "name": name, "input": given}
        )
    return made


def message(said: Said, body: Made, number: int) -> Made:
    return {
        "id": f"msg_{number}",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": blocks(said, number),
        "stop_reason": STOP_REASONS[said.finish],
        "stop_sequence": None,
        "usage": messages_usage(),
    }


def messages_whole(said: Said, body: Made, number: int) -> Reply:
    return Reply(200, message(said, body, number))


def messages_streamed(said: Said, body: Made, number: int) -> Stream:
    whole = message(said, body, number)
    start = {**whole, "content": [], "stop_reason": None, "usage": messages_usage(1)}
    events = [{"type": "message_start", "message": start}, {"type": "ping"}]
    for index, block in enumerate(whole["content"]):
        events += [{"index": index, **event} for event in block_events(block)]
    end = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    events.append({"type": "message_delta", "delta": end, "usage": whole["usage"]})
    events.append({"type": "message_stop"})
    return Stream(chunks=[named(event) for event in events], done=False)


def block_events(block: Made) -> Iterator[Made]:
    """One content block as its start, deltas and stop."""
    kind = block["type"]
    empty = {"text": {"text": ""}, "tool_use": {"input": {}}}
    hollow = empty.get(kind, {"thinking": "", "signature": ""})
    yield {"type": "content_block_start", "content_block": {**block, **hollow}}
    if kind == "text":
        deltas = [{"type": "text_delta", "text": piece} for piece in thirds(block["text"])]
    elif kind == "tool_use":
        pieces = ["", *thirds(json.dumps(block["input"]))] if block["input"] else [""]
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
    else:
        pieces = thirds(block["thinking"])
        deltas = [{"type": "thinking_delta", "thinking": piece} for piece in pieces]
        deltas.append({"type": "signature_delta", "signature": block["signature"]})
    yield from ({"type": "content_block_delta", "delta": one} for one in deltas)
    yield {"type": "content_block_stop"}


# --- a provider that speaks Responses ---------------------------------------------------------


def items(said: Said, number: int) -> list[Made]:
    made: list[Made] = []
    if said.reasoning:
        summary = [{"type": "summary_text", "text": said.reasoning}]
        sealed = {"summary": summary, "encrypted_content": SEALED}
        made.append({"id": f"rs_{number}", "type": "reasoning", **sealed})
    if said.text:
        part = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": []}
        words = {"role": "assistant", "content": [part], "status": "completed"}
        made.append({"id": f"msg_{number}", "type": "message", **words})
    for place, call in enumerate(chat_calls(said, number)):
        asked = {"call_id": call["id"], **call["function"], "status": "completed"}
        made.append({"id": f"fc_{number}x{place}", "type": "function_call", **asked})
    return made


def response(said: Said, body: Made, number: int) -> Made:
    cut = said.finish == "length"
    return {
        "id": f"resp_{number}",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata") or {},
        "model": body["model"],
        "output": items(said, number),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": body.get("tools", []),
        "usage": {
            "input_tokens": USED.prompt,
            "input_tokens_details": {"cached_tokens": USED.cached},
            "output_tokens": USED.completion,
            "output_tokens_details": {"reasoning_tokens": THOUGHT},
            "total_tokens": USED.total,
        },
    }


def responses_whole(said: Said, body: Made, number: int) -> Reply:
    return Reply(200, response(said, body, number))


def responses_streamed(said: Said, body: Made, number: int) -> Stream:
    whole = response(said, body, number)
    start = {**whole, "status": "in_progress", "output": [], "usage": None}
    events = [
        {"type": f"response.{name}", "response": start} for name in ("created", "in_progress")
    ]
    for index, item in enumerate(whole["output"]):
        events += [{"output_index": index, **event} for event in item_events(item)]
    # The ChatGPT backend keeps nothing, and so its last event has no output.
    end = {**whole, "output": []} if body["model"] == WIRES["codex"].model else whole
    events.append({"type": f"response.{whole['status']}", "response": end})
    numbered = ({**event, "sequence_number": at} for at, event in enumerate(events))
    return Stream(chunks=[named(event) for event in numbered], done=False)


def item_events(item: Made) -> Iterator[Made]:
    """One output item from output_item.added to output_item.done."""
    hollow: Made = {"message": {"content": []}, "function_call": {"arguments": ""}}
    kind, place = item["type"], {"item_id": item["id"]}
    opened = {**item, **hollow.get(kind, {"summary": []}), "status": "in_progress"}
    yield {"type": "response.output_item.added", "item": opened}
    if kind == "message":
        yield from text_events(item["content"][0], {**place, "content_index": 0})
    elif kind == "function_call":
        name = "response.function_call_arguments"
        given = item["arguments"]
        yield from ({"type": f"{name}.delta", **place, "delta": one} for one in thirds(given))
        yield {"type": f"{name}.done", **place, "arguments": given, "name": item["name"]}
    else:
        yield from summary_events(item["summary"][0], {**place, "summary_index": 0})
    yield {"type": "response.output_item.done", "item": item}


def text_events(part: Made, place: Made) -> Iterator[Made]:
    yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
    for piece in thirds(part["text"]):
        yield {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
    done = {"text": part["text"], "logprobs": []}
    yield {"type": "response.output_text.done", **place, **done}
    yield {"type": "response.content_part.done", **place, "part": part}


def summary_events(part: Made, place: Made) -> Iterator[Made]:
    name = "response.reasoning_summary"
    yield {"type": f"{name}_part.added", **place, "part": {**part, "text": ""}}
    for piece in thirds(part["text"]):
        yield {"type": f"{name}_text.delta", **place, "delta": piece}
    yield {"type": f"{name}_text.done", **place, "text": part["text"]}
    yield {"type": f"{name}_part.done", **place, "part": part}


# --- any provider -----------------------------------------------------------------------------

Speaker = Callable[[Said, Made, int], Reply]
SPEAKERS: dict[str, tuple[Speaker, Speaker]] = {
    "/chat/completions": (chat_whole, chat_streamed),
    "/messages": (messages_whole, messages_streamed),
    "/responses": (responses_whole, responses_streamed),
}


def path_of(request: Request) -> str:
    return request.path.partition("?")[0]


def say(said: Said, request: Request, number: int) -> Reply:
    """The answer in the dialect of the path that was asked."""
    whole_or_streamed = next(SPEAKERS[end] for end in SPEAKERS if path_of(request).endswith(end))
    body = request.json
    return whole_or_streamed[bool(body.get("stream"))](said, body, number)


def speak(*saids: Said) -> Callable[[Request], Reply]:
    """A provider that says these in turn, the last one again and again."""
    count = itertools.count()

    def answer(request: Request) -> Reply:
        number = next(count)
        return say(saids[min(number, len(saids) - 1)], request, number)

    return answer


class Wire(NamedTuple):
    """A provider row that is asked in a certain dialect."""

    row: str
    model: str
    path: str


RESPONSES_MODEL = "gpt-5-codex"  # one that OpenAI serves on /responses only
WIRES = {
    "chat": Wire("fireworks", "chat-mock", "/chat/completions"),
    "messages": Wire("anthropic", "claude-mock", "/messages"),
    "responses": Wire("openai", RESPONSES_MODEL, "/responses"),
    "codex": Wire("codex", "gpt-codex-mock", "/responses"),
}


def settings_of(wire: Wire, url: str, home: Path) -> dict[str, str]:
    """What points the row at a scripted provider; Codex has an account instead of a key."""
    settings = provider(wire.row, url, wire.model)
    if wire.row == "codex":
        del settings["CODEX_API_KEYS"]
        settings["CODEX_BASE_URL"] = url.removesuffix("/v1")
        auth = home / "auth.json"
        auth.write_text(json.dumps({"codex_accounts": [account()]}))
        auth.chmod(0o600)
    return settings


def account() -> Made:
    """A Codex account whose token lasts for a day."""
    claims = base64.urlsafe_b64encode(json.dumps({"exp": int(time.time()) + 86_400}).encode())
    token = ".".join(("e30", claims.decode().rstrip("="), "c2ln"))
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    secrets = {"access_token": token, "refresh_token": "rt-mock", "last_refresh": now}
    return {"account_id": "acc-mock", **secrets}


# --- what a provider was asked ----------------------------------------------------------------


def as_list(content: Any) -> list[Made]:
    """Content parts; a string is one text part."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content or [])


def read_part(part: Made, who: str) -> tuple[Any, ...]:
    if part["type"] in ("text", "input_text", "output_text"):
        return (who, part["text"])
    if part["type"] == "image":
        source = part["source"]
        return ("image", source["media_type"], source["data"])
    url = part["image_url"]
    url = url["url"] if isinstance(url, dict) else url
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return ("image", kind, data)


def flat(content: Any) -> str:
    return "".join(read_part(part, "")[1] for part in as_list(content))


def read_chat(body: Made) -> Iterator[tuple[Any, ...]]:
    names: dict[str, str] = {}
    for one in body["messages"]:
        if one["role"] == "tool":
            yield ("result", names[one["tool_call_id"]], flat(one["content"]))
            continue
        who = "system" if one["role"] == "developer" else one["role"]
        yield from (read_part(part, who) for part in as_list(one.get("content")))
        for call in one.get("tool_calls") or ():
            names[call["id"]] = call["function"]["name"]
            yield ("call", call["function"]["name"], json.loads(call["function"]["arguments"]))


def read_messages(body: Made) -> Iterator[tuple[Any, ...]]:
    names: dict[str, str] = {}
    yield from (read_part(part, "system") for part in as_list(body.get("system")))
    roles = [one["role"] for one in body["messages"]]
    assert all(a != b for a, b in itertools.pairwise(roles)), roles
    for one in body["messages"]:
        for block in as_list(one["content"]):
            if block["type"] == "tool_use":
                names[block["id"]] = block["name"]
                yield ("call", block["name"], block["input"])
            elif block["type"] == "tool_result":
                yield ("result", names[block["tool_use_id"]], flat(block["content"]))
            elif "thinking" not in block["type"]:
                yield read_part(block, one["role"])


def read_responses(body: Made) -> Iterator[tuple[Any, ...]]:
    names: dict[str, str] = {}
    if body.get("instructions"):
        yield ("system", body["instructions"])
    for one in as_list(body["input"]):
        kind = one.get("type", "message")
        if kind == "function_call":
            names[one["call_id"]] = one["name"]
            yield ("call", one["name"], json.loads(one["arguments"]))
        elif kind == "function_call_output":
            yield ("result", names[one["call_id"]], flat(one["output"]))
        elif kind in ("message", "text"):
            role = one.get("role", "user")
            who = "system" if role == "developer" else role
            yield from (read_part(part, who) for part in as_list(one.get("content", [one])))


ASKED = {
    "/chat/completions": read_chat,
    "/messages": read_messages,
    "/responses": read_responses,
}


def asked(request: Request, wire: Wire) -> list[tuple[Any, ...]]:
    """The conversation that reached the provider, system text first."""
    assert path_of(request).endswith(wire.path)
    turns = list(ASKED[wire.path](request.json))
    return sorted(turns, key=lambda turn: turn[0] != "system")


def tools_of(body: Made) -> dict[str, Made]:
    """name -> parameters of the tools a provider was offered."""
    bare = [tool.get("function", tool) for tool in body.get("tools", ())]
    named_ones = [tool for tool in bare if "name" in tool]  # web_search of OpenAI has none
    return {one["name"]: one.get("parameters", one.get("input_schema")) for one in named_ones}


# --- clients ----------------------------------------------------------------------------------

SYSTEM = "Be brief."
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Where"}},
    "required": ["city"],
}
EMPTY_SCHEMA: Made = {"type": "object", "properties": {}}
TOOLS = {"get_weather": SCHEMA, "get_time": EMPTY_SCHEMA}


class Heard(NamedTuple):
    """What a client understood."""

    said: Said
    id: str
    call_ids: list[str]
    usage: Usage
    back: list[Made]  # what it puts into its next request


class Client(NamedTuple):
    """One dialect from the client's side."""

    path: str
    ask: Callable[[list[Made]], Made]  # turns -> body
    hello: Callable[[str, str], list[Made]]  # text, image data URL or "" -> turns
    results: Callable[[Sequence[tuple[str, str]]], list[Made]]  # (call id, text) -> turns
    hear: Callable[[Made], Heard]
    collect: Callable[[bytes], Made]  # stream -> whole answer


# Chat


def chat_ask(turns: list[Made]) -> Made:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in TOOLS.items()
    ]
    talk = [{"role": "system", "content": SYSTEM}, *turns]
    return {"messages": talk, "tools": tools, "max_tokens": 4096, "reasoning_effort": "medium"}


def chat_hello(text: str, image: str) -> list[Made]:
    parts: list[Made] = [{"type": "text", "text": text}]
    if image:
        parts.append({"type": "image_url", "image_url": {"url": image}})
    return [{"role": "user", "content": parts if image else text}]


def chat_results(results: Sequence[tuple[str, str]]) -> list[Made]:
    return [{"role": "tool", "tool_call_id": id, "content": text} for id, text in results]


def chat_hear(got: Made) -> Heard:
    assert got["object"] == "chat.completion"
    choice = got["choices"][0]
    said = choice["message"]
    calls = said.get("tool_calls") or []
    functions = [call["function"] for call in calls]
    read = tuple((one["name"], json.loads(one["arguments"])) for one in functions)
    reasoning = said.get("reasoning_content") or ""
    used = got["usage"]
    cached = used["prompt_tokens_details"]["cached_tokens"]
    usage = Usage(used["prompt_tokens"], cached, used["completion_tokens"], used["total_tokens"])
    answer = Said(said.get("content") or "", read, reasoning, choice["finish_reason"])
    return Heard(answer, got["id"], [call["id"] for call in calls], usage, [said])


def chat_collect(data: bytes) -> Made:
    """A chat stream put together as its clients do."""
    assert data.endswith(b"data: [DONE]\n\n")
    events = [json.loads(text) for _, text in events_of(data) if text != "[DONE]"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    whole: Made = {**events[0], "object": "chat.completion"}
    said: Made = {"role": "assistant", "content": "", "reasoning_details": [], "tool_calls": []}
    finishes = []
    for event in events:
        whole["usage"] = event.get("usage") or whole.get("usage")
        for choice in event["choices"]:
            merge_chat(said, choice["delta"])
            finishes += [choice["finish_reason"]] if choice.get("finish_reason") else []
    assert len(finishes) == 1
    said = {name: value for name, value in said.items() if value != []}
    return {**whole, "choices": [{"message": said, "finish_reason": finishes[0]}]}


def merge_chat(said: Made, piece: Made) -> None:
    for name in ("content", "reasoning_content"):
        if piece.get(name):
            said[name] = said.get(name, "") + piece[name]
    merge_details(said["reasoning_details"], piece.get("reasoning_details") or ())
    calls = said["tool_calls"]
    for call in piece.get("tool_calls") or ():
        if call["index"] == len(calls):
            assert call["id"] and call["function"]["name"]
            calls.append({"id": call["id"], "type": "function", "function": {"arguments": ""}})
            calls[-1]["function"]["name"] = call["function"]["name"]
        function = calls[call["index"]]["function"]
        function["arguments"] += call["function"].get("arguments") or ""


def merge_details(made: list[Made], pieces: Iterable[Made]) -> None:
    """As the stream helper of the OpenAI SDK 3.54 does: strings of one index are concatenated."""
    for piece in pieces:
        if piece["index"] == len(made):
            made.append({})
        kept = made[piece["index"]]
        for name, value in piece.items():
            joins = isinstance(value, str) and name != "type"
            kept[name] = kept.get(name, "") + value if joins else value


# Messages


def messages_ask(turns: list[Made]) -> Made:
    tools = [{"name": name, "input_schema": schema} for name, schema in TOOLS.items()]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    more = {"max_tokens": 4096, "thinking": thinking}
    return {"system": SYSTEM, "messages": turns, "tools": tools, **more}


def messages_hello(text: str, image: str) -> list[Made]:
    parts: list[Made] = [{"type": "text", "text": text}]
    if image:
        kind, _, data = image.removeprefix("data:").partition(";base64,")
        source = {"type": "base64", "media_type": kind, "data": data}
        parts.append({"type": "image", "source": source})
    return [{"role": "user", "content": parts}]


def messages_results(results: Sequence[tuple[str, str]]) -> list[Made]:
    kept = [{"type": "tool_result", "tool_use_id": id, "content": text} for id, text in results]
    return [{"role": "user", "content": kept}]


def messages_hear(got: Made) -> Heard:
    assert (got["type"], got["role"]) == ("message", "assistant")
    kinds: dict[str, list[Made]] = {"thinking": [], "text": [], "tool_use": []}
    for block in got["content"]:
        kinds[block["type"]].append(block)
    finish = {reason: name for name, reason in STOP_REASONS.items()}[got["stop_reason"]]
    calls = tuple((block["name"], block["input"]) for block in kinds["tool_use"])
    text = "".join(block["text"] for block in kinds["text"])
    said = Said(text, calls, "".join(block["thinking"] for block in kinds["thinking"]), finish)
    used = got["usage"]
    cached = used.get("cache_read_input_tokens") or 0
    prompt = used["input_tokens"] + cached + (used.get("cache_creation_input_tokens") or 0)
    output = used["output_tokens"]
    ids = [block["id"] for block in kinds["tool_use"]]
    back = [{"role": "assistant", "content": got["content"]}]
    return Heard(said, got["id"], ids, Usage(prompt, cached, output, prompt + output), back)


def messages_collect(data: bytes) -> Made:
    """A Messages stream put together; its order is checked on the way."""
    events = [(name, json.loads(text)) for name, text in events_of(data)]
    assert all(name == event["type"] for name, event in events)
    plain = [event for _, event in events if event["type"] != "ping"]
    assert plain[0]["type"] == "message_start"
    assert [event["type"] for event in plain[-2:]] == ["message_delta", "message_stop"]
    whole: Made = plain[0]["message"]
    assert (whole["content"], whole["stop_reason"]) == ([], None)
    assert whole["usage"]["input_tokens"] > 0
    whole["content"] = collect_blocks(plain[1:-2])
    whole.update(plain[-2]["delta"])
    whole["usage"] = {**whole["usage"], **plain[-2]["usage"]}
    return whole


DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


def add_delta(block: Made, piece: Made) -> None:
    """As the SDK does: a signature comes whole, everything else in pieces."""
    if piece["type"] == "signature_delta":
        block["signature"] = piece["signature"]
    else:
        name = DELTAS[piece["type"]]
        block[name] = block.get(name, "") + piece[name]


def collect_blocks(events: Iterable[Made]) -> list[Made]:
    """Content blocks; at most one is open at any time and indices rise from 0."""
    made: list[Made] = []
    is_open = False
    for event in events:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(made)
            made.append({**event["content_block"]})
        else:
            assert is_open and event["index"] == len(made) - 1
        if event["type"] == "content_block_delta":
            add_delta(made[-1], event["delta"])
        is_open = event["type"] != "content_block_stop"
    assert not is_open
    for block in made:
        text = block.pop("partial_json", "")
        if block["type"] == "tool_use":
            block["input"] = json.loads(text or "{}")
    return made


# Responses


def responses_ask(turns: list[Made]) -> Made:
    tools = [
        {"type": "function", "name": name, "parameters": schema, "strict": False}
        for name, schema in TOOLS.items()
    ]
    return {
        "instructions": SYSTEM,
        "input": turns,
        "tools": tools,
        "max_output_tokens": 4096,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
    }


def responses_hello(text: str, image: str) -> list[Made]:
    parts: list[Made] = [{"type": "input_text", "text": text}]
    if image:
        parts.append({"type": "input_image", "image_url": image, "detail": "auto"})
    return [{"type": "message", "role": "user", "content": parts}]


def responses_results(results: Sequence[tuple[str, str]]) -> list[Made]:
    kind = "function_call_output"
    return [{"type": kind, "call_id": id, "output": text} for id, text in results]


def responses_hear(got: Made) -> Heard:
    assert got["object"] == "response"
    output = got["output"]
    ids = [item["id"] for item in output]
    assert len(set(ids)) == len(ids)
    text = "".join(part["text"] for item in of_kind(output, "message") for part in item["content"])
    called = of_kind(output, "function_call")
    calls = tuple((item["name"], json.loads(item["arguments"])) for item in called)
    finish = "tool_calls" if calls else "stop"
    if got["status"] == "incomplete":
        assert got["incomplete_details"]["reason"] == "max_output_tokens"
        finish = "length"
    said = Said(text, calls, summary_of(output), finish)
    used = got["usage"]
    cached = used["input_tokens_details"]["cached_tokens"]
    assert used["output_tokens_details"]["reasoning_tokens"] >= 0
    usage = Usage(used["input_tokens"], cached, used["output_tokens"], used["total_tokens"])
    return Heard(said, got["id"], [item["call_id"] for item in called], usage, output)


def of_kind(output: Iterable[Made], kind: str) -> list[Made]:
    return [item for item in output if item["type"] == kind]


def summary_of(output: Iterable[Made]) -> str:
    """Readable reasoning, as a summary or as content."""
    found = of_kind(output, "reasoning")
    parts = (part for item in found for part in item["summary"] or item.get("content") or ())
    return "".join(part["text"] for part in parts)


TERMINAL = {"response.completed", "response.incomplete", "response.failed"}


def responses_collect(data: bytes) -> Made:
    """The response in the terminal event; everything before it must tell the same."""
    events = [(name, json.loads(text)) for name, text in events_of(data)]
    assert all(name == event["type"] for name, event in events)
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    assert [name for name, _ in events][:2] == ["response.created", "response.in_progress"]
    assert [name for name, _ in events if name in TERMINAL] == [events[-1][0]]
    whole: Made = events[-1][1]["response"]
    plain = [event for _, event in events[2:-1] if event["type"] != "response.in_progress"]
    done = [event for event in plain if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in done] == list(range(len(done)))
    assert [event["item"] for event in done] == whole["output"]
    for event in done:
        check_item(event["item"], [one for one in plain if one["output_index"] == at(event)])
    return whole


def at(event: Made) -> int:
    return int(event["output_index"])


def check_item(item: Made, events: list[Made]) -> None:
    """The deltas of one item add up to what it is when it is done."""
    assert events[0]["type"] == "response.output_item.added"
    assert events[0]["item"]["id"] == item["id"]
    assert all(event.get("item_id", item["id"]) == item["id"] for event in events)
    text = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    if item["type"] == "function_call":
        assert text == item["arguments"]
    elif item["type"] == "message":
        assert text == "".join(part["text"] for part in item["content"])


# Completions (text only)


def completions_ask(turns: list[Made]) -> Made:
    return {"prompt": turns[0]["text"], "max_tokens": 4096}


def completions_hear(got: Made) -> Heard:
    assert got["object"] == "text_completion"
    choice = got["choices"][0]
    used = got["usage"]
    cached = used["prompt_tokens_details"]["cached_tokens"]
    usage = Usage(used["prompt_tokens"], cached, used["completion_tokens"], used["total_tokens"])
    said = Said(choice["text"], finish=choice["finish_reason"])
    return Heard(said, got["id"], [], usage, [])


def completions_collect(data: bytes) -> Made:
    assert data.endswith(b"data: [DONE]\n\n")
    events = [json.loads(text) for _, text in events_of(data) if text != "[DONE]"]
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice["text"] for choice in choices)
    finish = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    used = [event["usage"] for event in events if event.get("usage")]
    whole = {"text": text, "finish_reason": finish[0]}
    return {**events[0], "choices": [whole], "usage": used[-1]}


CLIENTS = {
    "chat": Client(
        "/v1/chat/completions", chat_ask, chat_hello, chat_results, chat_hear, chat_collect
    ),
    "messages": Client(
        "/v1/messages",
        messages_ask,
        messages_hello,
        messages_results,
        messages_hear,
        messages_collect,
    ),
    "responses": Client(
        "/v1/responses",
        responses_ask,
        responses_hello,
        responses_results,
        responses_hear,
        responses_collect,
    ),
    "completions": Client(
        "/v1/completions",
        completions_ask,
        lambda text, image: [{"text": text}],
        lambda results: [],
        completions_hear,
        completions_collect,
    ),
}
TALKERS = [name for name in CLIENTS if name != "completions"]


# --- the matrix -------------------------------------------------------------------------------


@dataclass
class Pair:
    """One client dialect before a router with some scripted providers."""

    client: Client
    http: Any
    ups: dict[str, Any]

    def post(self, turns: list[Made], *, stream: bool, model: str = "hermes-router") -> Any:
        body = {"model": model, **self.client.ask(turns), "stream": stream}
        if stream and "completions" in self.client.path:
            body["stream_options"] = {"include_usage": True}
        headers = {**AUTH, "anthropic-version": "2023-06-01"}
        return self.http.post(self.client.path, json=body, headers=headers)

    def ask(self, turns: list[Made], *, stream: bool, model: str = "hermes-router") -> Heard:
        got = self.post(turns, stream=stream, model=model)
        assert got.status_code == 200, got.data
        if stream:
            assert got.headers["Content-Type"].startswith("text/event-stream")
            return self.client.hear(self.client.collect(got.data))
        return self.client.hear(got.json)

    def hello(self, text: str = "hello there", image: str = "") -> list[Made]:
        return self.client.hello(text, image)


@pytest.fixture
def pair(upstream, make_app, tmp_path):
    """pair(client, {wire name: script}): a router before these providers."""

    def make(client: str, scripts: dict[str, Any]) -> Pair:
        ups = {name: upstream(script) for name, script in scripts.items()}
        settings: dict[str, str] = {}
        for name, up in ups.items():
            settings.update(settings_of(WIRES[name], f"{up.url}/v1", tmp_path))
        return Pair(CLIENTS[client], make_app(**settings).test_client(), ups)

    return make


WEATHER = ("get_weather", {"city": "Zürich"})
CASES = {
    "text": Said('Grüezi,\nwie "geht" es dir? ✓ 🙂'),
    "call": Said("", (WEATHER,), finish="tool_calls"),
    "call-without-arguments": Said("", (("get_time", {}),), finish="tool_calls"),
    "parallel": Said("", (WEATHER, ("get_weather", {"city": "Bern"})), finish="tool_calls"),
    "text-and-calls": Said("Let me see.", (WEATHER, ("get_time", {})), finish="tool_calls"),
    "reasoning": Said("42", reasoning="Six times seven.\nThat is 42."),
    "reasoning-and-call": Said("", (WEATHER,), "I need the weather.", "tool_calls"),
    "length": Said("This is cut", finish="length"),
}
TEXT_CASES = ("text", "length")


def matrix() -> Iterator[Any]:
    for client, wire, case in itertools.product(CLIENTS, WIRES, CASES):
        if client != "completions" or case in TEXT_CASES:
            yield pytest.param(client, wire, case, id=f"{client}-{wire}-{case}")


@BOTH
@pytest.mark.parametrize(("client", "wire", "case"), list(matrix()))
def test_what_the_provider_says_is_what_the_client_hears(pair, client, wire, case, stream):
    said = CASES[case]
    talk = pair(client, {wire: speak(said)})
    heard = talk.ask(talk.hello(), stream=stream)
    if (client, case, stream) == ("responses", "length", True):
        # Codex takes response.incomplete for a broken stream, so a router may end either way.
        said = replace(said, finish=heard.said.finish)
        assert said.finish in ("length", "stop")
    assert heard.said == said
    assert heard.usage == USED
    assert len(set(heard.call_ids)) == len(said.calls)
    request = talk.ups[wire].requests[0]
    assert path_of(request).endswith(WIRES[wire].path)
    assert request.json["model"] == WIRES[wire].model
    if client != "completions":
        assert ("system", SYSTEM) in asked(request, WIRES[wire])


@BOTH
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("client", CLIENTS)
def test_no_two_answers_share_an_id(pair, client, wire, stream):
    talk = pair(client, {wire: speak(Said("hello"))})
    assert len({talk.ask(talk.hello(), stream=stream).id for _ in range(3)}) == 3


@BOTH
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("client", CLIENTS)
def test_an_empty_answer_is_not_passed_off_as_one(pair, client, wire, stream):
    talk = pair(client, {wire: speak(Said())})
    got = talk.post(talk.hello(), stream=stream)
    if got.status_code == 200:  # only Responses tells of failure inside a stream
        last, text = events_of(got.data)[-1]
        assert (client, last) == ("responses", "response.failed")
        assert json.loads(text)["response"]["error"]["message"]
    else:
        assert got.status_code >= 500
        assert got.json["error"]["message"]
        assert (got.json.get("type") == "error") is (client == "messages")


# --- the way there ----------------------------------------------------------------------------

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


@BOTH
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("client", TALKERS)
def test_a_conversation_with_tools_reaches_the_provider(pair, client, wire, stream):
    first = CASES["text-and-calls"]
    talk = pair(client, {wire: speak(first, Said("It is 21 °C."))})
    turns = talk.hello("How warm is it?", f"data:image/png;base64,{PIXEL}")
    heard = talk.ask(turns, stream=stream)
    results = list(zip(heard.call_ids, ("21 °C", "noon"), strict=True))
    again = talk.ask([*turns, *heard.back, *talk.client.results(results)], stream=stream)
    assert again.said == Said("It is 21 °C.")

    requests = talk.ups[wire].requests
    assert asked(requests[1], WIRES[wire]) == [
        ("system", SYSTEM),
        ("user", "How warm is it?"),
        ("image", "image/png", PIXEL),
        ("assistant", "Let me see."),
        ("call", *WEATHER),
        ("call", "get_time", {}),
        ("result", "get_weather", "21 °C"),
        ("result", "get_time", "noon"),
    ]
    assert asked(requests[0], WIRES[wire]) == asked(requests[1], WIRES[wire])[:3]
    offered = tools_of(requests[1].json)
    assert list(offered) == list(TOOLS)
    assert set(offered["get_weather"]["properties"]) == {"city"}


@pytest.mark.parametrize("client", TALKERS)
def test_codex_is_asked_as_codex_wants_it(pair, client):
    talk = pair(client, {"codex": speak(Said("hello"))})
    talk.ask(talk.hello(), stream=False)
    body = talk.ups["codex"].requests[0].json
    assert (body["stream"], body["store"]) == (True, False)
    assert body["instructions"]
    refused = {"max_output_tokens", "max_tokens", "max_completion_tokens", "metadata"}
    assert not refused & set(body)
    assert talk.ups["codex"].requests[0].headers["chatgpt-account-id"] == "acc-mock"


# --- opaque reasoning -------------------------------------------------------------------------

OPAQUE = {"messages": SIGNATURE, "responses": SEALED, "codex": SEALED}
THINKING = CASES["reasoning-and-call"]


def second_turn(talk: Pair, first: str, second: str, stream: bool) -> Request:
    """A tool call by one provider, its result to another: what that one was asked."""
    named_models = {name: f"{WIRES[name].row}/{WIRES[name].model}" for name in (first, second)}
    turns = talk.hello()
    heard = talk.ask(turns, stream=stream, model=named_models[first])
    turns += [*heard.back, *talk.client.results([(heard.call_ids[0], "21 °C")])]
    talk.ask(turns, stream=stream, model=named_models[second])
    return talk.ups[second].requests[-1]


@BOTH
@pytest.mark.parametrize("wire", OPAQUE)
@pytest.mark.parametrize("client", TALKERS)
def test_opaque_reasoning_goes_back_to_where_it_came_from(pair, client, wire, stream):
    talk = pair(client, {wire: speak(THINKING, Said("It is 21 °C."))})
    request = second_turn(talk, wire, wire, stream)
    assert json.dumps(OPAQUE[wire])[1:-1].encode() in request.body
    assert THINKING.reasoning.encode() in request.body
    assert b"hr1." not in request.body


@BOTH
@pytest.mark.parametrize("client", TALKERS)
def test_readable_reasoning_goes_back_with_its_tool_call(pair, client, stream):
    talk = pair(client, {"chat": speak(THINKING, Said("It is 21 °C."))})
    said = second_turn(talk, "chat", "chat", stream).json["messages"][2]
    assert said["tool_calls"]
    assert said["reasoning_content"] == THINKING.reasoning


@BOTH
@pytest.mark.parametrize(
    ("first", "second"), [pair for pair in itertools.permutations(WIRES, 2) if pair[0] in OPAQUE]
)
@pytest.mark.parametrize("client", TALKERS)
def test_opaque_reasoning_never_goes_to_another(pair, client, first, second, stream):
    talk = pair(client, {first: speak(THINKING), second: speak(Said("It is 21 °C."))})
    request = second_turn(talk, first, second, stream)
    assert len(talk.ups[first].requests) == 1
    assert OPAQUE[first].encode() not in request.body
    assert b"hr1." not in request.body
    assert ("result", "get_weather", "21 °C") in asked(request, WIRES[second])
