# Everything runs inside .venv, which `make install` creates. `make help` lists the commands.

PYTHON    ?= python3
PIP_FLAGS ?=
WORKERS   ?= 2
# For make study: where the public data sets are, and such as STUDY="--only gemma3-270m --minutes 60".
SHARED    ?= ../shared/data
STUDY     ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# Workers are processes: one thread each, or they fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install browser demo test coverage test-gpu test-kernels test-faults test-real check docs format bench bench-gpu study clean

help: ## list these commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv with the package (editable) and the development tools

# pip keeps what fits already, so a second run is quick. A venv that was cut short has no stamp.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed: make install PYTHON=python3.12"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS) \
	  -c constraints.txt torch -e ".[dev]"
	@touch $(STAMP)

browser: ## Chromium, for the tests of pages, which skip without it (Debian and Ubuntu, as root)
	@command -v chromium >/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends chromium; }

demo: install ## find the golden layer of SmolLM2-135M on the starter facts (table and picture)
	$(BIN)/golden locate smollm2-135m --limit 200 --out runs/demo --overwrite
	@echo "Picture: runs/demo/ranking.png (and ranking.svg)"

test: install ## all tests that need no pretrained weights
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not real"

# Counting statements makes the tests take half as long again.
coverage: install ## the same tests with statement coverage, which must be 90 % or more
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not real" \
	  --cov --cov-report=term --cov-fail-under=90

test-gpu: install ## the tests of numbers on a GPU against the processor (skipped without one)
	GOLDENLAYERS_DEVICE=cuda $(PYTEST) tests/test_gpu.py

# Another processor's last bits: other instructions, two threads, and sums that are a bit off.
# KERNELS names the test files; without it all of them run.
KERNELS ?=

test-kernels: install ## the same tests as on another processor
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE ATEN_CPU_CAPABILITY=default \
	  MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 PYTHONPATH=tests \
	  $(BIN)/python -m pytest -p off_a_bit -n $(WORKERS) --dist worksteal -m "not real" $(KERNELS)

# So many cases of each property and of each fault; the counts are printed.
EXAMPLES ?= 7000
FAULTS   ?= 30

test-faults: install ## kills, full disks, torn files, damaged input: hundreds of faults, 100,000 cases
	GOLDENLAYERS_FAULTS=$(FAULTS) $(PYTEST) -s tests/test_faults.py
	GOLDENLAYERS_EXAMPLES=$(EXAMPLES) $(PYTEST) tests/test_properties.py
	PYTHONPATH=tests $(BIN)/python tests/delta_damage.py 4000
	PYTHONPATH=tests $(BIN)/python tests/gguf_mutations.py --cases 2000

test-real: install ## tests on real pretrained weights (fetched with pip on first use)
	$(BIN)/python -m pytest -m real

check: install ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: install ## build the site into docs/_build; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "docs/_build/index.html"

format: install ## put all files into the common form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# -P keeps the scripts' folder off the path: a script may bear a library module's name.
bench: install ## measure side by side; JSON in runs/bench
	@mkdir -p runs/bench
	@for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/[a-z]*.py)); do \
	  echo "== $$script"; \
	  $(BIN)/python -P $$script --out runs/bench/$$(basename $$script .py).json || exit 1; \
	done

bench-gpu: install ## models of 1.5 to 12 B parameters in random weights on a GPU; JSON in runs/bench
	@mkdir -p runs/bench
	$(BIN)/python -P benchmarks/gpu.py --out runs/bench/gpu.json

# Hours on 2 cores: what is finished is not done again, so it can be stopped and goes on.
study: install ## what is missing of studies/golden-layers.yaml; figures in runs/study/study
	$(BIN)/golden study studies/golden-layers.yaml --base $(SHARED) --out runs/study $(STUDY)

clean: ## remove caches and build products (not .venv, not runs)
	rm -rf .pytest_cache .ruff_cache .coverage .coverage.* htmlcov build dist docs/_build src/*.egg-info
	find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
