# Every target first sets up .venv if it is missing or out of date. The only requirement is Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
SET_UP := .venv/.set-up
# Files run in the order in which they are found: doctests, which are short, come last, so that no worker is left idle.
PYTEST = $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint runtimes zoo data-is-given

$(SET_UP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

# Train the sample, compress it to 2 bits, validate it and gate it; then do the same with a qcompress.toml.
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

# Run `test` with the slow tests included.
test-all: lint
	$(PYTEST) -m 'slow or not slow'

# Check that OpenVINO and MNN compute the same as onnxruntime with ResNet-20's files: `make runtimes DATA=DIR`, where DIR
# holds the nets and images of benchmarks/_nets.py. Each runtime gets a separate venv.
RUNTIMES := build/runtimes/openvino/.set-up build/runtimes/mnn/.set-up

build/runtimes/%/.set-up: benchmarks/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -qq --disable-pip-version-check -r $<
	@touch $@

runtimes: data-is-given $(SET_UP) $(RUNTIMES)
	$(BIN)/python benchmarks/runtimes.py --data $(DATA) --json benchmarks/results/runtimes.json

# Export popular nets and run the files: what benchmarks/results/zoo.json lacks is measured, and docs/zoo.md is written.
# The nets' packages get a separate venv. torchvision and timm are installed without their dependencies, which the venv
# holds: of torchvision only the Python is needed, whatever build of torch its library asks for.
ZOO := build/zoo

$(ZOO)/.set-up: pyproject.toml constraints.txt benchmarks/requirements-zoo.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all]' transformers
	$(@D)/bin/pip install -qq --disable-pip-version-check --no-deps -r benchmarks/requirements-zoo.txt
	@touch $@

zoo: $(ZOO)/.set-up
	$(ZOO)/bin/python benchmarks/zoo.py --json benchmarks/results/zoo.json --docs docs/zoo.md

data-is-given:
	@test -d "$(DATA)" || { echo "DATA must be the folder of the nets and images: make runtimes DATA=DIR"; exit 2; }
