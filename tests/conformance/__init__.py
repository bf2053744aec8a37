"""kombu's and Celery's own test suites, run against our transport, or against kombu's redis transport to compare.

The suites come from the sdists of the installed versions, downloaded into ``.conformance/`` of the checkout; nothing
of them is part of this repository.
"""
