# make demo    stream the shipped world to out/stream.mp4 and out/stream.png
# make test    the CPU test suite
# make aot     compile the Hopper kernels ahead of time, without a GPU, under each Triton that they were written for
# make lint    ruff;   make types   pyright;   make clean   remove what make made
#
# Every target creates .venv when it is missing and does nothing when it is up to date.
# TORCH chooses the torch to install: make test TORCH=torch takes the newest.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
JOBS   ?= 2
FRAMES ?= 240
OUT    ?= out
TRITONS ?= 3.6.0 3.7.1 3.9.0

# Threads that spin while they wait make a busy machine many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test aot lint types clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/swba-infer generate --model freedoom --context demo --frames $(FRAMES) --out $(OUT)/stream.mp4 --sheet $(OUT)/stream.png

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) $(PYTEST_ARGS)

test: $(VENV)/.installed-dev
	status=0; \
	$(PYTEST) -m "not gpu and not interpreter and not gluon" || status=1; \
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter tests/kernels || status=1; \
	exit $$status

aot: $(TRITONS:%=$(VENV)/triton-%/.installed)
	status=0; \
	for version in $(TRITONS); do \
		echo "triton $$version"; \
		PYTHONPATH=$(abspath $(VENV))/triton-$$version $(PYTEST) -m gluon tests/aot_hopper || status=1; \
	done; \
	exit $$status

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) $(OUT) build dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" -e ".[video]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	$(PIP) "$(TORCH)" -e ".[test,dev]"
	touch $@

$(VENV)/triton-%/.installed: | $(VENV)/.installed-dev
	$(PIP) --no-deps --upgrade --target $(@D) "triton==$*"
	touch $@
