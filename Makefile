# make train    the quickstart: set up, train a small model on this machine, look at the result
# make check    lint, types and the fast tests
# make test     the test suite
# make prove    what `make test` leaves out: longer proofs, and second ones (tests marked by_hand)
# PYTHON=python3.12 make …    with another Python (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A CPU with small pages spends a third of a training step on them; glibc reads this at start.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1
TRAIN_ARGS ?=

.PHONY: train check test prove clean

$(VENV)/.ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "olmo_jax needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

train: $(VENV)/.ready
	$(HUGE_PAGES) $(BIN)/python -m olmo_jax.train --config=configs/quickstart.py $(TRAIN_ARGS)

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest -n 2 -m 'not slow and not by_hand'

test: $(VENV)/.ready-test
	$(BIN)/pytest -n 2 -m 'not by_hand'

prove: $(VENV)/.ready-test
	$(BIN)/pytest -n 2 -m by_hand

clean:
	rm -rf $(VENV)
