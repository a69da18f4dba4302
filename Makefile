# `make` lists the targets. PYTHON= names the interpreter (3.11 or newer) that the virtual environment is made of.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VENV_STAMP := $(VENV)/.stamp-installed
PYTEST_ARGS ?=

# What the tests drive the project with; all are optional: a test that lacks its program says so and is skipped.
DEBIAN_PACKAGES := qemu-utils qemu-system-common nbdkit nbd-client nbd-server libnbd-bin python3-libnbd \
                   fio iproute2 nftables e2fsprogs resource-agents fence-agents

# What the virtual machines take.
VM_PACKAGES := qemu-system-x86 mmdebstrap busybox-static cpio e2fsprogs
VM_DIR := $(or $(REPLICA_VM_DIR),build/vm)
VM_IMAGE := $(VM_DIR)/root.ext4

# tests/vm takes minutes of emulation, tests/hosts minutes of waiting: they have targets of their own.
TEST_DIRS := $(wildcard tests/unit tests/interop tests/cluster tests/fuzz tests/sim tests/hosts/test_lab.py)
HOST_TESTS := $(filter-out tests/hosts/test_lab.py,$(wildcard tests/hosts/test_*.py))
BENCH_COLUMNS := min,median,mean,stddev,ops,rounds,iterations

# `make test` and `make test-vm` run so many files of tests at a time (1: none beside another).
TEST_JOBS ?= 2
AT_A_TIME = --numprocesses=$(TEST_JOBS) --dist=loadfile

SEEDS ?= 1000
START ?= 1
JOBS ?= 0

.PHONY: help venv setup demo test lint format bench bench-peers bench-compare bench-switchover bench-strain bench-steps bench-resync bench-in-kernel bench-failover test-hosts test-cluster tutorial soak database power-cuts hosts-setup vm-setup vm-image sim sim-canaries fuzz clients test-vm test-systemd clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
	  printf '  %-16s %s\n' "$$name" "$$text"; done

venv: $(VENV_STAMP) ## make .venv with the project and its tools (pip only)

setup: venv ## venv, and as root on Debian also the programs that the tests use
	@$(call install_missing,$(DEBIAN_PACKAGES))

hosts-setup: setup
	@tests/hosts/install-programs apache2

vm-setup: venv
	@$(call install_missing,$(VM_PACKAGES))

# Installs those of the packages $(1) that are missing; where that does not work it says so, and is content.
define install_missing
command -v dpkg-query >/dev/null || exit 0; \
missing=(); \
for package in $(1); do \
  [[ "$$(dpkg-query -W -f='$${db:Status-Status}' "$$package" 2>/dev/null || true)" == installed ]] \
    || missing+=("$$package"); \
