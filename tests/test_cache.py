"""What is kept of answers: for whom, under which name, how long, how much, and where."""

from __future__ import annotations

import importlib
import math
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import threading
from array import array
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upstream import free_port, until

import router

CHAT = router.CHAT
HELLO = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ALICE = router.Caller("alice", "a1", "sk-alice")


def asking(body=None, *, surface=CHAT, chat=None, **fields):
    body = {"model": "m", "messages": [HELLO], **(body or {})}
    ask = router.Ask(surface, router.dump_json(body), body, chat or body, router.Guard())
    fields = {"caller": ALICE, "stream": bool(body.get("stream")), **fields}
    return replace(ask, **fields)


# --- names ----------------------------------------------------------------------


def image(url):
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


# Requests of which no two may ever get the same answer.
DIFFERENT = {
    "plain": {},
    "another question": {"messages": [{"role": "user", "content": "Hello"}]},
    "a system prompt": {"messages": [{"role": "system", "content": "be brief"}, HELLO]},
    "an earlier turn": {"messages": [HELLO, {"role": "assistant", "content": "hi"}, HELLO]},
    "an image": {"messages": [image("data:image/png;base64,AAAA")]},
    "another image": {"messages": [image("data:image/png;base64,AAAB")]},
    "tools": {"tools": [TOOL]},
    "tools, none to be called": {"tools": [TOOL], "tool_choice": "none"},
    "another model": {"model": "other"},
    "a temperature": {"temperature": 0},
    "another one": {"temperature": 1},
    "a seed": {"seed": 1},
    "a limit": {"max_tokens": 10},
    "a format": {"response_format": {"type": "json_object"}},
    "a stop": {"stop": ["x"]},
    "reasoning": {"reasoning_effort": "low"},
    "a user of the caller": {"user": "bob"},
    "a member nobody knows": {"some_vendor_option": {"deep": [1, 2]}},
}


@pytest.mark.parametrize(("one", "other"), list(combinations(DIFFERENT, 2)))
def test_what_changes_the_answer_changes_the_name(one, other):
    names = [router.answer_key(asking(DIFFERENT[name])) for name in (one, other)]
    assert names[0] != names[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"caller": router.Caller("alice", "a2", "sk-bob")},
        {"caller": router.Caller("alice", "a1", "sk-alice", frozenset({"groq"}))},
        {"caller": router.Caller("alice", "a1", "sk-other")},
        {"surface": router.MESSAGES},
        {"terms": (True,)},
        {"terms": (False, "fast")},
        {"forward": b"anthropic-beta: x\r\n"},
    ],
)
def test_who_asks_and_how_changes_the_name(fields):
    assert router.answer_key(asking(**fields)) != router.answer_key(asking())


def test_the_form_of_an_answer_and_the_order_of_members_do_not():
    plain = router.answer_key(asking())
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert router.answer_key(asking(streamed)) == plain
    body = dict(reversed(asking().body.items()))
    assert router.answer_key(asking(body)) == plain
    assert router.answer_key(asking(request_id="x", started=5.0)) == plain


def test_a_name_tells_nothing():
    name = router.answer_key(asking())
    assert len(name) == 32
    assert not any(text in name for text in (b"hello", b"alice", b"sk-"))


NEVER = {
    "a tool loop": {"messages": [HELLO, {"role": "tool", "tool_call_id": "1", "content": "5"}]},
    "a tool loop with a remark": {
        "messages": [{"role": "tool", "tool_call_id": "1", "content": "5"}, HELLO]
    },
    "several answers": {"n": 2},
    "several streamed answers": {"n": 2, "temperature": 0, "stream": True},
    "kept by the provider": {"store": True},
    "a web search": {"web_search_options": {"search_context_size": "low"}},
    "chances": {"logprobs": True},
    "sound": {"audio": {"voice": "x"}},
}


@pytest.mark.parametrize("name", NEVER)
def test_what_is_never_shared(name):
    assert not router.may_share(asking(NEVER[name]))


