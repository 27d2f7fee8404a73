"""The models that an offloader knows: what is known of each, how they move, and what failed.

The numbers are the store's and the models' own (`Movable`). Kept here, beside the registry, is only
when a model last moved, and how often it failed to.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omnimem._attached import Attached
from omnimem._offload_choice import Memory, Model
from omnimem.config import format_size, parse_size
from omnimem.errors import ClosedError, Error, LimitError
from omnimem.store import Store

if TYPE_CHECKING:
    from omnimem._managed import Movable, Moved
    from omnimem.store import Usage

__all__ = ["Entry", "Models", "group_of", "memory_of"]

log = logging.getLogger("omnimem.offload")

_PATIENCE = 3
"""Failures in a row until a model is left alone for a while."""
_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0
_PAGE = 4096
_MEASURED = 16 << 20
"""Bytes that a rate takes to be believed."""


def group_of(model_id: str) -> str:
    """The store's group of a model."""
    return f"model:{model_id}"


def memory_of(report: Mapping[str, Any], home: str) -> Memory:
    """A sample of the monitor, as the choice takes it: of RAM, or of one device."""
    if home != "cpu":
        total, free = next(
            ((total, free) for _, uuid, _, total, free, _ in report["gpus"] if uuid == _uuid(home)),
            (1, 1),  # nothing is known of it: then it is not short
        )
        return Memory(usage=1.0 - free / total, total=total)
    known = report["seconds_to_exhaustion"] is not None
    return Memory(
        usage=report["usage"], total=report["total"], slope=report["slope"] if known else None
    )


def _uuid(device: str) -> str:
    """A device of torch, as the driver calls it."""
    cuda: Any = sys.modules["torch"].cuda
    return f"GPU-{cuda.get_device_properties(device).uuid}"


@dataclass
class Entry:
    """A model that is registered."""

    movable: Movable
    model: Any
    has_origin: bool
    """Its weights come from a checkpoint, and never have to be written."""
    slack: int = 0
    """Memory that its blocks take at most beside the weights: they lie in whole pages."""
    room: int | None = None
    """Memory that it was given; None: it gives way."""
    cap: int | None = None
    """Most memory that it may be given."""
    moved: float | None = None
    """When it last moved, or failed to."""
    movers: set[int] = field(default_factory=set)
    """Threads that are letting it go."""
    failures: int = 0
    """In a row."""
    paused_until: float = 0.0
    cause: str = ""
    """Of the last failure."""

    @property
    def model_id(self) -> str:
        return self.movable.model_id

    @property
    def target(self) -> str:
        """Where its weights go when memory is short; what lies in a file is out of use once it is
        idle, and goes when it has to."""
        return "cpu" if self.has_origin or self.movable.home != "cpu" else "disk"

    @property
    def size(self) -> int:
        """Memory that all its weights take at most."""
        return self.movable.nbytes + self.slack

    def pause(self, now: float) -> str:
        """Why its automatic moving pauses; "": it does not."""
        if now >= self.paused_until:
            return ""
        return (
            f"{self.model_id!r} failed to move {self.failures} times in a row ({self.cause}); "
            f"automatic moving pauses for {self.paused_until - now:.0f} s more"
        )

    def offload(self, target: str, timeout: float) -> Moved | str:
        """Move it; what went wrong, as text, where it is as it was."""
        before, self.room = self.room, None
        self.movers.add(threading.get_ident())
        try:
            moved = self.movable.offload(target, timeout)
        except ClosedError:
            raise
        except (Error, OSError, MemoryError) as error:
            self.room = before
            self._fail(error)
            log.warning("offloading %r to %s failed: %s", self.model_id, target, self.cause)
            return f"{self.model_id!r} is as it was, since moving it to {target} failed: {error}"
        else:
            self._succeed()
            return moved
        finally:
            self.movers.discard(threading.get_ident())

    def moved_since(self, then: float) -> bool:
        """Has it moved, or is it on its way, so that what was known of it is out of date?"""
        return bool(self.movers) or (self.moved is not None and self.moved >= then)

    def give(self, room: int) -> None:
        """Let it have so many bytes of memory. Others may take them again at any time."""
        room = min(room, self.movable.nbytes if self.cap is None else self.cap)
        self.room = room
        try:
            self.movable.resize(room)
        except BaseException:
            self.room = None
            raise

    def fetch(self, target: str | None, timeout: float) -> Moved:
        """Bring in what it was given; where that fails it is idle."""
        room = self.room
        try:
            moved = self.movable.fetch(target, timeout)
        except BaseException as error:
            if self.room == room:
                self.room = None
                with suppress(Error, OSError, MemoryError):
                    self.movable.offload("cpu")
            if isinstance(error, (Error, OSError, MemoryError)) and not isinstance(
                error, (ClosedError, LimitError)
            ):
                self._fail(error)
                log.warning("bringing %r back failed: %s", self.model_id, self.cause)
            raise
        self._succeed()
        return moved

    def let_go(self) -> None:
        """End its management: give its weights back where they are nowhere else."""
        if self.has_origin:
            self.movable.close()
        else:
            self.movable.release()

    def _succeed(self) -> None:
        self.moved = time.monotonic()
        self.failures, self.paused_until, self.cause = 0, 0.0, ""

    def _fail(self, error: Exception) -> None:
        self.moved = time.monotonic()
        self.failures += 1
        self.cause = f"{type(error).__name__}: {error}"
        if self.failures >= _PATIENCE:
            pause = min(_PAUSE * 2.0 ** (self.failures - _PATIENCE), _LONGEST_PAUSE)
            self.paused_until = self.moved + pause


