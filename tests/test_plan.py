"""Plan: which candidates, in what order, and what a client's `model` means. No network."""

from __future__ import annotations

import pytest

import router
from router import Directory, Limits, Traits, arrange, plan

KEY = "k-0123456789abcdef"
SEEDS = {  # recorded together with the orders below
    "gemini": "gemini-2.5-flash-lite",
    "openrouter": "nvidia/nemotron-3-super-120b-a12b:free",
    "cerebras": "gpt-oss-120b",
    "groq": "llama-3.3-70b-versatile",
    "github_models": "gpt-4o",
    "local": "mistral-7b",
}
SHORT = {"gh": "github_models", "or": "openrouter", "gr": "groq", "ge": "gemini", "ce": "cerebras",
         "lo": "local"}  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    """directory(groq="m1,m2", ..., SETTING=value): providers with models and settings."""

    def make(**settings):
        env = {"HR_HOME": str(tmp_path)}
        for name, value in settings.items():
            if name.isupper():
                env[name] = value
                continue
            row = router.provider_named(name)
            env[f"{name.upper()}_MODEL"] = value
            if row.state == "retired":
                env[f"{name.upper()}_BASE_URL"] = "http://127.0.0.1:1/v1"
            if row.key_env and not row.keyless:
                env[row.key_env[0]] = KEY
        return Directory(router.Config.from_env(env))

    return make


def limits(tokens=0, ill=(), opened=()):
    health = dict(ill)
    return Limits(tokens, lambda name: health.get(name, 0), lambda name: name in opened)


def order(made, level=3, *, turn=0, prefer="fit", lead=(), around=None, **traits):
    groups = arrange(made.targets, Traits(level, **traits), prefer)
    return [c.target.label for c in plan(lead, groups, around or limits(), turn, "asked for")]


def providers(labels):
    return [label.partition("/")[0] for label in labels]


# --- the recorded order ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "turn", "profile", "expected"),
    [
        (1, 0, "", "gh or gr ge ce lo"),
        (2, 0, "", "or gr gh ge ce lo"),
        (3, 0, "", "ge ce or gr gh lo"),
        (4, 0, "", "lo ge ce or gr gh"),
        (5, 0, "", "lo ge ce or gr gh"),
        (2, 3, "", "gr or gh ge ce lo"),
        (4, 0, "fast", "lo ge ce or gr gh"),
        (2, 0, "fast", "or gr gh ge ce lo"),
    ],
)
def test_recorded_orders(directory, level, turn, profile, expected):
    found = providers(order(directory(**SEEDS), level, turn=turn, profile=profile))
    assert found == [SHORT[name] for name in expected.split()]


def test_fast_puts_the_local_model_first_only_where_it_is_up_to_it(directory):
    made = directory(groq="gemini-2.5-flash-lite", local="mistral-7b")
    assert providers(order(made, 3, profile="fast")) == ["local", "groq"]
    assert providers(order(made, 2, profile="fast")) == ["groq", "local"]


def test_local_is_local_only(directory):
    made = directory(**SEEDS)
    assert providers(order(made, 1, profile="local")) == ["local"]


# --- fit, price, turns -----------------------------------------------------------------


def test_capable_before_weak_and_the_nearest_first(directory):
    made = directory(groq="gpt-4o,llama-3.3-70b,gpt-oss-120b,mistral-7b")
    ratings = {t.label: t.facts.rating for t in made.targets}
    assert sorted(ratings.values()) == [1, 2, 3, 4]
    assert [ratings[label] for label in order(made, 2)] == [2, 1, 3, 4]
    assert [ratings[label] for label in order(made, 3)] == [3, 2, 1, 4]
    assert [ratings[label] for label in order(made, 5)] == [4, 3, 2, 1]


def test_nothing_is_dropped_for_being_weak(directory):
    made = directory(groq="mistral-7b", local="llama-3.2-1b")
    assert len(order(made, 1)) == 2


def test_price_decides_between_equals_and_only_there(directory):
    made = directory(openai="gpt-4o", groq="gpt-4o", gemini="gemini-2.5-flash-lite")
    assert providers(order(made, 1)) == ["groq", "openai", "gemini"]
    assert providers(order(made, 3)) == ["gemini", "groq", "openai"]


def test_price_first_when_wished_but_never_before_capable(directory):
    made = directory(openai="gpt-4o-mini", groq="gpt-4o", local="mistral-7b")
    assert providers(order(made, 3))[0] == "openai"
    assert providers(order(made, 3, prefer="price")) == ["groq", "openai", "local"]


def test_an_unknown_price_is_not_free(directory):
    made = directory(openai="gpt-4o-mini,some-unheard-of-thing", groq="another-unheard-of-thing")
    cost = {t.label: t.cost for t in made.targets}
    assert cost["openai/some-unheard-of-thing"] > cost["openai/gpt-4o-mini"] > 0
    assert cost["groq/another-unheard-of-thing"] == 0, "on a free plan it is"


