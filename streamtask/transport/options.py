"""From what kombu knows of a connection - URL or its parts, ``ssl``, ``transport_options`` - to a broker and our settings.

URLs: ``streamtask://[user:password@]host[:port][/db]``; ``streamtasks://`` with TLS; ``streamtask+sentinel://host,host/name/db``,
``streamtask+cluster://``, ``streamtask+unix:///path`` and whatever else ``Broker`` takes after ``streamtask+``. With
``broker_transport="streamtask.transport:Transport"`` the same without ``streamtask``, as ``redis://``.
"""

from __future__ import annotations

import datetime as dt
import functools
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from kombu.utils.url import url_to_parts

from ..errors import ConfigError
from ..queue.calls import ProducerSettings
from ..redis.connection import Broker
from ..text import logger

log = logger("streamtask.transport")

SCHEMES = {
    "streamtask": "redis",
    "streamtasks": "rediss",
    "sentinel": "redis+sentinel",
    "cluster": "redis+cluster",
    "socket": "unix",
    "redis+socket": "unix",
}
"""Schemes by the name that ``Broker`` has for them, where it is another."""

WITHOUT_MEANING = frozenset({
    "ack_emulation", "visibility_timeout", "unacked_key", "unacked_index_key", "unacked_mutex_key", "unacked_mutex_expire",
    "unacked_restore_limit", "unacked_restore_interval", "unacked_restore_throttle", "max_connections",
    "retry_on_timeout", "health_check_interval", "reauth_check_interval", "sep", "sentinel_fanout_compat",
    "polling_interval", "fanout_prefix",
})  # fmt: skip
"""Options of kombu's redis transport that this one has no use for."""

OURS = frozenset({
    "namespace", "shards", "lease", "handover_timeout", "eta_hold", "produce_ttl", "max_backlog", "max_crashes",
    "send_timeout",
    "priority_steps", "queue_order_strategy", "fanout_patterns", "global_keyprefix", "body_encoding",
    "deadletter_queue", "socket_timeout", "socket_connect_timeout", "socket_keepalive", "socket_keepalive_options",
    "client_name", "master_name", "min_other_sentinels", "sentinel_kwargs", "credential_provider", "virtual_host",
})  # fmt: skip

KOMBUS = frozenset({
    "max_retries", "interval_start", "interval_step", "interval_max", "connect_retries_timeout", "errback", "callback",
    "confirm_publish", "confirm_timeout", "queue_prefix", "predefined_queues", "asynchronous", "is_secure",
})  # fmt: skip
"""Options that kombu or Celery read themselves, or that belong to other transports."""

