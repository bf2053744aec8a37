"""Several processes on one queue: sharing, leaving, dying, being stopped, forking."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from kombu import Exchange, Queue

from tests.helpers import Spawned, Starved, spawn, wait_until
from tests.transport.kit import LEASE_S, Inbox, Kit, publish

EATER = Path(__file__).with_name("eater.py")


class Eaters:
    def __init__(self, kit: Kit, stack: ExitStack) -> None:
        self.kit, self._stack = kit, stack
        self.processes: list[Spawned] = []

    def start(self, **given: Any) -> Spawned:
        given = {"url": self.kit.url, "options": self.kit.options, **given}
        process = self._stack.enter_context(spawn(EATER, json.dumps(given)))
        self.processes.append(process)
        process.wait_line("ready")
        return process


@pytest.fixture
def eaters(kit: Kit) -> Iterator[Eaters]:
    with ExitStack() as stack:
        eaters = Eaters(kit, stack)
        yield eaters
        for process in eaters.processes:
            print(process)  # pytest shows it beside a failure


def eaten(*processes: Spawned) -> list[str]:
    """The bodies that came, by process."""
    return [
        line.split()[0]
        for process in processes
        for line in process.lines
        if line and line.split()[0] not in ("ready", "done", "error")
    ]


def done(*processes: Spawned) -> list[tuple[float, str]]:
    """When each body was acknowledged, in that order."""
    found = [line.split() for process in processes for line in process.lines if line.startswith("done ")]
    return sorted((float(at), body) for _, body, at in found)


def started(*processes: Spawned) -> list[tuple[float, str]]:
    found = [line.split() for process in processes for line in process.lines]
    return sorted(
        (float(words[1]), words[0]) for words in found if words and words[0] not in ("ready", "done", "error")
    )


# --- sharing -------------------------------------------------------------------------------------------------------------


def test_competing_consumers(kit: Kit, eaters: Eaters) -> None:
    """Each message once; all have some."""
    channel = kit.channel()
    kit.queue(channel)
    both = [eaters.start(sleep=0.01, prefetch=4) for _ in range(2)]
    publish(channel, *range(200))
    wait_until(lambda: len(done(*both)) == 200, 30)
    assert sorted(map(int, eaten(*both))) == list(range(200))
    assert all(len(done(process)) > 40 for process in both)


def test_a_slow_consumer_hoards_no_more_than_its_prefetch(kit: Kit, eaters: Eaters) -> None:
    channel = kit.channel()
    kit.queue(channel)
    slow = eaters.start(mode="hold", prefetch=3)
    publish(channel, *range(20))
    wait_until(lambda: len(eaten(slow)) == 3)
    fast = eaters.start()
    wait_until(lambda: len(done(fast)) == 17)
    assert sorted(map(int, eaten(slow, fast))) == list(range(20))


def test_keyed_order_over_processes(kit: Kit, eaters: Eaters) -> None:
    """Two processes, several keys: per key in order, never two at a time, while a third joins and one leaves."""
    channel = kit.channel()
    kit.queue(channel)
    processes = [eaters.start(sleep=0.02, prefetch=4) for _ in range(2)]
    keys = [f"u{n}" for n in range(12)]
    rounds = 0

    def publish_round() -> None:
        nonlocal rounds
        for key in keys:
            publish(channel, f"{key}:{rounds}", headers={"shard_key": key})
        rounds += 1

    for _ in range(6):
        publish_round()
    wait_until(lambda: len(done(*processes)) >= 30, 30)
    processes.append(eaters.start(sleep=0.02, prefetch=4))

    def third_has_its_share() -> bool:
        if len(done(*processes)) > 12 * (rounds - 3):
            publish_round()
        return len(done(processes[2])) >= 5

    wait_until(third_has_its_share, 30, lambda: f"{rounds} rounds, {len(done(processes[2]))} by the third")
    for _ in range(3):
        publish_round()
    leaving = processes[0]
    leaving.signal(signal.SIGTERM)
    leaving.wait()
    # Its last acknowledgement may have been its last act, before it could tell us.
    untold = set(eaten(leaving)) - {body for _, body in done(leaving)}
    assert len(untold) <= 1
    wait_until(lambda: len(untold | {body for _, body in done(*processes)}) == 12 * rounds, 40)
    client = kit.client()
    wait_until(lambda: sum(client.xlen(key) for key in kit.keys("{kombu.q.*:stream")) == 0)
    starts, ends = started(*processes), done(*processes)
    for key in keys:
        first = list(dict.fromkeys(body for _, body in starts if body.startswith(f"{key}:")))
        assert first == [f"{key}:{n}" for n in range(rounds)]
        for n in range(rounds - 1):
            # The next one starts when this one was acknowledged. What the terminated process ran may run again.
            end = max((at for at, body in ends if body == f"{key}:{n}"), default=0.0)
            assert end or f"{key}:{n}" in untold
            begin = min(at for at, body in starts if body == f"{key}:{n + 1}")
            assert begin >= end - 0.005
    assert all(done(process) for process in processes[1:])


def test_shards_spread_over_processes(kit: Kit, eaters: Eaters) -> None:
    """A second process takes half of the shards; and all when the first has died."""
    channel = kit.channel()
    kit.queue(channel)
    first = eaters.start(prefetch=100)
    for n in range(40):
        publish(channel, n, headers={"shard_key": f"u{n}"})
    wait_until(lambda: len(done(first)) == 40)
    second = eaters.start(prefetch=100)
    numbers = iter(range(1000, 100_000))

    def both_work() -> bool:
        for n in range(20):
            publish(channel, next(numbers), headers={"shard_key": f"u{n}"})
        return bool(done(second)) and len(done(first)) > 40

    wait_until(both_work, 15, poll=0.1)
    first.kill_group()
    before = len(done(second))
    for n in range(40):
        publish(channel, 200_000 + n, headers={"shard_key": f"u{n}"})
    wait_until(lambda: {int(body) for _, body in done(second)} >= set(range(200_000, 200_040)), LEASE_S * 2 + 5)
    assert len(done(second)) > before


# --- leaving -------------------------------------------------------------------------------------------------------------


def test_shards_are_released_when_the_connection_is(kit: Kit, eaters: Eaters) -> None:
    """The process goes on living; another one has the queue's shards at once."""
    channel = kit.channel()
    kit.queue(channel)
    connection = kit.connect()
    inbox = Inbox(connection.channel(), "q", prefetch=100)
    for n in range(20):
        publish(channel, n, headers={"shard_key": f"u{n}"})
    for _ in range(20):
        inbox.take()[0].ack()
    connection.release()
    other = eaters.start(prefetch=100)
    for n in range(20):
        publish(channel, 100 + n, headers={"shard_key": f"u{n}"})
    wait_until(lambda: len(done(other)) == 20, 5)


