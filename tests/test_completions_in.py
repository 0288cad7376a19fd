"""Legacy completions: their requests as chat, chat answers as text_completion."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream import events_of

import router
from router import BadRequest, CompletionsWriter, Opening

Json = dict[str, Any]
USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
HEAD = {"id": "cmpl-abc", "object": "text_completion", "created": 9, "model": "asked"}


def opening(**request: Any) -> Opening:
    return Opening("abc", "asked", 9, 1, request)


def delta(finish: str | None = None, index: int = 0, **members: Any) -> Json:
    return {"choices": [{"index": index, "delta": members, "finish_reason": finish}]}


def sent_by(chunks: list[Json], **request: Any) -> list[Any]:
    writer = CompletionsWriter(opening(**request))
    sent = b"".join([*map(writer.feed, chunks), writer.finish()])
    return [data if data == "[DONE]" else json.loads(data) for _, data in events_of(sent)]


@pytest.mark.parametrize("prompt", ["Say hi", ["Say hi"]])
def test_a_prompt_is_one_user_message(prompt: Any) -> None:
    body = {"model": "m", "prompt": prompt, "max_tokens": 5, "n": 2, "best_of": 2, "echo": False}
    assert router.completions_to_chat({**body, "top_k": 4, "logprobs": None, "suffix": ""}) == {
        "model": "m",
        "max_tokens": 5,
        "n": 2,
        "top_k": 4,
        "messages": [{"role": "user", "content": "Say hi"}],
    }


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [1, 2]}),
        ("prompt", {"prompt": [[1, 2]]}),
        ("prompt", {"prompt": ["a", "b"]}),
        ("suffix", {"suffix": "end"}),
        ("echo", {"echo": True}),
        ("logprobs", {"logprobs": 0}),
        ("best_of", {"best_of": 3}),
        ("best_of", {"best_of": 3, "n": 2}),
        ("tools", {"tools": [{}]}),
        ("temperature", {"temperature": "hot"}),
    ],
)
def test_what_cannot_be_served_is_named(param: str, body: Json) -> None:
    with pytest.raises(BadRequest) as failed:
        router.completions_to_chat({"prompt": "x", **body})
    assert failed.value.param == param


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)
NAMES = ["prompt", "suffix", "echo", "logprobs", "best_of", "n", "stream", "stop", "messages"]


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), VALUES))
def test_any_json_is_served_or_refused(body: Json) -> None:
    before = json.dumps(body)
    try:
        chat = router.completions_to_chat(body)
    except BadRequest:
        return
    finally:
        assert json.dumps(body) == before
    router.validate_chat(chat)


def test_a_stream_has_text_then_its_end() -> None:
    chunks = [delta(content="a"), delta(reasoning_content="hm"), delta("length", content="b")]
    events = sent_by([*chunks, {"choices": [], "usage": USAGE}])
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["a", "b", ""]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, "length"]
    assert events[-1] == "[DONE]"
    assert all(HEAD.items() <= event.items() for event in events[:-1])


def test_usage_comes_when_it_is_asked_for() -> None:
    chunks = [delta("stop", content="a"), {"choices": [], "usage": USAGE}]
    events = sent_by(chunks, stream_options={"include_usage": True})
    assert events[0]["usage"] is None
    assert events[-2] == {**HEAD, "choices": [], "usage": USAGE}


def test_an_error_ends_without_done() -> None:
    writer = CompletionsWriter(opening())
    writer.feed(delta(content="a"))
    assert writer.beat().startswith(b":")
    error = router.OverLimit("slow")
    assert writer.fail(error) == router.encode_event(router.error_body(error))
    assert not (writer.finish() or writer.fail(error) or writer.beat() or writer.feed(delta()))


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=4)


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3), st.sampled_from(["stop", "length", "tool_calls"]))
def test_a_stream_cut_anyhow_is_the_whole(answers: list[list[str]], finish: str) -> None:
    chunks = [delta(index=n, content=text) for n, texts in enumerate(answers) for text in texts]
    chunks += [delta(finish, index=n) for n in range(len(answers))]
    reply = {
        "choices": [
            {"index": n, "message": {"content": "".join(texts)}, "finish_reason": finish}
            for n, texts in enumerate(answers)
        ],
        "usage": USAGE,
    }
    whole = router.chat_reply_to_completion(reply, opening())
    asked = {"stream_options": {"include_usage": True}}
    events = sent_by([*chunks, {"choices": [], "usage": USAGE}], **asked)
    joined: dict[int, Json] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            old = joined.get(choice["index"], {"text": ""})
            joined[choice["index"]] = {**choice, "text": old["text"] + choice["text"]}
    assert {
        **HEAD,
        "choices": [joined[index] for index in sorted(joined)],
        "usage": events[-2]["usage"],
    } == whole
    openai.types.Completion.model_validate(whole)
