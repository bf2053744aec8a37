"""The Celery app under test: what its bodies do is told by their arguments, and what they did is written to one file.

A worker process finds ``app`` here, made as its environment says (``rig.Site``); the tests make their own with ``make``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import time
from typing import Any

from celery import Celery, chord, current_task
from celery.exceptions import Reject
from celery.signals import worker_ready
from celery.worker.request import Request
from kombu import Queue
from kombu.common import Broadcast

from streamtask.redis import wire

MAIN = os.getpid()
"""The worker's main process: pool processes are forked from it."""

RECORD = os.environ.get("CELERY_TEST_RECORD")
_file = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if RECORD else None


def with_deadly(hook: Any) -> Any:
    """An extension type of msgpack whose reading ends the process without a word."""

    def ext_hook(code: int, data: bytes) -> Any:
        if code == 77:
            os._exit(3)
        return hook(code, data)

    return ext_hook


if RECORD:
    wire.ext_hook = with_deadly(wire.ext_hook)

STOCK: dict[str, Any] = {
    "task_ignore_result": True,
    "broker_connection_retry_on_startup": True,
    "task_publish_retry_policy": {
        "max_retries": 100,
        "interval_start": 0.02,
        "interval_step": 0.1,
        "interval_max": 0.3,
    },
    "worker_hijack_root_logger": True,
    "timezone": "UTC",
}


def write(kind: str, key: str | None, n: int, attempt: int, task_id: str, redelivered: bool, more: Any) -> None:
    """One line in the record; the order of the lines is the order of the calls, over all processes."""
    if _file is not None:
        line = [kind, time.monotonic(), MAIN, os.getpid(), key, n, attempt, task_id, redelivered, more]
        os.write(_file, json.dumps(line).encode() + b"\n")


def note(kind: str, key: str | None, n: int, **more: Any) -> None:
    """Writes down what the running body does."""
    request = current_task.request
    redelivered = bool((request.delivery_info or {}).get("redelivered"))
    write(kind, key, n, request.retries, request.id, redelivered, more)


def wait_gate(n: int) -> str:
    """Waits until the test opens the gate of this message (for this worker, or for any), and says the outcome."""
    folder = os.path.dirname(RECORD or "")
    gates = [os.path.join(folder, name) for name in (f"gate-{n}-{MAIN}", f"gate-{n}")]
    while not (there := [gate for gate in gates if os.path.exists(gate)]):
        time.sleep(0.01)
    with open(there[0]) as file:
        return file.read()


