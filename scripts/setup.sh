#!/usr/bin/env bash
# Makes .venv fit for what the arguments ask, and does nothing where it already is.
#
#   scripts/setup.sh EXTRA [EXTRA...]    extras of pyproject.toml: demo, test, bench, dev
#
# Three steps, each with a stamp in .venv that says for which inputs it was last done:
# the environment (interpreter and place), each extra (pyproject.toml), the C extension
# (its sources and the OMNIMEM_* knobs). Missing Debian packages are installed when this
# runs as root; otherwise the line that installs them is printed and the script fails.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv

say() { printf 'setup: %s\n' "$*" >&2; }
digest() { sha256sum | cut -d' ' -f1; }

exec 9>"$venv.lock"
flock 9

# ---- system packages ---------------------------------------------------------------------------

without_liburing() {
	case "${OMNIMEM_WITHOUT_LIBURING:-}" in '' | 0 | no | false) return 1 ;; *) return 0 ;; esac
}

missing_packages() {
	local missing=() pkg_config=${PKG_CONFIG:-pkg-config}
	if ! command -v "$python" >/dev/null; then
		missing+=(python3 python3-venv python3-dev)
	else
		"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
		"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
			missing+=(python3-dev)
	fi
	if ! printf '#include <stdio.h>\n' | ${CC:-gcc} -E - >/dev/null 2>&1; then
		missing+=(gcc libc6-dev)
	fi
	if ! command -v "$pkg_config" >/dev/null; then
		missing+=(pkg-config libxxhash-dev libzstd-dev)
		without_liburing || missing+=(liburing-dev)
	else
		"$pkg_config" --exists libxxhash || missing+=(libxxhash-dev)
		"$pkg_config" --exists libzstd || missing+=(libzstd-dev)
		without_liburing || "$pkg_config" --exists liburing || missing+=(liburing-dev)
	fi
	echo "${missing[*]:-}"
}

missing=$(missing_packages)
if [ -n "$missing" ]; then
	line="apt-get install -y $missing"
	if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
		say "missing system packages. Run this line as root, then try again:"
		printf '\n    %s\n\n' "$line" >&2
		exit 1
	fi
	say "$line"
	# shellcheck disable=SC2086
	if ! DEBIAN_FRONTEND=noninteractive apt-get install -y $missing >&2; then
		apt-get update >&2
		# shellcheck disable=SC2086
		DEBIAN_FRONTEND=noninteractive apt-get install -y $missing >&2
	fi
	still=$(missing_packages)
	if [ -n "$still" ]; then
		say "'$line' went through, and $still is still not found for $(command -v "$python")."
		exit 1
	fi
fi

"$python" - <<'P'
import sys
import sysconfig

if sys.version_info < (3, 11):
    sys.exit(f"setup: omnimem needs Python 3.11 or newer, and this is {sys.version.split()[0]}: "
             "set PYTHON=/path/to/a/newer/python3.")
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit("setup: free-threaded Python is not supported: set PYTHON=/path/to/an/ordinary/python3.")
P

# ---- the environment ---------------------------------------------------------------------------

# An environment that was moved, or whose interpreter went, does not work: make it anew.
place="$PWD $("$python" -c 'import sys; print(sys.base_prefix, sys.version)' | digest)"
if [ "$(cat "$venv/stamp-venv" 2>/dev/null)" != "$place" ]; then
	say "making $venv"
	"$python" -m venv --clear "$venv"
	"$venv/bin/python" -m pip install --quiet 'setuptools>=77' wheel
	printf '%s\n' "$place" >"$venv/stamp-venv"
fi

# ---- the extras --------------------------------------------------------------------------------

sources=$({
	cat setup.py
	find csrc -name '*.[ch]' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
	{ env | grep -E '^(OMNIMEM_(SANITIZE|DEBUG|COVERAGE|WERROR|WITHOUT_LIBURING)|CC|CFLAGS|LDFLAGS)=' || true; } | LC_ALL=C sort
} | digest)
wanted=$(cat pyproject.toml setup.py | digest)
for extra in "$@"; do
	[ "$(cat "$venv/stamp-$extra" 2>/dev/null)" != "$wanted" ] || continue
	if [ "$extra" != dev ]; then
		# The pinned torch goes first and alone: the resolver then never looks at
		# another version, and a build for the CPU that is already at hand is taken.
		torch=$(sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml | head -n 1)
		say "installing $torch"
		"$venv/bin/python" -m pip install --quiet "$torch"
	fi
	say "installing omnimem[$extra]"
	rm -f "$venv/stamp-core" python/omnimem/_core*.so # built anew, with today's knobs
	"$venv/bin/python" -m pip install --quiet --no-build-isolation -e ".[$extra]"
	printf '%s\n' "$sources" >"$venv/stamp-core"
	printf '%s\n' "$wanted" >"$venv/stamp-$extra"
done

# ---- the C extension ---------------------------------------------------------------------------

if [ "$(cat "$venv/stamp-core" 2>/dev/null)" != "$sources" ] ||
	! compgen -G 'python/omnimem/_core*.so' >/dev/null; then
	say "building omnimem._core"
	"$venv/bin/python" setup.py --quiet build_ext --inplace --force
	printf '%s\n' "$sources" >"$venv/stamp-core"
fi
