# Every target sets up what it needs by itself: git, make and Python 3.11 or later are enough.
.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench proto gpu test-gpu bench-gpu

export PYTHON
RUN := .venv/bin/python

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

venv:
	@sh scripts/venv.sh

demo: venv  ## train, export, serve and stream, on handwritten digits: about 15 seconds on two cores
	$(RUN) -m demo

test: venv  ## the tests that need no GPU: about 10 minutes on two cores
	$(RUN) -m pytest

lint: venv  ## style, types, the order of imports, stale stubs
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --exclude-gitignore
	.venv/bin/lint-imports
	$(RUN) proto/generate.py --check

proto: venv  ## the stubs of the wire contracts, from proto/
	$(RUN) proto/generate.py

bench: venv  ## throughput and latency, beside ceilings and peers: under ten minutes on two cores; into docs/performance
	$(RUN) -m bench --write docs/performance

gpu: venv  ## onnxruntime for CUDA, its libraries and CuPy into .venv, to serve on a GPU from the checkout
	@sh scripts/gpu.sh

test-gpu: venv  ## the tests that need a GPU; skipped, with the reason, where there is none
	@sh scripts/gpu.sh
	$(RUN) -m pytest -m gpu tests/gpu

bench-gpu: venv  ## speed on CUDA beside cuDNN and the device's floor; into docs/performance/gpu
	@sh scripts/gpu.sh
	$(RUN) -m bench.gpu --write docs/performance/gpu
