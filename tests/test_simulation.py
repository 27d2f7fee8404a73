"""simulate: known answers, sizes, leaders, and what it refuses."""

from __future__ import annotations

import array
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omnimem

TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"
MIB = 1 << 20


def trace(name: str) -> tuple[np.ndarray, np.ndarray]:
    file = TRACES / name
    if not file.exists():
        pytest.skip(f"no trace at {file}")
    kind = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    records = np.fromfile(file, dtype=kind)
    return records["id"].copy(), records["size"].copy()


CLOUD = {
    "lru": (93374, 89783, 83572, 81722, 72494, 72104, 71972, 71704),
    "clock": (93313, 89775, 83411, 81328, 74815, 72283, 71927, 64456),
    "s3fifo": (89307, 82387, 77041, 76791, 71300, 70343, 70455, 70355),
    "sieve": (91699, 86720, 78578, 76707, 69945, 66221, 64445, 64376),
    "belady": (79256, 70724, 65481, 61594, 59645, 57599, 50873, 48974),
}
"""Misses at 128, 256, ... 1024 MiB, from another simulator."""


@pytest.mark.parametrize("policy", CLOUD)
def test_block_trace(policy: str) -> None:
    ids, sizes = trace("cloudPhysicsIO.oracleGeneral.bin")
    found = tuple(
        omnimem.simulate(ids, (step + 1) * 128 * MIB, policy, sizes).misses for step in range(8)
    )
    assert found == CLOUD[policy]


EXPERTS = {
    "lru": (0.6484, 0.4657, 0.2449),
    "clock": (0.6394, 0.4533, 0.2372),
    "s3fifo": (0.6449, 0.4492, 0.2299),
    "belady": (0.4092, 0.2546, 0.1321),
}


@pytest.mark.parametrize("policy", EXPERTS)
def test_expert_trace(policy: str) -> None:
    ids, _ = trace("moe_qwen.oracleGeneral.bin")
    count = len(np.unique(ids))
    for share, expected in zip((0.1, 0.2, 0.4), EXPERTS[policy], strict=True):
        result = omnimem.simulate(ids, int(count * share), policy)
        assert result.miss_ratio == pytest.approx(expected, abs=1e-4)


CYCLE = {
    6: (0.8576, None),
    12: (0.6868, None),
    18: (0.5160, None),
    24: (0.3451, 0.5683),
    30: (0.1750, 0.4462),
    35: (0.0333, 0.1739),
}


@pytest.mark.parametrize("capacity", CYCLE)
def test_cycle(capacity: int) -> None:
    ids = np.tile(np.arange(36, dtype=np.uint64), 200)
    best, s3fifo = CYCLE[capacity]
    for policy in ("lru", "clock", "sieve"):
        assert omnimem.simulate(ids, capacity, policy).miss_ratio == 1.0
    assert omnimem.simulate(ids, capacity, "belady").miss_ratio == pytest.approx(best, abs=1e-4)
    if s3fifo is not None:
        found = omnimem.simulate(ids, capacity, "s3fifo").miss_ratio
        assert found == pytest.approx(s3fifo, abs=1e-4)
    adaptive = omnimem.simulate(ids, capacity, "adaptive")
    assert adaptive.miss_ratio <= best + 0.01
    assert adaptive.leaders is not None
    assert sum(adaptive.leaders.values()) == pytest.approx(1.0)
    assert max(adaptive.leaders, key=lambda name: adaptive.leaders[name]) == "nextuse"


def model_lru(ids: list[int], sizes: list[int], capacity: int) -> tuple[int, int]:
    kept: dict[int, int] = {}
    misses = missed = 0
    for key, size in zip(ids, sizes, strict=True):
        if key in kept:
            kept[key] = kept.pop(key)
            continue
        misses += 1
        missed += size
        if size > capacity:
            continue
        while sum(kept.values()) + size > capacity:
            kept.pop(next(iter(kept)))
        kept[key] = size
    return misses, missed


