# Everything runs in .venv, which the first command makes. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench zoo clean

demo: .venv/installed  ## a healthy and a poor run on real digits, and where to look
	$(BIN)/python examples/digits.py

test: .venv/installed  ## the whole suite, in two processes
	$(BIN)/pytest -n 2 --dist loadfile

check: .venv/installed  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed  ## what is claimed about cost
	$(BIN)/python benchmarks/gradient_norms.py
	$(BIN)/python benchmarks/rule_cost.py
	$(BIN)/python benchmarks/step_radius.py
	$(BIN)/python benchmarks/ska.py

zoo: .venv/installed  ## a zoo of real runs, and what the rules say of each (about a quarter of an hour)
	$(BIN)/python benchmarks/runs/record.py
	$(BIN)/python benchmarks/runs/judge.py

clean:
	rm -rf .venv build dist *.egg-info

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dynwatch needs Python 3.10 or newer; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
