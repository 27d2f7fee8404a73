"""Swappers fit for a machine, and tensors whose memory a swapper keeps."""

from __future__ import annotations

import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

from omnimem import _core
from omnimem._storage import storage_kind
from omnimem.block import MemoryRegionType
from omnimem.config import parse_size
from omnimem.nvme import NVMeOptimizer
from omnimem.swap import AdvancedMemorySwapper, SwapAlgorithm
from omnimem.swap_codec import CompressionManager

__all__ = [
    "create_advanced_memory_swapper",
    "create_optimized_swapping_system",
    "integrate_with_qwen3_vl",
    "integrate_with_qwen3_vl_swapping",
]

_GIB = 1 << 30
_KEYS = ("cpu_model", "gpu_model", "memory_size", "storage_type")
_STORAGE = ("nvme", "ssd", "hdd", "auto")
_MOST_SWAP = 4 * _GIB
_LITTLE_RAM = 8 * _GIB

Allocate = Callable[..., tuple[Any, str]]


def create_optimized_swapping_system(
    hardware_config: Mapping[str, Any] | None = None,
    nvme_optimizer: NVMeOptimizer | None = None,
) -> AdvancedMemorySwapper:
    """A swapper whose algorithm, threshold and swap size fit the hardware.

    On NVMe storage: ADAPTIVE from 75 % of memory in use on; on any other: LRU from 85 % on.
    Below 8 GiB of memory the threshold is 5 points higher, since little memory is soon in use.
    The swap file may take twice the memory, at most 4 GiB.

    Parameters
    ----------
    hardware_config : mapping, optional
        memory_size : bytes, int or str; by default what the machine or cgroup has.
        storage_type : "nvme", "ssd", "hdd", or "auto" (the default): the kernel's rotational
        flag and a short read in the swap directory decide.
        cpu_model, gpu_model : str, for people.
    nvme_optimizer : NVMeOptimizer, optional
        Where the swap file lies.

    Raises
    ------
    ValueError
        An unknown key or storage type, a memory size of 0.
    """
    config = dict(hardware_config or {})
    if unknown := sorted(set(config) - set(_KEYS)):
        raise ValueError(f"hardware_config has no {unknown[0]!r}: its keys are {', '.join(_KEYS)}")
    memory = parse_size(config.get("memory_size", _core.memory()[0]), "memory_size")
    if memory == 0:
        raise ValueError("memory_size=0: give the bytes of memory, or leave it out")
    storage = str(config.get("storage_type", "auto")).lower()
    if storage not in _STORAGE:
        raise ValueError(f"storage_type={storage!r} must be one of {', '.join(_STORAGE)}")
    optimizer = NVMeOptimizer() if nvme_optimizer is None else nvme_optimizer
    if storage == "auto":
        storage = storage_kind(optimizer.swap_directory).kind
    nvme = storage == "nvme"
    threshold = 0.75 if nvme else 0.85
    return AdvancedMemorySwapper(
        swap_algorithm=SwapAlgorithm.ADAPTIVE if nvme else SwapAlgorithm.LRU,
        swap_threshold=threshold + (0.05 if memory < _LITTLE_RAM else 0.0),
        max_swap_size=min(2 * memory, _MOST_SWAP),
        nvme_optimizer=optimizer,
    )


create_advanced_memory_swapper = create_optimized_swapping_system


def integrate_with_qwen3_vl(
    swapper: AdvancedMemorySwapper,
    memory_optimizer: Any = None,
    compression_manager: CompressionManager | None = None,
) -> Allocate:
    """A function that allocates tensors whose memory the swapper keeps.

    Parameters
    ----------
    swapper : AdvancedMemorySwapper
    memory_optimizer : object, optional
        With `allocate_tensor_memory(shape, dtype, tensor_type)`. Its tensor's memory becomes the
        block's, without a copy, where it is a buffer or has DLPack; else the block is as many
        zeros. By default the swapper allocates.
    compression_manager : CompressionManager, optional
        As `swapper.integrate_with_compression`.

    Returns
    -------
    callable
        `allocate(shape, dtype, tensor_type="general") -> (tensor, block_id)`. Without an
        optimizer the tensor is a view of the block: torch's, where torch is imported, else an
        object with buffer protocol and DLPack. As long as it lives the block stays in memory;
        let it go, and take `torch.from_dlpack(swapper.access_memory_block(block_id))` when the
        bytes are needed again. `tensor_type` names a `MemoryRegionType` ("kv_cache",
        "activation-buffer"); any other is TENSOR_DATA.
    """
    if compression_manager is not None:
        swapper.integrate_with_compression(compression_manager)

    def allocate_tensor_with_swapping(
        shape: SupportsIndex | Iterable[SupportsIndex], dtype: Any, tensor_type: str = "general"
    ) -> tuple[Any, str]:
        region = _region(tensor_type)
        block_id = f"tensor_{next(_numbers)}"
        if memory_optimizer is not None:
            tensor = memory_optimizer.allocate_tensor_memory(shape, dtype, tensor_type)
            shared = hasattr(tensor, "__dlpack__") or _is_buffer(tensor)
            nbytes = int(tensor.nbytes) if hasattr(tensor, "nbytes") else _bytes_of(shape, dtype)
            swapper.register_memory_block(
                block_id, nbytes, region, data=tensor if shared else None, take=shared
            )
            return tensor, block_id
        name, dims = _dtype_name(dtype), _dims(shape)
        swapper._register(block_id, _bytes_of(shape, dtype), region, dtype=name, shape=dims)
        with swapper.store.lease(block_id, write=True) as lease:
            window = lease.window(0, name, dims)
        torch = sys.modules.get("torch")
        return (window if torch is None else torch.from_dlpack(window)), block_id

    return allocate_tensor_with_swapping


integrate_with_qwen3_vl_swapping = integrate_with_qwen3_vl

_numbers = itertools.count(1)


def _region(tensor_type: str) -> MemoryRegionType:
    name = str(tensor_type).upper().replace("-", "_")
    return MemoryRegionType.__members__.get(name, MemoryRegionType.TENSOR_DATA)


def _is_buffer(tensor: Any) -> bool:
    try:
        memoryview(tensor).release()
    except TypeError:
        return False
    return True


def _dims(shape: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    if isinstance(shape, Iterable):
        return tuple(operator.index(size) for size in shape)
    return (operator.index(shape),)


def _dtype_name(dtype: Any) -> str:
    """ "float32" of a str, a NumPy dtype or scalar type, or a torch dtype."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return {"float": "float64", "int": "int64"}.get(name, name.removeprefix("torch."))


def _bytes_of(shape: SupportsIndex | Iterable[SupportsIndex], dtype: Any) -> int:
    _, bits, lanes = _core._dtype_code(_dtype_name(dtype))
    return (math.prod(_dims(shape)) * bits * lanes + 7) // 8
