"""The manager: its parts, the four points of a pipeline, and what is left of it."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import omnimem
import omnimem.manager
from omnimem import AdvancedMemoryConfig, AdvancedMemoryManager

MIB = 1 << 20


@pytest.fixture
def open_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., AdvancedMemoryManager]]:
    """Opens managers (64 MiB of memory unless told); checks and cleans them up."""
    monkeypatch.setenv("OMNIMEM_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("OMNIMEM_DISK_LIMIT", "256MiB")
    managers = []

    def open_one(**fields: Any) -> AdvancedMemoryManager:
        managers.append(AdvancedMemoryManager(AdvancedMemoryConfig(**{"budget": "64MiB"} | fields)))
        return managers[-1]

    yield open_one
    for manager in managers:
        try:
            manager.store.check()
        except omnimem.ClosedError:
            pass
        finally:
            manager.cleanup()


def our_threads() -> list[str]:
    return sorted(each.name for each in threading.enumerate() if each.name.startswith("omnimem"))


# ---- the parts ----


def test_a_pipeline(
    open_manager: Callable[..., AdvancedMemoryManager], caplog: pytest.LogCaptureFixture
) -> None:
    """The document's four points."""
    with open_manager() as manager:
        block = manager.allocate_memory("1MiB", "cpu")
        memoryview(block)[:5] = b"bytes"
        assert manager.cache_weights("model", "layer", bytes(range(100)))

        manager.record_model_usage("model")
        decision = manager.check_offload_needed("model")
        assert isinstance(decision, omnimem.OffloadDecision)
        assert not decision
        assert decision.reason
        assert bytes(manager.get_cached_weights("model", "layer")) == bytes(range(100))
        assert manager.get_cached_weights("model", "another") is None

        manager.deallocate_memory(block)
        stats = manager.get_memory_stats()
        assert stats.pool_stats["cpu"].allocation_count == 1
        assert stats.cache_stats["item_count"] == 1
        with caplog.at_level(logging.INFO, "omnimem.manager"):
            manager.cleanup()
    [line] = [each.getMessage() for each in caplog.records if each.name == "omnimem.manager"]
    assert "\n" not in line
    assert "budget of 64.00 MiB" in line
    assert "hit rate 50 %" in line


