"""`connect`: settings of clients are merged into their files, read by them, and taken back."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, program

import router

KEY = "sk-router-0123456789abcdefghij"
REACH = router.Reach("http://127.0.0.1:8319", KEY, "")
FILES = [client for client in router.CLIENTS if client.file]


@pytest.fixture
def connect(tmp_path):
    """connect("word", ...): `router.py connect` on a scratch home; the process, run to its end."""
    home = tmp_path / "my home"
    home.mkdir()

    def start(*words, **env):
        return subprocess.run(
            program("connect", *words),
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(home),
                "HR_HOME": str(tmp_path),
                "PROXY_API_KEYS": KEY,
                **env,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    start.home = home
    return start


def path_of(client, home: Path) -> Path:
    return {
        "claude-code": home / ".claude/settings.json",
        "codex": home / ".codex/config.toml",
        "opencode": home / ".config/opencode/opencode.json",
        "aider": home / ".aider.conf.yml",
        "continue": home / ".continue/config.yaml",
        "vscode": home / ".config/Code/User/chatLanguageModels.json",
    }[client.name]


def parsed(client, text: str):
    if client.format == "toml":
        return pytest.importorskip("tomllib").loads(text)
    return json.loads(text) if client.format == "json" else yaml.safe_load(text)


# What people have in these files, one that must survive in every way it is written.
OWN = {
    "claude-code": """{
    "permissions": {"allow": ["Bash(ls:*)"]},
    "env": {"FOO": "bar", "ANTHROPIC_BASE_URL": "https://old.example"},
    "model": "opus"
}
""",
    "codex": """# my settings
model = "gpt-5.5"
approval_policy = "on-request"  # ask

[mcp_servers.docs]
command = "npx"
args = ["-y", "docs"]

# about the next one
[model_providers.other]
name = "Other"
base_url = "https://other.example/v1"

[model_providers.other.http_headers]
X-Team = "a"
""",
    "opencode": """{
  "$schema": "https://opencode.ai/config.json",
  "theme": "nord",
  "provider": {"other": {"npm": "x", "options": {"apiKey": "sk-other"}}},
  "model": "other/thing"
}
""",
    "aider": """## aider
model: sonnet
read:
  - CONVENTIONS.md
  - "other: file.md"

dark-mode: true
""",
    "continue": """name: Mine
version: 0.0.1
schema: v1
models:
  - name: Claude
    provider: anthropic
    model: claude
    roles:
      - chat

  # a local one
  - name: "Local"
    provider: ollama
    model: qwen
rules:
  - Be brief
