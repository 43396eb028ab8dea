# Everything runs in a virtual environment inside the clone; `make demo` and `make test` set it up on first use.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# One thread per process: on few cores more threads only wait for each other.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1

.PHONY: env demo demo-short test test-all test-slurm lint bench bench-report format docs scaling kernel-resources demo-seeds
.PHONY: energon-env lmms-env ablations ablations-ci first-run test-more explain-page clean

env: $(STAMP)

# torch comes first and exactly pinned, so that what depends on it finds it and fetches no other build.
# torchvision serves one test as an oracle. Its wheel does not import beside CPU torch, so it stays out of the environment.
$(STAMP): setup.py constraints.txt
	test -x $(BIN)/python || $$(command -v $(PYTHON) || command -v python3) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VENV)/torchvision "$$(sed -n 's/^# oracle: //p' constraints.txt)"
	touch $@

demo: env
	$(BIN)/swim demo

demo-short: env
	$(BIN)/swim demo --short --out runs/demo-short

# Two files of tests at a time; what a test starts may itself be several processes.
test: env
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: env
	$(BIN)/python -m pytest -q -m "not gpu and not slurm and not bench"

# As root, with Debian's slurmctld, slurmd, slurm-client and munge: two nodes on this host.
test-slurm: env
	$(BIN)/python -m pytest -q -m slurm

bench: env
	$(BIN)/python -m pytest -q -s -m bench

# docs/performance.md from the files in benchmarks/results.
bench-report: env
	PYTHONPATH=. $(BIN)/python benchmarks/report.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/slurm/* tests/slurm/*.sh .ci/run
	bash -n launch/train.sh
	$(BIN)/python -W error -c "compile(open('launch/train.sh').read(), 'launch/train.sh', 'exec')"

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The generated pages; the tests check that they are current.
docs: env
	$(BIN)/python -c "from swim.train.reference import reference; print(reference(), end='')" > docs/config.md
	$(BIN)/swim data schema > data_tools/record.schema.json

# docs/scaling.md, with the model's shape instead of its config from the hub.
scaling: env
	mkdir -p runs/.cache/qwen2_5_vl_7b
	PYTHONPATH=. $(BIN)/python -c "from benchmarks.qwen import Shape; \
		Shape().config().save_pretrained('runs/.cache/qwen2_5_vl_7b')"
	$(BIN)/swim estimate swim_7b --scaling model.path=runs/.cache/qwen2_5_vl_7b > docs/scaling.md

# What the kernels take of devices, compiled for them here: minutes on two cores. The tests compare.
kernel-resources: env
	$(BIN)/python tests/kernel_resources.py

# docs/demo.md: the demo on three seeds, about five minutes each on two cores.
demo-seeds: env
	$(BIN)/swim demo --out runs/demo-seeds --seed 0 --seed 1 --seed 2 --table docs/demo.md

# docs/explain.html and its picture, by the models of `make demo`; the picture needs Debian's chromium and its driver.
explain-page: env
	$(BIN)/swim explain runs/demo/data/held_out "which way does the red circle move ?" --key synth_1000003_000008 \
		--model runs/demo/sft --compare runs/demo/supervised --out docs/explain.html
	$(BIN)/python tests/explain_screenshot.py docs/explain.html docs/explain.png

# Megatron-Energon for the slow test that it reads our shards; CPU torch first, and Energon without what it asks for, so
# that nothing fetches another build. About 1.1 GB.
energon-env: env
	test -x $(VENV)/energon/bin/python || $(BIN)/python -m venv $(VENV)/energon
	$(VENV)/energon/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)/energon/bin/pip install --quiet --disable-pip-version-check -r tests/energon_requirements.txt
	$(VENV)/energon/bin/pip install --quiet --disable-pip-version-check --no-deps megatron-energon==7.4.1

# docs/ablations.md: 103 runs of the tiny recipe, about 75 seconds of one core each. The preset checks the path.
ablations: env
	PYTHONPATH=. $(BIN)/python benchmarks/ablations.py

# The commands of docs/first_run.md, and whether they print what it says.
first-run: env
	$(BIN)/python -m pytest -q -m slow tests/test_first_run.py

# Slow tests whose promises no quick one guards: DeepSpeed's other profiles on four ranks, the stock Trainer, footage.
test-more: env
	$(BIN)/python -m pytest -q -m slow tests/train/test_profiles.py tests/test_examples.py tests/train/test_footage.py \
		-k "not own_adam"

ablations-ci: env
	PYTHONPATH=. $(BIN)/python benchmarks/ablations.py --preset ci --out runs/ablations-ci

# lmms-eval for the slow tests that our tasks and an exported model run there; as above. torchvision is the oracle's: on
# CPU torch it imports only where its operators are declared first, which the test does. About 1.5 GB.
lmms-env: env
	test -x $(VENV)/lmms/bin/python || $(BIN)/python -m venv $(VENV)/lmms
	$(VENV)/lmms/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)/lmms/bin/pip install --quiet --disable-pip-version-check -r tests/lmms_requirements.txt
	$(VENV)/lmms/bin/pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3 \
		qwen-vl-utils==0.0.14 "$$(sed -n 's/^# oracle: //p' constraints.txt)"

clean:
	rm -rf $(VENV) runs build dist *.egg-info
