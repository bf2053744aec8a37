"""Servers of other kinds than one plain redis-server: with TLS, behind Sentinels, in a Cluster."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.fix_redis import RedisServer, chosen_binaries
from tests.helpers import free_port, popen, wait_until


@dataclass
class Certificates:
    ca: Path
    certificate: Path
    key: Path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A certificate for 127.0.0.1 that signs itself."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate),
        ],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return Certificates(certificate, certificate, key)


def tls_binary(config: pytest.Config) -> str | None:
    """A server that was built with TLS, None where there is none."""
    for path in chosen_binaries(config).values():
        # Without a certificate none starts; what it says tells whether it could. One without TLS does not know the
        # directive, or knows it and lacks what is behind it.
        said = subprocess.run(
            [path, "--port", "0", "--tls-port", str(free_port())],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        if not any(text in said.stdout + said.stderr for text in ("Bad directive", "Failed finding TLS support")):
            return path
    return None


class TlsServer(RedisServer):
    """Answers on a TLS port only."""

    def __init__(self, binary: str, certificates: Certificates, **config: str) -> None:
        super().__init__(binary)
        self.certificates = certificates
        self.extra = config

    def _arguments(self) -> list[str]:
        self.config = {
            "port": "0",
            "tls-port": str(self.port),
            "tls-cert-file": str(self.certificates.certificate),
            "tls-key-file": str(self.certificates.key),
            "tls-ca-cert-file": str(self.certificates.ca),
            "tls-auth-clients": "no",
            **self.extra,
        }
        return super()._arguments()

    @property
    def url(self) -> str:
        return f"rediss://127.0.0.1:{self.port}/0?ssl_ca_certs={self.certificates.ca}"

    def answers(self, timeout: float = 1) -> bool:
        try:
            with contextlib.closing(redis.Redis.from_url(self.url, socket_timeout=timeout)) as client:
                return bool(client.ping())
        except (redis.RedisError, OSError):
            return False


@pytest.fixture
def tls_server(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[TlsServer]:
    binary = tls_binary(request.config)
    if binary is None:
        pytest.skip("no redis-server here was built with TLS")
    server = TlsServer(binary, certificates)
    try:
        server.start()
        yield server
    finally:
        server.close()


class Sentinels:
    """A master, a replica, and Sentinels that watch them."""

    name = "mymaster"

    def __init__(self, binary: str, folder: Path, count: int = 1) -> None:
        self.binary = binary
        self.folder = folder
        self.ports = [free_port() for _ in range(count)]
        self.servers = [RedisServer(binary), RedisServer(binary)]
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for server in self.servers:
            server.start()
        master, replica = self.servers
        replica.client().execute_command("REPLICAOF", "127.0.0.1", master.port)
        wait_until(lambda: replica.client().info("replication")["master_link_status"] == "up")
        for port in self.ports:
            path = self.folder / f"sentinel-{port}.conf"
            path.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {self.folder}\nlogfile {self.folder}/sentinel-{port}.log\n"
                f"sentinel monitor {self.name} 127.0.0.1 {master.port} 1\n"
                f"sentinel down-after-milliseconds {self.name} 500\nsentinel failover-timeout {self.name} 2000\n"
            )
            self.processes.append(
                popen([self.binary, str(path), "--sentinel"], stdout=subprocess.DEVNULL, cwd=self.folder)
            )
        for port in self.ports:
            wait_until(lambda port=port: self._sees(port), 20)

    def _sees(self, port: int) -> bool:
        try:
            with contextlib.closing(redis.Redis(port=port, decode_responses=True)) as client:
                master: Any = client.sentinel_master(self.name)
                return bool(master["num-slaves"] >= 1)
        except (redis.RedisError, OSError):
            return False

    @property
    def master(self) -> RedisServer:
        """Whom the first Sentinel names."""
        with contextlib.closing(redis.Redis(port=self.ports[0], decode_responses=True)) as client:
            _, port = client.sentinel_get_master_addr_by_name(self.name)
        return next(server for server in self.servers if server.port == int(port))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for server in self.servers:
            server.close()


@pytest.fixture
def sentinels(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sentinels]:
    found = Sentinels(list(chosen_binaries(request.config).values())[-1], tmp_path)
    try:
        found.start()
        yield found
    finally:
        found.close()


CLUSTER = {"cluster-enabled": "yes", "cluster-node-timeout": "1000", "repl-diskless-sync-delay": "0"}


def wait_replicated(master: RedisServer) -> None:
    """Waits until a master's replicas have all that it has."""

    def done() -> bool:
        info: Any = master.client().info("replication")
        return bool(info["connected_slaves"]) and info["slave0"]["offset"] == info["master_repl_offset"]

    wait_until(done, 20)


