"""Messages as kombu's redis transport keeps them."""

from __future__ import annotations

import base64
import re
from typing import Any


class NotMoved(Exception):
    """One message can't be moved; it stays where it is. The text says why."""


def payload_of(raw: bytes) -> dict[str, Any]:
    """The message. Raises ``NotMoved`` for what no worker could read."""
    from kombu.utils.json import loads

    try:
        payload = loads(raw.decode())
    except ValueError as exc:
        raise NotMoved(f"no JSON: {exc}") from None
    return checked(payload)


def checked(payload: Any) -> dict[str, Any]:
    if not isinstance(payload, dict) or not isinstance(payload.get("properties"), dict) or "body" not in payload:
        raise NotMoved("no message: it lacks body or properties")
    properties = payload["properties"]
    if "delivery_tag" not in properties or not isinstance(payload.get("headers") or {}, dict):
        raise NotMoved("no message: it lacks a delivery tag, or its headers are none")
    if properties.get("body_encoding") == "base64":
        try:
            base64.b64decode(payload["body"])
        except (TypeError, ValueError) as exc:
            raise NotMoved(f"its body is no base64: {exc}") from None
    return payload


def is_message(raw: bytes | None) -> bool:
    try:
        return raw is not None and bool(payload_of(raw))
    except NotMoved:
        return False


def held_by_worker(raw: bytes, tables: dict[str, list[tuple[str, str, str]]]) -> tuple[dict[str, Any], list[str]]:
    """A message of the unacked hash and the queues that it belongs to. Raises ``NotMoved``."""
    from kombu.utils.json import loads

    try:
        payload, exchange, routing_key = loads(raw.decode())
    except (ValueError, TypeError) as exc:
        raise NotMoved(f"held by a worker, but no message: {exc}") from None
    payload = checked(payload)
    if not exchange:
        return payload, [str(routing_key)]
    homes = sorted({queue for key, pattern, queue in tables.get(exchange, []) if _bound(key, pattern, routing_key)})
    if not homes:
        raise NotMoved(f"held by a worker, but no queue is bound to {exchange!r} with {routing_key!r}")
    return payload, homes


def _bound(key: str, pattern: str, routing_key: str) -> bool:
    # Bindings of a topic exchange have a pattern.
    return re.match(pattern, routing_key) is not None if pattern else key == routing_key


def mark_redelivered(payload: dict[str, Any]) -> None:
    if isinstance(payload.get("headers"), dict):
        payload["headers"]["redelivered"] = True
    if isinstance(payload["properties"].get("delivery_info"), dict):
        payload["properties"]["delivery_info"]["redelivered"] = True


def named(raw: bytes) -> dict[str, Any]:
    """What tells an operator which message it is."""
    try:
        payload = payload_of(raw)
    except NotMoved:
        return {"start": raw[:100].decode(errors="backslashreplace")}
    headers = payload.get("headers") or {}
    return {"task": headers.get("task"), "id": headers.get("id") or payload["properties"].get("correlation_id")}
