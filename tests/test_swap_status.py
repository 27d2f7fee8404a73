"""What the swapper tells: status, efficiency and patterns, recomputed from the store's events."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import pytest

from omnimem import AdvancedMemorySwapper, Event, SwapAlgorithm, SwapStats

from .memory import Memory
from .swappers import GIB, KIB, MIB, Opener, Zlib, content, fill, group_of, read, settle, swap_all

STATUS = {
    "algorithm",
    "swap_threshold",
    "max_swap_size_GB",
    "current_swap_size_GB",
    "total_registered_blocks",
    "swapped_blocks",
    "pinned_blocks",
    "pressure_level",
    "pressure_usage",
    "pressure_trend",
    "nvme_stats",
    "efficiency_metrics",
}
EFFICIENCY = {
    "hit_rate",
    "avg_swap_out_time",
    "avg_swap_in_time",
    "total_swapped_GB",
    "current_swap_utilization_GB",
    "max_swap_utilization_GB",
}
STATS = (
    "total_swapped_out",
    "total_swapped_in",
    "total_swapped_bytes",
    "swap_out_time",
    "swap_in_time",
    "total_swaps",
    "cache_hits",
    "cache_misses",
    "swap_efficiency",
)


def recomputed(events: list[Event]) -> SwapStats:
    """The statistics as the events tell them."""
    of = {
        kind: [event for event in events if event.kind == kind and event.group == "swap"]
        for kind in ("hit", "miss", "out", "in", "packed_out", "packed_in")
    }
    outs, ins = of["out"] + of["packed_out"], of["in"] + of["packed_in"]
    hits, misses = len(of["hit"]), len(of["miss"])
    return SwapStats(
        total_swapped_out=len(of["out"]),
        total_swapped_in=len(of["in"]),
        total_swapped_bytes=sum(event.nbytes for event in outs + ins),
        swap_out_time=sum(event.seconds for event in outs),
        swap_in_time=sum(event.seconds for event in ins),
        total_swaps=len(of["out"]) + len(of["in"]),
        cache_hits=hits,
        cache_misses=misses,
        swap_efficiency=hits / (hits + misses) if hits + misses else 0.0,
    )


def assert_true_to_events(swapper: AdvancedMemorySwapper) -> None:
    settle(swapper)
    told, want = dataclasses.asdict(swapper.stats), recomputed(swapper.store.events())
    for name, value in dataclasses.asdict(want).items():
        exact = value if isinstance(value, int) else pytest.approx(value, abs=1e-6)
        assert told[name] == exact, name


# -- statistics


def test_at_first(swapper: AdvancedMemorySwapper) -> None:
    assert swapper.stats == SwapStats()
    assert tuple(field.name for field in dataclasses.fields(SwapStats)) == STATS
    status = swapper.get_status()
    assert set(status) >= STATUS
    assert set(status["efficiency_metrics"]) >= EFFICIENCY
    assert status["algorithm"] == "adaptive"
    assert status["swap_threshold"] == 0.8
    assert status["max_swap_size_GB"] == 64 * MIB / GIB
    for key in ("current_swap_size_GB", "total_registered_blocks", "swapped_blocks"):
        assert status[key] == 0
    assert status["pressure_level"] in ("low", "medium", "high", "critical")
    assert 0.0 < status["pressure_usage"] < 1.0
    assert status["pressure_trend"] == "stable"
    assert status["swap_trouble"] is None
    efficiency = swapper.get_swapping_efficiency()
    assert efficiency.pop("max_swap_utilization_GB") == 64 * MIB / GIB
    assert set(efficiency.values()) == {0.0}


@pytest.mark.parametrize("codec", [False, True])
def test_statistics_are_the_sums_of_events(swapper: AdvancedMemorySwapper, codec: bool) -> None:
    if codec:
        swapper.integrate_with_compression(Zlib())
    chance = random.Random(5)
    names = fill(swapper, 6, 100 * KIB)
    for name in ("z0", "z1"):
        swapper.register_memory_block(name, 64 * KIB, data=bytes(64 * KIB))
        names.append(name)
    swapper.register_memory_block("blank", 4096)
    names.append("blank")
    for _ in range(15):
        for _ in range(8):
            swapper.access_memory_block(chance.choice(names))
        with memoryview(swapper.blocks[chance.choice(names)]) as view:
            view[3] = chance.randrange(256)
        assert_true_to_events(swapper)
        swap_all(swapper)
        assert_true_to_events(swapper)
        swapper.prefetch(chance.sample(names, 3)).wait()
        assert_true_to_events(swapper)
    stats = swapper.stats
    assert min(stats.total_swapped_out, stats.total_swapped_in) > 20
    assert min(stats.cache_hits, stats.cache_misses, stats.swap_in_time, stats.swap_out_time) > 0
    assert [event.number for event in swapper.store.events()] == list(
        range(len(swapper.store.events()))
    )


def test_efficiency(swapper: AdvancedMemorySwapper) -> None:
    names = fill(swapper, 8, 300_000)
    assert swap_all(swapper) == 8
    for name in (*names[:4], *names[:2]):
        swapper.access_memory_block(name)
    settle(swapper)
    stats, got = recomputed(swapper.store.events()), swapper.get_swapping_efficiency()
    assert got["hit_rate"] == stats.cache_hits / 6
    assert got["avg_swap_out_time"] == pytest.approx(stats.swap_out_time / 8, abs=1e-6)
    assert got["avg_swap_in_time"] == pytest.approx(
        stats.swap_in_time / stats.total_swapped_in, abs=1e-6
    )
    assert got["total_swapped_GB"] * GIB == stats.total_swapped_bytes
    assert 0 <= stats.total_swapped_bytes - 300_000 * stats.total_swaps < 4096 * stats.total_swaps
    assert got["current_swap_utilization_GB"] * GIB == group_of(swapper).disk_bytes
    assert group_of(swapper).disk_bytes >= 8 * 300_000
    assert got["max_swap_utilization_GB"] == 64 * MIB / GIB
    assert got == swapper.get_status()["efficiency_metrics"]


def test_events_have_times(swapper: AdvancedMemorySwapper) -> None:
    begin = time.monotonic()
    fill(swapper, 3)
    swap_all(swapper)
    read(swapper, "b1")
    settle(swapper)
    end = time.monotonic()
    events = swapper.store.events()
    assert [event.kind for event in events[:4]] == ["out", "out", "out", "miss"]
    for event in events:
        assert begin <= event.time <= end
        assert 0.0 <= event.seconds <= end - begin
        assert event.nbytes == (MIB if event.kind in ("in", "out") else event.nbytes)
    swapped_in = next(event for event in events if event.kind == "in")
    assert (swapped_in.block, swapped_in.group) == ("b1", "swap")
    assert swapper.store.events(events[2].number)[0] == events[2]
    assert swapper.store.events(10_000) == []


def test_status(swapper: AdvancedMemorySwapper, memory: Memory) -> None:
    memory.total, memory.swapper = 64 * MIB, swapper
    fill(swapper, 4, pinned=True)
    fill(swapper, 12, first=4)
    swapper.register_memory_block("blank", MIB)
    swapper.swap_algorithm, swapper.swap_threshold = SwapAlgorithm.CLOCK, 0.125
    assert swapper.perform_swapping() == 9
    status = swapper.get_status()
    assert status["algorithm"] == "clock"
    assert status["swap_threshold"] == 0.125
    assert status["total_registered_blocks"] == 17
    assert status["swapped_blocks"] == 9
    assert status["pinned_blocks"] == 4
    assert status["current_swap_size_GB"] == 9 * MIB / GIB
    assert status["pressure_usage"] == 7 / 64
    assert status["pressure_level"] == "low"
    assert status["nvme_stats"] == swapper.nvme_optimizer.get_swap_stats()
    for name in list(swapper.blocks):
        swapper.unregister_memory_block(name)
    status = swapper.get_status()
    for key in ("total_registered_blocks", "swapped_blocks", "pinned_blocks"):
        assert status[key] == 0


def test_after_cleanup(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 2)
    swap_all(swapper)
    swapper.cleanup()
    assert set(swapper.get_status()) >= STATUS
    assert set(swapper.get_swapping_efficiency()) >= EFFICIENCY
    assert swapper.get_status()["total_registered_blocks"] == 0
    assert swapper.analyze_access_patterns()["most_frequently_accessed"] == []


# -- patterns


def test_frequencies(swapper: AdvancedMemorySwapper) -> None:
    names = fill(swapper, 14, 4096)
    for i, name in enumerate(names):
        for _ in range(i):
            swapper.access_memory_block(name)
    got = swapper.analyze_access_patterns()
    assert set(got) >= {
        "most_frequently_accessed",
        "least_frequently_accessed",
        "temporal_locality",
        "spatial_locality",
    }
    assert got["most_frequently_accessed"] == [(f"b{i}", i + 1) for i in range(13, 3, -1)]
    assert got["least_frequently_accessed"] == [(f"b{i}", i + 1) for i in range(10)]


def test_locality_before_the_first_access(swapper: AdvancedMemorySwapper) -> None:
    got = swapper.analyze_access_patterns()
    assert got == {
        "most_frequently_accessed": [],
        "least_frequently_accessed": [],
        "temporal_locality": 0.0,
        "spatial_locality": 0.0,
    }


def test_locality_of_a_cycle(swapper: AdvancedMemorySwapper) -> None:
    names = fill(swapper, 50, 4096)
    for _ in range(30):
        for name in names:
            swapper.access_memory_block(name)
    got = swapper.analyze_access_patterns()
    assert got["temporal_locality"] == 1.0
    assert got["spatial_locality"] >= 0.99
    assert 0.0 <= got["spatial_locality"] <= 1.0


def test_locality_of_chance(swapper: AdvancedMemorySwapper) -> None:
    names, chance = fill(swapper, 300, 4096), random.Random(7)
    for _ in range(3):
        swap_all(swapper)
        for _ in range(500):
            swapper.access_memory_block(chance.choice(names))
    settle(swapper)
    got, group = swapper.analyze_access_patterns(), group_of(swapper)
    assert got["spatial_locality"] <= 0.05
    assert got["temporal_locality"] >= 0.5
    assert group.recent == 1024
    assert group.issued <= 40
    assert group.issued < group.misses / 10


def test_no_reuse_has_no_locality(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 200, 4096)
    got = swapper.analyze_access_patterns()
    assert got["temporal_locality"] == 0.0
    assert got["spatial_locality"] <= 0.05


def test_repeats_are_left_out(swapper: AdvancedMemorySwapper) -> None:
    names = fill(swapper, 20, 4096)
    for _ in range(100):
        swapper.access_memory_block(names[-1])
    group = group_of(swapper)
    assert (group.recent, group.repeated) == (120, 100)
    assert swapper.analyze_access_patterns()["spatial_locality"] <= 0.05


def test_repeats_in_a_cycle(swapper: AdvancedMemorySwapper) -> None:
    names = fill(swapper, 50, 4096)
    for _ in range(12):
        for name in names:
            for _ in range(3):
                swapper.access_memory_block(name)
    assert 0.99 <= swapper.analyze_access_patterns()["spatial_locality"] <= 1.0


def test_a_cycle_is_fetched_ahead(open_swapper: Opener) -> None:
    swapper = open_swapper()
    names = fill(swapper, 32, 256 * KIB)
    for _ in range(4):
        for name in names:
            swapper.access_memory_block(name)
    assert swap_all(swapper) == 32
    before = group_of(swapper)
    for name in names:
        assert read(swapper, name) == content(name, 256 * KIB)
        settle(swapper)
    after = group_of(swapper)
    assert after.issued - before.issued >= 16
    assert after.used - before.used >= 16
    assert after.hits - before.hits >= 16
    assert after.misses - before.misses <= 16
    assert after.hits + after.misses == before.hits + before.misses + 32


# -- priority


def expected(frequency: float, age: int, distance: int | None) -> Any:
    nearness = 0.0 if distance is None else 1 / (1 + distance)
    return pytest.approx((frequency + 1 / (1 + (age - 1) / 1024) + nearness) / 3)


def test_priority(swapper: AdvancedMemorySwapper) -> None:
    """Frequency and recency, of accesses without an order; b3, b3, b3 is one for recency."""
    fill(swapper, 4, 4096)
    for name in ("b3", "b3", "b0"):
        swapper.access_memory_block(name)
    priority = swapper.get_access_pattern_priority
    assert priority("b0") in (expected(2 / 3, 1, distance) for distance in (None, 0, 1, 2, 3))
    assert priority("b3") in (expected(1.0, 2, distance) for distance in (None, 0, 1, 2, 3))
    assert priority("b2") in (expected(1 / 3, 3, distance) for distance in (None, 0, 1, 2, 3))
    assert all(0.0 <= priority(name) <= 1.0 for name in swapper.blocks)
    assert type(priority("b0")) is float


def test_priority_of_a_cycle(swapper: AdvancedMemorySwapper) -> None:
    """What is next has the highest priority but for what was just used."""
    names = fill(swapper, 10, 4096)
    for _ in range(20):
        for name in names:
            swapper.access_memory_block(name)
    for name in names[:3]:
        swapper.access_memory_block(name)
    priority = swapper.get_access_pattern_priority
    assert priority("b3") == expected(21 / 22, 10, 0)
    assert priority("b4") == expected(21 / 22, 9, 1)
    assert priority("b3") > priority("b4") > priority("b5")
    assert priority("b2") in (expected(1.0, 1, distance) for distance in (None, 9))


def test_priority_of_an_unknown_block(swapper: AdvancedMemorySwapper) -> None:
    for name in ("b0", ""):
        with pytest.raises(KeyError):
            swapper.get_access_pattern_priority(name)
    fill(swapper, 1)
    assert 0.0 < swapper.get_access_pattern_priority("b0") <= 1.0
    swapper.unregister_memory_block("b0")
    with pytest.raises(KeyError, match="b0"):
        swapper.get_access_pattern_priority("b0")


def test_priority_changes_nothing(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 3)
    swap_all(swapper)
    before = (swapper.stats, swapper.blocks["b0"].access_count)
    swapper.get_access_pattern_priority("b0")
    swapper.analyze_access_patterns()
    assert (swapper.stats, swapper.blocks["b0"].access_count) == before
    assert swapper.blocks["b0"].is_swapped
