"""Does router.py still read from top to bottom?   python tests/layers.py [FILE]

What is looked for in one long source file:

  contents  the numbered list in the module docstring and the banners of the sections differ,
            or two sections have one title
  empty     a section defines nothing
  upward    code of one section uses a name that a later section defines
  import    the module level does something: a call, a loop, a thread, a file
  state     a function assigns to a name of the module
  environ   the process environment is read outside the section Config
  long      a function has more than 60 lines, its docstring not counted
  deep      a function has more than 4 blocks inside one another
  dead      a name of the module is used by nothing in it

A finding on a line with the comment `# layer: <reason>` is let through.
Global names are found in the compiled code, so a local of the same name is no finding.
"""

from __future__ import annotations

import ast
import dis
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import NamedTuple, TypeGuard

MAX_LINES, MAX_DEPTH = 60, 4
ENVIRON_SECTION = "Config"
RULE = re.compile(r"# ?[=─-]{20,}$")
TITLE = re.compile(r"# (\d+)\. (\S.*)$")
ENTRY = re.compile(r"^ *(?:[A-Z]+ +)?(\d+)\. (\S+(?: \S+)*)", re.MULTILINE)
PARDON = re.compile(r"# layer: \S")

# Modules whose functions act on the world: nothing of them is called while importing.
# fmt: off
ACTING = frozenset((
    "asyncio", "http", "io", "os", "pathlib", "requests", "select", "shutil", "signal", "socket",
    "sqlite3", "subprocess", "tempfile", "threading", "tiktoken", "time", "urllib", "urllib3",
    "waitress",
))
# fmt: on
ACTING_BUILTINS = frozenset(("open", "print", "input", "exec", "eval", "__import__"))

Function = ast.FunctionDef | ast.AsyncFunctionDef
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
HARMLESS = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)
READS, WRITES = ("LOAD_GLOBAL", "LOAD_NAME"), ("STORE_GLOBAL", "DELETE_GLOBAL")


class Finding(NamedTuple):
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.line}: {self.kind}: {self.text}"


class Section(NamedTuple):
    """A banner: its first line, and the number and title it shows."""

    line: int
    number: int
    title: str


@dataclass(frozen=True)
class House:
    """One source file, parsed and compiled."""

    lines: list[str]
    tree: ast.Module
    code: CodeType
    sections: list[Section]

    @classmethod
    def of(cls, source: str) -> House:
        lines = source.splitlines()
        code = compile(source, "<house>", "exec", dont_inherit=True)
        return cls(lines, ast.parse(source), code, list(banners(lines)))

    def section_at(self, line: int) -> Section:
        before = [section for section in self.sections if section.line <= line]
        return before[-1] if before else Section(0, 0, "(above all sections)")


def banners(lines: list[str]) -> Iterator[Section]:
    """Titles that stand between two rules."""
    for at in range(1, len(lines) - 1):
        title = TITLE.match(lines[at])
        if title and RULE.match(lines[at - 1]) and RULE.match(lines[at + 1]):
            yield Section(at, int(title[1]), title[2].strip())


def check(source: str) -> list[Finding]:
    """Everything found in a source text, in the order of its lines."""
    house = House.of(source)
    found = {finding for look in LOOKS for finding in look(house)}
    return sorted(f for f in found if not PARDON.search(house.lines[f.line - 1]))


def pardons(source: str) -> list[int]:
    """Lines that ask to be let through."""
    return [at for at, line in enumerate(source.splitlines(), 1) if PARDON.search(line)]


# --- the looks ----------------------------------------------------------------


