"""Pools: blocks of plain memory, limits, views that outlive them, what goes back to the system."""

from __future__ import annotations

import gc
import logging
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import omnimem
from omnimem import (
    ClosedError,
    DeviceError,
    LimitError,
    MemoryBlock,
    MemoryConfig,
    MemoryPoolManager,
    _core,
)

from .conftest import data, run_clean, run_python

MIB = 1 << 20


@pytest.fixture
def open_pools() -> Iterator[Callable[..., MemoryPoolManager]]:
    """Opens managers (a "cpu" pool of 16 MiB unless told); checks and closes them."""
    managers: list[MemoryPoolManager] = []

    def open_one(**fields: Any) -> MemoryPoolManager:
        fields = {"pool_sizes": {"cpu": "16MiB"}} | fields
        managers.append(MemoryPoolManager(MemoryConfig(**fields)))
        return managers[-1]

    yield open_one
    for manager in managers:
        if manager.closed:
            continue
        manager.check()
        for pool in manager.pools.values():
            for block in [*pool.values()]:
                manager.deallocate(block)
        manager.close()


@pytest.fixture
def pools(open_pools: Callable[..., MemoryPoolManager]) -> MemoryPoolManager:
    return open_pools()


def put(block: MemoryBlock, content: bytes) -> None:
    with memoryview(block) as view:
        view[: len(content)] = content


def get(block: MemoryBlock) -> bytes:
    with memoryview(block) as view:
        return bytes(view)


# ---- configuration ----


