"""Config: settings are read once, from one mapping, .env and auth.json; nothing bad is silent."""

from __future__ import annotations

import json
import os
import stat

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import router

KEY = "gsk_0123456789abcdef"


@pytest.fixture
def read(tmp_path):
    """read(NAME=value, ...): the configuration of exactly these settings."""

    def make(**settings):
        return router.Config.from_env({"HR_HOME": str(tmp_path), **settings})

    return make


@pytest.fixture
def problems(read):
    """problems(NAME=value, ...): what the refusal to start says."""

    def make(**settings):
        with pytest.raises(router.ConfigError) as caught:
            read(**settings)
        return caught.value.problems

    return make


def service(config, name="groq"):
    return next(s for s in config.services if s.name == name)


# --- defaults and types ----------------------------------------------------------------


def test_defaults(read):
    config = read()
    assert (config.host, config.port) == ("127.0.0.1", 8319)
    assert config.router_model_id == "hermes-router"
    assert (config.breaker_window, config.breaker_min_samples) == (8, 4)
    assert (config.breaker_error_rate, config.breaker_cooldown) == (0.5, 60.0)
    assert (config.max_request_bytes, config.worker_threads) == (10_485_760, 16)
    assert (config.request_deadline, config.connect_timeout) == (600.0, 10.0)
    assert (config.fast_route_threshold, config.reasoning_reserve) == (0, 4096)
    assert config.rotation_mode == "round-robin"
    assert (config.proxy_keys, config.services, config.warnings) == ((), (), ())
    assert config.echo_fallback and not config.metrics_require_auth and not config.strict_model


@pytest.mark.parametrize("word", ["0", "", "false", "no", "off", "False", "NO", "oFF", " off "])
def test_false_words(read, word):
    assert read(ECHO_FALLBACK=word).echo_fallback is False
    assert read(METRICS_REQUIRE_AUTH=word).metrics_require_auth is False


@pytest.mark.parametrize("word", ["1", "true", "yes", "on", "TRUE", "2"])
def test_any_other_word_is_true(read, word):
    assert read(STRICT_MODEL=word).strict_model is True


def test_a_number_that_is_empty_is_its_default(read):
    assert read(PORT="", BREAKER_WINDOW=" ").port == 8319


def test_numbers_may_have_blanks_around_and_times_a_fraction(read):
    config = read(PORT=" 9000 ", CONNECT_TIMEOUT="0.25")
    assert (config.port, config.connect_timeout) == (9000, 0.25)


def test_an_unknown_rotation_is_round_robin_with_a_warning(read):
    config = read(ROTATION_MODE="sideways")
    assert config.rotation_mode == "round-robin"
    assert "ROTATION_MODE" in " ".join(config.warnings)


@pytest.mark.parametrize("word", ["sequential", "SEQUENTIAL", " Sequential "])
def test_words_of_a_choice_may_be_in_capitals(read, word):
    config = read(ROTATION_MODE=word)
    assert (config.rotation_mode, config.warnings) == ("sequential", ())


def test_request_bodies_may_be_kept_small(read, problems):
    assert read(MAX_REQUEST_BYTES="100").max_request_bytes == 100
    assert "MAX_REQUEST_BYTES" in problems(MAX_REQUEST_BYTES="0")[0]


def test_the_configuration_cannot_be_changed(read):
    with pytest.raises(AttributeError):
        read().port = 1


# --- values that cannot be used --------------------------------------------------------

BAD = {
    "PORT": "80x",
    "BREAKER_WINDOW": "many",
    "BREAKER_MIN_SAMPLES": "0",
    "BREAKER_ERROR_RATE": "1.5",
    "BREAKER_COOLDOWN": "-1",
    "CONNECT_TIMEOUT": "inf",
    "TTFT_TIMEOUT": "nan",
    "STREAM_IDLE_TIMEOUT": "0",
    "REQUEST_DEADLINE": "soon",
    "MAX_REQUEST_BYTES": "1.5",
    "WORKER_THREADS": "0",
    "MAX_STREAMS": "-3",
    "FAST_ROUTE_THRESHOLD": "some",
    "REASONING_TOKEN_RESERVE": "-1",
    "AUTH_MODE": "shut",
    "ROUTE_PREFER": "luck",
    "MODELS_LIST": "none",
    "GROQ_BASE_URL": "ftp://x.test",
}