def test_no_keeper_without_a_consumer_of_keys(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, headers={"shard_key": "a"})
    connection = kit.connect()
    inbox = Inbox(connection.channel(), "q")
    inbox.take()[0].ack()
    session = connection.transport.session
    wait_until(lambda: inbox.drain(0.05) or len(session.consumed["q"].shards) == 8)
    connection.release()
    wait_until(lambda: session.ownership.fileno() < 0, 3)


def test_no_keeper_without_a_consumer(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1)
    connection = kit.connect()
    Inbox(connection.channel(), "q").take()[0].ack()
    session = connection.transport.session
    assert session.ownership.fileno() >= 0
    connection.release()
    assert session.ownership.fileno() < 0
    assert (
        kit.client().zcard(kit.keys("{kombu.q.*}:consumers:*")[0]) == 0 if kit.keys("{kombu.q.*}:consumers:*") else True
    )


def test_publishing_needs_no_keeper(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1)
    publish(channel, 2, headers={"shard_key": "a"})
    assert channel.connection.session.ownership.fileno() < 0
    assert channel._size("q") == 2


def test_getting_without_acknowledging_leaves_no_lease(kit: Kit) -> None:
    channel = kit.channel()
    queue = kit.queue(channel)
    publish(channel, 1)
    assert queue.get(no_ack=True).payload == 1
    session = channel.connection.session
    channel.close()
    wait_until(lambda: session.ownership.fileno() < 0)


