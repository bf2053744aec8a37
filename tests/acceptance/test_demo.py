"""``streamtask demo``: what it says, when it fails, that its check can fail, and that it leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from streamtask.cli.demo import ending_on_signals
from streamtask.cli.demo.check import Sent, Start, check, check_lane, percentile
from streamtask.cli.demo.events import Events, EventsError
from tests.helpers import Spawned, our_processes, spawn, wait_until
from tests.parts import sampled

# --- the check -----------------------------------------------------------------------------------------------------

KILL = [100]


def lane(*ranks: int, kill_after: int | None = None) -> list[tuple[int, int]]:
    """Starts of these ranks; the kill at 100 falls behind the first ``kill_after`` of them."""
    return [(i if kill_after is None or i < kill_after else 200 + i, rank) for i, rank in enumerate(ranks)]


@pytest.mark.parametrize(
    "starts, kills, disorder, twice",
    [
        pytest.param(lane(0, 1, 2, 3), [], 0, 0, id="in-order"),
        pytest.param(lane(), [], 0, 0, id="nothing"),
        pytest.param(lane(0, 1, 3), [], 0, 0, id="a-lost-one-is-not-out-of-order"),
        pytest.param(lane(0, 1, 2, 1, 2, 3, kill_after=3), KILL, 0, 2, id="repeats-to-the-last-started"),
        pytest.param(lane(0, 1, 2, 2, 3, kill_after=3), KILL, 0, 1, id="repeats-the-last-started"),
        pytest.param(lane(0, 1, 2, 0, 1, 2, kill_after=3), KILL, 0, 3, id="repeats-all-at-the-end"),
        pytest.param(lane(0, 2, 1), [], 1, 0, id="two-swapped"),
        pytest.param(lane(3, 2, 1, 0), [], 3, 0, id="backwards"),
        pytest.param(lane(0, 1, 1, 2), [], 1, 1, id="a-repeat-without-a-kill"),
        pytest.param(lane(0, 1, 1, 2, kill_after=4), KILL, 1, 1, id="a-repeat-before-the-kill"),
        pytest.param(lane(0, 1, 2, 1, 3, kill_after=3), KILL, 1, 1, id="a-run-that-stops-before-the-last-started"),
        pytest.param(lane(0, 1, 2, 1, kill_after=3), KILL, 1, 1, id="a-run-that-never-gets-there"),
        pytest.param(lane(0, 1, 2, 0, 2, 3, kill_after=3), KILL, 1, 2, id="a-run-with-a-hole"),
        pytest.param(lane(0, 1, 2, 2, 1, 3, kill_after=3), KILL, 2, 2, id="a-run-backwards"),
        pytest.param(lane(0, 1, 1, 2, 2, 3, kill_after=2), KILL, 1, 2, id="two-runs-after-one-kill"),
        pytest.param(lane(0, 1, 1, 2, 2, 3, kill_after=2), [100, 150], 0, 2, id="two-runs-after-two-kills"),
    ],
)
def test_order_of_a_key(starts: Sequence[tuple[int, int]], kills: Sequence[int], disorder: int, twice: int) -> None:
    assert check_lane(starts, kills) == (disorder, twice)


def sent_and_started(keys: Sequence[int]) -> tuple[Sent, list[Start]]:
    sent = Sent()
    return sent, [Start(10 * n, sent.add(key, 7, 0), 7, key, 0) for n, key in enumerate(keys)]


def test_verdict_over_keys() -> None:
    sent, starts = sent_and_started([1, 2, 1, 2, 0, 0])
    verdict = check(sent, starts)
    assert (verdict.run, verdict.lost, verdict.out_of_order, verdict.run_twice) == (6, 0, 0, 0)
    assert verdict.good

    swapped = [*starts[:2], Start(100, 2, 7, 1, 0), Start(90, 3, 7, 2, 0), *starts[4:]]
    assert check(sent, swapped).good, "the order of two keys among each other is free"
    assert check(sent, [starts[5], starts[4], *starts[:4]]).good, "messages without a key have no order"


def test_a_lost_message_is_seen() -> None:
    sent, starts = sent_and_started([1, 1, 1])
    verdict = check(sent, starts[:2])
    assert (verdict.run, verdict.lost, verdict.good) == (2, 1, False)


def test_disorder_is_seen() -> None:
    sent, starts = sent_and_started([1, 1, 1])
    verdict = check(sent, [starts[0], Start(50, 1, 7, 1, 0), starts[2]])
    assert (verdict.lost, verdict.out_of_order, verdict.good) == (0, 1, False)


@pytest.mark.parametrize("key, content", [(9, 7), (1, 8)])
def test_a_message_that_arrives_changed_is_lost(key: int, content: int) -> None:
    sent, starts = sent_and_started([1, 1])
    assert check(sent, [starts[0], Start(10, 1, content, key, 0)]).lost == 1


def test_a_message_that_nobody_sent_does_not_stand_for_one() -> None:
    sent, starts = sent_and_started([1, 1])
    assert check(sent, [starts[0], Start(10, 5, 7, 1, 0)]).lost == 1


def test_repeats_without_a_key_count_as_run_twice() -> None:
    sent, starts = sent_and_started([0, 0])
    verdict = check(sent, [*starts, starts[0]])
    assert (verdict.run, verdict.run_twice, verdict.good) == (2, 1, True)


def test_percentile() -> None:
    assert percentile([], 0.5) is None
    assert percentile([5], 0.99) == 5
    assert percentile(list(range(1, 101)), 0.5) == 50
    assert percentile(list(range(1, 101)), 0.99) == 99


# --- files ---------------------------------------------------------------------------------------------------------


def write(path: Path, lines: Sequence[Any]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def scanned(path: Path, field: str = "key") -> Events:
    events = Events(path, field)
    events.scan()
    return events


@pytest.mark.parametrize("name", ["events.jsonl", "events.jsonl.gz"])
def test_lines_and_keys(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"key": "a"}, "", {"key": None}, {"key": 7, "value": None}, {"key": "7"}])
    events = scanned(path)
    assert (events.messages, events.without_key, len(events.keys)) == (4, 1, 2), "7 and '7' are one key"
    assert [key for key, _ in events] == ["a", None, 7, "7"]
    assert [line for _, line in events][1] == b'{"key": null}'


def test_a_path_goes_on_into_text_that_holds_json(tmp_path: Path) -> None:
    lines = [{"key": '{"id": 3}', "value": {"user": {"name": "ö"}}}, {"key": None, "value": {"user": None}}]
    path = write(tmp_path / "events.jsonl", lines)
    assert [key for key, _ in scanned(path, "key.id")] == [3, None]
    assert [key for key, _ in scanned(path, "value.user.name")] == ["ö", None]


def test_a_file_that_grows_is_sent_as_it_was_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "events.jsonl", [{"key": 1}, {"key": 2}])
    events = scanned(path)
    with path.open("a") as file:
        file.write('{"key": 3}\n')
    assert [key for key, _ in events] == [1, 2]
    write(path, [{"key": 1}])
    with pytest.raises(EventsError, match="changed while it was read"):
        list(events)


BAD_FILES = [
    pytest.param(['{"key": 1}', "{oops"], "line 2: no JSON", id="bad-json"),
    pytest.param(['{"key": 1}', "", "[1]"], "line 3: no JSON object", id="no-object"),
    pytest.param(['{"id": 1}'], "line 1: no field 'key'", id="no-key-field"),
    pytest.param(['{"key": {"a": 1}}'], "line 1: the key field 'key' is neither", id="key-object"),
    pytest.param(['{"key": true}'], "line 1: the key field 'key' is neither", id="key-bool"),
    pytest.param(['{"key": ""}'], "line 1: the shard key is empty", id="key-empty"),
    pytest.param(['{"key": "\\ud800"}'], "line 1: the shard key .* is not valid Unicode", id="key-half-a-pair"),
    pytest.param([], "has no line to send", id="empty"),
]


@pytest.mark.parametrize("lines, message", BAD_FILES)
def test_bad_files(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(EventsError, match=message):
        scanned(write(tmp_path / "events.jsonl", lines))


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path / "events.jsonl.gz", [{"key": n, "x": os.urandom(50).hex()} for n in range(200)])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(EventsError, match="can't be unpacked after line"):
        scanned(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(EventsError, match="regular file"):
        scanned(tmp_path)


# --- runs ----------------------------------------------------------------------------------------------------------


def run_demo(tmp_path: Path, *args: str | Path, status: int = 0, timeout: float = 90) -> tuple[str, str]:
    """What a run writes to stdout and stderr. Nothing may be left in its temporary folder."""
    with demo_in(tmp_path, *args) as demo:
        assert demo.wait(timeout) == status, str(demo)
        assert os.listdir(tmp_path / "tmp") == [], "it left something in the temporary folder"
        return demo.stdout, demo.stderr


def demo_in(tmp_path: Path, *args: str | Path) -> AbstractContextManager[Spawned]:
    (tmp_path / "tmp").mkdir()
    env = {"TMPDIR": str(tmp_path / "tmp"), "STREAMTASK_HOME": str(tmp_path / "home"), "STREAMTASK_BROKER_URL": None}
    return spawn("-m", "streamtask", "demo", *args, env=env, cwd=tmp_path)


def report_of(output: tuple[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output[0])
    return found


def test_a_small_run(tmp_path: Path) -> None:
    report = report_of(run_demo(tmp_path, "--messages", "2000", "--users", "100", "--json"))
    assert (report["sent"], report["run"]) == (2000, 2000)
    assert (report["lost"], report["out_of_order"], report["dead_letters"]) == (0, 0, 0)
    assert report["ok"] is True
    assert len(report["kill"]["shards"]) == 2
    assert report["kill"]["taken_over_s"] is not None
    assert report["consumers"]["registered"] == report["consumers"]["alive"] >= 8
    assert report["latency_ms"]["under_load"]["messages"] == 1800
    assert report["latency_ms"]["at_rest"]["messages"] == 200
    assert not (tmp_path / "home").exists(), "it must not touch the user's own embedded server"


def test_a_run_without_a_kill_runs_nothing_twice(tmp_path: Path) -> None:
    args = ("--messages", "300", "--processes", "2", "--shards", "3", "--no-kill", "--json")
    report = report_of(run_demo(tmp_path, *args))
    assert (report["run"], report["run_twice"], report["kill"]) == (300, 0, None)


def test_one_message(tmp_path: Path) -> None:
    report = report_of(run_demo(tmp_path, "--messages", "1", "--users", "1", "--processes", "1", "--no-kill", "--json"))
    assert (report["run"], report["latency_ms"]["at_rest"]["p50"]) == (1, None)


def test_events_of_a_gzipped_file(tmp_path: Path) -> None:
    lines: list[Any] = [{"key": f'{{"id":{n % 37}}}', "value": None if n % 5 == 0 else "x" * n} for n in range(900)]
    lines[::9] = [{"key": None, "value": "ö"}] * 100
    path = write(tmp_path / "events.jsonl.gz", lines)
    report = report_of(run_demo(tmp_path, "--events", path, "--json"))
    assert (report["sent"], report["run"], report["lost"], report["out_of_order"]) == (900, 900, 0, 0)
    assert (report["without_key"], report["keys"]) == (100, 37)
    consumers = report["consumers"]
    assert consumers["registered"] == consumers["alive"], "the killed process was a consumer of the shared stream, too"


def test_the_table(tmp_path: Path) -> None:
    path = write(tmp_path / "events.jsonl", [{"user": {"id": n % 5}} for n in range(200)])
    out, _ = run_demo(tmp_path, "--events", path, "--key", "user.id", "--processes", "2")
    assert "killed -9 process" in out
    for name in ("sent", "run", "lost", "out of order", "run twice", "dead letters", "tasks per second", "latency at"):
        assert f"│ {name}" in out
    assert "Nothing lost, nothing out of order, with a kill -9 in the middle." in out
    assert "\x1b" not in out, "no colours or cursor movements where there is no terminal"
    assert max(len(line) for line in out.splitlines()) <= 100


@pytest.mark.parametrize(
    "args, status, message",
    [
        pytest.param(["--events", "missing.jsonl"], 2, "there is no file 'missing.jsonl'", id="missing-file"),
        pytest.param(["--events", "bad.jsonl"], 1, "bad.jsonl, line 2: no JSON", id="bad-line"),
        pytest.param(
            ["--events", "bad.jsonl", "--key", "nope"], 1, "bad.jsonl, line 1: no field 'nope'", id="no-field"
        ),
        pytest.param(["--key", "id"], 2, "give a file, too", id="key-without-file"),
        pytest.param(["--events", "bad.jsonl", "--messages", "5"], 2, "leave out --messages", id="both"),
        pytest.param(["--messages", "0"], 2, "0 is not in the range", id="no-messages"),
    ],
)
def test_errors(tmp_path: Path, args: list[str], status: int, message: str) -> None:
    write(tmp_path / "bad.jsonl", ['{"key": 1}', "{oops"])
    out, err = run_demo(tmp_path, *args, status=status)
    assert message in err.replace("\n", " ")
    assert "Traceback" not in out + err


def test_a_missing_redis_server_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    env = {"TMPDIR": str(tmp_path / "tmp"), "STREAMTASK_REDIS_SERVER": "/nonexistent/redis-server"}
    with spawn("-m", "streamtask", "demo", env=env, cwd=tmp_path) as demo:
        assert demo.wait() == 1
        assert "STREAMTASK_REDIS_SERVER" in demo.stderr
        assert "Traceback" not in demo.stderr
        assert os.listdir(tmp_path / "tmp") == []


@pytest.mark.parametrize("number", sampled([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
def test_interrupted(tmp_path: Path, number: int) -> None:
    before = set(our_processes())
    with demo_in(tmp_path, "--messages", "1000000") as demo:
        demo.wait_line("killed -9" if number == signal.SIGTERM else "started a redis-server", 60)
        demo.signal(number)
        assert demo.wait() == 130
        assert "Traceback" not in demo.stderr
        assert os.listdir(tmp_path / "tmp") == []
        wait_until(lambda: set(our_processes()) <= before | {demo.pid}, 5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_dropped_is_heard() -> None:
    class Deaf:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    def deaf_and_long() -> None:
        with ending_on_signals():
            Deaf()
            time.sleep(20)

    with pytest.raises(KeyboardInterrupt):
        deaf_and_long()


def test_killed_itself_it_leaves_no_process() -> None:
    """The worker ends with the demo, and the server with its last user."""
    before = set(our_processes())
    # A short path: for a long one the server makes a second folder, which only a living demo can remove.
    with TemporaryDirectory(prefix="st-") as folder, demo_in(Path(folder), "--messages", "1000000") as demo:
        demo.wait_line("worker processes own", 60)
        demo.kill()
        wait_until(lambda: set(our_processes()) <= before, 10, lambda: str(our_processes()))
