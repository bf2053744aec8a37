"""Lua scripts: what each file says of its keys and arguments is what it does, and what the fence, leases and settling
promise holds on every version of Redis."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import pytest
import redis

import streamtask.redis
from streamtask.clock import mono_s
from streamtask.coordination.lease import OVERRAN, Contact, Lease, Refused, acquire, join_shared, reap
from streamtask.coordination.membership import Membership
from streamtask.errors import BrokerOutOfMemory, BrokerUnavailable, LeaseLost, QueueFull, ReplyError
from streamtask.queue.consumer import ShardConsumer
from streamtask.queue.queues import Queue
from streamtask.queue.rules import ConsumerSettings
from streamtask.redis import wire
from streamtask.redis.connection import Broker
from streamtask.redis.keys import lease_times
from streamtask.redis.links import Pool
from streamtask.redis.scripts import Code, by_sha, script
from streamtask.redis.wire import Note
from streamtask.results import ResultStore
from streamtask.transport.consumer import StreamConsumer
from tests import static
from tests.helpers import wait_until
from tests.one_link import OneLink

LUA = Path(streamtask.redis.__file__).parent / "lua"
NAMES = sorted(path.stem for path in LUA.glob("*.lua"))
INCLUDES = sorted(path.stem for path in (LUA / "include").glob("*.lua"))


@pytest.mark.parametrize("name", NAMES)
def test_a_files_head_fits_its_code(name):
    assert list(static.head_faults(LUA / f"{name}.lua")) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_script_that_is_given_a_token_looks_at_the_lease_first(name):
    head, body = static.head_and_body(LUA / f"{name}.lua")
    if re.search(r"^-- ARGV\[1\] token", head, re.MULTILINE) and not name.startswith("renew"):
        assert re.search(r"^-- KEYS\[1\] lease", head, re.MULTILINE)
        assert "include fence" in (LUA / f"{name}.lua").read_text()
        assert body.strip().startswith("if not owns(KEYS[1], ARGV[1], ARGV[2]) then\n  return LEASE_LOST\nend")


@pytest.mark.parametrize("name", NAMES)
def test_a_script_touches_only_keys_that_it_is_given(name):
    source = script(name).source
    for command, key in re.findall(r"redis\.p?call\('(\w+)',(?: *'[A-Z]+',)? *([^,)]+)", source):
        assert command not in ("KEYS", "SCAN", "FLUSHALL", "EVAL", "RANDOMKEY")
        if command == "TIME":
            continue
        assert not key.startswith("'"), f"{command} of a key that is built in the script"
    assert not re.search(r"KEYS\[[^\]]+\] *\.\.", source), "a key that is built from another"


@pytest.mark.parametrize("name", INCLUDES)
def test_an_include_takes_what_it_needs_as_arguments(name):
    source = (LUA / "include" / f"{name}.lua").read_text()
    assert "KEYS[" not in source
    assert "ARGV[" not in source
    assert source.startswith("-- ")


def test_codes_are_the_same_in_lua_and_python():
    source = (LUA / "include" / "codes.lua").read_text()

    assert {name: int(value) for name, value in re.findall(r"^local (\w+) = (-?\d+)", source, re.MULTILINE)} == {
        code.name: code.value for code in Code
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_code_that_a_script_returns_is_said_in_its_head(name):
    head, body = static.head_and_body(LUA / f"{name}.lua")
    for code in set(re.findall(r"return \{? ?([A-Z_]{5,})", body)):
        words = {"STORED_ALREADY": "0 if"}.get(code, code)
        assert words in head or "a code" in head, code


def test_every_file_can_be_called_by_its_digest():
    assert {one.name for one in by_sha().values()} == set(NAMES)
    assert all("@include" not in one.source for one in by_sha().values())


def test_every_script_loads(redis_server_all):
    link = Broker(redis_server_all.url).link()
    for one in by_sha().values():
        assert link.command("SCRIPT", "LOAD", one.source).decode() == one.sha
    link.close()


# --- leases ------------------------------------------------------------------------------------------------------

GROUP = "workers"
LEASE = 150  # ms


class Shard:
    """A shard of a declared queue with one link to it."""

    def __init__(self, server, shard=0, groups=(GROUP,)):
        self.client = server.client()
        self.broker = Broker(server.url)
        self.queue = Queue(Pool(self.broker), "streamtask", "t", "q", 2)
        self.queue.declare(tuple(groups))
        self.keys = self.queue.shard_keys(shard)
        self.link = self.broker.link()
        self.layout = ""  # of the generations of its dedupe ids

    def acquire(self, incarnation, lease_ms=60_000, **more):
        return acquire(self.link, self.keys, GROUP, incarnation, lease_ms, **more)

    def now_ms(self):
        seconds, micros = self.client.time()
        return seconds * 1000 + micros // 1000

    def wait_past(self, ms):
        wait_until(lambda: self.now_ms() > ms)

    def add(self, count, first_ms=1000):
        ids = [f"{first_ms + n}-0" for n in range(count)]
        with self.client.pipeline(transaction=False) as pipe:
            for n, entry_id in enumerate(ids):
                pipe.xadd(self.keys.stream, {"m": wire.encode("task", b"42", b"%016d" % n, [n], {})}, id=entry_id)
            pipe.execute()
        return ids

    def read(self, count=100_000, group=GROUP, consumer="c"):
        found = self.client.xreadgroup(group, consumer, {self.keys.stream: ">"}, count=count)
        return [entry_id.decode() for _, entries in found for entry_id, _ in entries]

    def pending(self, group=GROUP):
        found = self.client.xpending_range(self.keys.stream, group, "-", "+", 100_000)
        return {one["message_id"].decode(): one["consumer"].decode() for one in found}

    def settle(self, lease, ids, group=GROUP):
        return self.link.run(
            "settle",
            [lease.key, self.keys.stream, self.keys.state, self.keys.notes(group)],
            [lease.token, lease.incarnation, group, *ids],
        )

    def everything(self):
        return {key: self.client.dump(key) for key in sorted(self.client.scan_iter(count=1000))}


@pytest.fixture
def shard(redis_server_all):
    one = Shard(redis_server_all)
    yield one
    one.link.close()
    one.broker.close()


def test_the_owner_may_take_its_lease_again_and_its_token_grows(shard):
    first = shard.acquire("a")

    again = shard.acquire("a")

    assert again.token > first.token
    assert shard.client.get(shard.keys.token(GROUP)) == str(again.token).encode()
    with pytest.raises(LeaseLost):
        first.renew(shard.link)


def test_what_was_taken_with_a_lost_reply_can_be_taken_again(redis_server, proxy):
    shard = Shard(redis_server)
    through = proxy(redis_server)
    link = Broker(through.url).link()
    other = shard.queue.shard_keys(1)
    acquire(link, other, GROUP, "a", 60_000)  # the script is loaded
    through.cut_after_request(b"EVALSHA")
    with pytest.raises(BrokerUnavailable):
        acquire(link, shard.keys, GROUP, "a", 60_000)
    link.close()

    token = int(shard.client.get(shard.keys.token(GROUP)))
    assert acquire(link, shard.keys, GROUP, "a", 60_000).token > token
    link.close()
    shard.link.close()


def test_acquire_is_refused_while_another_holds_the_lease_and_says_when_to_ask(shard):
    before = shard.now_ms()
    shard.acquire("a", 5000)

    refused = shard.acquire("b")

    assert isinstance(refused, Refused)
    assert before + 5000 <= refused.ask_at_ms <= shard.now_ms() + 5000


def test_an_expired_lease_is_anothers_to_take_and_says_that_it_expired(shard):
    first = shard.acquire("a", LEASE)
    refused = shard.acquire("b", LEASE)
    shard.wait_past(refused.ask_at_ms)

    taken = shard.acquire("b", LEASE)

    assert taken.token > first.token
    assert taken.by_expiry
    assert not first.by_expiry


def test_a_released_lease_is_free_at_once_and_the_token_grows(shard):
    tokens = []
    for n in range(5):
        lease = shard.acquire(f"p{n}")
        tokens.append(lease.token)
        assert not lease.by_expiry
        assert lease.release(shard.link)
        assert not lease.release(shard.link) or n < 0, "it is not ours any more"

    assert tokens == sorted(set(tokens))


def test_a_lease_has_no_time_to_live_of_its_own(shard):
    lease = shard.acquire("a", LEASE)

    assert shard.client.pttl(lease.key) == -1
    assert shard.client.pttl(shard.keys.token(GROUP)) == -1


def test_the_token_is_at_least_redis_time_in_microseconds(shard):
    seconds, micros = shard.client.time()

    assert shard.acquire("a").token >= seconds * 1_000_000 + micros


def test_the_token_grows_though_the_clock_went_back(shard):
    ahead = 4_000_000_000_000_000
    shard.client.set(shard.keys.token(GROUP), ahead)

    assert shard.acquire("a").token == ahead + 1


def test_the_token_is_not_below_what_the_caller_asks_for(shard):
    assert shard.acquire("a", lowest_token=4_000_000_000_000_000).token == 4_000_000_000_000_000


def test_the_token_grows_over_a_flush(shard):
    first = shard.acquire("a")
    shard.client.flushall()

    assert shard.acquire("b").token > first.token


def test_the_token_grows_over_a_lost_second_of_the_append_only_file(own_server_all, tmp_path):
    server = own_server_all
    server.config_set(appendfsync="always")
    shard = Shard(server)
    first = shard.acquire("a")
    first.release(shard.link)
    server.stop()
    shutil.copytree(server.dir, tmp_path / "kept")
    server.start()
    shard.link.close()
    second = shard.acquire("b")
    assert second.token > first.token
    server.kill()
    for path in server.dir.iterdir():
        if path.name.startswith("appendonly"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            kept = tmp_path / "kept" / path.name
            shutil.copytree(kept, path) if kept.is_dir() else shutil.copy(kept, path)
    server.start()
    shard.link.close()
    assert shard.client.hget(first.key, "owner") == b"", "b's acquire was to be lost"

    third = shard.acquire("c")

    assert third.token > second.token
    assert shard.settle(second, ["1-0"]) == Code.LEASE_LOST
    with pytest.raises(LeaseLost):
        second.renew(shard.link)
    shard.link.close()


def test_a_lease_may_be_renewed_late_while_nobody_took_it(shard):
    lease = shard.acquire("a", LEASE)
    shard.wait_past(shard.acquire("b", LEASE).ask_at_ms)

    lease.renew(shard.link)

    refused = shard.acquire("b", LEASE)
    assert isinstance(refused, Refused)
    assert refused.ask_at_ms > shard.now_ms()


def test_a_lease_that_was_taken_or_released_cant_be_renewed(shard):
    lease = shard.acquire("a", LEASE)
    shard.wait_past(shard.acquire("b", LEASE).ask_at_ms)
    taken = shard.acquire("b")
    with pytest.raises(LeaseLost):
        lease.renew(shard.link)
    taken.renew(shard.link)
    taken.release(shard.link)
    for former in (lease, taken):
        with pytest.raises(LeaseLost):
            former.renew(shard.link)


def test_a_renewal_after_a_flush_writes_the_record_anew(shard):
    lease = shard.acquire("a")
    shard.client.flushall()

    lease.renew(shard.link)

    assert isinstance(shard.acquire("b"), Refused)
    assert shard.client.hget(lease.key, "token") == str(lease.token).encode()
    assert shard.client.get(shard.keys.token(GROUP)) == str(lease.token).encode()


def test_after_a_flush_only_one_of_two_former_owners_can_come_back(shard):
    first = shard.acquire("a")
    first.release(shard.link)
    second = shard.acquire("b")
    shard.client.flushall()

    second.renew(shard.link)
    with pytest.raises(LeaseLost):
        first.renew(shard.link)
    shard.client.flushall()
    third = shard.acquire("c")
    with pytest.raises(LeaseLost):
        second.renew(shard.link)
    assert third.token > second.token


def test_after_an_outage_the_last_owner_goes_first(shard):
    """``since_ms``: the caller was itself cut off when the lease expired, so it waits one lease time from its return."""
    lease = shard.acquire("a", LEASE)
    shard.wait_past(shard.acquire("b", LEASE).ask_at_ms)

    back = shard.now_ms()
    refused = shard.acquire("b", LEASE, since_ms=back)
    assert isinstance(refused, Refused)
    assert refused.ask_at_ms == back + LEASE
    assert isinstance(shard.acquire("a", LEASE), Lease), "the former owner need not wait"

    shard.wait_past(shard.acquire("b", LEASE).ask_at_ms)
    back = shard.now_ms()
    shard.wait_past(back + LEASE)
    taken = shard.acquire("b", LEASE, since_ms=back)
    assert taken.token > lease.token
    assert taken.by_expiry


def test_after_a_shorter_outage_the_owner_has_the_time_to_connect_again(shard):
    """The caller is back before the lease ends, and before its owner, which it has not heard since."""
    lease_ms = 3 * LEASE
    ends = shard.now_ms() + LEASE // 4
    shard.acquire("a", lease_ms)
    shard.client.hset(shard.keys.lease(GROUP), "expires_at", ends)
    joined = join_shared(shard.link, shard.keys, GROUP, "a", lease_ms)
    shard.client.zadd(joined.alive, {"a": ends})
    back = shard.now_ms()

    assert shard.acquire("b", lease_ms, since_ms=back) == Refused(back + lease_ms)
    shard.wait_past(ends)
    assert shard.acquire("b", lease_ms, since_ms=back) == Refused(back + lease_ms)
    assert not reap(shard.link, shard.keys, GROUP, "a", lease_ms, gone=False, since_ms=back)
    # So long as that takes, and no longer: a long lease is not waited for again.
    assert shard.client.hset(shard.keys.lease(GROUP), "lease_ms", 60_000) == 0
    assert shard.acquire("b", 60_000, since_ms=back) == Refused(back + 21_000)
    assert shard.acquire("b", 60_000, since_ms=ends + 1) == Refused(ends + 1 + 60_000)
    assert shard.acquire("b", lease_ms, since_ms=ends - 60_000).by_expiry
    assert reap(shard.link, shard.keys, GROUP, "a", lease_ms, gone=False, since_ms=ends - 60_000)


def test_who_was_heard_all_the_time_need_not_wait_after_the_expiry(shard):
    since = shard.now_ms()
    shard.acquire("a", LEASE)
    shard.wait_past(shard.acquire("b", LEASE, since_ms=since).ask_at_ms)

    assert shard.acquire("b", LEASE, since_ms=since).by_expiry


def test_a_lease_that_was_released_is_free_also_after_an_outage(shard):
    shard.acquire("a", 60_000).release(shard.link)

    assert not shard.acquire("b", since_ms=shard.now_ms()).by_expiry


def test_after_a_flush_who_saw_the_record_waits_for_its_owner(shard):
    shard.client.flushall()
    missed = shard.now_ms()

    refused = shard.acquire("b", LEASE, missed_at_ms=missed)
    assert isinstance(refused, Refused)
    assert refused.ask_at_ms == missed + LEASE
    shard.wait_past(refused.ask_at_ms)
    assert shard.acquire("b", LEASE, missed_at_ms=missed).by_expiry


# --- heartbeats --------------------------------------------------------------------------------------------------


def membership(shard, lease_ms):
    return Membership(shard.queue.keys, GROUP, lease_ms)


def test_since_is_kept_while_heartbeats_come_and_begins_anew_after_a_gap(shard):
    one = membership(shard, 1000)
    one.beat(shard.link, {"a": {}})
    first = one.since_ms
    assert abs(first - shard.now_ms()) < 500
    for _ in range(5):
        shard.wait_past(one.heard_ms + 50)
        one.beat(shard.link, {"a": {}})
        assert one.since_ms == first
    # more than most of a lease time
    shard.wait_past(one.heard_ms + 650)
    one.beat(shard.link, {"a": {}})
    assert one.since_ms == one.heard_ms > first


def test_a_clock_that_was_set_back_keeps_no_lease_and_no_member_for_longer_than_a_lease_time(shard):
    """What was written before ends in the future."""
    one, gone = membership(shard, LEASE), shard.acquire("gone", LEASE)
    ahead = shard.now_ms() + 40_000
    one.heard_ms = one.since_ms = ahead
    one.cut_off = False
    shard.client.zadd(shard.queue.keys.members(GROUP), {"gone": ahead})
    shard.client.hset(gone.key, "expires_at", ahead)
    before = shard.now_ms()

    one.beat(shard.link, {"me": {}})
    refused = shard.acquire("me", LEASE, since_ms=one.since_ms)

    assert one.since_ms <= shard.now_ms()
    assert sorted(one.members) == ["gone", "me"]
    assert isinstance(refused, Refused)
    assert before + LEASE <= refused.ask_at_ms <= shard.now_ms() + LEASE
    shard.wait_past(refused.ask_at_ms)
    one.beat(shard.link, {"me": {}})
    assert one.members == ["me"]
    assert shard.acquire("me", LEASE, since_ms=before).token > gone.token


def test_a_clock_that_was_set_back_keeps_no_consumer_for_longer_than_a_lease_time(shard):
    join_shared(shard.link, shard.keys, GROUP, "gone", LEASE)
    live = join_shared(shard.link, shard.keys, GROUP, "live", LEASE)
    shard.client.zadd(live.alive, {"gone": shard.now_ms() + 40_000})

    Living(shard, "live").beat()

    ends = int(shard.client.zscore(live.alive, "gone"))
    assert ends <= shard.now_ms() + LEASE * 4 // 3
    shard.wait_past(ends)
    assert reap(shard.link, shard.keys, GROUP, "gone", LEASE, gone=False)


def test_a_lease_that_was_let_go_of_is_ended_and_no_later_one(shard):
    old = join_shared(shard.link, shard.keys, GROUP, "a", LEASE)
    assert reap(shard.link, shard.keys, GROUP, "a", LEASE, gone=True, token=old.token)
    new = join_shared(shard.link, shard.keys, GROUP, "a", LEASE)
    before = shard.everything()
    assert not reap(shard.link, shard.keys, GROUP, "a", LEASE, gone=True, token=old.token)
    assert shard.everything() == before
    assert reap(shard.link, shard.keys, GROUP, "a", LEASE, gone=True, token=new.token)


class Living:
    """Processes that are heard together. ``at``: their own clock, seconds."""

    def __init__(self, shard, *names, lease_ms=LEASE):
        self.shard, self.names = shard, names
        self.contact = Contact(shard.keys.alive(GROUP), lease_ms)
        self.at = 1000.0

    def beat(self, *, outages=0, after=0.01):
        self.at += after
        return self.contact.heard(self.shard.link.call(self.contact.pack_beat(self.names)), self.at, outages)


def test_who_is_heard_in_time_keeps_all_its_leases_at_once(shard):
    living = Living(shard, "a", "b", lease_ms=60_000)
    assert living.beat() == [False, False]  # each is looked at first
    assert living.beat() == [True, True]
    assert living.contact.next_ms == int(shard.client.zscore(living.contact.alive, "a"))
    # Late, or forgotten, or heard after a gap of any kind: another may have ended one of its consumers.
    shard.client.zadd(living.contact.alive, {"a": shard.now_ms()})
    assert living.beat() == [False, True]
    shard.client.delete(living.contact.alive)
    assert living.beat() == [False, False]
    assert living.beat(outages=1) == [False, False]
    assert living.beat(outages=1, after=37.0) == [False, False]
    living.contact.heard_ms += 100_000
    assert living.beat(outages=1) == [False, False]
    assert living.beat(outages=1) == [True, True]


def test_whose_time_is_over_is_named_until_all_have_seen_it(shard):
    living = Living(shard, "a")
    living.beat()
    now = shard.now_ms()
    shard.client.zadd(living.contact.alive, {"long ago": now - 10 * LEASE, "gone": now - 1, "next": now + LEASE // 2})
    living.beat()
    assert living.contact.over == ["long ago", "gone"]  # whoever was away for long is given its chance
    assert living.contact.next_ms == now + LEASE // 2
    shard.client.zadd(living.contact.alive, {"gone": now})

    def heard_for_long():
        living.contact.since_ms = now - 4 * LEASE
        living.beat()
        return "long ago" not in living.contact.over

    # This call may have waited for the end of an outage of all, which its caller does not know of yet.
    shard.client.zadd(living.contact.alive, {"a": now - LEASE})
    assert not heard_for_long()
    wait_until(heard_for_long)
    assert shard.client.zscore(living.contact.alive, "gone") == now


SHORT, LONG = LEASE, 40 * LEASE


def test_a_member_with_a_longer_lease_time_keeps_it(shard):
    short, long = membership(shard, SHORT), membership(shard, LONG)
    members, info = shard.queue.keys.members(GROUP), shard.queue.keys.member_info(GROUP)
    long.beat(shard.link, {"long": {}})
    ends = shard.client.zscore(members, "long")
    for _ in range(2):
        short.beat(shard.link, {"short": {}})
    assert shard.client.zscore(members, "long") == ends
    # Until the next of its beats, which are rarer.
    assert shard.client.pttl(members) > 5 * LONG < shard.client.pttl(info)
    shard.client.zadd(members, {"long": ends + 1_000_000})  # the clock was set back since
    short.beat(shard.link, {"short": {}})
    assert ends <= shard.client.zscore(members, "long") <= shard.now_ms() + LONG


def test_a_consumer_with_a_longer_lease_time_keeps_it(shard):
    lease = join_shared(shard.link, shard.keys, GROUP, "long", LONG)
    short, long = Living(shard, "short"), Living(shard, "long", lease_ms=LONG)
    long.beat()
    ends = shard.client.zscore(lease.alive, "long")
    short.beat()
    short.beat()
    assert shard.client.zscore(lease.alive, "long") == ends
    shard.client.zadd(lease.alive, {"long": ends + 1_000_000})  # the clock was set back since
    short.beat()
    assert ends <= shard.client.zscore(lease.alive, "long") <= shard.now_ms() + LONG + 500
    # It is not forgotten before it could have come back, either, after an outage of all.
    now = shard.now_ms()
    shard.client.zadd(lease.alive, {"long": now - 4 * SHORT})
    short.contact.since_ms = now - 4 * SHORT + 1
    short.beat()
    assert "long" in short.contact.over
    assert not reap(shard.link, shard.keys, GROUP, "long", SHORT, gone=False, since_ms=now - 2 * SHORT)
    shard.client.zadd(lease.alive, {"long": now - 4 * LONG})

    def forgotten():
        short.contact.since_ms = now - 4 * LONG
        short.beat()
        return "long" not in short.contact.over

    wait_until(forgotten)
    assert not shard.client.hexists(lease_times(lease.alive), "long")


def test_who_takes_a_lease_waits_as_long_as_its_owner_was_given(shard):
    """Where the clock was set back, after an outage of all, and after a flush."""
    lease = shard.acquire("long", LONG)
    shard.client.hset(lease.key, "expires_at", shard.now_ms() + 10 * LONG)
    refused = shard.acquire("short", SHORT)
    assert isinstance(refused, Refused)
    assert refused.ask_at_ms > shard.now_ms() + LONG - SHORT
    now = shard.now_ms()
    shard.client.hset(lease.key, "expires_at", now - 10)
    assert shard.acquire("short", SHORT, since_ms=now) == Refused(now + LONG)
    shard.client.delete(lease.key)
    assert shard.acquire("short", SHORT, missed_at_ms=now, its_lease_ms=LONG) == Refused(now + LONG)


def test_since_begins_anew_after_a_broken_connection(shard):
    one = membership(shard, 60_000)
    one.beat(shard.link, {"a": {}})
    first = one.since_ms
    shard.wait_past(first + 5)
    one.cut_off = True

    one.beat(shard.link, {"a": {}})

    assert one.since_ms > first
    assert not one.cut_off


def test_members_come_leave_and_expire(shard):
    one, other = membership(shard, 60_000), membership(shard, LEASE)
    assert one.beat(shard.link, {"b": {"pid": 1}, "a": {"pid": 2}})
    assert one.members == ["a", "b"]
    assert not one.beat(shard.link, {"b": {}, "a": {}}), "nothing changed"
    assert other.beat(shard.link, {"c": {}})
    assert one.beat(shard.link, {"a": {}, "b": {}})
    assert one.members == ["a", "b", "c"]
    wait_until(lambda: one.beat(shard.link, {"a": {}, "b": {}}), timeout=3)
    assert one.members == ["a", "b"]
    assert shard.client.hkeys(shard.queue.keys.member_info(GROUP)) == [b"b", b"a"]
    one.leave(shard.link, ["b"])
    one.beat(shard.link, {"a": {}})
    assert one.members == ["a"]
    assert shard.client.hkeys(shard.queue.keys.member_info(GROUP)) == [b"a"]


# --- the fence ---------------------------------------------------------------------------------------------------

NOTE = "1 2 0 0 0 0"


def mark(shard, entry_id, lease):
    """The owner has written down that a body starts."""
    shard.client.hset(shard.keys.notes(GROUP), entry_id, Note(mark=lease.token).format())


def fenced_calls(shard, ids, due_key):
    """Every script that changes a group's state, by name, as (keys, arguments after token and incarnation)."""
    k = shard.keys
    lease = k.lease(GROUP)
    return {
        "settle": ([lease, k.stream, k.state, k.notes(GROUP)], [GROUP, *ids]),
        "note": ([lease, k.stream, k.notes(GROUP)], [GROUP, ids[0], NOTE]),
        "charge": ([lease, k.stream, k.notes(GROUP)], [GROUP, ids[0], 1]),
        "unmark": ([lease, k.notes(GROUP)], [ids[0]]),
        "fetch": (
            [lease, k.stream, k.state, k.notes(GROUP), due_key, k.wake, k.requeued(GROUP)],
            [GROUP, "owner", 10, 1, 0],
        ),
        "dead_letter": (
            [lease, k.stream, k.state, k.notes(GROUP), k.dlq, k.replaced(GROUP)],
            [GROUP, ids[0], "{}", ""],
        ),
        "release": ([lease], []),
        "claim_ids": ([lease, k.state, k.seen("r1.0")], ["run", 1000, "", 100, b"i" * 16, 1]),
        "lift_last_id": ([lease, k.stream], ["9999999999999-0"]),
        "renew": ([lease, k.token(GROUP)], [1000]),
    }


