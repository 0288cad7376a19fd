"""Chat providers' accents: whatever the wire says, the router reads one canonical answer."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import GOLDEN, Recording

import router

NEW_ID = re.compile(r"call_[0-9a-f]{24}")


def chunk(delta: Any = None, finish: Any = None, index: Any = 0, **members: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta or {}, "finish_reason": finish}
    return {"id": "c1", "created": 7, "model": "m", "choices": [choice], **members}


def call(index: Any = 0, arguments: Any = "{}", **members: Any) -> dict[str, Any]:
    """A delta with one tool call; a member that is None is left out."""
    name, whole = members.pop("name", None), {"index": index, "type": "function", **members}
    function = {"name": name, "arguments": arguments}
    body = {key: value for key, value in function.items() if value is not None}
    kept = {key: value for key, value in whole.items() if value is not None}
    return {"tool_calls": [{**kept, "function": body}]}


def read(*events: Any, origin: str = "here") -> list[dict[str, Any]]:
    reader = router.ChatReader(origin)
    return [told for event in events for told in reader.feed(event)] + reader.finish()


def answer(*events: Any) -> dict[str, Any]:
    return router.gathered_reply(read(*events))


def message(*events: Any) -> dict[str, Any]:
    return answer(*events)["choices"][0]["message"]


def calls(*events: Any) -> list[tuple[str, str, str]]:
    """(id, name, arguments) of every call in the answer."""
    made = message(*events).get("tool_calls", ())
    return [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in made]


def finish(*events: Any) -> str:
    return answer(*events)["choices"][0]["finish_reason"]


def whole(body: Any, finish: Any = "stop", **members: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": body, "finish_reason": finish}
    reply = {"id": "c1", "object": "chat.completion", "choices": [choice], **members}
    return router.canonical_reply(reply, "here")


def recorded(recording: Recording) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(the canonical reply, the first useful event or the reply itself)."""
    if not recording.streams:
        body = json.loads(recording.body)
        return router.canonical_reply(body, recording.provider), body
    datas = [router.event_data(event) for event in router.split_events(recording.body)]
    events = [json.loads(data) for data in datas if data and data != b"[DONE]"]
    first = next((event for event in events if router.chunk_sign(event)), None)
    chunks = read(*events, origin=recording.provider)
    check_canonical(chunks)
    return router.gathered_reply(chunks), first


def check_canonical(chunks: list[dict[str, Any]]) -> None:
    """What every canonical stream promises."""
    heads = {(c["id"], c["created"], c["model"]) for c in chunks if "choices" in c}
    assert len(heads) <= 1
    ends: dict[int, int] = {}
    opened: dict[tuple[int, int], Any] = {}
    for made in chunks:
        if "error" in made:
            assert made is chunks[-1]
            continue
        assert "usage" not in made or (made is chunks[-1] and made["choices"] == [])
        for choice in made["choices"]:
            index, delta = choice["index"], choice["delta"]
            assert index not in ends, "something after the end"
            if choice["finish_reason"]:
                assert choice["finish_reason"] in router.ENDINGS
                ends[index] = 1
            assert all(delta.values()), "a member that carries nothing"
            for part in delta.get("tool_calls", ()):
                if (index, part["index"]) not in opened:
                    assert part["id"] and part[part["type"]]["name"]
                    opened[index, part["index"]] = part["id"]
                else:
                    assert "id" not in part
    for choice in {index for index, _ in opened}:
        mine = [at for index, at in opened if index == choice]
        ids = [id for (index, _), id in opened.items() if index == choice]
        assert mine == list(range(len(mine))) and len(set(ids)) == len(ids)


# --- recordings ---------------------------------------------------------------

