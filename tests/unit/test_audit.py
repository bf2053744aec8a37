"""What ``make lint`` says of known vulnerabilities: nothing is taken for checked that was not; and the lowest versions."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import pytest

from tests import audit
from tests.lowest import lowest

FINE = {"name": "fine", "version": "1", "vulns": []}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found on PyPI"}
BAD: dict[str, Any] = {
    "name": "bad", "version": "2", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.1"]}],
}  # fmt: skip


@pytest.mark.parametrize(
    "packages, status, said",
    [
        ([FINE], 0, ["known vulnerabilities: 1 packages checked: none"]),
        ([UNKNOWN], 0, ["known vulnerabilities: NOT CHECKED, no data is served here"]),
        (
            [FINE, UNKNOWN],
            0,
            [
                "known vulnerabilities: 1 packages checked: none",
                "known vulnerabilities: NOT CHECKED, not among the data: unknown",
            ],
        ),
        (
            [FINE, BAD],
            1,
            ["bad 2: PYSEC-1 is known (mended in: 2.1)", "known vulnerabilities: 2 packages checked"],
        ),
    ],
)
def test_verdict(packages: list[dict[str, Any]], status: int, said: list[str]) -> None:
    assert audit.verdict({"dependencies": packages}) == (status, said)


def test_what_does_not_concern_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(audit.IGNORED, "CVE-1", "we never call it")
    assert audit.verdict({"dependencies": [BAD]})[0] == 0


def test_what_users_get_is_asked_about() -> None:
    found = set(audit.brought_along())
    assert {"click", "hiredis", "kombu", "msgpack", "redis", "rich", "amqp"} <= found
    assert not {"streamtask", "pytest", "django", "ruff"} & found


def test_all_that_is_needed_has_a_lowest_version() -> None:
    found = lowest(metadata.requires("streamtask") or [])
    assert {"click", "hiredis", "kombu", "msgpack", "redis", "rich", "celery"} <= set(found)
    assert not {"pytest", "ruff", "matplotlib"} & set(found)
    assert lowest(["a[x,y]<9,>=1.2; extra == 'celery'", "b>=2; extra == 'test'", "c (>=3.1)", "d"]) == {
        "a": "1.2",
        "c": "3.1",
    }


def test_the_lowest_versions_are_those_that_were_asked_for() -> None:
    if ".lowest" not in os.environ.get("PYTHONPATH", ""):
        return  # not by make test-lowest
    for name in ("click", "fakeredis", "hiredis", "kombu", "msgpack", "redis", "rich", "celery"):
        version = lowest(metadata.requires("streamtask") or [])[name]
        assert f"{metadata.version(name)}.".startswith(f"{version}."), name
