# make demo    set up .venv and run the main job
# make test    set up .venv and run all tests
# make check   lint and type check
# make fuzz    random programs against eager: SECONDS=600 SEED=1000
# make bench   benchmarks, and the README's tables from them

# Torch goes in first and by its exact version: without one, pip may choose a build with several GB of CUDA packages.
TORCH  ?= 2.13.0
TRITON ?= 3.7.1
PYTHON ?= python3
SECONDS ?= 600
SEED    ?= 1000
JOBS   ?= 2

BIN   := .venv/bin
# Another version is another set-up.
READY := .venv/.ready-$(TORCH)-$(TRITON)
PIP   := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check fuzz bench clean

demo: $(READY)
	$(BIN)/python -m graphopt.tools.demo

# Model tests spend their time compiling in Python: two processes of one thread beat one process of two threads.
# Triton interprets or compiles, never both in one process: two runs, and the first fails early.
test: $(READY)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests/kernels_interpret
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Each failure prints its seed and the command that shows it again.
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --seconds $(SECONDS) --seed $(SEED)

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_passes
	$(BIN)/python -m bench.bench_models --inductor
	$(BIN)/python -m bench.bench_compile
	$(BIN)/python -m bench.report

# A CUDA build of torch brings its own triton, a CPU build brings none.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install "torch==$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install "triton==$(TRITON)"
	$(PIP) install -e ".[test]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
