"""Swapping under pressure: when, how much, what memory goes back, caches that shrink first."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import pytest

import omnimem
from omnimem import AdvancedMemorySwapper, MemoryPressureLevel, SwapAlgorithm

from .memory import Memory
from .swappers import GIB, MIB, Opener, content, fill, group_of, read, resident_bytes, swap_all

SHARES = [(0.0, True), (0.5, True), (0.625, True), (0.6251, False), (0.9, False), (1.0, False)]


class Shrinking:
    """A cache of so many bytes, which are in use."""

    def __init__(self, memory: Memory, nbytes: int) -> None:
        self.memory, self.left = memory, nbytes
        self.asked: list[int] = []
        memory.others += nbytes

    def evict(self, nbytes: int, /) -> int:
        self.asked.append(nbytes)
        freed = min(nbytes, self.left)
        self.left -= freed
        self.memory.others -= freed
        return freed


# -- when


@pytest.mark.parametrize(("threshold", "yes"), SHARES)
def test_should_swap(
    swapper: AdvancedMemorySwapper, memory: Memory, threshold: float, yes: bool
) -> None:
    memory.others = 5 * GIB // 8
    swapper.swap_threshold = threshold
    assert swapper.should_swap() is yes
    memory.others += GIB // 4
    assert swapper.should_swap() is (threshold <= 0.875)


def test_with_the_machines_numbers(swapper: AdvancedMemorySwapper) -> None:
    usage = swapper.pressure_monitor.get_ram_pressure()[1]
    swapper.swap_threshold = max(0.0, usage - 0.2)
    assert swapper.should_swap()
    swapper.swap_threshold = 1.0
    fill(swapper, 2)
    assert not swapper.should_swap()
    assert swapper.perform_swapping() == 0


def test_thresholds_take_effect_at_once(swapper: AdvancedMemorySwapper, memory: Memory) -> None:
    monitor = swapper.pressure_monitor
    memory.others = int(0.65 * GIB)
    assert swapper.get_status()["pressure_level"] == "low"
    monitor.ram_thresholds = (0.6, 0.8, 0.9)
    assert swapper.get_status()["pressure_level"] == "medium"
    monitor.ram_thresholds = (0.2, 0.4, 0.6)
    assert monitor.get_overall_pressure()[0] is MemoryPressureLevel.CRITICAL
    for wrong in ((0.8, 0.6, 0.9), (0.1, 0.2), (0.1, 0.2, 1.2), (-0.1, 0.2, 0.3), (0.5, 0.5, 0.6)):
        with pytest.raises(ValueError):
            monitor.ram_thresholds = wrong  # type: ignore[assignment]
        with pytest.raises(ValueError):
            monitor.gpu_thresholds = wrong  # type: ignore[assignment]
    assert monitor.ram_thresholds == (0.2, 0.4, 0.6)
    assert monitor.gpu_thresholds == (0.7, 0.85, 0.95)
    assert swapper.get_status()["pressure_level"] == "critical"


def test_pressure_levels_are_not_the_threshold(
    swapper: AdvancedMemorySwapper, memory: Memory
) -> None:
    memory.others = int(0.99 * GIB)
    swapper.swap_threshold = 1.0
    assert swapper.get_status()["pressure_level"] == "critical"
    assert not swapper.should_swap()


# -- how much


@pytest.mark.parametrize("algorithm", list(SwapAlgorithm))
def test_only_until_usage_is_below(
    open_swapper: Opener, memory: Memory, algorithm: SwapAlgorithm
) -> None:
    swapper = open_swapper(swap_algorithm=algorithm, swap_threshold=0.5)
    names = fill(swapper, 24)
    memory.swapper, memory.total, memory.others = swapper, 32 * MIB, 4 * MIB
    for _ in range(2):
        assert swapper.should_swap()
        held = group_of(swapper).host_bytes // MIB
        assert swapper.perform_swapping() == held - 11
        assert group_of(swapper).host_bytes == 11 * MIB
        assert not swapper.should_swap()
        assert swapper.perform_swapping() == 0
        assert [read(swapper, name) for name in names] == [content(name) for name in names]


def test_one_byte_too_much(swapper: AdvancedMemorySwapper, memory: Memory) -> None:
    fill(swapper, 8)
    memory.swapper, memory.total, swapper.swap_threshold = swapper, 16 * MIB, 0.5
    assert swapper.should_swap()
    assert swapper.perform_swapping() == 1
    memory.others = MIB - 1
    assert not swapper.should_swap()
    assert swapper.perform_swapping() == 0


def test_others_take_everything(swapper: AdvancedMemorySwapper, memory: Memory) -> None:
    """Usage cannot fall below the threshold: what can go goes, and it ends."""
    names = fill(swapper, 6)
    memory.swapper, memory.total, memory.others = swapper, 32 * MIB, 30 * MIB - 6 * MIB
    swapper.swap_threshold = 0.25
    view = memoryview(swapper.blocks["b0"])
    swapper.blocks["b1"].pinned = True
    assert swapper.perform_swapping() == 4
    assert swapper.should_swap()
    assert swapper.perform_swapping() == 0
    assert view == content("b0")
    assert [read(swapper, name) for name in names] == [content(name) for name in names]


@pytest.mark.parametrize("codec", [False, True])
def test_memory_goes_back(open_swapper: Opener, codec: bool) -> None:
    """RSS falls by the bytes swapped, but for a sixteenth."""
    count, size = 48, 4 * MIB
    swapper = open_swapper(
        host_limit="512MiB", max_swap_size="512MiB", swap_algorithm=SwapAlgorithm.LRU
    )
    noise = os.urandom(size)
    if codec:

        class Quarter:
            def compress(self, plain: Any, /) -> bytes:
                return bytes(plain[: size // 4])

            def decompress(self, packed: Any, /) -> bytes:
                return bytes(packed) + noise[size // 4 :]

        swapper.integrate_with_compression(Quarter())
    for i in range(count):
        swapper.register_memory_block(f"b{i}", size, data=noise)
    before = resident_bytes()
    assert swap_all(swapper) == count
    fell = before - resident_bytes()
    assert fell >= count * size * 15 // 16 - 2 * MIB
    assert group_of(swapper).disk_bytes == count * size // (4 if codec else 1)
    for i in (0, count // 2, count - 1):
        assert memoryview(swapper.access_memory_block(f"b{i}")) == noise  # type: ignore[arg-type]


def test_real_pressure(open_swapper: Opener, memory: Memory) -> None:
    """A part goes, and its memory with it."""
    swapper = open_swapper(host_limit="512MiB", max_swap_size="512MiB", swap_threshold=0.5)
    size = 4 * MIB
    noise = os.urandom(size)
    for i in range(40):
        swapper.register_memory_block(f"b{i}", size, data=noise)
    memory.swapper, memory.total = swapper, 160 * MIB
    before = resident_bytes()
    assert swapper.perform_swapping() == 21
    assert not swapper.should_swap()
    assert before - resident_bytes() >= 84 * MIB * 15 // 16 - 2 * MIB
    memory.total = 40 * MIB
    assert swapper.perform_swapping() == 15
    assert before - resident_bytes() >= 144 * MIB * 15 // 16 - 2 * MIB


# -- caches


def test_a_cache_is_asked_first(swapper: AdvancedMemorySwapper, memory: Memory) -> None:
    memory.total, memory.swapper = 32 * MIB, swapper
    cache = Shrinking(memory, 20 * MIB)
    assert isinstance(cache, omnimem.Cache)
    swapper.integrate_with_cache(cache)
    swapper.swap_threshold = 0.5
    fill(swapper, 8)
    assert swapper.perform_swapping() == 1  # usage is to be below the threshold, not on it
    assert cache.asked == [12 * MIB]
    assert swapper.perform_swapping() == 0
    assert cache.asked == [12 * MIB]
    memory.others += 10 * MIB
    assert swapper.perform_swapping() == 2
    assert cache.asked == [12 * MIB, 9 * MIB]
    assert cache.left == 0


def _raise(error: Exception) -> Callable[[int], int]:
    def evict(_: int) -> int:
        raise error

    return evict


@pytest.mark.parametrize("error", [RuntimeError("no"), omnimem.BusyError("held"), KeyError("x")])
def test_a_cache_that_raises(
    swapper: AdvancedMemorySwapper, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    class Broken:
        evict = staticmethod(_raise(error))

    swapper.integrate_with_cache(Broken())
    names = fill(swapper, 3)
    with caplog.at_level(logging.WARNING, "omnimem"):
        assert swap_all(swapper) == 3
    assert "cache" in caplog.text
    assert type(error).__name__ in caplog.text
    assert [read(swapper, name) for name in names] == [content(name) for name in names]


def test_what_is_no_cache(swapper: AdvancedMemorySwapper) -> None:
    for wrong in (None, 3, object()):
        with pytest.raises(TypeError, match="evict"):
            swapper.integrate_with_cache(wrong)  # type: ignore[arg-type]
