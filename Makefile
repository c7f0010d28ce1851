# `make demo` and `make test` set themselves up: an environment in .venv, the pinned packages, the build.
# Rebuilt when a source changes. PYTHON, PIP_ARGS and the PYDIFFUSE_* variables of setup.py are yours.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt $(PIP_ARGS)
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo demo-full test lint coverage sanitize sdist wheel bench micro tables gpu-test gpu-bench gpu-compile cuda-emulate train clean

demo: $(VENV)/demo
	$(BIN)/python examples/digits/demo.py

# Every sampler under every rule, what plain PyTorch and pydiffuse take: some minutes more.
demo-full: $(VENV)/demo
	$(BIN)/python examples/digits/demo.py --full

test: $(VENV)/test lint
	$(BIN)/python -m pytest --durations=5

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests torch-ext -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache | tail -n +11

# What the tests reach of the Python files; Triton's kernels are interpreted, C++ is not counted.
coverage: $(VENV)/coverage
	$(BIN)/python -m pytest --cov=pydiffuse --cov-report=term-missing:skip-covered

# The CPU kernels' tests under AddressSanitizer and UBSan, by a build of their own.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := test_guidance test_scan test_attention_cpu test_patch test_adaln test_routing test_numpy test_numpy_safety
sanitize: $(VENV)/test
	CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer $(SANITIZE)" LDFLAGS="$(SANITIZE)" PYDIFFUSE_CUDA=0 \
	  $(BIN)/python setup.py -q build --build-temp build/sanitized --build-lib build/sanitized/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. $(BIN)/python -m pytest --capture=sys \
	  -p no:cacheprovider -o pythonpath=build/sanitized/lib $(SANITIZED:%=tests/%.py) -k "cpu or numpy"

sdist: $(VENV)/built
	$(BIN)/python setup.py -q sdist

# For this machine's Python, with CUDA where setup.py builds it; repaired for older Linux where that can be done.
wheel: $(VENV)/package
	rm -rf build/lib.* build/bdist.* dist/*.whl
	$(BIN)/python -m pip --disable-pip-version-check wheel -q --no-deps --no-build-isolation -w dist .
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist/repaired dist/*.whl \
	  || echo "not repaired: dist/ holds a wheel for Linux like this one"

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks

micro: $(VENV)/bench
	$(BIN)/python -m pytest benchmarks/micro.py --benchmark-only

tables: $(VENV)/bench
	$(BIN)/python -m benchmarks --tables

train: $(VENV)/demo
	$(BIN)/python examples/digits/train.py

# On a machine with a GPU, an nvcc and a python3 that has torch: no environment of its own.
gpu-test:
	bash tests/gpu.sh

gpu-bench:
	bash benchmarks/gpu.sh

# The Triton kernels as launched, under every supported Triton and for every architecture; no GPU needed.
TRITONS := 3.6.0 3.8.0 3.9.0
gpu-compile: $(VENV)/test $(TRITONS:%=$(VENV)/triton-%)
	$(BIN)/python -m tests.gpu_compile --out benchmarks/results/triton-builds.json

# The CUDA kernels on the host, at length: several orders of threads, sanitizers, barriers left out.
cuda-emulate: $(VENV)/test
	$(BIN)/python -m tests.cuda_host

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the build tools (constraints.txt)"
	$(PIP) torch==2.13.0
	$(PIP) setuptools ninja pybind11 numpy
	@touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	@echo "building pydiffuse"
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/demo: $(VENV)/built
	$(PIP) --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/test: $(VENV)/built $(VENV)/triton-3.6.0
	$(PIP) 'jax; python_version >= "3.11"'
	$(PIP) --no-build-isolation -e '.[test,lint]'
	@touch $@

$(VENV)/coverage $(VENV)/package: $(VENV)/%: $(VENV)/test
	$(PIP) --no-build-isolation -e '.[$*]'
	@touch $@

# A Triton beside the environment's own, for what compiles the kernels under several.
$(VENV)/triton-%: | $(VENV)/torch
	$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps $(PIP_ARGS) --target $@ triton==$*

$(VENV)/bench: $(VENV)/built
	$(PIP) --no-build-isolation -e '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info pydiffuse/*.so
