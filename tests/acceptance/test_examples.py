"""The examples run as their READMEs say, in processes of their own."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.helpers import ROOT, spawn, wait_until

NOTIFICATIONS = ROOT / "examples" / "notifications"
USERS, EACH = 20, 5


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str | None]:
    return {
        "STREAMTASK_HOME": str(tmp_path / "home"),
        "STREAMTASK_BROKER_URL": None,
        "STREAMTASK_APP": None,
        "NOTIFICATIONS_LOG": str(tmp_path / "notifications.log"),
    }


def test_notifications(tmp_path: Path, env: dict[str, str | None]) -> None:
    log = tmp_path / "notifications.log"
    # The pushes, welcome, the flaky one and the one after it, the order, the reminder, the digest.
    expected = USERS * EACH + 1 + 2 + 1 + 1 + 1

    def lines() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    with spawn("-m", "streamtask", "-A", "app", "worker", "--processes", "2", env=env, cwd=NOTIFICATIONS) as worker:
        with spawn("producer.py", str(USERS), str(EACH), env=env, cwd=NOTIFICATIONS) as producer:
            assert producer.wait(60) == 0, str(producer)
            assert f"result: digest for {USERS} users" in producer.stdout
        wait_until(lambda: len(lines()) >= expected, 20, lambda: "\n".join(lines()))

        with spawn("-m", "streamtask", "-A", "app", "dlq", "list", "--json", env=env, cwd=NOTIFICATIONS) as dlq:
            assert dlq.wait() == 0, str(dlq)
            dead = json.loads(dlq.stdout)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0, str(worker)

    found = lines()
    assert len(found) == expected
    for user in range(1, USERS + 1):
        own = [line.partition(" ")[2].partition(" ")[2] for line in found if line.startswith(f"push user={user} ")]
        news = [f"news {n}" for n in range(1, EACH + 1)]
        extra = {1: ["welcome", *news], 2: [*news, "flaky offer", "after the offer"]}
        assert own == extra.get(user, [*news, "your order 4711 is on its way"] if user == 3 else news)
    assert found.count(f"digest users={USERS}") == 1
    assert found.count("reminder user=4 your appointment") == 1

    assert "there is no user -1" in json.dumps(dead)
    assert (NOTIFICATIONS / "notifications.log").exists() is False
