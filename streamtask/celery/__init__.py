"""The Celery plugin: tasks with ``shard_key`` run in order per key on stock Celery workers, over our kombu transport.

Importing this module installs it; the transport does so by itself in a process that has Celery::

    @celery_app.task(shard_key="user_id")  # a parameter, a path such as "order.user.id", or a callable
    def pay(user_id, amount): ...

    pay.apply_async(args, shard_key=7)     # the value itself; also in signatures: pay.s(...).set(shard_key=7)

What it does, and where:

- publish (``Celery.send_task``, which each call of a task goes through): the canonical key goes into the header
  ``shard_key``. A signal's handler could not refuse a call: Celery logs what it raises and publishes all the same.
  What was published before this module was imported is stamped when it reaches the transport (``stamp_missed``).
- retry: a publish that repeats the running message with one retry more carries that message's delivery, so that the
  transport puts it in the place of the old one. Where it can't be published, the running message goes back (``Task.retry``).
- worker (``Task.start_strategy``): a message that came out of a shard is acknowledged after its body, and goes back when
  its pool process dies, whatever the configuration says: its lane opens with the acknowledgement. This depends on the
  message, not on the task, because any task may be called with ``shard_key=``; with another broker nothing changes.
- worker (``Request.on_failure``, ``on_timeout``): such a message, and one of a task with ``reject_on_worker_lost``, that has
  taken its pool process down more than ``max_crashes`` times fails for good, and goes to the dead letters; so does one that
  overruns its time limit as often, where that does not acknowledge it. Where the body runs in the worker itself, the transport
  writes down that one starts again, and whoever takes the message next counts.
- worker (``Consumer.create_task_handler``): what breaks the worker at receipt, before any body, goes to the dead letters at
  once where it is no message of Celery's, and else after ``max_crashes`` deaths; what can't be decoded goes there, too
  (``Consumer.on_decode_error``), and junk among events ends no worker (``Gossip.on_message``).
- worker (``run_if_ours``): no body starts whose message another worker has been given meanwhile.

Celery itself sees to it that pool processes die with their worker (PR_SET_PDEATHSIG), so none runs beside a redelivery.
"""

from __future__ import annotations

from celery import signals
from celery.app.base import Celery
from celery.app.task import Task
from celery.worker.consumer import Consumer
from celery.worker.consumer.gossip import Gossip
from celery.worker.request import Request

from ..transport import hooks
from .brokers import on_worker_setup
from .pools import hear_pools
from .publish import stamp_missed, with_key, with_retry_kept
from .receipt import with_guard, with_junk_left_out, with_refusal
from .worker import (
    active,
    keep_active,
    not_begun,
    on_shutting_down,
    with_crash_count,
    with_hearing,
    with_keyed_strategy,
    with_overruns_counted,
)


def _install() -> None:
    Celery.send_task = with_key(Celery.send_task)
    Task.retry = with_retry_kept(Task.retry)
    Task.start_strategy = with_keyed_strategy(Task.start_strategy)
    Request.on_failure = with_crash_count(Request.on_failure)
    Request.on_timeout = with_overruns_counted(Request.on_timeout)
    Consumer.on_close = with_hearing(Consumer.on_close)
    Consumer.create_task_handler = with_guard(Consumer.create_task_handler)
    Consumer.on_decode_error = with_refusal(Consumer.on_decode_error)
    Gossip.on_message = with_junk_left_out(Gossip.on_message)
    hooks.before_publish.append(stamp_missed)
    hooks.keep_on_close.append(keep_active)
    hooks.worked_on.append(active)
    hooks.not_begun.append(not_begun)
    hooks.before_failure.append(hear_pools)
    signals.celeryd_after_setup.connect(on_worker_setup, weak=False, dispatch_uid=__name__)
    signals.worker_shutting_down.connect(on_shutting_down, weak=False, dispatch_uid=__name__)


_install()