def test_equals_take_turns(directory):
    made = directory(groq="x-70b", gemini="x-70b", mistral="x-70b")
    firsts = [providers(order(made, 2, turn=turn))[0] for turn in range(6)]
    assert sorted(firsts[:3]) == ["gemini", "groq", "mistral"]
    assert firsts[:3] == firsts[3:]


def test_every_request_has_its_turn(directory):
    made = directory(groq="x-70b", gemini="x-70b")
    groups, first = made.arranged(Traits(2))
    again, second = made.arranged(Traits(2))
    assert groups is again and second == first + 1


def test_small_requests_prefer_fast_providers_among_equals_only(directory):
    made = directory(gemini="x-70b", groq="x-70b", nvidia="x-70b")
    for turn in range(3):
        assert providers(order(made, 2, turn=turn, quick=True))[0] == "groq"
    made = directory(gemini="x-70b", groq="mistral-7b")
    assert providers(order(made, 2, quick=True)) == ["gemini", "groq"]


def test_the_ill_come_after_the_well_of_the_same_fit(directory):
    made = directory(gemini="x-70b", groq="x-70b", mistral="x-70b", local="mistral-7b")
    found = order(made, 2, around=limits(ill={"gemini": 2, "groq": 1}))
    assert providers(found) == ["mistral", "groq", "gemini", "local"]


# --- filters ---------------------------------------------------------------------------


def test_tools_need_a_model_that_has_them_if_there_is_one(directory):
    made = directory(groq="x-70b", gemini="x-70b", GROQ_SUPPORTS_TOOLS="0")
    assert providers(order(made, 2, tools=True)) == ["gemini"]
    assert len(order(made, 2)) == 2
    none = directory(groq="x-70b", GROQ_SUPPORTS_TOOLS="0")
    assert providers(order(none, 2, tools=True)) == ["groq"]


def test_images_need_a_model_that_sees_if_there_is_one(directory):
    made = directory(groq="llama-3.3-70b", openai="gpt-4o")
    assert providers(order(made, 2, vision=True)) == ["openai"]
    blind = directory(groq="llama-3.3-70b")
    assert providers(order(blind, 2, vision=True)) == ["groq"]


def test_the_callers_scope_has_no_safety_net(directory):
    made = directory(groq="x-70b", gemini="x-70b")
    assert providers(order(made, 2, scope=frozenset({"groq"}))) == ["groq"]
    assert order(made, 2, scope=frozenset({"mistral"})) == []


def test_the_tools_filter_looks_only_at_what_the_scope_allows(directory):
    made = directory(groq="x-70b", gemini="x-70b", GROQ_SUPPORTS_TOOLS="0")
    assert providers(order(made, 2, tools=True, scope=frozenset({"groq"}))) == ["groq"]


def test_a_request_above_a_providers_ceiling_is_not_sent_there(directory):
    made = directory(groq="x-70b", gemini="x-70b", GROQ_SKIP_TOKENS_OVER="100")
    assert len(order(made, 2, around=limits(100))) == 2
    assert providers(order(made, 2, around=limits(101))) == ["gemini"]


def test_a_window_that_is_too_small_comes_last(directory):
    made = directory(cerebras="gpt-oss-120b", gemini="gemini-2.5-pro")
    assert providers(order(made, 3, around=limits(1000))) == ["cerebras", "gemini"]
    assert providers(order(made, 3, around=limits(500_000))) == ["gemini", "cerebras"]


def test_open_breakers_come_last(directory):
    made = directory(groq="x-70b", gemini="x-70b", mistral="x-70b")
    first, *others = providers(order(made, 2, around=limits(opened={"groq", "gemini"})))
    assert first == "mistral" and sorted(others) == ["gemini", "groq"]
    everyone = limits(opened={"groq", "gemini", "mistral"})
    assert sorted(providers(order(made, 2, around=everyone))) == ["gemini", "groq", "mistral"]


def test_nobody_else_is_counted_after_the_other_filters(directory):
    made = directory(groq="x-70b", gemini="x-70b", GEMINI_SKIP_TOKENS_OVER="10")
    around = limits(100, opened={"groq"})
    assert providers(order(made, 2, around=around)) == ["groq"]


def test_every_candidate_says_why(directory):
    made = directory(groq="x-70b", gemini="x-70b")
    groups = arrange(made.targets, Traits(2))
    lead = made.choose("gemini/x-70b").lead
    reasons = [c.why for c in plan(lead, groups, limits(opened={"x"}), 0, "asked for")]
    assert reasons[0] == "asked for" and "rating 2" in reasons[1]


# --- what a client's `model` means -----------------------------------------------------


def lead(made, model):
    return [t.label for t in made.choose(model).lead]


@pytest.mark.parametrize("name", ["", " ", "hermes-router", "AUTO", "mine", "Mine "])
def test_router_ids_mean_smart_routing(directory, name):
    choice = directory(groq="auto", ROUTER_MODEL_ID="mine").choose(name)
    assert (choice.lead, choice.profile, choice.spill) == ((), "", True)


@pytest.mark.parametrize("name", ["hermes-router:fast", "auto:FAST", "mine:fast"])
def test_router_ids_may_carry_a_profile(directory, name):
    assert directory(groq="m", ROUTER_MODEL_ID="mine").choose(name).profile == "fast"


