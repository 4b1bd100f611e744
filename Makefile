# make demo: install into .venv and answer a question over two emulated meshes. make test, make lint: as CI does.
# The plain commands that these stand for are in README.md.

VENV   := .venv
BIN    := $(VENV)/bin
WANTED := $(shell cat .python-version)
# the version of .python-version, else another that the package supports, with a working venv module
PYTHON ?= $(shell for p in python$(WANTED) python3.12 python3.10 python3.11 python3; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' \
	>/dev/null 2>&1 && echo "$$p" && break; done)

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/disagg-tt generate

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build dist

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10, 3.11 or 3.12 with venv found; install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# editable, so that a later run sees changed sources without installing again
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

# MPICH joins separately started programs; in a folder of its own, since its mpirun must not replace Open MPI's
$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --ignore-installed --prefix $(VENV)/mpich mpich
	@touch $@ $(VENV)/.installed
