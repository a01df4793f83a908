# make demo   set up, then train DIGITS with every method: table, curves, filters, sparse models
# make test   set up, then linters and the whole test suite
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test setup clean

demo: setup
	$(BIN)/tl1kernels train digits --out runs/digits

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest
	$(BIN)/tl1kernels verify --backend reference

setup: $(VENV)/.done

# Two installs: the library's build needs torch's headers, and build isolation
# would download another torch to get them.
$(VENV)/.done: pyproject.toml constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy 'scikit-build-core>=0.11' 'cmake>=3.24' ninja
	$(PIP) --no-build-isolation -e '.[train,test]'
	touch $@

clean:
	rm -rf $(VENV) build
