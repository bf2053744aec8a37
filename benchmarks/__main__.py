"""The benchmark's command line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from . import page
from .bench import Bench, Contestant, Entry
from .contestants import OURS, PEERS, celery, peers
from .processes import ROOT, BenchmarkFailed, stop
from .report import as_text, target_rows, workload_rows
from .results import Results
from .server import awake_cpus, server
from .targets import outcomes
from .venvs import NotInstalled
from .workloads import Workload
from .workloads.all import CELERY, QUICK, WORKLOADS

PAGE = ROOT / "docs" / "benchmarks"


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def about(bench: Bench, contestants: Sequence[Contestant]) -> dict[str, dict[str, object]]:
    """Versions and settings of all, as each finds them in its own environment."""
    found: dict[str, dict[str, object]] = {}
    for one in contestants:
        with bench.producer(Entry(one, one.name)) as produce:
            answer = produce("about")
        found[one.name] = {
            "title": one.title,
            "peer": one.peer,
            "versions": answer["versions"],
            "settings": answer["settings"],
        }
    return found


def measure(
    bench: Bench, results: Results, workloads: Sequence[Workload], contestants: Sequence[Contestant], rounds: int
) -> None:
    """All rounds of one workload, then the next: what is compared is measured in the same minutes."""
    for workload in workloads:
        entries = workload.entries(contestants)
        if not entries:
            continue
        results.order[workload.name] = [entry.label for entry in entries]
        done = results.rounds.setdefault(workload.name, [])
        failures = results.failures.setdefault(workload.name, {})
        began = time.monotonic()
        for turn in range(max(1, round(rounds * workload.rounds))):
            progress(f"{workload.title}: round {turn + 1}")
            # Forwards, then backwards: A B C, C B A. Who has failed once stays out.
            order = [entry for entry in entries if entry.label not in failures][:: -1 if turn % 2 else 1]
            done.append(workload.run(bench, order, failures))
        results.seconds[workload.name] = round(time.monotonic() - began, 1)
    progress("")


def versions_of(server_version: str) -> dict[str, str]:
    return {"python": platform.python_version(), "redis-server": server_version}


def options_of() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measures streamtask against bare programs and other task frameworks."
    )
    names, celery_names = (",".join(one.name for one in some) for some in (WORKLOADS, CELERY))
    parser.add_argument(
        "--only",
        metavar="A,B",
        help=f"these workloads of {names}; all with --peers, else {','.join(QUICK)}. With --celery of {celery_names}",
    )
    parser.add_argument(
        "--peers", metavar="A,B", help=f"other frameworks too, 'all' or some of: {','.join(PEERS)}; installs them"
    )
    parser.add_argument(
        "--celery",
        nargs="?",
        const="",
        metavar="PYTHON",
        help="instead: Celery on our transport against Celery on kombu's redis transport, "
        "both run by this interpreter (default: by one in an environment that is made for them)",
    )
    parser.add_argument("--rounds", type=int, help="how often all are measured in turn (5; 1 with --smoke)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it works, not how fast it is")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures to this file")
    parser.add_argument("--write", action="store_true", help=f"write tables and pictures to {PAGE.relative_to(ROOT)}")
    parser.add_argument("--redis-server", metavar="PATH", help="which server to start (default: as embedded://)")
    options = parser.parse_args()
    if options.celery is not None:
        names = celery_names
        if options.peers:
            parser.error("--celery is a run of its own, without --peers")
    if options.only and (unknown := set(options.only.split(",")) - set(names.split(","))):
        parser.error(f"--only: no workload {', '.join(sorted(unknown))}; there are {names}")
    options.peers = list(PEERS) if options.peers == "all" else options.peers.split(",") if options.peers else []
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"--peers: no adapter for {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if options.rounds is None:
        options.rounds = 1 if options.smoke else 5
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return parser, options


def workloads_of(options: argparse.Namespace) -> list[Workload]:
    catalogue = WORKLOADS if options.celery is None else CELERY
    names = [one.name for one in catalogue]
    if options.only:
        names = options.only.split(",")
    elif options.celery is None and not options.peers and not options.smoke:
        names = list(QUICK)
    return [one for one in catalogue if one.name in names]


def main() -> int:
    parser, options = options_of()
    sys.path.insert(0, str(ROOT))
    from streamtask.errors import EmbeddedServerError
    from streamtask.redis.embedded import find_server

    if options.redis_server:
        os.environ["STREAMTASK_REDIS_SERVER"] = options.redis_server
    try:
        binary, server_version = find_server()
    except EmbeddedServerError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, stop)
    chosen = workloads_of(options)
    contestants, missing = list(OURS), {}
    if options.celery is None:
        others, missing = peers(options.peers, progress)
        contestants += others
    else:
        try:
            contestants = celery(options.celery, progress)
        except NotInstalled as error:
            print(f"error: Celery could not be installed: {error}", file=sys.stderr)
            return 1
    results = Results()
    folder = Path(tempfile.mkdtemp(prefix="streamtask-bench-"))
    began = time.monotonic()
    try:
        with awake_cpus() as idle, server(binary, folder) as client:
            bench = Bench(folder, client, 0.01 if options.smoke else 1.0, 0.2 if options.smoke else 1.0)
            results.about = {
                "versions": versions_of(server_version),
                "system": f"{platform.system()} {platform.machine()}",
                "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                "idle_cpus": idle,
                "rounds": options.rounds,
                "smoke": options.smoke,
                "contestants": about(bench, contestants),
                "missing": missing,
            }
            measure(bench, results, chosen, contestants, options.rounds)
    except BenchmarkFailed as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results.about["seconds"] = round(time.monotonic() - began, 1)
    show(results, chosen)
    if options.json:
        options.json.write_text(json.dumps(results.as_json(), indent=1) + "\n")
    if options.write:
        page.write(results, chosen, PAGE, page.ALL if options.celery is None else page.CELERY)
    return 0


def show(results: Results, workloads: Sequence[Workload]) -> None:
    facts = results.about
    print(", ".join(f"{name} {number}" for name, number in facts["versions"].items()))
    print(f"{facts['system']}, {facts['cpus']} CPUs; idle CPUs {facts['idle_cpus']}")
    print(f"{facts['rounds']} rounds, {facts['seconds']:.0f} s, one redis-server on 127.0.0.1, no persistence")
    for name, why in facts["missing"].items():
        print(f"{name}: {why}")
    if facts["smoke"]:
        print("smoke: these sizes are too small for conclusions")
    for workload in workloads:
        if workload.name in results.rounds:
            print(f"\n{workload.title} (medians)\n{as_text(workload_rows(results, workload.name))}")
    if found := outcomes(results, results.peers()):
        print(f"\nstreamtask / what it is compared with: median of the rounds' ratios\n{as_text(target_rows(found))}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
