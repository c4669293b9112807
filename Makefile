# Every target sets up what it needs by itself: a virtual environment in .venv with pinned versions and the compiled
# extensions. A demo installs only what it needs; the other targets add the rest to the same .venv. On a machine without
# a GPU, TORCH_INDEX may name PyTorch's index of CPU wheels, which spares a download of gigabytes; targets for a GPU run
# with the Python that has its PyTorch (GPU_PYTHON).
#
# make gpu is for a GPU that is at hand for minutes: LIMIT=420 are its seconds, OUT=gpu-results its folder, PHASES=tests
# and ONLY=koleo,sinkhorn a part of it. What it would have to build there, make gpu-kit builds beforehand, with a Python
# of the same version (GPU_KIT_PYTHON) and the packages of gpu/kit-requirements.txt, which are that machine's.

PYTHON ?= python3
GPU_PYTHON ?= python3
TORCH_INDEX ?=
GPU_KIT_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) $(shell command -v python3.12))
LIMIT ?= 420
OUT ?= gpu-results
PHASES ?=
ONLY ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
KIT_VENV := .venv-gpu-kit
NATIVE := $(wildcard csrc/*.cpp csrc/*/*)

# A stamp in .venv says which extras of pyproject.toml are installed there. Where a stamp of more is there already, a
# demo uses that one: the whole .venv then stays up to date, and nothing is installed twice.
EVERYTHING := $(VENV)/ready
FOR_DEMO_CURATE := $(firstword $(wildcard $(EVERYTHING)) $(VENV)/demo-curate-ready)
FOR_DEMO := $(firstword $(wildcard $(EVERYTHING) $(VENV)/demo-curate-ready) $(VENV)/demo-ready)

# PyPI's PyTorch brings CUDA on Linux, and on no other system. Where nothing can use CUDA, a message says how to spare
# it. PyTorch alone comes from TORCH_INDEX, which need not have the pinned versions of what PyTorch needs.
NVIDIA_DRIVER := /proc/driver/nvidia
GPU = $(wildcard $(NVIDIA_DRIVER)) $(shell command -v nvidia-smi 2>/dev/null)
SYSTEM = $(shell uname -s)-$(shell uname -m)
NEEDLESS_CUDA = $(if $(strip $(TORCH_INDEX) $(GPU)),,$(filter Linux-x86_64 Linux-aarch64,$(SYSTEM)))
MESSAGE = No NVIDIA GPU was found, but PyPI's PyTorch for Linux brings CUDA: nearly 3 GB to download, not 0.2 GB. To spare \
	it, stop this and run: make $(MAKECMDGOALS) TORCH_INDEX=https://download.pytorch.org/whl/cpu

.PHONY: help setup demo demo-curate test check format bench gpu gpu-kit gpu-rehearsal test-gpu bench-gpu clean
.NOTPARALLEL: # two set-ups at once would write to the same .venv

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

setup: $(EVERYTHING) ## everything that a developer needs: virtual environment, pinned packages, compiled extensions

$(VENV)/demo-ready: EXTRAS := demo
$(VENV)/demo-curate-ready: EXTRAS := demo,curate
$(EVERYTHING): EXTRAS := dev
$(EVERYTHING): CUDA := $(if $(shell command -v nvcc),DINOV2_KERNELS_CUDA=1)

$(VENV)/demo-ready $(VENV)/demo-curate-ready $(EVERYTHING): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(NEEDLESS_CUDA),@$(BIN)/python -c 'import torch' 2>/dev/null || echo "$(MESSAGE)")
	$(if $(TORCH_INDEX),$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install -c constraints.txt --no-deps --index-url $(TORCH_INDEX) torch)
	$(PIP) install -c constraints.txt torch setuptools wheel ninja pybind11
	$(CUDA) $(PIP) install -c constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	touch $@

demo: $(FOR_DEMO) ## pretrain a small ViT on bundled photographs: ten minutes, offline, on a laptop
	$(BIN)/python examples/demo.py

demo-curate: $(FOR_DEMO_CURATE) ## curate a small crawl, from web pages to a set to pretrain on: two minutes, offline
	$(BIN)/python examples/demo_curate.py

test: setup ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup tests

check: setup ## lint, format, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## apply the formatter and the lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## benchmarks on this CPU, peers side by side; writes benchmarks/results
	$(BIN)/python -m pytest -m 'not gpu' benchmarks

gpu: ## all that a GPU can tell within LIMIT seconds: tests, benchmarks, a step, a profile; into OUT
	@$(GPU_PYTHON) -m gpu --limit $(LIMIT) --output $(OUT) $(if $(PHASES),--phases $(PHASES)) $(if $(ONLY),--only $(ONLY))

gpu-kit: $(KIT_VENV)/ready ## what make gpu then need not build: extensions, and Triton's kernels in its cache
	$(KIT_VENV)/bin/python -m gpu.kit make

gpu-rehearsal: setup ## make gpu without a GPU: everything but the kernels
	$(BIN)/python -m gpu --rehearse --limit 900 --output $(OUT)

$(KIT_VENV)/ready: gpu/kit-requirements.txt
	@test -n "$(GPU_KIT_PYTHON)" || { echo 'gpu-kit: expected a Python 3.12 on PATH, or in GPU_KIT_PYTHON' && exit 1; }
	$(GPU_KIT_PYTHON) -m venv $(KIT_VENV)
	$(KIT_VENV)/bin/pip --disable-pip-version-check --quiet install -r gpu/kit-requirements.txt
	touch $@

test-gpu: ## tests that need a GPU, with the PyTorch of GPU_PYTHON
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PYTHON) -m pytest -m gpu tests/*/test_gpu.py

bench-gpu: ## benchmarks on this GPU, with the PyTorch of GPU_PYTHON
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PYTHON) -m pytest -m gpu benchmarks/*_gpu.py

clean: ## remove everything that is built
	rm -rf $(VENV) $(KIT_VENV) .gpu-kit gpu-results build dist *.egg-info dinov2_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
