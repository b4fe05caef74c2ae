# Every target sets up what it needs; all share the virtual environment .venv. System packages stand in
# tests/system-packages.txt and are installed only where some are missing, and only as root.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The first Python that is new enough; name another one with `make PYTHON=…`.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
  $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
TESTS ?= tests
PYTEST := $(BIN)/python -m pytest
PYTEST_ARGS ?=
# Tests at a time: most of them wait for a daemon. Each file stays on one worker, with its fixtures.
WORKERS ?= 2
ACTIONLINT := .cache/bin/actionlint

.PHONY: dist pythons packages-test rehearse pages help setup demo unit sim sim-mutants test check audit faults matrix brokers soak bench chart pictures \
  sbom clean packages

help:
	@echo "make demo    a real guest's disk fails, and the error comes out as a CloudEvent"
	@echo "make unit    the pure tests, in seconds: no root, no broker, no network"
	@echo "make pythons   the unit tests on newer Pythons, those of other Debian releases"
	@echo "make sim     a simulated cloud against every promise, in virtual time (SEEDS=200, HOURS=h, SEED=n, PLAN=file, GUEST=name, KEEP=file)"
	@echo "make test    all tests, with real QEMU guests and a real RabbitMQ (TESTS=…, PYTEST_ARGS=…)"
	@echo "make check   ruff, mypy --strict, import-linter, the schemas' compatibility, wording, workflows, Dockerfile, pages"
	@echo "make setup   system packages and .venv, as make test needs them"
	@echo "make faults | matrix | brokers | soak | bench | chart   one family of tests alone"
	@echo "make pictures   docs/fleet.svg and docs/dashboard.svg, from a run of eight minutes"
	@echo "make audit   known vulnerabilities of the dependencies (asks the network)"
	@echo "make sbom    a bill of materials of the installed package (CycloneDX)"
	@echo "make dist    sdist, wheel, chart, .deb, .rpm, SBOM and checksums, below dist/"
	@echo "make packages-test   the .deb and .rpm installed, run, upgraded and removed in fresh Debian roots"
	@echo "make rehearse   the release workflow's steps on dist/, up to the upload, with an index and a registry on this machine"
	@echo "make pages   the documents as HTML, below build/pages"
	@echo "make clean   remove everything that was made here, .venv too"

# --- what the targets need

packages:
	@tests/install-packages python demo test

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "virtbus needs Python 3.11 or newer; found none" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(VENV)/bin/python
	@echo "Installing virtbus with all extras into $(VENV)"
	$(PIP) install --editable '.[agent,kafka,nova,kubernetes,dev]'
	@touch $@

setup: packages
	@$(MAKE) --silent --no-print-directory $(VENV)/.installed

# --- for a stranger

# Where packages can't be had, the demo says so and replays recorded errors, which needs no libvirt.
demo:
	@tests/install-packages python demo || true
	@$(MAKE) --silent --no-print-directory $(VENV)/.demo
	@$(BIN)/python -m tests.lab.demo

$(VENV)/.demo: pyproject.toml $(VENV)/bin/python
	@if pkg-config --exists libvirt 2>/dev/null; then extra='.[agent]'; else extra='.'; fi; \
	  echo "Installing $$extra into $(VENV)"; $(PIP) install --editable "$$extra"
	@touch $@

# --- for a developer

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python schemas/check.py
	$(BIN)/python .packaging/release.py check
	$(PYTEST) -q tests/unit/test_english.py
	$(BIN)/zizmor --quiet --offline .github
	$(BIN)/hadolint Dockerfile
	@if test -x $(ACTIONLINT) || command -v go >/dev/null; then \
	  $(MAKE) --silent --no-print-directory $(ACTIONLINT) && echo $(ACTIONLINT) && $(ACTIONLINT); \
	elif test "$$VIRTBUS_CI" = 1; then echo "actionlint is built with Go, which this machine lacks" >&2; exit 1; \
	else echo "NOT CHECKED: the workflows by actionlint, which is built with Go" >&2; fi
	@$(MAKE) --silent --no-print-directory pages

$(ACTIONLINT):
	GOBIN=$(CURDIR)/$(dir $@) go install github.com/rhysd/actionlint/cmd/actionlint@v1.7.12

# The documents as pages, below build/pages; a dead link or anchor is an error. Not --quiet: what that hides is not
# counted as a warning either.
pages: setup
	@mkdir -p build && NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file .mkdocs.yml >build/pages.log 2>&1 \
	  || { cat build/pages.log >&2; exit 1; }

# Without libvirt's headers the agent's own package can't be built, and these tests do without it.
$(VENV)/.unit: pyproject.toml $(VENV)/bin/python
	@if test ! -e $(VENV)/.installed; then \
	  if pkg-config --exists libvirt 2>/dev/null; then extra='.[agent,kafka,dev]'; else extra='.[kafka,dev]'; fi; \
	  echo "Installing $$extra into $(VENV)"; $(PIP) install --editable "$$extra"; fi
	@touch $@

unit: $(VENV)/.unit
	$(PYTEST) -q $(PYTEST_ARGS) tests/unit

# The unit tests on the Python of Debian 13 and of the release after it. The first time it makes root file systems.
pythons: setup
	@tests/install-packages matrix
	$(BIN)/python -m tests.lab.pythons

# SEED=n tells the story of one seed, GUEST=guest-11 that of one guest in it. A seed takes half a second of a core;
# HOURS=2 plays what fits into two hours of this machine.
sim: $(VENV)/.unit
	$(BIN)/python -m tests.sim $(if $(PLAN),--plan $(PLAN),$(if $(SEED),--seed $(SEED),\
		$(if $(SEEDS),--seeds $(SEEDS)) $(if $(HOURS),--hours $(HOURS)))) \
		$(if $(GUEST),--guest $(GUEST)) $(if $(KEEP),--shrink $(KEEP))

