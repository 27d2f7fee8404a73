# Every target is one word and sets up what it needs; `make help` lists them.
#
# All paths are relative to this file's directory and no target is named by an absolute path,
# so that the tree may lie anywhere, spaces in its path included.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PY := .venv/bin/python
# Extra words for pytest, the demo or a benchmark: make test ARGS="-k store -x"
ARGS ?=

# Sanitized runs leave out what is slow and not ours: whole models, builds and the command line.
CORE_ONLY := --ignore-glob='*torch*' --ignore-glob='*transformers*' --ignore-glob='*model*' \
	--ignore-glob='*cli*' --ignore-glob='*demo*' --ignore-glob='*synth*' \
	--ignore=tests/test_c.py --ignore=tests/test_packaging.py --ignore=tests/test_readme.py

.PHONY: help setup demo test soak asan tsan fuzz lint format bench wheel clean

help:
	@echo "make demo    run a vision-language model with half of its weights in memory, and compare"
	@echo "make test    all tests, long loops in a short form"
	@echo "make soak    the long loops whole"
	@echo "make asan    C tests and core Python tests under the address and undefined sanitizers"
	@echo "make tsan    C tests and the thread tests under the thread sanitizer"
	@echo "make fuzz    decoders under libFuzzer, half a minute each (ARGS=SECONDS)"
	@echo "make lint    ruff, mypy, clang-format, and every C file with gcc and clang -Werror"
	@echo "make format  rewrite Python and C in the project's style"
	@echo "make bench   the benchmarks (give one by ARGS=benchmarks/NAME.py)"
	@echo "make wheel   a manylinux wheel in wheelhouse/, tried in an empty environment"
	@echo "make setup   only what the tests need: system libraries, .venv, the C extension"
	@echo "make clean   remove everything that was built, .venv included"

setup:
	@scripts/setup.sh test

demo:
	@scripts/setup.sh demo
	@.venv/bin/omnimem demo $(ARGS)

test: setup
	$(PY) -m pytest -n 2 --dist worksteal --durations=15 $(ARGS)

soak: setup
	OMNIMEM_SOAK=1 $(PY) -m pytest -m soak $(ARGS)

asan: setup
	scripts/sanitize.sh address,undefined tests/test_c.py $(ARGS)
	scripts/sanitize.sh address,undefined tests $(CORE_ONLY) $(ARGS)

tsan: setup
	scripts/sanitize.sh thread tests/test_c.py $(ARGS)
	scripts/sanitize.sh thread $(or $(wildcard tests/test_*thread*.py),tests/test_c.py) $(ARGS)

fuzz: setup
	scripts/fuzz.sh $(ARGS)

lint:
	@scripts/setup.sh test dev
	@scripts/lint.sh

format:
	@scripts/setup.sh dev
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .
	find csrc tests -name '*.[ch]' -print0 | xargs -0 clang-format -i

bench:
	@scripts/setup.sh bench
	@for script in $(or $(ARGS),$$(grep -l __main__ benchmarks/*.py)); do \
		echo "== $$script"; $(PY) "$$script"; \
	done

wheel:
	@scripts/setup.sh dev
	@scripts/wheel.sh

clean:
	rm -rf build dist wheelhouse .venv .venv.lock .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf python/*.egg-info python/omnimem/_core*.so
	find python tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
