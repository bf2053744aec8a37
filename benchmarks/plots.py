"""The results as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import labels_of, number
from .results import Results

OURS, YARDSTICK, PEER = "#c0392b", "#7f8c8d", "#34699a"
SHADES = (1.0, 0.62, 0.35)
"""Of the second and third bar of a contestant."""


@dataclass(frozen=True)
class Plot:
    """Bars of some figures, given as (workload, figure, legend)."""

    name: str
    title: str
    unit: str
    series: tuple[tuple[str, str, str], ...]
    scale: float = 1.0
    most_first: bool = True


PLOTS = (
    Plot(
        "drain",
        "Draining no-op tasks (more is better)",
        "tasks/s",
        (("drain", "rate", "one process"), ("two", "rate", "two processes")),
    ),
    Plot(
        "enqueue",
        "Enqueueing (more is better)",
        "calls/s",
        (
            ("enqueue", "one", "one by one"),
            ("enqueue", "bulk", "in bulk"),
            ("enqueue", "at_once", "50 at once, asyncio"),
        ),
    ),
    Plot(
        "latency",
        "Latency at rest, from the call to the start of the body (less is better)",
        "ms",
        (("latency", "p50_ms", "p50"), ("latency", "p99_ms", "p99")),
        most_first=False,
    ),
    Plot(
        "load",
        "Latency at half load (less is better)",
        "ms",
        (("load", "p50_ms", "p50"), ("load", "p99_ms", "p99")),
        most_first=False,
    ),
    Plot(
        "cpu",
        "CPU for a no-op task (less is better)",
        "microseconds",
        (("drain", "cpu_us_per_task", "worker"), ("drain", "redis_cpu_us_per_task", "Redis")),
        most_first=False,
    ),
    Plot(
        "rss",
        "Memory of a worker (less is better)",
        "MB",
        (("drain", "rss", "all its processes"), ("drain", "rss_runner", "the process that runs tasks")),
        scale=1 / 2**20,
        most_first=False,
    ),
    Plot(
        "queued",
        "Redis memory for a queued message (less is better)",
        "bytes",
        (("memory", "used_memory", "used_memory"),),
        most_first=False,
    ),
    Plot(
        "sleep",
        "Tasks that sleep, 16 at once: share of what is possible (more is better)",
        "efficiency",
        (("sleep10", "efficiency", "10 ms"), ("sleep1", "efficiency", "1 ms")),
    ),
)


def draw(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Writes NAME.png for all that was measured; name and title of each."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    done = []
    for plot in PLOTS:
        values = [_values(results, workload, figure, plot.scale) for workload, figure, _ in plot.series]
        if any(values):
            _bars(results, plot, values, folder / f"{plot.name}.png")
            done.append((plot.name, plot.title))
    if results.rounds.get("shards"):
        _shards(results, folder / "shards.png")
        done.append(("shards", "streamtask with more shards"))
    return done


def _values(results: Results, workload: str, figure: str, scale: float) -> dict[str, float]:
    known = results.about["contestants"]
    found = {}
    for label in labels_of(results, workload):
        value = results.median(workload, label, figure)
        # Variants of one contestant have lines of their own in the tables only.
        if value is not None and label in known:
            found[label] = value * scale
    return found


def _colour(results: Results, label: str) -> str:
    if label == "streamtask":
        return OURS
    return PEER if results.about["contestants"].get(label, {}).get("peer") else YARDSTICK


def _bars(results: Results, plot: Plot, series: Sequence[Mapping[str, float]], path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    labels = list(dict.fromkeys(label for values in series for label in values))
    # The best on top.
    labels.sort(
        key=lambda label: next((one[label] for one in series if label in one), 0.0), reverse=not plot.most_first
    )
    count = len(series)
    height = 0.82 / count
    figure, axes = plt.subplots(figsize=(9, 1.3 + len(labels) * (0.18 + 0.2 * count)), layout="constrained")
    everything = [value for values in series for value in values.values() if value > 0]
    log = max(everything) > 20 * min(everything)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(min(everything) / 2, max(everything) * 4)
    else:
        axes.set_xlim(0, max(everything) * 1.15)
    for place, label in enumerate(labels):
        # No gaps where a contestant lacks one of the figures.
        there = [(index, values[label]) for index, values in enumerate(series) if values.get(label, 0) > 0]
        for line, (index, value) in enumerate(there):
            y = place + height * ((len(there) - 1) / 2 - line)
            axes.barh(y, value, height * 0.92, color=_colour(results, label), alpha=SHADES[index])
            axes.annotate(number(value), (value, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.set_xlabel(plot.unit + (", logarithmic" if log else ""))
    axes.set_title(plot.title, fontsize=11, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    if count > 1:
        handles = [
            Patch(color="#444444", alpha=SHADES[index], label=legend) for index, (*_, legend) in enumerate(plot.series)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=count, fontsize=9, frameon=False)
    _save(figure, path)


def _shards(results: Results, path: Path) -> None:
    import matplotlib.pyplot as plt

    labels = results.order["shards"]
    shards = [label.split()[0] for label in labels]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, figure_name, title in (
        (left, "rate", "tasks/s, one process"),
        (right, "commands_per_task", "commands of Redis for a task"),
    ):
        axes.plot(shards, [results.median("shards", label, figure_name) for label in labels], "o-", color=OURS)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("shards")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    # Without the version of matplotlib, which would make another file of the same picture.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
