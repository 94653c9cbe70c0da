# Two commands on a bare machine with python3 and a C++ compiler:
#   make demo    set up .venv, build, run the demo
#   make test    set up if needed, run all tests
# On a machine that has torch already, `make demo VENV=` uses its own python3 and installs no dependency.

VENV ?= .venv
TORCH ?= torch==2.13.0
ifeq ($(VENV),)
python := python3
setup := build/setup.stamp
else
python := $(VENV)/bin/python
setup := $(VENV)/setup.stamp
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif
sources := $(wildcard csrc/* csrc/*/*)

.PHONY: setup demo test check bench wheel clean

setup: $(setup)

# Runs again when the build or its sources change; CMake then compiles only what changed.
$(setup): pyproject.toml setup.py CMakeLists.txt $(sources)
ifneq ($(VENV),)
	test -x $(python) || python3 -m venv $(VENV)
	$(python) -m pip install --quiet --disable-pip-version-check '$(TORCH)' 'setuptools>=77' cmake ninja pybind11
	$(python) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[dev]'
else
	$(python) -m pip install --no-build-isolation --no-deps --editable .
endif
	$(python) -c 'from fastflow import backend; print(backend.extension_error or backend.extension.build_info())'
	mkdir -p $(@D) && touch $@

demo: $(setup)
	fastflow demo

test: $(setup)
	OMP_NUM_THREADS=1 $(python) -m pytest -n 2 --dist worksteal

check: $(setup)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	clang-format --dry-run -Werror $(filter %.h %.cuh %.cpp %.cu,$(sources))
	$(python) -m mypy

bench: $(setup)
	$(python) benchmarks/run.py

wheel: $(setup)
	$(python) -m build --wheel --no-isolation

clean:
	rm -rf build dist fastflow/_C.*.so