def test_every_bad_value_is_named_in_one_message(problems):
    told = problems(**BAD, GROQ_API_KEY=KEY)
    for name in BAD:
        assert any(line.startswith(name) for line in told), name
    assert len(told) == len(BAD)


@pytest.mark.parametrize("name", BAD)
def test_one_bad_value_alone_stops_the_start(problems, name):
    assert len(problems(**{name: BAD[name]}, GROQ_API_KEY=KEY)) == 1


@pytest.mark.parametrize("port", ["65536", "-1", "1e3", "0x50", "9" * 5000])
def test_ports_that_do_not_exist(problems, port):
    assert problems(PORT=port)[0].startswith("PORT=")


def test_an_older_name_is_read_and_named_when_it_is_wrong(read, problems):
    assert read(UPSTREAM_TIMEOUT="30").request_deadline == 30
    assert read(UPSTREAM_TIMEOUT="30", REQUEST_DEADLINE="20").request_deadline == 20
    assert "UPSTREAM_TIMEOUT" in problems(UPSTREAM_TIMEOUT="soon")[0]


def test_a_log_level_that_does_not_exist_is_the_usual_one(read):
    assert read(LOG_LEVEL="debug").log_level.upper() == "DEBUG"
    loud = read(LOG_LEVEL="loudly")
    assert loud.log_level == "INFO"
    assert "LOG_LEVEL='loudly'" in loud.warnings[0]


def test_open_to_all_only_on_loopback(read, problems):
    assert read(AUTH_MODE="open").auth_mode == "open"
    assert "AUTH_MODE" in problems(AUTH_MODE="open", HOST="0.0.0.0")[0]


def test_numbers_of_one_provider_fall_back_with_a_warning(read):
    config = read(GROQ_API_KEY=KEY, GROQ_SKIP_TOKENS_OVER="lots", GROQ_MAX_OUTPUT_TOKENS="-5")
    assert service(config).skip_tokens_over == 5500
    assert service(config).max_output_tokens == 0
    warned = " ".join(config.warnings)
    assert "GROQ_SKIP_TOKENS_OVER" in warned and "GROQ_MAX_OUTPUT_TOKENS" in warned


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:99999/v1", "http://[x]/v1"])
@pytest.mark.parametrize("name", ["GROQ", "OPENAI"])
def test_a_base_url_that_is_none_is_named(problems, name, url):
    told = problems(**{f"{name}_API_KEY": KEY, f"{name}_BASE_URL": url})
    assert len(told) == 1 and told[0].startswith(f"{name}_BASE_URL")


def test_a_missing_part_of_a_url_is_told(tmp_path):
    env = {"HR_HOME": str(tmp_path), "CLOUDFLARE_API_TOKEN": KEY}
    try:
        told = " ".join(router.Config.from_env(env).warnings)
    except router.ConfigError as error:
        told = str(error)
    assert "CLOUDFLARE_ACCOUNT_ID" in told
    env["CLOUDFLARE_ACCOUNT_ID"] = "abc"
    assert "/accounts/abc/" in service(router.Config.from_env(env), "cloudflare").url


@given(st.dictionaries(st.sampled_from(sorted(BAD)), st.text(max_size=12), max_size=4))
@example({"OPENAI_BASE_URL": "http://[::1", "OPENAI_API_KEY": "k"})
@example({"PORT": "８３１９"})
def test_any_text_is_a_configuration_or_named_problems(env):
    try:
        router.Config.from_env({"HR_HOME": "/nowhere/at/all", "GROQ_API_KEY": KEY, **env})
    except router.ConfigError as error:
        assert error.problems


