"""The plugin with another broker than ours: one warning, and the tasks run as without it."""

from __future__ import annotations

import pytest

from tests.helpers import spawn

SCRIPT = """
import os, sys, time
from celery.contrib.testing.worker import start_worker
from tests.celery import app as sut

app = sut.make(sys.argv[1])
app.set_current()
ran = []

@app.task(name="mine", shard_key="k")
def mine(k, n):
    ran.append(n)

@app.task(name="again", bind=True, shard_key="k")
def again(self, k, n):
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    ran.append(n)

with start_worker(app, pool="solo", perform_ping_check=False, loglevel="INFO"):
    for n in range(3):
        mine.delay(k="a", n=n)
        mine.apply_async(kwargs={"k": "a", "n": n + 10}, shard_key="b")
    again.delay(k="a", n=20)
    deadline = time.monotonic() + 15
    while len(ran) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
print("ran", sorted(ran))
"""


@pytest.mark.parametrize("broker", ["memory", "redis"])
def test_one_warning_and_no_error(own_server, tmp_path, broker):
    url = "memory://" if broker == "memory" else own_server.url
    script = tmp_path / "foreign.py"
    script.write_text(SCRIPT)
    with spawn("-W", "always:::streamtask", script, url, cwd=tmp_path) as process:
        assert process.wait(40) == 0, str(process)
        output = process.stdout + process.stderr
    assert "ran [0, 1, 2, 10, 11, 12, 20]" in output, output
    warned = [line for line in output.splitlines() if "shard" in line and "warn" in line.lower()]
    assert len(warned) == 1, output
    assert "Traceback" not in output, output