def test_what_may_be_shared():
    assert router.may_share(asking())
    assert router.may_share(asking({"n": 2, "temperature": 0}))
    assert router.may_share(asking({"tools": [TOOL], "temperature": 1.3, "logprobs": False}))
    answered = {"role": "assistant", "content": "done"}
    loop = [{"role": "tool", "tool_call_id": "1", "content": "5"}, answered, HELLO]
    assert router.may_share(asking({"messages": loop}))
    assert not router.may_share(asking(left_out=["web_search"]))


def test_responses_are_shared_only_where_nothing_is_stored():
    surface = router.responses_surface(False, [])
    for body, expected in (
        ({}, False),
        ({"store": True}, False),
        ({"store": False}, True),
        ({"store": False, "previous_response_id": "resp_1"}, False),
    ):
        assert (
            router.may_share(asking(body, surface=surface, chat={"messages": [HELLO]})) is expected
        )


# --- what is worth keeping --------------------------------------------------------


def choice(finish="stop", **message):
    return {"message": {"content": "x", **message}, "finish_reason": finish}


WHOLE = (
    ("chat", {"choices": [choice()]}, True),
    ("chat", {"choices": [choice(tool_calls=[], refusal=None)]}, True),
    ("chat", {"choices": [choice("length")]}, False),
    ("chat", {"choices": [choice("content_filter")]}, False),
    ("chat", {"choices": [choice("tool_calls", tool_calls=[{}])]}, False),
    ("chat", {"choices": [choice(tool_calls=[{}])]}, False),
    ("chat", {"choices": [choice(refusal="no")]}, False),
    ("chat", {"choices": [choice(), choice("length")]}, False),
    ("chat", {"choices": []}, False),
    ("completions", {"choices": [{"text": "x", "finish_reason": "stop"}]}, True),
    ("completions", {"choices": [{"text": "x", "finish_reason": "length"}]}, False),
    ("messages", {"content": [{"type": "text"}], "stop_reason": "end_turn"}, True),
    ("messages", {"content": [{"type": "thinking"}], "stop_reason": "stop_sequence"}, True),
    ("messages", {"content": [{"type": "text"}], "stop_reason": "refusal"}, False),
    ("messages", {"content": [{"type": "text"}], "stop_reason": "max_tokens"}, False),
    ("messages", {"content": [{"type": "text"}], "stop_reason": "pause_turn"}, False),
    ("messages", {"content": [{"type": "tool_use"}], "stop_reason": "end_turn"}, False),
    (
        "responses",
        {"output": [{"type": "message", "content": [{}]}], "status": "completed"},
        True,
    ),
    ("responses", {"output": [{"type": "reasoning"}], "status": "incomplete"}, False),
    ("responses", {"output": [{"type": "function_call"}], "status": "completed"}, False),
    (
        "responses",
        {"output": [{"type": "message", "content": [{"type": "refusal"}]}], "status": "completed"},
        False,
    ),
    ("embeddings", {"data": []}, True),
)


@pytest.mark.parametrize(("dialect", "answer", "expected"), WHOLE)
def test_only_text_said_to_its_end_is_kept(dialect, answer, expected):
    assert router.ended_well(dialect, answer) is expected


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["stop", "end_turn", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "message",
                    "finish_reason",
                    "content",
                    "output",
                    "type",
                    "delta",
                    "status",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from(["chat", "completions", "messages", "responses", "embeddings"]), ODD)
def test_no_answer_is_too_odd_to_be_judged(dialect, value):
    answer = value if isinstance(value, dict) else {"choices": value, "content": value}
    router.ended_well(dialect, answer)
    if dialect != "embeddings":
        body = router.encode_event({"choices": [{"delta": {"content": "x"}}]})
        router.stream_ended_well(dialect, body + router.encode_event(answer), answer)


