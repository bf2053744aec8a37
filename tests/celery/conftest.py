"""The fixtures of the tests of Celery on streamtask."""

from tests.celery.rig import site, wire
from tests.transport.fix_servers import redis_cluster, sentinels

__all__ = ["redis_cluster", "sentinels", "site", "wire"]
