"""Views of a swapper's blocks, and blocks that are swapped out; nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest

from omnimem import AdvancedMemorySwapper, SwapAlgorithm, _core

from .conftest import data
from .memory import Memory
from .swappers import MIB, Opener, content, fill, group_of, read, settle, swap_all

# -- views


def test_views_keep_bytes(swapper: AdvancedMemorySwapper) -> None:
    """Through swapping, unregistering and the end of the swapper."""
    fill(swapper, 4)
    view = memoryview(swapper.blocks["b0"])
    assert swapper.blocks["b0"].ref_count == 1
    assert swap_all(swapper) == 3
    assert view == content("b0")
    assert not swapper.blocks["b0"].is_swapped
    swapper.unregister_memory_block("b0")
    assert view == content("b0")
    swapper.register_memory_block("b0", MIB, data=content("b9"))
    later = memoryview(swapper.blocks["b0"])
    swapper.cleanup()
    assert view == content("b0")
    assert later == content("b9")


def test_a_block_holds_nothing(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 2)
    block = swapper.access_memory_block("b0")
    assert block is not None
    assert (block.ptr != 0, block.is_swapped, block.swap_location) == (True, False, None)
    assert swap_all(swapper) == 2
    assert (block.ptr, block.is_swapped, block.ref_count) == (0, True, 0)
    assert block.swap_location is not None
    with memoryview(block) as view:
        assert view == content("b0")
        assert (block.ptr != 0, block.is_swapped, block.ref_count) == (True, False, 1)
    assert block.ref_count == 0


def test_views_share_what_is_written(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 1)
    block, expected = swapper.blocks["b0"], bytearray(content("b0"))
    for turn in range(3):
        first, second, third = memoryview(block), np.asarray(block), memoryview(block)
        assert block.ref_count == 3
        first[turn], second[100 + turn] = 200 + turn, 210 + turn
        expected[turn], expected[100 + turn] = 200 + turn, 210 + turn
        assert first == second.data == third == expected
        first.release()
        assert swap_all(swapper) == 0
        del second
        third[50 + turn] = expected[50 + turn] = 220 + turn
        third.release()
        assert swap_all(swapper) == 1
        assert read(swapper, "b0") == expected


def test_tensors_share_what_is_written(swapper: AdvancedMemorySwapper) -> None:
    torch = pytest.importorskip("torch")
    given = torch.arange(1000, dtype=torch.float32)
    block = swapper.register_memory_block("a", given.nbytes, data=given)
    for turn in range(3):
        tensor = torch.from_dlpack(block)
        tensor[turn] = -1.0
        given[turn] = -1.0
        assert torch.equal(torch.from_dlpack(block), given)
        assert swap_all(swapper) == 0
        del tensor
        assert swap_all(swapper) == 1
        assert torch.equal(torch.from_dlpack(swapper.access_memory_block("a")), given)


def test_a_clean_block_is_not_written_again(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 2)
    assert swap_all(swapper) == 2
    assert group_of(swapper).out_bytes == 2 * MIB
    for name in ("b0", "b1"):
        assert read(swapper, name) == content(name)
    memoryview(swapper.blocks["b1"])[0] ^= 1
    assert swap_all(swapper) == 2
    assert (group_of(swapper).outs, group_of(swapper).out_bytes) == (4, 3 * MIB)
    assert read(swapper, "b0") == content("b0")
    assert read(swapper, "b1")[1:] == content("b1")[1:]


# -- swapping out


@pytest.mark.parametrize("algorithm", list(SwapAlgorithm))
def test_perform_swapping(open_swapper: Opener, algorithm: SwapAlgorithm) -> None:
    swapper = open_swapper(swap_algorithm=algorithm)
    assert swapper.swap_algorithm is algorithm
    sizes = [1, 511, 4096, 4097, 100_000, MIB, 3 * MIB + 17, 5 * MIB]
    for i, size in enumerate(sizes):
        swapper.register_memory_block(f"b{i}", size, data=data(size, i))
    for _ in range(3):
        assert swap_all(swapper) == len(sizes)
        assert all(block.is_swapped and not block.ptr for block in swapper.blocks.values())
        assert (group_of(swapper).host_bytes, group_of(swapper).swapped) == (0, len(sizes))
        assert swap_all(swapper) == 0
        for i, size in enumerate(sizes):
            assert read(swapper, f"b{i}") == data(size, i)
    assert swapper.get_status()["swap_trouble"] is None


@pytest.mark.parametrize(
    ("algorithm", "first"), [(SwapAlgorithm.LRU, "b1"), (SwapAlgorithm.CLOCK, "b0")]
)
def test_the_algorithm_chooses(
    swapper: AdvancedMemorySwapper, memory: Memory, algorithm: SwapAlgorithm, first: str
) -> None:
    """All were used again, b1 the longest ago; the hand is at b0."""
    swapper.swap_algorithm = algorithm
    names = fill(swapper, 4)
    for name in ("b1", "b0", "b2", "b3"):
        swapper.access_memory_block(name)
    memory.swapper, memory.total, swapper.swap_threshold = swapper, 4 * MIB, 0.9
    assert swapper.perform_swapping() == 1
    assert [name for name in names if swapper.blocks[name].is_swapped] == [first]


def test_the_only_one_is_found(open_swapper: Opener) -> None:
    """The leader of ADAPTIVE has all in its shadow, of which one is in memory."""
    swapper = open_swapper(swap_algorithm=SwapAlgorithm.ADAPTIVE)
    fill(swapper, 2, 4096)
    for name in ("b0", "b0"):
        swapper.access_memory_block(name)
    assert swap_all(swapper) == 2
    for name in ("b1", "b1"):
        swapper.access_memory_block(name)
    settle(swapper)
    assert not swapper.blocks["b1"].is_swapped
    assert swap_all(swapper) == 1


def test_another_algorithm(swapper: AdvancedMemorySwapper) -> None:
    names = fill(swapper, 8)
    assert swap_all(swapper) == 8
    for algorithm in (*SwapAlgorithm, SwapAlgorithm.LRU):
        swapper.swap_algorithm = algorithm
        assert swapper.get_status()["algorithm"] == algorithm.value
        assert [read(swapper, name) for name in names] == [content(name) for name in names]
        assert swap_all(swapper) == 8
    with pytest.raises(ValueError, match="belady"):
        swapper.swap_algorithm = "belady"  # type: ignore[assignment]
    assert swapper.swap_algorithm is SwapAlgorithm.LRU


def test_pinned_blocks_stay(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 2, pinned=True)
    fill(swapper, 2, first=2)
    assert swapper.get_status()["pinned_blocks"] == 2
    assert swap_all(swapper) == 2
    assert [swapper.blocks[f"b{i}"].is_swapped for i in range(4)] == [False, False, True, True]
    swapper.blocks["b0"].pinned = False
    swapper.blocks["b2"].pinned = True
    assert swapper.get_status()["pinned_blocks"] == 2
    assert swap_all(swapper) == 1
    assert swapper.blocks["b0"].is_swapped
    swapper.access_memory_block("b2")
    assert swap_all(swapper) == 0
    for i in range(4):
        assert read(swapper, f"b{i}") == content(f"b{i}")


def test_a_full_swap_area_loses_nothing(open_swapper: Opener) -> None:
    swapper = open_swapper(swap_algorithm=SwapAlgorithm.LRU, max_swap_size="4MiB")
    names = fill(swapper, 10)
    gone = swap_all(swapper)
    assert gone == group_of(swapper).swapped == 4
    assert swapper.store.stats().disk.mapped_bytes <= 4 * MIB
    trouble = swapper.get_status()["swap_trouble"]
    assert trouble
    assert "max_swap_size" in trouble or "disk_limit" in trouble or "full" in trouble
    assert swap_all(swapper) == 0
    assert [read(swapper, name) for name in names] == [content(name) for name in names]
    swapper.max_swap_size = "16MiB"
    assert swapper.max_swap_size == 16 * MIB
    assert swap_all(swapper) == 10
    assert swapper.get_status()["swap_trouble"] is None
    assert [read(swapper, name) for name in names] == [content(name) for name in names]


def test_copies_of_what_is_in_memory_make_way(open_swapper: Opener) -> None:
    swapper = open_swapper(swap_algorithm=SwapAlgorithm.LRU, max_swap_size="4MiB")
    names = fill(swapper, 8)
    assert swap_all(swapper) == 4
    assert [name for name in names if swapper.blocks[name].is_swapped] == names[:4]
    for name in names[:4]:
        swapper.access_memory_block(name)
    assert swap_all(swapper) == 4
    assert [name for name in names if swapper.blocks[name].is_swapped] == names[4:]
    assert [read(swapper, name) for name in names] == [content(name) for name in names]


@pytest.mark.parametrize(("point", "nth"), [("nospc", 1), ("write", 3)])
def test_a_failed_write_loses_nothing(swapper: AdvancedMemorySwapper, point: str, nth: int) -> None:
    names = fill(swapper, 6)
    _core._fault_arm(point, nth, True)
    gone = swap_all(swapper)
    _core._fault_reset()
    assert gone == group_of(swapper).swapped < 6
    assert swapper.get_status()["swap_trouble"]
    swapper.store.check()
    assert [read(swapper, name) for name in names] == [content(name) for name in names]
    assert swap_all(swapper) == 6
    assert swapper.get_status()["swap_trouble"] is None
    assert [read(swapper, name) for name in names] == [content(name) for name in names]


def test_the_latest_used_stay(open_swapper: Opener, memory: Memory) -> None:
    swapper = open_swapper(swap_algorithm=SwapAlgorithm.LRU)
    memory.swapper, memory.total = swapper, 16 * MIB
    names = fill(swapper, 8)
    for name in (*names[:3], names[5]):
        swapper.access_memory_block(name)
    swapper.swap_threshold = 4.5 / 16
    assert swapper.perform_swapping() == 4
    assert {name for name in names if swapper.blocks[name].is_swapped} == {"b3", "b4", "b6", "b7"}
