# Every target that needs Python uses the locked environment in .venv, made on first use.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)

# No package of the stack reports to its makers or writes a device id into the user's home.
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := true
export MLFLOW_DISABLE_TELEMETRY := true
export ORT_DISABLE_TELEMETRY := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help
help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP):
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(0 if ok else f"Python 3.11 to 3.13 expected, {sys.version.split()[0]} found: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.installed-* && touch $@

.PHONY: install
install: $(STAMP) ## create .venv from the lock

.PHONY: demo
demo: $(STAMP) ## run the whole loop on real prices: train, serve, crash of 2008, drift, retrain
	@$(BIN)/python -m deployments.demo

.PHONY: up
up: $(STAMP) ## start the local stack on fixed ports until Ctrl-C
	@$(BIN)/python -m deployments.stack

.PHONY: lint
lint: $(STAMP) ## ruff, mypy strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Two files at a time, for half of a test's time is waiting for a server; the long ones come first.
TWO := -n 2 --dist loadfile --no-loadscope-reorder --durations 15 --durations-min 5

.PHONY: test
test: lint ## linters, types, import contracts and all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" $(TWO)

.PHONY: test-all
test-all: lint ## make test and the slow tests
	$(BIN)/python -m pytest $(TWO)

.PHONY: bench-loop
bench-loop: $(STAMP) ## measure the loop; the last line is one JSON object
	@$(BIN)/python -m benchmarks.loop

.PHONY: bench-serving
bench-serving: $(STAMP) ## measure serving beside its peers; the last line is one JSON object
	@$(BIN)/python -m benchmarks.serving

.PHONY: bench-quality
bench-quality: $(STAMP) ## measure the forecasts beside their peers; the last line is one JSON object
	@$(BIN)/python -m benchmarks.quality

.PHONY: bench-training
bench-training: $(STAMP) ## measure a fit beside a plain loop; the last line is one JSON object
	@$(BIN)/python -m benchmarks.training

.PHONY: bench-search
bench-search: $(STAMP) ## measure a search beside Ray's defaults; the last line is one JSON object
	@$(BIN)/python -m benchmarks.search

.PHONY: bench-fleet
bench-fleet: $(STAMP) ## measure 50 symbols trained by one worker and two; the last line is one JSON object
	@$(BIN)/python -m benchmarks.fleet

.PHONY: bench-drift
bench-drift: $(STAMP) ## measure the monitor's false alarms and what it finds; the last line is one JSON object
	@$(BIN)/python -m benchmarks.drift

.PHONY: bench-degraded
bench-degraded: $(STAMP) ## measure how soon forecasts that went bad are found; the last line is one JSON object
	@$(BIN)/python -m benchmarks.degraded

.PHONY: bench-probation
bench-probation: $(STAMP) ## measure how often a probation rolls back what is worse, and what is not; the last line is one JSON object
	@$(BIN)/python -m benchmarks.probation

.PHONY: replay
replay: $(STAMP) ## play retraining policies over years of history; the last line is one JSON object
	@$(BIN)/python -m benchmarks.replay

.PHONY: format
format: $(STAMP) ## format and fix imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
