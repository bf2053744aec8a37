"""What a worker needs from the layers above it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from types import AsyncGeneratorType, GeneratorType
from typing import Any, Protocol

from ..queue.backlog import Batch
from ..queue.consumer import ShardConsumer
from ..queue.delivery import Delivery, Outcome
from ..queue.queues import Queue
from ..queue.rules import ConsumerSettings
from ..redis.connection import Broker
from ..redis.links import Prepared


@dataclass(frozen=True, slots=True)
class Place:
    """Where a delivery came from: for ``self.request``. ``deadline`` tells the supervisor when to end the process."""

    queue: str
    shard: int | str
    token: int
    set_deadline: Callable[[float], None]
    in_main_thread: bool


def no_limit(deadline: float) -> None:
    """A place's ``set_deadline`` where no limit is."""


Ended = tuple[Outcome | None, Prepared | None]
"""What becomes of a message, None after success, and the packed command that stores its result, if there is one."""


def goes_on(value: Any) -> bool:
    """Whether what a function has returned is work that has yet to be done: something to await, or a generator."""
    return hasattr(type(value), "__await__") or isinstance(value, GeneratorType | AsyncGeneratorType)


class TaskRunner(Protocol):
    """Runs bodies, and lets nothing out that they raise."""

    plain: dict[str, Callable[..., Any]]
    """Tasks that need neither context, limits, middleware nor results: an executor may call them directly."""

    plain_async: dict[str, Callable[..., Coroutine[Any, Any, Any]]]
    """Coroutine functions of such tasks: to be called by ``begin``."""

    has_async: bool
    """Whether any task is a coroutine function."""

    def is_async(self, task: str) -> bool: ...

    def run(self, delivery: Delivery, place: Place) -> Ended | Coroutine[Any, Any, Ended]:
        """Answers a coroutine, to be run in an event loop, where the body's function has returned what ``goes_on``."""

    async def arun(self, delivery: Delivery, place: Place) -> Ended: ...

    def begin(
        self,
        body: Callable[..., Coroutine[Any, Any, Any]],
        args: list[Any],
        kwargs: dict[str, Any],
        batch: Batch,
        place: Place,
        position: int,
    ) -> tuple[Coroutine[Any, Any, Any], Any]:
        """Begins a plain coroutine function, for the message at a batch's ``position``: answers its coroutine, and what that
        waits for. Raises what the body raises, and ``StopIteration`` where it has ended."""

    async def rest(self, delivery: Delivery, place: Place, answer: Any) -> Ended:
        """Of a plain body that has returned what ``goes_on``."""

    def failed(self, delivery: Delivery, place: Place, exc: BaseException) -> Outcome:
        """What becomes of a message whose plain body raised."""

    def cancelled(self, delivery: Delivery, place: Place) -> Ended:
        """What becomes of a message whose coroutine was cancelled before it began."""

    here: Any
    """Executors say here what runs in their thread: the request that a body may ask for. See ``request.here``."""

    def revoked(self, delivery: Delivery, place: Place) -> Prepared | None:
        """The packed command that stores a revoked message's result, if it has one."""

    def dead(self, delivery: Delivery, place: Place, outcome: Outcome) -> Prepared | None:
        """Told of each dead letter once it is stored; answers a result to store."""

    def process_started(self) -> None:
        """Called in each worker process before its first message."""


def results_of(consumer: ShardConsumer, runner: TaskRunner) -> Iterator[tuple[Delivery, Prepared]]:
    """The packed commands that store the results of what has ended and did not run: the revoked, and the dead letters. Each is
    shown once."""
    backlog, settler = consumer.backlog, consumer.settler
    if not (backlog.left_out or settler.died):
        return
    place = Place(backlog.queue, backlog.shard, backlog.lease.token, lambda deadline: None, False)
    while backlog.left_out:
        delivery = backlog.left_out.pop(0)
        if (result := runner.revoked(delivery, place)) is not None:
            yield delivery, result
    while settler.died:
        delivery, outcome = settler.died.pop(0)
        if (result := runner.dead(delivery, place, outcome)) is not None:
            yield delivery, result


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """``ack_interval_s``: how long a finished message may wait for others to be acknowledged with it. ``audit_s``: how often
    Redis is asked for pending entries that the process does not hold."""

    app: str
    broker: Broker
    queues: list[Queue]
    consumer: ConsumerSettings
    lease_ms: int = 5000
    handover_timeout_s: float = 10.0
    ack_interval_s: float = 0.005
    audit_s: float = 60.0
    concurrency: int = 1
    result_broker: Broker | None = None
    has_time_limits: bool = False
    version: str = ""
