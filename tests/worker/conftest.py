"""The fixtures of the worker's tests."""

from tests.worker.rig import site

__all__ = ["site"]
