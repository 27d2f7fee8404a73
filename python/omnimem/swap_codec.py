"""Blocks encoded on their way out of memory, by a compression manager or by omnimem's own codec.

The core calls no Python: the thread that swaps takes the victims one by one, has them encoded, and
hands the result over. `omnimem.block` has them decoded when they are wanted.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from omnimem import _core
from omnimem.errors import BusyError, Error

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from omnimem.store import Store

__all__ = ["OWN", "CompressionManager", "encode_out"]

log = logging.getLogger("omnimem.swap")

_LEAST_SAVED = 0.05  # of a block's bytes: what encoding has to save


@runtime_checkable
class CompressionManager(Protocol):
    """What `integrate_with_compression` takes: lossless, and whole blocks at a time."""

    def compress(self, data: Buffer, /) -> Buffer:
        """The bytes, encoded."""

    def decompress(self, data: Buffer, /) -> Buffer:
        """The bytes that `compress` was given."""


class _Own:
    """omnimem's codec: a fixed-rate code that is faster than disks, for weights of any type."""

    def compress(self, data: Buffer, /) -> Buffer:
        coded = _core.encode(data, coding="fast")
        return data if coded is None else coded

    def decompress(self, data: Buffer, /) -> Buffer:
        return _core.decode(data)


OWN = _Own()  # the one that None stands for in `integrate_with_compression`


def encode_out(store: Store, group: str, need: int, codec: int) -> tuple[int, int]:
    """As `Store._swap_out`, with what is worth it encoded; what remains goes plain.

    `codec` is the manager's number among the store's. Returns the blocks and bytes that went.
    """
    manager = store._codecs[codec]
    begun: dict[str, int] = {}
    sent = 0
    while sent < need:
        lease = store._victim(group)
        if lease is None:
            break
        name, nbytes = lease.name, lease.nbytes
        try:
            with lease:
                if name in begun:  # it could not go
                    break
                packed = _encode(manager, lease)
                if packed is not None:
                    store._pack(lease, packed, codec)
            store.evict(name, timeout=0.0)  # what has to be written is on its way
        except BusyError:
            pass
        except KeyError:  # another thread has unregistered it
            continue
        except Error:
            break  # `_swap_out` meets it again, and keeps the reason
        begun[name] = nbytes
        sent += nbytes
    store._swap_out(group, 0)
    freed = {name: size for name, size in begun.items() if not _in_memory(store, name)}
    total = sum(freed.values())
    if total >= need:
        return len(freed), total
    gone, rest = store._swap_out(group, need - total)
    return len(freed) + gone, total + rest


def _in_memory(store: Store, block_id: str) -> bool:
    block = store._block(block_id)
    return block is not None and block.ptr != 0


def _encode(manager: CompressionManager, lease: _core.Lease) -> Any:
    """What the manager makes of a block, if it is worth it and gives back the same bytes."""
    packed: memoryview | None = None
    try:
        if manager is OWN:  # it knows what is worth it, is given the dtype, and has its own tests
            return _core.encode(lease, coding="fast")
        with memoryview(lease) as plain, memoryview(manager.compress(plain)) as made:
            packed = made.cast("B")
            if packed.nbytes > (1 - _LEAST_SAVED) * plain.nbytes:
                return None
            if _core._same_bytes(manager.decompress(packed), plain):
                return packed
        log.warning(
            "block %r: %s gave back other bytes than it was given; it is stored plain",
            lease.name,
            type(manager).__name__,
        )
    except Exception as error:
        log.warning(
            "block %r: %s failed; it is stored plain",
            lease.name,
            type(manager).__name__,
            exc_info=True,
        )
        # Who keeps the log record keeps the frames, whose views would keep the block in memory.
        traceback.clear_frames(error.__traceback__)
        if packed is not None:
            with contextlib.suppress(BufferError):
                packed.release()
    return None
