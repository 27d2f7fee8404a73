"""A process in a memory cgroup that touches far more than it may use (test_oom.py). Not a test.

Arguments: who ("store" or "swapper"), the cgroup's limit in bytes, seconds, a directory, a seed.
It puts itself into no cgroup: it is started in one. Exits with 0 when every touch found its bytes.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path

import omnimem

KIB = 1 << 10
THREADS = 4
TIMES = 8  # registered: so many times the limit
OVERLOAD = 60.0  # seconds that a touch may wait for the disk


def sizes(total: int, rng: random.Random) -> list[int]:
    """Mixed: 64 KiB to 16 MiB, as many bytes of each power of two."""
    found: list[int] = []
    while total > 0:
        size = (64 * KIB) << rng.randrange(9)
        for _ in range(max(1, (16 << 20) // size // 4)):
            found.append(size + rng.randrange(0, 4 * KIB))
            total -= found[-1]
    return found


def content(index: int, size: int) -> bytearray:
    seed = (index * 2654435761 + 12345) & 0xFFFFFFFF
    piece = random.Random(seed).randbytes(4 * KIB - 1)  # odd: no page is like the next
    whole = bytearray(piece) * (size // len(piece) + 1)
    del whole[size:]  # in place: its own memory should not be what is short
    return whole


def same(view: memoryview, index: int) -> bool:
    piece = content(index, 4 * KIB - 1)
    for start in range(0, len(view), 256 * (4 * KIB - 1)):
        part = view[start : start + 256 * (4 * KIB - 1)]
        if part != (piece * (len(part) // len(piece) + 1))[: len(part)]:
            return False
    return True


class Store:
    """A store at its defaults: every third block is read from a file, the others are added."""

    def __init__(self, directory: Path) -> None:
        self.store = omnimem.Store(omnimem.StoreConfig(directory=str(directory), disk_limit="4GiB"))
        self.file = directory / "origin"

    def register(self, sizes: list[int]) -> None:
        origins = list(enumerate(sizes))[::3]
        with self.file.open("wb") as out:
            for index, size in origins:
                out.write(content(index, size))
        offset = 0
        for index, size in origins:
            self.store.add_file(f"b{index}", str(self.file), offset, size)
            offset += size
        for index, size in enumerate(sizes):
            if index % 3:
                self.store.add(f"b{index}", content(index, size), timeout=OVERLOAD)

    def touch(self, index: int) -> bool:
        with self.store.lease(f"b{index}", timeout=OVERLOAD) as lease:
            return same(memoryview(lease), index)

    def close(self) -> None:
        self.store.check()
        self.store.close()


class Swapper:
    """A swapper at its defaults, but for the size of its swap file."""

    def __init__(self, directory: Path) -> None:
        nvme = omnimem.NVMeOptimizer(swap_directory=str(directory))
        self.swapper = omnimem.AdvancedMemorySwapper(max_swap_size="4GiB", nvme_optimizer=nvme)

    def register(self, sizes: list[int]) -> None:
        for index, size in enumerate(sizes):
            self.swapper.register_memory_block(f"b{index}", size, data=content(index, size))

    def touch(self, index: int) -> bool:
        block = self.swapper.access_memory_block(f"b{index}")
        assert block is not None
        with memoryview(block) as view:
            return same(view.cast("B"), index)

    def close(self) -> None:
        self.swapper.store.check()
        self.swapper.cleanup()


def main() -> int:
    who, limit, seconds, directory, seed = sys.argv[1:]
    faces = {"store": Store, "swapper": Swapper}
    face = faces[who](Path(directory))
    rng = random.Random(int(seed))
    all_sizes = sizes(TIMES * int(limit), rng)
    face.register(all_sizes)
    until = time.monotonic() + float(seconds)
    wrong: list[str] = []
    touches = [0] * THREADS

    def work(number: int) -> None:
        own = random.Random(int(seed) + 1 + number)
        try:
            while time.monotonic() < until and not wrong:
                index = own.randrange(len(all_sizes))
                if not face.touch(index):
                    wrong.append(f"block {index} has other bytes")
                touches[number] += 1
        except BaseException as error:  # told by the exit status
            wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    face.close()
    print(f"{len(all_sizes)} blocks, {sum(touches)} touches", *wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
