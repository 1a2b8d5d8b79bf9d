# The two commands:
#   make demo    the main job on data that needs no download: a table here, and runs/demo/report.html
#   make test    all tests but the nightly ones
# Both create .venv first if it is missing or out of date. Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
# Test processes. Each uses one thread.
JOBS ?= 2
PYTEST_ARGS ?=

SHELL := bash
.DELETE_ON_ERROR:
.PHONY: demo test test-nightly test-lowest gpu-checks docs lint format environment lock clean

installed := .venv/.installed

demo: $(installed)
	.venv/bin/python -m experiments.demo

test: $(installed)
	.venv/bin/python -m pytest -n $(JOBS) --durations=10 -m "not nightly" $(PYTEST_ARGS)

# Every night: what is too long for every change, and the library on the lowest supported versions (Python 3.10).
test-nightly: $(installed) test-lowest
	.venv/bin/python -m pytest -n $(JOBS) --durations=10 -m nightly $(PYTEST_ARGS)

PYTHON_LOWEST ?= python3.10
installed_lowest := .venv-lowest/.installed

test-lowest: $(installed_lowest)
	.venv-lowest/bin/python -m pytest -n $(JOBS) -m "not nightly and not slow" $(PYTEST_ARGS) tests/eva_lightning \
		tests/experiments/runner -o filterwarnings=

$(installed_lowest): requirements-lowest.lock pyproject.toml scripts/environment.sh
	@scripts/environment.sh $(PYTHON_LOWEST) .venv-lowest requirements-lowest.lock
	@touch $@

# Writes docs/gpu-checks.md; exit status 77 where there is no CUDA GPU.
gpu-checks: $(installed)
	.venv/bin/python -m tools.gpu_checks

# The documentation, into site/: open site/index.html. Warnings are errors; `make test` builds it too.
docs: $(installed)
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

lint: $(installed)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: $(installed)
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

environment: $(installed)

$(installed): requirements.lock pyproject.toml scripts/environment.sh
	@scripts/environment.sh $(PYTHON)
	@touch $@

# The newest versions within the ranges of pyproject.toml, for every supported Python at once; and the lowest.
lock: $(installed)
	.venv/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 --generate-hashes \
		--no-emit-index-url --custom-compile-command "make lock" --upgrade --quiet --output-file requirements.lock
	.venv/bin/uv pip compile pyproject.toml --all-extras --resolution lowest-direct --python-version 3.10 \
		--generate-hashes --no-emit-index-url --custom-compile-command "make lock" --upgrade --quiet \
		--output-file requirements-lowest.lock

clean:
	rm -rf .venv .venv-lowest runs site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
