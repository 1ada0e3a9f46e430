# make demo    set up .venv and run the main job
# make test    set up .venv and run all tests
# make check   lint and type check
# make fuzz    random programs against eager: SECONDS=600 SEED=1000
# make bench   benchmarks, and the README's tables from them
# make zoo     all model types of transformers, in two dtypes (long); fails where fewer are right or recognised than before
# make drift   the sample of the zoo under another version of transformers, too (DRIFT=5.17.0)

# Torch goes in first and by its exact version: without one, pip may choose a build with several GB of CUDA packages.
TORCH  ?= 2.13.0
TRITON ?= 3.7.1
PYTHON ?= python3
SECONDS ?= 600
SEED    ?= 1000
DRIFT  ?= 5.17.0
JOBS   ?= 2

BIN   := .venv/bin
# Another version is another set-up.
READY := .venv/.ready-$(TORCH)-$(TRITON)
PIP   := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check fuzz bench zoo drift clean

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

# The new results are kept only if nothing is lost: `git diff bench/results` then shows what was gained.
zoo: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/graphopt zoo --jobs $(JOBS) --short zoo.new.json \
		--baseline bench/results/zoo.json --golden tests/models/golden_zoo.json
	mv zoo.new.json bench/results/zoo.json
	$(BIN)/python -m bench.report

# Without types, all of the zoo: make drift SAMPLE=
SAMPLE ?= llama gemma3 qwen3_moe gpt2 gpt_neox bloom falcon deepseek_v3 t5 bert deberta-v2 modernbert vit whisper
drift: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/graphopt zoo --jobs $(JOBS) --dtype float32 --drift $(DRIFT) $(SAMPLE)

# A CUDA build of torch brings its own triton, a CPU build brings none.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install "torch==$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install "triton==$(TRITON)"
	$(PIP) install -e ".[test]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
