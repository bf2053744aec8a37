"""``streamtask migrate``: what lies in a broker of kombu's redis transport moves on, whole, and back."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
import redis
from click.testing import CliRunner

import streamtask.transport  # noqa: F401  registers its schemes
from streamtask.cli import main
from tests.fix_proxy import Proxy
from tests.fix_redis import RedisServer
from tests.helpers import free_port, spawn, wait_until

LEFT = "_streamtask.migrate"


class Old:
    """An app on kombu's redis transport, in database 0 of a server; database 1 is the place to move to."""

    def __init__(self, server: RedisServer, **options: Any) -> None:
        self.server = server
        self.source, self.target = f"{server.url[:-1]}0", f"{server.url[:-1]}1"
        self.client = redis.Redis.from_url(self.source)
        self.moved = redis.Redis.from_url(self.target)
        self.connection = kombu.Connection(self.source, transport_options=options)
        self.producer = self.connection.Producer()
        self.exchange = kombu.Exchange("shop", "topic")

    def send(self, number: int, queue: str = "celery", **options: Any) -> None:
        """A message as Celery sends it."""
        self.producer.publish(
            [[number], {}, {"chain": None}],
            routing_key=queue,
            correlation_id=f"id-{number}",
            reply_to="me",
            headers={"task": "shop.work", "id": f"id-{number}", "lang": "py", "shard_key": "42"},
            serializer="json",
            delivery_mode=2,
            declare=[kombu.Queue(queue)],
            **options,
        )

    def close(self) -> None:
        self.connection.release()
        self.client.close()
        self.moved.close()

    def hold(self, queue: str, number: int) -> kombu.Connection:
        """A worker that has taken so many messages and is gone without a word, as after kill -9."""
        worker = kombu.Connection(self.source)
        channel: Any = worker.channel()
        channel.do_restore = False
        for _ in range(number):
            assert channel.basic_get(queue) is not None
        return worker


@pytest.fixture
def old(redis_server: RedisServer) -> Iterator[Old]:
    app = Old(redis_server)
    yield app
    app.close()


Run = Callable[..., subprocess.CompletedProcess[str]]