_said: set[str] = set()


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of a session. Times are in the units of their names."""

    namespace: str = "streamtask"
    app: str = "kombu"
    shards: int = 8
    lease_ms: int = 5000
    handover_timeout_s: float = 10.0
    eta_hold_s: float = 60.0
    produce_ttl_ms: int = 120_000
    max_backlog: int = 0
    max_crashes: int = 3
    send_timeout_s: float = 1.0
    priority_steps: tuple[int, ...] = (0, 3, 6, 9)
    queue_order: str = "round_robin"
    fanout_patterns: bool = True
    db: int = 0

    def producer_settings(self) -> ProducerSettings:
        # How long to go on trying is for kombu's retry policy to say; what is repeated here mends a stale connection.
        return ProducerSettings(
            max_backlog=self.max_backlog, produce_ttl_ms=self.produce_ttl_ms, timeout_s=self.send_timeout_s
        )


def options_of(client: Any) -> Options:
    """The settings of a kombu connection. Raises ``ConfigError``; says once which options have no meaning here."""
    given: Mapping[str, Any] = client.transport_options or {}
    useless = sorted(set(given) & WITHOUT_MEANING - _said)
    if useless:
        _said.update(useless)
        log.info("transport options without meaning for streamtask, ignored: %s", ", ".join(useless))
    unknown = sorted(set(given) - WITHOUT_MEANING - OURS - KOMBUS - _said)
    if unknown:
        _said.update(unknown)
        log.warning("unknown transport options, ignored: %s", ", ".join(unknown))
    order = given.get("queue_order_strategy", "round_robin")
    if order not in ("round_robin", "sorted", "priority"):
        raise ConfigError(f"queue_order_strategy must be round_robin, sorted or priority, not {order!r}")
    if given.get("body_encoding") not in (None, "base64"):
        raise ConfigError(f"body_encoding must be None or base64, not {given['body_encoding']!r}")
    return Options(
        namespace=_text(given, "global_keyprefix", "", empty=True) + _text(given, "namespace", "streamtask"),
        shards=_number(given, "shards", 8, least=1, most=1024),
        lease_ms=int(_number(given, "lease", 5.0, least=0.2) * 1000),
        handover_timeout_s=_number(given, "handover_timeout", 10.0, least=0.0),
        eta_hold_s=_number(given, "eta_hold", 60.0, least=0.0),
        produce_ttl_ms=int(_number(given, "produce_ttl", 120.0, least=1.0) * 1000),
        max_backlog=_number(given, "max_backlog", 0, least=0),
        max_crashes=_number(given, "max_crashes", 3, least=0),
        send_timeout_s=_number(given, "send_timeout", 1.0, least=0.0),
        priority_steps=_steps(given.get("priority_steps", (0, 3, 6, 9))),
        queue_order=order,
        fanout_patterns=bool(given.get("fanout_patterns", True)),
        db=_db(client),
    )


def _number(given: Mapping[str, Any], name: str, default: Any, *, least: float, most: float = 1e9) -> Any:
    value = given.get(name, default)
    if isinstance(value, dt.timedelta) and isinstance(default, float):
        value = value.total_seconds()
    try:
        number = type(default)(value)
        wrong = isinstance(value, bool) or (isinstance(value, float) and isinstance(default, int))
        if wrong or not least <= number <= most:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise ConfigError(
            f"the transport option {name} must be {kind} from {least:g} to {most:g}, not {value!r}"
        ) from None
    return number


def _text(given: Mapping[str, Any], name: str, default: str, *, empty: bool = False) -> str:
    value = given.get(name, default)
    if not isinstance(value, str) or not (value or empty):
        raise ConfigError(f"the transport option {name} must be a text, not {value!r}")
    return value


def _steps(given: Any) -> tuple[int, ...]:
    try:
        steps = tuple(sorted({int(step) for step in given}))
    except (TypeError, ValueError):
        steps = ()
    if not steps or steps[0] != 0:
        raise ConfigError(f"priority_steps must be numbers of which 0 is the least, as in [0, 3, 6, 9], not {given!r}")
    return steps


def broker_of(client: Any) -> Broker:
    """The broker of a kombu connection. Raises ``ConfigError``."""
    given: Mapping[str, Any] = client.transport_options or {}
    options: dict[str, Any] = {}
    for name in ("socket_keepalive", "socket_keepalive_options"):
        if given.get(name) is not None:
            options[name] = given[name]
    # The timeout of the kombu connection itself is that of Celery's ``broker_connection_timeout``.
    connect = {"socket_connect_timeout": given.get("socket_connect_timeout") or client.connect_timeout or 5.0}
    options["socket_connect_timeout"] = _number(connect, "socket_connect_timeout", 5.0, least=0.001)
    options |= _for_sentinel(given)
    if client.ssl:
        options |= _tls(client.ssl if isinstance(client.ssl, Mapping) else {})
    provider = given.get("credential_provider") or getattr(client, "credential_provider", None)
    url, query = url_of(client)
    if client.ssl and url.startswith("redis://"):
        url = "rediss" + url[len("redis") :]
    options |= _tls({name: query.pop(name) for name in list(query) if name.startswith("ssl_")})
    provider = query.pop("credential_provider", None) or provider
    if provider is None and callable(client.password):
        provider = _CalledPassword(client.userid, client.password)
    if provider:
        options["credential_provider"] = _provider(provider)
    if query:
        url += "?" + urlencode(query)
    name = given.get("client_name") or "streamtask"
    if not isinstance(name, str) or not all("!" <= letter <= "~" for letter in name):
        raise ConfigError(f"client_name may have no spaces and no special characters, unlike {name!r}")
    timeout = {"socket_timeout": given.get("socket_timeout") or 5.0}
    return Broker(
        url,
        timeout_s=_number(timeout, "socket_timeout", 5.0, least=0.001),
        client_name=name,
        options=options,
    )


def _for_sentinel(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if given.get("min_other_sentinels"):
        found["min_other_sentinels"] = _number(given, "min_other_sentinels", 0, least=0)
    kwargs = given.get("sentinel_kwargs")
    if kwargs:
        if not isinstance(kwargs, Mapping):
            raise ConfigError(
                f"sentinel_kwargs must be a dict of options for connections to Sentinels, not a {type(kwargs).__name__}"
            )
        found["sentinel_kwargs"] = dict(kwargs)
    return found


def _tls(given: Mapping[str, Any]) -> dict[str, Any]:
    """TLS options by redis-py's names; those of ``broker_use_ssl`` for AMQP are understood too."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        name = name if name.startswith("ssl_") else f"ssl_{name}"
        if name == "ssl_cert_reqs" and isinstance(value, ssl.VerifyMode | int):
            value = {ssl.CERT_NONE: "none", ssl.CERT_OPTIONAL: "optional"}.get(ssl.VerifyMode(value), "required")
        elif name == "ssl_cert_reqs" and isinstance(value, str):
            value = value.lower().removeprefix("cert_")
            if value not in ("none", "optional", "required"):
                raise ConfigError(f"ssl_cert_reqs must be none, optional or required, not {value!r}")
        elif name == "ssl_check_hostname" and isinstance(value, str):
            value = value.lower() != "false"
        found[name] = value
    if found.get("ssl_cert_reqs") == "none":
        found.setdefault("ssl_check_hostname", False)
    return found