# id -> (content begins, reasoning begins, calls, finish, (prompt, completion, total, cached,
# reasoning tokens), must a chat client get canonical chunks?)
EXPECTED: dict[str, tuple[Any, Any, Any, str, Any, bool]] = {
    "crusoe.chat.tool-calling.0": (
        None,
        "The user wants to know the weather",
        [("get_weather", '{"city": "Paris"}')],
        "tool_calls",
        (167, 37, 204, 0, 25),
        False,
    ),
    "deepseek.chat.thinking-stream.0": (
        "Hello there! 😊",
        'Hmm, the user just said "Hello".',
        [],
        "stop",
        (6, 212, 218, 0, 198),
        False,
    ),
    "google.chat.compatible-api-with-tool-calls-without-id.0": (
        None,
        None,
        [("get_current_time", "{}")],
        "tool_calls",
        (35, 12, 109, 0, 0),  # the total is more than the sum, and stays so
        True,
    ),
    "groq.chat.reasoning-wire-contract-groq-qwen3-effort-setting.0": (
        "4",
        "Okay, let's see...",
        [],
        "stop",
        (21, 173, 194, 0, 0),
        True,
    ),
    "groq.chat.tool-use-failed-error-streaming.1": (
        None,
        "We need to call the function",
        [("get_something_by_name", '{"name":"example"}')],
        "tool_calls",
        (304, 49, 353, 0, 23),
        False,
    ),
    "groq.chat.web-search-tool-stream.0": (
        "The weather in San Francisco today",
        "To find the current weather",  # after a <think> in three pieces
        [],
        "stop",
        (5003, 359, 5362, 0, 0),
        False,
    ),
    "huggingface.chat.max-completion-tokens.0": (
        "",
        'Hmm, the user just said "hello".',  # a <think> that never ends
        [],
        "length",
        (4, 100, 104, 0, 0),
        True,
    ),
    "mistral.chat.multimodal-tool-return-matrix-tool-return-content-url-image.1": (
        "The image shows a beautiful rose",
        None,
        [],
        "stop",
        (254, 93, 347, 48, 0),
        False,
    ),
    "mistral.chat.reasoning-wire-contract-mistral-small-thinking-high.0": (
        "4",
        "The user is asking for the result",
        [],
        "stop",
        (28, 35, 63, 0, 0),
        True,
    ),
    "mistral.chat.tool-choice-matrix-list-single-mistral.0": (
        None,
        None,
        [("get_weather", '{"city": "Paris"}')],
        "tool_calls",
        (70, 12, 82, 69, 0),
        True,
    ),
    "openai.chat.complex-agent-run-in-workflow.0": (
        None,
        None,
        [("get_country", "{}"), ("get_product_name", "{}")],
        "tool_calls",
        (364, 40, 404, 0, 0),
        False,
    ),
    "openrouter.chat.tool-optional-parameters.0": (
        "I'll search for education content",
        None,
        [("find_education_content", "{}")],  # came without arguments
        "tool_calls",
        (568, 48, 616, 0, 0),
        True,
    ),
    "openrouter.chat.with-native-options.0": (
        "I'm Grok",
        None,
        [],
        "stop",
        (687, 240, 927, 682, 165),
        False,
    ),
    "snowflake.chat.streaming.0": ("4", None, [], "stop", (22, 5, 27, 0, 0), False),
    "snowflake.chat.thinking.0": (
        "Sure! Let me check",
        "Let me get the weather for Mexico City.",
        [("get_weather", '{"city":"Mexico City"}')],
        "tool_calls",  # its own word is ""
        (597, 81, 678, 0, 0),
        True,
    ),
    "zai.chat.glm-5-3-reasoning-effort.0": (
        "2 + 2 = 4",
        "The user is asking a simple",
        [],
        "stop",
        (20, 125, 145, 0, 116),
        False,
    ),
}


@pytest.mark.parametrize("id", EXPECTED)
def test_recorded_answers_become_canonical(id: str) -> None:
    content, reasoning, made, ending, counts, odd = EXPECTED[id]
    reply, first = recorded(GOLDEN[id])
    (choice,) = reply["choices"]
    said = choice["message"]
    assert (said["content"] or "").startswith(content or "")
    assert (said["content"] is None) == (content is None)
    assert said.get("reasoning_content", "").startswith(reasoning or "")
    assert ("reasoning_content" in said) == (reasoning is not None)
    assert "<think" not in str(said) and "</think" not in str(said)
    found = [c["function"] for c in said.get("tool_calls", ())]
    assert [(f["name"], f["arguments"]) for f in found] == made
    assert choice["finish_reason"] == ending
    usage = reply["usage"]
    assert counts == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
        usage["total_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        usage["completion_tokens_details"]["reasoning_tokens"],
    )
    assert first is not None and router.needs_reading(first) is odd


CHATS = [r for r in GOLDEN.values() if r.api == "chat" and r.provider != "cohere"]
ALLOWED = {
    *("role", "content", "reasoning_content", "reasoning_details", "tool_calls"),
    *("refusal", "annotations", "audio"),
}


@pytest.mark.parametrize("recording", CHATS, ids=[r.id for r in CHATS])
def test_no_recording_leaves_vendor_keys(recording: Recording) -> None:
    reply, _ = recorded(recording)
    if recording.status != 200 or "error" in reply:
        assert set(reply) == {"error"} and set(reply["error"]) == {"message", "type", "code"}
        return
    assert set(reply) <= {"id", "object", "created", "model", "choices", "usage"}
    for choice in reply["choices"]:
        assert set(choice) <= {"index", "message", "finish_reason", "stop_sequence"}
        assert set(choice["message"]) <= ALLOWED


@pytest.mark.parametrize("recording", CHATS, ids=[r.id for r in CHATS])
def test_what_is_canonical_stays_as_it_is(recording: Recording) -> None:
    reply, _ = recorded(recording)
    before = copy.deepcopy(reply)
    again = router.canonical_reply(reply, recording.provider)
    assert reply == before
    for said in (again, reply):  # a head that was empty gets an id each time
        said["id"] = said.get("id") and "id"
    assert "error" in reply or again == reply


def test_snowflakes_signature_and_googles_are_kept() -> None:
    reply, _ = recorded(GOLDEN["snowflake.chat.thinking.0"])
    (piece,) = reply["choices"][0]["message"]["reasoning_details"]
    assert piece["signature"].startswith("EvABCmc") and piece["origin"] == "snowflake"
    reply, _ = recorded(GOLDEN["google.chat.compatible-api-with-tool-calls-without-id.0"])
    (made,) = reply["choices"][0]["message"]["tool_calls"]
    assert NEW_ID.fullmatch(made["id"])
    assert made["extra_content"]["google"]["thought_signature"].startswith("AVSoXO4A")


def test_errors_inside_a_recorded_stream_end_it() -> None:
    for id, words in (
        ("openrouter.chat.stream-error.0", "Token limit reached"),
        ("groq.chat.tool-use-failed-error-streaming.0", "Tool call validation failed"),
    ):
        reply, _ = recorded(GOLDEN[id])
        assert reply["error"]["message"].startswith(words)
    assert reply["error"]["code"] == "tool_use_failed"


