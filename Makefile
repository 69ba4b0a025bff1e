# Everything a newcomer needs: `make demo` and `make test` set up what they use.
#   make demo          set up, start the demo server, send it a mixed batch; ONCE=1 stops after the table
#   make test          C++ tests (ctest) and Python tests (pytest), other people's clients too (.venv-clients)
#   make lint fmt      what CI checks; the formatters
#   make sanitize      C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make soak          the long random tests, fuzzing, planted faults
#   make bench         each benchmark at its smallest size; writes nothing
#   make bench-cpp     the C++ benchmarks at full size; adds rows to benchmarks/results
#   make sim           the scheduler's simulator: rows, tables and plots of docs/scheduling.md
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
CLIENTS := .venv-clients
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
FUZZ_SECONDS ?= 600
# The models of the tests are tiny: more threads, or threads that spin while they wait, only get in each other's way.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -n)
CXX_FILES = $(shell find csrc bindings tests/cpp benchmarks/cpp benchmarks/scheduler_sim -name '*.cc' -o -name '*.h')
EXTENSION_SOURCES = $(shell find csrc bindings -name '*.cc' -o -name '*.h') CMakeLists.txt

.PHONY: help setup setup-clients demo test test-cpp test-python lint fmt stub sanitize soak soak-fuzz bench bench-cpp build-bench sim clean

help:
	@sed -n 's/^#   //p' Makefile

# --- Set-up ------------------------------------------------------------------------------------------------
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "lora_serve needs Python 3.10 or newer; found $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "python3 -m venv failed. On Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }

# torch first and alone: its pinned version keeps pip from choosing a build with CUDA packages.
$(VENV)/.packages: constraints.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python scripts/check_cxx_compiler.py
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
	  scikit-build-core pybind11 cmake ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.packages $(EXTENSION_SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
	  --no-build-isolation --editable '.[test,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps lorax-client
	@touch $@

setup: $(VENV)/.installed

# Other people's clients, which the tests run against the server. They ask for other versions of some packages than
# ours, so they have an environment of their own; what suits them all (torch, transformers) it takes from ours,
# which a .pth file puts behind its own packages. Nothing in ours changes.
$(CLIENTS)/.installed: constraints-clients.txt constraints.txt | $(VENV)/.installed
	rm -rf $(CLIENTS)
	$(BIN)/python -m venv $(CLIENTS)
	$(BIN)/python -c 'import sys; print(*(path for path in sys.path if path.endswith("site-packages")), sep="\n")' \
	  > "$$($(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lora_serve_clients.pth"
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check -c constraints-clients.txt \
	  guidellm langchain-openai 'lm_eval[api]' schemathesis
	@touch $@

setup-clients: $(CLIENTS)/.installed

# --- Use ---------------------------------------------------------------------------------------------------
demo: setup
	$(BIN)/lora-serve demo $(if $(ONCE),--once)

test: test-cpp test-python

test-cpp: $(VENV)/.packages
	@scripts/install_cpp_library.sh GTest libgtest-dev $(SUDO)
	$(BIN)/cmake --preset release > build-configure.log || { cat build-configure.log; exit 1; }
	@rm -f build-configure.log
	$(BIN)/cmake --build --preset release -j $(JOBS)
	$(BIN)/ctest --preset release -j $(JOBS)

test-python: setup setup-clients
	@scripts/install_browser.sh $(SUDO)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'not gpu and not multi_gpu and not slow'

sanitize: $(VENV)/.packages
	@scripts/install_cpp_library.sh GTest libgtest-dev $(SUDO)
	$(BIN)/cmake --preset asan
	$(BIN)/cmake --build --preset asan -j $(JOBS)
	$(BIN)/ctest --preset asan -j $(JOBS)

# 22 million operations on the cache against its model, the scheduler's long runs, 10 minutes of fuzzing, planted faults,
# 3 minutes of 500 streams over HTTP.
soak: setup setup-clients soak-fuzz $(VENV)/.packages
	@scripts/install_cpp_library.sh GTest libgtest-dev $(SUDO)
	$(BIN)/cmake --preset asan
	$(BIN)/cmake --build --preset asan -j $(JOBS)
	LORA_SERVE_TEST_OPERATIONS=2000000 LORA_SERVE_TEST_STEPS=200000 \
	  $(BIN)/ctest --preset asan -j $(JOBS) -R Random --timeout 7200
	$(BIN)/python scripts/mutate_cache.py
	$(BIN)/python scripts/mutate_scheduler.py
	$(BIN)/python scripts/mutate_lora_kernels.py
	$(BIN)/python -m pytest -m slow --timeout 3600

# libFuzzer comes with Clang (Debian, Ubuntu: apt-get install clang). It goes on from the inputs that the last
# run found; one that fails is kept in build/fuzz.
soak-fuzz: $(VENV)/.packages
	@command -v clang++ > /dev/null || { echo "make soak needs clang++ for libFuzzer: apt-get install clang"; exit 1; }
	@scripts/install_cpp_library.sh GTest libgtest-dev $(SUDO)
	$(BIN)/cmake --preset fuzz
	$(BIN)/cmake --build --preset fuzz -j $(JOBS) --target kv_prefix_cache_fuzz
	mkdir -p build/fuzz/corpus
	build/fuzz/tests/cpp/kv_prefix_cache_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=4096 \
	  -artifact_prefix=build/fuzz/ build/fuzz/corpus

bench: setup build-bench
	$(BIN)/python benchmarks/run_smallest.py build/bench/benchmarks/cpp

bench-cpp: setup build-bench
	$(BIN)/python benchmarks/cpp/append_results.py build/bench/benchmarks/cpp/kv_prefix_cache_bench
	$(BIN)/python benchmarks/cpp/append_results.py build/bench/benchmarks/cpp/adapter_weights_bench
	$(BIN)/python benchmarks/cpp/append_results.py build/bench/benchmarks/cpp/scheduler_bench \
	  --subject scheduler_step

sim: setup build-bench
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt matplotlib
	$(BIN)/python benchmarks/scheduler_sim/bench_scheduler_sim.py

build-bench: $(VENV)/.packages
	@scripts/install_cpp_library.sh benchmark libbenchmark-dev $(SUDO)
	$(BIN)/cmake --preset bench > build-configure.log || { cat build-configure.log; exit 1; }
	@rm -f build-configure.log
	$(BIN)/cmake --build --preset bench -j $(JOBS)

# --- Lint --------------------------------------------------------------------------------------------------
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_size_budgets.py
	$(BIN)/python scripts/generate_stub.py --check
	$(BIN)/codespell

fmt: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

stub: setup
	$(BIN)/python scripts/generate_stub.py

clean:
	rm -rf build dist $(VENV) $(CLIENTS)