def test_parts_share_one_store(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    manager = open_manager(budget="32MiB")
    assert manager.store.config.host_limit == 32 * MIB
    manager.cache_weights("a", "b", bytes(MIB))
    assert manager.store.stats().host.used_bytes >= MIB
    with pytest.raises(omnimem.LimitError):
        manager.cache_weights("a", "large", bytes(40 * MIB))
    assert isinstance(manager.pool_manager, omnimem.MemoryPoolManager)
    assert isinstance(manager.weight_cache, omnimem.ModelWeightCache)
    assert isinstance(manager.memory_monitor, omnimem.MemoryMonitor)
    assert isinstance(manager.offloader, omnimem.AutomaticOffloader)
    assert manager.offloader.monitor is manager.memory_monitor


def test_the_order_of_the_document(
    open_manager: Callable[..., AdvancedMemoryManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def spy(cls: type[Any], method: str, text: str) -> None:
        known = getattr(cls, method)

        def told(self: Any, *args: Any, **fields: Any) -> Any:
            order.append(text)
            return known(self, *args, **fields)

        monkeypatch.setattr(cls, method, told)

    spy(omnimem.MemoryPoolManager, "__init__", "pools")
    spy(omnimem.ModelWeightCache, "__init__", "cache")
    spy(omnimem.AutomaticOffloader, "start", "offloader")
    spy(omnimem.MemoryMonitor, "start_monitoring", "monitor")
    spy(omnimem.MemoryPoolManager, "close", "pools end")
    spy(omnimem.ModelWeightCache, "close", "cache ends")
    spy(omnimem.AutomaticOffloader, "close", "offloader ends")
    spy(omnimem.MemoryMonitor, "stop_monitoring", "monitor ends")
    manager = open_manager()
    assert order == ["pools", "cache", "offloader", "monitor"]
    order.clear()
    manager.cleanup()
    assert list(dict.fromkeys(order)) == [
        "monitor ends",
        "offloader ends",
        "cache ends",
        "pools end",
    ]


def test_parts_that_are_off(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    manager = open_manager(
        enable_memory_pools=False,
        enable_weight_cache=False,
        enable_auto_offload=False,
        enable_monitoring=False,
    )
    assert our_threads() == []
    assert manager.weight_cache is None
    assert not manager.cache_weights("a", "b", bytes(10))
    assert manager.get_cached_weights("a", "b") is None
    manager.deallocate_memory(manager.allocate_memory(100, "cpu"))
    manager.record_model_usage("a")
    assert "enable_auto_offload=False" in manager.check_offload_needed("a").reason
    assert manager.get_memory_stats().system_memory[0] > 0


def test_defaults_and_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIMEM_DIRECTORY", str(tmp_path))
    with AdvancedMemoryManager() as manager:
        assert MIB <= manager.store.config.host_limit <= manager.get_memory_stats().system_memory[0]
        assert manager.store.config.disk_limit >= 0
        assert "0 models" in repr(manager)
    with pytest.raises(TypeError, match="AdvancedMemoryConfig"):
        AdvancedMemoryManager(omnimem.OffloadConfig())  # type: ignore[arg-type]


# ---- the end ----


def test_cleanup_is_final(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    manager = open_manager()
    manager.cache_weights("a", "b", bytes(100))
    held = manager.get_cached_weights("a", "b")
    manager.cleanup()
    manager.cleanup()
    assert our_threads() == []
    assert bytes(held) == bytes(100)
    for call in (
        lambda: manager.allocate_memory(10, "cpu"),
        lambda: manager.cache_weights("a", "b", b"x"),
        lambda: manager.get_cached_weights("a", "b"),
        lambda: manager.record_model_usage("a"),
        lambda: manager.check_offload_needed("a"),
        lambda: manager.attach({}),
        lambda: manager.get_memory_stats(),
    ):
        with pytest.raises(omnimem.ClosedError):
            call()
    repr(manager)


def test_one_part_that_fails_does_not_keep_the_others(
    open_manager: Callable[..., AdvancedMemoryManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = open_manager()

    def fail() -> None:
        raise OSError("no such luck")

    monkeypatch.setattr(manager.weight_cache, "_close", fail)
    with pytest.raises(OSError, match="no such luck"):
        manager.cleanup()
    assert our_threads() == []
    with pytest.raises(omnimem.ClosedError):
        manager.store.names()
    manager.cleanup()


@pytest.mark.parametrize(
    "part", ["MemoryPoolManager", "ModelWeightCache", "MemoryMonitor", "AutomaticOffloader"]
)
def test_half_made_nothing_is_left(
    part: str, open_manager: Callable[..., AdvancedMemoryManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = []
    known = omnimem.manager.open_store

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no such luck")

    def remember(limit: int) -> omnimem.Store:
        stores.append(known(limit))
        return stores[-1]

    monkeypatch.setattr(omnimem.manager, "open_store", remember)
    monkeypatch.setattr(omnimem.manager, part, fail)
    with pytest.raises(OSError, match="no such luck"):
        open_manager()
    assert our_threads() == []
    with pytest.raises(omnimem.ClosedError):
        stores[0].names()


def test_dropped_it_ends(open_manager: Callable[..., AdvancedMemoryManager]) -> None:
    manager = AdvancedMemoryManager(AdvancedMemoryConfig(budget="8MiB"))
    assert our_threads()
    del manager
    gc.collect()
    for _ in range(1000):
        if not our_threads():
            break
        threading.Event().wait(0.01)
    assert our_threads() == []
