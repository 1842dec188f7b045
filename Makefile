# Two commands do everything on a fresh machine: `make demo` and `make test`. Each builds its own environment first.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# vLLM comes in a GPU and a CPU build; the machine decides which. Override with `make install VARIANT=cpu`.
VARIANT ?= $(shell nvidia-smi > /dev/null 2>&1 && echo gpu || echo cpu)
CONSTRAINTS := $(if $(filter gpu,$(VARIANT)),constraints-gpu.txt,constraints.txt)

.PHONY: help install demo demo-sequential demo-sefe leaderboard bench test test-all lint format clean

help:
	@echo "make install | demo | leaderboard | bench | test | test-all | lint | format | clean"

install: .venv/installed-$(VARIANT)

.venv/installed-$(VARIANT): pyproject.toml $(CONSTRAINTS) overrides-$(VARIANT).txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mcit needs Python 3.11 or newer")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c $(CONSTRAINTS) --override overrides-$(VARIANT).txt -e ".[$(VARIANT),deepspeed,dev]"
	touch $@

# The main job on the embedded model: two methods over the mini stream, then both side by side. A stage of so small a
# model keeps one core busy, so on a CPU the two run at once.
demo: install
	@$(MAKE) --no-print-directory -j$(if $(filter gpu,$(VARIANT)),1,2) demo-sequential demo-sefe
	$(BIN)/mcit report runs/demo/sequential runs/demo/sefe --out runs/demo/report

demo-sequential demo-sefe: demo-%:
	set -o pipefail; $(BIN)/mcit run mini/$* --run-dir runs/demo/$* 2>&1 | sed -u 's/^/$*: /'

# Every method over the mini stream: its settings are searched for on another, then those runs of the board that have no
# record yet, JOBS at a time; then its page. Stop it whenever you like: the next sitting goes on from there.
JOBS ?= 2
leaderboard: install
	-seq $(JOBS) | xargs -I {} -P $(JOBS) $(BIN)/python benchmarks/leaderboard/board.py search
	-seq $(JOBS) | xargs -I {} -P $(JOBS) $(BIN)/python benchmarks/leaderboard/board.py run
	$(BIN)/python benchmarks/leaderboard/board.py page

# All figures that a CPU measures in reasonable time, as one table. A file of figures that is there is not measured again:
# remove it, or give another folder, `make bench FIGURES=runs/bench`. With RUN, a finished run, its matrix is timed too.
FIGURES ?= benchmarks/figures
PACKING := $(foreach model,tiny small,$(foreach setting,shared own grpo,packing-$(model)-$(setting)))
bench: $(patsubst %,$(FIGURES)/%.json,$(PACKING) features reglora reglora-7b gere rft_step stream $(if $(RUN),matrix_eval))
	$(BIN)/python benchmarks/table.py $(FIGURES)

$(FIGURES)/packing-%.json: | install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/packing.py $@ --only $*

$(FIGURES)/features.json: | install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/features.py $@

$(FIGURES)/stream.json: | install
	rm -rf runs/bench-stream
	$(BIN)/python benchmarks/stream.py runs/bench-stream --timed-cells 10
	cp runs/bench-stream/stream.json $@

$(FIGURES)/reglora.json: | install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reglora.py $@ --shapes 0.5b

$(FIGURES)/reglora-7b.json: | install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reglora.py $@ --shapes 7b

$(FIGURES)/gere.json: | install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gere.py $@

$(FIGURES)/rft_step.json: | install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rft_step.py $@

$(FIGURES)/matrix_eval.json: | install
	$(BIN)/python benchmarks/matrix_eval.py $(RUN) runs/bench-matrix
	cp runs/bench-matrix/matrix_eval.json $@

# One representative of each axis. A file's tests share what they make, so they stay in one worker.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
test: install
	$(PYTEST) -m "not slow"

# Every combination.
test-all: install
	$(PYTEST)

# mypy cannot see through the editable install's package mapping, so it is shown the folders under their import names.
lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p .build/mcit
	for folder in pipeline data_prep eval slurm; do ln -sfn ../../$$folder .build/mcit/$$folder; done
	cd .build && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml -p mcit.data_prep -p mcit.eval -p mcit.pipeline -p mcit.slurm

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .build runs
