# Everything a fresh clone needs: `make demo` and `make test` set themselves up in .venv.
#   make demo        train a tiny model on bundled lists, fused against reference; table and plot
#   make test        all tests (slow ones: make test PYTEST_ARGS="-m slow")
#   make test-fast   those that answer in two minutes: formulas, kernels, batches, attached models
#   make test-models build two small pretrained models (three minutes, once) and test on them
#   make zero        the loss under DeepSpeed, which it installs; make zero-launch: its training
#                    recipes (these need a C++ compiler)
#   make study       SFT, DPO and PRO on a real model: MODEL=folder or hub name, DATA=ranked lists;
#                    writes docs/study.md (an hour for SmolLM2-135M on two cores)
#   make bench       benchmarks; PRESET=cpu-small|cpu|MODEL, PEERS=1 installs and times the peers
#   make frameworks  DPO in TRL, LLaMA-Factory, ms-swift and axolotl, without and with `pro-kernels run`, each
#                    in an environment of its own in .frameworks (6 GB; an hour);
#                    FRAMEWORKS_ARGS='--only trl' runs some
#   make gpu-round   what a card must tell us, offline, with the Python that is there, in nine minutes;
#                    the same call goes on where the last stopped. ROUND_ARGS=--dry rehearses it on a CPU
#   make docs        the documentation site, into site/
#   make lint        ruff, mypy, clang-format
PYTHON ?= python3
VENV ?= .venv
MODELS ?= $(HOME)/.cache/pro_kernels/models
PRESET ?= cpu-small
EXTRAS ?= lint peers zero models docs
comma := ,
space := $(subst ,, )
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py

.PHONY: demo test test-fast test-models zero zero-launch study bench frameworks gpu-round docs lint env clean extras

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Remade when the package's metadata or the native code changed.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt $(SOURCES)
	$(PIP) --editable '.[test]'
	touch $@

$(addprefix $(VENV)/.,$(EXTRAS)): $(VENV)/.%: $(VENV)/.installed
	$(PIP) --editable '.[$*]'
	touch $@

# Several by one call of pip: make extras EXTRAS="zero lint docs".
extras: $(VENV)/.installed
	$(PIP) --editable '.[$(subst $(space),$(comma),$(EXTRAS))]'
	touch $(addprefix $(VENV)/.,$(EXTRAS))

demo: $(VENV)/.installed
	$(BIN)/python -m pro_trainer.demo

test: $(VENV)/.installed
	@echo "All tests: 5 to 8 minutes on two cores. make test-fast takes two."
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# What takes longest is left out: processes, ranks, compilers, interpreted kernels, the trainer.
FAST := tests/losses tests/distinct/test_tree.py tests/distinct/test_tree_attention.py \
	tests/distinct/test_states.py $(wildcard tests/backends/test_c*.py) tests/backends/test_native.py \
	$(addprefix tests/test_,$(addsuffix .py,reference layout layers planner matmul grad_filter \
	rank_order bad_input attach switches no_sync extending)) \
	$(addprefix tests/trainer/test_,$(addsuffix .py,collate text data records files choose config \
	official ranking inspect model))

test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -k "not triton and not cuda" $(FAST) $(PYTEST_ARGS)

test-models: $(VENV)/.models
	$(BIN)/python tests/models/build.py '$(MODELS)'
	PRO_KERNELS_MODELS='$(MODELS)' $(BIN)/python -m pytest -m models $(PYTEST_ARGS)

zero: $(VENV)/.zero
	$(BIN)/python -m pytest tests/distributed/test_zero.py

zero-launch: $(VENV)/.zero
	$(BIN)/python -m pytest -m slow tests/trainer/test_launch.py -k "deepspeed or zero3"

study: $(VENV)/.installed
	$(BIN)/python -m study --model '$(MODEL)' --data '$(DATA)' $(STUDY_ARGS)

bench: $(VENV)/.installed $(if $(PEERS),$(VENV)/.peers)
	$(BIN)/python -m bench loss --preset $(PRESET)

frameworks: $(VENV)/.models
	$(BIN)/python tests/models/build.py '$(MODELS)' smollm2
	$(BIN)/python -m bench frameworks --update docs/integrations/frameworks.md --model '$(MODELS)/smollm2-135m-instruct' $(FRAMEWORKS_ARGS)

gpu-round:
	$(PYTHON) -m bench gpu $(ROUND_ARGS)

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# Every page of the site in Chromium: what overflows, is broken, or asks another machine.
.PHONY: walk
walk: docs
	$(BIN)/python docs/walk.py

lint: $(VENV)/.installed $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

env: $(VENV)/.installed
	$(BIN)/pro-kernels env

clean:
	rm -rf build dist site *.egg-info pro_kernels/lib demo-output $(VENV)/.installed
