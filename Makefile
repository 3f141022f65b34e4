# make train      set up .venv, then run the main job
# make test       set up .venv, then the tests (without the slow ones)
# make test-slow  the slow tests: real processes killed, several devices, learning
# make nightly    fuzzing and long runs
# make lint       ruff and mypy
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/world

.PHONY: train test test-slow nightly lint clean

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements-serve.txt $(VENV)/.run
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

train: $(VENV)/.run
	$(BIN)/python -m launch.train --config=experiments/world.py --workdir=$(WORKDIR)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not nightly" -n 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow --durations=20

nightly: $(VENV)/.dev
	$(BIN)/python -m pytest -m nightly --durations=20

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
