"""Entries as they were read, made into messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from ..errors import DecodeError
from ..redis import wire
from .backlog import Backlog
from .delivery import Dead, Delivery, Entry, Kind, Outcome


@final
class Decoder:
    """Of one owner. What it can't decode is a dead letter."""

    def __init__(self, backlog: Backlog, group: str) -> None:
        self._backlog = backlog
        self._settings = backlog.settings
        self._group = group.encode()

    def __call__(self, entries: Sequence[Entry]) -> list[Delivery | Entry]:
        """Decodes entries ``[id, fields]``. What can't be decoded is left to be a dead letter."""
        arrived: list[Delivery | Entry] | None = None  # the entries themselves, up to the first unusual one
        unordered, largest = self._settings.unordered, self._settings.max_message_bytes
        unpack, hook, few, most = wire.unpackb, wire.ext_hook, wire.MOST_ALIKE, -1 if unordered else largest
        for position, entry in enumerate(entries):
            fields = entry[1]
            # What nearly all messages are is seen here, in place of a call of ``decode`` for each.
            envelope = None
            try:
                name, data = fields
                if len(data) <= most:
                    envelope = unpack(data, ext_hook=hook, strict_map_key=False, max_map_len=few)
                    task, key, message_id, args, kwargs, headers = envelope
                    if (
                        headers is None
                        and (type(key) is bytes or key is None)
                        and type(args) is list
                        and type(kwargs) is dict
                        and type(message_id) is bytes
                        and type(task) is str
                        and name == b"m"
                    ):
                        entry[1] = envelope
                        if arrived is not None:
                            arrived.append(entry)
                        continue
            except Exception:
                pass
            if arrived is None:
                arrived = list(entries[:position])
            entry_id = entry[0]
            replayed_for = wire.replayed_for(fields) if len(fields) > 2 else None
            if replayed_for not in (None, self._group, b"1"):
                self._backlog.finish(entry_id)  # the dead letter of another group; this one has dealt with the message
                continue
            try:
                if envelope is None and (size := max(map(len, fields), default=0)) > largest:
                    raise DecodeError(f"it has {size} bytes; max_message_bytes is {largest}")
                envelope = wire.decode(fields, envelope, self._settings.accepts)
            except DecodeError as exc:
                self._backlog.dead.append(Dead(entry_id, Outcome(Kind.DEAD, reason="undecodable", message=str(exc))))
                continue
            delivery = Delivery(entry_id, envelope)
            if unordered and delivery.task in unordered:
                delivery.lane = None
            delivery.replayed = replayed_for is not None
            arrived.append(delivery)
        return list(entries) if arrived is None else arrived
