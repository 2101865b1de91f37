# make train: train a small LLaVA on questions about synthetic scenes.   make test: lint, types, all tests.
# Targets install what they need. Prerequisites: make, and Python 3.11 to 3.14.

usable = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c '$(usable)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
MMLAB := $(BIN)/mmlab
DATA := data/shapes
SCENES := --max-objects 2 --kinds circle square triangle --types color shape count yesno --single-types color shape

.PHONY: setup train test check tests docs format bench clean
.DELETE_ON_ERROR:

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 is required; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Shards → small backbones → alignment → finetuning → answers. Completed steps are skipped.
train: setup $(DATA)/train/index/manifest.json $(DATA)/val/index/manifest.json $(DATA)/test/index/manifest.json $(DATA)/tokenizer/tokenizer.json
	$(MMLAB) train experiment=llava/vision_tiny
	$(MMLAB) train experiment=llava/language_tiny
	$(MMLAB) train experiment=llava/align_tiny
	$(MMLAB) train experiment=llava/finetune_tiny
	$(MMLAB) eval run=llava/finetune_tiny data.path=$(DATA)/test data.train_from=$(DATA)/train

$(DATA)/train/index/manifest.json: | setup
	$(MMLAB) shards build shapes $(DATA)/train --count 12000 $(SCENES) --overwrite

$(DATA)/val/index/manifest.json: | setup
	$(MMLAB) shards build shapes $(DATA)/val --split val --count 200 $(SCENES) --overwrite

$(DATA)/test/index/manifest.json: | setup
	$(MMLAB) shards build shapes $(DATA)/test --split test --count 630 $(SCENES) --overwrite

$(DATA)/tokenizer/tokenizer.json: $(DATA)/train/index/manifest.json
	$(MMLAB) shards tokenizer $(DATA)/train --out $(DATA)/tokenizer

# pyright needs one core and runs beside the tests.
test: setup
	$(MAKE) --no-print-directory --jobs=2 check tests

# Three workers on two cores: tests of SLURM jobs and of killed runs mostly wait. The tests of a file share what they
# train, so one worker runs them all.
tests: setup
	$(BIN)/pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The documentation as a site in site/; fails on a broken link or anchor, and on a page that needs a network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/all_contests.py

clean:
	rm -rf .venv data/shapes runs site
