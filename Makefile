# Every target makes what it needs. `.venv` is made from nothing; stamps in it make a second run quick.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	>/dev/null 2>&1 && echo $$p && break; done)
MODEL ?= smollm2-135m
# Processes that run tests; each takes some two gigabytes.
TEST_JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: demo serve test lint types sanitize cross-arm64 test-without-bodies bench bench-kernels peers compare step-cost models parity reliability compile-gpu proto wheel-check clean

demo: .venv/run.stamp
	$(BIN)/pallasite pull $(MODEL)
	$(BIN)/pallasite demo $(MODEL)

serve: .venv/run.stamp
	$(BIN)/pallasite pull $(MODEL)
	$(BIN)/pallasite serve $(MODEL)

test: .venv/test.stamp
	$(BIN)/pallasite pull smollm2-135m
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile

lint: .venv/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows no editable install, so it is shown the packages where a wheel would put them.
types: .venv/test.stamp .venv/lint.stamp
	mkdir -p build/types/pallasite
	for p in engine models pallas_kernels proto server; do \
		ln -sfn ../../../$$p build/types/pallasite/$$p; done
	$(BIN)/mypy

# The CPU's bodies alone, in C++: `check` calls them with random shapes, pages and faults.
BODIES_CHECK := $(MAKE) --no-print-directory -j $(TEST_JOBS) -f tests/pallas_kernels/cpu_bodies/Makefile \
	INCLUDE="$$($(BIN)/python -c 'import jax; print(jax.ffi.include_dir())')"

sanitize: .venv/run.stamp
	$(BODIES_CHECK) OUT=build/sanitize FLAGS="-O1 -g -fno-omit-frame-pointer \
		-fsanitize=address,undefined -fno-sanitize-recover=all"
	UBSAN_OPTIONS=print_stacktrace=1 build/sanitize/check 300 1

# Compiled for arm64 here, and run in an emulator of it.
cross-arm64: .venv/run.stamp
	$(BODIES_CHECK) OUT=build/arm64 CXX=aarch64-linux-gnu-g++ FLAGS="-O2 -Wall -Wextra -Werror"
	qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu build/arm64/check 60 1

test-without-bodies: .venv/made.stamp
	TEST_JOBS=$(TEST_JOBS) .ci/test_without_bodies $(BIN)/python build/without-bodies

bench: .venv/test.stamp
	$(BIN)/pallasite pull smollm2-135m
	mkdir -p build/bench
	for b in serving offline startup memory depth adapters speculation; do \
		$(BIN)/python -m benchmarks.$$b --output build/bench/$$b.json || exit; done

# Chips that are not there are compiled for; the GPU's compiler is that of compile-gpu.
bench-kernels: .venv/test.stamp .venv/bench.stamp build/cuda/made.stamp
	mkdir -p build/bench
	$(BIN)/python -m benchmarks.kernels --target tpu:v5e --target tpu:v6e --target tpu:v7x \
		--target gpu:h100 --target gpu:b200 --against jax --gpu-python build/cuda/venv/bin/python \
		--document docs/kernels.md --plot docs/kernels.png --output build/bench/kernels.json

# Other engines, each in an environment of its own; one that does not install is reported.
peers: .venv/run.stamp
	$(BIN)/pallasite pull smollm2-135m
	$(BIN)/python -m benchmarks.peers.install

compare: .venv/bench.stamp peers
	mkdir -p build/bench
	$(BIN)/python -m benchmarks.compare --output build/bench/compare.json \
		--plot docs/cpu.png --document docs/cpu.md

step-cost: .venv/bench.stamp
	$(BIN)/pallasite pull smollm2-135m
	mkdir -p build/bench
	$(BIN)/python -m benchmarks.step_cost --output build/bench/step_cost.json \
		--plot docs/step_cost.png --document docs/cpu.md

models: .venv/test.stamp
	$(BIN)/pallasite pull smollm2-135m
	$(BIN)/python -m tests.parity.report

# torch has an environment of its own, so that nothing else here ever runs beside it.
parity: .venv/test.stamp build/parity/made.stamp
	$(BIN)/pallasite pull smollm2-135m
	build/parity/venv/bin/python -m tests.parity.make_goldens smollm2-135m build/parity
	$(BIN)/python -m tests.parity.compare build/parity

reliability: .venv/test.stamp
	$(BIN)/pallasite pull smollm2-135m
	$(BIN)/python -m pytest tests/reliability --full --timeout 7200 -s

# No GPU is needed, but its compiler is, of 4.4 GB; it has an environment of its own.
compile-gpu: .venv/test.stamp build/cuda/made.stamp
	$(BIN)/python -m tests.pallas_kernels.gpu_registers build/cuda/venv/bin/python

proto: .venv/test.stamp
	rm -rf build/proto && mkdir -p build/proto
	$(BIN)/python -m grpc_tools.protoc -Ipallasite/proto=proto --python_out=build/proto \
		--pyi_out=build/proto --grpc_python_out=build/proto $(patsubst %,pallasite/%,$(wildcard proto/*.proto))
	cp build/proto/pallasite/proto/* proto/

wheel-check: .venv/run.stamp
	.ci/wheel_check $(BIN)/python

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .compile_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/made.stamp:
	@test -n "$(PYTHON)" || { echo "got no Python >= 3.11 with venv on the PATH; Pallasite needs" \
		"one; install it (on Debian: python3 and python3-venv) or name one:" \
		"make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/run.stamp: .venv/made.stamp pyproject.toml
	$(PIP) -e .
	@touch $@

.venv/test.stamp: .venv/run.stamp
	$(PIP) -e '.[hub,test,tpu]'
	@touch $@

.venv/lint.stamp: .venv/run.stamp
	$(PIP) -e '.[lint]'
	@touch $@

.venv/bench.stamp: .venv/run.stamp
	$(PIP) -e '.[bench]'
	@touch $@

build/parity/made.stamp: .venv/made.stamp pyproject.toml
	mkdir -p build/parity
	$(BIN)/python -m venv build/parity/venv
	build/parity/venv/bin/python -m pip install --disable-pip-version-check -e '.[parity]'
	@touch $@

build/cuda/made.stamp: .venv/made.stamp pyproject.toml
	mkdir -p build/cuda
	$(BIN)/python -m venv build/cuda/venv
	build/cuda/venv/bin/python -m pip install --disable-pip-version-check -e '.[cuda]'
	@touch $@
