"""Plugging the transport in: URLs of all kinds, TLS, failover, Sentinel, Cluster, credentials, options."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import pickle
import ssl
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES, get_transport_cls

import streamtask.transport.options as options_module
from streamtask.errors import AccessRefused, ConfigError
from streamtask.transport import Transport
from streamtask.transport.options import Options, broker_of, options_of
from tests.fix_redis import RedisServer
from tests.helpers import free_port, spawn, wait_until
from tests.transport.fix_servers import Sentinels, TlsServer, wait_replicated
from tests.transport.kit import LEASE_S, Inbox, Kit, publish

OURS = "streamtask.transport:Transport"


def in_db(server: RedisServer, db: int) -> list[bytes]:
    """The keys of one database."""
    place: dict[str, Any] = {"unix_socket_path": server.socket_path} if server.unix else {"port": server.port}
    with contextlib.closing(redis.Redis(**place, db=db)) as client:
        return list(client.scan_iter("*"))


def works(connection: Connection, name: str = "q") -> None:
    """Publishes and consumes, keyed and plain, on this connection."""
    channel = connection.channel()
    channel.queue_declare(name)
    publish(channel, "plain", to=name)
    publish(channel, "keyed", to=name, headers={"shard_key": "u1"})
    publish(channel, "low", to=name, priority=9)
    inbox = Inbox(channel, name)
    inbox.take(3)
    assert sorted(inbox.bodies) == ["keyed", "low", "plain"]
    for message in inbox.messages:
        message.ack()
    assert channel._size(name) == 0
    assert isinstance(connection.transport, Transport)


# --- how it is named -----------------------------------------------------------------------------------------------------


def test_schemes_are_registered() -> None:
    for scheme in ("streamtask", "streamtasks"):
        assert scheme in TRANSPORT_ALIASES
        assert issubclass(get_transport_cls(scheme), Transport)


def test_entry_registers_and_serializes() -> None:
    """The module behind the entry point, in a process that imports nothing else of ours."""
    code = (
        "import streamtask.transport.entry as entry\n"
        "from kombu import Connection\n"
        "dumps, loads, kind, encoding = entry.serializer\n"
        "import datetime, uuid\n"
        "value = {'when': datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc), 'id': uuid.UUID(int=1), 'b': b'x'}\n"
        "assert loads(dumps(value)) == value\n"
        "assert Connection('streamtask://127.0.0.1:1/0').transport.driver_name == 'streamtask'\n"
        "print('fine')\n"
    )
    with spawn("-c", code) as process:
        process.wait_line("fine")


def test_by_itself_in_a_process_with_kombu() -> None:
    found = [e for e in importlib.metadata.entry_points(group="kombu.serializers") if e.name == "streamtask"]
    if not found:
        pytest.skip("the package is not installed here, so there is no entry point")
    code = "import celery; app = celery.Celery(broker='streamtask://127.0.0.1:1/0')\nprint(app.connection().transport)"
    with spawn("-c", code) as process:
        process.wait_line("streamtask.transport")


def test_streamtask_url(kit: Kit) -> None:
    works(kit.connect())


@pytest.mark.parametrize("transport", [OURS, "streamtask", Transport], ids=["dotted", "alias", "class"])
def test_redis_url_with_a_transport(kit: Kit, transport: Any) -> None:
    works(kit.connect(kit.url.replace("streamtask", "redis"), transport=transport))


@pytest.mark.parametrize("transport", [OURS, "streamtask"])
def test_parts_instead_of_a_url(kit: Kit, transport: str) -> None:
    works(kit.connect("127.0.0.1", port=kit.server.port, virtual_host="2", transport=transport))
    assert in_db(kit.server, 2)


def test_streamtask_plus_redis(kit: Kit) -> None:
    works(kit.connect(kit.url.replace("streamtask", "streamtask+redis")))


def test_databases_are_apart(kit: Kit) -> None:
    zero, five = kit.connect().channel(), kit.connect(kit.url[:-1] + "5").channel()
    for channel in (zero, five):
        kit.queue(channel)
    publish(five, "five")
    assert zero.basic_get("q") is None
    assert five.basic_get("q").payload == "five"
    assert all(key.startswith(kit.namespace.encode()) for key in in_db(kit.server, 5))


def test_no_host_is_localhost() -> None:
    for url in ("streamtask://", "streamtask:///3", "streamtask://:6379/3", "streamtasks://", "streamtask://:pw@/3"):
        broker = broker_of(Connection(url))
        host = broker.client().connection_pool.connection_kwargs.get("host", "localhost")
        assert host == "localhost", url
        db = broker.client().connection_pool.connection_kwargs.get("db", 0)
        assert db == (3 if "3" in url.rpartition("/")[2] else 0), url


def test_ipv6() -> None:
    for connection in (Connection("streamtask://[::1]:7000/1"), Connection("::1", port=7000, transport=OURS)):
        arguments = broker_of(connection).client().connection_pool.connection_kwargs
        assert (arguments["host"], arguments["port"]) == ("::1", 7000)
    connection = Connection("streamtask://127.0.0.1:1;streamtask://[::1]:7000/1")
    connection.maybe_switch_next()
    arguments = broker_of(connection).client().connection_pool.connection_kwargs
    assert (arguments["host"], arguments["port"], arguments["db"]) == ("::1", 7000, 1)


@pytest.mark.parametrize("how", ["path", "virtual_host", "failover", "redis+socket"])
def test_unix_socket(make_kit: Any, request: pytest.FixtureRequest, how: str) -> None:
    from tests.fix_redis import _binary

    with RedisServer(_binary(request.config), unix=True) as server:
        kit = make_kit(server)
        url = f"streamtask+unix://{server.socket_path}"
        if how == "virtual_host":
            url += "?virtual_host=4"
        elif how == "failover":
            url = f"streamtask://127.0.0.1:{free_port()}/0;{url}"
        elif how == "redis+socket":
            url = url.replace("+unix", "+socket")
        connection = kit.connect(url)
        connection.ensure_connection(max_retries=3, interval_start=0.05)
        works(connection)
        assert in_db(server, 4 if how == "virtual_host" else 0)
        kit.close()


# --- credentials ---------------------------------------------------------------------------------------------------------

PASSWORDS = ["secret", "p@ss:w/or#d?%&+", "ünï=;,", "a b"]


@pytest.fixture(params=PASSWORDS)
def guarded(request: pytest.FixtureRequest, redis_server: RedisServer) -> tuple[RedisServer, str]:
    redis_server.client().execute_command("ACL", "SETUSER", "us@r", "on", f">{request.param}", "~*", "&*", "+@all")
    redis_server.config_set(requirepass="unguessable")
    return redis_server, request.param


def test_passwords(make_kit: Any, guarded: tuple[RedisServer, str]) -> None:
    """By URL, by its parts, and after a failover; none shows them."""
    from urllib.parse import quote

    server, password = guarded
    kit = make_kit(server)
    host = f"127.0.0.1:{server.port}"
    quoted = f"{quote('us@r', safe='')}:{quote(password, safe='')}@{host}"
    dead = f"streamtask://127.0.0.1:{free_port()}/0"
    connections = [
        kit.connect(f"streamtask://{quoted}/0"),
        kit.connect("127.0.0.1", port=server.port, userid="us@r", password=password, transport=OURS),
        kit.connect(f"{dead};streamtask://{quoted}/0"),
        kit.connect([dead.replace("streamtask", "redis"), f"redis://{quoted}/0"], transport=OURS),
    ]
    for n, connection in enumerate(connections):
        connection.ensure_connection(max_retries=3, interval_start=0.05)
        works(connection, f"q{n}")
        for shown in (connection.as_uri(), repr(connection), str(connection)):
            assert password not in shown
            assert quote(password, safe="") not in shown or (password == "secret" and "secret" not in shown)
        assert quote(password, safe="") in connection.as_uri(include_password=True)
        works(kit.clone(connection), f"c{n}")


def test_wrong_password(make_kit: Any, redis_server: RedisServer) -> None:
    redis_server.config_set(requirepass="right")
    connection = make_kit(redis_server).connect(f"streamtask://:wrongone@127.0.0.1:{redis_server.port}/0")
    began = time.monotonic()
    with pytest.raises(AccessRefused, match="refused the user or password") as info:
        connection.connect()
    assert "wrongone" not in str(info.value)
    assert time.monotonic() - began < 5


def test_a_password_that_is_refused_for_a_while(make_kit: Any, redis_server: RedisServer) -> None:
    """For who was connected it is an outage: kombu's errors of a connection, and a new connection goes on."""
    redis_server.config_set(requirepass="right")
    kit = make_kit(redis_server)
    connection = kit.connect(f"streamtask://:right@127.0.0.1:{redis_server.port}/0")
    channel = connection.channel()
    inbox = Inbox(channel, kit.queue(channel, "q"))
    producer = connection.Producer()
    producer.publish("before", routing_key="q")
    inbox.take()[0].ack()
    let_in = redis_server.lock_out("right")

    def refused() -> bool:
        try:
            inbox.drain(0.1)
        except connection.recoverable_connection_errors as exc:
            return "refused the user or password" in str(exc)
        return False

    wait_until(refused)
    with pytest.raises(OperationalError, match="refused the user or password"):
        producer.publish("refused", routing_key="q", retry=True, retry_policy={"max_retries": 1, "interval_start": 0})
    let_in()
    producer.publish("after", routing_key="q")
    assert Inbox(kit.clone(connection).channel(), "q").take()[0].payload == "after"


