"""The usage examples of the swapper's document, word for word but for the import; its advice."""

from __future__ import annotations

import gc
import random
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omnimem
from omnimem import (
    AdvancedMemorySwapper,
    CompressionManager,
    MemoryPressureLevel,
    MemoryRegionType,
    SwapAlgorithm,
)

from .memory import Memory
from .swappers import (
    GIB,
    MIB,
    Opener,
    Zlib,
    content,
    fill,
    read,
    resident_bytes,
    settle,
    swap_all,
)

BASIC = """
from omnimem import (
    AdvancedMemorySwapper, 
    SwapAlgorithm, 
    MemoryRegionType,
    create_optimized_swapping_system
)

# Create an optimized swapping system for your hardware
swapper = create_optimized_swapping_system({
    'cpu_model': 'Intel i5-10210U',
    'gpu_model': 'NVIDIA SM61',
    'memory_size': 8 * 1024 * 1024 * 1024,  # 8GB
    'storage_type': 'nvme'
})

# Register a memory block for potential swapping
block_id = "my_tensor_block"
size = 50 * 1024 * 1024  # 50MB
swapper.register_memory_block(
    block_id, 
    size, 
    MemoryRegionType.TENSOR_DATA,
    pinned=False  # Set to True to prevent swapping
)

# Access the block (this will handle swapping in if needed)
accessed_block = swapper.access_memory_block(block_id)

# Periodically check if swapping is needed based on memory pressure
if swapper.should_swap():
    swapped_count = swapper.perform_swapping()
    print(f"Swapped out {swapped_count} blocks")

# Get system status and efficiency metrics
status = swapper.get_status()
efficiency = swapper.get_swapping_efficiency()
"""  # noqa: W291

INTEGRATION = """
# Example of integrating with existing memory optimization
def integrate_with_qwen3_vl(swapper, memory_optimizer, compression_manager):
    # Integrate with compression system
    swapper.integrate_with_compression(compression_manager)
    
    # Create optimized tensor allocation function
    def allocate_tensor_with_swapping(shape, dtype, tensor_type="general"):
        # First allocate with existing optimizer
        tensor = memory_optimizer.allocate_tensor_memory(shape, dtype, tensor_type)
        
        # Register with swapping system
        block_id = f"tensor_{id(tensor)}_{int(time.time())}"
        size = np.prod(shape) * np.dtype(dtype).itemsize
        swapper.register_memory_block(
            block_id, 
            size, 
            MemoryRegionType[tensor_type.upper().replace('-', '_')]
        )
        
        return tensor, block_id
    
    return allocate_tensor_with_swapping
"""  # noqa: W291, W293

ADVANCED = """
# Create a custom swapper with specific parameters
swapper = AdvancedMemorySwapper(
    swap_algorithm=SwapAlgorithm.ADAPTIVE,    # Use adaptive algorithm
    swap_threshold=0.75,                      # Start swapping at 75% memory usage
    max_swap_size=2 * 1024 * 1024 * 1024,   # Max 2GB swap space
)

# Configure memory pressure monitoring thresholds
pressure_monitor = swapper.pressure_monitor
# Custom thresholds: (medium, high, critical) percentages
pressure_monitor.ram_thresholds = (0.6, 0.8, 0.9)
pressure_monitor.gpu_thresholds = (0.7, 0.85, 0.95)
"""


