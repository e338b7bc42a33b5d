# The commands a newcomer and CI type. Everything runs in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv test test-scale lint format protos manifests dashboards bench demo constraints clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

venv: .venv/.installed  ## .venv with the pinned dependencies

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt "torch==$$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

test: venv  ## all tests (no GPU needed) but those of test-scale
	$(BIN)/pytest -m "not scale"

test-scale: venv  ## Ray's autoscaler with nodes that come and go, and all pods as namespaces: five minutes
	$(BIN)/pytest -rs -m scale

demo: venv  ## the whole cluster on this machine, and a conversation with it
	$(BIN)/python scripts/demo.py

bench: venv  ## CPU speed beside transformers, and conversations with a cluster, on a quiet machine
	$(BIN)/python -m tests.bench.engine_cpu --threads 1
	$(BIN)/python -m tests.bench.multiturn

lint: venv  ## style, types, who may import whom, generated code in sync
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_protos.py --check
	$(BIN)/python scripts/dashboards.py --check

format: venv  ## what the linter can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: venv  ## generated stubs from protos/
	$(BIN)/python scripts/generate_protos.py

manifests: venv  ## every overlay of k8s/ built and checked
	$(BIN)/python -m tests.manifests

dashboards: venv  ## Grafana dashboards and Prometheus rules from the table of metrics
	$(BIN)/python scripts/dashboards.py

constraints: venv  ## pin what the venv holds now
	$(BIN)/pip freeze --exclude-editable | sed "s/+cpu//" > constraints.txt

clean:  ## remove what the commands above made
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