# --- dying ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "keyed"])
def test_killed_while_it_holds_messages(kit: Kit, eaters: Eaters, kind: str) -> None:
    """kill -9 of the consumer alone: its keeper gives its messages back at once, first and in order."""
    channel = kit.channel()
    kit.queue(channel)
    victim = eaters.start(mode="hold", prefetch=5)
    headers = [{"shard_key": f"u{n}"} if kind == "keyed" else {} for n in range(5)]
    for n in range(5):
        publish(channel, n, headers=headers[n])
    wait_until(lambda: len(eaten(victim)) == 5)
    other = eaters.start(prefetch=1)
    for n in range(5):
        publish(channel, 10 + n, headers=headers[n])
    wait_until(lambda: kind == "keyed" or len(done(other)) == 5)
    victim.kill()
    watch = Starved()
    wait_until(lambda: len(done(other)) == 10, 10)
    assert watch.spent < LEASE_S + 1
    again = [line.split()[0] for line in other.lines if line.endswith("again")]
    assert sorted(again) == [str(n) for n in range(5)]
    if kind == "plain":
        assert again == [str(n) for n in range(5)]


def test_killed_with_its_keeper(kit: Kit, eaters: Eaters) -> None:
    """A machine that is gone: its lease runs out."""
    channel = kit.channel()
    kit.queue(channel)
    victim = eaters.start(mode="hold", prefetch=5)
    publish(channel, *range(5))
    wait_until(lambda: len(eaten(victim)) == 5)
    keeper = keeper_of(victim.pid)
    os.kill(victim.pid, signal.SIGSTOP)
    os.kill(keeper, signal.SIGKILL)
    victim.kill()
    other = eaters.start(prefetch=1)
    watch = Starved()
    wait_until(lambda: len(done(other)) == 5, 15)
    assert watch.spent < LEASE_S + 3
    assert [body for _, body in done(other)] == [str(n) for n in range(5)]


def keeper_of(pid: int) -> int:
    """The pid of a process' keeper."""
    for name in os.listdir("/proc"):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes() if name.isdigit() else b""
            status = Path(f"/proc/{name}/status").read_text() if b"keeper_main" in words else ""
        except OSError:
            continue
        if f"PPid:\t{pid}\n" in status:
            return int(name)
    raise AssertionError(f"{pid} has no keeper")


@pytest.mark.parametrize("kind", ["plain", "keyed"])
def test_stopped_beyond_its_lease(kit: Kit, eaters: Eaters, kind: str) -> None:
    """SIGSTOP: others take over; when it goes on, its late acks change nothing, and it consumes again."""
    channel = kit.channel()
    kit.queue(channel)
    victim = eaters.start(sleep=0.5, prefetch=3)
    for n in range(3):
        publish(channel, n, headers={"shard_key": f"u{n}"} if kind == "keyed" else {})
    wait_until(lambda: eaten(victim))
    victim.signal(signal.SIGSTOP)
    other = eaters.start(prefetch=3)
    wait_until(lambda: len(done(other)) == 3, LEASE_S * 3 + 5)
    victim.signal(signal.SIGCONT)
    other.signal(signal.SIGTERM)
    other.wait()
    publish(channel, "new")
    wait_until(lambda: "new" in eaten(victim), 10)
    assert channel._size("q") == 0
    wait_until(lambda: kit.pending() == 0)


def test_its_keeper_is_killed(kit: Kit, eaters: Eaters) -> None:
    """Another one is started, and nothing is delivered twice."""
    channel = kit.channel()
    kit.queue(channel)
    eater = eaters.start(prefetch=2, sleep=0.01)
    publish(channel, *range(20))
    wait_until(lambda: len(done(eater)) == 20)
    first = keeper_of(eater.pid)
    os.kill(first, signal.SIGKILL)
    second: list[int] = []

    def another() -> bool:
        try:
            second[:] = [keeper_of(eater.pid)]
        except AssertionError:
            return False
        return second[0] != first

    publish(channel, *range(20, 40))
    wait_until(another, 10)
    time.sleep(LEASE_S)  # on purpose: what the new one does not renew runs out
    publish(channel, *range(40, 60))
    for n in range(5):
        publish(channel, 60 + n, headers={"shard_key": f"u{n}"})
    wait_until(lambda: len(done(eater)) == 65, 15)
    assert sorted(map(int, eaten(eater))) == list(range(65))
    assert not any(line.startswith("error") for line in eater.lines)


