"""Modules of the user's, imported by name, with errors that say where to look."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from types import ModuleType

from .errors import ConfigError
from .text import said, short

OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
LIBRARIES = tuple(sysconfig.get_paths()[kind] + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib"))


def import_named(name: str, asked: str) -> ModuleType:
    """The module of that name; ``asked`` says who named it. Raises ``ConfigError`` with the file and line that failed."""
    error: BaseException
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as exc:
        error = exc
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        raise ConfigError(
            f"there is no module {error.name!r} ({asked}): run from the folder that holds it, or install it"
        ) from None
    if isinstance(error, SyntaxError):
        what = f"{type(error).__name__}: {error.msg}"
    else:
        what = said(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {said(error)}"
    raise ConfigError(f"the module {name!r} ({asked}) can't be imported: {_place(error)}{short(what)}") from error


def run_and_imported(thing: object) -> str | None:
    """The file of the program's script, where that made ``thing`` and was imported a second time under its own name."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if main is None or file is None or not any(one is thing for one in list(vars(main).values())):
        return None
    path: str = os.path.abspath(file)
    for module in list(sys.modules.values()):
        other = getattr(module, "__file__", None)
        if module is not main and isinstance(other, str) and os.path.abspath(other) == path:
            return path
    return None


def _place(error: BaseException) -> str:
    """Where it was raised: the innermost line of the user's code, or of a library's where that alone is to be seen."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"in {error.filename}, line {error.lineno}: "
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(("<", OURS))]
    theirs = [one for one in frames if not one.filename.startswith(LIBRARIES)]
    for frame in reversed(theirs or frames):
        return f"in {frame.filename}, line {frame.lineno}: "
    return ""
