# make demo   sets up .venv, then converts the embedded model from 8 to 2 KV heads and reports
# make test   sets up .venv, then runs the tests
# make lint   ruff, as CI runs it
# make kernels   compiles the Triton kernels for four GPUs, none of which need be here
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   ?= runs/demo

.PHONY: demo test lint kernels setup clean

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

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

kernels: $(STAMP)
	$(BIN)/effattn kernels

clean:
	rm -rf $(VENV) runs build dist *.egg-info
