"""What operators ask of an app's queues, and what they do to them."""

from __future__ import annotations

from ..redis.keys import SHARED
from .inspector import Inspector

__all__ = ["SHARED", "Inspector"]
