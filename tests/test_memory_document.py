"""The architecture's document: its class structures word for word, against the classes here."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections import deque
from collections.abc import Mapping
from typing import Any, Optional

import pytest

import omnimem
from omnimem import (
    AdvancedMemoryConfig,
    AdvancedMemoryManager,
    CacheConfig,
    MemoryConfig,
    MonitorConfig,
    OffloadConfig,
)

torch = pytest.importorskip("torch")

STRUCTURES = '''
class MemoryPoolManager:
    def __init__(self, config: MemoryConfig):
        self.pools = {}  # device -> MemoryPool
        self.allocator = IntelligentAllocator()

    def allocate(self, size: int, device: str) -> MemoryBlock:
        """Allocate memory from appropriate pool"""

    def deallocate(self, block: MemoryBlock):
        """Return memory to pool"""

    def get_pool_stats(self, device: str) -> PoolStats:
        """Get statistics for a specific pool"""

class ModelWeightCache:
    def __init__(self, max_size_gb: float, config: CacheConfig):
        self.cache = OrderedDict()  # LRU implementation
        self.max_size = max_size_gb * 1024**3
        self.current_size = 0

    def get(self, model_key: str, layer_name: str) -> Optional[torch.Tensor]:
        """Retrieve weights from cache"""

    def put(self, model_key: str, layer_name: str, weights: torch.Tensor):
        """Store weights in cache with LRU management"""

    def evict_least_recently_used(self, target_size: int):
        """Evict LRU items to free up memory"""

class AutomaticOffloader:
    def __init__(self, memory_monitor: MemoryMonitor, config: OffloadConfig):
        self.monitor = memory_monitor
        self.offload_threshold = config.offload_threshold
        self.restore_threshold = config.restore_threshold

    def should_offload(self, model: nn.Module) -> bool:
        """Determine if model should be offloaded"""

    def offload_model(self, model: nn.Module, target_device: str):
        """Offload model to target device"""

    def restore_model(self, model: nn.Module):
        """Restore model to GPU if conditions allow"""

class MemoryMonitor:
    def __init__(self, config: MonitorConfig):
        self.history = deque(maxlen=config.history_size)
        self.alerts = AlertSystem()

    def get_memory_stats(self) -> MemoryStats:
        """Get current memory statistics"""

    def check_memory_pressure(self) -> MemoryPressure:
        """Assess current memory pressure level"""

    def log_memory_usage(self, stage: str):
        """Log memory usage for debugging"""
'''

CONFIGURATION = """
@dataclass
class AdvancedMemoryConfig:
    # Memory Pool Configuration
    enable_memory_pools: bool = True
    pool_sizes: Dict[str, int] = field(default_factory=lambda: {"cpu": 8*1024**3, "cuda": 16*1024**3})

    # Cache Configuration
    enable_weight_cache: bool = True
    cache_size_gb: float = 4.0
    cache_compression: bool = False

    # Offloading Configuration
    enable_auto_offload: bool = True
    offload_threshold: float = 0.8  # 80% memory usage
    restore_threshold: float = 0.6  # 60% memory usage

    # Monitoring Configuration
    enable_monitoring: bool = True
    monitoring_interval: float = 1.0  # seconds
    alert_thresholds: Dict[str, float] = field(default_factory=lambda: {"warning": 0.75, "critical": 0.9})
"""  # noqa: E501


def run(text: str) -> dict[str, type]:
    """The classes that the document's text makes, by name."""
    world: dict[str, Any] = {name: getattr(omnimem, name) for name in omnimem.__all__}
    world |= {"torch": torch, "nn": torch.nn, "Dict": dict, "Optional": Optional}
    world |= {"dataclass": dataclasses.dataclass, "field": dataclasses.field}
    world["__name__"] = "document"
    exec(compile(text, "document", "exec", dont_inherit=True), world)
    return {k: v for k, v in world.items() if getattr(v, "__module__", "") == "document"}


