# Each of the first three is the only command you need after cloning.
#   make app     set up, then open the page on http://127.0.0.1:7860
#   make demo    the same job without a page; leaves an adapter, images and a report in outputs/
#   make test    set up, check style and types, run every test
#   make check   format, lint, strict types and the fast tests, in under a minute
PYTHON ?= python3
PORT ?= 7860
VENV := .venv
RUN := $(VENV)/bin/python

# Tests without a browser, a training or a large model. `make test` runs all of them.
FAST_TESTS := tests/project/test_architecture.py tests/config tests/runs

.PHONY: app demo test check scripts format clean

app: $(VENV)/ready
	$(RUN) -m app --port $(PORT)

demo: $(VENV)/ready
	$(RUN) -m trainer demo

test: $(VENV)/ready-to-test scripts
	sh tests/browser/install_chromium.sh
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest

check: $(VENV)/ready-to-test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest $(FAST_TESTS)

# The tools that check app/static. Without npm the tests of the scripts are skipped.
scripts:
	@command -v npm > /dev/null || echo "npm is not installed: the page's scripts are not checked."
	@command -v npm > /dev/null && npm install --silent --no-package-lock --no-audit --no-fund || true

format: $(VENV)/ready-to-test
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "LoRA Atelier needs Python 3.11 or newer. Name it with: make PYTHON=python3.12 app")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/ready-to-test: $(VENV)/ready
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
