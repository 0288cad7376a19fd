"""What people read is true: links lead somewhere, commands and settings that are named exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

import router

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PRINTED = ("configuration.md", "providers.md", "commands.md")
# Variables of other programs, and those that no setting reads.
ELSEWHERE = (
    "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL", "ANTHROPIC_MODEL", "OPENAI_BASE_URL",
    "CLAUDE_CONFIG_DIR", "CODEX_HOME", "ROUTER_KEY", "HR_PYTHON", "HR_HOME", "NO_COLOR",
    "TIKTOKEN_CACHE_DIR", "HERMES_ROUTER_SERVICE",
)  # fmt: skip


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def hr_commands() -> set[str]:
    words = re.findall(r"^#   ([a-z]+) ", (ROOT / "hr").read_text(encoding="utf-8"), re.MULTILINE)
    return {command.name for command in router.COMMANDS} | set(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_named_exist(page):
    known = hr_commands()
    groups = {name.split()[0] for name in known if " " in name}
    text = page.read_text(encoding="utf-8")
    for first, second in re.findall(r"`(?:\./)?hr ([a-z]+)(?: ([a-z-]+))?", text):
        assert first in known, f"hr {first}"
        assert not second or first not in groups or f"{first} {second}" in known, (
            f"{first} {second}"
        )


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in PRINTED], ids=lambda page: page.name
)
def test_settings_that_are_named_exist(page):
    fields = router.setting_fields()
    known = {*fields, *ELSEWHERE, *(name for row in router.PROVIDERS for name in row.key_env)}
    known |= {also for row in fields.values() for also in row.metadata.get("also", ())}
    endings = tuple(f"_{suffix}" for suffix, _ in router.PER_PROVIDER)
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)(?:=[^`]*)?`", text):
        assert name in known or name.endswith(endings), name
