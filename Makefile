# From a fresh machine to the demo or the tests. Needs make, git and Python 3.11 or newer; what else is missing is
# installed: Python packages with pip into .venv/ (from wherever pip is configured to look), the rest with apt-get.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
FONTS := .venv/debian/usr/share/fonts/truetype/noto/NotoSans-Regular.ttf
FAKETIME := .venv/debian/libfaketimeMT.so.1
BENCH := .venv-bench/bin
BENCH_READY := .venv-bench/.ready
# Three at once on two cores, for many tests wait for processes that they have started.
TEST := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest --numprocesses 3 --dist worksteal
TEST_TOOLS := $(READY) chromium $(BIN)/postgres $(BIN)/promtool $(BIN)/redis-server $(BIN)/strace $(FONTS)
# Mathematics, contracts, formats, configuration: nothing that starts a daemon.
QUICK_TESTS := --ignore tests/numerics/test_batching.py --ignore tests/learners/test_dp_mixture.py tests/numerics tests/learners tests/properties tests/contracts tests/formats tests/house/test_code.py \
	tests/house/test_imports.py tests/house/test_figures.py tests/deploy/test_config.py tests/deploy/test_health.py tests/deploy/test_monitor.py tests/streams/test_wire.py \
	tests/streams/test_spec.py tests/streams/test_tensor_files.py tests/trainers/test_build.py \
	online_meta/testing streams/testing trainers/testing deploy/testing
# Which sixth of the slow tests `make check` runs: commits take turns.
PART ?= $(shell echo $$(( $$(git rev-list --count HEAD 2>/dev/null || echo 0) % 6 )))

# PYTHON=... chooses the interpreter that .venv/ is made with, MINUTES=... says how long to go on, SEED=... what is drawn
# by chance, ARGS=... is passed on to what is run.
PYTHON ?=
ARGS ?=
TABLE ?= first_table sinusoid_known_answers glyphs regret_theory non_stationary segmentation \
	unsegmented rainbow moml regression pool pool_cost package_texts filtered_glyphs statistician bayes \
	neural_processes
TORCH ?= 2.13.0
MINUTES ?=
SEED ?=

.PHONY: help setup demo test test-quick test-slow test-part lint check format docs reference experiments experiments-cost \
	bench bench-rounds bench-distributed bench-memory bench-streams bench-answers crash fuzz soak pins clean chromium

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(READY)  ## the environment, .venv/, with the versions of constraints.txt

demo: $(READY)  ## the main job on real data, with the dashboard; ARGS="--rounds 100 --keep-serving"
	@exec $(BIN)/online-meta demo $(ARGS)

test: $(TEST_TOOLS)  ## every kind of test, without the slow cases; ARGS="-k reptile"
	@$(TEST) --kills 1 -m "not slow" $(ARGS)

test-quick: $(READY)  ## mathematics, contracts, formats and configuration
	@$(TEST) -m "not slow" $(QUICK_TESTS) $(ARGS)

test-slow: $(TEST_TOOLS)  ## the tests that `make test` leaves out: all kills, ranks, machines, experiments
	@$(TEST) -m slow $(ARGS)

test-part: $(TEST_TOOLS)
	@$(TEST) --hypothesis-profile repeatable --slow-part $(PART) $(ARGS)

lint: $(READY)  ## formatting, lint and types
	@set -x
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test-part  ## what CI runs: formatting, lint, types, `make test` and a sixth of the slow tests

reference: $(READY)  ## write the generated reference pages, docs/reference/
	@$(BIN)/python -m tests.docs.reference

docs: $(READY)  ## the documentation as a site, site/index.html; fails on a stale page, a dead link or an unknown reference
	@$(BIN)/python -m tests.docs.reference --check
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mkdocs build --strict $(ARGS)

experiments: $(READY) $(FONTS)  ## the tables of docs/results, some hours; continues where it stopped; TABLE=glyphs ARGS="--jobs 1"
	@for table in $(TABLE); do $(BIN)/python -m tests.experiments.$$table $(ARGS); done

experiments-cost: $(READY)  ## the cost of a round stays constant, 80 minutes; continues where it stopped; ARGS="--quick --out /tmp"
	@exec $(BIN)/python -m tests.experiments.round_cost $(ARGS)

bench: $(BENCH_READY)  ## time and memory next to peers, into docs/results, 25 minutes; ARGS="--only sinusoid_k5"
	@exec $(BENCH)/python -m tests.benchmarks $(ARGS)

