"""Records what a monitor sees of its process, which grows, saws or reads files in a cgroup.

``python tests/data/record.py SHAPE > tests/data/SHAPE.trace`` as root, with version 1 cgroups. The
traces beside this file were made with it; tests/c/test_assess.c plays them back.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import time
from pathlib import Path

from omnimem import _core

LIMIT = 512 << 20
CGROUPS = Path("/sys/fs/cgroup/memory")
EVERY = 0.2
CHUNK = 4 << 20


def grow(held: list[mmap.mmap], tick: int) -> None:
    """8 MiB a sample after five quiet seconds, up to 93 % of the limit."""
    if tick >= 25 and len(held) * CHUNK < 0.91 * LIMIT:
        allocate(held, 2)


def saw(held: list[mmap.mmap], tick: int) -> None:
    """Up by 24 MiB a sample to about 85 % of the limit, then half of it at once goes."""
    allocate(held, 6)
    if len(held) * CHUNK > 0.80 * LIMIT:
        for chunk in held[len(held) // 2 :]:
            chunk.close()
        del held[len(held) // 2 :]


def read(held: list[mmap.mmap], tick: int) -> None:
    """Page cache of more than the limit, read and written all the time."""
    path = Path(tempfile.gettempdir()) / f"omnimem-record-{os.getpid()}"
    with path.open("ab") as file:
        file.write(bytes(16 << 20))
    if tick % 60 == 59:
        path.unlink()


def allocate(held: list[mmap.mmap], count: int) -> None:
    for _ in range(count):
        chunk = mmap.mmap(-1, CHUNK)
        for at in range(0, CHUNK, mmap.PAGESIZE):
            chunk[at] = 1
        held.append(chunk)


SHAPES = {"grow": grow, "saw": saw, "read": read}


def main(shape: str, ticks: int = 300) -> None:
    group = CGROUPS / f"omnimem-record-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(LIMIT))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    monitor = _core.Monitor(act=False)
    held: list[mmap.mmap] = []
    print(f"# {SHAPES[shape].__doc__}")
    print("# seconds, limit, bytes in use, seconds stalled some and full, limits met")
    began = time.monotonic()
    for tick in range(ticks):
        SHAPES[shape](held, tick)
        told = monitor.sample()
        _, limit, _, used, _ = next(p for p in told["places"] if p[0].endswith(group.name))
        some, full = told["psi_seconds"] or (-1, -1)
        met = told["events"].get("max", 0)
        print(f"{told['time'] - began:.3f} {limit} {used} {some:.6f} {full:.6f} {met}")
        time.sleep(max(0.0, began + (tick + 1) * EVERY - time.monotonic()))
    (CGROUPS / "cgroup.procs").write_text(str(os.getpid()))
    group.rmdir()


if __name__ == "__main__":
    main(sys.argv[1])