# --- the .env file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "pair"),
    [
        ("PORT=9000", ("PORT", "9000")),
        ("  PORT = 9000  ", ("PORT", "9000")),
        ("PORT=9000 # why", ("PORT", "9000")),
        ("PORT=9000\t# why", ("PORT", "9000")),
        ("PORT=# why", ("PORT", "")),
        ("PORT=", ("PORT", "")),
        ("KEY=a#b", ("KEY", "a#b")),
        ("KEY=a=b", ("KEY", "a=b")),
        ('KEY="a # b" # why', ("KEY", "a # b")),
        ("KEY='a b'", ("KEY", "a b")),
        ("KEY='", ("KEY", "")),
        ("export KEY=a", ("KEY", "a")),
        ("export   KEY=a", ("KEY", "a")),
        ("# KEY=a", None),
        ("#KEY=a", None),
        ("", None),
        ("KEY", None),
        ("=a", None),
    ],
)
def test_lines_of_a_dotenv_file(line, pair):
    assert router.parse_dotenv_line(line) == pair


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_file_is_read_however_it_was_saved(read, tmp_path, ends, mark):
    lines = ["PORT=9000 # the port", "", 'GROQ_MODEL="a,b"', f"export GROQ_API_KEY={KEY}"]
    (tmp_path / ".env").write_bytes((mark + ends.join(lines)).encode())
    config = read()
    assert config.port == 9000
    assert (service(config).models, service(config).keys) == (("a", "b"), (KEY,))


def test_the_process_environment_wins_over_the_file(read, tmp_path):
    (tmp_path / ".env").write_text("PORT=9000\nHOST=0.0.0.0\n")
    config = read(PORT="9001")
    assert (config.port, config.host) == (9001, "0.0.0.0")


HELD = {
    "PROXY_API_KEYS": ("sk-mine", lambda c: c.proxy_keys == ("sk-mine",)),
    "PORT": ("9001", lambda c: c.port == 9001),
    "ROTATION_MODE": ("sequential", lambda c: c.rotation_mode == "sequential"),
    "GROQ_API_KEY": (KEY, lambda c: service(c).keys == (KEY,)),
    "GROQ_MODEL": ("m9", lambda c: service(c).models == ("m9",)),
    "GROQ_BASE_URL": ("http://here:1/v1", lambda c: service(c).url == "http://here:1/v1"),
}
SAYING = {
    "RESCUE": ("1", lambda c: not c.rescue),
    "ROUTER_STATE_FILE": ("x.json", lambda c: c.state_file == ""),
    "STATE_FILE": ("x.json", lambda c: c.state_file == ""),
    "GROQ_EMBED_MODEL": ("e1", lambda c: service(c).embed_model == ""),
    "GROQ_SUPPORTS_TOOLS": ("1", lambda c: service(c).tools[""] is False),
    "GROQ_M1_REASONING": ("1", lambda c: service(c).reasoning["M1"] is False),
    "GROQ_AUTO_DISCOVER_MODELS": ("1", lambda c: service(c).discover is False),
}


@pytest.mark.parametrize("empty", ["", "  "])
@pytest.mark.parametrize("name", [*HELD, *SAYING])
def test_an_empty_variable_hides_the_file_only_where_empty_says_something(
    read, tmp_path, name, empty
):
    text, holds = {**HELD, **SAYING}[name]
    rest = {"GROQ_API_KEY": KEY, "GROQ_MODEL": "m1"} | {name: text}
    lines = [f"{variable}={value}" for variable, value in rest.items()]
    (tmp_path / ".env").write_text("\n".join(lines), encoding="utf-8")
    assert holds(read(**{name: empty}))


def test_the_process_environment_is_not_read_when_a_mapping_is_given(read, monkeypatch):
    monkeypatch.setenv("PORT", "9009")
    monkeypatch.setenv("MISTRAL_API_KEY", KEY)
    assert read().port == 8319 and read().services == ()


def test_bad_values_in_the_file_are_named_too(problems, tmp_path):
    (tmp_path / ".env").write_text("PORT=x\nBREAKER_WINDOW=y\n")
    assert len(problems()) == 2


def test_a_file_that_cannot_be_read_is_told(problems, tmp_path):
    (tmp_path / ".env").mkdir()
    assert problems()[0].startswith(".env cannot be read")


# --- provider keys ---------------------------------------------------------------------


def test_recorded_order_of_keys(read):
    env = {"API_KEY": "s", "API_KEYS": "p1, p2,,s", "API_KEY_2": "n2", "API_KEY_4": "n4"}
    config = read(**{f"GROQ_{name}": value for name, value in env.items()})
    assert service(config).keys == ("s", "p1", "p2", "n2")


