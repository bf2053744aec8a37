"""Text that comes from anywhere, made fit to be stored, sent and logged."""

from __future__ import annotations


def harmless(text: str) -> str:
    """A text that can be encoded: a lone surrogate, as JSON and ``surrogateescape`` let them in, becomes its escape."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def said(exc: BaseException) -> str:
    """What an exception says of itself, whatever its ``__str__`` does."""
    try:
        return harmless(str(exc))
    except Exception:
        return f"a {type(exc).__name__} without a text"