class Optimizer:
    """What the document's example calls its existing optimizer."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, Any, str]] = []

    def allocate_tensor_memory(self, shape: Any, dtype: Any, tensor_type: str) -> Any:
        self.made.append((shape, dtype, tensor_type))
        return np.full(shape, 7, dtype)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default swap directory is one of the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(example: str, **names: Any) -> dict[str, Any]:
    exec(example, names)
    return names


# -- usage examples


def test_basic_usage(memory: Memory, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    memory.total = 8 * GIB
    got = run(BASIC)
    swapper = got["swapper"]
    with swapper:
        assert capsys.readouterr().out == ""
        assert isinstance(swapper, AdvancedMemorySwapper)
        assert swapper.swap_algorithm is SwapAlgorithm.ADAPTIVE
        assert swapper.swap_threshold == 0.75
        assert swapper.nvme_optimizer.swap_directory == str(tmp_path / "cache/omnimem")
        block = got["accessed_block"]
        assert (block.id, block.size, block.pinned) == ("my_tensor_block", 50 * MIB, False)
        assert block is swapper.blocks["my_tensor_block"]
        assert got["status"]["total_registered_blocks"] == 1
        assert got["status"]["algorithm"] == "adaptive"
        assert got["efficiency"] == got["status"]["efficiency_metrics"]
        assert np.asarray(block).any() == False  # noqa: E712


def test_basic_usage_under_pressure(memory: Memory, capsys: pytest.CaptureFixture[str]) -> None:
    memory.total, memory.others = 8 * GIB, int(7.5 * GIB)
    got = run(BASIC)
    with got["swapper"]:
        assert capsys.readouterr().out == "Swapped out 1 blocks\n"
        assert got["accessed_block"].is_swapped
        assert got["status"]["swapped_blocks"] == 1
        assert got["status"]["current_swap_size_GB"] == 50 * MIB / GIB
        assert bytes(memoryview(got["accessed_block"])) == bytes(50 * MIB)


@pytest.mark.parametrize("dtype", ["float32", np.int16])
def test_integration(swapper: AdvancedMemorySwapper, dtype: Any) -> None:
    """The user's own function, as the document writes it."""
    optimizer, manager = Optimizer(), Zlib()
    assert isinstance(manager, CompressionManager)
    names = run(INTEGRATION, time=time, np=np, MemoryRegionType=MemoryRegionType)
    allocate = names["integrate_with_qwen3_vl"](swapper, optimizer, manager)
    kept = []
    for kind, region in (
        ("kv-cache", MemoryRegionType.KV_CACHE),
        ("tensor_data", MemoryRegionType.TENSOR_DATA),
        ("activation-buffer", MemoryRegionType.ACTIVATION_BUFFER),
    ):
        tensor, block_id = allocate((64, 128), dtype, kind)
        kept.append(tensor)
        assert optimizer.made[-1] == ((64, 128), dtype, kind)
        block = swapper.access_memory_block(block_id)
        assert block is not None
        assert (block.size, block.region_type) == (64 * 128 * np.dtype(dtype).itemsize, region)
    assert swap_all(swapper) == 3
    assert manager.packed == 3
    assert all(not np.asarray(block).any() for block in swapper.blocks.values())


def test_advanced_configuration(memory: Memory) -> None:
    swapper = run(
        ADVANCED, AdvancedMemorySwapper=AdvancedMemorySwapper, SwapAlgorithm=SwapAlgorithm
    )["swapper"]
    with swapper:
        assert swapper.swap_algorithm is SwapAlgorithm.ADAPTIVE
        assert swapper.swap_threshold == 0.75
        assert swapper.max_swap_size == 2 * GIB
        monitor = swapper.pressure_monitor
        assert monitor.ram_thresholds == (0.6, 0.8, 0.9)
        assert monitor.gpu_thresholds == (0.7, 0.85, 0.95)
        memory.others = int(0.65 * GIB)
        assert monitor.get_ram_pressure()[0] is MemoryPressureLevel.MEDIUM
        memory.others = int(0.85 * GIB)
        assert monitor.get_ram_pressure()[0] is MemoryPressureLevel.HIGH
        memory.others = int(0.92 * GIB)
        assert swapper.get_status()["pressure_level"] == "critical"


def test_configuration_options() -> None:
    """The defaults that the document tells."""
    with AdvancedMemorySwapper() as swapper:
        assert swapper.pressure_monitor.ram_thresholds == (0.7, 0.85, 0.95)
        assert swapper.pressure_monitor.gpu_thresholds == (0.7, 0.85, 0.95)
        assert swapper.nvme_optimizer.block_size == 4 * MIB
        assert swapper.swap_threshold == 0.8
        assert swapper.swap_algorithm is SwapAlgorithm.ADAPTIVE
    assert [algorithm.name for algorithm in SwapAlgorithm] == ["LRU", "CLOCK", "ADAPTIVE"]


# -- troubleshooting


def test_a_higher_threshold_swaps_less_often(open_swapper: Opener, memory: Memory) -> None:
    """1. High swap frequency: increasing the swap threshold."""
    memory.total = 16 * MIB
    counts = []
    for threshold in (0.25, 0.5, 0.9):
        swapper = open_swapper(swap_threshold=threshold, nvme_optimizer=None)
        memory.swapper = swapper
        swaps = 0
        for i in range(12):
            fill(swapper, 1, first=i)
            if swapper.should_swap():
                swaps += swapper.perform_swapping()
            assert not swapper.should_swap()
        counts.append(swaps)
    assert counts == [9, 5, 0]


def test_more_memory_swaps_less_often(open_swapper: Opener, memory: Memory) -> None:
    """1. High swap frequency: adding more physical memory."""
    counts = []
    for total in (6, 14, 32):
        memory.total = 64 * MIB
        memory.swapper = swapper = open_swapper(nvme_optimizer=None, swap_threshold=0.5)
        fill(swapper, 12)
        memory.total = total * MIB
        counts.append(swapper.perform_swapping())
    assert counts == [10, 6, 0]


