"""The client's side of a keeper: the process that keeps the leases of one that runs foreign code.

A Celery worker, or whatever else consumes through kombu, has no supervisor above it, and a thread in it starves beside a
body that holds Python's lock. So it starts a process for that (``keeper_main``) and tells it over a socket what to keep.
"""

from __future__ import annotations

import base64
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable

from ..errors import ConfigError, StreamTaskError
from ..redis.connection import Broker
from .lease import Lease
from .orders import (
    Cancel,
    Close,
    Consume,
    Forget,
    Keep,
    Order,
    Own,
    Released,
    Start,
    Touch,
    from_line,
    to_line,
)  # fmt: skip
from .shared import SharedMemory, create_file

ENV_KEEPER = "STREAMTASK_KEEPER"
"""How the client tells a keeper of the socket, of itself, and of the memory that they share: ``descriptor,pid,descriptor``."""

CLOSE_S = 2.0
"""How long ``close`` waits for the keeper to do what it was told before."""

LEASES = 1 << 16
"""So many shards have a place in the memory that a keeper shares with its client: their numbers are below."""


class Keeper:
    """Starts a keeper for this process and gives it orders. ``incarnation``: the client's name as an owner of shards;
    ``last``: the highest number of a shard that the keeper before it has given.

    No method waits for the keeper but ``close``; to be used by one thread at a time, and by no forked child. A lease that
    is told is renewed until it is forgotten, as long as this process is alive and not stopped; when it dies, all are
    given back at once.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        namespace: str,
        app: str,
        group: str,
        incarnation: str,
        lease_ms: int,
        handover_timeout_s: float,
        last: int = 0,
    ) -> None:
        if broker.scheme == "memory":
            raise ConfigError("a memory:// broker can't be shared with the process that keeps leases: use redis://")
        self._pid = os.getpid()
        self._in = b""
        self._out = bytearray()
        self._keyed = False
        self._died = False
        start = Start(_travelling(broker), namespace, app, group, incarnation, lease_ms, handover_timeout_s, last)
        self._sock, theirs = socket.socketpair()
        memory = create_file(1, LEASES)
        try:
            self.memory = SharedMemory(memory, 1, LEASES)
            """Says, by the token of its lease, of which entry it is to be counted if the client dies now: one that it
            receives, or that it reads."""
            self.trusted = self.memory.trusted
            """By the number of a shard, until when (monotonic) the keeper vouches for it: a body may start until then."""
            self._sock.setblocking(False)
            self._process = subprocess.Popen(
                [_python(), "-m", "streamtask.coordination.keeper_main"],
                env={**os.environ, **_import_path(), ENV_KEEPER: f"{theirs.fileno()},{self._pid},{memory}"},
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in our terminal is not for it
            )
        except BaseException:
            self._sock.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
        self._send(start)

    @property
    def pid(self) -> int:
        """The keeper's process."""
        return self._process.pid

    def fileno(self) -> int:
        """Readable when orders have come, or the keeper has died."""
        return self._sock.fileno()

    def keep(self, lease: Lease) -> None:
        """Renews the lease of a consumer of a shared stream, and removes dead consumers of that stream."""
        keys = lease.keys
        self._send(Keep(keys.prefix, lease.group, lease.incarnation, lease.lease_ms, lease.token, lease.alive))

    def forget(self, lease: Lease) -> None:
        """Renews it no longer, nor gives it back when the client dies; unless it is kept again it ends one lease time later."""
        self._send(Forget(lease.keys.prefix, lease.token))

    def consume(self, queue: str, owned: Iterable[Own] = ()) -> None:
        """Takes part in the assignment of a queue's shards, as soon as Redis has recorded how many there are. ``owned`` tells a
        new keeper of shards that the client still owns, as the last one gave them. They keep their numbers and tokens; what it
        is not told of it takes anew."""
        self._keyed = True
        self._send(Consume(queue, list(owned)))

    def cancel(self, queue: str) -> None:
        """Leaves the queue's members and gives back its shards, each when ``released`` answers its ``Release``."""
        self._send(Cancel(queue))

    def released(self, number: int) -> None:
        """Nothing of a shard runs or is unsettled here any more."""
        self._send(Released(number))

    def touch(self, queue: str, expires_ms: int) -> None:
        """Puts off the end of a queue that expires unless it is used, until it is told 0."""
        self._send(Touch(queue, expires_ms))

    def orders(self) -> list[Order]:
        """What the keeper has said since. Raises ``StreamTaskError`` when it has died: close this one, start another, and tell
        it all again."""
        self._flush()
        while not self._died:
            try:
                data = self._sock.recv(65536)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                data = b""
            if not data:
                self._died = True
            self._in += data
        *lines, self._in = self._in.split(b"\n")
        if lines or not self._died:
            return [from_line(line) for line in lines]
        self.close()
        raise StreamTaskError(
            f"the process that keeps the leases has ended (pid {self.pid}, status {self._process.returncode}): they run out "
            "unless another is started"
        )

    def close(self) -> None:
        """Ends it. Nothing is given back, but the members of consumed queues are left."""
        if os.getpid() != self._pid:
            self._sock.close()  # it is our parent's
            return
        if self._keyed and not self._died:
            self._send(Close())
            try:
                self._sock.settimeout(CLOSE_S)
                self._sock.sendall(self._out)
                self._process.wait(CLOSE_S)
            except (OSError, subprocess.TimeoutExpired):
                pass
        self._died = True
        # Before the socket: at the end of that it would take us for dead, and give back what we have.
        self._process.kill()
        self._process.wait()
        self._sock.close()

    def _send(self, order: Order) -> None:
        self._out += to_line(order)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except OSError:
            pass  # it has to read first, or it is dead, which its end of file tells


def _travelling(broker: Broker) -> str:
    """A broker as text for a private socket: its URL may hold a password, its options an object of the user's."""
    nodes = broker.cluster.nodes if broker.cluster else None
    try:
        packed = pickle.dumps((broker.url, broker.timeout_s, broker.client_name, broker.options, nodes))
    except Exception as exc:
        raise ConfigError(
            f"the options of the broker {broker.safe_url} can't be given to the process that keeps leases: {exc}. Use a "
            "credential provider, and other options, that can be pickled"
        ) from exc
    return base64.b64encode(packed).decode()


def unpack_broker(text: str) -> Broker:
    """The other half of ``_travelling``."""
    url, timeout_s, client_name, options, nodes = pickle.loads(base64.b64decode(text))
    broker = Broker(url, timeout_s=timeout_s, client_name=client_name, options=options)
    if broker.cluster is not None:
        broker.cluster.nodes = nodes
    return broker


def _import_path() -> dict[str, str]:
    """Lets the keeper find the modules that this process finds, wherever the command line or a program has put them."""
    return {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path), "PYTHONSAFEPATH": "1"}


def _python() -> str:
    """An interpreter, also inside a server (uWSGI, mod_wsgi) whose ``sys.executable`` is none."""
    if re.fullmatch(r"(python|pypy)[\d.]*[a-z]*", os.path.basename(sys.executable or ""), re.IGNORECASE):
        return sys.executable
    for candidate in (os.path.join(sys.exec_prefix, "bin", "python3"), shutil.which("python3")):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise ConfigError("no Python interpreter was found to keep leases with: put python3 on PATH")