def events(*deltas, finish="stop"):
    made = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    made.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return b"".join(map(router.encode_event, made)) + router.DONE


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (events({"content": "x"}), True),
        (events({"content": "x" * 9000}), True),
        (events({"content": "x", "tool_calls": None, "refusal": None}), True),
        (events({"content": "x"}, finish="length"), False),
        (events({"content": "x"}, finish="tool_calls"), False),
        (events({"tool_calls": [{"index": 0}]}), False),
        (events({"refusal": "no"}, *[{"content": "x"}] * 100), False),
        (events({"content": '"finish_reason":"stop"'}, finish=None), False),
        (b"data: [DONE]\n\n", False),
        # vLLM says which stop string ended it
        (events({"content": "x"}).replace(b'"stop"', b'"stop","stop_reason":"###"'), True),
        (events({"content": "x"}, finish=None).replace(b"null", b'null,"stop_reason":"#"'), False),
    ],
)
def test_the_same_of_streams(body, expected):
    assert router.stream_ended_well("chat", body, None) is expected


# --- what is kept, and its forms ----------------------------------------------------

SAVED = router.Saved(b'{"a": "\xc3\xa9"}\n', False, "groq", "m1", 2000.0)


@given(
    st.binary(),
    st.booleans(),
    st.text("abc/-.", max_size=9),
    st.booleans(),
    st.text(),
    st.lists(st.floats(-1, 1, width=32), max_size=9),
)
def test_what_was_packed_comes_out_as_it_was(body, stream, name, wants, usage, vector):
    usage, unit = usage.encode("utf-8", "replace"), router.unit_vector(vector)
    asked = unit and router.Asked(b"\x00space", router.question_made(unit))
    saved = router.Saved(body, stream, name, name, 1.5, wants, usage, asked)
    assert router.unpacked(saved.packed()) == saved
    assert saved.size == len(body) + len(usage) + 512 + (4 * len(vector) if unit else 0)


@given(st.binary())
def test_anything_else_is_nothing(data):
    assert router.unpacked(data) is None


@pytest.mark.parametrize(
    "head",
    [
        b'[1,false,"groq","m1",2.0,true,"","",""]',  # another form
        b'[2,false,"groq","m1",2,true,"","",""]',
        b'[2,false,"groq","m1\\r\\nX-Evil: 1",2.0,true,"","",""]',
        b'[2,false,"groq","m1",2.0,true,""]',
        b"{}",
    ],
)
def test_a_head_that_is_not_ours_is_nothing(head):
    assert router.unpacked(head + b"\n{}") is None


@pytest.mark.parametrize("vector", ["", "AAAA", "AAA", "!", "AAAAAAA="])
def test_a_question_that_cannot_be_read_leaves_its_answer(vector):
    head = b'[2,false,"groq","m1",2.0,true,"","zz","%s"]' % vector.encode()
    assert router.unpacked(head + b"\n{}") == router.Saved(b"{}", False, "groq", "m1", 2.0)


# --- how much, how long ---------------------------------------------------------------


def cache_of(clock, most=3, most_bytes=1 << 20, ttl_s=300.0, shelf=None):
    return router.Cache(ttl_s, most, most_bytes, shelf or router.Shelf(), clock)


def saved_at(cache, text=b"x"):
    return replace(SAVED, body=text, until=cache.until())


def test_an_answer_is_forgotten_after_its_time(clock):
    cache = cache_of(clock)
    cache.put(b"a", saved_at(cache))
    clock.time += 299
    assert cache.get(b"a")
    clock.time += 1
    assert cache.get(b"a") is None
    assert len(cache) == 0 and cache.stats()["bytes"] == 0


def test_the_least_recently_used_goes_first(clock):
    cache = cache_of(clock, most=2)
    for key in (b"a", b"b"):
        cache.put(key, saved_at(cache))
    cache.get(b"a")
    cache.put(b"c", saved_at(cache))
    assert [bool(cache.get(key)) for key in (b"a", b"b", b"c")] == [True, False, True]


