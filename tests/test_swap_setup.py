"""Swappers that fit a machine, and tensors whose memory a swapper keeps."""

from __future__ import annotations

import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omnimem
from omnimem import (
    AdvancedMemorySwapper,
    MemoryRegionType,
    NVMeOptimizer,
    SwapAlgorithm,
    create_advanced_memory_swapper,
    create_optimized_swapping_system,
    integrate_with_qwen3_vl,
    integrate_with_qwen3_vl_swapping,
)
from omnimem._storage import StorageKind

from .memory import Memory
from .swappers import GIB, MIB, Zlib, fill, group_of, swap_all

ADAPTIVE, LRU = SwapAlgorithm.ADAPTIVE, SwapAlgorithm.LRU
ROWS = [
    ("nvme", 8 * GIB, ADAPTIVE, 0.75, 4 * GIB),
    ("nvme", 8 * GIB - 1, ADAPTIVE, 0.8, 4 * GIB),
    ("nvme", "16GiB", ADAPTIVE, 0.75, 4 * GIB),
    ("nvme", 1 * GIB, ADAPTIVE, 0.8, 2 * GIB),
    ("nvme", "512MiB", ADAPTIVE, 0.8, 1 * GIB),
    ("ssd", 8 * GIB, LRU, 0.85, 4 * GIB),
    ("ssd", 4 * GIB, LRU, 0.9, 4 * GIB),
    ("hdd", 64 * GIB, LRU, 0.85, 4 * GIB),
    ("hdd", np.int64(GIB), LRU, 0.9, 2 * GIB),
    ("NVMe", 8 * GIB, ADAPTIVE, 0.75, 4 * GIB),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default swap directory is one of the test's, with room enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("omnimem.nvme.free_bytes", lambda _: 100 * GIB)


# -- swappers


@pytest.mark.parametrize(("storage", "size", "algorithm", "threshold", "swap"), ROWS)
def test_rules(
    storage: str, size: Any, algorithm: SwapAlgorithm, threshold: float, swap: int
) -> None:
    config = {"storage_type": storage, "memory_size": size, "cpu_model": "x", "gpu_model": "y"}
    with create_optimized_swapping_system(config) as swapper:
        assert isinstance(swapper, AdvancedMemorySwapper)
        assert swapper.swap_algorithm is algorithm
        assert swapper.swap_threshold == pytest.approx(threshold, abs=1e-12)
        assert swapper.max_swap_size == swap
        assert swapper.pressure_monitor.ram_thresholds == (0.7, 0.85, 0.95)


@pytest.mark.parametrize(
    ("total", "threshold", "swap"), [(GIB, 0.8, 2 * GIB), (32 * GIB, 0.75, 4 * GIB)]
)
def test_memory_of_the_machine(memory: Memory, total: int, threshold: float, swap: int) -> None:
    memory.total = total
    with create_optimized_swapping_system({"storage_type": "nvme"}) as swapper:
        assert (swapper.swap_threshold, swapper.max_swap_size) == (pytest.approx(threshold), swap)


@pytest.mark.parametrize("config", [None, {}, {"storage_type": "auto"}])
@pytest.mark.parametrize("kind", ["nvme", "ssd", "hdd"])
def test_storage_is_found_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Any, config: Any
) -> None:
    asked = []

    def look(directory: str) -> StorageKind:
        asked.append(directory)
        return StorageKind(kind, None, 1.0, "told")

    monkeypatch.setattr("omnimem.swap_setup.storage_kind", look)
    optimizer = NVMeOptimizer(swap_directory=tmp_path / "mine")
    with create_optimized_swapping_system(config, optimizer) as swapper:
        assert swapper.nvme_optimizer is optimizer
        assert swapper.swap_algorithm is (ADAPTIVE if kind == "nvme" else LRU)
    assert asked == [str(tmp_path / "mine")]


