"""Ids that stand for one publish and all its repetitions."""

from __future__ import annotations

import secrets
from itertools import count

from ..queue.seen import PAGE


class ProduceIds:
    """Ids for publishes: a page's name, which is random, and the number of a publish in it. Every target queue has a page of
    that name, so one id guards a publish to several queues. A forked child begins anew."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self._name = f"k{secrets.token_urlsafe(9)}"
        self._next = count().__next__

    def take(self) -> str:
        page, number = divmod(self._next(), PAGE)
        return f"{self._name}.{page:x} {number}"
