# make train      set up .venv, then run the main job
# make pretrained    exports the quick run to examples/pretrained/world anew, which loads for about six months
# make docs          the documentation site, into site/; fails on a broken link, anchor or docstring
# make test          set up .venv, then the tests (without those of the next two)
# make test-slow     the slow tests: trainings, real processes killed, several devices, browsers
# make test-nightly  what takes longer still: kills at random moments, more topologies, ten thousand updates
# make test-trackers  W&B offline and MLflow's local stores, in an environment with both
# make smoke         the wheel in a fresh environment, from an empty folder; smoke-oldest: oldest allowed versions
# make lint          ruff, mypy, and the linters of images, manifests and shell scripts
# Programs that tests compile are kept in .cache/xla, or in the folder that MMRF_TEST_CACHE names.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/world

# Tests start many processes, and pytest rewrites every test file: what that compiles to is kept.
export PYTHONDONTWRITEBYTECODE :=

PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: train test test-slow test-nightly test-trackers smoke smoke-oldest lint clean

# The pip of Python 3.11 resolves the requirements of tests in four minutes, a new one in seconds.
$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt pyproject.toml $(VENV)/.run
	$(BIN)/pip install -q -e '.[report,data,baselines,serve,gym,optuna,gcs,s3]' -r requirements-dev.txt
	touch $@

train: $(VENV)/.run
	$(BIN)/python -m launch.train --config=world --workdir=$(WORKDIR)

.PHONY: pretrained docs

pretrained: $(VENV)/.run
	rm -rf .cache/pretrained
	$(BIN)/python -m launch.train --config=world --config.quick=True --config.world.num_videos=2000 \
		--workdir=.cache/pretrained/run
	$(BIN)/python -m launch.export --workdir=.cache/pretrained/run --out=.cache/pretrained/world
	rm -rf examples/pretrained/world
	mv .cache/pretrained/world examples/pretrained/world

test: $(VENV)/.dev
	$(PYTEST) -m "not slow and not nightly"

# A third worker, because some of these tests wait for processes.
test-slow: $(VENV)/.dev
	$(PYTEST) -n 3 -m "slow and not nightly" --durations=20

test-nightly: $(VENV)/.dev smoke-oldest
	$(PYTEST) -m nightly --durations=20

# Apart, because MLflow needs older versions of packages that the tests of object storage and of logs use.
.venv-trackers/.built: pyproject.toml
	$(PYTHON) -m venv .venv-trackers
	.venv-trackers/bin/pip install -q -U pip
	.venv-trackers/bin/pip install -q -e '.[wandb,mlflow]' 'pytest>=8'
	touch $@

test-trackers: .venv-trackers/.built
	.venv-trackers/bin/python -m pytest tests/io/test_trackers.py

smoke:
	PYTHON=$(PYTHON) .ci/smoke

smoke-oldest:
	PYTHON=$(PYTHON) .ci/smoke --oldest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint deploy/*.Dockerfile
	$(BIN)/kubernetes-validate --strict --quiet deploy/kubernetes.yaml launch/gke/sweep.yaml
	$(BIN)/shellcheck launch/tpu_vm.sh launch/slurm/* .ci/run .ci/smoke

.venv-docs/.built: requirements-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -q -r requirements-docs.txt
	touch $@

docs: .venv-docs/.built
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) .venv-docs .venv-trackers site .cache .pytest_cache .ruff_cache .mypy_cache
