"""Memory pools: plain memory by device, in blocks of any size, under a limit."""

from __future__ import annotations

import logging
import re
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn, Self

from omnimem import _core
from omnimem._settings import Settings
from omnimem.block import EPOCH, MemoryBlock
from omnimem.config import format_size, parse_size
from omnimem.errors import ClosedError, DeviceError

__all__ = ["BlockSnapshot", "MemoryConfig", "MemoryPoolManager", "PoolStats"]

log = logging.getLogger("omnimem.pools")

KNOWN = '"cpu", "pinned" (RAM that is never swapped), "cuda" and "cuda:N"'
_CUDA = re.compile(r"cuda(:\d+)?")
_NAMED = 8  # blocks that a report of leaks names
_DEFAULT_SIZES = {"cpu": 8 << 30, "cuda": 16 << 30}


def _is_device(device: object) -> bool:
    return isinstance(device, str) and (
        device in ("cpu", "pinned") or _CUDA.fullmatch(device) is not None
    )


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(Settings):
    """What a `MemoryPoolManager` may use. Sizes are bytes, or strings such as "2GiB"."""

    enable_memory_pools: bool = True
    """False: no memory is kept for reuse, what is deallocated goes back to the system at once."""

    pool_sizes: Mapping[str, int | str] = field(default_factory=lambda: dict(_DEFAULT_SIZES))
    """The limit of each device's pool: "cpu", "pinned", "cuda", "cuda:N". It is no reservation:
    memory is taken as it is touched. Without a GPU its pools exist all the same, and are empty."""

    fragmentation_threshold: float = 0.1
    """Fragmentation (0..1, see `PoolStats`) above which free memory goes back at once."""

    cleanup_interval: float = 60.0
    """Seconds after which free memory goes back to the system at the latest, if the pool is used
    then: it has no thread of its own. Whole ranges of 2 MiB do."""

    def __post_init__(self) -> None:
        sizes = {}
        for device, size in dict(self.pool_sizes).items():
            if not _is_device(device):
                raise ValueError(f"pool_sizes: unknown device {device!r}; known are {KNOWN}")
            sizes[device] = parse_size(size, f"pool_sizes[{device!r}]")
        object.__setattr__(self, "pool_sizes", MappingProxyType(sizes))
        if not 0 <= self.fragmentation_threshold <= 1:
            raise ValueError(
                f"fragmentation_threshold={self.fragmentation_threshold!r} must lie between 0 and 1"
            )
        if not 0 <= self.cleanup_interval < float("inf"):
            raise ValueError(f"cleanup_interval={self.cleanup_interval!r} must be seconds from 0")


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Numbers of one pool (`MemoryPoolManager.get_pool_stats`): bytes and counts."""

    total_size: int = 0
    """The limit."""
    used_size: int = 0
    """Bytes asked for by blocks that are allocated."""
    free_size: int = 0
    """What the limit still allows: total_size - reserved_size, or 0."""
    fragmentation_ratio: float = 0.0
    """1 - largest_free_size / free_size: the share of what is free that one block cannot have; 0
    when nothing is free."""
    allocation_count: int = 0
    """Blocks allocated so far."""
    deallocation_count: int = 0
    """Blocks deallocated so far."""
    reserved_size: int = 0
    """Bytes that blocks hold: rounded up to 256, and those of `released_size`."""
    block_count: int = 0
    """Blocks that are allocated."""
    failure_count: int = 0
    """Requests that did not fit."""
    largest_free_size: int = 0
    """The largest block that would fit."""
    mapped_size: int = 0
    """Memory that was handed out and is not back with the system, in steps of 2 MiB."""
    exported_size: int = 0
    """Bytes of blocks that have a view, allocated or not."""
    released_size: int = 0
    """Bytes of blocks that are deallocated, but that a view still holds."""
    peak_used_size: int = 0
    """The most that `used_size` ever was."""
    peak_reserved_size: int = 0
    """The most that `reserved_size` ever was."""


@dataclass(frozen=True, slots=True)
class BlockSnapshot:
    """One block as it was at a moment (`MemoryPoolManager.snapshot`)."""

    id: str
    """"DEVICE:NUMBER"; numbers count a pool's allocations from 1."""
    device: str
    """Its pool."""
    label: str | None
    """What `allocate` was told."""
    ptr: int
    """Address."""
    size: int
    """Bytes asked for."""
    reserved_size: int
    """Bytes held."""
    timestamp: float
    """When it was allocated, in seconds since the epoch."""
    last_access_time: float
    """When it was allocated or last viewed."""
    access_count: int
    """Allocation and views so far."""
    ref_count: int
    """Views that hold the bytes now."""


class _LiveBlocks(Mapping[str, MemoryBlock]):
    """The blocks of one pool by id, read-only; the one used longest ago comes first."""

    def __init__(self, manager: MemoryPoolManager, device: str) -> None:
        self._manager = manager
        self._device = device

    def __getitem__(self, block_id: str) -> MemoryBlock:
        device, _, number = str(block_id).rpartition(":")
        found = None
        if device == self._device and number.isascii() and number.isdigit() and bool(self):
            found = self._manager._block(device, int(number))
        if found is None or found.id != block_id:
            raise KeyError(block_id)
        return found

    def __iter__(self) -> Iterator[str]:
        blocks = self._manager._blocks(self._device) if bool(self) else ()
        return iter([block.id for block in blocks])

    def __len__(self) -> int:
        manager = self._manager
        if manager.closed or self._device not in manager._open_devices:
            return 0
        return int(manager.get_pool_stats(self._device).block_count)


