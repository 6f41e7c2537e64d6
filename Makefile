# Everything from a bare clone: each job makes .venv and the pinned install first; a second call is quick.
PYTHON ?= python3
BIN := .venv/bin
# One thread per test process: the tests are many and small, so processes use the cores better.
WORKERS ?= 2
# Where this says not to, each process that a test starts would compile all of torch's Python anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed-demo ## train a small GPT on text that every install holds, and print what was found
	OMP_WAIT_POLICY=PASSIVE $(BIN)/inrun train

test: lint ## lint, types and tests (then those marked gpu, where there is a GPU)
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 \
	  $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=10
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m pytest -m gpu; fi

lint: .venv/.installed-dev ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/.installed-dev ## time kernels and whole steps against the peers (BENCH=--save-results: to be committed)
	$(BIN)/python -m pytest bench -q --benchmark-quiet $(BENCH)

clean: ## remove .venv and caches (runs/ is kept)
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .benchmarks

# pip is the last thing that `venv` writes, so a half-made environment is made again. torch by pip, whose settings say
# where its builds are; uv takes a quarter of the time for the rest, and goes: the demo trains on all licences there are.
PIP := $(BIN)/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt
define install
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) torch uv
	$(BIN)/uv pip install -p $(BIN)/python -c constraints.txt -e '.[$(1)]' || $(PIP) -e '.[$(1)]'
	$(BIN)/python -m pip uninstall -yq uv
endef

.venv/.installed-demo: pyproject.toml constraints.txt
	$(call install,report)
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt
	$(call install,dev)
	touch .venv/.installed-demo $@