def called_password() -> str:
    return "called"


def test_a_callable_password(make_kit: Any, redis_server: RedisServer) -> None:
    redis_server.config_set(requirepass="called")
    kit = make_kit(redis_server)
    connection = kit.connect("127.0.0.1", port=redis_server.port, password=called_password, transport=OURS)
    works(connection)


class Provider(redis.CredentialProvider):
    """What the tests name by its dotted name."""

    asked = 0

    def get_credentials(self) -> tuple[str, str]:
        Provider.asked += 1
        return "provided", "word"


@pytest.mark.parametrize("how", ["object", "name", "query", "connection"])
def test_credential_provider(make_kit: Any, redis_server: RedisServer, how: str) -> None:
    redis_server.client().execute_command("ACL", "SETUSER", "provided", "on", ">word", "~*", "&*", "+@all")
    redis_server.config_set(requirepass="unguessable")
    kit = make_kit(redis_server)
    name = f"{__name__}.Provider"
    Provider.asked = 0
    if how == "query":
        connection = kit.connect(f"{kit.url}?credential_provider={name}")
    elif how == "connection":
        connection = kit.connect(credential_provider=Provider())
    else:
        connection = kit.connect(transport_options={"credential_provider": Provider() if how == "object" else name})
    works(connection)
    assert Provider.asked > 0
    # A second connection of the process is the same session: its acks and leases are shared.
    assert kit.clone(connection).transport.session is connection.transport.session


