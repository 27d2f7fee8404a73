#!/usr/bin/env bash
# All linters, each even where an earlier one found something; exits 1 when any did.
set -uo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
failed=()

check() {
	local name=$1
	shift
	printf '== %s\n' "$name"
	"$@" || failed+=("$name")
}

compile() {
	local compiler=$1 flags
	flags="$(pkg-config --cflags libxxhash libzstd liburing) $("$python" -c \
		'import sysconfig; print("-isystem", sysconfig.get_paths()["include"].replace(" ", "\\ "))')"
	# shellcheck disable=SC2086
	find csrc tests/c tests/fuzz -name '*.c' -print0 | xargs -0 -r -n 1 -P "$(nproc)" "$compiler" \
		-std=c11 -D_GNU_SOURCE -DPy_LIMITED_API=0x030B0000 $2 -O2 -fvisibility=hidden \
		-Wall -Wextra -Werror -Icsrc -Itests/c $flags -c -o /dev/null
}

check "ruff check" "$python" -m ruff check .
check "ruff format" "$python" -m ruff format --check .
check "mypy" "$python" -m mypy
if command -v clang-format >/dev/null; then
	check "clang-format" bash -c \
		"find csrc tests -name '*.[ch]' -print0 | xargs -0 clang-format --dry-run -Werror"
fi
for compiler in gcc clang; do
	if command -v "$compiler" >/dev/null; then
		check "$compiler" compile "$compiler" ""
		check "$compiler, debug" compile "$compiler" "-DOM_DEBUG=1"
	fi
done
if command -v shellcheck >/dev/null; then
	check "shellcheck" shellcheck scripts/*.sh .ci/run
fi

if [ ${#failed[@]} -gt 0 ]; then
	printf 'lint: found something: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
	exit 1
fi
echo "lint: clean"
