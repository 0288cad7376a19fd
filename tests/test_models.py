"""Models: every default has a row, ratings follow whole words, prices stay where they are."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import router

FACTS = router.ModelFacts()
ROWS = list(router.model_rows())


def facts(name):
    provider, _, model = name.partition("/")
    return FACTS.facts(provider, model)


# ---- the tables


def test_rows_are_unique_and_ordered_like_the_providers():
    offers = [(row.provider, row.id.lower()) for row in ROWS]
    assert len(offers) == len(set(offers))
    order = [row.name for row in router.PROVIDERS]
    assert [row.provider for row in ROWS] == sorted((p for p, _ in offers), key=order.index)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.provider}/{row.id}")
def test_row_is_plausible(row):
    assert 1 <= row.rating <= 5
    assert row.window is None or 1_000 <= row.window <= 12_000_000
    assert row.max_output is None or 1_000 <= row.max_output <= 2_000_000
    assert (row.price_in is None) == (row.price_out is None)
    assert row.price_in is None or 0 <= row.price_in <= 200
    assert row.embedding or row.price_in is None or row.price_in <= row.price_out
    assert row.price_cached is None or 0 < row.price_cached <= row.price_in
    if router.is_free_id(row.id):
        assert row.price_in == row.price_out == 0


def test_the_makers_whose_caches_agents_live_on_have_prices_of_cached_input():
    makers = ("anthropic", "deepseek", "gemini", "openai", "xai")
    paid = [row for row in ROWS if row.provider in makers and row.price_in and not row.embedding]
    unknown = {row.id for row in paid if row.price_cached is None}
    assert unknown == {"gpt-3.5-turbo", "gpt-4-turbo"}  # older than caches


def test_every_default_model_has_a_living_row():
    rows = {(row.provider, row.id): row for row in ROWS}
    for provider in router.PROVIDERS:
        for model in provider.models:
            assert not rows[provider.name, model].retired
            assert not rows[provider.name, model].embedding
        if provider.embed_model:
            assert rows[provider.name, provider.embed_model].embedding


def test_rows_and_the_rating_by_name_agree():
    chat = [row for row in ROWS if not row.embedding]
    gaps = [abs(row.rating - router.rate_model(row.id)) for row in chat]
    assert max(gaps) <= 1
    assert gaps.count(0) >= 0.95 * len(gaps)


def test_family_tables_are_spelled_as_ids_are():
    families = [*router.VISION_FAMILIES, *(family for family, _ in router.RATINGS)]
    for family in families:
        anchored = family.removeprefix("/-")
        assert router.spelled(anchored) == f"--/-{anchored}-"
    assert len(set(families[len(router.VISION_FAMILIES) :])) == len(router.RATINGS)
    assert {rating for _, rating in router.RATINGS} == {1, 2, 3, 4, 5}


# ---- ratings


@pytest.mark.parametrize(
    ("model", "rating"),
    [
        ("gemini-2.5-pro", 1),
        ("gemini-2.5-flash", 2),
        ("gemini-2.5-flash-lite", 3),
        ("gpt-4o", 1),
        ("gpt-4o-mini", 3),
        ("claude-opus-4-1", 1),
        ("claude-sonnet-4-6", 2),
        ("claude-haiku-4-5-20251001", 3),
        ("llama-3.3-70b-versatile", 2),
        ("llama-3.1-8b-instant", 3),
        ("mistral-medium-latest", 2),
        ("command-a-03-2025", 2),
        ("glm-4.5-flash", 3),
        ("nvidia/nemotron-3-super-120b-a12b:free", 2),
        ("deepseek-ai/deepseek-v4-flash", 2),
        ("openai/gpt-oss-120b:cheapest", 3),
        ("kimi-for-coding", 3),
        ("gpt-5.5", 1),
        ("llama3.1", 3),
        ("DeepSeek-V3.2", 2),
        ("qwen3.6-plus-free", 2),
        ("gemma-3-27b-it", 4),
    ],
)
def test_ratings_people_rely_on(model, rating):
    assert router.rate_model(model) == rating
    assert FACTS.facts("anyone", model).rating == rating


@pytest.mark.parametrize(
    ("provider", "sees"), [("anthropic", True), ("codex", True), ("groq", False), ("mine", False)]
)
def test_models_that_nobody_knows_see_images_where_all_do(provider, sees):
    assert FACTS.facts(provider, "something-new").vision is sees


CLASSIC = {
    1: "gpt-5.3-codex gpt-5-codex gpt-5.5 gpt-4o o1 o3 claude-opus claude-opus-4 gemini-2.5-pro "
    "nemotron-3-ultra gpt-4.5 claude-3-7 gemini-2.0-ultra deepseek-r2 qwen3-235b qwen3-72b",
    2: "gemini-2.5-flash gemini-2.0-flash llama-3.3-70b llama-3.1-70b mistral-large mistral-medium "
    "command-r-plus command-a nemotron nemotron-3-super big-pickle deepseek-v4 deepseek-v4-flash "
    "deepseek-v3 deepseek-v2 claude-sonnet claude-3-5 grok-2 qwen2.5-72b qwen-72b qwen3-32b phi-4 "
    "phi-4-reasoning mixtral-8x22b wizardlm-2-8x22b yi-large moonshot-v1 llama-4-maverick "
    "llama-4-scout",
    3: "gemini-2.5-flash-lite gemini-1.5-flash gpt-4o-mini gpt-oss-120b mistral-small "
    "glm-4.5-flash glm-4.7-flash llama-3.1-8b-instant qwen2.5-32b qwen3-14b qwen3-8b phi-3.5 "
    "phi-3-medium mixtral-8x7b wizardlm-2-7b yi-medium yi-6b",
    4: "command-r7b command-r7b-12-2024 llama-3.2-3b mistral-7b qwen2.5-7b qwen3-4b phi-3-mini "
    "phi-3.5-mini yi-mini",
}


@pytest.mark.parametrize(
    ("model", "rating"), [(m, rating) for rating, ids in CLASSIC.items() for m in ids.split()]
)
def test_classic_families(model, rating):
    assert router.rate_model(model) == rating
    assert router.rate_model(f"vendor/{model.upper()}:free") == rating


@pytest.mark.parametrize(
    ("model", "rating"),
    [
        ("gemini-3-new", 2),  # mini is not in gemini
        ("minimax-m3-free", 2),  # nor in minimax
        ("llama-3.2-11b-vision", 4),  # 11b is not 1b
        ("some-31b", 3),
        ("gpt-5", 1),
        ("gpt-5-nano", 4),
        ("marco-o1", 3),  # o1 is a name, not an ending
        ("openai/o1", 1),
        ("o3-mini", 3),
        ("some-pro-exp-0827", 1),
        ("some-r1-zero", 1),
        ("some-scout", 2),
        ("some-fast", 4),
    ],
)
def test_words_match_whole(model, rating):
    assert router.rate_model(model) == rating


@pytest.mark.parametrize(
    ("model", "rating"),
    [
        ("x-1.5b", 5),
        ("x-3b", 4),
        ("x-8b-instruct", 4),
        ("x:14b", 3),
        ("x-22b", 3),
        ("x-32b", 2),
        ("x-70b", 2),
        ("x-8b-instant", 3),
        ("x-r7b", 4),
        ("x-8x22b", 2),
        ("x-120b-a12b", 2),
        ("x-405b", 1),
        ("x-2.4t-a95b", 1),
        ("x-e4b", 3),  # effective size: not a count of its own
        ("x-ultra", 1),
        ("x-pro", 2),
        ("x-flash", 3),
        ("x-flash-lite", 4),
        ("x-tiny", 5),
        ("x-professional", 3),
        ("x", 3),
        ("", 3),
    ],
)
def test_size_then_words(model, rating):
    assert router.rate_model(model) == rating


@pytest.mark.parametrize(
    "spelling",
    ["Qwen3.8-27B", "qwen-3-8-27b", "qwen/qwen3.8-27b", "qwen3.8:27b", "qwen3p8-27b"],
)
def test_one_spelling_for_all(spelling):
    assert router.family(spelling) == router.family("qwen3.8-27b")


# ---- free ids


@pytest.mark.parametrize(
    ("model", "free"),
    [
        ("a:free", True),
        ("b-free", True),
        ("x/free/y", True),
        ("openrouter/free", True),
        ("a:FREE", True),
        ("freedom", False),
        ("x/freedom", False),
        ("a-free-b", False),
    ],
)
def test_free_ids(model, free):
    assert router.is_free_id(model) is free
    model = FACTS.facts("anyone", model)
    assert (model.price_in == model.price_out == model.price_cached == 0) is free


# ---- looking up


def test_exact_row_with_its_price():
    model = facts("openai/gpt-4o")
    assert (model.price_in, model.price_out, model.price_cached) == (2.5, 10.0, 1.25)
    assert model.window == 128_000
    assert model.tools and model.vision and not model.reasoning and not model.retired
    assert facts("groq/llama-3.3-70b-versatile").retired


def test_the_same_model_elsewhere_has_no_known_price():
    model = FACTS.facts("llm7", "GPT-4o")
    assert (model.provider, model.id, model.window) == ("llm7", "GPT-4o", 128_000)
    assert model.price_in is None and model.price_out is None and model.price_cached is None


def test_a_retirement_is_one_providers_affair():
    assert not FACTS.facts("local", "llama-3.3-70b-versatile").retired


@pytest.mark.parametrize(
    ("model", "row"),
    [
        ("someone/gpt-4o", "openai/gpt-4o"),
        ("gpt-4o-2024-08-06", "openai/gpt-4o"),
        ("gpt-4o-latest", "openai/gpt-4o"),
        ("z-ai/GLM-5.3-flash:fastest", "zai/glm-5.3-flash"),
        ("anthropic/claude-opus-5.5", "anthropic/claude-opus-5-5"),
        ("accounts/x/models/glm-5p3", "zai/glm-5.3"),
        ("claude-haiku-4-5-20990101", "anthropic/claude-haiku-4-5"),
    ],
)
def test_vendor_offer_and_date_do_not_hide_a_model(model, row):
    found, known = FACTS.facts("together", model), facts(row)
    assert (found.rating, found.window, found.tools) == (known.rating, known.window, known.tools)
    assert found.price_in is None and found.price_cached is None


def test_a_size_tag_is_part_of_the_name():
    assert facts("local/gpt-oss:120b").rating == 3
    assert FACTS.facts("local", "gpt-oss:20b").rating == 4


def test_unknown_is_unknown_not_free():
    model = FACTS.facts("local", "never-heard-of-7b")
    assert model == router.Model("local", "never-heard-of-7b", 4, vision=False)


@pytest.mark.parametrize(
    ("model", "sees"),
    [
        ("gemini-9", True),
        ("claude-next", True),
        ("qwen9-vl-7b", True),
        ("llava-7b", True),
        ("grok-9", True),
        ("o3-2099-01-01", True),
        ("gemini-embed-9", False),
        ("marco-o1", False),
        ("envision-7b", False),
        ("evl-7b", False),
    ],
)
def test_vision_by_name(model, sees):
    assert router.sees_images(model) is sees


def test_answers_are_remembered_within_bounds():
    known = router.ModelFacts()
    assert known.facts("local", "a-7b") is known.facts("local", "a-7b")
    for number in range(router.MEMO_SIZE + 1):
        known.facts("local", f"model-{number}")
    assert len(known._memo) <= router.MEMO_SIZE


# ---- overrides


def test_overrides_win_and_the_narrow_one_most():
    known = router.ModelFacts(
        {
            "GPT-4o": {"rating": 4, "tools": False, "price_in": None},
            "openai/gpt-4o": {"rating": 5, "window": 9_000},
            "vendor/new": {"reasoning": True, "price_in": 1, "price_out": 2.5},
        }
    )
    ours, theirs = known.facts("openai", "gpt-4o"), known.facts("venice", "gpt-4o")
    assert (ours.rating, ours.window, ours.tools) == (5, 9_000, False)
    assert (theirs.rating, theirs.window, theirs.tools) == (4, 128_000, False)
    assert ours.price_in is None and ours.price_out == 10.0
    assert known.facts("openrouter", "vendor/new").reasoning is True


@pytest.mark.parametrize(
    ("said", "cached"),
    [
        ({"price_cached": 0.5}, 0.5),
        ({"price_cached": None}, None),
        ({"price_in": 2, "price_cached": 0.5}, 0.5),
        ({"price_out": 9}, 1.25),
        ({"price_in": 1}, None),  # that of the table belongs to another price
    ],
)
def test_the_price_of_cached_input_belongs_to_that_of_input(said, cached):
    known = router.ModelFacts({"openai/gpt-4o": said})
    assert known.facts("openai", "gpt-4o").price_cached == cached


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rating", 0),
        ("rating", 6),
        ("rating", None),
        ("rating", True),
        ("rating", "1"),
        ("window", -1),
        ("window", 1.5),
        ("max_output", "many"),
        ("price_in", -1),
        ("price_in", float("nan")),
        ("price_out", float("inf")),
        ("price_out", True),
        ("price_cached", -0.1),
        ("price_cached", "0.1"),
        ("tools", 1),
        ("vision", "yes"),
        ("embedding", None),
        ("retired", 0),
        ("id", "x"),
        ("colour", "red"),
    ],
)
def test_bad_overrides_name_key_and_field(field, value):
    with pytest.raises(ValueError, match=f"x/y.*{field}"):
        router.ModelFacts({"x/y": {field: value}})


def test_overrides_must_be_objects():
    with pytest.raises(ValueError, match="x/y"):
        router.ModelFacts({"x/y": 3})
    with pytest.raises(ValueError, match="object"):
        router.ModelFacts(["x/y"])


def test_every_field_can_be_overridden_but_the_names():
    fields = {field.name for field in dataclasses.fields(router.Model)}
    assert set(router.OVERRIDE_CHECKS) == fields - {"provider", "id"}


# ---- any id at all


@given(st.text() | st.from_regex(re.compile(r"[a-zA-Z0-9./:_p-]{0,40}"), fullmatch=True))
@example("9" * 5000 + "b")
@example("0x0b")
@example("x-٣b")
@example("/" * 50)
def test_any_id_has_facts(model):
    found = router.ModelFacts.facts(FACTS, "openrouter", model)
    assert 1 <= found.rating <= 5
    assert 1 <= router.rate_model(model) <= 5
    assert found.id == model and found.provider == "openrouter"
