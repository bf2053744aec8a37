"""Type checkers refuse wrong calls of tasks, and take the right ones."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from streamtask.settings import Settings, SettingsKeywords, TaskKeywords, TaskOptions
from tests.helpers import spawn

APP = Path(__file__).with_name("typed.py")


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_wrong_calls_are_refused_and_right_ones_pass(checker: str, tmp_path: Path) -> None:
    wrong = {number for number, line in enumerate(APP.read_text().splitlines(), 1) if line.endswith("# wrong")}
    if checker == "mypy":
        config = tmp_path / "mypy.ini"
        config.write_text("[mypy]\npython_version=3.10\n[mypy-redis.*,kombu.*,rich.*,click.*]\nfollow_imports=skip\n")
        command = ["mypy", "--config-file", config, "--cache-dir", tmp_path / "cache", APP]
    else:
        config = tmp_path / "pyrightconfig.json"
        config.write_text(json.dumps({"include": [str(APP)], "typeCheckingMode": "standard", "pythonVersion": "3.10"}))
        assert find_spec("basedpyright"), "the extra types has it: make test-rest installs it"
        command = ["basedpyright", "--outputjson", "--project", config]
    with spawn("-m", *command, cwd=tmp_path) as process:
        assert process.wait(120) == 1, str(process)
        if checker == "mypy":
            found = {
                int(number) for number in re.findall(r"^\S+typed\.py:(\d+):.* error: ", process.stdout, re.MULTILINE)
            }
        else:
            found = {one["range"]["start"]["line"] + 1 for one in json.loads(process.stdout)["generalDiagnostics"]}
        assert found == wrong, f"not refused: {sorted(wrong - found)}, refused: {sorted(found - wrong)}\n{process}"


@pytest.mark.parametrize("options, keywords", [(TaskOptions, TaskKeywords), (Settings, SettingsKeywords)])
def test_type_checkers_know_every_option(options: type, keywords: type) -> None:
    assert {field.name for field in dataclasses.fields(options)} - {"bind"} == set(keywords.__annotations__)
