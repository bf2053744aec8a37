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
from urllib.parse import parse_qsl, unquote, urlsplit

import redis
import redis.asyncio
from redis.sentinel import SentinelManagedSSLConnection as _SentinelTLS

from .. import fork
from ..clock import mono_s
from ..errors import BrokerUnavailable, ConfigError, StreamTaskError, UnsupportedServer
from ..text import logger
from .link import ERRORS, SMALL, Link, open_link, translate

log = logger("streamtask.redis")

MIN_VERSION = (6, 2)
SENTINEL_OPTIONS = ("sentinel_kwargs", "min_other_sentinels")
_cluster_nodes: dict[str, list[tuple[str, int]]] = {}
"""The nodes of Clusters by URL, as this process saw them last: they answer when those that the URL names do not."""

SLOTS_S = 0.1
"""A Cluster is asked where its slots are at most so often, in seconds."""

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster", "embedded", "memory")


SHOWN_OPTIONS = frozenset({
    "client_name", "db", "health_check_interval", "max_connections", "protocol", "retry_on_timeout", "socket_connect_timeout",
    "socket_keepalive", "socket_timeout", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile",
    "virtual_host",
})  # fmt: skip
"""What may stand in a URL's query and is no secret. All else is hidden: a password has many names."""


SET_HERE = {"protocol": "2", "decode_responses": "false", "encoding": "utf-8", "encoding_errors": "strict"}
"""Options of redis-py's connections that ours depend on."""


def safe_url(url: str) -> str:
    """The URL without its password and without secrets in its query, for logs and errors: the one place that hides them.

    A password that should have been percent-encoded ends the host's part for a URL parser, so all before the last ``@``
    counts as user and password.
    """
    head, separator, rest = url.partition("://")
    if not separator:
        return "(unreadable URL)" if re.search("[@?#]", url) else url
    userinfo, at, rest = ("", "", rest) if rest.startswith("/") else rest.rpartition("@")
    user = re.split(r"[:/?#@]", userinfo, maxsplit=1)[0] + ":" if ":" in userinfo else ""
    place, mark, query = rest.partition("?")
    place, hash_, _ = place.partition("#")
    shown = "&".join(map(_safe_option, query.split("&")))
    place += f"{hash_}***" if hash_ else ""
    return f"{head}://{user if user != ':' else ''}***@{place}{mark}{shown}" if at else f"{head}://{place}{mark}{shown}"


