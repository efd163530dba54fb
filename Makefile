# Every target makes its own virtual environment in .venv, and renews it when pyproject.toml or constraints.txt change.
# Another interpreter: make PYTHON=python3.12 test. Another number of tests side by side: make JOBS=4 test.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin

# One thread each: two processes side by side are faster than two threads in one. glibc hands large blocks back to the system
# after every step; keeping them is up to twice as fast on a CPU. (The recollect command sees to both by itself.)
LEAN := OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

.PHONY: help demo test upstream check smoke bench clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(VENV)/.installed-report  ## train the demonstration rows side by side and write runs/demo/report.html
	$(BIN)/recollect faceoff demo --workers 2 --out runs/demo

smoke: $(VENV)/.installed-dev  ## the code paths of both demonstrations end to end, in seconds
	$(BIN)/recollect faceoff demo-smoke --workers 2 --out runs/smoke
	$(BIN)/recollect lm demo --steps 5 --documents 40 --out runs/smoke-lm

test: $(VENV)/.installed-dev  ## run the tests (slow and gpu ones are left out: pytest -m slow, pytest -m gpu)
	$(LEAN) $(BIN)/pytest -q -n $(JOBS)

# The common tests of models are in the source distribution of transformers alone. It stays below .venv, as it is.
upstream: $(VENV)/.installed-dev  ## transformers' own tests of models, on recollect.hf; fetches its source distribution
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt 'parameterized>=0.9'
	@version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))'); \
	source=$(VENV)/upstream/transformers-$$version; \
	if [ ! -f "$$source/tests/test_modeling_common.py" ]; then \
	  echo "fetching the source distribution of transformers $$version into $(VENV)/upstream"; \
	  rm -rf $(VENV)/upstream; \
	  $(BIN)/pip download -qq --disable-pip-version-check --no-deps --no-binary transformers -d $(VENV)/upstream \
	    "transformers==$$version"; \
	  tar -xzf "$$source.tar.gz" -C $(VENV)/upstream; \
	fi; \
	RECOLLECT_TRANSFORMERS_TESTS=$(CURDIR)/$$source/tests $(LEAN) $(BIN)/pytest -q -n $(JOBS) -m upstream tests/upstream

check: $(VENV)/.installed-dev  ## style, format, types, import rules, the documentation's snippets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(LEAN) $(BIN)/pytest -q -n 0 tests/test_architecture.py tests/test_docs.py

bench: $(VENV)/.installed-dev  ## run the bench commands and every bench/*.py: an hour or more; JSON into runs/bench
	@mkdir -p runs/bench
	@for what in layers attention decode worldmodel; do $(BIN)/recollect bench $$what --out runs/bench; done
	@for script in bench/*.py; do \
	  echo "$$script"; $(LEAN) $(BIN)/python "$$script" "runs/bench/$$(basename "$$script" .py).json"; \
	done

clean:  ## remove the environment, caches and smoke runs (runs/demo and other runs stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist runs/smoke runs/smoke-lm
	find src tests bench -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "recollect needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing recollect[$*] into $(VENV) (PyTorch included: a few minutes the first time)"
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@