def test_default_config() -> None:
    config = MemoryConfig()
    assert config.enable_memory_pools is True
    assert config.pool_sizes == {"cpu": 8 << 30, "cuda": 16 << 30}
    assert config.fragmentation_threshold == 0.1
    assert config.cleanup_interval == 60.0
    with MemoryPoolManager(config) as manager:
        assert set(manager.pools) == {"cpu", "cuda"}
        assert not manager.pools["cuda"]
        with pytest.raises(DeviceError, match="cuda"):
            manager.allocate(1, "cuda")
        assert manager.get_pool_stats("cuda") == omnimem.PoolStats()
    with MemoryPoolManager() as manager:
        assert manager.config == config


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"pool_sizes": {"tpu": 1}}, ValueError, '"pinned"'),
        ({"pool_sizes": {"cpu:0": 1}}, ValueError, "known are"),
        ({"pool_sizes": {3: 1}}, ValueError, "unknown device 3"),
        ({"pool_sizes": {"cpu": "much"}}, ValueError, r"pool_sizes\['cpu'\]"),
        ({"pool_sizes": {"cpu": -1}}, ValueError, "between 0"),
        ({"pool_sizes": {"cpu": 1.5}}, TypeError, "must be an int"),
        ({"fragmentation_threshold": 1.1}, ValueError, "fragmentation_threshold=1.1"),
        ({"fragmentation_threshold": float("nan")}, ValueError, "between 0 and 1"),
        ({"cleanup_interval": -1}, ValueError, "cleanup_interval=-1"),
        ({"cleanup_interval": float("inf")}, ValueError, "seconds from 0"),
    ],
)
def test_bad_config(fields: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MemoryConfig(**fields)


def test_config_is_frozen_and_pickles() -> None:
    sizes: dict[str, int | str] = {"cpu": "1MiB", "cuda:1": 7}
    config = MemoryConfig(pool_sizes=sizes)
    sizes["pinned"] = 1
    assert config.pool_sizes == {"cpu": MIB, "cuda:1": 7}
    with pytest.raises(AttributeError):
        config.cleanup_interval = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.pool_sizes["cpu"] = 1  # type: ignore[index]
    assert pickle.loads(pickle.dumps(config)) == config


# ---- blocks ----


def test_block(pools: MemoryPoolManager) -> None:
    block = pools.allocate(1000, "cpu", label="first")
    assert isinstance(block, MemoryBlock)
    assert (block.id, block.size, block.device, block.label) == ("cpu:1", 1000, "cpu", "first")
    assert block.allocated
    assert block.ptr % 256 == 0
    assert block.ptr
    assert (block.access_count, block.ref_count) == (1, 0)
    assert not block.is_swapped
    assert block.swap_location is None
    assert not block.pinned
    assert block.timestamp == block.last_access_time
    with memoryview(block) as view:
        assert (view.nbytes, view.format, view.readonly) == (1000, "B", False)
        assert (block.ref_count, block.access_count) == (1, 2)
    assert block.ref_count == 0
    pools.deallocate(block)
    assert (block.allocated, block.ptr, block.size, block.id) == (False, 0, 1000, "cpu:1")
    assert block.label is None
    assert pools.allocate(1, "cpu").id == "cpu:2"


def test_sizes_and_alignment(pools: MemoryPoolManager) -> None:
    assert pools.allocate("1MiB", "cpu").size == MIB
    assert pools.allocate(np.int64(5), "cpu").size == 5
    for power in range(22):
        assert pools.allocate(100, "cpu", alignment=1 << power).ptr % (1 << power) == 0
    assert pools.allocate(100, "cpu", 4096).ptr % 4096 == 0
    for size, error in ((0, ValueError), (-1, ValueError), ("x", ValueError), (1.5, TypeError),
                        (None, TypeError), (True, TypeError)):  # fmt: skip
        with pytest.raises(error):
            pools.allocate(size, "cpu")  # type: ignore[arg-type]
    for alignment in (3, 1 << 22, -1):
        with pytest.raises(ValueError, match="alignment"):
            pools.allocate(1, "cpu", alignment=alignment)
    with pytest.raises(TypeError, match="label must be a str"):
        pools.allocate(1, "cpu", label=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="misses argument 'device'"):
        pools.allocate(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no argument 'where'"):
        pools.allocate(1, "cpu", where=1)  # type: ignore[call-arg]


def test_devices(pools: MemoryPoolManager) -> None:
    for call in (pools.get_pool_stats, pools.trim, lambda device: pools.set_limit(device, 1),
                 lambda device: pools.allocate(1, device), pools.snapshot,
                 lambda device: pools.suggest_victims(1, device)):  # fmt: skip
        with pytest.raises(ValueError, match=r'known are "cpu", "pinned"'):
            call("tpu")
        with pytest.raises(ValueError, match="pool_sizes has 'cpu'"):
            call("pinned")
        with pytest.raises(DeviceError, match="'cuda:3'"):
            call("cuda:3")
        with pytest.raises(TypeError, match="device must be a str"):
            call(7)
    name = "".join(["c", "pu"])  # not the interned one
    assert pools.allocate(1, name).device == "cpu"


def test_numpy_and_torch_without_a_copy(pools: MemoryPoolManager) -> None:
    torch = pytest.importorskip("torch")
    block = pools.allocate(4096, "cpu")
    array = np.asarray(block)
    exchanged = np.from_dlpack(block)
    tensor = torch.from_dlpack(block)
    assert array.ctypes.data == exchanged.ctypes.data == tensor.data_ptr() == block.ptr
    tensor[:] = 7
    assert (array == 7).all()
    array[0] = 1
    assert exchanged[0] == 1
    assert tensor[0] == 1
    assert block.__dlpack_device__() == (1, 0)
    copy = np.from_dlpack(block, copy=True)
    copy[:] = 9
    assert array[1] == 7
    assert tensor.view(torch.bfloat16).numel() == 2048


def test_views_outlive_deallocation(pools: MemoryPoolManager) -> None:
    content = data(3 * MIB)
    block = pools.allocate(len(content), "cpu")
    put(block, content)
    view, array = memoryview(block), np.from_dlpack(block)
    capsule = block.__dlpack__(max_version=(1, 0))
    pools.deallocate(block)
    stats = pools.get_pool_stats("cpu")
    assert stats.used_size == 0
    assert stats.exported_size == len(content)
    assert stats.released_size == stats.reserved_size == 3 * MIB
    with pytest.raises(LimitError, match="views of freed blocks"):
        pools.allocate(14 * MIB, "cpu")
    others = [pools.allocate(MIB, "cpu") for _ in range(13)]
    for other in others:
        put(other, b"\xff" * MIB)
    assert view == content
    view.release()
    assert bytes(array) == content
    del array
    assert pools.get_pool_stats("cpu").released_size == 3 * MIB
    del capsule
    assert pools.get_pool_stats("cpu").released_size == 0
    assert pools.allocate(3 * MIB, "cpu").allocated


def test_views_outlive_everything() -> None:
    manager = MemoryPoolManager(MemoryConfig(pool_sizes={"cpu": "8MiB"}))
    block = manager.allocate(MIB, "cpu")
    content = data(MIB)
    put(block, content)
    view = memoryview(block)
    manager.deallocate(block)
    manager.close()
    del manager, block
    gc.collect()
    assert view == content


def test_a_block_outlives_its_manager() -> None:
    block = MemoryPoolManager(MemoryConfig(pool_sizes={"cpu": MIB})).allocate(10, "cpu")
    gc.collect()
    put(block, b"0123456789")
    assert get(block) == b"0123456789"


def test_misuse(pools: MemoryPoolManager, open_pools: Callable[..., MemoryPoolManager]) -> None:
    block = pools.allocate(10, "cpu")
    with pytest.raises(ValueError, match="another manager"):
        open_pools().deallocate(block)
    pools.deallocate(block)
    with pytest.raises(ValueError, match="'cpu:1' has no memory: it was deallocated"):
        pools.deallocate(block)
    with pytest.raises(BufferError, match="'cpu:1' has no memory"):
        memoryview(block)
    with pytest.raises(BufferError, match="'cpu:1' has no memory"):
        block.__dlpack__()
    with pytest.raises(ValueError, match="no pool's block"):
        pools.deallocate(MemoryBlock(id="mine", size=1))
    for wrong in (None, 7, b"x"):
        with pytest.raises(TypeError, match="must be a MemoryBlock"):
            pools.deallocate(wrong)  # type: ignore[arg-type]
    again = pools.allocate(10, "cpu")  # of the same record
    with pytest.raises(ValueError, match="has no memory"):
        pools.deallocate(block)
    assert again.allocated
    with pytest.raises(BufferError, match="cannot be swapped"):
        again.pinned = True
    with pytest.raises(AttributeError):
        again.size = 3


def test_a_swappers_block_is_foreign(
    pools: MemoryPoolManager, swapper: omnimem.AdvancedMemorySwapper
) -> None:
    block = swapper.register_memory_block("a", 100)
    with pytest.raises(ValueError, match="no pool's block"):
        pools.deallocate(block)
    assert block.device == "cpu"
    assert block.label is None


# ---- numbers ----


def test_stats(pools: MemoryPoolManager) -> None:
    blocks = [pools.allocate(size, "cpu") for size in (1000, 2 * MIB + 1, 256)]
    stats = pools.get_pool_stats("cpu")
    assert stats.total_size == 16 * MIB
    assert stats.used_size == 1256 + 2 * MIB + 1
    assert stats.reserved_size == 1024 + 2 * MIB + 256 + 256
    assert stats.free_size == stats.largest_free_size == 16 * MIB - stats.reserved_size
    assert stats.fragmentation_ratio == 0
    assert (stats.allocation_count, stats.deallocation_count, stats.block_count) == (3, 0, 3)
    pools.deallocate(blocks[1])
    stats = pools.get_pool_stats("cpu")
    assert stats.fragmentation_ratio == 1 - stats.largest_free_size / stats.free_size
    assert stats.largest_free_size == 14 * MIB - 1536
    assert (stats.deallocation_count, stats.block_count) == (1, 2)
    assert stats.peak_used_size == 1256 + 2 * MIB + 1
    assert stats.mapped_size == 4 * MIB
    with pytest.raises(LimitError):
        pools.allocate(17 * MIB, "cpu")
    assert pools.get_pool_stats("cpu").failure_count == 1


def test_limit_errors_tell_what_is_missing(pools: MemoryPoolManager) -> None:
    blocks = [pools.allocate(2 * MIB, "cpu") for _ in range(8)]
    with pytest.raises(LimitError, match="raise the limit") as caught:
        pools.allocate(1, "cpu")
    error = caught.value
    assert (error.need, error.used, error.limit, error.which) == (1, 16 * MIB, 16 * MIB, "cpu")
    for block in blocks[::2]:
        pools.deallocate(block)
    with pytest.raises(LimitError, match=r"largest piece has 2097152 .*suggest_victims"):
        pools.allocate(3 * MIB, "cpu")
    assert pools.get_pool_stats("cpu").fragmentation_ratio == 0.75


def test_set_limit(pools: MemoryPoolManager) -> None:
    block = pools.allocate("6MiB", "cpu")
    pools.set_limit("cpu", "4MiB")
    assert pools.get_pool_stats("cpu").free_size == 0
    with pytest.raises(LimitError):
        pools.allocate(1, "cpu")
    put(block, b"still there")
    pools.deallocate(block)
    assert pools.allocate("4MiB", "cpu").allocated
    pools.set_limit("cpu", "40MiB")
    assert pools.allocate("36MiB", "cpu").allocated
    with pytest.raises(ValueError, match="limit"):
        pools.set_limit("cpu", -1)


def test_pools_mapping(pools: MemoryPoolManager) -> None:
    first, second = pools.allocate(1, "cpu"), pools.allocate(2, "cpu")
    live = pools.pools["cpu"]
    assert dict(live) == {"cpu:1": first, "cpu:2": second}
    assert live["cpu:2"] is second
    assert len(live) == 2
    get(first)
    assert [*live] == ["cpu:2", "cpu:1"]  # the one used longest ago first
    del first  # dropped, not deallocated
    gc.collect()
    assert live["cpu:1"].size == 1
    for missing in ("cpu:3", "cpu:01", "cpu:", "cpu", "pinned:1", "1", 1):
        assert missing not in live
    with pytest.raises(TypeError):
        live["cpu:9"] = second  # type: ignore[index]
    with pytest.raises(TypeError):
        pools.pools["cpu"] = {}  # type: ignore[index]
    pools.deallocate(second)
    assert "cpu:2" not in live
    pools.deallocate(live["cpu:1"])
    assert len(live) == 0


def test_snapshot(pools: MemoryPoolManager) -> None:
    block = pools.allocate(1000, "cpu", label="ünïcode")
    view = memoryview(block)
    (found,) = pools.snapshot()
    assert found == omnimem.BlockSnapshot(
        id="cpu:1", device="cpu", label="ünïcode", ptr=block.ptr, size=1000, reserved_size=1024,
        timestamp=block.timestamp, last_access_time=block.last_access_time, access_count=2,
        ref_count=1,
    )  # fmt: skip
    view.release()
    pools.deallocate(block)
    assert pools.snapshot("cpu") == []


def test_victims(pools: MemoryPoolManager) -> None:
    blocks = [pools.allocate(2 * MIB, "cpu") for _ in range(8)]
    assert pools.suggest_victims("2MiB", "cpu") == [blocks[0]]
    assert pools.suggest_victims(5 * MIB, "cpu") == blocks[:3]
    held = memoryview(blocks[1])  # between blocks[0] and the rest
    assert pools.suggest_victims(4 * MIB, "cpu") == blocks[2:4]
    get(blocks[2])
    assert pools.suggest_victims(2 * MIB, "cpu") == [blocks[0]]
    assert pools.suggest_victims(6 * MIB, "cpu") == [*blocks[3:6]]
    with pytest.raises(LimitError, match="no blocks without views"):
        pools.suggest_victims(16 * MIB, "cpu")
    held.release()
    for block in pools.suggest_victims(16 * MIB, "cpu"):
        pools.deallocate(block)
    assert pools.suggest_victims(16 * MIB, "cpu") == []
    assert pools.allocate(16 * MIB, "cpu").allocated
    with pytest.raises(ValueError, match="aligned to 3"):
        pools.suggest_victims(1, "cpu", alignment=3)


# ---- memory and the system ----

RSS = """
import os, sys, time
import omnimem
from omnimem import MemoryConfig, MemoryPoolManager
MIB = 1 << 20
def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def touch(block):
    with memoryview(block) as view:
        for at in range(0, len(view), 4096):
            view[at] = 1
"""


def test_a_size_is_no_reservation() -> None:
    run_clean(
        RSS
        + """
before = rss()
with MemoryPoolManager() as pools:
    blocks = [pools.allocate("1GiB", "cpu") for _ in range(8)]
    assert rss() - before < 8 * MIB, rss() - before
    try:
        pools.allocate(1, "cpu")
    except omnimem.LimitError:
        pass
    for block in blocks:
        pools.deallocate(block)
"""
    )


def test_trim_returns_memory() -> None:
    run_clean(
        RSS
        + """
pools = MemoryPoolManager(MemoryConfig(pool_sizes={"cpu": "256MiB"}))
keep = pools.allocate("1MiB", "cpu")
touch(keep)
before = rss()
block = pools.allocate("128MiB", "cpu")
touch(block)
assert rss() - before > 120 * MIB
pools.deallocate(block)
assert rss() - before > 120 * MIB  # kept for the next
assert pools.trim() >= 126 * MIB
assert rss() - before < 8 * MIB, rss() - before
assert bytes(memoryview(keep)[:1]) == b"\\1"
pools.deallocate(keep)
pools.close()
"""
    )


@pytest.mark.parametrize(
    "fields",
    ["enable_memory_pools=False", "cleanup_interval=0.2", "fragmentation_threshold=0.0"],
)
def test_memory_goes_back_by_itself(fields: str) -> None:
    run_clean(
        RSS
        + f"""
pools = MemoryPoolManager(MemoryConfig(pool_sizes={{"cpu": "130MiB"}}, {fields}))
"""
        + """
parts = [pools.allocate("2MiB", "cpu"), pools.allocate("2MiB", "cpu")]
block = pools.allocate("126MiB", "cpu")
touch(block)
before = rss()
pools.deallocate(parts[0])
pools.deallocate(block)
deadline = time.monotonic() + 20
while before - rss() < 100 * MIB:
    assert time.monotonic() < deadline, before - rss()
    time.sleep(0.05)
    pools.deallocate(pools.allocate(1, "cpu"))
pools.deallocate(parts[1])
pools.close()
"""
    )


PINNED = (
    RSS
    + """
import resource
def locked():
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) << 10 for l in file if l.startswith("VmLck"))
"""
)


def test_pinned_memory_is_locked() -> None:
    """As root too, who may lock anything: the limit is not in the way."""
    done = run_python(
        PINNED
        + """
with MemoryPoolManager(MemoryConfig(pool_sizes={"pinned": "2MiB"})) as pools:
    block = pools.allocate("1MiB", "pinned")
    assert block.device == "pinned" and block.pinned
    touch(block)
    assert locked() >= MIB, locked()
    pools.deallocate(block)
    pools.trim()
assert locked() == 0
"""
    )
    if "RLIMIT_MEMLOCK" in done.stderr:
        pytest.skip("less than 2 MiB may be locked here")
    assert (done.returncode, done.stderr) == (0, "")


def test_pinned_memory_over_the_limit() -> None:
    run_clean(
        PINNED
        + """
resource.setrlimit(resource.RLIMIT_MEMLOCK, (MIB, MIB))
if os.geteuid() == 0:
    os.setgroups([])
    os.setresuid(65534, 65534, 65534)
pools = MemoryPoolManager(MemoryConfig(pool_sizes={"pinned": "64MiB", "cpu": "1MiB"}))
block = pools.allocate("512KiB", "pinned")
touch(block)
try:
    pools.allocate("4MiB", "pinned")
except omnimem.LimitError as error:
    assert error.which == "RLIMIT_MEMLOCK" and error.limit == MIB, vars(error)
    assert "ulimit -l" in str(error) and "CAP_IPC_LOCK" in str(error)
else:
    raise AssertionError("locked more than it may")
pools.check()
touch(block)
pools.deallocate(block)
pools.deallocate(pools.allocate(1, "cpu"))
pools.close()
"""
    )


# ---- closing ----


def test_close_reports_leaks(caplog: pytest.LogCaptureFixture) -> None:
    manager = MemoryPoolManager(MemoryConfig(pool_sizes={"cpu": "64MiB", "pinned": 0}))
    for number in range(10):
        manager.allocate((number + 1) * MIB, "cpu", label=f"layer {number}" if number > 1 else None)
    with (
        caplog.at_level(logging.WARNING, "omnimem.pools"),
        pytest.warns(
            ResourceWarning, match="pool 'cpu' was closed with 10 blocks, 55.00 MiB, still"
        ),
    ):
        manager.close()
    (record,) = caplog.records
    assert "55.00 MiB, still allocated: 'layer 9' (10.00 MiB), 'layer 8'" in record.message
    assert record.message.endswith("'layer 2' (3.00 MiB) and 2 more")
    manager.close()
    assert len(caplog.records) == 1


def test_after_close(pools: MemoryPoolManager) -> None:
    block = pools.allocate(1000, "cpu")
    put(block, b"x" * 1000)
    view = memoryview(block)
    with pytest.warns(ResourceWarning, match="1 block, 1000 B"):
        pools.close()
    assert pools.closed
    assert not block.allocated
    assert view == b"x" * 1000
    with pytest.raises(BufferError):
        memoryview(block)
    with pytest.raises(ValueError, match="its pool was closed"):
        pools.deallocate(block)
    assert dict(pools.pools["cpu"]) == {}
    assert len(pools.pools["cpu"]) == 0
    for call in (
        lambda: pools.allocate(1, "cpu"), lambda: pools.get_pool_stats("cpu"), pools.trim,
        lambda: pools.set_limit("cpu", 1), pools.snapshot, pools.check,
        lambda: pools.suggest_victims(1, "cpu"),
    ):  # fmt: skip
        with pytest.raises(ClosedError):
            call()


def test_no_report_without_leaks(
    pools: MemoryPoolManager, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    with pools:
        pools.deallocate(pools.allocate(1, "cpu"))
    assert not recwarn.list
    assert not caplog.records


def test_fork() -> None:
    out = run_clean(
        """
import gc, os
import omnimem
pools = omnimem.MemoryPoolManager(omnimem.MemoryConfig(pool_sizes={"cpu": 1 << 20}))
block = pools.allocate(1000, "cpu", label="of the parent")
view = memoryview(block)
view[:3] = b"abc"
child = os.fork()
if child == 0:
    failed = []
    calls = dict(
        allocate=lambda: pools.allocate(1, "cpu"), deallocate=lambda: pools.deallocate(block),
        stats=lambda: pools.get_pool_stats("cpu"), trim=pools.trim, check=pools.check,
        limit=lambda: pools.set_limit("cpu", 1), snapshot=pools.snapshot,
        victims=lambda: pools.suggest_victims(1, "cpu"), view=lambda: memoryview(block),
        dlpack=lambda: block.__dlpack__(), blocks=lambda: list(pools.pools["cpu"]),
    )
    for name, call in calls.items():
        try:
            call()
            failed.append(name)
        except omnimem.ClosedError as error:
            if "fork" not in str(error):
                failed.append((name, str(error)))
    pools.close()
    del view, block, pools
    gc.collect()
    with omnimem.MemoryPoolManager() as own:
        own.deallocate(own.allocate(1, "cpu"))
    print(failed, flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert bytes(view[:3]) == b"abc" and block.allocated
pools.deallocate(block)
pools.close()
"""
    )
    assert out == "[]\n"


def test_exit_with_everything_alive() -> None:
    run_clean(
        """
import numpy, omnimem
pools = omnimem.MemoryPoolManager()
blocks = [pools.allocate(5000, "cpu") for _ in range(100)]
views = [memoryview(block) for block in blocks[:30]]
arrays = [numpy.from_dlpack(block) for block in blocks[20:60]]
capsules = [block.__dlpack__() for block in blocks[50:]]
for block in blocks[::3]:
    pools.deallocate(block)
import builtins
builtins.keep = (pools, blocks, views, arrays, capsules)
"""
    )


# ---- faults and threads ----


@pytest.mark.parametrize("point", ["alloc", "map"])
def test_every_fault(point: str) -> None:
    """The nth allocation or mapping fails: an error, and everything is as it was."""
    for nth in range(1, 200):
        manager = None
        _core._fault_arm(point, nth)
        try:
            manager = MemoryPoolManager(MemoryConfig(pool_sizes={"cpu": "8MiB"}))
            blocks = [
                manager.allocate(5000, "cpu", label="x" if n % 99 == 0 else None)
                for n in range(300)
            ]
            manager.suggest_victims("8MiB", "cpu")
            manager.snapshot()
            for block in blocks:
                manager.deallocate(block)
        except MemoryError:
            pass
        fired = _core._fault_fired(point)
        _core._fault_reset()
        if manager is not None:
            manager.check()
            for block in [*manager.pools["cpu"].values()]:
                manager.deallocate(block)
            assert manager.get_pool_stats("cpu").reserved_size == 0
            manager.close()
        if not fired:
            break
    assert nth > (3 if point == "alloc" else 1)
    assert not fired


def test_threads(open_pools: Callable[..., MemoryPoolManager]) -> None:
    """8 threads allocate, fill, hand views to each other, and deallocate under one limit."""
    pools = open_pools(pool_sizes={"cpu": "8MiB"}, cleanup_interval=0.01)
    errors: list[BaseException] = []
    passed: list[tuple[memoryview, bytes]] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        mine: list[tuple[MemoryBlock, bytes]] = []
        try:
            for _ in range(600):
                if passed and rng.random() < 0.3:
                    view, mark = passed.pop()
                    assert view == mark * view.nbytes
                if rng.random() < 0.5:
                    try:
                        block = pools.allocate(rng.randrange(1, 400_000), "cpu")
                    except LimitError:
                        pass
                    else:
                        mark = bytes([rng.randrange(256)])
                        put(block, mark * block.size)
                        mine.append((block, mark))
                elif mine:
                    block, mark = mine.pop(rng.randrange(len(mine)))
                    assert get(block) == mark * block.size
                    if rng.random() < 0.5:
                        passed.append((memoryview(block), mark))
                    pools.deallocate(block)
                if rng.random() < 0.02:
                    pools.trim()
            for block, _ in mine:
                pools.deallocate(block)
        except IndexError:  # another thread was faster
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        pools.check()
        assert pools.get_pool_stats("cpu").reserved_size <= 8 * MIB
    for thread in threads:
        thread.join()
    assert not errors
    passed.clear()
    pools.check()
    assert pools.get_pool_stats("cpu").released_size == 0


# ---- a model ----


class PoolMachine(RuleBasedStateMachine):
    """Blocks beside a dict of what was written to them."""

    @initialize(
        limit=st.integers(1 << 16, 1 << 23),
        threshold=st.sampled_from([0.0, 0.1, 1.0]),
        interval=st.sampled_from([0.0, 0.001, 60.0]),
    )
    def open(self, limit: int, threshold: float, interval: float) -> None:
        self.limit = limit
        self.manager = MemoryPoolManager(
            MemoryConfig(
                pool_sizes={"cpu": limit},
                fragmentation_threshold=threshold,
                cleanup_interval=interval,
            )
        )
        self.live: dict[str, tuple[MemoryBlock, bytes]] = {}
        self.views: list[tuple[memoryview, bytes, str]] = []
        self.allocated = self.deallocated = 0

    def released(self) -> dict[str, int]:
        return {name: len(view) for view, _, name in self.views if name not in self.live}

    def held(self) -> int:
        sizes = [block.size for block, _ in self.live.values()] + [*self.released().values()]
        return sum(-(-size // 256) * 256 for size in sizes)

    def pick(self, number: int) -> tuple[MemoryBlock, bytes]:
        assume(self.live)
        return self.live[sorted(self.live)[number % len(self.live)]]

    @rule(size=st.integers(1, 1 << 20) | st.integers(1, 3000), power=st.integers(0, 16),
          seed=st.integers(0, 255))  # fmt: skip
    def allocate(self, size: int, power: int, seed: int) -> None:
        before = self.manager.get_pool_stats("cpu")
        try:
            block = self.manager.allocate(size, "cpu", alignment=1 << power, label=str(seed))
        except LimitError:
            assert size + (1 << power) > before.largest_free_size
            return
        assert block.ptr % (1 << power) == 0
        assert -(-size // 256) * 256 <= -(-before.largest_free_size // 256) * 256
        content = bytes([seed]) * size
        put(block, content)
        self.live[block.id] = block, content
        self.allocated += 1

    @rule(number=st.integers(0, 99))
    def deallocate(self, number: int) -> None:
        block, content = self.pick(number)
        assert get(block) == content
        del self.live[block.id]
        self.manager.deallocate(block)
        self.deallocated += 1
        with pytest.raises(ValueError, match="has no memory"):
            self.manager.deallocate(block)

    @rule(number=st.integers(0, 99), dlpack=st.booleans())
    def view(self, number: int, dlpack: bool) -> None:
        block, content = self.pick(number)
        view = memoryview(np.from_dlpack(block)) if dlpack else memoryview(block)
        self.views.append((view, content, block.id))

    @rule(number=st.integers(0, 99))
    def drop_view(self, number: int) -> None:
        assume(self.views)
        view, content, _ = self.views.pop(number % len(self.views))
        assert view == content
        del view

    @rule(size=st.integers(1, 1 << 20))
    def make_room(self, size: int) -> None:
        try:
            victims = self.manager.suggest_victims(size, "cpu")
        except LimitError:
            assert size > self.limit or self.views
            return
        for block in victims:
            assert block.ref_count == 0
            del self.live[block.id]
            self.manager.deallocate(block)
            self.deallocated += 1
        self.manager.deallocate(self.manager.allocate(size, "cpu"))
        self.allocated += 1
        self.deallocated += 1

    @rule()
    def trim(self) -> None:
        self.manager.trim()

    @rule(limit=st.integers(1 << 16, 1 << 23))
    def set_limit(self, limit: int) -> None:
        self.manager.set_limit("cpu", limit)
        self.limit = limit

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        stats = self.manager.get_pool_stats("cpu")
        assert stats.used_size == sum(block.size for block, _ in self.live.values())
        assert stats.reserved_size == self.held()
        assert stats.total_size == self.limit
        assert stats.free_size == max(0, self.limit - self.held())
        assert stats.block_count == len(self.live)
        assert stats.allocation_count == self.allocated
        assert stats.deallocation_count == self.deallocated
        viewed = {name: len(view) for view, _, name in self.views}
        assert stats.exported_size == sum(viewed.values())
        assert {*self.manager.pools["cpu"]} == {*self.live}

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for block, content in self.live.values():
            assert get(block) == content
            self.manager.deallocate(block)
        self.manager.close()
        for view, content, _ in self.views:
            assert view == content


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
