"""The calls of a shard's owner: each names the token and the incarnation of its lease, and is refused when these are no longer
the owner's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, final

from ..coordination.lease import Lease
from ..errors import LeaseLost
from ..redis.commands import fields
from ..redis.link import Link
from ..redis.scripts import Code

OWNER = "owner"
"""The name of the one consumer of a shard in each group. The lease says which process that is."""


class LinksByKey(Protocol):
    """See ``redis.links.Links``."""

    def at(self, key: str) -> Link: ...


@final
class Fence:
    """See the module. ``links``: the consumer's connections; all keys of a shard are on one server."""

    def __init__(self, lease: Lease, queue: str, shard: int | str, links: LinksByKey) -> None:
        self.lease = lease
        self.keys = lease.keys
        self.group = lease.group
        self.queue = queue
        self.shard = shard
        self.consumer_name = lease.incarnation if lease.shared else OWNER
        self.needs_audit = False
        """Whether replies may have been lost, with entries in them or beside: what is pending is to be compared with what is
        held. See ``Claimer.recover``."""
        self.voided = 0
        """How often fetches that were on their way were made void, under this lease."""
        self.head = (lease.token, lease.incarnation, lease.group)
        """How the arguments of nearly all scripts begin."""
        self.guard_command = fields(lease.key, "token", "owner")
        """What to ask for after WATCH: does this incarnation own the lease?"""
        self._record = [b"%d" % lease.token, lease.incarnation.encode()]
        self._links = links

    @property
    def link(self) -> Link:
        """The connection to the shard's server."""
        return self._links.at(self.keys.stream)

    def owns(self, answer: Sequence[bytes | None]) -> bool:
        """Whether that is the answer to ``guard_command`` that an owner gets."""
        return answer == self._record

    def run(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Calls a script. Raises ``LeaseLost``."""
        return self.checked(self.link.run(name, keys, args))

    def checked(self, answer: Any) -> Any:
        """The answer of a script that the owner alone may call. Raises ``LeaseLost``."""
        if type(answer) is int and answer == Code.LEASE_LOST:
            raise LeaseLost(f"shard {self.shard} of queue {self.queue!r} belongs to another process now")
        return answer
