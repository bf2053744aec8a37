"""Two groups on one queue: what one of them holds, gives back or takes over is not the other's."""

from __future__ import annotations

from streamtask.redis.keys import SHARED
from tests.helpers import wait_until

TASKS = """
app = make_app()
GROUP = json.loads(os.environ["OPTIONS"]).get("group")

@app.task(name="free")
def free(n):
    note("S", GROUP, n)
    while not os.path.exists(f"open-{GROUP}"):
        time.sleep(0.005)
    note("E", GROUP, n)
"""
COUNT = 10


def test_what_a_dead_process_held_is_its_own_groups_alone(redis_server_all, site):
    """Both groups run all messages; a process of one dies, and a second of that group, which is idle, runs them again."""
    site = site(redis_server_all, TASKS, shards=1, lease=1.0)
    keys = site.keys.shard(0, SHARED)
    victim, other = site.pod(1, COUNT, group="a"), site.pod(1, 2 * COUNT, group="b")
    wait_until(lambda: len(site.redis.xinfo_groups(keys.stream)) == 2 if site.redis.exists(keys.stream) else False)
    wait_until(lambda: all(site.redis.zcard(keys.consumers(group)) == 1 for group in "ab"))
    site.task("free").send_many([{"n": n} for n in range(COUNT)])
    wait_until(lambda: len(site.of("S")) == 2 * COUNT, 15, lambda: str(site.events()))
    site.pod(1, COUNT, group="a")
    wait_until(lambda: site.redis.zcard(keys.consumers("a")) == 2)

    victim.kill_all()
    wait_until(lambda: len(site.of("S", "a")) == 2 * COUNT, 15, lambda: f"{site.events()}\n{site}")
    for group in "ab":
        (site.folder / f"open-{group}").touch()
    wait_until(lambda: site.redis.xlen(keys.stream) == 0, 15, lambda: str(site))
    assert sorted(event.n for event in site.of("S", "b")) == list(range(COUNT)), "what a put on offer is not for b"
    assert [len(site.of("E", group)) for group in "ab"] == [COUNT, COUNT]
    assert len(other.children()) == 1
