"""Providers: the table is sound, names resolve, base URLs mean one place however they are typed."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from upstream import AUTH, HELLO, Reply, completion, provider

import router

FIRST_NINETEEN = (
    "gemini openrouter sambanova github_models cerebras groq mistral cohere zai naga nvidia "
    "huggingface kimi opencode opencode_go openai anthropic codex local"
)
ROWS = [pytest.param(row, id=row.name) for row in router.PROVIDERS]


def test_order_is_the_one_people_know():
    names = [row.name for row in router.PROVIDERS]
    assert names[:19] == FIRST_NINETEEN.split()
    assert names[19:25] == ["xai", "deepseek", "together", "fireworks", "venice", "cloudflare"]


def test_names_aliases_and_key_variables_are_unique():
    names = [name for row in router.PROVIDERS for name in (row.name, *row.aliases)]
    variables = [variable for row in router.PROVIDERS for variable in row.key_env]
    assert len(names) == len(set(names))
    # It named Groq's grok and xAI's alike; the key itself tells whose it is.
    assert [v for v in set(variables) if variables.count(v) > 1] == ["EXTERNAL_GROK_KEY"]


@pytest.mark.parametrize("row", ROWS)
def test_row_is_well_formed(row):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", row.name)
    assert row.title and row.note and row.free.text
    assert row.tier in {"free", "trial", "paid", "subscription", "local"}
    assert set(row.dialects) <= router.DIALECTS.keys() and row.dialects
    assert row.state in {"alive", "changed", "retired"}
    assert row.trains_on_prompts in {"yes", "no", "unknown"}
    assert re.fullmatch(r"2026-\d\d-\d\d", row.state_date)
    assert row.note.startswith("2026-")
    assert all(alias == alias.lower() and "-" not in alias for alias in row.aliases)
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*", variable) for variable in row.key_env)
    assert not any(variable.endswith(("KEYS", "TOKENS")) for variable in row.key_env), (
        "stems are singular"
    )


@pytest.mark.parametrize("row", ROWS)
def test_row_can_be_used(row):
    assert row.models or row.state == "retired"
    assert len(set(row.models)) == len(row.models)
    assert row.key_env or row.accounts, "codex accounts come from auth.json"
    assert urlsplit(row.url).scheme == ("http" if row.tier == "local" else "https")
    assert router.normalise_base_url(row.url, row.known_path) == row.url


@pytest.mark.parametrize("row", ROWS)
def test_placeholders_in_the_url_have_a_variable(row):
    placeholders = re.findall(r"\{(\w+)\}", row.url)
    assert placeholders == [placeholder for placeholder, _ in row.extra_env]


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("gemini", ["GEMINI_API_KEY", "PROVIDER_KEY_GEMINI", "EXTERNAL_GOOGLE_KEY"]),
        ("groq", ["GROQ_API_KEY", "PROVIDER_KEY_GROQ", "EXTERNAL_GROK_KEY"]),
        ("nvidia", ["NVIDIA_API_KEY", "NVIDIA_NIM_KEY", "PROVIDER_KEY_NVIDIA_NIM"]),
        ("zai", ["GLM_API_KEY", "ZAI_API_KEY"]),
        ("github_models", ["GITHUB_MODELS_TOKEN"]),
        ("huggingface", ["HUGGINGFACE_API_KEY", "HUGGINGFACE_API_TOKEN"]),
    ],
)
def test_old_key_variables_stay_in_order(name, variables):
    known = router.provider_named(name).key_env
    assert [variable for variable in known if variable in variables] == variables


def test_ceilings():
    skips = {row.name: row.skip_tokens_over for row in router.PROVIDERS if row.skip_tokens_over}
    caps = {row.name: row.max_output_tokens for row in router.PROVIDERS if row.max_output_tokens}
    assert skips == {"groq": 5_500, "sambanova": 30_000, "github_models": 6_000}
    assert caps == {"cohere": 8_192, "github_models": 16_384}


def test_embedding_models():
    assert {row.name: row.embed_model for row in router.PROVIDERS[:19] if row.embed_model} == {
        "gemini": "gemini-embedding-001",
        "mistral": "mistral-embed",
        "cohere": "embed-v4.0",
        "openai": "text-embedding-3-small",
    }


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("groq", "groq"),
        (" Groq ", "groq"),
        ("google", "gemini"),
        ("or", "openrouter"),
        ("samba", "sambanova"),
        ("github", "github_models"),
        ("GitHub-Models", "github_models"),
        ("glm", "zai"),
        ("z.ai", "zai"),
        ("nim", "nvidia"),
        ("nvidia_nim", "nvidia"),
        ("nvidia-nim", "nvidia"),
        ("hf", "huggingface"),
        ("hugging_face", "huggingface"),
        ("moonshot", "kimi"),
        ("zen", "opencode"),
        ("opencode_zen", "opencode"),
        ("opencode-go", "opencode_go"),
        ("opencodego", "opencode_go"),
        ("go", "opencode_go"),
        ("gpt", "openai"),
        ("claude", "anthropic"),
        ("chatgpt", "codex"),
        ("ollama", "local"),
        ("x-ai", "xai"),
    ],
)
def test_names_resolve(typed, name):
    assert router.provider_named(typed).name == name


# Groq and xAI have both been called grok, so the word alone names neither.
@pytest.mark.parametrize("typed", ["", "grok", "nobody", "gro"])
def test_unknown_names_are_none(typed):
    assert router.provider_named(typed) is None


@pytest.mark.parametrize(
    "typed",
    [
        "https://api.openai.com",
        "https://api.openai.com/",
        "https://api.openai.com/v1",
        "https://api.openai.com/v1/",
        "https://api.openai.com/v1/chat/completions",
        "https://api.openai.com/v1/chat/completions/",
        "https://api.openai.com/v1/embeddings",
        "HTTPS://api.openai.com/v1/messages",
    ],
)
def test_spellings_of_a_base_url_reach_one_place(typed):
    assert router.normalise_base_url(typed, "/v1") == "https://api.openai.com/v1"


@pytest.mark.parametrize(
    ("typed", "name", "url"),
    [
        ("https://openrouter.ai", "openrouter", "https://openrouter.ai/api/v1"),
        ("https://api.groq.com", "groq", "https://api.groq.com/openai/v1"),
        ("https://api.venice.ai", "venice", "https://api.venice.ai/api/v1"),
        ("https://api.venice.ai/v1", "venice", "https://api.venice.ai/v1"),
        (
            "https://generativelanguage.googleapis.com",
            "gemini",
            "https://generativelanguage.googleapis.com/v1beta/openai",
        ),
        ("http://127.0.0.1:9000/v1", "groq", "http://127.0.0.1:9000/v1"),
        ("http://[::1]:9000", "local", "http://[::1]:9000/v1"),
    ],
)
def test_a_bare_host_gets_the_path_of_its_provider(typed, name, url):
    path = router.provider_named(name).known_path
    assert router.normalise_base_url(typed, path) == url


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("", "http"),
        ("api.openai.com/v1", "http"),
        ("ftp://api.openai.com", "http"),
        ("http://", "host"),
        ("https:///v1", "host"),
        ("http://:8080/v1", "host"),
        ("http://a b/v1", "whitespace"),
        ("http://a/v1\n", "whitespace"),
        ("http://a/v1\x00", "control"),
        ("http://a\\b/v1", "backslash"),
        ("http://me:secret@a/v1", "password"),
        ("http://@a/v1", "user name"),
        ("http://a:99999/v1", "URL"),
        ("http://[::1/v1", "URL"),
        ("http://a/v1?key=secret", "path"),
        ("http://a/v1#top", "path"),
    ],
)
def test_bad_base_urls_are_named_without_their_secrets(typed, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        router.normalise_base_url(typed, "/v1")
    assert "secret" not in str(caught.value)


@given(st.text() | st.from_regex(r"https?://[a-z\[\]:@./?#0-9\\]*", fullmatch=True))
@example("http://\ud800")
@example("http://a/messages/chat/completions")
@example("http://ⓐ．℀")
def test_any_text_is_a_usable_url_or_a_value_error(typed):
    try:
        url = router.normalise_base_url(typed, "/v1")
    except ValueError:
        return
    assert not url.endswith("/")
    assert urlsplit(url).hostname
    assert router.normalise_base_url(url, "/v1") == url


@given(st.text())
def test_any_name_is_a_row_or_none(name):
    row = router.provider_named(name)
    assert row is None or row in router.PROVIDERS


@pytest.mark.parametrize(
    ("name", "key", "sent"),
    [("local", "", "Bearer local"), ("local", "k-mine", "Bearer k-mine"), ("llm7", "", None)],
)
def test_what_a_server_that_needs_no_key_is_sent(upstream, make_app, name, key, sent):
    up = upstream(Reply(200, completion("the word local stands")))
    rows = {**provider(name, up), f"{name.upper()}_API_KEYS": key}
    client = make_app(**rows).test_client()
    got = client.post("/v1/chat/completions", json={"messages": HELLO}, headers=AUTH)
    assert got.json["choices"][0]["message"]["content"] == "the word local stands"
    assert up.requests[0].headers.get("authorization") == sent