def _provider(provider: Any) -> Any:
    if isinstance(provider, str):
        provider = _named_provider(provider)
    if not hasattr(provider, "get_credentials"):
        raise ConfigError(f"the credential provider {provider!r} has no get_credentials: it must be one of redis-py's")
    return provider


@functools.cache
def _named_provider(name: str) -> Any:
    """One for all connections of the process: what differs in its provider would be another broker's session."""
    from kombu.utils.imports import symbol_by_name

    try:
        return symbol_by_name(name)()
    except Exception as exc:
        raise ConfigError(f"the credential provider {name!r} can't be made: {exc!r}") from exc


@dataclass(frozen=True)
class _CalledPassword:
    """A password that kombu's connection was given as a callable: asked for at every connect. One of redis-py's providers
    by its methods, and equal and shown alike for all connections that were given the same callable."""

    user: str | None
    password: Callable[[], str]

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        return (self.user, self.password()) if self.user else (self.password(),)


def url_of(client: Any) -> tuple[str, dict[str, str]]:
    """The broker's URL, and what was in its query."""
    given = _whole_url(client)
    if given is not None:
        scheme, _, rest = given.partition("://")
        scheme = scheme.removeprefix("streamtask+")
        rest, _, text = rest.partition("?")
        query = dict(parse_qsl(text))
    else:
        # Connection(hostname=..., port=...)
        scheme = client.transport_cls if isinstance(client.transport_cls, str) else "redis"
        scheme = scheme.removeprefix("streamtask+")
        if scheme not in SCHEMES and scheme not in ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster"):
            scheme = "redis"
        query = {}
        rest = ""
        password = "" if callable(client.password) else client.password or ""
        if password or (client.userid and not client.password):
            rest = f"{quote(client.userid or '', safe='')}:{quote(password, safe='')}@"
        host = client.hostname or "localhost"
        rest += f"[{host}]" if ":" in host and not host.startswith("[") and "," not in host else host
        rest += f":{client.port}" if client.port else ""
        path = str(client.virtual_host or "").lstrip("/")
        rest += f"/{path}" if path else ""
    scheme = SCHEMES.get(scheme, scheme)
    if scheme == "unix":
        rest = "/" + rest.lstrip("/") if rest else ""
        query.setdefault("db", str(_db_number(query.pop("virtual_host", None))))
    elif "virtual_host" in query:
        rest = f"{rest.partition('/')[0]}/{_db_number(query.pop('virtual_host'))}"
    if scheme == "redis+sentinel":
        rest = _sentinel(client, rest)
    elif scheme == "redis+cluster":
        rest = rest.partition("/")[0]
    if scheme in ("redis", "rediss", "redis+cluster", "redis+sentinel"):
        rest = _with_host(rest)
    return f"{scheme}://{rest.rstrip('/')}", query