# --- text ---------------------------------------------------------------------


def test_plain_text_is_passed_on_at_once() -> None:
    reader = router.ChatReader("here")
    assert reader.feed(chunk({"role": "assistant", "content": ""})) == []
    (first,) = reader.feed(chunk({"role": "assistant", "content": "Hel"}, obfuscation="x"))
    (second,) = reader.feed({**chunk({"content": "lo"}), "id": "c2", "usage": None})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "Hel"}
    assert second == {**first, "choices": [{**first["choices"][0], "delta": {"content": "lo"}}]}
    assert set(second) == {"id", "object", "created", "model", "choices"}
    assert not reader.finished
    assert reader.feed(chunk({}, "stop")) == [] and reader.finished
    (end,) = reader.finish()
    assert end["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert reader.finish() == [] and reader.feed(chunk({"content": "late"})) == []


@pytest.mark.parametrize("id", ["", None, 5, []])
def test_an_answer_without_an_id_gets_one(id: Any) -> None:
    heads = {c["id"] for c in read(chunk({"content": "a"}, id=id), chunk({"content": "b"}, id="x"))}
    (made,) = heads
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{24}", made)


def test_choices_are_kept_apart() -> None:
    both = {
        **chunk(),
        "choices": [{"index": at, "delta": {"content": text}} for at, text in ((1, "b"), (0, "a"))],
    }
    reply = answer(both, chunk({"content": "B"}, "length", 1), chunk({"content": "A"}, "stop", 0))
    found = [(c["index"], c["message"]["content"], c["finish_reason"]) for c in reply["choices"]]
    assert found == [(0, "aA", "stop"), (1, "bB", "length")]


def test_a_message_may_come_instead_of_a_delta_or_beside_it() -> None:
    told = {**chunk(), "choices": [{"index": 0, "message": {"content": "Hi"}}]}
    assert message(told)["content"] == "Hi"
    assert message(told, told)["content"] == "HiHi"  # a message on each chunk is a delta
    growing = [
        {"index": 0, "delta": {"content": new}, "message": {"content": so_far}}
        for new, so_far in (("Hel", "Hel"), ("lo", "Hello"), ("", "Hello"))
    ]
    assert message(*({**chunk(), "choices": [c]} for c in growing))["content"] == "Hello"
    last = {**chunk(), "choices": [{"index": 0, "message": {"content": "Hello"}}]}
    assert message(chunk({"content": "Hello"}), last)["content"] == "Hello"
    assert whole({"content": "Hi"})["choices"][0]["message"]["content"] == "Hi"


def test_an_empty_answer_has_empty_content() -> None:
    assert message(chunk({"content": None}), chunk({}, "length")) == {
        "role": "assistant",
        "content": "",
    }
    assert message(chunk({"refusal": "No."}))["content"] is None


def test_notes_refusals_and_sound_are_passed_on_once() -> None:
    note = {"type": "url_citation", "url_citation": {"url": "http://a", "title": "A"}}
    said = message(
        chunk({"content": "x", "annotations": [note], "refusal": "", "audio": {"data": ""}}),
        chunk({"annotations": [note], "audio": {"id": "s", "data": "AA"}}),
        chunk({"audio": {"data": "BB"}, "refusal": "No"}),
        chunk({"refusal": "pe"}, citations=["http://b"]),
    )
    assert said["annotations"] == [note]
    assert said["audio"] == {"id": "s", "data": "AABB"} and said["refusal"] == "Nope"


def test_sources_beside_the_choices_become_notes() -> None:
    events = [chunk({"content": word}, citations=["http://a", 3]) for word in ("a", "b")]
    assert [n["url_citation"]["url"] for n in message(*events)["annotations"]] == ["http://a"]


# --- reasoning ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_has_many_names(name: str) -> None:
    said = message(chunk({name: "Hm"}), chunk({name: "m.", "content": "4"}), chunk({name: None}))
    assert said == {"role": "assistant", "content": "4", "reasoning_content": "Hmm."}


def test_what_was_only_thought_is_said_where_nothing_else_was() -> None:
    thought = [chunk({"reasoning": "It is "}), chunk({"reasoning": "four."})]
    said = message(*thought, chunk(finish="stop"))
    assert (said["content"], said["reasoning_content"]) == ("It is four.", "It is four.")
    assert (
        whole({"content": "", "reasoning_content": "4"})["choices"][0]["message"]["content"] == "4"
    )
    assert message(chunk({"content": "<think>4</think>"}), chunk(finish="stop"))["content"] == "4"
    for end in ("length", "content_filter", None):
        assert not message(*thought, chunk(finish=end)).get("content")
    for other in ({"content": "No."}, {"refusal": "No."}, call(name="f", id="1")):
        assert "four" not in str(message(*thought, chunk(other), chunk(finish="stop"))["content"])


def test_reasoning_given_three_times_is_read_once() -> None:
    events = [
        chunk(
            {
                "reasoning": text,
                "reasoning_content": text,
                "reasoning_details": [{"type": "reasoning.text", "text": text, "index": 0}],
            }
        )
        for text in ("Hm", "m.")
    ]
    signed = [{"type": "reasoning.text", "signature": "sig", "index": 0, "text": None}]
    said = message(*events, chunk({"reasoning": None, "reasoning_details": signed}))
    assert said["reasoning_content"] == "Hmm."
    assert said["reasoning_details"] == [
        {
            "type": "reasoning.text",
            "text": "Hmm.",
            "index": 0,
            "signature": "sig",
            "origin": "here",
        }
    ]


def test_summaries_join_and_secrets_do_not() -> None:
    secret = {"type": "reasoning.encrypted", "data": "xx", "index": 0}
    said = message(
        chunk({"reasoning_details": [{"type": "reasoning.summary", "summary": "a", "index": 0}]}),
        chunk({"reasoning_details": [{"type": "reasoning.summary", "summary": "b", "index": 0}]}),
        chunk({"reasoning_details": [{"type": "reasoning.summary", "summary": "c", "index": 1}]}),
        chunk({"reasoning_details": [secret]}),
        chunk({"reasoning_details": [secret, 5, None]}),
    )
    assert said["reasoning_content"] == "abc"
    found = [d.get("summary") or d["data"] for d in said["reasoning_details"]]
    assert found == ["ab", "c", "xx", "xx"]


THOUGHTS = [  # content, thought, said
    ("<think>a</think>b", "a", "b"),
    ("\n <think>\n\na b\n</think>\n\n b <think>c</think>", "a b\n", "b <think>c</think>"),
    ("<thinking>a</think></thinking>b", "a</think>", "b"),
    ("<thought>a</thought> b", "a", "b"),
    ("<think></think>b", "", "b"),
    ("<think>a", "a", ""),
    ("<think>a</thi", "a</thi", ""),
    ("<thin", "", "<thin"),
    ("<think", "", "<think"),
    ("<thinker>a</think>", "", "<thinker>a</think>"),
    ("a <think>b</think>", "", "a <think>b</think>"),
    ("</think>b", "", "</think>b"),
    ("  ", "", "  "),
    ("  b ", "", "  b "),
    (" " * 2000 + "<think>a</think>", "", " " * 2000 + "<think>a</think>"),
]


@pytest.mark.parametrize(("text", "thought", "said"), THOUGHTS)
def test_think_tags_in_the_content(text: str, thought: str, said: str) -> None:
    for size in (1, 2, 3, 5, 7, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        found = message(*(chunk({"content": piece}) for piece in pieces))
        assert (found.get("reasoning_content", ""), found["content"]) == (thought, said)


def test_think_tags_inside_reasoning_are_dropped() -> None:
    text = "<think>\na < b</think>\n<thinking>c<thin"
    for size in (1, 2, 3, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        found = message(*(chunk({"reasoning": piece}) for piece in pieces))
        assert found["reasoning_content"] == "a < bc<thin"


def test_content_in_parts_may_become_plain_strings() -> None:
    def thinking(text: str) -> list[dict[str, Any]]:
        return [{"type": "thinking", "thinking": [{"type": "text", "text": text}, 5]}]

    said = message(
        chunk({"content": ""}),
        chunk({"content": thinking("Hm")}),
        chunk({"content": [*thinking("m."), {"type": "text", "text": "4"}, "!", 7]}),
        chunk({"content": " Yes"}),
    )
    assert said == {"role": "assistant", "content": "4! Yes", "reasoning_content": "Hmm."}


# --- tool calls ---------------------------------------------------------------

WHOLE = [("call_a", "f", '{"x":1}')]


@pytest.mark.parametrize(
    "deltas",
    [
        [call(id="call_a", name="f", arguments='{"x":1}')],
        [call(id="call_a", name="f", arguments=""), call(arguments='{"x"'), call(arguments=":1}")],
        [call(id="call_a", name="f", arguments=None), call(arguments='{"x":1}')],
        [call(id="call_a", name="f", arguments={"x": 1})],
        [call(id="call_a", name="f", arguments={}), call(arguments='{"x":1}')],
        [call(id="call_a", arguments='{"x"'), call(arguments=":"), call(name="f", arguments="1}")],
        [call(name="f", arguments=""), call(id="call_a", arguments='{"x":1}')],
        [call(id="call_a", name="f", arguments=piece) for piece in ('{"x', '":', "1}", "")],
        [call(None, type=None, id="call_a", name="f", arguments=p) for p in ('{"x', '":1}')],
        [
            call(None, type=None, id="call_a", name="f", arguments=""),
            call(None, type=None, arguments='{"x":1}'),
        ],
        [call("0", id="call_a", name="f", arguments='{"x":1}'), call(0.0, arguments=None)],
        [call(id="call_a", name="f", arguments='{"x":1}')] * 2,  # the whole call once more
        [call(id=id, name=name, arguments=p) for id, name, p in (
            ("call_a", "f", '{"x'), ("other", None, '":1'), ("third", None, "}")
        )],
        [{"tool_calls": []}, {"tool_calls": 0}, call(id="call_a", name="f", arguments='{"x":1}')],
        [{"tool_calls": [{"id": "call_a", "name": "f", "arguments": {"x": 1}}]}],
        [{"tool_calls": call(id="call_a", name="f", arguments='{"x":1}')["tool_calls"][0]}],
        [call(id="call_a", name="f", arguments='{"x":1}'), {"function_call": {"name": "f"}}],
        [call(id="call_a", name="f", arguments='{"x":1}'), {"function_call": {"name": ""}}],
    ],
)  # fmt: skip
def test_one_call_in_many_shapes(deltas: list[dict[str, Any]]) -> None:
    events = [chunk(delta) for delta in deltas]
    check_canonical(read(*events))
    assert calls(*events, chunk({}, "stop")) == WHOLE
    assert finish(*events, chunk({}, "stop")) == "tool_calls"


@pytest.mark.parametrize("empty", [None, "", {}])
def test_a_call_without_arguments_has_an_empty_object(empty: Any) -> None:
    assert calls(chunk(call(id="call_a", name="f", arguments=empty))) == [("call_a", "f", "{}")]
    assert calls(
        chunk(call(0, id="call_a", name="f", arguments=empty)),
        chunk(call(1, id="call_b", name="g", arguments='{"y":2}')),
    ) == [("call_a", "f", "{}"), ("call_b", "g", '{"y":2}')]


@pytest.mark.parametrize(
    "deltas",
    [
        [call(0, id="a", name="f"), call(1, id="b", name="g")],
        [call(0, id="a", name="f"), call(0, id="b", name="g")],  # the same index
        [call(0, id="a", name="f"), call(0, id="b", name="f")],
        [call(None, id="a", name="f"), call(None, id="b", name="f")],
        [call(0, id="", name="f"), call(0, id="", name="f")],  # gemini
        [call(0, name="f"), call(0, name="g")],
        [call(None, name="f", arguments={"a": 1}), call(None, name="g", arguments={"b": 1})],
        [call(0, id="x", name="f"), call(1, id="x", name="g")],  # the same id
        [call(None, id="x", name="f"), call(None, id="x", name="g")],
        [{"tool_calls": [{"function": {"name": "f"}}, {"function": {"name": "f"}}]}],
        [call(3, id="a", name="f"), call(7, id="b", name="g")],
    ],
)
def test_two_calls_are_two(deltas: list[dict[str, Any]]) -> None:
    events = [chunk(delta) for delta in deltas]
    check_canonical(read(*events))
    first, second = calls(*events)
    assert first[0] and second[0] and first[0] != second[0]
    assert [first[1], second[1]] in (["f", "f"], ["f", "g"])
    told = deltas[0] if len(deltas) == 1 else {
        "tool_calls": [part for delta in deltas for part in delta["tool_calls"]]
    }  # fmt: skip
    again = whole(told)["choices"][0]["message"]["tool_calls"]
    assert [c["function"]["name"] for c in again] == [first[1], second[1]]


def test_deltas_of_parallel_calls_find_their_call() -> None:
    assert calls(
        chunk(call(0, id="a", name="f", arguments='{"x"')),
        chunk(call(1, id="b", name="g", arguments='{"y"')),
        chunk(call(0, arguments=":1}")),
        chunk(call(None, id="b", arguments=":2}")),
    ) == [("a", "f", '{"x":1}'), ("b", "g", '{"y":2}')]


@pytest.mark.parametrize("id", ["", None, [], {}])
def test_a_call_without_an_id_gets_one(id: Any) -> None:
    part = {"index": 0, "id": id, "function": {"name": "f", "arguments": "{}"}}
    ((made, name, arguments),) = calls(chunk({"tool_calls": [part]}))
    assert NEW_ID.fullmatch(made) and (name, arguments) == ("f", "{}")


def test_a_call_without_a_name_is_none() -> None:
    events = [chunk({**call(id="a"), "content": "x"}), chunk({}, "tool_calls")]
    assert calls(*events) == [] and finish(*events) == "stop"


def test_the_old_function_call_is_a_tool_call() -> None:
    def old(**members: Any) -> dict[str, Any]:
        return chunk({"function_call": members})

    events = [old(name="f", arguments=""), old(arguments='{"x"'), old(arguments=":1}")]
    ((id, name, arguments),) = calls(*events, chunk({}, "function_call"))
    assert (name, arguments) == ("f", '{"x":1}') and NEW_ID.fullmatch(id)
    assert finish(*events, chunk({}, "function_call")) == "tool_calls"
    assert calls(old(name="", arguments="")) == []


def test_everything_in_one_chunk() -> None:
    delta = {"role": "assistant", "content": "So:", "reasoning": "Hm", **call(id="a", name="f")}
    told = read(chunk(delta, "stop", usage={"prompt_tokens": 3, "completion_tokens": 4}))
    check_canonical(told)
    reply = router.gathered_reply(told)
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "tool_calls" and reply["usage"]["total_tokens"] == 7
    said = choice["message"]
    assert (said["content"], said["reasoning_content"]) == ("So:", "Hm")
    assert len(said["tool_calls"]) == 1


def test_blank_text_before_calls_is_dropped() -> None:
    assert message(chunk({"content": "\n\n"}), chunk(call(id="a", name="f")))["content"] is None


def test_a_custom_tool_keeps_its_input() -> None:
    begun = {"index": 0, "id": "a", "type": "custom", "custom": {"name": "sh", "input": "l"}}
    more = {"index": 0, "custom": {"input": "l"}}
    (made,) = message(chunk({"tool_calls": [begun]}), chunk({"tool_calls": [more]}))["tool_calls"]
    assert made == {"id": "a", "type": "custom", "custom": {"name": "sh", "input": "ll"}}


def test_signatures_stay_with_their_call() -> None:
    def extra(*deltas: dict[str, Any]) -> list[Any]:
        made = message(*(chunk(delta) for delta in deltas))["tool_calls"]
        return [c.get("extra_content") for c in made]

    google = {"google": {"thought_signature": "sig"}}
    one, two = call(0, id="a", name="f"), call(1, id="b", name="g")
    assert extra(call(id="a", name="f", extra_content=google), two) == [google, None]
    assert extra(call(id="a", name="f", thought_signature="sig")) == [google]
    assert extra(one, call(0, arguments=None, extra_content=google)) == [google]
    assert extra({"thought_signature": "sig"}, one, two) == [google, None]
    assert extra(one, two, {"extra_content": google}) == [google, None]


# --- the end ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("stop", "stop"),
        ("eos", "stop"),
        ("end_turn", "stop"),
        ("COMPLETE", "stop"),
        ("STOP", "stop"),
        ("something new", "stop"),
        ("", "stop"),
        (None, "stop"),
        (7, "stop"),
        ("tool_use", "stop"),  # but no call was made
        ("max_tokens", "length"),
        ("MAX_TOKENS", "length"),
        ("model_length", "length"),
        ("SAFETY", "content_filter"),
        ("refusal", "content_filter"),
    ],
)
def test_finish_words(word: Any, meaning: str) -> None:
    assert finish(chunk({"content": "a"}, word)) == meaning
    made = finish(chunk(call(id="a", name="f")), chunk({}, word))
    assert made == ("tool_calls" if meaning == "stop" else meaning)


def test_every_finish_word_has_a_known_meaning() -> None:
    assert set(router.FINISH_MEANINGS.values()) == router.ENDINGS | {"error"}
    assert all(word == word.lower() for word in router.FINISH_MEANINGS)
    assert sum(len(words.split()) for _, words in router.FINISH_WORDS) == len(
        router.FINISH_MEANINGS
    )


def test_a_finish_comes_once_and_last() -> None:
    told = read(
        chunk({"content": "a"}, "length"),
        chunk({"content": "b"}, "length"),
        chunk({}, None, usage={"prompt_tokens": 1}),
    )
    check_canonical(told)
    reply = router.gathered_reply(told)
    assert reply["choices"][0]["message"]["content"] == "ab"
    assert reply["choices"][0]["finish_reason"] == "length"


def test_an_error_word_is_an_error() -> None:
    told = read(chunk({"content": "a"}), chunk({}, "error"), chunk({"content": "b"}))
    assert told[-1]["error"]["code"] == "finish_error" and len(told) == 2
    assert whole({"content": "a"}, "error")["error"]["type"] == "upstream_error"


def test_an_error_event_ends_the_stream() -> None:
    reader = router.ChatReader("here")
    reader.feed(chunk({"content": "a"}))
    told = reader.feed({"error": {"message": "overloaded", "code": 503}, "choices": []})
    assert told == [{"error": {"message": "overloaded", "type": "upstream_error", "code": "503"}}]
    assert reader.feed(chunk({"content": "b"})) == [] and reader.finish() == []
    assert not reader.finished


def test_the_stop_sequence_is_told() -> None:
    def stopped(**members: Any) -> Any:
        event = chunk({"content": "a"}, "stop")
        event["choices"][0].update(members)
        return answer(event)["choices"][0].get("stop_sequence")

    assert stopped(stop_reason="END") == "END" == stopped(matched_stop="END")
    assert stopped(stop_reason=199999) is None and stopped(stop_reason="end_turn") is None


# --- usage --------------------------------------------------------------------


def counts(usage: Any) -> tuple[int, ...]:
    found = router.canonical_usage({"usage": usage})
    return (
        found["prompt_tokens"],
        found["completion_tokens"],
        found["total_tokens"],
        found["prompt_tokens_details"]["cached_tokens"],
        found["completion_tokens_details"]["reasoning_tokens"],
    )


BASE = {"prompt_tokens": 10, "completion_tokens": 5}


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (BASE, (10, 5, 15, 0, 0)),
        ({**BASE, "total_tokens": 99}, (10, 5, 99, 0, 0)),
        ({"prompt_tokens": 10.0, "completion_tokens": "5"}, (10, 5, 15, 0, 0)),
        ({"prompt_tokens": None, "completion_tokens": True, "total_tokens": 3}, (0, 0, 3, 0, 0)),
        ({"prompt_tokens": -1, "completion_tokens": 2}, (0, 2, 2, 0, 0)),
        ({**BASE, "prompt_tokens_details": {"cached_tokens": 4}}, (10, 5, 15, 4, 0)),
        ({**BASE, "prompt_cache_hit_tokens": 4}, (10, 5, 15, 4, 0)),
        ({**BASE, "num_cached_tokens": 4}, (10, 5, 15, 4, 0)),
        ({**BASE, "cached_tokens": 4, "prompt_tokens_details": None}, (10, 5, 15, 4, 0)),
        ({**BASE, "completion_tokens_details": {"reasoning_tokens": 3}}, (10, 5, 15, 0, 3)),
        ({"input_tokens": 10, "output_tokens": 5, "reasoning_tokens": 3}, (10, 5, 15, 0, 3)),
    ],
)
def test_usage_spellings(usage: Any, expected: tuple[int, ...]) -> None:
    assert counts(usage) == expected
    assert counts(router.canonical_usage({"usage": usage})) == expected


