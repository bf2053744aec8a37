"""The command line of the suites: ``python -m tests.conformance``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .reference import PARTS, QUICK, REFERENCE
from .suites import BROKERS, JOBS, Chosen, FileResult, Limits, NoSuite, Test, run, suite_files

COLUMNS = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description="Runs kombu's and Celery's own test suites. The exit status is 1 if a test failed that passes "
        "with kombu's redis transport.",
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="of Celery's t/integration, or kombu_generic.py")
    parser.add_argument("--broker", choices=BROKERS, default="streamtask")
    parser.add_argument("--suite", choices=sorted(REFERENCE), help="one of them; both by default")
    parser.add_argument("--quick", action="store_true", help="the part that `make test` runs")
    parser.add_argument("-k", dest="select", default="", metavar="EXPRESSION", help="as pytest's")
    parser.add_argument("-j", dest="jobs", type=int, default=JOBS, metavar="JOBS", help=f"files at a time ({JOBS})")
    parser.add_argument("--test-timeout", type=float, default=Limits.test_s, metavar="SECONDS")
    parser.add_argument("--file-timeout", type=float, default=Limits.file_s, metavar="SECONDS")
    return parser.parse_args(argv)


def chosen_files(args: argparse.Namespace) -> list[Chosen]:
    suites = [args.suite] if args.suite else list(REFERENCE)
    if args.quick:
        chosen = [one for one in QUICK if one.suite in suites]
    else:
        chosen = [
            Chosen(suite, name, args.select, part, PARTS.get(name, 1))
            for suite in suites
            for name in suite_files(suite)
            for part in range(1, PARTS.get(name, 1) + 1)
        ]
        # The longest first, so that no job is left alone at the end.
        chosen.sort(key=lambda one: PARTS.get(one.name, 0), reverse=True)
    if args.files:
        names = {Path(file).name for file in args.files}
        known = sorted({one.name for one in chosen})
        if unknown := names.difference(known):
            sys.exit(f"error: no file {', '.join(sorted(unknown))}: there are {', '.join(known)}")
        chosen = [one for one in chosen if one.name in names]
    return chosen


# --- the verdict -------------------------------------------------------------------------------------------------


def worse_than_reference(result: FileResult, broker: str) -> list[Test]:
    """The tests that should have passed."""
    reference = REFERENCE[result.suite]
    # What kombu's redis transport fails is no excuse for ours.
    may_fail = reference.failed | reference.off if broker == "redis" else reference.off
    worse = []
    for test in result.tests.values():
        if test.outcome in ("failed", "error"):
            if test.name not in may_fail:
                worse.append(test)
        # Another version of the suite may skip others.
        elif test.outcome == "skipped" and reference.same_version() and test.name not in reference.skipped:
            worse.append(test)
    return worse


def table(results: Sequence[FileResult]) -> str:
    width = max(len(result.name) for result in results)
    lines = [f"{'file':{width}}" + "".join(f"{column:>9}" for column in COLUMNS) + f"{'seconds':>9}"]
    for suite in REFERENCE:
        of_suite = [result for result in results if result.suite == suite]
        for result in of_suite:
            counts = "".join(f"{result.counts[column]:9}" for column in COLUMNS)
            lines.append(f"{result.name:{width}}{counts}{result.seconds:9.0f}")
        if of_suite:
            sums = "".join(f"{sum(result.counts[column] for result in of_suite):9}" for column in COLUMNS)
            lines.append(f"{suite + ', in all':{width}}{sums}{sum(result.seconds for result in of_suite):9.0f}")
    return "\n".join(lines)


def failures(results: Sequence[FileResult]) -> str:
    lines = []
    for result in results:
        bad = [test for test in result.tests.values() if test.outcome in ("failed", "error")]
        lines += [f"{test.outcome.upper()} {result.name}::{test.name}: {last_line(test.why)}" for test in bad]
        if bad:
            lines.append(f"    the whole output: {', '.join(map(str, result.logs))}")
    return "\n".join(lines)


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return (lines[0] if lines else "")[:200]


def main(argv: Sequence[str] | None = None) -> int:
    args = options(argv)

    def done(result: FileResult) -> None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(result.counts.items()))
        print(f"{result.name}: {counts} in {result.seconds:.0f} s", flush=True)

    try:
        results = run(
            chosen_files(args),
            args.broker,
            jobs=args.jobs,
            limits=Limits(args.test_timeout, args.file_timeout),
            done=done,
        )
    except NoSuite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(results)}")
    if text := failures(results):
        print(f"\n{text}")
    worse = [(result, test) for result in results for test in worse_than_reference(result, args.broker)]
    if worse:
        print(f"\n{len(worse)} worse than they should be:")
        for result, test in worse:
            print(f"  {test.outcome} {result.name}::{test.name}")
    for suite, reference in REFERENCE.items():
        if not args.quick and not args.files and not args.select and args.suite in (None, suite):
            print(f"\n{suite} {reference.version} with kombu's redis transport: {reference}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