def test_a_provider_that_is_none() -> None:
    with pytest.raises(ConfigError, match="get_credentials"):
        broker_of(Connection("streamtask://h/0", transport_options={"credential_provider": object()}))
    with pytest.raises(ConfigError, match=r"no\.such\.Thing"):
        broker_of(Connection("streamtask://h/0", transport_options={"credential_provider": "no.such.Thing"}))


# --- TLS -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ca", "none", "ssl option", "ssl option with streamtask", "rediss", "failover"])
def test_tls(tls_server: TlsServer, make_kit: Any, how: str) -> None:
    kit = make_kit(tls_server)
    place = f"127.0.0.1:{tls_server.port}/0"
    ca = str(tls_server.certificates.ca)
    if how == "ca":
        connection = kit.connect(f"streamtasks://{place}?ssl_ca_certs={ca}")
    elif how == "none":
        connection = kit.connect(f"streamtasks://{place}?ssl_cert_reqs=CERT_NONE")
    elif how == "ssl option":
        connection = kit.connect(f"streamtasks://{place}", ssl={"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": ca})
    elif how == "ssl option with streamtask":
        connection = kit.connect(f"streamtask://{place}", ssl={"ssl_cert_reqs": ssl.CERT_NONE})
    elif how == "rediss":
        connection = kit.connect(f"rediss://{place}?ssl_ca_certs={ca}", transport=OURS)
    else:
        dead = f"127.0.0.1:{free_port()}/0"
        connection = kit.connect(f"rediss://{dead};rediss://{place}?ssl_ca_certs={ca}", transport=OURS)
        connection.ensure_connection(max_retries=3, interval_start=0.05)
    works(connection)
    works(kit.clone(connection), "other")


@pytest.mark.parametrize("url", ["streamtasks://", "rediss://"])
def test_tls_refuses_an_unknown_certificate(tls_server: TlsServer, make_kit: Any, url: str) -> None:
    """Neither plain text nor an unchecked certificate unless it is asked for."""
    kit = make_kit(tls_server)
    more = {} if url.startswith("streamtask") else {"transport": OURS}
    connection = kit.connect(f"{url}127.0.0.1:{tls_server.port}/0", **more)
    with pytest.raises(connection.connection_errors, match="CERTIFICATE_VERIFY_FAILED"):
        connection.connect()


