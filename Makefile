# Two commands do everything on a machine with python3, git and make:
#   make quickstart    makes .venv, installs, runs the whole story on built-in data
#   make test          makes .venv, installs, lints, runs the tests
# PYTHON=python3.12 and VENV=.venv312 choose another interpreter and another place.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKDIR ?= runs/quickstart
WORKERS ?= 2
# A file's tests share what it has made, so they go to one worker.
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
TESTS ?= tests
ARGS ?=
TUTORIALS ?= $(addprefix docs/tutorials/,$(addsuffix .md,instructions lora_or_full classifier rlhf legal))

.PHONY: help install quickstart test test-fast lint layering format docs site tutorials families-page \
	plan-page clean

help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile
	@echo "others: install lint layering format test-fast docs site tutorials families-page plan-page clean"
	@echo "        make test TESTS=tests/data ARGS='-k packing'"

install: $(INSTALLED)

# Installing is skipped while pyproject.toml is older than the last installation.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

quickstart: install
	$(BIN)/jaxtune quickstart --workdir=$(WORKDIR)
	@echo "'source $(BIN)/activate' puts jaxtune on the PATH"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

layering: install
	$(BIN)/python -m pytest -q tests/test_layering.py

test: lint layering
	$(PYTEST) --durations=30 $(TESTS) $(ARGS)

test-fast: lint layering
	$(PYTEST) -m "not slow" $(TESTS) $(ARGS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/python docs/write_reference.py

# docs/ as a site in site/, to be opened from there; it needs no network to be read.
site: install
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Runs the tutorials as a reader does, and writes what they print into their pages. Needs the
# quickstart's runs/quickstart; runs/mine, choice, classifier, rlhf and legal are made anew.
tutorials: install
	rm -rf runs/mine runs/choice runs/classifier runs/rlhf runs/legal
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m tests.tutorials.runner --write $(TUTORIALS)
	$(BIN)/python -m tests.tutorials.cloud --write

# Some minutes; needs torch, transformers and peft.
families-page: install
	nice $(BIN)/python docs/write_families.py

# Some minutes; needs libtpu: pip install "jax[tpu]".
plan-page: install
	nice $(BIN)/python docs/write_plan.py

clean:
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
