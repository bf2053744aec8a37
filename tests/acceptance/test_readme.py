"""The README's example, as it stands there."""

from __future__ import annotations

import re
import signal
from collections import Counter
from pathlib import Path

from tests.helpers import ROOT, spawn, wait_until

LINE = re.compile(r"push to (\d+) (first|second|paid|news)")
TIMES = 3
CODE = re.compile(r"^```python\n(# notifications\.py\n.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_first_example_prints_whole_lines_with_four_processes(tmp_path: Path) -> None:
    [code] = CODE.findall((ROOT / "README.md").read_text())
    (tmp_path / "notifications.py").write_text(code)
    env = {"STREAMTASK_HOME": str(tmp_path / "home"), "STREAMTASK_BROKER_URL": None, "STREAMTASK_APP": None}
    args = ("-m", "streamtask", "-A", "notifications", "worker", "--processes", "4")
    # With Python's own buffers, as people run it: blocks of several processes would be mixed in the middle of lines.
    with spawn(*args, env={**env, "PYTHONUNBUFFERED": None}, cwd=tmp_path) as worker:
        for _ in range(TIMES):
            with spawn("notifications.py", env=env, cwd=tmp_path) as producer:
                assert producer.wait(60) == 0, str(producer)
        expected = TIMES * 1002 + 1  # what has a dedupe id is stored once
        wait_until(lambda: len(worker.lines) >= expected, 30, lambda: str(worker), progress=lambda: len(worker.lines))
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0, str(worker)
        assert [line for line in worker.lines if not LINE.fullmatch(line)] == []
        found = Counter(worker.lines)
    assert found.pop("push to 42 paid") == 1
    assert found.pop("push to 42 first") == found.pop("push to 42 second") == TIMES
    assert found == {f"push to {user} news": TIMES for user in range(1000)}


def test_without_buffers_a_print_of_several_values_is_one_write_too() -> None:
    code = (
        "import os, sys; from streamtask.worker.child import print_whole_lines; print_whole_lines()\n"
        "print('a', 'b', end=' ')\nassert os.fstat(1).st_size == 0\nprint('c')\nassert os.fstat(1).st_size == 6"
    )
    with spawn("-u", "-c", code) as process:
        assert process.wait() == 0, str(process)
        assert process.lines == ["a b c"]
