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

OLDEST = .venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt
OLDEST_TESTS = tests/test_rules.py tests/test_blocks.py tests/test_checkpoint.py tests/test_laws.py \
	tests/test_torch_optimizer.py tests/test_torch_compiled.py tests/test_jax_transformation.py tests/test_jax_wrapped.py

.PHONY: demo test slow newest oldest lint docs gpu release clean

# as many processes as there are cores, with one thread each: more would wait for each other
test slow newest oldest: export OMP_NUM_THREADS = 1
# XLA compiles in a third of the time; of the pinned version alone, as others may not know a flag and die of it
test: export XLA_FLAGS = --xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 \
	--xla_llvm_disable_expensive_passes=true

demo: .venv-demo/ready ## train on handwritten digits from step sizes that are far too small
	.venv-demo/bin/python -m metaopt demo

test: .venv/ready ## run all tests but those that are slow
	.venv/bin/python -m pytest -n auto --dist loadgroup --durations 25

slow: .venv/ready ## run the tests that are slow
	.venv/bin/python -m pytest -n auto --dist loadgroup -m slow

newest: ## run tests of the adapters on the newest PyTorch and JAX, those newer than the pinned ones
	$(PYTHON) -m venv .venv-newest
	$(NEWEST) pip
	$(NEWEST) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch jax
	$(NEWEST) --editable . --group newest
	$(call unless-pinned,torch,tests/test_torch_compiled.py tests/test_torch_optimizer.py)
	$(call unless-pinned,jax,tests/test_jax_transformation.py tests/test_jax_wrappers.py)

oldest: ## run tests on the oldest packages that the project says it runs with
	$(PYTHON) -m venv --clear .venv-oldest
	$(OLDEST) --upgrade pip
	$(OLDEST) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(OLDEST) --editable ".[torch,jax]" --group newest
	.venv-oldest/bin/python -m pytest -n auto $(OLDEST_TESTS)

lint: .venv/ready ## style and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs: .venv-docs/ready ## make the site, docs/_build/html/index.html, and look at every page
	.venv-docs/bin/python -m sphinx -q -W --keep-going -c docs . docs/_build/html
	.venv-docs/bin/python -m pytest tests/test_site.py

gpu: .venv-gpu/ready ## all that wants a GPU, in at most 25 minutes; again to go on
	.venv-gpu/bin/python -m benchmarks.gpu $(if $(DATA),--data $(DATA))

release: ## build what a release publishes, and check it in an environment of its own
	rm -rf dist
	$(PYTHON) -m venv --clear .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check build twine check-wheel-contents
	.venv-release/bin/python -m build
	.venv-release/bin/twine check --strict dist/*
	.venv-release/bin/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv --clear .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	.venv-release/bin/python tests/distribution.py dist

clean:
	rm -rf docs/_build docs/_gallery .venv-docs .venv-gpu .venv-release .venv .venv-newest .venv-oldest .venv-demo metaopt-demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv-demo/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-demo
	.venv-demo/$(INSTALL) --editable ".[demo]"
	touch $@

.venv-docs/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/$(INSTALL) --upgrade pip
	.venv-docs/$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	.venv-docs/$(INSTALL) --editable ".[demo,torch,jax]" --group docs
	touch $@

.venv-gpu/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-gpu
	.venv-gpu/$(INSTALL) --upgrade pip
	.venv-gpu/$(INSTALL) torch "jax[cuda12]" cupy-cuda12x
	.venv-gpu/$(INSTALL) --editable ".[learning]" --group test
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	.venv/$(INSTALL) --upgrade pip
	.venv/$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	.venv/$(INSTALL) --editable . --group dev
	touch $@
