"""The transport: one for each kombu connection."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

from kombu.transport import virtual

from ..errors import BrokerUnavailable, LeaseLost, QueueFull, ReplyError
from ..redis.address import safe_url
from . import hooks
from .channel import LET_GO_S, Channel
from .options import broker_of, options_of, url_of
from .poller import Poller
from .session import Session
from .sessions import session_of


class Transport(virtual.Transport):  # type: ignore[misc]
    """The transport by its own name, ``broker_transport="streamtask.transport:Transport"``, with a ``redis://`` URL."""

    Channel = Channel
    can_parse_url = True  # so that the URL comes whole: kombu would take its scheme away
    default_port = 6379
    driver_type = "redis"
    driver_name = "streamtask"
    polling_interval = None

    # Also replies that are not known to pass: Celery ends at a channel's error, and tries again after a connection's.
    connection_errors = (
        *virtual.Transport.connection_errors,
        BrokerUnavailable,
        LeaseLost,
        QueueFull,
        ReplyError,
        OSError,
    )
    channel_errors = virtual.Transport.channel_errors
    recoverable_connection_errors = connection_errors
    recoverable_channel_errors = channel_errors

    implements = virtual.Transport.implements.extend(
        asynchronous=True, batch_publish=True, exchange_type=frozenset(["direct", "topic", "fanout"]), heartbeats=False
    )

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        hooks.load_plugins()
        _keep_failover(client)
        self.session: Session = session_of(broker_of(client), options_of(client))
        self.poller = Poller(self.session, self.session.broker, self.session.options.queue_order)
        self.session.wakers.add(self.poller)
        if "://" in (client.hostname or ""):
            # kombu has not parsed it, and could not: so that it asks ``as_uri`` below.
            self.can_parse_url = True

    def driver_version(self) -> str:
        return metadata.version("redis")

    @property
    def default_connection_params(self) -> dict[str, Any]:
        return {"hostname": "localhost", "port": self.default_port, "virtual_host": "0"}

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        url, _ = url_of(self.client)
        scheme, _, rest = url.partition("://")
        names = {"redis": "streamtask", "rediss": "streamtasks"}
        url = f"{names.get(scheme, 'streamtask+' + scheme)}://{rest}"
        return url if include_password else safe_url(url).replace("***@", f"{mask}@")

    def establish_connection(self) -> Transport:
        self.session.look()
        return self

    def close_connection(self, connection: Any) -> None:
        super().close_connection(connection)
        self.poller.close()
        self.session.let_go(LET_GO_S)
        self.session.close_if_idle()

    def set_callback(self, queue: str, receive: Callable[[Any], Any] | None) -> None:
        """What kombu's own way to deliver calls for a queue; None: nobody consumes it."""
        if receive is None:
            self._callbacks.pop(queue, None)
        else:
            self._callbacks[queue] = receive

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        self.poller.drain(timeout)

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self.poller.register(loop)

    def verify_connection(self, connection: Any) -> bool:
        return not self.poller.closed


class SchemeTransport(Transport):
    """``streamtask://`` for kombu and Celery: see ``docs/celery.md``. The scheme says what it is, and kombu parses the rest."""

    can_parse_url = False


def _keep_failover(client: Any) -> None:
    """kombu takes the transport of the next URL in a failover list from its scheme: with ``redis://`` that would be its own."""
    schemes = {"redis://": "streamtask://", "rediss://": "streamtasks://"}
    if not client.alt:
        return
    alt = list(client.alt)
    for i, url in enumerate(alt):
        for scheme, ours in schemes.items():
            if isinstance(url, str) and url.startswith(scheme):
                alt[i] = ours + url[len(scheme) :]
    if alt != list(client.alt):
        client.alt[:] = alt
        if client.alt:
            client.cycle = client.failover_strategy(client.alt)
            next(client.cycle)
