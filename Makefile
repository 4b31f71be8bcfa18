# make demo   sets up .venv, then converts the embedded model from 8 to 2 KV heads and reports
# make test   sets up .venv, then runs the tests
# make quick  a part of every folder of tests, in under two minutes
# make lint   ruff and mypy, as CI runs them
# make kernels   the Triton kernels: values in the interpreter; launched and compiled for four GPUs, none of which need be here
# make bench   attention against its peers on this CPU, about 14 minutes, to results/<device>/bench.json
# make bench-gpu PART=1/3   the same on a GPU, its kernels' tests first; parts take under nine minutes
# make gpu-day   what is worth knowing of a GPU, in nine minutes, without an install
# make gpu-cache   its kernels, compiled here for ARCH=sm_90 to runs/gpu-cache.zip, by GPU_PYTHON's Triton
# make gpu-versions   .venv-gpu-versions: the oldest torch, Triton and transformers, and the tests that need them
# make real   what the documentation claims, on SmolLM2-135M and English text, which it fetches: hours; goes on after a stop
# make docs   runs the documentation's examples and builds it as a site, to site/; make pages: its tables and figures, from results/ and the code
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := $(VENV)/.peers-installed
GPU    := $(VENV)/.gpu-peers-installed
DOCS   := $(VENV)/.docs-installed
REAL   := $(VENV)/.gguf-installed
PART   ?= 1/1
DEMO   ?= runs/demo
DAY    ?=
ARCH   ?= sm_90
GPU_PYTHON   ?= $(PYTHON)
GPU_VENV     ?= .venv-gpu-versions
GPU_VERSIONS := $(GPU_VENV)/.installed
# what the oldest versions have to pass: kernels interpreted and launched, swaps, generation, packed caches, conformance
GPU_TESTS    ?= tests/kernels tests/surgery/test_swap.py tests/quant/test_quant_generate.py tests/patterns/test_conformance.py

.PHONY: demo test quick bench bench-gpu gpu-day gpu-cache gpu-versions real docs pages readme-figures lint kernels setup \
	clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/python recipes/convert_gqa.py --model embedded --kv-heads 2 --uptrain-tokens 100_000 --output $(DEMO)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal

$(PEERS) $(GPU) $(DOCS) $(REAL): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRA)]"
	touch $@

$(PEERS): EXTRA = bench
$(GPU): EXTRA = bench-gpu
$(DOCS): EXTRA = docs
$(REAL): EXTRA = gguf

quick: $(STAMP)
	$(BIN)/python -m pytest -m quick -n auto --dist worksteal

bench: $(PEERS)
	$(BIN)/python recipes/bench.py --device cpu

bench-gpu: $(GPU)
	$(BIN)/python recipes/bench.py --device cuda --part $(PART)

gpu-day:
	$(PYTHON) recipes/gpu_day.py $(DAY)

gpu-cache: $(GPU_VERSIONS)
	$(GPU_VENV)/bin/python recipes/gpu_day.py --build-cache runs/gpu-cache.zip --arch $(ARCH)

$(GPU_VERSIONS): pyproject.toml .ci/gpu-versions.txt
	test -x $(GPU_VENV)/bin/python || $(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r .ci/gpu-versions.txt
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

gpu-versions: $(GPU_VERSIONS)
	$(GPU_VENV)/bin/python -m pytest -m 'not slow' -n auto --dist worksteal $(GPU_TESTS)

# ARGS="--only caches --model M --text FILE", and so on; at low priority, since it takes hours.
real: $(REAL)
	nice $(BIN)/python -m bench.real $(ARGS)

# Strict: a broken link or a name that is not there fails.
docs: $(DOCS)
	$(BIN)/python -m pytest -m example -n auto tests/docs
	$(BIN)/mkdocs build --strict --quiet

pages readme-figures: $(STAMP)
	$(BIN)/python -m bench.docs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy

kernels: $(STAMP)
	$(BIN)/python -m pytest -m '(launch or interpreted) and not slow' -n auto --dist worksteal \
		tests/kernels tests/patterns tests/bench/test_gpu_day.py
	$(BIN)/effattn kernels

clean:
	rm -rf $(VENV) runs build dist site *.egg-info
