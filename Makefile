# Each of the three is the only command needed after a clone.
#   make app    set up, and open the page on http://127.0.0.1:7860
#   make demo   the same job without a page; leaves an adapter, pictures and a report in outputs/
#   make test   set up, check style and types, run every test
PYTHON ?= python3
PORT ?= 7860
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: app demo test clean

app: $(VENV)/ready
	$(RUN) -m app --port $(PORT)

demo: $(VENV)/ready
	$(RUN) -m trainer demo

test: $(VENV)/ready-to-test
	sh tests/browser/install_chromium.sh
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it with: make PYTHON=python3.12 app")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/ready-to-test: $(VENV)/ready
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
