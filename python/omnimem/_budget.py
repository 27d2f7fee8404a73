"""One budget across several models: who is used has the memory, the others give way.

When a pass of a model begins, those that nobody uses are rested: their bytes stay where they are,
and may go as soon as the store needs room, those of the model that is expected last first. The
model gets what the budget leaves beside others in use; where they are too many for it, each gets
its share by bytes, and streams the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from omnimem._offload_choice import OffloadDecision
from omnimem._offload_models import Entry, Models
from omnimem.config import format_size
from omnimem.errors import ClosedError, Error, LimitError

if TYPE_CHECKING:
    from omnimem._managed import Movable

__all__ = ["Budget", "shares"]

log = logging.getLogger("omnimem.manager")

_PAGE = 4096
_SEGMENT = 2 << 20
"""What a store takes memory in."""


def shares(budget: int, users: Mapping[str, int]) -> dict[str, int]:
    """Divide a budget among models in use, by the bytes of their weights.

    Parameters
    ----------
    budget : int
        Bytes.
    users : mapping of str to int
        Bytes of weights by model.

    Returns
    -------
    dict of str to int
        All bytes of each where they fit together; else the same share of each, in pages.
    """
    total = sum(users.values())
    if total <= budget:
        return dict(users)
    return {name: budget * nbytes // total // _PAGE * _PAGE for name, nbytes in users.items()}


class Budget:
    """Shares a store's memory out among its models, as they begin to be used.

    Parameters
    ----------
    models : Models
    most : callable
        Takes an entry; bytes of memory that it may have for other reasons than the budget.
    note : callable
        Takes what was decided.
    """

    def __init__(
        self,
        models: Models,
        most: Callable[[Entry], int],
        note: Callable[[OffloadDecision], object],
    ) -> None:
        self._models = models
        self._most = most
        self._note = note

    def used(self, movable: Movable) -> None:
        """A pass begins: runs on its thread, before it, outside every lock."""
        entry = self._models.get(movable.model_id)
        if entry is None or entry.movable is not movable:
            return
        with self._models.sharing:
            self._share(entry)

    def _share(self, entry: Entry) -> None:
        busy = [each for each in self._models if each is not entry and each.movable.in_use]
        users = {each.model_id: each for each in (entry, *busy)}
        parts = shares(self._shared(len(users)), {name: each.size for name, each in users.items()})
        rooms = {name: self._room(each, parts[name]) for name, each in users.items()}
        room = rooms[entry.model_id]
        if entry.room == room and self._models.spare() >= 0:
            return
        entry.room = room
        try:
            for each in self._models.rest(entry):
                self._tell("offload", each, f"{each.model_id!r} gives way to {entry.model_id!r}")
            for each in busy:
                if each.room is None or each.room > rooms[each.model_id]:
                    each.room = rooms[each.model_id]
                    self._resize(each, each.room)
            self._give(entry, room, busy)
        except ClosedError:
            return
        except (Error, OSError, MemoryError) as error:
            # It streams in the room that it has; what it cannot read is told where it is read.
            log.warning("%r begins without memory of its own: %s", entry.model_id, error)

    def _shared(self, users: int) -> int:
        """What so many models may have: those beside others each leave a segment partly filled."""
        limit = self._models.usable
        return limit if users == 1 else max(limit - users * _SEGMENT, limit // 2)

    @staticmethod
    def _room(entry: Entry, part: int) -> int:
        """Of a part of the budget, what weights may have."""
        room = min(max(part - entry.slack, 0), entry.movable.nbytes)
        return room if entry.cap is None else min(room, entry.cap)

    def _give(self, entry: Entry, part: int, busy: list[Entry]) -> None:
        """What is to stay comes as it is used, ahead of use: the pass need not wait for all."""
        room = min(part, self._most(entry))
        missing = entry.movable.missing_bytes()
        beside = ", ".join(repr(each.model_id) for each in busy)
        reason = (
            f"{entry.model_id!r} is used now{f' beside {beside}' if beside else ''}: it may have "
            f"{format_size(room)} of {format_size(self._models.limit)}, and has "
            f"{format_size(entry.movable.nbytes)} of weights"
        )
        trouble = self._resize(entry, room)
        if trouble:
            reason = f"{reason}; {trouble}"
        streams = bool(trouble) or room < entry.movable.nbytes
        self._tell("stream" if streams else "restore", entry, reason, min(missing, room))

    @staticmethod
    def _resize(entry: Entry, room: int) -> str:
        """Give a model so much; what keeps it from streaming in that, as text."""
        try:
            entry.movable.resize(room)
        except LimitError as error:
            entry.movable.offload("cpu")  # its units come one at a time, as the store has room
            return str(error)
        return ""

    def _tell(self, action: str, entry: Entry, reason: str, nbytes: int = 0) -> None:
        self._note(
            OffloadDecision(
                action=action,
                model_id=entry.model_id,
                reason=reason,
                nbytes=nbytes,
                at=time.monotonic(),
            )
        )
