# make quickstart: train the main example and show its table
# make test:       the tests
# make check:      ruff and mypy
# Each makes the virtual environment if it is missing. PYTHON chooses the interpreter.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2
BIN := $(VENV)/bin

.PHONY: quickstart test check format clean

quickstart: $(VENV)/installed
	$(BIN)/cnnlab table experiments/quickstart.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-newest .cache .mypy_cache .pytest_cache .ruff_cache

# A virtual environment of another Python than the one asked for is made anew.
WANTED := $(shell $(PYTHON) -c 'import sys; print(sys.version.split()[0])')
FOUND := $(shell $(VENV)/bin/python -c 'import sys; print(sys.version.split()[0])' 2>/dev/null)
ifneq ($(WANTED),$(FOUND))
.PHONY: $(VENV)/bin/python
$(VENV)/installed $(VENV)/installed-dev: $(VENV)/bin/python
endif

$(VENV)/bin/python:
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/installed
