"""What is wrong with the server, its settings and an app's queues, and what to do about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing

from ..clock import mono_s, wall_ms
from ..errors import AccessRefused, BrokerUnavailable, ConfigError, ReplyError, StreamTaskError
from ..redis import commands
from ..redis.connection import MIN_VERSION
from ..redis.keys import expiring, is_shared
from ..redis.link import Link
from ..redis.replies import EXHAUSTED_ADVICE
from ..redis.scripts import by_sha
from ..redis.wire import id_order
from ..text import counted
from .reader import Reader, RecordedQueue, Row, as_text
from .snapshot import Snapshot, snapshots

LAST_ID = (2**64 - 1, 2**64 - 1)
AHEAD_MS = 86_400_000


def examine(reader: Reader) -> list[Row]:
    """See ``Inspector.doctor``."""
    checks: list[Row] = []
    try:
        _check_server(reader, checks)
        checks += _check_queues(reader)
    except (BrokerUnavailable, ConfigError) as exc:
        checks.append(_check("redis", False, str(exc), "nothing else can be checked before Redis answers"))
    except ReplyError as exc:
        advice = "a key of a wrong type? Its shard rests until that is mended; no other is the worse for it"
        checks.append(_check("queues", False, f"a queue can't be looked at: {exc}", advice))
    return checks


def _check(name: str, ok: bool | None, message: str, advice: str = "") -> Row:
    return {"name": name, "ok": ok, "message": message, "advice": advice}


# The server


def _check_server(reader: Reader, checks: list[Row]) -> None:
    link = reader.links.at(reader.registry)
    checks.append(_check_answers(reader, link))
    checks.append(_check_access(reader, link))
    try:
        info = commands.info_fields(link.call(commands.info()))
    except (ReplyError, AccessRefused) as exc:
        advice = "allow this user INFO: without it version, memory and persistence are unknown"
        checks.append(_check("server", None, f"INFO is refused: {exc}", advice))
    else:
        checks += [_check_version(info), _check_role(info), *check_memory(info), *_check_persistence(info, link)]
    checks.append(_check_clock(link))
    checks.append(_check_scripts(link))
    checks.append(_check_writes(reader, link))
    checks.append(_check_id_sets(link))


def _check_answers(reader: Reader, link: Link) -> Row:
    link.call(commands.PING)
    rounds = []
    for _ in range(5):
        start = mono_s()
        link.call(commands.PING)
        rounds.append(mono_s() - start)
    best, slow = min(rounds) * 1000, max(rounds) * 1000
    message = f"{reader.app.broker.safe_url} answers in {best:.2f} ms (the slowest of 5: {slow:.2f} ms)"
    if best > 50:
        advice = "workers need a Redis nearby: every batch waits for round trips"
        return _check("redis", None, message, advice)
    return _check("redis", True, message)


def _check_access(reader: Reader, link: Link) -> Row:
    """Whether Redis does what somebody asks who has nothing but its address."""
    broker = reader.app.broker
    if broker.scheme not in ("redis", "rediss", "redis+sentinel", "redis+cluster"):
        return _check("access", True, "no network: the permissions of the socket say who may connect")
    with closing(broker.link(reader.registry, anonymous=True)) as stranger:
        try:
            stranger.call(commands.exists(reader.registry))
        except StreamTaskError:
            return _check("access", True, "a connection without a password is refused")
        near = stranger.is_local() and _setting(link, "protected-mode") == "yes"
    return _check(
        "access",
        None,
        f"{'every user of this machine' if near else 'whoever reaches Redis'} may use it: it asks for no password",
        "give it users (deploy/users.acl is a start) or requirepass, and bind it to addresses that only workers reach",
    )


def _check_version(info: dict[str, str]) -> Row:
    text = info.get("redis_version", "0")
    version = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    if version < MIN_VERSION:
        return _check("version", False, f"Redis {text} is too old", "streamtask needs 6.2 or later: upgrade the server")
    return _check("version", True, f"Redis {text}")


def _check_role(info: dict[str, str]) -> Row:
    if info.get("role") == "slave":
        return _check(
            "role",
            False,
            "this server is a read-only replica",
            "name the primary in the broker URL, or use redis+sentinel://",
        )
    return _check("role", True, "primary")


def check_memory(info: dict[str, str]) -> list[Row]:
    policy, limit, used = info.get("maxmemory_policy", "noeviction"), _int(info, "maxmemory"), _int(info, "used_memory")
    advice = "CONFIG SET maxmemory-policy noeviction, and in redis.conf: otherwise Redis deletes streams, ids or leases"
    if policy == "noeviction":
        checks = [_check("eviction", True, "maxmemory-policy is noeviction")]
    elif limit == 0:
        checks = [
            _check("eviction", None, f"maxmemory-policy is {policy}: harmless only while there is no maxmemory", advice)
        ]
    else:
        what = "ids of messages, so that repeated ones run twice" if policy.startswith("volatile") else "whole queues"
        checks = [
            _check(
                "eviction", False, f"MESSAGES CAN BE LOST: with maxmemory-policy {policy} Redis evicts {what}", advice
            )
        ]
    evicted = _int(info, "evicted_keys")
    if evicted:
        checks.append(
            _check(
                "evicted",
                False,
                f"Redis has evicted {counted(evicted, 'key')} since its start",
                "raise maxmemory; see 'eviction'",
            )
        )
    total = limit or _int(info, "total_system_memory")
    if not total:
        return [*checks, _check("memory", True, f"{_size(used)} used")]
    message = f"{_size(used)} of {_size(total)} used ({used / total:.0%} of {'maxmemory' if limit else 'the machine'})"
    relief = "raise maxmemory, start more workers, or set max_backlog: at the limit produce calls raise QueueFull"
    if limit and used > 0.98 * limit:
        return [*checks, _check("memory", False, message, relief)]
    if used > 0.85 * total:
        return [*checks, _check("memory", None, message, relief)]
    return [*checks, _check("memory", True, message)]


def _check_persistence(info: dict[str, str], link: Link) -> list[Row]:
    checks = []
    for name, what in (
        ("aof_last_write_status", "the last write to the append-only file failed"),
        ("aof_last_bgrewrite_status", "the last rewrite of the append-only file failed"),
        ("rdb_last_bgsave_status", "the last snapshot failed"),
    ):
        if info.get(name, "ok") != "ok":
            checks.append(
                _check("persistence", False, what, "look at Redis' log: a full disk, or too little memory to fork?")
            )
    if checks:
        return checks
    if info.get("aof_enabled") != "1":
        save = _setting(link, "save")
        lost = "everything" if save == "" else "what was stored since its last snapshot"
        return [
            _check(
                "persistence",
                None,
                f"appendonly is off: when Redis crashes, {lost} is lost, also messages whose produce call returned",
                "CONFIG SET appendonly yes, and in redis.conf; appendfsync everysec loses at most about a second",
            )
        ]
    fsync = _setting(link, "appendfsync")
    if fsync == "no":
        return [
            _check(
                "persistence",
                None,
                "appendfsync is no: a crash of the machine loses what the kernel has not written, often 30 s",
                "CONFIG SET appendfsync everysec",
            )
        ]
    return [_check("persistence", True, f"append-only file, appendfsync {fsync or 'unknown'}")]


def _check_clock(link: Link) -> Row:
    sent = wall_ms()
    now = commands.clock_ms(link.call(commands.TIME))
    off = (now - (sent + wall_ms()) / 2) / 1000
    message = f"Redis' clock is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} this machine's"
    advice = (
        "run NTP on both: eta, expires and the times in this output are off by as much (leases use Redis' clock alone)"
    )
    if abs(off) > 1:
        return _check("clock", False if abs(off) > 30 else None, message, advice)
    return _check("clock", True, f"Redis' clock and this machine's differ by {abs(off) * 1000:.0f} ms")


def _check_scripts(link: Link) -> Row:
    bad = []
    scripts = by_sha()
    for sha, one in scripts.items():
        try:
            if link.call(one.pack_load()) != sha:
                bad.append(f"{one.name}: another digest")
        except (ReplyError, AccessRefused) as exc:
            bad.append(f"{one.name}: {exc}")
    if bad:
        return _check(
            "scripts", False, "; ".join(bad), "the user needs EVALSHA and SCRIPT LOAD; is the server a Redis or Valkey?"
        )
    return _check("scripts", True, f"all {len(scripts)} scripts load")


def _check_id_sets(link: Link) -> Row:
    for name in ("hash-max-listpack-entries", "hash-max-ziplist-entries"):
        value = _setting(link, name)
        if value is None:
            continue
        if value.isdigit() and int(value) < 64:
            return _check(
                "id-sets",
                None,
                f"{name} is {value}: remembered ids take several times the memory",
                f"CONFIG SET {name} 128",
            )
        return _check("id-sets", True, f"{name} is {value}")
    return _check(
        "id-sets", None, "CONFIG GET is not allowed here, so the hash settings are unknown", "at least 64 is needed"
    )


def _check_writes(reader: Reader, link: Link) -> Row:
    """By a script that writes nothing, which Redis refuses as any that does (above maxmemory it allows that one)."""
    try:
        link.run("touch_queues", [expiring(reader.app.settings.namespace, reader.app.name)], [])
    except (BrokerUnavailable, ReplyError) as exc:
        return _check(
            "writes", False, str(exc), "until then nothing is stored and nothing runs: see docs/operations.md"
        )
    return _check("writes", True, "Redis lets scripts write")


def _setting(link: Link, name: str) -> str | None:
    """A setting of the server; None if it has none of that name or does not tell."""
    try:
        reply = link.call(commands.setting(name))
    except (ReplyError, AccessRefused):
        return None
    return as_text(reply[1]) if reply else None


def _int(info: dict[str, str], name: str) -> int:
    value = info.get(name, "0")
    return int(value) if value.isdigit() else 0


def _size(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.0f} {units[0]}" if units[0] == "B" else f"{count:.1f} {units[0]}"


# The queues


def _check_queues(reader: Reader) -> list[Row]:
    wrong, names = reader.wrong_keys()
    if wrong:
        advice = "remove or rename these keys, and see who may write there; their shards, or queues, rest until then"
        return [_check("keys", False, wrong, advice)]
    queues = reader.recorded(names)
    checks = [_check("keys", True, "all keys are of their types"), _check_shard_counts(reader, queues)]
    shots = snapshots(reader, queues, consumers=True)
    stale, ownerless = _stale(shots, True), _ownerless(shots)
    if stale or ownerless:
        time.sleep(reader.app.settings.lease + 1)
        shots = snapshots(reader, queues, consumers=True)
        stale &= _stale(shots, True)
        ownerless &= _ownerless(shots)
    checks.append(_check_owners(ownerless))
    checks.append(_check_consumers(stale, _stale(shots, False)))
    checks.append(_check_groups(shots))
    checks.append(_check_stream_ids(reader, queues))
    checks.append(_check_dead(shots))
    return checks


def _check_owners(ownerless: set[str]) -> Row:
    if ownerless:
        return _check(
            "shard-owners",
            False,
            f"workers live, but nobody owns {_listed(ownerless)}",
            "look at the workers' logs; restart the workers of these queues if they say nothing",
        )
    return _check("shard-owners", True, "every shard has an owner, where workers live")


def _check_consumers(stale: set[str], left: set[str]) -> Row:
    """``stale``: that live workers should have taken over from; ``left``: where no worker lives."""
    if stale:
        return _check(
            "stale-consumers",
            False,
            f"{counted(len(stale), 'consumer')} without a live process: {_listed(stale)}",
            "live workers take over what these had within a lease time, and none did: look at the workers' logs",
        )
    if left:
        return _check(
            "stale-consumers",
            None,
            f"{counted(len(left), 'consumer')} of processes that are gone, and no worker lives: {_listed(left)}",
            "the next worker that starts takes over what these had",
        )
    return _check("stale-consumers", True, "no consumer is left over from a dead process")


def _check_shard_counts(reader: Reader, queues: Sequence[RecordedQueue]) -> Row:
    settings = reader.app.settings
    recorded = {queue.name: queue.shape.shards for queue in queues}
    wrong = []
    for name in {*reader.app.queue_names(), *settings.queue_shards}:
        configured = settings.queue_shards.get(name, settings.shards)
        if name in recorded and recorded[name] != configured:
            wrong.append(f"{name} has {recorded[name]} in Redis, the app says {configured}")
    if wrong:
        return _check(
            "shard-counts",
            False,
            "; ".join(sorted(wrong)),
            "set shards= or queue_shards= to what Redis has: until then these queues take neither messages nor workers",
        )
    if not recorded:
        return _check("shard-counts", True, "no queue is recorded yet")
    return _check(
        "shard-counts", True, "as configured: " + ", ".join(f"{name} {number}" for name, number in recorded.items())
    )


def _check_stream_ids(reader: Reader, queues: Sequence[RecordedQueue]) -> Row:
    """Entries whose ids their producers chose: a stream may take no more of them, or has times that are none."""
    keys = [
        key for queue in queues for one in map(queue.shard, queue.shards()) for key in (one.stream, one.dlq, one.wake)
    ]
    replies = reader.ask_quietly([(key, commands.stream_info(key)) for key in keys])
    full, ahead = set(), set()
    for key, reply in zip(keys, replies, strict=True):
        if isinstance(reply, Exception):
            continue  # a stream that is not there
        last = id_order(commands.pairs(reply)[b"last-generated-id"])
        if last == LAST_ID:
            full.add(key)
        elif last[0] > wall_ms() + AHEAD_MS:
            ahead.add(key)
    if full:
        message = f"the largest id that there is was appended to {_listed(full)}: nothing more can be stored there"
        return _check("stream-ids", False, message, EXHAUSTED_ADVICE)
    if ahead:
        message = f"ids of the future were appended to {_listed(ahead)}: all that comes after has the time of these"
        return _check("stream-ids", None, message, EXHAUSTED_ADVICE)
    return _check("stream-ids", True, "all streams take messages")


def _check_groups(shots: Sequence[Snapshot]) -> Row:
    unserved = []
    for shot in shots:
        name = shot.queue.name
        for group in shot.queue.groups:
            backlog = shot.totals(group).backlog
            if backlog and not shot.members[group]:
                unserved.append(f"group {group} of queue {name} ({counted(backlog, 'message')})")
        if not shot.queue.groups and (backlog := shot.totals(None).backlog):
            unserved.append(f"queue {name}, where no worker has ever started ({counted(backlog, 'message')})")
    if unserved:
        return _check(
            "served",
            False,
            "nobody works on " + ", ".join(unserved),
            "start workers for them: until then these messages wait, and none is removed",
        )
    return _check("served", True, "every queue with messages has live workers")


def _check_dead(shots: Sequence[Snapshot]) -> Row:
    found = [f"{shot.dead:,} in {shot.queue.name}" for shot in shots if shot.dead]
    if found:
        return _check(
            "dead-letters",
            None,
            "there are dead letters: " + ", ".join(found),
            "'dlq list' shows them, 'dlq replay' runs them again",
        )
    return _check("dead-letters", True, "none")


def _stale(shots: Sequence[Snapshot], served: bool) -> set[str]:
    """Consumers of dead processes, of groups that have a live one, which should have taken over from them, or have none."""
    return {
        f"{shot.queue.name}/{row['shard']}/{row['group']}/{row['consumer']}"
        for shot in shots
        for row in shot.consumers()
        if row["stale"] and bool(shot.members[row["group"]]) == served
    }


def _ownerless(shots: Sequence[Snapshot]) -> set[str]:
    return {
        f"{shot.queue.name}/{shard}" + ("" if group == shot.main_group else f" (group {group})")
        for shot in shots
        for shard, state in shot.shards.items()
        for group, one in state.groups.items()
        if not is_shared(shard) and shot.members[group] and shot.owner(one) is None
    }


def _listed(names: set[str], most: int = 8) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
