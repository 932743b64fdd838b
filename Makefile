# Every target does its own set-up, made once: `demo` and `docs` what they need, the others all that the tests need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := .venv-demo
DOCS := .venv-docs

CORE := tests/test_files.py tests/test_upscaler.py tests/runtime/test_host.py tests/runtime/pictures tests/kernels/cpu \
	tests/cli/test_run.py tests/cli/test_streams.py tests/cli/test_plan.py tests/cli/test_info.py tests/cli/test_doctor.py

.PHONY: demo docs test elsewhere check clean

demo: $(DEMO)/.installed
	$(DEMO)/bin/python -m benchmarks.demo

docs: $(DOCS)/.installed
	$(DOCS)/bin/python -m sphinx -W --keep-going -q -c docs . site
	@echo "site/docs/index.html"

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

elsewhere: $(STAMP)
	for system in darwin win32; do echo "as on $$system:"; SANRT_AS_IF=$$system PYTHONPATH=tests/elsewhere OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q -k 'not openvino and not torch' $(CORE) || exit 1; done

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --package sanrt --package benchmarks --package training

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[export,cpu,openvino,rtx,kernels,ray,ray-test,formats,video,serve,ray-serve,triton,page-test,training,docs,dev]'
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
