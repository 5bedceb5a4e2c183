# Esper's own commands. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo

# The first Python on the path that is new enough; `make setup PYTHON=...` names another.
OLDEST := 3, 11
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < ($(OLDEST)))' >/dev/null 2>&1 && \
	{ echo "$$name"; break; }; done)

export UV_HTTP_TIMEOUT ?= 300
# Where it is set, every one of the many processes of the tests would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z][a-zA-Z0-9%-]*:.*## ' $(MAKEFILE_LIST) \
		| awk -F ':.*## ' '{ printf "  make %-15s %s\n", $$1, $$2 }'

.PHONY: setup
setup: $(READY) ## Make .venv with everything pinned by hash (repeats only when the pins change)

$(READY): pyproject.toml requirements.lock requirements-bootstrap.txt
	@python='$(PYTHON)'; \
	if [ -z "$$python" ] || \
		! "$$python" -c 'import sys; sys.exit(sys.version_info < ($(OLDEST)))' 2>/dev/null; then \
		echo "esper needs Python 3.11 or newer: make setup PYTHON=/path/to/python" >&2; exit 2; \
	fi; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		-r requirements-bootstrap.txt
	@$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation \
		--editable . --editable ./operator
	@touch $@

.PHONY: demo
demo: setup ## Train example 01 until it has grown; the report is runs/demo/report.html
	@$(BIN)/esper run examples/01-mnist1d-mlp/session.yaml --output-dir $(DEMO) --overwrite

# What inductor has compiled is kept for the next time.
COMPILED := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/esper/inductor
# Two workers share two cores, so each computes, and compiles, on one thread.
PYTEST := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 TORCHINDUCTOR_CACHE_DIR='$(COMPILED)' \
	$(BIN)/pytest -n 2 --dist loadgroup --timeout=900
# Being measured slows all Python down, so only the tests of what is measured are.
MEASURED := contracts services/tamiyo services/tolaria
MEASURED_TESTS := $(MEASURED:%=tests/unit/esper/%) tests/unit/esper_operator

# Built before tests run, programs and images: within one, its time would be up.
.PHONY: programs
programs: setup ## Build the programs of a Kubernetes control plane, and Helm (once, minutes)
	@$(BIN)/python -m tools.cluster.programs control-plane helm >/dev/null

.PHONY: test
test: programs ## Run every test; unit coverage of contracts, decisions and gates must reach 90 %
	@rm -f .coverage .coverage.*
	@$(PYTEST) --cov-report= $(MEASURED:%=--cov=esper/%) --cov=esper_operator $(MEASURED_TESTS)
	@$(BIN)/coverage report
	@$(BIN)/coverage report --include='esper/contracts/*' --fail-under=90
	@$(BIN)/coverage report --include='esper/services/tamiyo/*' --fail-under=90
	@$(BIN)/coverage report --include='esper/services/tolaria/gates.py' --fail-under=90
	@$(BIN)/coverage report --include='operator/esper_operator/decisions/*' --fail-under=90
	@$(PYTEST) $(MEASURED_TESTS:%=--ignore=%) --ignore=tests/e2e tests

.PHONY: verify
verify: setup ## Check format, lint, types, layers, spelling, generated files and what is committed
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/ruff check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/codespell
	@$(BIN)/esper crds --check crds
	@$(BIN)/python -m tools.chart --check
	@$(BIN)/python -m tools.images.pins --check
	@$(BIN)/python -m tools.api_reference --check
	@$(BIN)/pytest -q tests/architecture/test_repository.py

.PHONY: format
format: setup ## Format the code and mend what ruff can mend
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

.PHONY: crds
crds: setup ## Write crds/ anew from esper.contracts.resources
	@$(BIN)/esper crds --output-dir crds

.PHONY: chart
chart: setup ## Write anew what the chart has from the operator, and the table of its values
	@$(BIN)/python -m tools.chart

.PHONY: api
api: setup ## Write docs/api.md anew from the hub's OpenAPI description
	@$(BIN)/python -m tools.api_reference