# --- forking -------------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], Any]) -> str:
    """Runs it in a forked child, and gives what it returns, or its error."""
    import warnings

    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        pid = os.fork()
    if pid == 0:
        try:
            try:
                text = str(work())
            except BaseException as exc:
                text = repr(exc)
            os.write(write, text.encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text


def in_process(work: Callable[[], Any]) -> str:
    """The same in a process of multiprocessing's, which has hooks of its own after a fork."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=lambda: answers.put(str(work())))
    process.start()
    process.join(20)
    assert process.exitcode == 0
    return str(answers.get())


def test_a_forked_child_restores_nothing(kit: Kit) -> None:
    """It closes what it inherited, as a pool process of Celery does: the parent's deliveries stay the parent's."""
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(5))
    connection = kit.connect()
    consuming = connection.channel()
    inbox = Inbox(consuming, "q", prefetch=3)
    messages = inbox.take(3)

    def close_all() -> str:
        messages[0].ack()
        consuming.close()
        connection.release()
        return "closed"

    assert in_child(close_all) == "closed"
    assert not Inbox(kit.channel(), "q", prefetch=1).take()[0].delivery_info.get("redelivered")
    assert kit.pending() == 4
    for message in messages:
        message.ack()
    wait_until(lambda: kit.pending() == 1)
    assert inbox.take(1)[0].payload == 4


def test_a_forked_child_publishes_and_consumes_on_its_own(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, "parent")
    connection = kit.connect()
    inbox = Inbox(connection.channel(), "q", prefetch=1)
    inbox.take()

    def work() -> str:
        mine = kit.connect()
        queue = mine.SimpleQueue("other")
        queue.put("child")
        mine.Producer().publish("from the child", routing_key="q")
        message = queue.get(timeout=5)
        message.ack()
        queue.close()
        mine.release()
        return str(message.payload)

    assert in_child(work) == "child"
    inbox.messages[0].ack()
    assert inbox.take()[0].payload == "from the child"


def test_a_forked_child_may_use_the_inherited_connection(kit: Kit) -> None:
    """Not by kombu's rules, but people do: it must neither hang nor disturb the parent's sockets."""
    connection = kit.connect()
    channel = connection.channel()
    kit.queue(channel)
    producer = connection.Producer()
    producer.publish(0, routing_key="q")
    assert in_child(lambda: producer.publish(1, routing_key="q") or "fine") == "fine"
    for n in range(2, 12):
        producer.publish(n, routing_key="q")
    assert sorted(Inbox(kit.channel(), "q").drain_all()) == list(range(12))


@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
@pytest.mark.parametrize("consumed", [False, True])
def test_a_forked_child_gets_over_the_inherited_connection(kit: Kit, how: str, consumed: bool) -> None:
    """As if the connection was its own: what its parent has taken, and has room for, is the parent's affair."""
    connection = kit.connect()
    queue = connection.SimpleQueue("q")
    connection.default_channel.basic_qos(0, 1, False)
    queue.put("parent's")
    if consumed:
        assert queue.get(timeout=5).payload == "parent's"  # and does not acknowledge it
    queue.put("child's")

    def work() -> str:
        found = []
        for _ in range(1 if consumed else 2):
            message = queue.get(timeout=5)
            message.ack()
            found.append(message.payload)
        queue.close()
        return ",".join(found)

    assert (in_child if how == "fork" else in_process)(work) == ("child's" if consumed else "parent's,child's")
    wait_until(lambda: kit.pending() == int(consumed))


def test_a_forked_child_listens_to_the_fanout_that_its_parent_listened_to(kit: Kit) -> None:
    connection = kit.connect()
    channel = connection.channel()
    fanned = Queue("fanned", Exchange("fan", type="fanout"), auto_delete=True)(channel)
    fanned.declare()
    inbox = Inbox(channel, fanned, no_ack=True)
    while inbox.drain(0.05):
        pass

    def work() -> str:
        inbox.drain(5)  # it has subscribed
        connection.Producer().publish("x", exchange="fan")
        (message,) = inbox.take()
        channel.close()
        return str(message.payload)

    assert in_child(work) == "x"
    connection.Producer().publish("y", exchange="fan")
    inbox.take(2)
    assert inbox.bodies == ["x", "y"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_forked_child_holds_no_socket_that_its_parent_waits_for(kit: Kit) -> None:
    """While it does, an epoll of its parent goes on to report what the parent has closed, by a number that may be another's."""

    def names(fds: Iterable[Any]) -> set[str]:
        found = set()
        for fd in fds:
            with contextlib.suppress(FileNotFoundError):
                found.add(os.readlink(f"/proc/self/fd/{fd}"))
        return found

    connection = kit.connect()
    channel = connection.channel()
    kit.queue(channel)
    fanned = Queue("fanned", Exchange("fan", type="fanout"))(channel)
    fanned.declare()
    inbox = Inbox(channel, "q", prefetch=1)
    other = Inbox(channel, fanned, no_ack=True)
    connection.Producer().publish("x", routing_key="q")
    connection.Producer().publish("y", exchange="fan")
    inbox.take()
    other.take()
    inbox.drain(0.05)  # the bell waits
    watched = names(connection.transport.poller._sockets())
    assert len(watched) >= 3  # the keeper's, the listener's, the waker; the bell's where it waits
    assert in_child(lambda: sorted(watched & names(os.listdir("/proc/self/fd")))) == "[]"
    inbox.messages[0].ack()
    connection.Producer().publish("z", exchange="fan")
    assert other.take()[0].payload == "z"


FORKING = """
    import os, sys
    from kombu import Connection
    import streamtask.transport

    url, namespace = sys.argv[1:]
    connection = Connection(url, transport_options={"namespace": namespace})
    producer = connection.Producer()
    queues = [f"q{n}" for n in range(6)]

    def send(who):
        for n in range(30):
            for queue in queues:
                producer.publish([who, n], routing_key=queue, headers={"shard_key": f"k{n}"} if n % 2 else {})

    for queue in queues:
        connection.SimpleQueue(queue).put(["before", 0])  # it is open when the children begin
    children = []
    for who in range(6):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                send(f"child{who}")
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    send("parent")
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 6
    send("after")
"""


@pytest.mark.slow
def test_many_forked_children_publish_to_queues_that_their_parent_had_opened(kit: Kit, tmp_path: Path) -> None:
    """As under a web server that loads the app before it forks. Two processes on one socket would read each other's replies."""
    script = tmp_path / "forking.py"
    script.write_text(textwrap.dedent(FORKING))
    with spawn(script, kit.url, kit.namespace) as process:
        assert process.wait(30) == 0, process
    published = [["before", 0]]
    published += [[who, n] for who in ("parent", "after", *(f"child{who}" for who in range(6))) for n in range(30)]
    for queue in range(6):
        inbox = Inbox(kit.channel(), f"q{queue}", no_ack=True)
        inbox.take(len(published), timeout=30)
        assert sorted(inbox.bodies) == sorted(published)


def test_ids_of_a_forked_child_are_its_own(kit: Kit) -> None:
    """Publishes of parent and child after a fork are not taken for repeats of each other."""
    connection = kit.connect()
    kit.queue(connection.channel())
    connection.Producer().publish("first", routing_key="q")

    def work() -> str:
        for n in range(20):
            kit.connect().Producer().publish(f"child {n}", routing_key="q")
        return "fine"

    assert in_child(work) == "fine"
    for n in range(20):
        connection.Producer().publish(f"parent {n}", routing_key="q")
    assert in_child(work) == "fine"
    assert kit.channel()._size("q") == 61


def test_a_forked_childs_death_gives_nothing_back(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1)
    inbox = Inbox(kit.channel(), "q")
    message = inbox.take()[0]
    assert in_child(lambda: "dead") == "dead"
    other = Inbox(kit.connect(transport_options={"eta_hold": 59}).channel(), "q")
    assert not other.drain(1)
    message.ack()
    wait_until(lambda: kit.pending() == 0)
