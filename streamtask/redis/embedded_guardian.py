"""The process that owns the embedded redis-server: starts it, restarts it after a crash, stops it after the last user.

Run as a plain script in an interpreter of its own (``embedded.join`` does), so it uses the standard library alone and
starts in some 20 ms. Arguments: data directory, socket path, redis-server, a file descriptor for status lines.

Who is alive is told by file locks, which the kernel frees at any death, also at kill -9:

- ``guardian.lock``: held by this process;
- ``server.lock``: inherited by redis-server, and held by nobody else, so it is free only when the server (and a child
  that rewrites its file) is gone, whoever started it: there are never two servers on one directory;
- ``users.lock``: shared by the users; granted to us alone when the last of them has gone. We keep it until the server
  has stopped: a newcomer waits for exactly that.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable

MAX_FAILED_STARTS = 5
LOG_LIMIT = 4 << 20
STOP_TIMEOUT = 60.0


def open_lock(data_dir: str, name: str) -> int:
    return os.open(os.path.join(data_dir, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def try_lock(fd: int, operation: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class ForeignServer(Exception):
    """Who listens on our socket is another user's process."""


def refuse_foreign(connection: socket.socket) -> None:
    """Raises ``ForeignServer`` where another user listens at the other end; to be called before a word is sent. Only Linux
    tells; elsewhere the folders above the socket alone keep others away."""
    if hasattr(socket, "SO_PEERCRED"):
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        uid = struct.unpack("3i", peer)[1] & 0xFFFFFFFF
        if uid != os.geteuid():
            raise ForeignServer(f"a process of another user (uid {uid}) listens there")


