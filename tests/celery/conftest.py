"""The fixtures of the tests of Celery on streamtask."""

from tests.celery.rig import site, wire

__all__ = ["site", "wire"]
