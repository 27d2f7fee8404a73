"""Blocks of memory as users hold them: what they are, and their bytes without a copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

from omnimem import _core
from omnimem.errors import ClosedError, Error

if TYPE_CHECKING:
    from omnimem.store import Store

__all__ = ["MemoryBlock", "MemoryRegionType"]


class MemoryRegionType(Enum):
    """What a block's bytes are for."""

    TENSOR_DATA = "tensor_data"
    ACTIVATION_BUFFER = "activation_buffer"
    KV_CACHE = "kv_cache"
    TEMPORARY = "temporary"


T = TypeVar("T")

REGIONS = tuple(MemoryRegionType)
# The core's clock is time.monotonic(); users compare with time.time().
EPOCH = time.time() - time.monotonic()


class _State(NamedTuple):
    """What the core knows of a bound block (`_core.Block._state`)."""

    nbytes: int
    created: float
    accessed: float
    accesses: int
    address: int
    offset: int | None
    leases: int
    tag: int
    named: bool
    pinned: bool
    swapped: bool
    blank: bool
    device: str
    label: str | None


class _Field(Generic[T]):
    """An attribute: read from the core's state, or kept in an unbound block's record."""

    def __init__(self, read: Callable[[_State], T], doc: str) -> None:
        self._read = read
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, block: MemoryBlock | None, owner: type | None = None) -> T:
        if block is None:
            return cast(T, self)
        state = block._state()
        if state is None:
            return cast(T, block._record[self._name])
        return self._read(_State(*state))

    def __set__(self, block: MemoryBlock, value: T) -> None:
        if block._name is not None:
            raise AttributeError(f"{self._name} of a bound block is what the core says: read-only")
        block._record[self._name] = value


class _Pinned(_Field[bool]):
    """The one attribute of a bound block that can be set."""

    def __set__(self, block: MemoryBlock, value: bool) -> None:
        state = block._state()
        if state is None:
            super().__set__(block, value)
        else:
            block._mark(value, _State(*state).tag)


def _place(offset: int | None) -> str:
    return "encoded" if offset is None else f"swap file, byte {offset}"


class MemoryBlock(_core.Block):
    """A block of bytes, of a swapper (in memory or swapped out) or of a pool; it holds none itself.

    `memoryview(block)`, `numpy.asarray(block)` and `torch.from_dlpack(block)` bring the bytes in
    and hold them for as long as the view lives. Several views share the memory and may write to
    it; what they wrote is what comes back after a swap. (Memory that was given read-only with
    `take=True` stays read-only until it is swapped out.)

    A pool's block has its bytes from `allocate` to `deallocate`; views that exist then keep them.

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
        On a view of an unbound block, or of one that was deallocated.
    KeyError
        On a view of a block that was unregistered.
    """

    __slots__ = ("_record",)
    _record: dict[str, Any]

    def __init__(
        self,
        *,
        id: str,
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
        name = self._name
        return str(self._record["id"]) if name is None else name

    size = _Field[int](lambda s: s.nbytes, "Bytes.")
    ptr = _Field[int](
        lambda s: s.address,
        "Address of the bytes; 0 while they are not in memory. It holds nothing: take a view.",
    )
    region_type = _Field[MemoryRegionType](lambda s: REGIONS[s.tag], "What the bytes are for.")
    allocated = _Field[bool](
        lambda s: s.named and not s.blank,
        "Whether there are bytes, in memory or below: not before the first access.",
    )
    timestamp = _Field[float](
        lambda s: EPOCH + s.created, "When the block was made, in seconds since the epoch."
    )
    last_access_time = _Field[float](
        lambda s: EPOCH + s.accessed,
        "When it was last accessed, in seconds since the epoch; registering counts.",
    )
    access_count = _Field[int](lambda s: s.accesses, "Accesses so far; registering is the first.")
    is_swapped = _Field[bool](
        lambda s: s.swapped, "Whether the only whole copy of the bytes lies below memory."
    )
    swap_location = _Field[str | None](
        lambda s: None if not s.swapped else _place(s.offset),
        "Where the bytes lie while they are swapped out; None: in memory, or nowhere yet.",
    )
    ref_count = _Field[int](lambda s: s.leases, "Views and leases that hold the bytes.")
    pinned = _Pinned(
        lambda s: s.pinned, "Whether the bytes, once in memory, stay there; can be set at any time."
    )
    device = _Field[str](
        lambda s: s.device, 'Where the bytes are; views of "pinned" are the CPU\'s.'
    )

    @property
    def label(self) -> str | None:
        """What `allocate` was told, until the block is deallocated."""
        state = self._state()
        return None if state is None else _State(*state).label

    def __repr__(self) -> str:
        where = "unbound"
        if self._name is not None:
            where = "swapped out" if self.is_swapped else "in memory" if self.ptr else "not in use"
        return f"<omnimem.MemoryBlock {self.id!r}, {self.size} bytes, {where}>"


class Blocks(Mapping[str, MemoryBlock]):
    """The blocks of one group of a store by id, read-only; objects are made on demand."""

    def __init__(self, store: Store, group: str) -> None:
        self._store = store
        self._group = group

    def __getitem__(self, block_id: str) -> MemoryBlock:
        block = self.find(block_id) if block_id in self._store and self else None
        if block is None:
            raise KeyError(block_id)
        return block

    def find(self, block_id: str) -> MemoryBlock | None:
        """None also for a block of another group on the same store."""
        block = self._store._block(block_id)
        return block if block is not None and self.group_of(block_id) == self._group else None

    def group_of(self, block_id: str) -> str | None:
        try:
            group: str = self._store._info(block_id)[-1]
        except KeyError:
            return None
        return group

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.names(self._group) if self else ())

    def __len__(self) -> int:
        try:
            return self._store.group_stats(self._group).blocks
        except ClosedError:
            return 0


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
