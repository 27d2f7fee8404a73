"""MemoryBlock: a record when a user builds it, and the core's word when a swapper does."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import omnimem
from omnimem import AdvancedMemorySwapper, MemoryBlock, MemoryRegionType

from .conftest import data
from .swappers import MIB, fill, swap_all

FIELDS = (
    "id",
    "ptr",
    "size",
    "region_type",
    "allocated",
    "timestamp",
    "last_access_time",
    "access_count",
    "is_swapped",
    "swap_location",
    "ref_count",
    "pinned",
    "device",
)


# -- unbound


def test_unbound_defaults() -> None:
    before = time.time()
    block = MemoryBlock(id="a", size=12)
    after = time.time()
    assert (block.id, block.size, block.ptr) == ("a", 12, 0)
    assert block.region_type is MemoryRegionType.TENSOR_DATA
    assert (block.allocated, block.is_swapped, block.pinned) == (False, False, False)
    assert (block.access_count, block.ref_count) == (0, 0)
    assert block.swap_location is None
    assert block.device == "cpu"
    assert before <= block.timestamp <= after
    assert before <= block.last_access_time <= after
    assert "unbound" in repr(block)
    assert "'a'" in repr(block)


def test_unbound_fields() -> None:
    values: dict[str, Any] = {
        "id": "x",
        "size": 7,
        "ptr": 4096,
        "region_type": MemoryRegionType.KV_CACHE,
        "allocated": True,
        "timestamp": 1.5,
        "last_access_time": 2.5,
        "access_count": 3,
        "is_swapped": True,
        "swap_location": "there",
        "ref_count": 4,
        "pinned": True,
        "device": "cuda",
    }
    assert set(values) == set(FIELDS)
    block = MemoryBlock(**values)
    assert {name: getattr(block, name) for name in FIELDS} == values
    for name in FIELDS[1:]:
        setattr(block, name, values[name])
    block.size, block.pinned, block.last_access_time = 9, False, 8.0
    assert (block.size, block.pinned, block.last_access_time) == (9, False, 8.0)


def test_unbound_by_keyword_only() -> None:
    for wrong in (("a", 12), ("a",)):
        with pytest.raises(TypeError):
            MemoryBlock(*wrong)  # type: ignore[misc]
    with pytest.raises(TypeError):
        MemoryBlock(id="a")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        MemoryBlock(id="a", size=1, colour="red")  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        MemoryBlock(id="a", size=1).colour = "red"  # type: ignore[attr-defined]


def test_unbound_has_no_views() -> None:
    block = MemoryBlock(id="a", size=12, ptr=4096, allocated=True)
    for look in (memoryview, np.from_dlpack, MemoryBlock.__dlpack__):
        with pytest.raises(BufferError):
            look(block)  # type: ignore[operator]
    torch = pytest.importorskip("torch")
    with pytest.raises(BufferError):
        torch.from_dlpack(block)


def test_without_init() -> None:
    block = MemoryBlock.__new__(MemoryBlock)
    for name in FIELDS:
        with pytest.raises((AttributeError, RuntimeError)):
            getattr(block, name)
    with pytest.raises((BufferError, RuntimeError)):
        memoryview(block)


def test_unbound_is_no_block_of_a_swapper(swapper: AdvancedMemorySwapper) -> None:
    block = MemoryBlock(id="a", size=12)
    assert "a" not in swapper.blocks
    assert swapper.register_memory_block("a", 12) is not block


# -- bound


@pytest.mark.parametrize("region", list(MemoryRegionType))
def test_bound_fields(swapper: AdvancedMemorySwapper, region: MemoryRegionType) -> None:
    before = time.time()
    block = swapper.register_memory_block("a", MIB, region, data=data(MIB), pinned=True)
    after = time.time()
    assert isinstance(block, MemoryBlock)
    assert (block.id, block.size, block.device) == ("a", MIB, "cpu")
    assert block.region_type is region
    assert (block.allocated, block.is_swapped, block.pinned) == (True, False, True)
    assert (block.access_count, block.ref_count) == (1, 0)
    assert block.swap_location is None
    assert before - 0.1 <= block.timestamp <= block.last_access_time + 1e-6 <= after + 0.1
    last = block.last_access_time
    time.sleep(0.002)
    swapper.access_memory_block("a")
    assert (block.access_count, block.ref_count) == (2, 0)
    assert block.last_access_time > last
    assert "in memory" in repr(block)


def test_ptr_is_the_address(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 1)
    block = swapper.blocks["b0"]
    array = np.asarray(block)
    assert block.ptr == array.ctypes.data
    assert array.dtype == np.uint8
    assert array.shape == (MIB,)


def test_only_pinned_can_be_set(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 1, region_type=MemoryRegionType.KV_CACHE)
    block = swapper.blocks["b0"]
    for name in FIELDS:
        if name == "pinned":
            continue
        before = getattr(block, name)
        with pytest.raises(AttributeError, match="read-only" if name != "id" else "id"):
            setattr(block, name, before)
        assert getattr(block, name) == before
    block.pinned = True
    assert block.pinned
    assert block.region_type is MemoryRegionType.KV_CACHE
    assert swap_all(swapper) == 0
    block.pinned = False
    assert swap_all(swapper) == 1
    with pytest.raises(AttributeError):
        block.colour = "red"  # type: ignore[attr-defined]


def test_references_are_counted(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 1)
    block = swapper.blocks["b0"]
    views = [memoryview(block) for _ in range(3)]
    assert block.ref_count == 3
    tensor = np.from_dlpack(block)
    lease = swapper.store.lease("b0")
    assert block.ref_count == 5
    views[0].release()
    del tensor
    lease.release()
    assert block.ref_count == 2
    part = views[1][10:20]
    views.clear()
    assert block.ref_count == 1
    del part
    assert block.ref_count == 0


def test_a_view_is_no_access(swapper: AdvancedMemorySwapper) -> None:
    """A view of what is in memory is none; one that brings the bytes in is."""
    fill(swapper, 1)
    block = swapper.blocks["b0"]
    memoryview(block).release()
    assert block.access_count == 1
    swap_all(swapper)
    memoryview(block).release()
    assert (block.access_count, swapper.stats.cache_misses) == (2, 1)


def test_swapped_out(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 2)
    block = swapper.blocks["b1"]
    assert swap_all(swapper) == 2
    assert (block.ptr, block.is_swapped, block.allocated) == (0, True, True)
    assert block.swap_location is not None
    assert "swap file" in block.swap_location
    assert block.swap_location != swapper.blocks["b0"].swap_location
    assert "swapped out" in repr(block)
    swapper.access_memory_block("b1")
    assert (block.is_swapped, block.swap_location) == (False, None)


def test_unregistered(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 1)
    block = swapper.blocks["b0"]
    swapper.unregister_memory_block("b0")
    assert (block.id, block.size, block.ptr, block.allocated) == ("b0", MIB, 0, False)
    assert not block.is_swapped
    for look in (memoryview, np.from_dlpack):
        with pytest.raises(KeyError, match="b0"):
            look(block)  # type: ignore[arg-type]


def test_dlpack(swapper: AdvancedMemorySwapper) -> None:
    given = np.arange(12, dtype=np.int32).reshape(3, 4)
    block = swapper.register_memory_block("a", given.nbytes, data=given)
    assert block.__dlpack_device__() == (1, 0)
    assert np.array_equal(np.from_dlpack(block), given)
    again = np.from_dlpack(block)
    again[1, 1] = 77
    assert np.asarray(block).view(np.int32)[5] == 77 or np.asarray(block)[1, 1] == 77


def test_blocks_hash_by_identity(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 2)
    both = {swapper.blocks["b0"], swapper.blocks["b1"], swapper.blocks["b0"]}
    assert len(both) == 2
    assert swapper.blocks["b0"] != swapper.blocks["b1"]


def test_names() -> None:
    assert [region.name for region in MemoryRegionType] == [
        "TENSOR_DATA",
        "ACTIVATION_BUFFER",
        "KV_CACHE",
        "TEMPORARY",
    ]
    assert all(region.value == region.name.lower() for region in MemoryRegionType)
    assert {"MemoryBlock", "MemoryRegionType", "NVMeOptimizer"} <= set(omnimem.__all__)
