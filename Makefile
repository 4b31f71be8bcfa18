# make demo   sets up .venv, then converts the embedded model from 8 to 2 KV heads and reports
# make test   sets up .venv, then runs the tests
# make quick  a part of every folder of tests, in under two minutes
# make lint   ruff and mypy, as CI runs them
# make kernels   launches and compiles the Triton kernels for four GPUs, none of which need be here
# make bench   attention against its peers on this CPU, about 14 minutes, to results/<device>/bench.json
# make bench-gpu PART=1/3   the same on a GPU, its kernels' tests first; parts take under nine minutes
# make docs   the documentation as a site, to site/; make pages: its tables and figures, from results/ and the code
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := $(VENV)/.peers-installed
GPU    := $(VENV)/.gpu-peers-installed
DOCS   := $(VENV)/.docs-installed
PART   ?= 1/1
DEMO   ?= runs/demo

.PHONY: demo test quick bench bench-gpu docs pages readme-figures lint kernels setup clean

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

$(PEERS) $(GPU) $(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRA)]"
	touch $@

$(PEERS): EXTRA = bench
$(GPU): EXTRA = bench-gpu
$(DOCS): EXTRA = docs

quick: $(STAMP)
	$(BIN)/python -m pytest -m quick -n auto --dist worksteal

bench: $(PEERS)
	$(BIN)/python recipes/bench.py --device cpu

bench-gpu: $(GPU)
	$(BIN)/python recipes/bench.py --device cuda --part $(PART)

# Strict: a broken link or a name that is not there fails.
docs: $(DOCS)
	$(BIN)/mkdocs build --strict --quiet

pages readme-figures: $(STAMP)
	$(BIN)/python -m bench.docs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels: $(STAMP)
	$(BIN)/python -m pytest -m 'launch and not slow' -n auto --dist worksteal tests/kernels
	$(BIN)/effattn kernels

clean:
	rm -rf $(VENV) runs build dist site *.egg-info
