"""Found by kombu in the entry points of serializers, and thereby in every Celery process: registers the transport's schemes.

The entry point has to be a serializer, so it is one: msgpack with dates, UUIDs, decimals and sets. Like every serializer it
is used only where an app names it.
"""

from __future__ import annotations

from ..redis.wire import pack_body, unpack_body
from . import SCHEMES as SCHEMES  # importing it registers them

serializer = (pack_body, unpack_body, "application/x-streamtask", "binary")
