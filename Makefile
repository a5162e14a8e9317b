# make demo    the main job: data, training, evaluation, report (about 14 minutes on 2 cores after installation)
# make test    all checks and tests
# make setup   the environment alone, in .venv
#
# Another Python (3.11 to 3.13) than `python3`:  make setup PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test setup lint format lock clean

demo: $(READY)
	$(BIN)/emu2 demo --run runs/demo

# Test processes; each compiles on a core of its own. TESTS=tests/models runs a part.
PROCESSES ?= 2
TESTS ?=

test: lint
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadscope $(TESTS)

setup: $(READY)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every package at the version in the lock file, on the accelerator extra if one is asked for: make setup EXTRA=tpu
EXTRA ?=

$(READY): requirements.lock setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "emu2_jax needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is `$(PYTHON) --version 2>&1`. Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@if [ -n "$(EXTRA)" ]; then $(BIN)/python -m pip install --constraint requirements.lock --editable '.[$(EXTRA)]'; fi
	@touch $@

# After a change of the ranges in setup.cfg. One file serves all supported Pythons.
lock:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra test --upgrade setup.cfg --output-file requirements.lock

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
