"""Queues on Redis Streams: produce, consume in lanes, retry, delay, dead-letter, dedupe.

Both front doors (our own tasks and the kombu transport) stand on this layer. It speaks of messages, keys and entries,
never of functions.
"""
