"""From a broker URL to clients and links.

A ``Broker`` knows where Redis is. ``Broker.client()`` gives redis-py's client, for what happens seldom. ``Broker.link()``
gives a ``Link``: one connection that sends prepared bytes, for the path of the messages.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio
from redis.sentinel import SentinelManagedSSLConnection as _SentinelTLS

from .. import fork
from ..errors import BrokerUnavailable, ConfigError, StreamTaskError, UnsupportedServer
from ..text import logger
from .address import Address
from .cluster import Cluster, node_of
from .link import ERRORS, SMALL, Link, open_link, translate

log = logger("streamtask.redis")

MIN_VERSION = (6, 2)
SENTINEL_OPTIONS = ("sentinel_kwargs", "min_other_sentinels")


class Broker:
    """Where Redis is, and how to connect to it.

    ``url``: see ``SCHEMES``; unknown query options are refused. ``timeout_s``: for connecting and for each reply.
    ``client_name``: shown by CLIENT LIST. ``options``: further options of redis-py's connections (TLS, credential provider,
    keepalive), and for Sentinel ``sentinel_kwargs`` and ``min_other_sentinels``. Raises ``ConfigError`` for a wrong URL.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 5.0,
        client_name: str = "streamtask",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.address = Address.parse(url)
        self.url = url
        self.scheme = self.address.scheme
        self.safe_url = self.address.shown
        self.options = dict(options or {})
        self.timeout_s = timeout_s
        self.client_name = client_name
        # Of what lies below, and held for no more than a look at it: to connect, or to write a log, may run other people's
        # code, which may send its first task. A signal handler may do that anywhere, so it may be taken again.
        self._lock = threading.RLock()
        self._client: Any = None
        self._embedded: Any = None
        self._eviction_checked = False
        self.cluster = Cluster(self.address) if self.scheme == "redis+cluster" else None
        self.is_cluster = self.cluster is not None
        fork.in_child(fork.Turn.LOCKS, self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()  # another thread of the parent may have held it

    def _options(self, decode: bool = False) -> dict[str, Any]:
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        return {
            "socket_timeout": self.timeout_s,
            "socket_connect_timeout": min(self.timeout_s, 5.0),
            "socket_keepalive": True,
            "client_name": self.client_name,
            "protocol": 2,
            "decode_responses": decode,
            # Who calls decides what may be repeated, and waits between tries (backoff.py).
            "retry": Retry(NoBackoff(), 0),
            **{name: value for name, value in self.options.items() if name not in SENTINEL_OPTIONS},
        }

    def client(self) -> Any:
        """redis-py's client, which answers bytes. One per broker; safe to share between threads."""
        client = self._client or self._first_client()
        if self.cluster is None:
            return client
        try:
            return self.cluster.up_to_date(client, self._reopen)
        except Exception as exc:
            raise self._went_astray(exc) from exc

    def _reopen(self, old: Any) -> Any:
        client = self._open()
        with self._lock:
            self._client = client
        old.close()
        return client

    def _first_client(self) -> Any:
        try:
            made = self._open()
        except ERRORS as exc:
            raise translate(exc, self.safe_url) from None
        except (ValueError, TypeError) as exc:
            raise ConfigError(f"the broker URL {self.safe_url!r} can't be used: {_of_url(exc)}") from None
        with self._lock:
            client = self._client = self._client or made
        if client is not made:
            made.close()  # another thread was quicker
        return client

    def _open(self) -> Any:
        options = self._options()
        if self.scheme == "memory":
            return _memory_client(self.url)
        if self.scheme == "embedded":
            from .embedded import Connection

            client = redis.Redis.from_url(self._embedded_url(), **self._for_scheme(options))
            client.connection_pool.connection_class = Connection
            return client
        if self.cluster is not None:
            options.pop("retry")
            return self.cluster.open(options)
        if self.scheme == "redis+sentinel":
            return self._open_sentinel(options)
        return _checked(redis.Redis.from_url(self.url, **self._for_scheme(options)))

    def _for_scheme(self, options: dict[str, Any]) -> dict[str, Any]:
        if self.scheme in ("unix", "embedded"):
            # A unix socket has no keepalive, and redis-py refuses the option there.
            options.pop("socket_keepalive")
        return options

    def _open_sentinel(self, options: dict[str, Any]) -> Any:
        from redis.sentinel import Sentinel

        address = self.address
        sentinel_options = {"socket_timeout": min(self.timeout_s, 2.0), **self.options.get("sentinel_kwargs", {})}
        if "sentinel_password" in address.query:
            sentinel_options["password"] = address.query["sentinel_password"]
        sentinel = Sentinel(
            [(host, port or 26379) for host, port in address.nodes],
            min_other_sentinels=self.options.get("min_other_sentinels", 0),
            sentinel_kwargs=sentinel_options,
        )
        if "credential_provider" not in options:
            options |= {"username": address.username, "password": address.password}
        if any(name.startswith("ssl_") for name in options):
            options["connection_class"] = _SentinelTLS
            options.pop("ssl", None)
        return sentinel.master_for(address.service, **options, db=address.database)

    def _embedded_url(self) -> str:
        if self._embedded is None:
            from .embedded import join

            joined = join(self.address.folder or None)
            with self._lock:
                self._embedded, other = self._embedded or joined, self._embedded
            if other is not None:
                joined.leave()
        url: str = self._embedded.url
        return url

    def node(self, key: str) -> str:
        """Which server holds a key: '' but on a Cluster."""
        return self._node(key)[0] if self.is_cluster else ""

    def _node(self, key: str) -> tuple[str, Any]:
        """A key's node on a Cluster: its name, and redis-py's client of it."""
        client = self.client()
        try:
            return node_of(client, key)
        except Exception as exc:
            raise self._went_astray(exc) from exc

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """Around calls of ``client()``: turns redis-py's errors into ours."""
        try:
            yield
        except ERRORS as exc:
            raise self._went_astray(exc) from None

    def _went_astray(self, exc: Exception) -> StreamTaskError:
        """An error of redis-py as one of ours; a Cluster is asked anew where its slots are."""
        if self.cluster is not None:
            self.cluster.forget()
        if isinstance(exc, ERRORS):
            return translate(exc, self.safe_url)
        # redis-py 5 raises others, too, while another thread learns of the slots or loses a node.
        return BrokerUnavailable(f"the nodes of the Redis Cluster at {self.safe_url} are not known: {exc!r}")

    def link(
        self, key: str = "", *, timeout_s: float | None = None, buffer_bytes: int = SMALL, anonymous: bool = False
    ) -> Link:
        """A new, unconnected link to the server that holds ``key``. ``timeout_s`` bounds the wait for a reply,
        ``buffer_bytes`` is how much one read takes. ``anonymous``: it does not say who we are."""
        client = self._node(key)[1] if self.is_cluster else self.client()
        with self.wrapped():
            return open_link(
                client,
                self.safe_url,
                timeout_s=timeout_s,
                buffer_bytes=buffer_bytes,
                memory=self.scheme == "memory",
                astray=self.cluster.forget if self.cluster else None,
                anonymous=anonymous,
            )

    @property
    def has_async_client(self) -> bool:
        return self.scheme in ("redis", "rediss", "unix", "embedded")

    def async_client(self) -> Any:
        """redis-py's asyncio client, where there is one; make one per event loop."""
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        options = self._options()
        options["retry"] = Retry(NoBackoff(), 0)
        url = self._embedded_url() if self.scheme == "embedded" else self.url
        client = redis.asyncio.Redis.from_url(url, **self._for_scheme(options))
        if self.scheme == "embedded":
            from .embedded import AsyncConnection

            client.connection_pool.connection_class = AsyncConnection
        return client

    def check_version(self) -> tuple[int, ...]:
        """The server's version. Raises ``UnsupportedServer`` below 6.2 and ``BrokerUnavailable``."""
        if self.scheme == "memory":
            return (7, 0)  # fakeredis has no INFO; it is made with that version below
        with self.wrapped():
            info = self.client().info("server")
            if self.is_cluster and "redis_version" not in info:
                info = next(iter(info.values()))
        text = str(info.get("redis_version", "0"))
        version = tuple(int(part) for part in re.findall(r"\d+", text)[:3])
        if version < MIN_VERSION:
            raise UnsupportedServer(
                f"Redis at {self.safe_url} is version {text}: streamtask needs 6.2 or later (or Valkey). Upgrade the server"
            )
        return version

    def warn_of_eviction(self) -> None:
        """Says loudly, once per broker, if the server may evict keys: messages among them."""
        if self._eviction_checked or self.scheme == "memory":
            return
        self._eviction_checked = True
        with self.wrapped():
            info = self.client().info("memory")
            if self.is_cluster and "maxmemory" not in info:
                info = next(iter(info.values()))
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and int(info.get("maxmemory", 0)) > 0:
            log.critical(
                "data loss ahead: Redis evicts keys when its memory is full (maxmemory-policy %s), and messages lie in keys; "
                "set maxmemory-policy noeviction broker=%s",
                policy,
                self.safe_url,
            )

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None
            if self._embedded is not None:
                self._embedded.leave()
                self._embedded = None


def _of_url(exc: Exception) -> str:
    """What is wrong with a URL's query, in words of who wrote it."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(exc))
    if unknown is None:
        return str(exc)
    hint = ": for TLS it begins with rediss://" if unknown[1] == "ssl" else ""
    return f"its option {unknown[1]} is none that a connection has{hint}"


def _checked(client: Any) -> Any:
    """The client, if its URL's options are ones that a connection takes: redis-py looks at them at the first use."""
    client.connection_pool.make_connection()
    return client


def _memory_client(url: str) -> Any:
    try:
        import fakeredis
        import lupa  # noqa: F401 - without it fakeredis has no scripts
    except ImportError:
        raise ConfigError("memory:// needs fakeredis with Lua: pip install 'streamtask[testing]'") from None
    return fakeredis.FakeRedis(server=_memory_server(url), protocol=2)


_memory_servers: dict[str, Any] = {}


def _memory_server(url: str) -> Any:
    import fakeredis

    return _memory_servers.get(url) or _memory_servers.setdefault(url, fakeredis.FakeServer(version=(7, 0)))
