"""What the tests of the swapper share: blocks with known bytes, and all of them swapped out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omnimem import AdvancedMemorySwapper, GroupStats

from .conftest import data

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


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
