"""The house keeps its order: layers, tables, printed documents, an import that does nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import layers
import pytest

import router

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "router.py").read_text(encoding="utf-8")


def repeated(values: Iterable[str]) -> list[str]:
    return [value for value, times in Counter(values).items() if times > 1]


# --- layers -------------------------------------------------------------------


def test_router_reads_from_top_to_bottom() -> None:
    assert [str(finding) for finding in layers.check(SOURCE)] == []


def test_the_architecture_lists_every_section() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [A-Z]+ \| ([^|]+) \|", text, re.MULTILINE)
    told = [title for row in rows for title in row.split(", ")]
    assert told == [section.title for section in layers.House.of(SOURCE).sections]


def test_few_lines_ask_to_be_let_through() -> None:
    assert len(layers.pardons(SOURCE)) < 5


def test_most_functions_are_short() -> None:
    house = layers.House.of(SOURCE)
    nodes = [node for node in layers.ast.walk(house.tree) if isinstance(node, layers.Function)]
    sizes = sorted(layers.length(node) for node in nodes)
    assert sizes[len(sizes) // 2] <= 8
    assert sizes[len(sizes) * 95 // 100] <= 35


SOUND = '''\
"""A small house.

  FACTS     1. Errors    what can go wrong
            2. Config    what is set
  ACTION    3. Router    what is done
