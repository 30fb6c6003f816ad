# `make demo`: install into .venv and run the main job. `make test`: install and pass the tests. Both reuse what is there.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# The first sentence a user reads should be about them, not about pip.
SAY = @printf '%s\n'

.PHONY: demo test test-all coverage lint book readme bench clean help

help:
	@printf 'make demo      train, quantize, compare (results in checkpoints/demo)\nmake test      the tests\nmake test-all  the tests, the long ones too\nmake book      export, run and clean the notebooks; README.md\nmake bench     the benchmarks\nmake lint      ruff\n'

.venv/.base: pyproject.toml constraints.txt
	$(SAY) 'Installing qtlm into .venv (once) ...'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.base
	$(SAY) 'Installing what the tests need into .venv (once) ...'
	@$(PIP) -e '.[dev]'
	@touch $@

demo: .venv/.base
	@$(BIN)/qtlm demo $(ARGS)

test: .venv/.dev
	@$(BIN)/python -m pytest -q -m 'not slow' $(ARGS)

test-all: .venv/.dev
	@$(BIN)/python -m pytest -q $(ARGS)

coverage: .venv/.dev
	@$(BIN)/python -m pytest -q -m 'not slow' --cov=qtlm --cov-report=term-missing:skip-covered $(ARGS)

lint: .venv/.dev
	@$(BIN)/ruff check .

book: .venv/.dev
	@$(BIN)/nbdev-export
	@$(BIN)/python docs/cells.py run nbs/*.ipynb
	@$(BIN)/python docs/readme.py

readme: .venv/.dev
	@$(BIN)/python docs/readme.py

bench: .venv/.dev
	@for b in training inference accuracy; do $(BIN)/python benchmarks/$$b.py || exit 1; done

clean:
	@rm -rf .venv _docs _proc build *.egg-info
