"""A process that is a copy of another (a snapshot of its machine, CRIU) has its ids, and stores its messages all the same."""

from __future__ import annotations

import textwrap

import pytest

from tests.helpers import spawn

COPY = """
    import asyncio, ctypes, logging, os, sys
    from streamtask import StreamTask

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    url, way = sys.argv[1:]
    app = StreamTask("t", broker=url, shards=2)

    @app.task(name="keyed", shard_key="user")
    def keyed(user, n):
        pass

    def one(n):
        if way == "single":
            return [keyed.delay(user=1, n=n).id]
        if way == "delayed":
            return [keyed.apply_async(kwargs={"user": 1, "n": n}, countdown=60).id]
        if way == "async":
            return [asyncio.run(keyed.adelay(user=1, n=n)).id]
        if way == "many":
            return [result.id for result in keyed.send_many([{"user": user, "n": n} for user in range(300)])]
        if way == "together":
            many = connection.Producer()
            with many.batch(max_size=10):
                for _ in range(3):
                    many.publish({"n": n}, routing_key="q", headers={"shard_key": "a"})
            return []
        connection.Producer().publish({"n": n}, routing_key="q", retry=True)
        return []

    if way in ("kombu", "together"):
        import streamtask.transport
        from kombu import Connection, Queue

        connection = Connection(url.replace("redis://", "streamtask://"))
        Queue("q")(connection.default_channel).declare()
        session = connection.transport.session
        producer = session.producer
    else:
        producer = app.sender.producer
    one(0)
    # What a copy has of its connections is of no use to it.
    producer.pool.close()
    me = os.getpid()
    copy = ctypes.PyDLL(None).fork()  # Python's hooks of a fork do not run
    os.getpid = lambda: me
    if copy:
        os.waitpid(copy, 0)
    for n in range(1, 4):
        for id in one(n if copy else -n):
            print("id", id)
    print("done", flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("way", ["single", "delayed", "async", "many", "kombu", "together"])
def test_both_store_their_messages(redis_server_all, tmp_path, way):
    file = tmp_path / "copies.py"
    file.write_text(textwrap.dedent(COPY))
    with spawn(file, redis_server_all.url, way) as process:
        assert process.wait() == 0, process
        lines = list(process.lines)
    assert lines.count("done") == 2
    assert sum("seems to be a copy of another" in line for line in lines) == 1, (
        "who comes second finds out, and says so once"
    )
    client = redis_server_all.client()
    count = sum(
        (client.xlen if key.endswith(b"stream") else client.zcard)(key)
        for pattern in ("*:stream", "*:delayed")
        for key in client.scan_iter(match=pattern)
    )
    each = {"many": 300, "together": 3}.get(way, 1)
    assert count == 7 * each
    ids = [line for line in lines if line.startswith("id ")]
    assert len(set(ids)) == len(ids) == (0 if way in ("kombu", "together") else 6 * each)
