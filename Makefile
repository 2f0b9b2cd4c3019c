# every target sets the environment up first; that costs milliseconds when it is already there

SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
# the Python that .venv is made with (3.11 or 3.12); empty: the first that runs
PYTHON ?=
# the document that `make demo` quotes from; empty: the Python standard library's source
DOC ?=
# 1: `make demo` keeps KV in host memory, and a device holds an eighth of it
OFFLOAD ?=
# 1: `make demo` asks twenty questions of one document, and restarts the server in the middle
PREFIX ?=
# more arguments for pytest, as in: make check ARGS="-k select -x"
ARGS ?=
export PYTHON
# small tensors and Triton's interpreter keep one core busy each; servers want the machine
TWO_AT_A_TIME := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile
# what is asked for may all be of the other kind
MAY_BE_NONE := $(if $(ARGS),|| test $$? -eq 5)
# nothing here downloads a model, a tokenizer or a data set
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo demo-cluster chaos check test soak lint type kernels-check helm-tools helm-test helm-e2e chart bench numbers numbers-check lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with locked versions (Linux x86-64, Python 3.11 or 3.12)
	@scripts/setup.sh

demo: setup ## serve a 64K-token document and continue quotes from it: make demo [DOC=path] [OFFLOAD=1] [PREFIX=1]
	$(BIN)/hip-sglang demo --out demo-out $(if $(DOC),--doc "$(DOC)") $(if $(OFFLOAD),--offload) $(if $(PREFIX),--prefix)

demo-cluster: setup ## two local Ray nodes, TP=2, a router; a rank is killed, and every quote comes out right
	$(BIN)/python -m hip_cluster.demo demo-out

chaos: setup ## kill ranks, nodes, router, supervisor and head of a local cluster; table in docs/operations.md
	$(BIN)/python scripts/chaos.py

check: lint type ## lint, types and the fast tests: about two minutes
	$(TWO_AT_A_TIME) -m "not server and not soak and not interpreter and not helm and not slow" $(ARGS)

test: lint type ## the gate: everything but the slow lane, under twenty minutes on two cores
	$(TWO_AT_A_TIME) --durations=15 -m "not server and not soak" $(ARGS) $(MAY_BE_NONE)
	$(BIN)/pytest --durations=15 -m "server and not soak" $(ARGS) $(MAY_BE_NONE)

soak: setup ## the slow lane; writes its row to benchmarks/results/soak.csv
	$(BIN)/python scripts/soak.py $(ARGS)

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup ## mypy, strict, on the three packages
	$(BIN)/mypy

kernels-check: setup ## compile every Triton kernel for sm_80, sm_90 and sm_100; no GPU is needed
	$(BIN)/python scripts/kernels_check.py

helm-tools: setup ## fetch helm 4 and 3, kubectl and Kubernetes' schemas into .tools
	@$(BIN)/python scripts/helm_tools.py

helm-test: helm-tools ## the chart: lint, render, validate, refuse; its slow tests run in make soak
	$(TWO_AT_A_TIME) tests/helm -m "not soak" $(ARGS)

helm-e2e: helm-tools ## build a real kube-apiserver, once (Debian; half an hour), and install the chart there
	$(BIN)/python scripts/kube_apiserver.py
	$(BIN)/pytest tests/helm -m kubernetes $(ARGS)

chart: helm-tools ## rewrite what the chart repeats: HipConfig's schema, its README, deploy/
	$(BIN)/python scripts/write_chart.py

bench: setup ## attention on this machine against dense, quickly
	$(BIN)/hip-sglang bench attention --context 32768 --json

numbers: setup ## rewrite docs/numbers.md and the README's table from benchmarks/results/
	$(BIN)/python -m benchmarks report

numbers-check: setup ## whether they are what the rows say
	$(BIN)/python -m benchmarks report --check

lock: setup ## rewrite requirements/lock.txt from a working .venv
	scripts/lock.sh

clean: ## remove .venv, caches and outputs
	rm -rf .venv .tools build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
