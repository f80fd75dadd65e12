# `make` lists the targets. Each makes .venv first if it is not there; a machine with Python 3.11 or newer is enough.
PYTHON ?= python3
BIN := .venv/bin
OUT := demo-out

.DEFAULT_GOAL := help
.PHONY: help demo map test lint types weights bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q fusecli  # an editable install does not, and some shells forbid it later: 40 ms a start
	touch $@

demo: .venv/installed  ## fuse the sample pair, show what came out, and fuse 24 more
	@mkdir -p $(OUT)
	$(BIN)/fusecli fuse sample_data/regions.npy sample_data/text.npy -w sample_data/fusion.safetensors -o $(OUT)/fused.npy -a $(OUT)/attention.safetensors --tokens sample_data/tokens.json
	@$(BIN)/fusecli inspect sample_data/regions.npy sample_data/text.npy $(OUT)/fused.npy $(OUT)/attention.safetensors
	$(BIN)/fusecli show $(OUT)/attention.safetensors
	$(BIN)/fusecli show $(OUT)/attention.safetensors --image sample_data/image.png --fit contain -o $(OUT)/map.html
	$(BIN)/fusecli batch sample_data/pairs/images sample_data/pairs/texts -w sample_data/fusion.safetensors -o $(OUT)/pairs --overwrite

map: .venv/installed  ## draw the README's map of the sample picture
	@mkdir -p $(OUT)
	$(BIN)/fusecli fuse sample_data/patches.npy sample_data/text.npy -w sample_data/fusion.safetensors -o $(OUT)/fused.npy -a $(OUT)/patches.safetensors --tokens sample_data/tokens.json
	$(BIN)/fusecli show $(OUT)/patches.safetensors --image sample_data/image.png --fit contain -o docs/map.png

test: .venv/installed  ## run all tests, on up to 8 cores
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

lint: .venv/installed  ## ruff and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/installed  ## mypy, strict
	$(BIN)/mypy

weights: .venv/installed  ## train the demo's checkpoint: make weights DATA=folder (regions and texts)
	@test -n "$(DATA)" || { echo "make weights DATA=folder" >&2; exit 2; }
	@mkdir -p $(OUT)
	$(BIN)/fusecli train $(DATA)/regions.safetensors $(DATA)/texts.safetensors -o $(OUT)/trained.safetensors --no-bfloat16 --overwrite
	$(BIN)/fusecli convert $(OUT)/trained.safetensors -o sample_data/fusion.safetensors --dtype float16

bench: .venv/installed  ## measure and print ratios (minutes; leave the machine alone)
	$(BIN)/python -m benchmarks

clean:  ## remove all that make made
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf .venv $(OUT) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
