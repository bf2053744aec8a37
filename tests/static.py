"""``make lint`` asks here what no tool looks for: what a module reaches of another's, what the pages name, what scripts say.

- **private**: a name with a leading underscore is used in its own module only. ``FOREIGN`` has those of other packages that
  have no public way, and why.
- **cycles**: no module imports one that imports it, on whatever ways, not even for types. Where a lower room has to know what a
  higher one gives it, a protocol of its own says what that is.
- **names**: a file, class, method or dotted module that a page, a docstring or a comment names is there.
- **redis**: commands are spelled in ``redis/`` or in Lua, and whoever holds a connection got it there for a key.
- **heads**: the comment at a script's head explains all KEYS and ARGV that its code uses, in order, and what it returns.

Each check answers its findings as lines ``place: what is wrong``. Exit status 1 if there are any.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "streamtask"
LUA = SOURCE / "redis" / "lua"
FENCE = re.compile(r"^([ \t]*)```(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)

FOREIGN = {
    "self": {"_flush": "of kombu's QoS"},
    "os": {"_exit": "the one way to end a process at once"},
    "parts": {"_replace": "a method of named tuples, public by its documentation"},
}
"""Private names of other packages, by what they are reached through."""

FOREIGN_FILES = {
    "streamtask/celery/internals.py": "apps, requests and pools of Celery and billiard, each fact once",
    "streamtask/migration/streams.py": "kombu's virtual channels",
    "streamtask/migration/lists.py": "kombu's redis transport",
}
"""Files that stand against the inside of another package, and what of it."""


# Private names


@cache
def own_private_names(path: Path) -> frozenset[str]:
    """The private names that a module of ours defines: functions, classes, methods, attributes, module variables."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(name for name in found if is_private(name))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names() -> Iterator[str]:
    """What a module uses of another's private names."""
    paths = sorted(SOURCE.rglob("*.py"))
    for path in paths:
        place = path.relative_to(ROOT).as_posix()
        own = own_private_names(path)
        near = near_private_names(path) - own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                for name in node.names:
                    stranger = not node.level and (node.module or "").split(".")[0] != "streamtask"
                    if is_private(name.name) and not stranger:
                        yield f"{place}:{node.lineno}: imports {name.name}, which is private to {node.module}"
            elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                if isinstance(node.value, ast.Name) and node.attr in FOREIGN.get(node.value.id, ()):
                    continue
                if is_inherited(node.value) and node.attr not in near:
                    continue  # of a base class that is another package's
                if place in FOREIGN_FILES and not is_inherited(node.value):
                    continue
                yield f"{place}:{node.lineno}: uses {ast.unparse(node)}, which is private to another module"


def is_inherited(node: ast.expr) -> bool:
    return is_self(node) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "super")


