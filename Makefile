# Every target does its own set-up, made once: `demo` and `docs` what they need, the others all that the tests need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := .venv-demo
DOCS := .venv-docs

.PHONY: demo docs test check clean

demo: $(DEMO)/.installed
	$(DEMO)/bin/python -m benchmarks.demo

docs: $(DOCS)/.installed
	$(DOCS)/bin/python -m sphinx -W --keep-going -q -c docs . site
	@echo "site/docs/index.html"

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --package sanrt --package benchmarks --package training

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[export,cpu,openvino,rtx,kernels,ray,ray-test,formats,serve,training,docs,dev]'
	touch $@

$(DEMO)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install --quiet --editable .
	touch $@

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) $(DOCS) models demo build dist site
