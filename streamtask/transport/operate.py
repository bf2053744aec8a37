"""An app for the operator's commands on queues of the kombu transport::

    STREAMTASK_BROKER_URL=redis://localhost:6379/0 streamtask -A streamtask.transport.operate status

Not for workers: what these queues hold are messages of Celery.
"""

from __future__ import annotations

from ..app import StreamTask

app = StreamTask("kombu")
