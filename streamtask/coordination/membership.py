"""Which processes of a group live, on Redis' clock."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..clock import wall_ms
from ..redis import commands
from ..redis.keys import QueueKeys
from ..redis.link import Link
from ..redis.scripts import script


@dataclass(slots=True)
class Membership:
    """A queue's group as one who keeps leases sees it; ``beat`` refreshes it.

    ``since_ms`` is since when Redis has heard it without a gap: see ``lease.py`` on outages.
    ``clock_ms`` is what to add to this machine's wall clock to get Redis'.
    """

    keys: QueueKeys
    group: str
    lease_ms: int
    members: list[str] = field(default_factory=list)
    since_ms: int = 0
    heard_ms: int = 0
    clock_ms: int = 0
    cut_off: bool = True

    def pack_beat(self, infos: Mapping[str, Mapping[str, Any]]) -> bytes:
        args: list[str | int] = [self.lease_ms, 1 if self.cut_off else 0, self.heard_ms, self.since_ms]
        for incarnation, info in infos.items():
            args += [incarnation, json.dumps({"lease_ms": self.lease_ms, **info}, separators=(",", ":"))]
        return script("heartbeat").pack((self.keys.members(self.group), self.keys.member_info(self.group)), tuple(args))

    def heard(self, answer: Any, sent_ms: int) -> bool:
        """Takes the answer to ``pack_beat``. True if the members changed."""
        now, since, changed, members = answer
        self.heard_ms, self.since_ms, self.cut_off = int(now), int(since), False
        self.clock_ms = self.heard_ms - (sent_ms + wall_ms()) // 2
        before, self.members = self.members, [member.decode() for member in members]
        return bool(changed) or before != self.members

    def beat(self, link: Link, infos: Mapping[str, Mapping[str, Any]]) -> bool:
        sent_ms = wall_ms()
        return self.heard(link.call(self.pack_beat(infos)), sent_ms)

    def leave(self, link: Link, incarnations: list[str]) -> None:
        if incarnations:
            link.run("leave", [self.keys.members(self.group), self.keys.member_info(self.group)], incarnations)

    def redis_now_ms(self) -> int:
        return wall_ms() + self.clock_ms

    def pack_announce(self, what: str) -> bytes:
        """Tells all others who keep leases of the group to look at once."""
        return commands.publish(self.keys.channel(self.group), what)
