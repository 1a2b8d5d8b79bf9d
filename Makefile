# The two commands:
#   make demo    the main job on data that needs no download: a table here, and runs/demo/report.html
#   make test    all tests
# Both create .venv first if it is missing or out of date. Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
# Test processes. Each uses one thread.
JOBS ?= 2
PYTEST_ARGS ?=

SHELL := bash
.DELETE_ON_ERROR:
.PHONY: demo test lint format environment lock clean

installed := .venv/.installed

demo: $(installed)
	.venv/bin/python -m experiments.demo

test: $(installed)
	.venv/bin/python -m pytest -n $(JOBS) --durations=10 $(PYTEST_ARGS)

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

# New versions of everything, within the ranges of pyproject.toml and for every supported Python at once.
lock: $(installed)
	.venv/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 --generate-hashes \
		--no-emit-index-url --custom-compile-command "make lock" --upgrade --quiet --output-file requirements.lock

clean:
	rm -rf .venv runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