def test_a_profile_at_the_end_of_a_name_that_nobody_knows_counts(directory):
    made = directory(groq="m1:fast")
    assert made.choose("gpt-4o:fast").profile == "fast"
    assert made.choose("gpt-4o:LOCAL").profile == "local"
    assert (lead(made, "m1:fast"), made.choose("m1:fast").profile) == (["groq/m1:fast"], "")
    assert (lead(made, "gpt-4o:free"), made.choose("gpt-4o:free").profile) == ([], "")


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("groq/m1", ["groq/m1"]),
        ("groq:m1", ["groq/m1"]),
        ("GROQ/m1", ["groq/m1"]),
        ("groq/not-listed", ["groq/not-listed"]),
        ("groq/vendor/m:free", ["groq/vendor/m:free"]),
        ("google/m1", ["gemini/m1"]),
        ("gemini/m2", ["gemini/m2"]),
        ("m1", ["gemini/m1", "groq/m1"]),
        ("M1", ["gemini/m1", "groq/m1"]),
        ("openai/gpt-oss", ["groq/openai/gpt-oss"]),
        ("mistral/m1", []),
        ("groq/", []),
        ("claude-3-5-sonnet", []),
        ("gpt-4o", []),
        ("gemini-9", ["gemini/gemini-9"]),
    ],
)
def test_the_ladder(directory, name, labels):
    made = directory(groq="m1,openai/gpt-oss", gemini="m1")
    assert sorted(lead(made, name)) == labels
    assert made.choose(name).spill


def test_vendor_prefix_that_is_also_a_configured_provider(directory):
    made = directory(groq="openai/gpt-oss", openai="gpt-4o")
    assert lead(made, "openai/gpt-oss") == ["groq/openai/gpt-oss"]
    assert lead(made, "openai/gpt-4o") == ["openai/gpt-4o"]


def test_a_size_tag_is_no_provider(directory):
    made = directory(local="mistral:7b", mistral="mistral-small-latest")
    assert lead(made, "mistral:7b") == ["local/mistral:7b"]


@pytest.mark.parametrize(
    ("name", "provider"),
    [("gpt-5", "openai"), ("o3-mini", "openai"), ("claude-x", "anthropic"), ("grok-4", "xai")],
)
def test_well_known_names_go_to_their_makers_when_configured(directory, name, provider):
    made = directory(openai="a", anthropic="b", xai="c")
    assert lead(made, name) == [f"{provider}/{name}"]
    assert lead(directory(groq="m"), name) == []


def test_an_alias_comes_before_a_configured_id(directory):
    made = directory(groq="m1,m2", gemini="m3", MODEL_ALIASES="*haiku*=groq/m2, m1 = m3,gpt-*=m1")
    assert lead(made, "claude-HAIKU-4") == ["groq/m2"]
    assert lead(made, "m1") == ["gemini/m3"]
    assert lead(made, "gpt-4o") == ["groq/m1"]


def test_an_alias_to_nowhere_is_smart_routing(directory):
    made = directory(groq="m1", MODEL_ALIASES="a=mistral/x,b,=,c=")
    assert [lead(made, name) for name in "abc"] == [[], [], []]


def test_strict_refuses_what_is_unknown_and_stays_inside_what_is_named(directory):
    made = directory(groq="m1", STRICT_MODEL="1")
    assert made.choose("groq/m1").spill is False
    assert made.choose("hermes-router").spill is True
    with pytest.raises(router.NotFound) as caught:
        made.choose("gpt-4o")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("name", ["groq/a b", "groq/<script>", "groq/" + "x" * 300, "groq/a\nb"])
def test_a_name_that_is_no_model_id_is_refused(directory, name):
    with pytest.raises(router.BadRequest) as caught:
        directory(groq="m1").choose(name)
    assert caught.value.param == "model"


def test_the_dummy_model_is_the_echos(directory):
    assert directory(groq="m1").choose("dummy").echo
    assert not directory(groq="m1", ECHO_FALLBACK="0").choose("dummy").echo


def test_a_provider_that_is_not_used_cannot_be_named(directory):
    made = directory(groq="a", GROQ_EXCLUDE_MODELS="a", gemini="m1")
    assert lead(made, "groq/a") == []


def test_arrangements_are_remembered_within_bounds(directory, monkeypatch):
    monkeypatch.setattr(Directory, "MAX_ARRANGED", 4)
    made = directory(groq="m1")
    for number in range(40):
        made.arranged(Traits(3, scope=frozenset({f"p{number}"})))
    assert len(made._arranged) <= 4


def test_quotas_come_before_prices_only_where_they_are_nearly_spent(directory):
    made = directory(groq="m1", openai="m1")  # free and dear, equally strong
    for left, first in ((0, "groq"), (1, "groq"), (2, "openai")):
        headroom = {"groq": left, "openai": 0}
        around = limits()._replace(headroom=lambda t, h=headroom: h[t.provider])
        assert providers(order(made, around=around))[0] == first
