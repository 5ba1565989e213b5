# Every target is a line or two that calls a real tool. `make` alone explains them.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
comma := ,
EXTRAS := book,course,test$(if $(filter full,$(BOOK_PROFILE)),$(comma)full)
EXECUTE := $(BIN)/python -m tools.execute book _build/.jupyter_cache _build/execution.json
export OMP_NUM_THREADS := 1
export TQDM_DISABLE := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help book test nbval test-site serve lab bench assignment home clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

book: .venv/ready  ## Execute the notebooks in parallel and build the site
	$(EXECUTE)
	$(BIN)/jupyter-book build book --config _config.yml --toc $(CURDIR)/_toc.yml --path-output . --all --quiet -W -n --keep-going
	@echo "The site is at _build/html/index.html; 'make serve' shows it."

test: .venv/ready  ## Check everything: modules, notebooks, course, workflows, and the site where it is built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(EXECUTE)
	$(BIN)/pytest -n auto --dist worksteal

nbval: .venv/ready  ## Execute every cell afresh with nbval and compare with what is committed
	$(BIN)/pytest -n auto --dist loadfile --nbval-lax --nbval-sanitize-with tests/nbval_sanitize.cfg -W ignore book

test-site: .venv/ready  ## Check the built site in headless Chromium
	$(BIN)/pytest -n auto tests/test_site.py

serve: .venv/ready  ## Show the built site on http://localhost:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

lab: .venv/ready  ## Open JupyterLab with the book
	env -u TQDM_DISABLE $(BIN)/jupyter lab book

bench: .venv/ready  ## Measure CPU seconds and memory of every notebook
	$(BIN)/python tools/bench.py

assignment: .venv/ready  ## Write the students' version of a theme to release/: make assignment THEME=collapse
	$(BIN)/nbgrader generate_assignment "$(THEME)" --create --force

home: .venv/ready  ## Give the book its address: make home URL=https://github.com/<owner>/<repo>
	$(BIN)/python -m tools.home "$(URL)"

clean:  ## Remove what was built; the environment stays
	rm -rf _build release autograded feedback gradebook.db
