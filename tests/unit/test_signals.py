"""What has come to a supervisor at the end of a warm restart, in a process of its own."""

from __future__ import annotations

from tests.helpers import spawn

HOLDS = """
import os, signal
from streamtask.worker.signals import FOLLOWED, STOPS, Signals

signals = Signals()
signals.started()

def holds(*numbers):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOLLOWED)
    for number in numbers:
        os.kill(os.getpid(), number)
    return signals.hold()

print([holds(), holds(signal.SIGHUP), holds(signal.SIGUSR1, signal.SIGUSR2)])
print([holds(number) for number in STOPS], holds(signal.SIGHUP, signal.SIGTERM), holds())
os.kill(os.getpid(), signal.SIGTERM)
print(signal.sigpending() == {signal.SIGTERM})
"""


def test_none_that_stops_is_lost_in_a_restart():
    """What nobody has taken forbids it; what comes later waits for the next program."""
    with spawn("-c", HOLDS) as spawned:
        assert spawned.wait() == 0
        assert spawned.lines == ["[True, True, True]", "[False, False, False] False True", "True"]
