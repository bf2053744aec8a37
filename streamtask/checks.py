"""What an option may be: one ``Rule`` for each kind of value, tables of them where the options are, and one sentence for
whatever breaks one. Standard library only.
"""

from __future__ import annotations

import datetime as dt
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .errors import ConfigError
from .text import printable

MOST_S = 100 * 365 * 86400.0
"""A hundred years: what is longer is a mistake, or no time that can be reckoned with."""


class Rule(NamedTuple):
    """``right``: what a value must be, to stand behind "must be". ``take``: makes of a value what is to be used; raises
    TypeError, ValueError or OverflowError for a wrong one."""

    right: str
    take: Callable[[Any], Any]


def shown(value: object) -> str:
    """A value as an error names it, whatever its ``__repr__`` does."""
    try:
        return printable(repr(value), 100, lines=False)
    except Exception:
        return f"a {type(value).__name__}"


def check(name: str, rule: Rule, value: Any, *, secret: bool = False) -> Any:
    """The value to be used. Raises ``ConfigError`` saying which option is wrong, what it was (unless that is ``secret``) and
    what is right; ``name`` is as the option is to be called there."""
    try:
        return rule.take(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"{name} must be {rule.right}, not {f'a {type(value).__name__}' if secret else shown(value)}"
        ) from None


def check_fields(options: Any, rules: Mapping[str, Rule], what: str) -> None:
    """Checks the fields of a frozen dataclass that is being made. ``what`` stands before the name of a wrong one."""
    for name, rule in rules.items():
        value = getattr(options, name)
        taken = check(f"{what} {name}", rule, value)
        if taken is not value:
            object.__setattr__(options, name, taken)


def _is(holds: object) -> None:
    if not holds:
        raise ValueError


def seconds(least: float = 0.0, *, above: bool = False) -> Rule:
    """Numbers, and timedeltas, which are unmistakable. ``above``: more than ``least``."""

    def take(value: Any) -> Any:
        if isinstance(value, dt.timedelta):
            value = value.total_seconds()
        _is(isinstance(value, int | float) and not isinstance(value, bool))
        _is(least < value <= MOST_S or (value == least and not above))
        return value

    return Rule(
        f"a number of seconds {'above' if above else 'from'} {least:g}, at most 100 years, or a timedelta", take
    )


def whole(least: int, most: int = 2**53) -> Rule:
    """Whole numbers, of which Lua holds those up to 2 ** 53."""

    def take(value: Any) -> int:
        _is(not isinstance(value, bool))
        number = operator.index(value)
        _is(least <= number <= most)
        return number

    return Rule(f"a whole number from {least}" + (f" to {most}" if most < 2**53 else ""), take)


def optional(rule: Rule, meaning: str = "") -> Rule:
    """``rule``, or None. ``meaning``: what None says."""
    return Rule(f"{rule.right}, or None{meaning}", lambda value: None if value is None else rule.take(value))


def one_of(*values: str) -> Rule:
    def take(value: Any) -> str:
        _is(isinstance(value, str) and value in values)
        return _plain(value)

    return Rule(f"one of {', '.join(values)}", take)


def _flag(value: Any) -> bool:
    _is(isinstance(value, bool))
    return bool(value)


def _plain(value: str) -> str:
    """The text itself: ``str`` of a member of a ``(str, Enum)`` is its name, as ``Queues.HIGH``."""
    return str.__str__(value)


def _any_text(value: Any) -> str:
    _is(isinstance(value, str) and value)
    return _plain(value)


def _text(value: Any) -> str:
    text = _any_text(value)
    text.encode()  # no lone surrogate, which can't be stored
    return text


def _instant(value: Any) -> dt.datetime:
    _is(isinstance(value, dt.datetime) and value.utcoffset() is not None)
    found: dt.datetime = value
    return found


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    _is(isinstance(value, tuple | list | set | frozenset))
    return tuple(map(_text, value))


def _exceptions(value: Any) -> tuple[type[BaseException], ...]:
    value = (value,) if isinstance(value, type) else value
    _is(isinstance(value, tuple | list | set | frozenset))
    _is(all(isinstance(one, type) and issubclass(one, BaseException) for one in value))
    return tuple(value)


FLAG = Rule("True or False", _flag)
TEXT = Rule("text that is not empty", _text)
ANY_TEXT = Rule("text that is not empty", _any_text)  # a lone surrogate, too, where it is not stored as it is
TEXTS = Rule("a tuple of texts", _texts)
EXCEPTIONS = Rule("a tuple of exception classes", _exceptions)
INSTANT = Rule("a datetime with a time zone, as datetime.now(timezone.utc) + timedelta(minutes=5)", _instant)


TIMEOUT = seconds()


def either(*rules: Rule) -> Rule:
    """What fits one of the rules, the first of them."""

    def take(value: Any) -> Any:
        for rule in rules[:-1]:
            try:
                return rule.take(value)
            except (TypeError, ValueError, OverflowError):
                continue
        return rules[-1].take(value)

    return Rule(", or ".join(rule.right for rule in rules), take)
