"""Gets the suites and runs their files, each in a pytest process of its own against a redis-server of its own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tests.fix_redis import NONE_FOUND, RedisServer, server_binaries
from tests.helpers import MARK, ROOT, is_alive, popen, wait_until

from .plugin import PART, REDIS_ALIAS, RESULTS, SUITE, TEST_TIMEOUT

CACHE = ROOT / ".conformance"
CELERY_LEFT_OUT = ("test_backend.py",)  # it needs an account with a cloud provider
SETTINGS_FILES = (("setup.cfg",), ("pyproject.toml",))
TRANSPORT = "streamtask.transport:Transport"
KOMBU_FILE = Path(__file__).with_name("kombu_generic.py")
BROKERS = ("redis", "streamtask")

JOBS = 6
"""Files at a time: the suites sleep and wait most of the time."""
TEST_TIMEOUT_S = 180
FILE_TIMEOUT_S = 600
DOWNLOAD_TIMEOUT_S = 180


class NoSuite(Exception):
    """The tests can't be had."""


@dataclass
class Test:
    name: str
    outcome: str
    """passed, failed, error, skipped, xfailed, xpassed."""
    why: str = ""
    seconds: float = 0


@dataclass
class FileResult:
    """What became of one file of a suite."""

    suite: str
    name: str
    tests: dict[str, Test] = field(default_factory=dict)
    seconds: float = 0
    logs: list[Path] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        return Counter(test.outcome for test in self.tests.values())

    def add(self, test: Test) -> None:
        """A test may have two outcomes, its own and its teardown's: the worse one counts."""
        known = self.tests.get(test.name)
        if known is None or known.outcome not in ("failed", "error"):
            self.tests[test.name] = test


@dataclass(frozen=True)
class Chosen:
    """What one pytest process runs: a file, or those of its tests that ``-k`` selects, or the ``part``-th of ``parts``."""

    suite: str
    name: str
    select: str = ""
    part: int = 1
    parts: int = 1


# --- the suites --------------------------------------------------------------------------------------------------


def suite_folder(package: str) -> Path:
    """Where the tests of the installed version of kombu or celery lie, downloaded if need be."""
    version = importlib.metadata.version(package)
    folder = CACHE / f"{package}-{version}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="download-") as temporary:
        argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        argv += ["--no-binary", ":all:", "--dest", temporary, f"{package}=={version}"]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise NoSuite(f"pip could not download {package} {version} within {DOWNLOAD_TIMEOUT_S} s") from None
        archives = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode or not archives:
            text = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise NoSuite(f"the tests of {package} {version} can't be downloaded; they need the network once:\n{text}")
        # Only the tests and their settings: the package itself is the installed one.
        unpacked = Path(temporary, "unpacked")
        top = f"{package}-{version}"
        with tarfile.open(archives[0]) as archive:
            for member in archive.getmembers():
                parts = Path(member.name).parts
                wanted = parts[:1] == (top,) and (parts[1:2] == ("t",) or parts[1:] in SETTINGS_FILES)
                if wanted and member.isfile() and ".." not in parts:
                    source = archive.extractfile(member)
                    assert source is not None
                    target = unpacked.joinpath(*parts[1:])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file)
        if not (unpacked / "t" / "integration").is_dir():
            raise NoSuite(f"the sdist of {package} {version} has no t/integration")
        # In one step: two runs at a time may both have come here.
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def suite_files(suite: str) -> list[str]:
    """The names of the suite's files that are to run."""
    if suite == "kombu":
        return [KOMBU_FILE.name]
    files = sorted(path.name for path in (suite_folder("celery") / "t" / "integration").glob("test_*.py"))
    return [name for name in files if name not in CELERY_LEFT_OUT]


# --- running -----------------------------------------------------------------------------------------------------


@dataclass
class Limits:
    test_s: float = TEST_TIMEOUT_S
    file_s: float = FILE_TIMEOUT_S


@contextlib.contextmanager
def own_server() -> Iterator[RedisServer]:
    binaries = server_binaries()
    if not binaries:
        raise NoSuite(NONE_FOUND)
    with RedisServer(list(binaries.values())[-1]) as server:
        yield server