def _whole_url(client: Any) -> str | None:
    """The URL that a kombu connection was given, None if it was given its parts.

    When kombu goes on to the next URL of a failover list it takes that apart, keeps the port and the database of the last
    one where the next names none, and can't tell a socket's path; so what it is at now is looked up in the list.
    """
    hostname = client.hostname or ""
    if "://" in hostname:
        return str(hostname)
    hostname = hostname.removeprefix("streamtask+")  # as a clone has it
    for url in client.alt or ():
        if not isinstance(url, str) or "://" not in url:
            continue
        try:
            scheme, host, port, user, password, path, _ = url_to_parts(url)
        except ValueError:
            continue  # several hosts in one URL
        if (scheme, host or "") != (client.transport_cls, hostname):
            continue
        pairs = (
            (port, client.port), (path, client.virtual_host), (user, client.userid), (password, client.password),
        )  # fmt: skip
        if all(named is None or str(named) == str(current) for named, current in pairs):
            return url
    return None


def _with_host(rest: str) -> str:
    """``redis://`` is the server of this machine."""
    userinfo, at, place = rest.rpartition("@")
    return f"{userinfo}{at}localhost{place}" if not place or place[0] in ":/" else rest


def _sentinel(client: Any, rest: str) -> str:
    """``host,host/service/db``: the service may be an option, the hosts a failover list, as for kombu's redis transport."""
    userinfo, at, place = rest.rpartition("@")
    hosts, _, path = place.partition("/")
    service, _, db = path.strip("/").partition("/")
    if service.isdigit() and not db:
        service, db = "", service
    service = service or _text(client.transport_options or {}, "master_name", "", empty=True)
    if not service:
        raise ConfigError(
            "the broker URL names no service of the Sentinels: it goes behind the hosts, as in "
            "streamtask+sentinel://host1:26379,host2:26379/mymaster/0, or into the transport option master_name"
        )
    if "," not in hosts and client.alt:
        found = [urlsplit(url if "://" in url else f"//{url}").netloc.rpartition("@")[2] for url in client.alt if url]
        hosts = ",".join(dict.fromkeys(host for host in found if host)) or hosts
    return f"{userinfo}{at}{hosts}/{service}/{db or 0}"


def _db_number(value: Any) -> int:
    text = str(value or 0).strip("/")
    if text and not text.isdigit():
        raise ConfigError(f"the database in the broker URL must be a number from 0, as in .../0, not {text!r}")
    return int(text or 0)


def _db(client: Any) -> int:
    """The number of the database, for the names of pub/sub channels."""
    try:
        url, query = url_of(client)
        tail = urlsplit(url).path.strip("/").rpartition("/")[2]
        return int(query.get("db", tail) or 0)
    except ValueError:
        return 0
