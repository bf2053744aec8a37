"""The private redis-server of a run: TCP on the loopback, a random port, no persistence."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from .processes import BenchmarkFailed, log_of, running, wait_for


@contextlib.contextmanager
def server(binary: str, folder: Path) -> Iterator[Any]:
    """A client of it."""
    for _ in range(5):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        argv = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        with running("redis", [*argv, "--save", "", "--appendonly", "no"], folder) as process:
            client: Any = redis.Redis(port=port)

            def answers(client: Any = client, pid: int = process.pid) -> bool:
                with contextlib.suppress(redis.ConnectionError):
                    return int(client.info("server")["process_id"]) == pid
                return False

            try:
                wait_for(answers, 20, "an answer of Redis", process)
            except BenchmarkFailed:
                # Between our look and its bind, another process may have taken the port.
                client.close()
                continue
            try:
                yield client
            finally:
                client.close()
            return
    raise BenchmarkFailed(f"the redis-server {binary} did not start\n{log_of(folder, 'redis')}")


def cpu_of(client: Any) -> float:
    """CPU seconds that the server has used."""
    info = client.info("cpu")
    return float(info["used_cpu_sys"]) + float(info["used_cpu_user"])


def commands_of(client: Any) -> int:
    """Commands that the server has run, those inside of scripts as well."""
    return int(client.info("stats")["total_commands_processed"])


def used_memory(client: Any) -> int:
    """Bytes that the server has taken, without its clients' buffers, which come and go."""
    info = client.info("memory")
    return int(info["used_memory"]) - int(info.get("mem_clients_normal", 0))


@contextlib.contextmanager
def awake_cpus() -> Iterator[str]:
    """Keeps idle CPUs from halting, where that is allowed; says whether it is."""
    try:
        # Unbuffered: the kernel keeps the request as long as the file is open.
        file = open("/dev/cpu_dma_latency", "wb", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        yield f"may halt (/dev/cpu_dma_latency: {error.strerror})"
        return
    with file:
        try:
            file.write(struct.pack("=i", 0))
        except OSError as error:
            held = f"may halt (/dev/cpu_dma_latency: {error.strerror})"
        else:
            held = "kept awake (/dev/cpu_dma_latency held at 0)"
        yield held
