"""What the tests of the swapper share: blocks with known bytes, and all of them swapped out."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from omnimem import AdvancedMemorySwapper, GroupStats

from .conftest import data

if TYPE_CHECKING:
    from typing_extensions import Buffer

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
Opener = Callable[..., AdvancedMemorySwapper]


def group_of(swapper: AdvancedMemorySwapper) -> GroupStats:
    return swapper.store.group_stats("swap")


def fill(
    swapper: AdvancedMemorySwapper, count: int, size: int = MIB, first: int = 0, **fields: object
) -> list[str]:
    """Registers blocks b0, b1, ... with the bytes that `content` tells."""
    names = [f"b{i}" for i in range(first, first + count)]
    for name in names:
        swapper.register_memory_block(name, size, data=content(name, size), **fields)
    return names


def content(name: str, size: int = MIB) -> bytes:
    return data(size, int(name.removeprefix("b")))


def read(swapper: AdvancedMemorySwapper, name: str) -> bytes:
    block = swapper.access_memory_block(name)
    assert block is not None
    return bytes(memoryview(block).cast("B"))


def swap_all(swapper: AdvancedMemorySwapper) -> int:
    """Swaps whatever can go, however much memory there is."""
    threshold, swapper.swap_threshold = swapper.swap_threshold, 0.0
    try:
        return swapper.perform_swapping()
    finally:
        swapper.swap_threshold = threshold


def settle(swapper: AdvancedMemorySwapper) -> None:
    """Waits until nothing is on its way any more."""
    while swapper.store.stats().moves:
        time.sleep(0.001)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Zlib:
    """A compression manager; counts what it does, and remembers on which threads."""

    def __init__(self) -> None:
        self.packed = self.unpacked = 0
        self.threads: set[int] = set()

    def compress(self, plain: Buffer, /) -> bytes:
        self.packed += 1
        self.threads.add(threading.get_ident())
        return zlib.compress(plain, 1)

    def decompress(self, packed: Buffer, /) -> Buffer:
        self.unpacked += 1
        self.threads.add(threading.get_ident())
        return zlib.decompress(packed)