def test_pinned_blocks_never_miss(swapper: AdvancedMemorySwapper) -> None:
    """2. Slow performance: pinning frequently accessed blocks."""
    fill(swapper, 1, pinned=True)
    fill(swapper, 5, first=1)
    for _ in range(5):
        assert swap_all(swapper) in (5, 0)
        swapper.access_memory_block("b0")
    assert (swapper.stats.cache_hits, swapper.stats.cache_misses) == (5, 0)
    assert swapper.access_memory_block("b1") is not None
    assert swapper.stats.cache_misses == 1


def test_nothing_stays_of_unregistered_blocks(open_swapper: Opener, tmp_path: Path) -> None:
    """3. Memory leaks: all unregistered, memory and swap area go back."""
    directory = tmp_path / "swap"
    optimizer = omnimem.NVMeOptimizer(swap_directory=directory)
    swapper = open_swapper(host_limit="256MiB", max_swap_size="256MiB", nvme_optimizer=optimizer)
    noise = content("b0", 4 * MIB)
    before = resident_bytes()
    for i in range(32):
        swapper.register_memory_block(f"b{i}", 4 * MIB, data=noise)
    for i in range(8):
        swapper.blocks[f"b{i}"].pinned = True
    assert swap_all(swapper) == 24
    for i in range(20):
        swapper.access_memory_block(f"b{i}")
    assert resident_bytes() - before > 70 * MIB
    assert swapper.store.stats().disk.used_bytes >= 96 * MIB
    for i in range(32):
        assert swapper.unregister_memory_block(f"b{i}")
    settle(swapper)
    swap_all(swapper)
    stats = swapper.store.stats()
    assert (stats.host.used_bytes, stats.disk.used_bytes, stats.blocks) == (0, 0, 0)
    assert resident_bytes() - before < 24 * MIB
    assert not [path for path in directory.rglob("*") if path.is_file()]
    swapper.cleanup()
    assert resident_bytes() - before < 8 * MIB


def test_no_circular_references() -> None:
    """3. Memory leaks: check for circular references."""
    swapper = AdvancedMemorySwapper(host_limit="8MiB")
    fill(swapper, 3)
    swapper.integrate_with_compression(Zlib())
    swap_all(swapper)
    blocks = list(swapper.blocks.values())
    assert blocks
    store = weakref.ref(swapper.store)
    gc.disable()
    try:
        del swapper, blocks
        assert store() is None
    finally:
        gc.enable()


# -- best practices


def test_statistics_are_shown(swapper: AdvancedMemorySwapper) -> None:
    """2, 4. Monitor trends, efficiency metrics, and the status."""
    names = fill(swapper, 4)
    assert swapper.get_swapping_efficiency()["hit_rate"] == 0.0
    assert swap_all(swapper) == 4
    for name in (*names, *names, *names):
        assert read(swapper, name) == content(name)
    status = swapper.get_status()
    assert status["efficiency_metrics"]["hit_rate"] == pytest.approx(8 / 12)
    assert status["efficiency_metrics"]["avg_swap_out_time"] > 0.0
    assert status["efficiency_metrics"]["avg_swap_in_time"] > 0.0
    assert status["efficiency_metrics"]["total_swapped_GB"] == 8 * MIB / GIB
    assert status["pressure_trend"] in ("increasing", "decreasing", "stable")
    assert status["nvme_stats"]["read_bytes"] >= 4 * MIB


def test_the_trend_foretells(swapper: AdvancedMemorySwapper, memory: Memory) -> None:
    """2. Use pressure trend analysis to predict issues."""
    assert swapper.pressure_monitor.get_pressure_trend() == "stable"
    for others in (0.2, 0.35, 0.5, 0.65):
        memory.others = int(others * GIB)
        assert not swapper.should_swap()
    assert swapper.get_status()["pressure_trend"] == "increasing"


def test_falling_pressure(swapper: AdvancedMemorySwapper, memory: Memory) -> None:
    for others in (0.65, 0.5, 0.35, 0.2):
        memory.others = int(others * GIB)
        swapper.should_swap()
    assert swapper.pressure_monitor.get_pressure_trend() == "decreasing"


@pytest.mark.parametrize("algorithm", list(SwapAlgorithm))
def test_what_is_used_often_stays(
    open_swapper: Opener, memory: Memory, algorithm: SwapAlgorithm
) -> None:
    """6. Every algorithm keeps what is used all the time, with the others coming and going."""
    swapper = open_swapper(swap_algorithm=algorithm, swap_threshold=0.5)
    memory.swapper, memory.total = swapper, 16 * MIB
    names, chance = fill(swapper, 24), random.Random(1)
    hot, cold = names[:3], names[3:]
    for _ in range(40):
        for name in (*hot, chance.choice(cold)):
            swapper.access_memory_block(name)
        swapper.perform_swapping()
    missed = [event.block for event in swapper.store.events() if event.kind == "miss"]
    assert len([name for name in missed if name in hot]) <= 12
    assert len([name for name in missed if name in cold]) >= 20
