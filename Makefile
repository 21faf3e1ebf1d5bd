# make demo   install into .venv and draw a picture with the bundled model
# make test   install and run every check
# make docs   build the documentation site in build/site, with every link checked
# make release-check   build the release, install it in an empty environment and draw with it
# PYTHON=python3.12 takes another Python, TORCH_INDEX=URL another index for PyTorch, such as that of its builds without CUDA
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
# Python code that ends with a message under a Python that is too old; any Python can run it.
NEW_ENOUGH := import sys; sys.version_info >= (3, 11) or sys.exit("error: %s is Python %d.%d, but 3.11 or newer is needed; give \
	another one: make demo PYTHON=python3.12 (first rm -r $(VENV), if it exists)" % ((sys.executable,) + sys.version_info[:2]))

.PHONY: demo test lint check docs release-check clean

demo: $(VENV)/.installed
	@echo 'drawing on the CPU: "Can you generate a photo of a blue cross and a pink square?"'
	$(BIN)/scale-rae t2i "Can you generate a photo of a blue cross and a pink square?" --model-path shapes --device cpu \
		--guidance-level 5 --upscale --output outputs/demo.png --overwrite
	@echo 'The picture is outputs/demo.png. Open it, then try a prompt of your own:'
	@echo '    source $(BIN)/activate'
	@echo '    scale-rae t2i "Show me a green star and a purple heart." --model-path shapes --guidance-level 5 --upscale'

test: lint docs check

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases benchmarks integrations
	$(BIN)/mypy scripts
	$(BIN)/hadolint Dockerfile

# Compiled modules are kept even where the environment says otherwise: tests start many programs.
check: $(VENV)/.installed-dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/site.py
	$(BIN)/zensical build --strict --config-file build/zensical.toml

release-check: $(VENV)/.installed-dev
	$(BIN)/python scripts/release_check.py

# What is tested is what constraints.txt pins. Torch's CPU build is enough for everything but speed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo 'installing into $(VENV); PyTorch is the largest part of the download'
	@if test -x $(BIN)/python; then $(BIN)/python -c '$(NEW_ENOUGH)'; else $(PYTHON) -c '$(NEW_ENOUGH)'; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install "$(shell grep ^torch== constraints.txt)" --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo 'installing what the tests need'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
