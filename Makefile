# make demo   set up, then train DIGITS with every method: table, curves, filters, sparse models
# make test   set up, then linters and the whole test suite
# make bench  set up with the peers, then time the CPU kernels against them
# make sanitize   the kernels' tests under the address, undefined-behaviour and thread sanitizers
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
VERIFY := $(addprefix verify-,triton reference cpu cuda)

.PHONY: demo test bench sanitize setup clean $(VERIFY)

demo: setup
	$(BIN)/tl1kernels train digits --out runs/digits

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -k triton
	$(MAKE) --no-print-directory -j 2 $(if $(filter output-sync,$(.FEATURES)),-O) $(VERIFY)

# Two at a time, for each is a process of one core; the slowest first.
$(VERIFY): verify-%:
	$(BIN)/tl1kernels verify --backend $*
verify-triton: export TRITON_INTERPRET := 1
verify-cuda: export TL1KERNELS_CUDA := emulated

bench: setup
	$(PIP) --no-build-isolation -e '.[peers]' $(BUILD)
	$(BIN)/python -m pytest bench --benchmark-enable --json-out bench/results

sanitize: setup
	$(BIN)/python -m tests.sanitize address -n auto
	$(BIN)/python -m tests.sanitize thread -n auto

setup: $(VENV)/.done

# Two installs: the library's build needs torch's headers, and build isolation
# would download another torch to get them.
# The CUDA kernels are built for one GPU, whatever the torch, where there is nvcc; and always for
# the host, where the tests run them.
CUDA_ARCHITECTURES ?= 90a-real
DEFINE := --config-settings=cmake.define
BUILD  := $(DEFINE).TL1_EMULATE_CUDA=ON $(if $(shell command -v nvcc),$(DEFINE).TL1_CUDA=ON \
          $(DEFINE).CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES))
$(VENV)/.done: pyproject.toml constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy 'scikit-build-core>=0.11' 'cmake>=3.24' ninja
	$(PIP) --no-build-isolation -e '.[train,test]' $(BUILD)
	touch $@

clean:
	rm -rf $(VENV) build
