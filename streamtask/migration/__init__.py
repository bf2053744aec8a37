"""Moving messages between kombu's redis transport and ours, for ``streamtask migrate``.

It talks to both brokers through kombu, so that every broker URL that Celery takes will do; of kombu's redis transport it
knows the keys, which have been the same for many years:

- a list for each queue, and one more for each priority step above 0 (``celery``, ``celery\\x06\\x163``, ...), written at
  its left end and read at its right end;
- the hash ``unacked`` and the sorted set ``unacked_index``: what workers hold, as ``[message, exchange, routing key]``;
- a set ``_kombu.binding.EXCHANGE`` for each exchange, whose members name the bound queues.

How no message is lost, whatever dies when: a message is moved, in one step, from its list to a list of ours beside it
(*aside*), is stored in the new broker, and only then removed. What a run that died has left aside is what the next run
begins with, and only the first of that may be in the new broker already: it is sent with the id of its first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BrokerUnavailable, ConfigError, StreamTaskError
from ..redis.address import safe_url
from .lists import OldRedis
from .side import Outcome, Side, lost_errors


@contextmanager
def open_broker(url: str, options: dict[str, Any], tell: Callable[[str], None]) -> Iterator[Side]:
    """A broker that answers. ``tell``: see ``Side``.

    Raises ``ConfigError`` for a wrong URL, ``BrokerUnavailable`` where nobody answers."""
    from kombu.connection import Connection
    from kombu.exceptions import KombuError
    from kombu.transport import redis as kombu_redis

    if url.startswith("streamtask"):
        from .. import transport  # noqa: F401 - registers the scheme
    shown = safe_url(url)
    try:
        kind = Connection(url).get_transport_cls()
    except (KombuError, KeyError, ValueError, TypeError, ImportError) as exc:
        raise ConfigError(f"the broker URL {shown!r} can't be used: {exc}") from None
    streams = kind.__module__.startswith("streamtask.")
    if not streams and not issubclass(kind, kombu_redis.Transport):
        raise ConfigError(f"the broker URL {shown!r} is neither kombu's redis nor streamtask: there is nothing to move")
    # A broker that does not answer is said soon.
    settings = {"socket_timeout": 10, "socket_connect_timeout": 5, **options}
    if not streams:
        settings.pop("global_keyprefix", None)  # ours to add, see OldRedis
    connection = Connection(url, transport_options=settings)
    lost = lost_errors(connection)
    try:
        connection.connect()
        if streams:
            from .streams import Streams

            broker: Side = Streams(url, options, connection, tell)
        else:
            broker = OldRedis(url, options, connection, tell)
    except StreamTaskError:
        raise
    except lost as exc:
        raise BrokerUnavailable(f"{shown} can't be reached: {exc}") from None
    except (KombuError, ValueError, TypeError) as exc:
        raise ConfigError(f"the broker URL {shown!r} can't be used: {exc}") from None
    try:
        yield broker
    finally:
        broker.close()


__all__ = ["Outcome", "open_broker"]