""",
    "vscode": """[
\t{
\t\t"name": "Other",
\t\t"vendor": "customendpoint",
\t\t"models": []
\t}
]
""",
}


def without_ours(client, document):
    """What is left when everything that connect writes is taken out."""
    settings = router.JsonSettings(json.dumps(document))
    for edit in client.edits(REACH):
        settings.put(edit.place, router.MISSING)
    return settings.text()


# --- new files ----------------------------------------------------------------


@pytest.mark.parametrize("client", FILES, ids=lambda c: c.name)
def test_a_new_file_is_what_the_client_reads(connect, client):
    done = connect(client.name)
    assert done.returncode == 0, done.stderr
    path = path_of(client, connect.home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    document = parsed(client, path.read_text())
    text = json.dumps(document)
    assert "http://127.0.0.1:8319" in text
    assert (KEY in text) == (client.name != "codex"), "Codex reads its key from a variable"
    again = connect(client.name)
    assert again.returncode == 0 and "as it should be" in again.stderr
    assert parsed(client, path.read_text()) == document
    undone = connect(client.name, "--undo")
    assert undone.returncode == 0, undone.stderr
    assert not path.exists()


def test_claude_code_gets_its_environment(connect):
    connect("claude-code", "--model", "hermes-router")
    document = json.loads((connect.home / ".claude/settings.json").read_text())
    assert document == {
        "env": {
            "ANTHROPIC_BASE_URL": "http://127.0.0.1:8319",
            "ANTHROPIC_AUTH_TOKEN": KEY,
            "ANTHROPIC_MODEL": "hermes-router",
        }
    }


def test_codex_gets_a_provider_and_a_line_for_the_shell(connect):
    tomllib = pytest.importorskip("tomllib")
    done = connect("codex")
    document = tomllib.loads((connect.home / ".codex/config.toml").read_text())
    assert document["model_provider"] == "hermes"
    assert document["model_providers"]["hermes"] == {
        "name": "hermes-router",
        "base_url": "http://127.0.0.1:8319/v1",
        "wire_api": "responses",
        "env_key": "ROUTER_KEY",
    }
    assert done.stdout == f"export ROUTER_KEY={KEY}\n"


# --- files that people wrote --------------------------------------------------


@pytest.mark.parametrize("client", FILES, ids=lambda c: c.name)
def test_what_stood_there_stays_and_comes_back(connect, client):
    path = path_of(client, connect.home)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OWN[client.name])
    before = parsed(client, OWN[client.name])

    shown = connect(client.name, "--dry-run")
    assert shown.returncode == 0 and path.read_text() == OWN[client.name]
    assert "+++" in shown.stdout and KEY not in shown.stdout.replace(f"ROUTER_KEY={KEY}", "")

    done = connect(client.name)
    assert done.returncode == 0, done.stderr
    after = parsed(client, path.read_text())
    assert without_ours(client, after) == without_ours(client, before)
    assert after != before
    keep = path.with_name(path.name + ".before-hermes")
    assert keep.read_text() == OWN[client.name]
    assert stat.S_IMODE(keep.stat().st_mode) == 0o600

    assert connect(client.name, "--undo").returncode == 0
    assert parsed(client, path.read_text()) == before
    assert not keep.exists()
    if client.format != "json":
        assert path.read_text() == OWN[client.name], "comments and order, too"


@pytest.mark.parametrize("client", FILES, ids=lambda c: c.name)
def test_undo_keeps_what_was_changed_since(client):
    new = router.merged(OWN[client.name], client, REACH)
    if client.format == "json":
        now = new.replace("Bash(ls:*)", "Bash(cat:*)").replace("nord", "day").replace("[]", "[1]")
    else:
        now = new + ("later: yes\n" if client.format == "yaml" else '\n[later]\nnow = "yes"\n')
    back = router.unmerged(now, OWN[client.name], client, REACH)
    assert "hermes" not in back and "8319" not in back
    changed = parsed(client, back)
    assert changed != parsed(client, OWN[client.name])
    assert without_ours(client, changed) == without_ours(client, parsed(client, now))


@pytest.mark.parametrize("client", FILES, ids=lambda c: c.name)
def test_a_second_address_replaces_the_first(client):
    first = router.merged(OWN[client.name], client, REACH)
    other = router.Reach("http://10.0.0.9:9000", "sk-router-another-key-0123", "groq/m1")
    second = router.merged(first, client, other)
    assert "8319" not in second and KEY not in second
    assert second == router.merged(OWN[client.name], client, other)


def test_undo_of_nothing_takes_nothing_away(connect):
    path = connect.home / ".claude/settings.json"
    path.parent.mkdir()
    text = '{"env": {"ANTHROPIC_BASE_URL": "https://another.example"}}'
    path.write_text(text)
    done = connect("claude-code", "--undo")
    assert done.returncode == 0 and "nothing of hermes-router" in done.stderr
    assert path.read_text() == text


def test_a_link_stays_one(connect, tmp_path):
    real = tmp_path / "dotfiles.json"
    real.write_text('{"theme": "dark"}')
    path = connect.home / ".claude/settings.json"
    path.parent.mkdir()
    path.symlink_to(real)
    assert connect("claude-code").returncode == 0
    assert path.is_symlink() and json.loads(real.read_text())["theme"] == "dark"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("claude-code", '{"a": 1, // why\n "b": 2}'),
        ("claude-code", "[1, 2]"),
        ("claude-code", '{"env": "all"}'),
        ("claude-code", "{"),
        ("codex", "model = 'unfinished\n"),
        ("codex", 'model_providers = { hermes = { name = "mine" } }\n'),
        ("aider", "{model: sonnet}\n"),
        ("aider", "---\na: 1\n---\nb: 2\n"),
        ("continue", "models: [{name: a}]\n"),
        ("vscode", '{"name": "no list"}'),
    ],
)
def test_what_cannot_be_merged_is_left_alone_and_shown(connect, name, text):
    client = router.client_named(name)
    path = path_of(client, connect.home)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    done = connect(name)
    assert done.returncode == 1
    assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]
    assert "left as it is" in done.stderr and "8319" in done.stdout


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write")
def test_a_read_only_folder_is_told(connect):
    folder = connect.home / ".claude"
    folder.mkdir(mode=0o500)
    done = connect("claude-code")
    assert done.returncode == 1 and "left as it is" in done.stderr


def test_other_secrets_are_not_shown_in_a_difference(connect):
    path = connect.home / ".claude/settings.json"
    path.parent.mkdir()
    path.write_text('{"env": {"ANTHROPIC_AUTH_TOKEN": "sk-ant-0123456789-another"}}')
    done = connect("claude-code", "--dry-run")
    assert "-" in done.stdout and "sk-ant-0123456789" not in done.stdout + done.stderr


def test_a_client_whose_requests_nobody_takes_is_told_so(connect):
    wide = {"GROQ_API_KEY": "gsk_0123456789abcdef"}
    told = connect("claude-code", "--dry-run", **wide).stderr
    assert "22,000 tokens" in told and "groq takes at most" in told and "GROQ_SKIP_TOKENS" in told
    assert "tokens" not in connect("aider", "--dry-run", **wide).stderr
    wide["GROQ_SKIP_TOKENS_OVER"] = "0"
    assert "tokens" not in connect("claude-code", "--dry-run", **wide).stderr


def test_a_dry_run_changes_nothing(connect, tmp_path):
    done = connect("claude-code", "--dry-run", PROXY_API_KEYS="")
    assert done.returncode == 0
    assert not (connect.home / ".claude").exists()
    assert not (tmp_path / ".env").exists(), "not even a key is made for it"


# --- printed ones -------------------------------------------------------------


def test_cursor_is_told_about_its_servers(connect):
    done = connect("cursor")
    assert done.returncode == 0 and KEY in done.stdout
    assert "tunnel" in done.stderr


def test_lines_for_sdks_set_what_the_sdks_read(connect):
    done = connect("openai-sdk")
    shell = f'{done.stdout}\nprintf \'%s %s\' "$OPENAI_BASE_URL" "$OPENAI_API_KEY"'
    heard = subprocess.run(["sh", "-c", shell], capture_output=True, text=True)
    assert heard.stdout == f"http://127.0.0.1:8319/v1 {KEY}"


def test_clients_are_listed(connect):
    done = connect()
    assert done.returncode == 0
    assert all(client.name in done.stdout for client in router.CLIENTS)


def test_a_key_of_a_caller_is_chosen_by_name_or_tail(connect, tmp_path):
    rows = {"sk-router-of-the-laptop-123456": {"name": "laptop"}}
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": rows}))
    for which in ("laptop", "123456"):
        done = connect("openai-sdk", "--key", which)
        assert "sk-router-of-the-laptop-123456" in done.stdout, done.stderr
    assert connect("openai-sdk", "--key", "nobody").returncode == 1


def test_the_documented_settings_are_those_that_are_written():
    """docs/clients.md shows each client's settings, but for the key."""
    text = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
    reach = router.Reach("http://127.0.0.1:8319", "sk-router-...", "")
    for client in router.CLIENTS:
        shown = router.merged("", client, reach) if client.file else client.shown(reach) + "\n"
        assert f"hr connect {client.name}" in text, client.name
        fences = (f"```{client.format}\n{shown}```", f"```\n{shown}```", f"```sh\n{shown}```")
        assert any(fence in text for fence in fences), client.name