done; \
(( $${#missing[@]} )) || exit 0; \
if (( EUID == 0 )) && command -v apt-get >/dev/null; then \
  export DEBIAN_FRONTEND=noninteractive; \
  { apt-get update -q && apt-get install -qy --no-install-recommends "$${missing[@]}"; } \
    || echo "setup: not installed: $${missing[*]}; the tests that need them will be skipped" >&2; \
else \
  echo "setup: not installed (that takes root): $${missing[*]}; the tests that need them will be skipped" >&2; \
fi
endef

$(VENV_STAMP): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: Python 3.11 or newer is needed: name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@# Debian splits ensurepip off into python3-venv, and without it leaves a half-made environment behind.
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
	  || { (( EUID == 0 )) && command -v apt-get >/dev/null && apt-get update -q \
	       && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends python3-venv; } \
	  || { echo "make: $(PYTHON) has no venv module: install python3-venv" >&2; exit 1; }
	@"$(BIN)/python" -c 'import pip' 2>/dev/null || "$(PYTHON)" -m venv --clear $(VENV)
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: venv ## two nodes on this machine: replicate, kill one, see the data again
	@$(BIN)/python -m replica.demo

test: hosts-setup ## all tests (PYTEST_ARGS= is passed on)
	$(BIN)/python -m pytest $(AT_A_TIME) $(TEST_DIRS) $(PYTEST_ARGS)

lint: venv ## ruff (rules and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv ## let ruff mend format and simple findings
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## latency and throughput, in process and of clients (pytest-benchmark)
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-sort=name --benchmark-columns=$(BENCH_COLUMNS) \
	  --timeout=0 $(PYTEST_ARGS)

bench-peers: ROUNDS ?= 4
bench-peers: setup ## beside other NBD servers and a bound, ROUNDS=4 times; writes docs/benchmarks.md and its charts
	$(BIN)/python -m bench.peers --rounds $(ROUNDS) --write-docs

bench-compare: ROUNDS ?= 8
bench-compare: setup ## this revision beside BASE=commit, ROUNDS=8 times
	@[[ -n "$(BASE)" ]] || { echo "make: name the other revision: make bench-compare BASE=main" >&2; exit 1; }
	$(BIN)/python -m bench.compare "$(BASE)" --rounds $(ROUNDS)

bench-switchover: RUNS ?= 50
bench-switchover: setup ## pauses of a client when the Primary changes, RUNS=50 times; writes docs/benchmarks.md
	$(BIN)/python -m bench.switchover --runs $(RUNS) --write-docs

bench-strain: setup ## a large volume, many clients and resources, slow disks (as root); writes docs/benchmarks.md
	$(BIN)/python -m bench.strain --write-docs

bench-steps: setup ## where the time of a write goes: steps, system calls, functions; writes docs/benchmarks.md
	$(BIN)/python -m bench.steps --write-docs

bench-resync: setup ## how long a resync takes, by how much differs; writes docs/benchmarks.md and its chart
	$(BIN)/python -m bench.resync_time --write-docs

bench-in-kernel: setup vm-image ## beside DRBD in the kernel, in a virtual machine; writes docs/benchmarks.md
	$(BIN)/python -m bench.in_kernel --write-docs

bench-failover: ROUNDS ?= 3
bench-failover: hosts-setup ## failover beside Debian's heartbeat, ROUNDS=3 times (as root); writes docs/failover.md
	@tests/hosts/install-programs heartbeat
	$(BIN)/python -m bench.failover --rounds $(ROUNDS) --write-docs

test-hosts: hosts-setup ## failover and the tutorial on hosts of namespaces (as root)
	$(BIN)/python -m pytest $(HOST_TESTS) $(PYTEST_ARGS)

test-cluster: hosts-setup ## the same with ten minutes of losses and busy processors (as root)
	REPLICA_LOSSES_S=600 $(BIN)/python -m pytest tests/hosts --timeout=0 $(PYTEST_ARGS)

soak: ROUNDS ?= 60
soak: setup ## the kill loop alone, ROUNDS=60 rounds (REPLICA_SEED= replays)
	REPLICA_KILL_ROUNDS=$(ROUNDS) $(BIN)/python -m pytest tests/cluster/test_kill_loop.py --timeout=0 $(PYTEST_ARGS)

database: ROUNDS ?= 20
database: setup ## databases on ext4 on the volume, ROUNDS=20 failovers each (as root; REPLICA_SEED= replays)
	REPLICA_DATABASE_ROUNDS=$(ROUNDS) $(BIN)/python -m pytest -s tests/cluster/test_database.py $(PYTEST_ARGS)

power-cuts: ROUNDS ?= 6
power-cuts: setup vm-image ## nodes in virtual machines lose power, ROUNDS=6 times (REPLICA_SEED= replays)
	REPLICA_POWER_CUT_ROUNDS=$(ROUNDS) REPLICA_VM_DIR=$(VM_DIR) $(BIN)/python -m pytest -s tests/vm/test_machine.py \
	  tests/vm/test_power_cut.py $(PYTEST_ARGS)

test-vm: setup vm-image ## the kernel's NBD client on a stock kernel: nbd-client, map, failovers (REPLICA_SEED= replays)
	REPLICA_VM_DIR=$(VM_DIR) $(BIN)/python -m pytest -s $(AT_A_TIME) tests/vm/test_kernel_device.py \
	  tests/vm/test_two_machines.py tests/vm/test_third_machine.py $(PYTEST_ARGS)

test-systemd: setup vm-image ## the units of contrib/systemd and the systemd agent, in a virtual machine that runs systemd
	REPLICA_VM_DIR=$(VM_DIR) $(BIN)/python -m pytest -s tests/vm/test_systemd.py $(PYTEST_ARGS)

vm-image: vm-setup $(VM_IMAGE) # as root; cached in build/vm or $REPLICA_VM_DIR

$(VM_IMAGE): tests/vm/build-image tests/vm/guest-init tests/vm/guest-agent.service pyproject.toml | vm-setup
	PYTHON=$(abspath $(BIN))/python tests/vm/build-image $(VM_DIR)

sim: venv ## the deterministic simulator: SEEDS=1000 runs from START=1, JOBS=0 (one for each processor)
	$(BIN)/python -m tests.sim --seeds $(SEEDS) --start $(START) --jobs $(JOBS)

sim-canaries: venv ## how many seeds the simulator takes to find each planted bug
	$(BIN)/python -m tests.sim --canary all --jobs $(JOBS)

fuzz: SECONDS = 60
fuzz: venv ## fuzz every parser for SECONDS=60 in all; what breaks one is kept in tests/fuzz/crashes
	@$(BIN)/python -c 'import atheris' 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check '.[fuzz]' \
	  || echo "fuzz: atheris cannot be installed here" >&2
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

clients: setup ## every client across every kind of failover (make test runs a part of them)
	REPLICA_ALL_CLIENTS=1 $(BIN)/python -m pytest tests/cluster/test_clients.py $(PYTEST_ARGS)

clean: ## remove everything that was made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
