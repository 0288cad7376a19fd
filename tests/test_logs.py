"""/v1/logs, /v1/why, the log file and the histograms: what became of a request, without content."""

from __future__ import annotations

import logging
import re
import stat

import pytest
import requests
from upstream import (
    AUTH,
    HELLO,
    KEY,
    Hang,
    Reply,
    Stream,
    chunks,
    failing_first,
    good,
    provider,
    until,
)

import router

LIMITED = Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "30"})
SECRET = "the moon is made of cheese"
ASK = [{"role": "user", "content": SECRET}]


@pytest.fixture
def pair(upstream, serve):
    """pair(script, SETTING=...): a served router before groq and cerebras with one script."""

    def make(script, **settings):
        groq, cerebras = upstream(script), upstream(script)
        rows = {**provider("groq", groq, "m1"), **provider("cerebras", cerebras, "m1")}
        return serve(**{**rows, **settings})

    return make


def get(live, path, key=KEY, **query):
    headers = {"Authorization": f"Bearer {key}"}
    return live.session.get(live.url + path, params=query, headers=headers, timeout=10)


def entries(live, **query):
    return get(live, "/v1/logs", **query).json()["entries"]


def test_a_failover_is_told_candidate_by_candidate(pair):
    live = pair(failing_first(LIMITED))
    answer = live.chat(messages=ASK)
    why = get(live, f"/v1/why/{answer.headers['X-Request-ID']}").json()
    first, second = why["attempts"]
    assert (first["verdict"], first["status"], first["text"]) == ("rate_limited", 429, "slow down")
    assert second["verdict"] == "ok" and second["label"] == answer.headers["X-Provider"] + "/m1"
    assert [c["outcome"] for c in why["candidates"]] == ["rate_limited", "ok"]
    assert all("rating" in c["why"] for c in why["candidates"])
    assert (why["status"], why["http_status"], why["cascades"]) == ("success", 200, 1)
    assert why["complexity"] in range(1, 6) and why["difficulty"]
    assert why["prompt_tokens"] == 7 and why["completion_tokens"] == 3


def test_what_rests_and_what_cannot_serve_is_told_as_well(pair):
    live = pair(failing_first(LIMITED), CEREBRAS_SUPPORTS_TOOLS="0")
    live.chat()
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    id = live.chat(tools=tools).headers["X-Request-ID"]
    why = get(live, f"/v1/why/{id}").json()
    assert {"candidate": "cerebras/m1", "why": "does not support tools"} in why["left_out"]


def test_who_is_too_small_for_a_request_is_told(pair):
    live = pair(good(), GROQ_SKIP_TOKENS_OVER="50", CEREBRAS_MODEL="m1,gpt-oss-120b")
    long = [{"role": "user", "content": "word " * 200_000}]
    id = live.chat(messages=long, model="cerebras/m1").headers["X-Request-ID"]
    told = get(live, f"/v1/why/{id}").json()["candidates"]
    outcome = {row["candidate"]: row["outcome"] for row in told}
    assert outcome["cerebras/m1"] == "ok"
    assert outcome["groq/m1"] == "skipped: it takes at most 50 tokens"
    assert outcome["cerebras/gpt-oss-120b"].startswith("not asked: its window is 131072")


def test_a_resting_candidate_is_skipped_with_its_reason(pair):
    live = pair(failing_first(LIMITED), GROQ_MODEL="m1", ROUTE_PREFER="fit")
    rested = live.chat().headers["X-Provider"]
    other = {"groq": "cerebras", "cerebras": "groq"}[rested]
    id = live.chat(model=f"{other}/m1").headers["X-Request-ID"]
    why = get(live, f"/v1/why/{id}").json()
    assert why["choice"] == "named provider/model" and why["asked"] == f"{other}/m1"
    assert [line for line in why["skipped"] if line.startswith(f"{other}/m1: resting")]


def test_what_rests_is_a_metric(pair):
    live = pair(failing_first(LIMITED), GROQ_MODEL="m1", CEREBRAS_MODEL="m1")
    live.chat()
    line = r'hermes_router_cooldown_seconds\{provider="(groq|cerebras)",key="1",model="m1"\} (\d+)'
    ((_, seconds),) = re.findall(line, get(live, "/metrics").text)
    assert 0 < int(seconds) <= 60


