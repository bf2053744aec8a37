"""A virtual environment for each peer, made again when its list of requirements changes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .processes import ROOT

FOLDER = ROOT / ".bench" / "venvs"
REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
INSTALL_TIMEOUT_S = 600


class NotInstalled(Exception):
    """Why a peer can't take part."""


def python_of(name: str) -> str:
    """The interpreter of the peer's environment, which is installed first if need be."""
    requirements = REQUIREMENTS / f"{name}.txt"
    text = requirements.read_text()
    base = interpreter(text)
    wanted = hashlib.sha256(f"{base}\n{text}".encode()).hexdigest()
    folder = FOLDER / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    _run([base, "-m", "venv", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)])
    stamp.write_text(wanted)
    return str(python)


def _run(argv: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            argv, env=environment, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(str(error)) from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalled((errors or done.stderr.splitlines() or ["pip failed"])[-1])


def interpreter(requirements: str) -> str:
    """Ours, unless the first line asks for a newer one than that."""
    match = re.match(r"# needs python 3\.(\d+)", requirements)
    least = int(match[1]) if match else 0
    if sys.version_info >= (3, least):
        return sys.executable
    for minor in range(least, least + 5):
        for candidate in (shutil.which(f"python3.{minor}"), *_of_pyenv(minor)):
            if candidate and _works(candidate, minor):
                return candidate
    raise NotInstalled(f"needs Python 3.{least} or newer, and none was found")


def _of_pyenv(minor: int) -> list[str]:
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return [str(one) for one in sorted(root.glob(f"versions/3.{minor}.*/bin/python3.{minor}"))]


def _works(candidate: str, minor: int) -> bool:
    """pyenv has commands on the PATH for versions that are not chosen: they fail."""
    code = f"import sys, ensurepip, venv; sys.exit(sys.version_info[:2] != (3, {minor}))"
    return subprocess.run([candidate, "-c", code], capture_output=True, check=False).returncode == 0