bench-rounds: $(BENCH_READY) $(READY)  ## whole rounds next to plain JAX, into docs/results, 40 minutes; ARGS="--only rounds_k1"
	@exec $(BENCH)/python -m tests.benchmarks.rounds $(ARGS)

bench-distributed: $(READY)  ## gain and cost of several ranks, 8 minutes; ARGS="--kills 5"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.benchmarks.distributed $(ARGS)

bench-memory: $(READY)  ## error of the estimate of peak memory, 10 minutes; ARGS="--only conv4"
	@exec $(BIN)/python -m tests.benchmarks.memory $(ARGS)

bench-streams: $(READY) $(BIN)/redis-server  ## speed of the streams and the history, 8 minutes; ARGS="--only http_ingest"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.benchmarks.streams $(ARGS)

bench-answers: $(READY) $(BIN)/wrk  ## speed of answers while training goes on, 8 minutes; ARGS="--only 'one learner'"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.benchmarks.answers $(ARGS)

crash: $(READY) $(BIN)/strace  ## kill and harm the history at every system call that changes a file; SEED=1 ARGS="--every 10"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.crash --seed $(or $(SEED),0) $(ARGS)

fuzz: $(READY)  ## bad input of every kind, for 5 minutes; MINUTES=60 ARGS="--only npz"
	@$(BIN)/python -c 'import atheris' 2>/dev/null \
		|| $(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[fuzz]'
	exec $(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),5) $(ARGS)

soak: $(READY) $(BIN)/redis-server $(FAKETIME)  ## a daemon among producers and a fault a minute, then all checks; MINUTES=30 ARGS="--every 20"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30) --faketime $(FAKETIME) $(ARGS)

format: $(READY)  ## format the code, mend what lint can mend
	@$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what make made; runs/ stays
	rm -rf .venv .venv-bench build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The newest versions that pyproject.toml allows, but for torch, with which results change. Left out are a local build's
# mark (+cpu), which other machines could not ask for, and what a CUDA build of torch brings, for torch itself pins it.
pins: scratch := $(shell mktemp -u -d)
pins:  ## resolve the dependencies anew in a clean environment and write constraints.txt
	@$(shell_functions)
	trap 'rm -rf $(scratch) constraints.txt.new build online_meta.egg-info' EXIT
	make_environment $(scratch)
	$(scratch)/bin/python -m pip install --upgrade setuptools
	$(scratch)/bin/python -m pip install torch==$(TORCH) deepspeed
	$(scratch)/bin/python -m pip install --no-build-isolation torch==$(TORCH) '.[dev,fuzz]'
	$(scratch)/bin/python -m pip freeze --all --exclude pip --exclude online-meta \
		| sed -E '/^(nvidia|cuda|triton)/d; s/\+[a-z0-9.]+$$//' > constraints.txt.new
	! grep -vE '^[A-Za-z0-9._-]+==[A-Za-z0-9.]+$$' constraints.txt.new || fail "these lines are no plain pins"
	mv constraints.txt.new constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(shell_functions)
	$(BIN)/python -c 'import pip' 2>/dev/null || make_environment .venv
	$(PIP) install --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt deepspeed  # from its source, which wants a build of its own
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

# The peers live apart: nothing that the project needs is installed or held back for their sake.
$(BENCH_READY): pyproject.toml constraints.txt tests/benchmarks/requirements.txt
	@$(shell_functions)
	$(BENCH)/python -c 'import pip' 2>/dev/null || make_environment .venv-bench
	PIP=($(BENCH)/python -m pip --disable-pip-version-check --no-input install --constraint constraints.txt)
	"$${PIP[@]}" setuptools torch==$(TORCH)
	"$${PIP[@]}" --requirement tests/benchmarks/requirements.txt
	"$${PIP[@]}" --no-build-isolation --editable '.[daemon]'
	touch $@

chromium:
	@$(shell_functions)
	command -v chromium >/dev/null || install_packages chromium

# Unpacked and not installed: Debian's package would start a service.
$(BIN)/promtool: | $(READY)
	@$(shell_functions)
	unpack_package prometheus
	cd .venv/debian
	ln -sf ../debian/usr/bin/prometheus ../debian/usr/bin/promtool ../bin/

