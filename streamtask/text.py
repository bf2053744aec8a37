"""Text that comes from anywhere, made fit to be stored, sent, logged and shown."""

from __future__ import annotations

import contextlib
import logging
import traceback

from .errors import SoftTimeLimitExceeded

MOST = 2_000
"""Characters of one value in a log, a table or an error: messages, and what they are made of, are as long as a sender likes."""
MOST_LINES = 20_000
"""Characters of what is read as a whole: a traceback, the arguments of one message."""


def harmless(text: str) -> str:
    """A text that can be encoded: a lone surrogate, as JSON and ``surrogateescape`` let them in, becomes its escape."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def said(value: object) -> str:
    """What an exception, or anything else, says of itself, whatever its ``__str__`` does."""
    try:
        return harmless(str(value))
    except BaseException:
        return f"a {type(value).__name__} without a text"


def short(text: str, most: int = MOST) -> str:
    """The text, or its beginning and how many more characters there are."""
    more = len(text) - most
    return f"{text[:most]} ... ({more:,} more characters)" if more > 0 else text


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things: ``1 retry``, ``1,200 retries``. ``many``: the word for several, where it is not ``one`` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def printable(value: object, most: int = MOST, *, lines: bool = True) -> str:
    """Anything as text that shows what it is made of and does nothing: control characters (C0, C1), marks that turn the
    direction of writing, and whatever else is not seen become escapes; see also ``short``. ``lines``: a newline stays one."""
    try:
        text = value if type(value) is str else str(value)
    except BaseException:
        text = f"a {type(value).__name__} without a text"
    text = short(text, most)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in text)


FIELDS = ("reason", "task", "id", "key", "attempt", "error")
"""What our records of one message say of it, beside their text: formats of JSON, and handlers of other kinds, find it there."""
ADDED = "_streamtask"
"""The attribute of a record that names what ``TaskFilter`` has added to it."""


def logger(name: str) -> logging.Logger:
    """The logger of that name. Its lines are printable and short, whoever formats them: Celery, say, or an app. A
    configuration that names it not (``disable_existing_loggers``, the default of ``dictConfig``) does not silence it, and
    what an app's filters and handlers raise does not come out of it."""
    found = logging.getLogger(name)
    if not isinstance(found, _Heard):
        found.__class__ = type("Logger", (_Heard, type(found)), {})
        found.addFilter(_show)
    return found


class _Heard(logging.Logger):
    @property
    def disabled(self) -> bool:
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None: ...

    def handle(self, record: logging.LogRecord) -> None:
        try:
            super().handle(record)
        except SoftTimeLimitExceeded:  # of the body that logs
            raise
        except BaseException:
            with contextlib.suppress(Exception):
                traceback.print_exc()


def _show(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(
            arg if arg is None or isinstance(arg, int | float) else printable(arg, lines=False) for arg in record.args
        )
    if record.exc_info and not record.exc_text:
        # Formatters take it from here.
        record.exc_text = printable(logging.Formatter().formatException(record.exc_info), MOST_LINES)
    elif text := record.__dict__.pop("traceback", None):
        # Of another process, or of a while ago: the exception itself is gone.
        record.exc_text = printable(text.rstrip(), MOST_LINES)
    return True