def test_this_machine() -> None:
    """Whatever it has."""
    with create_optimized_swapping_system() as swapper:
        assert swapper.swap_algorithm in (ADAPTIVE, LRU)
        assert 0.75 <= swapper.swap_threshold <= 0.9
        fill(swapper, 2)
        assert swap_all(swapper) == 2


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"disk": "nvme"}, "disk"),
        ({"storage_type": "tape"}, "tape"),
        ({"storage_type": None}, "storage_type"),
        ({"memory_size": 0}, "memory_size"),
        ({"memory_size": -1}, "memory_size"),
        ({"memory_size": "lots"}, "lots"),
    ],
)
def test_wrong_values(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        create_optimized_swapping_system(config)


def test_aliases() -> None:
    assert create_advanced_memory_swapper is create_optimized_swapping_system
    assert integrate_with_qwen3_vl_swapping is integrate_with_qwen3_vl
    assert {
        "create_advanced_memory_swapper",
        "create_optimized_swapping_system",
        "integrate_with_qwen3_vl",
        "integrate_with_qwen3_vl_swapping",
    } <= set(omnimem.__all__)


# -- tensors


class Optimizer:
    """Allocates as it was told to."""

    def __init__(self, make: Callable[[Any, Any], Any]) -> None:
        self.make = make
        self.asked: list[tuple[Any, Any, str]] = []

    def allocate_tensor_memory(self, shape: Any, dtype: Any, tensor_type: str) -> Any:
        self.asked.append((shape, dtype, tensor_type))
        return self.make(shape, dtype)


@pytest.mark.parametrize("dtype", ["float32", np.float16, np.dtype("int64"), float, "bool"])
def test_with_an_optimizer(swapper: AdvancedMemorySwapper, dtype: Any) -> None:
    """The memory of its tensor is the block's, without a copy."""
    optimizer = Optimizer(np.zeros)
    allocate = integrate_with_qwen3_vl(swapper, optimizer)
    tensor, block_id = allocate((4, 6), dtype, "kv_cache")
    assert isinstance(tensor, np.ndarray)
    assert optimizer.asked == [((4, 6), dtype, "kv_cache")]
    block = swapper.blocks[block_id]
    assert (block.size, block.ptr) == (tensor.nbytes, tensor.ctypes.data)
    assert block.region_type is MemoryRegionType.KV_CACHE
    tensor[1, 2] = 1
    expected = tensor.copy()
    del tensor
    assert swap_all(swapper) == 1
    back = np.from_dlpack(swapper.access_memory_block(block_id))
    assert (back.dtype, back.shape) == (expected.dtype, (4, 6))
    assert np.array_equal(back, expected)


def test_with_a_torch_optimizer(swapper: AdvancedMemorySwapper) -> None:
    torch = pytest.importorskip("torch")
    allocate = integrate_with_qwen3_vl(
        swapper, Optimizer(lambda shape, dtype: torch.ones(shape, dtype=dtype))
    )
    tensor, block_id = allocate((3, 5), torch.bfloat16, "activation-buffer")
    block = swapper.blocks[block_id]
    assert (block.size, block.ptr) == (30, tensor.data_ptr())
    assert block.region_type is MemoryRegionType.ACTIVATION_BUFFER
    del tensor
    assert swap_all(swapper) == 1
    assert torch.equal(torch.from_dlpack(block), torch.ones((3, 5), dtype=torch.bfloat16))


def test_with_an_optimizer_of_buffers(swapper: AdvancedMemorySwapper) -> None:
    allocate = integrate_with_qwen3_vl(
        swapper, Optimizer(lambda shape, _: array.array("f", [0.5] * shape))
    )
    given, block_id = allocate(10, "float32")
    given[3] = 0.25
    assert swap_all(swapper) == 1
    view = memoryview(swapper.blocks[block_id]).cast("B").cast("f")
    assert view.tolist() == [0.5] * 3 + [0.25] + [0.5] * 6


def test_with_an_optimizer_of_something_else(swapper: AdvancedMemorySwapper) -> None:
    """Its memory cannot be had: the block is as many zeros."""
    allocate = integrate_with_qwen3_vl(swapper, Optimizer(lambda *_: object()))
    thing, block_id = allocate((np.int64(3), 7), "int16")
    assert type(thing) is object
    assert swapper.blocks[block_id].size == 42
    assert not swapper.blocks[block_id].allocated
    assert bytes(memoryview(swapper.blocks[block_id])) == bytes(42)


@pytest.mark.parametrize(
    "shape", [(4, 6), [4, 6], (np.int64(4), np.int32(6)), 24, np.int64(24), ()]
)
@pytest.mark.parametrize("dtype", ["float32", np.float32])
def test_without_an_optimizer(swapper: AdvancedMemorySwapper, shape: Any, dtype: Any) -> None:
    allocate = integrate_with_qwen3_vl(swapper)
    tensor, block_id = allocate(shape, dtype)
    held = np.from_dlpack(tensor)
    assert held.shape == np.zeros(shape).shape
    assert held.dtype == np.float32
    assert not held.any()
    held[...] = 2.5
    block = swapper.blocks[block_id]
    assert block.size == held.nbytes
    assert swap_all(swapper) == 0
    del tensor, held
    assert swap_all(swapper) == 1
    assert set(np.asarray(block).view(np.float32).ravel().tolist()) == {2.5}


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "int64", "uint8", "bool"])
def test_torch_tensors(swapper: AdvancedMemorySwapper, name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    allocate = integrate_with_qwen3_vl(swapper)
    tensor, block_id = allocate((8, 16), dtype)
    assert isinstance(tensor, torch.Tensor)
    assert (tensor.dtype, tensor.shape) == (dtype, (8, 16))
    assert not tensor.any()
    tensor.fill_(1)
    assert swapper.blocks[block_id].ptr == tensor.data_ptr()
    assert swap_all(swapper) == 0
    del tensor
    assert swap_all(swapper) == 1
    back = torch.from_dlpack(swapper.access_memory_block(block_id))
    assert torch.equal(
        back.view(torch.uint8).flatten(),
        torch.ones((8, 16), dtype=dtype).view(torch.uint8).flatten(),
    )


def test_torch_tensors_come_back_as_they_were(swapper: AdvancedMemorySwapper) -> None:
    torch = pytest.importorskip("torch")
    tensor, block_id = integrate_with_qwen3_vl(swapper)((8, 16), torch.float32)
    tensor.fill_(1)
    del tensor
    back = torch.from_dlpack(swapper.access_memory_block(block_id))
    assert (back.dtype, back.shape) == (torch.float32, (8, 16))


@pytest.mark.parametrize(
    ("name", "region"),
    [
        ("general", MemoryRegionType.TENSOR_DATA),
        ("tensor_data", MemoryRegionType.TENSOR_DATA),
        ("kv-cache", MemoryRegionType.KV_CACHE),
        ("KV_Cache", MemoryRegionType.KV_CACHE),
        ("activation-buffer", MemoryRegionType.ACTIVATION_BUFFER),
        ("temporary", MemoryRegionType.TEMPORARY),
        ("vision", MemoryRegionType.TENSOR_DATA),
        ("", MemoryRegionType.TENSOR_DATA),
    ],
)
def test_tensor_types(swapper: AdvancedMemorySwapper, name: str, region: MemoryRegionType) -> None:
    _, block_id = integrate_with_qwen3_vl(swapper)((4,), "float32", name)
    assert swapper.blocks[block_id].region_type is region
    _, block_id = integrate_with_qwen3_vl(swapper)((4,), "float32", tensor_type=name)
    assert swapper.blocks[block_id].region_type is region


def test_with_a_compression_manager(swapper: AdvancedMemorySwapper) -> None:
    manager = Zlib()
    allocate = integrate_with_qwen3_vl(swapper, None, manager)
    ids = [allocate((MIB,), "uint8")[1] for _ in range(3)]
    assert len(set(ids)) == 3
    assert swap_all(swapper) == 3
    assert manager.packed == 3
    assert group_of(swapper).disk_bytes < MIB
    assert all(bytes(memoryview(swapper.blocks[name])) == bytes(MIB) for name in ids)
    with pytest.raises(TypeError, match="compress"):
        integrate_with_qwen3_vl(swapper, None, object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "dtype", "error"),
    [
        ((4, -1), "float32", ValueError),
        ((1.5,), "float32", TypeError),
        ("4", "float32", TypeError),
        (None, "float32", TypeError),
        ((4,), "float33", (TypeError, ValueError)),
        ((4,), object(), (TypeError, ValueError)),
    ],
)
def test_wrong_tensors(swapper: AdvancedMemorySwapper, shape: Any, dtype: Any, error: Any) -> None:
    with pytest.raises(error):
        integrate_with_qwen3_vl(swapper)(shape, dtype)
    assert len(swapper.blocks) == 0


def test_without_torch() -> None:
    """It is not imported, and not needed."""
    from .conftest import run_clean

    code = (
        "import sys, omnimem\n"
        "s = omnimem.AdvancedMemorySwapper()\n"
        "window, name = omnimem.integrate_with_qwen3_vl(s)((2, 3), 'float32')\n"
        "view = memoryview(window)\n"
        "print(view.shape, view.format, view.readonly, s.blocks[name].ref_count)\n"
        "print('torch' in sys.modules)\n"
    )
    assert run_clean(code).split() == ["(2,", "3)", "f", "False", "1", "False"]
