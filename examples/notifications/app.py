"""User notifications: pushes in order for each user, a digest for whoever is free, a reminder for later.

The log (``NOTIFICATIONS_LOG``, else ``notifications.log``) stands for the phones: one line for each notification.
"""

from __future__ import annotations

import os
import time

from streamtask import Reject, StreamTask, Task

LOG = os.environ.get("NOTIFICATIONS_LOG", "notifications.log")

# Without a broker: STREAMTASK_BROKER_URL, and without that the embedded server of this user.
app = StreamTask("notifications", backend=True)


class ProviderDown(Exception):
    """The push provider did not take a notification; it may the next time."""


def provider(user_id: int, text: str, attempt: int) -> None:
    """Stands for the HTTP call to a push service that has bad moments."""
    if user_id <= 0:
        raise Reject(f"there is no user {user_id}")
    if "flaky" in text and attempt < 2:
        raise ProviderDown("503")
    write(f"push user={user_id} {text}")


def write(line: str) -> None:
    """One system call per line, so that lines of several processes don't mix."""
    fd = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)


# Pushes of one user start in the order in which they were sent, on whatever process, and never overlap. While one is
# retried, later ones of the same user wait behind it; other users' go on.
@app.task(shard_key="user_id", bind=True, max_retries=5, retry_backoff=0.1, autoretry_for=(ProviderDown,))
def send_push(self: Task[..., None], user_id: int, text: str) -> None:
    provider(user_id, text, self.request.attempt)


# No shard key: any process that is free takes it.
@app.task
def build_digest(user_ids: list[int]) -> str:
    time.sleep(0.05)  # a slow query
    write(f"digest users={len(user_ids)}")
    return f"digest for {len(user_ids)} users"


@app.task(shard_key="user_id")
def remind(user_id: int, about: str) -> None:
    write(f"reminder user={user_id} {about}")