FENCED = [
    "settle",
    "note",
    "charge",
    "unmark",
    "fetch",
    "dead_letter",
    "release",
    "claim_ids",
    "lift_last_id",
    "renew",
]


def world(shard, count=3):
    """A shard with pending, delayed and requeued messages."""
    ids = shard.add(count)
    shard.read()
    member = f"{1:016}mx"
    shard.client.zadd(shard.keys.delayed, {member: 1})
    shard.client.zadd(shard.keys.requeued(GROUP), {ids[0]: 1000})
    return ids


@pytest.mark.parametrize("stale", ["token", "incarnation", "both", "flushed-and-taken"])
@pytest.mark.parametrize("name", FENCED)
def test_who_lost_the_lease_can_change_nothing(redis_server, name, stale):
    shard = Shard(redis_server)
    former = shard.acquire("former")
    former.release(shard.link)
    now = shard.acquire("now")
    ids = world(shard)
    before = shard.everything()
    token, incarnation = {
        "token": (former.token, "now"),
        "incarnation": (now.token, "former"),
        "both": (former.token, "former"),
        "flushed-and-taken": (now.token, "other"),
    }[stale]

    keys, args = fenced_calls(shard, ids, shard.keys.delayed)[name]
    assert shard.link.run(name, keys, [token, incarnation, *args]) == Code.LEASE_LOST

    assert shard.everything() == before
    shard.link.close()