class MemoryPoolManager(_core.Pools):
    """Memory by device, in blocks of any size, under one limit a device; a context manager.

    A block's bytes are usable without a copy (`memoryview(block)`, `numpy.asarray(block)`,
    `torch.from_dlpack(block)`), and stay as they are while any such view lives, also past
    `deallocate` and `close`: until then they count as `released_size`. A block that is dropped
    without `deallocate` stays allocated, and is found in `pools`.

    A pool is one range of addresses that fills from where it fits best (two-level segregated fit);
    what is free goes back to the system as `MemoryConfig` says, during the calls that users make.

    Parameters
    ----------
    config : MemoryConfig, optional

    Attributes
    ----------
    config : MemoryConfig
    pools : mapping of str to mapping of str to MemoryBlock
        By device, then by id: the blocks that are allocated. Read-only; every key of `pool_sizes`
        is there.
    """

    def __init__(self, config: MemoryConfig | None = None) -> None:
        self.config = MemoryConfig() if config is None else config
        self._open_devices: tuple[str, ...] = ()
        _open_pools.add(self)
        decay = self.config.cleanup_interval if self.config.enable_memory_pools else 0.0
        for device, size in self.config.pool_sizes.items():
            if _CUDA.fullmatch(device):
                continue
            fragmentation = self.config.fragmentation_threshold
            self._open(device, parse_size(size), decay, fragmentation, device == "pinned")
            self._open_devices += (device,)
        self.pools: Mapping[str, Mapping[str, MemoryBlock]] = MappingProxyType(
            {device: _LiveBlocks(self, device) for device in self.config.pool_sizes}
        )

    def _refuse(self, device: object) -> NoReturn:
        """Say why there is no pool of that device."""
        if not isinstance(device, str):
            raise TypeError(f"device must be a str, not {device!r}")
        if not _is_device(device):
            raise ValueError(f"unknown device {device!r}; known are {KNOWN}")
        if _CUDA.fullmatch(device):
            raise DeviceError(
                f"no memory on {device!r}: this omnimem manages the CPU's memory only; allocate on "
                "'cpu' or 'pinned', and copy to the GPU with the framework"
            )
        sizes = ", ".join(map(repr, self.config.pool_sizes))
        raise ValueError(f"no pool for device {device!r}: pool_sizes has {sizes or 'none'}")

    def get_pool_stats(self, device: str) -> PoolStats:
        """Numbers of a device's pool; all 0 for a GPU that is not there.

        Raises
        ------
        ValueError
            No key of `pool_sizes`.
        ClosedError
            The manager is closed.
        """
        if device in self.config.pool_sizes and device not in self._open_devices:
            return PoolStats()
        return PoolStats(*self._stats(device))

    def suggest_victims(
        self, size: int | str, device: str, alignment: int = 256
    ) -> list[MemoryBlock]:
        """Blocks that make room for `size` bytes in one piece when all of them are deallocated.

        The block used longest ago (allocated or viewed), then the older of the two beside the hole
        that it leaves, until the hole fits: neighbours were mostly used together, so that few young
        ones go, and the pool stays full. Blocks with views are left alone. For caches: pools do not
        evict by themselves.

        Returns
        -------
        list of MemoryBlock
            The one used longest ago first; empty when there is room.

        Raises
        ------
        LimitError
            No blocks without views make as much room.
        """
        return self._victims(size, device, alignment)

    def trim(self, device: str | None = None) -> int:
        """Give free memory back to the system now; of all devices for None.

        Returns
        -------
        int
            Bytes.
        """
        devices = self._open_devices if device is None else (device,)
        return sum(self._trim(name) for name in devices)

    def set_limit(self, device: str, limit: int | str) -> None:
        """Change a pool's limit.

        Below what is held, nothing is taken away, and nothing more is given until enough is
        deallocated.
        """
        self._set_limit(device, parse_size(limit, "limit"))

    def snapshot(self, device: str | None = None) -> list[BlockSnapshot]:
        """Tell of each allocated block, of all devices for None; the one used longest ago first."""
        devices = self._open_devices if device is None else (device,)
        return [
            BlockSnapshot(
                id=f"{name}:{number}",
                device=name,
                label=label,
                ptr=ptr,
                size=size,
                reserved_size=held,
                timestamp=EPOCH + created,
                last_access_time=EPOCH + used,
                access_count=uses,
                ref_count=views,
            )
            for name in devices
            for number, ptr, size, held, created, used, uses, views, label in self._snapshot(name)
        ]

    def check(self) -> None:
        """Compare all sums and lists of the pools with each other: for tests.

        Raises
        ------
        CorruptError
            They do not agree, which is a bug of omnimem.
        """
        for device in self._open_devices:
            self._check(device)

    def close(self) -> None:
        """Let all memory go but what views hold. Idempotent.

        Blocks that nobody deallocated are reported with their labels, by a warning to the logger
        "omnimem.pools" and a `ResourceWarning`.
        """
        if self.closed:
            return
        try:
            reports = [*filter(None, map(self._leaks, self._open_devices))]
        except ClosedError:  # a child's copy: the blocks are those of its parent
            reports = []
        self._close()
        for report in reports:
            log.warning(report)
            warnings.warn(report, ResourceWarning, stacklevel=2)

    def _leaks(self, device: str) -> str | None:
        left = self.snapshot(device)
        if not left:
            return None
        left.sort(key=lambda block: -block.size)
        names = ", ".join(
            f"{block.label or block.id!r} ({format_size(block.size)})" for block in left[:_NAMED]
        )
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        total = format_size(sum(block.size for block in left))
        blocks = "1 block" if len(left) == 1 else f"{len(left)} blocks"
        return f"pool {device!r} was closed with {blocks}, {total}, still allocated: {names}{more}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_open_pools: weakref.WeakSet[MemoryPoolManager] = weakref.WeakSet()
