# make demo: the bundled model answers a question.   make test: the tests.
# Both make .venv first, from nothing but python3.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/python -m mlx_qwen3next.generate --prompt "How do I use itertools.chain?"

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mlx_qwen3next needs Python 3.11 or newer, as mlx-lm does; this is %s. Name another: make PYTHON=python3.12 …" % sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV) || { echo "python3's venv module is missing (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
