"""The results as text."""

from __future__ import annotations

from collections.abc import Sequence

from .results import Results
from .targets import Outcome

Column = tuple[str, str]
"""A figure's name, and what stands above it."""

ENQUEUE: tuple[Column, ...] = (("one", "one by one /s"), ("bulk", "in bulk /s"), ("at_once", "50 at once /s"))
DRAIN: tuple[Column, ...] = (
    ("rate", "tasks/s"),
    ("cpu_us_per_task", "worker CPU us/task"),
    ("redis_cpu_us_per_task", "Redis CPU us/task"),
    ("commands_per_task", "commands/task"),
    ("rss", "RSS of all MB"),
    ("rss_runner", "RSS of one MB"),
    ("startup_s", "start-up s"),
)
LATENCY: tuple[Column, ...] = (("p50_ms", "p50 ms"), ("p99_ms", "p99 ms"))

COLUMNS: dict[str, tuple[Column, ...]] = {
    "enqueue": ENQUEUE,
    "drain": DRAIN,
    "each": (("rate", "tasks/s"), ("commands_per_task", "commands/task")),
    "two": (("rate", "tasks/s"),),
    "threads": (("rate", "tasks/s"), ("cpu_us_per_task", "worker CPU us/task")),
    "coroutines": (("rate", "tasks/s"), ("cpu_us_per_task", "worker CPU us/task")),
    "sleep1": (("efficiency", "efficiency"), ("rate", "tasks/s")),
    "sleep10": (("efficiency", "efficiency"), ("rate", "tasks/s")),
    "asleep10": (("efficiency", "efficiency"), ("rate", "tasks/s")),
    "latency": LATENCY,
    "load": (("offered_per_s", "offered /s"), *LATENCY),
    "order": (("out_of_order", "pairs out of order"), ("pairs", "of"), ("processes", "processes that ran some")),
    "crash": (
        ("lost", "lost"),
        ("run_twice", "run twice"),
        ("done_s", "s until all are done"),
        ("recovery_s", "s from the kill until then"),
    ),
    "memory": (("used_memory", "used_memory"), ("stream", "stream alone"), ("xadd", "same by XADD")),
    "ids": (("used_memory", "used_memory"), ("memory_usage", "MEMORY USAGE")),
    "idle": (
        ("cpu_percent", "CPU %"),
        ("commands_per_s", "commands/s"),
        ("per_process", "a process"),
        ("inner_per_s", "in scripts/s"),
    ),
    "shards": (("rate", "tasks/s"), ("commands_per_task", "commands/task")),
    "backlog": (("window_rate", "tasks/s, same number"), ("rate", "tasks/s, all")),
    "celery_enqueue": ENQUEUE,
    "celery_1": DRAIN,
    "celery_4": DRAIN,
    "celery_latency": LATENCY,
}


def number(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def shown(figure: str, value: float | None) -> str:
    return number(value / 2**20 if value is not None and figure.startswith("rss") else value)


def workload_rows(results: Results, workload: str) -> list[list[str]]:
    """A heading, then a line for each that took part: medians, and the reason where there is none."""
    columns = [
        one
        for one in COLUMNS[workload]
        if any(results.values(workload, x, one[0]) for x in labels_of(results, workload))
    ]
    rows = [["", *(title for _, title in columns)]]
    for label in labels_of(results, workload):
        failure = results.failures.get(workload, {}).get(label)
        cells = [shown(figure, results.median(workload, label, figure)) for figure, _ in columns]
        why = failure.splitlines()[0] if failure else ""
        rows.append([label, *cells] if any(cells) or not columns else [label, f"failed: {why}"])
    return rows


def labels_of(results: Results, workload: str) -> list[str]:
    failed = results.failures.get(workload, {})
    return list(dict.fromkeys([*results.order.get(workload, []), *results.labels(workload), *failed]))


def target_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    rows = [["target", "wanted", "measured", "range", "streamtask", "against", ""]]
    for one in outcomes:
        ratio = one.ratio
        unit = one.target.wanted[-1] if one.target.wanted[-1] in "x%" else ""
        span = "" if ratio.low == ratio.high else f"{ratio.low:.2f} - {ratio.high:.2f}"
        figure = one.target.ours[2]
        against = shown(figure, ratio.theirs) if one.target.theirs else ""
        if one.against:
            against += f" ({one.against})"
        measured = f"{ratio.ratio:.2f}{unit}"
        rows.append([one.target.title, one.target.wanted, measured, span, shown(figure, ratio.ours), against])
        rows[-1].append("met" if one.met else "missed")
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width."""
    widths = [max(len(row[i]) for row in rows if len(row) == len(rows[0])) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)),
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    width = len(rows[0])
    lines = [f"| {' | '.join([*row, *[''] * (width - len(row))])} |" for row in rows]
    lines.insert(1, f"| --- |{' ---: |' * (width - 1)}")
    return "\n".join(lines)
