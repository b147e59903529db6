# SPDX-License-Identifier: Apache-2.0
# Everything is built into .venv and build/; `make clean` removes both. PYTHON=/path/to/python3 chooses
# the interpreter for a new .venv (3.11 or newer).

VENV := .venv
BIN := $(VENV)/bin
PACKAGES := accounting cache faults service transport
CORES := $(addsuffix /core,cache accounting faults transport) accounting/core/overlay faults/core/populate \
	transport/core/blocks transport/core/guest transport/core/nbd transport/preload transport/library
C_SOURCES := $(wildcard $(addsuffix /*.c,$(CORES)))
C_HEADERS := $(wildcard $(addsuffix /*.h,$(CORES)))
CORE := cache/_core.abi3.so
PRELOAD := transport/_preload.abi3.so
FORMATTED_C := $(wildcard $(addsuffix /*.[ch],$(CORES) bench/core tests/* tests/*/*))
PIP := $(BIN)/pip install -qq --disable-pip-version-check

# tools/bootstrap.sh puts promtool into .venv if the system has none.
PROMTOOL := PATH="$(BIN):$$PATH" promtool

# Warnings are errors here and in `make check`, but not in installs with other compilers.
C_CHECK := gcc -std=gnu11 -O2 -Wall -Wextra -Werror -pthread -I. -c -o /dev/null

# `make sanitize SANITIZE=address SANITIZE_TESTS=tests/faults` for one sanitizer, and some tests.
SANITIZE := thread address
SANITIZE_TESTS := $(wildcard tests/cache tests/faults tests/stress)

# One test process for each CPU: with more, the tests' own clients get too little CPU. A file stays in one
# process, since its tests share fixtures.
TEST_PROCESSES ?= $(shell nproc)
PYTEST := $(BIN)/pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

FUZZ_SECONDS := 60

export PYTHON
# Container images tend to set it. Every started process would then compile all its modules again, which takes more than
# half of a daemon's time to start and end.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo demo-vm test test-quick check dashboards man files stubs format bench misses hit-rates fuzz \
	sanitize wheel clean links guest-library install-guest-library

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(VENV)/.installed $(CORE) $(PRELOAD) ## install everything into .venv and build the C core; idempotent

# The dependencies. Editable: Python edits need no `make`, and `make` rebuilds the C core in place.
$(VENV)/.installed: pyproject.toml setup.py service/runtime/version.py tools/bootstrap.sh
	@sh tools/bootstrap.sh $(VENV)
	@$(PIP) -e '.[dev]'
	@touch $@

# A removed file triggers no rebuild, so the list of files is a prerequisite too.
C_LIST := build/core-files
$(shell mkdir -p build; echo '$(sort $(C_SOURCES) $(C_HEADERS))' | cmp -s - $(C_LIST) || \
	echo '$(sort $(C_SOURCES) $(C_HEADERS))' > $(C_LIST))

$(CORE) $(PRELOAD) &: $(C_SOURCES) $(C_HEADERS) $(C_LIST) cache/core_build.py | $(VENV)/.installed
	@CFLAGS=-Werror $(BIN)/python setup.py -q build_ext --inplace --force

demo: setup ## a short tour on real images
	@$(BIN)/python bench/demo.py

demo-vm: setup ## three machines boot from one disk in memory
	@$(BIN)/python bench/demo_vm.py

test: setup ## every test; TESTS=tests/cache for some, TEST_PROCESSES=1 for one at a time
	@$(PYTEST) --durations=10 $(TESTS)

test-quick: setup ## all but the tests of whole systems; run it after an edit
	@$(PYTEST) -m 'not slow' $(TESTS)