@pytest.mark.parametrize("stream", [False, True])
def test_an_entry_of_the_log(pair, stream):
    live = pair(good())
    assert live.chat(stream=stream, messages=ASK).content
    until(lambda: entries(live), 5)
    (entry,) = entries(live)
    assert entry["endpoint"] == "chat" and entry["streaming"] is stream
    assert entry["caller"] == router.key_tail(KEY) and entry["caller_name"] == "key1"
    assert entry["status"] == "success" and entry["provider"] in ("groq", "cerebras")
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (7, 3)
    assert entry["latency_ms"] > 0 and (entry["ttft_ms"] is not None) is stream
    assert entry["ts"].endswith("Z") and len(entry["ts"]) == 20


def test_no_content_and_no_key_is_kept_anywhere(pair):
    live = pair(
        failing_first(Reply(500, {"error": {"message": "bad key sk-proj-a1b2c3d4e5f6g7h8i9j0"}}))
    )
    id = live.chat(messages=ASK).headers["X-Request-ID"]
    texts = [get(live, path).text for path in ("/v1/logs", f"/v1/why/{id}", "/metrics")]
    for text in texts:
        assert SECRET not in text and "sk-proj-a1b2" not in text and KEY not in text


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("frame", ["you said: {}", 'prompt="{}" was refused by our policy', "{}"])
@pytest.mark.parametrize("prompt", ["my plan for the grey whale", "grey-whale-42"])
def test_what_a_provider_quotes_of_a_prompt_is_for_its_client_only(
    pair, caplog, status, frame, prompt
):
    error = {"error": {"message": frame.format(prompt)}}
    live = pair(lambda _: Reply(status, error))
    answer = live.chat(messages=[{"role": "user", "content": prompt}])
    assert prompt in answer.json()["error"]["message"]
    id = answer.headers["X-Request-ID"]
    texts = [get(live, path).text for path in ("/v1/logs", f"/v1/why/{id}")]
    for text in (*texts, caplog.text):
        assert "grey" not in text and "[...]" in text
    told = get(live, f"/v1/why/{id}").json()["attempts"][0]["text"]
    assert frame != "{}" or told == "[...]"
    assert "policy" not in frame or told.endswith("was refused by our policy")


def test_errors_that_quote_nothing_stay_as_they_are():
    said = ("what does the error rate limit reached for model mean", "hi")
    for text in ("Rate limit reached for model `m`", "internal error while handling: hi", ""):
        assert router.without_quotes(text, ("hi", "a b c", "")) == text
    assert router.without_quotes("the rate limit reached for model x", said) == "the [...] x"


def test_a_stream_that_breaks_off_says_why_in_the_log(pair):
    live = pair(Stream(chunks=chunks(*["one two three "] * 10), stop_at=900), RESCUE=0)
    assert b"stream_interrupted" in live.chat(stream=True, messages=ASK).content
    until(lambda: entries(live), 5)
    (entry,) = entries(live, status="error")
    assert entry["http_status"] == 200 and "reset" in entry["error"]


def test_newest_first_filters_and_limits(pair):
    live = pair(good())
    for n in range(5):
        live.session.post(
            f"{live.url}/v1/chat/completions",
            json={"messages": HELLO},
            headers={"X-Request-ID": f"r{n}"},
        )
    live.session.post(f"{live.url}/v1/chat/completions", json={"messages": []})
    assert [e["id"] for e in entries(live, limit=3, status="success")] == ["r4", "r3", "r2"]
    assert len(entries(live, status="error")) == 1
    assert entries(live, endpoint="messages") == []
    assert len(entries(live, limit="x")) == len(entries(live, limit=10**9)) == 6
    whole = get(live, "/v1/logs", limit=2).json()
    assert (whole["buffer_size"], whole["stored"], whole["returned"]) == (500, 6, 2)


def test_the_filter_of_providers_goes_by_what_an_entry_shows(pair):
    live = pair(good(), CACHE_TTL_SECONDS="300")
    asked = [live.chat() for _ in range(2)][0].headers["X-Provider"]
    for name in ("groq", "cerebras", "cache", "nobody"):
        expected = [name] if name in (asked, "cache") else []
        assert [e["provider"] for e in entries(live, provider=name)] == expected


