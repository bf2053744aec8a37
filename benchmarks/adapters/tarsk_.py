"""tarsk on Redis Streams, whose core is written in Rust."""

from __future__ import annotations

from common import BODIES, URL, Adapter, main, tool
from tarsk import App

app = App(broker=URL)
TASKS = {name: app.task(name=name)(body) for name, body in BODIES.items()}


def worker(processes: int, concurrency: int) -> list[list[str]]:
    argv = [tool("tarsk"), "worker", "--app", "tarsk_:app", "--broker", URL, "--queues", "default"]
    return [[*argv, "--children", str(processes), "--slots", str(concurrency or 1000)]]


if __name__ == "__main__":
    main(
        Adapter(
            packages=("tarsk-redis", "msgpack"),
            settings={"worker": "--children PROCESSES, --slots 1000, 16 for the tasks that sleep"},
            worker=worker,
            sender=lambda task: TASKS[task].send,
            async_sender=lambda task: TASKS[task].send_async,
        )
    )
