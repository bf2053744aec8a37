"""The figures of all rounds, and what they say: medians, and ratios of what was measured side by side."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

from .bench import Figures


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, their range, and the medians of what is compared."""

    ratio: float
    low: float
    high: float
    ours: float
    theirs: float


@dataclass
class Results:
    """``rounds[workload]`` has a mapping of labels to figures for each round."""

    rounds: dict[str, list[dict[str, Figures]]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    """By workload and label: why there are no figures."""
    order: dict[str, list[str]] = field(default_factory=dict)
    """By workload: who took part, in the order of the contestants."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By workload: how long it took."""
    about: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def peers(self) -> list[str]:
        """The names of the other frameworks that took part."""
        return [name for name, one in self.about["contestants"].items() if one.get("peer")]

    def values(self, workload: str, label: str, figure: str) -> list[float]:
        rounds = self.rounds.get(workload, [])
        return [one[label][figure] for one in rounds if figure in one.get(label, {})]

    def median(self, workload: str, label: str, figure: str) -> float | None:
        values = self.values(workload, label, figure)
        return statistics.median(values) if values else None

    def labels(self, workload: str) -> list[str]:
        return list(dict.fromkeys(label for one in self.rounds.get(workload, []) for label in sorted(one)))

    def ratio(self, ours: tuple[str, str, str], theirs: tuple[str, str, str]) -> Ratio | None:
        """Of two figures (workload, label, figure), round by round."""
        a, b = self.values(*ours), self.values(*theirs)
        ratios = [x / y for x, y in zip(a, b, strict=False) if y]
        if not ratios:
            return None
        return Ratio(statistics.median(ratios), min(ratios), max(ratios), statistics.median(a), statistics.median(b))

    def best(self, workload: str, labels: list[str], figure: str, most: bool = True) -> str | None:
        """The label with the best median."""
        found = {label: value for label in labels if (value := self.median(workload, label, figure)) is not None}
        return (max if most else min)(found, key=found.__getitem__) if found else None
