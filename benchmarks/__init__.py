"""Measures streamtask against bare programs and against other task frameworks: ``python -m benchmarks --help``."""
