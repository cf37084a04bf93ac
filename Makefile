# Both targets do all the set-up themselves: Python >= 3.11 and make are all that a fresh machine needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint fast soak clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/unplant demo -o demo-out --force $(DEMO_FLAGS)

# Two single-thread processes side by side beat one with two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist

test: $(VENV)/.installed-test lint
	$(PYTEST) worksteal -m "not slow"
	$(PYTEST) loadgroup --no-loadscope-reorder -m "slow"

fast: $(VENV)/.installed-test
	$(PYTEST) worksteal -m "not slow"

soak: $(VENV)/.installed-test
	UNPLANT_SOAK_CHECKPOINTS=100000 UNPLANT_SOAK_IMAGES=100000 UNPLANT_SOAK_KILLS=200 $(BIN)/python -m pytest -q \
		$(wildcard tests/test_hostile.py tests/test_fuzz_checkpoints.py tests/test_fuzz_images.py tests/test_resume.py)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "unplant needs Python 3.11 or newer; try: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) demo-out
