"""The documentation against the code: links lead somewhere, named tests exist, every setting and option is described."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import textwrap
from pathlib import Path

import pytest

from streamtask import errors
from streamtask.settings import Settings, TaskOptions

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md"), *ROOT.glob("deploy/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
TEST = re.compile(r"\btests/[\w/]+\.py(?:::\w+)*")
FENCE = re.compile(r"^([ \t]*)```(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
BINDINGS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """A page without its code blocks: what looks like a link or a heading there is none."""
    return FENCE.sub("", text_of(name))


def anchors(name: str) -> set[str]:
    """The anchors of a page's headings, as hosts of repositories make them."""
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", prose(name), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def rows(name: str, section: str | None = None) -> set[str]:
    """What stands in backquotes in the first column of a page's tables, or of those of one section."""
    text = prose(name)
    if section is not None:
        text = text.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    firsts = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    return {one for first in firsts for one in re.findall(r"`([^`]+)`", first)}


@functools.cache
def defined(path: Path) -> set[str]:
    """The tests of a file: ``test_x``, or ``TestX::test_y``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, BINDINGS):
            found.add(node.name)
            found |= {f"{node.name}::{one.name}" for one in node.body if isinstance(one, BINDINGS)}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    broken = []
    for target in LINK.findall(prose(name)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (ROOT / name).parent / file if file else ROOT / name
        if not page.exists():
            broken.append(target)
        elif anchor and page.suffix == ".md" and anchor not in anchors(str(page.resolve().relative_to(ROOT))):
            broken.append(f"{target}: no such heading")
    assert not broken


@pytest.mark.parametrize("name", [name for name in NAMES if TEST.search(text_of(name))])
def test_named_tests_exist(name: str) -> None:
    missing = []
    for one in TEST.findall(text_of(name)):
        file, _, test = one.partition("::")
        if not (ROOT / file).is_file() or (test and test not in defined(ROOT / file)):
            missing.append(one)
    assert not missing


def test_every_guarantee_names_tests() -> None:
    sections = re.split(r"^## (?=\d)", text_of("docs/guarantees.md"), flags=re.MULTILINE)[1:]
    assert [int(section.split(".", 1)[0]) for section in sections] == list(range(1, 9))
    for section in sections:
        for part in ("**Promised.**", "**How.**", "**Where it ends.**", "**Tests.**"):
            assert section.count(part) == 1, section.splitlines()[0]
        assert TEST.search(section.split("**Tests.**")[1]), section.splitlines()[0]


def test_every_setting_is_described_with_its_default() -> None:
    described = dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", text_of("docs/settings.md"), re.MULTILINE))
    for field in dataclasses.fields(Settings):
        assert field.name in described, field.name
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        assert ast.literal_eval(described[field.name].strip("`")) == default, field.name


def test_every_task_option_is_described_with_its_default() -> None:
    described = dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", text_of("docs/tasks.md"), re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(TaskOptions)}
    assert set(fields) <= set(described)
    for name, default in fields.items():
        if name != "serializer":  # "the app's"
            assert ast.literal_eval(described[name].strip("`")) == default, name


def test_no_setting_or_option_is_described_that_is_not_there() -> None:
    settings = {field.name for field in dataclasses.fields(Settings)}
    for section in ("Queues and messages", "Producing", "Working"):
        assert rows("docs/settings.md", section) <= settings
    options = {field.name for field in dataclasses.fields(TaskOptions)}
    assert rows("docs/tasks.md", "Options") == options | {"name"}


def test_errors_of_produce_calls_are_known() -> None:
    named = rows("docs/producing.md", "Errors") - {"TypeError"}
    assert named <= set(errors.__all__)
    assert {"QueueFull", "BrokerUnavailable", "BulkSendError", "ShardKeyError"} <= named


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_compile(name: str) -> None:
    for _, language, code in FENCE.findall(text_of(name)):
        if language in ("python", "py"):
            compile(textwrap.dedent(code), name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_architecture_names_every_module() -> None:
    """Whoever has read that page alone knows where to look. Commands are one file each, by their names."""
    page = text_of("docs/architecture.md")
    source = ROOT / "streamtask"
    modules = [path for path in source.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    named = [path.relative_to(source).as_posix() for path in modules if path.relative_to(source).parts[0] != "cli"]
    assert len(named) > 80
    assert [name for name in named if f"`{name}`" not in page] == []