@pytest.mark.parametrize("usage", [None, {}, [], "x", 5, {"cost": 1}, {"prompt_tokens": None}])
def test_no_usage(usage: Any) -> None:
    assert router.canonical_usage({"usage": usage}) is None
    assert router.canonical_usage(usage) is None


@pytest.mark.parametrize(
    "events",
    [
        [chunk({}, "stop"), {"choices": [], "usage": BASE}],
        [chunk({}, "stop", usage=BASE)],
        [chunk({}, "stop"), chunk({"content": ""}, None, usage=BASE)],
        [chunk({}, "stop", x_groq={"usage": BASE})],
        [chunk({}, "stop", x_groq={"usage": BASE}, usage=BASE)],
        [{**chunk(), "choices": [{"index": 0, "finish_reason": "stop", "usage": BASE}]}],
        [chunk({}, None, usage={"prompt_tokens": 1}), chunk({}, "stop", usage=BASE)],
        [chunk({}, "stop", usage=BASE), {"choices": [], "usage": {"prompt_tokens": 0}}],
        [chunk({}, "stop", usage=BASE), {"choices": [], "usage": None}],
    ],
)
def test_usage_may_stand_anywhere(events: list[dict[str, Any]]) -> None:
    told = read(chunk({"content": "a"}, usage=None), *events)
    check_canonical(told)
    assert told[-1]["usage"]["total_tokens"] == 15


