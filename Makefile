# `make` lists the targets. Two of them are all a new machine needs: `make run` and `make test`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export UV_SYSTEM_CERTS ?= 1

.PHONY: help setup run test check journeys journeys-quick bench docs lock clean coverage fmt

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: lock.txt pyproject.toml scripts/setup.sh
	@PYTHON=$(PYTHON) bash scripts/setup.sh $(VENV)
	@touch $@

setup: $(VENV)/.installed ## create .venv from lock.txt (uv if it can be had, else pip)

run: setup ## run the demo desk: simulated market, paper venues, no keys, no servers
	@$(BIN)/nightdesk demo

test: setup ## run the tests; says what was skipped and why
	@bash scripts/test-services.sh
	@$(BIN)/python -m pytest -q -rs

check: setup ## ruff, formatting, mypy strict, spelling, layout
	@$(BIN)/ruff check src tests benchmarks examples
	@$(BIN)/ruff format --check src tests benchmarks examples
	@$(BIN)/mypy
	@$(BIN)/codespell src tests docs examples benchmarks README.md CHANGELOG.md changelog.d
	@$(BIN)/python -m pytest -q tests/test_layout.py tests/test_tour.py

fmt: setup ## format and fix what can be fixed
	@$(BIN)/ruff check --fix -q src tests benchmarks examples; $(BIN)/ruff format src tests benchmarks examples

coverage: setup ## the tests with coverage of src/
	@rm -f .coverage .coverage.*
	@$(BIN)/coverage run -m pytest -q -rs
	@$(BIN)/coverage combine -q && $(BIN)/coverage report --skip-covered --fail-under=90

journeys: setup ## whole stories with real processes: kill sweep, bad neighbours, bad input (about 30 minutes)
	@status=0; \
	$(BIN)/python tests/journeys/kill_sweep.py --points 300 || status=1; \
	$(BIN)/python tests/journeys/bad_neighbours.py || status=1; \
	$(BIN)/python tests/journeys/bad_input.py || status=1; \
	exit $$status

journeys-quick: setup ## the same with 20 kill points
	@$(BIN)/python tests/journeys/kill_sweep.py --points 20

bench: setup ## every benchmark beside its baseline
	@for name in switch commit schedule recover path; do $(BIN)/nightdesk bench $$name || exit $$?; done

docs: setup ## check the links and examples of the documentation
	@$(BIN)/python -m pytest -q tests/test_docs.py

lock: ## resolve the dependencies again into lock.txt (hashes, no addresses)
	@$(VENV)/bin/uv --version >/dev/null 2>&1 || $(PYTHON) -m venv .tools && .tools/bin/pip -q install uv
	@.tools/bin/uv pip compile --universal --python-version 3.11 --all-extras --group dev --generate-hashes \
		--no-emit-index-url --custom-compile-command "make lock" -q -o lock.txt pyproject.toml

clean: ## remove everything that can be made again
	@rm -rf $(VENV) .tools .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* dist build out
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