"""
from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass

# ==============================
# 1. Errors
# ==============================


class Wrong(Exception):
    """Says so."""


# ==============================
# 2. Config
# ==============================


@dataclass(frozen=True)
class Row:
    name: str


def spelled(name: str) -> str:
    return name.upper()


ROWS = (Row("a"), Row(spelled("b")))
DEFAULT = Row("c")
WORD = re.compile("a|b")
BY_NAME = {row.name: row for row in ROWS}


def read(env: dict | None = None) -> dict:
    return dict(os.environ if env is None else env)


# ==============================
# 3. Router
# ==============================


class Router:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def run(self, rows: tuple = ROWS) -> Row:
        main = [row for row in rows if WORD.match(row.name)]
        if not main:
            raise Wrong
        return BY_NAME.get(main[0].name, DEFAULT)


def main() -> None:
    read()
    Router().run()


if __name__ == "__main__":
    main()
'''


def test_the_checker_finds_nothing_in_a_sound_house() -> None:
    assert layers.check(SOUND) == []


def nest(levels: int) -> str:
    lines = [f"{'    ' * (at + 1)}if env:" for at in range(levels)]
    return "\n".join(["def nested(env):", *lines, "    " * (levels + 1) + "pass"])


def long_function(lines: int) -> str:
    return "\n".join(["def long():", '    """One line."""', *["    x = 1"] * lines])


SPOT = "def read(env"  # code is planted before this line, in section 2


def planted(code: str, kind: str) -> tuple[str, str, str]:
    return SPOT, f"{code}\n\n\n{SPOT}", kind


# Name -> what is replaced in the sound house, by what, and the kind of finding that must follow.
FAULTS: dict[str, tuple[str, str, str]] = {
    "list lacks a section": ("  ACTION    3. Router    what is done\n", "", "contents"),
    "list has another title": ("3. Router    what", "3. Rooter    what", "contents"),
    "list in another order": ("2. Config    what is set", "2. Confit    what is set", "contents"),
    "no list at all": (
        "  FACTS     1. Errors    what can go wrong\n            2. Config    what is set\n"
        "  ACTION    3. Router    what is done\n",
        "",
        "contents",
    ),
    "banner with a wrong number": ("# 3. Router", "# 4. Router", "contents"),
    "a title twice": ("# 3. Router", "# 3. Errors", "contents"),
    "section twice": ("# 3. Router", "# 2. Config", "contents"),
    "empty section": ('class Wrong(Exception):\n    """Says so."""\n', "", "empty"),
    "upward call": planted("def early():\n    return Router()", "upward"),
    "upward in a method": ('"""Says so."""', "def all(self):\n        return ROWS", "upward"),
    "upward in a lambda": planted("EARLY = lambda: main()", "upward"),
    "upward in a generator": planted("def early():\n    yield (Router for _ in ROWS)", "upward"),
    "a loop at import": planted("for row in ROWS:\n    pass", "import"),
    "a call at import": planted("spelled('x')", "import"),
    "a value of an own function": planted("NAME = spelled('x')", "import"),
    "an object at import": ("def main()", "ROUTER = Router()\n\n\ndef main()", "import"),
    "a lock at import": planted("LOCK = threading.Lock()", "import"),
    "a lock in a class": ("    name: str", "    name: str\n    lock = threading.Lock()", "import"),
    "a file at import": planted("TEXT = open('x').read()", "import"),
    "a file as default": planted("def f(x=open('x')): ...", "import"),
    "work in an if": ("def main()", "if ROWS:\n    print(ROWS)\n\n\ndef main()", "import"),
    "work in a try": (
        "def main()",
        "try:\n    import x\nexcept ImportError:\n    main()\n\n\ndef main()",
        "import",
    ),
    "module state": ("    Router().run()", "    global DEFAULT\n    DEFAULT = None", "state"),
    "environ elsewhere": ("    Router().run()", "    os.environ['A'] = 'b'", "environ"),
    "getenv elsewhere": ("    Router().run()", "    os.getenv('A')", "environ"),
    "environ imported": ("import re\n", "import re\nfrom os import environ\n", "environ"),
    "dead code": planted("def unwanted():\n    pass", "dead"),
    "61 lines": planted(long_function(61), "long"),
    "5 levels": planted(nest(5), "deep"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_checker_finds_a_planted_fault(name: str) -> None:
    before, after, kind = FAULTS[name]
    assert SOUND.count(before) == 1
    found = layers.check(SOUND.replace(before, after))
    assert kind in {finding.kind for finding in found}, found
    # One fault may show in the contents as well, and what is planted is not used.
    assert {finding.kind for finding in found} <= {kind, "contents", "upward", "dead"}


@pytest.mark.parametrize(
    "code",
    [
        long_function(60),
        nest(4),
        "def chain(env):\n    if env:\n        pass\n" + "    elif env:\n        pass\n" * 9,
        "def shadow(main):\n    return main, [Router for Router in ROWS]",
        "def inner():\n    main = 1\n    return lambda: main",
        "NAME = spelled('x')  # layer: a constant, spelled out of another",
        "LATER: Router | None = None",
        "try:\n    import tomllib\nexcept ImportError:\n    tomllib = None",
    ],
)
def test_the_checker_lets_sound_code_pass(code: str) -> None:
    found = layers.check(SOUND.replace(SPOT, f"{code}\n\n\n{SPOT}"))
    assert [finding for finding in found if finding.kind != "dead"] == []


# --- tables -------------------------------------------------------------------


def test_provider_names_and_aliases_are_unique() -> None:
    names = [name for row in router.PROVIDERS for name in (row.name, *row.aliases)]
    assert repeated(names) == []
    assert repeated(row.title for row in router.PROVIDERS) == []
    assert all(re.fullmatch(r"[a-z][a-z0-9._-]*", name) for name in names)


def test_every_provider_row_makes_sense() -> None:
    for row in router.PROVIDERS:
        assert row.tier in ("free", "trial", "paid", "subscription", "local"), row.name
        assert row.state in ("alive", "changed", "retired"), row.name
        assert row.state == "alive" or (row.state_date and row.note), row.name
        assert row.trains_on_prompts in ("yes", "no", "unknown"), row.name
        # Codex has no key: it signs in with the tokens of an account.
        assert row.keyless or row.key_env or row.accounts, row.name
        assert repeated(row.models) == [], row.name
        assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*", name) for name in row.key_env), row.name


def test_every_default_model_has_a_rating() -> None:
    rows = {(row.provider, row.id): row for row in router.model_rows()}
    assert len(rows) == len(router.MODELS.strip().splitlines())
    for provider in router.PROVIDERS:
        for model in provider.models:
            if provider.tier == "local":
                continue  # whatever runs there; the name is a guess
            row = rows.get((provider.name, model))
            assert row, f"{provider.name}/{model} has no row in MODELS"
            assert 1 <= row.rating <= 5
            assert not row.embedding


def test_default_embedding_models_are_known_as_such() -> None:
    rows = {(row.provider, row.id): row for row in router.model_rows()}
    for provider in router.PROVIDERS:
        row = rows.get((provider.name, provider.embed_model))
        assert row is None or row.embedding, f"{provider.name}/{provider.embed_model}"


def test_every_setting_has_a_name_of_its_own() -> None:
    names = [
        name
        for field in fields(router.Config)
        if "env" in field.metadata
        for name in (field.metadata["env"], *field.metadata.get("also", ()))
    ]
    assert names
    assert repeated(names) == []


@pytest.mark.parametrize("path", [".env.example", "docs/configuration.md"])
def test_every_setting_and_key_variable_is_documented(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    words = set(re.findall(r"[A-Z][A-Z0-9_]+", text))
    settings = {f.metadata["env"] for f in fields(router.Config) if "env" in f.metadata}
    keys = {row.key_env[0] for row in router.PROVIDERS if row.key_env}
    assert sorted((settings | keys | {"HR_HOME"}) - words) == []
    for field in fields(router.Config):
        assert not field.metadata or field.metadata["help"]


@pytest.mark.parametrize(
    ("path", "printed"),
    [
        (".env.example", router.describe_env),
        ("docs/configuration.md", router.describe_configuration),
        ("docs/providers.md", router.describe_providers),
        ("docs/commands.md", router.describe_commands),
    ],
)
def test_printed_documents_are_fresh(path: str, printed: object) -> None:
    assert callable(printed)
    assert (ROOT / path).read_text(encoding="utf-8") == printed(), f"{path} is stale"


def test_every_error_has_its_own_status_and_type() -> None:
    todo, seen = [router.RouterError], []
    while todo:
        error = todo.pop()
        todo += error.__subclasses__()
        seen.append(error)
    assert len(seen) > 5
    for error in seen:
        assert 400 <= error.status < 600
        assert error.kind.endswith("_error")
        made = error("what happened", param="p", retry_after=1.0, tried=("a: 429",))
        assert (str(made), made.param, made.retry_after) == ("what happened", "p", 1.0)


# --- import -------------------------------------------------------------------

WATCHED_IMPORT = """
import os, sys, threading
import flask, requests, urllib3, waitress  # their imports are their own affair

ACTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.mkdir",
        "os.remove", "os.rename", "os.chmod", "os.putenv", "os.unsetenv", "_thread.start",
        "tempfile.", "sqlite3.", "shutil.", "signal.")
seen = []

def watch(event, arguments):
    writes = event == "open" and (
        any(c in str(arguments[1] or "") for c in "wax+")
        or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes or event.startswith(ACTS):
        seen.append((event, repr(arguments)[:200]))

before = dict(os.environ), set(threading.enumerate())
sys.addaudithook(watch)
import router
assert not seen, seen
assert (dict(os.environ), set(threading.enumerate())) == before
assert "tiktoken" not in sys.modules, "the tokenizer costs 76 MB and is loaded when needed"
"""


def test_importing_the_router_does_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-B", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})"]
    command[-1] += WATCHED_IMPORT
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
