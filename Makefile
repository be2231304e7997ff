# setup: the environment in .venv; demo: the main job on the embedded default; test, check, bench, wheel, release, replica as they say.
PYTHON ?= python3
BIN := .venv/bin
# Where other work shares the cores, threads that spin while they wait double the time of a step.
export OMP_WAIT_POLICY ?= PASSIVE
DEMO := AUTOSLOTH_MODEL=demo AUTOSLOTH_DATASET=demo
# llama-cpp-python comes as source; these leave out what AutoSloth does not use. pip keeps the wheel it builds.
export CMAKE_ARGS ?= -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/autosloth/export/llama.cmake

.PHONY: setup demo test check bench wheel release replica

setup: .venv/complete

.venv/complete: requirements.txt requirements-bare.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt -r requirements-bare.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(DEMO) AUTOSLOTH_RUN_NAME=demo $(BIN)/python -m autosloth.notebook notebooks/AutoSloth-SFT.ipynb
	$(BIN)/autosloth show runs/demo

# Two processes of one thread each: the demo's model is so small that a second thread gains nothing.
test: export OMP_NUM_THREADS := 1
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What the notebooks install: from beside them, until a release has set an address and a hash.
wheel: setup
	$(BIN)/python docs/release.py

# make release HOME=https://github.com/OWNER/NAME VERSION=x.y.z; the user's own HOME is not to be the address.
release: setup
	@env -u HOME $(BIN)/python docs/release.py '$(HOME)' '$(VERSION)'

# Colab's and Kaggle's images, Python and torch too (gigabytes, once); the tests with them: REPLICA=whole pytest -m slow tests/replica.
replica: setup
	$(BIN)/python tests/replica/build.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python benchmarks/sft.py
	$(BIN)/python benchmarks/dpo.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/spin.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/gpu.py
