"""Bodies that do what they should not."""

from __future__ import annotations

from tests.helpers import wait_until
from tests.worker.rig import keys_on

FORKS = """
app = make_app()

@app.task(name="forks", shard_key="k", max_retries=0)
def forks(k, n, ends):
    note("S", k, n)
    pid = os.fork()
    if pid == 0:
        # The child comes back out of the body: it must not go on as a second worker on its parent's connections.
        if ends:
            sys.exit(0)
        return
    os.waitpid(pid, 0)
    note("E", k, n)
"""


def test_a_child_that_a_body_forks_does_not_go_on_as_a_worker(redis_server, site):
    site = site(redis_server, FORKS)
    pod = site.pod(1)
    site.ready(1)
    keys = [key for shard in range(4) for key in keys_on(shard, 2)]
    for key in keys:
        site.task("forks").send_many([{"k": key, "n": n, "ends": n % 2 == 0} for n in range(6)])
    wait_until(lambda: site.ended() == 6 * len(keys), 20, lambda: f"{site}\n{pod.log}")
    site.wait_empty()
    for key in keys:
        assert site.started(key) == list(range(6))
    assert site.dead() == []
