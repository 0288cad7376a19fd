"""Discovery: what providers list is read in every shape, and used without anybody noticing."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_accounts import jwt, row
from upstream import (
    KEY,
    Hang,
    Reply,
    Reset,
    Stream,
    chat,
    chunks,
    completion,
    drip,
    html,
    provider,
    until,
)

import router
from router import Discovery, ModelFacts, Offer

ON = {"AUTO_DISCOVER_MODELS": "1"}
SECRET = "gsk_AbCdEf0123456789AbCdEf0123456789"


def lists(*ids, **more):
    """A list of models as OpenAI writes it."""
    return Reply(200, {"object": "list", "data": [{"id": id} for id in ids], **more})


def offers(document, provider="groq"):
    return router.offers_in(document, router.provider_named(provider))


def offer(row, provider="groq"):
    (found,) = offers([row], provider)
    return found


# --- what a list says -------------------------------------------------------------------

SHAPES = [
    {"object": "list", "data": [{"id": "m1"}, {"id": "v/m2"}]},
    {"data": [{"id": "m1", "object": "model", "created": 0, "owned_by": "x"}, {"id": "v/m2"}]},
    {"models": [{"name": "m1"}, {"name": "v/m2"}]},
    {"models": [{"slug": "m1", "context_window": 9000}, {"slug": "v/m2"}]},
    {"data": [], "models": [{"model": "m1"}, {"model": "v/m2"}]},
    {"result": [{"id": "", "name": "m1"}, {"name": "v/m2"}]},
    [{"id": "m1"}, {"id": "v/m2"}],
    ["m1", "v/m2"],
    {"data": ["m1", None, 7, {}, {"id": 3}, {"id": "no model"}, {"id": "<b>"}, [], "v/m2", "M1"]},
]


@pytest.mark.parametrize("document", SHAPES)
def test_every_shape_of_a_list_is_read(document):
    assert [one.id.lower() for one in offers(document)] == ["m1", "v/m2"]


@pytest.mark.parametrize(
    "document", [None, 7, "m1", {}, {"data": "m1"}, {"error": {"message": "no"}}, [[]], [{}]]
)
def test_what_is_no_list_holds_nothing(document):
    assert offers(document) == []


def test_a_list_that_is_too_long_is_none():
    assert len(offers([f"m{n}" for n in range(router.MAX_OFFERS)])) == router.MAX_OFFERS
    assert offers([f"m{n}" for n in range(router.MAX_OFFERS + 1)]) == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["data", "id", "pricing", "prompt", "input", "capabilities", "tags",
                         "architecture", "context_length", "model_spec", "type", "endpoints",
                         "supported_parameters", "input_modalities", "output_modalities"]),
        inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(deadline=None)
@given(VALUES)
def test_nothing_that_a_list_says_trips_the_reader(value):
    for document in (value, [value], [{"id": "m1", "pricing": value, "capabilities": value}]):
        for found in offers(document):
            assert router.kept_offer(json.loads(json.dumps(list(found)))) == found


FACTS = [
    (
        "openrouter",
        {
            "id": "x/new-model",
            "context_length": 200_000,
            "pricing": {"prompt": "0.0000005", "completion": "0.000002", "image": "0",
                        "input_cache_read": "0.00000005", "input_cache_write": "0.0000006"},
            "architecture": {"input_modalities": ["text", "image"], "output_modalities": ["text"]},
            "top_provider": {"context_length": 100_000, "max_completion_tokens": 8192},
            "supported_parameters": ["tools", "temperature", "include_reasoning"],
        },
        {"window": 200_000, "max_output": 8192, "price_in": 0.5, "price_out": 2.0,
         "price_cached": 0.05, "tools": True, "vision": True, "reasoning": True},
    ),
    (
        "openrouter",
        {
            "id": "x/plain",
            "architecture": {"input_modalities": ["text"]},
            "pricing": {"prompt": "-1", "completion": "-1"},
            "supported_parameters": ["temperature"],
        },
        {"tools": False, "vision": False},
    ),
    ("openrouter", {"id": "x/y:free", "pricing": {"prompt": "0", "completion": "0"}},
     {"price_in": 0.0, "price_out": 0.0}),
    # Together writes 0 beside what it sells by the hour.
    ("together", {"id": "m", "pricing": {"input": 0, "output": 0, "hourly": 3}}, {}),
    ("together", {"id": "m", "pricing": {"input": 0.18, "output": 0.2}, "context_length": 8192},
     {"window": 8192, "price_in": 0.18, "price_out": 0.2}),
    ("vercel_ai_gateway", {"id": "m", "context_window": 131_072, "tags": ["tool-use", "vision"],
                           "pricing": {"input": "0.00000125", "output": "0.00001"}},
     {"window": 131_072, "tools": True, "vision": True, "price_in": 1.25, "price_out": 10.0}),
    ("requesty", {"id": "m", "input_price": 0, "output_price": 0.0, "supports_vision": False},
     {"price_in": 0.0, "price_out": 0.0, "vision": False}),
    ("requesty", {"id": "m", "input_price": 3e-6, "output_price": 1.5e-5, "cached_price": 3e-7,
                  "caching_price": 3.75e-6},
     {"price_in": 3.0, "price_out": 15.0, "price_cached": 0.3}),
    # Per 1M, as the price of input shows; and what cannot be a price of cached input.
    ("together", {"id": "m", "pricing": {"input": 0.006, "output": 0.5,
                                         "input_cache_read": 0.0006}},
     {"price_in": 0.006, "price_out": 0.5, "price_cached": 0.0006}),
    *(
        ("openrouter", {"id": "m", "pricing": {"prompt": "0.000001", "completion": "0.000002",
                                               "input_cache_read": cached}},
         {"price_in": 1.0, "price_out": 2.0})
        for cached in ("0", "-1", "0.0000011", "NaN", "", None, {})
    ),
    ("openrouter", {"id": "m", "pricing": {"input_cache_read": "0.000001"}}, {}),
    ("mistral", {"id": "m", "max_context_length": 32_768,
                 "capabilities": {"completion_chat": True, "function_calling": True,
                                  "vision": False}},
     {"window": 32_768, "tools": True, "vision": False}),
    ("local", {"id": "m", "max_model_len": 4096}, {"window": 4096}),
    ("venice", {"id": "m", "model_spec": {"availableContextTokens": 65_536,
                                          "capabilities": {"supportsFunctionCalling": True}}},
     {"window": 65_536, "tools": True}),
    ("groq", {"id": "m", "context_window": True, "pricing": {"prompt": 1}}, {}),
    ("groq", {"id": "m", "context_window": -1, "max_completion_tokens": "many"}, {}),
    ("groq", {"id": "m", "pricing": {"prompt": "NaN", "completion": 1e300}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "listed", "facts"), FACTS)
def test_facts_of_a_list(name, listed, facts):
    assert offer(listed, name).facts == facts


NO_CHATS = [
    "text-embedding-3-large", "nomic-embed-text:latest", "BAAI/bge-m3", "whisper-large-v3-turbo",
    "playai-tts", "gpt-4o-mini-tts", "gpt-image-1", "gemini-2.5-flash-image", "imagen-4.0-fast",
    "veo-3.1", "omni-moderation-latest", "meta-llama/llama-guard-4-12b", "gpt-oss-safeguard-20b",
    "rerank-v3.5", "gpt-4o-transcribe", "gpt-realtime", "dall-e-3", "sora-2", "davinci-002",
    "mistral-ocr-latest", "black-forest-labs/FLUX.1-schnell", "stable-diffusion-xl", "aqa",
    "canopylabs/orpheus-v1-english", "gpt-3.5-turbo-instruct", "o4-mini-deep-research",
    "nvidia/nvclip", "nvidia/llama-nemoretriever-300m", "nano-banana-pro",
]  # fmt: skip
CHATS = [
    "gpt-6-luna", "gemini-3.8-flash", "gemma-4-31b-it", "llama-3.2-11b-vision-instruct", "qwen3:8b",
    "accounts/fireworks/models/glm-5p3", "deepseek-v4.1-flash", "claude-haiku-5-5", "grok-4.7",
    "command-r7b-12-2024", "z-ai/glm-5.3-flash:free", "codestral-latest",
]  # fmt: skip


@pytest.mark.parametrize("id", NO_CHATS)
def test_models_that_do_not_chat_are_known_by_name(id):
    assert not offer({"id": id}).chats


@pytest.mark.parametrize("id", CHATS)
def test_models_that_chat_are_not_taken_for_others(id):
    assert offer({"id": id}).chats


@pytest.mark.parametrize(
    "row",
    [
        {"type": "embedding"},
        {"type": "image"},
        {"task": "text-to-speech"},
        {"active": False},
        {"deprecated": True},
        {"archived": True},
        {"capabilities": {"completion_chat": False}},
        {"endpoints": ["embed", "classify"]},
        {"supportedGenerationMethods": ["embedContent"]},
        {"architecture": {"output_modalities": ["image"]}},
    ],
)
def test_models_that_do_not_chat_are_known_by_what_the_list_says(row):
    assert not offer({"id": "m", **row}).chats


@pytest.mark.parametrize(
    "row",
    [
        {"type": "chat"},
        {"type": "model"},
        {"active": True},
        {"endpoints": ["chat", "generate"]},
        {"supportedGenerationMethods": ["generateContent", "countTokens"]},
        {"architecture": {"output_modalities": ["text", "image"]}},
    ],
)
def test_models_that_chat_are_known_by_what_the_list_says(row):
    assert offer({"id": "m", **row}).chats


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["type", "task"])
def test_long_words_of_a_list_hold_nobody_up(name):
    """A pattern that takes the square of a length would stop the whole process for days."""
    assert offer({"id": "m", name: "_" * 4_000_000}).chats
    assert not offer({"id": "m", name: "_" * 4_000_000 + "guard"}).chats


# --- which of them are used ---------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    def read(**env):
        return router.Config.from_env({"HR_HOME": str(tmp_path), **env})

    return read


@pytest.fixture
def chosen(config):
    """chosen(ids, most, SETTING=value): the models of groq (or `name`) beside such a list."""

    def choose(ids, most=8, name="groq", **env):
        stem = router.provider_named(name).key_env[0]
        (service,) = config(**{stem: "key-0123456789", **env}).services
        found = offers([{"id": id} if isinstance(id, str) else id for id in ids], name)
        facts = {f"{name}/{one.id}".lower(): one.facts for one in found}
        made = router.with_listed(service, found, ModelFacts(None, facts), most)
        return made and (list(made.models), list(made.unlisted))

    return choose


def test_chosen_models_that_are_listed_stay_in_their_order(chosen):
    assert chosen(["a", "B", "c"], 2, GROQ_MODEL="c,gone,b") == (["c", "b"], ["gone"])


def test_the_limit_never_drops_a_chosen_model(chosen):
    assert chosen(["a", "b", "c", "d"], 1, GROQ_MODEL="a,b,c") == (["a", "b", "c"], [])


def test_where_no_chosen_model_is_left_the_best_listed_are_used(chosen):
    ids = ["x-7b", "gpt-6", "whisper-1", "x-70b"]
    assert chosen(ids, 2, GROQ_MODEL="gone") == (["gpt-6", "x-70b"], ["gone"])


def test_nothing_is_changed_where_nothing_would_be_left(chosen):
    assert chosen(["whisper-1"], GROQ_MODEL="gone") is None


def test_the_cheapest_come_first_then_the_strongest_then_by_name(chosen):
    def priced(id, price):
        return {"id": id, "pricing": {"input": price, "output": price}}

    ids = ["unpriced-400b", priced("dear-400b", 30), priced("b-7b", 0.1), priced("a-7b", 0.1),
           priced("c-70b", 0.1), "chosen"]  # fmt: skip
    found = chosen(ids, name="together", TOGETHER_MODEL="chosen")
    assert found == (["chosen", "c-70b", "a-7b", "b-7b", "unpriced-400b", "dear-400b"], [])


def test_one_name_of_each_model_is_added(chosen):
    ids = ["m-70b-2024-08-06", "m-70b", "m-70b-latest", "n-70b-2411", "n-70b-2506", "o-70b:latest"]
    assert chosen(ids, GROQ_MODEL="gone")[0] == ["m-70b", "n-70b-2506", "o-70b:latest"]
    assert chosen(ids, GROQ_MODEL="m-70b-latest,o-70b")[0] == [
        "m-70b-latest", "o-70b", "n-70b-2506",
    ]  # fmt: skip


def test_excluded_models_are_not_added(chosen):
    found = chosen(["a", "b", "c"], GROQ_MODEL="a,b", GROQ_EXCLUDE_MODELS="B,C")
    assert found == (["a"], [])


def test_models_known_as_retired_or_as_embeddings_are_not_added(chosen):
    row = next(model for model in router.model_rows() if model.retired)
    assert chosen([row.id, "a"], name=row.provider, **{f"{row.provider.upper()}_MODEL": "a"}) in (
        (["a"], []), None,
    )  # fmt: skip
    found = chosen(["gemini-embedding-001", "m"], name="gemini", GEMINI_MODEL="m")
    assert found == (["m"], [])


@pytest.mark.parametrize("name", ["openrouter", "naga", "opencode", "kilo"])
def test_some_providers_are_searched_for_free_models_only(chosen, name):
    ids = ["v/paid", "v/a:free", "b-free", "v/free", "freeway", "chosen"]
    found, _ = chosen(ids, name=name, **{f"{name.upper()}_MODEL": "chosen"})
    assert (found[0], sorted(found[1:])) == ("chosen", ["b-free", "v/a:free", "v/free"])


def test_a_provider_whose_free_models_have_no_mark_is_searched_by_price(chosen):
    free, paid = ({"input_price": price, "output_price": price} for price in (0, 1e-6))
    ids = [{"id": "free", **free}, {"id": "paid", **paid}, "unpriced", "chosen"]
    assert chosen(ids, name="requesty", REQUESTY_MODEL="chosen")[0] == ["chosen", "free"]


@pytest.mark.parametrize(
    ("model", "listed", "there"),
    [
        ("m", "M", True),
        ("m", "m2", False),
        ("llama3.2", "llama3.2:latest", True),
        ("gpt-oss:20b", "gpt-oss:120b", False),
        ("claude-haiku-4-5", "claude-haiku-4-5-20251001", True),
        ("gpt-4o-2024-05-13", "gpt-4o-2024-11-20", False),
        ("mistral-small-latest", "mistral-small-2603", True),
        ("v/m:nitro", "v/m", True),
        ("v/m:free", "v/m", False),
        ("v/m", "v/m:free", False),
    ],
)
def test_names_that_mean_a_listed_model(model, listed, there):
    names = router.names_listed([Offer(listed, True, {})])
    assert router.is_listed(model, names) is there


def test_a_list_tells_what_is_not_known(config):
    facts = {"window": 50_000, "price_in": 1.0, "price_out": 2.0, "tools": False, "vision": True,
             "price_cached": 0.1}  # fmt: skip
    known = ModelFacts({"groq/own": {"window": 7}}, {"groq/new-7b": facts, "groq/own": facts,
                                                     "groq/openai/gpt-oss-20b": facts})  # fmt: skip
    new = known.facts("groq", "New-7b")
    assert (new.window, new.price_in, new.tools, new.vision, new.rating) == (
        50_000,
        1,
        False,
        True,
        4,
    )
    assert new.price_cached == 0.1
    assert known.facts("groq", "own").window == 7
    assert known.facts("groq", "openai/gpt-oss-20b") == ModelFacts().facts(
        "groq", "openai/gpt-oss-20b"
    )
    assert known.facts("mistral", "new-7b").window is None


# --- who is asked -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "env", "asked"),
    [
        ("groq", {}, False),
        ("groq", ON, True),
        ("groq", {"GROQ_AUTO_DISCOVER_MODELS": "1"}, True),
        ("groq", {**ON, "GROQ_AUTO_DISCOVER_MODELS": "0"}, False),
        ("groq", {**ON, "GROQ_AUTO_DISCOVER_MODELS": ""}, False),
        ("groq", {**ON, "GROQ_MODEL": "a", "GROQ_EXCLUDE_MODELS": "a"}, True),
        ("anthropic", ON, False),
        ("anthropic", {"ANTHROPIC_AUTO_DISCOVER_MODELS": "1"}, True),
        ("huggingface", ON, False),
        ("huggingface", {**ON, "HUGGINGFACE_AUTO_DISCOVER_MODELS": "1"}, True),
        ("local", {**ON, "LOCAL_MODEL": "m"}, False),
        ("local", {"LOCAL_MODEL": "m", "LOCAL_AUTO_DISCOVER_MODELS": "yes"}, True),
        ("github_models", ON, False),  # it is retired
        ("github_models", {**ON, "GITHUB_MODELS_BASE_URL": "http://127.0.0.1:1"}, True),
    ],
)
def test_which_providers_are_asked(config, name, env, asked):
    made = config(**{router.provider_named(name).key_env[0]: "key-0123456789", **env})
    assert [router.asks_for_models(service, made) for service in made.services] == [asked]


def test_codex_is_not_asked_unless_it_is_told_to_be():
    assert router.provider_named("codex").lists == "unasked"


def test_the_settings_have_defaults_and_bounds(config):
    assert (config().auto_discover_models, config().auto_discover_limit) == (False, 8)
    assert config(AUTO_DISCOVER_MODEL_LIMIT="1").auto_discover_limit == 1
    with pytest.raises(router.ConfigError, match="AUTO_DISCOVER_MODEL_LIMIT"):
        config(AUTO_DISCOVER_MODEL_LIMIT="0")


# --- over the wire ------------------------------------------------------------------------


class Hub:
    """A running router, seen from inside and outside."""

    def __init__(self, live):
        self.live, self.router = live, live.app.extensions["router"]

    def status(self, name="groq"):
        return self.live.session.get(f"{self.live.url}/v1/status").json()["providers"][name]

    def models(self, name="groq"):
        return self.status(name)["models"]

    def listed(self):
        rows = self.live.session.get(f"{self.live.url}/v1/models").json()["data"]
        return [row["id"] for row in rows]

    def asked(self, name="groq"):
        """Wait until a list came and is used, or did not come."""
        finder = self.router.discovery
        until(lambda: self.seen(name) and finder._used is finder._found)
        return self.status(name)["discovery"]

    def seen(self, name):
        row = self.status(name)["discovery"]
        return row and (row["listed_at"] or row["error"])

    def again(self):
        """Ask everybody once more, in this thread."""
        finder = self.router.discovery
        with finder._lock:
            finder._found = {
                name: router.replace(one, due=0.0) for name, one in finder._found.items()
            }
        finder.run_due()


@pytest.fixture
def hub(serve):
    """hub(settings, ..., SETTING=value): a router that has begun to ask for lists."""

    def start(*rows, **more):
        made = Hub(serve(**{k: v for row in (ON, *rows, more) for k, v in row.items()}))
        made.router.start()
        return made

    return start


def named(request):
    """An answer that names the model that was asked."""
    if request.json.get("stream"):
        return Stream(chunks=chunks("hel", "lo"))
    return Reply(200, completion(model=request.model))


@pytest.fixture
def shelf(upstream):
    """shelf(answer to a GET, script): a provider that lists models."""

    def make(answer, *script):
        up = upstream(*(script or (named,)))
        up.on_get = answer if callable(answer) else lambda request: answer
        return up

    return make


def test_listed_models_are_used_shown_and_routed(hub, shelf):
    up = shelf(
        Reply(200, {"data": [{"id": "m1"}, {"id": "brand-new-70b", "context_window": 77_777},
                             {"id": "whisper-1"}]})
    )  # fmt: skip
    here = hub(provider("groq", up, "m1", "gone"))
    found = here.asked()
    assert here.models() == ["m1", "brand-new-70b"]
    assert (found["listed"], found["added"], found["unlisted"], found["error"]) == (
        3, ["brand-new-70b"], ["gone"], None,
    )  # fmt: skip
    assert abs(found["listed_at"] - time.time()) < 600
    assert {"groq/m1", "groq/brand-new-70b"} <= set(here.listed())
    assert "groq/gone" not in here.listed()
    assert here.live.chat(model="brand-new-70b").json()["model"] == "brand-new-70b"
    new = here.status()["model_caps"][1]
    assert (new["context_window"], new["rating"]) == (77_777, 2)
    (get,) = up.gets
    assert (get.path, get.key) == ("/v1/models", "groq-key-1")


def test_nobody_is_asked_by_default(hub, shelf):
    up = shelf(lists("m1", "m2"))
    here = hub(provider("groq", up), AUTO_DISCOVER_MODELS="0")
    assert here.live.chat(model="groq/m1").status_code == 200
    assert (up.gets, here.status()["discovery"], here.router.discovery._thread) == ([], None, None)


def test_ids_of_gemini_lose_their_prefix(hub, shelf):
    up = shelf(lists("models/gemini-9-flash", "models/gemini-embedding-001", "models/gemini-9-pro"))
    here = hub(provider("gemini", up, "gemini-9-pro"))
    here.asked("gemini")
    assert here.models("gemini") == ["gemini-9-pro", "gemini-9-flash"]


def test_ids_of_others_keep_theirs(hub, shelf):
    here = hub(provider("groq", shelf(lists("models/a")), "models/a"))
    here.asked()
    assert here.models() == ["models/a"]


def test_anthropic_is_asked_in_its_own_scheme_and_page_by_page(hub, shelf):
    def answer(request):
        if "after_id=claude-two" in request.path:
            return lists("claude-three", has_more=False, last_id="claude-three")
        return lists("claude-one", "claude-two", has_more=True, last_id="claude-two")

    up = shelf(answer)
    here = hub(provider("anthropic", up, "claude-one"), ANTHROPIC_AUTO_DISCOVER_MODELS="1")
    assert here.asked("anthropic")["listed"] == 3
    assert here.models("anthropic")[0] == "claude-one"
    assert set(here.models("anthropic")) == {"claude-one", "claude-two", "claude-three"}
    heads = [get.headers for get in up.gets]
    assert [head["x-api-key"] for head in heads] == ["anthropic-key-1"] * 2
    assert all("authorization" not in head and "anthropic-version" in head for head in heads)


def test_a_list_without_an_end_is_given_up(hub, shelf):
    up = shelf(lists("a", has_more=True, last_id="a"))
    here = hub(provider("anthropic", up, "m"), ANTHROPIC_AUTO_DISCOVER_MODELS="1")
    assert "pages" in here.asked("anthropic")["error"]
    assert (here.models("anthropic"), len(up.gets)) == (["m"], Discovery.MAX_PAGES)


def test_a_chatgpt_account_is_asked_with_its_token(hub, shelf, tmp_path):
    token = jwt(time.time() + 9000)
    (tmp_path / "auth.json").write_text(json.dumps({"codex_accounts": [row(access=token)]}))
    up = shelf(Reply(200, {"models": [{"slug": "gpt-9", "context_window": 272_000}]}))
    here = hub({"CODEX_BASE_URL": up.url, "CODEX_AUTO_DISCOVER_MODELS": "1"})
    here.asked("codex")
    assert here.models("codex") == ["gpt-9"]
    (get,) = up.gets
    assert (get.path, get.key) == ("/backend-api/codex/models?client_version=0.0.0", token)
    assert get.headers["chatgpt-account-id"] == "acc-1"


def test_a_local_server_is_asked_with_what_stands_for_a_key(hub, shelf):
    up = shelf(Reply(200, {"models": [{"name": "qwen3:8b"}, {"name": "nomic-embed-text"}]}))
    here = hub(provider("local", up, "gone"), LOCAL_AUTO_DISCOVER_MODELS="1")
    here.asked("local")
    assert here.models("local") == ["qwen3:8b"]
    assert up.gets[0].headers["authorization"] == "Bearer local"


def test_a_provider_without_models_gets_those_it_lists(hub, shelf):
    here = hub(provider("groq", shelf(lists("a", "b")), "a"), GROQ_EXCLUDE_MODELS="a")
    here.asked()
    assert here.models() == ["b"]
    assert here.live.chat().json()["model"] == "b"


def test_the_limit_is_kept(hub, shelf):
    up = shelf(lists(*(f"x{n}-7b" for n in range(50))))
    here = hub(provider("groq", up, "x9-7b"), AUTO_DISCOVER_MODEL_LIMIT="3")
    here.asked()
    assert here.models() == ["x9-7b", "x0-7b", "x1-7b"]


def test_what_is_known_of_a_discovered_model_can_be_overridden(hub, shelf):
    up = shelf(lists("m1", "new.7b"))
    here = hub(provider("groq", up), GROQ_NEW_7B_SUPPORTS_TOOLS="0")
    here.asked()
    assert [row["supports_tools"] for row in here.status()["model_caps"]] == [True, False]


# --- when no list comes ---------------------------------------------------------------------

BAD_LISTS = [
    (Reply(404, {"error": {"message": "no such page"}}), "404 no such page"),
    (Reply(500, "oops"), "500 oops"),
    (Reply(410, ""), "410"),
    (Reply(204, b""), "204"),
    (html(), "what came is none, or empty"),
    (Reply(200, "{"), "what came is none, or empty"),
    (Reply(200, ""), "what came is none, or empty"),
    (Reply(200, {"data": []}), "what came is none, or empty"),
    (Reply(200, {"error": {"message": "x"}}), "what came is none, or empty"),
    (Reply(200, "[" * 100_000), "what came is none, or empty"),
    (lists("whisper-1", "bge-m3"), "none of its models can be used"),
    (Reply(200, [{"id": "a"}] * 9, stop_at=20), ""),
    (Reset(), ""),
    (Hang(60), "no answer in time"),
    (drip(lists(*(f"m{n}" for n in range(50))), 0.1), "no answer in time"),
    (Reply(200, [f"m{n}" for n in range(20_000)]), "larger than"),
]


@pytest.mark.parametrize(("answer", "why"), BAD_LISTS)
def test_without_a_list_the_models_stay(hub, shelf, monkeypatch, answer, why):
    monkeypatch.setattr(Discovery, "LIMIT_S", 0.5)
    monkeypatch.setattr(Discovery, "MAX_BYTES", 150_000)
    up = shelf(answer)
    here = hub(provider("groq", up, "m1", "m2"))
    found = here.asked()
    assert why in found["error"]
    assert (found["listed"], found["listed_at"], here.models()) == (0, None, ["m1", "m2"])
    assert here.live.chat(model="m2").json()["model"] == "m2"


def test_a_provider_that_is_away_is_no_harm(hub):
    here = hub(provider("groq", "http://127.0.0.1:1/v1", "m1"))
    assert here.asked()["error"]
    assert here.models() == ["m1"]


def test_a_redirect_is_not_followed_with_the_key(hub, shelf):
    other = shelf(lists("m1", "evil"))
    up = shelf(Reply(302, "", {"location": f"{other.url}/v1/models"}))
    here = hub(provider("groq", up))
    assert here.asked()["error"].startswith("302")
    assert (here.models(), other.gets) == (["m1"], [])


def test_a_failure_keeps_what_was_listed_before_and_is_told_once(hub, shelf, caplog):
    answers = [lists("m1", "m2"), *[Reply(500, "oops")] * 3, lists("m1", "m3")]
    up = shelf(lambda request: answers[min(len(up.gets), 5) - 1])
    with caplog.at_level(logging.INFO):
        here = hub(provider("groq", up))
        here.asked()
        for _ in range(3):
            here.again()
            assert (here.models(), here.status()["discovery"]["error"]) == (
                ["m1", "m2"],
                "500 oops",
            )
        here.again()
    assert (here.models(), here.status()["discovery"]["error"]) == (["m1", "m3"], None)
    assert caplog.text.count("its list of models did not come") == 1


def test_failures_are_asked_again_ever_more_rarely(hub, shelf):
    here = hub(provider("groq", shelf(Reply(500, "oops"))))
    here.asked()
    waits = []
    for _ in range(12):
        waits.append(here.router.discovery._found["groq"].wait_s)
        here.again()
    assert 800 < waits[0] < 1000
    assert waits == sorted(waits)
    assert waits[-1] == Discovery.EVERY_S


def test_a_list_is_asked_for_again_a_day_later(hub, shelf):
    here = hub(provider("groq", shelf(lists("m1"))))
    here.asked()
    assert 70_000 < here.router.discovery.run_due() < 100_000


def test_a_refused_key_leaves_the_question_to_the_next(hub, shelf):
    def answer(request):
        return (
            Reply(401, {"error": {"message": "bad"}}) if request.key == "k1" else lists("m1", "x")
        )

    up = shelf(answer)
    here = hub(provider("groq", up, keys="k1,k2,k3"))
    here.asked()
    assert (here.models(), [get.key for get in up.gets]) == (["m1", "x"], ["k1", "k2"])


def test_dead_keys_are_not_shown(hub, shelf):
    up = shelf(lists("m1", "x"))
    here = hub(provider("groq", up, keys="k1,k2"), AUTO_DISCOVER_MODELS="0")
    here.router.keys.rest("groq", "k1", router.ANY, 900, "dead_key")
    ask = router.replace(here.router.config.services[0], discover=True)
    here.router.discovery._ask(ask)
    here.router.keys.rest("groq", "k2", router.ANY, 900, "dead_key")
    with pytest.raises(router.NoList, match="none of its keys works"):
        here.router.discovery._ask(ask)
    assert [get.key for get in up.gets] == ["k2"]


def test_no_key_is_logged_or_shown(hub, shelf, caplog):
    up = shelf(Reply(403, {"error": {"message": f"{SECRET} may not list"}}))
    with caplog.at_level(logging.DEBUG):
        here = hub(provider("groq", up, keys=SECRET))
        assert "may not list" in here.asked()["error"]
        page = here.live.session.get(f"{here.live.url}/v1/status").text
    assert SECRET not in caplog.text + page


def test_a_bug_ends_neither_the_thread_nor_the_models(hub, shelf, monkeypatch, caplog):
    up = shelf(lists("m1", "m2"))

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(router, "offers_in", broken)
    here = hub(provider("groq", up))
    assert here.asked()["error"] == "it could not be read"
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    here.again()
    assert here.models() == ["m1", "m2"]


# --- what a list lacks ------------------------------------------------------------------------


def unlisted(caplog):
    """The line about models that a list lacks."""
    rows = [row for row in caplog.records if "does not list" in row.getMessage()]
    assert len(rows) < 2
    return rows[0] if rows else None


def test_a_named_model_that_is_not_listed_is_told_and_still_answers_by_name(hub, shelf, caplog):
    with caplog.at_level(logging.INFO):
        here = hub(provider("groq", shelf(lists("m1")), "m1", "mine"), STRICT_MODEL="1")
        here.asked()
        until(lambda: unlisted(caplog))
        here.again()
    line = unlisted(caplog)
    assert (line.levelname, "groq does not list mine" in line.getMessage()) == ("WARNING", True)
    for model in ("mine", "groq/mine", "MINE"):
        assert here.live.chat(model=model).json()["model"].lower() == "mine"
    assert {here.live.chat().json()["model"] for _ in range(4)} == {"m1"}


def test_a_default_model_that_is_not_listed_is_no_warning(hub, shelf, caplog):
    row = provider("groq", shelf(lists("new")))
    del row["GROQ_MODEL"]
    with caplog.at_level(logging.INFO):
        here = hub(row)
        here.asked()
        until(lambda: unlisted(caplog))
    assert (here.models(), unlisted(caplog).levelname) == (["new"], "INFO")


def test_an_unlisted_model_leaves_its_name_to_those_who_list_it(hub, shelf):
    groq, mistral = shelf(lists("m1")), shelf(lists("shared"))
    here = hub(provider("groq", groq, "m1", "shared"), provider("mistral", mistral, "shared"))
    here.asked()
    here.asked("mistral")
    assert here.live.chat(model="shared").headers["X-Provider"] == "mistral"


# --- beside requests ----------------------------------------------------------------------------


def test_a_slow_list_delays_neither_the_start_nor_requests_nor_the_end(hub, shelf):
    up = shelf(Hang(60))
    began = time.monotonic()
    here = hub(provider("groq", up))
    until(lambda: up.gets)
    assert here.live.chat().status_code == 200
    assert here.status()["discovery"]["error"] is None
    here.router.close()
    assert time.monotonic() - began < 8  # the question would go on for 10 s
    assert up.gets[0].closed.wait(5)
    assert not any(thread.name == "discovery" for thread in threading.enumerate())


def test_a_process_ends_while_a_list_is_waited_for(launch, shelf):
    up = shelf(Hang(60))
    running = launch("serve", **ON, **provider("groq", up))
    until(lambda: up.gets)
    began = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("part", ["discovery", "checks"])
def test_a_bell_that_rings_while_it_is_put_back_is_heard(make_app, part):
    finder = getattr(make_app().extensions["router"], part)
    put_back = finder._bell.clear

    def clear():
        finder._bell.clear = put_back
        finder.close()
        put_back()

    finder._bell.clear = clear
    finder._bell.set()
    thread = threading.Thread(target=finder._run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_only_a_few_are_asked_at_once_and_each_list_is_used_as_it_comes(hub, shelf):
    names = ("groq", "mistral", "cohere", "zai", "nvidia", "xai")
    slow = {name: shelf(Hang(60, lists("m1", "new"))) for name in names}
    quick = shelf(lists("m1", "new"))
    here = hub(provider("cerebras", quick), *(provider(name, up) for name, up in slow.items()))
    until(lambda: here.models("cerebras") == ["m1", "new"])
    time.sleep(0.3)
    assert sum(len(up.gets) for up in slow.values()) == Discovery.MOST
    for up in slow.values():
        up.open_gate()
    for name in names:
        until(lambda name=name: here.models(name) == ["m1", "new"])


def test_requests_lose_nothing_while_lists_come(hub, shelf, monkeypatch):
    """A list that changes all the time, under forty clients."""
    monkeypatch.setattr(Discovery, "EVERY_S", 0.01)
    up = shelf(lambda request: lists("m1", f"n{len(up.gets) % 7}"))
    here = hub(provider("groq", up))

    def ask(number):
        model = ("m1", "groq/m1", f"groq/n{number % 7}", "hermes-router")[number % 4]
        answer = here.live.chat(model=model, stream=number % 2 == 0)
        return answer.status_code, b"error" in answer.content

    with ThreadPoolExecutor(40) as pool:
        answers = set(pool.map(ask, range(600)))
    assert answers == {(200, False)}
    until(lambda: len(up.gets) > 10)
    assert here.router.gate.inside == 0


def test_a_conversation_goes_on_while_its_model_leaves_the_list(hub, shelf):
    answers = [lists("m1", "m2"), lists("m2")]
    up = shelf(lambda request: answers[min(len(up.gets), 2) - 1], Hang(60, chat("late")))
    here = hub(provider("groq", up))
    here.asked()
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(here.live.chat, model="groq/m1")
        up.wait_for(1)
        here.again()
        assert here.models() == ["m2"]
        up.open_gate()
        assert under_way.result(30).status_code == 200


# --- settings that change -----------------------------------------------------------------------


@pytest.fixture
def editable(serve, tmp_path):
    """editable(settings of .env, ...): the router, and a function that changes them."""

    def write(*rows, **more):
        lines = {k: v for row in (*rows, more) for k, v in row.items()}
        (tmp_path / ".env").write_text("".join(f"{k}={v}\n" for k, v in lines.items()))

    def start(*rows):
        write(ON, *rows)
        made = Hub(serve())
        made.router.start()

        def change(*rows, **more):
            write(*rows, **more)
            assert made.live.app.extensions["reloader"].reload() == ""

        return made, change

    return start


def test_a_reload_loses_nothing_and_asks_nobody_again(editable, shelf, tmp_path):
    up = shelf(lists("m1", "m2", "m3"))
    row = provider("groq", up)
    here, change = editable(row)
    here.asked()
    change(ON, row, MAX_STREAMS="77")
    assert (here.router.config.max_streams, here.models()) == (77, ["m1", "m2", "m3"])
    change(ON, row, AUTO_DISCOVER_MODEL_LIMIT="2")
    assert here.models() == ["m1", "m2"]
    change(ON, row, GROQ_EXCLUDE_MODELS="m2")
    assert here.models() == ["m1", "m3"]
    change(ON, {**row, "GROQ_MODEL": "m3"})
    assert here.models() == ["m3", "m1", "m2"]
    (tmp_path / "models.json").write_text('{"groq/m2": {"retired": true}, "m3": {"rating": 1}}')
    change(ON, row)
    assert here.models() == ["m1", "m3"]
    (tmp_path / "models.json").unlink()
    change(row)
    assert (here.models(), here.status()["discovery"]) == (["m1"], None)
    change(ON, row, GROQ_AUTO_DISCOVER_MODELS="0")
    assert here.models() == ["m1"]
    change(ON, row)
    assert here.models() == ["m1", "m2", "m3"]
    time.sleep(0.3)
    assert len(up.gets) == 1


def test_a_reload_that_changes_nothing_takes_nothing_over(editable, shelf, monkeypatch):
    row = provider("groq", shelf(lists("m1", "m2")))
    here, change = editable(row)
    here.asked()
    until(lambda: here.models() == ["m1", "m2"])
    config = here.router.config
    change(ON, row)
    assert here.router.config is config


def test_another_place_is_asked_anew_and_other_keys_too(editable, shelf):
    first, second = shelf(lists("m1", "m2")), shelf(lists("m1", "m9"))
    here, change = editable(provider("groq", first))
    here.asked()
    change(ON, provider("groq", second))
    until(lambda: here.models() == ["m1", "m9"])
    change(ON, provider("groq", second, keys="another"))
    until(lambda: len(second.gets) == 2)
    assert here.models() == ["m1", "m9"]


def test_what_another_place_listed_is_not_used(editable, shelf):
    here, change = editable(provider("groq", shelf(lists("m1", "m2"))))
    here.asked()
    silent = shelf(Hang(60))
    change(ON, provider("groq", silent))
    assert here.models() == ["m1"]
    until(lambda: silent.gets)


def test_discovery_is_turned_on_as_a_feature(editable, shelf):
    up = shelf(lists("m1", "m2"))
    here, change = editable(provider("groq", up), {"AUTO_DISCOVER_MODELS": "0"})
    live = here.live
    listed = live.session.get(f"{live.url}/v1/config/features").json()["addons"]
    (row,) = [row for row in listed if row["name"] == "model_discovery"]
    assert (row["enabled"], row["env"], row["on"], row["off"]) == (
        False, "AUTO_DISCOVER_MODELS", "1", "0",
    )  # fmt: skip
    url = f"{live.url}/v1/config/features/model_discovery"
    assert live.session.post(url, json={"enabled": True}).status_code == 200
    until(lambda: here.models() == ["m1", "m2"])
    assert live.session.post(url, json={"enabled": False}).json()["restart_required"] is False
    assert here.models() == ["m1"]
    url = f"{live.url}/v1/config/settings"
    assert live.session.post(url, json={"GROQ_AUTO_DISCOVER_MODELS": True}).status_code == 200
    assert here.models() == ["m1", "m2"]


# --- over a restart -------------------------------------------------------------------------------


def test_a_restart_begins_with_what_was_listed(hub, shelf, tmp_path):
    answers = [Reply(200, [{"id": "m1"}, {"id": "m2", "context_window": 5000}]), Hang(60)]
    up = shelf(lambda request: answers[min(len(up.gets), 2) - 1])
    row = provider("groq", up, "m1", "gone", keys=SECRET)
    before = hub(row)
    before.asked()
    until(lambda: before.models() == ["m1", "m2"])
    before.router.close()
    text = (tmp_path / "router_state.json").read_text()
    assert "m2" in text
    assert SECRET not in text
    after = hub(row)
    assert after.models() == ["m1", "m2"]
    found = after.status()["discovery"]
    assert (found["listed"], found["unlisted"], found["error"]) == (2, ["gone"], None)
    assert after.status()["model_caps"][1]["context_window"] == 5000
    until(lambda: len(up.gets) == 2)  # it is asked all the same


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.update(place="elsewhere"),
        lambda row: row.update(at=time.time() - 8 * 86_400),
        lambda row: row.update(at=time.time() + 9_000),
        lambda row: row.update(at="never"),
        lambda row: row.update(models="m9"),
        lambda row: row.update(models=[["m9", True, {}]]),
        lambda row: row.update(models='[["<b>", true, {}], ["m9"], 7, ["m9", 1, {}], ["m9"'),
        lambda row: row.update(models='[["<b>", true, {}], ["m9"], 7, ["m9", 1, {}]]'),
        lambda row: row.clear(),
    ],
)
def test_lists_of_the_file_that_cannot_be_used_are_passed_over(hub, shelf, tmp_path, change):
    answers = [lists("m1", "m2"), Hang(60)]
    up = shelf(lambda request: answers[min(len(up.gets), 2) - 1])
    before = hub(provider("groq", up))
    before.asked()
    before.router.close()
    path = tmp_path / "router_state.json"
    document = json.loads(path.read_text())
    change(document["lists"]["groq"])
    path.write_text(json.dumps(document))
    after = hub(provider("groq", up))
    assert after.models() == ["m1"]
    until(lambda: len(up.gets) == 2)


def test_facts_of_the_file_are_checked():
    good = {"window": 9000, "price_in": 0.0, "price_cached": 0.5, "vision": True}
    bad = {"window": -1, "id": "x", "rating": 9, "tools": "yes", "nothing": 1}
    assert router.kept_offer(["m", True, {**good, **bad, "window": 9000}]) == Offer("m", True, good)


def test_the_state_file_stays_small(config):
    made = config(GROQ_API_KEY="k1", MISTRAL_API_KEY="k2", XAI_API_KEY="k3")
    finder = Discovery(None, None, None, lambda: None)
    finder.adopt(made, frozenset())
    many = tuple(Offer(f"m{n}", True, {}) for n in range(Discovery.MAX_KEPT - 1))
    for service, held in zip(made.services, (many, many, many[:1]), strict=True):
        finder._note(service, router.Listing(service.url, held, 1.0), 9.0)
    assert list(finder.kept()) == [made.services[0].name, made.services[2].name]
    assert finder.kept() is finder.kept()


# --- for people -----------------------------------------------------------------------------------


def test_the_commands_tell_what_was_found(hub, shelf, monkeypatch, capsys, tmp_path):
    groq, mistral = shelf(lists("m1", "m2")), shelf(Reply(500, "oops"))
    rows = {**provider("groq", groq, "m1", "gone"), **provider("mistral", mistral)}
    here = hub(rows)
    here.asked()
    here.asked("mistral")
    env = {"HR_HOME": str(tmp_path), "HOME": str(tmp_path), "PROXY_API_KEYS": KEY, **ON, **rows}
    monkeypatch.setattr(os, "environ", {**env, "PORT": str(here.live.port)})
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    router.main(["doctor"])
    told = capsys.readouterr().out
    assert "groq does not list gone" in told
    assert "mistral: its list of models did not come: 500 oops" in told
    router.main(["model", "list", "--json"])
    listed = {row["provider"]: row for row in json.loads(capsys.readouterr().out)}
    assert (listed["groq"]["models"], listed["groq"]["source"]) == (
        ["m1", "m2"], "override, discovered",
    )  # fmt: skip
    router.main(["status"])
    assert "! groq does not list gone" in capsys.readouterr().out


def test_a_router_that_is_away_is_no_harm_to_the_commands(monkeypatch, capsys, tmp_path):
    env = {"HR_HOME": str(tmp_path), "HOME": str(tmp_path), **ON, "PORT": "1",
           **provider("groq", "http://127.0.0.1:1/v1")}  # fmt: skip
    monkeypatch.setattr(os, "environ", env)
    assert router.main(["model", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["models"] == ["m1"]