def test_cache_writes_and_estimates() -> None:
    usage = {**BASE, "prompt_tokens_details": {"cache_write_tokens": 6}}
    found = router.canonical_usage({"usage": usage})
    assert found["prompt_tokens_details"] == {"cached_tokens": 0, "cache_creation_tokens": 6}
    guess = router.estimate_usage(100, 41)
    assert (guess["completion_tokens"], guess["total_tokens"]) == (11, 111)
    assert guess["hermes"] and router.canonical_usage({"usage": guess}) == guess


# --- arguments ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("", {}),
        (" null ", {}),
        ('{"a": 1}', {"a": 1}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('```{"a": "```"}```', {"a": "```"}),
        ('{"a": 1}}', {"a": 1}),
        ('{"a": 1} I hope this helps', {"a": 1}),
        ('{"a": [1, 2,], }', {"a": [1, 2]}),
        ('{"a": True, "b": None, "c": "True, ]"}', {"a": True, "b": None, "c": "True, ]"}),
        ('"{\\"a\\": 1}"', {"a": 1}),
        ('{"a": "x\ny"}', {"a": "x\ny"}),
        ('{}{"a": 1}', {"a": 1}),
        ('{"a": 1}{"a": 1}', {"a": 1}),
        ('{"a": "half', None),
        ('{"a": {"b": 1}', None),
        ("[1]", None),
        ("5", None),
        ('"text"', None),
        ("rm -rf", None),
        ('{"a": NaN}', None),
        ('{"a": 1e999}', None),
        ("```", None),
        ("[" * 100_000, None),
        ('{"a":' * 100_000, None),
        ('"' + '\\"' * 100_000, None),
    ],
)
def test_repaired_arguments(text: str, repaired: Any) -> None:
    found = router.repaired_arguments(text)
    assert found is None if repaired is None else json.loads(found or "") == repaired


