"""How a run of the demo looks: live in a terminal, line by line elsewhere, and the table at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ...clock import mono_s
from ...operations import SHARED
from ...text import printable
from .run import AT_REST_EVERY_S, WINDOW, Latency, Plan, Report, State, View

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY_S = 1.0
NOTED_WIDTH = 80
SPARKS = "▁▂▃▄▅▆▇█"
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "bright_red", "bright_cyan", "bright_magenta")


def headline(plan: Plan) -> list[str]:
    """What the run is about."""
    first = f"{plan.messages:,} {plan.kind}"
    parts = []
    if plan.events is not None:
        first += f" of {printable(plan.events.path.name)}"
        parts.append(f"{plan.keys:,} keys" + (f", {plan.without_key:,} without key" if plan.without_key else ""))
    else:
        first += f" for {plan.users:,} users"
    parts.append(f"{plan.shards} shard{'s' if plan.shards > 1 else ''}")
    parts.append(f"{plan.processes} worker process{'es' if plan.processes > 1 else ''}")
    return [first, " · ".join(parts)]


class Lines(View):
    """For pipes and logs: one line per event, and one a second while it runs."""

    def __init__(self, plan: Plan, out: TextIO) -> None:
        self._out = out
        self._start = self._last = mono_s()
        first, second = headline(plan)
        self._write(f"streamtask demo: {first}")
        self._write(second)

    def _write(self, text: str) -> None:
        print(f"{mono_s() - self._start:6.2f} s  {text}", file=self._out, flush=True)

    def event(self, text: str, *, bad: bool = False) -> None:
        self._write(text)

    def refresh(self, state: State) -> None:
        if state.phase in ("sending", "one by one") and mono_s() - self._last >= LINE_EVERY_S:
            self._last = mono_s()
            lag = sum(row["lag"] + row["pending"] for row in state.shards)
            self._write(
                f"sent {state.sent:,} of {state.total:,}, run {state.run:,}, {state.rate:,.0f} a second, backlog {lag:,}"
            )


class Screen(View):
    """For terminals: events scroll by, below them a picture of what goes on, which is gone at the end."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan = plan
        self._console = console
        self._state = State(plan.messages)
        self._live = Live(console=console, refresh_per_second=8, transient=True, get_renderable=self._picture)
        self._start = mono_s()
        self._colours: dict[str, str] = {}

    def __enter__(self) -> View:
        first, second = headline(self._plan)
        self._console.print(
            Text.assemble(("streamtask demo  ", "bold"), f"{first}\n", (f"{' ' * 17}{second}\n", "dim"))
        )
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def event(self, text: str, *, bad: bool = False) -> None:
        self._console.print(
            Text.assemble((f"{mono_s() - self._start:6.2f} s  ", "dim"), (text, "bold red" if bad else ""))
        )

    def refresh(self, state: State) -> None:
        self._state = state

    def _picture(self) -> RenderableType:
        state = self._state
        parts: list[RenderableType] = [Text(), self._bars(state)]
        # Where the terminal is too low for one line per shard, the bars must do.
        if state.shards and len(state.shards) + 8 <= self._console.height:
            parts += [Text(), self._shards(state)]
        return Group(*parts)

    def _bars(self, state: State) -> Table:
        bars = Table.grid(padding=(0, 2))
        bars.add_column(justify="right", style="bold", no_wrap=True)
        bars.add_column(width=max(10, min(50, self._console.width - 50)))
        bars.add_column(justify="right", no_wrap=True)
        bars.add_column(no_wrap=True)
        total = f"{state.total:,}"
        for name, value, note in (
            ("sent", state.sent, Text(state.phase, "dim")),
            ("run", state.run, Text(f"{state.rate:,.0f}/s {self._sparks(state.rates)}", "green")),
        ):
            bar = ProgressBar(total=max(1, state.total), completed=value, complete_style="cyan")
            bars.add_row(name, bar, f"{value:>{len(total)},} of {total}", note)
        return bars

    def _sparks(self, rates: list[float]) -> str:
        if not (self._console.encoding or "").lower().startswith("utf"):
            return ""
        recent = rates[-12:]
        top = max(recent, default=0.0) or 1.0
        return "".join(SPARKS[min(7, int(rate / top * 7.99))] for rate in recent)

    def _shards(self, state: State) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
        for name in ("SHARD", "OWNER", "LAG", "PENDING", "RUN"):
            table.add_column(name, justify="left" if name == "OWNER" else "right", no_wrap=True, min_width=7)
        workers = {worker["id"]: worker for worker in state.workers}
        for row in state.shards:
            if row["shard"] == SHARED:
                if self._plan.without_key:
                    run = sum(count for shard, count in state.run_by_shard.items() if shard >= self._plan.shards)
                    self._add(table, row, Text("all processes", "dim"), run)
                continue
            self._add(table, row, self._owner(row["owner"], workers), state.run_by_shard.get(row["shard"], 0))
        return table

    def _add(self, table: Table, row: dict[str, Any], owner: Text, run: int) -> None:
        table.add_row(str(row["shard"]), owner, f"{row['lag']:,}", f"{row['pending']:,}", f"{run:,}")

    def _owner(self, owner: str | None, workers: dict[str, dict[str, Any]]) -> Text:
        if owner is None:
            return Text("nobody", "bold red")
        colour = self._colours.setdefault(owner, COLOURS[len(self._colours) % len(COLOURS)])
        worker = workers.get(owner)
        return Text(f"process {worker['pid']}" if worker else "a process that is gone", colour if worker else "red")


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 10_000:
        return f"{value / 1000:,.1f} s"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def end_table(report: Report, width: int) -> Table:
    """The table at the end: what, how much, and, where there is room, what it means."""
    plan, verdict, kill = report.plan, report.verdict, report.kill
    table = Table(box=box.ROUNDED, show_header=False, padding=(0, 1))
    table.add_column("what", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    noted = width >= NOTED_WIDTH
    if noted:
        table.add_column("note", style="dim", overflow="fold")

    def row(name: str, value: str, note: str = "", style: str = "") -> None:
        table.add_row(name, Text(value, style), *([Text(note)] if noted else []))

    def must_be_zero(name: str, value: int, note: str) -> None:
        row(name, f"{value:,}", note, "bold green" if value == 0 else "bold red")

    keys = f"{plan.keys:,} {'keys' if plan.events else 'users'} on {plan.shards} shard{'s' if plan.shards > 1 else ''}"
    row("sent", f"{report.sent:,}", keys + (f"; {plan.without_key:,} without key" if plan.without_key else ""), "bold")
    row("run", f"{verdict.run:,}", "by what the bodies wrote down at their start", "bold")
    must_be_zero("lost", verdict.lost, "sent, but never started as it was sent")
    must_be_zero("out of order", verdict.out_of_order, "starts that break the order of their key")
    row("run twice", f"{verdict.run_twice:,}", _twice_note(report))
    dead = report.dead_letters
    row("dead letters", f"{dead:,}", "messages that could not be run", "bold red" if dead else "")
    table.add_section()
    rate = "-" if report.tasks_per_s is None else f"{report.tasks_per_s:,.0f}"
    beside = f"{plan.processes} process{'es' if plan.processes > 1 else ''}"
    row("tasks per second", rate, f"{beside}, bodies that only note their start")
    row("latency under load p50/p99", _pair(report.loaded), f"produce to start, up to {WINDOW:,} waiting")
    every = f"produce to start, one message every {AT_REST_EVERY_S * 1000:.0f} ms"
    row("latency at rest p50/p99", _pair(report.at_rest), every)
    table.add_section()
    if kill is not None:
        waited = kill.resumed_s is not None
        note = (
            f"messages that waited ran on after {_seconds(kill.resumed_s)}" if waited else "none of its messages waited"
        )
        row("takeover after kill -9", _seconds(kill.taken_over_s), note)
    stale = report.registered - report.alive
    row(
        "consumers registered/alive",
        f"{report.registered} / {report.alive}",
        f"{stale} stale" if stale else "in Redis, while the workers still ran",
        "bold red" if stale else "bold green",
    )
    return table


def _pair(latency: Latency) -> str:
    return f"{_milliseconds(latency.p50)} / {_milliseconds(latency.p99)}"


def _twice_note(report: Report) -> str:
    if report.verdict.run_twice == 0:
        return "none was unacknowledged at the kill" if report.kill else ""
    if report.kill is None:
        return "nothing was killed: should be 0"
    return "finished but unacknowledged at the kill"


def closing_line(report: Report) -> Text:
    """The verdict in one sentence."""
    verdict = report.verdict
    if verdict.good:
        what = "Nothing lost, nothing out of order"
        return Text(what + (", with a kill -9 in the middle." if report.kill else "."), "bold green")
    found = []
    if verdict.lost:
        found.append(f"{verdict.lost:,} lost")
    if verdict.out_of_order:
        found.append(f"{verdict.out_of_order:,} out of order")
    return Text(f"The guarantee does not hold: {', '.join(found)}. Please report this run.", "bold red")