class Models:
    """Models of one store, by id."""

    def __init__(self, store: Store, window: float) -> None:
        self.store = store
        self.limit = parse_size(store.config.host_limit)
        """Bytes of memory that the store may have."""
        self.wasted = 0
        """Of these, those that blocks left unused in their segments when memory ran short; learned
        anew when models come or go."""
        self._sharing = threading.Lock()
        self._owner = os.getpid()
        self._window = window
        self._entries: dict[str, Entry] = {}
        self._numbers = itertools.count(1)

    @property
    def sharing(self) -> threading.Lock:
        """Held while memory is shared out and models are told so, and never while weights move.

        Two who do it at once would each give what the other has given.

        Raises
        ------
        ClosedError
            In a process made by fork, where it may be held for ever.
        """
        if os.getpid() != self._owner:
            raise ClosedError("these models belong to the process that forked this one")
        return self._sharing

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, model_id: str) -> Entry | None:
        return self._entries.get(model_id)

    def known(self, model: Any) -> Entry | None:
        """The entry of a model that is registered."""
        return next((entry for entry in self if entry.model is model), None)

    def add(
        self,
        model: Any,
        model_id: str | None = None,
        model_dir: str | os.PathLike[str] | None = None,
        *,
        resident: bool = True,
    ) -> Entry:
        """Register a model that is not; see `manage`."""
        if model_id is None:
            names = (f"{type(model).__name__}-{number}" for number in self._numbers)
            model_id = next(name for name in names if name not in self._entries)
        if model_id in self._entries:
            raise ValueError(f"another model is registered as {model_id!r}; unregister it first")
        from omnimem._managed import manage

        movable = manage(model, self.store, model_id, model_dir=model_dir, resident=resident)
        entry = self._entries[model_id] = Entry(movable, model, model_dir is not None)
        self.wasted = 0
        entry.slack = self.store.group_stats(movable.group).blocks * 2 * _PAGE
        movable.on_short = self.give_way
        if resident:
            entry.room = movable.nbytes
        if getattr(model, "omnimem", None) is movable:
            model.omnimem = Attached(self, entry)
        return entry

    def find(self, model_id: str) -> Entry:
        """The entry of an id.

        Raises
        ------
        KeyError
            There is none.
        """
        entry = self._entries.get(model_id)
        if entry is None:
            known = ", ".join(map(repr, self._entries)) or "none"
            raise KeyError(f"no model is registered as {model_id!r}; known are {known}")
        return entry

    def remove(self, entry: Entry) -> None:
        """Forget a model that was released or closed."""
        self._entries.pop(entry.model_id, None)
        self.wasted = 0
        entry.movable.on_use = entry.movable.on_short = None
        handle = getattr(entry.model, "omnimem", None)
        if isinstance(handle, Attached) and handle._entry is entry:
            del entry.model.omnimem

    def stays(self, entry: Entry) -> str:
        """Why a model's memory cannot go to disk; "": it can."""
        if entry.has_origin or parse_size(self.store.config.disk_limit) > 0:
            return ""
        return (
            f"{entry.model_id!r} stays in memory: it has no checkpoint to come back from, and the "
            "store no disk (disk_limit=0)"
        )

    def home(self, model_id: str) -> str:
        """Where a model's weights are when they are used."""
        entry = self._entries.get(model_id)
        return "cpu" if entry is None else entry.movable.home

    @property
    def usable(self) -> int:
        """Bytes of memory that weights can have."""
        return self.limit - self.wasted

    def room(self, entry: Entry) -> int:
        """Bytes that the store's limit allows a model, beside what others use right now."""
        others = self._others(entry)
        busy = sum(each.size for each in others if each.movable.in_use)
        return max(self.usable - busy - entry.slack, 0)

    def spare(self) -> int:
        """Bytes of the store that no model was given; below 0: they were given too many."""
        given = [
            min(each.room, each.movable.nbytes) + each.slack
            for each in self._others()
            if each.room is not None
        ]
        return self.usable - sum(given)

    def _others(self, entry: Entry | None = None) -> list[Entry]:
        """Models that are at home in RAM, but for one."""
        return [each for each in self if each is not entry and each.movable.home == "cpu"]

    def idle(self, entry: Entry) -> int:
        """Bytes of other models that give way to one by themselves."""
        others = [each for each in self._others(entry) if each.room is None]
        return sum(each.movable.host_bytes() for each in others)

    def rest(self, entry: Entry) -> list[Entry]:
        """Have models that nobody uses give way to one; those that did not before."""
        rested = []
        for each in self._others(entry):
            if each.room is not None and not each.movable.in_use:
                each.room = None
                each.movable.offload("cpu")
                rested.append(each)
        return rested

    def give_way(self, movable: Movable) -> None:
        """Have all models keep nothing, since one waits for memory that they hold.

        Those in use go on a unit at a time until their next pass begins. What was given fitted by
        its bytes and did not in whole segments: that much less is given from now on.
        """
        if not self.sharing.acquire(blocking=False):
            return  # it is being shared out right now; who still waits then asks again
        try:
            self.store.trim()
            host = self.store.stats().host
            self.wasted = min(host.mapped_bytes - host.used_bytes, self.limit // 2)
            log.info(
                "%r waits for memory: models keep nothing until they are used next; %s of %s lie "
                "where no block has use for them",
                movable.model_id,
                format_size(self.wasted),
                format_size(self.limit),
            )
            for each in self._others():
                if each.room is None:
                    continue
                with suppress(Error, OSError, MemoryError):  # who waits hears what keeps it waiting
                    each.movable.offload("cpu")
                    each.room = None
        finally:
            self.sharing.release()

    def use(self, model_id: str) -> Usage:
        """How a model is used."""
        return self.store.usage(group_of(model_id), self._window)

    def describe(self, model_id: str, now: float) -> Model:
        """What is known of a model, registered or not, as the choice takes it."""
        use = self.use(model_id)
        seen: dict[str, Any] = {
            "last": use.last or None,
            "gap": use.gap or None,
            "next": use.next or None,
            "recent": use.recent,
        }
        entry = self._entries.get(model_id)
        if entry is None:
            return Model(model_id=model_id, busy=use.busy > 0, **seen)
        # What is idle and lies in a file is not in use any more: the store gives it up by itself.
        host = entry.movable.home_bytes()
        seconds, writes = self._cost(entry, host)
        return Model(
            model_id=model_id,
            host_bytes=host,
            missing_bytes=entry.movable.missing_bytes(),
            seconds_per_byte=seconds,
            writes=writes,
            busy=use.busy > 0 or entry.movable.in_use,
            moved=entry.moved,
            stays=entry.pause(now) or (self.stays(entry) if entry.target == "disk" else ""),
            **seen,
        )

    def _cost(self, entry: Entry, host_bytes: int) -> tuple[float | None, bool]:
        """Seconds to bring a byte back, and to write it where it has to be; and whether it has."""
        stats = self.store.stats()
        writes = False
        if not entry.has_origin:
            writes = self.store.group_stats(entry.movable.group).disk_bytes < host_bytes
        if stats.read_bytes < _MEASURED or (writes and stats.written_bytes < _MEASURED):
            return None, writes
        seconds = stats.read_busy_seconds / stats.read_bytes
        if writes:
            seconds += stats.write_busy_seconds / stats.written_bytes
        return seconds, writes
