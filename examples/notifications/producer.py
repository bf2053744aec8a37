"""Sends notifications to the app beside it: ``python producer.py [users] [pushes for each]``."""

from __future__ import annotations

import datetime as dt
import sys

from app import build_digest, remind, send_push


def main(users: int = 20, each: int = 5) -> None:
    # One call: when it returns, the message is stored and will be run.
    send_push.delay(user_id=1, text="welcome")

    # Many at once: some hundreds of messages take one round trip. The order within each user is that of the list.
    calls = [{"user_id": user, "text": f"news {n}"} for n in range(1, each + 1) for user in range(1, users + 1)]
    send_push.send_many(calls)

    # The provider refuses this one twice. What is sent to user 2 after it waits for it.
    send_push.delay(2, "flaky offer")
    send_push.delay(2, "after the offer")

    # Rejected by the task: a dead letter, to be looked at with 'streamtask -A app dlq list'.
    send_push.delay(-1, "to nobody")

    # Once for an order, however often the web server repeats the request.
    for _ in range(3):
        send_push.apply_async((3, "your order 4711 is on its way"), dedupe_id="order-4711-shipped")

    # Later: a countdown in seconds, or an instant.
    soon = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=2)
    remind.apply_async((4, "your appointment"), eta=soon)

    digest = build_digest.delay(list(range(1, users + 1)))
    print(f"sent {len(calls)} pushes at once and some single messages; waiting for the digest")
    print("result:", digest.get(timeout=60))


if __name__ == "__main__":
    main(*(int(arg) for arg in sys.argv[1:]))
