# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: setup demo test test-gpu browser lint check clean experiments

setup: $(VENV)/.ready

# torch goes first and alone, by its exact version: a range would let the index choose a build
# with several GB of CUDA libraries.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## the main job: three tasks on one trunk, then ResNet-50 in four blocks
	$(BIN)/blockflow demo

test: setup browser  ## everything that can run on this machine
	$(BIN)/pytest -m 'not gpu'

GPU_TESTS ?= gpu and not two_gpus  # `gpu` where there are two
test-gpu:  ## what needs an NVIDIA GPU; with the environment's own torch, for wheels differ
	PYTHONPATH=src python3 -m pytest -m '$(GPU_TESTS)' tests/test_tensormq.py tests/test_program.py tests/test_devices.py tests/test_runtime.py tests/test_gpu_runner.py tests/test_gpu.py tests/test_gpu_mps.py

# The page's tests drive a real browser. Without root and without one they fail and say so.
browser:
	@command -v chromium chromedriver >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] || \
	  ! command -v apt-get >/dev/null 2>&1 || \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver) >/dev/null

lint: setup  ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint  ## what every commit passes: lint, and the fast tests
	$(BIN)/pytest -m 'not slow and not gpu' --timeout 60

EXPERIMENTS := latency throughput energy vram sharing
EXPERIMENT_PYTHON ?= $(BIN)/python
EXPERIMENT_OUT ?= docs/results/experiments

# The published results, measured again: see experiments/README.md. Another Python than that of .venv
# must have what they need already.
experiments: $(if $(filter $(BIN)/python,$(EXPERIMENT_PYTHON)),setup)
	@for each in $(EXPERIMENTS); do \
	  PYTHONPATH=src $(EXPERIMENT_PYTHON) experiments/run_$${each}_test.py --out $(EXPERIMENT_OUT) \
	    $(EXPERIMENT_ARGS) || exit 1; \
	done
	$(EXPERIMENT_PYTHON) experiments/page.py $(EXPERIMENT_OUT)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
