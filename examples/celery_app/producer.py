"""Sends some of everything to the app beside it: ``python producer.py [users] [events of each] [reports]``."""

from __future__ import annotations

import datetime as dt
import sys

from app import build_report, handle_event, remind

REMINDER_IN = 8


def main(users: int = 20, each: int = 15, reports: int = 100) -> None:
    due = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=REMINDER_IN)
    remind.apply_async((1, due.timestamp()), eta=due)
    for number in range(1, each + 1):
        for user_id in range(1, users + 1):
            handle_event.delay(user_id=user_id, number=number)
    for number in range(1, reports + 1):
        build_report.delay(number)
    print(f"sent {users * each} events of {users} users, {reports} reports, and a reminder for in {REMINDER_IN} s")


if __name__ == "__main__":
    main(*(int(arg) for arg in sys.argv[1:]))