def test_bytes_are_bounded_and_counted(clock):
    cache = cache_of(clock, most=1000, most_bytes=10_000)
    for at in range(100):
        cache.put(b"%d" % at, saved_at(cache, b"x" * 1000))
        assert cache.stats()["bytes"] <= 10_000
    kept = len(cache)
    assert kept == 10_000 // saved_at(cache, b"x" * 1000).size
    cache.put(b"99", saved_at(cache, b"y" * 1000))
    assert len(cache) == kept
    cache.clear()
    assert cache.stats()["bytes"] == len(cache) == 0


def test_one_answer_does_not_push_out_all_others(clock):
    cache = cache_of(clock, most_bytes=10_000)
    cache.put(b"a", saved_at(cache))
    cache.put(b"b", saved_at(cache, b"x" * 9_000))
    assert cache.get(b"a") and cache.get(b"b") is None


def test_stale_ones_make_room_by_themselves(clock):
    cache = cache_of(clock, most=100)
    for at in range(50):
        cache.put(b"%d" % at, saved_at(cache))
    clock.time += 400
    cache.put(b"new", saved_at(cache))
    assert len(cache) == 1


def test_many_threads_keep_the_books_right(clock):
    cache = cache_of(clock, most=20)

    def work(seed):
        rng = random.Random(seed)
        for _ in range(500):
            key = b"%d" % rng.randrange(40)
            if rng.random() < 0.5:
                cache.put(key, saved_at(cache, b"x" * rng.randrange(50)))
            else:
                cache.get(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache) <= 20
    assert cache.stats()["bytes"] == sum(saved.size for saved in cache._kept.values())


# --- on disk ----------------------------------------------------------------------------


def disk(clock, path, most=3):
    cache = cache_of(clock, most=most, shelf=router.DiskShelf(path, clock))
    cache.start()
    return cache


def test_answers_survive_a_restart(clock, tmp_path):
    path = tmp_path / "cache.db"
    cache = disk(clock, path)
    for at in range(5):
        clock.time += 1
        cache.put(b"%d" % at, saved_at(cache, b"text %d" % at))
    clock.time += 10
    cache.close()
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}
    again = disk(clock, path)
    assert [again.get(b"%d" % at) and again.get(b"%d" % at).body for at in range(5)] == [
        None, None, b"text 2", b"text 3", b"text 4",
    ]  # fmt: skip
    again.close()
    clock.time += 289
    late = disk(clock, path)
    assert [bool(late.get(b"%d" % at)) for at in (2, 3, 4)] == [False, False, True]
    late.clear()
    late.close()
    assert rows_of(path) == []


def test_nothing_stays_of_a_file_that_others_could_read_keys_in(clock, tmp_path):
    path, key = tmp_path / "cache.db", "sk-router-readable"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE cache (hash TEXT PRIMARY KEY, data TEXT, ns TEXT)")
        connection.execute("INSERT INTO cache VALUES ('a', '{}', ?)", (key,))
    path.chmod(0o644)
    cache = disk(clock, path)
    cache.put(b"a", saved_at(cache))
    cache.close()
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}
    assert key.encode() not in path.read_bytes() and len(rows_of(path)) == 1


def rows_of(path):
    with sqlite3.connect(path) as connection:
        return connection.execute("SELECT * FROM answers").fetchall()


def test_a_smaller_limit_holds_for_the_file_too(clock, tmp_path):
    path = tmp_path / "cache.db"
    cache = disk(clock, path, most=10)
    for at in range(10):
        clock.time += 1
        cache.put(b"%d" % at, saved_at(cache))
    cache.close()
    disk(clock, path, most=2).close()
    assert len(rows_of(path)) == 2


def test_a_file_whose_clock_was_ahead_keeps_nothing_for_ever(clock, tmp_path):
    path = tmp_path / "cache.db"
    clock.time += 1e6
    cache = disk(clock, path)
    cache.put(b"a", saved_at(cache))
    cache.close()
    clock.time -= 1e6
    late = disk(clock, path)
    assert late.get(b"a") is None
    late.close()