class RedisCluster:
    """Some nodes which own the slots in equal parts."""

    def __init__(self, binary: str, count: int) -> None:
        self.binary = binary
        self.nodes = [self._node() for _ in range(count)]

    def _node(self) -> RedisServer:
        node = RedisServer(self.binary, config=CLUSTER)
        # A node talks to the others on its port and 10,000; ports must leave room for that.
        while node.port > 55_000:
            node.port = free_port()
        node._any_port = False
        return node

    @property
    def port(self) -> int:
        return self.nodes[0].port

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        count = len(self.nodes)
        for n, node in enumerate(self.nodes):
            slots = range(16384 * n // count, 16384 * (n + 1) // count)
            node.client().execute_command("CLUSTER", "ADDSLOTS", *slots)
            node.client().execute_command("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        for node in self.nodes[1:]:
            self.nodes[0].client().execute_command("CLUSTER", "MEET", "127.0.0.1", node.port)
        wait_until(lambda: all(self._complete(node) for node in self.nodes), 20)

    def _complete(self, node: RedisServer) -> bool:
        info: Any = node.client().execute_command("CLUSTER INFO")
        return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == len(self.nodes)

    def owner(self, key: str) -> RedisServer:
        """The node that has a key's slot, as a living one sees it."""
        living = next(node for node in self.nodes if node.running)
        slot = living.client().execute_command("CLUSTER", "KEYSLOT", key)
        ranges: Any = living.client().execute_command("CLUSTER SLOTS")
        port = next(master[1] for first, last, master, *_ in ranges if first <= slot <= last)
        return next(node for node in self.nodes if node.port == port)

    def move(self, key: str) -> RedisServer:
        """Gives a key's slot, with all that lies in it, to another node, as a reshard does; that node."""
        source = self.owner(key)
        target = self.nodes[(self.nodes.index(source) + 1) % len(self.nodes)]
        slot = source.client().execute_command("CLUSTER", "KEYSLOT", key)
        ids = {node.port: node.client().execute_command("CLUSTER MYID").decode() for node in (source, target)}
        target.client().execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
        source.client().execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
        while found := source.client().execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.client().migrate("127.0.0.1", target.port, found, 0, 5000)
        for node in (target, source, *self.nodes):
            node.client().execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])
        # Two moves at once may give two nodes the same epoch, and then each may take the other for a slot's owner for good.
        wait_until(self._agree, 20, lambda: "\n".join(str(self._view(node)) for node in self.nodes))
        return target

    def _view(self, node: RedisServer) -> dict[str, tuple[str, Any]]:
        """Since which epoch which master has which slots, as a node sees it."""
        seen: Any = node.client().execute_command("CLUSTER NODES")
        masters = [one for one in seen.values() if set(one["flags"].split(",")) <= {"master", "myself"}]
        return {one["node_id"]: (one["epoch"], one["slots"]) for one in masters}

    def _agree(self) -> bool:
        first, *others = [self._view(node) for node in self.nodes if node.running]
        return all(other == first for other in others) and len({epoch for epoch, _ in first.values()}) == len(first)

    def replicate(self, master: RedisServer) -> RedisServer:
        """Starts a replica of a node; returns once it has what the node has, and may take its place."""
        replica = self._node()
        self.nodes.append(replica)
        replica.start()
        replica.client().execute_command("CLUSTER", "MEET", "127.0.0.1", master.port)
        wait_until(lambda: all(self._complete(node) for node in self.nodes), 20)
        replica.client().execute_command("CLUSTER", "REPLICATE", master.client().execute_command("CLUSTER MYID"))
        wait_until(lambda: replica.client().info("replication").get("master_link_status") == "up", 20)
        return replica

    def close(self) -> None:
        for node in self.nodes:
            node.close()


@pytest.fixture(params=[1, 3], ids=["one node", "three nodes"])
def redis_cluster(request: pytest.FixtureRequest) -> Iterator[RedisCluster]:
    found = RedisCluster(list(chosen_binaries(request.config).values())[-1], request.param)
    try:
        found.start()
        yield found
    finally:
        found.close()