def test_auth_json_comes_first_and_each_key_once(read, tmp_path):
    stored = {"groq": [" a1 ", "", "s", 7, None]}
    (tmp_path / "auth.json").write_text(json.dumps({"providers": stored}))
    config = read(GROQ_API_KEY="s", PROVIDER_KEY_GROQ="late", GROQ_API_KEYS="p")
    found = service(config)
    assert found.keys == ("a1", "s", "p", "late")
    assert found.key_sources == (
        "auth.json",
        "auth.json",
        "GROQ_API_KEYS",
        "PROVIDER_KEY_GROQ",
    )


def test_auth_json_takes_older_names_and_ignores_what_is_no_list(read, tmp_path):
    stored = {"nvidia_nim": ["n"], "google": ["g"], "or": ["o"], "groq": "no list", "mistral": {}}
    (tmp_path / "auth.json").write_text(json.dumps({"providers": stored}))
    assert {s.name for s in read().services} == {"nvidia", "gemini", "openrouter"}


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"', "\x00", '{"providers": 3}', "[" * 9000])
def test_a_broken_auth_json_is_a_warning_and_stays_as_it_is(read, tmp_path, text):
    file = tmp_path / "auth.json"
    file.write_text(text)
    config = read(GROQ_API_KEY=KEY)
    router.with_proxy_key(config)
    assert service(config).keys == (KEY,)
    assert file.read_text() == text
    assert text == '{"providers": 3}' or "auth.json" in " ".join(config.warnings)


def test_auth_json_elsewhere(read, tmp_path):
    (tmp_path / "other.json").write_text('{"providers": {"groq": ["x"]}}')
    assert service(read(ROUTER_AUTH_FILE="other.json")).keys == ("x",)
    assert service(read(ROUTER_AUTH_FILE=str(tmp_path / "other.json"))).keys == ("x",)


@pytest.mark.parametrize("key", ["a b", "a\nb", "schlüssel", "\x7f"])
def test_a_key_that_cannot_be_a_header_is_dropped_with_a_warning_that_hides_it(read, tmp_path, key):
    (tmp_path / "auth.json").write_text(json.dumps({"providers": {"groq": [key, "good"]}}))
    config = read()
    assert service(config).keys == ("good",)
    assert "groq" in config.warnings[0] and key not in config.warnings[0]


def test_local_exists_when_its_address_or_model_is_set_and_needs_no_key(read):
    assert read().services == ()
    assert read(LOCAL_BASE_URL="", LOCAL_MODEL=" ").services == ()
    assert service(read(LOCAL_MODEL="llama3.1"), "local").keys == ("",)
    assert service(read(LOCAL_BASE_URL="http://box:1/v1"), "local").url == "http://box:1/v1"


def test_a_key_alone_does_not_make_a_local_server(read):
    assert read(LOCAL_API_KEY="local").services == ()


def test_the_sdks_own_variable_may_point_at_this_router(read):
    config = read(OPENAI_API_KEY=KEY, OPENAI_BASE_URL="http://localhost:8319/v1")
    assert service(config, "openai").url == "https://api.openai.com/v1"
    config = read(OPENAI_API_KEY=KEY, OPENAI_BASE_URL="http://localhost:8320/v1")
    assert service(config, "openai").url == "http://localhost:8320/v1"


# --- models and overrides of a provider ------------------------------------------------


@pytest.mark.parametrize(
    ("model", "suffix"),
    [
        ("gemini-2.5-pro", "GEMINI_2_5_PRO"),
        ("nvidia/nemotron-3:free", "NVIDIA_NEMOTRON_3_FREE"),
        ("_a__b_", "A_B"),
    ],
)
def test_recorded_suffixes(model, suffix):
    assert router.env_suffix(model) == suffix


def test_the_word_for_one_model_beats_the_word_for_all(read):
    config = read(
        GROQ_API_KEY=KEY,
        GROQ_MODEL="big-1.0,small",
        GROQ_SUPPORTS_TOOLS="0",
        GROQ_BIG_1_0_SUPPORTS_TOOLS="1",
        GROQ_SMALL_REASONING="yes",
    )
    big, small = router.Directory(config).targets
    assert (big.tools, small.tools) == (True, False)
    assert small.reasoning


def test_models_are_a_list_without_repeats_and_exclusions_in_any_case(read):
    config = read(GROQ_API_KEY=KEY, GROQ_MODEL="a, b,,a,C", GROQ_EXCLUDE_MODELS="B,c")
    assert service(config).models == ("a",)


def test_a_provider_without_models_stays_visible_and_is_never_tried(read):
    config = read(GROQ_API_KEY=KEY, GROQ_MODEL="a", GROQ_EXCLUDE_MODELS="A")
    assert service(config).resting
    assert router.Directory(config).targets == ()


def test_embedding_models(read):
    keys = {f"{name}_API_KEY": KEY for name in ("GEMINI", "MISTRAL", "OPENAI", "COHERE", "GROQ")}
    found = {s.name: s.embed_model for s in read(**keys, MISTRAL_EMBED_MODEL="").services}
    assert found == {
        "gemini": "gemini-embedding-001",
        "openai": "text-embedding-3-small",
        "cohere": "embed-v4.0",
        "mistral": "",
        "groq": "",
    }


def test_openrouter_is_told_who_asks(read):
    config = read(OPENROUTER_API_KEY=KEY, OPENROUTER_APP_NAME="mine", OPENROUTER_SITE_URL="u")
    headers = dict(service(config, "openrouter").headers)
    assert headers["X-Title"] == "mine"
    assert headers["HTTP-Referer"] == "u"


# --- keys of callers -------------------------------------------------------------------


def test_caller_keys_are_trimmed_and_blanks_dropped(read):
    assert read(PROXY_API_KEYS=" a, ,b,,a ").proxy_keys == ("a", "b")


@pytest.mark.parametrize("keys", ["", " , ", "sk-router-1", "sk-my-router-key-1,sk-router-1"])
def test_without_a_real_key_one_is_made_and_kept(read, tmp_path, keys):
    (tmp_path / ".env").write_text(f"# mine\nPORT=9000\nPROXY_API_KEYS={keys}\nHOST=::1\n")
    os.chmod(tmp_path / ".env", 0o644)
    config, made = router.with_proxy_key(read())
    assert made.startswith("sk-router-") and len(made) >= 40
    assert config.proxy_keys == (made,) == read().proxy_keys
    text = (tmp_path / ".env").read_text()
    assert text == f"# mine\nPORT=9000\nPROXY_API_KEYS={made}\nHOST=::1\n"
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert router.with_proxy_key(read()) == (read(), "")
    assert sorted(f.name for f in tmp_path.iterdir()) == [".env", ".env.lock"], "no litter"


def test_a_real_key_beside_a_placeholder_is_left_alone(read, tmp_path):
    config = read(PROXY_API_KEYS="sk-router-1,mine")
    assert router.with_proxy_key(config)[1] == ""
    assert "mine" in config.proxy_keys and not (tmp_path / ".env").exists()


def test_two_new_keys_differ(tmp_path):
    homes = [{"HR_HOME": str(tmp_path / name)} for name in "ab"]
    keys = {router.with_proxy_key(router.Config.from_env(home))[1] for home in homes}
    assert len(keys) == 2


def test_no_key_is_made_for_an_open_router(read, tmp_path):
    assert router.with_proxy_key(read(AUTH_MODE="open"))[1] == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [False, True], ids=["no file", "a file"])