def ask(socket_path: str, command: bytes, timeout: float = 1.0) -> bytes:
    """The start of the server's reply; empty when nobody answers. Raises ``ForeignServer``."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(socket_path)
            refuse_foreign(connection)
            connection.sendall(command + b"\r\n")
            return connection.recv(4096)
    except OSError:
        return b""


def is_ready(socket_path: str, timeout: float = 1.0) -> bool:
    """Any answer but "I still load my data": a server without a free connection is alive too."""
    reply = ask(socket_path, b"PING", timeout)
    return bool(reply) and not reply.startswith(b"-LOADING")


def server_arguments(binary: str, data_dir: str, socket_path: str) -> list[str]:
    options = {
        "dir": data_dir,
        "logfile": os.path.join(data_dir, "redis.log"),
        "daemonize": "no",
        "port": "0",  # the unix socket alone: its folder decides who may connect
        "unixsocket": socket_path,
        "unixsocketperm": "600",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    return [binary, *(part for name, value in options.items() for part in (f"--{name}", value))]


class Guardian:
    def __init__(self, data_dir: str, socket_path: str, binary: str, status_fd: int) -> None:
        self.data_dir, self.socket_path, self.binary = data_dir, socket_path, binary
        self.status_fd = status_fd
        self.mutex = threading.Lock()
        self.stopping = False
        self.server_pid = 0

    def tell(self, line: str) -> None:
        """To the process that started us; it may be gone."""
        try:
            os.write(self.status_fd, line.encode() + b"\n")
        except OSError:
            pass

    def run(self) -> None:
        guardian_fd = open_lock(self.data_dir, "guardian.lock")
        if not try_lock(guardian_fd):
            return  # the pipe's end tells
        os.ftruncate(guardian_fd, 0)
        os.write(guardian_fd, b"%d\n" % os.getpid())  # for people and tests; nothing relies on it
        threading.Thread(target=self.stop_after_last_user, daemon=True).start()
        failed = 0
        while failed < MAX_FAILED_STARTS and not self.stopping:
            server_fd = open_lock(self.data_dir, "server.lock")
            was_ready, started = True, time.monotonic()
            if try_lock(server_fd):
                was_ready = self.serve(server_fd)
            else:
                self.adopt(server_fd)
                os.close(server_fd)
            if was_ready:
                failed = 0
                if time.monotonic() - started < 1 and not self.stopping:
                    time.sleep(0.1)  # one that crashes as soon as it is up is not to burn the machine
            elif self.status_fd >= 0:
                break  # the first start: somebody waits for the error
            else:
                failed += 1
                time.sleep(min(0.1 * 2**failed, 5))
        # In this order: who gets users.lock must find no guardian.
        os.close(guardian_fd)
        os._exit(0)

    def serve(self, server_fd: int) -> bool:
        """Starts the server and returns when it is gone, with whether it was ever ready."""
        log = os.path.join(self.data_dir, "redis.log")
        try:
            if os.path.getsize(log) > LOG_LIMIT:
                os.replace(log, log + ".1")
        except OSError:
            pass
        with self.mutex:
            if self.stopping:
                return True
            try:
                process = subprocess.Popen(
                    server_arguments(self.binary, self.data_dir, self.socket_path),
                    pass_fds=(server_fd,),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    # A wrong option or a missing library is said here, before there is a log file.
                    stderr=sys.stderr,
                )
            except OSError as error:
                self.tell(f"error can't run {self.binary}: {error}")
                return False
            self.server_pid = process.pid
        os.close(server_fd)
        ready = self.wait_ready(lambda: process.poll() is not None)
        if ready:
            gone_fd = open_lock(self.data_dir, "server.lock")
            fcntl.flock(gone_fd, fcntl.LOCK_EX)
            os.close(gone_fd)
        # Not before the zombie is reaped may its pid belong to somebody else: so forget it under the same mutex.
        with self.mutex:
            process.wait()
            self.server_pid = 0
        if not ready:
            self.tell(f"error it ended at once with exit status {process.returncode}")
        return ready

    def adopt(self, server_fd: int) -> None:
        """Watches a server whose guardian was killed, until it is gone."""
        if self.wait_ready(lambda: try_lock(server_fd)):
            for line in ask(self.socket_path, b"INFO server").split(b"\r\n"):
                if line.startswith(b"process_id:"):
                    with self.mutex:
                        self.server_pid = int(line[11:])
                        stopping = self.stopping
                    if stopping:
                        self.stop(signal.SIGTERM)
        fcntl.flock(server_fd, fcntl.LOCK_EX)
        with self.mutex:
            self.server_pid = 0

    def wait_ready(self, gone: Callable[[], bool]) -> bool:
        last_told = time.monotonic()
        while not gone():
            if is_ready(self.socket_path):
                if self.status_fd >= 0:
                    self.tell("ready")
                    os.close(self.status_fd)
                    self.status_fd = -1
                return True
            if time.monotonic() - last_told > 1 and self.status_fd >= 0:
                last_told = time.monotonic()
                if ask(self.socket_path, b"PING").startswith(b"-LOADING"):
                    self.tell("loading")
            time.sleep(0.003)
        return False

    def stop_after_last_user(self) -> None:
        users_fd = open_lock(self.data_dir, "users.lock")
        fcntl.flock(users_fd, fcntl.LOCK_EX)
        with self.mutex:
            self.stopping = True
        # By pid and not by the socket: somebody may have removed the directory and started anew in its place.
        try:
            ours = os.path.samestat(os.fstat(users_fd), os.stat(os.path.join(self.data_dir, "users.lock")))
        except OSError:
            ours = False
        # A clean end, with the file written and synced. It also unlinks the socket, which may be another server's when
        # the directory is no longer ours; what was written is safe from SIGKILL too.
        self.stop(signal.SIGTERM if ours else signal.SIGKILL)
        time.sleep(STOP_TIMEOUT)
        self.stop(signal.SIGKILL)

    def stop(self, number: int) -> None:
        with self.mutex:
            if self.server_pid:
                try:
                    os.kill(self.server_pid, number)
                except ProcessLookupError:
                    pass


def main() -> None:
    data_dir, socket_path, binary, status_fd = sys.argv[1:5]
    # The process that starts us waits for this one, and has no child afterwards that it would have to reap.
    if os.fork():
        os._exit(0)
    os.chdir("/")
    os.umask(0o077)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        Guardian(data_dir, socket_path, binary, int(status_fd)).run()
    finally:
        sys.stderr.flush()


if __name__ == "__main__":
    main()
