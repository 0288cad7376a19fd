"""What translating between dialects costs, in CPU microseconds.   python bench/translate.py

No sockets: a stream's events through Flow or Translation, requests through the translators.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import router  # noqa: E402

CHUNKS = 2_000


def chat_events(chunks: int) -> list[bytes]:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return router.encode_event({**head, "choices": [choice]})

    words = [event({"content": f"word{n:05} "}) for n in range(chunks)]
    counts = {"prompt_tokens": 9, "completion_tokens": chunks, "total_tokens": 9 + chunks}
    usage = router.encode_event({**head, "choices": [], "usage": counts})  # else it is estimated
    opening = event({"role": "assistant", "content": ""})
    return [opening, *words, event({}, "stop"), usage, router.DONE]


def messages_events(chunks: int) -> list[bytes]:
    def event(kind: str, **members: Any) -> bytes:
        data = json.dumps({"type": kind, **members}, separators=(",", ":"))
        return f"event: {kind}\ndata: {data}\n\n".encode()

    message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": "m"}
    message["usage"] = {"input_tokens": 9, "output_tokens": 1}
    delta = {"type": "text_delta"}
    return [
        event("message_start", message=message),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *(
            event("content_block_delta", index=0, delta={**delta, "text": f"word{n:05} "})
            for n in range(chunks)
        ),
        event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 9}),
        event("message_stop"),
    ]


def agent_request(tools: int = 24, turns: int = 12) -> dict[str, Any]:
    """About 60 KB of what a coding agent sends to /v1/messages."""
    schema = {
        "type": "object",
        "properties": {
            f"p{n}": {"type": "string", "description": "what it is for. " * 4} for n in range(6)
        },
    }
    offered = [
        {"name": f"tool_{n}", "description": "does a thing. " * 40, "input_schema": schema}
        for n in range(tools)
    ]
    said: list[dict[str, Any]] = []
    for n in range(turns):
        use = {"type": "tool_use", "id": f"toolu_{n}", "name": "tool_1", "input": {"p1": "x" * 200}}
        result = {"type": "tool_result", "tool_use_id": f"toolu_{n}", "content": "line\n" * 200}
        said += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    first = {"role": "user", "content": "Please look at the tests."}
    return {
        "model": "claude", "max_tokens": 4096, "system": "You are careful. " * 100,
        "messages": [first, *said], "tools": offered, "stream": True,
    }  # fmt: skip


def cpu_us(run: Callable[[], object], times: int) -> float:
    """CPU microseconds of one run, the best of three series."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for _ in range(times):
            run()
        best = min(best, (time.process_time() - start) / times * 1e6)
    return best


def stream(dialect: str, surface: router.Surface, events: list[bytes]) -> Callable[[], None]:
    body = {"model": "m", "messages": [], "input": "x"}

    def run() -> None:
        ask = router.Ask(surface, b"{}", body, {"messages": []}, router.Guard(), True, True)
        flow = router.Passage(router.DIALECTS[dialect], ask, "groq").flow()
        for event in events:
            flow.take(event)
        assert flow.finished and not flow.failure

    return run


def main() -> None:
    chat, claude = chat_events(CHUNKS), messages_events(CHUNKS)
    responses = router.responses_surface(False, ())
    rows = [
        ("chat -> chat, as it comes", "chat", router.CHAT, chat),
        ("chat -> messages", "chat", router.MESSAGES, chat),
        ("chat -> responses", "chat", responses, chat),
        ("messages -> messages, as it comes", "messages", router.MESSAGES, claude),
        ("messages -> chat", "messages", router.CHAT, claude),
    ]
    print(f"{'stream, one event at a time':<40}us per chunk")
    for name, dialect, surface, events in rows:
        print(f"{name:<40}{cpu_us(stream(dialect, surface, events), 5) / CHUNKS:8.1f}")
    body = agent_request()
    size = len(json.dumps(body)) // 1024
    chat_body = router.messages_to_chat(body)
    traits, fit = router.claude_traits("claude-sonnet-4-5"), router.fit_for("groq", "m")
    wholes = [
        (f"messages -> chat, {size} KB", lambda: router.messages_to_chat(body)),
        ("chat fitted to a provider", lambda: fit.edits(chat_body)),
        ("chat -> messages", lambda: router.chat_to_messages(chat_body, "claude", traits)),
        ("chat -> responses", lambda: router.chat_to_responses(chat_body, "m", "openai", False)),
    ]
    print(f"\n{'request':<40}us")
    for name, run in wholes:
        print(f"{name:<40}{cpu_us(run, 50):8.0f}")


if __name__ == "__main__":
    main()