@pytest.mark.parametrize("seed", range(5))
def test_lru_against_a_dict(seed: int) -> None:
    rng = np.random.default_rng(seed)
    of = rng.integers(1, 5000, size=80)
    ids = rng.zipf(1.3, size=4000) % 80
    result = omnimem.simulate(ids, 30000, "lru", of[ids])
    assert (result.misses, result.missed_bytes) == model_lru(ids.tolist(), of[ids].tolist(), 30000)
    assert result.requested_bytes == of[ids].sum()
    assert result.byte_miss_ratio == result.missed_bytes / result.requested_bytes
    assert result.leaders is None


@pytest.mark.parametrize("policy", ["lru", "clock", "s3fifo", "sieve", "adaptive", "belady"])
def test_everything_fits(policy: str) -> None:
    ids = np.random.default_rng(1).integers(0, 50, size=3000, dtype=np.uint32)
    sizes = (ids * 7 % 90).astype(np.uint32)  # some of no bytes at all
    result = omnimem.simulate(ids, "1MiB", policy, sizes)
    assert result.misses == len(np.unique(ids))
    nothing = omnimem.simulate(ids[:0], 5, policy)
    assert (nothing.requests, nothing.miss_ratio, nothing.byte_miss_ratio) == (0, 0.0, 0.0)


@pytest.mark.parametrize(
    "ids",
    [
        array.array("B", [1, 2, 1]),
        array.array("I", [1, 2, 1]),
        array.array("q", [1, 2, 1]),
        np.array([1, 2, 1], dtype=np.uint16),
        np.array([1, 2, 1], dtype=np.int8),
        np.array([1, 2**63 + 5, 1], dtype=np.uint64),
        bytes([1, 2, 1]),
        memoryview(struct.pack("3Q", 1, 2, 1)).cast("Q"),
    ],
    ids=lambda ids: str(getattr(ids, "dtype", type(ids).__name__)),
)
def test_kinds_of_ids(ids: Any) -> None:
    assert omnimem.simulate(ids, 2, "lru").misses == 2


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"policy": "fifo"}, ValueError, "no policy is named 'fifo'; there are lru"),
        ({"policy": 3}, TypeError, "policy must be a str"),
        ({"capacity": 0}, ValueError, "capacity of 0"),
        ({"capacity": -1}, ValueError, "capacity"),
        ({"capacity": "much"}, ValueError, "capacity='much'"),
        ({"ids": np.array([1, -2])}, ValueError, r"ids\[1\] is negative"),
        ({"ids": np.array([1.0, 2.0])}, TypeError, "format 'd'"),
        ({"ids": np.zeros((2, 2), dtype=int)}, TypeError, "2 dimensions"),
        ({"ids": [1, 2]}, TypeError, "bytes-like"),
        ({"ids": np.arange(8)[::2]}, ValueError, "contiguous"),
        ({"sizes": np.array([1])}, ValueError, "1 sizes for 2 ids"),
        ({"ids": np.array([4, 4]), "sizes": np.array([1, 2])}, ValueError, "id 4 has 2 bytes"),
        ({"sizes": np.array([1, -1])}, ValueError, r"sizes\[1\] is negative"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"ids": np.array([1, 2]), "capacity": 2, "policy": "lru"} | change
    with pytest.raises(error, match=text):
        omnimem.simulate(**arguments)


def test_without_the_gil() -> None:
    ids = np.random.default_rng(0).integers(0, 20000, size=1_000_000)
    results: list[omnimem.SimulationResult] = []
    thread = threading.Thread(
        target=lambda: results.append(omnimem.simulate(ids, 5000, "adaptive"))
    )
    thread.start()
    turns = 0
    while thread.is_alive():
        turns += 1
    thread.join()
    assert turns > 100
    assert results[0].requests == len(ids)
