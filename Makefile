# Every target does its own set-up: a virtual environment in .venv, made anew when the pins or the project change.
# A machine needs python3 with venv and pip, and make. `make PYTHON=python3.12 test` chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Two test processes, one thread each: the tests are too small to fill two cores with one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.PHONY: setup quickstart test test-slow lint docs clean

setup: $(READY)

# uv installs in seconds what takes pip minutes; pip does it where uv cannot be had.
$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if $(BIN)/python -m pip install --quiet uv && \
	    $(BIN)/uv pip install --python $(BIN)/python --requirement requirements.txt && \
	    $(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable . ; then :; \
	else \
	    echo "uv could not install; using pip" && \
	    $(BIN)/python -m pip install --requirement requirements.txt && \
	    $(BIN)/python -m pip install --no-deps --no-build-isolation --editable . ; \
	fi
	touch $@

quickstart: $(READY)
	$(BIN)/vtp quickstart --out runs/quickstart

test: lint
	$(PYTEST) --ignore=tests/test_architecture.py

test-slow: $(READY)
	$(BIN)/pytest -m slow || test $$? -eq 5  # 5: there are none

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_architecture.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