# --- failover ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "list"])
@pytest.mark.parametrize("scheme", ["streamtask", "redis"])
def test_failover(make_kit: Any, redis_server: RedisServer, form: str, scheme: str) -> None:
    """The first is dead; the transport stays ours, also for a clone and after further switches."""
    kit = make_kit(redis_server)
    urls = [f"{scheme}://127.0.0.1:{free_port()}/0", f"{scheme}://127.0.0.1:{redis_server.port}/0"]
    more = {"transport": OURS} if scheme == "redis" else {}
    connection = kit.connect(";".join(urls) if form == "text" else urls, **more)
    connection.ensure_connection(max_retries=3, interval_start=0.05)
    works(connection)
    assert str(redis_server.port) in connection.as_uri()
    for _ in range(2):
        connection.maybe_switch_next()
        assert isinstance(connection.transport, Transport)
    clone = kit.clone(connection)
    clone.ensure_connection(max_retries=3, interval_start=0.05)
    works(clone, "clone")


def test_failover_under_a_publish(make_kit: Any, request: pytest.FixtureRequest, redis_server: RedisServer) -> None:
    from tests.fix_redis import _binary

    with RedisServer(_binary(request.config)) as first:
        kit = make_kit(first)
        connection = kit.connect([f"redis://127.0.0.1:{s.port}/0" for s in (first, redis_server)], transport=OURS)
        producer = connection.Producer()
        producer.publish(1, routing_key="q", declare=[])
        first.kill()
        producer.publish(2, routing_key="q", retry=True, retry_policy={"max_retries": 5, "interval_start": 0.05})
        other = make_kit(redis_server, namespace=kit.namespace)
        assert Inbox(other.channel(), "q").drain_all() == [2]


# --- Sentinel -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["path", "option", "kombu", "list"])
def test_sentinel(sentinels: Sentinels, make_kit: Any, form: str) -> None:
    kit = make_kit(sentinels.master)
    host = f"127.0.0.1:{sentinels.ports[0]}"
    options = {} if form == "path" else {"master_name": sentinels.name}
    if form == "path":
        connection = kit.connect(f"streamtask+sentinel://{host}/{sentinels.name}/0")
    elif form == "option":
        connection = kit.connect(f"streamtask+sentinel://{host}/0", transport_options=options)
    elif form == "kombu":
        connection = kit.connect(f"sentinel://{host}", transport_options=options, transport=OURS)
    else:
        url = f"streamtask+sentinel://127.0.0.1:{free_port()};streamtask+sentinel://{host}"
        connection = kit.connect(url, transport_options=options)
        connection.ensure_connection(max_retries=3, interval_start=0.05)
    works(connection)
    works(kit.clone(connection), "other")


def test_sentinel_failover(sentinels: Sentinels, make_kit: Any) -> None:
    """The master dies: publishing and consuming go on with the new one."""
    master = sentinels.master
    kit = make_kit(master)
    url = f"streamtask+sentinel://127.0.0.1:{sentinels.ports[0]}/{sentinels.name}/0"
    connection = kit.connect(url)
    producer = connection.Producer()
    kit.queue(connection.channel())
    producer.publish(1, routing_key="q")
    wait_replicated(master)
    master.kill()
    policy = {"max_retries": 100, "interval_start": 0.1, "interval_max": 0.2}
    producer.publish(2, routing_key="q", retry=True, retry_policy=policy)
    assert sentinels.master is not master
    assert sorted(Inbox(kit.channel() if False else kit.connect(url).channel(), "q").drain_all(1)) == [1, 2]


# --- wrong URLs and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "redis://host:port/0", "redis://host:99999/0", "redis://host/db", "redis://host/-1", "redis://host/0?nonsense=1",
        "redis://:pa/ss@host/0", "sentinel://host:26379", "sentinel://host:26379/0", "nonsense://host", "unix://",
        "unix:///s?virtual_host=x", "redis://host/0?socket_timeout=x", "rediss://host/0?ssl_cert_reqs=maybe",
        "rediss://host/0?ssl_nonsense=1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["scheme", "transport"])
def test_wrong_urls(url: str, how: str) -> None:
    """Said when the connection is made or used first, by a ConfigError that shows no password.

    What follows ``streamtask://`` is kombu's to parse: where that fails, it is said in kombu's words.
    """
    said: tuple[type[Exception], ...] = (ConfigError,)
    if how == "scheme":
        plain = url.replace("rediss://", "streamtasks://").replace("redis://", "streamtask://")
        url = plain if plain != url else f"streamtask+{url}"
        said = (ConfigError, ValueError, TypeError, KeyError) if plain == url else said
    with pytest.raises(said) as info:
        Connection(url, transport=OURS if how == "transport" else None).connect()
    if isinstance(info.value, ConfigError):
        assert "pa/ss" not in str(info.value)
        assert "ss@" not in str(info.value)


