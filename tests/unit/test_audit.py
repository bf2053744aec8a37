"""What ``make lint`` says of known vulnerabilities: nothing is taken for checked that was not."""

from __future__ import annotations

from typing import Any

import pytest

from tests import audit

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
