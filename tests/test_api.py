"""The names that pools, cache, monitor, offloader and manager are used by: a contract.

More may be added; what is listed here is neither left out nor renamed.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import omnimem
from omnimem import (
    AdvancedMemoryConfig,
    AdvancedMemoryManager,
    AutomaticOffloader,
    CacheConfig,
    MemoryConfig,
    MemoryMonitor,
    MemoryPoolManager,
    MemoryPressure,
    MemoryPressureLevel,
    MemoryStats,
    ModelWeightCache,
    MonitorConfig,
    OffloadConfig,
    PoolStats,
    StoreConfig,
)

GIB = 1 << 30
POOLS = {"cpu": 8 * GIB, "cuda": 16 * GIB}
ALERTS = {"warning": 0.75, "critical": 0.9}

DEFAULTS: dict[type, dict[str, Any]] = {
    MemoryConfig: {
        "enable_memory_pools": True,
        "pool_sizes": POOLS,
        "fragmentation_threshold": 0.1,
        "cleanup_interval": 60.0,
    },
    CacheConfig: {
        "max_size_gb": 4.0,
        "enable_compression": False,
        "compression": "auto",
        "compression_ratio": 0.5,
        "eviction_batch_size": 10,
        "access_count_threshold": 1,
        "policy": "lru",
    },
    OffloadConfig: {
        "enable_auto_offload": True,
        "offload_threshold": 0.8,
        "restore_threshold": 0.6,
        "min_offload_interval": 10.0,
        "usage_window": 300.0,
    },
    MonitorConfig: {
        "enable_monitoring": True,
        "monitoring_interval": 1.0,
        "history_size": 1000,
        "alert_thresholds": ALERTS,
    },
    AdvancedMemoryConfig: {
        "enable_memory_pools": True,
        "pool_sizes": POOLS,
        "enable_weight_cache": True,
        "cache_size_gb": 4.0,
        "cache_compression": False,
        "enable_auto_offload": True,
        "offload_threshold": 0.8,
        "restore_threshold": 0.6,
        "enable_monitoring": True,
        "monitoring_interval": 1.0,
        "alert_thresholds": ALERTS,
        "memory": MemoryConfig(),
        "cache": CacheConfig(),
        "offload": OffloadConfig(),
        "monitor": MonitorConfig(),
        "budget": None,
    },
}

NEEDED = inspect.Parameter.empty
METHODS: dict[type, dict[str, dict[str, Any]]] = {
    MemoryPoolManager: {
        "__init__": {"config": None},
        "allocate": {"size": NEEDED, "device": NEEDED, "alignment": 256, "label": None},
        "deallocate": {"block": NEEDED},
        "get_pool_stats": {"device": NEEDED},
        "trim": {"device": None},
        "set_limit": {"device": NEEDED, "limit": NEEDED},
        "snapshot": {"device": None},
        "close": {},
    },
    ModelWeightCache: {
        "__init__": {"max_size_gb": None, "config": None},
        "get": {"model_key": NEEDED, "layer_name": NEEDED, "index": None},
        "put": {"model_key": NEEDED, "layer_name": NEEDED, "weights": NEEDED},
        "contains": {"model_key": NEEDED, "layer_name": NEEDED},
        "remove": {"model_key": NEEDED, "layer_name": NEEDED},
        "evict_least_recently_used": {"target_size": NEEDED},
        "evict": {"target_size": NEEDED},
        "clear": {},
        "get_stats": {},
        "close": {},
    },
    MemoryMonitor: {
        "__init__": {"config": None},
        "get_memory_stats": {},
        "check_memory_pressure": {},
        "log_memory_usage": {"stage": NEEDED},
        "start_monitoring": {},
        "stop_monitoring": {},
        "get_history": {"limit": 100},
        "explain": {},
        "wait_for_level": {"level": NEEDED, "timeout": None},
    },
    AutomaticOffloader: {
        "__init__": {"memory_monitor": NEEDED, "config": None},
        "should_offload": {"model": NEEDED},
        "offload_model": {"model": NEEDED, "target_device": "cpu"},
        "restore_model": {"model": NEEDED, "target_device": None},
        "record_usage": {"model": NEEDED},
        "register": {"model": NEEDED, "model_id": None},
        "start": {},
        "stop": {},
    },
    AdvancedMemoryManager: {
        "__init__": {"config": None},
        "allocate_memory": {"size": NEEDED, "device": "cpu"},
        "deallocate_memory": {"block": NEEDED},
        "cache_weights": {"model_key": NEEDED, "layer_name": NEEDED, "weights": NEEDED},
        "get_cached_weights": {"model_key": NEEDED, "layer_name": NEEDED},
        "check_offload_needed": {"model_id": NEEDED},
        "offload_model": {"model": NEEDED, "model_id": None, "target_device": "cpu"},
        "restore_model": {"model": NEEDED, "model_id": None, "target_device": None},
        "record_model_usage": {"model_id": NEEDED},
        "get_memory_stats": {},
        "attach": {"model": NEEDED, "model_dir": None},
        "cleanup": {},
    },
}


@pytest.mark.parametrize("config", DEFAULTS, ids=lambda cls: cls.__name__)
def test_configs(config: type) -> None:
    made = config()
    for name, value in DEFAULTS[config].items():
        assert getattr(made, name) == value, name
    assert dataclasses.is_dataclass(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, next(iter(DEFAULTS[config])), None)


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls, methods in METHODS.items() for name in methods]
)
def test_methods_take_what_they_are_given(cls: type, name: str) -> None:
    """By these names, in this order, with these defaults; what is added has a default."""
    promised = METHODS[cls][name]
    function = cls if name == "__init__" else getattr(cls, name)
    taken = inspect.signature(function).parameters
    ours = {key: p.default for key, p in taken.items() if key != "self"}
    assert list(ours)[: len(promised)] == list(promised)
    for parameter, value in ours.items():
        if parameter in promised:
            assert value == promised[parameter], parameter
        else:
            assert value is not NEEDED, parameter


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (
            PoolStats,
            "total_size used_size free_size fragmentation_ratio allocation_count "
            "deallocation_count reserved_size",
        ),
        (MemoryStats, "system_memory gpu_memory pool_stats cache_stats timestamp"),
    ],
)
def test_records(cls: Any, fields: str) -> None:
    assert set(fields.split()) <= {field.name for field in dataclasses.fields(cls)}


def test_everything_is_exported() -> None:
    named = {cls.__name__ for cls in (*DEFAULTS, *METHODS, MemoryStats, PoolStats, MemoryPressure)}
    assert named | {"AlertSystem", "MemoryBlock", "OffloadDecision", "track"} <= set(
        omnimem.__all__
    )
    for name in omnimem.__all__:
        assert getattr(omnimem, name).__doc__, name


@pytest.mark.parametrize(
    ("level", "word"),
    [("low", "low"), ("medium", "warning"), ("high", "warning"), ("critical", "critical")],
)
def test_pressure_is_a_word(level: str, word: str) -> None:
    pressure = MemoryPressure(MemoryPressureLevel(level), 0.5, "why", 3.0)
    assert isinstance(pressure, str)
    assert pressure == word
    told = (pressure.level.value, pressure.usage, pressure.cause, pressure.seconds_to_exhaustion)
    assert told == (level, 0.5, "why", 3.0)


def test_cache_statistics() -> None:
    with ModelWeightCache(0.25) as cache:
        assert {
            "cache_size_gb", "max_size_gb", "utilization", "item_count", "access_counts", "hits",
            "misses", "hit_rate", "evictions",
        } <= set(cache.get_stats())  # fmt: skip
        assert (cache.max_size, cache.current_size, dict(cache.cache)) == (GIB // 4, 0, {})


def test_parts_of_a_manager() -> None:
    with AdvancedMemoryManager(AdvancedMemoryConfig(budget="8MiB")) as manager:
        assert isinstance(manager.pool_manager, MemoryPoolManager)
        assert isinstance(manager.weight_cache, ModelWeightCache)
        assert isinstance(manager.memory_monitor, MemoryMonitor)
        assert isinstance(manager.offloader, AutomaticOffloader)
        assert set(manager.pool_manager.pools) == set(POOLS)
        with pytest.raises(KeyError, match="never seen"):
            manager.offload_model("never seen")
        assert not manager.check_offload_needed("never seen")
        manager.record_model_usage("never seen")


@pytest.mark.parametrize("cls", [MemoryMonitor, AutomaticOffloader, AdvancedMemoryManager])
@pytest.mark.parametrize("wrong", [3, {"budget": 1}, StoreConfig()])
def test_a_wrong_type_is_named(cls: Any, wrong: object) -> None:
    with pytest.raises(TypeError, match=f"must be an? .*, not {type(wrong).__name__}"):
        cls(wrong)
