# What a developer runs. Needs Python 3.10 or newer and make; everything else goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
SECONDS ?= 120
# Tests wait more than they compute: more of them at once than there are cores.
JOBS ?= 3

python = $(VENV)/bin/python
pip = $(python) -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test lint types demo bench soak clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "ARGS are handed on (make test ARGS='-k codec'); PYTHON and VENV choose the interpreter and the folder."
	@echo "JOBS is how many tests run at once, 0 for one after the other in this process."
	@echo "SECONDS is for how long soak makes faults."
	@echo "PG_LAYER_TEST_DSN is the server that the tests use, instead of one of their own."

venv: $(VENV)/.installed-dev ## install the project and what its development needs

test: $(VENV)/.installed-dev ## run the tests against a PostgreSQL server of their own
	PYTHONDEVMODE=1 $(python) -m pytest -n $(JOBS) --dist loadscope $(ARGS)

lint: $(VENV)/.installed-dev ## check style and formatting
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/.installed-dev $(VENV)/.installed-bench $(VENV)/.installed-browser ## check the types
	$(python) -m mypy

demo: $(VENV)/.installed-demo ## run the chat in two processes, with a PostgreSQL server of its own
	$(python) -m example.demo $(ARGS)

bench: $(VENV)/.installed-bench ## measure the layer against its peers
	$(python) -m benchmarks $(ARGS)

soak: $(VENV)/.installed-dev ## make faults for a while, and account for every message
	$(python) -m soak --seconds $(SECONDS) $(ARGS)

clean: ## remove the virtual environment and whatever was built
	rm -rf "$(VENV)" build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .demo .bench
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp for each set of extras. They share one environment, so that the sets may come in any order.
$(VENV)/.installed-%: pyproject.toml $(VENV)/.created
	$(pip) install --editable ".[$*]"
	@touch "$@"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed; $(PYTHON) is not. Name another one: make PYTHON=python3.13 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -m venv "$(VENV)" || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	$(pip) install "pip>=21.3"
	@touch "$@"
