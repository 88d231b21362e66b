# Two commands: `make` runs the whole method on the embedded model, `make test` runs every test.
PY := .venv/bin/python
TASK ?= fixed
RUN ?= runs/$(TASK)

.PHONY: run setup test table bench clean

run: setup
	$(PY) lcdd.py --task $(TASK) --out $(RUN) --resume
	$(PY) eraser.py --run $(RUN)
	$(PY) evaluate.py --run $(RUN)

setup: .venv/ready

.venv/ready: requirements.txt
	python3 -c "import sys; sys.exit('Python 3.11 or newer is needed, this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else 0"
	python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

test: setup
	$(PY) -m pytest -q

table: setup
	$(PY) -m lab.ablate --seeds 3

bench: setup
	$(PY) -m lab.bench

clean:
	rm -rf runs .pytest_cache __pycache__ lab/__pycache__ tests/__pycache__
