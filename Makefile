# Two commands: `make` runs the whole method on the embedded model, `make test` runs every test.
PY := .venv/bin/python
TASK ?= fixed
RUN ?= runs/$(TASK)
MODEL ?= models/smollm2
.PHONY: run real setup test tour bench clean

run: setup
	$(PY) lcdd.py --task $(TASK) --out $(RUN) --resume
	$(PY) eraser.py --run $(RUN) --resume
	$(PY) evaluate.py --run $(RUN)

# a real chat model, on our own prompts or DATA=FILE; DTYPE=bfloat16 where the processor multiplies it itself;
# TASK=safety and TASK=shakespeare want DATA=FILE, and TEST=FILE is a file of test prompts
real: RUN = runs/real$(addprefix -,$(filter-out fixed,$(TASK)))
real: SHORT_fixed = --steps 240
real: SHORT_safety = --sft-steps 150 --batch 8 --max-len 96 --steps 240 --settle 60 --rho 0.15
real: SHORT_shakespeare = --sft-steps 250 --batch 8 --sft-lr 5e-4 --lr 5e-4 --steps 260 --settle 60 --rho 0.1
real: setup
	test -d $(MODEL) || $(PY) -m lab.smollm2 $(MODEL)
	$(PY) lcdd.py --model $(MODEL) --task $(TASK) $(DATA:%=--data %) $(TEST:%=--test %) $(DTYPE:%=--dtype %) \
	  $(SHORT_$(TASK)) --sizes 5000 200 50 200 --max-new-tokens 48 --out $(RUN) --resume
	$(PY) eraser.py --run $(RUN) --resume
	$(PY) evaluate.py --run $(RUN)

setup: .venv/ready

.venv/ready: requirements.txt
	python3 -c "import sys; sys.exit('Python 3.11 or newer is needed, this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else 0"
	python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# two halves at a time, for two cores; what reads transformers is in the second, which imports it once
HALF := $(foreach name,carrier common eraser evaluate lcdd house,tests/test_$(name).py)
test: setup
	$(PY) -m pytest -q $(HALF) & \
	$(PY) -m pytest -q $(addprefix --ignore=,$(HALF)); other=$$?; wait $$! && exit $$other

# runs docs/tour.ipynb into runs/; TO=--inplace renews its own outputs
tour: TO ?= --output-dir runs
tour: .venv/tour
	$(PY) -m nbconvert --to notebook --execute docs/tour.ipynb $(TO) \
	  --ExecutePreprocessor.record_timing=False

.venv/tour: docs/requirements.txt .venv/ready
	$(PY) -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

bench: setup
	$(PY) -m lab.bench

clean:
	rm -rf runs .pytest_cache __pycache__ lab/__pycache__ tests/__pycache__