def test_valid_arguments_are_not_rewritten() -> None:
    assert router.repaired_arguments('{"a" : 1.0}') == '{"a" : 1.0}'


# --- must it be read at all? --------------------------------------------------


@pytest.mark.parametrize(
    ("event", "odd"),
    [
        (chunk({"content": "Hello"}), False),
        (chunk({"content": " Hello"}), False),
        (chunk({"content": "a <think>"}), False),
        (chunk({"content": "<div>"}), False),
        (chunk({"reasoning_content": "Hm", "content": None}), False),
        (chunk(call(id="a", name="f", arguments="")), False),
        (chunk({"content": "a"}, "stop"), False),
        (chunk({"content": "<think>"}), True),
        (chunk({"content": "\n<thinking>\nSo"}), True),
        (chunk({"content": "<"}), True),
        (chunk({"content": "\n"}), True),
        (chunk({"content": [{"type": "thinking"}]}), True),
        (chunk({"content": "a"}, "eos"), True),
        (chunk({"content": "a"}, ""), True),
        (chunk({"content": "a"}, []), True),
        (chunk(call(id="", name="f")), True),
        (chunk(call(None, id="a", name="f")), True),
        (chunk(call(id="a", name="f", arguments={"x": 1})), True),
        (chunk(call(id="a", name="f", type=None)), True),
        (chunk({"tool_calls": 5}), True),
        (chunk({"function_call": {"name": "f"}}), True),
        ({"choices": [{"message": {"content": "a"}}]}, True),
        (chunk(call(id="a", name="f"), "stop"), True),
        ({"choices": 5}, False),
        ([], False),
    ],
)
def test_needs_reading(event: Any, odd: bool) -> None:
    assert router.needs_reading(event) is odd


