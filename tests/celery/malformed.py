"""Messages that no producer of Celery's or kombu's makes: what a stranger may append to a stream."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

FINE: list[Any] = [[], {"n": 0}, {}]
STATED = {"task": "late", "id": "x"}


def parts(
    body: Any = FINE,
    content_type: Any = "application/json",
    encoding: Any = "utf-8",
    headers: Any = None,
    properties: Any = None,
    **stated: Any,
) -> list[Any]:
    """What the transport stores of a message."""
    body = json.dumps(body) if isinstance(body, dict | list) else body
    return [body, content_type, encoding, {**STATED, **stated} if headers is None else headers, properties or {}]


def old(**more: Any) -> list[Any]:
    """A message of Celery's first protocol: all is in the body."""
    return parts({"task": "late", "id": "x", "args": [], "kwargs": {"n": 0}, **more}, headers={})


AT_FETCH: dict[str, list[Any]] = {
    "is no dict": [parts(properties={"delivery_info": 5})],
    "body_encoding is not known": [
        parts(properties={"body_encoding": name}) for name in ("none", ["base64"], {"a": 1}, 5)
    ],
    "is no base64": [parts("abc", properties={"body_encoding": "base64"})],
    "neither text nor bytes": [[5, *parts()[1:]], [FINE, *parts()[1:]], [{"a": 1}, *parts()[1:]]],
    "content type is no text": [parts(content_type=kind) for kind in (["application/json"], {}, 5, True)],
    "content encoding is no text": [parts(encoding=name) for name in (["utf-8"], {"a": 1}, 5)],
    "compressed by what is not known": [parts(compression=name) for name in ("none", ["gzip"], {"a": 1}, 5)],
    "no message of kombu's": [[*parts()[:3], [], {}], [*parts()[:3], {}, 5], parts()[:3], [5], [], [*parts(), 1]],
}
"""Why, and what: nothing that kombu could make a message of."""

AT_RECEIPT: dict[str, list[Any]] = {
    "can't be decoded": [
        parts("no json"), parts(b"\xff"), parts("[" * 100_000), parts(content_type="application/x-python-serialize"),
        parts(content_type="none"), parts(b"\xff", content_type="application/text", encoding="none"),
    ],
    "is no [args, kwargs, embed]": [
        parts({}), parts([]), parts("5"), parts("null"), parts('"abc"'), parts('{"a": 1, "b": 2, "c": 3}'), parts([[], {}]),
        parts([[], {}, {}, {}]), parts(None), parts(""), parts(content_type=None),
    ],
    "no list and two maps": [
        parts([5, {}, {}]), parts([[], 5, {}]), parts([[], {}, 5]), parts([[], {}, ["ab"]]), parts([None, None, None]),
        old(args=5), old(kwargs=[]),
    ],
    "its task is": [parts(task=5), parts(task={}), parts(task=None), old(task=5)],
    "its id is": [
        parts(headers={"task": "late"}), parts(headers={"task": "unknown"}), parts(id={}), parts(id=b"x"), parts(id=None),
        old(id=[]),
    ],
    "its timelimit is": [
        parts(timelimit=value) for value in ("abc", ["a", "b"], 5, [5], {"a": 1, "b": 2}, [{}, []], [float("nan"), None])
    ] + [old(timelimit="abc"), parts({"args": [], "kwargs": {}, "timelimit": ["a", "b"]})],
    "its eta is": [parts(eta={}), parts(eta=""), parts(eta=5), old(eta=[])],
    "its expires is": [parts(expires=""), parts(expires=True)],
    "its stamped_headers is": [parts(stamped_headers=5), parts(stamped_headers=[{}])],
    "its shadow is": [parts(shadow={"a": 1})],
    "it has no body": [parts(None, headers={}), parts(None, headers={"id": "x"})],
    "its retries is": [parts(retries=b"1"), parts(retries=-1), parts(retries="1"), old(retries=[])],
    "its headers is": [parts({"args": [], "kwargs": {}, "headers": "abc"})],
}  # fmt: skip
"""As ``AT_FETCH``, of what Celery could make no task of."""

REJECTED = [parts(headers={}), parts(headers={"id": "x"}), parts(task="unknown"), parts(eta="x"), parts(expires="x")]
"""What Celery says of by itself that it is none."""

JUST_FAILS = [
    parts(headers={**STATED, "streamtask_delivery": 5}), parts([[], {"n": 0}, {"delivery_info": 5}]), parts([[], {}, {}]),
    parts([[], {"n": 0}, {"chain": [5]}]), old(streamtask_delivery="junk"),
]  # fmt: skip
"""What is run, or fails by itself."""

FAR = "2990-01-01T00:00:00+00:00"
SOON = (datetime.now(timezone.utc) + timedelta(hours=1)).isoformat()
LATER = [parts(eta=SOON), parts(eta=FAR), old(eta=FAR), parts({"args": [], "kwargs": {"n": 0}, "eta": FAR})]
"""What is to run in another time, and came as if it was to run at once."""
