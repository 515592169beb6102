# Two commands for a fresh clone: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup

# The oldest and the newest transformers that work; constraints.txt holds one in between. Each has a folder of its own that goes
# before .venv's packages, with what it asks for in another version than they have.
OLDEST := transformers-5.17.0
NEWEST := transformers-5.24.0
REQUIREMENTS-$(OLDEST) := huggingface_hub==1.33.0

.PHONY: venv demo test test-versions lint clean

venv: $(STAMP)

# torch first and pinned: an unpinned torch, as a dependency, would bring gigabytes of CUDA packages.
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test]' ruff
	touch $@

demo: venv
	$(BIN)/larosa demo $(ARGS)

test: venv
	$(PYTEST) $(ARGS)

# What depends on transformers most, with each of the two: what Dynamo finds in its models, and its loop of generation.
VERSIONED := $(addprefix tests/,compiler/test_backend.py compiler/test_negatives.py serving/test_enable.py test_generation.py)

test-versions: $(VENV)/$(OLDEST) $(VENV)/$(NEWEST)
	PYTHONPATH=$(CURDIR)/$(VENV)/$(OLDEST) $(PYTEST) $(ARGS) $(VERSIONED)
	PYTHONPATH=$(CURDIR)/$(VENV)/$(NEWEST) $(PYTEST) $(ARGS) $(VERSIONED)

$(VENV)/transformers-%: $(STAMP)
	rm -rf $@ $@.part
	$(BIN)/pip install --quiet --no-deps --target $@.part transformers==$*
	$(if $(REQUIREMENTS-transformers-$*),$(BIN)/pip install --quiet --target $@.part $(REQUIREMENTS-transformers-$*))
	mv $@.part $@

lint: venv
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info