# --- properties ---------------------------------------------------------------

WORDS = [
    "<think>",
    "</think>",
    "<thinking>",
    "</thinking>",
    "<thin",
    "</",
    "<",
    ">",
    "\n",
    " ",
    "x",
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    """`text` in pieces, some of them empty."""
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@settings(deadline=None, max_examples=300)
@given(TEXTS, st.data())
def test_think_tags_may_be_cut_anywhere(text: str, data: st.DataObject) -> None:
    splitter = router.ThinkSplitter()
    found = [splitter.feed(piece) for piece in data.draw(cut(text))] + [splitter.finish()]
    other = router.ThinkSplitter()
    expected = [other.feed(text), other.finish()]
    for side in (0, 1):
        assert "".join(p[side] for p in found) == "".join(p[side] for p in expected)
    stripper, again = router.TagStripper(), router.TagStripper()
    pieces = [stripper.feed(piece) for piece in data.draw(cut(text))]
    assert "".join(pieces) + stripper.finish() == again.feed(text) + again.finish()


ARGUMENTS = st.dictionaries(
    st.text(max_size=3), st.integers() | TEXTS | st.dictionaries(TEXTS, TEXTS, max_size=1)
).map(json.dumps)
CALLS = st.builds(
    lambda name, arguments: {"name": name, "arguments": arguments},
    st.sampled_from("fg"),
    ARGUMENTS | st.just(""),
)
MESSAGES = st.fixed_dictionaries(
    {"content": st.none() | TEXTS},
    optional={
        "reasoning": TEXTS,
        "reasoning_content": TEXTS,
        "refusal": st.text(max_size=4),
        "tool_calls": st.lists(CALLS, max_size=3).map(
            lambda made: [
                {"id": f"id{at}", "type": "function", "function": body}
                for at, body in enumerate(made)
            ]
        ),
    },
)


@st.composite
def streamed(draw: st.DrawFn, said: dict[str, Any]) -> list[dict[str, Any]]:
    """The deltas of a stream that says the same as a whole message."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    reasoning = [name for name in ("reasoning", "reasoning_content") if name in said]
    same = {name: said[reasoning[0]] for name in reasoning}
    if same:
        pieces = draw(cut(same[reasoning[0]]))
        deltas += [{name: piece for name in same} for piece in pieces]
    for name in ("content", "refusal"):
        deltas += [{name: piece} for piece in draw(cut(said.get(name) or ""))]
    keep_id, keep_name = draw(st.booleans()), draw(st.booleans())
    for at, made in enumerate(said.get("tool_calls", ())):
        pieces = draw(cut(made["function"]["arguments"]))
        for n, piece in enumerate(pieces):
            function = {"arguments": piece}
            if not n or keep_name:
                function["name"] = made["function"]["name"]
            part = {"index": at, "function": function}
            if not n or keep_id:
                part |= {"id": made["id"], "type": "function"}
            deltas.append({"tool_calls": [part]})
    if draw(st.booleans()) and len(deltas) > 1:  # the last two in one
        last = deltas.pop()
        deltas.append({**deltas.pop(), **last} if not deltas[-1].keys() & last else last)
    return deltas


@settings(deadline=None, max_examples=300)
@given(MESSAGES, st.sampled_from(["stop", "length", "", None]), st.data())
def test_a_stream_says_the_same_as_the_whole(
    said: dict[str, Any], word: str | None, data: st.DataObject
) -> None:
    if "reasoning" in said and "reasoning_content" in said:
        said["reasoning_content"] = said["reasoning"]
    deltas = data.draw(streamed(said))
    told = read(*map(chunk, deltas), chunk({}, word))
    check_canonical(told)
    reply = router.gathered_reply(told)
    expected = whole(said, word)
    assert reply["choices"] == expected["choices"]
    for made in reply["choices"][0]["message"].get("tool_calls", ()):
        assert isinstance(json.loads(made["function"]["arguments"]), dict)


MEMBERS = """
    index id type function custom name arguments input content text thinking reasoning delta
    message reasoning_content reasoning_details signature summary data tool_calls function_call
    extra_content google thought_signature audio annotations refusal finish_reason stop_reason
    usage prompt_tokens completion_tokens total_tokens prompt_tokens_details cached_tokens
    citations search_results url error x_groq created model code status
"""
NAMES = st.sampled_from(MEMBERS.split())
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.floats(),
    st.sampled_from(["", "<think>", "a", "{}", "stop", "thinking", "reasoning.text", "custom"]),
    st.text(max_size=3),
)
ANY = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=20,
)


@st.composite
def noise(draw: st.DrawFn) -> Any:
    """Anything at all, more often than not in the shape of a chunk."""
    if draw(st.integers(0, 5)) == 0:
        return draw(ANY)
    members = draw(st.dictionaries(NAMES.filter(lambda n: n != "error"), ANY, max_size=2))
    deltas = st.dictionaries(NAMES, ANY, max_size=5)
    choice = draw(st.dictionaries(NAMES, ANY, max_size=2))
    choice["delta"] = draw(deltas | ANY)
    if draw(st.booleans()):
        choice["delta"] = {"tool_calls": draw(st.lists(deltas | ANY, max_size=3))}
    return {**members, "choices": draw(st.lists(st.just(choice) | ANY, max_size=2))}


@settings(deadline=None, max_examples=400)
@given(st.lists(noise(), max_size=5))
def test_no_json_makes_a_reader_fall(events: list[Any]) -> None:
    before = copy.deepcopy(events)
    told = read(*events)
    assert repr(events) == repr(before)  # nan is not equal to itself
    check_canonical(told)
    router.gathered_reply(told)
    for event in events:
        router.canonical_usage(event)
        router.needs_reading(event)
        reply = router.canonical_reply(event, "here")
        assert "error" in reply or isinstance(reply["choices"], list)


LETTERS = [*'{}[]",:\\ `a1', "True", "None", "```"]


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=30) | st.lists(st.sampled_from(LETTERS)).map("".join))
def test_repaired_arguments_are_json_or_none(text: str) -> None:
    found = router.repaired_arguments(text)
    assert found is None or isinstance(json.loads(found), dict)