def test_a_key_that_cannot_be_kept_is_a_warning(read, tmp_path, monkeypatch, exists):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    if exists:
        (tmp_path / ".env").write_text("PORT=9000\n")
    monkeypatch.setattr(router, "write_private", read_only)
    config, made = router.with_proxy_key(read())
    assert config.proxy_keys == (made,)
    assert "Read-only file system" in " ".join(config.warnings)
    assert made not in " ".join(config.warnings)


def test_a_dotenv_file_in_another_encoding_is_not_damaged(read, tmp_path):
    old = "# f\xfcr mich\nPORT=9000\n".encode("latin-1")
    (tmp_path / ".env").write_bytes(old)
    config, made = router.with_proxy_key(read())
    assert config.port == 9000 and config.proxy_keys == (made,)
    assert (tmp_path / ".env").read_bytes() == old or made in read().proxy_keys


# --- what a caller's key may use -------------------------------------------------------


def scopes(read, tmp_path, rows, **settings):
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": rows}))
    return {c.key: c.scope for c in read(PROXY_API_KEYS="k", **settings).callers}


def test_scopes_take_older_names_and_none_means_all(read, tmp_path):
    rows = {
        "k": {"allowed_providers": ["google", "groq"]},
        "l": {},
        "m": {"allowed_providers": []},
    }
    found = scopes(read, tmp_path, rows)
    assert found["k"] == {"gemini", "groq"}
    assert not found.get("l") and not found.get("m")


