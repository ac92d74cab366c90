# make demo    a real photograph, rendered at three focus planes
# make test    the tests, on up to four cores (make test PYTEST="--slow" for all of them)
# make docs    the documentation, in outputs/site
# make tflite  an environment of its own, .venv-tflite, for bokehdiff export compact --format tflite
# make lint    style and types;  make format  puts the style right
#
# PYTHON  the interpreter a new environment is made from (3.10 or newer)
# VENV    the environment to use; one you already have is fine:  make test VENV=/path/to/environment
# PIP     more words for pip, for instance  PIP="--quiet"

PYTHON ?= python3
VENV ?= .venv
PIP ?=
PYTEST ?=

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test lint format install tflite docs
.DEFAULT_GOAL := demo

demo: install
	$(RUN) examples/demo.py

test: install
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(PYTEST)

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy bokehdiff

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# The theme would speak of the next version of mkdocs.
docs: install
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# Its torch is older than that of the library may be, hence apart.
tflite:
	@test -x .venv-tflite/bin/python || $(PYTHON) -m venv .venv-tflite
	.venv-tflite/bin/python -m pip install $(PIP) --editable ".[tflite]" pytest pytest-timeout
	@echo "Now: .venv-tflite/bin/bokehdiff export compact -o compact.tflite --size 1536x1024"

# The stamp holds what was installed and from where, so that pip runs only when one of them changed.
install: $(RUN)
	@{ pwd; cat pyproject.toml; } | cmp -s - $(STAMP) || { \
		echo "Installing bokehdiff and its tools into $(VENV) ..." && \
		$(RUN) -m pip install $(PIP) --editable ".[dev]" && \
		{ pwd; cat pyproject.toml; } > $(STAMP); }

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "bokehdiff needs Python 3.10 or newer; $(PYTHON) is not. Try: make demo PYTHON=python3.12"; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