def test_rows_that_are_not_ours_are_passed_over(clock, tmp_path):
    path = tmp_path / "cache.db"
    disk(clock, path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO answers VALUES (?, ?, ?)", (b"a", b"junk", 1e9))
        connection.execute("INSERT INTO answers VALUES ('b', 'junk', 1e9)")
    cache = disk(clock, path)
    assert len(cache) == 0
    cache.close()


# --- in Redis ---------------------------------------------------------------------------


@pytest.fixture
def redis_server(tmp_path):
    """start() -> url of a real Redis server of our own; stop() ends it."""
    pytest.importorskip("redis", reason="pip install redis")
    program = shutil.which("redis-server") or os.environ.get("REDIS_SERVER")
    if not program:
        pytest.skip("no redis-server (Debian: apt-get install redis-server)")
    port, running = free_port(), []

    class Server:
        url = f"redis://127.0.0.1:{port}/0"

        def start(self):
            command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
            running.append(
                subprocess.Popen([*command, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
            )
            until(self.answers)
            return self

        def answers(self):
            redis = importlib.import_module("redis")
            try:
                with redis.Redis.from_url(self.url) as client:
                    return client.ping()
            except redis.RedisError:
                return False

        def stop(self):
            for process in running:
                process.kill()
                process.wait(10)
            running.clear()

    server = Server()
    yield server
    server.stop()


@pytest.fixture
def shelves(clock):
    made = []

    def make(url, **options):
        made.append(router.RedisShelf(url, clock, clock, **options))
        return made[-1]

    yield make
    for shelf in made:
        shelf.close()


def redis_cache(shelves, clock, url):
    cache = cache_of(clock, shelf=shelves(url))
    cache.start()
    return cache


def test_routers_share_what_redis_keeps(redis_server, shelves, clock):
    redis_server.start()
    one, two = (redis_cache(shelves, clock, redis_server.url) for _ in range(2))
    one.put(b"a", saved_at(one, b"text"))
    until(lambda: two.get(b"a"))
    assert two.get(b"a").body == b"text" and two.get(b"b") is None
    one.clear()
    two._kept.clear()
    assert two.get(b"a") is None


def test_redis_forgets_by_itself_and_shows_no_names(redis_server, shelves, clock):
    redis_server.start()
    cache = redis_cache(shelves, clock, redis_server.url)
    cache.put(b"a", saved_at(cache))
    redis = importlib.import_module("redis")
    with redis.Redis.from_url(redis_server.url) as client:
        until(lambda: client.keys("*"))
        assert client.keys("*") == [b"hr:cache:61"]
        assert 290_000 < client.pttl("hr:cache:61") <= 300_000


def test_a_redis_that_dies_is_one_warning_and_comes_back(redis_server, shelves, clock, caplog):
    caplog.set_level("INFO")
    redis_server.start()
    cache = redis_cache(shelves, clock, redis_server.url)
    cache.put(b"a", saved_at(cache))
    until(lambda: cache._shelf.get(b"a"))
    redis_server.stop()
    cache._kept.clear()
    for _ in range(5):
        assert cache.get(b"a") is None
        clock.time += 1
    assert caplog.text.count("Redis is away") == 1
    redis_server.start()
    assert cache.get(b"a") is None  # not asked yet
    clock.time += 31
    cache.get(b"a")
    assert "Redis is back" in caplog.text
    cache.put(b"b", saved_at(cache, b"new"))
    until(lambda: cache._shelf.get(b"b"))


def test_a_redis_that_is_not_there_costs_nothing_after_the_first_time(shelves, clock, caplog):
    pytest.importorskip("redis", reason="pip install redis")
    shelf = shelves(f"redis://:secret-pw-1234567890@127.0.0.1:{free_port()}/0")
    shelf.start(10)
    asked = []
    shelf._client.get = counting(shelf._client.get, asked)
    for _ in range(10):
        assert shelf.get(b"a") is None
    assert len(asked) == 1
    assert "secret-pw" not in caplog.text
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def counting(function, calls):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted


def test_without_the_package_there_is_a_hint(shelves, monkeypatch, caplog):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(router.importlib, "import_module", missing)
    shelf = shelves("redis://127.0.0.1/0")
    shelf.start(10)
    assert shelf.get(b"a") is None
    assert "pip install redis" in caplog.text


def test_an_address_that_is_none_is_a_warning(shelves, caplog):
    pytest.importorskip("redis", reason="pip install redis")
    shelf = shelves("http://127.0.0.1")
    shelf.start(10)
    assert shelf.get(b"a") is None and "REDIS_URL" in caplog.text


# --- questions ----------------------------------------------------------------------------


def question(*values):
    unit = router.unit_vector(list(values))
    return router.question_made(unit)


def test_the_nearest_question_above_the_bar_comes_first():
    kept = router.Questions(10)
    kept.add(b"s", question(1, 0, 0), b"east")
    kept.add(b"s", question(1, 0.1, 0), b"nearly")
    kept.add(b"s", question(0, 1, 0), b"north")
    kept.add(b"other", question(1, 0, 0), b"elsewhere")
    assert kept.nearest(b"s", question(3, 0, 0), 0.95) == [b"east", b"nearly"]
    assert kept.nearest(b"s", question(3, 0, 0), 0.999) == [b"east"]
    assert kept.nearest(b"s", question(-1, 0, 0), 0.5) == []
    assert kept.nearest(b"nowhere", question(1, 0, 0), 0.5) == []


def test_vectors_of_another_size_are_not_alike():
    kept = router.Questions(10)
    kept.add(b"s", question(1, 0), b"two")
    assert kept.nearest(b"s", question(1, 0, 0), 0.5) == []


def test_questions_are_bounded_and_can_be_forgotten():
    kept = router.Questions(3)
    for at in range(5):
        kept.add(b"s%d" % (at % 2), question(1, at), b"%d" % at)
    assert len(kept) == 3 and len(kept._spaces) == 2
    kept.add(b"s0", question(0, 1), b"4")  # the same answer: moved, not doubled
    assert len(kept) == 3
    for at in range(5):
        kept.forget(b"%d" % at)
    assert len(kept) == 0 and not kept._spaces


@pytest.mark.parametrize("values", [None, [], [0.0, 0.0], ["a"], [math.inf], [True], "text", {}])
def test_what_is_no_vector_is_none(values):
    assert router.unit_vector(values) is None


def test_the_quick_search_finds_what_a_full_one_finds():
    rng = random.Random(5)
    size, kept, truth = 256, router.Questions(4000), []
    topics = [[rng.gauss(0, 1) for _ in range(size)] for _ in range(40)]
    # All vectors share a large part, as those of real models do.
    shared = [rng.gauss(0, 1) if at % 16 else 6.0 for at in range(size)]
    for at in range(1500):
        topic = topics[at % 40]
        vector = [s + t + rng.gauss(0, 0.8) for s, t in zip(shared, topic, strict=True)]
        truth.append((b"%d" % at, question(*vector)))
        kept.add(b"s", truth[-1][1], truth[-1][0])
    missed = 0
    for _ in range(100):
        _, base = truth[rng.randrange(len(truth))]
        asked = question(*(v + rng.gauss(0, 0.01) for v in base.unit))
        full = max((router.cosine(asked.unit, row.unit), key) for key, row in truth)
        assert full[0] > 0.95
        missed += kept.nearest(b"s", asked, 0.9)[:1] != [full[1]]
    assert missed == 0


def test_a_cosine_is_one():
    assert router.cosine(array("f", [0.6, 0.8]), array("f", [0.8, 0.6])) == pytest.approx(0.96)


# --- the frame of a question --------------------------------------------------------------


def framed(body=None, **fields):
    return router.question_of(asking(body, **fields))


def say(text, *earlier):
    return {"messages": [*earlier, {"role": "user", "content": text}]}


def test_another_question_in_the_same_frame_may_be_compared():
    one, two = framed(say("How tall is it?")), framed(say("What is its height?"))
    assert one[0] == two[0] and (one[1], two[1]) == ("How tall is it?", "What is its height?")


@pytest.mark.parametrize(("one", "other"), list(combinations(DIFFERENT, 2)))
def test_nothing_but_the_question_may_differ(one, other):
    found = [framed(DIFFERENT[name]) for name in (one, other)]
    asked_only = {one, other} == {"plain", "another question"}
    if all(found):
        assert (found[0][0] == found[1][0]) is asked_only


@pytest.mark.parametrize(
    "fields", [{"caller": router.Caller("bob", "b1", "sk-bob")}, {"terms": ("fast",)}]
)
def test_nor_who_asks(fields):
    assert framed(**fields)[0] != framed()[0]


def test_figures_are_never_alike():
    assert framed(say("what is 2+2"))[0] != framed(say("what is 2+3"))[0]


def test_long_texts_and_other_turns_are_not_compared():
    assert framed(say("x" * 1000)) and framed(say("x" * 1001)) is None
    assert framed(say("  ")) is None
    assert framed({"messages": [HELLO, {"role": "assistant", "content": "hi"}]}) is None
    one, two = framed(say("next?", HELLO)), framed(say("next?", {**HELLO, "content": "bye"}))
    assert one[0] != two[0]


def test_the_text_of_parts_is_compared_and_their_images_are_bound():
    def parts(text, url):
        shown = image(url)["content"]
        return {"messages": [{"role": "user", "content": [{"type": "text", "text": text}, *shown]}]}

    one, two, three = (
        framed(parts(*told)) for told in (("what?", "u1"), ("which?", "u1"), ("what?", "u2"))
    )
    assert one[0] == two[0] != three[0]


# --- settings -----------------------------------------------------------------------------


def config(**env):
    return router.Config.from_env({"HR_HOME": "/nonexistent", **env})


@pytest.mark.parametrize(
    ("env", "ttl"),
    [
        ({}, 300),
        ({"CACHE_TTL": "7"}, 7),
        ({"LLMROUTER_CACHE_TTL": "0", "CACHE_TTL": "7"}, 0),
        ({"CACHE_TTL_SECONDS": "9", "LLMROUTER_CACHE_TTL": "0"}, 9),
    ],
)
def test_the_first_name_of_the_ttl_counts(env, ttl):
    assert config(**env).cache_ttl == ttl


def test_either_flag_turns_likeness_on_and_its_bar_is_the_first_set():
    assert not config().semantic_cache
    assert config(SEMANTIC_CACHE="0", LLMROUTER_SEMANTIC_CACHE_ENABLED="true").semantic_cache
    assert config(SEMANTIC_CACHE="1").semantic_cache
    assert config().semantic_threshold == 0.95
    assert config(LLMROUTER_SEMANTIC_CACHE_THRESHOLD="0.85").semantic_threshold == 0.85
    both = {"SEMANTIC_CACHE_THRESHOLD": "0.9", "LLMROUTER_SEMANTIC_CACHE_THRESHOLD": "0.8"}
    assert config(**both).semantic_threshold == 0.9


def test_redis_needs_its_address_and_hides_it():
    with pytest.raises(router.ConfigError, match="REDIS_URL"):
        config(CACHE_BACKEND="redis")
    made = config(CACHE_BACKEND="redis", REDIS_URL="redis://:pw@127.0.0.1/0")
    assert ":pw@" not in repr(made)


def test_which_shelf_is_used(tmp_path):
    def shelf(**env):
        return router.make_shelf(router.Config.from_env({"HR_HOME": str(tmp_path), **env})).name

    redis = {"CACHE_BACKEND": "redis", "REDIS_URL": "redis://127.0.0.1/0"}
    assert shelf() == "memory"
    assert shelf(CACHE_PERSIST="1") == shelf(CACHE_BACKEND="sqlite") == "sqlite"
    assert shelf(**redis) == "redis"
    assert shelf(**redis, CACHE_TTL_SECONDS="0") == "memory"
    assert list(tmp_path.iterdir()) == []