.PHONY: lock
lock: setup ## Write requirements.lock anew from pyproject.toml, with the newest versions allowed
	@{ echo '# Made by `make lock` from pyproject.toml; never edited by hand.'; \
		$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
			--upgrade --all-extras pyproject.toml; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock
	@$(BIN)/python -m tools.images.pins

.PHONY: bench-%
bench-growth: ## Measure growth against static and random arms into benchmarks/results/growth.json
bench-execution: ## Measure what sleeping, watched and grafted seeds cost, and the kernel cache
bench-births: ## Measure whether first weights taken from the data help
bench-gpu: ## Measure execution on a GPU; without one it says so and measures nothing
bench-operator: ## Measure the operator: 1,000 sessions at once on a real control plane, then idle
bench-services: ## Measure bus, object store, hub and log beside plain libraries
bench-distributed: ## Measure what several ranks cost: steps, grafted seeds, checkpoints, logical shards
bench-%: setup
	@$(BIN)/python -m benchmarks.$* $(ARGUMENTS)

.PHONY: services
services: setup ## Start Redis, Postgres, S3 and every service as processes; Ctrl-C stops them
	@$(BIN)/python -m tools.services $(ARGUMENTS)

.PHONY: cluster-api
cluster-api: programs ## Start a control plane, the operator and a node of processes; Ctrl-C stops them
	@$(BIN)/python -m tools.cluster_api $(ARGUMENTS)

.PHONY: cluster
cluster: setup ## Start a real cluster: kind where Docker answers, else from source (root)
	@$(BIN)/python -m tools.cluster.containers up $(ARGUMENTS)

.PHONY: cluster-down
cluster-down: setup ## End that cluster; nothing of it is left
	@$(BIN)/python -m tools.cluster.containers down

.PHONY: images
images: setup ## Build the images and load them into that cluster; BASE=, ACCELERATOR=cpu|cuda, TAG=
	@$(BIN)/python -m tools.images $(if $(BASE),--base=$(BASE)) \
		$(if $(ACCELERATOR),--accelerator=$(ACCELERATOR)) $(if $(TAG),--tag=$(TAG)) $(ARGUMENTS)

.PHONY: install
install: setup ## Install the chart, with the images of `make images`, in KUBECONFIG or that cluster
	@$(BIN)/python -m tools.install $(ARGUMENTS)

.PHONY: cluster-demo
cluster-demo: setup ## All of it: cluster, images, install, then example 02 is trained and checked
	@$(BIN)/python -m tools.real_demo $(ARGUMENTS)

.PHONY: e2e
e2e: setup ## Run the tests that need a real cluster, on one of their own (root, minutes)
	@$(BIN)/python -m tools.cluster.programs control-plane node dns pause helm >/dev/null
	@$(BIN)/python -m tools.images --build-for=source
	@$(BIN)/pytest --timeout=900 --durations=0 --durations-min=1 tests/e2e $(ARGUMENTS)

.PHONY: examples-services
examples-services: setup ## Run each example in one process and over the services: equal to the bit
	@$(BIN)/python -m tools.examples_services $(ARGUMENTS)

.PHONY: chaos-services
chaos-services: setup ## Kill and freeze every service in turn while a session trains; nothing is lost
	@$(BIN)/python -m tools.chaos_services $(ARGUMENTS)

.PHONY: examples-ranks
examples-ranks: setup ## Run examples by 1, 2 and 4 ranks in logical shards: equal to the bit
	@$(BIN)/python -m tools.examples_ranks $(ARGUMENTS)

.PHONY: chaos-ranks
chaos-ranks: setup ## Kill and stop ranks in trials, grafts and checkpoints; nothing is lost
	@$(BIN)/python -m tools.chaos_ranks $(ARGUMENTS)

.PHONY: chaos-operator
chaos-operator: setup ## Kill the operator at every change that it makes in a session's life
	@$(BIN)/python -m tools.chaos_operator $(ARGUMENTS)

.PHONY: chaos-cluster
chaos-cluster: setup ## Kill what sessions need, and their pods, on that cluster's kubelet; nothing is lost
	@$(BIN)/python -m tools.chaos_cluster $(ARGUMENTS)

.PHONY: clean
clean: ## Remove what the commands above made: .venv, caches, runs/demo
	@rm -rf $(VENV) $(DEMO) .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache \
		.import_linter_cache .hypothesis build dist
