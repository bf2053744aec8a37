"""A page in ``docs/benchmarks/``: all that was measured, with pictures, versions and settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .plots import draw
from .report import as_markdown, target_rows, workload_rows
from .results import Results
from .targets import outcomes
from .workloads import Workload

HEAD = """# Measured

Made by `make {target} ARGS='--write'`; [the method](../benchmarks.md) says what each line means.
Don't edit this page: it is written anew by the next run. All figures of all rounds are in [{figures}]({figures}).

{facts}
"""


@dataclass(frozen=True)
class Page:
    """Names of files, and the target of ``make`` that writes them."""

    name: str
    figures: str
    target: str


ALL = Page("README.md", "results.json", "bench-peers")
CELERY = Page("celery.md", "celery.json", "bench-celery")


def write(results: Results, workloads: Sequence[Workload], folder: Path, page: Page) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / page.figures).write_text(json.dumps(results.as_json(), indent=1) + "\n")
    pictures = draw(results, folder)
    parts = [HEAD.format(facts=_facts(results), target=page.target, figures=page.figures), _targets(results)]
    if pictures:
        parts.append("## Pictures\n\nRed: streamtask. Grey: bare programs. Blue: other frameworks. Medians.\n")
    parts += [f"![{title}]({name}.png)\n" for name, title in pictures]
    for workload in workloads:
        if workload.name in results.rounds:
            rounds = len(results.rounds[workload.name])
            times = f"Medians of {rounds} rounds." if rounds > 1 else "One round."
            parts.append(
                f"## {workload.title}\n\n{times}\n\n{as_markdown(workload_rows(results, workload.name))}\n"
                f"{_failures(results, workload.name)}"
            )
    parts += [_settings(results)]
    (folder / page.name).write_text("\n".join(parts))


def _facts(results: Results) -> str:
    about = results.about
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    smoke = "**Tiny sizes (`--smoke`): no conclusions.** " if about["smoke"] else ""
    return (
        f"{smoke}{about['system']}, {about['cpus']} CPUs, shared by all that is measured with Redis and the producers; "
        f"idle CPUs {about['idle_cpus']}. {versions}. {about['rounds']} rounds in {about['seconds'] / 60:.0f} minutes, "
        "one redis-server on the loopback without persistence."
    )


def _targets(results: Results) -> str:
    rows = target_rows(outcomes(results, results.peers()))
    return (
        "## Targets\n\nMedian of the rounds' ratios, streamtask / what it is compared with; then the medians themselves."
        f"\n\n{as_markdown(rows)}\n"
    )


def _failures(results: Results, workload: str) -> str:
    failed = results.failures.get(workload, {})
    lines = [f"- {label}: {why.splitlines()[0]}" for label, why in failed.items()]
    return "\nFailed:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _settings(results: Results) -> str:
    lines = ["## Versions and settings", ""]
    for name, one in results.about["contestants"].items():
        versions = ", ".join(f"{package} {number}" for package, number in one["versions"].items())
        lines += [f"**{name}**: {one['title']}. {versions}.", ""]
        lines += [f"- {setting}: {value}" for setting, value in one["settings"].items()]
        lines.append("")
    for name, why in results.about["missing"].items():
        lines += [f"**{name}**: {why}", ""]
    return "\n".join(lines)
