"""Loads the test rig, and checks that no test leaves a process behind."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import MARK, our_processes, run_folders, wait_until

pytest_plugins = ["tests.fix_redis", "tests.fix_proxy", "tests.parts"]

# A shell that starts a job in the background lets it ignore SIGINT, and whatever the job starts inherits that: the tests
# that interrupt a call or a command would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# So does nohup with SIGHUP, which workers are to follow. With a handler here, what the tests start has the default.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# How long an example takes says how busy the machine is.
settings.register_profile("streamtask", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("streamtask")

# Every process that a test starts inherits this, also one that has left our process group and session.
os.environ[MARK] = f"{os.getpid()}-{os.urandom(8).hex()}"


@pytest.fixture(autouse=True)
def no_process_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A test that leaves a process running fails: what it leaves disturbs the tests after it."""
    run_folders.add(f"{tmp_path_factory.getbasetemp()}{os.sep}")
    before = our_processes()
    yield
    left: dict[int, str] = {}

    def gone() -> bool:
        left.clear()
        left.update({pid: command for pid, command in our_processes().items() if pid not in before})
        return not left

    try:
        wait_until(gone, timeout=3)
    except AssertionError:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        pytest.fail("the test left processes running (now killed): " + "; ".join(f"{p}: {c}" for p, c in left.items()))
