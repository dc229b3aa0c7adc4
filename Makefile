# Each target does its own set-up in .venv; PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo
KILLS ?= 20

.PHONY: demo test check format slurm chaos benchmark clean

demo: .venv/.installed
	$(BIN)/outlast demo --out $(OUT)

# On several cores at once, where a test that takes long is left to itself.
test: .venv/.installed-for-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: .venv/.installed-for-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed-for-tests
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# On a real Slurm that the tests start; as root, with Debian's slurmctld, slurmd, slurm-client and munge.
slurm: .venv/.installed-for-tests
	$(BIN)/python -m pytest -m 'slurm and not chaos and not benchmark'

chaos: .venv/.installed-for-tests
	OUTLAST_KILLS=$(KILLS) $(BIN)/python -m pytest -m chaos

benchmark: .venv/.installed-for-tests
	$(BIN)/python -m pytest -m benchmark -s

clean:
	rm -rf .venv demo build *.egg-info

.venv/.installed: pyproject.toml
	@echo "Installing Outlast and what it needs in .venv (once; a few minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

# flash-attn's kernels need a GPU to build for; its Python layer is tested on the CPU without them.
# megatron-core reads our shards in the tests; of what it asks for, nothing more than that is needed.
.venv/.installed-for-tests: .venv/.installed
	@echo "Installing what the tests need"
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps 'megatron-core==0.16.*'
	FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \
		$(BIN)/pip install --quiet --no-build-isolation --no-deps 'flash-attn==2.8.*'
	$(BIN)/pip install --quiet --no-deps 'flash-attn-4==4.0.0b36'
	touch $@
