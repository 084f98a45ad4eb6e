# Everything a person or a machine runs here. Each target sets up first when it has to; nothing is installed outside .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
SETUP := $(VENV)/.setup
DEV := $(VENV)/.dev
MODELS := .models/.fetched
NATIVE := CMakeLists.txt $(wildcard src/leangrid/kernels/cpu/*)

# What `make bench` and `make race` measure on; your own, such as c4.jsonl and wiki.test.raw: make bench CALIBRATION=... TEXT=...
CALIBRATION ?= self
TEXT ?= embedded
SAMPLES ?= 8
LENGTH ?= 512
# What `make experiments` runs on (experiments/README.md): a size, and data by path, or by name where they can be fetched
SIZE ?= small
C4 ?= c4
WIKITEXT ?= wikitext2
WIKITEXT_TRAIN ?= wikitext2
STORIES ?= .models/stories260k
STS ?=
SQUAD ?= .models/minilm_squad
TASKS_DIR ?=
# Which types `make zoo` tries, all where empty; a number makes it try other configs of them than the usual ones
TYPES ?=
VARY ?=
ZOO := build/zoo$(if $(VARY),-varied/$(VARY))
RESULTS := benchmarks/results
KEEP := $(BIN)/python benchmarks/common/lines.py $(RESULTS)
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: help setup dev models demo demo-all check format test test-slow test-gpu zoo interop bench race experiments docs clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */  make \1|/' | column -t -s '|'

# torch first and alone: plain pip picks the build that belongs to this machine, the rest then fits itself to it
$(SETUP): pyproject.toml constraints.txt $(NATIVE)
	@echo "setting up .venv: what running needs, about 1 GB of packages and the native kernels, two minutes or so the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) scikit-build-core nanobind cmake ninja
	$(PIP) --no-build-isolation --editable .
	@$(BIN)/python -c "from leangrid import kernels; print('leangrid is installed, kernels:', kernels.backend())"
	@touch $@

# The packages of one extra of pyproject.toml, without building leangrid again
EXTRA = $(BIN)/python -c "import sys, tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'][sys.argv[1]], sep='\n')" $(1) > $(VENV)/$(1).txt \
	&& $(PIP) --requirement $(VENV)/$(1).txt
$(DEV): $(SETUP)
	@echo "the tools of development: about 1 GB of packages more"
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) triton==3.9.0  # a CUDA build of torch has brought the one it was built for
	$(call EXTRA,dev)
	@touch $@

$(MODELS): scripts/fetch_models.py | $(SETUP)
	$(BIN)/python scripts/fetch_models.py
	@touch $@

setup: $(SETUP)  ## .venv with the package and its native kernels
dev: $(DEV)  ## .venv with the tools of development too, as every target below that needs them
models: $(MODELS)  ## the two small models that the demo and the tests use, into .models
demo: $(SETUP) $(MODELS)  ## quantize SmolLM2-135M in 4 bits, let it answer, compare with GPTQ and rounding; leaves demo/
	$(BIN)/python examples/demo.py
demo-all: $(SETUP) $(MODELS)  ## the same nine ways, in 3 and 4 bits, a quarter of an hour
	$(BIN)/python examples/demo.py --all
check: $(DEV)  ## format, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py
format: $(DEV)  ## let ruff write the format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
test: $(DEV) $(MODELS)  ## the fast suite, and the GPU kernels in Triton's interpreter
	$(PARALLEL) -m "not slow and not gpu and not zoo"
	TRITON_INTERPRET=1 $(PARALLEL) -m "gpu and not slow" tests/gpu
test-slow: $(DEV) $(MODELS)  ## the slow tests: real models, every power cut, protections taken away, kernels under sanitizers
	$(BIN)/python -m pytest -q -m "slow and not gpu"
	$(BIN)/python scripts/mutants.py
	$(BIN)/python scripts/sanitize.py
test-gpu: $(DEV)  ## the GPU kernels: on the GPU, or anywhere with TRITON_INTERPRET=1
	$(BIN)/python -m pytest -q -m gpu tests/gpu
zoo: $(DEV)  ## every model type of transformers, tiny, from its checkpoint to plain transformers; some: make zoo TYPES="gpt_oss phi"; other configs: VARY=1
	rm -rf $(ZOO)
	status=0; TYPES="$(TYPES)" VARY="$(VARY)" ZOO_RESULTS=$(ZOO) $(PARALLEL) tests/zoo || status=$$?; \
		$(BIN)/python scripts/models_page.py $(if $(VARY),--counts )$(ZOO); exit $$status
interop: $(DEV) $(MODELS)  ## every format in its engine, beside our own model; installs the engines in .peers (12 GB, needs a network)
	$(BIN)/python benchmarks/interop.py --out $(RESULTS)/interop.jsonl
	test ! -x .peers/llama/bin/python || LLAMA_PYTHON=$(abspath .peers/llama/bin/python) $(BIN)/python -m pytest -q tests/interop/test_llama.py
bench: $(DEV) $(MODELS)  ## kernels, decoding, time and quality on the CPU, a quarter of an hour; then the tables (benchmarks/README.md)
	$(BIN)/python benchmarks/kernels_cpu.py --repeats 3 | $(KEEP)/kernels_cpu.jsonl
	$(BIN)/python benchmarks/grid_search.py | $(KEEP)/grid_search.jsonl
	$(BIN)/python benchmarks/decode_cpu.py layers | $(KEEP)/decode_cpu.jsonl
	$(BIN)/python benchmarks/scaling.py --small --repeats 2 --out $(RESULTS)/scaling.jsonl
	$(BIN)/python benchmarks/quantize_time.py --samples $(SAMPLES) --length $(LENGTH) --rounds 1 --out $(RESULTS)/quantize_time.jsonl
	$(BIN)/python benchmarks/quality.py --calibration $(CALIBRATION) --text $(TEXT) --samples $(SAMPLES) --length $(LENGTH) --windows 12 \
		--schemes W4A16_G64,NU4 --variants default --out $(RESULTS)/quality.jsonl
	$(BIN)/python benchmarks/table.py
race: $(DEV) $(MODELS)  ## against GPTQModel, llm-compressor and AutoRound, side by side; installs them in .peers (5 GB, needs a network)
	$(BIN)/python benchmarks/race.py --calibration $(CALIBRATION) --text $(TEXT) --out $(RESULTS)/race.jsonl
experiments: $(DEV) $(MODELS)  ## the paper's experiments: SIZE=small here, in a good hour; SIZE=paper on a GPU; goes on where it was stopped
	$(BIN)/python experiments/run.py --size $(SIZE) --c4 $(C4) --wikitext $(WIKITEXT) --wikitext-train $(WIKITEXT_TRAIN) \
		--stories $(STORIES) --squad $(SQUAD) $(if $(STS),--sts $(STS)) $(if $(TASKS_DIR),--tasks-dir $(TASKS_DIR))
	$(BIN)/python benchmarks/table.py
# mkdocs and its theme are installed here, where they are needed, and nowhere else
$(VENV)/.docs: $(DEV)
	$(call EXTRA,docs)
	@touch $@
docs: $(VENV)/.docs  ## the generated tables and figures again from the results, then the site, into site/
	$(BIN)/python benchmarks/table.py
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python scripts/reliability.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site  # the notice is in docs/decisions/0017
	@echo "site/index.html"
clean:  ## what make made, except .venv and .models
	rm -rf build site demo .pytest_cache .ruff_cache .hypothesis