check: setup links ## lint, types, import contract, C warnings, dashboards and rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(FORMATTED_C)
	@$(BIN)/codespell
	@$(BIN)/python tools/layout.py
	@echo "check: $(words $(FORMATTED_C)) C files are laid out, no file has a misspelling or violates .editorconfig"
	$(BIN)/python tools/core_stub.py --check
	$(BIN)/mypy $(addprefix -p cowshed.,$(PACKAGES)) -p dashboards
	$(BIN)/lint-imports --no-logo --cache-dir build/import-linter
	$(BIN)/python -m dashboards.build --check
	@$(PROMTOOL) check config dashboards/prometheus.yml >/dev/null
	@$(PROMTOOL) test rules tests/dashboards/rules/*.yaml >/dev/null
	@echo "check: dashboards are up to date, rules are valid and pass their tests"
	@sh tools/check_unit.sh service/cowshed.service $(BIN)/cowshed
	@echo "check: systemd accepts the unit"
	@set -e; for file in $(C_SOURCES); do $(C_CHECK) $$file; done
	@set -e; for file in $(C_HEADERS); do $(C_CHECK) -x c -include $$file /dev/null; done
	@echo "check: $(words $(C_SOURCES)) C sources and $(words $(C_HEADERS)) headers compile without warnings"

# The namespace as folders, for tools that do not follow the editable install's import hook.
links:
	@mkdir -p build/dev/cowshed
	@for package in $(PACKAGES); do ln -sfn ../../../$$package build/dev/cowshed/$$package; done

dashboards: setup ## write dashboards/generated/ from dashboards/*.py
	@$(BIN)/python -m dashboards.build

# The guest library for other languages, without Python. PREFIX and DESTDIR have their usual meaning.
PREFIX := /usr/local
GUEST_LIBRARY := build/guest-library
GUEST_SOURCES := $(wildcard transport/core/guest/*.c transport/library/*.c)
GUEST_FLAGS := -std=gnu11 -O2 -g -Wall -Wextra -Werror -pthread -fPIC -fvisibility=hidden -UNDEBUG -I.

guest-library: $(GUEST_LIBRARY)/libcowshed_guest.so.1 ## the guest library for C, with header and .pc file

$(GUEST_LIBRARY)/libcowshed_guest.so.1: $(GUEST_SOURCES) $(wildcard transport/core/guest/*.h transport/library/*)
	@mkdir -p $(GUEST_LIBRARY)
	@gcc $(GUEST_FLAGS) -shared -Wl,-soname,libcowshed_guest.so.1 -Wl,-z,defs -o $@ $(GUEST_SOURCES)

install-guest-library: guest-library ## install it below PREFIX (/usr/local)
	@install -D -m 755 $(GUEST_LIBRARY)/libcowshed_guest.so.1 $(DESTDIR)$(PREFIX)/lib/libcowshed_guest.so.1
	@ln -sfn libcowshed_guest.so.1 $(DESTDIR)$(PREFIX)/lib/libcowshed_guest.so
	@install -D -m 644 transport/library/cowshed_guest.h $(DESTDIR)$(PREFIX)/include/cowshed_guest.h
	@install -d $(DESTDIR)$(PREFIX)/lib/pkgconfig
	@sed 's|@PREFIX@|$(PREFIX)|' transport/library/cowshed_guest.pc.in > \
		$(DESTDIR)$(PREFIX)/lib/pkgconfig/cowshed_guest.pc

man: setup ## write the man pages into build/man
	@$(BIN)/python tools/man.py build/man

files: setup ## list the source files, with what each owns
	@$(BIN)/python tools/files.py

stubs: setup ## write the C extensions' typed stubs from their headers
	@$(BIN)/python tools/core_stub.py

format: setup ## lay out the code
	@$(BIN)/ruff check -q --fix-only .
	@$(BIN)/ruff format -q .
	@$(BIN)/clang-format -i $(FORMATTED_C)

bench: setup ## measure; docs/benchmarks.md describes the cases
	@$(BIN)/python bench/run.py

misses: setup ## compare eviction policies on recorded accesses; writes the table of docs/eviction.md
	@$(BIN)/python bench/misses.py --write

hit-rates: setup ## compare the hit rates that a daemon shows with true ones; about fourteen minutes
	@$(BIN)/python bench/hit_rates.py

fuzz: setup ## fuzz all code that reads a peer's bytes, coverage-guided; FUZZ_SECONDS=60 for each target
	@FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/pytest -q --timeout=0 tests/fuzz

sanitize: setup ## the tests that race, on a core built with each sanitizer of SANITIZE
	@set -e; for sanitizer in $(SANITIZE); do \
		sh tools/sanitize.sh $(VENV) $$sanitizer $(SANITIZE_TESTS); \
	done

wheel: setup ## the abi3 wheel, into dist/
	@$(BIN)/pip wheel -qq --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean: ## remove everything that make made
	rm -rf $(VENV) build dist *.egg-info cache/_core.*.so transport/_preload.*.so .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
