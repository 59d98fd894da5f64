# make test and make demo do all the set-up themselves; Python 3.11 or newer with pip is all they need.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow lint benchmark clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(RUN) examples/eight_schools.py

test: $(INSTALLED)
	$(RUN) -m pytest -n 2 -m 'not slow'

test-slow: $(INSTALLED)
	$(RUN) -m pytest -n 2 -m slow

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

benchmark: $(INSTALLED)
	$(RUN) -m benchmarks.step_time

clean:
	rm -rf $(VENV) build *.egg-info output
