"""A roundtrip through the store of an installed wheel, and whose C libraries it took."""

import os
import sys
from pathlib import Path

import omnimem

inside = Path(omnimem.__file__).resolve().parent
if Path(sys.prefix).resolve() not in inside.parents:
    sys.exit(f"try_wheel: omnimem came from {inside}, not from the environment {sys.prefix}")

data = os.urandom(3_000_000)
with omnimem.Store(omnimem.StoreConfig(host_limit="8MiB", disk_limit="16MiB")) as store:
    for number in range(4):
        store.add(f"block{number}", data[number:])  # 12 MB: some go to disk
    for number in range(4):
        with store.lease(f"block{number}") as lease:
            if memoryview(lease) != data[number:]:
                sys.exit(f"try_wheel: block{number} came back changed")
    store.check()

for line in Path("/proc/self/maps").read_text().splitlines():
    library = line.split(maxsplit=5)[-1]
    name = Path(library).name
    if (
        name.startswith(("liburing", "libxxhash", "libzstd"))
        and Path(sys.prefix).resolve() not in Path(library).resolve().parents
    ):
        sys.exit(f"try_wheel: {library} is the system's, not the wheel's own")

for module in ("torch", "numpy"):
    if module in sys.modules:
        sys.exit(f"try_wheel: importing omnimem imported {module}")
print(f"omnimem {omnimem.__version__} works in an empty environment: {inside}")
