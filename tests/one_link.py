"""The connections of a consumer in tests: one, which a test may replace by one that fails."""

from __future__ import annotations

from typing import Any


class OneLink:
    """In the place of ``redis.links.Links``."""

    def __init__(self, link: Any) -> None:
        self.link = link

    def at(self, key: str) -> Any:
        return self.link
