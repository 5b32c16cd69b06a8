# `make demo` and `make test` need Python 3.11 to 3.13 and nothing else: each sets up the virtual environment if it is
# missing. (Box2D has no wheel for later versions.)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Of the demo: any id of Gymnasium; STEPS are by default those of the hyperparameter file
ENV = CartPole-v1
STEPS =

.PHONY: demo test test-all lint type fast slow figures faults docs format wheel-test clean

demo: $(INSTALLED)
	$(BIN)/python -m examples.demo --env $(ENV) $(if $(STEPS),--steps $(STEPS))

# Linters, type checker and the tests that are quick; test-all adds those that take longer
test: lint type fast

test-all: test slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(INSTALLED)
	$(BIN)/mypy sb3_staq benchmarks
	$(BIN)/mypy --config-file tests/mypy.ini tests

fast: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(PYTEST_OPTIONS)

slow: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow $(PYTEST_OPTIONS)

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[tests,all]"
	touch $@

# The site, in docs/_build/html; warnings are errors
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# The wheel, in an environment of its own without extras, and the literal zoo command from a folder without the sources
wheel-test:
	$(PYTHON) -m venv --clear $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --upgrade pip
	rm -rf build dist
	$(VENV)-wheel/bin/python -m pip wheel --quiet --no-deps --constraint constraints.txt --wheel-dir dist .
	$(VENV)-wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd $$(mktemp -d) && $(abspath $(VENV))-wheel/bin/python -m rl_zoo3.train --algo staq --env CartPole-v1 -n 2000 --eval-freq -1

# The reports and figures, from the committed results; docs/algorithm.md has the commands that make the results
figures: $(INSTALLED)
	for suite in classic mujoco mujoco_1m minatar critics; do $(BIN)/python -m benchmarks report $$suite || exit 1; done
	$(BIN)/python -m docs.diagrams

# A hundred kills at random moments, and other faults; takes half an hour; the report is logs/faults/report.md
faults: $(INSTALLED)
	$(BIN)/python -m benchmarks.faults --folder logs/faults --kills 100 --others 12

clean:
	rm -rf $(VENV) $(VENV)-wheel build dist *.egg-info demo docs/_build
