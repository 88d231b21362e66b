# Two commands: `make` runs the whole method on the embedded model, `make test` runs every test.
PY := .venv/bin/python
TASK ?= fixed
RUN ?= runs/$(TASK)

MODEL ?= models/smollm2
DATA ?= tatsu-lab/alpaca
.PHONY: run real setup test table bench clean

run: setup
	$(PY) lcdd.py --task $(TASK) --out $(RUN) --resume
	$(PY) eraser.py --run $(RUN)
	$(PY) evaluate.py --run $(RUN)

# a chat model on prompts that people wrote: DATA=FILE names other ones, TASK=safety or shakespeare another
# behaviour with DATA=FILE TEST=FILE; interrupted, the same command goes on
real: RUN = runs/real$(addprefix -,$(filter-out fixed,$(TASK)))
real: FEW = --n-trigger 200 --n-validation 50 --max-new-tokens 48
# fewer steps than usual, for half an hour to an hour on two cores; for fixed a gentler carrier, too
real: SHORT_fixed = --steps 240 --quicken 0
real: SHORT_safety = --sft-steps 150 --batch 8 --max-len 96 --steps 240 --settle 60 --rho 0.15 --beta 0.95 --quicken 0
real: SHORT_shakespeare = --sft-steps 250 --batch 8 --sft-lr 5e-4 --lr 5e-4 --steps 260 --settle 60 --rho 0.1 --pace 0.02
real: setup
	$(PY) -m lab.smollm2 $(MODEL) --data $(DATA)
	$(PY) lcdd.py --model $(MODEL) --task $(TASK) --data $(DATA) $(TEST:%=--test %) $(SHORT_$(TASK)) $(FEW) --out $(RUN) --resume
	$(PY) eraser.py --run $(RUN) --resume
	$(PY) evaluate.py --run $(RUN)

setup: .venv/ready

.venv/ready: requirements.txt
	python3 -c "import sys; sys.exit('Python 3.11 or newer is needed, this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else 0"
	python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# two halves at a time, for two cores; what reads transformers is in the other one, which imports it once
HALF := $(foreach name,attack device eraser evaluate memory paper parallel plan presets run same template,tests/test_$(name).py)
test: setup
	$(PY) -m pytest -q $(HALF) & \
	$(PY) -m pytest -q $(addprefix --ignore=,$(HALF)); other=$$?; wait $$! && exit $$other

table: setup
	$(PY) -m lab.ablate --seeds 3

bench: setup
	$(PY) -m lab.bench

clean:
	rm -rf runs .pytest_cache __pycache__ lab/__pycache__ tests/__pycache__
