"""A process that consumes: ``eater.py JSON`` with url, options, queue, prefetch, mode (ack, hold), sleep.

Writes ``ready``, then ``BODY TIME`` for each message as it comes, and ``done BODY`` when it is acknowledged.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from kombu import Connection, Consumer, Queue

import streamtask.transport  # noqa: F401  (registers the schemes)


def main() -> None:
    given = json.loads(sys.argv[1])
    connection = Connection(given["url"], transport_options=given["options"])
    sleep, mode = given.get("sleep", 0), given.get("mode", "ack")

    def eat(message: Any) -> None:
        flag = " again" if message.delivery_info.get("redelivered") else ""
        print(f"{message.payload} {time.time()}{flag}", flush=True)
        if mode == "hold":
            return
        if sleep:
            time.sleep(sleep)
        message.ack()
        print(f"done {message.payload} {time.time()}", flush=True)

    while True:
        try:
            queue = Queue(given.get("queue", "q"), no_declare=True)
            accept = ["json", "text/plain"]
            consumer = Consumer(connection.channel(), [queue], on_message=eat, accept=accept, auto_declare=False)
            consumer.qos(prefetch_count=given.get("prefetch", 1))
            with consumer:
                print("ready", flush=True)
                while True:
                    try:
                        connection.drain_events(timeout=0.2)
                    except TimeoutError:
                        pass
        except connection.connection_errors as exc:
            print(f"error {exc}", flush=True)
            connection.collect()
            connection.ensure_connection(interval_start=0.1, interval_max=0.2)


if __name__ == "__main__":
    main()
