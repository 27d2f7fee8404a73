"""The swapper's blocks: registered, accessed, forgotten, and the end."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import omnimem
from omnimem import AdvancedMemorySwapper, MemoryBlock, MemoryRegionType

from .conftest import data
from .swappers import MIB, Opener, content, fill, group_of, read, swap_all

WRONG = [
    ({"size": -1}, ValueError, "-1"),
    ({"size": 0}, ValueError, "at least one byte"),
    ({"size": 1 << 70}, ValueError, "size"),
    ({"size": 1 << 60}, omnimem.LimitError, "host_limit"),
    ({"size": "much"}, ValueError, "much"),
    ({"size": 1.5}, TypeError, "size"),
    ({"size": None}, TypeError, "size"),
    ({"block_id": 7}, TypeError, "block_id"),
    ({"block_id": None}, TypeError, "block_id"),
    ({"block_id": ""}, ValueError, "name"),
    ({"block_id": "a\0b"}, ValueError, "NUL"),
    ({"data": b"123"}, ValueError, "size=4, but data has 3 bytes"),
    ({"data": b"123", "take": True}, ValueError, "size=4, but data has 3 bytes"),
    ({"data": 7}, TypeError, "DLPack"),
    ({"data": "1234"}, TypeError, "DLPack"),
    ({"take": True}, ValueError, "needs data"),
    ({"region_type": "attic"}, ValueError, "attic"),
]


# -- registering


def test_data_is_copied(swapper: AdvancedMemorySwapper) -> None:
    mine = bytearray(data(MIB))
    block = swapper.register_memory_block("a", MIB, data=mine)
    mine[:] = bytes(MIB)
    assert bytes(memoryview(block)) == data(MIB)
    assert (block.id, block.size, block.access_count) == ("a", MIB, 1)
    assert block.region_type is MemoryRegionType.TENSOR_DATA
    assert not block.pinned


def test_data_is_taken(swapper: AdvancedMemorySwapper) -> None:
    """The memory is the producer's: no copy; swapped out, it is let go."""
    mine = np.frombuffer(bytearray(data(MIB)), np.uint8)
    block = swapper.register_memory_block("a", MIB, data=mine, take=True)
    assert block.ptr == mine.ctypes.data
    np.asarray(block)[7] = mine[7] ^ 255
    changed = bytearray(data(MIB))
    changed[7] ^= 255
    assert bytes(mine) == changed
    gone = weakref.ref(mine)
    del mine
    gc.collect()
    assert gone() is not None
    assert swap_all(swapper) == 1
    assert gone() is None
    assert read(swapper, "a") == changed


def test_read_only_data_is_taken(swapper: AdvancedMemorySwapper) -> None:
    block = swapper.register_memory_block("a", MIB, data=data(MIB), take=True)
    assert memoryview(block).readonly
    assert swap_all(swapper) == 1
    view = memoryview(block)
    assert view == data(MIB)
    assert not view.readonly


def test_zeros_are_made_at_the_first_access(swapper: AdvancedMemorySwapper) -> None:
    block = swapper.register_memory_block("a", 3 * MIB)
    assert (block.ptr, block.allocated, block.is_swapped, block.access_count) == (
        0,
        False,
        False,
        1,
    )
    assert group_of(swapper).host_bytes == 0
    assert group_of(swapper).missing_bytes == 3 * MIB
    assert swap_all(swapper) == 0
    assert swapper.access_memory_block("a") is block
    assert block.ptr != 0
    assert block.allocated
    assert group_of(swapper).host_bytes == 3 * MIB
    assert group_of(swapper).missing_bytes == 0
    assert bytes(memoryview(block)) == bytes(3 * MIB)


def test_a_view_is_a_first_access(swapper: AdvancedMemorySwapper) -> None:
    block = swapper.register_memory_block("a", MIB)
    memoryview(block)[5] = 5
    assert swap_all(swapper) == 1
    assert read(swapper, "a") == bytes(5) + b"\5" + bytes(MIB - 6)


def test_the_same_id_again(swapper: AdvancedMemorySwapper) -> None:
    block = swapper.register_memory_block("a", MIB, data=data(MIB))
    again = swapper.register_memory_block(
        "a", 5, MemoryRegionType.KV_CACHE, pinned=True, data=b"12345"
    )
    assert again is block
    assert (again.size, again.region_type, again.pinned) == (
        MIB,
        MemoryRegionType.TENSOR_DATA,
        False,
    )
    assert read(swapper, "a") == data(MIB)


