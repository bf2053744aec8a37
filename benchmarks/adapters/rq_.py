"""RQ."""

from __future__ import annotations

from collections.abc import Callable

from common import BODIES, URL, Adapter, Calls, main, tool
from redis import Redis
from rq import Queue

queue = Queue("bench", connection=Redis.from_url(URL))


def sender(task: str) -> Callable[..., object]:
    enqueue, body = queue.enqueue, BODIES[task]
    return lambda *args: enqueue(body, args=args, result_ttl=0)


def bulk_sender(task: str) -> Callable[[Calls], object]:
    body = BODIES[task]
    return lambda calls: queue.enqueue_many([Queue.prepare_data(body, args=args, result_ttl=0) for args in calls])


def worker(processes: int, concurrency: int) -> list[list[str]]:
    common = ["--url", URL, "--worker-class", "rq.worker.SimpleWorker", "--quiet"]
    count = max(processes, concurrency)
    if count == 1:
        return [[tool("rq"), "worker", *common, "bench"]]
    return [[tool("rq"), "worker-pool", *common, "--num-workers", str(count), "bench"]]


if __name__ == "__main__":
    main(
        Adapter(
            packages=("rq", "redis", "hiredis"),
            settings={
                "worker": "SimpleWorker, without RQ's usual fork for each job, which is several times slower; "
                "a worker-pool of 16 for the tasks that sleep",
                "result_ttl": "0: no result is stored",
                "bulk": "Queue.enqueue_many",
            },
            worker=worker,
            sender=sender,
            bulk_sender=bulk_sender,
        )
    )
