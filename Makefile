# Both targets make their own environment; nothing needs to be installed but Python 3.11 or newer.
PYTHON ?= python3
# CPU builds of PyTorch for the tests, gigabytes smaller; empty for the public index alone
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

INSTALL = bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean

demo: .venv-demo/ready ## train on handwritten digits from step sizes that are far too small
	.venv-demo/bin/python -m metaopt demo

test: .venv/ready ## run all tests
	.venv/bin/python -m pytest -n auto

lint: .venv/ready ## style and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-demo metaopt-demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv-demo/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-demo
	.venv-demo/$(INSTALL) --editable ".[demo]"
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	.venv/$(INSTALL) --upgrade pip
	.venv/$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	.venv/$(INSTALL) --editable . --group dev
	touch $@
