"""Blocks of memory as users hold them: what they are, and their bytes without a copy."""

from __future__ import annotations

import time
from enum import Enum
from typing import Any

from omnimem import _core
from omnimem.errors import Error

__all__ = ["MemoryBlock", "MemoryRegionType"]


class MemoryRegionType(Enum):
    """What a block's bytes are for."""

    TENSOR_DATA = "tensor_data"
    ACTIVATION_BUFFER = "activation_buffer"
    KV_CACHE = "kv_cache"
    TEMPORARY = "temporary"


REGIONS = tuple(MemoryRegionType)
# The core's clock is time.monotonic(); users compare with time.time().
_EPOCH = time.time() - time.monotonic()


class MemoryBlock(_core.Block):
    """A named block of bytes, in memory or swapped out; it holds no bytes itself.

    `memoryview(block)`, `numpy.asarray(block)` and `torch.from_dlpack(block)` bring the bytes in
    and hold them for as long as the view lives. Several views share the memory and may write to
    it; what they wrote is what comes back after a swap. (Memory that was given read-only with
    `take=True` stays read-only until it is swapped out.)

    Built by a user it is *unbound*: a record of the values given, without memory. Those that a
    swapper or a pool returns are *bound*: every attribute is read anew from the core.

    Parameters
    ----------
    id : str
        Name of the block.
    size : int
        Bytes.
    ptr, region_type, allocated, timestamp, last_access_time, access_count, is_swapped, \
swap_location, ref_count, pinned, device
        As the attributes below.

    Raises
    ------
    BufferError
        On a view of an unbound block.
    KeyError
        On a view of a block that was unregistered.
    """

    __slots__ = ("_record",)
    _record: dict[str, Any]

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - the name is a contract
        size: int,
        ptr: int = 0,
        region_type: MemoryRegionType = MemoryRegionType.TENSOR_DATA,
        allocated: bool = False,
        timestamp: float | None = None,
        last_access_time: float | None = None,
        access_count: int = 0,
        is_swapped: bool = False,
        swap_location: str | None = None,
        ref_count: int = 0,
        pinned: bool = False,
        device: str = "cpu",
    ) -> None:
        now = time.time()
        self._record = {
            "id": id,
            "size": size,
            "ptr": ptr,
            "region_type": region_type,
            "allocated": allocated,
            "timestamp": now if timestamp is None else timestamp,
            "last_access_time": now if last_access_time is None else last_access_time,
            "access_count": access_count,
            "is_swapped": is_swapped,
            "swap_location": swap_location,
            "ref_count": ref_count,
            "pinned": pinned,
            "device": device,
        }

    @property
    def id(self) -> str:
        """Name of the block."""
        name: str | None = self._name
        return self._record["id"] if name is None else name

    @property
    def size(self) -> int:
        """Bytes."""
        return self._get("size")

    @property
    def ptr(self) -> int:
        """Address of the bytes; 0 while they are not in memory. It promises nothing: hold a view."""
        return self._get("ptr")

    @property
    def region_type(self) -> MemoryRegionType:
        """What the bytes are for."""
        return self._get("region_type")

    @property
    def allocated(self) -> bool:
        """Whether there are bytes, in memory or below; False before the first access, and after."""
        return self._get("allocated")

    @property
    def timestamp(self) -> float:
        """When the block was made, in seconds since the epoch."""
        return self._get("timestamp")

    @property
    def last_access_time(self) -> float:
        """When it was last accessed, in seconds since the epoch. Registering counts."""
        return self._get("last_access_time")

    @property
    def access_count(self) -> int:
        """Accesses so far. Registering is the first."""
        return self._get("access_count")

    @property
    def is_swapped(self) -> bool:
        """Whether the only whole copy of the bytes lies below memory."""
        return self._get("is_swapped")

    @property
    def swap_location(self) -> str | None:
        """Where the bytes lie while they are swapped out; None: in memory, or nowhere yet."""
        return self._get("swap_location")

    @property
    def ref_count(self) -> int:
        """Views and leases that hold the bytes."""
        return self._get("ref_count")

    @property
    def pinned(self) -> bool:
        """Whether the bytes, once in memory, stay there. Can be set at any time."""
        return self._get("pinned")

    @property
    def device(self) -> str:
        """Where views of it are: "cpu"."""
        return self._get("device")

    def _get(self, field: str) -> Any:
        state = self._state()
        return self._record[field] if state is None else _FIELDS[field](state)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIELDS:
            state = self._state()
            if state is None:
                self._record[name] = value
                return
            if name == "pinned":
                self._mark(value, state[7])
                return
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        where = "unbound"
        if self._name is not None:
            where = "swapped out" if self.is_swapped else "in memory" if self.ptr else "not in use"
        return f"<omnimem.MemoryBlock {self.id!r}, {self.size} bytes, {where}>"


_FIELDS: dict[str, Any] = {
    # of _core.Block._state: nbytes, created, accessed, accesses, address, offset in the swap
    # file, leases, tag, named, pinned, swapped, blank
    "size": lambda s: s[0],
    "timestamp": lambda s: _EPOCH + s[1],
    "last_access_time": lambda s: _EPOCH + s[2],
    "access_count": lambda s: s[3],
    "ptr": lambda s: s[4],
    "swap_location": lambda s: (
        None if not s[10] else "encoded" if s[5] is None else f"swap file, byte {s[5]}"
    ),
    "ref_count": lambda s: s[6],
    "region_type": lambda s: REGIONS[s[7]],
    "allocated": lambda s: s[8] and not s[11],
    "pinned": lambda s: s[9],
    "is_swapped": lambda s: s[10],
    "device": lambda s: "cpu",
}


def _unpack(block: MemoryBlock) -> None:
    """Decode a block whose only bytes are those that a compression manager made of it."""
    found = block._lease_packed()
    if found is None:
        return
    lease, number = found
    manager = block._codecs[number]
    with lease:
        try:
            with memoryview(lease) as packed:
                plain = manager.decompress(packed)
            block._unpack(plain)
        except Error:
            raise
        except Exception as error:
            raise Error(
                f"block {block.id!r}: {type(manager).__name__}.decompress failed on its "
                f"{lease.nbytes} encoded bytes ({error}); they are kept: try again"
            ) from error


_core._block_setup(MemoryBlock, _unpack)
