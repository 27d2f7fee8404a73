"""AdvancedMemorySwapper: named blocks of memory that go to disk when memory is short."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from omnimem import _core
from omnimem._core import Ticket
from omnimem.block import REGIONS, Blocks, MemoryBlock, MemoryRegionType
from omnimem.config import format_share, parse_size
from omnimem.errors import ClosedError
from omnimem.nvme import NVMeOptimizer
from omnimem.pressure import MemoryPressureMonitor
from omnimem.store import GroupStats, Store
from omnimem.swap_codec import OWN, CompressionManager, encode_out

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "AdvancedMemorySwapper",
    "Cache",
    "SwapAlgorithm",
    "SwapStats",
]

log = logging.getLogger("omnimem.swap")

_GIB = 1 << 30
_FEW = 10  # blocks that analyze_access_patterns names


class SwapAlgorithm(Enum):
    """Who goes first: the policies that `omnimem.simulate` judges."""

    LRU = "lru"
    CLOCK = "clock"
    ADAPTIVE = "adaptive"


@runtime_checkable
class Cache(Protocol):
    """What `integrate_with_cache` takes: something that can shrink."""

    def evict(self, nbytes: int, /) -> int:
        """Free about so many bytes; returns how many were freed."""


@dataclass(frozen=True, slots=True)
class SwapStats:
    """What a swapper has moved (`AdvancedMemorySwapper.stats`), from the core's counters."""

    total_swapped_out: int = 0
    """Copies of blocks that left memory."""
    total_swapped_in: int = 0
    """Copies that came back."""
    total_swapped_bytes: int = 0
    """Bytes written and read for that."""
    swap_out_time: float = 0.0
    """Seconds, summed over the copies that left."""
    swap_in_time: float = 0.0
    """Seconds, summed over the copies that came back."""
    total_swaps: int = 0
    """Both directions."""
    cache_hits: int = 0
    """Accesses that found the bytes in memory."""
    cache_misses: int = 0
    """Accesses that did not."""
    swap_efficiency: float = 0.0
    """Share of the accesses that found the bytes in memory; 0.0 before the first one."""