def _safe_option(pair: str) -> str:
    name, equals, value = pair.partition("=")
    if name in SHOWN_OPTIONS and re.fullmatch(r"[\w.:/%,+-]*", value):
        return pair
    return f"{name}=***" if equals else "***" * bool(name)


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
        self.url = url
        self.options = dict(options or {})
        self.safe_url = safe_url(url)
        self.timeout_s = timeout_s
        self.client_name = client_name
        # Of what lies below, and held for no more than a look at it: to connect, or to write a log, may run other people's
        # code, which may send its first task. A signal handler may do that anywhere, so it may be taken again.
        self._lock = threading.RLock()
        self._client: Any = None
        self._embedded: Any = None
        self._eviction_checked = False
        self._slots_stale = False
        self._slots_asked_at = float("-inf")
        self._asking = threading.Lock()
        scheme = url.partition("://")[0] if "://" in url else ""
        if scheme not in SCHEMES:
            raise ConfigError(
                f"the broker URL {self.safe_url!r} has an unknown scheme: it must begin with one of "
                + ", ".join(f"{name}://" for name in SCHEMES)
            )
        self.scheme = scheme
        self._check()
        fork.in_child(fork.Turn.LOCKS, self._after_fork)

    def _check(self) -> None:
        if self.scheme == "memory":
            return
        try:
            parts = urlsplit(self.url)
            places = parts.netloc.rpartition("@")[2].split(",")
            _ = [urlsplit(f"//{place}").port for place in places]
        except ValueError:
            # The parser's own words may repeat a piece of a password that was not percent-encoded.
            raise ConfigError(
                f"the broker URL {self.safe_url!r} can't be read: is its port a number up to 65535, and are special "
                "characters in its password percent-encoded (/ as %2F, # as %23, ? as %3F, @ as %40)?"
            ) from None
        if (
            parts.netloc
            and "@" not in parts.netloc
            and "@" in parts.path + parts.query.partition("=")[0] + parts.fragment
        ):
            raise ConfigError(
                f"the broker URL {self.safe_url!r} has an @ after its host: special characters in a password must be "
                "percent-encoded (/ as %2F, # as %23, ? as %3F, @ as %40)"
            )
        if self.scheme in ("redis", "rediss", "redis+cluster") and not parts.hostname:
            raise ConfigError(f"the broker URL {self.safe_url!r} names no host, as in redis://localhost:6379/0")
        for option, value in parse_qsl(parts.query):
            if value.lower() != SET_HERE.get(option, value).lower():
                raise ConfigError(
                    f"the broker URL {self.safe_url!r} sets {option}, and streamtask needs {SET_HERE[option]!r} there: "
                    "leave it out"
                )
        if self.scheme in ("redis", "rediss"):
            path = parts.path.strip("/")
            if path and not path.isdigit():
                raise ConfigError(f"the database in the broker URL {self.safe_url!r} must be a number, as in .../0")
        if self.scheme == "unix" and not (parts.path or parts.netloc):
            raise ConfigError("the broker URL names no socket, as in unix:///run/redis/redis.sock?db=0")
        if self.scheme == "redis+sentinel" and not self._sentinel_service():
            raise ConfigError(
                f"the broker URL {self.safe_url!r} names no service, as in redis+sentinel://host1,host2:26379/mymaster/0"
            )

    def _sentinel_service(self) -> str:
        return urlsplit(self.url).path.strip("/").partition("/")[0]

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
        return self._ask_for_slots(client) if self._slots_stale and self.is_cluster else client

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
        if self.scheme == "redis+cluster":
            options.pop("retry")
            return self._open_cluster(options)
        if self.scheme == "redis+sentinel":
            return self._open_sentinel(options)
        return _checked(redis.Redis.from_url(self.url, **self._for_scheme(options)))

    def _open_cluster(self, options: dict[str, Any]) -> Any:
        from redis.cluster import ClusterNode, RedisCluster

        parts = urlsplit(self.url)
        userinfo, at, hosts = parts.netloc.rpartition("@")
        first, *others = hosts.split(",")
        nodes = [(place.hostname or "localhost", place.port or 6379) for place in (urlsplit(f"//{o}") for o in others)]
        client = RedisCluster.from_url(
            parts._replace(scheme="redis", netloc=f"{userinfo}{at}{first}").geturl(),
            startup_nodes=[ClusterNode(host, port) for host, port in dict.fromkeys([*nodes, *self.cluster_nodes])],
            **options,
        )
        self._remember_nodes(client)
        return client

    @property
    def cluster_nodes(self) -> list[tuple[str, int]]:
        """Host and port of each node of the Cluster, as this process saw them last."""
        return _cluster_nodes.get(self.url, [])

    @cluster_nodes.setter
    def cluster_nodes(self, nodes: list[tuple[str, int]]) -> None:
        _cluster_nodes[self.url] = nodes

    def _remember_nodes(self, client: Any) -> None:
        self.cluster_nodes = [(node.host, node.port) for node in client.get_nodes()]

    def _for_scheme(self, options: dict[str, Any]) -> dict[str, Any]:
        if self.scheme in ("unix", "embedded"):
            # A unix socket has no keepalive, and redis-py refuses the option there.
            options.pop("socket_keepalive")
        return options

    def _open_sentinel(self, options: dict[str, Any]) -> Any:
        from redis.sentinel import Sentinel

        parts = urlsplit(self.url)
        userinfo, _, hosts = parts.netloc.rpartition("@")
        user, _, password = userinfo.partition(":")
        nodes = []
        for host in hosts.split(","):
            name, _, port = host.partition(":")
            nodes.append((name, int(port or 26379)))
        query = dict(parse_qsl(parts.query))
        sentinel_options = {"socket_timeout": min(self.timeout_s, 2.0), **self.options.get("sentinel_kwargs", {})}
        if "sentinel_password" in query:
            sentinel_options["password"] = query["sentinel_password"]
        service, _, db = parts.path.strip("/").partition("/")
        sentinel = Sentinel(
            nodes,
            min_other_sentinels=self.options.get("min_other_sentinels", 0),
            sentinel_kwargs=sentinel_options,
        )
        if "credential_provider" not in options:
            options |= {"username": unquote(user) or None, "password": unquote(password) or None}
        if any(name.startswith("ssl_") for name in options):
            options["connection_class"] = _SentinelTLS
            options.pop("ssl", None)
        return sentinel.master_for(service, **options, db=int(db or 0))

    def _embedded_url(self) -> str:
        if self._embedded is None:
            from .embedded import join

            joined = join(self.url.removeprefix("embedded://").partition("?")[0] or None)
            with self._lock:
                self._embedded, other = self._embedded or joined, self._embedded
            if other is not None:
                joined.leave()
        url: str = self._embedded.url
        return url

    @property
    def is_cluster(self) -> bool:
        return self.scheme == "redis+cluster"

    def node(self, key: str) -> str:
        """Which server holds a key: '' but on a Cluster."""
        if not self.is_cluster:
            return ""
        return self._node(key)[0]

    def _node(self, key: str) -> tuple[str, Any]:
        """A key's node on a Cluster: its name, and redis-py's client of it."""
        client = self.client()
        try:
            node = client.get_node_from_key(key)
            return node.name, client.get_redis_connection(node)
        except Exception as exc:
            raise self._went_astray(exc) from exc

    def forget_slots(self) -> None:
        """A Cluster is asked anew, at the next use, where its slots are. Links do this when they fail."""
        self._slots_stale = True

    def _ask_for_slots(self, client: Any) -> Any:
        """One thread asks, which may take long; the others go on with what is known."""
        if mono_s() - self._slots_asked_at < SLOTS_S or not self._asking.acquire(blocking=False):
            return client
        try:
            self._slots_stale = False
            try:
                client.nodes_manager.initialize()
                self._remember_nodes(client)
            except Exception:
                # None of the nodes that were known is there: the URL's name may stand for others by now.
                old, client = client, self._open()
                with self._lock:
                    self._client = client
                old.close()
            return client
        except Exception as exc:
            raise self._went_astray(exc) from exc
        finally:
            self._slots_asked_at = mono_s()
            self._asking.release()

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """Around calls of ``client()``: turns redis-py's errors into ours."""
        try:
            yield
        except ERRORS as exc:
            raise self._went_astray(exc) from None

    def _went_astray(self, exc: Exception) -> StreamTaskError:
        """An error of redis-py as one of ours; a Cluster is asked anew where its slots are."""
        self.forget_slots()
        if isinstance(exc, ERRORS):
            return translate(exc, self.safe_url)
        # redis-py 5 raises others, too, while another thread learns of the slots or loses a node.
        return BrokerUnavailable(f"the nodes of the Redis Cluster at {self.safe_url} are not known: {exc!r}")

    def _after_fork(self) -> None:
        """In the child: another thread of the parent may have held the locks."""
        self._lock = threading.RLock()
        self._asking = threading.Lock()

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
                astray=self.forget_slots if self.is_cluster else None,
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
