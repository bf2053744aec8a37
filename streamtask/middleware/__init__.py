"""What an app may be given beside its tasks: hooks of its own, and one file for each capability that comes with streamtask."""

from __future__ import annotations

from .base import Middleware, Outgoing, overriding
from .dedupe import Dedupe

__all__ = ["Dedupe", "Middleware", "Outgoing", "overriding"]
