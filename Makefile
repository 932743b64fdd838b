# Every target does its own set-up, made once: `demo` what sanrt itself needs, the others all that the tests need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := .venv-demo

.PHONY: demo test check clean

demo: $(DEMO)/.installed
	$(DEMO)/bin/python -m benchmarks.demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --package sanrt --package benchmarks --package training

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[export,cpu,openvino,rtx,kernels,ray,ray-test,formats,serve,training,dev]'
	touch $@

$(DEMO)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install --quiet --editable .
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) models demo build dist