def test_a_provider_is_found_under_its_other_names(upstream, serve):
    live = serve(**provider("gemini", upstream(good()), "m1"))
    live.chat()
    for name in ("gemini", "google", "Gemini"):
        assert [e["provider"] for e in entries(live, provider=name)] == ["gemini"]


def test_an_answer_from_memory_costs_nothing_which_is_not_unknown(pair, tmp_path):
    (tmp_path / "prices.json").write_text('{"groq/m1": [1, 1]}')
    live = pair(good(), CACHE_TTL_SECONDS="300", MODEL_PRICES_FILE="prices.json")
    for _ in range(2):
        live.chat(model="groq/m1")
    assert [e["cost_usd"] for e in entries(live)] == [0.0, 0.00001]


def test_a_caller_without_a_key_is_anon(pair):
    live = pair(good(), AUTH_MODE="open", PROXY_API_KEYS="")
    requests.post(f"{live.url}/v1/chat/completions", json={"messages": HELLO}, timeout=10)
    (entry,) = entries(live)
    assert entry["caller"] == "anon"


@pytest.mark.parametrize("name", ["status", "endpoint"])
def test_an_unknown_filter_names_what_there_is(pair, name):
    answer = get(pair(good()), "/v1/logs", **{name: "nothing"})
    assert answer.status_code == 400 and "error" in answer.json()
    assert answer.json()["error"]["param"] == name
    assert router.LOG_FILTERS[name][0] in answer.json()["error"]["message"]


def test_errors_are_logged_even_before_the_request_is_understood(pair):
    live = pair(good())
    for body in (b"{", b'{"messages": "x"}', b"[]"):
        live.session.post(f"{live.url}/v1/messages", data=body)
    found = entries(live, endpoint="messages", status="error")
    assert len(found) == 3 and {e["http_status"] for e in found} == {400}
    live.session.post(f"{live.url}/v1/messages", data=b"{}", headers={"Authorization": "Bearer no"})
    assert len(entries(live)) == 3  # strangers fill no log


def test_callers_see_their_own_requests_and_admins_all(pair):
    live = pair(good(), PROXY_API_KEYS=f"{KEY},second-key-of-a-guest")
    own = live.chat().headers["X-Request-ID"]
    headers = {"Authorization": "Bearer second-key-of-a-guest"}
    url = f"{live.url}/v1/chat/completions"
    theirs = live.session.post(url, json={"messages": HELLO}, headers=headers)
    theirs = theirs.headers["X-Request-ID"]
    guest = "second-key-of-a-guest"
    assert [e["id"] for e in get(live, "/v1/logs", guest).json()["entries"]] == [theirs]
    assert {e["id"] for e in entries(live)} == {own, theirs}
    assert get(live, f"/v1/why/{own}", guest).status_code == 404
    assert get(live, f"/v1/why/{theirs}").status_code == 200


def test_the_ring_is_bounded_and_can_be_off(pair):
    live = pair(good(), REQUEST_LOG_SIZE="2")
    ids = [live.chat().headers["X-Request-ID"] for _ in range(4)]
    assert [e["id"] for e in entries(live)] == ids[:1:-1]
    assert get(live, f"/v1/why/{ids[0]}").status_code == 404
    live = pair(good(), REQUEST_LOG_SIZE="-1")
    live.chat()
    assert get(live, "/v1/logs").json() == {
        "buffer_size": 0, "stored": 0, "returned": 0, "entries": [],
    }  # fmt: skip


def test_one_id_used_twice_is_the_later_request():
    traces = router.Traces(2)
    made = [router.Trace(id, "chat", router.ITSELF, 0.0) for id in ("a", "a", "b")]
    for trace in made:
        traces.keep(trace)
    assert traces.find("a") is made[1] and traces.find("b") is made[2]
    traces.keep(router.Trace("c", "chat", router.ITSELF, 0.0))
    assert traces.find("a") is None and len(traces.latest()) == 2


def test_histograms_add_up_and_keep_prometheus_rules(pair):
    live = pair(good())
    for stream in (False, True, True):
        assert live.chat(stream=stream).content
    until(lambda: len(entries(live)) == 3, 5)
    lines = get(live, "/metrics").text.splitlines()
    name = "hermes_router_request_latency_seconds"
    assert f"# TYPE {name} histogram" in lines
    buckets = [
        float(x.split()[-1]) for x in lines if x.startswith(f'{name}_bucket{{endpoint="chat"')
    ]
    assert buckets == sorted(buckets) and buckets[-1] == 3
    assert f'{name}_count{{endpoint="chat"}} 3' in lines
    first = [x for x in lines if x.startswith("hermes_router_time_to_first_token_seconds_count")]
    assert sum(float(x.split()[-1]) for x in first) == 2


