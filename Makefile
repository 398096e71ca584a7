# Thin wrappers; README shows the plain commands beneath each of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
EXTRAS ?= test
CONSTRAINTS := $(shell $(PYTHON) -c "import sys; print('constraints-py311.txt' if sys.version_info < (3, 12) else 'constraints-py312.txt')")

.PHONY: install quickstart test test-slow check format clean

install: $(VENV)/installed

$(VENV)/installed: setup.py $(CONSTRAINTS)
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'lm needs Python 3.11 or newer; this is ' + sys.version.split()[0] + '. Try: make PYTHON=python3.12 ' + '$(MAKECMDGOALS)')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/installed-$(EXTRAS): $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@touch $@

quickstart: install
	$(BIN)/python -m lm.train --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(BIN)/python -m lm.evaluate --workdir=$(WORKDIR)
	$(BIN)/python -m lm.report --output=$(WORKDIR)/curve.png $(WORKDIR)
	$(BIN)/python -m lm.generate --workdir=$(WORKDIR) --prompt="def " --max_tokens=120
	@echo
	@echo "Everything lies in $(WORKDIR): curve.png, metrics.jsonl, checkpoints/, config.json, tensorboard/."
	@echo "Next:"
	@echo "  $(BIN)/python -m lm.generate --workdir=$(WORKDIR) --prompt='import '"
	@echo "  $(BIN)/python -m lm.train --config=configs/quickstart.py --workdir=runs/mine --config.data.source='PATH/*.txt'"
	@echo "  $(BIN)/python -m lm.train --help --config=configs/quickstart.py"

test: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m pytest -m slow

check: $(VENV)/installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python --level error

format: $(VENV)/installed-$(EXTRAS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache *.egg-info
