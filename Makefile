# Each target sets up .venv by itself. PYTHON selects the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo
KILLS ?= 20

.PHONY: demo test check format slurm chaos benchmark clean

demo: .venv/.installed
	$(BIN)/outlast demo --out $(OUT)

# Runs on up to four cores; worksteal moves waiting tests to idle cores.
test: .venv/.installed-for-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: .venv/.installed-for-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed-for-tests
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Needs root and the Debian packages slurmctld, slurmd, slurm-client and munge: the tests start a real Slurm.
slurm: .venv/.installed-for-tests
	$(BIN)/python -m pytest -m 'slurm and not chaos and not benchmark'

chaos: .venv/.installed-for-tests
	OUTLAST_KILLS=$(KILLS) $(BIN)/python -m pytest -m chaos

benchmark: .venv/.installed-for-tests
	$(BIN)/python -m pytest -m benchmark -s

clean:
	rm -rf .venv demo build *.egg-info

.venv/.installed: pyproject.toml
	@echo "Installing Outlast and its dependencies in .venv (once; takes a few minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

# flash-attn is installed without its CUDA kernels, which need a GPU: the tests run its Python layer on the CPU.
# megatron-core is installed without its dependencies: the tests use only its reader of indexed data sets.
.venv/.installed-for-tests: .venv/.installed
	@echo "Installing the dependencies of the tests"
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps 'megatron-core==0.16.*'
	FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \
		$(BIN)/pip install --quiet --no-build-isolation --no-deps 'flash-attn==2.8.*'
	$(BIN)/pip install --quiet --no-deps 'flash-attn-4==4.0.0b36'
	touch $@