@pytest.mark.parametrize("name", FENCED)
def test_the_owner_can(redis_server_all, name):
    shard = Shard(redis_server_all)
    lease = shard.acquire("a")
    ids = world(shard)
    mark(shard, ids[0], lease)
    before = shard.everything()

    keys, args = fenced_calls(shard, ids, shard.keys.delayed)[name]
    assert shard.link.run(name, keys, [lease.token, "a", *args]) != Code.LEASE_LOST

    assert shard.everything() != before, "this call would prove nothing above"
    shard.link.close()


@pytest.mark.parametrize("name", ["settle", "note", "charge", "dead_letter", "release"])
def test_repeating_a_call_changes_nothing(redis_server_all, name):
    shard = Shard(redis_server_all)
    lease = shard.acquire("a")
    ids = world(shard)
    keys, args = fenced_calls(shard, ids, shard.keys.delayed)[name]
    shard.link.run(name, keys, [lease.token, "a", *args])
    before = shard.everything()

    shard.link.run(name, keys, [lease.token, "a", *args])

    assert shard.everything() == before
    shard.link.close()


# --- finishing ---------------------------------------------------------------------------------------------------


def test_entries_behind_a_held_head_are_removed(shard):
    lease = shard.acquire("a")
    held, *followers = shard.add(20_000)
    assert len(shard.read()) == 20_000

    for at in range(0, len(followers), 200):
        batch = followers[at : at + 200]
        assert shard.settle(lease, batch) == len(batch)

    assert shard.client.xlen(shard.keys.stream) == 1
    assert list(shard.pending()) == [held]
    assert shard.client.memory_usage(shard.keys.stream, samples=0) < 20_000
    assert shard.settle(lease, followers[:200]) == 0, "what is settled is settled"


def test_entries_are_removed_in_whatever_order_they_end(shard):
    lease = shard.acquire("a")
    ids = shard.add(1000)
    shard.read()
    batches = [ids[start::7] for start in (3, 0, 6, 1, 5, 2, 4)]

    for n, batch in enumerate(batches, 1):
        for at in range(0, len(batch), 200):
            shard.settle(lease, batch[at : at + 200])
        assert shard.client.xlen(shard.keys.stream) == 1000 - sum(map(len, batches[:n]))

    assert shard.client.xlen(shard.keys.stream) == 0


def test_what_was_not_delivered_is_never_removed(shard):
    lease = shard.acquire("a")
    ids = shard.add(10)
    shard.read(5)

    shard.settle(lease, ids[:5])

    assert [entry_id.decode() for entry_id, _ in shard.client.xrange(shard.keys.stream)] == ids[5:]
    assert shard.read() == ids[5:]


