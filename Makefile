# Both targets make their own environment; nothing needs to be installed but Python 3.11 or newer.
PYTHON ?= python3
# CPU builds of PyTorch for the tests, gigabytes smaller; empty for the public index alone
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

INSTALL = bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

NEWEST = .venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade
# run tests unless the package is the very version that all tests run with
unless-pinned = version=$$(.venv-newest/bin/python -c "import $(1); print($(1).__version__.split('+')[0])"); \
	if grep --quiet --line-regexp "$(1)==$$version" constraints.txt; \
	then echo "$(1) $$version is the pinned one"; \
	else .venv-newest/bin/python -m pytest -n auto $(2); fi

.PHONY: demo test newest lint clean

demo: .venv-demo/ready ## train on handwritten digits from step sizes that are far too small
	.venv-demo/bin/python -m metaopt demo

test: .venv/ready ## run all tests
	.venv/bin/python -m pytest -n auto

newest: ## run tests of the adapters on the newest PyTorch and JAX, those newer than the pinned ones
	$(PYTHON) -m venv .venv-newest
	$(NEWEST) pip
	$(NEWEST) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch jax
	$(NEWEST) --editable . --group newest
	$(call unless-pinned,torch,tests/test_torch_compiled.py tests/test_torch_optimizer.py)
	$(call unless-pinned,jax,tests/test_jax_transformation.py tests/test_jax_wrappers.py)

lint: .venv/ready ## style and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-newest .venv-demo metaopt-demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

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