def command(*args: str) -> list[str]:
    return ["-m", "streamtask", "migrate", *args]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def call(*args: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        with spawn(*command(*args), cwd=tmp_path) as process:
            code = process.wait(60)
            done = subprocess.CompletedProcess(args, code, process.stdout, process.stderr)
        assert code == status, f"{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return call


# In a process of its own: a consumer of streams has a keeper beside it, which ends with its process.
DRAIN = """
import base64, json, sys, time
import kombu, streamtask.transport

url, queue, total = sys.argv[1], sys.argv[2], int(sys.argv[3])
with kombu.Connection(url) as connection:
    channel = connection.channel()
    found, end = 0, time.monotonic() + 20
    while found < total and time.monotonic() < end:
        message = channel.basic_get(queue)
        if message is None:
            time.sleep(0.02)
            continue
        found += 1
        body = message.body.encode() if isinstance(message.body, str) else bytes(message.body)
        print(json.dumps({
            "body": base64.b64encode(body).decode(),
            "content-type": message.content_type,
            "content-encoding": message.content_encoding,
            "headers": message.headers,
            "properties": message.properties,
            "payload": message.payload,
        }))
        channel.basic_ack(message.delivery_tag)
    assert channel.basic_get(queue) is None, "more than expected"
"""


HOLD = """
import sys, time
import kombu, streamtask.transport

with kombu.Connection(sys.argv[1]) as connection:
    channel = connection.channel()
    while (message := channel.basic_get(sys.argv[2])) is None:
        time.sleep(0.02)
    print("got", message.headers["id"])
    time.sleep(100)
"""


def drain(url: str, queue: str, total: int) -> list[dict[str, Any]]:
    """All messages of a queue, taken as a consumer takes them."""
    with spawn("-c", DRAIN, url, queue, str(total)) as process:
        assert process.wait(30) == 0, str(process)
        return [json.loads(line) for line in process.lines]


def streams(url: str) -> str:
    return url.replace("redis://", "streamtask://")


def numbers(items: list[bytes]) -> list[int]:
    """Of a list's messages, the oldest first."""
    return [int(json.loads(item)["headers"]["id"].partition("-")[2]) for item in reversed(items)]


def test_a_queue_moves_with_its_priorities_and_every_byte(old: Old, run: Run) -> None:
    for number in range(250):
        old.send(number, priority=(0, 3, 5, 9)[number % 4], expiration=3600)
    old.send(900, queue="other")
    keys = ["celery", "celery\x06\x163", "celery\x06\x169"]
    before = {key: old.client.lrange(key, 0, -1) for key in keys}
    assert [len(items) for items in before.values()] == [63, 125, 62]

    done = run("--from", old.source, "--to", old.target, "--queues", "celery", "--json")
    report = json.loads(done.stdout)
    assert report["moved"] == {"celery": 250}
    assert report["priorities"] == {"celery": {"0": 63, "3": 125, "9": 62}}
    assert {key: old.moved.lrange(key, 0, -1) for key in keys} == before
    assert {key for key in old.client.scan_iter() if not key.startswith(b"_kombu.")} == {b"other"}
    assert [key for key in old.moved.scan_iter() if key.startswith(LEFT.encode())] == [f"{LEFT}.stored".encode()]

    # Again: nothing more to do, and nothing doubled.
    assert run("--from", old.source, "--to", old.target, "--queues", "celery").stdout == "nothing to move\n"
    assert {key: old.moved.lrange(key, 0, -1) for key in keys} == before


def test_dry_run_only_counts(old: Old, run: Run) -> None:
    for number in range(3):
        old.send(number, priority=number * 3)
    before = {key: old.client.dump(key) for key in old.client.scan_iter()}
    text = run("--from", old.source, "--to", old.target, "--queues", "celery", "--dry-run").stdout
    assert text == "celery: would move 3 messages (1 of priority 3, 1 of priority 6)\n"
    assert {key: old.client.dump(key) for key in old.client.scan_iter()} == before
    assert old.moved.keys() == []


def test_all_finds_the_queues(old: Old, run: Run) -> None:
    old.send(1, queue="bound")
    old.producer.publish({}, routing_key="simple", headers={"id": "id-2"})  # bound to nothing
    old.send(3, queue="urgent", priority=9)
    old.send(4, queue="abc.reply.celery.pidbox")
    old.client.rpush("somebody-elses-list", "text", "more")
    old.client.set("celery-task-meta-1", "{}")
    report = json.loads(run("--from", old.source, "--to", old.target, "--all", "--json").stdout)
    assert report["moved"] == {"bound": 1, "simple": 1, "urgent": 1}
    assert report["skipped"] == ["abc.reply.celery.pidbox"]
    assert old.client.llen("somebody-elses-list") == 2
    assert old.client.llen("abc.reply.celery.pidbox") == 1
    assert old.moved.llen("urgent\x06\x169") == 1


def test_a_key_prefix_and_another_separator(redis_server: RedisServer, run: Run) -> None:
    options = {"global_keyprefix": "shop*:", "sep": ":"}
    app = Old(redis_server, **options)
    for number in range(4):
        app.send(number, priority=9 * (number % 2))
    app.client.lpush("celery", "of somebody else")
    assert app.client.llen("shop*:celery:9") == 2
    held = kombu.Connection(app.source, transport_options=options)
    channel: Any = held.channel()
    channel.do_restore = False
    assert channel.basic_get("celery") is not None
    args = ["--from", app.source, "--to", app.target, "--from-options", json.dumps(options), "--all"]
    report = json.loads(run(*args, "--json", "--unacked", "--to-options", '{"global_keyprefix": "new:"}').stdout)
    assert report["moved"] == {"celery": 4}
    assert report["restored"] == {"celery": 1}
    assert numbers(app.moved.lrange("new:celery", 0, -1)) == [0, 2]
    assert numbers(app.moved.lrange("new:celery\x06\x169", 0, -1)) == [1, 3]
    assert app.client.lrange("celery", 0, -1) == [b"of somebody else"]
    held.release()
    app.close()


def test_junk_stays_where_it_is_and_is_named(old: Old, run: Run) -> None:
    for number in range(3):
        old.send(number)
        old.client.lpush("celery", f"junk {number}")
    old.client.rpush("celery", '{"body": "x", "properties": {}}')
    done = run("--from", old.source, "--to", old.target, "--queues", "celery", status=1)
    assert "celery: moved 3 messages" in done.stdout
    assert "4 not moved, and still where they were" in done.stdout
    assert "start junk 1" in done.stdout
    assert "lacks a delivery tag" in done.stdout
    rest = [b"junk 2", b"junk 1", b"junk 0", b'{"body": "x", "properties": {}}']
    assert old.client.lrange("celery", 0, -1) == rest
    assert not old.client.keys(f"{LEFT}*")
    assert numbers(old.moved.lrange("celery", 0, -1)) == [0, 1, 2]
    report = json.loads(run("--from", old.source, "--to", old.target, "--queues", "celery", "--json", status=1).stdout)
    assert [row["why"].partition(":")[0] for row in report["not_moved"]] == ["no message", *["no JSON"] * 3]
    assert old.client.lrange("celery", 0, -1) == rest


def test_what_workers_hold_is_taken_only_when_asked_for(old: Old, run: Run) -> None:
    for number in range(4):
        old.send(number)
    for number in range(10, 13):
        old.send(number, priority=9)
    topic = kombu.Queue("mails", old.exchange, routing_key="mail.#")
    old.producer.publish({}, exchange=old.exchange, routing_key="mail.user", declare=[topic], headers={"id": "id-20"})
    workers = [old.hold("celery", 4), old.hold("mails", 1)]  # 0, 10, ... by priority 0 first in kombu
    assert old.client.hlen("unacked") == 5
    old.client.hset("unacked", "broken", "junk")
    old.client.hset(
        "unacked", "gone", json.dumps([json.loads(old.client.lindex("celery\x06\x169", 0)), "nowhere", "x"])
    )

    args = ["--from", old.source, "--to", old.target, "--all"]
    done = run(*args, "--dry-run", status=1)
    assert "celery: workers hold 4 more; once they are stopped, --unacked takes these, too" in done.stdout
    report = json.loads(run(*args, "--json", status=1).stdout)
    assert (report["moved"], report["held"]) == ({"celery": 3}, {"celery": 4, "mails": 1})
    assert numbers(old.moved.lrange("celery\x06\x169", 0, -1)) == [10, 11, 12]

    report = json.loads(run(*args, "--unacked", "--json", status=1).stdout)
    assert (report["moved"], report["restored"]) == ({"celery": 4, "mails": 1}, {"celery": 4, "mails": 1})
    assert numbers(old.moved.lrange("celery", 0, -1)) == [0, 1, 2, 3]
    for item in old.moved.lrange("celery", 0, -1) + old.moved.lrange("mails", 0, -1):
        message = json.loads(item)
        assert message["headers"]["redelivered"] is True
        assert message["properties"]["delivery_info"]["redelivered"] is True
    assert sorted(row["tag"] for row in report["not_moved"]) == ["broken", "gone"]
    assert sorted(old.client.hkeys("unacked")) == [b"broken", b"gone"]
    assert old.client.zcard("unacked_index") == 0
    for worker in workers:
        worker.release()


def test_it_may_be_killed_at_any_instant(
    old: Old, run: Run, proxy: Callable[[Any], Proxy], redis_server: RedisServer, tmp_path: Path
) -> None:
    total = 400
    for number in range(total):
        old.send(number, priority=(0, 9)[number % 2])
    link = proxy(redis_server)
    dice = random.Random(4)
    args = ["--queues", "celery"]

    def moved() -> int:
        return old.moved.llen("celery") + old.moved.llen("celery\x06\x169")

    for turn in range(6):
        goal = moved() + dice.randrange(5, 60)
        # Slow enough that the kill falls between any two commands, of either side.
        link.delay(0.002)
        with spawn(*command("--from", f"{link.url[:-1]}0", "--to", f"{link.url[:-1]}1", *args), cwd=tmp_path) as one:
            wait_until(lambda goal=goal: moved() >= goal, 30, lambda one=one: str(one))
            time.sleep(dice.random() * 0.006)  # not for something to happen: for a random place
            one.kill()
        if turn == 2:
            old.send(1000)
    link.delay(0)
    run("--from", old.source, "--to", old.target, *args)
    assert numbers(old.moved.lrange("celery", 0, -1)) == [*range(0, total, 2), 1000]
    assert numbers(old.moved.lrange("celery\x06\x169", 0, -1)) == list(range(1, total, 2))
    assert not old.client.keys(f"{LEFT}*")


def test_a_lost_reply_doubles_nothing(old: Old, run: Run, proxy: Callable[[Any], Proxy], redis_server: Any) -> None:
    for number in range(20):
        old.send(number)
    link = proxy(redis_server)
    link.cut_after_request(b"LPUSH", times=3)
    run("--from", old.source, "--to", f"{link.url[:-1]}1", "--queues", "celery")
    assert link.cuts == 3
    assert numbers(old.moved.lrange("celery", 0, -1)) == list(range(20))


@pytest.mark.slow
def test_when_the_new_broker_dies_nothing_is_lost_and_the_next_run_goes_on(
    old: Old, run: Run, own_server: RedisServer, proxy: Callable[[Any], Proxy], tmp_path: Path
) -> None:
    for number in range(150):
        old.send(number)
    link = proxy(own_server)
    link.delay(0.002)
    new = own_server.client()
    args = ["--from", old.source, "--to", link.url, "--queues", "celery", "--json"]
    with spawn(*command(*args), cwd=tmp_path) as one:
        wait_until(lambda: new.llen("celery") >= 20, 30, lambda: str(one))
        link.refuse()
        link.cut()
        assert one.wait(60) == 1
        assert "Traceback" not in one.stderr
        assert "Run the command again: it goes on" in one.stderr
        assert json.loads(one.stdout)["moved"]["celery"] >= 19
    # Workers of the old broker find what was not sent; what may have been sent waits for the next run.
    there = new.llen("celery")
    assert old.client.llen("celery") + 1 + there in (150, 151)
    link.accept()
    link.delay(0)
    run(*args)
    assert numbers(new.lrange("celery", 0, -1)) == list(range(150))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_puts_back_what_was_not_sent(
    old: Old, run: Run, proxy: Callable[[Any], Proxy], redis_server: RedisServer, tmp_path: Path, number: int
) -> None:
    for each in range(150):
        old.send(each)
    link = proxy(redis_server)
    link.delay(0.02)  # slow enough for whoever looks to see it on its way
    with spawn(*command("--from", old.source, "--to", f"{link.url[:-1]}1", "--queues", "celery"), cwd=tmp_path) as one:
        wait_until(lambda: old.moved.llen("celery") >= 20, 30, lambda: str(one))
        one.signal(number)
        assert one.wait() == 1
        assert "Traceback" not in one.stderr
    assert old.client.llen("celery") + old.moved.llen("celery") in (149, 150, 151)
    assert old.client.llen(f"{LEFT}.aside.celery") <= 1
    run("--from", old.source, "--to", old.target, "--queues", "celery")
    assert numbers(old.moved.lrange("celery", 0, -1)) == list(range(150))


def test_live_workers_and_a_migration_share_the_messages(old: Old, tmp_path: Path) -> None:
    total = 1000
    for number in range(total):
        old.send(number)
    taken: list[int] = []
    queue: Any = old.connection.channel()
    with spawn(*command("--from", old.source, "--to", old.target, "--queues", "celery"), cwd=tmp_path) as one:
        wait_until(lambda: old.moved.llen("celery") > 0, 20, lambda: str(one))
        while one.returncode is None:
            message = queue.basic_get("celery")
            if message is not None:
                taken.append(int(message.headers["id"].partition("-")[2]))
                queue.basic_ack(message.delivery_tag)
        assert one.wait() == 0
    there = numbers(old.moved.lrange("celery", 0, -1))
    assert taken
    assert there
    assert sorted(taken + there) == list(range(total))


def test_two_migrations_at_once_move_everything_once(
    old: Old, proxy: Callable[[Any], Proxy], redis_server: RedisServer, tmp_path: Path
) -> None:
    for number in range(120):
        old.send(number)
    link = proxy(redis_server)
    link.delay(0.001)
    args = command("--from", old.source, "--to", f"{link.url[:-1]}1", "--queues", "celery")
    with spawn(*args, cwd=tmp_path) as one, spawn(*args, cwd=tmp_path) as two:
        assert (one.wait(60), two.wait(60)) == (0, 0), f"{one}{two}"
        assert "another migration is under way" in one.stderr + two.stderr
    assert numbers(old.moved.lrange("celery", 0, -1)) == list(range(120))


@pytest.mark.slow
def test_wrong_use_and_dead_servers_get_one_line(old: Old, run: Run) -> None:
    dead = f"redis://:secret@127.0.0.1:{free_port()}/0"

    def error(*args: str, status: int) -> str:
        done = run(*args, status=status)
        assert "secret" not in done.stdout + done.stderr
        return done.stderr.strip().splitlines()[-1]

    both = ["--from", old.source, "--to", old.target]
    assert "name the queues with --queues a,b, or give --all" in error(*both, status=2)
    assert "name the queues" in error(*both, "--all", "--queues", "a", status=2)
    assert "Missing option '--to'" in error("--from", old.source, "--all", status=2)
    assert "are the same" in error("--from", old.source, "--to", old.source, "--all", status=2)
    alias = old.source.replace("127.0.0.1", "localhost")
    assert "are the same database" in error("--from", old.source, "--to", alias, "--all", status=2)
    for url in ("nonsense", "redis://localhost:6379/x", "foo://x", "amqp://localhost", "redis://:se/cret@h/0"):
        assert "broker URL" in error("--from", url, "--to", old.target, "--all", status=2), url
    assert "--to-options is no JSON" in error(*both, "--all", "--to-options", "x=1", status=2)
    for url in ([dead, old.target], [old.source, dead]):
        assert "can't be reached" in error("--from", url[0], "--to", url[1], "--all", status=1)
    old.client.set("text", "x")
    assert "WRONGTYPE" in error(*both, "--queues", "text", status=1)


@pytest.mark.parametrize("way", ["file", "stdin", "environment"])
def test_urls_that_hold_a_password_need_not_be_arguments(old: Old, tmp_path: Path, way: str) -> None:
    """Those are seen by all users of the machine."""
    old.send(1)
    old.client.execute_command("ACL", "SETUSER", "ann", "on", ">hunter2", "~*", "&*", "+@all")
    source, target = (url.replace("//", "//ann:hunter2@") for url in (old.source, streams(old.target)))
    args, given, variables = ["--from", "-", "--to", "-"], None, {}
    if way == "file":
        for name, url in (("source", source), ("target", target)):
            (tmp_path / name).write_text(f"{url}\n")
        args = ["--to", f"@{tmp_path}/target", "--from", f"@{tmp_path}/source", "--to-options", f"@{tmp_path}/options"]
        (tmp_path / "options").write_text('{"shards": 2}')
    elif way == "stdin":
        args, given = ["--to", "-", "--from", "-"], f"{source}\n{target}\n"
    else:
        args = []
        variables = {"STREAMTASK_MIGRATE_FROM": source, "STREAMTASK_MIGRATE_TO": target}
    done = CliRunner().invoke(main, ["migrate", "--all", "--dry-run", *args], input=given, env=variables)
    assert done.exit_code == 0, done.output
    assert "celery: would move 1 message" in done.output


@pytest.mark.parametrize("args", [["--from", "@nowhere"], ["--from", "-"], ["--from", "a", "--to-options", "-"]])
def test_an_url_that_is_not_there_is_wrong_use(args: list[str]) -> None:
    done = CliRunner().invoke(main, ["migrate", "--all", "--to", "redis://127.0.0.1:1/0", *args], input="")
    assert done.exit_code == 2
    assert ("can't be read" if "@nowhere" in args else "nothing stands there") in done.output


def test_to_streams_with_every_byte(old: Old, run: Run) -> None:
    for number in range(40):
        old.send(number, priority=(0, 3, 9)[number % 3], expiration=3600)
    keys = ["celery", "celery\x06\x163", "celery\x06\x169"]
    before = [json.loads(item) for key in keys for item in reversed(old.client.lrange(key, 0, -1))]
    target = streams(old.target)
    report = json.loads(run("--from", old.source, "--to", target, "--queues", "celery", "--json").stdout)
    assert report["moved"] == {"celery": 40}
    assert not old.client.exists(*keys)
    assert run("--from", old.source, "--to", target, "--queues", "celery").stdout == "nothing to move\n"
    found = drain(target, "celery", 40)
    assert len(found) == 40
    by_id = {message["headers"]["id"]: message for message in found}
    for payload in before:
        message = by_id[payload["headers"]["id"]]
        for part in ("body", "content-type", "content-encoding"):
            assert message[part] == payload[part], part
        for name, value in payload["properties"].items():
            assert name == "delivery_tag" or message["properties"][name] == value, name
        assert {name: message["headers"][name] for name in payload["headers"]} == payload["headers"]
    # They have a shard key, so their order holds; it does within a priority without one.
    assert [message["headers"]["id"] for message in found] == [payload["headers"]["id"] for payload in before]


@pytest.mark.slow
def test_a_move_to_streams_may_be_killed_at_any_instant(
    old: Old, run: Run, proxy: Callable[[Any], Proxy], redis_server: RedisServer, tmp_path: Path
) -> None:
    total = 200
    for number in range(total):
        old.send(number)
    link = proxy(redis_server)
    dice = random.Random(4)
    args = ["--from", f"{link.url[:-1]}0", "--to", streams(f"{link.url[:-1]}1"), "--queues", "celery"]

    def left() -> int:
        return old.client.llen("celery") + old.client.llen(f"{LEFT}.aside.celery")

    for _ in range(5):
        goal = left() - dice.randrange(5, 30)
        link.delay(0.002)
        with spawn(*command(*args), cwd=tmp_path) as one:
            wait_until(lambda goal=goal: left() <= goal, 30, lambda one=one: str(one))
            time.sleep(dice.random() * 0.006)  # not for something to happen: for a random place
            one.kill()
    link.delay(0)
    run("--from", old.source, "--to", streams(old.target), "--queues", "celery")
    found = drain(streams(old.target), "celery", total)
    assert [message["headers"]["id"] for message in found] == [f"id-{number}" for number in range(total)]


def test_back_to_lists_with_what_waits_for_its_time(old: Old, run: Run) -> None:
    source = streams(old.source)
    later = "2099-01-01T00:00:00+00:00"
    with kombu.Connection(source) as connection:
        producer = connection.Producer()
        for number in range(30):
            headers = {"task": "shop.work", "id": f"id-{number}", "eta": None}
            if number % 3 == 1:
                headers["shard_key"] = str(number % 2)
            if number % 5 == 4:
                headers["eta"] = later
            producer.publish(
                [[number], {}, {}], routing_key="celery", headers=headers, serializer="json", correlation_id=f"id-{number}",
                reply_to="me", priority=9 * (number % 2), declare=[kombu.Queue("celery")],
            )  # fmt: skip
    report = json.loads(run("--from", source, "--to", old.target, "--queues", "celery", "--json").stdout)
    assert (report["moved"], report["left"]) == ({"celery": 30}, {})
    for key, rest in (("celery", 0), ("celery\x06\x169", 1)):
        assert sorted(numbers(old.moved.lrange(key, 0, -1))) == list(range(rest, 30, 2))
    found = drain(old.target, "celery", 30)
    tags = set()
    for message in found:
        number = message["payload"][0][0]
        headers, properties = message["headers"], message["properties"]
        assert (properties["correlation_id"], properties["reply_to"]) == (f"id-{number}", "me")
        assert headers["eta"] == (later if number % 5 == 4 else None)
        assert not [name for name in [*headers, *properties] if name.startswith("streamtask")]
        tags.add(properties["delivery_tag"])
    assert len(tags) == 30
    assert run("--from", source, "--to", old.target, "--queues", "celery").stdout == "nothing to move\n"


def test_there_and_back_again(old: Old, run: Run) -> None:
    for number in range(60):
        old.send(number, priority=(0, 3, 9)[number % 3])
    before = {
        key: [json.loads(item) for item in old.client.lrange(key, 0, -1)] for key in ("celery", "celery\x06\x163")
    }
    middle = streams(old.source)
    run("--from", old.source, "--to", middle, "--queues", "celery")
    run("--from", middle, "--to", old.target, "--queues", "celery")
    for key, payloads in before.items():
        after = [json.loads(item) for item in old.moved.lrange(key, 0, -1)]
        for payload in (*payloads, *after):
            del payload["properties"]["delivery_tag"]
        assert after == payloads


@pytest.mark.slow
def test_a_move_back_may_be_killed_at_any_instant(
    old: Old, run: Run, proxy: Callable[[Any], Proxy], redis_server: RedisServer, tmp_path: Path
) -> None:
    total = 120
    for number in range(total):
        old.send(number)
        if number % 2:  # without a shard key
            old.client.lset("celery", 0, old.client.lindex("celery", 0).replace(b'"shard_key"', b'"other"'))
    middle = streams(old.source)
    run("--from", old.source, "--to", middle, "--queues", "celery")
    link = proxy(redis_server)
    dice = random.Random(4)
    args = ["--from", streams(f"{link.url[:-1]}0"), "--to", f"{link.url[:-1]}1", "--queues", "celery"]
    for _ in range(4):
        goal = old.moved.llen("celery") + dice.randrange(4, 20)
        link.delay(0.002)
        with spawn(*command(*args), cwd=tmp_path) as one:
            wait_until(lambda goal=goal: old.moved.llen("celery") >= goal, 30, lambda one=one: str(one))
            time.sleep(dice.random() * 0.006)  # not for something to happen: for a random place
            one.kill()
    link.delay(0)
    report = json.loads(run("--from", middle, "--to", old.target, "--queues", "celery", "--json").stdout)
    assert report["left"] == {}
    assert sorted(numbers(old.moved.lrange("celery", 0, -1))) == list(range(total))


@pytest.mark.slow
def test_what_live_workers_hold_is_left_and_said(old: Old, run: Run, tmp_path: Path) -> None:
    for number in range(3):
        old.send(number)
    middle = streams(old.source)
    run("--from", old.source, "--to", middle, "--queues", "celery")
    with spawn("-c", HOLD, middle, "celery", cwd=tmp_path) as worker:
        worker.wait_line("got id-0")
        done = run("--from", middle, "--to", old.target, "--queues", "celery", status=1)
        assert "celery: 3 are left" in done.stdout
    # It is gone: what it held is back when its lease has expired.
    assert "celery: moved 3 messages" in run("--from", middle, "--to", old.target, "--queues", "celery").stdout
    assert numbers(old.moved.lrange("celery", 0, -1)) == [0, 1, 2]