@pytest.mark.parametrize("wrong", ["groq", {"groq": True}, [7], [None], 3])
def test_a_scope_that_cannot_be_read_does_not_become_every_provider(read, tmp_path, wrong):
    rows = {"k": {"allowed_providers": wrong}}
    try:
        config_scopes = scopes(read, tmp_path, rows)
    except router.ConfigError:
        return
    assert config_scopes["k"], "an empty scope means every provider"


def test_callers_have_names_and_ids_that_tell_nothing_of_their_keys(read, tmp_path):
    rows = {"secret-2": {"name": "  ci\n"}, "secret-3": {"name": 7}}
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": rows}))
    callers = read(PROXY_API_KEYS="secret-1").callers
    assert [c.name for c in callers] == ["key1", "ci", "key3"]
    assert "secret" not in repr(callers)
    alone = read(PROXY_API_KEYS="secret-3").callers
    assert {c.id for c in alone} < {c.id for c in callers}  # whatever their place and number
    assert len({c.id for c in callers}) == 3


def test_the_first_key_is_the_admin_until_somebody_is_named(read, tmp_path):
    def admins(**settings):
        return [c.key for c in read(PROXY_API_KEYS="a,b", **settings).callers if c.admin]

    assert admins() == ["a"]
    assert admins(ADMIN_KEYS="boss") == ["boss"]
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": {"b": {"admin": True}}}))
    assert admins() == ["b"]
    assert admins(ADMIN_KEYS="boss") == ["b", "boss"]
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": {"b": {"admin": "yes"}}}))
    assert admins() == ["a"]


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_key_in_auth_json_lets_nobody_in(read, tmp_path, make_app, empty):
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": {empty: {"name": "blank"}}}))
    assert not any(not key.strip() for key in read(PROXY_API_KEYS="k").proxy_keys)
    client = make_app().test_client()
    for headers in ({}, {"Authorization": ""}, {"Authorization": "Bearer "}, {"x-api-key": " "}):
        assert client.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("rows", [[], "x", {"k": None}, {"k": []}, {"k": "x"}])
def test_odd_rows_stop_nothing(read, tmp_path, rows):
    assert not any(scopes(read, tmp_path, rows).values())


# --- secrets ---------------------------------------------------------------------------


def test_a_printed_configuration_holds_no_secret(read):
    config = read(PROXY_API_KEYS="sk-caller-secret", GROQ_API_KEY=KEY)
    assert KEY not in repr(config)
    assert "sk-caller-secret" not in repr(config)


def test_a_password_in_a_url_is_not_repeated(problems):
    for url in ("https://me:hunter2@x.test/v1", "https://x.test/v1?key=hunter2"):
        told = problems(GROQ_API_KEY=KEY, GROQ_BASE_URL=url)
        assert told[0].startswith("GROQ_BASE_URL")
        assert "hunter2" not in told[0]


# --- private files ---------------------------------------------------------------------


def test_a_private_file_is_never_readable_by_others(tmp_path):
    umask = os.umask(0)
    try:
        router.write_private(tmp_path / "x", "secret")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600
    assert (tmp_path / "x").read_text() == "secret"


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        router.write_private(tmp_path / "x", "new")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("x", "old")]


@pytest.mark.parametrize(
    ("key", "owner"), [("gsk_abc123", "groq"), ("xai-abc123", "xai"), ("other", "groq")]
)
def test_a_variable_of_two_providers_goes_by_how_the_key_begins(read, key, owner):
    assert [s.name for s in read(EXTERNAL_GROK_KEY=key).services] == [owner]
