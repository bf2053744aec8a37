"""What is measured. A workload says who takes part, and measures one round of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..bench import Bench, Contestant, Entry, Figures
from ..processes import BenchmarkFailed

RoundOf = Callable[[Bench, Sequence[Entry], dict[str, str]], dict[str, Figures]]
"""Measures all entries once, in their order. Who fails is put into the last argument, with the reason."""


@dataclass(frozen=True)
class Workload:
    """``entries`` makes the list of who takes part from the contestants that are there."""

    name: str
    title: str
    entries: Callable[[Sequence[Contestant]], list[Entry]]
    run: RoundOf
    rounds: float = 1.0
    """How many rounds it takes, as a share of what was asked for."""


def each(measure: Callable[[Bench, Entry], Figures]) -> RoundOf:
    """A round in which one contestant after the other is measured."""

    def run(bench: Bench, entries: Sequence[Entry], failures: dict[str, str]) -> dict[str, Figures]:
        figures = {}
        for entry in entries:
            with failing(entry, failures):
                figures[entry.label] = measure(bench, entry)
        return figures

    return run


@contextlib.contextmanager
def failing(entry: Entry, failures: dict[str, str]) -> Iterator[None]:
    """The failure of a peer is a result; that of our own programs ends the run."""
    try:
        yield
    except BenchmarkFailed as error:
        if not entry.contestant.peer:
            raise
        failures[entry.label] = str(error)


def everybody(contestants: Sequence[Contestant]) -> list[Entry]:
    """All that have a queue."""
    return [Entry(one, one.name) for one in contestants if one.name != "alone"]


def called(contestants: Sequence[Contestant], name: str) -> list[Contestant]:
    """The contestant of this name, if it takes part."""
    return [one for one in contestants if one.name == name]


def frameworks(contestants: Sequence[Contestant]) -> list[Contestant]:
    """All but the bare programs."""
    return [one for one in contestants if one.name not in ("bare", "socket", "alone")]
