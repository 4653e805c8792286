# make demo, make test, make bench, make clean.
#
# Needs Python 3.11 or newer with venv; everything else goes into .venv.

PYTHON ?= python3
BIN = .venv/bin
export VSOCKETS_TRANSPORT = fabric
# The tests start thousands of processes, each of which would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-replace test-every-line soak simulate bench site debian-package exhaustion test-arm64 test-containers test-examples test-guest test-systemd test-walk test-kernels test-kernel-tree test-peers test-recipes test-long release clean test-downloads test-site test-pytest test-ordinary-user test-debian-13 test-ruff test-mypy

# What a user needs, and no more.
demo: .venv/usable
	$(BIN)/vsock demo
	@echo
	@echo "vsock is $(CURDIR)/$(BIN)/vsock, and on the PATH after:  . $(BIN)/activate"
	@echo "Then, for instance:  vsock fabric -- go test ./...      (or cargo test, a C suite; docs/testing.md)"
	@echo "                     vsock run --cid 3 -- ./your_agent  (any program, in guest 3; docs/run.md)"
	@echo "Tests with pytest:   pip install pytest                 (the fixture is vsock_fabric)"

# Each part runs whatever becomes of the others; it fails if one of them does.
test: .venv/ready
	@$(MAKE) --keep-going --no-print-directory --jobs=1 \
		test-downloads test-site test-pytest test-ordinary-user test-debian-13 debian-package test-ruff test-mypy

test-downloads:
	PYTHONPATH=tests $(BIN)/python -m vm.downloads

# Links and cross-references of the documentation, as the generator of the site sees them.
test-site: site

# A worker more than processors: much of the time a test waits.
test-pytest:
	$(BIN)/python tests/retry.py --numprocesses 3 --dist loadfile --no-loadscope-reorder

# Root runs a part of them again: as an ordinary user, and on Debian 13 if mmdebstrap is installed.
test-ordinary-user:
	PYTHONPATH=tests $(BIN)/python -m environments.ordinary_user

test-debian-13:
	PYTHONPATH=tests $(BIN)/python -m environments.debian_13

test-ruff:
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet

test-mypy:
	$(BIN)/mypy

# The library's tests while vsockd is replaced four times a second, by another process each time.
test-replace: .venv/ready
	PYTHONPATH=tests $(BIN)/pytest -p replacing tests/library --deselect tests/library/test_full_backlog.py \
		--deselect tests/library/test_datagram.py::test_more_peers_than_cached_routes

# Requests of each kind while vsockd is killed at every line of its code in turn; ten minutes.
test-every-line: .venv/ready
	VSOCKETS_TEST_KILLS=300 $(BIN)/pytest tests/daemon/test_killed_at_lines.py --timeout 600

# vsockd is replaced a hundred times under ten thousand streams, and killed fifty times; three minutes.
soak: .venv/ready
	PYTHONPATH=tests $(BIN)/python -m daemon.soak
	PYTHONPATH=tests $(BIN)/python -m daemon.soak --replacements 0 --kills 50

# Two thousand seeds of the simulator, two minutes; docs/internals/simulation.md.
simulate: .venv/ready
	PYTHONPATH=tests $(BIN)/python -m simulation --seeds 2000

# Tests of which make test runs a short form, whole: four minutes.
test-long: .venv/ready
	VSOCKETS_TEST_LONG=1 $(BIN)/pytest --durations=15 tests/amqp/test_survival.py tests/nfs/test_kernel_tree.py \
		tests/simulation tests/daemon/test_fabric_by_the_guide.py tests/vm/test_vmci.py tests/vm/test_vmci_streams.py \
		tests/vm/test_virtio.py

# A core suite in an emulated arm64 machine; about ten minutes.
test-arm64: .venv/ready
	PYTHONPATH=tests $(BIN)/python -m environments.arm64

# dist/vsockets_VERSION_all.deb, after it was installed, used, upgraded and purged on Debian 12 and 13;
# skipped without root or mmdebstrap.
debian-package: .venv/ready
	PYTHONPATH=tests $(BIN)/python -m environments.debian_package

# The documentation as a site with a search, in site/; a warning is an error.
site: .venv-site/ready
	@rm -rf site
	.venv-site/bin/sphinx-build --nitpicky --fail-on-warning --keep-going --quiet --fresh-env \
		-c docs -d .venv-site/doctrees . site

bench: .venv/ready
	$(BIN)/python -m bench

# What one guest's connects take while another one attacks vsockd.
exhaustion: .venv/ready
	PYTHONPATH=tests $(BIN)/python -m daemon.exhaustion

# The product below Podman itself, in an emulated virtual machine: three minutes.
test-containers: .venv/ready
	$(BIN)/pytest tests/containers/with_podman.py --durations=10

# All examples, also those that make test leaves out: half a minute, and two minutes the first time.
test-examples: .venv/ready
	$(BIN)/pytest --override-ini 'python_files=test_*.py with_*.py' tests/examples --durations=20

# The Debian package under systemd, in an emulated Debian 13: three minutes.
test-systemd: .venv/ready
	$(BIN)/pytest tests/environments/with_systemd.py --durations=10

# systemd, VMware Tools, cloud-init, ssh and qemu-ga in emulated guests, Debian 13 and 12: six minutes.
test-guest: .venv/ready
	$(BIN)/pytest tests/environments/with_systemd_guest.py --durations=10

# docs/internals/kernels.md: guests' kernels by device, in emulated machines, one after the other.
test-kernels: .venv/ready
	PYTHONPATH=tests $(BIN)/python -m vm.kernels

# The Linux kernel's source, checked out by git over NFS in a virtual machine; docs/nfs.md has the times.
test-kernel-tree: .venv/ready
	PYTHONPATH=tests $(BIN)/python -m vm.kernel_tree

# docs/internals/peers.md: what happens to connections, with real machines and played ones.
test-peers: .venv/ready
	PYTHONPATH=tests $(BIN)/python -m vm.peers

# From README's install line to its pastes, on Debian 12 and 13 and in a container, timed: two minutes.
test-walk: .venv/ready
	PYTHONPATH=tests $(BIN)/python -m environments.walk

# The recipes for CI services: action.yml and ci/.
test-recipes: .venv/ready
	$(BIN)/pytest tests/packaging/with_recipes.py --durations=10

# Wheel, sdist, SBOM and checksums in dist/, from the commit, built twice and compared.
release:
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/pip install --quiet --disable-pip-version-check 'hatchling>=1.27' 'cyclonedx-bom>=5'
	.venv-release/bin/python packaging/release.py

clean:
	rm -rf .venv .venv-release .venv-site site .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/usable: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "needs Python 3.11 or newer with venv: apt install python3-venv (an older default: apt install python3.11-venv; make PYTHON=python3.11)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --disable-pip-version-check --editable .
	@touch $@

.venv/ready: .venv/usable
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	# pyfuse3 is compiled: for who has libfuse3-dev, pkg-config and python3-dev.
	! pkg-config --exists fuse3 2>/dev/null || \
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[nfs]'
	touch $@

.venv-site/ready: Makefile
	$(PYTHON) -m venv .venv-site
	.venv-site/bin/pip install --quiet --disable-pip-version-check 'sphinx>=8.1,<10' 'myst-parser>=4,<6' 'furo>=2024.8.6'
	@touch $@
