# Every target sets up .venv first where it is missing or out of date; nothing but Python 3.11 or later is needed.
PYTHON ?= python3
BIN := .venv/bin
SET_UP := .venv/.set-up
PYTEST = $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-all lint

$(SET_UP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

# Train the sample, compress it to 2 bits, prove it, and gate it; then the same with a qcompress.toml.
demo: $(SET_UP)
	@rm -rf build/demo
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash samples/digits/demo.sh build/demo

lint: $(SET_UP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(PYTEST)

# As `test`, with the slow tests too.
test-all: lint
	$(PYTEST) -m 'slow or not slow'
