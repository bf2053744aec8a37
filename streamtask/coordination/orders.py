"""What a process and the one that keeps its leases say to each other, and the socket between them: a line of JSON for each
order. Its end of file says that the other has died.

A supervisor and its child say some of it, a keeper and its client the rest; both sides are of one version.
"""

from __future__ import annotations

import json
import selectors
import socket
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, get_args

# Who keeps leases tells their owner


@dataclass(frozen=True, slots=True)
class Own:
    """A shard, or a place in a shared stream, is its own from now on; with a token that it knows, it was all the time."""

    number: int
    """By which both call the lease. No other has it until it is given back or lost."""
    queue: str
    shard: int | str
    epoch: int
    token: int
    incarnation: str
    shared: bool
    by_expiry: bool
    """Whether the last owner's time was over: nobody has said what ran there."""


@dataclass(frozen=True, slots=True)
class Release:
    """Hand out nothing more of it, and say ``Released`` when nothing of it runs."""

    number: int


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on with it after all."""

    number: int


@dataclass(frozen=True, slots=True)
class Revoked:
    """Ids of tasks that are not to begin, and of those of which that is over."""

    queue: str
    ids: list[str]
    over: list[str]


@dataclass(frozen=True, slots=True)
class Stop:
    """Release everything, for good."""


@dataclass(frozen=True, slots=True)
class End:
    """Nothing of it is left here: end the process."""


@dataclass(frozen=True, slots=True)
class Up:
    """A keeper renews what it was told of. Its start takes a while, above a lease time where the machine is busy: until then
    its client renews itself."""


@dataclass(frozen=True, slots=True)
class LostShared:
    """What was delivered from a shared stream is others' now."""

    prefix: str
    token: int


# Both say


@dataclass(frozen=True, slots=True)
class Lost:
    """It is another's now."""

    number: int
    queue: str
    shard: int | str
    token: int


# An owner tells who keeps its leases


@dataclass(frozen=True, slots=True)
class Ready:
    """The process has started, and can own."""


@dataclass(frozen=True, slots=True)
class Released:
    """Nothing of it runs or is unsettled here any more."""

    number: int


# A client tells its keeper


@dataclass(frozen=True, slots=True)
class Start:
    """The first: whose leases they are. ``broker``: see ``keeper.unpack_broker``; ``last``: the highest number of a lease that
    the keeper before it has given."""

    broker: str
    namespace: str
    app: str
    group: str
    incarnation: str
    lease_ms: int
    handover_timeout_s: float
    last: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Renew the lease of a consumer of a shared stream, and remove dead consumers of that stream."""

    prefix: str
    group: str
    incarnation: str
    lease_ms: int
    token: int
    alive: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Renew it no longer, nor give it back at the end; unless it is kept again it ends one lease time later."""

    prefix: str
    token: int


@dataclass(frozen=True, slots=True)
class Consume:
    """Take part in the assignment of a queue's shards. ``owned``: those that the client owns, as the last keeper gave them."""

    queue: str
    owned: list[Own]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Leave the queue's members, and give back its shards."""

    queue: str


@dataclass(frozen=True, slots=True)
class Touch:
    """Put off the end of a queue that expires unless it is used; 0: no longer."""

    queue: str
    expires_ms: int


@dataclass(frozen=True, slots=True)
class Close:
    """Leave all queues' members and end, giving back nothing."""


Order: TypeAlias = (
    Own | Release | Resume | Revoked | Stop | End | Up | Lost | LostShared
    | Ready | Released
    | Start | Keep | Forget | Consume | Cancel | Touch | Close
)  # fmt: skip
_BY_NAME = {kind.__name__: kind for kind in get_args(Order)}


def to_line(order: Order) -> bytes:
    return json.dumps({"op": type(order).__name__, **_fields(order)}, default=_fields).encode() + b"\n"


def _fields(order: Order) -> dict[str, object]:
    return {name: getattr(order, name) for name in order.__slots__}


def from_line(line: bytes) -> Order:
    fields = json.loads(line)
    kind = _BY_NAME[fields.pop("op")]
    if kind is Consume:
        fields["owned"] = [Own(**{name: one[name] for name in Own.__slots__}) for one in fields["owned"]]
    order: Order = kind(**fields)
    return order


@dataclass(frozen=True, slots=True)
class _Late:
    """An order that is made when it is its turn to be sent."""

    about: Hashable
    make: Callable[[], Order] = field(compare=False)


class Closed(Exception):
    """The other side is gone."""


class Wire:
    """The owner's end: the other one always reads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, order: Order) -> None:
        """Says nothing if the other side is gone, which its end of file will tell."""
        try:
            self._sock.sendall(to_line(order))
        except OSError:
            pass

    def receive(self) -> Iterator[Order]:
        """The orders that have arrived as a whole. Raises ``Closed``."""
        try:
            data = self._sock.recv(65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            raise Closed
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            yield from_line(line)

    def close(self) -> None:
        self._sock.close()


class PatientWire(Wire):
    """The end of who keeps leases: the other one may read nothing for hours, and nothing here waits for it.

    Call ``flush`` when the selector, where it is registered with ``data``, says that it is writable. What waits is bounded
    by what there is to own: a ``Resume`` takes back a ``Release`` that was not read yet, and what ``send_late`` was given waits
    once.
    """

    def __init__(self, sock: socket.socket, selector: selectors.BaseSelector, data: object) -> None:
        super().__init__(sock)
        sock.setblocking(False)
        self._selector = selector
        self._data = data
        self._unsent: deque[Order | _Late | bytes] = deque()
        selector.register(self, selectors.EVENT_READ, data)

    def send(self, order: Order) -> None:
        taken_back = Release(order.number) if isinstance(order, Resume) else None
        if taken_back is not None and taken_back in self._unsent:
            self._unsent = deque(one for one in self._unsent if one != taken_back)
        else:
            self._unsent.append(order)
        self.flush()

    def send_late(self, about: Hashable, make: Callable[[], Order]) -> None:
        """Sends what ``make`` answers when it is its turn; ``about`` tells one such order from another."""
        late = _Late(about, make)
        if late not in self._unsent:
            self._unsent.append(late)
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes."""
        try:
            while self._unsent:
                one = self._unsent.popleft()
                made = one.make() if isinstance(one, _Late) else one
                line = made if isinstance(made, bytes) else to_line(made)
                try:
                    sent = self._sock.send(line)
                except BlockingIOError:
                    sent = 0
                if sent == 0 and made is one:
                    self._unsent.appendleft(one)
                elif sent < len(line):
                    self._unsent.appendleft(line[sent:])  # to be neither taken back nor changed
                if sent == 0:
                    break
        except OSError:
            self._unsent.clear()  # its end of file will tell
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        if self.fileno() >= 0 and self._selector.get_key(self).events != events:
            self._selector.modify(self, events, self._data)

    def close(self) -> None:
        if self.fileno() >= 0:
            self._selector.unregister(self)
        self._unsent.clear()
        super().close()
