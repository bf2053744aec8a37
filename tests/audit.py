"""``make lint`` asks here whether what streamtask brings along has known vulnerabilities: pip-audit, on what users get.

What it answers when it can't know looks like a clean bill: packages that its source of data does not have are left out of
the sum. So nothing is taken for checked but what was: where no data can be reached, or of a package none, it is said, and
is no failure. Exit status 1 only for a vulnerability that is known.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

IGNORED: dict[str, str] = {}
"""Vulnerabilities that don't concern us, by id, and why."""

TIMEOUT_S = 120


def brought_along(name: str = "streamtask", extras: tuple[str, ...] = ("all",)) -> dict[str, str]:
    """Name and version of all that is installed because users install streamtask."""
    found: dict[str, str] = {}
    waiting = [(name, extras)]
    seen = set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            package = metadata.distribution(one[0])
        except metadata.PackageNotFoundError:
            continue  # of an extra, or of another platform
        if one[0] != name:
            found[one[0]] = package.version
        for line in package.requires or ():
            requirement, _, marker = line.partition(";")
            match = re.match(r"([\w.-]+)\s*(?:\[([^\]]*)\])?", requirement.strip())
            assert match is not None, line
            wanted = re.search(r"""extra\s*==\s*['"]([^'"]+)""", marker)
            if wanted is None or wanted[1] in one[1]:
                plain = re.sub(r"[-_.]+", "-", match[1]).lower()
                waiting.append((plain, tuple(filter(None, re.split(r"[,\s]+", match[2] or "")))))
    return found


def verdict(report: dict[str, Any]) -> tuple[int, list[str]]:
    """The exit status, and what to say, of what pip-audit has found."""
    packages = report["dependencies"]
    unknown = sorted(one["name"] for one in packages if "skip_reason" in one)
    said, status = [], 0
    for one in packages:
        for found in one.get("vulns", ()):
            names = {found["id"], *found.get("aliases", ())}
            if names.isdisjoint(IGNORED):
                status = 1
                mended = ", ".join(found.get("fix_versions", ())) or "none yet"
                said.append(f"{one['name']} {one['version']}: {found['id']} is known (mended in: {mended})")
    checked = len(packages) - len(unknown)
    if not checked:
        said.append("known vulnerabilities: NOT CHECKED, no data is served here")
    else:
        said.append(f"known vulnerabilities: {checked} packages checked" + (": none" if not status else ""))
        if unknown:
            said.append(f"known vulnerabilities: NOT CHECKED, not among the data: {', '.join(unknown)}")
    return status, said


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in sorted(brought_along().items())))
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "-r",
            str(wanted),
            "--no-deps",
            "--disable-pip",
            "--format",
            "json",
        ]
        try:
            done = subprocess.run(
                [*command, "--progress-spinner", "off", "--timeout", "10"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            report = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            print(f"known vulnerabilities: NOT CHECKED, no answer within {TIMEOUT_S} s")
            return 0
        except ValueError:
            # It says nothing on stdout where it could not ask.
            print("known vulnerabilities: NOT CHECKED:", (done.stderr.strip().splitlines() or ["no answer"])[-1])
            return 0
    status, said = verdict(report)
    print("\n".join(said))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