def test_the_same_id_from_many_threads(swapper: AdvancedMemorySwapper) -> None:
    found: list[MemoryBlock] = []
    start = threading.Barrier(4)

    def register() -> None:
        start.wait()
        for i in range(200):
            found.append(swapper.register_memory_block(f"{i}", 16, data=bytes(16)))

    threads = [threading.Thread(target=register) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 800
    assert len({id(block) for block in found}) == len(swapper.blocks) == 200


@pytest.mark.parametrize("size", [np.int64(4096), "4KiB", 4096])
def test_spellings_of_a_size(swapper: AdvancedMemorySwapper, size: Any) -> None:
    assert swapper.register_memory_block("a", size).size == 4096


@pytest.mark.parametrize(("fields", "error", "text"), WRONG)
def test_wrong_arguments(
    swapper: AdvancedMemorySwapper, fields: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        swapper.register_memory_block(**{"block_id": "a", "size": 4} | fields)
    assert len(swapper.blocks) == 0
    assert swapper.register_memory_block("a", 4, data=b"1234").size == 4


def test_what_cannot_be_brought_in_is_refused(open_swapper: Opener) -> None:
    swapper = open_swapper(host_limit="4MiB", max_swap_size="4MiB")
    with pytest.raises((omnimem.LimitError, omnimem.DiskFullError), match="b"):
        fill(swapper, 20)
    names = list(swapper.blocks)
    assert 4 <= len(names) <= 8
    for name in names:
        assert read(swapper, name) == content(name)


def test_arrays(swapper: AdvancedMemorySwapper) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    given: Any
    for name, given in {
        "whole": array,
        "strided": array[:, ::2, 1:],
        "scalar": array[0, 0, 0],
    }.items():
        block = swapper.register_memory_block(name, given.nbytes, data=given)
        assert swap_all(swapper) == 1
        back = np.from_dlpack(block)
        assert (back.dtype, back.shape) == (given.dtype, given.shape)
        assert np.array_equal(back, given)
        del back
        swap_all(swapper)


@pytest.mark.parametrize("take", [False, True])
def test_tensors(swapper: AdvancedMemorySwapper, take: bool) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    tensors = [
        torch.randn(3, 5),
        torch.randn(7).to(torch.bfloat16),
        torch.randn(2, 2).to(torch.float16),
        torch.randint(0, 9, (4, 1, 2)),
        torch.tensor([True, False]),
        torch.tensor(3.5),
        torch.randn(3, 5, dtype=torch.complex64),
    ]
    for i, tensor in enumerate(tensors):
        block = swapper.register_memory_block(str(i), tensor.nbytes, data=tensor.clone(), take=take)
        for _ in range(2):
            back = torch.from_dlpack(block)
            assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(back, tensor)
            del back
            swap_all(swapper)


# -- accessing


def test_hits_and_misses(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 3)
    assert (swapper.stats.cache_hits, swapper.stats.cache_misses) == (0, 0)
    block = swapper.access_memory_block("b0")
    assert block is swapper.blocks["b0"]
    assert block.access_count == 2
    assert (swapper.stats.cache_hits, swapper.stats.cache_misses) == (1, 0)
    assert swap_all(swapper) == 3
    assert swapper.access_memory_block("b0") is block
    assert swapper.access_memory_block("b0") is block
    assert (swapper.stats.cache_hits, swapper.stats.cache_misses) == (2, 1)
    assert block.access_count == 4
    assert swapper.blocks["b1"].access_count == 1


def test_unknown_ids(swapper: AdvancedMemorySwapper) -> None:
    assert swapper.access_memory_block("a") is None
    assert swapper.unregister_memory_block("a") is False
    assert (swapper.stats.cache_hits, swapper.stats.cache_misses) == (0, 0)
    for odd in (3, None, "", "a\0b", "x" * 5000):
        assert odd not in swapper.blocks
        with pytest.raises(KeyError):
            swapper.blocks[odd]
    with pytest.raises(TypeError, match="str"):
        swapper.access_memory_block(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="str"):
        swapper.prefetch("a")
    with pytest.raises(KeyError, match="a"):
        swapper.prefetch(["a"]).wait(10)


def test_prefetch(swapper: AdvancedMemorySwapper) -> None:
    names = fill(swapper, 4)
    assert swap_all(swapper) == 4
    assert swapper.prefetch(names[:3]).wait(30)
    assert [swapper.blocks[name].is_swapped for name in names] == [False, False, False, True]
    assert [read(swapper, name) for name in names] == [content(name) for name in names]
    assert (swapper.stats.cache_hits, swapper.stats.cache_misses) == (3, 1)


# -- forgetting


def test_unregister(swapper: AdvancedMemorySwapper) -> None:
    names = fill(swapper, 4)
    assert swap_all(swapper) == 4
    swapper.access_memory_block("b0")
    held = swapper.blocks["b0"]
    for name in names:
        assert swapper.unregister_memory_block(name) is True
        assert swapper.unregister_memory_block(name) is False
        assert swapper.access_memory_block(name) is None
        assert name not in swapper.blocks
    group = group_of(swapper)
    assert (group.blocks, group.swapped, group.host_bytes, group.disk_bytes) == (0, 0, 0, 0)
    with pytest.raises(KeyError, match="b0"):
        memoryview(held)
    assert held.ptr == 0
    other = swapper.register_memory_block("b0", 4, data=b"1234")
    assert other is not held
    assert bytes(memoryview(other)) == b"1234"


def test_another_groups_blocks_are_none_of_it(swapper: AdvancedMemorySwapper) -> None:
    """A store that is shared has other blocks, too: of a model, for one."""
    swapper.store.add("theirs", b"1234")
    with pytest.raises(ValueError, match="theirs"):
        swapper.register_memory_block("theirs", 4, data=b"5678")
    assert "theirs" not in swapper.blocks
    assert swapper.unregister_memory_block("theirs") is False
    with pytest.raises(KeyError, match="theirs"):
        swapper.get_access_pattern_priority("theirs")
    swapper.cleanup()


def test_another_groups_block_is_not_accessed(swapper: AdvancedMemorySwapper) -> None:
    swapper.store.add("theirs", b"1234")
    assert swapper.access_memory_block("theirs") is None


# -- the mapping


def test_blocks(swapper: AdvancedMemorySwapper) -> None:
    blocks = swapper.blocks
    assert isinstance(blocks, Mapping)
    assert (len(blocks), list(blocks), bool(blocks)) == (0, [], False)
    names = fill(swapper, 3)
    assert (len(blocks), list(blocks), bool(blocks)) == (3, names, True)
    assert "b0" in blocks
    assert "b3" not in blocks
    assert {name: block.size for name, block in blocks.items()} == dict.fromkeys(names, MIB)
    assert blocks.get("b3") is None
    for change in ("__setitem__", "__delitem__", "pop", "clear", "update"):
        assert not hasattr(blocks, change)
    with pytest.raises(AttributeError):
        swapper.blocks = {}  # type: ignore[misc]
    swapper.unregister_memory_block("b1")
    assert list(blocks) == ["b0", "b2"]


def test_objects_are_made_on_demand(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 2)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is MemoryBlock]
    block = swapper.blocks["b0"]
    assert swapper.blocks["b0"] is block is swapper.access_memory_block("b0")
    swap_all(swapper)
    assert swapper.blocks["b0"] is block
    assert swapper.register_memory_block("b0", MIB) is block


def test_what_was_unregistered_does_not_count(swapper: AdvancedMemorySwapper) -> None:
    """A view keeps its bytes, but no name: no block of the swapper."""
    fill(swapper, 2, pinned=True)
    view = memoryview(swapper.blocks["b0"])
    swapper.unregister_memory_block("b0")
    assert list(swapper.blocks) == ["b1"]
    assert len(swapper.blocks) == 1
    assert swapper.get_status()["total_registered_blocks"] == 1
    assert swapper.get_status()["pinned_blocks"] == 1
    assert view == content("b0")


# -- the end


def test_cleanup(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 3)
    swap_all(swapper)
    swapper.access_memory_block("b0")
    block = swapper.blocks["b1"]
    swapper.cleanup()
    swapper.cleanup()
    assert (len(swapper.blocks), list(swapper.blocks)) == (0, [])
    assert "b0" not in swapper.blocks
    with pytest.raises(omnimem.ClosedError):
        swapper.register_memory_block("a", 4)
    with pytest.raises(omnimem.ClosedError):
        swapper.access_memory_block("b0")
    with pytest.raises((omnimem.ClosedError, KeyError)):
        memoryview(block)
    with contextlib.suppress(omnimem.ClosedError):
        assert swap_all(swapper) == 0
    assert swapper.get_status()["total_registered_blocks"] == 0


def test_context_manager(open_swapper: Opener) -> None:
    with open_swapper() as swapper:
        fill(swapper, 2)
        assert "2 blocks" in repr(swapper)
    assert len(swapper.blocks) == 0
    with pytest.raises(omnimem.ClosedError):
        swapper.access_memory_block("b0")


def test_a_shared_store_stays_open(open_store: Any, open_swapper: Opener, io_backend: str) -> None:
    store = open_store()
    store.add("theirs", b"1234")
    swapper = AdvancedMemorySwapper(store=store)
    assert swapper.store is store
    fill(swapper, 3)
    assert swap_all(swapper) == 3
    assert swapper.get_status()["nvme_stats"]["written_bytes"] >= 3 * MIB
    swapper.cleanup()
    assert store.names() == ["theirs"]
    assert bytes(store.lease("theirs")) == b"1234"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"swap_threshold": 1.01}, ValueError),
        ({"swap_threshold": -0.01}, ValueError),
        ({"swap_threshold": float("nan")}, ValueError),
        ({"swap_threshold": "high"}, TypeError),
        ({"swap_algorithm": "random"}, ValueError),
        ({"max_swap_size": -1}, ValueError),
        ({"max_swap_size": "lots"}, ValueError),
        ({"host_limit": -1}, ValueError),
        ({"io_backend": "paper"}, ValueError),
    ],
)
def test_wrong_settings(
    open_swapper: Opener, fields: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        open_swapper(**fields)


def test_host_limit_belongs_to_a_shared_store(open_store: Any) -> None:
    with pytest.raises(ValueError, match="host_limit"):
        AdvancedMemorySwapper(store=open_store(), host_limit="1MiB")