# The same; libraries that a Debian may lack are unpacked too.
$(BIN)/redis-server: | $(READY)
	@$(shell_functions)
	for package in libatomic1 libjemalloc2 liblzf1 redis-tools redis-server; do unpack_package $$package; done
	echo '#!/bin/sh
	here=$$(dirname "$$(readlink -f "$$0")")/../debian
	LD_LIBRARY_PATH=$$(echo "$$here"/usr/lib/*-linux-gnu) exec "$$here"/usr/bin/redis-server "$$@"' > $@
	chmod +x $@

# Unpacked where the machine has none: Debian's package would start a service.
$(BIN)/postgres: | $(READY)
	@$(shell_functions)
	found=$$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1 || true)
	if [ -x "$$found/postgres" ]; then
		ln -sf "$$found/initdb" "$$found/postgres" $(BIN)/
		exit
	fi
	apt-cache show postgresql >/dev/null 2>&1 || update_packages postgresql
	server=$$(apt-cache depends postgresql | sed -nE 's/.*Depends: (postgresql-[0-9]+)$$/\1/p')
	for package in $$(apt-cache depends "$$server" | sed -nE 's/.*Depends: (lib[a-z0-9.+-]+)$$/\1/p'); do
		case $$package in libc6 | libgcc* | libstdc* | libllvm*) ;; *) unpack_package "$$package" ;; esac
	done
	unpack_package "$$server"
	for program in initdb postgres; do
		echo "#!/bin/sh
		here=\$$(dirname \"\$$(readlink -f \"\$$0\")\")/../debian
		LD_LIBRARY_PATH=\$$(echo \"\$$here\"/usr/lib/*-linux-gnu) exec \"\$$here\"/usr/lib/postgresql/$${server#postgresql-}/bin/$$program \"\$$@\"" > $(BIN)/$$program
		chmod +x $(BIN)/$$program
	done

# Unpacked where the machine has none.
$(BIN)/strace: | $(READY)
	@$(shell_functions)
	if found=$$(command -v strace); then
		ln -sf "$$found" $@
	else
		unpack_package strace
		ln -sf ../debian/usr/bin/strace $@
	fi

# The same; the library that it needs is unpacked too.
$(BIN)/wrk: | $(READY)
	@$(shell_functions)
	if found=$$(command -v wrk); then
		ln -sf "$$found" $@
		exit
	fi
	for package in libluajit2-5.1-2 wrk; do unpack_package $$package; done
	echo '#!/bin/sh
	here=$$(dirname "$$(readlink -f "$$0")")/../debian
	LD_LIBRARY_PATH=$$(echo "$$here"/usr/lib/*-linux-gnu) exec "$$here"/usr/bin/wrk "$$@"' > $@
	chmod +x $@

# The folder in the package is named after the machine.
$(FAKETIME): | $(READY)
	@$(shell_functions)
	unpack_package libfaketime
	cd .venv/debian
	ln -sf usr/lib/*/faketime/libfaketimeMT.so.1 ./
	test -e libfaketimeMT.so.1 || fail "libfaketime's package has no libfaketimeMT.so.1"

# Unpacked and not installed, for nothing else on the machine has a use for them.
$(FONTS): | $(READY)
	@$(shell_functions)
	unpack_package fonts-noto-core
	touch $@

define shell_functions
fail() { echo "error: $$*" >&2; exit 1; }

as_root=()

update_packages() {  # the list of what Debian has, as root or through sudo
	command -v apt-get >/dev/null || fail "$$* is missing, and there is no apt-get to install it with: install it yourself"
	if [ "$$(id -u)" != 0 ]; then
		command -v sudo >/dev/null || fail "$$* is missing: run as root: apt-get install $$*"
		as_root=(sudo)
	fi
	"$${as_root[@]}" apt-get update -qq || fail "apt-get update failed, so $$* cannot be installed"
}

install_packages() {  # Debian's
	update_packages "$$@"
	"$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$$@" \
		|| fail "apt-get could not install $$*"
}

unpack_package() {  # one of Debian's, into .venv/debian
	mkdir -p .venv/debian
	(
		cd .venv/debian
		apt-get download -qq "$$1" 2>/dev/null || { update_packages "$$1"; apt-get download -qq "$$1"; } \
			|| fail "apt-get could not download $$1"
		dpkg --extract "$$1"_*.deb .
	)
}

find_python() {
	local candidate
	for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
			echo "$$candidate"
			return
		fi
	done
	fail "Python 3.11 or newer is needed (looked for $(or $(PYTHON),python3.11 to python3.13 and python3)); PYTHON=... names another"
}

make_environment() {
	local python version
	python=$$(find_python)
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then
		version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
		install_packages "python$$version-venv"
	fi
	"$$python" -m venv --clear "$$1"
}
endef
