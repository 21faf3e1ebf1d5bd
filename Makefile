# make demo   install and draw a picture with the bundled model
# make test   install and run every check
# make docs   build the documentation site in build/site, with every link checked
# make release-check   build the release, install it in an empty environment and draw with it
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint check docs release-check clean

demo: $(VENV)/.installed
	$(BIN)/scale-rae t2i --model-path shapes --prompt "Can you generate a photo of a blue cross and a pink square?"
	@echo 'next: source $(BIN)/activate   (then `scale-rae --help`, `python cli.py --help`; without it: $(BIN)/scale-rae --help)'

test: lint docs check

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases benchmarks
	$(BIN)/mypy scripts
	$(BIN)/hadolint Dockerfile

# Compiled modules are kept even where the environment says otherwise: tests start many programs.
check: $(VENV)/.installed-dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/site.py
	$(BIN)/zensical build --strict

release-check: $(VENV)/.installed-dev
	$(BIN)/python scripts/release_check.py

# What is tested is what constraints.txt pins. Torch's CPU build is enough for everything but speed.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
