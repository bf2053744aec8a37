"""pytest plugin: the fixture ``streamtask_app``.

Override ``streamtask_app_options`` to name your own app::

    @pytest.fixture
    def streamtask_app_options():
        return {"app": "myproject.tasks:app"}

The fixture then gives that app with a private in-memory broker (``memory://``: the real scripts on fakeredis, in this
process) instead of its own; ``app.run_until_idle()`` runs what was sent.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .app import StreamTask


@pytest.fixture
def streamtask_app_options() -> dict[str, Any]:
    """``{"app": "module:attribute"}`` for an app of yours, or the options of a new one."""
    return {}


@pytest.fixture
def streamtask_app(streamtask_app_options: dict[str, Any]) -> Iterator[StreamTask]:
    """An app on a broker of its own that is gone after the test."""
    from .app import StreamTask, find_app

    options = dict(streamtask_app_options)
    url = f"memory://{uuid.uuid4().hex}"
    name = options.pop("app", None)
    if name is None:
        app = StreamTask(options.pop("name", "test"), broker=url, backend=options.pop("backend", True), **options)
        yield app
        app.close()
        return
    app = find_app(name)
    with app.on_broker(url):
        yield app