class _Run:
    """One pytest process, its redis-server, and all that they start."""

    def __init__(self, chosen: Chosen, broker: str, limits: Limits, stopped: threading.Event) -> None:
        self.chosen, self.broker, self.limits, self.stopped = chosen, broker, limits, stopped
        self.mark = f"{os.getpid()}-{os.urandom(8).hex()}"

    def __call__(self) -> FileResult:
        result = FileResult(self.chosen.suite, self.chosen.name)
        if self.stopped.is_set():
            return result
        folder = suite_folder(self.chosen.suite)
        logs = CACHE / "logs" / self.broker
        logs.mkdir(parents=True, exist_ok=True)
        number = f"-{self.chosen.part}" if self.chosen.parts > 1 else ""
        log = logs / f"{self.chosen.suite}-{Path(self.chosen.name).stem}{number}.log"
        result.logs.append(log)
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="conformance-"))
            server = stack.enter_context(own_server())
            nobody = stack.enter_context(socket.socket())
            nobody.bind(("127.0.0.1", 0))  # and never listens: who connects is refused
            results = Path(temporary, "results")
            results.touch()
            environment = self._environment(server.port, nobody.getsockname()[1])
            environment |= {RESULTS: str(results), "TMPDIR": temporary}
            began = time.monotonic()
            with open(log, "wb") as output:
                process = popen(
                    self._arguments(),
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            try:
                ended = self._wait(process, began + self.limits.file_s)
            finally:
                left = self._end(process)
            result.seconds = time.monotonic() - began
            _read(result, results, log, f"pytest ended {ended}, exit status {process.returncode}")
            if process.returncode not in (0, 1) and not result.counts["error"]:
                result.add(Test("(process)", "error", f"pytest ended {ended}, exit status {process.returncode}"))
        if left:
            result.add(Test(f"(processes{number})", "error", "left running, now killed: " + "; ".join(left)))
        return result

    def _arguments(self) -> list[str]:
        argv = [sys.executable, "-m", "pytest", "-v", "-rA", "--durations=10", "--color=no", "-p", "no:cacheprovider"]
        argv += ["-p", "pytest_timeout", "-p", "tests.conformance.plugin"]
        if self.chosen.suite == "kombu":
            # Without the conftest files above our module; class names as in this repository.
            argv += ["-c", "setup.cfg", "--noconftest", "-o", "python_classes=Test*", "--import-mode=importlib"]
            argv.append(str(KOMBU_FILE))
        else:
            argv += ["-c", "pyproject.toml", "-p", "celery.contrib.pytest", f"t/integration/{self.chosen.name}"]
        return [*argv, "-k", self.chosen.select] if self.chosen.select else argv

    def _environment(self, port: int, nobody: int) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "CELERY"))}
        scheme, alias = self.broker, ""
        if self.broker == "streamtask" and self.chosen.name == "test_connection_recovery.py":
            # It skips itself unless the scheme is exactly redis. So that it runs on ours, redis means ours here.
            scheme, alias = "redis", TRANSPORT
        return environment | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            # Only what is named on the command line: no reruns by somebody's pytest-rerunfailures, for one.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            MARK: self.mark,
            SUITE: self.chosen.suite,
            PART: f"{self.chosen.part}/{self.chosen.parts}",
            TEST_TIMEOUT: str(self.limits.test_s),
            REDIS_ALIAS: alias,
            "TEST_BROKER": f"{scheme}://127.0.0.1:{port}/0",
            "TEST_NOBODY": f"{scheme}://127.0.0.1:{nobody}/0",
            "TEST_BACKEND": f"redis://127.0.0.1:{port}/0",
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(port),
            "WORKER_LOGLEVEL": "INFO",
        }

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> str:
        while not self.stopped.is_set():
            try:
                process.wait(max(0.0, min(0.5, deadline - time.monotonic())))
                return "by itself"
            except subprocess.TimeoutExpired:
                if time.monotonic() >= deadline:
                    return f"not within {self.limits.file_s:g} s and was killed"
        return "because the run was stopped"

    def _end(self, process: subprocess.Popen[bytes]) -> list[str]:
        """Kills what is left; returns the commands of what outlived a pytest process that ended by itself."""
        outlived: dict[int, str] = {}
        if process.poll() is not None:
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not self._running(), timeout=8, poll=0.1)
            outlived = self._running()
        else:
            process.kill()
        process.wait()
        for pid in self._running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self._running(), timeout=5, poll=0.1)
        return list(outlived.values())

    def _running(self) -> dict[int, str]:
        """Pid and command of what carries our mark in its environment."""
        found: dict[int, str] = {}
        wanted = f"{MARK}={self.mark}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes() and is_alive(int(folder.name)):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(folder.name)] = command.strip()[:300]
        return found


def _read(result: FileResult, results: Path, log: Path, ending: str) -> None:
    collected: list[str] = []
    started = ""
    for line in results.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the last line of a killed process
            record = json.loads(line)
            if "collected" in record:
                collected = [_short(name) for name in record["collected"]]
            elif "started" in record:
                started = _short(record["started"])
            else:
                result.add(Test(_short(record["test"]), record["outcome"], record["why"], record["seconds"]))
    for name in collected:
        if name not in result.tests:
            what = "did not end" if name == started else "was not run"
            result.tests[name] = Test(name, "error", f"{what}: {ending}")
    if not result.tests:
        tail = log.read_text(errors="replace")[-2000:]
        result.add(Test("(collection)", "error", f"{ending}\n{tail}"))


def _short(nodeid: str) -> str:
    """``test_x.py::test_y[1]`` becomes ``test_y[1]``."""
    return nodeid.partition("::")[2] or nodeid


def run(
    chosen: Sequence[Chosen],
    broker: str,
    *,
    jobs: int = JOBS,
    limits: Limits | None = None,
    done: Callable[[FileResult], None] = lambda result: None,
) -> list[FileResult]:
    """Runs the chosen, ``jobs`` at a time; ``done`` is called after each. The parts of a file become one result."""
    for suite in {one.suite for one in chosen}:
        suite_folder(suite)  # once, before the threads start
    stopped = threading.Event()
    found: dict[tuple[str, str], FileResult] = {}
    with ThreadPoolExecutor(jobs, "conformance") as pool:
        try:
            futures = [pool.submit(_Run(one, broker, limits or Limits(), stopped)) for one in chosen]
            for future in as_completed(futures):
                result = future.result()
                done(result)
                whole = found.setdefault((result.suite, result.name), FileResult(result.suite, result.name))
                whole.seconds += result.seconds
                whole.logs += result.logs
                for test in result.tests.values():
                    whole.add(test)
        finally:
            stopped.set()
    return [found[key] for key in dict.fromkeys((one.suite, one.name) for one in chosen)]