def imported(path: Path) -> Iterator[Path]:
    """The modules of ours that a module of ours imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in node.names:
                ways = (
                    folder / f"{name.name}.py",
                    folder / name.name / "__init__.py",
                    folder / "__init__.py",
                    folder.with_suffix(".py"),
                )
                yield from [way for way in ways if way.is_file()][:1]


def near_private_names(path: Path) -> set[str]:
    """The private names of what a module builds upon: what it imports, and what that imports from the same folder."""
    direct = set(imported(path))
    further = {two for one in direct for two in imported(one) if two.parent == one.parent}
    return {name for one in direct | further for name in own_private_names(one)}


# Cycles


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def cycles() -> Iterator[str]:
    """Modules that import each other, under ``TYPE_CHECKING`` and inside of functions, too."""
    graph = {path: set(imported(path)) - {path} for path in sorted(SOURCE.rglob("*.py"))}
    while ends := [path for path, below in graph.items() if not below & graph.keys()]:
        for path in ends:  # it imports nothing that may lead back
            del graph[path]
    while tops := [path for path in graph if not any(path in below for below in graph.values())]:
        for path in tops:  # nothing that is left imports it
            del graph[path]
    for path, below in graph.items():
        others = ", ".join(sorted(map(module_name, below & graph.keys())))
        yield f"{path.relative_to(ROOT).as_posix()}: in a cycle with {others}"


# Commands and connections

SPELLS = {"pack", "command", "pack_command", "execute_command"}
COMMAND = re.compile(
    r"X[A-Z]{3,}|H(M?GET|GETALL|SET|DEL|KEYS)|Z(ADD|REM|RANGE\w*|SCORE|CARD)|S(ADD|REM|MEMBERS)|P?SUBSCRIBE|PUBLISH"
)
OTHERS_REDIS = {"streamtask/migration/lists.py": "what kombu's own transport has stored, by kombu's client"}
"""Files that ask a Redis which is not ours."""


def redis_elsewhere() -> Iterator[str]:
    """Where a command is spelled outside of ``redis/``, or a connection is not asked for by a key."""
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if path.is_relative_to(SOURCE / "redis") or place in OTHERS_REDIS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                words = node.args
                if called in SPELLS and words and text_of(words[0]).isupper():
                    yield f"{place}:{node.lineno}: spells {text_of(words[0])}: redis/commands.py has it, or is to"
                elif called == "link" and not words and not node.keywords and isinstance(node.func, ast.Attribute):
                    yield f"{place}:{node.lineno}: takes a connection for no key: redis/links.py holds them"
                elif called in ("client", "async_client") and not words and isinstance(node.func, ast.Attribute):
                    yield f"{place}:{node.lineno}: uses redis-py's client: what it asks belongs to redis/"
            elif isinstance(node, ast.Tuple | ast.List) and node.elts and COMMAND.fullmatch(text_of(node.elts[0])):
                yield f"{place}:{node.lineno}: spells {text_of(node.elts[0])}: redis/commands.py has it, or is to"


def text_of(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


# Names in pages, docstrings and comments


def definitions() -> dict[str, set[str]]:
    """All classes of ours, with the names that they define or annotate, their bases' included."""
    found: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            names = found.setdefault(node.name, set())
            bases.setdefault(node.name, set()).update(ast.unparse(base).split(".")[-1] for base in node.bases)
            for one in ast.walk(node):
                if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
                    names.add(one.name)
                elif isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store) and is_self(one.value):
                    names.add(one.attr)
                elif isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
                    names.add(one.id)
    for _ in range(6):
        for name, above in bases.items():
            for base in above & set(found):
                found[name] |= found[base]
    return found


PATH = re.compile(r"(?<![\w/.-])([\w*./-]*[\w*]\.(?:py|lua))(?:::[\w:]+)?(?![\w/])")
FOLDER = re.compile(r"^((?:[a-z_]+/)+)$")
DOTTED = re.compile(r"^streamtask(?:\.[a-z_]\w*)+(?:\.[A-Z]\w*)?$")
MEMBER = re.compile(r"^([A-Z]\w+)\.(\w+)(?:\(\))?$")
LOGGERS = re.compile(r"logger\(\"(streamtask[\w.]*)\"\)|getLogger\(\"(streamtask[\w.]*)\"\)")

EXAMPLES = frozenset(
    [
        "tasks.py",
        "app.py",
        "shop.py",
        "myapp.py",
        "celeryconfig.py",
        "manage.py",
        "celery.py",
        "settings.py",
        "orders.py",
        "conftest.py",
        "notes.py",
        "test_tasks.py",
        "test_x.py",
        ".py",
        "NAME.lua",
        "NAME_.py",
        "NOUN.py",
        "noun.py",
        "verb_noun.lua",
        "settle_v2.lua",
    ]
)
"""Files of readers, which pages show."""

OTHERS = {
    "Producer": {"batch"},
    "Request": {"on_failure", "on_timeout"},
    "Task": {"start_strategy"},
}
"""Members of classes of Celery's and kombu's that are called as some of ours."""


def folders(file: Path) -> list[Path]:
    return [
        file.parent,
        ROOT,
        SOURCE,
        SOURCE / "redis",
        LUA,
        LUA / "include",
        ROOT / "tests",
        ROOT / "docs",
        ROOT / "examples",
    ]


def is_there(name: str, file: Path) -> bool:
    """Whether a file of that name stands where its name is said from."""
    return any(next(iter(folder.glob(name.strip("/"))), None) is not None for folder in folders(file))


def resolves(dotted: str) -> bool:
    """Whether that is a module of ours, or a name in one."""
    try:
        if importlib.util.find_spec(dotted) is not None:
            return True
    except ModuleNotFoundError:
        pass
    above, _, name = dotted.rpartition(".")
    try:
        spec = importlib.util.find_spec(above)
    except ModuleNotFoundError:
        return False
    if spec is None or spec.origin is None:
        return False
    return re.search(rf"\b{name}\b", Path(spec.origin).read_text(encoding="utf-8")) is not None


