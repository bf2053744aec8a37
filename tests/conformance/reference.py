"""What the suites gave with kombu's own redis transport, and the part of them that is quick."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field

from .suites import Chosen


@dataclass(frozen=True)
class Reference:
    package: str
    version: str
    passed: int
    failed: frozenset[str] = field(default_factory=frozenset)
    skipped: frozenset[str] = field(default_factory=frozenset)
    off: frozenset[str] = field(default_factory=frozenset)
    """Tests that excuse themselves from a ``redis://`` broker, and fail with kombu's redis transport by another name."""

    def same_version(self) -> bool:
        return importlib.metadata.version(self.package) == self.version

    def __str__(self) -> str:
        return f"{self.passed} passed, {len(self.failed)} failed, {len(self.skipped)} skipped"


# kombu's redis transport ignores the time to live of a message.
_TTL = ("test_publish_consume", "test_simple_queue_publish_consume", "test_simple_buffer_publish_consume")

REFERENCE = {
    "kombu": Reference(
        "kombu",
        "5.7.0",
        passed=72,
        failed=frozenset(f"TestTimeToLive::{name}[{way}]" for name in _TTL for way in ("plain", "prefixed")),
    ),
    "celery": Reference(
        "celery",
        "5.7.0",
        passed=394,
        skipped=frozenset(
            {
                "test_chord_expires",  # another result backend
                # switched off by Celery
                "test_tasks::test_multiprocess_producer",
                "test_tasks::test_multithread_producer",
                "test_tasks::test_task_accepted",
            }
        ),
        # Its handler of a signal raises before it has published what it wants to.
        off=frozenset({"test_chain::test_chord_header_id_duplicated_on_rabbitmq_msg_duplication[redis-group-ids]"}),
    ),
}

PARTS = {"test_canvas.py": 8, "test_tasks.py": 2, "test_inspect.py": 2, "kombu_generic.py": 2}
"""Files that take long are run in parts, each by a process of its own."""

QUICK = (
    Chosen("celery", "test_canvas.py", part=1, parts=8),
    Chosen("celery", "test_tasks.py", part=1, parts=4),
    Chosen("celery", "test_inspect.py", part=1, parts=2),
    Chosen("celery", "test_inspect.py", part=2, parts=2),
    Chosen("kombu", "kombu_generic.py", part=1, parts=2),
    Chosen("kombu", "kombu_generic.py", part=2, parts=2),
    Chosen("celery", "test_beat.py", select="remote_control"),
    Chosen("celery", "test_connection_recovery.py"),
    Chosen("celery", "test_group_chains.py"),
    Chosen("celery", "test_serialization.py"),
    Chosen("celery", "test_worker.py", select="not django"),
)
"""What `make test` runs: what a broker is used for, in some two minutes. Those that take longest come first."""