class AdvancedMemorySwapper:
    """Blocks of memory that are moved to disk when memory is short, and back when they are used.

    Parameters
    ----------
    swap_algorithm : SwapAlgorithm
        Who goes first. Can be set later.
    swap_threshold : float
        Share of memory in use, 0..1, from which on `should_swap` says yes and down to which
        `perform_swapping` swaps. Can be set later.
    max_swap_size : int or str
        Most bytes of the swap file; never more than the directory's free space less 5 %. Can be
        set later.
    nvme_optimizer : NVMeOptimizer, optional
        Where the swap file lies and how much is in flight.
    host_limit : int or str, optional
        Most bytes of memory for blocks; by default all that the machine or cgroup has, so that
        only pressure decides.
    store : Store, optional
        Share this store and its limits (see `load_model`), instead of having one of its own.
    io_backend : str
        "auto", "uring" or "threads", of its own store.

    Raises
    ------
    ValueError
        A threshold outside 0..1, a size that is none.
    IOFailure
        io_uring was demanded and denied.

    Notes
    -----
    A face on one group of a `Store`: every byte, limit and counter is the core's. Thread safe.
    A context manager: leaving it is `cleanup`. The swap file is made when the first block goes:
    a directory that cannot be used is then told by `get_status()["swap_trouble"]`.
    """

    _GROUP = "swap"

    def __init__(
        self,
        swap_algorithm: SwapAlgorithm = SwapAlgorithm.ADAPTIVE,
        swap_threshold: float = 0.8,
        max_swap_size: int | str = 2 * _GIB,
        nvme_optimizer: NVMeOptimizer | None = None,
        *,
        host_limit: int | str | None = None,
        store: Store | None = None,
        io_backend: str = "auto",
    ) -> None:
        self.pressure_monitor = MemoryPressureMonitor()
        self._cache: Cache | None = None
        self._codec: int | None = None
        self.swap_threshold = swap_threshold
        self._nvme = NVMeOptimizer() if nvme_optimizer is None else nvme_optimizer
        swap_limit = parse_size(max_swap_size, "max_swap_size")
        if store is None:
            total = _core.memory()[0]
            host = total if host_limit is None else min(parse_size(host_limit, "host_limit"), total)
            self._store = self._nvme._open(max(host, 1 << 20), swap_limit, io_backend)
        elif host_limit is not None:
            raise ValueError("host_limit belongs to the store that is shared: set it there")
        else:
            self._nvme._join(store)
            self._store = store
        self._owns = store is None
        self._access = self._store._access
        self.swap_algorithm = swap_algorithm
        self._blocks = Blocks(self._store, self._GROUP)

    # -- settings --------------------------------------------------------------------------------

    @property
    def swap_algorithm(self) -> SwapAlgorithm:
        """Who goes first; another one begins without what the former had learned."""
        return self._algorithm

    @swap_algorithm.setter
    def swap_algorithm(self, value: SwapAlgorithm) -> None:
        algorithm = SwapAlgorithm(value)
        self._store.group(self._GROUP, 0, algorithm.value, True)
        self._algorithm = algorithm

    @property
    def swap_threshold(self) -> float:
        """Share of memory in use from which on blocks are swapped."""
        return self._threshold

    @swap_threshold.setter
    def swap_threshold(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"swap_threshold={value!r} must lie between 0.0 and 1.0")
        self._threshold = float(value)

    @property
    def max_swap_size(self) -> int:
        """Most bytes of the swap file, as the directory has room for."""
        return self._nvme._limit

    @max_swap_size.setter
    def max_swap_size(self, value: int | str) -> None:
        self._nvme._set_limit(parse_size(value, "max_swap_size"))

    @property
    def nvme_optimizer(self) -> NVMeOptimizer:
        """Where the swap file lies, and how the I/O engine does."""
        return self._nvme

    @property
    def store(self) -> Store:
        """The store that holds the blocks; others may share it and its limits."""
        return self._store

    @property
    def blocks(self) -> Mapping[str, MemoryBlock]:
        """The registered blocks by id, read-only; empty after `cleanup`."""
        return self._blocks

    # -- blocks ----------------------------------------------------------------------------------

    def register_memory_block(
        self,
        block_id: str,
        size: int,
        region_type: MemoryRegionType = MemoryRegionType.TENSOR_DATA,
        pinned: bool = False,
        data: Any = None,
        take: bool = False,
    ) -> MemoryBlock:
        """Have a block kept by the swapper.

        Parameters
        ----------
        block_id : str
            Its name. The same one again returns the block that there is, unchanged.
        size : int
            Bytes.
        region_type : MemoryRegionType
            What they are for.
        pinned : bool
            Its bytes, once in memory, are never swapped out.
        data : buffer or DLPack producer, optional
            Its bytes, copied in; dtype and shape are remembered. Without, it is `size` zeros,
            made at the first access.
        take : bool
            Keep the memory of `data` instead of copying it. It goes back to the system when it
            is swapped out and the producer lets go of it too. Whoever writes to it from then on
            should do so through the block.

        Raises
        ------
        ValueError
            A size below 1 or not that of `data`; a name that the store uses for something else.
        TypeError
            A name that is no str, a size that is no int.
        LimitError, DiskFullError
            All blocks would not fit into memory and swap area, so that one could not be brought in.
        """
        return self._register(block_id, size, region_type, pinned, data, take)

    def _register(
        self,
        block_id: str,
        size: int,
        region_type: MemoryRegionType,
        pinned: bool = False,
        data: Any = None,
        take: bool = False,
        dtype: str | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> MemoryBlock:
        """As `register_memory_block`; zeros may have a dtype and a shape, too."""
        if not isinstance(block_id, str):
            raise TypeError(f"block_id must be a str, not {type(block_id).__name__}")
        nbytes = parse_size(size, "size")
        if nbytes == 0:
            raise ValueError(f"block {block_id!r}: size=0, but a block has at least one byte")
        region = MemoryRegionType(region_type)
        there = self._blocks.find(block_id)
        if there is not None:
            return there
        if take and data is None:
            raise ValueError(f"block {block_id!r}: take=True needs data")
        if data is not None and (given := _nbytes(data)) is not None and given != nbytes:
            raise ValueError(f"block {block_id!r}: size={nbytes}, but data has {given} bytes")
        try:
            if data is None:
                self._store._add_zeros(block_id, nbytes, self._GROUP, dtype, shape)
            elif take:
                self._store.take(block_id, data, self._GROUP)
            else:
                self._store.add(block_id, data, self._GROUP)
        except ValueError as error:
            there = self._blocks.find(block_id)  # another thread was quicker
            if there is not None:
                return there
            if "exists already" not in str(error) or self._blocks.group_of(block_id) not in (
                None,
                self._GROUP,
            ):
                raise
            # ... and has unregistered it again
            return self._register(block_id, size, region_type, pinned, data, take, dtype, shape)
        block = self._store._block(block_id)
        if block is None:
            raise KeyError(f"block {block_id!r} was unregistered while it was registered")
        if block.size != nbytes:
            self._store.remove(block_id)
            raise ValueError(f"block {block_id!r}: size={nbytes}, but data has {block.size} bytes")
        block._mark(pinned, REGIONS.index(region))
        return block

    def unregister_memory_block(self, block_id: str) -> bool:
        """Forget a block; its bytes go with the last view. False: there is none of that name."""
        if self._blocks.find(block_id) is None:
            return False
        try:
            self._store.remove(block_id)
        except KeyError:  # another thread was quicker
            return False
        return True

    def access_memory_block(self, block_id: str) -> MemoryBlock | None:
        """Bring a block's bytes into memory, and count a hit or a miss.

        Returns
        -------
        MemoryBlock or None
            None: there is none of that name. The object holds no bytes: take a view of it
            (`memoryview`, DLPack) to keep them in memory.

        Raises
        ------
        CorruptError, IOFailure
            The bytes could not be read, or differ from those written.
        BusyError
            No room for them within 30 s, since views hold it.
        Error
            The compression manager that encoded it could not decode it; the encoded bytes are kept.
        """
        return self._access(self._GROUP, block_id)

    def prefetch(self, block_ids: Iterable[str]) -> Ticket:
        """Start bringing blocks in; `.wait()` on what is returned waits for all of them."""
        return self._store.prefetch(block_ids)

    # -- swapping --------------------------------------------------------------------------------

    def should_swap(self) -> bool:
        """Whether memory in use has reached `swap_threshold`: of the machine or of the cgroup that
        the process lives in, whichever is tighter."""
        return self.pressure_monitor.get_ram_pressure()[1] >= self._threshold

    def perform_swapping(self) -> int:
        """Swap blocks out until usage is below `swap_threshold`.

        A cache that was integrated is asked to shrink first. Blocks that are pinned or viewed
        stay. When this returns the memory is the system's again, but for at most 16 MiB, and at
        most a sixteenth of what went, that stay ready for the next access.

        Returns
        -------
        int
            Blocks swapped out. It stops early when nothing more can go or the swap area is full;
            then nothing is lost, and `get_status()["swap_trouble"]` says why.
        """
        need = self._excess()
        if need and self._cache is not None:
            self._shrink_cache(need)
            need = self._excess()
        blocks = 0
        while need:
            if self._codec is not None:
                gone, freed = encode_out(self._store, self._GROUP, need, self._codec)
            else:
                gone, freed = self._store._swap_out(self._GROUP, need)
            blocks += gone
            if freed < need:
                break
            need = self._excess()
        return blocks

    def integrate_with_compression(self, manager: CompressionManager | None = None) -> None:
        """Have blocks encoded when they are swapped out, where that saves at least 5 %.

        None is omnimem's own codec, for weights: it takes three tenths off bfloat16, a fifth off
        float8_e5m2 and 9 to 15 % off float8_e4m3fn, float16 and float32.

        `manager.compress` and `decompress` run on the calling thread only: inside
        `perform_swapping`, `access_memory_block`, `memoryview(block)` and `block.__dlpack__`.
        What it made is decoded once and compared before the plain bytes go, so that a manager
        that raises or returns other bytes loses nothing. Another manager can follow: each block
        is decoded by the one that encoded it.

        Raises
        ------
        TypeError
            An object without both methods.
        """
        if manager is None:
            manager = OWN
        if not isinstance(manager, CompressionManager):
            raise TypeError(
                "integrate_with_compression() takes an object with compress(data) and "
                f"decompress(data), not {type(manager).__name__}"
            )
        codecs = self._store._codecs
        if manager not in codecs:
            if len(codecs) == 256:
                raise ValueError("a swapper takes at most 256 compression managers")
            codecs.append(manager)
        self._codec = codecs.index(manager)

    def integrate_with_cache(self, cache: Cache) -> None:
        """Have a cache shrink before blocks are swapped: `cache.evict(nbytes)`.

        Raises
        ------
        TypeError
            An object without `evict`.
        """
        if not isinstance(cache, Cache):
            raise TypeError(
                "integrate_with_cache() takes an object with evict(nbytes), "
                f"not {type(cache).__name__}"
            )
        self._cache = cache

    def load_model(
        self, model_dir: str | os.PathLike[str], budget: int | str, **options: Any
    ) -> nn.Module:
        """Build a transformers model on this swapper's store, within `budget` bytes of its memory.

        `omnimem.torch.load` with `store=swapper.store`: weights and blocks share one limit, and
        blocks make way for weights. `options` are those of `load`.
        """
        from omnimem import torch

        return torch.load(model_dir, budget, store=self._store, **options)

    # -- what it knows ---------------------------------------------------------------------------

    @property
    def stats(self) -> SwapStats:
        """What was moved."""
        group = self._group_stats()
        return SwapStats(
            total_swapped_out=group.outs,
            total_swapped_in=group.ins,
            total_swapped_bytes=group.out_bytes + group.in_bytes,
            swap_out_time=group.out_seconds,
            swap_in_time=group.in_seconds,
            total_swaps=group.outs + group.ins,
            cache_hits=group.hits,
            cache_misses=group.misses,
            swap_efficiency=_share(group.hits, group.hits + group.misses),
        )

    def get_status(self) -> dict[str, Any]:
        """How the swapper and memory are. Takes no longer with more blocks.

        Returns
        -------
        dict
            algorithm : str; swap_threshold : 0..1; max_swap_size_GB, current_swap_size_GB : GiB of
            the swap file allowed, and held by blocks; total_registered_blocks, swapped_blocks,
            pinned_blocks : numbers; pressure_level : "low", "medium", "high" or "critical";
            pressure_usage : share of memory in use; pressure_trend : "increasing", "decreasing"
            or "stable"; nvme_stats : as `NVMeOptimizer.get_swap_stats`; efficiency_metrics : as
            `get_swapping_efficiency`; swap_trouble : why the last swapping stopped early, or None.
        """
        group = self._group_stats()
        level, usage = self.pressure_monitor.get_overall_pressure()
        return {
            "algorithm": self._algorithm.value,
            "swap_threshold": self._threshold,
            "max_swap_size_GB": self.max_swap_size / _GIB,
            "current_swap_size_GB": group.disk_bytes / _GIB,
            "total_registered_blocks": group.blocks,
            "swapped_blocks": group.swapped,
            "pinned_blocks": group.pinned,
            "pressure_level": level.value,
            "pressure_usage": usage,
            "pressure_trend": self.pressure_monitor.get_pressure_trend(),
            "nvme_stats": self._nvme.get_swap_stats(),
            "efficiency_metrics": self._efficiency(group),
            "swap_trouble": group.trouble or None,
        }

    def get_swapping_efficiency(self) -> dict[str, float]:
        """How well swapping does.

        Returns
        -------
        dict
            hit_rate : share of accesses that found the bytes in memory, 0.0 before the first;
            avg_swap_out_time, avg_swap_in_time : seconds a block, 0.0 before the first;
            total_swapped_GB : GiB moved both ways; current_swap_utilization_GB : GiB of the swap
            file held by blocks; max_swap_utilization_GB : GiB that it may have.
        """
        return self._efficiency(self._group_stats())

    def analyze_access_patterns(self) -> dict[str, Any]:
        """How blocks are used. Looks at every block.

        Returns
        -------
        dict
            most_frequently_accessed, least_frequently_accessed : lists of at most 10 pairs
            (id, accesses), registering included; temporal_locality : share of the last accesses
            (at most 1024) that were of a block accessed within as many before; spatial_locality :
            share of them that the learned order of accesses had foretold, those that went on
            with the block just accessed left out. Both are 0.0 before the first access.
        """
        group = self._group_stats()
        return {
            "most_frequently_accessed": self._ranked(True),
            "least_frequently_accessed": self._ranked(False),
            "temporal_locality": _share(group.reused, group.recent),
            "spatial_locality": _share(group.foretold, group.recent - group.repeated),
        }

    def get_access_pattern_priority(self, block_id: str) -> float:
        """How much a block deserves its memory, 0..1: the mean of three shares.

        Frequency: its accesses over those of the block with the most. Recency: 1 for the block
        just accessed, one half 1024 accesses later, those that go on with the block just
        accessed left out. Nearness: 1 when the learned order of accesses foretells it next, one
        half when one later, 0 when it does not foretell it.

        Raises
        ------
        KeyError
            No block has that name.
        """
        accesses, most, age, distance = self._blocks[block_id]._outlook()
        recency = 1.0 / (1.0 + (age - 1) / 1024) if age else 0.0
        nearness = 0.0 if distance is None else 1.0 / (1.0 + distance)
        return float((_share(accesses, most) + recency + nearness) / 3)

    def cleanup(self) -> None:
        """Unregister all blocks and close the swapper: threads stop, memory and swap file go back.

        Views that live keep their bytes. Idempotent; registering and accessing raise
        `ClosedError` from then on. A store that is shared stays open.
        """
        for block_id in self._blocks:
            self.unregister_memory_block(block_id)
        if self._owns:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cleanup()

    def __repr__(self) -> str:
        return (
            f"<omnimem.AdvancedMemorySwapper, {len(self._blocks)} blocks, "
            f"{self._algorithm.value} from {format_share(self._threshold, 0)} on>"
        )

    # -- inside ----------------------------------------------------------------------------------

    def _group_stats(self) -> GroupStats:
        try:
            return self._store.group_stats(self._GROUP)
        except ClosedError:
            return GroupStats.nothing()

    def _ranked(self, most: bool) -> list[tuple[str, int]]:
        try:
            return self._store._ranked(self._GROUP, most, _FEW)
        except ClosedError:
            return []

    def _efficiency(self, group: GroupStats) -> dict[str, float]:
        return {
            "hit_rate": _share(group.hits, group.hits + group.misses),
            "avg_swap_out_time": _share(group.out_seconds, group.outs),
            "avg_swap_in_time": _share(group.in_seconds, group.ins),
            "total_swapped_GB": (group.out_bytes + group.in_bytes) / _GIB,
            "current_swap_utilization_GB": group.disk_bytes / _GIB,
            "max_swap_utilization_GB": self.max_swap_size / _GIB,
        }

    def _excess(self) -> int:
        """Bytes above the threshold; 0: usage is below it."""
        total, available, _ = _core.memory()
        used = total - available
        if used < self._threshold * total:
            return 0
        return max(1, math.ceil(used - self._threshold * total))

    def _shrink_cache(self, need: int) -> None:
        try:
            self._cache.evict(need)  # type: ignore[union-attr]
        except Exception:
            log.warning("the cache could not shrink by %d bytes", need, exc_info=True)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _nbytes(data: Any) -> int | None:
    """Bytes of a buffer or tensor; None: only the core can tell."""
    try:
        return memoryview(data).nbytes
    except (TypeError, BufferError):
        nbytes = getattr(data, "nbytes", None)
        return nbytes if isinstance(nbytes, int) else None
