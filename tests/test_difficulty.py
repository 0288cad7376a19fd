"""Difficulty: what is asked decides, not what surrounds it; and nothing makes it fall over."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import router


def level(text, **fields):
    return router.rate_difficulty({"messages": [{"role": "user", "content": text}], **fields}).level


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hi", 4),
        ("what is 2+2", 5),
        ("translate this to French: hello", 5),
        ("yes or no: is 7 prime", 5),
        ("please summarize this", 2),
        ("def f(): pass", 3),
        ("implement quicksort def f", 1),
        ("explain how TCP works", 2),
        pytest.param("a " * 210, 4, id="420 characters"),
        pytest.param("what is " + "a " * 190, 5, id="388 characters, simple"),
        pytest.param("b " * 650, 3, id="1300 characters"),
        pytest.param("c " * 1650, 2, id="3300 characters"),
        pytest.param("d " * 4100, 1, id="8200 characters"),
        ("class of 1999", 3),
        ("", 4),
    ],
)
def test_recorded_levels(text, expected):
    assert level(text) == expected
    assert level([{"type": "text", "text": text}]) == expected


COMPLEX = (
    "implement|design|architect|debug|refactor|algorithm|optimize|analyze|build|develop|summarize|"
    "explain how|compare|research|create a plan|generate|convert|migrate|write tests|test cases|"
    "step by step|walk me through|help me understand"
)
SIMPLE = (
    "what is|who is|define|translate|yes or no|how many|give me a number|true or false|in one word|"
    "spell|what does|one sentence|yes or no answer|what year|what time|how old"
)


@pytest.mark.parametrize("words", COMPLEX.split("|"))
def test_complex_words(words):
    assert level(f"Please {words.upper()}, it") == 2
    assert level(f"{words}\n```\nx\n```") == 1
    assert level(f"x{words}y") == 4


@pytest.mark.parametrize("words", SIMPLE.split("|"))
def test_simple_words(words):
    assert level(f"{words.capitalize()} that?") == 5
    assert level(f"x{words}y") == 4


@pytest.mark.parametrize(
    "text", ["```", "def x", "a function of", "my class is", "import os", "IMPORT\tos", "class\nx"]
)
def test_code(text):
    assert level(text) == 3


@pytest.mark.parametrize(
    "text", ["building a class", "importance of x", "classes", "a buildup", "undefined", "spelling"]
)
def test_parts_of_words_do_not_count(text):
    assert level(text) == 4


def test_phrases_survive_line_breaks_and_punctuation():
    assert level("walk me\n  through it") == 2
    assert level("do it step-by-step") == 2
    assert level("Yes, or no?") == 5


# ---- the last user turn decides


def asked(text, *, system="", history=(), tools=()):
    messages = [{"role": "system", "content": system}, *history, {"role": "user", "content": text}]
    return router.rate_difficulty({"messages": messages, "tools": list(tools)}).level


AGENT = "Implement, design and refactor code.\n```\nimport os\n```\n" * 2000
TOOL = {"type": "function", "function": {"name": "f", "description": "Build a class. " * 40}}


def test_a_system_prompt_and_tools_never_make_a_request_critical():
    assert asked("hi", system=AGENT) > 1
    assert asked("hi", tools=[TOOL] * 500) > 1
    assert asked("hi", system=AGENT, tools=[TOOL] * 500) > 1
    assert asked("what is 2+2", system="You implement and design things. Be brief.") == 5


def test_an_agents_long_past_is_complex_not_critical():
    turn = [{"role": "user", "content": AGENT}, {"role": "assistant", "content": AGENT}]
    assert asked("go on", history=turn * 3) == 2
    assert asked("go on", system=AGENT, history=turn * 3, tools=[TOOL] * 100) == 2
    assert asked("implement it:\n```\nx\n```", history=turn) == 1


def test_words_are_those_of_the_last_user_turn_even_in_a_tool_loop():
    loop = [
        {"role": "user", "content": "summarize the file"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "tool_call_id": "1", "content": "def f(): pass"},
    ]
    assert router.rate_difficulty({"messages": loop}).level == 2
    assert asked("thanks", history=loop) == 4


def test_history_counts_for_size():
    assert asked("and now?", history=[{"role": "assistant", "content": "x" * 3000}]) == 4
    assert asked("and now?", history=[{"role": "assistant", "content": "x" * 6000}]) == 3


def test_only_the_ends_of_a_long_turn_are_read():
    filler = "x " * 3500
    assert level(f"implement {filler}") == level(f"{filler} implement") == 2
    assert level(f"def f {filler} implement") == 1


# ---- robustness and cost


@pytest.mark.parametrize(
    "chat",
    [
        {},
        {"messages": None},
        {"messages": "hi"},
        {"messages": {"role": "user"}},
        {"messages": [None, 3, "hi", [], {}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": {"type": "text", "text": "x"}}]},
        {"messages": [{"role": "user", "content": [None, 3, {}, {"text": 5}, {"text": None}]}]},
        {"messages": [{"role": ["user"], "content": 1.5}]},
        {"messages": [{"role": "user", "content": "\ud800\x00"}]},
        {"messages": [], "tools": 5},
        {"messages": [], "tools": [None, {"function": None}, {"function": {"description": 1}}]},
        None,
        [],
    ],
)
def test_malformed_requests_count_as_empty(chat):
    assert router.rate_difficulty(chat).level == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "text", "type", "function", "description"])
            | st.text(),
            inner | st.sampled_from(["user", "system", "assistant", "tool"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.fixed_dictionaries({"messages": JSON, "tools": JSON}) | JSON)
@example({"messages": [{"role": "user", "content": "build ```" * 2000}]})
def test_any_json_gets_a_level_and_a_reason(chat):
    found = router.rate_difficulty(chat)
    assert found.level in router.DIFFICULTY_LABELS and found.why


def test_labels():
    assert list(router.DIFFICULTY_LABELS.values()) == [
        "critical",
        "complex",
        "standard",
        "simple",
        "trivial",
    ]


def test_a_large_agent_request_costs_next_to_nothing():
    step = {"role": "assistant", "content": [{"type": "text", "text": "x " * 400}]}
    chat = {
        "messages": [
            {"role": "system", "content": "You are an agent. " * 800},
            *[step] * 60,
            {"role": "user", "content": "Look at the fox and the lazy dog once more. " * 60},
        ],
        "tools": [TOOL] * 25,
    }
    best = min(timed(chat) for _ in range(50))
    assert best < 0.001, "150 us are the aim, the rest is room for a slow machine"


def timed(chat):
    start = time.perf_counter()
    router.rate_difficulty(chat)
    return time.perf_counter() - start
