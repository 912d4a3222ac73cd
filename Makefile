# One command each. Needs Python 3.11+ and make, nothing else: tools and dependencies go into .venv,
# at the versions of uv.lock.
.DEFAULT_GOAL := help
.PHONY: help setup run check test clients bench bench-peers protos docs clean
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
export UV_PYTHON_DOWNLOADS := never
unexport VIRTUAL_ENV

help:            ## this list
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:.*## */\t/' | expand -t 12

setup: $(VENV)/.done   ## make .venv with everything in it

$(VENV)/.done: pyproject.toml uv.lock
	@test -n "$(PYTHON)" || { echo "tidegate needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet --disable-pip-version-check 'uv>=0.9'; }
	@UV_PROJECT_ENVIRONMENT=$(VENV) $(BIN)/uv sync --quiet --frozen --inexact --all-extras --python $(BIN)/python
	@touch $@

run: setup       ## serve the demo (simulated models that don't all fit) on 127.0.0.1:8080
	@$(BIN)/tidegate serve --config deploy/demo.yaml

check: setup     ## style, types, layers, contract, generated files
	@$(BIN)/python scripts/check.py

test: setup      ## everything else
	@$(BIN)/pytest -n auto $(ARGS)

clients: setup   ## make .clients, so that `make test` also tests real clients (0.6 GB)
	@$(BIN)/python scripts/clients.py

bench: setup     ## figures, as ratios against a direct call in the same run
	@$(BIN)/python -m bench $(ARGS)

bench-peers: setup   ## figures beside other gateways, which are installed under bench/out
	@$(BIN)/python -m bench.peers $(ARGS)

protos: setup    ## regenerate the code of protos/
	@$(BIN)/python scripts/protos.py

docs: setup      ## regenerate the configuration reference
	@$(BIN)/python scripts/reference.py

clean:           ## remove what was made here
	@rm -rf $(VENV) .clients tests/clients/node/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out
