"""Which block makes way: the policies of stores for blocks that somebody else keeps and moves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from omnimem import _core
from omnimem.config import parse_size

__all__ = [
    "AdaptiveSwapAlgorithm",
    "BaseSwapAlgorithm",
    "ClockSwapAlgorithm",
    "LRUSwapAlgorithm",
    "SwapBlock",
]


class SwapBlock(Protocol):
    """What an algorithm needs to know of a block; `MemoryBlock` has it, and any object may."""

    @property
    def id(self) -> str:
        """Its name, constant; no other block of the algorithm has it."""

    @property
    def size(self) -> int:
        """Bytes, more than 0; read when it is added."""

    @property
    def last_access_time(self) -> float:
        """Seconds of any clock, finite; read when it is added or accessed."""

    @property
    def pinned(self) -> bool:
        """It may not go now; read when it would be chosen."""


class BaseSwapAlgorithm(ABC):
    """An order in which blocks make way; subclass it for one of your own.

    An algorithm moves nothing and forgets nothing by itself: whoever asks for a victim moves its
    bytes out and then removes it.
    """

    @abstractmethod
    def add_block(self, block: SwapBlock) -> None:
        """A block can be chosen from now on.

        One that has the id of a block that is there replaces it, and its place is a new one.

        Raises
        ------
        ValueError
            A size of 0 or less, or a last access that is no finite time; nothing has changed.
        """

    @abstractmethod
    def remove_block(self, block_id: str) -> None:
        """A block cannot be chosen any more: its bytes were moved, or it is gone for good.

        Raises
        ------
        KeyError
            No block has that id.
        """

    @abstractmethod
    def access_block(self, block_id: str) -> None:
        """A block was used just now.

        Raises
        ------
        KeyError
            No block has that id.
        """

    @abstractmethod
    def select_victim(self) -> SwapBlock | None:
        """The block to give up, never a pinned one; None when there is none.

        It stays until it is removed: asked again, an algorithm may choose it again.
        """


class _RankedSwapAlgorithm(BaseSwapAlgorithm):
    """A policy of the core, which knows blocks by slot.

    A removed id stays known, with its slot, until the core gives the slot to another: so a policy
    that learns about blocks that are gone knows those that come back.

    What is pinned is not told to anybody, so it is asked when a block is chosen: a pinned one is
    passed by, and asked again at the next choice. The core ends that with the block's next use.
    """

    def __init__(self, policy: str, capacity: int = 0) -> None:
        self._ranking = _core.Ranking(policy, capacity)
        self._slots: dict[str, int] = {}
        self._ids: list[str] = []  # by slot
        self._blocks: list[SwapBlock | None] = []  # by slot; None: removed
        self._passed: set[int] = set()

    def add_block(self, block: SwapBlock) -> None:
        block_id = block.id
        known = self._slots.get(block_id, -1)
        slot = self._ranking.add(known, block.size, block.last_access_time)
        if slot == len(self._ids):
            self._ids.append(block_id)
            self._blocks.append(None)
        elif slot != known:
            del self._slots[self._ids[slot]]
            self._ids[slot] = block_id
        self._slots[block_id] = slot
        self._blocks[slot] = block
        self._passed.discard(slot)

    def remove_block(self, block_id: str) -> None:
        slot, _ = self._find(block_id)
        self._ranking.remove(slot)
        self._blocks[slot] = None
        self._passed.discard(slot)

    def access_block(self, block_id: str) -> None:
        slot, block = self._find(block_id)
        self._ranking.access(slot, block.last_access_time)
        self._passed.discard(slot)

    def select_victim(self) -> SwapBlock | None:
        for slot in tuple(self._passed):
            block = self._blocks[slot]
            if block is not None and not block.pinned:
                self._ranking.pass_by(slot, False)
                self._passed.discard(slot)
        while (chosen := self._ranking.victim()) is not None:
            block = self._blocks[chosen]
            if block is not None and not block.pinned:
                return block
            self._passed.add(chosen)
            self._ranking.pass_by(chosen, True)
        return None

    def _find(self, block_id: str) -> tuple[int, SwapBlock]:
        slot = self._slots.get(block_id, -1)
        block = self._blocks[slot] if slot >= 0 else None
        if block is None:
            raise KeyError(f"no block {block_id!r}")
        return slot, block


class LRUSwapAlgorithm(_RankedSwapAlgorithm):
    """Least recently used: the block goes that was used longest ago.

    Notes
    -----
    A block that is added takes its place by `last_access_time`, after those of the same time, in
    whatever order blocks come: at once when times rise, else in as many steps as blocks were used
    later. An access makes a block the most recent, even if nobody has set its time: it counts as
    one at `last_access_time`, or at the latest time seen if that is later.

    Not thread safe: calls of several threads must take turns.
    """

    def __init__(self) -> None:
        super().__init__("lru")


class ClockSwapAlgorithm(_RankedSwapAlgorithm):
    """Second chance: the hand takes the first block that was not used since it last came by.

    Notes
    -----
    Blocks lie in the order in which they were added; a new one has its bit clear, an access sets
    it. Where the hand finds it set, it clears it and leaves the block for its next round, pinned
    or not; a pinned block whose bit is clear keeps its place, and is the first again at the next
    choice. `last_access_time` does not count.

    Not thread safe: calls of several threads must take turns.
    """

    def __init__(self) -> None:
        super().__init__("clock")


class AdaptiveSwapAlgorithm(_RankedSwapAlgorithm):
    """Whichever of four policies would have missed least lately: cycles, phases, skew, scans.

    Parameters
    ----------
    capacity : int or str, optional
        Bytes ("512MiB") that the blocks can have together: what the policies are tried with. By
        default the most that they had together so far.

    Raises
    ------
    ValueError
        A capacity of 0 or less.

    Notes
    -----
    Adding a block is a request that missed, an access one that hit, in the order of the calls;
    `last_access_time` does not count. A removed block is remembered, since it may come back: at
    least the last 1024, 8 for each block if that is more.

    Not thread safe: calls of several threads must take turns.
    """

    def __init__(self, capacity: int | str | None = None) -> None:
        room = 0 if capacity is None else parse_size(capacity, "capacity")
        if capacity is not None and not room:
            raise ValueError(f"capacity={capacity!r} holds nothing")
        super().__init__("adaptive", room)
