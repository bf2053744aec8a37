"""Runs it all and judges it: two workers, a producer, a kill -9, and then the log. Exit status 0 if all held.

Without ``SHOP_BROKER_URL`` it starts a redis-server of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
USERS, EACH, REPORTS = 20, 15, 100


def main() -> int:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shop-")))
        url = os.environ.get("SHOP_BROKER_URL") or stack.enter_context(own_server(folder))
        log = folder / "shop.log"
        env = {**os.environ, "SHOP_BROKER_URL": url, "SHOP_LOG": str(log)}
        # Before app.py is imported below, to ask for what is left in the queue.
        os.environ.update(env)

        def lines(start: str) -> list[str]:
            text = log.read_text() if log.exists() else ""
            return [line for line in text.splitlines() if line.startswith(start)]

        first = stack.enter_context(worker("one", env, folder))
        second = stack.enter_context(worker("two", env, folder))
        wait(lambda: len(lines("ready")) == 2, 60, "both workers are ready")

        sizes = [str(number) for number in (USERS, EACH, REPORTS)]
        subprocess.run([sys.executable, "producer.py", *sizes], env=env, cwd=HERE, check=True)

        wait(lambda: len(lines("start")) >= 60, 30, "the workers are busy")
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        killed = time.monotonic()
        print("worker one was killed with -9, its pool with it, in the middle of its work")

        wanted = USERS * EACH + REPORTS + 1
        wait(lambda: len(set(lines("end"))) >= wanted, 90, lambda: f"{len(set(lines('end')))} of {wanted} have ended")
        print(f"everything had run {time.monotonic() - killed:.1f} s after the kill")

        second.terminate()
        second.wait(30)
        faults = judge(log.read_text().splitlines()) + [f"{left()} messages are left in the queue"] * bool(left())
        for fault in faults:
            print("WRONG:", fault)
        print("lost, or out of order: see above" if faults else "nothing lost, each user's order held, one reminder")
        return bool(faults)


def judge(log: list[str]) -> list[str]:
    """What did not hold, read from the log."""
    starts: dict[tuple[str, int], list[str]] = defaultdict(list)
    ended = set()
    faults = []
    for line in log:
        kind, *rest = line.split()
        if kind == "ready":
            continue
        what, user, number = rest[0], int(rest[1]), rest[2]
        if kind == "end":
            ended.add((what, user, number))
            continue
        if what == "event" and number not in starts[what, user]:
            # The one before it must have ended: order, and never two at once.
            before = str(int(number) - 1)
            if number != "1" and ("event", user, before) not in ended:
                faults.append(f"event {number} of user {user} began before event {before} had ended")
        starts[what, user].append(number)

    for user in range(1, USERS + 1):
        missing = [n for n in range(1, EACH + 1) if ("event", user, str(n)) not in ended]
        if missing:
            faults.append(f"lost: events {missing} of user {user}")
    missing = [n for n in range(1, REPORTS + 1) if ("report", 0, str(n)) not in ended]
    if missing:
        faults.append(f"lost: reports {missing}")

    reminders = starts["reminder", 1]
    if len(reminders) != 1:
        faults.append(f"the reminder came {len(reminders)} times")
    elif float(reminders[0]) < 0:
        faults.append(f"the reminder came {-float(reminders[0]):.3f} s too early")

    runs = sum(len(numbers) for numbers in starts.values())
    again = runs - sum(len(set(numbers)) for numbers in starts.values())
    print(f"{runs} bodies ran, {again} of them again: what the killed worker had begun and not acknowledged")
    return faults


def left() -> int:
    """Messages that are still in the broker."""
    from app import app

    with app.connection() as connection:
        queue = connection.default_channel.queue_declare(app.conf.task_default_queue, passive=False)
        return int(queue.message_count)


@contextlib.contextmanager
def worker(name: str, env: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A stock Celery worker in a process group of its own, which ends with the block, whatever becomes of us."""
    command = [sys.executable, "-m", "celery", "-A", "app", "worker", "-n", f"{name}@%h", "-c", "4", "-l", "warning"]
    with open(folder / f"{name}.txt", "wb") as output:
        process = subprocess.Popen(
            command, env=env, cwd=HERE, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    except BaseException:
        print(f"--- worker {name}:", (folder / f"{name}.txt").read_text(errors="replace"), sep="\n", file=sys.stderr)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def own_server(folder: Path) -> Iterator[str]:
    """A redis-server on a free port, which only this run uses; gives the broker URL."""
    from streamtask.redis.embedded import find_server

    binary, version = find_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--appendonly", "yes"]
    with open(folder / "redis.txt", "wb") as output:
        server = subprocess.Popen([*words, "--save", ""], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        wait(lambda: answers(port), 20, "redis-server answers")
        print(f"started a redis-server {version}")
        yield f"streamtask://127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.wait()


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
            probe.sendall(b"PING\r\n")
            return probe.recv(7) == b"+PONG\r\n"
    except OSError:
        return False


def wait(condition: Callable[[], bool], timeout: float, what: str | Callable[[], str]) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"not within {timeout:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
