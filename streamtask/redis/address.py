"""A broker's URL, parsed once: what it names, and how it is shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import ConfigError

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


@dataclass(frozen=True, slots=True)
class Address:
    """Where a URL says that Redis is; see ``SCHEMES``. ``Address.parse`` makes one."""

    url: str = field(repr=False)
    shown: str
    """The URL without secrets."""
    scheme: str
    nodes: tuple[tuple[str, int | None], ...] = ()
    """Hosts and ports: several of Sentinels, and of a Cluster's nodes."""
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    service: str = ""
    """Sentinel's name of the master."""
    database: int = 0
    """Of such a service; of other schemes redis-py reads it from the URL."""
    folder: str = ""
    """An embedded server's, "" for the default."""
    first_url: str = field(default="", repr=False)
    """Of a Cluster: the URL of its first node."""
    query: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ``ConfigError`` for a wrong URL, without its secrets."""
        shown = safe_url(url)
        scheme = url.partition("://")[0] if "://" in url else ""
        if scheme not in SCHEMES:
            raise ConfigError(
                f"the broker URL {shown!r} has an unknown scheme: it must begin with one of "
                + ", ".join(f"{name}://" for name in SCHEMES)
            )
        if scheme == "memory":
            return cls(url, shown, scheme)
        try:
            parts = urlsplit(url)
            userinfo, at, hosts = parts.netloc.rpartition("@")
            places = [urlsplit(f"//{place}") for place in hosts.split(",")]
            nodes = tuple((place.hostname or "", place.port) for place in places)
        except ValueError:
            # The parser's own words may repeat a piece of a password that was not percent-encoded.
            raise ConfigError(
                f"the broker URL {shown!r} can't be read: is its port a number up to 65535, and are special "
                "characters in its password percent-encoded (/ as %2F, # as %23, ? as %3F, @ as %40)?"
            ) from None
        if (
            parts.netloc
            and "@" not in parts.netloc
            and "@" in parts.path + parts.query.partition("=")[0] + parts.fragment
        ):
            raise ConfigError(
                f"the broker URL {shown!r} has an @ after its host: special characters in a password must be "
                "percent-encoded (/ as %2F, # as %23, ? as %3F, @ as %40)"
            )
        if scheme in ("redis", "rediss", "redis+cluster") and not parts.hostname:
            raise ConfigError(f"the broker URL {shown!r} names no host, as in redis://localhost:6379/0")
        for option, value in parse_qsl(parts.query):
            if value.lower() != SET_HERE.get(option, value).lower():
                raise ConfigError(
                    f"the broker URL {shown!r} sets {option}, and streamtask needs {SET_HERE[option]!r} there: leave it out"
                )
        service, database, folder, first_url = "", 0, "", ""
        if scheme in ("redis", "rediss"):
            path = parts.path.strip("/")
            if path and not path.isdigit():
                raise ConfigError(f"the database in the broker URL {shown!r} must be a number, as in .../0")
        if scheme == "unix" and not (parts.path or parts.netloc):
            raise ConfigError("the broker URL names no socket, as in unix:///run/redis/redis.sock?db=0")
        if scheme == "redis+sentinel":
            service, _, number = parts.path.strip("/").partition("/")
            if not service:
                raise ConfigError(
                    f"the broker URL {shown!r} names no service, as in redis+sentinel://host1,host2:26379/mymaster/0"
                )
            if number and not number.isdigit():
                raise ConfigError(f"the database in the broker URL {shown!r} must be a number, as in .../mymaster/0")
            database = int(number or 0)
        if scheme == "redis+cluster":
            first_url = parts._replace(scheme="redis", netloc=f"{userinfo}{at}{hosts.partition(',')[0]}").geturl()
        if scheme == "embedded":
            folder = url.removeprefix("embedded://").partition("?")[0]
        user, _, password = userinfo.partition(":")
        return cls(
            url,
            shown,
            scheme,
            nodes=nodes,
            username=unquote(user) or None,
            password=unquote(password) or None,
            service=service,
            database=database,
            folder=folder,
            first_url=first_url,
            query=dict(parse_qsl(parts.query)),
        )
