# make demo: install and run the demonstration; make test: lint, types and tests. Both create .venv when it is absent.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --dist loadfile
BIN := $(VENV)/bin

.PHONY: demo test lint format clean

demo: $(VENV)/.nestc-core
	$(BIN)/nestc demo

# Every check runs even when an earlier one fails, so that one run shows everything; pytest's summary comes last.
test: $(VENV)/.nestc-test
	@status=0; \
	echo "ruff check";  $(BIN)/ruff check . || status=1; \
	echo "ruff format"; $(BIN)/ruff format --check . || status=1; \
	echo "pyright";     $(BIN)/pyright --pythonpath $(BIN)/python || status=1; \
	echo "pytest";      $(BIN)/python -m pytest $(PYTEST_ARGS) || status=1; \
	exit $$status

lint: $(VENV)/.nestc-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.nestc-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp an extra (core: none): installed again only when pyproject.toml is newer. The package itself is editable.
$(VENV)/.nestc-core: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.nestc-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
