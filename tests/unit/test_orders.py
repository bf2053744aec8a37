"""What passes between an owner and who keeps its leases (``coordination/orders.py``)."""

import selectors
import socket
from typing import get_args

import pytest

from streamtask.coordination.orders import (
    Consume,
    Order,
    Own,
    PatientWire,
    Release,
    Resume,
    Revoked,
    Wire,
    from_line,
    to_line,
)

OWN = Own(3, "q", 7, epoch=1, token=12, incarnation="i", shared=False, by_expiry=True)
VALUES = {
    "int": 5,
    "str": "x",
    "float": 0.5,
    "bool": True,
    "int | str": "shared",
    "list[str]": ["a"],
    "list[Own]": [OWN],
}


def example(kind: type) -> Order:
    """One with other values than a default would have."""
    return kind(*(VALUES[str(kind.__annotations__[name])] for name in kind.__slots__))


@pytest.mark.parametrize("kind", get_args(Order), ids=lambda kind: kind.__name__)
def test_each_arrives_as_it_was_sent(kind: type):
    order = example(kind)
    assert from_line(to_line(order)) == order


class Sides:
    """Two ends, of which one reads only when ``read`` is called."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        theirs.settimeout(5)
        self.selector = selectors.DefaultSelector()
        self.keeps = PatientWire(ours, self.selector, "owner")
        self.owner = Wire(theirs)

    def fill(self) -> int:
        """Sends until nothing more is taken; so many it were."""
        sent = 0
        while self.selector.get_key(self.keeps).events & selectors.EVENT_WRITE == 0:
            self.keeps.send(Consume("full" * 100, []))
            sent += 1
        return sent

    def read(self) -> list[Order]:
        found: list[Order] = []
        while self.selector.get_key(self.keeps).events & selectors.EVENT_WRITE:
            found += self.owner.receive()
            self.keeps.flush()
        self.keeps.send(Resume(-1))
        while Resume(-1) not in found:
            found += self.owner.receive()
        return [order for order in found[:-1] if not isinstance(order, Consume)]

    def close(self) -> None:
        self.keeps.close()
        self.owner.close()
        self.selector.close()


@pytest.fixture
def sides():
    both = Sides()
    yield both
    both.close()


def test_what_was_not_read_is_taken_back(sides: Sides):
    sides.fill()
    sides.keeps.send(OWN)
    for number in (1, 2):
        sides.keeps.send(Release(number))
    sides.keeps.send(Resume(1))
    assert sides.read() == [OWN, Release(2)]


def test_what_was_read_is_not(sides: Sides):
    sides.keeps.send(Release(1))
    sides.keeps.send(Resume(1))
    assert sides.read() == [Release(1), Resume(1)]


def test_what_is_late_is_made_when_it_is_its_turn(sides: Sides):
    ids = ["a"]
    sides.fill()
    for _ in range(3):
        sides.keeps.send_late("q", lambda: Revoked("q", list(ids), []))
    ids.append("b")
    assert sides.read() == [Revoked("q", ["a", "b"], [])]
