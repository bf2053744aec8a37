"""The fixtures of the tests of Celery on streamtask."""

from tests.celery.rig import site, wire
from tests.transport.fix_servers import sentinels

__all__ = ["sentinels", "site", "wire"]
