# Two commands for people: `make quickstart` and `make test`. Both set up .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: quickstart test test-slow audit benchmark docs gpu lint format

quickstart: $(INSTALLED)
	$(BIN)/hf-circuit-sparsity quickstart $(ARGS)

test: lint
	$(BIN)/python -m pytest -q --numprocesses logical --dist loadfile $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow $(ARGS)

audit: $(INSTALLED)
	$(BIN)/python .ci/audit.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by the constraints: left to the resolver it may come as another build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# The site, into build/site; a broken link is an error.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

benchmark: $(INSTALLED)
	$(BIN)/python -m benchmarks.speed $(ARGS)

# With the Python of the machine that has the GPU; see benchmarks/README.md for what it must hold.
gpu:
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh runs/gpu $(ARGS)
