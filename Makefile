# `make demo`: install into .venv and run the main job. `make test`: install and pass the tests. Both reuse what is there.
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# The first sentence a user reads should be about them, not about pip.
SAY = @printf '%s\n'

.PHONY: demo test test-all coverage lint book notebooks readme docs docs-serve lab bench browser clean help

help:
	@printf '%s\n' \
	  'make demo        train, quantize, compare (results in checkpoints/demo)' \
	  'make test        the tests' \
	  'make test-all    the tests, the long ones too' \
	  'make docs        the documentation site: _docs/index.html' \
	  'make docs-serve  the same, on http://localhost:$(PORT)' \
	  'make lab         the notebooks in Jupyter' \
	  'make notebooks   export, run and clean the notebooks' \
	  'make book        that, and README.md' \
	  'make bench       the benchmarks' \
	  'make lint        ruff'

.venv/.base: pyproject.toml constraints.txt
	$(SAY) 'Installing qtlm into .venv (once) ...'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.base
	$(SAY) 'Installing what the tests need into .venv (once) ...'
	@$(PIP) -e '.[dev,docs]'
	@touch $@

.venv/.docs: .venv/.base
	$(SAY) 'Installing what the site is built with into .venv (once) ...'
	@$(PIP) -e '.[docs]'
	@touch $@

.venv/.lab: .venv/.dev
	$(SAY) 'Installing Jupyter into .venv (once) ...'
	@$(PIP) -e '.[lab]'
	@touch $@

demo: .venv/.base
	@$(BIN)/qtlm demo $(ARGS)

# The site is looked at in a real browser. Where root may install Debian's Chromium it is installed; elsewhere that test says why it skips.
CHROMIUM = command -v chromium || command -v chromium-browser || command -v google-chrome
browser:
	@{ $(CHROMIUM); } >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { \
	  printf '%s\n' 'Installing Chromium for the tests of the site (once) ...'; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; }

test: .venv/.dev browser
	@$(BIN)/python -m pytest -q -m 'not slow' $(ARGS)

test-all: .venv/.dev browser
	@$(BIN)/python -m pytest -q $(ARGS)

coverage: .venv/.dev
	@$(BIN)/python -m pytest -q -m 'not slow' --cov=qtlm --cov-report=term-missing:skip-covered $(ARGS)

lint: .venv/.dev
	@$(BIN)/ruff check .

notebooks: .venv/.dev
	@$(BIN)/nbdev-export
	@$(BIN)/python docs/cells.py run nbs/*.ipynb

book: notebooks readme

readme: .venv/.dev
	@$(BIN)/python docs/readme.py

docs: .venv/.docs
	@$(BIN)/python docs/build.py
	$(SAY) 'Open _docs/index.html'

docs-serve: docs
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs $(PORT)

lab: .venv/.lab
	@$(BIN)/jupyter lab nbs $(ARGS)

bench: .venv/.dev
	@for b in training inference accuracy; do $(BIN)/python benchmarks/$$b.py || exit 1; done

clean:
	@rm -rf .venv _docs _proc build *.egg-info