@pytest.mark.parametrize(
    "given",
    [
        {"shards": 0}, {"shards": "many"}, {"shards": 2.5}, {"shards": True}, {"shards": 100_000}, {"shards": None},
        {"lease": 0}, {"lease": -1}, {"lease": "x"}, {"lease": float("nan")}, {"lease": float("inf")},
        {"lease": timedelta(0)}, {"max_crashes": 1.0},
        {"eta_hold": -1}, {"eta_hold": "x"}, {"produce_ttl": 0}, {"max_backlog": -1}, {"send_timeout": "x"},
        {"handover_timeout": -1}, {"priority_steps": []}, {"priority_steps": [3, 6]}, {"priority_steps": ["a"]},
        {"priority_steps": 5}, {"priority_steps": [0, -3]}, {"queue_order_strategy": "random"}, {"socket_timeout": "x"},
        {"socket_timeout": -1}, {"socket_connect_timeout": "x"}, {"namespace": ""}, {"namespace": 5},
        {"sentinel_kwargs": 5}, {"global_keyprefix": 5}, {"client_name": "a b"},
        {"body_encoding": "rot13"}, {"min_other_sentinels": "x"},
    ],
    ids=repr,
)  # fmt: skip
def test_wrong_options(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=name):
        Connection("streamtask://127.0.0.1:1/0", transport_options=given).transport.session  # noqa: B018


@pytest.mark.parametrize(
    "given, name, value",
    [
        ({"shards": "16"}, "shards", 16),
        ({"shards": 1}, "shards", 1),
        ({"lease": timedelta(minutes=1)}, "lease_ms", 60_000),
        ({"lease": "2.5"}, "lease_ms", 2500),
        ({"lease": 3}, "lease_ms", 3000),
        ({"eta_hold": 0}, "eta_hold_s", 0.0),
        ({"priority_steps": range(3)}, "priority_steps", (0, 1, 2)),
        ({"priority_steps": [6, 0, 3]}, "priority_steps", (0, 3, 6)),
        ({"global_keyprefix": "team:"}, "namespace", "team:streamtask"),
        ({"fanout_patterns": False}, "fanout_patterns", False),
    ],
)
def test_options(given: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(options_of(Connection("streamtask://h/0", transport_options=given)), name) == value


def test_defaults() -> None:
    assert options_of(Connection("streamtask://h/0")) == Options()


def test_wrong_timeouts_of_the_connection() -> None:
    assert broker_of(Connection("streamtask://h/0", connect_timeout=None)).options["socket_connect_timeout"] == 5


def test_timeouts() -> None:
    """socket_connect_timeout; else the connection's own connect_timeout, as Celery's broker_connection_timeout sets it."""
    arguments = broker_of(Connection("streamtask://h/0", connect_timeout=3)).client().connection_pool.connection_kwargs
    assert (arguments["socket_connect_timeout"], arguments["socket_timeout"]) == (3, 5)
    given = {"socket_timeout": 7, "socket_connect_timeout": 2, "socket_keepalive": False, "client_name": "me"}
    broker = broker_of(Connection("streamtask://h/0", connect_timeout=3, transport_options=given))
    arguments = broker.client().connection_pool.connection_kwargs
    assert (arguments["socket_connect_timeout"], arguments["socket_timeout"]) == (2, 7)
    assert (arguments["socket_keepalive"], arguments["client_name"]) == (False, "me")


def test_options_without_meaning_are_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options_module, "_said", set())
    given = {
        "visibility_timeout": 43200,
        "unacked_restore_limit": 5,
        "fanout_prefix": True,
        "health_check_interval": 25,
    }
    with caplog.at_level(logging.INFO, "streamtask.transport"):
        for _ in range(3):
            options_of(Connection("streamtask://h/0", transport_options=given))
    (record,) = caplog.records
    assert "visibility_timeout" in record.getMessage()
    assert "unacked_restore_limit" in record.getMessage()


def test_unknown_options_are_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "_said", set())
    for _ in range(3):
        options_of(Connection("streamtask://h/0", transport_options={"visibility_timeuot": 1}))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "visibility_timeuot" in record.getMessage()


