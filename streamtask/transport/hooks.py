"""What the transport asks of a framework above it: its plugin fills these in. Of the frameworks themselves the transport knows
but the names, which say whose plugin it loads."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection
from typing import Any

PLUGINS = {"celery": "streamtask.celery"}
"""The plugin of each framework, by the module that says that it is there."""


def load_plugins() -> None:
    """Loads the plugins of the frameworks that this process has, before its first session."""
    for framework, plugin in PLUGINS.items():
        if framework in sys.modules:
            importlib.import_module(plugin)


before_publish: list[Callable[[dict[str, Any]], None]] = []
"""Called with the prepared message of every publish to a queue: body, content-type, content-encoding, headers, properties."""

before_failure: list[Callable[[], None]] = []
"""Called before an error of the connection reaches kombu's event loop, which forgets what it was reading."""

keep_on_close: list[Callable[[Collection[str]], Collection[str]]] = []
"""Asked, when a channel closes, which of its delivery tags are still being worked on: these wait for their ack."""

worked_on: list[Callable[[Collection[str]], Collection[str]]] = []
"""Asked now and then which of the deliveries that outlived their channel are still being worked on: what is not, though nobody
has acknowledged it, is delivered again."""

not_begun: list[Callable[[Collection[str]], Collection[str]]] = []
"""Asked which of these deliveries wait to begin, and say so with ``sessions.begin`` when they do: their shard can go to another
process without them."""
