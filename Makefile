PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo cards compare test quality style
help:  ## show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

.venv/installed: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: .venv/installed  ## fine-tune a small CLIP several ways and compare what they gain and keep
	$(BIN)/python examples/demo/demo.py

cards: .venv/installed  ## run the demo, and write its figures into model_cards/
	$(BIN)/python examples/demo/demo.py --cards model_cards

compare: .venv/installed  ## compare all methods on the demo's drawings, over three seeds (an hour)
	$(BIN)/python examples/demo/data.py
	$(BIN)/python examples/benchmarks/compare_methods.py --config examples/configs/compare_methods.yaml

test: .venv/installed  ## run the tests, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

quality: .venv/installed  ## lint, check the formatting and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: .venv/installed  ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
