"""Logging of the command line: to stderr, one line per event, as text or as JSON."""

from __future__ import annotations

import datetime as dt
import json
import logging
import sys
from typing import Any

from ..text import ADDED, FIELDS, MOST_LINES, printable, short

LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("text", "json")

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", ADDED}


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What the call gave as ``extra=``, and of which message it is."""
    found = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    return {name: value for name, value in found.items() if not (value is None and name in FIELDS)}


def _told(record: logging.LogRecord) -> dict[str, Any]:
    """What a line of text has beside its message. Our own messages have it all, and for others task and id say enough."""
    own = record.name.startswith("streamtask.")
    left_out = FIELDS if own else set(record.__dict__.get(ADDED, ())) - {"task", "id"}
    return {name: value for name, value in _extra(record).items() if name not in left_out}


def _time(record: logging.LogRecord) -> str:
    return dt.datetime.fromtimestamp(record.created, dt.timezone.utc).isoformat(timespec="milliseconds")


def _plain(value: Any) -> str:
    try:
        return str(value)
    except Exception as exc:
        return f"<{type(value).__name__} without text: {exc!r}>"


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    text = record.exc_text or (formatter.formatException(record.exc_info) if record.exc_info else "")
    return printable(text, MOST_LINES)


class TextFormatter(logging.Formatter):
    """``TIME LEVEL logger: message key=value``. Only a traceback takes further lines, which are indented."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_plain(value)}" for name, value in _told(record).items())
        message = printable(record.getMessage() + fields, MOST_LINES, lines=False)
        line = f"{_time(record)} {record.levelname:<7} {record.name}: {message}"
        if text := _traceback(self, record):
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
        if text := _traceback(self, record):
            event["exception"] = text
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


def name_tasks() -> None:
    """From now on records made within a body say which message it runs, whatever handler they go to: those of the app, too."""
    from ..request import TaskFilter

    known = [logging.root, *logging.Logger.manager.loggerDict.values()]
    for handler in {handler for one in known if isinstance(one, logging.Logger) for handler in one.handlers}:
        handler.addFilter(TaskFilter())