@pytest.mark.parametrize("name", ["settle", "settle_kept"])
def test_a_batch_of_which_only_a_part_is_pending_takes_nothing_else_with_it(redis_server_all, name):
    """A lost second of the append-only file: what was acknowledged is pending again, or was never delivered."""
    shard = Shard(redis_server_all)
    lease = shard.acquire("a")
    ids = shard.add(6)
    shard.read(2)
    keys = [lease.key, shard.keys.stream, shard.keys.state, shard.keys.notes(GROUP)]
    if name == "settle":
        args = [*ids[:2], ids[4]]
    else:
        keys.append(shard.keys.replaced(GROUP))
        args = [part for entry_id in (*ids[:2], ids[4]) for part in (entry_id, 0)]

    for _ in range(2):
        shard.link.run(name, keys, [lease.token, "a", GROUP, *args])
        # The fifth is its owner's to finish, once Redis knows again that it was delivered.
        assert [entry_id.decode() for entry_id, _ in shard.client.xrange(shard.keys.stream)] == ids[2:]

    assert shard.read() == ids[2:]
    assert shard.settle(lease, [ids[4], "99999-0"]) == 1
    assert shard.settle(lease, [ids[2], ids[4]]) == 1, "one was finished before"
    assert [entry_id.decode() for entry_id, _ in shard.client.xrange(shard.keys.stream)] == [ids[3], ids[5]]
    assert shard.settle(lease, [ids[3], ids[5]]) == 2
    assert shard.client.xlen(shard.keys.stream) == 0
    shard.link.close()


def test_a_repeated_settle_leaves_what_another_group_needs(redis_server_all):
    shard = Shard(redis_server_all, groups=(GROUP, "sink"))
    lease = shard.acquire("a")
    sink = acquire(shard.link, shard.keys, "sink", "s", 60_000)
    ids = shard.add(4)
    shard.read(3)
    shard.settle(lease, ids[:2])
    assert shard.settle(lease, ids[:3]) == 1
    assert shard.client.xlen(shard.keys.stream) == 4
    shard.read(4, "sink", "s")
    assert shard.settle(sink, ids, "sink") == 4
    assert [entry_id.decode() for entry_id, _ in shard.client.xrange(shard.keys.stream)] == ids[3:]
    shard.link.close()


def test_with_several_groups_the_last_to_acknowledge_removes(redis_server_all):
    shard = Shard(redis_server_all, groups=(GROUP, "sink"))
    lease = shard.acquire("a")
    sink = acquire(shard.link, shard.keys, "sink", "s", 60_000)
    ids = shard.add(10)
    shard.read()
    shard.settle(lease, ids[:6])
    assert shard.client.xlen(shard.keys.stream) == 10, "the sink has read nothing yet"
    shard.read(8, "sink", "s")
    shard.settle(sink, ids[:4], "sink")
    assert shard.client.xlen(shard.keys.stream) == 6
    shard.settle(sink, ids[7:8], "sink")
    shard.settle(lease, ids[6:9])
    assert [i.decode() for i, _ in shard.client.xrange(shard.keys.stream)] == [*ids[4:7], *ids[8:]]
    shard.settle(lease, ids[9:])
    shard.read(10, "sink", "s")
    shard.settle(sink, ids[4:7] + ids[8:], "sink")

    assert shard.client.xlen(shard.keys.stream) == 0
    assert shard.pending() == shard.pending("sink") == {}
    shard.link.close()


def test_a_registered_group_that_the_shard_lacks_keeps_entries(shard):
    lease = shard.acquire("a")
    ids = shard.add(3)
    shard.read()
    shard.client.hset(shard.keys.state, "group:coming", 1)

    shard.settle(lease, ids)

    assert shard.client.xlen(shard.keys.stream) == 3


def test_a_group_that_nobody_registered_keeps_nothing(shard):
    lease = shard.acquire("a")
    shard.client.xgroup_create(shard.keys.stream, "by-hand", "0")
    ids = shard.add(3)
    shard.read()

    shard.settle(lease, ids)

    assert shard.client.xlen(shard.keys.stream) == 0


# --- crash counts and dead letters -------------------------------------------------------------------------------


def test_a_crash_is_counted_once_per_token(shard):
    ids = shard.add(2)
    shard.read()
    notes = shard.keys.notes(GROUP)
    lease = shard.acquire("a")
    assert [lease.charge(shard.link, {ids[0]: True}) for _ in range(3)] == [1, 0, 0]
    assert Note.parse(shard.client.hget(notes, ids[0])).crashes == 1
    lease.release(shard.link)
    lease = shard.acquire("b")
    assert lease.charge(shard.link, dict.fromkeys(ids, True)) == 2
    assert [Note.parse(shard.client.hget(notes, one)).crashes for one in ids] == [2, 1]
    assert lease.charge(shard.link, {"5-5": True}) == 0, "it is not pending"


def test_who_is_not_at_fault_is_spared(shard):
    ids = shard.add(2)
    shard.read()
    notes = shard.keys.notes(GROUP)
    lease = shard.acquire("a")
    shard.client.hset(notes, ids[0], Note(attempt=1, due_ms=9, crashes=1, mark=lease.token, held=1).format())
    for _ in range(2):
        assert lease.charge(shard.link, dict.fromkeys(ids, False)) == 0
        assert shard.client.hkeys(notes) == [ids[0].encode()]
        assert Note.parse(shard.client.hget(notes, ids[0])) == Note(attempt=1, due_ms=9, crashes=1, held=1)


def test_a_charge_keeps_attempts_and_due_time(shard):
    (entry_id,) = shard.add(1)
    shard.read()
    lease = shard.acquire("a")
    notes = shard.keys.notes(GROUP)
    shard.client.hset(notes, entry_id, Note(attempt=3, due_ms=99, crashes=1, mark=7).format())

    lease.charge(shard.link, {entry_id: True})

    note = Note.parse(shard.client.hget(notes, entry_id))
    assert (note.attempt, note.due_ms, note.crashes, note.mark) == (3, 99, 2, 0)


def test_what_overran_is_written_down_once_and_is_no_crash(shard):
    (entry_id,) = shard.add(1)
    shard.read()
    lease = shard.acquire("a")
    notes = shard.keys.notes(GROUP)
    shard.client.hset(notes, entry_id, Note(attempt=1, due_ms=99, crashes=1, mark=7).format())

    assert [lease.charge(shard.link, {entry_id: OVERRAN}) for _ in range(2)] == [1, 0]

    note = Note.parse(shard.client.hget(notes, entry_id))
    assert note.overran
    assert (note.attempt, note.due_ms, note.crashes, note.mark) == (1, 0, 1, 0)


def test_only_ones_own_mark_is_taken_back(shard):
    """What else has been written beside the entry meanwhile stays."""
    ids = shard.add(3)
    shard.read()
    lease = shard.acquire("a")
    notes = shard.keys.notes(GROUP)
    shard.client.hset(
        notes, ids[0], Note(attempt=3, due_ms=99, crashes=1, mark=lease.token, charged=5, held=1).format()
    )
    shard.client.hset(notes, ids[1], Note(mark=7).format())
    answers = [shard.link.run("unmark", [lease.key, notes], [lease.token, "a", *ids, "5-5"]) for _ in range(2)]
    assert answers == [1, 0]
    first, second, third = (shard.client.hget(notes, entry_id) for entry_id in ids)
    assert Note.parse(first) == Note(attempt=3, due_ms=99, crashes=1, mark=0, charged=5, held=1)
    assert Note.parse(second) == Note(mark=7)
    assert third is None


def test_a_dead_letter_is_whole_and_there_once(shard):
    ids = shard.add(2)
    shard.read()
    lease = shard.acquire("a")
    (_, fields), _ = shard.client.xrange(shard.keys.stream)
    keys, args = fenced_calls(shard, ids, shard.keys.delayed)["dead_letter"]

    assert [shard.link.run("dead_letter", keys, [lease.token, "a", *args]) for _ in range(2)] == [1, 0]

    ((_, dead),) = shard.client.xrange(shard.keys.dlq)
    assert dead.items() >= fields.items()
    assert (dead[b"entry"], dead[b"group"], dead[b"error"]) == (ids[0].encode(), GROUP.encode(), b"{}")
    assert list(shard.pending()) == ids[1:]
    assert shard.client.xlen(shard.keys.stream) == 1


def test_a_dead_letter_is_the_retry_that_failed(shard):
    """And not the message that it took the place of; nothing of it stays beside the entry that is gone."""
    ids = shard.add(2)
    shard.read()
    lease = shard.acquire("a")
    k = shard.keys
    shard.client.hset(k.notes(GROUP), ids[0], NOTE)
    shard.client.hset(k.replaced(GROUP), mapping={ids[0]: b"2 0 re try\n0", ids[1]: b"1 0 other"})
    keys, args = fenced_calls(shard, ids, k.delayed)["dead_letter"]

    assert shard.link.run("dead_letter", keys, [lease.token, "a", *args]) == 1

    ((_, dead),) = shard.client.xrange(k.dlq)
    assert dead[b"m"] == b"re try\n0"
    assert shard.client.hkeys(k.replaced(GROUP)) == [ids[1].encode()]
    assert not shard.client.exists(k.notes(GROUP))


def test_a_purge_leaves_no_note_of_what_was_on_offer_and_is_gone(shard):
    ids = shard.add(1)
    shard.client.zadd(shard.keys.requeued(GROUP), {ids[0]: 1})
    shard.client.hset(shard.keys.notes(GROUP), ids[0], NOTE)
    k = shard.keys

    assert shard.link.run("purge_requeued", [k.stream, k.requeued(GROUP), k.state, k.notes(GROUP)], [GROUP, 10]) == [
        1,
        0,
    ]

    assert not shard.client.exists(k.notes(GROUP), k.requeued(GROUP))


