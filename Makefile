PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo cards compare docs test test-long quality style build
help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# The demo needs less than the tests, so it is installed alone where it comes first. What is imported is compiled then,
# and kept, whatever the shell says: else every process of the tests would compile it anew.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable
.venv/demo: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) ".[demo]"
	@touch $@

.venv/installed: .venv/demo
	$(PIP) ".[dev]"
	@touch $@

demo: .venv/demo  ## fine-tune a small CLIP several ways and compare what they gain and keep: three minutes
	$(BIN)/python examples/demo/demo.py

compare: .venv/demo  ## compare all methods on the demo's drawings, over three seeds: an hour and a half; goes on where it stopped
	$(BIN)/python examples/demo/data.py
	$(BIN)/hf-robust compare --config examples/configs/compare_methods.yaml

cards: compare  ## write the figures of the comparison into model_cards/
	cp runs/compare/cards/aclip.md model_cards/a_clip.md
	cp runs/compare/cards/radapter.md model_cards/r_adapter.md
	cp runs/compare/cards/lp-ft.md model_cards/lp_ft.md
	cp runs/compare/cards/full+lipsum-ft.md model_cards/lipsum_ft.md
	cp runs/compare/cards/full+car-ft.md model_cards/car_ft.md
	cp runs/compare/cards/full+ldifs.md model_cards/ldifs.md
	cp runs/compare/cards/full+l2-sp.md model_cards/l2_sp.md
	cp runs/compare/cards/flyp+starft.md model_cards/starft.md
	cp runs/compare/cards/context+ogen.md model_cards/ogen.md
	cp runs/compare/cards/full+similarity.md model_cards/similarity_loss.md
	cp runs/compare/cards/saft-per-tensor-0.01.md model_cards/saft.md
	cp runs/compare/cards/full+wise-ft.md model_cards/wise_ft.md

docs: .venv/installed  ## build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

test: .venv/installed  ## run the tests, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

test-long: .venv/installed  ## kill the trainer, and fail the disk, at every call by which a checkpoint is saved: an hour
	HF_ROBUST_LONG=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/training/test_trainer_faults.py

quality: .venv/installed  ## lint, check the formatting and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: .venv/installed  ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: .venv/installed  ## build wheel and sdist into dist/
	rm -rf dist
	$(BIN)/python -m build