def test_every_option_of_kombus_redis_transport_is_known(caplog: pytest.LogCaptureFixture) -> None:
    from kombu.transport import redis as theirs

    names = {*theirs.Channel.from_transport_options, *theirs.SentinelChannel.from_transport_options}
    assert names - options_module.WITHOUT_MEANING - options_module.OURS - options_module.KOMBUS == set()


# --- what kombu does with a connection -----------------------------------------------------------------------------------


def test_info(kit: Kit) -> None:
    info = kit.connect(kit.url.replace("//", "//user:hidden@")).info()
    assert info["transport_options"]["lease"] == LEASE_S
    assert info["transport"] == "streamtask"


def test_as_uri() -> None:
    uris = {
        "streamtask://user:hidden@h:1/2": "streamtask://user:**@h:1/2",
        "streamtask://:hidden@h:1/2": "streamtask://:**@h:1/2",
        "streamtasks://u:hidden@h:1/2": "streamtasks://u:**@h:1/2",
    }
    for url, shown in uris.items():
        connection = Connection(url)
        assert connection.as_uri().replace("//**", "//:**") == shown
        assert "hidden" not in repr(connection)
        if "hidden" in url:
            assert "hidden" in connection.as_uri(include_password=True)


def test_as_uri_of_several_hosts() -> None:
    connection = Connection("streamtask+sentinel://u:hidden@h:1,i:2/m/2")
    assert "hidden" not in repr(connection)
    assert (
        broker_of(Connection(connection.as_uri(include_password=True))).url == "redis+sentinel://u:hidden@h:1,i:2/m/2"
    )


def test_connection_can_be_pickled(kit: Kit) -> None:
    connection = pickle.loads(pickle.dumps(kit.connect()))
    try:
        works(connection)
    finally:
        connection.release()


def test_equal_connections_have_equal_hashes(kit: Kit) -> None:
    """kombu's pools keep one pool per connection that is told apart by this."""
    assert kit.connect().__eqhash__() == kit.connect().__eqhash__()


def test_pool(kit: Kit) -> None:
    pool = kit.connect().Pool(2)
    one, two = pool.acquire(), pool.acquire()
    with pytest.raises(pool.LimitExceeded):
        pool.acquire()
    works(one)
    one.release()
    two.release()
    with pool.acquire() as again:
        works(again, "again")
    pool.force_close_all()


def test_connecting_says_what_is_wrong() -> None:
    connection = Connection(f"streamtask://:hidden@127.0.0.1:{free_port()}/0")
    with pytest.raises(connection.connection_errors, match="can't be reached") as info:
        connection.connect()
    assert "hidden" not in str(info.value)


def test_ensure_connection_waits_for_the_server(own_server: RedisServer, make_kit: Any) -> None:
    kit = make_kit(own_server)
    own_server.stop()
    connection = kit.connect()
    said: list[Any] = []

    def errback(exc: Exception, interval: float) -> None:
        said.append(exc)
        if len(said) == 2:
            own_server.start()

    connection.ensure_connection(errback, max_retries=20, interval_start=0.05, interval_max=0.1)
    assert len(said) >= 2
    works(connection)


def test_released_connections_leave_nothing(kit: Kit) -> None:
    """No socket to Redis of a consumer stays, no lease, and no keeper (the fixture looks)."""
    for n in range(3):
        connection = kit.connect()
        works(connection, f"q{n}")
        connection.release()
    wait_until(lambda: kit.keys("*:consumers:*") == [])
    assert kit.keys("*lease*") == [] or all(":lease:workers:" not in key for key in kit.keys("*lease*"))


def test_a_big_app_directory(tmp_path: Path, kit: Kit) -> None:
    """The keeper is started from whatever folder and with whatever in it: a module there called as one of ours."""
    (tmp_path / "streamtask.py").write_text("raise RuntimeError('not me')")
    (tmp_path / "redis.py").write_text("raise RuntimeError('not me')")
    code = (
        "import sys, os; sys.path.pop(0); sys.path[:] = [p for p in sys.path if p]\n"
        "import streamtask.transport; from kombu import Connection\n"
        f"c = Connection({kit.url!r}, transport_options={{'namespace': {kit.namespace!r}}})\n"
        "q = c.SimpleQueue('q'); q.put(1); m = q.get(timeout=5); m.ack(); q.close(); c.release(); print('fine')\n"
    )
    with spawn("-c", code, cwd=tmp_path) as process:
        process.wait_line("fine")
