#!/usr/bin/env bash
# Runs pytest on a build with sanitizers, which lives beside the ordinary one.
#
#   scripts/sanitize.sh address,undefined|thread TESTS...
#
# The C tests are instrumented programs and need nothing else; Python itself is not
# instrumented, so for Python tests the runtime is preloaded and a whole build of the
# package in build/SANITIZERS/lib goes before the installed one.
set -euo pipefail
cd "$(dirname "$0")/.."

sanitize=$1
shift
base=build/${sanitize//,/-}
python=.venv/bin/python
export OMNIMEM_SANITIZE=$sanitize OMNIMEM_DEBUG=1
export UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1"
# The thread sanitizer of gcc 12 and 13 needs a kernel that places mappings as it always did.
run=()
if [ "$sanitize" = thread ] && command -v setarch >/dev/null && setarch -R true 2>/dev/null; then
	run=(setarch -R)
fi

if [ "$1" = tests/test_c.py ]; then
	exec "${run[@]}" "$python" -m pytest "$@"
fi

"$python" setup.py --quiet build --build-base "$base/build" --build-lib "$base/lib" --force
runtime=libasan.so
if [ "$sanitize" = thread ]; then
	runtime=libtsan.so
fi
# CPython frees little at exit, so leaks are looked for by the C tests alone.
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:handle_segv=1"
export TSAN_OPTIONS="halt_on_error=1:second_deadlock_stack=1"
export PYTHONPATH="$PWD/$base/lib" PYTHONMALLOC=malloc
preload=$("${CC:-gcc}" -print-file-name="$runtime")
exec "${run[@]}" env LD_PRELOAD="$preload" "$python" -m pytest -p no:cacheprovider "$@"