def said_in(path: Path) -> Iterator[tuple[int, str]]:
    """What a page has in backquotes; what docstrings and comments have in double ones."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = FENCE.sub(lambda block: "\n" * block.group().count("\n"), text)
        quoted = r"(?<!`)`([^`\n]+)`(?!`)"
    else:
        quoted = r"``([^`\n]+)``"
    for match in re.finditer(quoted, text):
        yield text.count("\n", 0, match.start()) + 1, match.group(1)


def names_that_are_not_there() -> Iterator[str]:
    """Files, folders, modules, classes' members that a text of ours names and that do not exist."""
    classes = definitions()
    loggers = {
        one
        for path in SOURCE.rglob("*.py")
        for pair in LOGGERS.findall(path.read_text(encoding="utf-8"))
        for one in pair
    }
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("deploy/*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]
    for path in sorted([*pages, *SOURCE.rglob("*.py"), *SOURCE.rglob("*.lua"), *(ROOT / "tests").rglob("*.py")]):
        if path.name in ("CHANGELOG.md", "static.py", "test_static.py"):
            continue  # tells of what was
        place = path.relative_to(ROOT).as_posix()
        for line, name in said_in(path):
            for file in PATH.findall(name):
                if Path(file).name not in EXAMPLES and not file.startswith("t/") and not is_there(file, path):
                    yield f"{place}:{line}: no file {file}"
            if (folder := FOLDER.match(name)) and not is_there(folder[1], path):
                yield f"{place}:{line}: no folder {name}"
            if DOTTED.match(name) and name not in loggers and not resolves(name):
                yield f"{place}:{line}: nothing is called {name}"
            member = MEMBER.match(name)
            if (
                member
                and member[1] in classes
                and member[2] not in classes[member[1]] | OTHERS.get(member[1], set())
                and not is_there(name, path)
            ):
                yield f"{place}:{line}: {member[1]} has no {member[2]}"


# Heads of scripts


def head_and_body(path: Path) -> tuple[str, str]:
    """The comment at the file's head, and its code without comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("--") or line.startswith("---"))
    code = [re.sub(r"--.*", "", line) for line in lines[first:]]
    return "\n".join(lines[:first]), "\n".join(code)


def documented(head: str, what: str) -> tuple[list[int], int | None]:
    """Indexes that the head explains, and from where on all are explained ("KEYS[4...]"), or None."""
    found = re.findall(rf"^-- {what}\[(\d+)(\.\.\.)?\] \S", head, re.MULTILINE)
    return [int(n) for n, dots in found if not dots], next((int(n) for n, dots in found if dots), None)


def used(body: str, what: str) -> tuple[set[int], bool]:
    """Indexes that stand in the code as numbers, and whether others are reached by counting."""
    numbers = {int(n) for n in re.findall(rf"{what}\[(\d+)\]", body)}
    return numbers, bool(re.search(rf"{what}\[[^\]]*[a-z#]|#{what}|unpack\({what}", body))


def head_faults(path: Path) -> Iterator[str]:
    """Where a script's head and its code do not fit."""
    place = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    head, body = head_and_body(path)
    for what in ("KEYS", "ARGV"):
        single, rest_from = documented(head, what)
        numbers, counted = used(body, what)
        last = rest_from if rest_from is not None else len(single) + 1
        if single != list(range(1, last)):
            yield f"{place}: its head does not explain each of {what} once, in order"
        elif (rest_from is not None) != counted:
            yield f"{place}: {what}[N...] stands for what the code reaches by counting, and for nothing else"
        elif {n for n in numbers if n < last} != set(single) or (rest_from is None and not numbers <= set(single)):
            yield f"{place}: {what} is explained and not used, or used and not explained"
    if not re.match(r"-- [A-Z].{20,}", head):
        yield f"{place}: its head does not say what it does"
    if "-- Returns: " not in head:
        yield f"{place}: its head does not say what it returns"


def heads() -> Iterator[str]:
    for path in sorted(LUA.glob("*.lua")):
        yield from head_faults(path)


def main() -> int:
    found = [*private_names(), *cycles(), *redis_elsewhere(), *names_that_are_not_there(), *heads()]
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