def look_at_contents(house: House) -> Iterator[Finding]:
    promised = [(int(n), title) for n, title in ENTRY.findall(ast.get_docstring(house.tree) or "")]
    built = [(section.number, section.title) for section in house.sections]
    if not promised:
        yield Finding(1, "contents", "the docstring has no numbered list of sections")
    elif promised != built:
        odd = sorted(set(promised) ^ set(built)) or "the order"
        yield Finding(1, "contents", f"list and banners differ in {odd}")
    titles = [section.title for section in house.sections]
    for wanted, section in enumerate(house.sections, 1):
        if section.title in titles[: wanted - 1]:
            yield Finding(section.line, "contents", f"a second section {section.title}")
        if section.number != wanted:
            yield Finding(section.line, "contents", f"{section.title} should have number {wanted}")


def look_at_rooms(house: House) -> Iterator[Finding]:
    ends = [*(section.line for section in house.sections[1:]), len(house.lines) + 1]
    for section, end in zip(house.sections, ends, strict=False):
        if not any(section.line < node.lineno < end for node in house.tree.body):
            yield Finding(section.line, "empty", f"nothing in {section.title}")


def look_upward(house: House) -> Iterator[Finding]:
    homes = definitions(house.tree.body)
    for line, name in global_names(house.code, READS):
        user, home = house.section_at(line), house.section_at(homes.get(name, 0))
        if home.line > user.line:
            yield Finding(line, "upward", f"{user.title} uses {name} of {home.title}")


def look_for_state(house: House) -> Iterator[Finding]:
    for line, name in global_names(house.code, WRITES):
        yield Finding(line, "state", f"{name} belongs to the module and is assigned here")


def look_at_import(house: House) -> Iterator[Finding]:
    top = [n for n in house.tree.body if isinstance(n, Function | ast.ClassDef)]
    builders = {node.name for node in top if not is_data(node)}
    for node in statements(house.tree.body):
        if isinstance(node, Function):
            started: list[ast.AST] = [*node.decorator_list, node.args]
        elif isinstance(node, HARMLESS):
            started = [node]
        else:
            yield Finding(node.lineno, "import", f"runs {ast.unparse(node)[:60]}")
            continue
        for call in (part for start in started for part in ast.walk(start)):
            if isinstance(call, ast.Call) and acts(call):
                yield Finding(call.lineno, "import", f"calls {ast.unparse(call)[:60]}")
        value = node in house.tree.body and getattr(node, "value", None)
        # Rows of a table may be built by the file's own functions; a lone value is built by hand.
        if isinstance(value, ast.Call) and getattr(value.func, "id", None) in builders:
            yield Finding(node.lineno, "import", f"builds {ast.unparse(value)[:60]}")


def look_for_environ(house: House) -> Iterator[Finding]:
    for node in ast.walk(house.tree):
        line = getattr(node, "lineno", 0)
        if is_environ(node) and house.section_at(line).title != ENVIRON_SECTION:
            yield Finding(line, "environ", f"only {ENVIRON_SECTION} reads the environment")


def look_at_functions(house: House) -> Iterator[Finding]:
    for node in ast.walk(house.tree):
        if isinstance(node, Function):
            if (size := length(node)) > MAX_LINES:
                yield Finding(node.lineno, "long", f"{node.name} has {size} lines")
            if (levels := depth(node.body)) > MAX_DEPTH:
                yield Finding(node.lineno, "deep", f"{node.name} has {levels} levels")


def look_for_dead(house: House) -> Iterator[Finding]:
    used = {node.id for node in ast.walk(house.tree) if is_read(node)}
    for name, line in definitions(house.tree.body).items():
        if name not in used and not name.startswith("__"):
            yield Finding(line, "dead", f"nothing uses {name}")


LOOKS = (
    look_at_contents,
    look_at_rooms,
    look_upward,
    look_for_state,
    look_at_import,
    look_for_environ,
    look_at_functions,
    look_for_dead,
)


# --- what they see with -------------------------------------------------------


