"""What ``-A`` may name, and what is said where it can't be imported: which line of which file, and what to do."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamtask import StreamTask
from streamtask.cli import main
from streamtask.cli.worker import _check_tasks
from tests.helpers import spawn

FILES = {
    "circle": "from circle_b import x\nfrom streamtask import StreamTask\napp = StreamTask('a', broker='memory://x')\n",
    "circle_b": "from circle import app\n",
    "lacks": "import os\nimport nonsuch_at_all\n",
    "syntax": "x = 1\ndef f(:\n",
    "raises": "def f():\n    return 1 / 0\n\nf()\n",
    "setting": "from streamtask import StreamTask\napp = StreamTask('a', broker='memory://x', shardz=3)\n",
    "value": "from streamtask import StreamTask\n\napp = StreamTask('a', broker='memory://x', lease=0.001)\n",
    "option": "from bare import app\n\n\n@app.task(max_retries=-1)\ndef t(): pass\n",
    "script": "import sys\n\nsys.exit(3)\n",
    "away": "from streamtask import StreamTask\napp = StreamTask('a', broker='redis://:hunter2@127.0.0.1:1/0')\n"
    "@app.task\ndef t(): pass\nt.apply_async(timeout=0.1)\n",
    "two": "from streamtask import StreamTask\none, other = StreamTask('a', broker='memory://x'), StreamTask('b', broker='memory://x')\n"
    "text = 'x'\n",
    "none": "x = 1\n",
    "bare": "from streamtask import StreamTask\napp = StreamTask('bare', broker='memory://x')\n",
}
SAID = {
    "circle": ["partially initialized module 'circle'", "circular import", "circle_b.py, line 1: "],
    "lacks": ["No module named 'nonsuch_at_all'", "lacks.py, line 2: "],
    "syntax": ["SyntaxError", "syntax.py, line 2: "],
    "raises": ["ZeroDivisionError: division by zero", "raises.py, line 2: "],
    "setting": ["unknown setting shardz", "setting.py, line 2: "],
    "value": ["the setting lease must be", "value.py, line 3: "],
    "option": ["the task option max_retries must be", "option.py, line 4: "],
    "script": ["SystemExit: 3", "script.py, line 3: "],
    "away": ["can't be reached", "away.py, line 5: "],
    "nope": ["there is no module 'nope'", "run from the folder that holds it"],
    "two": ["has several apps: name one, as in -A two:one; its apps are one, other"],
    "two:three": ["has no 'three' (-A two:three): its apps are one, other"],
    "two:text": ["two:text is no StreamTask app, but of type str: its apps are one, other"],
    "none": ["the module 'none' has no StreamTask app"],
    "none:app": ["has no 'app' (-A none:app): there is no StreamTask app in it"],
    "./none.py": ["names a file: name its module, as in -A none,"],
    "pkg/none.py:app": ["names a file: name its module, as in -A pkg.none:app,"],
    ":app": ["must name a module and the app in it"],
}
WITH_A_WAY = ("circle", "lacks", "syntax", "raises", "setting", "value", "option", "script", "away")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in FILES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("name", SAID)
def test_what_is_said(folder: Path, name: str) -> None:
    done = CliRunner().invoke(main, ["-A", name, "status"])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    for words in SAID[name]:
        assert words in done.stderr
    assert "hunter2" not in done.stderr
    assert ("--traceback shows" in done.stderr) == (name in WITH_A_WAY)


def test_options_of_the_group_stand_behind_the_command_too(folder: Path) -> None:
    """As Celery's users write them; also behind the commands of ``dlq``."""
    for args in (["status", "-A", "bare"], ["dlq", "list", "--app", "bare:app"], ["dlq", "-A", "bare", "list"]):
        done = CliRunner().invoke(main, [*args, "-l", "DEBUG"])
        assert (done.exit_code, logging.getLogger().level) == (0, logging.DEBUG), done.output
    done = CliRunner().invoke(main, ["-A", "none", "status", "-A", "bare", "--loglevel=info", "--log-format", "json"])
    assert done.exit_code == 0, "the last one counts"
    done = CliRunner().invoke(main, ["status", "-A", "raises", "--traceback"])
    assert 'raises.py", line 2, in f' in done.stderr
    assert CliRunner().invoke(main, ["status", "-l", "loud", "-A", "bare"]).exit_code == 2
    shown = CliRunner().invoke(main, ["status", "--help"]).output
    assert "--app" not in shown, "once is enough"


def test_a_worker_of_an_app_without_tasks(folder: Path) -> None:
    with spawn("-m", "streamtask", "worker", "-A", "bare", cwd=folder) as worker:  # it sets handlers of signals
        assert worker.wait() == 2, str(worker)
        assert "the app 'bare' has no tasks" in worker.stderr


def test_a_queue_that_no_task_names(caplog: pytest.LogCaptureFixture) -> None:
    app = StreamTask("a", broker="memory://x")
    for queue in ("default", "email"):
        app.task(lambda: None, name=queue, queue=queue)
    for asked, said in (
        (["email", "default"], []),
        (["emial"], ["no task of the app goes to emial (-Q): did you mean email?"]),
        (["x", "email", "y"], ["no task of the app goes to x, y (-Q): its tasks go to default, email"]),
    ):
        caplog.clear()
        _check_tasks(app, asked)
        assert [record.getMessage() for record in caplog.records] == said
