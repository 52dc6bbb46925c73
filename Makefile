# Everything is installed into $(VENV) with plain pip, nothing outside it; `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
# What pip shall install as torch, e.g. TORCH="torch==2.12.0 --index-url ..." for another build; what is there stays.
TORCH ?= $(or $(shell cat $(VENV)/torch 2>/dev/null),torch==2.13.0)
# Which build of it, by uv's name (cpu, cu130, ...): uv then installs it, and finds its place by itself. Empty is pip's choice.
TORCH_BACKEND ?=
# Further arguments of demo, test and bench, e.g. make test ARGS="-k merge".
ARGS ?=
# What `make sanitize` compiles for, e.g. "address thread", each a library of its own; address,undefined are one.
SANITIZERS ?= address,undefined thread
# The versions that `make compat` compares, oldest first, and arguments for pip, e.g. --index-url of builds for CPU.
COMPAT_TORCH ?= $(firstword $(TORCH))
COMPAT_PIP_ARGS ?= $(wordlist 2,$(words $(TORCH)),$(TORCH))
# The transformers that it tests condense_kernels.models on: the oldest, the last that vLLM's CPU build takes, the newest.
COMPAT_TRANSFORMERS ?= transformers==5.18.0 transformers==5.19.0 transformers

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
VISION := $(shell sed -n 's/^vision = \["[^"]*", \(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
RAY := $(shell sed -n 's/^ray = \[\(.*\)\]$$/\1/p' pyproject.toml)
LINTERS := $(shell sed -n 's/^lint = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
NOTEBOOKS := $(shell sed -n 's/^notebooks = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
DOCS := $(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
AUDITORS := $(shell sed -n 's/^audit = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
RELEASERS := $(shell sed -n 's/^release = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
# Beside each other, a worker a core, and in another order each time; ARGS="-n 0 -p no:randomly" for neither.
TEST := -m pytest -n auto --maxprocesses 8
BENCH := $(RUN) -m pytest benchmarks --benchmark-only --benchmark-quiet -q -p no:cacheprovider -p no:warnings -p no:randomly
CPP := $(wildcard csrc/*.cpp csrc/*.h)
SCHEMAS := $(wildcard condense_kernels/ops/*/schema.txt)
LINTED := $(CPP) $(wildcard tests/*.cpp tests/aot/*.cpp tests/ptx/*.cpp tests/ptx/*.h tests/rowops/*)
WORKFLOWS := $(wildcard .github/workflows/*.yml)
VLLM := .venv-vllm
LMMS := .venv-lmms-eval
TTSEM := ttsem==0.1.0
CFFCONVERT := cffconvert==2.0.0
ZIG := ziglang==0.17.1
UV := uv==0.13.9
SEED ?= 1
CALLS ?= 100000
DURATION ?= 3600
# $(call install_torch,PYTHON) REQUIREMENTS
install_torch = $(1) -m pip --disable-pip-version-check install $(if $(TORCH_BACKEND),--quiet $(UV) && \
    $(1) -m uv pip install --python $(1) --torch-backend $(TORCH_BACKEND))
COMPAT := $(addprefix .venv-compat/,$(COMPAT_TORCH))
MODELS := $(addprefix .venv-compat/,$(COMPAT_TRANSFORMERS))

.DEFAULT_GOAL := help
.NOTPARALLEL:
# What help lists, and what it does not.
.PHONY: force sanitize-address sanitize-undefined sanitize-thread $(shell sed -n 's/^\([a-z-]*\):.*\#\# .*/\1/p' Makefile)

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

demo: $(VENV)/installed ## condense a picture: prints a table, writes demo.png
	$(RUN) -m condense_kernels demo $(ARGS)

demo-vision: $(VENV)/vision ## the same with a model's attention: writes demo-vision.png and -sheet.png
	$(RUN) -m condense_kernels demo --score dinov2 $(ARGS)

test: $(VENV)/installed ## run the tests
	$(RUN) $(TEST) -m "not slow" $(ARGS)

test-full: $(VENV)/vision $(VENV)/ray $(VENV)/notebooks $(VENV)/docs ## run the slow tests, too; ARGS="-m slow" for those alone
	$(RUN) $(TEST) $(ARGS)

# The browser is the system's: apt-get install chromium. Without one these tests fail, and say so.
test-html: $(VENV)/installed ## of the slow tests, those of the page of show, in headless Chromium
	$(RUN) $(TEST) tests/test_show_page.py $(ARGS)

# aarch64 is emulated: apt-get install g++-aarch64-linux-gnu qemu-user. Without them those tests are skipped.
port-check: $(VENV)/ziglang ## compile the row loops by Clang, and for aarch64, and run them
	PYTHONPATH=$(VENV)/ziglang $(RUN) $(TEST) tests/test_rowops.py $(ARGS)

# Debian's Python, torch and what tests need, for that processor: 2 GB. Described in docs/checking.md.
arm-check: $(VENV)/installed $(VENV)/auditors ## build the wheel for aarch64, audit and test it, emulated, in .venv-arm
	$(RUN) tests/emulated.py $(ARGS)

# Both are described in docs/checking.md.
ptx-check: $(VENV)/installed ## run the tests of Triton kernels on their PTX, executed and checked on the CPU
	PYTHONPATH=$(CURDIR)/tests:$(CURDIR)/benchmarks $(RUN) $(TEST) -p ptx.plugin $(ARGS)

gpu-check: $(VENV)/installed $(VENV)/ttsem ## run Triton kernels on their TTIR, in ttsem: bounds and races
	TRITON_INTERPRET=0 PYTHONPATH=$(VENV)/ttsem $(RUN) tests/ttsem_calls.py $(ARGS)

sanitize: $(VENV)/installed ## the C++ library under AddressSanitizer, UBSan and TSan; sanitize-thread for one alone
	$(RUN) tests/sanitize.py $(ARGS) $(SANITIZERS)

sanitize-address sanitize-undefined sanitize-thread: sanitize-%: $(VENV)/installed
	$(RUN) tests/sanitize.py $(ARGS) $*

# Both are described in docs/load.md. SEED=... repeats the fuzz; without it the time is its seed, which it prints.
fuzz: $(VENV)/installed ## calls at random against the reference: CALLS=100000
	$(RUN) tests/fuzz.py --calls $(CALLS) $(if $(filter file,$(origin SEED)),,--seed $(SEED)) $(ARGS)

soak: $(VENV)/installed ## 8 threads call for an hour, memory flat: DURATION=3600
	$(RUN) tests/soak.py --seconds $(DURATION) $(if $(filter file,$(origin SEED)),,--seed $(SEED)) $(ARGS)

tiny-llava: $(VENV)/installed ## train the tiny LLaVA anew, 34 minutes of a core: build/tiny-llava/1, or another SEED
	$(RUN) -m condense_kernels.tiny_llava.train --output build/tiny-llava/$(SEED) --seed $(SEED) $(ARGS)

vllm: $(VLLM)/installed ## test the plugin of vLLM, in .venv-vllm (Python >= 3.11, 1.8 GB)
	PYTHONPATH=$(CURDIR)/tests/with_vllm/site:$(CURDIR)/tests $(VLLM)/bin/python -m pytest --confcutdir tests/with_vllm tests/with_vllm $(ARGS)

lmms-eval: $(LMMS)/installed ## test the models of lmms-eval and reproduce, in .venv-lmms-eval (1.8 GB)
	$(LMMS)/bin/python -m pytest --confcutdir tests/with_lmms_eval tests/with_lmms_eval $(ARGS)

notebooks: $(VENV)/vision $(VENV)/notebooks ## run docs/notebooks, and write their outputs into them
	$(RUN) benchmarks/notebooks.py $(ARGS)

# Strict: a page that no menu has, or a link or anchor that leads nowhere, is an error; under --quiet mkdocs counts none.
# Nothing is fetched.
docs: $(VENV)/docs ## build the site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build $(ARGS)

docs-serve: $(VENV)/docs ## the same at http://127.0.0.1:8000, anew whenever a file changes
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve --watch condense_kernels --watch README.md $(ARGS)

# The types need torch's own, and nothing else of what is installed changes the verdict.
lint: $(VENV)/torch $(VENV)/linters $(VENV)/cffconvert ## check style, formatting, types, workflows and the citation
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(if $(CPP),$(VENV)/bin/clang-format --dry-run -Werror $(LINTED))
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows $(WORKFLOWS)
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml
	$(VENV)/bin/jactionlint --strict-exit --shellcheck $(VENV)/bin/shellcheck --pyflakes "" $(WORKFLOWS) .github/dependabot.yml
	$(VENV)/bin/zizmor --offline --quiet --pedantic --no-progress .github
	@PYTHONPATH=$(VENV)/cffconvert $(RUN) $(VENV)/cffconvert/bin/cffconvert --validate && echo

format: $(VENV)/linters ## format the code, and mend what the style check can mend
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .
	$(if $(CPP),$(VENV)/bin/clang-format -i $(LINTED))

bench: $(VENV)/installed ## time the operators beside their baselines, 4 minutes
	$(BENCH) $(ARGS)

bench-results: $(VENV)/installed ## the same for the record: results file, plots, page, 6 minutes
	$(BENCH) --sweeps --record $(ARGS)

bench-against: $(VENV)/installed ## time this tree and another in turn, and tell what changed: BASE=../other
	cd $(or $(BASE),$(error BASE is empty: make bench-against BASE=../other)) && \
	    CONDENSE_BUILD_EXT=1 $(abspath $(RUN)) setup.py --quiet build_ext --inplace
	$(RUN) benchmarks/against.py measure $(BASE) build/against.json $(ARGS)
	@$(RUN) benchmarks/against.py table build/against.json

# auditwheel gives the tag, if it finds nothing newer; torch's libraries come with torch.
wheel: $(VENV)/installed $(VENV)/auditors ## build dist/*.whl against the torch in .venv, and audit it
	@rm -rf $(VENV)/wheel
	CONDENSE_BUILD_EXT=1 $(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir $(VENV)/wheel .
	$(call audited,$(VENV)/wheel/*.whl)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat \
	    --exclude libtorch_cpu.so --exclude libc10.so --wheel-dir dist $(VENV)/wheel/*.whl
	$(VENV)/bin/twine check --strict dist/*.whl

# In the images of manylinux, which takes docker or podman. [tool.cibuildwheel] in pyproject.toml says what is done there.
wheels: $(VENV)/releasers $(VENV)/auditors ## build the wheel that is released for this processor, test and audit it
	$(VENV)/bin/cibuildwheel --platform linux --archs $$(uname -m) --output-dir dist

audit: $(VENV)/auditors ## hold a wheel to its tag: WHEEL=dist/condense_kernels-...whl
	$(call audited,$(or $(WHEEL),$(error WHEEL is empty: make audit WHEEL=dist/condense_kernels-...whl)))

pure-wheel: $(VENV)/created ## build dist/*-py3-none-any.whl, without compiled kernels, for other platforms
	CONDENSE_BUILD_EXT=0 $(PIP) wheel --quiet --no-deps --wheel-dir dist .

sdist: $(VENV)/installed $(VENV)/auditors ## build dist/*.tar.gz, which builds and tests itself as a checkout does
	$(RUN) setup.py --quiet sdist
	$(VENV)/bin/twine check --strict dist/*.tar.gz

# For Hugging Face's kernels (docs/hub.md): projects of kernel-builder, and variants that are built, of which one is compiled.
hub-kernel: $(VENV)/installed $(VENV)/auditors ## assemble build/hub, this package as a kernel of a kernel hub, and audit it
	$(RUN) hub/assemble.py
	$(VENV)/bin/torch-abi-audit --check torch build/hub/repository/build

check-dist: $(VENV)/auditors ## look at the metadata of what is in dist/ as the index does
	$(VENV)/bin/twine check --strict dist/*

compat: $(COMPAT:=/status) $(MODELS:=/status) ## test one wheel on several torch: COMPAT_TORCH="torch==2.10.0 torch==2.13.0"
	@for env in $(COMPAT) $(MODELS); do printf '%-22s %s\n' $${env##*/} "$$(tail -n 1 $$env/report)"; done
	@for env in $(COMPAT) $(MODELS); do test "$$(cat $$env/status)" = 0 || exit 1; done

clean: ## remove what was built; the packages in .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks demo*.png
	rm -f condense_kernels/_C.abi3.so condense_kernels/_not_built.txt $(VENV)/installed
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

# The files below stand for steps that are done.

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=...")'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Runs always, changes only when $(TORCH) has. Torch comes before the rest, so that no requirement brings another one.
$(VENV)/torch: $(VENV)/created force
	@if [ "$$(cat $@ 2>/dev/null)" != '$(TORCH)' ]; then \
	    echo "installing $(TORCH) into $(VENV)"; \
	    $(call install_torch,$(RUN)) $$(test -e $@ && echo --force-reinstall) $(TORCH) && echo '$(TORCH)' > $@; \
	fi

# Editable, so that Python files need no reinstallation; the C++ files do, and are compiled in this step.
$(VENV)/installed: $(VENV)/torch $(CPP) $(SCHEMAS) setup.py pyproject.toml condense_kernels/_version.py
	@echo "installing condense_kernels with what the demo and the tests need; compiling csrc/"
	@$(PIP) install --quiet 'setuptools>=77.0.3'
	@$(PIP) install --quiet --no-build-isolation --editable '.[test]'
	@if [ -f condense_kernels/_C.abi3.so ]; then \
	    echo "the C++ kernels are built"; \
	else \
	    echo "WARNING: the C++ kernels are not built, CPU tensors run on the slow reference:" >&2; \
	    cat condense_kernels/_not_built.txt >&2; \
	    echo "To build them then: make clean, then CONDENSE_BUILD_EXT=1 make $(MAKECMDGOALS)" >&2; \
	fi
	@touch $@

# Those of an extra, whose step this is.
define packages
	@echo "installing $(1)"
	@$(PIP) install --quiet $(1)
	@touch $@
endef

# cli and models are there with the tests' requirements.
$(VENV)/vision: $(VENV)/installed pyproject.toml
	$(call packages,$(VISION))

$(VENV)/ray: $(VENV)/installed pyproject.toml
	@echo "installing "$(RAY)
	@$(PIP) install --quiet $(RAY)
	@touch $@

# One each, on the torch named above. No requirement is followed, so that none brings another torch.
define pinned
	@echo "creating $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(call install_torch,$(@D)/bin/python) --quiet $(TORCH)
	@$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	@touch $@
endef

$(VLLM)/requirements: tests/with_vllm/requirements.txt
	$(pinned)

$(LMMS)/requirements: tests/with_lmms_eval/requirements.txt
	$(pinned)

$(VLLM)/installed $(LMMS)/installed: %/installed: %/requirements $(CPP) $(SCHEMAS) setup.py pyproject.toml condense_kernels/_version.py
	@echo "installing condense_kernels into $(@D); compiling csrc/"
	@$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Beside the other packages, as it asks for Python >= 3.12; what is used of it runs on 3.10 and 3.11 as well.
$(VENV)/ttsem: $(VENV)/created
	@echo "installing $(TTSEM)"
	@$(PIP) install --quiet --no-deps --ignore-requires-python --target $@ $(TTSEM)

# Clang, and the C and C++ libraries for two processors: 100 MB. Beside the other packages, as they need none of it.
$(VENV)/ziglang: $(VENV)/installed
	@echo "installing $(ZIG)"
	@$(PIP) install --quiet --no-deps --target $@ $(ZIG)

# Beside the other packages, as it needs an old jsonschema.
$(VENV)/cffconvert: $(VENV)/created
	@echo "installing $(CFFCONVERT)"
	@$(PIP) install --quiet --no-warn-conflicts --target $@ $(CFFCONVERT)

$(VENV)/linters: $(VENV)/created pyproject.toml
	$(call packages,$(LINTERS))

$(VENV)/notebooks: $(VENV)/installed pyproject.toml
	$(call packages,$(NOTEBOOKS))

$(VENV)/docs: $(VENV)/installed pyproject.toml
	$(call packages,$(DOCS))

$(VENV)/auditors: $(VENV)/created pyproject.toml
	$(call packages,$(AUDITORS))

$(VENV)/releasers: $(VENV)/created pyproject.toml
	$(call packages,$(RELEASERS))

# Of torch no more than its stable ABI, of Python no more than its own: $(call audited,WHEEL).
define audited
	@rm -rf $(VENV)/audited
	@$(RUN) -m zipfile -e $(1) $(VENV)/audited
	$(VENV)/bin/torch-abi-audit --check torch $(VENV)/audited/condense_kernels
	$(VENV)/bin/abi3audit --strict --summary --assume-minimum-abi3 3.10 $(1)
endef

# One environment for each torch, one wheel for all of them: built on the first, so that no later torch can leak into it.
$(COMPAT:=/torch): .venv-compat/%/torch:
	@echo "creating .venv-compat/$*"
	@$(PYTHON) -m venv --clear $(@D)
	@$(call install_torch,$(@D)/bin/python) --quiet $* $(COMPAT_PIP_ARGS)
	@$(@D)/bin/python -m pip --disable-pip-version-check install --quiet 'setuptools>=77.0.3'
	@touch $@

.venv-compat/wheel: $(firstword $(COMPAT))/torch force
	@echo "building the wheel in $(<D)"
	@rm -rf $@
	@CONDENSE_BUILD_EXT=1 $(<D)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $@ .

# One for each transformers, on the first torch.
$(MODELS:=/torch): .venv-compat/%/torch:
	@echo "creating .venv-compat/$*"
	@$(PYTHON) -m venv --clear $(@D)
	@$(call install_torch,$(@D)/bin/python) --quiet $(firstword $(COMPAT_TORCH)) $(COMPAT_PIP_ARGS)
	@touch $@

# From another folder, and with none of its own on the path, so that the wheel is what is imported.
define tested
	@wheel=$$(echo .venv-compat/wheel/*.whl) && pip="$(@D)/bin/python -m pip --disable-pip-version-check" && \
	    $$pip install --quiet "$$wheel[test]" $(1) && $$pip install --quiet --force-reinstall --no-deps "$$wheel"
	@cd $(@D) && (PYTHONSAFEPATH=1 bin/python $(TEST) -q $(2) $(ARGS); echo $$? > status) 2>&1 | tee report
endef

$(COMPAT:=/status): .venv-compat/%/status: .venv-compat/%/torch .venv-compat/wheel force
	$(call tested,,../../tests)

$(MODELS:=/status): .venv-compat/%/status: .venv-compat/%/torch .venv-compat/wheel force
	$(call tested,$*,$(addprefix ../../,$(wildcard tests/test_models*.py)))