DOCUMENT = run(STRUCTURES)


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, m) for name, cls in DOCUMENT.items() for m, v in vars(cls).items() if callable(v)],
)
def test_calls(name: str, method: str) -> None:
    """What the document calls can be called, by position and by name."""
    ours: Any = getattr(omnimem, name)
    names = list(inspect.signature(vars(DOCUMENT[name])[method]).parameters)[1:]
    function = ours if method == "__init__" else getattr(ours, method)
    signature = inspect.signature(function)
    given = [] if method == "__init__" else [None]
    by_position = signature.bind(*given, *range(len(names)))
    by_name = signature.bind(*given, **{each: i for i, each in enumerate(names)})
    assert by_position.arguments == by_name.arguments


def test_configuration() -> None:
    theirs = run(CONFIGURATION)["AdvancedMemoryConfig"]()
    ours = AdvancedMemoryConfig()
    for field in dataclasses.fields(theirs):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert AdvancedMemoryConfig(**dataclasses.asdict(theirs)) == ours


def test_attributes() -> None:
    """What the document's constructors set is there, and means what it says."""
    pools = omnimem.MemoryPoolManager(MemoryConfig())
    assert isinstance(pools.pools, Mapping)
    assert set(pools.pools) == {"cpu", "cuda"}
    pools.close()
    cache = omnimem.ModelWeightCache(0.25, CacheConfig())
    assert (cache.max_size, cache.current_size) == (0.25 * 1024**3, 0)
    assert list(cache.cache) == []
    cache.close()
    monitor = omnimem.MemoryMonitor(MonitorConfig())
    assert isinstance(monitor.history, deque)
    assert monitor.history.maxlen == MonitorConfig().history_size
    assert isinstance(monitor.alerts, omnimem.AlertSystem)
    offloader = omnimem.AutomaticOffloader(monitor, OffloadConfig())
    assert offloader.monitor is monitor
    assert (offloader.offload_threshold, offloader.restore_threshold) == (0.8, 0.6)
    offloader.close()
    monitor.close()


def test_offloader_of_the_document() -> None:
    """`should_offload`, `offload_model` and `restore_model` as the document calls them."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    inputs = torch.ones(1, 64)
    before = model(inputs)
    monitor = omnimem.MemoryMonitor(MonitorConfig())
    offloader = omnimem.AutomaticOffloader(monitor, OffloadConfig())
    try:
        assert not offloader.should_offload(model)
        for target in ("cpu", "disk"):
            assert offloader.offload_model(model, target)
            assert torch.equal(model(inputs), before)
            offloader.restore_model(model)
            assert torch.equal(model(inputs), before)
    finally:
        offloader.close()
        monitor.close()
    assert torch.equal(model(inputs), before)


def test_integration_points(caplog: pytest.LogCaptureFixture) -> None:
    """Initialisation, loading, the inference loop and cleanup, in the document's order."""
    caplog.set_level(logging.INFO, "omnimem")
    model = torch.nn.Linear(64, 64)
    inputs = torch.ones(1, 64)
    before = model(inputs)
    manager = AdvancedMemoryManager(AdvancedMemoryConfig(budget="64MiB"))
    assert manager.memory_monitor.running
    block = manager.allocate_memory(1 << 20, "cpu")
    memoryview(block)[:5] = b"bytes"
    manager.cache_weights("model", "layer", model.weight.detach())
    assert manager.get_memory_stats().pool_stats["cpu"].used_size == 1 << 20
    manager.attach(model, model_id="model")
    for _ in range(2):
        if manager.check_offload_needed("model"):
            manager.offload_model(model, "model")
        assert torch.equal(model(inputs), before)
        assert torch.equal(manager.get_cached_weights("model", "layer"), model.weight)
    manager.deallocate_memory(block)
    manager.cleanup()
    assert "memory at the end" in caplog.text
    assert torch.equal(model(inputs), before)