@pytest.mark.parametrize("hold", ["", "0 0 0 0 0 1"])
def test_a_dead_letter_of_very_many_fields_is_whole_and_can_be_replayed(redis_server_all, hold):
    shard = Shard(redis_server_all)
    lease = shard.acquire("a")
    k = shard.keys
    fields = {f"f{n}": f"v{n}" for n in range(20_000)}
    entry_id = shard.client.xadd(k.stream, fields).decode()
    (_, raw), *_ = shard.link.command("XRANGE", k.stream, "-", "+")
    shard.read()
    keys = [lease.key, k.stream, k.state, k.notes(GROUP), k.dlq, k.replaced(GROUP)]
    args = [GROUP, entry_id, "{}", hold]

    assert shard.link.run("dead_letter", keys, [lease.token, "a", *args]) == 1
    assert shard.link.run("dead_letter", keys, [lease.token, "a", *args]) == 0

    ((dead_id, dead),) = shard.link.command("XRANGE", k.dlq, "-", "+")
    assert wire.whole(dead[8:]) == raw
    assert shard.client.xlen(k.stream) == (1 if hold else 0)
    assert shard.link.run("replay", [k.dlq, k.stream, k.wake, k.notes(GROUP)], [dead_id]) == 1
    ((_, again),) = shard.link.command("XRANGE", k.stream, "-", "+")
    assert wire.whole(again) == (raw if hold else [*raw, b"replayed", GROUP.encode()])
    shard.link.close()


def test_a_message_that_is_in_no_stream_is_buried_however_many_fields_it_has(shard):
    message = [f"{n}".encode() for n in range(40_000)]
    own = ["error", "{}", "entry", "1-0", "group", GROUP, "held", "0"]
    for fields in (message, message[:2]):
        dead_id = shard.link.run("bury", [shard.keys.state, shard.keys.dlq], [*own, *fields])
        ((_, dead),) = shard.link.command("XRANGE", shard.keys.dlq, dead_id, dead_id)
        assert dead[:8] == [part.encode() for part in own]
        assert wire.whole(dead[8:]) == fields


def test_ten_thousand_processes_are_gone_or_leave_at_once(shard):
    keys = [shard.queue.keys.members(GROUP), shard.queue.keys.member_info(GROUP)]
    names = [f"p{n}" for n in range(10_000)]
    for how in ("gone", "leave"):
        shard.client.zadd(keys[0], dict.fromkeys(names, 1))
        shard.client.hset(keys[1], mapping=dict.fromkeys(names, "{}"))
        if how == "gone":
            membership(shard, 60_000).beat(shard.link, {"a": {}})
        else:
            assert shard.link.run("leave", keys, names) == len(names)
        assert shard.client.zrange(keys[0], 0, -1) == [b"a"]
        assert shard.client.hkeys(keys[1]) == [b"a"]
    living = Living(shard, *names)
    assert living.beat() == [False] * 10_000
    shard.client.zadd(living.contact.alive, dict.fromkeys(names, 1))
    living.names = ()
    living.beat()
    assert len(living.contact.over) == 10_000


MANY = {
    # What the callers send at most: a settled batch is 200, a page of the inspector 100, a bulk call 250.
    "bury": (lambda k, ids: ([k.state, k.dlq], ["e", "", "entry", "", "group", "", "held", "0", *range(40_000)])),
    "charge": (lambda k, ids: ([k.lease(GROUP), k.stream, k.notes(GROUP)], [GROUP, *[x for i in ids for x in (i, 1)]])),
    "claim_ids": (
        lambda k, ids: (
            [k.lease(GROUP), k.state, *[k.seen("r1.0")] * 100],
            ["run", 1000, "", 1000, *(part for n in range(100) for part in (b"%016d" % n, n))],
        )
    ),
    "note": (
        lambda k, ids: ([k.lease(GROUP), k.stream, k.notes(GROUP)], [GROUP, *(p for one in ids for p in (one, NOTE))])
    ),
    "settle": (lambda k, ids: ([k.lease(GROUP), k.stream, k.state, k.notes(GROUP)], [GROUP, *ids])),
    "settle_kept": (
        lambda k, ids: (
            [k.lease(GROUP), k.stream, k.state, k.notes(GROUP), k.replaced(GROUP)],
            [GROUP, *(part for one in ids for part in (one, 0))],
        )
    ),
    "unmark": (lambda k, ids: ([k.lease(GROUP), k.notes(GROUP)], ids)),
    "produce_many": (lambda k, ids: ([k.state, k.seen("p"), k.stream, k.delayed], [0, 1, 1000, 0, *["m", "x"] * 250])),
    "open_shard": (lambda k, ids: ([k.state, k.stream], [0, *(f"g{n}" for n in range(50))])),
}
ELSEWHERE = {
    "drop_dead": "tests/inspect", "replay": "tests/inspect", "requeue": "tests/transport",
    "fetch": "as many as there are priorities",
    "beat": "ten thousand processes, above", "heartbeat": "ten thousand processes, above",
    "leave": "ten thousand processes, above",
    "open_queue": "as many as there are priorities", "touch_queues": "tests/transport",
    "produce_deduped": "as many as there are generations",
}  # fmt: skip


def test_each_script_that_takes_a_list_is_called_with_a_long_one():
    """Lua's stack takes some 8,000 values, and a script that fails after its first write has lost something."""
    heads = {name: static.head_and_body(LUA / f"{name}.lua")[0] for name in NAMES}
    lists = {name for name, head in heads.items() if any(static.documented(head, what)[1] for what in ("KEYS", "ARGV"))}
    assert lists == set(MANY) | set(ELSEWHERE), "a new one needs a case"


@pytest.mark.parametrize("name", MANY)
def test_the_longest_list_that_a_caller_sends(redis_server_all, name):
    shard = Shard(redis_server_all)
    lease = shard.acquire("a")
    keys_and_args = MANY[name]
    ids = world(shard, 200)
    keys, args = keys_and_args(shard.keys, ids)
    head = [lease.token, "a"] if "include fence" in (LUA / f"{name}.lua").read_text() else []
    answer = shard.link.run(name, keys, [*head, *args])  # an error is raised
    if isinstance(answer, list) and answer[:1] == [Code.SEEN_LAYOUT]:
        args[2] = answer[1]
        answer = shard.link.run(name, keys, [*head, *args])
    assert not isinstance(answer, int) or answer >= 0, "refused: that proves nothing"
    shard.link.close()


def test_what_is_on_offer_is_purged_by_pages(shard):
    ids = shard.add(1200)
    shard.read()
    k = shard.keys
    shard.client.zadd(k.requeued(GROUP), {entry_id: n for n, entry_id in enumerate(ids)})
    shard.client.hset(k.notes(GROUP), ids[3], NOTE)
    call = ("purge_requeued", [k.stream, k.requeued(GROUP), k.state, k.notes(GROUP)], [GROUP, 500])

    assert [shard.link.run(*call) for _ in range(4)] == [[500, 500], [500, 500], [200, 200], [0, 0]]

    assert shard.client.xlen(k.stream) == 0
    assert not shard.client.exists(k.requeued(GROUP), k.notes(GROUP))
    assert not shard.pending()


def test_what_is_taken_for_good_leaves_no_note(shard):
    ids = shard.add(3)
    shard.read()
    k = shard.keys
    shard.client.zadd(k.requeued(GROUP), {ids[0]: 1, "77-0": 2})
    shard.client.hset(k.notes(GROUP), mapping={ids[0]: NOTE, "77-0": NOTE, ids[1]: NOTE})

    shard.link.run("take", [k.stream, k.requeued(GROUP), k.delayed, k.state, k.wake, k.notes(GROUP)], [GROUP, 10])

    assert shard.client.hkeys(k.notes(GROUP)) == [ids[1].encode()]


@pytest.mark.parametrize("kind", ["a shard", "the shared stream"])
def test_a_fetch_that_was_sent_before_can_be_made_void(shard, kind):
    if kind == "a shard":
        lease = shard.acquire("a")
    else:
        lease = join_shared(shard.link, shard.keys, GROUP, "a", 60_000)
    before, call = shard.everything(), ("void_fetches", [lease.key, lease.guard])
    with shard.client.pipeline() as pipe:
        pipe.watch(lease.guard)
        pipe.multi()
        pipe.ping()
        assert shard.link.run(*call, [lease.token, "b"]) == Code.LEASE_LOST
        assert shard.link.run(*call, [lease.token + 1, "a"]) == Code.LEASE_LOST
        assert pipe.execute() == [True]
        pipe.watch(lease.guard)
        pipe.multi()
        pipe.ping()
        shard.client.config_set("maxmemory", 1)
        assert shard.link.run(*call, [lease.token, "a"]) == 1
        shard.client.config_set("maxmemory", 0)
        with pytest.raises(redis.WatchError):
            pipe.execute()
    assert shard.client.hincrby(lease.key, "voided", -1) == 0
    assert shard.everything() == before


# --- how much one call does --------------------------------------------------------------------------------------

