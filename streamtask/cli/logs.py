"""Logging of the command line: to stderr, one line per event, as text or as JSON."""

from __future__ import annotations

import datetime as dt
import json
import logging
import sys
from typing import Any

from ..text import MOST_LINES, printable, short

LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("text", "json")

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What the call gave as ``extra=``."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _time(record: logging.LogRecord) -> str:
    return dt.datetime.fromtimestamp(record.created, dt.timezone.utc).isoformat(timespec="milliseconds")


def _plain(value: Any) -> str:
    try:
        return str(value)
    except Exception as exc:
        return f"<{type(value).__name__} without text: {exc!r}>"


class TextFormatter(logging.Formatter):
    """``TIME LEVEL logger: message key=value``. Only a traceback takes further lines, which are indented."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_plain(value)}" for name, value in _extra(record).items())
        message = printable(record.getMessage() + fields, MOST_LINES, lines=False)
        line = f"{_time(record)} {record.levelname:<7} {record.name}: {message}"
        if record.exc_info:
            text = printable(record.exc_text or self.formatException(record.exc_info), MOST_LINES)
            line += "".join(f"\n    {part}" for part in text.splitlines())
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, process, what was given as ``extra``, and exception."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": short(record.getMessage(), MOST_LINES),
            "process": record.process,
        }
        for name, value in _extra(record).items():
            event.setdefault(name, value)
        if record.exc_info:
            event["exception"] = short(record.exc_text or self.formatException(record.exc_info), MOST_LINES)
        return json.dumps(event, default=_plain)


def set_up(level: str = "info", form: str = "text") -> None:
    """Sends all of this process's logging to stderr, in place of what was set up before.

    ``level``: one of ``LEVELS``, the least that is shown; ``form``: one of ``FORMATS``. Raises ValueError for others.
    """
    if level.lower() not in LEVELS or form not in FORMATS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)} and form one of {', '.join(FORMATS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