# Each fault of tests/sim/mutants is put back in turn; the simulation has to find it within 2,000 seeds.
sim-mutants: $(VENV)/.unit
	$(BIN)/python -m tests.sim.mutants

# A worker that dies is not replaced: pytest-xdist 3.8 then waits for ever for tests that are done (issue 1323).
test: setup
	$(PYTEST) -n $(WORKERS) --dist loadfile --max-worker-restart 0 $(PYTEST_ARGS) $(TESTS)

# FAULTS names scenarios, or says --quick or --list; all of them take more than an hour on two cores.
faults: setup
	@tests/install-packages faults
	$(BIN)/python -m tests.faults $(FAULTS)

# The genuine helm, a real control plane, the images as pods, a collector. The first time it builds all of them: half
# an hour. Without Go what needs them is skipped aloud, or fails with VIRTBUS_CI=1.
chart: setup
	@tests/install-packages image
	@for part in apiserver collector image; do $(BIN)/python -m tests.chart.$$part || test "$$VIRTBUS_CI" != 1; done
	$(PYTEST) $(PYTEST_ARGS) -o python_files='test_*.py with_*.py' tests/chart tests/integrations/with_*.py

# What `make dist` left in dist/: packages installed, run with real guests, upgraded from the code before (BEFORE names
# another commit), removed, in two Debian releases; wheel, chart and images published to an index and a registry on
# loopback; two builds compared. The first time it makes root file systems and images: half an hour.
packages-test: setup
	@tests/install-packages matrix packages image
	@$(BIN)/python -m tests.lab.chroot bookworm trixie
	@$(BIN)/python -m tests.chart.image
	before=$$($(BIN)/python -m tests.packages.before $(BEFORE)) && VIRTBUS_PACKAGE_BEFORE="$$before" \
	  $(PYTEST) $(PYTEST_ARGS) -o python_files='with_*.py' tests/packages

# The release workflow's steps on dist/, up to the upload: an index, a registry and a layout on this machine. It tells
# what it did; what it can't do stands in docs/contributing.md.
rehearse: setup
	@tests/install-packages packages image
	@$(BIN)/python -m tests.chart.image
	$(PYTEST) -v $(PYTEST_ARGS) tests/packages/with_release.py

# A table with pass or short a row; 1 below a committed floor. BENCH_ARGS="--only idle --quick", say.
bench: setup
	$(BIN)/python -m tests.bench $(BENCH_ARGS)

matrix: setup
	@tests/install-packages matrix
	$(PYTEST) $(PYTEST_ARGS) tests/lab/matrix.py tests/lab/matrix_changes.py

# The tests of buses and consumers on each release of RabbitMQ and Kafka that is supported, with a table at the
# end. BROKERS names some of them, such as rabbitmq-forky or kafka-4.4.0.
brokers: setup
	@tests/install-packages matrix
	$(BIN)/python -m tests.brokers $(BROKERS)

# An hour under load and faults, then ten minutes of fuzzing: VIRTBUS_SOAK_SECONDS, VIRTBUS_FUZZ_SECONDS.
soak: setup
	@$(BIN)/python -m tests.soak.soak
	@$(BIN)/python -m tests.soak.fuzz

# Six hosts with real guests, RabbitMQ and Prometheus; what breaks when is told in tests/pictures/world.py.
pictures: setup
	$(BIN)/python -m tests.pictures

# Asks the vulnerability databases (network); the tool lives in an environment of its own.
audit: setup
	@test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && \
	  build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit; }
	@$(BIN)/python -m pip freeze --exclude-editable >build/audit/installed.txt
	@build/audit/bin/pip-audit --disable-pip --no-deps --strict --progress-spinner off \
	  --requirement build/audit/installed.txt >build/audit/found 2>build/audit/log; status=$$?; \
	cat build/audit/found; \
	if [ $$status -ne 0 ] && [ ! -s build/audit/found ]; then \
	  echo "Not audited, the vulnerability database gave no answer: $$(tail -n 1 build/audit/log)" >&2; \
	else tail -n 1 build/audit/log >&2; fi; exit $$status

# What is in the image: the Python packages that .docker/ pins, and the Debian packages of an image that
# `make chart` built, if there is one.
sbom: $(VENV)/bin/python
	@rm -rf build/sbom && mkdir -p build
	$(PYTHON) -m venv build/sbom/tool && $(PYTHON) -m venv --without-pip build/sbom/package
	build/sbom/tool/bin/pip install --quiet --disable-pip-version-check --require-hashes --requirement .packaging/sbom.txt
	build/sbom/tool/bin/pip --python build/sbom/package/bin/python install --quiet --disable-pip-version-check \
	  --require-hashes --requirement .docker/requirements-agent.txt
	build/sbom/tool/bin/pip --python build/sbom/package/bin/python install --quiet --disable-pip-version-check \
	  --no-deps .
	build/sbom/tool/bin/cyclonedx-py environment build/sbom/package/bin/python --pyproject pyproject.toml \
	  --output-file build/virtbus.cdx.json
	@$(PYTHON) .docker/sbom.py build/virtbus.cdx.json
	@echo "build/virtbus.cdx.json"

# Everything that a release consists of, below dist/ (Debian 12, root for the build's own packages).
dist: setup
	@tests/install-packages dist
	@HELM=$$($(BIN)/python -c 'from tests.chart import tools; print(tools.helm("4"))') /usr/bin/python3 .packaging/build.py

clean:
	rm -rf $(VENV) .cache build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