def definitions(body: list[ast.stmt]) -> dict[str, int]:
    """Names of the module and the line that first defines each."""
    lines: dict[str, int] = {}
    for node in body:
        if isinstance(node, SCOPES[:3]):
            lines.setdefault(node.name, node.lineno)
        elif isinstance(node, ast.If | ast.Try):
            for name, line in definitions(inner_bodies(node)).items():
                lines.setdefault(name, line)
        else:
            stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
            for name_node in stored:
                if isinstance(name_node.ctx, ast.Store):
                    lines.setdefault(name_node.id, node.lineno)
    return lines


def inner_bodies(node: ast.If | ast.Try) -> list[ast.stmt]:
    handlers = [part for handler in getattr(node, "handlers", ()) for part in handler.body]
    return [*node.body, *node.orelse, *handlers, *getattr(node, "finalbody", ())]


def global_names(code: CodeType, operations: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, name) wherever functions and class bodies read or write a name of the module."""
    for inner in (const for const in code.co_consts if isinstance(const, CodeType)):
        line = inner.co_firstlineno
        own = set()  # names a class body has bound itself
        for step in dis.get_instructions(inner):
            line = line_of(step) or line
            if step.opname == "STORE_NAME":
                own.add(step.argval)
            elif step.opname in operations and step.argval not in own:
                yield line, step.argval
        yield from global_names(inner, operations)


def line_of(step: dis.Instruction) -> int | None:
    """The source line of an instruction; where it stands depends on the Python version."""
    positions = getattr(step, "positions", None)
    return positions.lineno if positions else step.starts_line


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import, but for the docstrings, class frames and guards that may."""
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.ClassDef):
            yield from statements(node.body)
        elif isinstance(node, ast.If) and is_guard(node.test):
            continue
        elif isinstance(node, ast.If | ast.Try):
            yield from statements(inner_bodies(node))
        else:
            yield node


def is_guard(test: ast.expr) -> bool:
    return ast.unparse(test) in ("__name__ == '__main__'", "TYPE_CHECKING")


def is_read(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


def is_data(node: ast.stmt) -> bool:
    """A class whose objects never change: a frozen dataclass or a named tuple."""
    if not isinstance(node, ast.ClassDef):
        return False
    frozen = any("frozen=True" in ast.unparse(decorator) for decorator in node.decorator_list)
    return frozen or any(ast.unparse(base) == "NamedTuple" for base in node.bases)


def acts(call: ast.Call) -> bool:
    """Does this call, by its name, touch a file, a thread, a socket or the terminal?"""
    root: ast.expr = call.func
    while isinstance(root, ast.Attribute | ast.Call):
        root = root.value if isinstance(root, ast.Attribute) else root.func
    if not isinstance(root, ast.Name):
        return False
    return root.id in (ACTING if isinstance(call.func, ast.Attribute) else ACTING_BUILTINS)


def is_environ(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(
            alias.name in ("environ", "environb", "getenv") for alias in node.names
        )
    return (
        isinstance(node, ast.Attribute)
        and re.fullmatch(r"os\.(environb?|getenvb?|putenv|unsetenv)", ast.unparse(node)) is not None
    )


def length(function: Function) -> int:
    body = function.body
    if ast.get_docstring(function) is not None and len(body) > 1:
        body = body[1:]
    return (function.end_lineno or 0) - body[0].lineno + 1


def depth(body: list[ast.stmt]) -> int:
    """How many blocks stand inside one another; an elif is no deeper than its if."""
    return max((levels(node) for node in body), default=0)


def levels(node: ast.AST) -> int:
    if isinstance(node, SCOPES):
        return 0
    inner = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        chained = node.orelse[0]
        inner.remove(chained)
        return max(levels(chained), 1 + max(map(levels, inner), default=0))
    return isinstance(node, BLOCKS) + max(map(levels, inner), default=0)


if __name__ == "__main__":
    default = Path(__file__).resolve().parent.parent / "router.py"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    findings = check(path.read_text(encoding="utf-8"))
    print(*(f"{path.name}:{finding}" for finding in findings), sep="\n")
    sys.exit(bool(findings))