def test_labels_of_a_histogram_are_bounded():
    histogram = router.Histogram((1.0,))
    for n in range(1000):
        histogram.observe(f"provider {n}", 0.5)
    assert len(histogram.series) <= histogram.MAX_LABELS + 1
    assert sum(row[0] for row in histogram.series.values()) == 1000


def test_the_log_file_has_a_line_per_request_and_is_private(tmp_path, monkeypatch):
    config = router.Config.from_env({"HR_HOME": str(tmp_path), "LOG_PATH": "logs/router.log"})
    monkeypatch.setattr(router.request_log, "propagate", True)
    monkeypatch.setattr(router.request_log, "level", logging.NOTSET)
    close = router.log_to_file(config)
    router.Traces(1).keep(router.Trace("req_1", "chat", router.ITSELF, 0.0, asked="a\nb"))
    router.log.warning("something else")
    close()
    path = tmp_path / "logs" / "router.log"
    lines = path.read_text().splitlines()
    assert len(lines) == 2 and "request req_1" in lines[0] and "cache_hit=False" in lines[0]
    assert "something else" in lines[1]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_log_file_that_cannot_be_is_a_warning(tmp_path, caplog):
    (tmp_path / "logs").write_text("a file where a folder should be")
    config = router.Config.from_env({"HR_HOME": str(tmp_path), "LOG_PATH": "logs/router.log"})
    router.log_to_file(config)()
    assert "LOG_PATH" in caplog.text


@pytest.mark.parametrize("shared", ["0", "1"])
@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/v1/chat/completions", {"messages": HELLO}, b"[DONE]"),
        ("/v1/responses", {"input": "hello", "store": False}, b"response.completed"),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 9}, b"message_stop"),
    ],
)
def test_a_client_that_hangs_up_at_the_last_event_got_its_answer(pair, shared, path, body, last):
    live = pair(good(), SINGLE_FLIGHT=shared)
    client = live.app.test_client()
    answer = client.post(path, json={**body, "stream": True}, headers=AUTH, buffered=False)
    assert any(last in block for block in answer.iter_encoded())
    answer.close()  # as the server does when the connection is gone
    assert [(row["status"], row["http_status"]) for row in entries(live)] == [("success", 200)]


def test_a_response_is_kept_for_a_client_that_hangs_up_at_its_last_event(pair):
    live = pair(good())
    client, ask = live.app.test_client(), {"input": "hello", "stream": True}
    answer = client.post("/v1/responses", json=ask, headers=AUTH, buffered=False)
    blocks = iter(answer.iter_encoded())
    text = b""
    while b"response.completed" not in text:
        text += next(blocks)
    answer.close()
    (name,) = set(re.findall(rb'"(resp_\w+)"', text))
    assert get(live, f"/v1/responses/{name.decode()}").status_code == 200


def test_a_client_that_left_is_cancelled(pair):
    live = pair(Hang())
    with pytest.raises(requests.Timeout):
        live.session.post(
            f"{live.url}/v1/chat/completions", json={"messages": HELLO}, headers=AUTH, timeout=0.3
        )
    until(lambda: entries(live, status="cancelled"), 5)
    (entry,) = entries(live)
    assert entry["http_status"] == 499 and entry["cascades"] == 0
    why = get(live, f"/v1/why/{entry['id']}").json()
    (attempt,) = why["attempts"]
    assert attempt["verdict"] == "cancelled" and 0.2 < attempt["seconds"] < 5
    told = {row["candidate"]: row["outcome"] for row in why["candidates"]}
    assert sorted(told.values()) == ["cancelled", "not asked"]
    assert told[attempt["label"]] == "cancelled"
    asked, _ = attempt["label"].split("/")
    lines = get(live, "/metrics").text.splitlines()
    assert f'hermes_router_requests_total{{provider="{asked}"}} 1' in lines
    assert f'hermes_router_errors_total{{provider="{asked}"}} 0' in lines
