"""What the quick part of the suite has of the rest. Each test is in one part, by how ``tests/parts.py`` chooses."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.fix_redis import server_binaries
from tests.helpers import ROOT


def collected(*args: str) -> Counter[str]:
    """The ids of the tests that a run would take."""
    options = ("--collect-only", "-q", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Counter(line for line in done.stdout.splitlines() if "::" in line)


@pytest.mark.slow
def test_the_quick_part_has_something_of_everything() -> None:
    quick = collected("--part", "quick")
    assert set(quick.values()) == {1}
    # Somebody who runs the quick part alone has met every folder, and each test on one server only.
    folders = {path.parent.name for path in Path(ROOT, "tests").glob("*/test_*.py")} - {"conformance"}
    assert {name.split("/")[1] for name in quick} == folders
    versions = set(re.findall(r"\bredis(\d+\.\d+)\b", "\n".join(quick)))
    assert versions == {list(server_binaries())[-1]}
    for name in ("test_kills", "test_outages"):
        assert any(name in one for one in quick if "/chaos/" in one)
