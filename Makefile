# make verify   install into .venv, build the extension, prove the numbers on this machine
# make test     the same, and the tests;   make test-all   the slow ones too
# make sanitize the tests again, on an extension built with the address and undefined sanitizers
# make cuda     the extension with its CUDA kernels for every GPU, where there is an nvcc: it must load here
# make gpu      on a CUDA or ROCm machine, with PYTHON's own torch: tests, tunes and measures, in 8 minutes
# make lint     what CI checks besides;    make format     what the machines settle
# make readme   what the README says of speed, again from the runs in results/
# make clean    forget everything that was built
#
# TORCH chooses the torch to install, e.g. TORCH="torch --index-url ..." for a CUDA or ROCm build;
# pip's own settings and environment are honoured. Nothing is downloaded twice, and compiled objects
# stay in build/, so that a C++ file is compiled again only when it or a header has changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: all verify test test-all sanitize cuda gpu lint format readme clean

all: $(VENV)/.installed

verify: $(VENV)/.installed
	$(BIN)/fastattn verify

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest

# leaks are Python's own; the stack is the tests'; torch itself is not instrumented, nor are the kernels
# for GPUs, whose emulators check more than a sanitizer does
sanitize: $(VENV)/.dev
	FASTATTN_SANITIZE=1 $(PIP) --no-build-isolation --no-deps --upgrade --target build/sanitize .
	cd build/sanitize && LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(abspath $(BIN))/python -m pytest $(CURDIR)/tests -m "not slow" -p no:cacheprovider \
	  --ignore $(CURDIR)/tests/emulate --ignore-glob "$(CURDIR)/tests/kernels/*"

cuda: $(VENV)/.installed
	@if [ -n "$$(command -v nvcc)$$CUDA_HOME" ]; then $(MAKE) --no-print-directory build/cuda; \
	  else echo "fastattn: no nvcc here: the CUDA kernels were not compiled"; fi

.PHONY: build/cuda
build/cuda:
	FASTATTN_BUILD_CUDA=1 $(PIP) --no-build-isolation --no-deps --upgrade --target build/cuda .
	cd build/cuda && ls -sh fastattn/_C.so && $(abspath $(BIN))/python -c "import fastattn, torch; \
	  from fastattn.kernels import native; has = torch._C._dispatch_has_kernel_for_dispatch_key; \
	  assert all(has('fastattn_cuda::%s_%s' % (n, w), 'CUDA') for n in ('attention', 'norm') for w in ('fwd', 'bwd')); \
	  print('fastattn: CUDA kernels for', *native.cuda_architectures(), 'load with torch', torch.__version__)"

# no virtual environment and no network: such a machine has the torch that fits it
gpu:
	$(PYTHON) -m fastattn gpu $(GPU)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

readme: $(VENV)/.dev
	$(BIN)/fastattn plot $(wildcard results) --readme README.md

clean:
	rm -rf $(VENV) build *.egg-info fastattn/_C*.so

# torch goes first and alone, so that no other requirement chooses its build
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@echo "fastattn: installing $(TORCH)"
	$(PIP) $(TORCH)
	$(PIP) "setuptools>=77" wheel ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml $(SOURCES)
	@echo "fastattn: building the extension, about a minute"
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@
