"""Tables of other people's text: nothing of a row is lost, however narrow the screen is and however long the names are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.segment import Segment
from rich.text import Text

from ..text import counted

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

GAP, INDENT = "  ", "    "
NOTHING = "-"
"""What a cell shows that has nothing to show."""
LEAST = 16
"""Columns that a cell keeps whose end alone is shown."""


class Table:
    """Rows under headings. Where they have no room beside each other, the widest of the columns that hold text go below their
    row, each on lines of its own with its name before it; in a pipe, which has no width, each row is one line.

    ``headings``: those that begin with ``>`` are of numbers, and stay in the row, as those that begin with ``=``; of one that
    begins with ``<`` the ends are shown where there is too little room, because another table has it whole.
    """

    def __init__(self, *headings: str) -> None:
        self._headings = [heading.lstrip("<=>") for heading in headings]
        self._right = [heading.startswith(">") for heading in headings]
        self._cut = [heading.startswith("<") for heading in headings]
        self._stays = [heading[0] in "=>" for heading in headings]
        self._rows: list[tuple[list[str], str]] = []

    def add(self, *cells: str, style: str = "") -> None:
        self._rows.append((list(cells), style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = range(len(self._headings))
        widths = [max(map(cell_len, (self._headings[i], *(cells[i] for cells, _ in self._rows)))) for i in columns]
        for i in columns:
            if self._cut[i]:
                widths[i] = max(min(widths[i], LEAST), widths[i] + min(0, options.max_width - _width(widths)))
        beside = self._beside(widths, options.max_width)
        yield self._line(self._headings, widths, beside, "bold")
        for cells, style in self._rows:
            yield self._line(cells, widths, beside, style)
            below = [
                Text(f"{self._headings[i].lower()} {cells[i]}", style)
                for i in columns
                if i not in beside and cells[i] != NOTHING
            ]
            yield from _packed(below, console, options.max_width, INDENT, INDENT)

    def _beside(self, widths: list[int], room: int) -> list[int]:
        """The columns that stand in the row: all but the widest, until they fit."""
        beside = list(range(len(widths)))
        while _width([widths[i] for i in beside]) > room:
            movable = [i for i in beside if not self._stays[i]]
            if not movable or len(beside) == 1:
                break
            beside.remove(max(movable, key=lambda i: widths[i]))
        return beside

    def _line(self, cells: list[str], widths: list[int], beside: list[int], style: str) -> Text:
        padded = []
        for i in beside:
            cell = _end(cells[i], widths[i])
            blank = " " * (widths[i] - cell_len(cell))
            padded.append(blank + cell if self._right[i] else cell + blank)
        return Text(GAP.join(padded).rstrip(), style)


def _width(widths: list[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _end(cell: str, width: int) -> str:
    if cell_len(cell) <= width:
        return cell
    while cell_len(cell) >= width:
        cell = cell[1:]
    return "…" + cell


class Line:
    """Some texts in a line, or in as many as they need: a line ends between two of them."""

    def __init__(self, *parts: Text) -> None:
        self._parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _packed(self._parts, console, options.max_width, "", INDENT)


def _packed(parts: Iterable[Text], console: Console, width: int, first: str, more: str) -> Iterator[Text]:
    """The lines of some texts, each of which is broken only where it has no room for itself."""
    line = Text(first)
    empty = True
    for part in parts:
        if not empty and line.cell_len + len(GAP) + part.cell_len > width:
            yield line
            line, empty = Text(more), True
        if not empty:
            line.append(GAP)
        *whole, last = part.wrap(console, max(width - line.cell_len, 1))
        for piece in whole:
            piece.rstrip()
            yield line.append_text(piece)
            line = Text(more)
        line.append_text(last)
        empty = False
    if not empty:
        yield line


class Screenful:
    """What fits the screen, with ``last`` as its last lines; what has no room is said in one line above these."""

    def __init__(self, picture: RenderableType, last: RenderableType = "") -> None:
        self._picture = picture
        self._last = last

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        free = options.update(height=None)
        lines = console.render_lines(self._picture, free, pad=False)
        last = console.render_lines(self._last, free, pad=False) if self._last else []
        room = max((options.height or console.height) - len(last), 1)
        if len(lines) > room:
            hidden = len(lines) - room + 1
            said = f"... {counted(hidden, 'more line')}: make the window higher, or name one queue with --queue"
            note = console.render_lines(Text(said, "dim", no_wrap=True, overflow="ellipsis"), free, pad=False)
            lines = lines[: room - 1] + note
        for i, line in enumerate([*lines, *last]):
            if i:
                yield Segment.line()
            yield from line


__all__ = ["Line", "Screenful", "Table"]
