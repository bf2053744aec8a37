"""The lowest versions of what streamtask needs, as pip takes them: ``make test-lowest`` installs exactly these."""

from __future__ import annotations

import re
from importlib import metadata

EXTRAS = ("celery", "embedded", "reload", "testing")


def lowest(requirements: list[str]) -> dict[str, str]:
    """The lower bounds among requirements as packages have them; of extras those that users choose."""
    found = {}
    for requirement in requirements:
        wanted = re.search(r"""extra\s*==\s*['"]([^'"]+)""", requirement)
        bound = re.match(r"([\w.-]+)(?:\[[^\]]*\])?[^;]*?>=\s*([\w.]+)", requirement)
        if bound is not None and (wanted is None or wanted[1] in EXTRAS):
            found[bound[1]] = bound[2]
    return found


if __name__ == "__main__":
    here = {package.name for package in metadata.distributions()}  # some are for other platforms only
    for name, version in lowest(metadata.requires("streamtask") or []).items():
        if name in here:
            print(f"{name}=={version}")