def first_time(what: str) -> bool:
    """Whether no process has come here before."""
    try:
        os.close(os.open(os.path.join(os.path.dirname(RECORD or ""), what), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def kill_worker() -> None:
    """kill -9 of the worker's main process and of ourselves."""
    os.kill(MAIN, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def body(task: Any, key: str | None, n: int, ms: float, fail: int, countdown: float, gated: bool) -> None:
    note("S", key, n)
    if gated:
        wait_gate(n)
    if ms:
        time.sleep(ms / 1000)
    if task.request.retries < fail:
        last = task.max_retries is not None and task.request.retries >= task.max_retries
        note("D" if last else "F", key, n)
        try:
            raise task.retry(countdown=countdown, exc=ValueError(f"fails {fail} times"))
        except Reject as exc:
            if exc.requeue:
                note("Q", key, n)  # the retry could not be published
            raise
    note("E", key, n)


class Fragile(Request):
    """A message whose header says how it ends the worker's main process at its receipt, each time."""

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        how = message.headers.get("breaks")
        if how:
            write("X", None, 0, 0, self.id, False, how)
        if how == "error":
            raise RuntimeError("as if")
        if how == "system exit":
            raise SystemExit(3)
        if how == "vanish with all":
            for thread in os.listdir("/proc/self/task"):
                with open(f"/proc/self/task/{thread}/children") as children:
                    for pid in children.read().split():
                        os.kill(int(pid), signal.SIGKILL)
        if how:
            os._exit(3)


def make(
    broker: str, options: dict[str, Any] | None = None, *, plugin: bool = True, broadcast: str = "", **conf: Any
) -> Celery:
    """The app: ``options`` are the transport options, ``broadcast`` a queue of that kind, ``conf`` settings of Celery."""
    if plugin:
        with contextlib.suppress(ModuleNotFoundError):
            import streamtask.celery  # noqa: F401
    app = Celery("celerytest", broker=broker, set_as_current=False)
    app.conf.update({**STOCK, "broker_transport_options": options or {}, **conf})
    if broadcast:
        app.conf.task_queues = [Queue("celery"), Broadcast(broadcast)]
    # Otherwise Celery gives each of them to every later app of this process too.
    task = functools.partial(app.task, shared=False)
    keyed: dict[str, Any] = {"bind": True, "shard_key": "k"}

    @task(name="put", max_retries=3, **keyed)
    def put(
        self: Any, k: str, n: int, ms: float = 0, fail: int = 0, countdown: float = 0.1, gated: bool = False
    ) -> None:
        body(self, k, n, ms, fail, countdown, gated)

    @task(
        name="auto", autoretry_for=(ValueError,), retry_kwargs={"max_retries": 3, "countdown": 0.1},
        retry_jitter=False, **keyed,
    )  # fmt: skip
    def auto(self: Any, k: str, n: int, fail: int = 0) -> None:
        note("S", k, n)
        if self.request.retries < fail:
            note("D" if self.request.retries >= 3 else "F", k, n)
            raise ValueError(f"fails {fail} times")
        note("E", k, n)

    @task(name="gated", **keyed)
    def gated(self: Any, k: str, n: int) -> None:
        note("S", k, n)
        outcome = wait_gate(n)
        note("E" if outcome == "ok" else "D", k, n)
        if outcome == "reject":
            raise Reject("as the gate says", requeue=False)

    def poison(self: Any, k: str | None = None, n: int = 0) -> None:
        note("S", k, n)
        os.kill(os.getpid(), signal.SIGKILL)

    def hungry(self: Any, k: str | None = None, n: int = 0) -> None:
        note("S", k, n)
        raise MemoryError("as if")

    task(name="poison", **keyed)(poison)
    task(name="hungry", **keyed)(hungry)
    task(name="hungry_late", bind=True, acks_late=True)(hungry)
    task(name="poison_late", bind=True, acks_late=True, reject_on_worker_lost=True)(poison)

    @task(name="busy", **keyed)
    def busy(self: Any, k: str, n: int, ms: float) -> None:
        """Holds the interpreter's lock all the while, as a C extension may."""
        note("S", k, n)
        ctypes.PyDLL(None).usleep(int(ms * 1000))
        note("E", k, n)

    @task(name="requeued", **keyed)
    def requeued(self: Any, k: str, n: int, times: int = 1) -> None:
        note("S", k, n)
        for i in range(times):
            if first_time(f"requeued-{n}-{i}"):
                note("Q", k, n)
                raise Reject("once more", requeue=True)
        note("E", k, n)

    @task(name="deadly", max_retries=3, **keyed)
    def deadly(self: Any, k: str, n: int, when: str, countdown: float = 0.3) -> None:
        """Retries once; at its first run ever it kills the worker before the retry is published, or after."""
        note("S", k, n)
        if self.request.retries:
            note("E", k, n)
            return
        if when == "before" and first_time(f"killed-{n}"):
            note("K", k, n)
            kill_worker()
        note("F", k, n)
        if when == "between" and first_time(f"killed-{n}"):
            self.retry(countdown=countdown, throw=False)
            note("K", k, n)
            kill_worker()
        raise self.retry(countdown=countdown)

    def overrun(self: Any, k: str | None = None, n: int = 0) -> None:
        note("S", k, n)
        time.sleep(60)

    task(name="overrun", time_limit=1, **keyed)(overrun)
    task(name="overrun_again", time_limit=0.2, acks_on_failure_or_timeout=False, **keyed)(overrun)
    task(
        name="overrun_late", time_limit=0.2, acks_late=True, acks_on_failure_or_timeout=False, bind=True,
    )(overrun)  # fmt: skip

    @task(name="early", bind=True, max_retries=3)
    def early(self: Any, n: int, ms: float = 0, fail: int = 0, countdown: float = 0.1, gated: bool = False) -> None:
        body(self, None, n, ms, fail, countdown, gated)

    @task(name="late", bind=True, max_retries=3, acks_late=True, reject_on_worker_lost=True)
    def late(self: Any, n: int, ms: float = 0, fail: int = 0, countdown: float = 0.1, gated: bool = False) -> None:
        body(self, None, n, ms, fail, countdown, gated)

    def fragile(self: Any, k: str | None = None, n: int = 0) -> None:
        body(self, k, n, 0, 0, 0)

    task(name="fragile", Request=Fragile, **keyed)(fragile)
    task(name="fragile_plain", Request=Fragile, bind=True)(fragile)

    @task(name="free_gated", bind=True, acks_late=True, reject_on_worker_lost=True)
    def free_gated(self: Any, n: int) -> None:
        note("S", None, n)
        wait_gate(n)
        note("E", None, n)

    @task(name="due", bind=True)
    def due(self: Any, n: int) -> None:
        note("S", None, n, eta=self.request.eta, wall=time.time())
        note("E", None, n)

    @task(name="replaced", bind=True)
    def replaced(self: Any, n: int) -> None:
        note("R", None, n)
        raise self.replace(early.si(n=n))

    @task(name="replaced_keyed", **keyed)
    def replaced_keyed(self: Any, k: str, n: int) -> None:
        note("R", k, n)
        raise self.replace(put.si(k=k, n=n))

    def unacknowledged(self: Any, how: str, n: int, k: str | None = None) -> None:
        """Its result is stored, and then ``after_return`` sees to it that its message comes once more."""
        note("S", k, n)
        note("E", k, n)

    def come_again(state: str, result: Any, task_id: str, args: Any, kwargs: dict[str, Any], error: Any) -> None:
        if first_time(f"unacknowledged-{kwargs['n']}"):
            note("Q", kwargs.get("k"), kwargs["n"])
            if kwargs["how"] == "killed":
                kill_worker()
            raise Reject("once more", requeue=True)

    stored = {"bind": True, "acks_late": True, "ignore_result": False, "after_return": staticmethod(come_again)}
    task(name="unacknowledged", **stored)(unacknowledged)
    task(name="unacknowledged_keyed", shard_key="k", **stored)(unacknowledged)

    @task(name="number", ignore_result=False)
    def number(n: int, ms: float = 0) -> int:
        time.sleep(ms / 1000)
        return n

    @task(name="keyed_number", ignore_result=False, shard_key="k")
    def keyed_number(k: str, n: int) -> int:
        note("S", k, n)
        note("E", k, n)
        return n

    @task(name="total", ignore_result=False, bind=True)
    def total(self: Any, numbers: list[int], n: int) -> int:
        note("S", None, n, total=sum(numbers))
        note("E", None, n)
        return sum(numbers)

    @task(name="summed")
    def summed(count: int, n: int) -> None:
        """A chord sent from inside a worker."""
        chord([number.si(i, 50) for i in range(count)])(total.s(n=n))

    return app


def record_acks() -> None:
    """Writes down when the main process acknowledges (A) or rejects (J) a delivery."""
    acknowledge, reject = Request.acknowledge, Request.reject

    def note_ack(self: Any) -> None:
        if not self.acknowledged:
            acknowledge(self)
            write("A", None, 0, self.request_dict.get("retries") or 0, self.id, False, self.name)

    def note_reject(self: Any, requeue: bool = False) -> None:
        if not self.acknowledged:
            reject(self, requeue)
            write("J", None, 0, self.request_dict.get("retries") or 0, self.id, False, self.name)

    Request.acknowledge, Request.reject = note_ack, note_reject


@worker_ready.connect
def tell_ready(sender: Any, **_: Any) -> None:
    write("W", None, 0, 0, "", False, sender.hostname)


if RECORD:
    record_acks()
    app = make(
        os.environ["CELERY_TEST_BROKER"],
        json.loads(os.environ["CELERY_TEST_OPTIONS"]),
        **json.loads(os.environ["CELERY_TEST_CONF"]),
    )
    # Signatures that a body makes are bound to it.
    app.set_current()
