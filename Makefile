# `make demo` and `make test` set up all they need; only python3, make and a package index are assumed.
.PHONY: setup demo test test-slow lint format lock reference clean bench-demo bench-transport bench-ranking bench-ranking-build bench-assess bench-distill bench-training bench-scaling bench-plan bench-scale bench-eta docs
.DELETE_ON_ERROR:

UV_VERSION := 0.13.8
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Output appears as it is written, also when it goes to a file.
export PYTHONUNBUFFERED := 1

setup: $(STAMP)

# uv takes the torch that torchvision was built against, and checks every hash. An interrupted set-up starts over. All is
# compiled at once: where Python may not write bytecode, each of Ray's processes would compile torch anew, for seconds.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"error: Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; name another with make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "installing the locked packages into .venv (about 6 GB, once)"
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: $(STAMP)
	@$(BIN)/faculty run -c conf/demo/run.yaml

# Two at a time: many tests wait for processes that start. Files run in their order, the long ones first.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" $(ARGS)

# Variations of those, each with a Ray or a cluster of its own.
test-slow: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not gpu" $(ARGS)

# Writes benchmarks/results/demo.json and the README's table: about two minutes a split.
bench-demo: $(STAMP)
	@$(BIN)/python -m benchmarks.demo

# Writes benchmarks/results/transport.json and its plot: about half an hour, up to 10 GB of memory.
bench-transport: $(STAMP)
	@$(BIN)/python -m benchmarks.transport

# Judges every score against the students in benchmarks/ranking/truth.parquet: seconds.
bench-ranking: $(STAMP)
	@$(BIN)/python -m benchmarks.ranking report

# Makes these students anew, and the scores: about 90 minutes; goes on where it was cut off. Needs npm and apt-get.
bench-ranking-build: $(STAMP)
	@$(BIN)/python -m benchmarks.ranking all --work $(or $(WORK),runs/bench-ranking)

# Writes benchmarks/results/assess.json: about ten minutes.
bench-assess: $(STAMP)
	@$(BIN)/python -m benchmarks.assess

# Every method, control and baseline on seven tasks, 3 seeds: an estimated two hours; goes on where it was cut off. Needs npm and
# apt-get for the raw images. Writes benchmarks/results/distill.json, its table and its plot.
bench-distill: $(STAMP)
	@$(BIN)/python -m benchmarks.ranking fetch --work $(or $(WORK),runs/bench-distill)
	@$(BIN)/python -m benchmarks.distill build --work $(or $(WORK),runs/bench-distill)
	@$(BIN)/python -m benchmarks.distill run --work $(or $(WORK),runs/bench-distill)
	@$(BIN)/python -m benchmarks.distill report --work $(or $(WORK),runs/bench-distill)

# The peer needs none of its own dependencies beside ours, and would bring another torch along.
bench-training: $(STAMP)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --target runs/peers --no-deps torchdistill==1.1.5
	@PYTHONPATH=runs/peers $(BIN)/python -m benchmarks.training $(ARGS)

bench-scaling: $(STAMP)
	@$(BIN)/python -m benchmarks.scaling $(ARGS)

# The site of docs/, in runs/site: open runs/site/index.html.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir runs/site

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

# The lock pins and hashes every package, development tools included, for all platforms; it names no index.
lock:
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet uv==$(UV_VERSION); }
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet --output-file requirements.lock
	$(BIN)/uv pip compile conf/cluster/mlflow.in --constraint requirements.lock --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet \
		--output-file conf/cluster/mlflow.lock

# The reference of the settings, after a change of theirs: docs/run.schema.json and docs/settings.md.
reference: $(STAMP)
	@$(BIN)/faculty schema --out docs/run.schema.json
	@$(BIN)/faculty schema --markdown --out docs/settings.md

clean:
	rm -rf .venv runs build dist *.egg-info

# Plans the demo and runs it: the ratio of planned to actual time and memory of each stage.
bench-plan: $(STAMP)
	@$(BIN)/python -m benchmarks.plan

# Runs the demo twice: how far off the time left was that its progress bars told.
bench-eta: $(STAMP)
	@$(BIN)/python -m benchmarks.eta $(ARGS)

# The simulation behind docs/scale.md.
bench-scale: $(STAMP)
	@$(BIN)/python -m benchmarks.scale
