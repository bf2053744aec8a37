"""The quick part of kombu's and Celery's own suites passes on our transport; ``make test-conformance`` runs them whole."""

from __future__ import annotations

import pytest

from .__main__ import worse_than_reference
from .reference import QUICK
from .suites import FileResult, Limits, NoSuite, run

# All files are run at once, while the first test is set up.
pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module")
def results() -> dict[str, FileResult]:
    try:
        return {result.name: result for result in run(QUICK, "streamtask", limits=Limits(test_s=90, file_s=170))}
    except NoSuite as error:
        pytest.fail(str(error), pytrace=False)


@pytest.mark.parametrize("name", sorted({one.name for one in QUICK}))
def test_suite_file_passes(results: dict[str, FileResult], name: str) -> None:
    result = results[name]
    logs = ", ".join(map(str, result.logs))
    worse = "\n".join(f"{test.outcome} {test.name}: {test.why}" for test in worse_than_reference(result, "streamtask"))
    assert not worse, f"{worse}\nthe whole output: {logs}"
    assert result.counts["passed"], f"no test was run: {logs}"
