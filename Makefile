# `make bench` and `make test` need Python >= 3.11, gcc, make and nothing else: they make .venv.
# One stamp each for the build tools and the package: a second run installs nothing, a changed
# native source rebuilds, a changed constraints.txt or pyproject.toml installs again.

PYTHON ?= python3
# Where the ambient Python holds torch and a CUDA device is at hand (gpu-* targets; no venv there).
GPU_PYTHON ?= python3
JOBS ?= 2
ARGS ?=
RESULTS ?= build/bench
WERROR ?= $(if $(CI),ON,OFF)

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
NATIVE := $(wildcard src/qkrope/native/*.c src/qkrope/native/*.h src/qkrope/native/*.cpp)
FORMATTED := $(NATIVE) $(wildcard src/qkrope/*/*.cu src/qkrope/*/*.cuh) $(wildcard tests/emulate/*.h)
PYTHON_DIRS := $(wildcard src tests examples benchmarks tools)
TVM_FFI_MIN := 0.1.11
SANITIZE_TESTS ?= tests/test_kernels.py tests/test_kernel_rules.py tests/test_options.py \
  tests/test_grad.py tests/test_grad_options.py tests/test_grad_rules.py
SMOKE_TESTS ?= tests/test_kernels.py tests/test_compat.py

PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest
XDIST := -n $(JOBS)
CPU_ONLY := not gpu and not slow

.PHONY: help venv lint format test test-slow test-tvm-ffi-min sanitize bench readme \
        docs gpu-test gpu-bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

venv: $(VENV)/.package ## make .venv: pinned build tools, then the package and all its extras

$(VENV)/.build: constraints.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt scikit-build-core cmake ninja apache-tvm-ffi
	@touch $@

# PATH: the pinned cmake and ninja, not whatever the machine has.
$(VENV)/.package: $(VENV)/.build CMakeLists.txt $(NATIVE)
	@echo 'Building qkrope; the first time this also downloads what it needs, torch among it.'
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) install -q -c constraints.txt --no-build-isolation \
	  -C cmake.define.QKROPE_WERROR=$(WERROR) -e '.[cuda,bench,test,dev,docs]'
	@touch $@

lint: venv ## ruff, clang-format and mypy, all in checking mode
	$(VENV)/bin/ruff check $(PYTHON_DIRS)
	$(VENV)/bin/ruff format --check $(PYTHON_DIRS)
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)
	$(VENV)/bin/mypy

format: venv ## let ruff and clang-format rewrite the sources
	$(VENV)/bin/ruff check --fix $(PYTHON_DIRS)
	$(VENV)/bin/ruff format $(PYTHON_DIRS)
	$(VENV)/bin/clang-format -i $(FORMATTED)

test: venv ## the CPU tests (ARGS="-k name" narrows)
	$(PYTEST) $(XDIST) -m "$(CPU_ONLY)" $(ARGS)

test-slow: venv ## the long CPU tests
	$(PYTEST) $(XDIST) -m "slow and not gpu" $(ARGS)

test-tvm-ffi-min: venv ## the library as built, run on the oldest tvm-ffi that is supported
	test -d $(VENV)/tvm-ffi-$(TVM_FFI_MIN) || $(PIP) install -q --no-deps \
	  --target $(VENV)/tvm-ffi-$(TVM_FFI_MIN) apache-tvm-ffi==$(TVM_FFI_MIN)
	PYTHONPATH=$(CURDIR)/$(VENV)/tvm-ffi-$(TVM_FFI_MIN) $(PY) -c \
	  "import tvm_ffi; v = tvm_ffi.__version__; assert v == '$(TVM_FFI_MIN)', v; print('tvm-ffi', v)"
	PYTHONPATH=$(CURDIR)/$(VENV)/tvm-ffi-$(TVM_FFI_MIN) $(PYTEST) $(XDIST) -m "$(CPU_ONLY)" \
	  $(SMOKE_TESTS) $(ARGS)

# The base interpreter, with .venv's packages on PYTHONPATH: the editable install of .venv would
# win over PYTHONPATH inside .venv itself. Any report ends the run; the first run must end so.
sanitize: venv ## the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) install -q --no-build-isolation --no-deps --upgrade \
	  --target build/sanitize -C build-dir=build/sanitize-cmake \
	  -C cmake.define.QKROPE_SANITIZE=ON -C install.strip=false .
	site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("platlib"))'); \
	base=$$($(PY) -c 'import sys; print(sys._base_executable)'); \
	export PYTHONPATH="$(CURDIR)/build/sanitize:$$site" OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
	  PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 \
	  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)"; \
	"$$base" -c 'import qkrope; assert "/build/sanitize/" in qkrope.__file__, qkrope.__file__' && \
	if "$$base" tools/planted_fault.py overrun >build/sanitize-control.log 2>&1 || \
	    ! grep -q 'heap-buffer-overflow' build/sanitize-control.log; then \
	  echo 'the planted overrun was not reported: see build/sanitize-control.log'; exit 1; fi && \
	"$$base" -m pytest -p no:cacheprovider -p xdist $(XDIST) --maxfail=1 --capture=sys \
	  -m "$(CPU_ONLY)" $(SANITIZE_TESTS) $(ARGS)

bench: venv ## the CPU benchmark; records and a plot go to RESULTS
	@mkdir -p $(RESULTS)
	$(VENV)/bin/qkrope bench --out $(RESULTS)/cpu.jsonl --plot $(RESULTS)/cpu.png $(ARGS)

docs: venv ## the documentation into build/site: no broken link, nothing fetched
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	$(PY) tools/check_site.py build/site

readme: venv ## rewrite the tables of the README and docs from benchmarks/results
	$(PY) -m qkrope.bench.tables README.md $(wildcard docs/*.md)

gpu-test: ## the GPU tests, where there is a GPU: builds into build/gpu, installs nothing else
	GPU_PYTHON="$(GPU_PYTHON)" PYTEST_ARGS="$(ARGS)" tools/gpu.sh build test

gpu-bench: ## the GPU benchmark, likewise
	GPU_PYTHON="$(GPU_PYTHON)" BENCH_ARGS="$(ARGS)" OUT="$(RESULTS)" tools/gpu.sh build bench

clean: ## remove everything that was built, .venv too
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