UNBOUNDED = r"'(HGETALL|HKEYS|HVALS|SMEMBERS|ZUNIONSTORE|ZINTERSTORE|SUNIONSTORE|SORT|LRANGE|SINTER|SUNION)'"
RANGES = r"'(XRANGE|XREVRANGE|ZRANGEBYSCORE|ZREVRANGEBYSCORE|ZRANGE|ZREMRANGEBYSCORE)', ([^\n]*)"
FEW = {
    # Of these there are as many as groups, priorities or processes, whatever waits in a queue.
    "HKEYS', state", "HGETALL', state", "HKEYS', KEYS[1]", "ZRANGE', KEYS[1], 0, -1",
    "ZRANGEBYSCORE', KEYS[1], '(' .. now + lease_ms, '+inf'", "ZRANGEBYSCORE', KEYS[1], '-inf', now",
    "ZRANGEBYSCORE', KEYS[1], '(' .. expires_at, '+inf'", "ZREMRANGEBYSCORE', KEYS[1], '-inf', long_ago",
    "ZRANGE', KEYS[2], 0, -1",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_script_reads_all_that_there_is(name):
    """Redis serves nobody else meanwhile. What may be very many is read with a bound, and the caller repeats the call."""
    source = script(name).source
    found = list(re.finditer(UNBOUNDED, source))
    for match in re.finditer(RANGES, source):
        rest = match[2]
        first, last = [*re.findall(r"[^,()]+(?:\([^)]*\))?", rest), "", "", ""][1:3]
        bounded = "COUNT" in rest or "LIMIT" in rest or first.strip() == last.strip(" )")
        if match[1] == "ZRANGE":
            bounded = not re.search(r", 0, -1\)", rest)
        if not bounded:
            found.append(match)
    for match in found:
        there = source[match.start() + 1 :]
        assert any(there.startswith(few) for few in FEW), source[match.start() : match.end() + 60]


@pytest.fixture(params=[10_000, pytest.param(100_000, marks=pytest.mark.more)])
def much(request):
    return request.param


def fill(shard, count):
    """So many entries, all of them pending with one consumer and on offer."""
    ids = shard.add(count)
    assert shard.read(count) == ids
    for start in range(0, count, 1000):
        shard.client.zadd(shard.keys.requeued(GROUP), {one: float(one[:-2]) for one in ids[start : start + 1000]})
        shard.client.hset(shard.keys.notes(GROUP), mapping=dict.fromkeys(ids[start : start + 1000], NOTE))
    return ids


def delay_many(shard, count):
    for start in range(0, count, 1000):
        members = {f"{n:016d}mx": 10.0**13 - n for n in range(start, start + 1000)}
        shard.client.zadd(shard.keys.delayed, members)


def until(shard, size, name, keys, args):
    """As the callers do it."""
    done = size
    while (done[0] if isinstance(done, list) else done) == size:
        done = shard.link.run(name, keys, args)


def purge_waiting(shard, much):
    shard.add(much)
    k, last, removed = shard.keys, "", 1
    while removed:
        removed, _, last = shard.link.run("purge_shard", [k.stream, k.state, k.delayed], [1000, last, 1000])
    assert shard.client.xlen(k.stream) == 0


def purge_delayed(shard, much):
    delay_many(shard, much)
    k, removed = shard.keys, 1
    while removed:
        _, removed, _ = shard.link.run("purge_shard", [k.stream, k.state, k.delayed], [1000, "", 1000])
    assert shard.client.zcard(k.delayed) == 0


def purge_requeued(shard, much):
    fill(shard, much)
    k = shard.keys
    until(shard, 500, "purge_requeued", [k.stream, k.requeued(GROUP), k.state, k.notes(GROUP)], [GROUP, 500])
    assert shard.client.xlen(k.stream) == 0


def make_due(shard, much):
    delay_many(shard, much)
    k = shard.keys
    until(shard, 500, "make_due", [k.state, k.delayed], [500])
    assert [int(one[:16]) for one in shard.client.zrange(k.delayed, 0, -1)] == list(range(much))
    assert shard.client.zcount(k.delayed, "(0", "+inf") == 0


def move_due(shard, much):
    delay_many(shard, much)
    k, lease = shard.keys, shard.acquire("a")
    shard.client.zadd(k.delayed, dict.fromkeys(shard.client.zrange(k.delayed, 0, -1), 1))
    while shard.client.exists(k.delayed):
        take(shard, lease, 0)
    assert shard.client.xlen(k.stream) == much


def take_over(shard, much):
    join_shared(shard.link, shard.keys, GROUP, "c", LEASE)
    join_shared(shard.link, shard.keys, GROUP, "b", 60_000)
    fill(shard, much)
    assert reap(shard.link, shard.keys, GROUP, "c", LEASE, gone=True)
    assert shard.client.zcard(shard.keys.requeued(GROUP)) == much


def take_all(shard, much):
    ids = fill(shard, much)
    lease, taken = join_shared(shard.link, shard.keys, GROUP, "b", 60_000), 0
    while found := take(shard, lease, 200):
        taken += len(found)
    assert taken == len(ids)


def given_back(shard, much):
    lease = join_shared(shard.link, shard.keys, GROUP, "c", 60_000)
    ids = fill(shard, much)
    shard.client.delete(shard.keys.requeued(GROUP))
    consumer = StreamConsumer(lease, "q", "shared", ConsumerSettings(group=GROUP), OneLink(shard.link))
    consumer._returned = [one.encode() for one in ids]
    consumer._unmarked = [one.encode() for one in ids]
    consumer.flush()
    assert shard.client.zcard(shard.keys.requeued(GROUP)) == much


def unbound(shard, much):
    queues, expiring, bound, epochs = "{t}:queues", "{t}:expiring", "{t}:bound", "{t}:epochs"
    shard.client.sadd(queues, "q")
    for start in range(0, much, 1000):
        shard.client.sadd(bound, *(f"ex|{n}|p|q" for n in range(start, start + 1000)))
    done = 2
    while done == 2:
        done = shard.link.run("unbind_queue", [queues, expiring, bound, epochs], ["q", "{t}:bindings:", "|", "all"])
    assert done == [1]
    assert not shard.client.exists(queues, bound)


WHOLE = [
    purge_waiting, purge_delayed, purge_requeued, make_due, move_due, take_over, take_all, given_back, unbound,
]  # fmt: skip


@pytest.mark.old_redis(10_000)
@pytest.mark.parametrize("what", WHOLE, ids=lambda what: what.__name__)
def test_what_is_much_is_done_by_many_calls(shard, much, what):
    shard.client.config_resetstat()

    what(shard, much)

    calls = int(shard.client.info("commandstats")["cmdstat_evalsha"]["calls"])
    assert calls >= much / 1000, f"{calls} calls"


# --- several groups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [(GROUP,), (GROUP, "audit")])
@pytest.mark.parametrize(
    "ids",
    [
        ["5-1", f"{2**64 - 1}-{2**64 - 1}"],
        ["5-1", f"{2**64 - 1}-{2**64 - 2}", f"{2**64 - 1}-{2**64 - 1}"],
        ["5-1", "5-9007199254740993", "5-9007199254740994", "5-9223372036854775600", "5-9223372036854775601"],
        ["5-999999999999999", "5-1000000000000000", "5-1000000000000001", "9007199254740993-0", "9007199254740994-0"],
    ],
)
def test_ids_of_any_size_are_settled_and_no_others(redis_server, ids, groups):
    """A producer may choose the ids of his entries; a number of Lua's has 53 bits of them."""
    shard = Shard(redis_server, groups=groups)
    lease = shard.acquire("a")
    for one in ids:
        shard.client.xadd(shard.keys.stream, {"m": "x"}, id=one)
    for group in groups[1:]:
        assert shard.read(len(ids) - 1, group=group) == ids[:-1]
        shard.client.xack(shard.keys.stream, group, *ids[:-1])
    left = list(ids)
    while left:
        assert shard.read(1) == left[:1]
        assert shard.settle(lease, left[:1]) == 1
        del left[0]
        there = [one.decode() for one, _ in shard.client.xrange(shard.keys.stream)]
        assert there == (left or ids[-1:] * (len(groups) - 1))
    shard.link.close()
    shard.broker.close()


@pytest.mark.parametrize(
    "lower,higher",
    [
        ("5-9", "5-10"),
        ("9-5", "10-0"),
        ("9007199254740992-0", "9007199254740993-0"),
        ("5-9007199254740992", "5-9007199254740993"),
        (f"{2**64 - 1}-{2**64 - 2}", f"{2**64 - 1}-{2**64 - 1}"),
    ],
)
def test_the_last_id_is_lifted_whatever_its_size(shard, lower, higher):
    lease = shard.acquire("a")
    keys = [lease.key, shard.keys.stream]
    shard.client.xadd(shard.keys.stream, {"m": "x"}, id=lower)
    for given, lifted in ((lower, 0), (higher, 1), (higher, 0), (lower, 0)):
        assert shard.link.run("lift_last_id", keys, [lease.token, "a", given]) == lifted, given
    assert shard.client.xinfo_stream(shard.keys.stream)["last-generated-id"].decode() == higher


def test_what_was_revoked_long_ago_is_forgotten(shard):
    key, channel = "n:revoked", "n:events"
    heard = shard.client.pubsub(ignore_subscribe_messages=True)
    heard.subscribe(channel)
    wait_until(lambda: shard.client.pubsub_numsub(channel)[0][1] == 1)

    assert shard.link.run("revoke", [key], ["one", 20, channel]) == 1
    wait_until(lambda: not shard.client.exists(key))  # nothing stays of a queue where nothing is revoked any more
    shard.client.zadd(key, {"old": 1})
    assert shard.link.run("revoke", [key], ["two", 60_000, channel]) == 1
    assert shard.link.run("revoke", [key], ["two", 60_000, channel]) == 0
    assert shard.client.zrange(key, 0, -1) == [b"two"]
    assert 0 < shard.client.pttl(key) <= 60_000
    wait_until(
        lambda: (
            heard.get_message(timeout=0.1)
            == {"type": "message", "pattern": None, "channel": b"n:events", "data": b"revoked"}
        )
    )
    heard.close()


def test_a_result_is_replaced_by_its_own_message_alone(shard):
    """What is no string there is nobody's result."""
    store = ResultStore(Pool(shard.broker), "n", "a", 60)
    mine, other = ("q", "0", b"1-1"), ("q", "1", b"1-1")

    def stored(origin, value):
        return shard.link.call(store.pack("id", origin, "SUCCESS", value)[1]) >= 0, store.read("id")["result"]

    assert stored(mine, 1) == (True, 1)
    assert stored(other, 2) == (False, 1)
    assert stored(mine, 3) == (True, 3)
    store.forget([("id", other), ("unknown", mine)])
    assert store.read("id")["result"] == 3
    store.forget([("id", mine)])
    assert store.read("id") is None
    assert stored(other, 4) == (True, 4)
    shard.client.delete(store.key("id"))
    shard.client.rpush(store.key("id"), store.key("id"))
    assert stored(mine, 5) == (True, 5)


@pytest.fixture
def two(redis_server_all):
    one = Shard(redis_server_all, groups=(GROUP, "audit"))
    yield one
    one.link.close()
    one.broker.close()


def produce(shard, number, limit):
    k = shard.keys
    return shard.link.run("produce", [k.state, k.seen("p"), k.stream, k.delayed], [0, number, 1000, limit, "m", "x"])


def test_a_backlog_is_that_of_the_group_which_has_most_of_it(two):
    leases = {group: acquire(two.link, two.keys, group, group, 60_000) for group in (GROUP, "audit")}
    ids = two.add(10)
    for group in leases:
        assert two.read(group=group) == ids
    assert produce(two, 0, 10) == Code.FULL

    assert two.settle(leases[GROUP], ids[:5]) == 5
    assert produce(two, 1, 10) == Code.FULL, "the other group has finished none"

    assert two.settle(leases["audit"], ids[5:], "audit") == 5
    assert two.client.xlen(two.keys.stream) == 10, "each is needed by one of them"
    k = two.keys
    ready = ("ready", [k.stream, k.requeued(GROUP), k.delayed, k.state], [GROUP])
    assert two.link.run(*ready) == 0
    bulk = ("produce_many", [k.state, k.seen("b"), k.stream, k.delayed], [0, 0, 1000, 10, *["m", "x"] * 8])
    assert two.link.run(*bulk) == 5, "five of ten are unfinished in each group"
    assert produce(two, 2, 10) == Code.FULL
    assert two.link.run(*ready) == 5

    # What was finished once is not counted again, nor what is gone.
    two.settle(leases[GROUP], ids[:7])
    two.settle(leases["audit"], ids[:5], "audit")
    dead = [leases["audit"].key, k.stream, k.state, k.notes("audit"), k.dlq, k.replaced("audit")]
    new = two.read(group="audit")
    assert two.link.run("dead_letter", dead, [leases["audit"].token, "audit", "audit", new[0], "{}", ""]) == 1
    state = {name.decode(): value for name, value in two.client.hgetall(k.state).items()}
    entries = {one.decode() for one, _ in two.client.xrange(k.stream)}
    last = [*ids, *new]
    pending = {group: set(two.pending(group)) for group in leases}
    pending[GROUP] |= set(new)  # which it was not given
    for group in leases:
        assert int(state[f"kept:{group}"]) == len(entries - pending[group]), (group, last)
    rest = two.read()
    for group, one in leases.items():
        two.settle(one, sorted({*ids, *rest, *new}, key=lambda one: tuple(map(int, one.split("-")))), group)
    assert two.client.xlen(k.stream) == 0
    assert two.client.hmget(k.state, "kept:workers", "kept:audit") == [b"0", b"0"]


# --- notes -------------------------------------------------------------------------------------------------------


def test_an_entry_that_is_gone_leaves_no_note(shard):
    k = shard.keys
    join_shared(shard.link, k, GROUP, "a", 60_000)
    live = join_shared(shard.link, k, GROUP, "b", 60_000)
    ids = shard.add(6)
    shard.read(consumer="a")
    shard.client.zadd(k.requeued(GROUP), {"77-0": 1, ids[0]: 2, ids[1]: 3})
    shard.client.hset(k.notes(GROUP), mapping=dict.fromkeys(["77-0", *ids], NOTE))
    shard.client.xdel(k.stream, ids[0], ids[2], ids[4])
    assert take(shard, live, 2) == []
    assert reap(shard.link, k, GROUP, "a", 60_000, gone=True)
    # Redis 6.2 lets also what is gone be claimed, and so be offered.
    assert set(take(shard, live, 10)) >= {ids[3], ids[5]}
    left = {one.decode() for one in shard.client.hkeys(k.notes(GROUP))}
    assert left == {ids[1], ids[3], ids[5]}


# --- shared streams ----------------------------------------------------------------------------------------------


def test_joining_twice_answers_the_same_token(shard):
    assert (
        join_shared(shard.link, shard.keys, GROUP, "a", 60_000).token
        == join_shared(shard.link, shard.keys, GROUP, "a", 60_000).token
    )
    assert join_shared(shard.link, shard.keys, GROUP, "b", 60_000).token > 0


def consumers(shard):
    return sorted(one["name"].decode() for one in shard.client.xinfo_consumers(shard.keys.stream, GROUP))


def test_a_consumer_with_a_lease_is_left_alone(shard):
    join_shared(shard.link, shard.keys, GROUP, "a", 60_000)
    join_shared(shard.link, shard.keys, GROUP, "b", 60_000)
    shard.add(3)
    shard.read(consumer="a")
    before = shard.everything()

    assert not reap(shard.link, shard.keys, GROUP, "a", 60_000, gone=False)

    assert shard.everything() == before


def test_a_consumer_whose_lease_expired_is_removed_and_its_entries_are_offered(shard):
    stale = join_shared(shard.link, shard.keys, GROUP, "a", LEASE)
    live = join_shared(shard.link, shard.keys, GROUP, "b", 60_000)
    ids = shard.add(2500)
    shard.read(consumer="a")
    wait_until(lambda: reap(shard.link, shard.keys, GROUP, "a", LEASE, gone=False), timeout=3)

    assert set(shard.pending().values()) == {"b"}
    assert consumers(shard) == ["b"]
    with pytest.raises(LeaseLost):
        stale.renew(shard.link)
    taken = []
    while batch := take(shard, live, 300):
        taken += batch
    assert taken == ids
    assert shard.settle(stale, ids[:1]) == Code.LEASE_LOST
    assert shard.settle(live, ids[:200]) == 200


def take(shard, lease, count):
    k = shard.keys
    _, (_, _, _, more, entries, new) = shard.link.run(
        "fetch",
        [lease.key, k.stream, k.state, k.notes(GROUP), k.delayed, k.wake, k.requeued(GROUP)],
        [lease.token, lease.incarnation, GROUP, lease.incarnation, count, 0, 0],
    )
    assert not new
    assert more == shard.client.exists(shard.keys.requeued(GROUP))
    return [entry_id.decode() for entry_id, _, _ in entries]


def test_one_fetch_gives_what_is_due_on_offer_and_new_in_all_streams(redis_server_all):
    """The first stream's before the second's, and no more than was asked for; a note comes with its entry, or goes."""
    streams = [Shard(redis_server_all, "shared"), Shard(redis_server_all, "shared.5")]
    streams[1].client.xgroup_create(streams[1].keys.stream, GROUP, "0", mkstream=True)
    leases = [join_shared(one.link, one.keys, GROUP, "a", 60_000) for one in streams]
    given = []
    for one in streams:
        given.append(one.add(2))
        one.read()
        one.client.zadd(one.keys.requeued(GROUP), {**{entry_id: n for n, entry_id in enumerate(given[-1])}, "77-0": 9})
        one.client.hset(one.keys.notes(GROUP), mapping={given[-1][0]: NOTE, "77-0": NOTE})
        one.client.zadd(one.keys.delayed, {f"{1:016}mx": 1, f"{2:016}my": 9e15})
    woken = streams[0].client.xadd(streams[0].keys.wake, {"w": "due"})
    keys = []
    for one, lease in zip(streams, leases, strict=True):
        k = one.keys
        keys += [lease.key, k.stream, k.state, k.notes(GROUP), k.delayed, k.wake, k.requeued(GROUP)]

    def fetch(most, new, token=leases[1].token):
        return streams[0].link.run("fetch", keys, [leases[0].token, "a", GROUP, "a", most, new, 0, token, 0])

    before = streams[0].everything()
    assert fetch(9, 1, token=1) == Code.LEASE_LOST
    assert streams[0].everything() == before

    _, first, second = fetch(4, 1)
    last, rung, due, more, again, fresh = first
    assert [(entry_id.decode(), note.decode()) for entry_id, _, note in again] == [
        (given[0][0], NOTE),
        (given[0][1], ""),
    ]
    assert [fields for _, fields in fresh] == [[b"m", b"x"]]
    assert (last, rung, due, more) == (fresh[0][0], woken, 9e15, 0)
    assert [entry_id.decode() for entry_id, _, _ in second[4]] == [given[1][0]]
    assert (second[1], second[3], second[5]) == (b"0-0", 1, [])
    assert set(streams[0].pending().values()) == {"a"}

    _, first, second = fetch(9, 0)
    assert (first[4], first[5], second[5]) == ([], [], [])
    assert [entry_id.decode() for entry_id, _, _ in second[4]] == given[1][1:]
    assert [one.client.hkeys(one.keys.notes(GROUP)) for one in streams] == [[ids[0].encode()] for ids in given]
    assert [len(part[5]) for part in fetch(9, 1)[1:]] == [0, 1]


def test_entries_of_one_millisecond_are_offered_in_their_order(shard):
    join_shared(shard.link, shard.keys, GROUP, "a", LEASE)
    live = join_shared(shard.link, shard.keys, GROUP, "b", 60_000)
    ids = [f"7-{n}" for n in range(1, 25)]
    for entry_id in ids:
        shard.client.xadd(shard.keys.stream, {"m": "x"}, id=entry_id)
    shard.read(consumer="a")

    assert reap(shard.link, shard.keys, GROUP, "a", LEASE, gone=True)

    assert take(shard, live, 5) + take(shard, live, 100) == ids


def test_nothing_is_lost_where_nobody_else_lives(shard):
    join_shared(shard.link, shard.keys, GROUP, "a", 60_000)
    ids = shard.add(3)
    shard.read(consumer="a")

    assert not reap(shard.link, shard.keys, GROUP, "a", 60_000, gone=True)
    assert shard.pending() == dict.fromkeys(ids, "a")

    # whoever comes next need not wait for the lease of one that is known to be gone
    live = join_shared(shard.link, shard.keys, GROUP, "b", 60_000)
    assert reap(shard.link, shard.keys, GROUP, "a", 60_000, gone=False)
    assert take(shard, live, 10) == ids
    # Nobody knows which of them had begun: whoever takes one is to write that down.
    assert shard.client.hgetall(shard.keys.notes(GROUP)) == {one.encode(): Note().format().encode() for one in ids}


@pytest.mark.parametrize("alone", [True, False])
def test_what_had_ended_when_its_process_died_is_not_charged(shard, alone):
    """Where the supervisor has charged what ran. The start of what another process marked stays written down."""
    lease = join_shared(shard.link, shard.keys, GROUP, "a", 60_000)
    ids = shard.add(3)
    shard.read(consumer="a")
    for entry_id in ids[:2]:
        mark(shard, entry_id, lease)
    shard.client.hset(shard.keys.notes(GROUP), ids[2], Note(mark=7).format())
    assert lease.charge(shard.link, {ids[1]: True}) == 1
    live = None if alone else join_shared(shard.link, shard.keys, GROUP, "b", 60_000)
    assert reap(shard.link, shard.keys, GROUP, "a", 60_000, gone=True, charged=True) is not alone
    live = live or join_shared(shard.link, shard.keys, GROUP, "b", 60_000)
    assert reap(shard.link, shard.keys, GROUP, "a", 60_000, gone=False)
    assert take(shard, live, 10) == ids
    notes = [Note.parse(shard.client.hget(shard.keys.notes(GROUP), entry_id)) for entry_id in ids]
    assert [(note.mark, note.crashes) for note in notes] == [(0, 0), (0, 1), (7, 0)]


def test_an_empty_consumer_goes_though_nobody_else_lives(shard):
    join_shared(shard.link, shard.keys, GROUP, "a", 60_000)
    shard.client.xgroup_createconsumer(shard.keys.stream, GROUP, "a")

    assert reap(shard.link, shard.keys, GROUP, "a", 60_000, gone=True)
    assert consumers(shard) == []


def test_entries_that_were_deleted_under_a_consumer_do_not_keep_it(shard):
    join_shared(shard.link, shard.keys, GROUP, "a", 60_000)
    live = join_shared(shard.link, shard.keys, GROUP, "b", 60_000)
    ids = shard.add(4)
    shard.read(consumer="a")
    shard.client.xdel(shard.keys.stream, ids[1], ids[2])

    assert reap(shard.link, shard.keys, GROUP, "a", 60_000, gone=True)

    assert consumers(shard) == ["b"]
    assert take(shard, live, 10) == [ids[0], ids[3]]
    assert list(shard.pending()) == [ids[0], ids[3]]


# --- out of memory -----------------------------------------------------------------------------------------------


def exhaust(server):
    client = server.client()
    for n in range(200):
        client.set(f"filler{n}", b"x" * 10_000)
    server.config_set(maxmemory=int(client.info("memory")["used_memory"]) - 1_000_000)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        client.set("probe", "x")


@pytest.mark.parametrize(
    "name",
    [name for name in FENCED if name != "claim_ids"],
)
def test_scripts_that_settle_work_above_maxmemory(redis_server_all, name):
    shard = Shard(redis_server_all)
    lease = shard.acquire("a")
    ids = world(shard)
    mark(shard, ids[0], lease)
    for one in by_sha().values():  # a load would be refused
        shard.link.command("SCRIPT", "LOAD", one.source)
    exhaust(redis_server_all)
    before = shard.everything()

    keys, args = fenced_calls(shard, ids, shard.keys.delayed)[name]
    assert shard.link.run(name, keys, [lease.token, "a", *args]) != Code.LEASE_LOST

    assert shard.everything() != before
    shard.link.close()


def test_messages_are_read_and_settled_until_there_is_memory_again(redis_server_all):
    """What drains a full Redis: reading, settling, holding the lease, taking over, being alive."""
    shard = Shard(redis_server_all)
    ids = shard.add(5000)
    first = shard.acquire("a", LEASE)
    one = membership(shard, 60_000)
    exhaust(redis_server_all)

    one.beat(shard.link, {"a": {}})
    first.renew(shard.link)
    wait_until(lambda: isinstance(second := shard.acquire("b"), Lease) and second)
    second = shard.acquire("b")
    while batch := shard.read(200):
        assert shard.settle(second, batch) == len(batch)
    assert shard.client.xlen(shard.keys.stream) == 0
    assert second.token > first.token
    assert ids
    shard.link.close()


def test_shared_streams_drain_above_maxmemory(redis_server_all):
    shard = Shard(redis_server_all)
    gone = join_shared(shard.link, shard.keys, GROUP, "a", 60_000)
    live = join_shared(shard.link, shard.keys, GROUP, "b", 60_000)
    ids = shard.add(10)
    shard.read(consumer="a")
    exhaust(redis_server_all)

    live.renew(shard.link)
    join_shared(shard.link, shard.keys, GROUP, "c", 60_000)
    assert reap(shard.link, shard.keys, GROUP, "a", 60_000, gone=True)
    assert take(shard, live, 10) == ids
    assert shard.settle(live, ids) == 10
    assert gone.token
    shard.link.close()


# --- delayed messages, and what is sent behind them --------------------------------------------------------------


def state_of(shard):
    return shard.client.hget(shard.keys.state, "open")


def delay(shard, due_ms, number=1):
    """A message that falls due then, as ``produce_delayed.lua`` leaves it."""
    k = shard.keys
    args = [0, number, 60_000, 0, "m", b"delayed", due_ms, 0]
    assert shard.link.run("produce_delayed", [k.state, k.seen("p0"), k.stream, k.delayed, k.wake], args) == 1


def replace(shard, entry_id, due_ms=0):
    k = shard.keys
    return shard.link.run(
        "produce_replacement",
        [k.state, k.seen("k0"), k.stream, k.delayed, k.wake, k.lease(GROUP), k.notes(GROUP), k.replaced(GROUP)],
        [0, 0, 60_000, "m", b"retry", due_ms, GROUP, entry_id, 1, 1],
    )


def bodies(shard):
    return [fields[b"m"] for _, fields in shard.client.xrange(shard.keys.stream)]


def overdue(shard, count):
    """As many delayed messages that are due, of which the state says so."""
    k = shard.keys
    due = shard.now_ms()
    shard.client.zadd(k.delayed, {b"%016dmd%d" % (n, n): due for n in range(count)})
    shard.client.hset(k.state, "open", f"0 {due}")
    shard.wait_past(due)
    return [b"d%d" % n for n in range(count)]


def call_of(shard, way):
    """A call of each produce script, to be repeated with the same arguments; all of them say ``new``."""
    k = shard.keys
    keys, page = [k.state, k.seen("p0"), k.stream, k.delayed], [0, 7, 60_000, 0]
    calls = {
        "produce": (keys, [*page, "m", b"new"]),
        "produce_many": (keys, [*page, "m", b"new"]),
        "produce_delayed": ([*keys, k.wake], [*page, "m", b"new", 1000, 0]),
        "produce_deduped": (
            [k.state, k.stream, k.delayed, k.wake, k.seen("r0.0")],
            [0, b"i" * 16, 60_000, 0, "m", b"new", "", 0, shard.layout, 1000, 5, 0],
        ),
        "produce_replacement": (
            [*keys, k.wake, k.lease(GROUP), k.notes(GROUP), k.replaced(GROUP)],
            [*page[:3], "m", b"new", 0, GROUP, "1-0", 1, 1],
        ),
    }
    answer = shard.link.run(way, *calls[way])
    while isinstance(answer, list) and answer[0] == Code.SEEN_LAYOUT:
        shard.layout = answer[1]
        return call_of(shard, way)
    return answer


PRODUCE = ["produce", "produce_many", "produce_delayed", "produce_deduped", "produce_replacement"]


@pytest.mark.parametrize("way", PRODUCE)
@pytest.mark.parametrize("count", [1, 200, 450])
def test_what_is_due_goes_first_some_of_it_with_each_call(shard, way, count):
    due = overdue(shard, count)
    answers = [call_of(shard, way)]
    while answers[-1] == Code.MORE_DUE:
        assert b"new" not in bodies(shard)
        assert len(bodies(shard)) <= 200 * len(answers), "each call moves a few"
        answers.append(call_of(shard, way))

    assert len(answers) == (count + 199) // 200
    assert bodies(shard) == [*due, b"new"]
    assert shard.client.zcard(shard.keys.delayed) == 0
    assert state_of(shard) == b"0"
    # Repeated after a lost reply it is known, also where more has fallen due meanwhile.
    overdue(shard, 201)
    assert call_of(shard, way) in (Code.STORED_ALREADY, [Code.STORED_ALREADY, 1])
    assert bodies(shard).count(b"new") == 1


@pytest.mark.parametrize("way", PRODUCE)
def test_what_is_due_moves_into_no_full_redis(own_server_all, way):
    shard = Shard(own_server_all)
    due = overdue(shard, 3)
    with contextlib.suppress(ReplyError, QueueFull):
        call_of(Shard(own_server_all, shard=1), way)  # the script is loaded
    before = shard.everything()
    own_server_all.config_set(maxmemory=1)
    with pytest.raises(BrokerOutOfMemory):
        call_of(shard, way)
    own_server_all.config_set(maxmemory=0)
    assert shard.everything() == before
    call_of(shard, way)
    assert bodies(shard) == [*due, b"new"]


def test_a_due_time_that_was_left_over_is_no_hindrance(shard):
    shard.client.hset(shard.keys.state, "open", "0 1")
    assert call_of(shard, "produce")
    assert bodies(shard) == [b"new"]


def test_an_owner_moves_no_more_than_it_was_asked_to_and_knows_that_more_is_due(shard):
    due = overdue(shard, 700)
    lease = shard.acquire("a")
    consumer = ShardConsumer(lease, "q", 0, ConsumerSettings(group=GROUP), OneLink(shard.link))
    for count in (500, 700):
        consumer.arrivals.look()
        assert bodies(shard) == due[:count]
        assert (consumer.arrivals.next_due is not None and consumer.arrivals.next_due <= mono_s()) == (count < 700)


def test_a_retry_whose_entry_is_finished_goes_behind_what_is_due(shard):
    overdue(shard, 1)

    assert replace(shard, "1-0") == 2

    assert bodies(shard) == [b"d0", b"retry"]


def test_a_retry_whose_entry_is_finished_is_appended_where_nothing_is_due(shard):
    delay(shard, shard.now_ms() + 60_000)

    assert replace(shard, "1-0") == 2

    assert [fields for _, fields in shard.client.xrange(shard.keys.stream)] == [{b"m": b"retry"}]


def test_the_state_says_when_the_first_delayed_message_falls_due(shard):
    k = shard.keys
    later = shard.now_ms() + 60_000
    delay(shard, later + 5)
    assert state_of(shard) == b"0 %d" % (later + 5)
    delay(shard, later + 9, number=2)
    assert state_of(shard) == b"0 %d" % (later + 5), "a later one is not the first"
    delay(shard, later, number=3)
    assert state_of(shard) == b"0 %d" % later

    assert shard.link.run("purge_shard", [k.stream, k.state, k.delayed], [1000, "", 1])[1] == 1
    assert state_of(shard) == b"0 %d" % (later + 5), "of those that are left"
    assert shard.link.run("make_due", [k.state, k.delayed], [500]) == 2
    assert state_of(shard) == b"0 0"
    assert shard.link.run("purge_shard", [k.stream, k.state, k.delayed], [1000, "", 1000])[1] == 2
    assert state_of(shard) == b"0", "nothing is delayed any more"
